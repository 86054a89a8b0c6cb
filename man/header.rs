//! Reads include/vmig.h: its chapters, and what each declares with the comment above it.

/// The header.
#[derive(Debug, Default)]
pub(crate) struct Header {
    /// The comment it opens with.
    pub(crate) opening: Vec<String>,
    pub(crate) chapters: Vec<Chapter>,
}

#[derive(Debug, Default)]
pub(crate) struct Chapter {
    pub(crate) title: String,
    pub(crate) intro: Vec<String>,
    /// Comments with a heading of their own.
    pub(crate) texts: Vec<(String, Vec<String>)>,
    pub(crate) items: Vec<Item>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Function,
    /// A struct, or the type of a callback or a number.
    Type,
    Constant,
}

#[derive(Debug)]
pub(crate) struct Item {
    pub(crate) kind: Kind,
    pub(crate) name: String,
    pub(crate) doc: Vec<String>,
    /// The declaration on one line; of a struct `struct name`; of a constant its value.
    pub(crate) code: String,
    /// Of a struct: declaration and comment of each member.
    pub(crate) members: Vec<(String, Vec<String>)>,
}

impl Chapter {
    pub(crate) fn of(&self, kind: Kind) -> impl Iterator<Item = &Item> {
        self.items.iter().filter(move |i| i.kind == kind)
    }

    /// Name of its page: the title up to a colon or what joins two things, words joined by hyphens.
    pub(crate) fn page(&self) -> String {
        let title = self.title.to_lowercase();
        let ends = [":", " and ", " for ", " of "];
        let end = ends.iter().filter_map(|end| title.find(end)).min().unwrap_or(title.len());
        let words = title[..end].split_whitespace().filter(|w| !matches!(*w, "the" | "a" | "an"));
        format!("vmig-{}", words.collect::<Vec<_>>().join("-"))
    }
}

/// What is wrong, and in which line.
type Result<T> = std::result::Result<T, String>;
type Lines<'a> = std::iter::Peekable<std::iter::Enumerate<std::str::Lines<'a>>>;

/// Reads the header as build.rs writes it. What it does not know is an error, so that nothing is left out in silence.
pub(crate) fn parse(text: &str) -> Result<Header> {
    let mut header = Header::default();
    let mut lines = text.lines().enumerate().peekable();
    let mut doc: Vec<String> = Vec::new();
    while let Some((number, line)) = lines.next() {
        if line.starts_with("/*") {
            let comment = comment(line, &mut lines);
            doc = file_comment(&mut header, comment, lines.peek().map_or("", |l| l.1));
        } else if line.starts_with("#define ") && !header.chapters.is_empty() {
            let whole = continued(line, &mut lines);
            header.chapters.last_mut().into_iter().for_each(|c| c.items.extend(constant(&whole, &doc)));
            doc.clear();
        } else if line.is_empty() || line.starts_with(['#', '{', '}', ' ']) || is_cplusplus(line) {
            doc.clear();
        } else {
            let item = declaration(line, &mut lines, std::mem::take(&mut doc));
            let item =
                item.ok_or_else(|| format!("include/vmig.h:{}: what does this declare? {line}", number + 1))?;
            let chapter =
                header.chapters.last_mut().ok_or("include/vmig.h declares things before its first chapter")?;
            chapter.items.push(item);
        }
    }
    Ok(header)
}

fn is_cplusplus(line: &str) -> bool {
    line.starts_with("extern \"") || line.starts_with("template ")
}

/// The lines of a comment, without its marks. `first` begins with the opening one.
fn comment<'a>(first: &'a str, lines: &mut Lines<'a>) -> Vec<String> {
    let mut out = Vec::new();
    let mut line = first.trim_start().trim_start_matches("/*");
    loop {
        let text = line.strip_suffix("*/").unwrap_or(line);
        out.push(text.strip_prefix(' ').unwrap_or(text).trim_end().to_string());
        if line.ends_with("*/") {
            return out;
        }
        let Some((_, next)) = lines.next() else { return out };
        line = next.trim_start();
        line = line.strip_prefix('*').filter(|l| !l.starts_with('/')).unwrap_or(line);
    }
}

