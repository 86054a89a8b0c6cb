//! `vmig_test_device`: correct devices pass, and each broken one is found, by name. What a device does in its own memory is
//! AddressSanitizer's to find; then the log says in which case.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use common::{built, c_program, run, try_run, words};
use std::process::Command;

/// What `trial` printed of one device, seeds and cases as given.
fn tried(device: &[&str]) -> String {
    let mut command = Command::new("timeout");
    let out = run(command.args(["-k", "5", "240"]).arg(c_program("trial")).args(device));
    let text = words(&out);
    println!("{}:\n{text}", device[0]);
    text
}

fn number(text: &str, key: &str) -> u64 {
    text.lines()
        .find_map(|l| l.strip_prefix(key)?.trim().parse().ok())
        .unwrap_or_else(|| panic!("no '{key}' in {text}"))
}

/// Nothing is found, the device is what it was, and each of `steps` is among what was tried.
fn clean(device: &str, steps: &[&str]) -> String {
    let text = tried(&[device]);
    assert!(text.contains("\nclean \n") && text.ends_with("kept\n"), "{text}");
    for step in steps {
        assert!(text.lines().any(|l| l.starts_with("step ") && l.contains(step)), "no '{step}' in\n{text}");
    }
    text
}

#[test]
fn a_correct_device_passes_every_test() {
    let text = clean(
        "full",
        &[
            "save, reset, load, save: the same bytes",
            "truncation: 68 of 68 tried",
            "bit flip: 544 of 544 tried",
            "versions: 1 to 3 are read, 2 older ones",
            "parts: 2 tried",
            "samples: 1 loaded",
            "failing callbacks: 7 tried",
        ],
    );
    // Three bytes are unused space, which is no reason to say anything.
    assert!(!text.contains("note "), "{text}");
    assert_eq!(number(&text, "saved "), 68);
}

#[test]
fn every_kind_of_device_can_be_tried() {
    clean("plain", &["bit flip: 200 of 200 tried"]);
    clean("early", &["bit flip: 200 of 200 tried"]);
    clean("grown", &["1 older ones", "samples: 1 loaded"]);
    clean("varies", &["bit flip: 264 of 264 tried"]);
    clean("declared-varying", &["no memory: "]);
    clean("no-state", &["declared without state"]);
    clean(
        "blob",
        &[
            "truncation: 50 of 50 tried: 96 times refused",
            "bit flip: 400 of 400 tried",
            "failing callbacks: 4 tried",
            "no memory: ",
        ],
    );
}

#[test]
fn sections_of_many_bodies_can_be_tried() {
    let text = tried(&["lots", "1", "2000"]);
    assert!(text.contains("\nclean \n") && text.ends_with("kept\n"), "{text}");
    assert!(text.contains("step bit flip: 19") && text.contains("step no memory: 63 tried"), "{text}");
    // setup, iterate, complete, load_setup, each body: all fail in turn, at their start and at their end.
    let failing =
        text.lines().find_map(|l| l.strip_prefix("step failing callbacks: ")?.split(' ').next()?.parse::<u32>().ok());
    assert!(failing.unwrap() > 50, "{text}");
}

#[test]
fn much_state_is_sampled_and_a_seed_draws_the_same() {
    let first = tried(&["big", "7", "40"]);
    assert!(first.contains("bit flip: 40 of 16777248 tried") && first.contains("seed 7"), "{first}");
    assert_eq!(first, tried(&["big", "7", "40"]));
    let drawn = clean("big", &["truncation: "]);
    assert!(number(&drawn, "cases ") > 500, "{drawn}");
}

/// The first thing found, and that the device was put back.
fn found(device: &str, words: &[&str]) {
    let text = tried(&[device, "1"]);
    let line =
        text.lines().find_map(|l| l.strip_prefix("found ")).unwrap_or_else(|| panic!("nothing found in\n{text}"));
    for word in words {
        assert!(line.contains(word), "no '{word}' in: {line}");
    }
    assert!(text.contains(&format!("error {line}\n")), "the log has it, too: {text}");
    assert!(text.ends_with("kept\n"), "{text}");
}

#[test]
fn a_forgotten_field_is_found() {
    found(
        "forgets-a-field",
        &["save, reset, load, save: section 'plain'", "4 bytes of its memory from byte 0", "no field"],
    );
    found("loads-no-mode", &["save, reset, load, save: section 'loads-no-mode'", "byte 45 was 0x02 and is 0x00"]);
}

