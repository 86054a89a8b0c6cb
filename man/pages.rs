//! The page of each chapter, links to it, and the list of all pages.

use super::header::{self, Chapter, Header, Item, Kind};
use super::prose::{Block, blocks, filled, render, sentences, tagged};
use super::roff::{self, Stamp};
use super::{options, overview, tool};

/// Columns a prototype may take, so that it fits on a terminal of 80.
const WIDTH: usize = 70;
/// What callers are told of a function's marks.
const MARKS: [(&str, &str); 4] = [
    ("[any]", "any thread, any time, big lock held or not"),
    ("[bql]", "any thread that holds the big lock"),
    ("[free]", "any thread that does not hold the big lock; may wait"),
    ("[cb]", "also inside callbacks"),
];

/// What the pages are made from.
#[derive(Clone, Copy)]
pub(crate) struct Texts<'a> {
    pub(crate) header: &'a str,
    pub(crate) options: &'a str,
    pub(crate) readme: &'a str,
    pub(crate) tool: &'a str,
}

/// Every page: where it belongs (`man3/vmig_new.3`), and its text.
pub(crate) fn all(texts: &Texts, stamp: &Stamp) -> Result<Vec<(String, String)>, String> {
    let header = header::parse(texts.header)?;
    let mut out = vec![
        ("man7/vmig.7".to_string(), overview::page(&header, texts.readme, stamp)?),
        ("man7/vmig-options.7".to_string(), options::page(texts.options, stamp)?),
        ("man1/vmig.1".to_string(), tool::page(texts.tool, stamp)?),
    ];
    for chapter in &header.chapters {
        let page = chapter.page();
        out.push((format!("man3/{page}.3"), chapter_page(&header, chapter, stamp)));
        let link = format!(".so man3/{page}.3\n");
        out.extend(linked(chapter).map(|name| (format!("man3/{name}.3"), link.clone())));
    }
    let mut names: Vec<_> = out.iter().map(|(name, _)| name).collect();
    names.sort();
    match names.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(format!("two pages would be {}", pair[0])),
        None => Ok(out),
    }
}

/// What of a chapter a reader may ask man(1) for: functions and types. The handle has vmig(7).
fn linked(chapter: &Chapter) -> impl Iterator<Item = &str> {
    let named = chapter.of(Kind::Function).chain(chapter.of(Kind::Type));
    named.map(|item| item.name.as_str()).filter(|name| *name != "vmig")
}

fn chapter_page(header: &Header, chapter: &Chapter, stamp: &Stamp) -> String {
    let name = chapter.page();
    let mut out = roff::title(&name, 3, stamp);
    let names: Vec<_> = std::iter::once(name.as_str()).chain(linked(chapter)).map(roff::code).collect();
    let names = format!("{} \\- {}", names.join(", "), roff::prose(&chapter.title));
    out += &(roff::section("NAME") + &roff::filled(&names));
    out += &synopsis(chapter);
    out += &format!("{}{}", roff::section("DESCRIPTION"), body(&render(&blocks(&chapter.intro), false)));
    for function in chapter.of(Kind::Function) {
        out += &roff::part(&format!("{}()", function.name));
        out += &body(&described(function));
    }
    for (title, text) in &chapter.texts {
        out += &roff::section(&title.to_uppercase());
        out += &body(&render(&blocks(text), false));
    }
    out += &types(chapter);
    out += &results(chapter);
    out += &errors(chapter);
    out + &see_also(header, &name)
}

/// Without the paragraph macro at its beginning, which a heading makes superfluous.
fn body(text: &str) -> String {
    text.strip_prefix(".PP\n").unwrap_or(text).into()
}

fn synopsis(chapter: &Chapter) -> String {
    let mut out = roff::section("SYNOPSIS") + ".nf\n.B #include <vmig.h>\n.PP\n";
    for function in chapter.of(Kind::Function) {
        out += &prototype(&function.code).iter().map(|l| format!("{}\n", roff::protected(l))).collect::<String>();
    }
    out + ".fi\n.PP\nCompile and link with \\fI$(pkg\\-config \\-\\-cflags \\-\\-libs vmig)\\fP.\n"
}

/// A prototype in lines that fit, parameters under one another, their names slanted.
fn prototype(code: &str) -> Vec<String> {
    let Some((head, rest)) = code.split_once('(') else { return vec![roff::code(code)] };
    let parameters = parameters(rest.strip_suffix(')').unwrap_or(rest));
    let mut lines = vec![format!("\\fB{}(\\fP", roff::code(head))];
    let left = " ".repeat(head.len() + 1);
    let mut used = left.len();
    for (i, parameter) in parameters.iter().enumerate() {
        let last = i + 1 == parameters.len();
        if i > 0 && used + parameter.len() + 3 > WIDTH {
            lines.push(left.clone());
            used = left.len();
        } else if i > 0 {
            lines.last_mut().into_iter().for_each(|l| *l += " ");
            used += 1;
        }
        used += parameter.len() + 1;
        let end = if last { ");" } else { "," };
        lines.last_mut().into_iter().for_each(|l| *l += &format!("{}\\fB{end}\\fP", slanted(parameter)));
    }
    lines
}

