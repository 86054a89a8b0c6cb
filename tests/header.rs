//! The header as C and C++ see it: the checked-in copy is what the sources say, it compiles pedantically in programs
//! that use all of it, layouts are Rust's, and wrong use does not compile.
//!
//! Structs and macros are found in the header itself: one that arrives without a comparison here (`layouts`) or a use
//! in tests/c/header_*.c fails the tests.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use common::{have, root, run, scratch, try_run, words};
use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs,
    path::Path,
    process::{Command, Output},
};

const GENERATED: &str = include_str!(concat!(env!("OUT_DIR"), "/vmig.h"));
const STRICT: [&str; 4] = ["-Wall", "-Wextra", "-Wpedantic", "-Werror"];
const C_STANDARDS: [&str; 3] = ["-std=c99", "-std=c11", "-std=c17"];

/// Size and member offsets of a struct: from Rust by the macro below, from C by a program.
type Layout = (usize, BTreeMap<String, usize>);

/// `layout!(types, path::to::vmig_x { member, ... })`: all members, in any order.
macro_rules! layout {
    ($into:ident, $type:ty { $($member:ident),+ $(,)? }) => {{
        let name = stringify!($type).rsplit(':').next().unwrap().trim();
        let members = [$((stringify!($member).to_string(), std::mem::offset_of!($type, $member))),+];
        $into.insert(name.to_string(), (size_of::<$type>(), BTreeMap::from(members)));
    }};
}

/// Every struct of the header as Rust lays it out: a line for each.
fn layouts() -> BTreeMap<String, Layout> {
    use vmig::{capi, section, vmm};
    let mut t = BTreeMap::new();
    layout!(
        t,
        vmm::ops::vmig_ops {
            size,
            stop,
            start,
            lock,
            unlock,
            held,
            log_dirty,
            announce,
            log,
            destroy,
            ram_replaced,
            release,
            reacquire,
            fence,
            config,
            gate,
            throttle,
            log_record
        }
    );
    layout!(t, capi::gate::vmig_gate_config { size, vcpus, signal, flags, timeout_ms });
    layout!(t, vmm::ops::vmig_moment { size, wall_ns, monotonic_ns });
    layout!(t, vmm::ops::vmig_log_record { size, level, thread, monotonic_ns, target, text });
    layout!(
        t,
        capi::run::vmig_bql_stats { size, acquisitions, contended, wait_ns, wait_max_ns, hold_ns, hold_max_ns }
    );
    layout!(t, capi::ram::vmig_ram { size, name, host, len, gpa, flags, fd, fd_offset });
    layout!(t, vmig::dirty::callback::vmig_dirty_bitmap { size, ram, host, first, pages, bits });
    layout!(t, vmig::dirty::callback::vmig_dirty_source { size, name, flags, start, sync, clear, stop, destroy });
    layout!(t, capi::ram::vmig_vcpu_dirt { size, limit, rate, throttle });
    layout!(t, capi::ram::vmig_kvm_slot { size, slot, flags, ram, offset, len, gpa });
    layout!(
        t,
        capi::migrate::vmig_status {
            size,
            state,
            side,
            iteration,
            total,
            remaining,
            transferred,
            normal_pages,
            zero_pages,
            dirty_rate,
            bandwidth,
            elapsed,
            setup,
            expected_downtime,
            stop,
            downtime,
            eta,
            throttle,
            trackers,
            dirty_limit,
            downtime_limit,
            ladder
        }
    );
    layout!(
        t,
        capi::check::vmig_check_report {
            size,
            connect,
            hello,
            compare,
            devices,
            device_bytes,
            devices_timed,
            devices_untimed,
            stop,
            start
        }
    );
    layout!(
        t,
        capi::rate::vmig_dirty_rate {
            size,
            state,
            mode,
            period_ms,
            sample_pages,
            began,
            rate,
            working_set,
            content,
            complete,
            steady,
            vcpus
        }
    );
    layout!(t, capi::rate::vmig_forecast_report { size, verdict, throttle, total, rounds, blackout, left, sent });
    layout!(
        t,
        capi::migrate::vmig_downtime { size, stop, devices, sync, ram, load, start, total, unexplained, verify, go }
    );
    layout!(
        t,
        section::cdevice::vmig_field {
            name,
            kind,
            since,
            offset,
            width,
            count,
            nested,
            count_field,
            flags,
            reserved32,
            reserved
        }
    );
    layout!(
        t,
        section::cdevice::vmig_device {
            size,
            name,
            version,
            oldest,
            fields,
            parts,
            needed,
            pre_save,
            post_save,
            pre_load,
            post_load,
            flags,
            priority
        }
    );
    layout!(
        t,
        vmm::channel_ops::vmig_channel_ops {
            size,
            flags,
            reserved,
            connect,
            listen,
            accept,
            unlisten,
            read,
            write,
            shutdown,
            close
        }
    );
    layout!(
        t,
        section::ops::vmig_section_ops {
            size,
            instance,
            oldest,
            priority,
            flags,
            is_active,
            is_active_iterate,
            prepare,
            setup,
            pending_estimate,
            pending_exact,
            iterate,
            complete,
            cleanup,
            load_setup,
            load,
            load_cleanup
        }
    );
    layout!(t, section::trial::ops::vmig_member { offset, len });
    layout!(t, section::trial::ops::vmig_sample { bytes, len, version, reserved });
    layout!(
        t,
        section::trial::ops::vmig_device_test {
            size,
            seed,
            cases,
            memory,
            transient,
            samples,
            reset,
            saved,
            log,
            opaque,
            flags,
            reserved
        }
    );
    t
}

