//! Streams that stock QEMU wrote (tests/streams/README.md) load through the library, and its replies are QEMU's. The
//! test's own reader, which judges what the library writes, is judged by them too.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;
mod qemu;

use common::{c_program, points, root, scratch};
use qemu::decode::decode;
use qemu::peer::{End, Peer, assert_same_memory, path, saved};
use std::{
    fs::{self, File},
    io::{Read, Write},
    net::{Shutdown, TcpStream},
    os::{fd::OwnedFd, unix::net::UnixStream},
};

const MIB: usize = 1 << 20;

fn stream(name: &str) -> Vec<u8> {
    fs::read(root().join("tests/streams").join(name)).unwrap()
}

/// What the guest's memory held when the streams were made.
fn pattern(bytes: usize) -> Vec<u8> {
    let mut ram = vec![0; bytes];
    ram[0x1000..0x1004].copy_from_slice(&[0xde, 0xad, 0xbe, 0xef]);
    ram[0x5000..0x6000].fill(0xab);
    for (i, byte) in ram[0x6000..0x7000].iter_mut().enumerate() {
        *byte = u8::try_from((7 * i + 3) & 0xff).unwrap();
    }
    ram[bytes / 2..bytes / 2 + 8].copy_from_slice(&[1, 2, 3, 4, 5, 6, 7, 8]);
    if bytes == 16 * MIB {
        ram[0xfff000..0x1000000].copy_from_slice(&b"END!".repeat(1024));
    }
    ram
}

/// A destination full of garbage.
fn destination(uri: &str, ram: usize, more: &[String], stdin: impl Into<std::process::Stdio>) -> Peer {
    let mut settings = vec![format!("ram={ram}"), "fill=165".to_string()];
    settings.extend_from_slice(more);
    Peer::start(&c_program("peer"), "in", uri, &settings, stdin)
}

#[test]
fn a_file_of_qemu_loads() {
    let dir = scratch("capture");
    let ram = dir.join("ram");
    let file = File::open(root().join("tests/streams/qemu10-none16.bin")).unwrap();
    let end = destination("fd:0", 16 * MIB, &[path("save", &ram), "autostart=off".into()], file).end().completed();
    assert_same_memory(&pattern(16 * MIB), &saved(&ram), "RAM");
    assert_eq!((end.normal_pages, end.zero_pages), (5, 4091));
    // The clock stands still until the guest is started.
    let decoded = decode(&stream("qemu10-none16.bin"));
    assert_eq!(end.clock_ns, decoded.device("timer").u64("cpu_clock_offset"));
}

#[test]
fn the_same_through_a_pipe() {
    let ram = scratch("capture").join("ram");
    let (reader, mut writer) = std::io::pipe().unwrap();
    let peer = destination("fd:0", 16 * MIB, &[path("save", &ram)], OwnedFd::from(reader));
    for piece in stream("qemu10-none16.bin").chunks(1000) {
        writer.write_all(piece).unwrap();
    }
    drop(writer);
    let end = peer.end().completed();
    assert!(end.runs && end.reasons == 0, "{end:?}");
    assert_same_memory(&pattern(16 * MIB), &saved(&ram), "RAM");
}

#[test]
fn our_replies_are_those_qemu_gave() {
    for (name, ack) in [("return-path", "off"), ("switchover-ack", "on")] {
        let recorded = stream(&format!("qemu10-none1-{name}.replies.bin"));
        let forward = stream(&format!("qemu10-none1-{name}.bin"));
        let ram = scratch("capture").join("ram");
        let settings = [path("save", &ram), format!("switchover-ack={ack}")];
        let peer = destination("tcp:127.0.0.1:0", MIB, &settings, std::process::Stdio::null());
        let mut link = TcpStream::connect(peer.address.strip_prefix("tcp:").unwrap()).unwrap();
        link.write_all(&forward).unwrap();
        let mut replies = Vec::new();
        link.read_to_end(&mut replies).unwrap();
        assert_eq!(replies, recorded, "{name}");
        assert!(peer.end().completed().runs, "{name}");
        assert_same_memory(&pattern(MIB), &saved(&ram), name);
    }
}

/// Loads the first bytes of a stream over a socket that then ends; what came back, and how the destination fared.
fn cut(forward: &[u8], at: usize) -> (Vec<u8>, End) {
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let peer = destination("fd:0", MIB, &[], OwnedFd::from(theirs));
    ours.write_all(&forward[..at]).unwrap();
    ours.shutdown(Shutdown::Write).unwrap();
    let mut replies = Vec::new();
    ours.read_to_end(&mut replies).unwrap();
    (replies, peer.end())
}

#[test]
fn a_stream_that_ends_early_is_refused() {
    // PONG(1), SHUT(1); the commands they answer end at these bytes.
    const REPLIES: [u8; 16] = [0, 2, 0, 4, 0, 0, 0, 1, 0, 1, 0, 4, 0, 0, 0, 1];
    const OPENED: usize = 22;
    const PINGED: usize = OPENED + 9;
    let forward = stream("qemu10-none1-return-path.bin");
    for at in points("cut capture", forward.len(), 12) {
        let (replies, end) = cut(&forward, at);
        assert!(!end.failed(&["ends"]).runs, "cut at {at:#x}");
        let expected = match at {
            0..OPENED => &REPLIES[..0],
            OPENED..PINGED => &REPLIES[8..],
            _ => &REPLIES[..],
        };
        assert_eq!(replies, expected, "cut at {at:#x}");
    }
}

#[test]
fn the_reader_of_the_tests_understands_qemu() {
    for (name, bytes) in [("none16", 16 * MIB), ("none1-return-path", MIB), ("none1-switchover-ack", MIB)] {
        let decoded = decode(&stream(&format!("qemu10-{name}.bin")));
        assert_same_memory(&pattern(bytes), &decoded.blocks["ram"], name);
        let names: Vec<_> = decoded.devices.iter().map(|d| (d.name.as_str(), d.bytes)).collect();
        assert_eq!(names, [("timer", 24), ("globalstate", 104)]);
    }
}
