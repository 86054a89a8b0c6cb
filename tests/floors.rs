//! The staircase: the order of the modules in src/lib.rs is the architecture. A module names only modules listed
//! before it, and the two halves, `outgoing` and `incoming`, never name each other.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use common::source::{code_only, files, tokens};
use std::{collections::BTreeSet, fs, path::Path};

/// The modules of a crate root, in order, whatever their visibility.
fn floors(lib: &str) -> Vec<String> {
    let tokens = tokens(&code_only(lib));
    let mut depth = 0;
    let mut found = Vec::new();
    for (i, (_, token)) in tokens.iter().enumerate() {
        match token.as_str() {
            "{" => depth += 1,
            "}" => depth -= 1,
            "mod" if depth == 0 => found.push(tokens[i + 1].1.clone()),
            _ => {}
        }
    }
    found
}

/// How far below the crate root the code at each token is: files and `mod name { ... }` both count.
fn depths(tokens: &[(usize, String)], file_depth: usize) -> Vec<usize> {
    let mut open = Vec::new(); // for each brace: does it belong to a module?
    let mut out = Vec::new();
    for (i, (_, token)) in tokens.iter().enumerate() {
        match token.as_str() {
            "{" => open.push(i >= 2 && tokens[i - 2].1 == "mod"),
            "}" => drop(open.pop()),
            _ => {}
        }
        out.push(file_depth + open.iter().filter(|module| **module).count());
    }
    out
}

/// The names that stand directly after a path's `::` at token `at`: one, or all of a `{...}` list.
fn named(tokens: &[(usize, String)], at: usize) -> Vec<(usize, String)> {
    if tokens.get(at).is_none_or(|t| t.1 != "{") {
        return tokens.get(at).cloned().into_iter().collect();
    }
    let mut depth = 0;
    let mut found = Vec::new();
    for (i, (line, token)) in tokens.iter().enumerate().skip(at) {
        match token.as_str() {
            "{" => depth += 1,
            "}" if depth == 1 => break,
            "}" => depth -= 1,
            name if depth == 1 && matches!(tokens[i - 1].1.as_str(), "{" | ",") => found.push((*line, name.into())),
            _ => {}
        }
    }
    found
}

/// Everything a file names directly under the crate root, with the line.
fn used(text: &str, relative: &Path) -> Vec<(usize, String)> {
    let tokens = tokens(&code_only(text));
    let depths = depths(&tokens, depth_of(relative));
    let is = |i: usize, what: &str| tokens.get(i).is_some_and(|t| t.1 == what);
    let mut found = Vec::new();
    for i in 0..tokens.len() {
        if is(i, "crate") && is(i + 1, "::") {
            found.extend(named(&tokens, i + 2));
        } else if is(i, "crate") && is(i + 1, "as") {
            found.push((tokens[i].0, "crate as".into())); // a new name for the root would hide what follows
        } else if is(i, "super") && !(i >= 1 && is(i - 1, "::")) {
            let supers = (0..).take_while(|n| is(i + 2 * n, "super") && is(i + 2 * n + 1, "::")).count();
            if supers > 0 && supers >= depths[i] {
                found.extend(named(&tokens, i + 2 * supers));
            }
        } else if is(i, "path") && is(i + 1, "=") && i >= 2 && is(i - 1, "[") && is(i - 2, "#") {
            let line = text.lines().nth(tokens[i].0 - 1).unwrap();
            let path = line.split('"').nth(1).unwrap_or("?");
            found.extend(taken_from(relative, path).map(|name| (tokens[i].0, name)));
        }
    }
    found
}

/// The module of src from which `#[path = "..."]` takes a file. None for one below tests, where no floors are (guests
/// that several tests run).
fn taken_from(relative: &Path, path: &str) -> Option<String> {
    let mut place = vec!["src"];
    place.extend(relative.parent().iter().flat_map(|p| p.iter()).filter_map(|p| p.to_str()));
    for part in path.split('/') {
        if part == ".." { place.truncate(place.len().saturating_sub(1)) } else { place.push(part) }
    }
    match place[..] {
        ["tests", _, ..] => None,
        ["src", module, ..] => Some(module.trim_end_matches(".rs").to_string()),
        _ => Some(path.to_string()),
    }
}

/// How deep a file's module is: src/bql.rs and src/wire/mod.rs are 1, src/wire/input.rs is 2.
fn depth_of(relative: &Path) -> usize {
    relative.components().count() - usize::from(relative.ends_with("mod.rs"))
}

/// What one file does against the order.
fn violations(order: &[String], relative: &Path, text: &str) -> Vec<String> {
    let mine = relative.iter().next().unwrap().to_str().unwrap().trim_end_matches(".rs");
    let floor = |name: &str| order.iter().position(|m| m == name);
    let wrong = |name: &str| match (floor(name), floor(mine)) {
        _ if name == mine => None,
        _ if matches!((mine, name), ("outgoing", "incoming") | ("incoming", "outgoing")) => Some("the other half"),
        (Some(theirs), Some(ours)) if theirs < ours => None,
        (None, _) => Some("not a module of src/lib.rs"),
        _ => Some("listed later"),
    };
    let names = used(text, relative);
    let bad = names.iter().filter_map(|(line, name)| {
        let why = wrong(name)?;
        Some(format!("src/{}:{line}: `{mine}` must not use `{name}`: {why}", relative.display()))
    });
    bad.collect()
}

