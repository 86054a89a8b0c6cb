//! What `make install` puts somewhere is all that a C program needs: header, libraries, pkg-config.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use common::{built, root, run, scratch, try_run};
use std::{
    collections::BTreeSet,
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

const PROGRAM: &str = r#"
#include <vmig.h>
#include <stdio.h>
int main(void)
{
    printf("%u.%u.%u\n", vmig_version() >> 16, vmig_version() >> 8 & 255, vmig_version() & 255);
    return 0;
}
"#;

fn make(goal: &str, variables: &[String]) {
    let mut make = Command::new("make");
    for inherited in ["MAKEFLAGS", "MFLAGS", "MAKELEVEL"] {
        make.env_remove(inherited); // a make that runs these tests has its own jobs and variables
    }
    make.env("CARGO_TARGET_DIR", common::target());
    run(make.arg("-s").arg("-C").arg(root()).arg(goal).args(variables));
}

/// Where the library was installed for all tests of this file: PREFIX /opt/vmig below a DESTDIR.
fn installed() -> &'static Path {
    static PREFIX: OnceLock<PathBuf> = OnceLock::new();
    PREFIX.get_or_init(|| {
        let destdir = scratch("install");
        make("install", &[format!("DESTDIR={}", destdir.display()), "PREFIX=/opt/vmig".into()]);
        destdir.join("opt/vmig")
    })
}

fn pkg_config(prefix: &Path, arguments: &[&str]) -> Vec<String> {
    let mut command = Command::new("pkg-config");
    command.env("PKG_CONFIG_PATH", prefix.join("lib/pkgconfig")).env_remove("PKG_CONFIG_LIBDIR");
    let out = run(command.args(arguments));
    String::from_utf8(out.stdout).unwrap().split_whitespace().map(str::to_string).collect()
}

/// Compiles PROGRAM in a directory of its own with the flags pkg-config prints, and returns what it prints.
fn compile_and_run(name: &str, before: &[&str], flags: &[String]) -> (PathBuf, String) {
    let dir = scratch(name);
    fs::write(dir.join("program.c"), PROGRAM).unwrap();
    let mut cc = Command::new("cc");
    run(cc.current_dir(&dir).args(before).args(["program.c", "-o", "program"]).args(flags));
    let mut program = Command::new(dir.join("program"));
    let out = run(program.env("LD_LIBRARY_PATH", installed().join("lib")));
    (dir.join("program"), String::from_utf8(out.stdout).unwrap())
}

fn needed(program: &Path) -> String {
    String::from_utf8(run(Command::new("readelf").arg("-d").arg(program)).stdout).unwrap()
}

fn version() -> String {
    format!("{}\n", env!("CARGO_PKG_VERSION"))
}

#[test]
fn a_program_links_with_the_shared_library() {
    let flags = pkg_config(installed(), &["--cflags", "--libs", "vmig"]);
    let (program, printed) = compile_and_run("shared", &[], &flags);
    assert_eq!(printed, version());
    assert!(needed(&program).contains("[libvmig.so.0]"), "{}", needed(&program));
}

#[test]
fn the_tool_is_installed_and_runs() {
    let out = run(Command::new(installed().join("bin/vmig")).arg("--version"));
    assert_eq!(String::from_utf8(out.stdout).unwrap(), format!("vmig {}", version()));
    let stream = root().join("tests/streams/qemu10-none16.bin");
    run(Command::new(installed().join("bin/vmig")).arg("inspect").arg(stream));
}

#[test]
fn a_program_links_statically() {
    let flags = pkg_config(installed(), &["--static", "--cflags", "--libs", "vmig"]);
    let (program, printed) = compile_and_run("static", &["-static"], &flags);
    assert_eq!(printed, version());
    assert!(!needed(&program).contains("NEEDED"), "{}", needed(&program));
}

#[test]
fn a_program_links_with_the_archive_alone() {
    let flags = pkg_config(installed(), &["--cflags", "--libs", "vmig-static"]);
    let (program, printed) = compile_and_run("archive", &[], &flags);
    assert_eq!(printed, version());
    let needed = needed(&program);
    assert!(needed.contains("[libc.so.6]") && !needed.contains("libvmig"), "{needed}");
}

