//! Stock QEMU as the other side, in both directions: memory is compared byte by byte, and what cannot work fails with
//! an error that says why, the source's guest still running.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;
mod qemu;

use common::{c_program, run, scratch, without_qemu};
use qemu::decode::{Decoded, decode};
use qemu::peer::{Peer, assert_same_memory, drawn_ram, path, saved};
use qemu::{Launch, Qemu};
use serde_json::json;
use std::{
    fs::{self, File},
    io::{ErrorKind, Read},
    net::TcpListener,
    os::{
        fd::OwnedFd,
        unix::{fs::FileExt, net::UnixStream},
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

const MIB: u64 = 1 << 20;
const RAM: u64 = 16 * MIB;
const PAGE: usize = 4096;
/// What the destination's memory is full of before anything arrives.
const GARBAGE: &str = "fill=165";
const PAUSED_BY_USER: u32 = 1;

/// Our destination, full of garbage.
fn destination(uri: &str, settings: &[String], stdin: impl Into<Stdio>) -> Peer {
    let mut all = vec![format!("ram={RAM}"), GARBAGE.to_string()];
    all.extend_from_slice(settings);
    Peer::start(&c_program("peer"), "in", uri, &all, stdin)
}

/// Our source, towards QEMU.
fn source(uri: &str, settings: &[String], stdin: impl Into<Stdio>) -> Peer {
    let mut all = vec![format!("ram={RAM}"), "peer=qemu".to_string()];
    all.extend_from_slice(settings);
    Peer::start(&c_program("peer"), "out", uri, &all, stdin)
}

fn listen_tcp(settings: &[String]) -> Peer {
    destination("tcp:127.0.0.1:0", settings, Stdio::null())
}

fn on_off(on: bool) -> &'static str {
    if on { "on" } else { "off" }
}

/// QEMU as source, its return path on or off.
fn qemu_source(file: &Path, ram: u64, return_path: bool) -> Qemu {
    let mut qemu = Launch::loaded(ram, file).start();
    if return_path {
        qemu.capabilities(&["return-path"]);
    }
    qemu
}

/// QEMU as destination, waiting for `migrate-incoming`.
fn qemu_destination(machine: &str, ram: u64) -> Qemu {
    Launch { machine, more: &["-incoming", "defer"], ..Launch::none(ram) }.start()
}

/// QEMU writes its stream into a file.
fn to_file(qemu: &mut Qemu, dir: &Path) -> PathBuf {
    let file = dir.join("stream");
    qemu.migrate(&format!("file:{}", file.display()));
    assert_eq!(qemu.ended()["status"], "completed");
    file
}

// ---- QEMU to us ----------------------------------------------------------------------------------------------------

#[test]
fn qemu_to_us() {
    if without_qemu() {
        return;
    }
    for (kind, return_path) in [("tcp", true), ("tcp", false), ("unix", true), ("unix", false), ("tcp6", true)] {
        let what = format!("{kind}, return path {}", on_off(return_path));
        let dir = scratch("to-us");
        let (ram, arrived) = (drawn_ram(&dir, RAM), dir.join("arrived"));
        let uri = match kind {
            "tcp" => "tcp:127.0.0.1:0".to_string(),
            "tcp6" => "tcp:[::1]:0".to_string(),
            _ => format!("unix:{}", dir.join("s").display()),
        };
        let peer = destination(&uri, &[path("save", &arrived)], Stdio::null());
        let mut qemu = qemu_source(&ram, RAM, return_path);
        qemu.migrate(&peer.address);
        assert_eq!(qemu.ended()["status"], "completed", "{what}");
        assert_eq!(qemu.run_state(), "postmigrate", "{what}");
        let end = peer.end().completed();
        assert!(end.runs && end.zero_pages > 0, "{what}: {end:?}");
        assert_same_memory(&saved(&ram), &saved(&arrived), &what);
    }
}

#[test]
fn qemu_to_us_over_a_pipe() {
    if without_qemu() {
        return;
    }
    let dir = scratch("to-us");
    let (ram, arrived, pipe) = (drawn_ram(&dir, RAM), dir.join("arrived"), dir.join("pipe"));
    run(Command::new("mkfifo").arg(&pipe));
    let both = File::options().read(true).write(true).open(&pipe).unwrap(); // does not wait for the other end
    let peer = destination("fd:0", &[path("save", &arrived)], both);
    let mut qemu = qemu_source(&ram, RAM, false);
    qemu.migrate(&format!("exec:cat >{}", pipe.display()));
    assert_eq!(qemu.ended()["status"], "completed");
    peer.end().completed();
    assert_same_memory(&saved(&ram), &saved(&arrived), "pipe");
}

/// Holds QEMU's migration up after its first pages, so that a test can do something meanwhile.
fn slow_qemu(mut qemu: Qemu, capabilities: &[&str], uri: &str) -> Qemu {
    qemu.capabilities(capabilities);
    qemu.parameters(json!({"max-bandwidth": MIB}));
    qemu.migrate(uri);
    qemu.has_sent(MIB / 2);
    qemu
}

/// A QEMU whose memory is a file of ours. What we write there QEMU does not notice; a reset puts `ram` there again.
fn qemu_with_a_file(ram: &Path, dir: &Path) -> (Qemu, File) {
    let memory = dir.join("memory");
    let file = File::options().read(true).write(true).create_new(true).open(&memory).unwrap();
    let object = format!("memory-backend-file,id=ram,size={RAM},mem-path={},share=on", memory.display());
    let more = ["-object", &object];
    (Launch { machine: "none,memory-backend=ram", more: &more, ..Launch::loaded(RAM, ram) }.start(), file)
}

#[test]
fn pages_written_meanwhile_arrive() {
    if without_qemu() {
        return;
    }
    let dir = scratch("dirty");
    let (ram, arrived) = (drawn_ram(&dir, RAM), dir.join("arrived"));
    let (qemu, memory) = qemu_with_a_file(&ram, &dir);
    // The first round finds no page as it will be in the end: none that is zero then, and zeros elsewhere.
    let last = saved(&ram);
    let first = |page: &[u8]| if page.iter().all(|b| *b == 0) { [0x55; PAGE] } else { [0; PAGE] };
    let before: Vec<u8> = last.chunks(PAGE).flat_map(first).collect();
    memory.write_all_at(&before, 0).unwrap();
    let peer = listen_tcp(&[path("save", &arrived)]);
    let mut qemu = slow_qemu(qemu, &["return-path"], &peer.address);
    qemu.reset();
    qemu::wait_for("the reset", || (qemu.memory(RAM) == last).then_some(()));
    qemu.parameters(json!({"max-bandwidth": 1024 * MIB}));
    assert_eq!(qemu.ended()["status"], "completed");
    let end = peer.end().completed();
    assert!(end.normal_pages + end.zero_pages > RAM / 4096, "no page came twice: {end:?}");
    assert_same_memory(&last, &saved(&arrived), "dirtied RAM");
}

#[test]
fn a_guest_that_does_not_run_at_qemu_arrives_paused() {
    if without_qemu() {
        return;
    }
    for before in ["prelaunch", "paused"] {
        let dir = scratch("paused");
        let (ram, arrived) = (drawn_ram(&dir, RAM), dir.join("arrived"));
        let more: &[&str] = if before == "prelaunch" { &["-S"] } else { &[] };
        let mut qemu = Launch { more, ..Launch::loaded(RAM, &ram) }.start();
        qemu.capabilities(&["return-path"]);
        if before == "paused" {
            qemu.ok("stop", json!({}));
        }
        assert_eq!(qemu.run_state(), before);
        let peer = listen_tcp(&[path("save", &arrived)]);
        qemu.migrate(&peer.address);
        assert_eq!(qemu.ended()["status"], "completed");
        let end = peer.end().completed();
        assert_eq!((end.reasons, end.runs), (PAUSED_BY_USER, false), "{before}");
        assert_same_memory(&saved(&ram), &saved(&arrived), before);
    }
}

#[test]
fn qemu_waits_for_our_ack() {
    if without_qemu() {
        return;
    }
    let dir = scratch("ack");
    let (ram, arrived) = (drawn_ram(&dir, RAM), dir.join("arrived"));
    let peer = listen_tcp(&[path("save", &arrived), "switchover-ack=on".into()]);
    let mut qemu = Launch::loaded(RAM, &ram).start();
    qemu.capabilities(&["return-path", "switchover-ack"]);
    qemu.migrate(&peer.address);
    assert_eq!(qemu.ended()["status"], "completed");
    peer.end().completed();
    assert_same_memory(&saved(&ram), &saved(&arrived), "RAM");
}

#[test]
fn the_clock_arrives() {
    if without_qemu() {
        return;
    }
    let dir = scratch("clock");
    let ram = drawn_ram(&dir, RAM);
    let stream = to_file(&mut qemu_source(&ram, RAM, false), &dir);
    let sent = decode(&fs::read(&stream).unwrap()).device("timer").u64("cpu_clock_offset");
    let end = destination("fd:0", &["autostart=off".into()], File::open(&stream).unwrap()).end().completed();
    assert!(sent > 0 && end.reasons == PAUSED_BY_USER, "{end:?}");
    assert_eq!(end.clock_ns, sent);
}

// ---- QEMU to us: what cannot work ----------------------------------------------------------------------------------

/// QEMU's migration to us fails on both sides; ours says these words, and QEMU's guest goes on.
fn refused(mut qemu: Qemu, settings: &[String], words: &[&str]) {
    let peer = listen_tcp(settings);
    qemu.migrate(&peer.address);
    let info = qemu.ended();
    assert_eq!(info["status"], "failed", "{words:?}: {info}");
    assert_eq!(qemu.run_state(), "running", "{words:?}");
    assert!(!peer.end().failed(words).runs);
}

#[test]
fn what_differs_is_refused_and_qemu_goes_on() {
    if without_qemu() {
        return;
    }
    let ram = drawn_ram(&scratch("differs"), RAM);
    for return_path in [true, false] {
        let qemu = || qemu_source(&ram, RAM, return_path);
        refused(qemu(), &["ram=0x800000".into()], &["RAM block 'ram'", "length", "0x800000", "0x1000000"]);
        refused(qemu(), &["block=main".into()], &["no RAM block 'ram'"]);
        refused(qemu(), &["machine=board".into()], &["machine type", "'board'", "'none'"]);
    }
}

#[test]
fn what_we_do_not_speak_is_refused_and_qemu_goes_on() {
    if without_qemu() {
        return;
    }
    let ram = drawn_ram(&scratch("capability"), RAM);
    let cases: [(&[&str], &str); 3] =
        [(&["multifd"], "multifd"), (&["postcopy-ram"], "postcopy"), (&["x-ignore-shared"], "x-ignore-shared")];
    for (capabilities, words) in cases {
        let mut qemu = qemu_source(&ram, RAM, true);
        qemu.capabilities(capabilities);
        // QEMU may wait for its channels until we lose patience.
        refused(qemu, &["stall-timeout=5000".into()], &[words]);
    }
}

#[test]
fn delta_pages_are_refused_and_qemu_goes_on() {
    if without_qemu() {
        return;
    }
    let dir = scratch("xbzrle");
    let ram = drawn_ram(&dir, RAM);
    let (qemu, memory) = qemu_with_a_file(&ram, &dir);
    let peer = listen_tcp(&[]);
    let mut qemu = slow_qemu(qemu, &["return-path", "xbzrle", "switchover-ack"], &peer.address);
    // As the ack never comes, there are as many rounds as it takes.
    qemu.parameters(json!({"max-bandwidth": 1024 * MIB}));
    // Every reset makes all pages dirty, and what we change after it makes them differ from what QEMU sent before.
    let info = qemu::wait_for("QEMU to notice", || {
        qemu.reset();
        (0..RAM / 4096).for_each(|page| memory.write_all_at(b"changed", page * 4096).unwrap());
        Some(qemu.ok("query-migrate", json!({}))).filter(|i| i["status"] == "failed" || i["status"] == "completed")
    });
    assert_eq!((info["status"].as_str(), qemu.run_state()), (Some("failed"), "running".to_string()), "{info}");
    peer.end().failed(&["XBZRLE", "switch xbzrle off"]);
}

#[test]
fn a_mapped_ram_file_is_refused() {
    if without_qemu() {
        return;
    }
    let dir = scratch("mapped");
    let mut qemu = qemu_source(&drawn_ram(&dir, RAM), RAM, false);
    qemu.capabilities(&["mapped-ram"]);
    let stream = File::open(to_file(&mut qemu, &dir)).unwrap();
    destination("fd:0", &[], stream).end().failed(&["capability mapped-ram is on at the source"]);
}

#[test]
fn qemu_that_dies_or_cancels_is_an_error_here() {
    if without_qemu() {
        return;
    }
    let ram = drawn_ram(&scratch("gone"), RAM);
    for return_path in [true, false] {
        let capabilities: &[&str] = if return_path { &["return-path"] } else { &[] };
        let peer = listen_tcp(&[]);
        slow_qemu(Launch::loaded(RAM, &ram).start(), capabilities, &peer.address).kill();
        assert!(!peer.end().failed(&["the stream ends at byte"]).runs);

        let peer = listen_tcp(&[]);
        let mut qemu = slow_qemu(Launch::loaded(RAM, &ram).start(), capabilities, &peer.address);
        qemu.ok("migrate_cancel", json!({}));
        assert_eq!(qemu.ended()["status"], "cancelled");
        assert_eq!(qemu.run_state(), "running");
        assert!(!peer.end().failed(&["the stream ends at byte"]).runs);
    }
}

// ---- us to QEMU ----------------------------------------------------------------------------------------------------

/// Our guest, which writes to its memory all the time, moves to QEMU.
fn leave(qemu: &mut Qemu, uri: &str, settings: &[String], stdin: impl Into<Stdio>) {
    let dir = scratch("leave");
    let (ram, left) = (drawn_ram(&dir, RAM), dir.join("left"));
    // Slow enough for the guest to be quicker than the first round.
    let mut all = vec![path("load", &ram), path("save", &left), "dirty=2048".into(), "max-bandwidth=64M".into()];
    all.extend_from_slice(settings);
    let end = source(uri, &all, stdin).end().completed();
    assert!(!end.runs && end.zero_pages > 0, "{settings:?}: {end:?}");
    assert_eq!(qemu.ended()["status"], "completed", "{settings:?}: {}", qemu.words());
    assert_eq!(qemu.run_state(), "running", "{settings:?}");
    let left = saved(&left);
    assert!(left != saved(&ram), "the guest wrote nothing");
    assert_same_memory(&left, &qemu.memory(RAM), &format!("{uri} {settings:?}"));
}

#[test]
fn us_to_qemu() {
    if without_qemu() {
        return;
    }
    for (kind, return_path) in [("tcp", true), ("tcp", false), ("unix", true), ("unix", false)] {
        let mut qemu = qemu_destination("none", RAM);
        let uri = match kind {
            "tcp" => "tcp:127.0.0.1:0".to_string(),
            _ => format!("unix:{}", scratch("s").join("s").display()),
        };
        let uri = qemu.incoming(&uri);
        let settings = [format!("return-path={}", on_off(return_path))];
        leave(&mut qemu, &uri, &settings, Stdio::null());
    }
}

#[test]
fn us_to_qemu_over_a_passed_socket() {
    if without_qemu() {
        return;
    }
    let (theirs, ours) = UnixStream::pair().unwrap();
    let stdin = OwnedFd::from(theirs).into();
    let mut qemu = Launch { stdin, more: &["-incoming", "defer"], ..Launch::none(RAM) }.start();
    qemu.incoming("fd:0");
    leave(&mut qemu, "fd:0", &[], OwnedFd::from(ours));
}

#[test]
fn we_wait_for_qemus_ack() {
    if without_qemu() {
        return;
    }
    let mut qemu = qemu_destination("none", RAM);
    qemu.capabilities(&["return-path", "switchover-ack"]);
    let uri = qemu.incoming("tcp:127.0.0.1:0");
    leave(&mut qemu, &uri, &["switchover-ack=on".into()], Stdio::null());
}

#[test]
fn our_paused_guest_arrives_paused_at_qemu() {
    if without_qemu() {
        return;
    }
    let dir = scratch("paused");
    let ram = drawn_ram(&dir, RAM);
    let mut qemu = qemu_destination("none", RAM);
    let uri = qemu.incoming("tcp:127.0.0.1:0");
    source(&uri, &[path("load", &ram), "pause=1".into()], Stdio::null()).end().completed();
    assert_eq!(qemu.ended()["status"], "completed");
    assert_eq!(qemu.run_state(), "paused");
    assert_same_memory(&saved(&ram), &qemu.memory(RAM), "RAM");
}

#[test]
fn qemu_that_cannot_take_our_guest_leaves_it_running() {
    if without_qemu() {
        return;
    }
    let ram = drawn_ram(&scratch("refuses"), RAM);
    // QEMU has no words for us: it says that it failed, or, before it knows that we listen, just goes.
    let cases = [
        ("none", RAM / 2, "block=ram", "destination failed"),
        ("none", RAM, "block=main", "destination failed"),
        ("none", RAM, "machine=board", "destination closed the connection"),
        ("pc", RAM, "machine=none", "destination closed the connection"),
    ];
    for ((machine, bytes, setting, words), return_path) in cases.iter().flat_map(|c| [(c, true), (c, false)]) {
        let mut qemu = qemu_destination(machine, *bytes);
        let uri = qemu.incoming("tcp:127.0.0.1:0");
        let settings = [path("load", &ram), setting.to_string(), format!("return-path={}", on_off(return_path))];
        let end = source(&uri, &settings, Stdio::null()).end();
        assert_eq!(qemu.ended()["status"], "failed", "{machine} {setting} {end:?}");
        println!("{machine} {setting}: {}", qemu.words());
        let end = end.failed_and_runs_on(&[]);
        // Without a return path, or before it is open, there is only a connection that breaks.
        let broken = !(return_path && words.contains("failed")) && end.message().contains("writing to the peer");
        assert!(broken || return_path && end.message().contains(words), "{machine} {setting}: {end:?}");
    }
}

#[test]
fn a_device_qemu_does_not_know_brings_our_guest_back() {
    if without_qemu() {
        return;
    }
    // All of it may be written, the handover included, before QEMU finds out: its answer gives the guest back.
    for _ in 0..5 {
        let mut qemu = qemu_destination("none", MIB);
        let uri = qemu.incoming("tcp:127.0.0.1:0");
        let settings = [format!("ram={MIB}"), "device=1".into(), "dirty=16".into()];
        source(&uri, &settings, Stdio::null()).end().failed_and_runs_on(&["the destination failed"]);
        assert_eq!(qemu.ended()["status"], "failed");
    }
}

#[test]
fn qemu_that_dies_leaves_our_guest_running() {
    if without_qemu() {
        return;
    }
    let ram = drawn_ram(&scratch("dies"), RAM);
    for return_path in [true, false] {
        let mut qemu = qemu_destination("none", RAM);
        let uri = qemu.incoming("tcp:127.0.0.1:0");
        let settings =
            [path("load", &ram), format!("return-path={}", on_off(return_path)), "max-bandwidth=1M".to_string()];
        let peer = source(&uri, &settings, Stdio::null());
        qemu::wait_for("QEMU to see us", || {
            (qemu.ok("query-migrate", json!({}))["status"] == "active").then_some(())
        });
        qemu.kill();
        peer.end().failed_and_runs_on(&[]);
    }
}

#[test]
fn a_guest_is_not_handed_over_to_somebody_who_never_answered() {
    // As QEMU does when the machine's name is wrong: it hangs up, only later than a small guest takes to be written.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let uri = format!("tcp:{}", listener.local_addr().unwrap());
    let peer = source(&uri, &[format!("ram={MIB}")], Stdio::null());
    let (mut link, _) = listener.accept().unwrap();
    link.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    let mut stream = Vec::new();
    let silence = link.read_to_end(&mut stream).unwrap_err();
    assert_eq!(silence.kind(), ErrorKind::WouldBlock);
    drop(link);
    peer.end().failed_and_runs_on(&["destination", "closed the connection"]);
    assert!(!stream.is_empty() && !stream.windows(14).any(|w| w == b"cpu_clock_offs"), "the devices were sent");
}

// ---- files ---------------------------------------------------------------------------------------------------------

/// Our stream in a file, decoded; also the memory as it was at the stop, and the clock.
fn our_file(dir: &Path, settings: &[&str]) -> (PathBuf, Decoded, Vec<u8>, u64) {
    let (ram, left, stream) = (drawn_ram(dir, RAM), dir.join("left"), dir.join("stream"));
    let mut all = vec![path("load", &ram), path("save", &left), "dirty=2048".into()];
    all.extend(settings.iter().map(ToString::to_string));
    let end = source("fd:0", &all, File::create(&stream).unwrap()).end().completed();
    let decoded = decode(&fs::read(&stream).unwrap());
    assert_eq!(decoded.pages, (usize::try_from(end.normal_pages).unwrap(), usize::try_from(end.zero_pages).unwrap()));
    (stream, decoded, saved(&left), end.clock_ns)
}

#[test]
fn what_we_write_is_what_the_description_says() {
    // The device in tests/c/peer.c.
    const GADGET: [(&str, &[u8]); 8] = [
        ("mode", &[7]),
        ("level", &[255, 255, 255, 251]),
        ("on", &[1]),
        ("table[4]", &[0, 0, 0, 5]),
        ("used", &[0, 3]),
        ("ring[2]", &[0, 0, 0, 0, 0, 0, 0, 8]),
        ("alarm", &[255; 8]),
        ("lanes[0].credit", &[0, 9]),
    ];
    let dir = scratch("file");
    let (_, decoded, left, clock) = our_file(&dir, &["device=1", "machine=board"]);
    assert_eq!(decoded.machine, "board");
    assert_same_memory(&left, &decoded.blocks["ram"], "RAM in the file");
    // The list of blocks comes once and first, the last pages once and last; nothing asks for an answer.
    let ram = &decoded.ram_sections;
    assert!(ram[0] == 1 && *ram.last().unwrap() == 3 && ram[1..ram.len() - 1].iter().all(|k| *k == 2), "{ram:?}");
    assert_eq!(decoded.commands, [11]);
    assert_eq!(decoded.device("timer").u64("cpu_clock_offset"), clock);
    let gadget = decoded.device("gadget");
    assert_eq!((gadget.instance, gadget.version), (7, 3));
    for (name, bytes) in GADGET {
        assert_eq!(gadget.field(name), bytes, "{name}");
    }
    assert_eq!(gadget.u64("gadget/extra.extra"), 10);
    let names: Vec<&str> = decoded.devices.iter().map(|d| d.name.as_str()).collect();
    assert_eq!(names, ["timer", "gadget", "globalstate"]);
    assert!(decoded.description["vmig"].is_object(), "{}", decoded.description);
}

#[test]
fn qemu_loads_our_file() {
    if without_qemu() {
        return;
    }
    for how in ["file:", "exec:cat "] {
        let dir = scratch("file");
        let (stream, _, left, clock) = our_file(&dir, &["pause=1"]);
        let mut qemu = qemu_destination("none", RAM);
        qemu.incoming(&format!("{how}{}", stream.display()));
        assert_eq!(qemu.ended()["status"], "completed", "{how}: {}", qemu.words());
        assert_eq!(qemu.run_state(), "paused");
        assert_same_memory(&left, &qemu.memory(RAM), how);
        // The guest never ran there, so what QEMU writes now must be what we wrote.
        let again = decode(&fs::read(to_file(&mut qemu, &scratch("again"))).unwrap());
        assert_eq!(again.device("timer").u64("cpu_clock_offset"), clock, "{how}");
        assert_eq!(again.device("globalstate").field("runstate")[..7], *b"paused\0", "{how}");
    }
}

#[test]
fn nobody_waits_for_an_answer_from_a_file() {
    let stream = File::create(scratch("file").join("stream")).unwrap();
    source("fd:0", &["switchover-ack=on".into()], stream).end().failed_and_runs_on(&["switchover-ack", "cannot"]);
}

#[test]
fn two_of_us_agree_when_the_source_alone_wants_it() {
    let peer = listen_tcp(&[]);
    let settings = ["peer=vmig".to_string(), "switchover-ack=on".into(), "dirty=256".into()];
    source(&peer.address, &settings, Stdio::null()).end().completed();
    assert!(peer.end().completed().runs);
}

#[test]
fn a_pause_during_the_switchover_travels() {
    let peer = listen_tcp(&["device=1".into()]);
    let settings = ["peer=vmig", "device=1", "pause=late", "dirty=256"].map(String::from);
    source(&peer.address, &settings, Stdio::null()).end().completed();
    let end = peer.end().completed();
    assert_eq!((end.reasons, end.runs), (PAUSED_BY_USER, false), "{end:?}");
}
