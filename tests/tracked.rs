//! Processes without KVM move while their threads write, by every tracker that needs no KVM: what arrives is what the
//! source had when it stopped. And everything that can go wrong with a tracker fails the migration, not the guest.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;
#[path = "common/program.rs"]
mod program;

use common::{c_program, scratch, skip};
use program::Program;
use std::path::Path;
use vmig::dirty::write_protect::WriteProtect;

/// Starts tests/c/tracked.c; none, with the skip counted, where there is no such memory.
fn start(dir: &Path, name: &str, words: &[&str]) -> Program {
    let program = Program::start(name, dir, &c_program("tracked"), words);
    assert_eq!(program.reply(), "ready");
    program
}

fn without_huge_pages() -> bool {
    let free = std::fs::read_to_string("/proc/meminfo").unwrap();
    let line = free.lines().find_map(|l| l.strip_prefix("HugePages_Free:")).unwrap_or("0").trim().to_owned();
    // Two processes of 32 MiB.
    line.parse::<usize>().unwrap_or(0) < 32 && skip("hugetlb", &format!("{line} huge pages are free, 32 are needed"))
}

fn without_write_protect() -> bool {
    WriteProtect::new().is_err_and(|e| skip("userfaultfd", &e.to_string()))
}

/// A destination with memory of the same kind.
fn waiting(dir: &Path, kind: &str) -> (Program, String) {
    let mut destination = start(dir, "destination", &[kind, "incoming"]);
    destination.send("incoming tcp:127.0.0.1:0");
    let address = destination.listening();
    (destination, address)
}

fn writes(program: &mut Program) -> u64 {
    program.command("writes").strip_prefix("writes ").unwrap().parse().unwrap()
}

