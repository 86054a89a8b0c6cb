//! The man pages say all that the header and the table of options say, in roff that no tool complains of.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;
#[path = "../man/main.rs"]
#[expect(dead_code, reason = "its main() is for make")]
mod man;

use common::{built, root, run, scratch, skip, source, words};
use man::header::{Kind, parse};
use man::pages::{Texts, all, failures, returned, take_marks};
use man::prose::{Block, blocks, render};
use man::roff::{Stamp, protected};
use std::{collections::BTreeMap, fs, io::Write, process::Command, process::Stdio};
use vmig::options::TABLE;

const STAMP: Stamp = Stamp { version: "1.2.3", date: "2026-01-02" };

fn text(file: &str) -> String {
    fs::read_to_string(root().join(file)).unwrap()
}

/// All pages by name, from the sources as they are now.
fn pages() -> BTreeMap<String, String> {
    made(&text("include/vmig.h"), &text("docs/options.md"), &text("docs/tool.md")).unwrap().into_iter().collect()
}

fn made(header: &str, options: &str, tool: &str) -> Result<Vec<(String, String)>, String> {
    all(&Texts { header, options, readme: &text("README.md"), tool }, &STAMP)
}

/// The page that `man 3 name` shows.
fn shown<'a>(pages: &'a BTreeMap<String, String>, name: &str) -> &'a str {
    let page = pages.get(&format!("man3/{name}.3")).unwrap_or_else(|| panic!("{name} has no page"));
    match page.strip_prefix(".so ") {
        Some(target) => &pages[target.trim()],
        None => page,
    }
}

/// Names of the functions C can call, from the Rust sources.
fn exported() -> Vec<String> {
    let mut out = Vec::new();
    for file in source::files(&root().join("src")) {
        let text = fs::read_to_string(&file).unwrap_or_default();
        for after in text.split("#[unsafe(no_mangle)]\n").skip(1) {
            let name = after.split("fn ").nth(1).unwrap().split('(').next().unwrap();
            out.push(name.to_string());
        }
    }
    out
}

/// What roff shows, without fonts and the lines that are only macros.
fn unroffed(page: &str) -> String {
    let mut out = String::new();
    for line in page.lines() {
        let heading = [".SH ", ".SS ", ".B "].iter().find_map(|m| line.strip_prefix(m));
        out += if line.starts_with('.') { heading.unwrap_or("") } else { line };
        out.push('\n');
    }
    let names =
        [("\\(dq", "\""), ("\\(aq", "'"), ("\\(ga", "`"), ("\\(ha", "^"), ("\\(ti", "~"), ("\\-", "-"), ("\\&", "")];
    let fonts = [("\\fB", ""), ("\\fI", ""), ("\\fP", ""), ("\\e", "\\")];
    names.iter().chain(&fonts).fold(out, |text, (from, to)| text.replace(from, to))
}

/// Words and numbers, one space between, so that one text can be looked for in another.
fn tokens(text: &str) -> String {
    let words = text.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|w| !w.is_empty());
    words.fold(" ".to_string(), |text, word| text + word + " ")
}

#[test]
fn every_function_and_type_has_a_page() {
    let (pages, names) = (pages(), exported());
    assert!(names.len() > 50, "only {} functions found in src", names.len());
    for name in names {
        let page = shown(&pages, &name);
        assert!(page.contains(&format!("\n.SS {name}()\n")), "{name} is not described on its page");
        let synopsis = page.split(".SH DESCRIPTION").next().unwrap();
        let prototype = |l: &str| unroffed(l).contains(&format!("{name}("));
        assert!(synopsis.lines().any(prototype), "{name} is not in the synopsis of its page");
    }
    let header = text("include/vmig.h");
    let types = header.lines().filter_map(|l| l.strip_prefix("} ")?.strip_suffix(';')).collect::<Vec<_>>();
    assert!(types.len() > 10 && types.contains(&"vmig_ops"), "{types:?}");
    for name in types {
        assert!(shown(&pages, name).contains(&format!("\n.SS {name}\n")), "{name} is not described on its page");
    }
}

/// Comments of the chapters with the line below each, from nothing but where comments begin and end.
fn comments(header: &str) -> Vec<(String, String)> {
    let chapters = header.split_once("/* ---- 1. ").unwrap().1.split_once('\n').unwrap().1;
    let chapters = chapters.rsplit_once("#ifdef __cplusplus").unwrap().0;
    let each = chapters.split("/*").skip(1).map(|rest| {
        let (inner, after) = rest.split_once("*/").unwrap();
        let lines = inner.lines().map(|l| l.trim().trim_start_matches("* ").trim_end_matches('*').to_string());
        let next = after.trim_start_matches('\n').lines().next().unwrap_or("");
        (lines.collect::<Vec<_>>().join("\n"), next.to_string())
    });
    let untitled = |inner: String| match inner.trim_start().starts_with("---- ") {
        true => inner.split_once('\n').map_or(String::new(), |(_, rest)| rest.to_string()),
        false => inner,
    };
    each.map(|(inner, next)| (untitled(inner), next)).filter(|(inner, _)| !inner.is_empty()).collect()
}

