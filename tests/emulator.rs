//! The emulator of c-examples: an interpreter on one thread, whose guest knows what every word of its memory must hold and
//! counts on its console. All emulators of a test append to one console, which must read as if the guest had never moved.
#![allow(clippy::unwrap_used, reason = "a test")]

#[path = "common/program.rs"]
mod program;

mod common;

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use program::Program;

const LIMIT: Duration = Duration::from_secs(60);
/// Small enough that the guest walks over all of it in a fraction of a second, also under AddressSanitizer.
const MEM: &str = "8";
/// Slow enough that the guest writes most of its memory while it is copied, fast enough that it converges.
const BANDWIDTH: &str = "max-bandwidth 32M";

/// A guest's image, which make built if it found a toolchain for it.
fn image(name: &str) -> Option<PathBuf> {
    let path = common::c_program("emulator").with_file_name(format!("emulator-{name}.bin"));
    let missing = !path.exists() && common::skip("riscv", "make found no compiler or linker for 32-bit RISC-V");
    (!missing).then_some(path)
}

/// Where the emulators of one test live.
struct Place {
    dir: PathBuf,
    console: PathBuf,
    walk: PathBuf,
}

impl Place {
    fn new() -> Option<Place> {
        let walk = image("walk")?;
        let dir = common::scratch("emulator");
        Some(Place { console: dir.join("console"), dir, walk })
    }

    fn start(&self, program: &Path, name: &str, args: &[&str]) -> Program {
        let mut all = vec!["--mem", MEM, "--console", self.console.to_str().unwrap()];
        all.extend(args);
        Program::start(name, &self.dir, program, &all)
    }

    fn guest(&self, args: &[&str]) -> Program {
        self.start(&common::c_program("emulator"), "a", &[args, &[self.walk.to_str().unwrap()]].concat())
    }

    fn empty(&self, args: &[&str]) -> Program {
        self.start(&common::c_program("emulator"), "b", args)
    }

    fn text(&self) -> String {
        fs::read_to_string(&self.console).unwrap_or_default()
    }

    /// Counter and pass the guest printed last; everything before must be there, once and in order.
    fn last(&self) -> (u64, u64) {
        let text = self.text();
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        let (mut counter, mut pass) = (0, 0);
        for line in whole.lines().filter(|line| !line.starts_with("echo ")) {
            let numbers =
                line.split_once(' ').and_then(|(n, p)| Some((n.parse::<u64>().ok()?, p.parse::<u64>().ok()?)));
            let (n, p) = numbers.unwrap_or_else(|| panic!("not a line of the guest after {counter}: {text}"));
            assert!(n == counter + 1 && p >= pass, "'{line}' follows '{counter} {pass}'");
            (counter, pass) = (n, p);
        }
        (counter, pass)
    }

