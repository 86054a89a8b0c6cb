//! Option `checksum`: a bit that changes on its way is noticed and named, wherever it is; without the option it arrives.
//! The relay here is the network that changes it.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;
#[path = "words/flip.rs"]
mod flip;
#[path = "words/still.rs"]
mod still;

use common::hostile::Vmm;
use flip::{Bit, HEADER, relay};
use still::{SHAPE, arrives_changed, busy_moves, source, stayed_and_moves, takes_two};

const OPTION: &str = "checksum";

/// Moves a guest through the relay, with and without checksums.
fn changes(channels: usize, bit: Bit, section: &str, field: Option<&str>, words: &str) {
    let mut here = source(channels, OPTION, "crc32c");
    let (mut there, address) = Vmm::destination(&SHAPE);
    let (left, came) = here.leaves_for(&mut there, &relay(&address, channels, bit));
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
    stayed_and_moves(here, there);
}

/// The same without checksums: nobody notices.
fn arrives(channels: usize, bit: Bit) {
    arrives_changed(source(channels, OPTION, "none"), channels, bit);
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
    for (channels, unix) in [(0, false), (1, false), (4, true)] {
        let mut here = source(channels, OPTION, "crc32c");
        here.does("set max-bandwidth 40M");
        busy_moves(here, unix);
    }
}

#[test]
fn it_takes_two_vmigs() {
    takes_two(OPTION, "none", "crc32c");
    let mut here = source(0, OPTION, "crc32c");
    here.does("set peer qemu");
    let (errno, words) = here.refuses("out tcp:127.0.0.1:1");
    assert_eq!(errno, libc::EINVAL);
    assert!(words.contains("'checksum' needs a vmig"), "{words}");
    here.end();
}
