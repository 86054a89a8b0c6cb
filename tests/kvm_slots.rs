//! KVM's dirty log through slots that overlap, start anywhere, are read-only, or change behind the library's back.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;
#[path = "common/program.rs"]
mod program;

use common::{c_program, scratch, without_kvm};
use program::Program;
use std::path::Path;

fn start(dir: &Path, name: &str, args: &[&str]) -> Program {
    let program = Program::start(name, dir, &c_program("slots"), args);
    assert_eq!(program.reply(), "ready");
    program
}

fn batches(program: &mut Program) -> u64 {
    program.command("batches").strip_prefix("batches ").unwrap().parse().unwrap()
}

/// The guest runs: it wrote more.
fn runs(program: &mut Program) {
    let goal = batches(program) + 20;
    let end = std::time::Instant::now() + program::REPLY;
    while batches(program) < goal {
        if std::time::Instant::now() > end {
            program.fail("the guest stands still");
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

fn waiting(dir: &Path) -> (Program, String) {
    let mut destination = start(dir, "destination", &["incoming"]);
    destination.send("incoming tcp:127.0.0.1:0");
    let address = destination.listening();
    (destination, address)
}

/// Starts a migration that does not end before the bandwidth is set free.
fn slow(source: &mut Program, address: &str) {
    source.must("set max-bandwidth 4M");
    source.must(&format!("migrate {address}"));
    let end = std::time::Instant::now() + program::MOVE;
    while source.status_text("state") != "active" {
        if std::time::Instant::now() > end {
            source.fail("the migration does not get going");
        }
    }
}

/// A whole migration: what the destination began with is what the source ended with.
fn moves_well(dir: &Path, source: &mut Program) {
    let (mut destination, address) = waiting(dir);
    source.must("set max-bandwidth 0");
    source.must(&format!("migrate {address}"));
    arrives_well(source, &mut destination);
}

fn arrives_well(source: &mut Program, destination: &mut Program) {
    source.must_end_in("completed");
    destination.must_end_in("completed");
    let arrived = destination.await_news("hashed");
    assert_eq!(source.command("hash").strip_prefix("hash"), arrived.strip_prefix("hashed"), "memory differs");
    assert_eq!(source.command("logging"), "logging off");
    runs(destination);
}

#[test]
fn memory_is_whole_through_any_slots() {
    if without_kvm() {
        return;
    }
    for hook in [false, true] {
        let dir = scratch("slots");
        let mut source = start(&dir, "source", if hook { &["hook"] } else { &[] });
        runs(&mut source);
        assert_eq!(source.command("logging"), "logging off");
        let (mut destination, address) = waiting(&dir);
        slow(&mut source, &address);
        assert_eq!(source.command("logging"), "logging on");
        source.must("flash 1");
        runs(&mut source);
        source.must("flash 2");
        source.must("set max-bandwidth 0");
        arrives_well(&mut source, &mut destination);
        // Six slots, each switched on and off by the hook if there is one, else by the library.
        assert_eq!(source.command("switched"), if hook { "switched 12" } else { "switched 0" });
        source.quit();
        destination.quit();
    }
}

#[test]
fn logging_is_off_after_every_end() {
    if without_kvm() {
        return;
    }
    for hook in [false, true] {
        let dir = scratch("ends");
        let mut source = start(&dir, "source", if hook { &["hook"] } else { &[] });
        for end in ["cancelled", "failed"] {
            let (mut destination, address) = waiting(&dir);
            slow(&mut source, &address);
            assert_eq!(source.command("logging"), "logging on");
            match end {
                "cancelled" => source.must("cancel"),
                _ => destination.kill(),
            }
            source.must_end_in(end);
            assert_eq!(source.command("logging"), "logging off", "after a migration that {end}");
            runs(&mut source);
        }
        moves_well(&dir, &mut source);
        source.quit();
    }
}

/// How a slot is changed during a migration, and what must come of it: an error with these words, or no harm.
const TAMPERED: [(&str, u32, Option<&str>); 6] = [
    ("off", 2, Some("no dirty log")),
    ("gone", 4, Some("no dirty log")),
    ("smaller", 3, Some("it has another size now")),
    ("larger", 4, Some("it is larger now")),
    ("again", 1, None),
    ("again", 3, None),
];

#[test]
fn a_slot_changed_behind_our_back_is_named_or_harmless() {
    if without_kvm() {
        return;
    }
    for (how, slot, words) in TAMPERED {
        let dir = scratch("tamper");
        let mut source = start(&dir, "source", &[]);
        let (mut destination, address) = waiting(&dir);
        slow(&mut source, &address);
        runs(&mut source);
        source.must(&format!("{how} {slot}"));
        runs(&mut source);
        source.must("set max-bandwidth 0");
        match words {
            None => arrives_well(&mut source, &mut destination),
            Some(words) => {
                source.must_end_in("failed");
                destination.must_end_in("failed");
                let why = source.command("error");
                let block = "RAM block 'main'";
                // What is found first, at a read of the log or while clearing it, depends on the moment.
                let found = why.contains(words) || why.contains("KVM_CLEAR_DIRTY_LOG") || why.contains("any more");
                assert!(found && why.contains(block) && why.contains(&format!("slot {slot}")), "{how} {slot}: {why}");
                runs(&mut source);
                if how != "off" {
                    source.must(&format!("back {slot}"));
                }
                assert_eq!(source.command("logging"), "logging off", "{how} {slot}");
                moves_well(&dir, &mut source);
            }
        }
        source.quit();
    }
}

/// The library does not bring a slot back to life that the VMM deleted.
#[test]
fn a_deleted_slot_stays_deleted() {
    if without_kvm() {
        return;
    }
    let dir = scratch("deleted");
    let mut source = start(&dir, "source", &[]);
    let (_destination, address) = waiting(&dir);
    slow(&mut source, &address);
    source.must("gone 5");
    source.must("set max-bandwidth 0");
    source.must_end_in("failed");
    assert!(source.command("error").contains("'rom'"));
    assert_eq!(source.command("present 5"), "present no");
    source.quit();
}

#[test]
fn ram_that_nobody_tracks_is_refused_by_name() {
    if without_kvm() {
        return;
    }
    let dir = scratch("untracked");
    let mut source = start(&dir, "source", &[]);
    let (_destination, address) = waiting(&dir);
    source.must("forget 2");
    source.must(&format!("migrate {address}"));
    source.must_end_in("failed");
    let why = source.command("error");
    // Slot 4 shows a part of what slot 2 did: the hole begins behind it.
    let hole = (37 + 64 * 20 + 11) * 4096;
    assert!(why.contains("RAM block 'main'") && why.contains(&format!("{hole:#x}")), "{why}");
    assert_eq!(source.command("logging"), "logging off");
    runs(&mut source);
    source.must("register 2");
    moves_well(&dir, &mut source);
    source.quit();
}
