//! Text as roff: escapes, fonts, and the frame of a page. The macros are those of man(7).

/// Bytes of a line of text.
const WIDTH: usize = 79;

/// What stands in the margins of every page.
pub(crate) struct Stamp<'a> {
    pub(crate) version: &'a str,
    pub(crate) date: &'a str,
}

/// The head of a page. Lines are neither justified nor hyphenated, so that names stay whole.
pub(crate) fn title(name: &str, section: u8, stamp: &Stamp) -> String {
    let Stamp { version, date } = stamp;
    let made = ".\\\" Made from include/vmig.h, docs/options.md, docs/tool.md and README.md; edit their sources.\n";
    format!(
        "{made}.TH {} {section} \"{}\" \"vmig {}\" \"vmig\"\n.ad l\n.nh\n",
        code(&name.to_uppercase()),
        date,
        version
    )
}

/// A section.
pub(crate) fn section(name: &str) -> String {
    format!(".SH {}\n", prose(name))
}

/// A part of a section.
pub(crate) fn part(name: &str) -> String {
    format!(".SS {}\n", code(name))
}

/// Lines that stay as they are, in the font of code.
pub(crate) fn verbatim(lines: &[String]) -> String {
    let lines = lines.iter().map(|line| format!("{}\n", protected(&code(line))));
    format!(".PP\n.in +4n\n.EX\n{}.EE\n.in\n", lines.collect::<String>())
}

/// `name(section)` of another page.
pub(crate) fn page(name: &str, section: u8) -> String {
    format!("\\fB{}\\fP({section})", code(name))
}

/// Characters that mean something to roff, in code: what is printed can be pasted into a program.
pub(crate) fn code(text: &str) -> String {
    text.chars().map(|c| if c == '-' { "\\-".into() } else { character(c, true) }).collect()
}

/// Text that is filled anyway, in lines of a moderate length.
pub(crate) fn filled(text: &str) -> String {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.len() + word.len() < WIDTH => *line += &format!(" {word}"),
            _ => lines.push(protected(word)),
        }
    }
    lines.iter().map(|line| format!("{line}\n")).collect()
}

/// A line of text whose first character is not taken for a request.
pub(crate) fn protected(line: &str) -> String {
    let request = line.starts_with(['.', '\'']);
    if request { format!("\\&{line}") } else { line.to_string() }
}

fn character(c: char, in_code: bool) -> String {
    match c {
        '\\' => "\\e".into(),
        '^' => "\\(ha".into(),
        '~' => "\\(ti".into(),
        '`' => "\\(ga".into(),
        '"' => "\\(dq".into(), // so that it can stand in the argument of a macro
        '\'' if in_code => "\\(aq".into(),
        c if c.is_ascii() => c.into(),
        c => format!("\\[u{:04X}]", u32::from(c)),
    }
}

/// Markdown inside a paragraph: `code`, **strong**, *stressed*; and without marks the names of the API and of errors.
pub(crate) fn prose(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    let mut before = ' ';
    while let Some(c) = rest.chars().next() {
        let (shown, taken) = span(rest, before).unwrap_or_else(|| {
            // A minus, where no word goes on.
            let minus = c == '-' && !before.is_alphanumeric();
            (if minus { "\\-".into() } else { character(c, false) }, c.len_utf8())
        });
        out += &shown;
        before = rest[..taken].chars().next_back().unwrap_or(' ');
        rest = &rest[taken..];
    }
    out
}

/// What has a font of its own at the beginning of `rest`: as roff, and how many bytes of `rest` that was.
fn span(rest: &str, before: char) -> Option<(String, usize)> {
    let between = |mark: &str, font: char| {
        let inner = rest.strip_prefix(mark)?.split_once(mark)?.0;
        let words = !inner.is_empty() && inner.trim() == inner;
        words.then(|| (format!("\\f{font}{}\\fP", code(inner)), inner.len() + 2 * mark.len()))
    };
    let word_before = before.is_alphanumeric() || before == '_';
    if rest.starts_with('`') {
        return between("`", 'B');
    }
    if rest.starts_with('*') && !word_before {
        return if rest.starts_with("**") { between("**", 'B') } else { between("*", 'I') };
    }
    let name = name(rest).filter(|_| !word_before)?;
    Some((format!("\\fB{}\\fP", code(name)), name.len()))
}

/// A name of the API or of an error at the beginning of `text`.
pub(crate) fn name(text: &str) -> Option<&str> {
    let end = |from: usize| {
        let tail = text[from..].find(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
        tail.map_or(text.len(), |i| from + i)
    };
    if text.starts_with("vmig_") || text.starts_with("VMIG_") {
        return Some(&text[..end(5)]);
    }
    let error = text.starts_with("-E").then(|| &text[..end(2)])?;
    let shouted = error.len() > 3 && error[1..].chars().all(|c| c.is_ascii_uppercase() || c.is_ascii_digit());
    shouted.then_some(error)
}