/// The guest runs: it writes more.
fn runs(program: &mut Program) {
    let goal = writes(program) + 2000;
    let end = std::time::Instant::now() + program::REPLY;
    while writes(program) < goal {
        if std::time::Instant::now() > end {
            program.fail("the guest stands still");
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

/// Starts a migration that goes on until its bandwidth is set free, and waits until the guest's first round is over.
fn slow(source: &mut Program, address: &str) {
    source.must("set max-bandwidth 20M");
    source.must("set downtime-limit 1");
    source.must(&format!("migrate {address}"));
    let end = std::time::Instant::now() + program::MOVE;
    while source.status("iteration") < 2 {
        if std::time::Instant::now() > end || source.status_text("over") == "1" {
            let why = source.command("error");
            source.fail(&format!("the migration does not get going: {why}"));
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

fn arrives_well(source: &mut Program, destination: &mut Program) {
    source.must("set max-bandwidth 0");
    source.must("set downtime-limit 300");
    source.must_end_in("completed");
    destination.must_end_in("completed");
    let arrived = destination.await_news("note arrived");
    let left = source.command("hash");
    assert_eq!(left.strip_prefix("hash "), arrived.strip_prefix("note arrived "), "memory differs");
    runs(destination);
}

/// Moves a guest of this kind live, and says which trackers it had.
fn moves_live(words: &[&str], options: &[&str]) -> String {
    let dir = scratch("tracked");
    let mut source = start(&dir, "source", words);
    options.iter().for_each(|option| source.must(&format!("set {option}")));
    let (mut destination, address) = waiting(&dir, words[0]);
    runs(&mut source);
    slow(&mut source, &address);
    runs(&mut source);
    arrives_well(&mut source, &mut destination);
    let tracker = source.command("tracker");
    // And back, with the same tracker.
    options.iter().for_each(|option| destination.must(&format!("set {option}")));
    source.quit();
    destination.quit();
    tracker
}

#[test]
fn a_process_without_kvm_moves_by_write_protection() {
    if without_write_protect() {
        return;
    }
    for option in ["dirty-tracker auto", "dirty-tracker write-protect"] {
        for kind in ["private", "shared"] {
            assert_eq!(moves_live(&[kind], &[option]), "tracker 4 write-protect (ram, spare)");
        }
    }
    assert_eq!(moves_live(&["private"], &["multifd off"]), "tracker 4 write-protect (ram, spare)");
}

#[test]
fn huge_pages_move_by_write_protection() {
    if !without_write_protect() && !without_huge_pages() {
        assert_eq!(moves_live(&["hugetlb"], &[]), "tracker 4 write-protect (ram, spare)");
    }
}

#[test]
fn nobody_needs_privileges_for_write_protection() {
    if !without_write_protect() {
        assert_eq!(moves_live(&["private", "nobody"], &[]), "tracker 4 write-protect (ram, spare)");
    }
}

#[test]
fn the_vmm_reports_by_marks_or_by_a_source() {
    assert_eq!(moves_live(&["private", "marks"], &[]), "tracker 8 callback (ram, spare)");
    assert_eq!(moves_live(&["private", "marks"], &["dirty-tracker callback"]), "tracker 8 callback (ram, spare)");
    for way in ["source", "clear"] {
        for option in ["dirty-tracker auto", "dirty-tracker callback"] {
            assert_eq!(moves_live(&["private", way], &[option]), "tracker 8 callback 'device's' (ram, spare)");
        }
    }
}

/// A device writes through a mapping of its own, which write protection cannot see, and reports it by a source.
#[test]
fn a_source_is_merged_with_what_the_tracker_finds() {
    if !without_write_protect() {
        assert_eq!(moves_live(&["shared", "device"], &[]), "tracker 12 write-protect (ram, spare)");
    }
}

#[test]
fn without_a_tracker_the_guest_is_stopped_first() {
    let dir = scratch("none");
    let mut source = start(&dir, "source", &["private"]);
    let (mut destination, address) = waiting(&dir, "private");
    source.must("set dirty-tracker none");
    source.must(&format!("migrate {address}"));
    source.must_end_in("completed");
    assert_eq!(source.status("iteration"), 2, "one round, and the last sync");
    arrives_well(&mut source, &mut destination);
    assert_eq!(source.command("tracker"), "tracker 16 none (the guest is stopped before its memory is sent)");
    source.quit();
    destination.quit();
}

#[test]
fn a_tracker_that_is_not_there_is_refused_by_name() {
    let dir = scratch("refused");
    let mut source = start(&dir, "source", &["private"]);
    for (tracker, why) in [
        ("kvm-log", "option 'dirty-tracker' is kvm-log, but the library knows of no KVM guest"),
        ("kvm-ring", "option 'dirty-tracker' is kvm-ring, but the library knows of no KVM guest"),
    ] {
        let (_destination, address) = waiting(&dir, "private");
        source.must(&format!("set dirty-tracker {tracker}"));
        source.must(&format!("migrate {address}"));
        source.must_end_in("failed");
        let error = source.command("error");
        assert!(error.contains(why), "{error}");
        runs(&mut source);
    }
    assert!(source.command("set dirty-tracker soft-dirty").starts_with("error set: "));
    if without_write_protect() {
        return;
    }
    // Memory has one userfaultfd, and here it is the VMM's.
    source.must("set dirty-tracker auto");
    assert_eq!(source.command("guard"), "guard 1");
    let (_destination, address) = waiting(&dir, "private");
    source.must(&format!("migrate {address}"));
    source.must_end_in("failed");
    let error = source.command("error");
    assert!(error.contains("RAM block 'ram' cannot be write-protected: it is registered with another"), "{error}");
    source.must("unguard");
    let (mut destination, address) = waiting(&dir, "private");
    source.must(&format!("migrate {address}"));
    arrives_well(&mut source, &mut destination);
    source.quit();
    destination.quit();
}

/// Before anything is stopped or tracked, somebody who asks hears which tracker would be refused, and why.
#[test]
fn a_tracker_that_would_be_refused_is_named_before() {
    let dir = scratch("asked");
    let (_destination, address) = waiting(&dir, "private");
    let ask = |source: &mut Program, tracker: &str| {
        source.must(&format!("set dirty-tracker {tracker}"));
        source.command(&format!("compare {address}"))
    };
    let mut denied = start(&dir, "denied", &["private", "nobody", "denied"]);
    for tracker in ["write-protect", "auto"] {
        let said = ask(&mut denied, tracker);
        assert!(said.starts_with("value 1 ") && said.contains("\"side\":\"source\""), "{said}");
        assert!(said.contains("a seccomp filter") && said.contains("dirty-tracker"), "{tracker}: {said}");
    }
    for tracker in ["callback", "none"] {
        assert_eq!(ask(&mut denied, tracker), "value 0 []");
    }
    let said = ask(&mut denied, "kvm-ring");
    assert!(said.starts_with("value 1 ") && said.contains("the library knows of no KVM guest"), "{said}");
    assert_eq!(denied.command("tracker"), "tracker 0 ", "nothing was tracked");
    runs(&mut denied);
    denied.quit();
    if without_write_protect() {
        return;
    }
    let mut source = start(&dir, "source", &["private"]);
    for tracker in ["auto", "write-protect"] {
        assert_eq!(ask(&mut source, tracker), "value 0 []");
    }
    // The guest's memory is nobody's still.
    assert_eq!(source.command("guard"), "guard 1");
    source.quit();
}

/// Whatever a source does wrong, the migration fails with its name, the guest runs on, and the next attempt is well.
#[test]
fn a_source_that_fails_or_lies_harms_nobody() {
    let dir = scratch("liar");
    for (words, faults) in [
        (
            ["private", "source"],
            &[
                ("fail-start 1", "start of dirty source 'device's' failed: No such device or address"),
                ("fail-sync 1", "RAM block 'ram': sync of dirty source 'device's' failed: Input/output error"),
                ("fail-sync 4", "RAM block 'spare': sync of dirty source 'device's' failed"),
                ("lie 3", "dirty source 'device's' reported page 6207 of RAM block 'ram', which has 6144 pages"),
            ][..],
        ),
        (
            ["private", "clear"],
            &[
                ("fail-clear 1", "RAM block 'ram': clear of dirty source 'device's' failed: Numerical argument"),
                ("fail-clear 3", "clear of dirty source 'device's' failed"),
            ][..],
        ),
    ] {
        let mut source = start(&dir, "source", &words);
        for (fault, why) in faults {
            let (_destination, address) = waiting(&dir, "private");
            source.must(fault);
            source.must("set max-bandwidth 0");
            source.must(&format!("migrate {address}"));
            source.must_end_in("failed");
            let error = source.command("error");
            assert!(error.contains(why), "{fault}: {error}");
            let calls = source.command("calls");
            let count = |what: &str| {
                let word = calls.split(' ').find_map(|w| w.strip_prefix(what)).unwrap();
                word.parse::<u32>().unwrap()
            };
            assert_eq!(count("starts="), count("stops="), "{fault}: {calls}");
            runs(&mut source);
        }
        let (mut destination, address) = waiting(&dir, "private");
        source.must(&format!("migrate {address}"));
        arrives_well(&mut source, &mut destination);
        source.quit();
        destination.quit();
    }
}

/// In a block whose bitmap ends within a word: the bit of the first page that it does not have, and the word's last.
#[test]
fn a_source_that_lies_in_its_last_word_is_named() {
    let dir = scratch("edge");
    let mut source = start(&dir, "source", &["private", "source", "odd"]);
    let waiting = || {
        let mut destination = start(&dir, "destination", &["private", "odd", "incoming"]);
        destination.send("incoming tcp:127.0.0.1:0");
        let address = destination.listening();
        (destination, address)
    };
    for (fault, page) in [("lie 2", 5055), ("edge 2", 5000), ("lie 4", 5055), ("edge 4", 5000)] {
        let (_destination, address) = waiting();
        source.must(fault);
        source.must(&format!("migrate {address}"));
        source.must_end_in("failed");
        let error = source.command("error");
        let why = format!("'device's' reported page {page} of RAM block 'spare', which has 5000 pages");
        assert!(error.contains(&why), "{fault}: {error}");
        runs(&mut source);
    }
    let (mut destination, address) = waiting();
    source.must(&format!("migrate {address}"));
    arrives_well(&mut source, &mut destination);
    source.quit();
    destination.quit();
}

/// Trackers and RAM stay as they are while a migration runs, and may change before and after.
#[test]
fn nothing_changes_while_a_migration_runs() {
    if without_write_protect() {
        return;
    }
    let dir = scratch("change");
    let mut source = start(&dir, "source", &["private"]);
    let (mut destination, address) = waiting(&dir, "private");
    slow(&mut source, &address);
    for (command, what) in [
        ("add more", "add RAM block 'more'"),
        ("remove spare", "remove RAM block 'spare'"),
        ("add-source", "add dirty source 'device's'"),
        ("remove-source", "remove a dirty source"),
    ] {
        let answer = source.command(command);
        let why = format!("cannot {what} now: a migration is in progress (state active): what migrates was settled");
        assert!(answer.contains(&why) && answer.contains("vmig_cancel"), "{command}: {answer}");
    }
    source.must("cancel");
    source.must_end_in("cancelled");
    destination.must_end_in("failed");
    source.must("remove spare");
    source.must("add spare");
    source.must("add-source");
    assert!(source.command("add-source").contains("one with the same opaque pointer was added"));
    source.must("remove-source");
    assert!(source.command("remove-source").contains("no dirty source with this opaque pointer"));
    let (mut destination, address) = waiting(&dir, "private");
    source.must(&format!("migrate {address}"));
    arrives_well(&mut source, &mut destination);
    // The guest left, and with it everything that was on for it.
    source.must("remove ram");
    assert_eq!(source.command("guard"), "guard 1");
    source.quit();
    destination.quit();
}

/// Whoever tracks: what the kernel says of a hole comes before anybody looks into it.
#[test]
fn memory_that_goes_away_is_an_error() {
    let dir = scratch("gone");
    let protects = !without_write_protect();
    let unmapped = "a part of RAM block 'spare' at or after offset";
    for (words, option, command, why) in [
        (&["private"][..], "multifd on", "unmap", unmapped),
        (&["private"][..], "multifd off", "unmap", unmapped),
        (
            &["private"][..],
            "multifd on",
            "replace",
            "the memory of RAM block 'spare' at or after offset 0x0 was replaced by another mapping",
        ),
        (&["private", "marks"][..], "multifd on", "unmap", unmapped),
        (&["private", "marks"][..], "multifd off", "unmap", unmapped),
        (&["private", "marks"][..], "checksum crc32c", "unmap", unmapped),
        (&["shared", "clear"][..], "zero-page-detection legacy", "unmap", unmapped),
    ] {
        if words.len() == 1 && !protects {
            continue;
        }
        let mut source = start(&dir, "source", words);
        let (mut destination, address) = waiting(&dir, words[0]);
        source.must(&format!("set {option}"));
        slow(&mut source, &address);
        source.must(command);
        // Nobody writes there, so that it is looked at again only because somebody says so.
        source.must("touch");
        source.must("set max-bandwidth 0");
        source.must_end_in("failed");
        let error = source.command("error");
        assert!(error.contains(why), "{words:?}, {option}, {command}: {error}");
        destination.must_end_in("failed");
        runs(&mut source);
        source.quit();
    }
}
