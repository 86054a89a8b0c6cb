//! Migrations through commands (exec:) and files (file:), from VMM to VMM; the VMM is `c_program("peer")`. What cannot
//! run here: the data path of vsock, which needs a host that has it.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::{c_program, run, scratch, skip, words};

const BYTES: usize = 4 << 20;

struct Side {
    state: String,
    words: String,
    runs: bool,
    out: Output,
}

fn side(mut command: Command) -> Side {
    let out = command.output().unwrap();
    let words = words(&out);
    let found = |key: &str| words.lines().find_map(|l| l.strip_prefix(key)).unwrap_or_default().to_owned();
    Side { state: found("state "), runs: found("guest ") == "runs", words: words.clone(), out }
}

fn vmm(args: &[&str]) -> Command {
    let mut command = Command::new("timeout");
    command.args(["-k", "5", "100"]).arg(c_program("peer")).args(args);
    command.args([&format!("ram={BYTES}"), "device=1"]);
    command
}

/// A source whose memory is in the file `ram` of `dir`.
fn out(dir: &Path, uri: &str, more: &[&str]) -> Side {
    let ram = dir.join("ram");
    if !ram.exists() {
        fs::write(&ram, (0..BYTES).map(|n| u8::try_from((n / 4096 + n % 7) % 251).unwrap()).collect::<Vec<u8>>())
            .unwrap();
    }
    side(vmm(&[&["out", uri, &format!("load={}", ram.display())], more].concat()))
}

/// A destination; its memory must be the source's if it has the guest.
fn comes(dir: &Path, uri: &str) -> Side {
    let save = dir.join("save");
    let _ = fs::remove_file(&save);
    let side = side(vmm(&["in", uri, &format!("save={}", save.display())]));
    if side.state == "completed" {
        assert!(fs::read(save).unwrap() == fs::read(dir.join("ram")).unwrap(), "memory differs");
        assert!(side.runs, "{}", side.words);
    }
    side
}

fn completed(side: &Side) {
    assert_eq!(side.state, "completed", "{}", side.words);
}

/// The guest goes on at the source, and the reason has these words.
fn stays(side: &Side, reason: &str) {
    assert!(side.state == "failed" && side.runs && side.words.contains(reason), "{reason}: {}", side.words);
}

fn path(dir: &Path, name: &str) -> String {
    dir.join(name).display().to_string()
}

#[test]
fn through_a_command_into_a_file_and_back() {
    let dir = scratch("commands");
    let (saved, noise) = (path(&dir, "saved"), path(&dir, "noise"));
    completed(&out(&dir, &format!("exec:cat >{saved}; echo not an answer"), &[]));
    completed(&comes(&dir, &format!("exec:cat {saved}")));
    // What a pipeline says in passing, however much, is no error, and holds nothing up.
    completed(&out(&dir, &format!("exec:yes noise | head -c 3000000 >&2; gzip -1 | tee {noise} >{saved}"), &[]));
    completed(&comes(&dir, &format!("exec:gzip -dc <{saved}")));
}

#[test]
fn a_command_may_be_a_way_to_a_destination_that_answers() {
    let dir = scratch("commands");
    let (there, back) = (path(&dir, "there"), path(&dir, "back"));
    run(Command::new("mkfifo").args([&there, &back]));
    let arrives = std::thread::spawn({
        let dir = dir.clone();
        move || {
            // Its own answers go to the source's command.
            comes(&dir, &format!("exec:exec 3<&0; cat <&3 >{}  & cat <{}", path(&dir, "back"), path(&dir, "there")))
        }
    });
    let leaves = out(&dir, &format!("exec:exec 3<&0; cat <&3 >{there} & cat <{back}"), &["return-path=on"]);
    completed(&leaves);
    completed(&arrives.join().unwrap());
}

