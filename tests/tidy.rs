//! House rules a machine can check, over the whole tree. Each rule has a case that breaks it.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use common::source::{code_only, files, tokens};
use std::{fs, path::Path};

const LINES_MAX: usize = 700;
/// Where `unsafe` may stand: the doors, guest memory, what calls back into C, and KVM state that is saved as a device.
const UNSAFE_ALLOWED: [&str; 9] = [
    "src/sys",
    "src/capi",
    "src/ram.rs",
    "src/ram",
    "src/zero.rs",
    "src/section",
    "src/dirty/callback.rs",
    "src/vmm",
    "src/kvm/x86_64/section.rs",
];
/// Words are put together here so that this file keeps its own rules.
const MARKS: [&str; 5] = [
    concat!("TO", "DO"),
    concat!("FIX", "ME"),
    concat!("X", "XX"),
    concat!("todo", "!("),
    concat!("unimpl", "emented!("),
];
const MACHINE_PATHS: [&str; 4] =
    [concat!("/wo", "rk/"), concat!("/ho", "me/"), concat!("/ro", "ot/"), concat!("/Us", "ers/")];
const IGNORED_TEST: &str = concat!("#[ign", "ore");
/// Lines above an `unsafe` among which its reason must be.
const SAFETY_REACH: usize = 4;

fn is_source(path: &str) -> bool {
    let kinds = [".rs", ".c", ".h", ".S", ".ld", ".py", ".sh", ".toml", ".mk", "Makefile", ".ci/run", "tests/run"];
    kinds.iter().any(|end| path.ends_with(end))
}

/// What is wrong with one file; `path` is relative to the project.
fn complaints(path: &str, text: &str) -> Vec<String> {
    let mut bad = Vec::new();
    let mut say = |line: usize, what: &str| bad.push(format!("{path}:{line}: {what}"));
    let generated = path == "include/vmig.h";
    for (i, line) in text.lines().enumerate() {
        if MARKS.iter().any(|m| marked(line, m)) && is_source(path) {
            say(i + 1, "unfinished");
        }
        if MACHINE_PATHS.iter().any(|p| line.contains(p)) {
            say(i + 1, "a path of one machine");
        }
        if line.contains(IGNORED_TEST) && path.ends_with(".rs") {
            say(i + 1, "an ignored test: skip with a reason instead, so that it is counted");
        }
    }
    if is_source(path) && !generated && text.lines().count() > LINES_MAX {
        say(LINES_MAX, "longer than one idea: split it");
    }
    if path.ends_with(".rs") {
        for (line, what) in unsafe_complaints(path, text) {
            say(line, what);
        }
    }
    bad
}

/// Whether a line has this mark, not as a part of a longer word (the XXXXXX of mkdtemp).
fn marked(line: &str, mark: &str) -> bool {
    let letter = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
    line.match_indices(mark).any(|(at, _)| {
        let after = line[at + mark.len()..].chars().next();
        !letter(line[..at].chars().next_back()) && (mark.ends_with('(') || !letter(after))
    })
}

/// `unsafe` where it may not be, or without its reason.
fn unsafe_complaints(path: &str, text: &str) -> Vec<(usize, &'static str)> {
    let lines: Vec<&str> = text.lines().collect();
    let tokens = tokens(&code_only(text));
    let mut bad = Vec::new();
    for (i, (line, token)) in tokens.iter().enumerate() {
        if token != "unsafe" {
            continue;
        }
        let inside = |dir: &&str| Path::new(path).starts_with(dir) || path == format!("{dir}.rs");
        if path.starts_with("src/") && !UNSAFE_ALLOWED.iter().any(inside) {
            bad.push((*line, "unsafe outside the doors"));
        }
        let claims = tokens.get(i + 1).is_some_and(|t| t.1 == "{" || t.1 == "impl");
        let above = &lines[line.saturating_sub(1 + SAFETY_REACH)..*line];
        if claims && !above.iter().any(|l| l.contains("SAFETY")) {
            bad.push((*line, "unsafe without a SAFETY comment close above"));
        }
    }
    bad
}

