//! Parallel channels between two of us, and channels that are not what they should be. The hostile sides are played
//! here, against `c_program("hostile")`, whose memory lies between guard pages.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;
mod qemu;
#[path = "channels/liar.rs"]
mod liar;

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use common::hostile::{Look, Vmm};
use common::{c_program, run, scratch};
use liar::{Liar, be, connect, hello, offer, plays};
use qemu::peer::{Peer, assert_same_memory, drawn_ram, path, saved};

const RAM: u64 = 8 << 20;

fn peer(way: &str, uri: &str, settings: &[String], stdin: impl Into<Stdio>) -> Peer {
    let all = [&[format!("ram={RAM}")], settings].concat();
    Peer::start(&c_program("peer"), way, uri, &all, stdin)
}

/// Moves a busy guest, and compares what left with what arrived.
fn moves(listen: &str, settings: &[String], ends: Option<(OwnedFd, OwnedFd)>) {
    let dir = scratch("moves");
    let (left, arrived) = (dir.join("left"), dir.join("arrived"));
    let (here, there) = match ends {
        Some((here, there)) => (Stdio::from(here), Stdio::from(there)),
        None => (Stdio::null(), Stdio::null()),
    };
    let destination = peer("in", listen, &[path("save", &arrived), "fill=165".into()], there);
    let mut all = vec![path("load", &drawn_ram(&dir, RAM)), path("save", &left)];
    all.extend(["dirty=1500".into(), "max-bandwidth=64M".into()]);
    all.extend_from_slice(settings);
    let source = peer("out", &destination.address, &all, here);
    let (here, there) = (source.end().completed(), destination.end().completed());
    assert!(!here.runs && there.runs, "{settings:?}: {here:?} {there:?}");
    assert_eq!((here.normal_pages, here.zero_pages), (there.normal_pages, there.zero_pages), "{settings:?}");
    assert_same_memory(&saved(&left), &saved(&arrived), &format!("{settings:?}"));
}

#[test]
fn a_busy_guest_moves_over_any_number_of_channels() {
    let zeros = ["multifd", "legacy", "none"].iter().cycle();
    for (n, (channels, zeros)) in [1, 2, 4, 64, 1, 2, 4, 64].iter().zip(zeros).enumerate() {
        let legacy = if n < 4 { "off" } else { "on" };
        let listen = match n % 2 {
            0 => "tcp:127.0.0.1:0".to_string(),
            _ => format!("unix:{}", scratch("u").join("s").display()),
        };
        let settings = [
            "multifd=on".to_string(),
            format!("multifd-channels={channels}"),
            format!("zero-page-detection={zeros}"),
            format!("multifd-flush-after-each-section={legacy}"),
        ];
        moves(&listen, &settings, None);
    }
}

#[test]
fn a_lone_descriptor_has_only_the_plain_stream() {
    let settings = ["multifd-channels=4".to_string()];
    let (here, there) = UnixStream::pair().unwrap();
    moves("fd:0", &settings, Some((here.into(), there.into())));
    let pipe = scratch("pipe").join("p");
    run(Command::new("mkfifo").arg(&pipe));
    let both = File::options().read(true).write(true).open(&pipe).unwrap(); // does not wait for the other end
    let writes = File::options().write(true).open(&pipe).unwrap();
    let reads = File::options().read(true).open(&pipe).unwrap();
    drop(both);
    moves("fd:0", &settings, Some((writes.into(), reads.into())));
}

/// A large guest that takes its time, in pages that all travel whole.
fn slow_source(channels: u8) -> Vmm {
    let mut source = Vmm::source(&["low=5000"]);
    source.does("set multifd on");
    source.does(&format!("set multifd-channels {channels}"));
    for option in ["zero-page-detection none", "max-bandwidth 1M", "stall-timeout 1000", "connect-timeout 2000"] {
        source.does(&format!("set {option}"));
    }
    source
}

/// Moves it, undisturbed.
fn goes(source: &mut Vmm, there: &mut Vmm, address: &str) {
    source.does("set max-bandwidth 0");
    source.moves_to(there, address);
}