#[test]
fn a_command_that_fails_is_named_with_its_status_and_words() {
    let dir = scratch("commands");
    stays(
        &out(&dir, "exec:head -c 90000 >/dev/null; echo no more room >&2; exit 3", &[]),
        "status 3 and said: no more room",
    );
    stays(&out(&dir, "exec:no-such-command", &[]), "status 127");
    stays(&out(&dir, "exec:head -c 90000 >/dev/null; kill -9 $$", &[]), "was killed by signal 9");
    stays(&out(&dir, "exec:cat >/dev/full", &[]), "No space left on device");
    stays(&out(&dir, "exec:exec <&-; sleep 100", &[]), "closed its standard input, and goes on");
    // Its words are bounded, and the last of them are kept.
    let loud = out(&dir, "exec:yes loud | head -c 1000000 >&2; echo the end >&2; exit 1", &[]);
    stays(&loud, "the end");
    assert!(loud.words.len() < 12_000, "{} bytes of words", loud.words.len());
    // Had it been a way to a destination, the guest could run there.
    let late = out(&dir, "exec:cat >/dev/null; exit 5", &[]);
    assert!(late.state == "switchover-unknown" && !late.runs && late.words.contains("status 5"), "{}", late.words);
    // One that ends before the last byte does not even take it.
    stays(&out(&dir, "exec:exec <&-", &[]), "ended with status 0");
}

#[test]
fn a_source_that_is_a_command_that_fails_brings_no_guest() {
    let dir = scratch("commands");
    let saved = path(&dir, "saved");
    completed(&out(&dir, &format!("exec:cat >{saved}"), &[]));
    for (command, reason) in [
        (format!("head -c 90000 {saved}; echo torn >&2; exit 4"), "status 4 and said: torn"),
        (format!("cat {saved}; exit 6"), "status 6"),
        (format!("cat {saved}; kill -9 $$"), "signal 9"),
        (format!("head -c 90000 {saved}"), "the stream ends"),
    ] {
        let side = comes(&dir, &format!("exec:{command}"));
        assert!(side.state == "failed" && !side.runs && side.words.contains(reason), "{command}: {}", side.words);
    }
    // It gave everything, and has something else to do.
    completed(&comes(&dir, &format!("exec:cat {saved}; exec sleep 100")));
}

/// What a command of ours inherits: its three descriptors, no blocked or ignored signal, a process group of its own.
#[test]
fn a_command_finds_a_clean_house() {
    let dir = scratch("commands");
    let facts = path(&dir, "facts");
    let look = format!(
        "exec:(ls /proc/self/fd; grep Sig /proc/self/status; ps -o pgid= -p $$; echo $$) >{facts}; cat >/dev/null"
    );
    // The VMM itself has a descriptor that it forgot to mark, and ignores SIGHUP.
    let program = c_program("peer");
    let script = format!("trap '' HUP; exec 7</dev/null; exec {} out '{look}' ram={BYTES}", program.display());
    let side = side({
        let mut command = Command::new("bash");
        command.args(["-c", &script]);
        command
    });
    completed(&side);
    let facts = fs::read_to_string(facts).unwrap();
    let lines: Vec<&str> = facts.lines().collect();
    // ls itself has the directory open.
    assert_eq!(&lines[..4], ["0", "1", "2", "3"], "{facts}");
    assert!(!lines.contains(&"7"), "{facts}");
    assert!(lines.contains(&"SigBlk:\t0000000000000000"), "{facts}");
    // The C library ignores the two signals that it keeps for itself (32, 33).
    let ignored = lines.iter().find_map(|l| l.strip_prefix("SigIgn:\t")).unwrap();
    assert_eq!(u64::from_str_radix(ignored, 16).unwrap() & !(3 << 31), 0, "{facts}");
    let [group, number] = lines[lines.len() - 2..] else { panic!("{facts}") };
    assert_eq!(group.trim(), number, "{facts}");
}

fn processes_with(mark: &str) -> Vec<PathBuf> {
    let all = fs::read_dir("/proc").unwrap().map_while(Result::ok).map(|entry| entry.path());
    let has = |path: &PathBuf| {
        let line = fs::read(path.join("cmdline")).unwrap_or_default();
        path.file_name().unwrap().to_str().unwrap().parse::<u32>().is_ok()
            && String::from_utf8_lossy(&line).contains(mark)
    };
    all.filter(has).collect()
}

