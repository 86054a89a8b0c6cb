//! The text of comments: paragraphs, code, lists, tables, and columns of terms with their meaning, as roff.

use super::roff;

/// A piece of text.
#[derive(Debug, PartialEq)]
pub(crate) enum Block {
    Paragraph(String),
    Code(Vec<String>),
    /// What each item begins with (a dot or a number), and its text.
    List(Vec<(String, String)>),
    /// Terms in Markdown, and what they mean.
    Terms(Vec<(String, String)>),
}

/// Reads lines without the marks of the comment they stood in.
pub(crate) fn blocks(lines: &[String]) -> Vec<Block> {
    let mut out = Vec::new();
    let mut at = 0;
    while let Some(line) = lines.get(at) {
        let rest = &lines[at..];
        let (block, taken) = if line.trim().is_empty() {
            (None, 1)
        } else if line.starts_with("```") {
            fenced(rest)
        } else if line.starts_with('|') {
            table(rest)
        } else if indent(line) >= 4 {
            // Code may have gaps, too, but not all of it in one column.
            let code = indented(rest);
            let columns = column(line).map(|column| terms(rest, indent(line), column));
            columns.filter(|(_, taken)| *taken >= code.1).unwrap_or(code)
        } else if let Some(column) = column(line) {
            terms(rest, indent(line), column)
        } else if item(line).is_some() {
            list(rest)
        } else {
            paragraph(rest)
        };
        out.extend(block);
        at += taken;
    }
    out
}

fn indent(line: &str) -> usize {
    line.len() - line.trim_start().len()
}

/// Where the second of two columns begins, if the line has two: after more than one space.
fn column(line: &str) -> Option<usize> {
    let gap = indent(line) + line.trim_start().find("  ")?;
    let text = line[gap..].trim_start();
    (!text.is_empty() && !text.starts_with("/*") && !text.starts_with("/ *")).then(|| line.len() - text.len())
}

/// `- text` or `1. text`: what it begins with, and the text.
fn item(line: &str) -> Option<(String, &str)> {
    let line = line.trim_start();
    if let Some(text) = line.strip_prefix("- ").or(line.strip_prefix("* ")) {
        return Some(("\\(bu".into(), text));
    }
    let (number, text) = line.split_once(". ")?;
    (!number.is_empty() && number.len() < 3 && number.bytes().all(|b| b.is_ascii_digit()))
        .then(|| (format!("{number}."), text))
}

fn join(text: &mut String, line: &str) {
    if !text.is_empty() {
        text.push(' ');
    }
    *text += line.trim();
}

fn fenced(lines: &[String]) -> (Option<Block>, usize) {
    let inner: Vec<_> = lines[1..].iter().take_while(|l| !l.starts_with("```")).cloned().collect();
    let taken = inner.len() + 2;
    (Some(Block::Code(inner)), taken.min(lines.len()))
}

fn indented(lines: &[String]) -> (Option<Block>, usize) {
    let mut count = lines.iter().take_while(|l| indent(l) >= 4 || l.trim().is_empty()).count();
    while count > 1 && lines[count - 1].trim().is_empty() {
        count -= 1;
    }
    let left = lines[..count].iter().filter(|l| !l.trim().is_empty()).map(|l| indent(l)).min().unwrap_or(0);
    let code = lines[..count].iter().map(|l| l.get(left..).unwrap_or_default());
    // The header cannot have a comment in a comment.
    let code = code.map(|l| l.replace("/ *", "/*").replace("* /", "*/")).collect();
    (Some(Block::Code(code)), count)
}

/// A table of Markdown: the first cell is the term, the others mean it. The head is left out.
fn table(lines: &[String]) -> (Option<Block>, usize) {
    let count = lines.iter().take_while(|l| l.starts_with('|')).count();
    let rows = lines[..count].iter().skip(2).map(|line| {
        let mut cells = cells(line).into_iter();
        let term = cells.next().unwrap_or_default();
        (term, cells.filter(|c| !c.is_empty()).collect::<Vec<_>>().join("; "))
    });
    (Some(Block::Terms(rows.collect())), count)
}

/// The cells of a line of a table.
pub(crate) fn cells(line: &str) -> Vec<String> {
    let line = line.trim().trim_start_matches('|').replace("\\|", "\0");
    let line = line.strip_suffix('|').unwrap_or(&line);
    line.split('|').map(|cell| cell.trim().replace('\0', "|")).collect()
}