#[test]
fn what_was_cancelled_goes_the_next_time() {
    for who in 0..2 {
        let mut source = slow_source(4);
        let (mut there, address) = Vmm::destination(&["low=5000"]);
        source.does(&format!("out {address}"));
        thread::sleep(Duration::from_millis(30)); // the channels are open and busy, or not yet: both must work
        if who == 0 { &mut source } else { &mut there }.does("cancel");
        let (here, gone) = (source.wait(), there.wait());
        let states = (here.state.as_str(), gone.state.as_str());
        assert_eq!(
            states,
            if who == 0 { ("cancelled", "failed") } else { ("failed", "cancelled") },
            "{}",
            here.error
        );
        source.runs_on();
        let address = there.listen("tcp:127.0.0.1:0");
        goes(&mut source, &mut there, &address);
        source.end();
        there.end();
    }
}

// ---- a relay that breaks one channel -------------------------------------------------------------------------------

/// What becomes of the connection with the number `victim` (0 is the main one).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Harm {
    Cut,
    Stop,
}

fn pass(mut from: TcpStream, mut to: TcpStream, mut left: usize, harm: Harm) {
    let mut some = [0; 8192];
    loop {
        let room = some.len().min(left);
        match from.read(&mut some[..room]) {
            Ok(n) if n > 0 && to.write_all(&some[..n]).is_ok() => left -= n,
            _ => break,
        }
        if left == 0 && harm == Harm::Stop {
            // Takes no more, until one of the two goes.
            while matches!(to.read(&mut some), Ok(n) if n > 0) {}
            break;
        }
    }
    let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
}

/// Between a source and `address`: harms one connection after so many bytes.
fn relay(address: &str, connections: usize, victim: usize, after: usize, harm: Harm) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (own, address) = (listener.local_addr().unwrap(), address.strip_prefix("tcp:").unwrap().to_owned());
    thread::spawn(move || {
        for n in 0..connections {
            let Ok((source, _)) = listener.accept() else { return };
            let Ok(there) = TcpStream::connect(&address) else { return };
            let (back, forth) = (there.try_clone().unwrap(), source.try_clone().unwrap());
            let left = if n == victim { after } else { usize::MAX };
            thread::spawn(move || pass(source, there, left, harm));
            // The victim's way back is quiet, and looks at its end only.
            if !(n == victim && harm == Harm::Stop) {
                thread::spawn(move || pass(back, forth, usize::MAX, Harm::Cut));
            }
        }
    });
    format!("tcp:{own}")
}

#[test]
fn a_source_outlives_a_channel_that_breaks() {
    let mut source = slow_source(3);
    for (victim, after, harm) in [
        (1, 30, Harm::Cut),
        (2, 64, Harm::Cut),
        (3, 100_000, Harm::Cut),
        (0, 760, Harm::Cut),
        (2, 30, Harm::Stop),
        (1, 70_000, Harm::Stop),
    ] {
        source.does("set max-bandwidth 2M");
        let mut there = Vmm::new(&["fill=0", "low=5000"]);
        there.does("set stall-timeout 1000");
        let address = there.listen("tcp:127.0.0.1:0");
        let before = there.ask("left");
        source.does(&format!("out {}", relay(&address, 4, victim, after, harm)));
        let (here, gone) = (source.wait(), there.wait());
        let what = format!("{victim} {harm:?} after {after}: {} | {}", here.message(), gone.message());
        println!("{what}");
        assert_eq!((here.state.as_str(), gone.state.as_str()), ("failed", "failed"), "{what}");
        assert!(victim == 0 || here.message().contains("channel"), "{what}");
        assert!(victim == 0 || gone.message().contains("channel"), "{what}");
        assert_eq!(there.ask("starts"), "0", "{what}");
        nothing_left(&mut there, &before);
        source.runs_on();
        there.end();
    }
    let (mut there, address) = Vmm::destination(&["low=5000"]);
    goes(&mut source, &mut there, &address);
    source.end();
    there.end();
}