#[test]
fn a_command_that_outlives_its_use_is_killed_with_its_pipeline() {
    let dir = scratch("commands");
    let mark = format!("654.{}", std::process::id());
    for command in [
        // Deaf to SIGTERM, or to be asked only once.
        format!("trap '' TERM; head -c 90000 >/dev/null; exec <&-; sleep {mark} | sleep {mark}"),
        format!("head -c 90000 >/dev/null; exec <&-; sleep {mark}"),
    ] {
        let side = out(&dir, &format!("exec:{command}"), &[]);
        stays(&side, "goes on");
        assert!(side.out.status.success());
        let left = processes_with(&format!("sleep\0{mark}"));
        assert!(left.is_empty(), "{command}: {left:?}");
    }
}

#[test]
fn a_file_from_an_offset_on() {
    let dir = scratch("commands");
    let file = path(&dir, "file");
    fs::write(&file, "x".repeat(9_000_000)).unwrap();
    completed(&out(&dir, &format!("file:{file},offset=0x1004"), &[]));
    let content = fs::read(&file).unwrap();
    assert!(content[..0x1004].iter().all(|b| *b == b'x'), "what stands before is not touched");
    assert_eq!(&content[0x1004..0x1008], b"QEVM");
    assert!(content.len() < 9_000_000, "what stood behind is gone");
    completed(&comes(&dir, &format!("file:{file},offset=4100")));
    let side = comes(&dir, &format!("file:{file}"));
    assert_eq!(side.state, "failed", "{}", side.words);
    let new = path(&dir, "new");
    completed(&out(&dir, &format!("file:{new}"), &[]));
    assert_eq!(std::os::unix::fs::PermissionsExt::mode(&fs::metadata(&new).unwrap().permissions()) & 0o777, 0o600);
    completed(&comes(&dir, &format!("file:{new}")));
}

#[test]
fn files_that_cannot_be_used() {
    let dir = scratch("commands");
    run(Command::new("mkfifo").arg(dir.join("fifo")));
    stays(&out(&dir, "file:/dev/full", &[]), "No space left on device");
    stays(&out(&dir, &format!("file:{}", dir.display()), &[]), "Is a directory");
    stays(&out(&dir, "file:/no/such/place", &[]), "No such file or directory");
    stays(&out(&dir, &format!("file:{}", path(&dir, "fifo")), &[]), "this is a pipe");
    for (way, uri, reason) in [
        ("in", "file:/no/such/place", "No such file or directory"),
        ("in", "file:/dev/fdset/1", "there is no fd set 1"),
        ("out", "file:x,offset=0x20M", "bad offset 0x20M"),
        ("out", "pigeon:coop", "unknown migration protocol 'pigeon'"),
        ("in", "vsock:4:x", "not vsock:CID:PORT"),
    ] {
        let side = side(vmm(&[way, uri]));
        assert!(side.out.status.code() == Some(1) && side.words.contains(reason), "{uri}: {}", side.words);
    }
}

/// A real file system that is full, and a limit of the process.
#[test]
fn a_full_disk_keeps_the_guest_where_it_is() {
    let dir = scratch("commands");
    out(&dir, "file:/dev/null", &[]);
    let ram = path(&dir, "ram");
    let program = c_program("peer").display().to_string();
    let limited = format!("ulimit -f 1000; exec {program} out file:{} ram={BYTES} load={ram}", path(&dir, "limited"));
    let mut command = Command::new("bash");
    command.args(["-c", &limited]);
    stays(&side(command), "File too large");
    let disk = path(&dir, "disk");
    fs::create_dir(&disk).unwrap();
    let mount = format!("mount -t tmpfs -o size=1m none {disk}");
    let may = Command::new("unshare").args(["-m", "sh", "-c", &mount]).output();
    if !may.is_ok_and(|out| out.status.success()) {
        let _ = skip("mount", "no file system can be mounted here");
        return;
    }
    for uri in [format!("file:{disk}/f"), format!("exec:cat >{disk}/f")] {
        let script = format!("{mount} && exec {program} out '{uri}' ram={BYTES} load={ram}");
        let mut command = Command::new("unshare");
        command.args(["-m", "sh", "-c", &script]);
        stays(&side(command), "No space left on device");
    }
}

/// There is no host to talk to here: only what the kernel says without one.
#[test]
fn vsock_says_what_is_wrong() {
    let dir = scratch("commands");
    let side = out(&dir, "vsock:4294967294:77", &["connect-timeout=200"]);
    stays(&side, "connecting to vsock:4294967294:77");
}
