//! A destination that is far away: what is only the way there and back does not count against the bandwidth.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;
#[path = "common/program.rs"]
mod program;

use common::{c_program, scratch};
use program::Program;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

/// From one side to the other.
const WAY: Duration = Duration::from_millis(60);

/// Passes on what comes, each piece when it has been under way for long enough.
fn pass_on(pieces: &Receiver<(Instant, Vec<u8>)>, to: &mut TcpStream) {
    while let Ok((due, piece)) = pieces.recv() {
        thread::sleep(due.saturating_duration_since(Instant::now()));
        if to.write_all(&piece).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}

/// One direction of a connection, in which so many pieces of up to 256 KiB may be under way.
fn carry(mut from: TcpStream, mut to: TcpStream) {
    let (sender, pieces) = sync_channel(256);
    thread::spawn(move || pass_on(&pieces, &mut to));
    thread::spawn(move || {
        let mut piece = vec![0; 1 << 18];
        while let Ok(n @ 1..) = from.read(&mut piece) {
            if sender.send((Instant::now() + WAY, piece[..n].to_vec())).is_err() {
                break;
            }
        }
    });
}

/// A long way to `destination`.
fn far(destination: &str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let uri = format!("tcp:{}", listener.local_addr().unwrap());
    let there = destination.strip_prefix("tcp:").unwrap().to_owned();
    thread::spawn(move || {
        for source in listener.incoming() {
            let (source, destination) = (source.unwrap(), TcpStream::connect(&there).unwrap());
            source.set_nodelay(true).unwrap();
            destination.set_nodelay(true).unwrap();
            carry(source.try_clone().unwrap(), destination.try_clone().unwrap());
            carry(destination, source);
        }
    });
    uri
}

#[test]
fn a_guest_moves_far_away() {
    let dir = scratch("far");
    let start = |name: &str, words: &[&str]| {
        let program = Program::start(name, &dir, &c_program("tracked"), words);
        assert_eq!(program.reply(), "ready");
        program
    };
    let mut source = start("source", &["private", "marks"]);
    let mut destination = start("destination", &["private", "incoming"]);
    destination.send("incoming tcp:127.0.0.1:0");
    let address = far(&destination.listening());
    // It writes all it has written before in less time than a word takes there and back.
    source.must("hot 64");
    source.must("set max-bandwidth 0");
    source.must("set downtime-limit 200");
    source.must("set total-timeout 40000");
    source.must(&format!("migrate {address}"));
    source.must_end_in("completed");
    destination.must_end_in("completed");
    let arrived = destination.await_news("note arrived");
    assert_eq!(source.command("hash").strip_prefix("hash "), arrived.strip_prefix("note arrived "), "memory differs");
    // GO and its answer were under way for a time that was expected.
    let parts = source.command("go");
    let ways: Vec<u128> = parts.split(' ').skip(1).map(|word| word.parse().unwrap()).collect();
    assert!(ways.len() == 2 && ways.iter().all(|ns| *ns >= 2 * WAY.as_nanos()), "{parts}");
}
