//! Writes the C header into OUT_DIR from the Rust sources, one chapter at a time, so that it reads like a book.
//!
//! cbindgen runs on the files of each chapter alone: what belongs together stands together, in the order given here.
//! The copy people read is include/vmig.h; tests/header.rs compares the two (`make header` rewrites it).

use std::{env, error::Error, fs, path::Path};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// One chapter of the header. Its introduction is the `//!` text of the first source.
struct Chapter {
    title: &'static str,
    sources: &'static [&'static str],
    /// Macros in C, placed between the chapter's types and its functions.
    fragment: Option<&'static str>,
}

/// The table of contents: edit here to add or move a chapter. A file that does not exist is an error.
const CHAPTERS: &[Chapter] = &[
    Chapter { title: "the guest", sources: &["src/capi/guest.rs", "src/vmm/ops.rs"], fragment: None },
    Chapter { title: "the big lock and the run state", sources: &["src/capi/run.rs"], fragment: None },
    Chapter {
        title: "guest RAM and dirty pages",
        sources: &["src/capi/ram.rs", "src/dirty/callback.rs"],
        fragment: None,
    },
    Chapter {
        title: "device state",
        sources: &["src/capi/device.rs", "src/section/cdevice.rs"],
        fragment: Some("src/section/macros.h"),
    },
    Chapter {
        title: "migrating",
        sources: &["src/capi/migrate.rs", "src/capi/check.rs", "src/capi/rate.rs"],
        fragment: None,
    },
    Chapter { title: "QMP", sources: &["src/capi/qmp.rs", "src/vmm/command.rs"], fragment: None },
    Chapter { title: "a gate for vCPUs", sources: &["src/capi/gate.rs"], fragment: None },
    Chapter { title: "a VMM with one thread", sources: &["src/capi/dispatch.rs"], fragment: None },
    Chapter { title: "observing", sources: &["src/capi/observe.rs"], fragment: None },
    Chapter {
        title: "connections of your own",
        sources: &["src/capi/channel.rs", "src/vmm/channel_ops.rs"],
        fragment: None,
    },
    Chapter {
        title: "full control: sections of your own",
        sources: &["src/capi/section.rs", "src/section/ops.rs", "src/section/stream.rs"],
        fragment: None,
    },
    Chapter {
        title: "testing your devices",
        sources: &["src/capi/trial.rs", "src/section/trial/ops.rs"],
        fragment: Some("src/section/trial/macros.h"),
    },
];

/// What stands before the first chapter: the grammar of the API, includes, VMIG_SIZED.
const OPENING: &str = "src/capi/opening.h";
const WIDTH: usize = 118;

fn main() -> Result<()> {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed={OPENING}");
    for file in CHAPTERS.iter().flat_map(|c| c.sources.iter().chain(c.fragment.iter())) {
        println!("cargo:rerun-if-changed={file}");
    }
    // Programs linked with one 0.x release run with the next one only while this number stays.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libvmig.so.{}", env::var("CARGO_PKG_VERSION_MAJOR")?);
    let out = env::var("OUT_DIR")?;
    Ok(fs::write(Path::new(&out).join("vmig.h"), header()?)?)
}

/// The whole header: opening, chapters, one guard around all.
fn header() -> Result<String> {
    let mut text = read(OPENING)?;
    text += "\n#ifdef __cplusplus\nextern \"C\" {\n#endif\n";
    for (number, chapter) in CHAPTERS.iter().enumerate() {
        text += &one_chapter(number + 1, chapter).map_err(|e| format!("chapter \"{}\": {e}", chapter.title))?;
    }
    text += "\n#ifdef __cplusplus\n}\n#endif\n#endif /* VMIG_H */\n";
    Ok(text)
}

/// Banner, introduction, types, macros, functions.
fn one_chapter(number: usize, chapter: &Chapter) -> Result<String> {
    let mut sources = Vec::new();
    for file in chapter.sources {
        sources.push(read(file)?);
    }
    let (types, functions) = generate(chapter, &sources)?;
    let mut text = format!("\n{}\n", banner(number, chapter.title));
    let intro = plain(&sources.first().map(|s| introduction(s)).unwrap_or_default());
    if !intro.is_empty() {
        text += &comment(&intro, "");
    }
    for part in [types, chapter.fragment.map(read).transpose()?.unwrap_or_default(), functions] {
        if !part.trim().is_empty() {
            text += &format!("\n{}\n", part.trim());
        }
    }
    Ok(text)
}