/// A compiler, its language and its standard.
fn compilers() -> Vec<(&'static str, &'static str)> {
    let mut found: Vec<_> = C_STANDARDS.map(|s| ("gcc", s)).to_vec();
    found.push(("g++", "-std=c++17"));
    if have("clang") {
        found.extend(C_STANDARDS.map(|s| ("clang", s)));
        found.push(("clang++", "-std=c++17"));
    }
    found
}

/// A compiler call with the header in reach; .c files are C++ when the standard says so.
fn compile((compiler, standard): (&str, &str), dir: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(compiler);
    command.current_dir(dir).args(STRICT).arg(standard).arg("-I").arg(root().join("include"));
    if standard.contains("++") {
        command.args(["-x", "c++"]);
    }
    command.args(arguments);
    command
}

fn source(name: &str) -> String {
    root().join("tests/c").join(name).to_str().unwrap().to_string()
}

#[test]
fn the_checked_in_header_is_what_the_sources_say() {
    let path = root().join("include/vmig.h");
    if env::var("UPDATE_HEADER").is_ok_and(|v| v == "1") {
        fs::write(&path, GENERATED).unwrap();
    }
    let checked_in = fs::read_to_string(&path).unwrap();
    let differs = checked_in.lines().zip(GENERATED.lines()).position(|(a, b)| a != b);
    let line = differs.unwrap_or(checked_in.lines().count().min(GENERATED.lines().count())) + 1;
    assert!(checked_in == GENERATED, "include/vmig.h:{line} is not what the sources say: `make header` rewrites it");
}

#[test]
fn programs_that_use_it_compile_everywhere() {
    for kind in compilers() {
        let dir = scratch(&format!("use-{}{}", kind.0, kind.1));
        for unit in ["unit_a", "unit_b"] {
            let file = source("header_use.c");
            run(&mut compile(kind, &dir, &[&format!("-DUNIT={unit}"), "-c", &file, "-o", &format!("{unit}.o")]));
        }
        run(&mut compile(kind, &dir, &["-c", &source("header_main.c"), "-o", "main.o"]));
        run(Command::new(kind.0).current_dir(&dir).args(["main.o", "unit_a.o", "unit_b.o", "-o", "use"]));
        run(&mut Command::new(dir.join("use")));
    }
}

