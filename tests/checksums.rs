//! Option `checksum`: a bit that changes on its way is noticed and named, wherever it is; without the option it arrives.
//! The relay here is the network that changes it.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;
#[path = "words/flip.rs"]
mod flip;

use std::io::Write;
use std::net::{TcpListener, TcpStream};

use common::hostile::{Look, Vmm};
use flip::{Bit, HEADER, relay};

const SHAPE: [&str; 1] = ["low=64"];

/// A guest that stands still, so that what changes on its way is not sent again.
fn source(channels: usize, checksum: &str) -> Vmm {
    let mut source = Vmm::new(&SHAPE);
    source.does("idle 1");
    source.does("start");
    source.does(&format!("set multifd {}", if channels > 0 { "on" } else { "off" }));
    if channels > 0 {
        source.does(&format!("set multifd-channels {channels}"));
    }
    source.does("set zero-page-detection none");
    source.does(&format!("set checksum {checksum}"));
    source
}

fn ends(source: &mut Vmm, there: &mut Vmm, uri: &str) -> (Look, Look) {
    source.does(&format!("out {uri}"));
    (source.wait(), there.wait())
}

/// Moves a guest through the relay, with and without checksums.
fn changes(channels: usize, bit: Bit, section: &str, field: Option<&str>, words: &str) {
    let mut here = source(channels, "crc32c");
    let (mut there, address) = Vmm::destination(&SHAPE);
    let (left, came) = ends(&mut here, &mut there, &relay(&address, channels, bit));
    let seen = format!("{bit:?}: {} | {}", left.message(), came.message());
    println!("{seen}");
    for (look, side) in [(&left, "destination"), (&came, "destination")] {
        let error = &look.error;
        assert_eq!((look.state.as_str(), error["side"].as_str()), ("failed", Some(side)), "{seen}");
        assert_eq!(error["errno"].as_i64(), Some(libc::EBADMSG.into()), "{seen}");
        assert_eq!(error["section"].as_str(), (!section.is_empty()).then_some(section), "{seen}");
        assert_eq!(error["field"].as_str(), field, "{seen}");
        assert!(look.message().contains(words), "{seen}");
        let sum = |key: &str| error[key].as_str().is_some_and(|s| s.starts_with("0x") && s.len() == 10);
        assert!(sum("expected") && sum("got") && error["expected"] != error["got"], "{seen}");
    }
    assert_eq!(there.ask("starts"), "0", "{seen}");
    // The guest is as it was, and runs; the next attempt, over a better network, succeeds.
    here.does("idle 0");
    here.runs_on();
    let address = there.listen("tcp:127.0.0.1:0");
    let (left, came) = ends(&mut here, &mut there, &address);
    assert_eq!(
        (left.state.as_str(), came.state.as_str()),
        ("completed", "completed"),
        "{} {}",
        left.error,
        came.error
    );
    there.has_what_left(&mut here);
    there.runs_on();
    here.end();
    there.end();
}

/// The same without checksums: nobody notices.
fn arrives(channels: usize, bit: Bit) {
    let mut here = source(channels, "none");
    let (mut there, address) = Vmm::destination(&SHAPE);
    let (left, came) = ends(&mut here, &mut there, &relay(&address, channels, bit));
    assert_eq!(
        (left.state.as_str(), came.state.as_str()),
        ("completed", "completed"),
        "{bit:?} {} {}",
        left.error,
        came.error
    );
    let (left, arrived) = (here.ask("hash"), there.ask("hash"));
    assert_ne!(left.split(' ').next(), arrived.split(' ').nth(1), "{bit:?}: it changed nothing");
    here.end();
    there.end();
}

#[test]
fn a_bit_of_a_page_is_noticed() {
    for channels in [1, 3] {
        let bit = Bit::Packet("low", HEADER + 5 * 4096 + 77);
        changes(channels, bit, "ram", Some("low"), "RAM block 'low', bytes 0x0..");
        arrives(channels, bit);
    }
}

#[test]
fn a_bit_of_a_packets_header_is_noticed() {
    // The offset of a page: without checksums it goes elsewhere.
    let bit = Bit::Packet("high", 320 + 5 * 8 + 6);
    changes(2, bit, "ram", None, "the header of a packet arrived other than it was sent");
    arrives(2, bit);
    for at in [3, 8, 19, 70, 1343] {
        changes(1, Bit::Packet("low", at), "ram", None, "the header of a packet arrived other than it was sent");
    }
    for at in [24, 40, 63] {
        changes(1, Bit::Init(at), "", None, "the first packet of a channel: it arrived other than it was sent");
    }
}

