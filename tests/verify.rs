//! Option `verify`: what differs between the two sides when everything arrived is named, whoever made it differ, and the
//! guest stays; without the option nobody notices.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;
#[path = "words/flip.rs"]
mod flip;
#[path = "words/pair.rs"]
mod pair;
#[path = "common/program.rs"]
mod program;
#[path = "words/relay.rs"]
mod relay;
#[path = "words/still.rs"]
mod still;

use std::net::TcpListener;

use common::hostile::Vmm;
use common::scratch;
use flip::{Bit, HEADER};
use pair::{Pair, hooks, value};
use relay::{READY, SAME, VOTE};
use serde_json::Value;
use still::{SHAPE, arrives_changed, busy_moves, refused, source, stayed_and_moves, takes_two};

const OPTION: &str = "verify";

/// Both sides failed by the same difference, and say all that there is to know.
fn named(error: &Value, section: &str, field: Option<&str>, words: &str) {
    let seen = error.to_string();
    println!("{seen}");
    assert_eq!(error["errno"].as_i64(), Some(libc::EBADMSG.into()), "{seen}");
    assert_eq!((error["section"].as_str(), error["field"].as_str()), (Some(section), field), "{seen}");
    assert!(error["message"].as_str().unwrap().contains(words), "{seen}");
    let of = |key: &str| error[key].as_str().unwrap_or("").to_owned();
    assert!(of("expected").starts_with("0x") && of("expected") != of("got") && of("got").starts_with("0x"), "{seen}");
}

/// A bit changes between the two sides: with the option it is named, without it arrives.
fn flipped(channels: usize, bit: Bit, section: &str, field: Option<&str>, words: &str) {
    let mut here = source(channels, OPTION, "on");
    let (mut there, address) = Vmm::destination(&SHAPE);
    let (left, came) = here.leaves_for(&mut there, &flip::relay(&address, channels, bit));
    for look in [&left, &came] {
        assert_eq!((look.state.as_str(), look.error["side"].as_str()), ("failed", Some("destination")), "{bit:?}");
        named(&look.error, section, field, words);
    }
    stayed_and_moves(here, there);
    arrives_changed(source(channels, OPTION, "off"), channels, bit);
}

#[test]
fn a_page_that_changed_on_its_way_is_named() {
    for channels in [1, 3] {
        let bit = Bit::Packet("low", HEADER + 5 * 4096 + 77);
        flipped(
            channels,
            bit,
            "ram",
            Some("low"),
            "'low' differs from the source's at page 0x5 (bytes 0x5000..0x6000)",
        );
    }
    // Of the plain stream's first record; a page goes behind a head of eight bytes.
    flipped(0, Bit::Behind(b"\x03low", 23_000), "ram", Some("low"), "'low' differs from the source's at page 0x5 ");
}

#[test]
fn a_section_that_changed_on_its_way_is_named() {
    for channels in [0, 2] {
        flipped(channels, Bit::Behind(&[18; 40], 20), "gpu", None, "what arrived of section 'gpu' is not what");
        flipped(
            channels,
            Bit::Behind(b"\x07counter", 8 + 8 + 6),
            "counter",
            None,
            "what arrived of section 'counter'",
        );
    }
}

fn error(program: &mut program::Program) -> Value {
    serde_json::from_str(&value(program, "error")).unwrap()
}

#[test]
fn a_late_writer_at_the_source_is_named() {
    let mut pair = Pair::new("late", READY);
    pair.source.must("set verify on");
    pair.until_held();
    // Everything was compared: a thread of the source writes, and tells nobody.
    pair.source.must("poke 0x3010");
    pair.relay.pass();
    pair.end_in("failed", "failed");
    for side in [&mut pair.source, &mut pair.destination] {
        let error = error(side);
        assert_eq!(error["side"], "source");
        named(&error, "ram", Some("low"), "'low' changed at page 0x3 (bytes 0x3000..0x4000)");
    }
    assert_eq!(hooks(&mut pair.source), "stop release=1 reacquire=3 start");
    assert_eq!(hooks(&mut pair.destination), "reacquire=2 release=2");
    assert_eq!(value(&mut pair.destination, "memory"), "0", "nothing of the guest is left");
    pair.stayed();
    pair.moves_after_all();
    pair.quit();
    // Without the option nobody notices.
    let mut pair = Pair::new("unseen", READY);
    pair.until_held();
    pair.source.must("poke 0x3010");
    pair.relay.pass();
    pair.end_in("completed", "completed");
    pair.quit();
}

