//! docs/integrating.md is followed word for word, in an empty folder: its files are written, its commands run in their order,
//! what they print is what it says, and the guest arrives.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use common::{root, scratch, without_userfaultfd};

/// A block between two fences.
struct Block {
    kind: String,
    /// The text above, on one line.
    above: String,
    text: String,
}

fn blocks(page: &str) -> Vec<Block> {
    let (mut all, mut above, mut lines) = (Vec::new(), String::new(), page.lines());
    while let Some(line) = lines.next() {
        match line.strip_prefix("```") {
            Some(kind) => {
                let text: String = lines.by_ref().take_while(|l| *l != "```").map(|l| format!("{l}\n")).collect();
                all.push(Block { kind: kind.to_owned(), above: std::mem::take(&mut above), text });
            }
            None if line.is_empty() => (),
            None => above = format!("{above} {line}"),
        }
    }
    all
}

/// What a C block is put into, and whether behind what is there.
fn file_of(block: &Block) -> (&str, &str) {
    let (verb, how) = match (block.above.rfind("Put into `"), block.above.rfind("Append to `")) {
        (Some(at), None) => (at, ">"),
        (None, Some(at)) => (at, ">>"),
        (Some(put), Some(append)) if put > append => (put, ">"),
        (_, Some(append)) => (append, ">>"),
        (None, None) => panic!("nobody says where this goes, so it is not tested: {}", block.text),
    };
    let name = block.above[verb..].split('`').nth(1).unwrap();
    assert!(block.above.ends_with(&format!("`{name}`:")), "the sentence is not the last: {}", block.above);
    (name, how)
}

/// The page as one script. What the commands of block n print goes to the file `n` of `out`.
fn script(blocks: &[Block], out: &Path) -> String {
    // A guide that fails half-way leaves nobody running.
    let mut script = String::from("set -eu\ntrap 'kill $(jobs -p) 2>/dev/null || true' EXIT\n");
    for (number, block) in blocks.iter().enumerate() {
        match block.kind.as_str() {
            "c" => {
                let (name, how) = file_of(block);
                script += &format!("cat {how}{name} <<'END OF THE FILE'\n{}END OF THE FILE\n", block.text);
            }
            // A reader is slower than the programs, whose last words may be under way.
            "sh" => script += &format!("sleep 1\n{{\n{}}} >{}/{number} 2>&1\n", block.text, out.display()),
            "text" => (),
            kind => panic!("a block of kind '{kind}', which nobody tests"),
        }
    }
    script
}

/// A line with 0 for every number.
fn shape(line: &str) -> String {
    let mut shape = String::new();
    for c in line.trim_end().chars() {
        match c {
            '0'..='9' if shape.ends_with('0') => (),
            '0'..='9' => shape.push('0'),
            c => shape.push(c),
        }
    }
    shape
}

/// The lines of `text` that have the shapes of all the expected lines, in their order.
fn found<'a>(expected: &str, text: &'a str) -> Vec<&'a str> {
    let mut lines = text.lines();
    let find = |wanted: &str| {
        let shape_of = shape(wanted);
        lines
            .find(|line| shape(line) == shape_of)
            .unwrap_or_else(|| panic!("no '{wanted}', in its order, in:\n{text}"))
    };
    expected.lines().map(find).collect()
}

/// A session of somebody whose home directory is `home`.
fn follow(home: &Path, script: &str) -> std::process::Output {
    let path = home.join("session.sh");
    fs::write(&path, script).unwrap();
    let mut command = Command::new("timeout");
    command.args(["-k", "5", "300", "bash"]).arg(path).current_dir(root()).stdin(Stdio::null());
    for inherited in ["MAKEFLAGS", "MFLAGS", "MAKELEVEL"] {
        command.env_remove(inherited); // a make that runs these tests has its own jobs and variables
    }
    // Cargo's own home is not that of the session.
    let own = std::env::var("HOME").unwrap_or_default();
    for (name, default) in [("CARGO_HOME", ".cargo"), ("RUSTUP_HOME", ".rustup")] {
        command.env(name, std::env::var(name).map_or_else(|_| PathBuf::from(&own).join(default), PathBuf::from));
    }
    command.env("HOME", home).env("CARGO_TARGET_DIR", common::target()).env_remove("PKG_CONFIG_LIBDIR");
    common::try_run(&mut command)
}

#[test]
fn the_guide_is_followed_and_the_guest_arrives() {
    if without_userfaultfd() {
        return;
    }
    let page = fs::read_to_string(root().join("docs/integrating.md")).unwrap();
    let blocks = blocks(&page);
    let home = scratch("guide");
    let out = home.join("out");
    fs::create_dir(&out).unwrap();
    let ended = follow(&home, &script(&blocks, &out));
    let printed = |number: usize| fs::read_to_string(out.join(number.to_string())).unwrap_or_default();
    let all: String = (0..blocks.len()).map(printed).collect();
    assert!(ended.status.success(), "{}\n{}\n{all}", ended.status, common::words(&ended));
    let mut counts = Vec::new();
    for (number, block) in blocks.iter().enumerate().filter(|(_, block)| block.kind == "text") {
        assert_eq!(blocks[number - 1].kind, "sh", "what prints this: {}", block.text);
        let count = |line: &str| line.split(|c: char| !c.is_ascii_digit()).find_map(|word| word.parse::<u64>().ok());
        let text = printed(number - 1);
        let lines = found(&block.text, &text);
        let of_guest = lines.iter().filter(|line| line.starts_with("left at ") || line.starts_with("starts at "));
        counts.extend(of_guest.filter_map(|line| count(line)));
    }
    assert!(!all.contains("BROKEN") && !all.contains("warning:"), "{all}");
    // It began at 0, and went on where it left.
    assert!(matches!(counts[..], [0, left, arrived] if left == arrived && left > 0), "{counts:?}");
}

#[test]
fn blocks_shapes_and_orders_are_told_apart() {
    let page = "# A\n\nSome words.\nPut into `a.c`:\n\n```c\nx\n```\n\nAppend to `a.c`:\n\n```c\ny\n```\n\n```sh\ncat a.c\n```\n";
    let blocks = blocks(page);
    assert_eq!(blocks.iter().map(file_of_c).collect::<Vec<_>>(), [Some(("a.c", ">")), Some(("a.c", ">>")), None]);
    assert_eq!(shape("in 52 ms, 1.5 at 06:53"), "in 0 ms, 0.0 at 0:0");
    assert_eq!(found("a 1\nb 2\n", "x\na 77\ny\nb 0\n"), ["a 77", "b 0"]);
    let wrong = |expected: &str| std::panic::catch_unwind(|| found(expected, "a 1\nb 2\n").len()).is_err();
    assert!(wrong("b 1\na 1\n") && wrong("a 1\nc\n") && !wrong("b 1\n"));
}

fn file_of_c(block: &Block) -> Option<(&str, &str)> {
    (block.kind == "c").then(|| file_of(block))
}
