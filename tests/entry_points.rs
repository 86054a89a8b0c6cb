//! Every function of the header refuses what it must refuse, says why, and changes nothing.

#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;

/// Names of the functions the header declares: a word of ours right before a parenthesis, outside of comments.
fn declared() -> BTreeSet<String> {
    let text = fs::read_to_string(common::root().join("include/vmig.h")).expect("the header");
    let mut code = String::new();
    let mut rest = text.as_str();
    while let Some((before, after)) = rest.split_once("/*") {
        code.push_str(before);
        rest = after.split_once("*/").expect("a comment ends").1;
    }
    code.push_str(rest);
    let plain = code.lines().filter(|l| !l.starts_with('#') && !l.starts_with("    ") && !l.contains("vmig_sized_"));
    plain
        .filter_map(|line| {
            let name = line.split_once('(')?.0.rsplit([' ', '*']).next()?;
            name.starts_with("vmig_").then(|| name.to_owned())
        })
        .collect()
}

#[test]
fn every_function_refuses_nonsense() {
    let declared = declared();
    assert!(declared.len() > 45 && declared.contains("vmig_new"), "{declared:?}");
    let out = common::run(&mut Command::new(common::c_program("entry")));
    let text = String::from_utf8(out.stdout).unwrap();
    let tried: BTreeSet<String> = text.lines().filter_map(|l| l.strip_prefix("case ")).map(str::to_owned).collect();
    assert_eq!(tried, declared, "tests/c/entry.c has a case for every function of the header");
}
