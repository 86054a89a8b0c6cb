//! Reading our own sources: every file of the tree, and Rust without its comments and strings.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// All files below `dir`, sorted; what git ignores at the top (target, .work) and .git left out.
pub fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut entries: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
    entries.sort();
    for path in entries {
        let name = path.file_name().unwrap().to_str().unwrap();
        if path.is_symlink() || matches!(name, ".git" | ".work" | "target" | "__pycache__") {
            continue;
        }
        if path.is_dir() { found.extend(files(&path)) } else { found.push(path) }
    }
    found
}

/// Rust source with comments, strings and character literals blanked; every line break stays where it is.
pub fn code_only(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let mut out = String::with_capacity(text.len());
    let mut at = 0;
    while at < chars.len() {
        let end = skip_one(&chars, at);
        if end > at {
            out.extend(chars[at..end].iter().map(|c| if *c == '\n' { '\n' } else { ' ' }));
            at = end;
        } else {
            out.push(chars[at]);
            at += 1;
        }
    }
    out
}

/// Where the comment, string or character literal at `at` ends; `at` itself when there is none.
fn skip_one(chars: &[char], at: usize) -> usize {
    let get = |i: usize| chars.get(i).copied().unwrap_or('\0');
    let find =
        |from: usize, done: &dyn Fn(usize) -> bool| (from..chars.len()).find(|i| done(*i)).unwrap_or(chars.len());
    let in_word = at > 0 && (chars[at - 1].is_alphanumeric() || chars[at - 1] == '_');
    match get(at) {
        '/' if get(at + 1) == '/' => find(at, &|i| chars[i] == '\n'),
        '/' if get(at + 1) == '*' => block_comment(chars, at),
        '"' => quoted(chars, at + 1),
        'b' | 'c' | 'r' if !in_word => {
            let mut i = at + usize::from(get(at) != 'r');
            if get(i) == '"' {
                return quoted(chars, i + 1);
            }
            if get(i) != 'r' {
                return at;
            }
            let hashes = find(i + 1, &|j| chars[j] != '#') - (i + 1);
            i += 1 + hashes;
            if get(i) != '"' {
                return at;
            }
            let closes = |j: usize| chars[j] == '"' && (1..=hashes).all(|k| get(j + k) == '#');
            (find(i + 1, &closes) + 1 + hashes).min(chars.len())
        }
        '\'' if get(at + 1) == '\\' => find(at + 3, &|i| chars[i] == '\'') + 1,
        '\'' if get(at + 2) == '\'' => at + 3,
        _ => at, // a lifetime, or plain code
    }
}

/// The end of a string whose text starts at `at`.
fn quoted(chars: &[char], mut at: usize) -> usize {
    while at < chars.len() && chars[at] != '"' {
        at += if chars[at] == '\\' { 2 } else { 1 };
    }
    (at + 1).min(chars.len())
}

/// The end of a block comment, which in Rust may hold others.
fn block_comment(chars: &[char], start: usize) -> usize {
    let (mut at, mut depth) = (start, 0);
    while at + 1 < chars.len() {
        match (chars[at], chars[at + 1]) {
            ('/', '*') => (depth, at) = (depth + 1, at + 2),
            ('*', '/') => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
        if depth == 0 {
            return at;
        }
    }
    chars.len()
}

/// Names, `::` and other marks, each with its line, counted from 1.
pub fn tokens(code: &str) -> Vec<(usize, String)> {
    let mut found: Vec<(usize, String)> = Vec::new();
    for (number, line) in code.lines().enumerate() {
        let mut rest = line.trim_start();
        while let Some(first) = rest.chars().next() {
            let word = |c: char| c.is_alphanumeric() || c == '_';
            let length = if word(first) {
                rest.find(|c| !word(c)).unwrap_or(rest.len())
            } else if rest.starts_with("::") {
                2
            } else {
                first.len_utf8()
            };
            found.push((number + 1, rest[..length].to_string()));
            rest = rest[length..].trim_start();
        }
    }
    found
}