#[test]
fn field_macros_make_what_they_say_and_refuse_the_rest() {
    for kind in compilers() {
        let dir = scratch(&format!("macros-{}{}", kind.0, kind.1));
        run(&mut compile(kind, &dir, &[&source("macros.c"), "-o", "macros"]));
        let told = words(&run(&mut Command::new(dir.join("macros"))));
        let most = told.lines().find_map(|line| line.strip_prefix("WRONG_MAX ")?.parse::<usize>().ok()).unwrap();
        assert!(most > 0, "{told}");
        for wrong in 1..=most {
            let case = format!("-DWRONG={wrong}");
            let out = try_run(&mut compile(kind, &dir, &[&case, "-fsyntax-only", &source("macros.c")]));
            assert!(!out.status.success(), "{kind:?}: WRONG={wrong} of macros.c compiles");
        }
    }
}

#[test]
fn each_wrong_use_is_refused() {
    let text = fs::read_to_string(source("header_wrong.c")).unwrap();
    let numbers = text.match_indices("CASE == ").filter_map(|(i, m)| {
        let digits: String = text[i + m.len()..].chars().take_while(char::is_ascii_digit).collect();
        digits.parse::<usize>().ok()
    });
    let numbers: BTreeSet<_> = numbers.collect();
    let cases = numbers.len();
    assert!(cases > 0);
    assert_eq!(numbers, (1..=cases).collect(), "cases of header_wrong.c are numbered from 1 without a gap");
    let macros = macros(GENERATED);
    for row in text.lines().filter_map(|l| l.strip_prefix("#define ROW ")) {
        let name = row.split('(').next().unwrap();
        assert!(macros.contains_key(name), "{name} is no macro of the header, so its case proves nothing");
    }
    std::thread::scope(|scope| {
        for kind in compilers() {
            scope.spawn(move || wrong_uses(kind, cases));
        }
    });
}

/// Compiles all cases of header_wrong.c with one compiler.
fn wrong_uses(kind: (&str, &str), cases: usize) {
    let dir = scratch("wrong");
    let build = |case: usize| -> Output {
        let arguments = [&format!("-DCASE={case}"), "-fsyntax-only", &source("header_wrong.c")];
        try_run(&mut compile(kind, &dir, &arguments.map(|a| a as &str)))
    };
    let good = build(0);
    assert!(good.status.success(), "{kind:?}: the good case: {}", words(&good));
    for case in 1..=cases {
        let bad = build(case);
        let said = words(&bad);
        assert!(!bad.status.success(), "{kind:?}: case {case} of header_wrong.c compiled");
        // A member whose name is mistyped would fail as well, and prove nothing; case 1 and another are about that.
        let unknown = said.contains("no member named") && !said.contains("missing") && case != 1;
        assert!(!unknown, "{kind:?}: case {case} of header_wrong.c names a member that is not there: {said}");
    }
}

/// The header as a C compiler reads it, comments and directives gone, standard headers left out.
fn preprocessed(header: &str) -> String {
    let lines: String = header.lines().filter(|l| !l.starts_with("#include")).map(|l| format!("{l}\n")).collect();
    let dir = scratch("preprocessed");
    fs::write(dir.join("header.c"), lines).unwrap();
    let out = run(Command::new("gcc").current_dir(&dir).args(["-E", "-P", "header.c"]));
    String::from_utf8(out.stdout).unwrap()
}

/// Structs with a body, and the names of their members.
fn structs(header: &str) -> BTreeMap<String, BTreeSet<String>> {
    let text = preprocessed(header);
    let mut found = BTreeMap::new();
    for (at, keyword) in text.match_indices("struct ") {
        let Some((name, rest)) = text[at + keyword.len()..].split_once('{') else { break };
        let name = name.trim();
        if name.is_empty() || !name.chars().all(|c| c.is_alphanumeric() || c == '_') {
            continue; // only mentioned here
        }
        let body = rest.split_once('}').unwrap().0;
        found.insert(name.to_string(), body.split(';').filter_map(member).collect());
    }
    found
}

