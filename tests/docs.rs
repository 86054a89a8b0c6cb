//! The documents say what the code says: the page of options is made from the table, the README's integration compiles.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::process::Command;
use std::{env, fs};

use vmig::options::{Opt, TABLE, Type};
use vmig::status::STATES;

mod common;

fn root() -> &'static str {
    env!("CARGO_MANIFEST_DIR")
}

fn options_page() -> String {
    let mut page = String::from(
        "# Options\n\nSet with `vmig_set(m, \"name\", \"value\")`, read with `vmig_get`. Made from the table in \
         `src/options/table.rs` (`make header` rewrites it). *Live* options may change while a migration runs. `defaults=qemu` \
         puts every option to QEMU's default. `listen-address` can only be read: where `vmig_incoming` listens; so can \
         `dirty-tracker-in-use`: what finds written pages, of the last migration from here. Over QMP (docs/qmp.md) options \
         are parameters, those with a *c* are capabilities.\n\n\
         | option | values | default | QEMU's | live | meaning |\n|---|---|---|---|---|---|\n",
    );
    for (index, row) in TABLE.iter().enumerate() {
        let text = |value: u64| match row.kind {
            Type::Bool => (if value == 0 { "off" } else { "on" }).to_owned(),
            Type::Choice(words) => words[usize::try_from(value).expect("an index")].to_owned(),
            Type::Size if value >= 1 << 20 && value % (1 << 20) == 0 => format!("{}M", value >> 20),
            Type::Size | Type::Millis | Type::Number => value.to_string(),
            Type::Text if index == Opt::TraceFile as usize => "none".to_owned(),
            Type::Text => "all".to_owned(),
        };
        let (default, qemu) = match index == Opt::Machine as usize {
            true => ("none".to_owned(), "its machine".to_owned()),
            false => (text(row.default), text(row.qemu)),
        };
        let (min, max) = row.range;
        let values = match row.kind {
            Type::Text => "a text".to_owned(),
            Type::Bool => "on, off".to_owned(),
            Type::Choice(words) => words.join(", "),
            Type::Size if max == u64::MAX => "a number, also with K, M, G, T".to_owned(),
            Type::Size | Type::Number => format!("{min} to {max}"),
            Type::Millis => format!("{min} to {max} ms"),
        };
        let live = if row.live { "yes" } else { "no" };
        let capability = if row.capability { " *c*" } else { "" };
        page += &format!("| `{}`{capability} | {values} | {default} | {qemu} | {live} | {} |\n", row.name, row.doc);
    }
    page
}

#[test]
fn the_page_of_options_is_the_table() {
    let path = format!("{}/docs/options.md", root());
    if env::var("UPDATE_HEADER").is_ok() {
        fs::write(&path, options_page()).unwrap();
    }
    let there = fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(there, options_page(), "docs/options.md is not what the table says: run `make header`");
}

/// What the README's program takes for granted.
const PRELUDE: &str = "#include <stdio.h>\n#include <vmig.h>\nstruct uart { uint8_t ier, lcr; uint16_t divisor; };\n\
    struct machine { int vm_fd, vcpu_fd[4]; size_t vcpus; void *ram; uint64_t ram_size; struct uart uart; };\n\
    int machine_pause(struct machine *vm);\nint machine_resume(struct machine *vm);\n\
    int machine_migratable(struct machine *vm, vmig **out);\n";

#[test]
fn the_integration_of_the_readme_compiles() {
    let readme = fs::read_to_string(format!("{}/README.md", root())).unwrap();
    let code = readme.split("```c\n").nth(1).and_then(|rest| rest.split("```").next()).expect("a C block");
    assert!(code.lines().count() < 60, "the minimal integration stays under 60 lines");
    let dir = common::scratch("readme");
    fs::write(dir.join("readme.c"), format!("{PRELUDE}{code}")).unwrap();
    let flags = ["-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-c"];
    common::run(
        Command::new("gcc").current_dir(&dir).args(flags).arg(format!("-I{}/include", root())).arg("readme.c"),
    );
}

fn page(name: &str) -> String {
    fs::read_to_string(format!("{}/docs/{name}", root())).unwrap()
}

/// What stands in the first column of a page's tables, in backticks.
fn rows(page: &str) -> Vec<&str> {
    let first = page.lines().filter_map(|line| line.strip_prefix("| ")?.split(" |").next());
    first.flat_map(|cell| cell.split('`').skip(1).step_by(2)).collect()
}

/// Every text that the sources give to `in_phase`.
fn phases() -> Vec<String> {
    let files = common::source::files(&common::root().join("src"));
    let mut all: Vec<String> = files
        .iter()
        .filter_map(|path| fs::read_to_string(path).ok())
        .flat_map(|text| {
            let found =
                text.split("in_phase(\"").skip(1).filter_map(|rest| Some(rest.split_once("\")")?.0.to_owned()));
            found.collect::<Vec<_>>()
        })
        .collect();
    all.sort();
    all.dedup();
    all
}