#[test]
fn it_lives_beside_a_second_rust_library() {
    let dir = scratch("beside");
    let other = "#[unsafe(no_mangle)] pub extern \"C\" fn other(n: i32) -> i32 {\n\
                 std::panic::catch_unwind(|| { let v = vec![1; 3]; v[n as usize] }).unwrap_or(-1) }";
    fs::write(dir.join("other.rs"), other).unwrap();
    let main = "#include <vmig.h>\nint other(int n);\n\
                int main(void) { return vmig_version() && other(1) == 1 && other(5) == -1 ? 0 : 1; }";
    fs::write(dir.join("main.c"), main).unwrap();
    let rustc = env::var("RUSTC").unwrap_or("rustc".into());
    for lto in [&["-O"][..], &["-O", "-Clto=fat", "-Ccodegen-units=1"]] {
        let mut rustc = Command::new(&rustc);
        run(rustc.current_dir(&dir).args(["--edition=2024", "--crate-type=staticlib", "other.rs"]).args(lto));
        let ours = pkg_config(installed(), &["--cflags", "--libs", "vmig-static"]);
        for other_first in [true, false] {
            let mut cc = Command::new("cc");
            cc.current_dir(&dir).args(["main.c", "-o", "main"]);
            cc.args(other_first.then_some("libother.a")).args(&ours).args((!other_first).then_some("libother.a"));
            run(cc.args(["-lpthread", "-ldl", "-lm"]));
            run(&mut Command::new(dir.join("main")));
        }
    }
}

#[test]
fn the_shared_library_exports_only_our_names() {
    let library = installed().join("lib/libvmig.so");
    let out = run(Command::new("nm").args(["-D", "--defined-only"]).arg(&library));
    let text = String::from_utf8(out.stdout).unwrap();
    let names: BTreeSet<_> = text.lines().filter_map(|l| l.split_whitespace().nth(2)).collect();
    assert!(names.contains("vmig_version"), "{text}");
    assert!(names.iter().all(|n| n.starts_with("vmig_")), "{text}");
    // What is exported is what the header promises, no more and no less.
    let header = fs::read_to_string(installed().join("include/vmig.h")).unwrap();
    let promised: BTreeSet<_> = functions(&header).into_iter().collect();
    assert_eq!(names, promised.iter().map(String::as_str).collect(), "exported, and in the header");
    let soname = needed(&library);
    assert!(soname.contains("Library soname: [libvmig.so.0]"), "{soname}");
}

/// Names of the functions a header declares: at the left margin, a type, `vmig_name(`.
fn functions(header: &str) -> Vec<String> {
    let starts = header.lines().filter(|l| l.starts_with(|c: char| c.is_ascii_lowercase()) && l.contains('('));
    let declared = starts.filter(|l| !l.starts_with("typedef") && !l.starts_with("template"));
    let names = declared.filter_map(|l| l.split('(').next()?.rsplit([' ', '*']).next().map(str::to_string));
    names.filter(|n| n.starts_with("vmig_")).collect()
}

#[test]
fn functions_of_a_header_are_found() {
    let header = "typedef int (*vmig_fn)(void);\nint vmig_a(void);\nconst char *vmig_b(int x,\n    void (*vmig_c)(void));\n\
                  typedef struct vmig_s {\n    int (*vmig_d)(void);\n} vmig_s;\n/* int vmig_e(void); */\n#define VMIG_F(x)";
    assert_eq!(functions(header), ["vmig_a", "vmig_b"]);
}

#[test]
fn man_finds_a_page_for_each_function() {
    let header = fs::read_to_string(installed().join("include/vmig.h")).unwrap();
    let pages = installed().join("share/man");
    for name in functions(&header) {
        assert!(pages.join(format!("man3/{name}.3")).exists(), "{name} has no page");
    }
    if Command::new("man").arg("--version").output().is_err() && common::skip("man", "man is not installed") {
        return;
    }
    for (part, name, says) in [("3", "vmig_outgoing", "Starts to migrate the guest"), ("7", "vmig", "SEE ALSO")] {
        let mut man = Command::new("man");
        man.env("LC_ALL", "C.UTF-8").env("MANWIDTH", "300").env("MANPAGER", "cat").arg("-M").arg(&pages);
        let shown = String::from_utf8(run(man.args([part, name])).stdout).unwrap();
        assert!(shown.contains(says), "man {part} {name}: {shown}");
    }
}

