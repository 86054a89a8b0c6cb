//! Memory that the VMM unmapped behind the library's back, with every reader there is: it is an error that names the block,
//! and the guest runs on. What is sent is in tests/tracked.rs.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;
#[path = "common/program.rs"]
mod program;

use common::{c_program, scratch, skip};
use program::Program;
use std::path::Path;
use std::time::{Duration, Instant};
use vmig::dirty::write_protect::WriteProtect;

const SAMPLING: u32 = 0;
const BITMAP: u32 = 1;
const RING: u32 = 2;
/// "state=" of a measurement.
const MEASURING: &str = "state=1";
const MEASURED: &str = "state=2";
const FAILED: &str = "state=3";

/// A guest, how it is tracked, and what of it goes.
struct Case {
    program: &'static str,
    words: &'static [&'static str],
    tracker: &'static str,
    /// What tells how much the guest wrote.
    life: &'static str,
    block: &'static str,
    /// Parts that go.
    unmap: &'static [&'static str],
    ring: bool,
}

const TRACKED: Case = Case {
    program: "tracked",
    words: &["private"],
    tracker: "write-protect",
    life: "writes",
    block: "spare",
    unmap: &["unmap 2", "unmap 4"],
    ring: false,
};
const SLOTS: Case = Case {
    program: "slots",
    words: &[],
    tracker: "kvm-log",
    life: "batches",
    block: "rom",
    unmap: &["unmap"],
    ring: false,
};

fn cases() -> Vec<Case> {
    let mut cases = vec![
        Case { words: &["private", "marks"], tracker: "callback", ..TRACKED },
        Case { words: &["shared", "marks"], tracker: "callback", ..TRACKED },
        Case { words: &["shared", "clear"], tracker: "callback", ..TRACKED },
    ];
    if !WriteProtect::new().is_err_and(|e| skip("userfaultfd", &e.to_string())) {
        cases.push(TRACKED);
        cases.push(Case { words: &["shared"], ..TRACKED });
    }
    if !common::without_kvm() {
        cases.push(SLOTS);
        cases.push(Case { words: &["ring=4096"], tracker: "kvm-ring", ring: true, ..SLOTS });
    }
    cases
}

/// Starts it; none, with the skip counted, where KVM has no rings.
fn start(case: &Case, dir: &Path, name: &str) -> Option<Program> {
    let mut vmm = Program::start(name, dir, &c_program(case.program), case.words);
    let ready = vmm.reply();
    if ready != "ready" && case.ring && skip("kvm", &ready) {
        return None;
    }
    assert_eq!(ready, "ready");
    vmm.must(&format!("set dirty-tracker {}", case.tracker));
    Some(vmm)
}