#[test]
fn a_bit_of_a_device_is_noticed() {
    let counter = Bit::Behind(b"\x07counter", 8 + 8 + 6);
    let gpu = Bit::Behind(&[18; 40], 20);
    for channels in [0, 2] {
        changes(channels, counter, "counter", None, "arrived other than it was sent");
        changes(channels, gpu, "gpu", None, "arrived other than it was sent");
        arrives(channels, counter);
        arrives(channels, gpu);
    }
    // Its name, before which the frame's head stands.
    changes(1, Bit::Behind(b"\x04uart\0\0\0\x07", 8), "uart", None, "arrived other than it was sent");
}

#[test]
fn a_bit_of_the_plain_stream_is_noticed() {
    // Of the first record's page, and of a later one.
    for (behind, words) in [(23_000, "from 0x0 of RAM block 'low' on"), (264_000, "of RAM block 'low' on")] {
        let bit = Bit::Behind(b"\x03low", behind);
        changes(0, bit, "ram", Some("low"), words);
        arrives(0, bit);
    }
}

#[test]
fn a_busy_guest_arrives_and_nobody_complains() {
    // What the guest writes between the summing and the sending is no difference.
    for (channels, uri) in [(0, "tcp:127.0.0.1:0"), (1, "tcp:127.0.0.1:0"), (4, "unix")] {
        let mut here = source(channels, "crc32c");
        here.does("idle 0");
        here.does("set max-bandwidth 40M");
        here.does("set zero-page-detection multifd");
        let mut there = Vmm::new(&["fill=0", SHAPE[0]]);
        let path = common::scratch("busy").join("s");
        let address = there.listen(&if uri == "unix" { format!("unix:{}", path.display()) } else { uri.to_owned() });
        let (left, came) = ends(&mut here, &mut there, &address);
        assert_eq!(
            (left.state.as_str(), came.state.as_str()),
            ("completed", "completed"),
            "{} {}",
            left.error,
            came.error
        );
        there.has_what_left(&mut here);
        there.runs_on();
        here.end();
        there.end();
    }
}

#[test]
fn it_takes_two() {
    let refused = |look: &Look, side: &str, words: &str| {
        let seen = format!("{}: {}", look.state, look.error);
        assert_eq!((look.state.as_str(), look.error["side"].as_str()), ("failed", Some(side)), "{seen}");
        assert!(look.message().contains(words) && look.error["option"] == "checksum", "{seen}");
    };
    // A destination may insist.
    let mut here = source(0, "none");
    let (mut there, address) = (Vmm::new(&["fill=0", SHAPE[0]]), "tcp:127.0.0.1:0");
    there.does("set checksum crc32c");
    let address = there.listen(address);
    let (left, came) = ends(&mut here, &mut there, &address);
    refused(&left, "destination", "set it at the source, too (source: none, destination: crc32c)");
    refused(&came, "destination", "set it at the source, too");
    // A QEMU has none, whoever of us listens or sends; nor has a file.
    here.does("set checksum crc32c");
    here.does("set peer qemu");
    let (errno, words) = here.refuses(&format!("out {address}"));
    assert_eq!(errno, libc::EINVAL);
    assert!(words.contains("'checksum' needs a vmig"), "{words}");
    here.does("set peer vmig");
    here.does(&format!("save {}", common::scratch("file").join("f").display()));
    refused(&here.wait(), "source", "needs a destination that uses this library");
    let address = there.listen("tcp:127.0.0.1:0");
    let mut plain = TcpStream::connect(address.strip_prefix("tcp:").unwrap()).unwrap();
    plain.write_all(b"QEVM\0\0\0\x03").unwrap();
    refused(&there.wait(), "destination", "the source does not use this library");
    // An older vmig does not know them.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    here.does(&format!("out tcp:{}", listener.local_addr().unwrap()));
    let mut older = listener.accept().unwrap().0;
    older.write_all(b"VMIG\0\0\0\x01\0\0\0\x0f{\"features\":[]}").unwrap();
    refused(&here.wait(), "source", "is older and knows nothing of option 'checksum'");
    here.does("idle 0");
    here.runs_on();
    here.end();
    there.end();
}
