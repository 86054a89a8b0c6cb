//! The dirty rate, measured with real writers: threads under write protection and by samples, a KVM guest by its log and
//! its ring, a VMM with one thread. What is checked are relations (no writer: nothing; so many pages: no more than those),
//! never how fast it went. And everything that can go wrong with a measurement.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;
#[path = "common/program.rs"]
mod program;

use std::path::Path;
use std::time::{Duration, Instant};

use common::{c_program, scratch, skip};
use program::Program;
use vmig::dirty::write_protect::WriteProtect;

const PAGE: u64 = 4096;
const SAMPLING: u32 = 0;
const BITMAP: u32 = 1;
const RING: u32 = 2;
/// States of a measurement.
const MEASURING: u64 = 1;
const MEASURED: u64 = 2;
const FAILED: u64 = 3;
/// What tests/c/tracked.c has.
const ALL: u64 = (24 << 20) + (8 << 20);

fn start(dir: &Path, program: &str, words: &[&str]) -> Program {
    let vmm = Program::start("vmm", dir, &c_program(program), words);
    assert_eq!(vmm.reply(), "ready");
    vmm
}

/// A number of a line of words `name=number`.
fn number(line: &str, name: &str) -> u64 {
    let found = line.split(' ').find_map(|word| word.strip_prefix(name)?.strip_prefix('=')?.parse().ok());
    found.unwrap_or_else(|| panic!("no {name} in '{line}'"))
}