/// The guest runs: it writes more.
fn runs(case: &Case, vmm: &mut Program) {
    let count = |vmm: &mut Program| vmm.command(case.life).split(' ').nth(1).unwrap().parse::<u64>().unwrap();
    let (goal, end) = (count(vmm) + 20, Instant::now() + program::REPLY);
    while count(vmm) < goal {
        if Instant::now() > end {
            vmm.fail("the guest stands still");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn result(vmm: &mut Program) -> String {
    let end = Instant::now() + program::MOVE;
    loop {
        let line = vmm.command("rate");
        if !line.contains(MEASURING) {
            return line;
        }
        if Instant::now() > end {
            vmm.fail("the measurement does not end");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// What is said of it.
fn is_named(case: &Case, said: &str) {
    let what = format!("a part of RAM block '{}' at or after offset", case.block);
    assert!(
        said.contains(&what) && said.contains("is not mapped any more"),
        "{} {:?}: {said}",
        case.tracker,
        case.words
    );
}

#[test]
fn a_measurement_of_what_is_gone_fails() {
    for case in cases() {
        let dir = scratch("unmapped");
        for unmap in case.unmap {
            let Some(mut vmm) = start(&case, &dir, "vmm") else { continue };
            vmm.must(unmap);
            for mode in [SAMPLING, BITMAP, RING].into_iter().take(if case.ring { 3 } else { 2 }) {
                vmm.must(&format!("measure {mode} 50"));
                let line = result(&mut vmm);
                assert!(line.contains(FAILED), "{unmap}, mode {mode}: {line}");
                is_named(&case, &line);
            }
            runs(&case, &mut vmm);
            vmm.quit();
        }
    }
}

/// Who samples looks again; trackers that do not look may say what they know.
#[test]
fn memory_that_goes_while_it_is_measured_harms_nobody() {
    for case in cases() {
        let dir = scratch("unmapped");
        for unmap in case.unmap {
            for mode in [SAMPLING, BITMAP, RING].into_iter().take(if case.ring { 3 } else { 2 }) {
                let Some(mut vmm) = start(&case, &dir, "vmm") else { continue };
                vmm.must(&format!("measure {mode} 1000"));
                // It has begun by then, or it was as above.
                std::thread::sleep(Duration::from_millis(100));
                vmm.must(unmap);
                let line = result(&mut vmm);
                if mode == SAMPLING || line.contains(FAILED) {
                    is_named(&case, &line);
                } else {
                    assert!(line.contains(MEASURED), "{line}");
                }
                runs(&case, &mut vmm);
                vmm.quit();
            }
        }
    }
}

/// Where a guest is waited for there is none to harm, but a VMM.
#[test]
fn nobody_arrives_where_memory_is_gone() {
    for multifd in ["on", "off"] {
        let dir = scratch("unmapped");
        let case = Case { words: &["private", "marks"], tracker: "callback", ..TRACKED };
        let mut source = start(&case, &dir, "source").unwrap();
        source.must(&format!("set multifd {multifd}"));
        for unmap in case.unmap {
            let words = ["private", "incoming"];
            let mut destination = Program::start("destination", &dir, &c_program(case.program), &words);
            assert_eq!(destination.reply(), "ready");
            destination.must(unmap);
            leaves(&mut source, &mut destination);
            stays(&case, &mut source, destination);
        }
        source.quit();
    }
}

/// A guest sets out to a destination.
fn leaves(source: &mut Program, destination: &mut Program) {
    destination.send("incoming tcp:127.0.0.1:0");
    let address = destination.listening();
    source.must(&format!("migrate {address}"));
}

/// It does not arrive, both sides know why, and it runs.
fn stays(case: &Case, source: &mut Program, mut destination: Program) {
    source.must_end_in("failed");
    destination.must_end_in("failed");
    is_named(case, &destination.command("error"));
    is_named(case, &source.command("error"));
    runs(case, source);
    destination.quit();
}

#[test]
fn memory_that_goes_while_a_guest_arrives_is_named() {
    for multifd in ["on", "off"] {
        let dir = scratch("unmapped");
        let case = Case { words: &["private", "marks"], tracker: "callback", ..TRACKED };
        let mut source = start(&case, &dir, "source").unwrap();
        source.must(&format!("set multifd {multifd}"));
        source.must("set max-bandwidth 4M");
        let mut destination = Program::start("destination", &dir, &c_program(case.program), &["private", "incoming"]);
        assert_eq!(destination.reply(), "ready");
        leaves(&mut source, &mut destination);
        let end = Instant::now() + program::MOVE;
        while destination.status("normal") == 0 {
            assert!(Instant::now() < end, "nothing arrives");
        }
        destination.must("unmap 0");
        source.must("set max-bandwidth 0");
        stays(&case, &mut source, destination);
        source.quit();
    }
}

/// It was sent and not written since, so that nobody looks at it again but who hashes all of memory.
#[test]
fn what_is_gone_is_not_hashed() {
    for case in cases() {
        let dir = scratch("unmapped");
        for unmap in case.unmap {
            let Some(mut source) = start(&case, &dir, "source") else { continue };
            let words: &[&str] = if case.program == "slots" { &["incoming"] } else { &[case.words[0], "incoming"] };
            let mut destination = Program::start("destination", &dir, &c_program(case.program), words);
            assert_eq!(destination.reply(), "ready");
            destination.send("incoming tcp:127.0.0.1:0");
            let address = destination.listening();
            for option in ["verify on", "max-bandwidth 20M", "downtime-limit 1"] {
                source.must(&format!("set {option}"));
            }
            source.must(&format!("migrate {address}"));
            let end = Instant::now() + program::MOVE;
            while source.status("iteration") < 2 {
                if Instant::now() > end || source.status_text("over") == "1" {
                    let why = source.command("error");
                    source.fail(&format!("the migration does not get going: {why}"));
                }
                std::thread::sleep(Duration::from_millis(5));
            }
            source.must(unmap);
            source.must("set max-bandwidth 0");
            source.must("set downtime-limit 10000");
            source.must_end_in("failed");
            destination.must_end_in("failed");
            let said = source.command("error");
            is_named(&case, &said);
            runs(&case, &mut source);
            source.quit();
            destination.quit();
        }
    }
}