/// Parameters between commas that are in no parentheses.
fn parameters(list: &str) -> Vec<String> {
    let mut out = vec![String::new()];
    let mut depth = 0;
    for c in list.chars() {
        match c {
            '(' => depth += 1,
            ')' => depth -= 1,
            ',' if depth == 0 => {
                out.push(String::new());
                continue;
            }
            _ => {}
        }
        out.last_mut().into_iter().for_each(|p| p.push(c));
    }
    out.iter().map(|p| p.trim().to_string()).collect()
}

/// A declaration in bold, the name it declares slanted.
fn slanted(declaration: &str) -> String {
    let letter = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let end = match declaration.find("(*") {
        Some(pointer) => declaration[pointer..].find(')').map_or(declaration.len(), |i| pointer + i),
        None => declaration.find('[').unwrap_or(declaration.len()),
    };
    let start = declaration[..end].rfind(|c| !letter(c)).map_or(0, |i| i + 1);
    if start == 0 {
        return format!("\\fB{}\\fP", roff::code(declaration)); // void
    }
    let (before, rest) = declaration.split_at(start);
    let (name, after) = rest.split_at(end - start);
    let bold = |text: &str| if text.is_empty() { String::new() } else { format!("\\fB{}\\fP", roff::code(text)) };
    format!("{}\\fI{}\\fP{}", bold(before), roff::code(name), bold(after))
}

/// The comment of a function, and who may call it: the marks, which end one of its paragraphs.
fn described(function: &Item) -> String {
    let mut blocks = blocks(&function.doc);
    let marks = take_marks(&mut blocks);
    let mut out = render(&blocks, false);
    let told: Vec<_> = MARKS.iter().filter(|(mark, _)| marks.contains(mark)).map(|(_, text)| *text).collect();
    if marks == ["[cb]"] {
        out += ".PP\nMay be called inside callbacks only.\n";
    } else if !told.is_empty() {
        out += &format!(".PP\n{}", filled(&format!("May be called by {}.", told.join("; "))));
    }
    out
}

/// Takes the marks away from the ends of paragraphs.
pub(crate) fn take_marks(blocks: &mut [Block]) -> Vec<&'static str> {
    let mut found = Vec::new();
    for block in blocks {
        let Block::Paragraph(text) = block else { continue };
        while let Some((mark, _)) = MARKS.iter().find(|(mark, _)| text.ends_with(mark)) {
            text.truncate(text.len() - mark.len());
            text.truncate(text.trim_end().len());
            found.push(*mark);
        }
    }
    found
}

fn types(chapter: &Chapter) -> String {
    let mut out = String::new();
    for item in chapter.of(Kind::Type) {
        out += &roff::part(&item.name);
        let doc = render(&blocks(&item.doc), false);
        out += &match item.members.is_empty() {
            true => format!("{}{doc}", roff::verbatim(&wrapped(&item.code)).replacen(".PP\n", "", 1)),
            false => body(&doc),
        };
        for (code, doc) in &item.members {
            out += &tagged(&slanted(code), &render(&blocks(doc), true));
        }
    }
    if !out.is_empty() {
        out = roff::section("TYPES") + &out;
    }
    let mut constants = chapter.of(Kind::Constant).peekable();
    if constants.peek().is_some() {
        out += &roff::section("CONSTANTS");
    }
    for item in constants {
        let term = format!("\\fB{}\\fP ({})", roff::code(&item.name), roff::code(&item.code));
        out += &tagged(&term, &render(&blocks(&item.doc), true));
    }
    out
}

/// The typedef of a callback, in lines that fit.
fn wrapped(code: &str) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in format!("{code};").split(' ') {
        if lines.last().is_some_and(|l| l.len() + word.len() >= WIDTH) {
            lines.push("       ".into());
        }
        lines.last_mut().into_iter().for_each(|l| *l += &format!("{}{word}", if l.is_empty() { "" } else { " " }));
    }
    lines
}

/// The sentences of a function's comment, without its marks.
pub(crate) fn told(function: &Item) -> Vec<String> {
    let mut blocks = blocks(&function.doc);
    take_marks(&mut blocks);
    let paragraphs = blocks.iter().filter_map(|b| if let Block::Paragraph(text) = b { Some(text) } else { None });
    paragraphs.flat_map(|text| sentences(text)).map(str::to_string).collect()
}