fn read(file: &str) -> Result<String> {
    fs::read_to_string(file).map_err(|e| format!("{file}, which build.rs needs for the header: {e}").into())
}

fn banner(number: usize, title: &str) -> String {
    let start = format!("/* ---- {number}. {title} ");
    format!("{start}{} */", "-".repeat(WIDTH.saturating_sub(start.len() + 3)))
}

/// The `//!` lines a file opens with.
fn introduction(source: &str) -> Vec<String> {
    let docs = source.lines().take_while(|l| l.starts_with("//!"));
    let text = docs.map(|l| l.strip_prefix("//!").unwrap_or(l)).map(|l| l.strip_prefix(' ').unwrap_or(l));
    text.map(|l| l.trim_end().to_string()).collect()
}

/// cbindgen's text for one chapter: what stands before the functions, and the functions.
fn generate(chapter: &Chapter, sources: &[String]) -> Result<(String, String)> {
    let (include, exclude) = names(sources);
    let mut config = cbindgen::Config {
        language: cbindgen::Language::C,
        cpp_compat: true, // enums get a fixed size in C++ too
        no_includes: true,
        usize_is_size_t: true,
        style: cbindgen::Style::Both,
        documentation_length: cbindgen::DocumentationLength::Full,
        documentation_style: cbindgen::DocumentationStyle::Doxy,
        line_length: WIDTH,
        tab_width: 4,
        ..Default::default()
    };
    config.export.include = include.clone(); // a type or constant that no function names is wanted all the same
    config.export.exclude = exclude;
    config.function.sort_by = Some(cbindgen::SortKey::None);
    config.constant.sort_by = Some(cbindgen::SortKey::None);
    let mut builder = cbindgen::Builder::new().with_config(config);
    for file in chapter.sources {
        builder = builder.with_src(file);
    }
    let mut bytes = Vec::new();
    builder.generate()?.write(&mut bytes);
    let mut text = String::from_utf8(bytes)?;
    for name in include {
        // An opaque type: C knows only that it is there.
        let body = format!("typedef struct {name} {{\n    uint8_t _private[0];\n}} {name};");
        text = text.replace(&body, &format!("typedef struct {name} {name};"));
    }
    // cbindgen wraps functions, and only functions, in extern "C"; the header opens that once for all chapters.
    let open = "#ifdef __cplusplus\nextern \"C\" {\n#endif // __cplusplus\n";
    let close = "#ifdef __cplusplus\n}  // extern \"C\"\n#endif  // __cplusplus\n";
    let (types, functions) = text.split_once(open).unwrap_or((&text, ""));
    let mut known = Vec::new();
    Ok((tidy(types, &mut known), tidy(&functions.replace(close, ""), &mut known)))
}

/// Public names declared at the left margin: those of the C API, and those that are Rust's own business.
fn names(sources: &[String]) -> (Vec<String>, Vec<String>) {
    let declared = sources.iter().flat_map(|s| s.lines()).filter_map(|line| {
        let rest = line.strip_prefix("pub ")?;
        let rest = ["struct ", "union ", "enum ", "type ", "const "].iter().find_map(|k| rest.strip_prefix(k))?;
        Some(rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>())
    });
    declared.partition(|name| name == "vmig" || name.starts_with("vmig_") || name.starts_with("VMIG_"))
}

/// Rewrites cbindgen's comments and enums for C readers, and drops what `typedef` already says.
/// `known` are the structs whose typedef has been read.
fn tidy(generated: &str, known: &mut Vec<String>) -> String {
    let mut text = String::new();
    let mut lines = generated.lines();
    while let Some(line) = lines.next() {
        let indent = &line[..line.len() - line.trim_start().len()];
        if line.trim() == "/**" {
            let words = lines.by_ref().take_while(|l| l.trim() != "*/");
            let words = words.map(|l| l.trim_start().strip_prefix('*').unwrap_or(l));
            let words: Vec<_> = words.map(|l| l.strip_prefix(' ').unwrap_or(l).to_string()).collect();
            text += &comment(&plain(&words), indent);
        } else if let Some(name) = line.strip_prefix("enum ") {
            text += &enumeration(name, &mut lines);
        } else if line.starts_with("#define ") {
            constant(&mut text, line);
        } else {
            let named = line.strip_prefix("} ").or(line.strip_prefix("typedef struct "));
            let shown = known.iter().fold(line.to_string(), |l, name| without_struct(&l, name));
            if let Some(name) = named.and_then(|n| n.strip_suffix(';')).and_then(|n| n.split(' ').next_back()) {
                known.push(name.to_string());
            }
            if !(shown.trim().is_empty() && text.ends_with("\n\n")) {
                text += &format!("{}\n", shown.trim_end());
            }
        }
    }
    text
}

