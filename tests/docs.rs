//! The documents say what the code says: the page of options is made from the table, the README's integration compiles.

use std::process::Command;
use std::{env, fs};

use vmig::options::{Opt, TABLE, Type};

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