/// The name a member declaration gives: `int (*f)(void *)`, `size_t x[4]`, `const char *name`.
fn member(declaration: &str) -> Option<String> {
    let declaration = declaration.trim();
    let name = match declaration.split_once("(*") {
        Some((_, rest)) => rest.split(')').next()?,
        None => declaration.split('[').next()?.rsplit([' ', '*']).next()?,
    };
    (!name.is_empty()).then(|| name.to_string())
}

/// What C says about the layout of these structs of `header`.
fn layouts_in_c(header: &str, structs: &BTreeMap<String, BTreeSet<String>>) -> BTreeMap<String, Layout> {
    let dir = scratch("layout");
    fs::write(dir.join("vmig.h"), header).unwrap();
    let mut program = String::from("#include \"vmig.h\"\n#include <stdio.h>\nint main(void)\n{\n");
    for (name, members) in structs {
        program += &format!("    printf(\"{name} %zu\\n\", sizeof(struct {name}));\n");
        for m in members {
            program += &format!("    printf(\"{name} %zu {m}\\n\", offsetof(struct {name}, {m}));\n");
        }
    }
    fs::write(dir.join("layout.c"), program + "    return 0;\n}\n").unwrap();
    run(Command::new("gcc").current_dir(&dir).args(STRICT).args(["-std=c11", "layout.c", "-o", "layout"]));
    let mut found: BTreeMap<String, Layout> = BTreeMap::new();
    for line in String::from_utf8(run(&mut Command::new(dir.join("layout"))).stdout).unwrap().lines() {
        let mut parts = line.split(' ');
        let (name, number) = (parts.next().unwrap(), parts.next().unwrap().parse().unwrap());
        let layout = found.entry(name.to_string()).or_default();
        match parts.next() {
            Some(member) => drop(layout.1.insert(member.to_string(), number)),
            None => layout.0 = number,
        }
    }
    found
}

#[test]
fn structs_are_laid_out_as_in_rust() {
    let structs = structs(GENERATED);
    let (rust, c) = (layouts(), layouts_in_c(GENERATED, &structs));
    for (name, layout) in &c {
        let ours = rust.get(name).unwrap_or_else(|| panic!("{name} is in the header: give it a line in `layouts`"));
        assert_eq!(layout, ours, "{name}: size and offsets in C, and in Rust");
    }
    assert_eq!(c.len(), rust.len(), "`layouts` has a line for a struct that is not in the header");
}

/// Macros a program may use, with what stands for them; empty for macros with arguments. The guard and names that end
/// in an underscore are the header's own business.
fn macros(header: &str) -> BTreeMap<String, String> {
    let defines =
        header.lines().filter_map(|l| l.trim_start().strip_prefix('#')?.trim_start().strip_prefix("define "));
    let pairs = defines.map(|rest| {
        let word = |c: char| c.is_alphanumeric() || c == '_';
        let end = rest.find(|c| !word(c)).unwrap_or(rest.len());
        let value = rest[end..].strip_prefix(' ').unwrap_or("").split("/*").next().unwrap().trim();
        (rest[..end].to_string(), value.to_string())
    });
    pairs.filter(|(name, _)| name != "VMIG_H" && !name.ends_with('_')).collect()
}

/// Macros whose value is a number: a program made here uses them all.
fn constants(header: &str) -> Vec<String> {
    let numbers = macros(header).into_iter().filter(|(_, v)| v.starts_with(|c: char| c.is_ascii_digit() || c == '-'));
    numbers.map(|(name, _)| name).collect()
}

