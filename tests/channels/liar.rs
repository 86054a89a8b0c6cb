//! A source that lies: packets put together by hand, and what the second of its two channels does wrong.
#![allow(dead_code, unreachable_pub, reason = "only one test file uses it")]
#![allow(clippy::unwrap_used, reason = "a test")]

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::path::Path;
use std::time::Duration;

use serde_json::json;

use crate::common::hostile::Vmm;
use crate::common::scratch;

const PAGE: usize = 4096;
const PATIENCE: Duration = Duration::from_secs(60);
const MAGIC: u32 = 0x1122_3344;
const FLUSH: u64 = 0x200;

pub fn be(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_be_bytes()).collect()
}

/// A frame of the hello: of a vmig with two channels.
pub fn hello() -> Vec<u8> {
    let json = json!({
        "machine": "none", "page-size": 4096, "channels": 2,
        "ram": [{"name": "low", "length": 0x4000}, {"name": "high", "length": 0x6000}],
        "devices": [{"name": "uart", "instance": 7, "version": 2}, {"name": "counter", "instance": 0, "version": 1},
            {"name": "gpu", "instance": 0, "version": 3}],
    });
    let json = json.to_string();
    [b"VMIG", &be(&[1, u32::try_from(json.len()).unwrap()])[..], json.as_bytes()].concat()
}

/// A stream as the library writes it to a file, with a meeting point at the end of each RAM section; how many those are.
fn stream(dir: &Path) -> (Vec<u8>, usize) {
    let file = dir.join("good");
    let mut source = Vmm::new(&[]);
    source.does("idle 1");
    source.does("start");
    source.does(&format!("save {}", file.display()));
    assert_eq!(source.wait().state, "completed");
    source.end();
    let bytes = fs::read(file).unwrap();
    // The end of a body of RAM, and the footer of section 1.
    let end = [&16u64.to_be_bytes()[..], &[0x7e, 0, 0, 0, 1]].concat();
    let (mut out, mut from, mut meetings) = (Vec::new(), 0, 0);
    while let Some(at) = bytes[from..].windows(end.len()).position(|w| w == end) {
        out.extend(&bytes[from..from + at]);
        out.extend(FLUSH.to_be_bytes());
        out.extend(&end);
        (from, meetings) = (from + at + end.len(), meetings + 1);
    }
    out.extend(&bytes[from..]);
    (out, meetings)
}

pub fn init(id: u8) -> Vec<u8> {
    let mut out = be(&[MAGIC, 1]);
    out.resize(64, 0);
    out[24] = id;
    out
}

pub fn packet(flags: u32, block: &str, whole: &[u64], zero: &[u64]) -> Vec<u8> {
    let size = |n: usize| u32::try_from(n).unwrap();
    let words = [MAGIC, 1, flags, 128, size(whole.len()), size(whole.len() * PAGE), 0, 0, size(zero.len())];
    let mut out = be(&words);
    out.resize(64, 0);
    out.extend(block.as_bytes());
    out.resize(320, 0);
    whole.iter().chain(zero).for_each(|offset| out.extend(offset.to_be_bytes()));
    out.resize(1344 + whole.len() * PAGE, 0);
    out
}

fn sync() -> Vec<u8> {
    let mut out = packet(1, "", &[], &[]);
    out[12..16].fill(0);
    out
}

/// With these bytes at this place.
fn with(mut packet: Vec<u8>, at: usize, bytes: &[u8]) -> Vec<u8> {
    packet[at..at + bytes.len()].copy_from_slice(bytes);
    packet
}

/// What the second of two channels does instead of what it should.
pub struct Play {
    pub name: &'static str,
    pub init: Vec<u8>,
    /// After the first meeting.
    pub then: Vec<u8>,
    /// More or fewer meetings than there are.
    pub more: isize,
    pub closes: bool,
    pub words: &'static str,
}