/// Adds a constant, on one line with the comment that stands before it where both fit, close to the one before.
fn constant(text: &mut String, line: &str) {
    let start = text.trim_end_matches('\n').rfind('\n').map_or(0, |i| i + 1);
    let comment = text[start..].trim_end().to_string();
    let joined = format!("{line:<32} {comment}\n");
    let whole = comment.starts_with("/*") && comment.ends_with("*/");
    if !whole || joined.len() > WIDTH {
        *text += &format!("{line}\n");
        return;
    }
    text.truncate(start);
    let before = text.trim_end();
    if before.lines().next_back().is_some_and(|l| l.starts_with("#define ") && l.ends_with("*/")) {
        text.truncate(before.len() + 1);
    }
    *text += &joined;
}

/// `struct name` as `name`.
fn without_struct(line: &str, name: &str) -> String {
    let tagged = format!("struct {name}");
    let mut parts = line.split(&tagged);
    let mut out = parts.next().unwrap_or_default().to_string();
    for part in parts {
        let whole = !part.starts_with(|c: char| c.is_alphanumeric() || c == '_');
        out += &if whole { format!("{name}{part}") } else { format!("{tagged}{part}") };
    }
    out
}

/// cbindgen's enum of a fixed size, in five conditionals, as an integer type and its constants: the same in C and C++.
fn enumeration<'a>(name: &str, lines: &mut impl Iterator<Item = &'a str>) -> String {
    let head: Vec<_> = lines.by_ref().take_while(|l| l.trim() != "{").collect();
    let integer = head.iter().find_map(|l| l.trim().strip_prefix(": ")).unwrap_or("int");
    let body: Vec<_> = lines.by_ref().take_while(|l| *l != "};").collect();
    lines.by_ref().take_while(|l| *l != "#endif // __cplusplus").for_each(drop);
    format!("typedef {integer} {name};\nenum {{\n{}\n}};\n", tidy(&body.join("\n"), &mut Vec::new()).trim_end())
}

/// Markdown of rustdoc to plain text: headings, links and escapes lose their marks, code is indented.
fn plain(lines: &[String]) -> Vec<String> {
    let mut out: Vec<String> = Vec::new();
    let mut fenced = false;
    for line in lines {
        if line.starts_with("```") {
            fenced = !fenced;
            continue;
        }
        if fenced {
            out.push(format!("    {line}").trim_end().replace("*/", "* /").replace("/*", "/ *"));
            continue;
        }
        let mut line = match line.strip_prefix("# ") {
            Some(heading) => format!("{heading}:"),
            None => line.clone(),
        };
        while let Some((before, code, after)) = link(&line) {
            line = format!("{before}{code}{after}");
        }
        let line = line.replace("\\[", "[").replace("\\]", "]").replace("*/", "* /").replace("/*", "/ *");
        let after_heading = out.last().is_some_and(|l| l.ends_with(':')) && line.is_empty();
        if !after_heading {
            out.push(line);
        }
    }
    while out.last().is_some_and(String::is_empty) {
        out.pop();
    }
    out
}

/// The first [`name`] or [`name`](target) of a line: what stands before it, `name` in backticks, what follows.
fn link(line: &str) -> Option<(&str, &str, &str)> {
    let (before, rest) = line.split_once("[`")?;
    let (name, mut after) = rest.split_once("`]")?;
    if let Some((_, rest)) = after.strip_prefix('(').and_then(|r| r.split_once(')')) {
        after = rest;
    }
    let start = before.len() + 1;
    Some((before, &line[start..start + name.len() + 2], after))
}

/// A C comment: one line where it fits, else with its lines under one another.
fn comment(lines: &[String], indent: &str) -> String {
    let joined = lines.join(&format!("\n{indent} * "));
    let text = format!("{indent}/* {joined} */\n");
    text.lines().map(|l| format!("{}\n", l.trim_end())).collect()
}