/// Macros of `header` that are no numbers and that the code of `text` does not mention.
fn unused(header: &str, text: &str) -> Vec<String> {
    let code: String = text.split("*/").map(|part| part.split("/*").next().unwrap()).collect();
    let words: BTreeSet<_> = code.split(|c: char| !(c.is_alphanumeric() || c == '_')).collect();
    let constants = constants(header);
    let names = macros(header).into_keys();
    names.filter(|m| !words.contains(m.as_str()) && !constants.contains(m)).collect()
}

#[test]
fn every_macro_is_used_by_a_program() {
    let unused = unused(GENERATED, &fs::read_to_string(source("header_use.c")).unwrap());
    assert!(unused.is_empty(), "not used in tests/c/header_use.c: {unused:?}");
}

#[test]
fn constants_are_constant_expressions() {
    let mut program = "#include <vmig.h>\nextern const long long all[];\nconst long long all[] = { 0,\n".to_string();
    for name in constants(GENERATED) {
        program += &format!("    {name},\n");
    }
    for kind in compilers() {
        let dir = scratch(&format!("constants-{}{}", kind.0, kind.1));
        fs::write(dir.join("constants.c"), format!("{program}}};\n")).unwrap();
        run(&mut compile(kind, &dir, &["-fsyntax-only", "constants.c"]));
    }
}

/// A header with all that the readers above have to cope with.
const SAMPLE: &str = "
#ifndef VMIG_H
#define VMIG_H
#include <stddef.h>
#include <stdint.h>
/* struct no { int x; }; */
typedef struct opaque opaque;
typedef struct later later;
typedef struct one {
    size_t size; /* bytes; of all */
    const char *name;
    int (*call)(void *vm, const struct later *x);
    uint8_t pair[2];
    const struct later *const *parts;
} one;
struct later {
    uint32_t flags;
    one inner;
};
#define VMIG_HELPER_(x) x
#  define VMIG_ONE 1 /* one */
#define VMIG_TWO(x) \\
    VMIG_HELPER_(x)
#endif
";

#[test]
fn structs_and_macros_of_a_header_are_found() {
    let members = |names: &[&str]| names.iter().map(|n| n.to_string()).collect::<BTreeSet<_>>();
    let found = structs(SAMPLE);
    let expected = [
        ("later".to_string(), members(&["flags", "inner"])),
        ("one".to_string(), members(&["size", "name", "call", "pair", "parts"])),
    ];
    assert_eq!(found, BTreeMap::from(expected));
    assert_eq!(macros(SAMPLE).into_keys().collect::<BTreeSet<_>>(), members(&["VMIG_ONE", "VMIG_TWO"]));
    assert_eq!(constants(SAMPLE), ["VMIG_ONE"]);
    assert_eq!(unused(SAMPLE, "int x = VMIG_ONE + VMIG_TWO_MORE(1); /* VMIG_TWO */"), ["VMIG_TWO"]);
}

#[test]
fn layouts_in_c_are_read() {
    let found = layouts_in_c(SAMPLE, &structs(SAMPLE));
    let (size, members) = &found["one"];
    assert_eq!((*size, members["size"], members["name"], members["pair"], members["parts"]), (40, 0, 8, 24, 32));
    assert_eq!((found["later"].0, found["later"].1["inner"]), (48, 8));
}

#[test]
fn the_layout_macro_takes_paths() {
    #[repr(C)]
    struct plain {
        a: u8,
        b: u64,
    }
    mod inner {
        #[repr(C)]
        pub(super) struct nested {
            pub(super) x: u32,
        }
    }
    let mut types: BTreeMap<String, Layout> = BTreeMap::new();
    layout!(types, plain { a, b });
    layout!(types, inner::nested { x });
    assert_eq!(types["plain"], (16, BTreeMap::from([("a".to_string(), 0), ("b".to_string(), 8)])));
    assert_eq!(types["nested"].0, 4);
}