/// Files a comment where it belongs, or returns it: it is about the next line then, and not about the chapter.
fn file_comment(header: &mut Header, mut comment: Vec<String>, next: &str) -> Vec<String> {
    let first = comment.first().cloned().unwrap_or_default();
    let heading = first.strip_prefix("---- ").map(|h| h.trim_end_matches('-').trim().to_string());
    if header.opening.is_empty() {
        header.opening = comment;
        return Vec::new();
    }
    if let Some(heading) = heading {
        match heading.split_once(". ").filter(|(n, _)| n.bytes().all(|b| b.is_ascii_digit())) {
            Some((_, title)) => {
                header.chapters.push(Chapter { title: title.into(), ..Chapter::default() });
                return Vec::new();
            }
            None => {
                comment.remove(0);
                header.chapters.last_mut().into_iter().for_each(|c| c.texts.push((heading.clone(), comment.clone())));
                return Vec::new();
            }
        }
    }
    match header.chapters.last_mut() {
        Some(chapter) if next.is_empty() => {
            if chapter.items.is_empty() && chapter.intro.is_empty() {
                chapter.intro = comment;
            }
            Vec::new()
        }
        _ => comment,
    }
}

/// A line with those that backslashes add to it.
fn continued(line: &str, lines: &mut Lines) -> String {
    let mut whole = line.to_string();
    while whole.ends_with('\\') {
        whole.pop();
        whole += lines.next().map_or("", |l| l.1);
    }
    whole
}

/// `#define NAME number`, with a comment above or behind it. Other macros are told of in texts.
fn constant(line: &str, above: &[String]) -> Option<Item> {
    let (name, rest) = line.strip_prefix("#define ")?.split_once(' ')?;
    let (value, behind) = rest.split_once("/*").unwrap_or((rest, ""));
    let value = value.trim();
    value.starts_with(|c: char| c.is_ascii_digit()).then(|| {
        let behind = behind.trim_end_matches("*/").trim().to_string();
        let doc = if behind.is_empty() { above.to_vec() } else { vec![behind] };
        Item { kind: Kind::Constant, name: name.into(), doc, code: value.into(), members: Vec::new() }
    })
}

/// A function or a type.
fn declaration<'a>(first: &'a str, lines: &mut Lines<'a>, doc: Vec<String>) -> Option<Item> {
    let item = |kind, name: &str, code: String| Item {
        kind,
        name: name.into(),
        doc: doc.clone(),
        code,
        members: Vec::new(),
    };
    if let Some(name) = first.strip_prefix("typedef struct ").and_then(|r| r.strip_suffix(" {")) {
        let members = members(lines)?;
        return Some(Item { members, ..item(Kind::Type, name, format!("struct {name}")) });
    }
    let whole = statement(first, lines);
    let code = whole.trim_end_matches(';').to_string();
    if let Some(declared) = whole.strip_prefix("typedef ") {
        let function = declared.split_once("(*").and_then(|(_, rest)| rest.split_once(')'));
        let name = function.map(|(name, _)| name).or_else(|| declared.trim_end_matches(';').rsplit(' ').next())?;
        return Some(item(Kind::Type, name, code));
    }
    let (head, _) = whole.split_once('(')?;
    let name = head.rsplit([' ', '*']).next()?;
    let words = head.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '*' | ' '));
    // Its parentheses close at the end and nowhere before.
    let closed = code
        .match_indices(')')
        .find(|(at, _)| code[..=*at].matches('(').count() == code[..=*at].matches(')').count());
    let declares = words && name.starts_with("vmig_") && closed.is_some_and(|(at, _)| at + 1 == code.len());
    declares.then(|| item(Kind::Function, name, code))
}

/// Lines up to a semicolon, as one.
fn statement<'a>(first: &'a str, lines: &mut Lines<'a>) -> String {
    let mut whole = first.trim().to_string();
    while !whole.ends_with(';') {
        let Some((_, next)) = lines.next_if(|l| !l.1.is_empty()) else { break };
        whole += " ";
        whole += next.trim();
    }
    whole
}

/// The members of a struct, whose first line was read.
fn members<'a>(lines: &mut Lines<'a>) -> Option<Vec<(String, Vec<String>)>> {
    let mut out = Vec::new();
    let mut doc = Vec::new();
    loop {
        let (_, line) = lines.next()?;
        if line.starts_with('}') {
            return Some(out);
        }
        if line.trim_start().starts_with("/*") {
            doc = comment(line, lines);
        } else if !line.trim().is_empty() {
            out.push((statement(line, lines).trim_end_matches(';').into(), std::mem::take(&mut doc)));
        }
    }
}
