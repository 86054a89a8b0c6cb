//! What `make demo` runs: it succeeds with any of its options, and fails when a dirty page is lost on purpose.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use common::{built, c_program, points, try_run, without_kvm, words};
use std::process::{Command, Output};

/// Options that draw together everything the demo can vary.
const VARIANTS: [&str; 10] = [
    "--mem 256 --vcpus 2",
    "--mem 64 --vcpus 1 --uri unix --fill zero",
    "--mem 128 --vcpus 4 --fill random --shared",
    "--mem 128 --idle",
    "--mem 64 --vcpus 1 --spin",
    "--mem 256 --fill untouched --uri unix",
    "--mem 128 --burst 256 --downtime 50",
    "--mem 64 --burst 0 --pages 1024",
    "--mem 64 --no-hash --shared --uri unix",
    "--mem 128 --set zero-page-detection\u{a0}none --fill zero",
];

fn demo(program: &std::path::Path, options: &str) -> Output {
    let args = options.split_ascii_whitespace().map(|word| word.replace('\u{a0}', " "));
    try_run(Command::new(program).arg("--json").args(args).env("VMIG_FAULT", "drop-dirty"))
}

/// The JSON line of a demo that must have gone well.
fn verdict(out: &Output, options: &str) -> serde_json::Value {
    assert!(out.status.success(), "demo {options}: {}\n{}", out.status, words(out));
    let json: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!((&json["ok"], &json["status"]), (&true.into(), &"completed".into()), "{json}");
    json
}

/// The library the demo is built with knows nothing of faults, so the variable set here must not matter to it.
#[test]
fn the_demo_succeeds_with_its_options() {
    if without_kvm() {
        return;
    }
    for index in points("demo", VARIANTS.len(), 3) {
        let options = format!("{} --warm 300", VARIANTS[index]);
        let json = verdict(&demo(&c_program("demo"), &options), &options);
        if !options.contains("--no-hash") {
            assert_eq!(json["memory_verified"], true, "{json}");
        }
        assert!(json["pages_verified"].as_u64() > Some(0), "{json}");
        for pair in json["generations"].as_array().unwrap() {
            assert_eq!(pair[0].as_u64().map(|n| n + 1), pair[1].as_u64(), "{json}");
        }
    }
}

#[test]
fn the_software_guest_moves_without_kvm() {
    let json = verdict(&demo(&c_program("demo"), "--software"), "--software");
    assert_eq!((&json["guest"], &json["memory_verified"]), (&"software".into(), &true.into()));
    assert!(json["iterations"].as_u64() > Some(0) && json["blackout_ms"].as_f64() > Some(0.0), "{json}");
}

/// A page that is lost is found: by the hash of all pages and by name, whatever the guest itself notices.
#[test]
fn a_lost_page_is_named() {
    if without_kvm() {
        return;
    }
    for options in ["--mem 64 --vcpus 1", "--mem 128 --vcpus 2 --uri unix"] {
        let out = demo(&built("c-fault/demo"), &format!("{options} --warm 300"));
        let text = words(&out);
        assert_eq!(out.status.code(), Some(1), "{text}");
        assert!(text.contains("\"ok\": false") && text.contains("memory differs: 1 of"), "{text}");
        let named = text.lines().find(|line| line.contains("the page at 0x"));
        assert!(named.is_some_and(|l| l.contains("ram.low") || l.contains("ram.high")), "{text}");
    }
}