/// What is known once the measurement is over.
fn result(vmm: &mut Program) -> String {
    let end = Instant::now() + program::MOVE;
    loop {
        let line = vmm.command("rate");
        if number(&line, "state") != MEASURING {
            return line;
        }
        if Instant::now() > end {
            vmm.fail(&format!("the measurement does not end: {line}"));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn measured(vmm: &mut Program, mode: u32, ms: u32) -> String {
    vmm.must(&format!("measure {mode} {ms}"));
    let line = result(vmm);
    assert_eq!((number(&line, "state"), number(&line, "mode")), (MEASURED, mode.into()), "{line}");
    assert_eq!(number(&line, "period"), u64::from(ms), "{line}");
    line
}

fn without_write_protect() -> bool {
    WriteProtect::new().is_err_and(|e| skip("userfaultfd", &e.to_string()))
}

fn writes(vmm: &mut Program) -> u64 {
    vmm.command("writes").strip_prefix("writes ").unwrap().parse().unwrap()
}

/// Measures until the guest wrote so much meanwhile that, by chance, no page of `pages` is likely to be left out.
fn measured_well(vmm: &mut Program, mode: u32, pages: u64) -> String {
    let mut ms = 400;
    loop {
        let before = writes(vmm);
        let line = measured(vmm, mode, ms);
        if writes(vmm) - before > 40 * pages || ms > 20_000 {
            return line;
        }
        ms *= 2;
    }
}

#[test]
fn who_writes_nothing_dirties_nothing() {
    if without_write_protect() {
        return;
    }
    let mut vmm = start(&scratch("rate"), "tracked", &["private"]);
    vmm.must("hot 0");
    vmm.must("pause");
    for mode in [SAMPLING, BITMAP] {
        let line = measured(&mut vmm, mode, 100);
        let found = ["rate", "set", "complete", "steady", "vcpus"].map(|name| number(&line, name));
        assert_eq!(found, [0, 0, 1, 1, 0], "{line}");
        // The spare block has content in its first half only.
        let content = number(&line, "content");
        assert!((24 << 20..=28 << 20).contains(&content), "{line}");
        let forecast = vmm.command("forecast 1000000");
        assert_eq!((number(&forecast, "verdict"), number(&forecast, "left")), (1, 0), "{forecast}");
        assert!(number(&forecast, "total") >= content * 1000, "{forecast}");
        assert!(vmm.command("forecast").contains("no bandwidth"));
    }
    vmm.quit();
}

#[test]
fn the_working_set_is_what_is_written() {
    if without_write_protect() {
        return;
    }
    for words in [&["private"][..], &["shared"], &["private", "marks"], &["private", "source"]] {
        let mut vmm = start(&scratch("rate"), "tracked", words);
        for pages in [1, 700] {
            vmm.must(&format!("hot {pages}"));
            let line = measured_well(&mut vmm, BITMAP, pages);
            assert_eq!(number(&line, "set"), pages * PAGE, "{words:?}: {line}");
            assert_eq!(number(&line, "vcpus"), 0);
            assert!(number(&line, "rate") > 0);
        }
        // A migration afterwards begins with all pages, whatever the measurement took from the trackers.
        vmm.must("pause");
        assert_eq!(number(&measured(&mut vmm, BITMAP, 50), "set"), 0, "{words:?}: a guest that stands still");
        vmm.quit();
    }
}

#[test]
fn samples_see_what_is_written_everywhere_and_nothing_else() {
    let mut vmm = start(&scratch("rate"), "tracked", &["private"]);
    let line = measured_well(&mut vmm, SAMPLING, 6144);
    let set = number(&line, "set");
    assert!(set > 0 && set <= 25 << 20, "{line}");
    assert_eq!(number(&line, "samples"), 512);
    vmm.must("measure 0 100 16384");
    assert_eq!(number(&result(&mut vmm), "samples"), 16384);
    vmm.quit();
}

#[test]
fn a_migration_after_a_measurement_loses_nothing() {
    if without_write_protect() {
        return;
    }
    let dir = scratch("rate");
    let mut vmm = start(&dir, "tracked", &["private"]);
    let mut destination = Program::start("destination", &dir, &c_program("tracked"), &["private", "incoming"]);
    assert_eq!(destination.reply(), "ready");
    for mode in [BITMAP, SAMPLING] {
        measured(&mut vmm, mode, 100);
    }
    destination.send("incoming tcp:127.0.0.1:0");
    let address = destination.listening();
    vmm.must("set max-bandwidth 40M");
    vmm.must(&format!("measure {BITMAP} 60000"));
    assert!(vmm.command(&format!("measure {BITMAP} 100")).contains("is being measured"));
    assert!(vmm.command("add other").contains("is being measured"), "what is measured stays");
    // A migration does not wait for a minute.
    vmm.must(&format!("migrate {address}"));
    let refused = vmm.command(&format!("measure {SAMPLING} 100"));
    assert!(refused.contains("cannot measure the dirty rate now"), "{refused}");
    let cut = result(&mut vmm);
    assert!(number(&cut, "state") == FAILED && cut.contains("a migration began"), "{cut}");
    assert!(vmm.command("forecast 1").contains("a migration began"));
    vmm.must("set max-bandwidth 0");
    vmm.must_end_in("completed");
    destination.must_end_in("completed");
    let arrived = destination.await_news("note arrived");
    assert_eq!(vmm.command("hash").strip_prefix("hash "), arrived.strip_prefix("note arrived "), "memory differs");
    let gone = vmm.command(&format!("measure {SAMPLING} 100"));
    assert!(gone.contains("the guest is not here"), "{gone}");
    // Who came is measured there; who waits for a guest is not.
    destination.must("pause");
    assert_eq!(number(&measured(&mut destination, BITMAP, 50), "set"), 0);
    destination.must(&format!("measure {SAMPLING} 60000"));
    vmm.quit();
    destination.quit();
}

#[test]
fn a_guest_is_freed_while_it_is_measured() {
    for (mode, words) in [(SAMPLING, &["private"][..]), (BITMAP, &["private", "source"])] {
        let mut vmm = start(&scratch("rate"), "tracked", words);
        vmm.must(&format!("measure {mode} 60000"));
        vmm.quit();
    }
}

#[test]
fn a_tracker_that_fails_fails_the_measurement() {
    for (fault, words) in
        [("fail-start", "source"), ("fail-sync", "source"), ("fail-clear", "clear"), ("lie", "source")]
    {
        let mut vmm = start(&scratch("rate"), "tracked", &["private", words]);
        vmm.must(&format!("{fault} 2"));
        let mut failed = false;
        for _ in 0..3 {
            vmm.must(&format!("measure {BITMAP} 100"));
            let line = result(&mut vmm);
            failed |= number(&line, "state") == FAILED && line.contains("device's");
        }
        assert!(failed, "{fault}");
        measured(&mut vmm, BITMAP, 50);
        vmm.quit();
    }
}

/// The rates of the vCPUs, which are none but with rings.
fn vcpus(line: &str) -> Vec<u64> {
    (0..number(line, "vcpus")).map(|n| number(line, &format!("vcpu.{n}"))).collect()
}

#[test]
fn a_kvm_guest_is_measured_by_log_and_ring() {
    if common::without_kvm() {
        return;
    }
    for (words, mode) in [(&[][..], BITMAP), (&["hook"], BITMAP), (&["ring=4096"], BITMAP), (&["ring=1024"], RING)] {
        let dir = scratch("rate");
        let mut vmm = Program::start("vmm", &dir, &c_program("slots"), words);
        let ready = vmm.reply();
        if ready != "ready" && skip("kvm", &format!("{words:?}: {ready}")) {
            continue;
        }
        let line = measured(&mut vmm, mode, 400);
        let (rate, set, rates) = (number(&line, "rate"), number(&line, "set"), vcpus(&line));
        assert!(rate > 0 && set > 0, "{words:?}: {line}");
        match words.iter().any(|word| word.starts_with("ring")) {
            // The one vCPU wrote every page of the set, some of them again after its ring was emptied.
            true => assert!(rates.len() == 1 && rates[0] * 2 > set, "{words:?}: {line}"),
            false => assert!(rates.is_empty(), "{words:?}"),
        }
        if rates.is_empty() {
            let refused = vmm.command(&format!("measure {RING} 100"));
            assert!(refused.contains("KVM_CAP_DIRTY_LOG_RING"), "{refused}");
        }
        vmm.must("pause");
        let line = measured(&mut vmm, mode, 100);
        assert_eq!((number(&line, "set"), vcpus(&line).iter().sum::<u64>()), (0, 0), "{words:?}: {line}");
        let line = measured(&mut vmm, SAMPLING, 50);
        assert_eq!((number(&line, "set"), number(&line, "vcpus")), (0, 0), "{line}");
        vmm.must("resume");
        vmm.quit();
    }
}

#[test]
fn a_vmm_with_one_thread_is_measured_between_its_loops() {
    let dir = scratch("rate");
    let mut vmm = Program::start("vmm", &dir, &c_program("single"), &["guest"]);
    let line = measured(&mut vmm, BITMAP, 200);
    assert!(number(&line, "set") > 0, "{line}");
    assert_eq!(number(&measured(&mut vmm, SAMPLING, 50), "samples"), 512);
    vmm.must(&format!("measure {BITMAP} 60000"));
    let mut other = Program::start("other", &dir, &c_program("single"), &["empty"]);
    // Every turn of its loop dirties all it has: whether it converges is not the question here.
    vmm.must("set downtime-limit 10000");
    other.send("incoming tcp:127.0.0.1:0");
    let address = other.listening();
    vmm.must(&format!("migrate {address}"));
    let cut = result(&mut vmm);
    assert!(number(&cut, "state") == FAILED && cut.contains("a migration began"), "{cut}");
    vmm.must_end_in("completed");
    other.must_end_in("completed");
    vmm.quit();
    // Freed while it is measured, with callbacks that wait for the loop.
    other.must(&format!("measure {BITMAP} 60000"));
    other.quit();
}

/// QEMU's words, and its way to tell.
#[test]
fn qmp_measures_too() {
    if without_write_protect() {
        return;
    }
    let mut vmm = start(&scratch("rate"), "tracked", &["private"]);
    let mut ask = |line: &str| -> serde_json::Value {
        let answer = vmm.command(&format!("qmp {line}"));
        serde_json::from_str(answer.strip_prefix("value ").unwrap()).unwrap()
    };
    let none = ask(r#"{"execute": "query-dirty-rate"}"#);
    assert_eq!((&none["return"]["status"], none["return"].get("dirty-rate")), (&"unstarted".into(), None));
    for (arguments, words) in [
        (r#"{"calc-time": 61}"#, "out of range [50ms, 60000ms]"),
        (r#"{"calc-time": 49, "calc-time-unit": "millisecond"}"#, "out of range"),
        (r#"{"calc-time": 1, "sample-pages": 127}"#, "sample-pages is out of range"),
        (r#"{"calc-time": 1, "sample-pages": 512, "mode": "dirty-bitmap"}"#, "only in page-sampling mode"),
        (r#"{"calc-time": 1, "mode": "dirty-ring"}"#, "KVM_CAP_DIRTY_LOG_RING"),
    ] {
        let answer = ask(&format!(r#"{{"execute": "calc-dirty-rate", "arguments": {arguments}}}"#));
        assert!(answer["error"]["desc"].as_str().unwrap().contains(words), "{arguments}: {answer}");
    }
    for (mode, samples) in [("page-sampling", 512), ("dirty-bitmap", 0)] {
        let arguments = format!(r#"{{"calc-time": 1000, "calc-time-unit": "millisecond", "mode": "{mode}"}}"#);
        assert_eq!(
            ask(&format!(r#"{{"execute": "calc-dirty-rate", "arguments": {arguments}}}"#))["return"]
                .as_object()
                .unwrap()
                .len(),
            0
        );
        let end = Instant::now() + program::MOVE;
        let found = loop {
            let found = ask(r#"{"execute": "query-dirty-rate"}"#)["return"].take();
            if found["status"] == "measured" {
                break found;
            }
            assert!(
                found["status"] == "measuring" && found.get("dirty-rate").is_none() && Instant::now() < end,
                "{found}"
            );
            std::thread::sleep(Duration::from_millis(20));
        };
        assert_eq!((&found["mode"], &found["sample-pages"]), (&mode.into(), &samples.into()), "{found}");
        assert_eq!((&found["calc-time"], &found["calc-time-unit"]), (&1.into(), &"second".into()), "{found}");
        assert!(
            found["dirty-rate"].as_u64().unwrap() <= ALL >> 20 && found["start-time"].as_u64().is_some(),
            "{found}"
        );
        let again = ask(r#"{"execute": "query-dirty-rate", "arguments": {"calc-time-unit": "millisecond"}}"#);
        assert_eq!(again["return"]["calc-time"], 1000);
    }
    vmm.quit();
}