    fn wait(&self, what: &str, mut done: impl FnMut(&Place) -> bool) {
        let end = Instant::now() + LIMIT;
        while !done(self) {
            assert!(Instant::now() < end, "the guest does not get there: {what}; its console: {}", self.text());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// The guest lives, and finds all of its memory as it left it: two passes from now it has looked at every word.
    fn must_be_whole(&self) {
        let (counter, pass) = self.last();
        self.wait("two passes", |place| place.last().1 >= pass + 2 && place.last().0 > counter + 2);
    }

    /// Where emulator `name` may listen. It keeps an address where a guest came in, so each has its own.
    fn address(&self, transport: &str, name: &str) -> String {
        match transport {
            "unix" => format!("unix:{}", self.dir.join(name).display()),
            _ => "tcp:127.0.0.1:0".to_owned(),
        }
    }

    fn send(&self, from: &mut Program, to: &mut Program, transport: &str) {
        to.send(&format!("incoming {}", self.address(transport, &to.name)));
        let address = to.listening();
        from.must(&format!("migrate {address}"));
    }

    fn moves(&self, from: &mut Program, to: &mut Program, transport: &str) {
        self.send(from, to, transport);
        from.must_end_in("completed");
        to.must_end_in("completed");
    }
}

fn fact(vmm: &mut Program, key: &str) -> String {
    let line = vmm.command("info");
    let found = line.split(' ').find_map(|w| w.strip_prefix(key)?.strip_prefix('=').map(str::to_owned));
    found.unwrap_or_else(|| vmm.fail(&format!("no {key} in '{line}'")))
}

/// There and back, and there again, each time while the guest writes.
fn there_and_back(tracker: &str, bits: u64, transport: &str, busy: &str) {
    let Some(place) = Place::new() else { return };
    let args = ["--tracker", tracker, "--busy", busy, "--set", BANDWIDTH];
    let (mut a, mut b) = (place.guest(&args), place.empty(&args));
    place.must_be_whole();
    for _ in 0..3 {
        place.moves(&mut a, &mut b, transport);
        let (in_use, rounds) = (a.status_text("in-use"), a.status("iteration"));
        let what = format!("{tracker} over {transport}, busy {busy} ms: in use {in_use}, {rounds} rounds");
        println!("{what}");
        assert_eq!(a.status("trackers"), bits, "{what}");
        assert!(tracker == "none" || rounds > 1, "the guest wrote nothing while it was copied: {what}");
        assert_eq!((fact(&mut a, "running"), fact(&mut b, "running")), ("0".to_owned(), "1".to_owned()), "{what}");
        place.must_be_whole();
        std::mem::swap(&mut a, &mut b);
    }
    a.quit();
    b.quit();
    place.last();
}

#[test]
fn a_guest_moves_while_each_store_is_marked() {
    there_and_back("marks", 8, "tcp", "2");
    there_and_back("marks", 8, "unix", "50");
}

#[test]
fn a_guest_moves_while_the_emulator_keeps_a_bitmap() {
    there_and_back("bitmap", 8, "unix", "2");
    there_and_back("bitmap", 8, "tcp", "50");
}

#[test]
fn a_guest_moves_while_the_kernel_protects_its_memory() {
    if common::without_userfaultfd() {
        return;
    }
    there_and_back("write-protect", 4, "tcp", "2");
    there_and_back("write-protect", 4, "unix", "50");
    there_and_back("auto", 4, "tcp", "2");
}

#[test]
fn a_guest_moves_while_it_stands_still() {
    there_and_back("none", 16, "tcp", "2");
    there_and_back("none", 16, "unix", "50");
}

/// Nothing runs on either side when both are compared, so every bit of the machine must be the same: registers, devices,
/// memory, what was typed and not read yet, and the line the guest was in the middle of.
#[test]
fn what_arrives_is_what_left_to_the_bit() {
    let Some(place) = Place::new() else { return };
    let (mut a, mut b) = (place.guest(&[]), place.empty(&[]));
    place.must_be_whole();
    for letters in ["ab", "cde"] {
        a.must("pause");
        a.must(&format!("type {letters}"));
        let (state, before) = (a.command("info"), place.text());
        place.moves(&mut a, &mut b, "tcp");
        assert_eq!(b.command("info"), state);
        assert_eq!(place.text(), before, "a guest that stands still prints nothing");
        b.must("resume");
        for letter in letters.chars() {
            place.wait("an echo", |place| place.text().contains(&format!("echo {letter}\n")));
        }
        place.must_be_whole();
        std::mem::swap(&mut a, &mut b);
    }
    b.quit();
    a.must("type q");
    a.wait_end(0);
    assert!(place.text().ends_with("echo q\n"), "{}", place.text());
}

#[test]
fn a_cancelled_move_leaves_the_guest_where_it_is() {
    let Some(place) = Place::new() else { return };
    for tracker in ["marks", "bitmap"] {
        let (mut a, mut b) = (place.guest(&["--tracker", tracker]), place.empty(&["--tracker", tracker]));
        a.must("set max-bandwidth 1M");
        place.send(&mut a, &mut b, "tcp");
        while a.status("sent") < 1 << 16 {
            std::thread::sleep(Duration::from_millis(5));
        }
        a.must("cancel");
        a.must_end_in("cancelled");
        assert_ne!(b.ended_in(), "completed");
        assert_eq!((fact(&mut a, "running"), fact(&mut b, "running")), ("1".to_owned(), "0".to_owned()));
        place.must_be_whole();
        a.must("set max-bandwidth 0");
        place.moves(&mut a, &mut b, "tcp");
        place.must_be_whole();
        a.quit();
        b.quit();
        fs::remove_file(&place.console).unwrap();
    }
}

#[test]
fn a_destination_that_is_not_there_or_not_alike_is_named() {
    let Some(place) = Place::new() else { return };
    let mut a = place.guest(&["--set", "connect-timeout 2000"]);
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    for (uri, word) in
        [(format!("tcp:127.0.0.1:{port}"), "refused"), (place.address("unix", "nobody"), "No such file")]
    {
        a.must(&format!("migrate {uri}"));
        a.must_end_in("failed");
        let why = a.command("error");
        assert!(why.contains(word), "{uri}: {why}");
        place.must_be_whole();
    }
    assert!(a.command("migrate nonsense:1").starts_with("error migrate: "));
    // The last --mem counts.
    let mut b = place.empty(&["--mem", "16"]);
    place.send(&mut a, &mut b, "tcp");
    a.must_end_in("failed");
    let why = a.command("error");
    assert!(why.contains("ram"), "{why}");
    place.must_be_whole();
    b.quit();
    let mut b = place.empty(&[]);
    place.moves(&mut a, &mut b, "unix");
    place.must_be_whole();
    a.quit();
    b.quit();
}

#[test]
fn a_destination_that_is_killed_costs_nothing() {
    let Some(place) = Place::new() else { return };
    for (tracker, busy) in [("marks", "2"), ("bitmap", "50")] {
        let args = ["--tracker", tracker, "--busy", busy];
        let (mut a, mut b) = (place.guest(&args), place.empty(&args));
        for _ in 0..2 {
            a.must("set max-bandwidth 1M");
            place.send(&mut a, &mut b, "tcp");
            while a.status("sent") < 1 << 16 {
                std::thread::sleep(Duration::from_millis(5));
            }
            b.kill();
            a.must_end_in("failed");
            place.must_be_whole();
            b = place.empty(&args);
        }
        a.must("set max-bandwidth 0");
        place.moves(&mut a, &mut b, "tcp");
        place.must_be_whole();
        a.quit();
        b.quit();
        fs::remove_file(&place.console).unwrap();
    }
}

/// Its check finds one bit, in the first, the last and some other word of its memory.
#[test]
fn the_guest_notices_a_bit_that_changed() {
    let Some(place) = Place::new() else { return };
    for address in ["0x80010000", "0x8040abcd", "0x807fffff"] {
        let mut a = place.guest(&[]);
        place.must_be_whole();
        assert!(a.command("corrupt 0x70000000").starts_with("error corrupt: "));
        a.must(&format!("corrupt {address}"));
        a.wait_end(3);
        let word = u32::from_str_radix(&address[2..], 16).unwrap() & !3;
        let text = place.text();
        assert!(text.contains(&format!("guest: memory at {word:#010x} is ")), "{text}");
        fs::remove_file(&place.console).unwrap();
    }
}

/// A dirty page that does not arrive is found by the guest, which says where and switches off.
#[test]
fn the_guest_notices_a_page_that_was_lost() {
    let Some(place) = Place::new() else { return };
    let program = common::built("c-fault/emulator");
    // Only the source loses it, so only the source gets the variable.
    let console = place.console.to_str().unwrap();
    let (exe, walk) = (program.to_str().unwrap(), place.walk.to_str().unwrap());
    let args = ["VMIG_FAULT=drop-dirty", exe, "--mem", MEM, "--console", console, "--set", BANDWIDTH, walk];
    let mut a = Program::start("a", &place.dir, Path::new("/usr/bin/env"), &args);
    let mut b = place.empty(&[]);
    place.must_be_whole();
    place.send(&mut a, &mut b, "tcp");
    a.must_end_in("completed");
    b.wait_end(3);
    // The first page that differs is the program's own; it is missed all the same.
    assert!(place.text().contains("\nguest: "), "{}", place.text());
    a.quit();
}

// ---- the machine by itself ----

/// What the guest `check` computes with compiled code.
fn arithmetic() -> u32 {
    let (mut hash, mut state) = (0x811c_9dc5_u32, 1_u32);
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state
    };
    let signed = |bits: u32| i32::from_ne_bytes(bits.to_ne_bytes());
    let bits = |signed: i32| u32::from_ne_bytes(signed.to_ne_bytes());
    let low = |wide: u64| u32::try_from(wide & 0xffff_ffff).unwrap();
    let low_of_signed = |wide: i64| low(u64::from_ne_bytes(wide.to_ne_bytes()));
    for i in 0..3000 {
        let (a, b) = (random(), random() >> (i % 32));
        let (sa, sb) = (signed(a), signed(b));
        let divisor = if sb | 1 == -1 { 3 } else { sb | 1 };
        let wide = (u64::from(a) << 32 | u64::from(b)).wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(a.into());
        for result in [
            a.wrapping_add(b),
            a.wrapping_sub(b),
            a.wrapping_mul(b),
            low_of_signed((i64::from(sa) * i64::from(sb)) >> 32),
            low((u64::from(a) * u64::from(b)) >> 32),
            bits(sa / divisor),
            bits(sa % divisor),
            a / (b | 1),
            a % (b | 1),
            a << (b & 31),
            a >> (b & 31),
            bits(sa >> (b & 31)),
            u32::from(sa < sb),
            u32::from(a < b),
            (a & b) ^ (a | !b),
            low(wide),
            low(wide >> 32),
            low(wide >> (b & 63)),
            low_of_signed(i64::from_ne_bytes(wide.to_ne_bytes()) >> (a & 63)),
        ] {
            hash = (hash ^ result).wrapping_mul(0x0100_0193);
        }
    }
    hash
}

/// Every instruction, trap, interrupt and register that the guest `check` knows of.
#[test]
fn the_interpreter_keeps_to_the_manual() {
    let Some(check) = image("check") else { return };
    let Some(place) = Place::new() else { return };
    let mut vmm = place.start(&common::c_program("emulator"), "a", &[check.to_str().unwrap()]);
    place.wait("type", |place| place.text().contains("type\n"));
    vmm.must("type xy");
    vmm.wait_end(0);
    let text = place.text();
    let words: Vec<&str> = text.lines().filter(|line| *line != "type").collect();
    let [result, count] = words[..] else { panic!("{text}") };
    assert_eq!(result, format!("arithmetic {:#010x}", arithmetic()), "{text}");
    let checks = count.strip_prefix("checks ").and_then(|c| c.strip_suffix(" bad 0")?.parse().ok());
    assert!(checks > Some(200), "{text}");
}

#[test]
fn an_image_that_is_none_is_refused() {
    let Some(place) = Place::new() else { return };
    let big = place.dir.join("big");
    fs::File::create(&big).unwrap().set_len((8 << 20) + 1).unwrap();
    fs::write(place.dir.join("void"), "").unwrap();
    for (file, word) in [("big", "large"), ("void", "format"), ("none", "No such file")] {
        let out = common::try_run(
            Command::new(common::c_program("emulator")).args(["--mem", MEM]).arg(place.dir.join(file)),
        );
        let words = common::words(&out);
        assert!(out.status.code() == Some(2) && words.contains(word), "{file}: {}: {words}", out.status);
    }
    let out = common::try_run(Command::new(common::c_program("emulator")).args(["--tracker", "luck"]));
    let words = common::words(&out);
    assert!(out.status.code() == Some(1) && words.contains("write-protect"), "the trackers are named: {words}");
}

// ---- what the documents say ----

/// Lines of C that are neither blank nor a comment by itself.
fn lines_of_code(text: &str) -> usize {
    let mut inside = false;
    let mut count = 0;
    for line in text.lines().map(str::trim) {
        let comment = inside || line.starts_with("/*");
        inside = comment && !line.ends_with("*/");
        count += usize::from(!comment && !line.is_empty());
    }
    count
}

#[test]
fn the_glue_is_as_short_as_the_documents_say() {
    assert_eq!(lines_of_code("/* a\n * b */\n\nint x;      /* c */\n/* d */\nint y;\n"), 2);
    let root = common::root();
    let count = lines_of_code(&fs::read_to_string(root.join("c-examples/emulator/glue.c")).unwrap());
    assert!(count < 60, "glue.c has {count} lines");
    for file in ["README.md", "c-examples/emulator/README.md"] {
        let text = fs::read_to_string(root.join(file)).unwrap();
        assert!(text.contains(&format!("glue.c` has {count} lines")), "{file} does not say {count} lines");
    }
    for file in ["cpu.c", "machine.c"] {
        let text = fs::read_to_string(root.join("c-examples/emulator").join(file)).unwrap();
        assert!(!text.contains("vmig_"), "{file} is to know nothing of the library");
    }
}

#[test]
fn a_missing_toolchain_is_named() {
    let out = common::scratch("toolchain");
    let make = |optional: &str| {
        let mut make = Command::new("make");
        make.args(["-s", "-C"]).arg(common::root().join("c-examples/emulator")).arg("guests");
        make.arg(format!("OUT={}", out.display())).args(["RISCV_CC=no-such-compiler", optional]);
        common::try_run(make.env_remove("MAKEFLAGS"))
    };
    for (optional, ends_well) in [("GUESTS_OPTIONAL=1", true), ("GUESTS_OPTIONAL=", false)] {
        let out = make(optional);
        let words = common::words(&out);
        assert_eq!(out.status.success(), ends_well, "{words}");
        assert!(words.contains("no-such-compiler") && words.contains("install clang and lld"), "{words}");
    }
}