#[test]
fn a_source_names_the_channel_of_which_the_destination_says_nothing() {
    let mut source = slow_source(2);
    for (victim, harm, words) in
        [(0, Harm::Cut, "channel 0: "), (1, Harm::Cut, "channel 1: "), (1, Harm::Stop, "channel 1: ")]
    {
        source.does("set max-bandwidth 1M");
        let before = source.ask("left");
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        if harm == Harm::Stop {
            // Little is under way to who does not read, so that no channel could be done with its part.
            socket2::SockRef::from(&listener).set_recv_buffer_size(1 << 16).unwrap();
        }
        source.does(&format!("out tcp:{}", listener.local_addr().unwrap()));
        let mut main = listener.accept().unwrap().0;
        main.write_all(&[b"VMIG", &be(&[1, 15])[..], br#"{"features":[]}"#].concat()).unwrap();
        let mut kept = Vec::new();
        for _ in 0..2 {
            let mut channel = listener.accept().unwrap().0;
            let mut first = [0; 64];
            channel.read_exact(&mut first).unwrap();
            if usize::from(first[24]) != victim {
                let drained = channel.try_clone().unwrap();
                thread::spawn(move || std::io::copy(&mut &drained, &mut std::io::sink()));
            }
            if usize::from(first[24]) != victim || harm == Harm::Stop {
                kept.push(channel);
            }
        }
        if harm == Harm::Stop {
            // As fast as it can.
            source.does("set max-bandwidth 0");
        }
        let drained = main.try_clone().unwrap();
        thread::spawn(move || std::io::copy(&mut &drained, &mut std::io::sink()));
        let look = source.wait();
        let seen = format!("{victim} {harm:?}: {}", look.message());
        println!("{seen}");
        assert_eq!((look.state.as_str(), look.error["side"].as_str()), ("failed", Some("source")), "{seen}");
        assert!(look.message().contains(words), "{seen}");
        source.runs_on();
        no_more_than(&mut source, &before, 1);
    }
    let (mut there, address) = Vmm::destination(&["low=5000"]);
    goes(&mut source, &mut there, &address);
    source.end();
    there.end();
}

/// No descriptor, and no thread but the last migration's own, is left of what listened when there were `before`.
fn nothing_left(vmm: &mut Vmm, before: &str) {
    no_more_than(vmm, before, 0);
}

/// As many descriptors as before at most, and so many threads more: the last migration's own may be known until the next.
fn no_more_than(vmm: &mut Vmm, before: &str, threads: usize) {
    let numbers = |line: &str| -> Vec<usize> { line.split(' ').map(|n| n.parse().unwrap()).collect() };
    let (before, now) = (numbers(before), numbers(&vmm.ask("left")));
    assert!(now[0] <= before[0] && now[1] <= before[1] + threads, "descriptors, threads: {before:?}, then {now:?}");
}

// ---- a source that lies --------------------------------------------------------------------------------------------

/// A destination that loses its patience soon.
fn impatient() -> Vmm {
    let mut there = Vmm::new(&["fill=0"]);
    there.does("set stall-timeout 400");
    there.does("set connect-timeout 700");
    there
}

fn failed(look: &Look, words: &str, what: &str) {
    let seen = format!("{what}: {} {}", look.state, look.message());
    println!("{seen}");
    assert_eq!((look.state.as_str(), look.error["side"].as_str()), ("failed", Some("destination")), "{seen}");
    assert!(look.message().contains(words) && look.error["phase"].is_string(), "'{words}': {seen}");
    assert!(!look.message().contains(char::is_control), "{seen}");
}

#[test]
fn a_destination_outlives_any_channel() {
    let liar = Liar::new();
    let mut there = impatient();
    for play in plays() {
        let address = there.listen("tcp:127.0.0.1:0");
        let before = there.ask("left");
        let mut main = Liar::opens(&address);
        let first = liar.channel(&address, &Liar::honest(0));
        let second = liar.channel(&address, &play);
        let (start, last) = liar.stream.split_at(liar.stream.len() - 1);
        offer(&mut main, start);
        if play.more > 0 {
            thread::sleep(Duration::from_millis(200)); // what is too much is there before the end
        }
        offer(&mut main, last);
        let _ = main.shutdown(Shutdown::Write); // so that nobody waits for us to read the last words
        let look = there.wait();
        failed(&look, play.words, play.name);
        assert_eq!((look.reasons != 0, there.ask("starts").as_str()), (true, "0"), "{}: it did not start", play.name);
        nothing_left(&mut there, &before);
        drop((main, first, second));
    }
    arrives(&mut there, &liar);
    there.end();
}

/// After all that an honest source is welcome.
fn arrives(there: &mut Vmm, liar: &Liar) {
    let address = there.listen("tcp:127.0.0.1:0");
    let mut main = Liar::opens(&address);
    let channels = [0, 1].map(|id| liar.channel(&address, &Liar::honest(id)));
    offer(&mut main, &liar.stream);
    let look = there.wait();
    assert_eq!(look.state, "completed", "{}", look.error);
    drop(channels);
    there.runs_on();
    there.does("stop");
}

// ---- strangers -----------------------------------------------------------------------------------------------------

#[test]
fn strangers_do_not_disturb() {
    let liar = Liar::new();
    let mut there = impatient();
    let address = there.listen("tcp:127.0.0.1:0");
    // Says nothing; goes without a word; comes first though it is a channel, with its number before the other's.
    let silent = connect(&address);
    drop(connect(&address));
    let mut shy = connect(&address);
    shy.write_all(b"VM").unwrap();
    let one = liar.channel(&address, &Liar::honest(1));
    let mut main = Liar::opens(&address);
    // While a channel is awaited: a second main connection, and somebody who is lost. They are shown out.
    let busy = "is busy: another guest is arriving there";
    for (words, answer) in [(&b"QEVM\0\0\0\x03"[..], ""), (b"GET / HTTP/1.1\r\n\r\n", ""), (&hello(), busy)] {
        let mut second = connect(&address);
        second.write_all(words).unwrap();
        let mut said = Vec::new();
        let end = second.read_to_end(&mut said);
        let said = String::from_utf8_lossy(&said);
        assert!(said.contains(answer) && said.is_empty() == answer.is_empty() && end.is_ok_or_reset(), "{said}");
    }
    let zero = liar.channel(&address, &Liar::honest(0));
    offer(&mut main, &liar.stream);
    let look = there.wait();
    assert_eq!(look.state, "completed", "{}", look.error);
    there.runs_on();
    drop((silent, shy, one, zero));
    there.end();
}

trait Gone {
    fn is_ok_or_reset(&self) -> bool;
}

impl Gone for std::io::Result<usize> {
    /// Closed: what the other side had not read makes that a reset.
    fn is_ok_or_reset(&self) -> bool {
        self.as_ref().map_or_else(|e| e.kind() == ErrorKind::ConnectionReset, |_| true)
    }
}

#[test]
fn garbage_for_a_main_connection_is_named() {
    let liar = Liar::new();
    let mut there = impatient();
    for garbage in [&b"GARBAGE!"[..], b"\x44\x33\x22\x11\0\0\0\0"] {
        let address = there.listen("tcp:127.0.0.1:0");
        let before = there.ask("left");
        let early = liar.channel(&address, &Liar::honest(0));
        let mut stranger = connect(&address);
        stranger.write_all(garbage).unwrap();
        let word = u32::from_be_bytes(*garbage.first_chunk().unwrap());
        failed(&there.wait(), &format!("{word:#x}"), "garbage");
        assert_eq!(there.ask("starts"), "0");
        nothing_left(&mut there, &before);
        drop(early);
    }
    arrives(&mut there, &liar);
    there.end();
}

#[test]
fn a_source_whose_channels_do_not_come_fails_in_time() {
    let mut there = impatient();
    let address = there.listen("tcp:127.0.0.1:0");
    let main = Liar::opens(&address);
    failed(&there.wait(), "not all channels of the source came in time (expected 2, got 0)", "nobody came");
    drop(main);
    there.end();
}