#[test]
fn modules_use_only_what_stands_before_them() {
    let src = common::root().join("src");
    let order = floors(&fs::read_to_string(src.join("lib.rs")).unwrap());
    let mut bad = Vec::new();
    let mut there = BTreeSet::new();
    for path in files(&src) {
        let relative = path.strip_prefix(&src).unwrap();
        // Programs stand on the library's roof: to them it is another crate.
        let program = relative.starts_with("bin");
        if relative.extension().is_none_or(|e| e != "rs") || relative == Path::new("lib.rs") || program {
            continue;
        }
        let module = relative.iter().next().unwrap().to_str().unwrap().trim_end_matches(".rs");
        there.insert(module.to_string());
        bad.extend(violations(&order, relative, &fs::read_to_string(&path).unwrap()));
    }
    assert_eq!(order.iter().cloned().collect::<BTreeSet<_>>(), there, "modules in src/lib.rs, and files in src");
    assert!(bad.is_empty(), "{}", bad.join("\n"));
}

#[test]
fn floors_are_read_in_every_spelling() {
    let lib = "//! mod no;\npub mod error;\npub(crate) mod sys; // mod no;\nmod bql;\n#[cfg(test)] mod late;\n\
               /* mod no; */ mod\n inline { mod not_a_floor; }\npub(in crate) mod last;";
    assert_eq!(floors(lib), ["error", "sys", "bql", "late", "inline", "last"]);
}

/// Lines of `text` that break the order [a, outgoing, incoming, top] from the file `relative`.
fn caught(relative: &str, text: &str) -> Vec<usize> {
    let order = floors("mod a;\nmod outgoing;\nmod incoming;\nmod top;");
    let bad = violations(&order, Path::new(relative), text);
    bad.iter().map(|b| b.split(':').nth(1).unwrap().parse().unwrap()).collect()
}

#[test]
fn every_way_of_naming_a_module_is_seen() {
    let cases = [
        ("a.rs", "use crate::top::X;", vec![1]),
        ("a.rs", "fn f() { crate::top::g() }", vec![1]),
        ("a.rs", "use crate::{\n  top::X,\n  a };", vec![2]),
        ("a.rs", "use crate::{a::{b, top}, top};", vec![1]),
        ("a.rs", "use crate :: top;", vec![1]),
        ("a.rs", "use crate::\n    top;", vec![2]),
        ("a.rs", "use super::top::X;", vec![1]),
        ("a.rs", "use super::{a, top};", vec![1]),
        ("a/mod.rs", "use super::top;", vec![1]),
        ("a/b.rs", "use super::super::top;", vec![1]),
        ("a/b/c.rs", "fn f(x: super::super::super::top::X) {}", vec![1]),
        ("a.rs", "mod tests { use super::super::top; }", vec![1]),
        ("a.rs", "mod tests {}\nuse super::top;", vec![2]),
        ("a.rs", "macro_rules! m { () => { $crate::top::x() } }", vec![1]),
        ("a.rs", "use crate::*;", vec![1]),
        ("a.rs", "use crate as root;", vec![1]),
        ("a.rs", "use crate::Reexported;", vec![1]),
        ("a.rs", "#[path = \"../top/x.rs\"] mod x;", vec![1]),
        ("a.rs", "#[path = \"../src/top/x.rs\"] mod x;", vec![1]),
        ("a.rs", "#[path = \"top/x.rs\"] mod x;", vec![1]),
        ("a/b.rs", "#[path = \"../top/x.rs\"] mod x;", vec![1]),
        ("incoming.rs", "use crate::outgoing::X;", vec![1]),
        ("outgoing/x.rs", "use crate::incoming::X;", vec![1]),
    ];
    for (file, text, lines) in cases {
        assert_eq!(caught(file, text), lines, "{file}: {text}");
    }
}

#[test]
fn what_is_allowed_is_left_alone() {
    let cases = [
        ("top.rs", "use crate::{a::X, outgoing, incoming::{Y, z}};"),
        ("top/x.rs", "use super::y; use super::super::a; use crate::top::z;"),
        ("a.rs", "// use crate::top;\n/* crate::top /* crate::top */ crate::top */ const S: &str = \"crate::top\";"),
        ("a.rs", "const S: &str = r#\"crate::\"top\"#; const C: char = '\"'; fn f<'a>() {} /* crate::top */"),
        ("a.rs", "mod tests { use super::top; }"),
        ("a.rs", "pub(super) fn f() {} pub(crate) fn g() {}"),
        ("a/b.rs", "use super::top;"),
        ("a/b.rs", "#[path = \"b_tests.rs\"] mod tests;"),
        ("a.rs", "#[path = \"a/tests.rs\"] mod tests;"),
        ("a/b.rs", "#[path = \"../../tests/guest/mod.rs\"] mod guest;"),
        ("a/b/c.rs", "#[path = \"../x.rs\"] mod x;"),
    ];
    for (file, text) in cases {
        assert_eq!(caught(file, text), Vec::<usize>::new(), "{file}: {text}");
    }
}