#[test]
fn the_tree_keeps_the_rules() {
    let root = common::root();
    let mut bad = Vec::new();
    let mut read = 0;
    for path in files(root) {
        let relative = path.strip_prefix(root).unwrap().to_str().unwrap();
        let Ok(text) = fs::read_to_string(&path) else { continue }; // a binary sample
        read += usize::from(is_source(relative));
        bad.extend(complaints(relative, &text));
    }
    assert!(read > 20, "only {read} source files found below {}", root.display());
    assert!(bad.is_empty(), "{}", bad.join("\n"));
}

#[test]
fn each_rule_catches_what_it_is_for() {
    let block = "unsafe { f() }";
    let cases = [
        ("src/a.rs", format!("fn f() {{}} // {}: later", MARKS[0]), 1),
        ("c-examples/a.c", format!("/* {} */", MARKS[1]), 1),
        ("src/a.rs", format!("fn f() {{ {}) }}", MARKS[3]), 1),
        ("docs/a.md", format!("see {}x", MACHINE_PATHS[0]), 1),
        ("tests/a.rs", format!("{IGNORED_TEST}]"), 1),
        ("tests/a.rs", "\n".repeat(LINES_MAX + 1), 1),
        ("c-examples/vmm/a.c", "\n".repeat(LINES_MAX + 1), 1),
        ("src/outgoing/a.rs", format!("// SAFETY: because\n{block}"), 1),
        ("src/outgoing/a.rs", block.to_string(), 2),
        ("src/system.rs", format!("// SAFETY: because\n{block}"), 1),
        ("src/sys/a.rs", block.to_string(), 1),
        ("src/sys/a.rs", format!("// SAFETY: too far\n\n\n\n\n{block}"), 1),
        ("src/vmm/a.rs", "unsafe impl Send for X {}".to_string(), 1),
        ("tests/a.rs", format!("let s = \"// SAFE\"; {block}"), 1),
    ];
    for (path, text, count) in cases {
        assert_eq!(complaints(path, &text).len(), count, "{path}: {text}");
    }
}

#[test]
fn what_keeps_the_rules_passes() {
    let cases = [
        ("src/sys/a.rs", "// SAFETY: because\n// of this\nunsafe { f() }"),
        ("src/vmm.rs", "/// # Safety\n/// x\npub unsafe fn f() {}"),
        ("src/error.rs", "// unsafe { }\nconst S: &str = \"unsafe {\";"),
        ("c-examples/a.c", concat!("char t[] = \"x-X", "XXXXX\";")),
        ("src/capi/a.rs", "#[unsafe(no_mangle)]\npub extern \"C\" fn f() {}"),
    ];
    for (path, text) in cases {
        assert_eq!(complaints(path, text), Vec::<String>::new(), "{path}: {text}");
    }
    assert_eq!(complaints("src/a.rs", &"\n".repeat(LINES_MAX)), Vec::<String>::new());
}

#[test]
fn a_required_need_is_no_skip() {
    let required = |list: &str| common::is_required(list, "kvm");
    assert!(required("kvm") && required("qemu,kvm") && required("all") && required("all,-qemu"));
    assert!(!required("") && !required("qemu") && !required("all,-kvm") && !required("kvmx"));
}

#[test]
fn samples_are_drawn_within_the_points() {
    let drawn = common::points("tidy", 1000, 10);
    let all = std::env::var("VMIG_ALL").is_ok_and(|v| v == "1");
    assert_eq!(drawn.len(), if all { 1000 } else { 10 });
    assert!(drawn.is_sorted() && drawn[0] == 0 && *drawn.last().unwrap() == 999);
    assert_eq!(common::points("tidy", 2, 10), [0, 1]);
    assert_eq!(common::points("tidy", 0, 10), [0; 0]);
}