/// Two columns: a term begins at `left`, its text at `column` on its own line and those below.
fn terms(lines: &[String], left: usize, column: usize) -> (Option<Block>, usize) {
    let mut out: Vec<(String, String)> = Vec::new();
    let mut taken = 0;
    for line in lines {
        // A term as long as its column leaves one space: not more than a word, then.
        let split = line.is_char_boundary(column) && line.len() > column;
        let both = split && indent(line) == left && line[..column].ends_with(' ') && !line[column..].starts_with(' ');
        let (term, text) = if both { line.split_at(column) } else { ("", line.as_str()) };
        let two_spaces = line.get(..column).is_some_and(|t| t.ends_with("  "));
        if both && (two_spaces || !term.trim().contains(' ')) {
            out.push((term.trim().into(), text.trim().into()));
        } else if indent(line) == column {
            if let Some((_, last)) = out.last_mut() {
                join(last, text);
            }
        } else {
            break;
        }
        taken += 1;
    }
    // Terms of code without marks: those with an underscore or a bracket.
    let marked =
        |term: String| if term.contains(['_', '[', '(']) { format!("`{term}`") } else { format!("**{term}**") };
    (Some(Block::Terms(out.into_iter().map(|(term, text)| (marked(term), text)).collect())), taken.max(1))
}

fn list(lines: &[String]) -> (Option<Block>, usize) {
    let mut out: Vec<(String, String)> = Vec::new();
    let mut taken = 0;
    for line in lines.iter().take_while(|l| !l.trim().is_empty()) {
        match item(line) {
            Some((mark, text)) => out.push((mark, text.trim().into())),
            None => out.last_mut().into_iter().for_each(|(_, last)| join(last, line)),
        }
        taken += 1;
    }
    (Some(Block::List(out)), taken)
}

fn paragraph(lines: &[String]) -> (Option<Block>, usize) {
    let mut text = String::new();
    let mut taken = 0;
    for line in lines {
        let ends =
            line.trim().is_empty() || line.starts_with('|') || line.starts_with("```") || column(line).is_some();
        if taken > 0 && (ends || line.starts_with("- ")) {
            break;
        }
        join(&mut text, line);
        taken += 1;
    }
    (Some(Block::Paragraph(text)), taken)
}

/// The sentences of a paragraph. A full stop before a small letter ends none.
pub(crate) fn sentences(text: &str) -> Vec<&str> {
    let mut out = Vec::new();
    let mut start = 0;
    for (at, _) in text.match_indices([' ']) {
        let ended = text[..at].ends_with(['.', '?', '!']) || text[..at].ends_with(".)");
        let next = &text[at + 1..];
        let goes_on = next.starts_with(char::is_lowercase) && !next.starts_with("vmig");
        if ended && !goes_on && !text[..at].ends_with("..") {
            out.push(&text[start..at]);
            start = at + 1;
        }
    }
    out.push(&text[start..]);
    out
}

/// Text as lines of roff, each sentence from a new one.
pub(crate) fn filled(text: &str) -> String {
    sentences(text).into_iter().map(|sentence| roff::filled(&roff::prose(sentence))).collect()
}

/// Blocks as roff. Inside a tagged paragraph (`inside`) the first paragraph begins without a macro, and others stay in.
pub(crate) fn render(blocks: &[Block], inside: bool) -> String {
    let mut out = String::new();
    for block in blocks {
        match block {
            Block::Paragraph(text) if inside && out.is_empty() => out += &filled(text),
            Block::Paragraph(text) if inside => out += &format!(".IP\n{}", filled(text)),
            Block::Paragraph(text) => out += &format!(".PP\n{}", filled(text)),
            Block::Code(lines) => out += &roff::verbatim(lines),
            Block::List(items) => {
                let shown = items.iter().map(|(mark, text)| format!(".IP {mark} 4\n{}", filled(text)));
                out += &nested(&shown.collect::<String>(), inside);
            }
            Block::Terms(terms) => {
                let shown = terms.iter().map(|(term, text)| tagged(&roff::prose(term), &filled(text)));
                out += &nested(&shown.collect::<String>(), inside);
            }
        }
    }
    out
}

fn nested(shown: &str, inside: bool) -> String {
    if inside { format!(".RS\n{shown}.RE\n") } else { shown.into() }
}

/// A term, and below it what it means, both as roff.
pub(crate) fn tagged(term: &str, text: &str) -> String {
    format!(".TP\n{}\n{text}", roff::protected(term))
}
