//! A guest that stands still, so that what changes on its way is not sent again, and what becomes of it when it moves.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::io::Write;
use std::net::{TcpListener, TcpStream};

use crate::common::hostile::{Look, Vmm, completed};
use crate::common::scratch;
use crate::flip::{Bit, relay};

pub(crate) const SHAPE: [&str; 1] = ["low=64"];

/// A source with so many channels and this option.
pub(crate) fn source(channels: usize, option: &str, value: &str) -> Vmm {
    let mut source = Vmm::new(&SHAPE);
    source.does("idle 1");
    source.does("start");
    source.does(&format!("set multifd {}", if channels > 0 { "on" } else { "off" }));
    if channels > 0 {
        source.does(&format!("set multifd-channels {channels}"));
    }
    source.does("set zero-page-detection none");
    source.does(&format!("set {option} {value}"));
    source
}

/// The guest moves, and both programs end.
fn moves(mut here: Vmm, mut there: Vmm, address: &str) {
    here.moves_to(&mut there, address);
    here.end();
    there.end();
}

/// After an attempt that failed the guest is as it was, and runs; the next one, over a better network, succeeds.
pub(crate) fn stayed_and_moves(mut here: Vmm, mut there: Vmm) {
    assert_eq!(there.ask("starts"), "0");
    here.does("idle 0");
    here.runs_on();
    let address = there.listen("tcp:127.0.0.1:0");
    moves(here, there, &address);
}

/// A guest that writes moves; what it writes while it is looked at is no difference.
pub(crate) fn busy_moves(mut here: Vmm, unix: bool) {
    here.does("idle 0");
    here.does("set zero-page-detection multifd");
    let mut there = Vmm::new(&["fill=0", SHAPE[0]]);
    let path = scratch("busy").join("s");
    let uri = if unix { format!("unix:{}", path.display()) } else { "tcp:127.0.0.1:0".to_owned() };
    let address = there.listen(&uri);
    moves(here, there, &address);
}

/// With the option off, nobody notices that the bit changed.
pub(crate) fn arrives_changed(mut here: Vmm, channels: usize, bit: Bit) {
    let (mut there, address) = Vmm::destination(&SHAPE);
    let (left, came) = here.leaves_for(&mut there, &relay(&address, channels, bit));
    completed(&left, &came);
    let (left, arrived) = (here.ask("hash"), there.ask("hash"));
    assert_ne!(left.split(' ').next(), arrived.split(' ').nth(1), "{bit:?}: it changed nothing");
    here.end();
    there.end();
}

/// An attempt was refused by this side, because of the option.
pub(crate) fn refused(look: &Look, side: &str, option: &str, words: &str) {
    let seen = format!("{}: {}", look.state, look.error);
    assert_eq!((look.state.as_str(), look.error["side"].as_str()), ("failed", Some(side)), "{seen}");
    assert!(look.message().contains(words) && look.error["option"] == option, "{seen}");
}

/// An option that both sides must have: a destination insists; a QEMU, a file and an older vmig cannot.
pub(crate) fn takes_two(option: &str, off: &str, on: &str) {
    let mut here = source(0, option, off);
    let mut there = Vmm::new(&["fill=0", SHAPE[0]]);
    there.does(&format!("set {option} {on}"));
    let address = there.listen("tcp:127.0.0.1:0");
    let (left, came) = here.leaves_for(&mut there, &address);
    let both = format!("set it at the source, too (source: {off}, destination: {on})");
    refused(&left, "destination", option, &both);
    refused(&came, "destination", option, "set it at the source, too");
    here.does(&format!("set {option} {on}"));
    here.does(&format!("save {}", scratch("file").join("f").display()));
    refused(&here.wait(), "source", option, "needs a destination that uses this library");
    let address = there.listen("tcp:127.0.0.1:0");
    let mut plain = TcpStream::connect(address.strip_prefix("tcp:").unwrap()).unwrap();
    plain.write_all(b"QEVM\0\0\0\x03").unwrap();
    refused(&there.wait(), "destination", option, "the source does not use this library");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    here.does(&format!("out tcp:{}", listener.local_addr().unwrap()));
    let mut older = listener.accept().unwrap().0;
    older.write_all(b"VMIG\0\0\0\x01\0\0\0\x0f{\"features\":[]}").unwrap();
    let unknown = format!("is older and knows nothing of option '{option}'");
    refused(&here.wait(), "source", option, &unknown);
    here.does("idle 0");
    here.runs_on();
    here.end();
    there.end();
}
