//! The order of a switchover, and what must be true at each of its steps, seen from C programs on both sides.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;
#[path = "common/program.rs"]
mod program;

use common::{c_program, scratch};
use program::Program;
use std::path::Path;

fn start(dir: &Path, name: &str, args: &[&str]) -> Program {
    let program = Program::start(name, dir, &c_program("discipline"), args);
    assert_eq!(program.reply(), "ready");
    program
}

fn pair(dir: &Path) -> (Program, Program, String) {
    let source = start(dir, "source", &[]);
    let mut destination = start(dir, "destination", &["incoming"]);
    destination.send("incoming tcp:127.0.0.1:0");
    let address = destination.listening();
    (source, destination, address)
}

fn counter(program: &mut Program) -> u64 {
    program.command("counter").strip_prefix("counter ").unwrap().parse().unwrap()
}

/// The guest runs: its counter moves.
fn runs(program: &mut Program) {
    let before = counter(program);
    let end = std::time::Instant::now() + program::REPLY;
    while counter(program) == before {
        if std::time::Instant::now() > end {
            program.fail("the guest stands still");
        }
    }
}

/// A further migration is whole: what the destination began with is what the source ended with.
fn moves_well(dir: &Path, source: &mut Program) {
    let mut destination = start(dir, "next", &["incoming"]);
    destination.send("incoming tcp:127.0.0.1:0");
    let address = destination.listening();
    source.must(&format!("migrate {address}"));
    source.must_end_in("completed");
    same(source, &destination);
    runs(&mut destination);
    destination.quit();
}

fn same(source: &mut Program, destination: &Program) {
    let arrived = destination.await_news("hashed");
    assert_eq!(source.command("hash").strip_prefix("hash"), arrived.strip_prefix("hashed"));
}

#[test]
fn everything_comes_in_the_order_of_the_switchover() {
    let dir = scratch("order");
    let (mut source, mut destination, address) = pair(&dir);
    source.forget_news();
    source.must(&format!("migrate {address}"));
    source.must_end_in("completed");
    destination.must_end_in("completed");
    same(&mut source, &destination);
    let handlers = |order: [i32; 3], what: &str| order.map(|p| format!("note handler {p} {what} bql"));
    let mut wanted: Vec<String> = Vec::new();
    let mut add = |lines: &[&str]| wanted.extend(lines.iter().map(|l| format!("note {l}")));
    add(&["notes prepare bql", "notes setup bql", "early pre_save bql", "early post_save bql", "stop"]);
    wanted.extend(handlers([100, 7, -5], "prepare-stop"));
    wanted.extend(handlers([100, 7, -5], "stopped"));
    let mut add = |lines: &[&str]| wanted.extend(lines.iter().map(|l| format!("note {l}")));
    add(&["notes complete bql", "first pre_save bql", "first post_save bql", "middle pre_save bql"]);
    add(&["middle post_save bql", "last pre_save bql", "last post_save bql", "notes cleanup bql"]);
    assert_eq!(source.news("note"), wanted);
    // Devices of higher priority are also set up first; `early` has the lowest of all.
    let mut wanted: Vec<String> = Vec::new();
    let mut add = |lines: &[&str]| wanted.extend(lines.iter().map(|l| format!("note {l}")));
    add(&["notes load_setup bql", "notes load-start bql", "early post_load bql", "notes load-end bql"]);
    add(&["first post_load bql", "middle post_load bql", "last post_load bql", "notes load_cleanup ok bql"]);
    wanted.extend(handlers([-5, 7, 100], "prepare-start"));
    wanted.extend(handlers([-5, 7, 100], "starting"));
    wanted.push("note start".into());
    assert_eq!(destination.news("note"), wanted);
    runs(&mut destination);
    source.quit();
    destination.quit();
}

/// The check that devices see the final RAM can fail: bytes written at the stop and not reported do not travel.
#[test]
fn what_is_not_reported_is_missed_while_loading() {
    let dir = scratch("forgotten");
    let (mut source, mut destination, address) = pair(&dir);
    source.must("forget-mark on");
    source.must(&format!("migrate {address}"));
    source.must_end_in("failed");
    destination.must_end_in("failed");
    let why = source.command("error");
    assert!(why.contains("notes") && why.contains("load") && why.contains("destination"), "{why}");
    assert!(destination.errors().contains("saw old RAM"), "{}", destination.errors());
    assert_eq!(destination.news("note start"), [""; 0]);
    runs(&mut source);
    source.must("forget-mark off");
    moves_well(&dir, &mut source);
    source.quit();
    destination.quit();
}

/// A device that writes after the stop is named by block and offset, and the guest runs on.
#[test]
fn a_device_that_does_not_stop_fails_the_attempt() {
    let dir = scratch("rogue");
    let (mut source, mut destination, address) = pair(&dir);
    source.must("rogue on");
    source.must(&format!("migrate {address}"));
    source.must_end_in("failed");
    destination.must_end_in("failed");
    let why = source.command("error");
    let offset = (8 << 20) - 64 * 4096 + 9 * 4096;
    assert!(why.contains("'ram.b'") && why.contains(&format!("{offset:#x}")), "{why}");
    assert!(why.contains("\"phase\":\"complete\""), "{why}");
    assert_eq!(destination.news("note start"), [""; 0]);
    runs(&mut source);
    source.must("rogue off");
    moves_well(&dir, &mut source);
    source.quit();
    destination.quit();
}

/// A stop handler that fails: those told of the stop are told of a start, in reverse, and the guest runs on.
#[test]
fn a_failing_stop_handler_fails_the_attempt() {
    let dir = scratch("handler");
    let (mut source, mut destination, address) = pair(&dir);
    source.must("fail-handler 7");
    source.forget_news();
    source.must(&format!("migrate {address}"));
    source.must_end_in("failed");
    let why = source.command("error");
    assert!(why.contains("No such device") && why.contains("\"phase\":\"stop\""), "{why}");
    let notes = source.news("note handler");
    let wanted: Vec<String> = [
        "100 prepare-stop",
        "7 prepare-stop",
        "-5 prepare-stop",
        "100 stopped",
        "7 stopped",
        "-5 prepare-start",
        "7 prepare-start",
        "100 prepare-start",
        "100 starting",
    ]
    .map(|l| format!("note handler {l} bql"))
    .into();
    assert_eq!(notes, wanted);
    runs(&mut source);
    source.must("fail-handler 0");
    moves_well(&dir, &mut source);
    source.quit();
    destination.must_end_in("failed");
    destination.quit();
}
