//! vmig(7): what the library is, its pages, the rules of its API, and an example that the tests compile.

use super::header::{Header, Kind};
use super::pages::see_also;
use super::prose::{Block, blocks, filled, render, tagged};
use super::roff::{self, Stamp};

pub(crate) fn page(header: &Header, readme: &str, stamp: &Stamp) -> Result<String, String> {
    let mut out = roff::title("vmig", 7, stamp);
    let (tagline, what) = introduction(readme).ok_or("README.md does not begin with a title and two paragraphs")?;
    out += &format!(
        "{}vmig \\- {}\n",
        roff::section("NAME"),
        roff::prose(&first_letter(&tagline, |c| c.to_ascii_lowercase()))
    );
    out += &format!("{}.nf\n.B #include <vmig.h>\n.PP\n", roff::section("SYNOPSIS"));
    out += ".B cc vmm.c $(pkg\\-config \\-\\-cflags \\-\\-libs vmig)\n";
    out += ".B cc vmm.c $(pkg\\-config \\-\\-cflags \\-\\-libs vmig\\-static)\n.fi\n";
    out += &format!("{}{}", roff::section("DESCRIPTION"), filled(&what));
    out += &roff::section("PAGES");
    out += &filled(
        "Read from top to bottom: each page needs only those before it, and is a chapter of vmig.h. The name of each \
         function and type leads to its page.",
    );
    for (number, chapter) in (1..).zip(&header.chapters) {
        let functions: Vec<_> = chapter.of(Kind::Function).map(|f| format!("{}()", f.name)).collect();
        let told = format!("Chapter {number}, {}: {}.", chapter.title, functions.join(", "));
        out += &tagged(&roff::page(&chapter.page(), 3), &filled(&told));
    }
    out += &tagged(&roff::page("vmig-options", 7), &filled("All options of vmig_set() and vmig_get()."));
    out += &tagged(&roff::page("vmig", 1), &filled("The command: inspects streams, draws reports, drives VMMs."));
    out += &rules(header)?;
    out += &roff::section("EXAMPLES");
    let (code, after) = example(readme).ok_or("README.md has no example in C with a paragraph below")?;
    out += &filled("The whole integration of a KVM guest with one device:");
    out += &roff::verbatim(&code);
    out += &format!(".PP\n{}", filled(&after));
    Ok(out + &see_also(header, "vmig"))
}

fn first_letter(text: &str, change: fn(char) -> char) -> String {
    let mut chars = text.chars();
    chars.next().into_iter().map(change).chain(chars).collect()
}

/// The first two paragraphs below the README's title; the first without its full stop.
fn introduction(readme: &str) -> Option<(String, String)> {
    let mut paragraphs = readme.split("\n\n").skip(1).map(|p| p.replace('\n', " "));
    let tagline = paragraphs.next()?.trim().trim_end_matches('.').to_string();
    Some((tagline, paragraphs.next()?)).filter(|(first, second)| !first.is_empty() && !second.starts_with('#'))
}

/// What the header opens with: rules for calls, then threads and the lock, with the marks.
fn rules(header: &Header) -> Result<String, String> {
    let blocks = blocks(header.opening.get(1..).unwrap_or_default()); // without its title
    let first = blocks.iter().position(|b| matches!(b, Block::Terms(_)));
    let first = first.ok_or("include/vmig.h does not begin with the rules of its API")?;
    let lock = header.chapters.iter().find(|c| c.of(Kind::Function).any(|f| f.name == "vmig_bql_lock"));
    let lock = lock.ok_or("include/vmig.h: no chapter has vmig_bql_lock")?;
    let mut out = roff::section("RULES") + &render(&blocks[first..=first], false);
    out += &roff::section("THREADS AND THE BIG LOCK");
    out += render(&super::prose::blocks(&lock.intro), false).trim_start_matches(".PP\n");
    Ok(out + &render(&blocks[first + 1..], false))
}

/// The README's block of C, and the paragraph below it.
fn example(readme: &str) -> Option<(Vec<String>, String)> {
    let (code, rest) = readme.split_once("```c\n")?.1.split_once("```")?;
    let after = rest.trim_start().split("\n\n").next()?.replace('\n', " ");
    Some((code.lines().map(str::to_string).collect(), after)).filter(|(_, text)| !text.is_empty())
}