#[test]
fn no_word_of_the_header_is_lost() {
    let (pages, header) = (pages(), text("include/vmig.h"));
    let whole: String = pages.values().map(|page| tokens(&unroffed(page))).collect();
    let mut read = 0;
    for (comment, next) in comments(&header) {
        let inner = next.starts_with("#if")
            || next.starts_with("template")
            || next.starts_with("#define") && next.contains('(');
        let paragraphs = comment.split("\n*\n").flat_map(|p| p.split("\n\n"));
        for paragraph in paragraphs.filter(|_| !inner) {
            let mut told = paragraph.trim();
            while let Some(before) = ["[any]", "[bql]", "[free]", "[cb]"].iter().find_map(|m| told.strip_suffix(m)) {
                told = before.trim_end();
            }
            read += 1;
            assert!(whole.contains(&tokens(told)), "no page says: {told}");
        }
    }
    assert!(read > 200, "only {read} paragraphs read");
    let rules = header.split("\n * Results ").nth(1).unwrap().split("*/").next().unwrap();
    for line in rules.lines() {
        assert!(tokens(&unroffed(&pages["man7/vmig.7"])).contains(&tokens(line)), "vmig(7) does not say: {line}");
    }
    for item in parse(&header).unwrap().chapters.iter().flat_map(|c| c.of(Kind::Constant)) {
        assert!(whole.contains(&format!(" {} {} ", item.name, item.code)), "no page has {}", item.name);
    }
}

#[test]
fn every_option_is_on_its_page() {
    let page = unroffed(&pages()["man7/vmig-options.7"]);
    let told = tokens(&page);
    for row in &TABLE {
        assert!(page.contains(&format!("\n{}\n", row.name)), "{} has no entry", row.name);
        assert!(told.contains(&tokens(row.doc)), "{}: its meaning is not on the page", row.name);
    }
}

#[test]
fn the_command_has_a_page() {
    let (page, tool) = (pages().remove("man1/vmig.1").unwrap(), text("docs/tool.md"));
    let told = tokens(&unroffed(&page));
    assert!(!page.contains("]("), "a link is left:\n{page}");
    let command = tool.split_once("\n## vmig inspect\n").unwrap().1.split_once("\n## Metrics\n").unwrap().0;
    let paragraphs =
        command.split("\n\n").map(man::tool::unlinked).filter(|p| !p.contains("|---") && !p.starts_with('#'));
    for paragraph in paragraphs {
        for sentence in paragraph.split(". ") {
            assert!(told.contains(&tokens(sentence)), "vmig(1) does not say: {sentence}");
        }
    }
    assert_eq!(man::tool::unlinked("a [b](c.md) [d] (e) f](g [h](i#j)"), "a b [d] (e) f](g h");
}

#[test]
fn every_function_says_who_may_call_it_and_what_it_returns() {
    let header = parse(&text("include/vmig.h")).unwrap();
    for function in header.chapters.iter().flat_map(|c| c.of(Kind::Function)) {
        let doc = function.doc.join("\n");
        let marked = ["[any]", "[bql]", "[free]", "[cb]"].iter().any(|mark| doc.contains(mark));
        assert!(marked, "{}: its comment has no mark: who may call it?", function.name);
        let status = function.code.starts_with("int ") || function.code.starts_with("void vmig_");
        assert!(status || !returned(function).is_empty(), "{}: what does it return?", function.name);
    }
}

