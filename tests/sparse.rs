//! A guest of 64 GiB that uses 1 GiB of it, in any pattern, costs at most 1.25 GiB on either side.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;
#[path = "common/program.rs"]
mod program;

use common::{c_program, points, scratch, skip};
use program::Program;
use std::env;
use std::path::Path;
use vmig::dirty::write_protect::WriteProtect;

const KINDS: [&str; 2] = ["private", "shared"];
/// See tests/c/sparse.c.
const PATTERNS: [&str; 9] = ["dense", "single", "nth", "apart", "pairs", "half", "half-spread", "mixed", "little"];
/// Settings of both sides, and of the source alone: a QEMU gives no hints where its memory is.
const STREAMS: [(&str, &[&str], &[&str]); 6] = [
    ("default", &[], &[]),
    ("one stream", &["multifd off"], &[]),
    ("channels", &["multifd on"], &[]),
    ("one stream, as from a QEMU", &["multifd off"], &["peer qemu"]),
    ("channels, as from a QEMU", &["multifd on"], &["peer qemu"]),
    ("write-protected", &[], &[PROTECTED]),
];
const PROTECTED: &str = "dirty-tracker write-protect";
const LIMIT_KIB: u64 = (5 << 20) / 4;
/// What a page table costs: one page maps 2 MiB, and in 64 GiB any page may be in use.
const TABLES_KIB: u64 = (64 << 20) / 512 + 1024;

fn start(dir: &Path, name: &str, args: &[&str], settings: &[&str]) -> Program {
    let mut program = Program::start(name, dir, &c_program("sparse"), args);
    assert_eq!(program.reply(), "ready");
    settings.iter().for_each(|setting| program.must(&format!("set {setting}")));
    program
}

fn memory(program: &mut Program) -> [u64; 4] {
    let line = program.command("memory");
    ["high", "now", "tables", "file"].map(|key| {
        let found = line.split(' ').find_map(|word| word.strip_prefix(key)?.strip_prefix('='));
        found.unwrap_or_else(|| panic!("no {key} in '{line}'")).parse().unwrap()
    })
}

fn check(program: &mut Program, what: &str) {
    assert_eq!(program.command("check"), "value right", "{what}");
    let [high, now, tables, file] = memory(program);
    println!("{what}: {} MiB at most, {} now, file {}, tables {}", high >> 10, now >> 10, file >> 10, tables >> 10);
    // The sanitizer's own memory is not ours to judge.
    if under_asan() {
        return;
    }
    assert!(now >= 1 << 20, "{what}: less than its contents, {now} KiB");
    assert!(high.max(file) <= LIMIT_KIB, "{what}: {high} KiB resident, {file} KiB in the file");
    assert!(tables <= TABLES_KIB, "{what}: {tables} KiB of page tables");
}

fn under_asan() -> bool {
    env::var("VMIG_ASAN").is_ok_and(|v| v == "1")
}

#[test]
fn a_sparse_guest_costs_what_it_uses() {
    let points = points("sparse", KINDS.len() * PATTERNS.len() * STREAMS.len(), 6);
    // What the sanitizer looks for hardly depends on the pattern.
    let some = if under_asan() { points.len().min(8) } else { points.len() };
    for point in points.into_iter().take(some) {
        let (kind, rest) = (KINDS[point % 2], point / 2);
        let (pattern, (stream, both, source)) = (PATTERNS[rest % PATTERNS.len()], STREAMS[rest / PATTERNS.len()]);
        if source.contains(&PROTECTED) && WriteProtect::new().is_err_and(|e| skip("userfaultfd", e.text())) {
            continue;
        }
        let what = format!("{kind} memory, {pattern}, {stream}");
        let dir = scratch("sparse");
        let mut destination = start(&dir, "destination", &[kind, pattern, "incoming"], both);
        destination.send("incoming tcp:127.0.0.1:0");
        let address = destination.listening();
        let mut source = start(&dir, "source", &[kind, pattern], &[both, source].concat());
        source.must(&format!("migrate {address}"));
        source.must_end_in("completed");
        destination.must_end_in("completed");
        check(&mut source, &format!("{what}, source"));
        check(&mut destination, &format!("{what}, destination"));
        source.quit();
        destination.quit();
    }
}
