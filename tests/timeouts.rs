//! What is waited for and does not come ends the attempt, for a reason that a program can read: `ETIMEDOUT`, the option
//! whose time ran out, and the phase. The guest runs on. No test here looks at how long anything took.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::thread;
use std::time::Duration;

use socket2::{Domain, SockAddr, Socket, Type};

use common::hostile::{Look, Vmm};
use common::scratch;

/// The attempt ended by this option's time, in this phase; the sentence names both option and value.
fn timed_out(look: &Look, option: &str, value: &str, phase: &str, words: &str) {
    let (error, seen) = (&look.error, format!("{}: {}", look.state, look.error));
    println!("{seen}");
    assert_eq!((look.state.as_str(), error["errno"].as_i64()), ("failed", Some(libc::ETIMEDOUT.into())), "{seen}");
    assert_eq!((error["option"].as_str(), error["phase"].as_str()), (Some(option), Some(phase)), "{seen}");
    let sentence = format!("{value} seconds (option '{option}')");
    assert!(look.message().contains(&sentence) && look.message().contains(words), "{seen}");
}

/// An attempt after all that succeeds.
fn moves_out_after(mut source: Vmm, shape: &[&str]) {
    source.runs_on();
    for option in ["stall-timeout 30000", "connect-timeout 10000"] {
        source.does(&format!("set {option}"));
    }
    let (mut there, address) = Vmm::destination(shape);
    source.moves_to(&mut there, &address);
    source.end();
    there.end();
}

#[test]
fn nobody_accepts() {
    let mut source = Vmm::source(&[]);
    source.does("set connect-timeout 300");
    // A unix socket whose queue is full, so that connecting itself must wait.
    let path = scratch("full").join("s");
    let (full, address) = (Socket::new(Domain::UNIX, Type::STREAM, None).unwrap(), SockAddr::unix(&path).unwrap());
    full.bind(&address).unwrap();
    full.listen(0).unwrap();
    let waits = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
    waits.connect(&address).unwrap();
    source.does(&format!("out unix:{}", path.display()));
    timed_out(&source.wait(), "connect-timeout", "0.3", "connect", &format!("connecting to unix:{}", path.display()));
    source.runs_on();
    // The system takes connections for a listener that does not: it is the answer that does not come.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    source.does(&format!("out tcp:{}", listener.local_addr().unwrap()));
    timed_out(&source.wait(), "connect-timeout", "0.3", "hello", "did not answer");
    moves_out_after(source, &[]);
}

#[test]
fn an_answer_that_trickles_is_none() {
    let mut source = Vmm::source(&[]);
    source.does("set connect-timeout 400");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    source.does(&format!("out tcp:{}", listener.local_addr().unwrap()));
    let (mut stream, _) = listener.accept().unwrap();
    let trickle = thread::spawn(move || {
        let answer = [b"VMIG\0\0\0\x01\0\x01\0\0", &[b' '; 1 << 16][..]].concat();
        for byte in answer {
            if stream.write_all(&[byte]).is_err() {
                return true;
            }
            thread::sleep(Duration::from_millis(20));
        }
        false
    });
    timed_out(&source.wait(), "connect-timeout", "0.4", "hello", "did not answer");
    assert!(trickle.join().unwrap(), "the source hung up");
    moves_out_after(source, &[]);
}

/// Passes `limit` bytes of a connection on to `address`, and answers; then nothing more in either direction, and nobody
/// hangs up until what is returned beside its address goes. With `swallows` what follows is taken all the same.
fn freezing(address: &str, limit: usize, swallows: bool) -> (String, Sender<()>) {
    let (holds, held) = channel::<()>();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (own, address) = (listener.local_addr().unwrap(), address.strip_prefix("tcp:").unwrap().to_owned());
    thread::spawn(move || {
        let (mut source, mut there) = (listener.accept().unwrap().0, TcpStream::connect(address).unwrap());
        let (mut back, mut forth) = (there.try_clone().unwrap(), source.try_clone().unwrap());
        let frozen = Arc::<AtomicBool>::default();
        let flag = Arc::clone(&frozen);
        thread::spawn(move || {
            let mut some = [0; 4096];
            while let Ok(n @ 1..) = back.read(&mut some) {
                if !flag.load(Ordering::SeqCst) {
                    let _ = forth.write_all(&some[..n]);
                }
            }
        });
        let (mut some, mut left) = ([0; 4096], limit);
        while left > 0 {
            match source.read(&mut some[..left.min(4096)]) {
                Ok(n @ 1..) if there.write_all(&some[..n]).is_ok() => left -= n,
                _ => break,
            }
        }
        frozen.store(true, Ordering::SeqCst);
        while swallows && matches!(source.read(&mut some), Ok(1..)) {}
        let _ = held.recv();
    });
    (format!("tcp:{own}"), holds)
}

#[test]
fn a_peer_that_freezes_is_lost() {
    // Half of a large guest, which then finds no room; and all but the end of a small one, whose pings stay unanswered.
    for (shape, bytes, swallows, words) in
        [(&["low=5000"][..], 400_000, false, "took no byte for"), (&[], 20_000, true, "ping")]
    {
        let mut source = Vmm::source(shape);
        source.does("set stall-timeout 500");
        source.does("set zero-page-detection none");
        let mut there = Vmm::new(&[&["fill=0"], shape].concat());
        there.does("set stall-timeout 700");
        let address = there.listen("tcp:127.0.0.1:0");
        let (address, _holds) = freezing(&address, bytes, swallows);
        source.does(&format!("out {address}"));
        timed_out(&source.wait(), "stall-timeout", "0.5", "iterate", words);
        timed_out(&there.wait(), "stall-timeout", "0.7", "load", "sent no byte for");
        assert_eq!(there.ask("starts"), "0");
        there.end();
        moves_out_after(source, shape);
    }
}

#[test]
fn a_guest_that_does_not_converge_runs_on_here() {
    let mut source = Vmm::source(&["low=3000"]);
    let (mut there, address) = Vmm::destination(&["low=3000"]);
    // Far more than this is dirtied again and again.
    for option in ["max-bandwidth 2M", "downtime-limit 0", "zero-page-detection none", "total-timeout 700"] {
        source.does(&format!("set {option}"));
    }
    let before = source.ask("left");
    source.does(&format!("out {address}"));
    timed_out(&source.wait(), "total-timeout", "0.7", "iterate", "bytes of guest memory are left");
    let look = there.wait();
    assert_eq!((look.state.as_str(), there.ask("starts").as_str()), ("failed", "0"), "{}", look.error);
    source.runs_on();
    // It covers connecting, too.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    source.does(&format!("out tcp:{}", listener.local_addr().unwrap()));
    timed_out(&source.wait(), "total-timeout", "0.7", "hello", "still being set up");
    // In time: it has no say any more, and its thread is gone.
    for option in ["total-timeout 60000", "max-bandwidth 0", "downtime-limit 300"] {
        source.does(&format!("set {option}"));
    }
    let address = there.listen("tcp:127.0.0.1:0");
    source.moves_to(&mut there, &address);
    let count = |line: &str| line.split(' ').map(|n| n.parse::<usize>().unwrap()).collect::<Vec<_>>();
    let (before, after) = (count(&before), count(&source.ask("left")));
    assert!(after[0] <= before[0] && after[1] <= before[1] + 1, "{before:?} {after:?}");
    source.end();
    there.end();
}
