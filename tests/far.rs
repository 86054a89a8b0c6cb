//! A destination that is far away, or behind a slow link: what is only the way there and back does not count against the
//! bandwidth, who waits for a slow link is not taken for dead, and a cancel on the way leaves nobody waiting.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;
#[path = "common/program.rs"]
mod program;

use common::{c_program, scratch};
use program::Program;
use socket2::SockRef;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::Path;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

/// The way to the destination.
#[derive(Clone, Copy)]
struct Link {
    /// From one side to the other.
    way: Duration,
    /// Bytes per second of each connection; 0: no limit.
    rate: u64,
}

const FAR: Link = Link { way: Duration::from_millis(60), rate: 0 };
const SLOW: Link = Link { way: Duration::ZERO, rate: 1 << 20 };

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

impl Link {
    /// One direction of a connection.
    fn carry(self, mut from: TcpStream, mut to: TcpStream) {
        let (sender, pieces) = sync_channel(if self.rate > 0 { 1 } else { 256 });
        thread::spawn(move || pass_on(&pieces, &mut to));
        thread::spawn(move || {
            let mut piece = vec![0; if self.rate > 0 { 1 << 14 } else { 1 << 18 }];
            while let Ok(n @ 1..) = from.read(&mut piece) {
                if let Some(micros) = (n as u64 * 1_000_000).checked_div(self.rate) {
                    thread::sleep(Duration::from_micros(micros));
                }
                if sender.send((Instant::now() + self.way, piece[..n].to_vec())).is_err() {
                    break;
                }
            }
        });
    }

    /// Leads to `destination`.
    fn to(self, destination: &str) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        if self.rate > 0 {
            // Little is under way.
            SockRef::from(&listener).set_recv_buffer_size(1 << 16).unwrap();
        }
        let uri = format!("tcp:{}", listener.local_addr().unwrap());
        let there = destination.strip_prefix("tcp:").unwrap().to_owned();
        thread::spawn(move || {
            for source in listener.incoming() {
                let (source, destination) = (source.unwrap(), TcpStream::connect(&there).unwrap());
                source.set_nodelay(true).unwrap();
                destination.set_nodelay(true).unwrap();
                self.carry(source.try_clone().unwrap(), destination.try_clone().unwrap());
                self.carry(destination, source);
            }
        });
        uri
    }
}

fn start(dir: &Path, name: &str, words: &[&str]) -> Program {
    let program = Program::start(name, dir, &c_program("tracked"), words);
    assert_eq!(program.reply(), "ready");
    program
}

/// A guest that writes to 256 KiB, a destination, and the way there.
fn pair(link: Link, settings: &[&str]) -> (Program, Program, String) {
    let dir = scratch("far");
    let mut source = start(&dir, "source", &["private", "marks"]);
    let mut destination = start(&dir, "destination", &["private", "incoming"]);
    for setting in settings.iter().chain(&["max-bandwidth 0", "total-timeout 60000"]) {
        source.must(&format!("set {setting}"));
        destination.must(&format!("set {setting}"));
    }
    source.must("hot 64");
    destination.send("incoming tcp:127.0.0.1:0");
    let uri = link.to(&destination.listening());
    (source, destination, uri)
}

fn arrives(source: &mut Program, destination: &mut Program) {
    source.must_end_in("completed");
    destination.must_end_in("completed");
    let arrived = destination.await_news("note arrived");
    assert_eq!(source.command("hash").strip_prefix("hash "), arrived.strip_prefix("note arrived "), "memory differs");
}

#[test]
fn a_guest_moves_far_away() {
    // It writes all it has written before in less time than a word takes there and back.
    for more in ["resume-timeout 0", "resume-timeout 20000", "verify on", "multifd off"] {
        let (mut source, mut destination, uri) = pair(FAR, &["downtime-limit 100", more]);
        source.must(&format!("migrate {uri}"));
        arrives(&mut source, &mut destination);
        // GO and its answer were under way for a time that was expected.
        let parts = source.command("go");
        let ways: Vec<u128> = parts.split(' ').skip(1).map(|word| word.parse().unwrap()).collect();
        assert!(ways.len() == 2 && ways.iter().all(|ns| *ns >= 2 * FAR.way.as_nanos()), "{parts}");
        source.quit();
        destination.quit();
    }
}

#[test]
fn a_slow_link_is_not_a_dead_one() {
    // A lane's part of the first round takes longer than anybody may be silent.
    let (mut source, mut destination, uri) =
        pair(SLOW, &["downtime-limit 1000", "multifd-channels 4", "stall-timeout 3000"]);
    source.must(&format!("migrate {uri}"));
    arrives(&mut source, &mut destination);
    source.quit();
    destination.quit();
}

#[test]
fn nobody_waits_for_a_source_that_was_cancelled_on_the_way() {
    // The destination agrees to wait for it, and the source is cancelled before it hears that.
    let (mut source, mut destination, uri) = pair(FAR, &["resume-timeout 600000"]);
    source.must(&format!("migrate {uri}"));
    let end = Instant::now() + program::REPLY;
    while destination.status_text("state") != "active" {
        assert!(Instant::now() < end, "{}", destination.command("status"));
    }
    source.must("cancel");
    source.must_end_in("cancelled");
    destination.must_end_in("failed");
    source.quit();
    destination.quit();
}