#[test]
fn a_save_that_is_not_just_a_look_is_found() {
    found("drains", &["save twice: section 'plain'", "byte 8 (field 'buf') was"]);
    found(
        "counts",
        &["save twice: section 'plain'", "saving the device changed it: byte 26 of its memory", "no field"],
    );
    found("ticks", &["save twice: section 'plain'", "byte 32 (field 'clock') was 0x02 and is 0x03"]);
    found("saves-at-random", &["save twice: section 'saves-at-random'", "byte 53 was 0x01 and is 0x02"]);
    found("stays-busy", &["save twice: section 'plain'", "a second time: section 'plain': pre_save", "busy"]);
}

#[test]
fn a_load_that_is_not_the_reverse_of_a_save_is_found() {
    found("refuses-itself", &["save, load, save: section 'plain'", "refuses what it was saved as", "post_load"]);
    found("stale", &["save, reset, load, save: section 'plain'", "byte 25 of its memory was"]);
    found("latches", &["bit flip: section 'plain': bit 1 of byte 4 (field 'b')", "afterwards", "is saved otherwise"]);
    found("half-loads", &["bit flip: section 'half-loads'", "afterwards the device refuses what it was saved as"]);
}

#[test]
fn a_failure_that_leaves_something_behind_is_found() {
    found("busy-for-ever", &["no memory: section 'busy-for-ever': vmig_put fails after 0 bytes", "cannot be saved"]);
}

#[test]
fn a_version_that_does_not_load_is_found() {
    found("no-old-version", &["old version: section 'plain': version 1, made from", "post_load"]);
    found("same-version", &["sample: section 'plain': sample 0, version 1, 25 bytes", "it is refused", "ends"]);
    found("new-format", &["sample: section 'new-format': sample 0, version 1, 1 bytes", "it is refused"]);
    found(
        "refuses-old",
        &["sample: section 'refuses-old': sample 0, version 1", "load of section 'refuses-old' failed"],
    );
}

#[test]
fn a_section_that_takes_no_part_is_no_pass() {
    let text = tried(&["never-active"]);
    assert!(text.contains("failed section 'never-active': is_active says"), "{text}");
}

/// A device that writes or reads beyond its own memory: the sanitizer's words, and the case by name.
fn dies(device: &str, what: &str, case: &str) {
    let mut command = Command::new("timeout");
    let command = command.args(["-k", "5", "240"]).arg(built("c-asan/trial")).args([device, "1"]);
    let out = try_run(command);
    let text = words(&out);
    assert!(!out.status.success() && text.contains(what), "{text}");
    let died = text.lines().find_map(|l| l.strip_prefix("died in: ")).unwrap_or_else(|| panic!("no case in {text}"));
    assert!(died.starts_with(case), "{died}");
    println!("{device}: {died}");
}

#[test]
fn what_a_device_does_in_its_memory_is_found_with_a_sanitizer() {
    dies("trusts-an-index", "out of bounds", "bit flip: bit 4 of byte 24 (field 'at')");
    dies("trusts-a-length", "heap-buffer-overflow", "bit flip: bit 0 of byte 0");
    dies("unchecked-index", "out of bounds", "bit flip: bit 6 of byte 44");
    dies("trusts-a-chunk", "out of bounds", "bit flip: bit 0 of byte 0 of body 1");
    // A leak shows when the process ends.
    let out = try_run(Command::new(built("c-asan/trial")).args(["leaks", "1"]));
    assert!(!out.status.success() && words(&out).contains("detected memory leaks"), "{}", words(&out));
}

#[test]
fn descriptors_stay_where_they_are() {
    let text = tried(&["fds"]);
    assert!(text.contains("bit flip: 32 of 64 tried") && text.ends_with("fds done\n"), "{text}");
}

#[test]
fn what_cannot_be_tried_is_refused() {
    assert!(tried(&["refuses"]).ends_with("refuses done\n"));
}

#[test]
fn the_example_shows_a_finding() {
    let example = |bug: &[&str]| {
        let out = try_run(Command::new(c_program("device_test")).args(bug));
        (out.status.code(), words(&out))
    };
    let (code, text) = example(&[]);
    assert!(code == Some(0) && text.ends_with("nothing found\n"), "{text}");
    let (code, text) = example(&["forgets"]);
    let line = "found: save, reset, load, save: section 'uart': loading does not bring back what a reset clears: byte 1 of its \
                memory was 0x03 and is 0x00; no field of the table covers it\n";
    assert!(code == Some(1) && text.ends_with(line), "{text}");
    let out = try_run(Command::new(built("c-asan/device_test")).arg("trusts"));
    let text = words(&out);
    assert!(!out.status.success() && text.contains("died in: bit flip: bit "), "{text}");
    assert!(text.contains("(field 'head')"), "{text}");
}
