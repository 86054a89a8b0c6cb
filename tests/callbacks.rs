//! Callbacks that fail, cancel and ask for what they may not have, at every call; with each kind of big lock, and with a
//! vCPU that keeps taking it.

mod common;

use std::process::Command;

/// Runs a case of tests/c/callbacks.c with the library's lock, with the VMM's own, and with the VMM's own and `held`;
/// each with an idle big lock and with a busy one. Returns what was printed.
fn case(name: &str) -> String {
    let mut printed = String::new();
    for lock in ["0", "1", "2"] {
        for greedy in ["0", "1"] {
            let mut command = Command::new("timeout");
            command.args(["-k", "5", "240"]).arg(common::c_program("callbacks")).args([name, lock, greedy]);
            let out = common::run(&mut command);
            let text = common::words(&out);
            assert!(text.ends_with(&format!("{name} done\n")), "{lock} {greedy}: {text}");
            printed.push_str(&text);
        }
    }
    println!("{printed}");
    printed
}

/// In how many migrations the callback that was to do something did it, in the least of the runs.
fn hits(printed: &str) -> usize {
    let hit = |line: &str| line.strip_suffix(" calls hit")?.parse::<usize>().ok();
    printed.lines().filter_map(hit).min().expect("each run counts its hits")
}

#[test]
fn every_callback_may_fail_at_every_call() {
    let hits = hits(&case("fail"));
    assert!(hits >= 25, "only {hits} calls failed");
}

#[test]
fn every_callback_may_cancel() {
    let hits = hits(&case("cancel"));
    assert!(hits >= 28, "only {hits} calls cancelled");
}

#[test]
fn hooks_and_handlers_cannot_stop_start_or_register() {
    case("reenter");
}

#[test]
fn threads_are_listed_with_real_ids() {
    case("threads");
}

#[test]
fn cancel_works_in_every_state() {
    assert!(case("cancel-states").contains("cancel in active (destination): "));
}

#[test]
fn a_users_pause_travels() {
    case("pause");
}

#[test]
fn nothing_is_registered_while_a_migration_runs() {
    case("busy");
}

#[test]
fn blockers_block_and_say_why() {
    case("blockers");
}

#[test]
fn events_tell_every_state_in_order() {
    case("events");
}

#[test]
fn the_big_lock_is_counted() {
    case("stats");
}