#[test]
fn a_source_that_is_cancelled_while_hashes_are_compared_says_so() {
    let mut pair = Pair::new("compared", SAME);
    pair.source.must("set verify on");
    pair.until_held();
    pair.source.must("cancel");
    pair.end_in("cancelled", "failed");
    let error = error(&mut pair.destination);
    assert_eq!((&error["side"], &error["phase"]), (&"source".into(), &"verify".into()), "{error}");
    assert_eq!(error["errno"].as_i64(), Some(libc::ECANCELED.into()), "{error}");
    assert_eq!(value(&mut pair.destination, "memory"), "0", "nothing of the guest is left");
    pair.relay.pass();
    pair.stayed();
    pair.moves_after_all();
    pair.quit();
}

#[test]
fn hashing_is_a_part_of_the_downtime_and_of_its_prediction() {
    for verify in ["on", "off"] {
        let mut pair = Pair::new("parts", VOTE);
        pair.relay.pass();
        pair.source.must(&format!("set verify {verify}"));
        pair.source.must(&format!("out {}", pair.relay.uri));
        pair.end_in("completed", "completed");
        let said = pair.source.command("parts");
        let part = |name: &str| {
            let number = said.split(' ').find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
            number.unwrap().parse::<u64>().unwrap()
        };
        assert_eq!((part("verify") > 0, part("expected") > 0), (verify == "on", verify == "on"), "{said}");
        assert!(part("verify") < part("total"), "{said}");
        pair.quit();
    }
}

#[test]
fn a_writer_before_the_hash_is_named_by_the_destination() {
    for verify in ["on", "off"] {
        let mut pair = Pair::new("early", VOTE);
        pair.relay.pass();
        pair.source.must(&format!("set verify {verify}"));
        pair.source.must("hold release");
        pair.source.must(&format!("out {}", pair.relay.uri));
        pair.source.await_news("note held");
        // The page was sent in the first round, and is not dirty.
        pair.source.must("poke 0x3010");
        pair.source.must("hold none");
        if verify == "off" {
            pair.end_in("completed", "completed");
        } else {
            pair.end_in("failed", "failed");
            for side in [&mut pair.source, &mut pair.destination] {
                let error = error(side);
                assert_eq!((&error["side"], &error["phase"]), (&"destination".into(), &"verify".into()), "{error}");
                named(&error, "ram", Some("low"), "'low' differs from the source's at page 0x3 ");
            }
            pair.stayed();
            pair.moves_after_all();
        }
        pair.quit();
    }
}

#[test]
fn a_device_that_loads_wrongly_is_named() {
    for verify in ["on", "off"] {
        let mut pair = Pair::new("twisted", VOTE);
        pair.relay.pass();
        pair.source.must(&format!("set verify {verify}"));
        pair.destination.must("twist 1");
        pair.source.must(&format!("out {}", pair.relay.uri));
        if verify == "off" {
            pair.end_in("completed", "completed");
        } else {
            pair.end_in("failed", "failed");
            for side in [&mut pair.source, &mut pair.destination] {
                let error = error(side);
                assert_eq!(error["side"], "destination");
                named(&error, "uart", None, "saved again it differs from byte 0x2 of its body on");
            }
            assert_eq!(value(&mut pair.destination, "memory"), "0", "nothing of the guest is left");
            pair.stayed();
            pair.destination.must("twist 0");
            pair.moves_after_all();
        }
        pair.quit();
    }
}

#[test]
fn a_busy_guest_arrives_and_nobody_complains() {
    for (channels, unix, checksum) in
        [(0, false, "none"), (0, false, "crc32c"), (1, true, "none"), (4, true, "crc32c")]
    {
        let mut here = source(channels, OPTION, "on");
        here.does(&format!("set checksum {checksum}"));
        busy_moves(here, unix);
    }
}

#[test]
fn memory_that_is_handed_over_is_compared_too() {
    let dir = scratch("handed");
    let start = |name: &str, fill: &str| {
        let mut vmm = program::Program::start(name, &dir, &common::c_program("hand"), &["memfd", "memfd", "4", fill]);
        vmm.must("set hand-over on");
        vmm
    };
    let (mut source, mut destination) = (start("source", "fill=3"), start("destination", "fill=5"));
    source.must("set verify on");
    source.must("resume");
    destination.send(&format!("incoming unix:{}", dir.join("s").display()));
    let address = destination.listening();
    source.must(&format!("migrate {address}"));
    source.must_end_in("completed");
    destination.must_end_in("completed");
    source.quit();
    destination.quit();
}

#[test]
fn it_takes_two_vmigs_that_talk() {
    takes_two(OPTION, "off", "on");
    let mut here = source(0, OPTION, "on");
    for (option, value, back) in [("peer", "qemu", "vmig"), ("return-path", "off", "on")] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        here.does(&format!("set {option} {value}"));
        here.does(&format!("out tcp:{}", listener.local_addr().unwrap()));
        refused(&here.wait(), "source", OPTION, "needs a destination that uses this library");
        here.does(&format!("set {option} {back}"));
    }
    here.end();
}