pub fn plays() -> Vec<Play> {
    let usual = |name, words| Play { name, init: init(1), then: vec![], more: 0, closes: false, words };
    let opens = |name, init: Vec<u8>, words| Play { init, ..usual(name, words) };
    let sends = |name, then: Vec<u8>, words| Play { then, ..usual(name, words) };
    let good = || packet(0, "low", &[0x3000], &[0x2000]);
    let word = |at, value: u32, name, words| sends(name, with(good(), at, &value.to_be_bytes()), words);
    let cut = |name, len: usize, words| Play { closes: true, ..sends(name, good()[..len].to_vec(), words) };
    let stalls = |name, len: usize, words| sends(name, good()[..len].to_vec(), words);
    vec![
        opens("id twice", init(0), "two channels have the id 0"),
        opens("id too large", init(2), "a channel's id is beyond the number of channels (expected below 2, got 2)"),
        opens("init version", with(init(1), 4, &be(&[2])), "another version (expected 1, got 2)"),
        opens("uuid", with(init(1), 23, &[1]), "uuid"),
        Play {
            closes: true,
            ..opens("half an init", init(1)[..40].to_vec(), "a channel closed before its first packet")
        },
        opens(
            "half an init, then silence",
            init(1)[..40].to_vec(),
            "the first packet of a channel: the peer sent no byte for 0.4 seconds",
        ),
        opens(
            "another magic",
            with(init(1), 0, b"GARB"),
            "not all channels of the source came in time (expected 2, got 1)",
        ),
        word(0, 0x1122_3345, "magic", "channel 1: a channel's packet does not begin with its magic"),
        word(4, 7, "version", "channel 1: a channel's packet has another version (expected 1, got 7)"),
        word(8, 2, "zlib", "channel 1: a channel's packet is compressed"),
        word(8, 0x40, "device state", "channel 1: a channel's packet is compressed or carries device state"),
        word(8, 1, "sync with pages", "channel 1: a sync packet with pages"),
        word(8, 0x8000_0000, "unknown flag", "channel 1: a channel's packet is compressed"),
        word(12, 129, "too much room", "channel 1: a channel's packet claims more pages than one can carry"),
        word(12, 1, "too little room", "channel 1: a channel's packet contradicts itself"),
        word(16, u32::MAX, "too many pages", "channel 1: a channel's packet claims more pages than one can carry"),
        word(16, 2, "more pages than bytes", "channel 1: a channel's packet contradicts itself"),
        word(20, 4095, "other size", "channel 1: a channel's packet contradicts itself"),
        word(20, u32::MAX, "huge size", "channel 1: a channel's packet contradicts itself"),
        word(32, 128, "too many zero pages", "channel 1: a channel's packet contradicts itself"),
        sends(
            "no such block",
            packet(0, "lie\u{1b}", &[0], &[]),
            r"channel 1: there is no RAM block 'lie\u{1b}' here",
        ),
        sends("no name", packet(0, "", &[0], &[]), "channel 1: there is no RAM block '' here"),
        sends(
            "not UTF-8",
            with(good(), 64, &[0xff]),
            "channel 1: the block's name in a channel's packet is not UTF-8",
        ),
        sends("name without an end", packet(0, &"n".repeat(256), &[0], &[]), "channel 1: there is no RAM block 'nnn"),
        sends(
            "just behind",
            packet(0, "low", &[0x4000], &[]),
            "'low' (expected a multiple of 4096 below 0x4000, got 0x4000)",
        ),
        sends(
            "zeros just behind",
            packet(0, "high", &[], &[0x6000]),
            "channel 1: a page outside of RAM block 'high'",
        ),
        sends("far behind", packet(0, "low", &[1 << 63], &[]), "channel 1: a page outside of RAM block 'low'"),
        sends("just before", packet(0, "low", &[0u64.wrapping_sub(0x1000)], &[]), "channel 1: a page outside"),
        sends("unaligned", packet(0, "low", &[0x800], &[]), "got 0x800"),
        sends("a run over the end", packet(0, "low", &[0x2000, 0x3000, 0x4000], &[]), "channel 1: a page outside"),
        cut("ends in a header", 700, "channel 1: the channel ended within a packet's header"),
        cut("ends in a page", 2000, "channel 1: the channel ended within a packet's pages"),
        stalls("stalls in a header", 700, "channel 1: the peer sent no byte for 0.4 seconds"),
        stalls("stalls in a page", 2000, "channel 1: the peer sent no byte for 0.4 seconds"),
        Play { more: -1, ..usual("a sync too few", "channel 1 did not reach the meeting point of the main stream") },
        Play { more: -1, closes: true, ..usual("closes early", "channel 1: it ended before the meeting point") },
        Play { more: 1, ..usual("a sync too many", "channel 1: a packet after the last meeting") },
        Play {
            more: 1,
            then: good(),
            ..usual("a sync too many, and pages", "channel 1: a packet after the last meeting")
        },
    ]
}

pub struct Liar {
    pub stream: Vec<u8>,
    pub meetings: usize,
}

pub fn connect(address: &str) -> TcpStream {
    let stream = TcpStream::connect(address.strip_prefix("tcp:").unwrap()).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// Bytes to somebody who may have hung up meanwhile.
pub fn offer(stream: &mut TcpStream, bytes: &[u8]) {
    if let Err(error) = stream.write_all(bytes) {
        assert!([ErrorKind::BrokenPipe, ErrorKind::ConnectionReset].contains(&error.kind()), "{error}");
    }
}

impl Liar {
    pub fn new() -> Liar {
        let (stream, meetings) = stream(&scratch("liar"));
        assert!(meetings >= 2, "START and END meet");
        Liar { stream, meetings }
    }

    /// The main connection: hello, and the rest when the channels are on their way.
    pub fn opens(address: &str) -> TcpStream {
        let mut main = connect(address);
        main.write_all(&hello()).unwrap();
        let mut answer = [0; 12];
        main.read_exact(&mut answer).unwrap();
        assert!(answer.starts_with(b"VMIG"));
        main
    }

    pub fn channel(&self, address: &str, play: &Play) -> TcpStream {
        let mut channel = connect(address);
        offer(&mut channel, &play.init);
        let syncs = self.meetings.checked_add_signed(play.more).unwrap();
        for n in 0..syncs {
            // What is cut or stalls has nothing behind it.
            if play.init.len() < 64 || n == 1 && play.then.len() % PAGE != 1344 % PAGE && !play.then.is_empty() {
                break;
            }
            offer(&mut channel, &sync());
            if n == 0 {
                offer(&mut channel, &play.then);
            }
        }
        if play.closes {
            channel.shutdown(Shutdown::Write).unwrap();
        }
        channel
    }

    pub fn honest(id: u8) -> Play {
        let then = packet(0, "low", &[0x3000], &[0x2000]);
        Play { name: "honest", init: init(id), then, more: 0, closes: false, words: "" }
    }
}
