//! Device tables and custom sections between two processes, of the same release and of different ones.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;
#[path = "common/program.rs"]
mod program;

use common::{c_program, scratch};
use program::Program;
use std::path::Path;

fn start(dir: &Path, name: &str, args: &[&str]) -> Program {
    let program = Program::start(name, dir, &c_program("sections"), args);
    assert_eq!(program.reply(), "ready");
    program
}

/// Source, destination and where it listens.
fn pair(dir: &Path, source: &[&str], destination: &[&str]) -> (Program, Program, String) {
    let source = start(dir, "source", source);
    let mut destination = start(dir, "destination", &[&["incoming"], destination].concat());
    destination.must("set autostart off"); // so that its state stays what arrived
    destination.send("incoming tcp:127.0.0.1:0");
    let address = destination.listening();
    (source, destination, address)
}

/// A migration that goes well, and what both sides have after it.
fn moves(source: &mut Program, destination: &mut Program, address: &str) -> (String, String) {
    source.must(&format!("migrate {address}"));
    source.must_end_in("completed");
    destination.must_end_in("completed");
    (source.command("digest"), destination.command("digest"))
}

fn word<'a>(line: &'a str, key: &str) -> &'a str {
    line.split(' ').find_map(|w| w.strip_prefix(key)?.strip_prefix('=')).unwrap()
}

#[test]
fn all_kinds_and_much_state_arrive() {
    let dir = scratch("kinds");
    let (mut source, mut destination, address) = pair(&dir, &[], &[]);
    assert_ne!(word(&source.command("digest"), "all"), word(&destination.command("digest"), "all"));
    // However fast the connection, and however slow the machine.
    source.must("set avail-switchover-bandwidth 64M");
    source.must("set convergence-time 60000");
    let (here, there) = moves(&mut source, &mut destination, &address);
    for key in ["all", "a", "b", "bulk0", "bulk1"] {
        assert_eq!(word(&here, key), word(&there, key), "{key} of\n{here}\n{there}");
    }
    // A part that was not sent leaves the default.
    assert_eq!((word(&here, "option"), word(&there, "option")), ("33", "5"));
    assert_eq!(destination.news("note"), ["note early before RAM", "note grown version 2"]);
    // 64 MiB went in many bodies while the machine ran; what was left for the stop is little.
    let sent = source.command("bulk");
    let numbers: Vec<u32> = sent.split(' ').skip(1).map(|n| n.parse().unwrap()).collect();
    assert!(numbers[0] > 4 && numbers[1] < 32 << 20, "{sent}");
    source.quit();
    destination.quit();
}

#[test]
fn a_needed_part_travels() {
    let dir = scratch("part");
    let (mut source, mut destination, address) = pair(&dir, &[], &[]);
    source.must("option on");
    let (here, there) = moves(&mut source, &mut destination, &address);
    assert_eq!((word(&here, "option"), word(&there, "option")), ("33", "33"));
    source.quit();
    destination.quit();
}

#[test]
fn a_new_program_takes_what_an_old_one_sends() {
    let dir = scratch("old-new");
    let (mut source, mut destination, address) = pair(&dir, &["old"], &[]);
    let (here, there) = moves(&mut source, &mut destination, &address);
    for key in ["all", "a", "bulk0", "bulk1"] {
        assert_eq!(word(&here, key), word(&there, key), "{key} of\n{here}\n{there}");
    }
    assert_eq!((word(&there, "b"), word(&there, "option")), ("77", "5"));
    assert!(destination.news("note").contains(&"note grown version 1".to_owned()));
    source.quit();
    destination.quit();
}

/// What a migration that must not happen says on both sides.
fn refused(source: &mut Program, destination: &mut Program, address: &str) -> String {
    source.must(&format!("migrate {address}"));
    source.must_end_in("failed");
    destination.must_end_in("failed");
    let (here, there) = (source.command("error"), destination.command("error"));
    format!("{here}\n{there}")
}

#[test]
fn an_old_program_refuses_what_a_new_one_sends() {
    let dir = scratch("new-old");
    let (mut source, mut destination, address) = pair(&dir, &[], &["old"]);
    let why = refused(&mut source, &mut destination, &address);
    // Everything that does not fit at once, on both sides, before anything was loaded.
    for line in why.lines() {
        assert!(line.contains("'grown'") && line.contains("'bulk'") && line.contains("hello"), "{line}");
    }
    assert_eq!(destination.news("note"), [""; 0]);
    source.quit();
    destination.quit();
}

#[test]
fn a_section_only_one_side_has_is_named() {
    for (here, there) in [(&["extra"][..], &[][..]), (&[], &["extra"])] {
        let dir = scratch("extra");
        let (mut source, mut destination, address) = pair(&dir, here, there);
        let why = refused(&mut source, &mut destination, &address);
        assert!(why.lines().all(|line| line.contains("'extra'")), "{why}");
        source.quit();
        destination.quit();
    }
}

/// A load that does not read exactly its body: the section and where in it, on both sides.
#[test]
fn a_body_read_wrongly_is_named() {
    for (bytes, words) in [("-2", "leaves 2 bytes unread, from byte 0x12"), ("2", "reads 7 bytes at byte 0xf")] {
        let dir = scratch("misread");
        let (mut source, mut destination, address) = pair(&dir, &[], &[]);
        destination.must(&format!("misread {bytes}"));
        let why = refused(&mut source, &mut destination, &address);
        for line in why.lines() {
            assert!(line.contains("'plain'") && line.contains(words), "{line}");
        }
        source.quit();
        destination.quit();
    }
}