#[test]
fn an_archive_in_a_shared_object_leaks_nothing() {
    let dir = scratch("wrapped");
    let archive = installed().join("lib/libvmig.a");
    let mut cc = Command::new("cc");
    cc.current_dir(&dir).args(["-shared", "-o", "wrapped.so", "-Wl,--whole-archive"]).arg(archive);
    run(cc.args(["-Wl,--no-whole-archive", "-lpthread", "-ldl", "-lm"]));
    let out = run(Command::new("nm").args(["-D", "--defined-only"]).arg(dir.join("wrapped.so")));
    let text = String::from_utf8(out.stdout).unwrap();
    let foreign: Vec<_> = text.lines().filter(|l| !l.contains(" vmig_")).collect();
    assert!(foreign.is_empty(), "a VMM's shared object would export Rust's library too: {foreign:?}");
}

#[test]
fn the_private_libraries_are_what_rustc_says() {
    let said = fs::read_to_string(built("native-static-libs.txt")).unwrap();
    let all = pkg_config(installed(), &["--static", "--libs-only-l", "vmig"]);
    let own: BTreeSet<_> = all.iter().map(String::as_str).filter(|l| *l != "-lvmig").collect();
    // Every C compiler adds these two by itself, and libgcc_s does not exist for programs linked with -static.
    let needed: BTreeSet<_> = said.split_whitespace().filter(|l| !matches!(*l, "-lgcc_s" | "-lc")).collect();
    assert_eq!(own, needed, "LIBS_PRIVATE in the Makefile, and rustc's native-static-libs");
}

#[test]
fn the_module_can_be_moved_and_removed() {
    let destdir = scratch("moved");
    let place =
        [format!("DESTDIR={}", destdir.display()), "PREFIX=/usr".into(), "LIBDIR=/usr/lib/x86_64-linux-gnu".into()];
    make("install", &place);
    let moved = destdir.join("elsewhere");
    fs::rename(destdir.join("usr"), &moved).unwrap();
    let mut command = Command::new("pkg-config");
    command.env("PKG_CONFIG_PATH", moved.join("lib/x86_64-linux-gnu/pkgconfig"));
    let flags = String::from_utf8(run(command.args(["--cflags", "--libs", "vmig"])).stdout).unwrap();
    for (flag, file) in [("-I", "vmig.h"), ("-L", "libvmig.so")] {
        let dir = flags.split_whitespace().find_map(|f| f.strip_prefix(flag)).unwrap();
        assert!(Path::new(dir).join(file).exists(), "{file} is not in {dir}");
    }
    fs::rename(&moved, destdir.join("usr")).unwrap();
    make("uninstall", &place);
    let left: Vec<_> = common::source::files(&destdir);
    assert!(left.is_empty(), "uninstall left {left:?}");
    let links = try_run(Command::new("find").arg(&destdir).args(["-type", "l"]));
    assert!(links.stdout.is_empty(), "uninstall left {}", String::from_utf8_lossy(&links.stdout));
}

#[test]
fn the_sanitized_programs_are_sanitized() {
    for (dir, expected) in [("c", false), ("c-asan", true)] {
        built(&format!("{dir}/.built"));
        for path in common::source::files(&common::target().join(dir)) {
            let bytes = fs::read(&path).unwrap();
            let program = bytes.starts_with(b"\x7fELF") && bytes[16] != 1; // not a relocatable object
            if program {
                let out = run(Command::new("nm").arg(&path));
                let asan = String::from_utf8_lossy(&out.stdout).contains("__asan_init");
                assert_eq!(asan, expected, "__asan_init in {}", path.display());
            }
        }
    }
}