/// What a function returns, in sentences of its comment: those that say so, and the first one of a function that returns
/// neither errors nor nothing, for it says what there is.
pub(crate) fn returned(function: &Item) -> Vec<String> {
    let status = ["int vmig_", "void vmig_"].iter().any(|kind| function.code.starts_with(kind));
    let says = |s: &str| {
        let begins = s.starts_with("Returns ") || s.starts_with("NULL on ");
        begins || s.contains(" and returns ") && !s.contains("returns at once")
    };
    let all = told(function).into_iter().enumerate();
    all.filter(|(i, s)| says(s) || *i == 0 && !status).map(|(_, s)| s).collect()
}

fn results(chapter: &Chapter) -> String {
    let functions = || chapter.of(Kind::Function);
    if functions().next().is_none() {
        return String::new();
    }
    let mut out = roff::section("RETURN VALUE");
    if functions().any(|f| f.code.starts_with("int ")) {
        out += &filled(
            "Functions of type `int` return 0 or more for success and a negative errno for failure; vmig_errmsg() \
             then says why, in a sentence. A failed call changes nothing.",
        );
    }
    for function in functions() {
        let told = returned(function);
        if !told.is_empty() {
            out += &tagged(&format!("\\fB{}\\fP()", roff::code(&function.name)), &filled(&told.join(" ")));
        }
    }
    out
}

/// What a function's comment says of errors: errno, and when it comes. Read are the clauses that begin with errors.
pub(crate) fn failures(function: &Item) -> Vec<(String, String)> {
    let mut out = Vec::new();
    for sentence in told(function) {
        for clause in sentence.trim_end_matches('.').split("; ") {
            let (errors, when) = failure(clause);
            out.extend(errors.iter().map(|errno| (errno.to_string(), when.to_string())));
        }
    }
    out
}

/// The errors a clause begins with, and when they come: `-EINVAL or -EPERM if ...`, `-EBUSY: ...`.
fn failure(clause: &str) -> (Vec<&str>, &str) {
    let clause = clause.strip_prefix("Fails with ").unwrap_or(clause);
    let mut errors = Vec::new();
    let mut rest = clause;
    while let Some(errno) = roff::name(rest).filter(|name| name.starts_with('-')) {
        errors.push(errno);
        rest = &rest[errno.len()..];
        rest = [", ", " or ", " and "]
            .iter()
            .find_map(|j| rest.strip_prefix(j).filter(|r| r.starts_with("-E")))
            .unwrap_or(rest);
    }
    // `-EADDRINUSE and other errors`: only together with its beginning.
    let when = rest.trim_start_matches([' ', ':']);
    (errors, if when.starts_with("and ") || when.starts_with("or ") { clause } else { when })
}

fn errors(chapter: &Chapter) -> String {
    // By errno, and for each what its functions say; functions that say the same stand together.
    let mut all: std::collections::BTreeMap<String, Vec<(String, Vec<&str>)>> = Default::default();
    for function in chapter.of(Kind::Function) {
        for (errno, when) in failures(function) {
            let told = all.entry(errno).or_default();
            match told.iter_mut().find(|(text, _)| *text == when) {
                Some((_, functions)) => functions.push(&function.name),
                None => told.push((when, vec![&function.name])),
            }
        }
    }
    if chapter.of(Kind::Function).all(|f| !f.code.starts_with("int ")) {
        return String::new();
    }
    let general = "NULL is `-EINVAL` where a thing is needed. A failing hook's or callback's own error is passed on. Texts, \
                   and errors that are not named here, may change between releases.";
    let mut out = roff::section("ERRORS") + &filled(general);
    for (errno, told) in all {
        let lines = told.iter().map(|(when, functions)| {
            let names: Vec<_> = functions.iter().map(|f| format!("{f}()")).collect();
            filled(&format!("{}: {when}.", names.join(", ")))
        });
        out += &tagged(&roff::prose(&errno), &lines.collect::<Vec<_>>().join(".br\n"));
    }
    out
}

/// All other pages.
pub(crate) fn see_also(header: &Header, own: &str) -> String {
    let fixed = [("vmig".to_string(), 7), ("vmig-options".to_string(), 7)];
    let pages = fixed.into_iter().chain(header.chapters.iter().map(|c| (c.page(), 3)));
    let shown: Vec<_> = pages.filter(|(name, _)| name != own).map(|(name, part)| roff::page(&name, part)).collect();
    format!("{}{}\n", roff::section("SEE ALSO"), shown.join(",\n"))
}