#[test]
fn who_runs_it_finds_every_state_option_and_phase() {
    let (operating, options) = (page("operating.md"), page("options.md"));
    let (told, listed) = (rows(&operating), rows(&options));
    for state in STATES {
        assert!(told.contains(&state.name()), "operating.md has no row for the state '{}'", state.name());
    }
    let phases = phases();
    assert!(phases.len() > 10, "{phases:?}");
    for phase in &phases {
        assert!(told.contains(&phase.as_str()), "operating.md has no row for the phase '{phase}'");
    }
    assert!(operating.contains("(options.md)"), "where the options are");
    for row in &TABLE {
        assert!(listed.contains(&row.name), "options.md has no row for '{}'", row.name);
        let waits = row.name.ends_with("-timeout");
        assert!(
            !waits || operating.contains(&format!("`{}`", row.name)),
            "operating.md has no word on '{}'",
            row.name
        );
    }
    assert!(!told.contains(&"no-such-state") && rows("| `a`, `b` | `c` |\nx `d`\n") == ["a", "b"]);
}

#[test]
fn documents_lead_to_what_is_there() {
    let pages = common::source::files(&common::root().join("docs"));
    let mut links = 0;
    for path in pages.iter().filter(|path| path.extension().is_some_and(|e| e == "md")) {
        let text = fs::read_to_string(path).unwrap();
        for target in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let (file, anchor) = target.split_once('#').unwrap_or((target, ""));
            if file.contains("://") {
                continue;
            }
            links += 1;
            let there = if file.is_empty() { path.clone() } else { path.with_file_name(file) };
            let text = fs::read_to_string(&there).unwrap_or_else(|e| panic!("{}: {target}: {e}", path.display()));
            let letter = |c: char| c.is_ascii_alphanumeric() || c == '-';
            let name =
                |head: &str| head.to_lowercase().replace(' ', "-").chars().filter(|c| letter(*c)).collect::<String>();
            let heads = text.lines().filter_map(|line| line.strip_prefix('#'));
            let known = heads.map(|head| name(head.trim_start_matches('#').trim())).any(|head| head == anchor);
            assert!(anchor.is_empty() || known, "{}: {target}: no such heading", path.display());
        }
    }
    assert!(links > 20, "only {links} links");
}

/// The files of a folder that end so, by their names.
fn names(folder: &str, end: &str) -> Vec<String> {
    let entries = fs::read_dir(common::root().join(folder)).unwrap().map(|e| e.unwrap().file_name());
    entries.filter_map(|name| name.into_string().ok()).filter(|name| name.ends_with(end)).collect()
}

#[test]
fn the_page_of_qmp_has_each_command_once() {
    let page = page("qmp.md");
    let told: Vec<&str> = rows(page.split("## Commands\n").nth(1).unwrap().split("### ").next().unwrap());
    for command in &vmig::qmp::table::COMMANDS {
        let times = told.iter().filter(|name| **name == command.name).count();
        assert_eq!(times, 1, "qmp.md has {times} rows for '{}'", command.name);
    }
    assert_eq!(told.len(), vmig::qmp::table::COMMANDS.len(), "{told:?}");
}

#[test]
fn each_test_crate_and_module_has_its_line() {
    let (testing, dependencies) = (page("testing.md"), page("dependencies.md"));
    let told = rows(&testing);
    for name in names("tests", ".rs") {
        assert!(told.contains(&format!("tests/{name}").as_str()), "testing.md has no row for tests/{name}");
    }
    for name in names("tests/c", ".c") {
        assert!(told.contains(&name.as_str()), "testing.md has no row for tests/c/{name}");
    }
    let cargo = fs::read_to_string(common::root().join("Cargo.toml")).unwrap();
    let sections = cargo.split("\n[").filter(|section| section.split(']').next().unwrap().ends_with("dependencies"));
    let crates: Vec<&str> =
        sections.flat_map(str::lines).filter_map(|line| Some(line.split_once(" = ")?.0)).collect();
    let explained = rows(&dependencies);
    assert!(crates.len() > 10, "{crates:?}");
    for name in &crates {
        assert!(explained.contains(name), "dependencies.md has no row for '{name}'");
    }
    for name in &explained {
        assert!(crates.contains(name), "dependencies.md has a row for '{name}', which Cargo.toml has not");
    }
    let map = fs::read_to_string(common::root().join("src/lib.rs")).unwrap();
    let modules: Vec<&str> =
        map.lines().filter_map(|line| line.strip_prefix("pub mod ")?.strip_suffix(';')).collect();
    let rows = map.lines().filter_map(|line| line.strip_prefix("//! | [`")?.split_once("`] | ")).map(|row| row.0);
    assert_eq!(rows.collect::<Vec<_>>(), modules, "src/lib.rs: a row for each module, in floor order");
}

#[test]
fn the_page_of_threads_has_each_name() {
    let design = page("design.md");
    let told = rows(design.split("## Threads\n").nth(1).unwrap());
    let mut started = 0;
    for path in common::source::files(&common::root().join("src")) {
        let text = fs::read_to_string(&path).unwrap_or_default();
        let code = text.split("\nmod tests").next().unwrap().split("#[cfg(test)]").next().unwrap();
        for rest in ["threads.spawn(", "threads.spawn_with("].iter().flat_map(|call| code.split(call).skip(1)) {
            let start = rest.trim_start().trim_start_matches("&format!(");
            let Some(name) = start.strip_prefix('"').and_then(|rest| rest.split('"').next()) else { continue };
            let name = name.split('{').next().unwrap();
            started += 1;
            let known = told.iter().any(|row| *row == name || row.strip_suffix('N') == Some(name));
            assert!(known, "{}: design.md has no row for the thread '{name}'", path.display());
        }
    }
    assert!(started > 10, "only {started} threads found");
}
