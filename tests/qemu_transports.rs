//! Commands and files with stock QEMU at the other end: what it writes by `exec:` and `file:` we read by ours, and the
//! other way round; memory is compared byte by byte.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;
mod qemu;

use common::{c_program, run, scratch, without_qemu};
use qemu::peer::{Peer, assert_same_memory, drawn_ram, path, saved};
use qemu::{Launch, Qemu};
use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
};

const RAM: u64 = 16 << 20;
/// Where the stream begins in a file, and what stands before it: something the other side may not touch.
const OFFSET: usize = 0x3000;
const BEFORE: u8 = 0x5a;

fn peer(way: &str, uri: &str, settings: &[String]) -> Peer {
    let mut all = vec![format!("ram={RAM}")];
    if way == "out" {
        all.push("peer=qemu".into());
    } else {
        all.push("fill=165".into());
    }
    all.extend_from_slice(settings);
    Peer::start(&c_program("peer"), way, uri, &all, Stdio::null())
}

fn qemu_destination() -> Qemu {
    Launch { more: &["-incoming", "defer"], ..Launch::none(RAM) }.start()
}

/// A file whose beginning is somebody else's, and longer than any stream here.
fn container(dir: &Path) -> std::path::PathBuf {
    let file = dir.join("container");
    fs::write(&file, vec![BEFORE; 2 * usize::try_from(RAM).unwrap()]).unwrap();
    file
}

#[track_caller]
fn assert_untouched(file: &Path) {
    let content = fs::read(file).unwrap();
    assert!(content[..OFFSET].iter().all(|b| *b == BEFORE), "what stands before the offset was touched");
    assert_eq!(&content[OFFSET..OFFSET + 4], b"QEVM", "the stream begins at the offset");
}

#[test]
fn what_qemu_wrote_by_a_command_or_into_a_file_we_read() {
    if without_qemu() {
        return;
    }
    for (theirs, ours) in [
        ("exec:cat >F", "exec:cat F"),
        ("exec:gzip -1 >F", "exec:gzip -dc F"),
        ("exec:cat >F", "file:F"),
        ("file:F", "exec:cat <F"),
        ("file:F,offset=0x3000", "file:F,offset=12288"),
        ("file:F,offset=12K", "exec:tail -c +12289 F"),
    ] {
        let dir = scratch("qemu-transports");
        let (ram, arrived, file) = (drawn_ram(&dir, RAM), dir.join("arrived"), container(&dir));
        let named = |uri: &str| uri.replace('F', file.to_str().unwrap());
        let mut qemu = Launch::loaded(RAM, &ram).start();
        qemu.migrate(&named(theirs));
        assert_eq!(qemu.ended()["status"], "completed", "{theirs}: {}", qemu.words());
        if theirs.contains("offset") {
            assert_untouched(&file);
        }
        let end = peer("in", &named(ours), &[path("save", &arrived)]).end().completed();
        assert!(end.runs && end.zero_pages > 0, "{theirs} {ours}: {end:?}");
        assert_same_memory(&saved(&ram), &saved(&arrived), &format!("{theirs} {ours}"));
    }
}

#[test]
fn what_we_wrote_by_a_command_or_into_a_file_qemu_reads() {
    if without_qemu() {
        return;
    }
    for (ours, theirs) in [
        ("exec:cat >F", "exec:cat F"),
        ("exec:gzip -1 >F", "exec:gzip -dc F"),
        ("exec:cat >F", "file:F"),
        ("file:F", "exec:cat <F"),
        ("file:F,offset=0x3000", "file:F,offset=0x3000"),
        ("file:F,offset=12K", "exec:tail -c +12289 F"),
    ] {
        let dir = scratch("qemu-transports");
        let (ram, left, file) = (drawn_ram(&dir, RAM), dir.join("left"), container(&dir));
        let named = |uri: &str| uri.replace('F', file.to_str().unwrap());
        let settings = [path("load", &ram), path("save", &left), "dirty=2048".into(), "max-bandwidth=64M".into()];
        let end = peer("out", &named(ours), &settings).end().completed();
        assert!(!end.runs && end.zero_pages > 0, "{ours}: {end:?}");
        if ours.contains("offset") {
            assert_untouched(&file);
        }
        let mut qemu = qemu_destination();
        qemu.incoming(&named(theirs));
        assert_eq!(qemu.ended()["status"], "completed", "{ours} {theirs}: {}", qemu.words());
        assert_eq!(qemu.run_state(), "running", "{ours} {theirs}");
        let left = saved(&left);
        assert!(left != saved(&ram), "the guest wrote nothing");
        assert_same_memory(&left, &qemu.memory(RAM), &format!("{ours} {theirs}"));
    }
}

/// Commands at both ends that carry the stream there and the answers back, while both sides live.
#[test]
fn commands_at_both_ends_carry_answers() {
    if without_qemu() {
        return;
    }
    for from_us in [true, false] {
        let dir = scratch("qemu-transports");
        let (ram, other) = (drawn_ram(&dir, RAM), dir.join("other"));
        let (there, back) = (dir.join("there"), dir.join("back"));
        run(Command::new("mkfifo").args([&there, &back]));
        let (there, back) = (there.display(), back.display());
        // The shell would give what it starts beside it an empty input: so it is passed by another number.
        let source = format!("exec:exec 3<&0; cat <&3 >{there} & exec cat <{back}");
        let destination = format!("exec:exec 3<&0; cat <&3 >{back} & exec cat <{there}");
        if from_us {
            let mut qemu = qemu_destination();
            qemu.capabilities(&["return-path"]);
            qemu.incoming(&destination);
            let settings = [path("load", &ram), path("save", &other), "dirty=2048".into(), "return-path=on".into()];
            peer("out", &source, &settings).end().completed();
            assert_eq!(qemu.ended()["status"], "completed", "{}", qemu.words());
            assert_same_memory(&saved(&other), &qemu.memory(RAM), "us to QEMU");
        } else {
            let ours = peer("in", &destination, &[path("save", &other)]);
            let mut qemu = Launch::loaded(RAM, &ram).start();
            qemu.capabilities(&["return-path"]);
            qemu.migrate(&source);
            assert_eq!(qemu.ended()["status"], "completed", "{}", qemu.words());
            assert!(ours.end().completed().runs);
            assert_same_memory(&saved(&ram), &saved(&other), "QEMU to us");
        }
    }
}

/// QEMU's destination that gives up, seen through a command: the guest stays, and the reason names the command.
#[test]
fn a_command_whose_qemu_refuses_brings_the_guest_back() {
    if without_qemu() {
        return;
    }
    let dir = scratch("qemu-transports");
    let (ram, socket) = (drawn_ram(&dir, RAM), dir.join("there"));
    run(Command::new("mkfifo").arg(&socket));
    let mut qemu = qemu_destination();
    qemu.incoming(&format!("exec:exec cat {}", socket.display()));
    let settings = [path("load", &ram), "block=main".into()];
    let end = peer("out", &format!("exec:exec cat >{}", socket.display()), &settings).end();
    end.failed_and_runs_on(&["the command 'exec cat >", "was killed by signal 13"]);
    assert_eq!(qemu.ended()["status"], "failed");
}