#[test]
fn make_built_these_pages() {
    built("man/.built");
    let built = common::target().join("man");
    let same =
        |page: &str| page.lines().filter(|l| !l.starts_with(".TH ")).map(|l| format!("{l}\n")).collect::<String>();
    let pages = pages();
    for (name, page) in &pages {
        let there = fs::read_to_string(built.join(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(same(&there) == same(page), "{name} was built from other sources: run `make man`");
    }
    let there =
        ["man1", "man3", "man7"].iter().map(|part| fs::read_dir(built.join(part)).unwrap().count()).sum::<usize>();
    assert_eq!(there, pages.len(), "there are pages of something that is no more");
}

/// True, with the skip counted, where a program is missing.
fn without(program: &str) -> bool {
    let found = Command::new(program).arg("--version").output().is_ok();
    !found && skip(program, &format!("{program} is not installed"))
}

/// What a tool says of each page, on both of its outputs; its rendering goes to a file.
fn complaints(tool: &str, arguments: &[&str]) -> Vec<String> {
    let dir = scratch("man-lint");
    let mut said = Vec::new();
    for (name, page) in pages() {
        let path = dir.join(name.replace('/', "-"));
        fs::write(&path, &page).unwrap();
        if !page.starts_with(".so ") {
            let mut command = Command::new(tool);
            command.env("LC_ALL", "C.UTF-8").args(arguments).arg(&path).stdout(Stdio::null());
            let out = command.output().unwrap();
            if !out.stderr.is_empty() || !out.status.success() {
                said.push(format!("{name}: {}", words(&out)));
            }
        }
    }
    said
}

#[test]
fn mandoc_has_nothing_to_say() {
    if without("mandoc") {
        return;
    }
    let dir = scratch("mandoc");
    for (name, page) in pages().into_iter().filter(|(_, page)| !page.starts_with(".so ")) {
        let path = dir.join(name.replace('/', "-"));
        fs::write(&path, page).unwrap();
        let out = Command::new("mandoc").args(["-Tlint", "-Wwarning"]).arg(&path).output().unwrap();
        assert!(out.stdout.is_empty() && out.status.success(), "{name}: {}", words(&out));
    }
}

#[test]
fn groff_has_nothing_to_say() {
    if without("groff") {
        return;
    }
    let said = complaints("groff", &["-man", "-Tutf8", "-ww"]);
    assert!(said.is_empty(), "{}", said.join("\n"));
}

#[test]
fn man_has_nothing_to_say() {
    if without("man") {
        return;
    }
    let said = complaints("man", &["-l", "--warnings", "-Tutf8"]);
    assert!(said.is_empty(), "{}", said.join("\n"));
}

/// What groff makes of a piece of text, on long lines.
fn grotty(text: &str) -> String {
    let page = format!(".TH X 3 2026-01-02 a b\n.nh\n.ad l\n.ll 1000n\n.SH NAME\nx \\- y\n.SH BODY\n{text}");
    let mut groff = Command::new("groff");
    groff.args(["-man", "-Tascii", "-P-cbou", "-ww", "-rLL=1000n"]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = groff.stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(page.as_bytes()).unwrap();
    let out = child.wait_with_output().unwrap();
    assert!(out.stderr.is_empty(), "{}", String::from_utf8_lossy(&out.stderr));
    let shown = String::from_utf8(out.stdout).unwrap();
    let body = shown.split_once("BODY\n").unwrap().1;
    body.lines().filter(|l| !l.contains("2026-01-02")).map(|l| format!("{l}\n")).collect()
}

fn rendered(lines: &[&str]) -> String {
    render(&blocks(&lines.iter().map(|l| l.to_string()).collect::<Vec<_>>()), false)
}

#[test]
fn what_means_something_to_roff_is_shown_as_it_stands() {
    if without("groff") {
        return;
    }
    let hostile = [
        ".TH evil 1",
        "'br is a request, too",
        "a \\fBback\\slash\\fP and \\n(.l and \\",
        "-1 and -ENOENT and --long and half-open",
        "tilde ~ caret ^ tick ` quote \" apostrophe ' hash \\\" comment",
        "one sentence.  .so /etc/passwd",
    ];
    for text in hostile {
        let flat = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
        assert_eq!(flat(&grotty(&rendered(&[text]))), flat(text), "{text}");
        let code = grotty(&rendered(&["    keep   this", &format!("    {text}")]));
        assert!(code.contains(&format!("{text}\n")) && code.contains("keep   this\n"), "{text}: {code}");
    }
    assert_eq!(protected("a.b"), "a.b");
}

#[test]
fn markdown_is_rendered() {
    let cases: [(&[&str], &str); 9] = [
        (
            &["Set `max-bandwidth` by vmig_set(), or", "-EINVAL."],
            ".PP\nSet \\fBmax\\-bandwidth\\fP by \\fBvmig_set\\fP(), or \\fB\\-EINVAL\\fP.\n",
        ),
        (
            &["Fills `*out`. It is **bold**, *live*, a char * or 2 * 3 * 4."],
            ".PP\nFills \\fB*out\\fP.\nIt is \\fBbold\\fP, \\fIlive\\fP, a char * or 2 * 3 * 4.\n",
        ),
        (&["text:", "- one", "  and a half", "- two"], ".PP\ntext:\n.IP \\(bu 4\none and a half\n.IP \\(bu 4\ntwo\n"),
        (&["1. one", "2. two"], ".IP 1. 4\none\n.IP 2. 4\ntwo\n"),
        (
            &["", "    if (x - y)", "        z / * why * /", ""],
            ".PP\n.in +4n\n.EX\nif (x \\- y)\n    z /* why */\n.EE\n.in\n",
        ),
        (&["```c", "a;", "", ".b", "```", "more"], ".PP\n.in +4n\n.EX\na;\n\n\\&.b\n.EE\n.in\n.PP\nmore\n"),
        (
            &["  [any]   who", "          ever", "  [x_y]   z"],
            ".TP\n\\fB[any]\\fP\nwho ever\n.TP\n\\fB[x_y]\\fP\nz\n",
        ),
        (
            &["Pointers  NULL", "          is", "Callbacks get"],
            ".TP\n\\fBPointers\\fP\nNULL is\n.TP\n\\fBCallbacks\\fP\nget\n",
        ),
        (&["| a | b |", "|---|---|", "| `x-y` | one \\| two | three |"], ".TP\n\\fBx\\-y\\fP\none | two; three\n"),
    ];
    for (lines, roff) in cases {
        assert_eq!(rendered(lines), roff, "{lines:?}");
    }
    let mut marked = blocks(&["Does it. [any][cb]".into(), String::new(), "More, `[bql]` inside.".into()]);
    assert_eq!(take_marks(&mut marked), ["[cb]", "[any]"]);
    assert_eq!(marked[0], Block::Paragraph("Does it.".into()));
}

#[test]
fn what_it_does_not_know_is_an_error() {
    let header = text("include/vmig.h");
    let with = |line: &str| header.replacen("int vmig_new(", &format!("{line}\nint vmig_new("), 1);
    for line in ["union vmig_u {", "static inline int vmig_f(void)", "extern int vmig_x;", "int other(void);"] {
        let result = parse(&with(line));
        assert!(result.is_err(), "{line}");
    }
    assert!(
        parse(&with("int vmig_other(void);")).unwrap().chapters[0].of(Kind::Function).any(|f| f.name == "vmig_other")
    );
    let twice = header.replacen("---- 2. the big lock and the run state", "---- 2. a guest of honour", 1);
    let error = made(&twice, &text("docs/options.md"), &text("docs/tool.md")).unwrap_err();
    assert!(error.contains("two pages would be man3/vmig-guest.3"), "{error}");
    let out = run(Command::new("sed").args(["-n", "1p"]).arg(root().join("docs/options.md")));
    let no_table = String::from_utf8(out.stdout).unwrap();
    assert!(made(&header, &no_table, &text("docs/tool.md")).is_err());
    assert!(made(&header, &text("docs/options.md"), "# The tool\n\n## Trace files\n\nNone.\n").is_err());
}

#[test]
fn errors_are_collected() {
    let told = |doc: &str| {
        let header = text("include/vmig.h").replacen(
            "/* Makes a guest",
            &format!("/* {doc} */\nint vmig_x(void);\n\n/* Makes a guest"),
            1,
        );
        let header = parse(&header).unwrap();
        let function = header.chapters[0].of(Kind::Function).next().unwrap();
        failures(function).into_iter().map(|(errno, when)| format!("{errno} {when}")).collect::<Vec<_>>()
    };
    assert_eq!(
        told("Does it. -EINVAL: not a URI; -EBUSY while it runs. [any]"),
        ["-EINVAL not a URI", "-EBUSY while it runs"]
    );
    assert_eq!(told("Fails with -EINVAL if it is missing; then nothing was made."), ["-EINVAL if it is missing"]);
    assert_eq!(told("-EINVAL, -EACCES or -EPERM if not."), ["-EINVAL if not", "-EACCES if not", "-EPERM if not"]);
    assert_eq!(told("-EIO and other errors of reading."), ["-EIO -EIO and other errors of reading"]);
    assert_eq!(told("Later calls give -EINVAL, half-empty."), [""; 0]);
    let pages = pages();
    let errors = unroffed(shown(&pages, "vmig_add_ram").split(".SH ERRORS\n").nth(1).unwrap());
    let busy = errors.split("\n-EBUSY\n").nth(1).unwrap().split("\n-E").next().unwrap();
    assert!(tokens(busy).contains(&tokens("vmig_add_ram(), vmig_remove_ram(),")), "{busy}");
    let results = unroffed(shown(&pages, "vmig_wait").split(".SH RETURN VALUE\n").nth(1).unwrap());
    assert!(tokens(&results).contains(&tokens("vmig_wait() Returns 1 if none runs")), "{results}");
}
