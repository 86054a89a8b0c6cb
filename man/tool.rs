//! vmig(1), from the parts of docs/tool.md that are about the command.

use super::prose::{blocks, render};
use super::roff::{self, Stamp};

/// Sections of these names are about the command; the others about what a VMM does with the library.
fn is_told(title: &str) -> bool {
    title.starts_with("vmig ") || title == "Trace files"
}

pub(crate) fn page(text: &str, stamp: &Stamp) -> Result<String, String> {
    let sections: Vec<_> = text.split("\n## ").skip(1).filter_map(|s| s.split_once('\n')).collect();
    let told: Vec<_> = sections.into_iter().filter(|(title, _)| is_told(title)).collect();
    let mut synopsis = String::new();
    for (title, body) in told.iter().filter(|(title, _)| title.starts_with("vmig ")) {
        let line = body.trim_start().lines().next().filter(|line| line.trim_start().starts_with(title));
        let line = line.ok_or_else(|| format!("docs/tool.md: {title} does not begin with how it is called"))?;
        synopsis += &format!(".PP\n{}\n", roff::protected(&roff::code(line.trim())));
    }
    if synopsis.is_empty() {
        return Err("docs/tool.md has no section about a command".into());
    }
    let name = "vmig \\- looks into migration streams, draws reports of migrations, drives VMMs over QMP\n";
    let mut out = roff::title("vmig", 1, stamp);
    out += &format!("{}{name}{}.nf\n", roff::section("NAME"), roff::section("SYNOPSIS"));
    out += &format!("{}.fi\n", synopsis.trim_start_matches(".PP\n"));
    for (title, body) in &told {
        let lines: Vec<_> = unlinked(body).lines().map(str::to_string).collect();
        let blocks = blocks(&lines);
        // How it is called stands above.
        let first = usize::from(title.starts_with("vmig "));
        out += &roff::section(&title.to_uppercase());
        out += render(&blocks[first..], false).trim_start_matches(".PP\n");
    }
    let pages = [roff::page("vmig", 7), roff::page("vmig-options", 7)];
    Ok(out + &format!("{}{}\n", roff::section("SEE ALSO"), pages.join(",\n")))
}

/// `[text](address)` as its text.
pub(crate) fn unlinked(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("](") {
        let name = before.rsplit_once('[').filter(|(_, name)| !name.contains(']'));
        let link = name.zip(after.split_once(')'));
        let Some(((before, name), (_, after))) = link else {
            out += &rest[..before.len() + 2];
            rest = &rest[before.len() + 2..];
            continue;
        };
        out += before;
        out += name;
        rest = after;
    }
    out + rest
}
