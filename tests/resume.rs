//! Connections that break while the guest runs (option `resume-timeout`): two processes (tests/c/switchover.c), a relay that
//! cuts main and channel connections, and a guest that writes all the time.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;
#[path = "common/program.rs"]
mod program;
#[path = "common/qmp.rs"]
mod qmp;
#[path = "resume/relay.rs"]
mod relay;

use common::{c_program, scratch, seed};
use program::Program;
use qmp::Client;
use relay::Relay;
use serde_json::json;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use vmig::wire::ask::MigrationId;
use vmig::wire::knock::{self, Knock};
use vmig::wire::packet::{self, Header};

/// Slower than the guest writes, so that precopy does not end by itself.
const SLOW: &str = "set max-bandwidth 8M";

struct Pair {
    source: Program,
    destination: Program,
    relay: Relay,
    address: String,
}

fn start(name: &str, dir: &Path, fill: &str) -> Program {
    Program::start(name, dir, &c_program("switchover"), &[fill, "4096"])
}

impl Pair {
    fn new(name: &str, channels: u32, timeout: u32) -> Pair {
        let dir = scratch(name);
        let (mut source, mut destination) = (start("source", &dir, "33"), start("destination", &dir, "0"));
        source.must(&format!("set resume-timeout {timeout}"));
        match channels {
            0 => source.must("set multifd off"),
            n => source.must(&format!("set multifd-channels {n}")),
        }
        source.must(SLOW);
        source.must("start");
        destination.send("in tcp::0");
        let address = destination.listening();
        let relay = Relay::new(&address);
        Pair { source, destination, relay, address }
    }

    fn begin(&mut self) {
        let uri = self.relay.uri.clone();
        self.source.must(&format!("out {uri}"));
        until(&mut self.source, "active");
    }

    /// The guest moves to its end, and arrives as it left.
    fn arrives(&mut self) {
        self.source.must("set max-bandwidth 0");
        self.source.must_end_in("completed");
        self.destination.must_end_in("completed");
        assert_eq!(value(&mut self.source, "hash"), value(&mut self.destination, "arrival"));
    }

    fn quit(self) {
        self.source.quit();
        self.destination.quit();
    }
}

fn value(program: &mut Program, command: &str) -> String {
    let line = program.command(command);
    line.strip_prefix("value ").unwrap_or_else(|| panic!("{command}: {line}")).to_owned()
}

fn until(program: &mut Program, state: &str) {
    let end = Instant::now() + program::MOVE;
    while program.status_text("state") != state {
        if Instant::now() > end {
            let why = program.command("error");
            program.fail(&format!("it is not {state}: {why}"));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Waits until more bytes have moved, as this side counts them.
fn progresses(program: &mut Program) {
    let (before, end) = (program.status("transferred"), Instant::now() + program::MOVE);
    while program.status("transferred") <= before + (64 << 10) {
        if Instant::now() > end {
            program.fail("nothing moves");
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// What a stranger hears who says this first, when it has said all.
fn stranger(address: &str, words: &[u8]) -> String {
    let mut stream = TcpStream::connect(address.strip_prefix("tcp:").unwrap()).unwrap();
    stream.set_read_timeout(Some(program::MOVE)).unwrap();
    stream.write_all(words).unwrap();
    let mut answer = Vec::new();
    // A connection that is reset was closed with bytes unread.
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

fn knock_of(migration: [u8; 16], number: u32) -> Vec<u8> {
    let mut words = Vec::new();
    knock::put(&mut words, &Knock { migration: MigrationId(migration), number, over: false });
    words
}

#[test]
fn who_would_go_on_with_another_migration_hears_why_not() {
    let mut pair = Pair::new("foreign", 2, 60_000);
    let foreign = [knock_of([7; 16], 1), b"VMIG and a hello that nobody reads".to_vec()].concat();
    // While a guest is expected, while one arrives, and while its source is waited for.
    let answer = stranger(&pair.address, &foreign);
    assert!(answer.contains("knows nothing of the migration that is to go on"), "{answer}");
    assert_eq!(pair.destination.status_text("state"), "setup");
    pair.begin();
    progresses(&mut pair.destination);
    let answer = stranger(&pair.address, &foreign);
    assert!(answer.contains("another migration has begun to arrive here"), "{answer}");
    pair.relay.close(true);
    pair.relay.cut_all();
    until(&mut pair.destination, "reconnecting");
    until(&mut pair.source, "reconnecting");
    let answer = stranger(&pair.address, &foreign);
    assert!(answer.contains("another migration has begun to arrive here"), "{answer}");
    assert_eq!(pair.destination.status_text("state"), "reconnecting");
    pair.relay.close(false);
    until(&mut pair.source, "active");
    // The right migration, and an attempt that was before.
    let answer = stranger(&pair.address, &knock_of(pair.relay.migration(), 1));
    assert!(answer.contains("an older connection of the migration"), "{answer}");
    progresses(&mut pair.destination);
    pair.arrives();
    pair.quit();
}

#[test]
fn channels_of_an_older_connection_are_closed_unread() {
    let mut pair = Pair::new("stale", 2, 60_000);
    pair.begin();
    progresses(&mut pair.destination);
    let tag = packet::tag(&pair.relay.migration(), 0);
    // A page for the guest, of a source that is gone.
    let mut header = Header::default();
    header.set_pages(0, "high", &[0], &[]);
    let words = [&packet::init(0, false, &tag)[..], header.bytes(), &[0xee; 4096]].concat();
    let (over, closed) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::SeqCst) {
                assert_eq!(stranger(&pair.address, &words), "");
                closed.fetch_add(1, Ordering::SeqCst);
            }
        });
        let _ended = common::AtEnd(|| over.store(true, Ordering::SeqCst));
        let end = Instant::now() + program::MOVE;
        // Who comes while a connection is whole waits for its end; some come when the next one has begun already.
        for breaks in 0.. {
            if breaks >= 8 && closed.load(Ordering::SeqCst) >= 4 {
                break;
            }
            assert!(Instant::now() < end, "{breaks} breaks, {closed:?} closed: {}", pair.source.command("error"));
            pair.relay.cut_all();
            while pair.relay.links() == 0 {
                assert!(Instant::now() < end, "{}", pair.source.command("error"));
                std::thread::sleep(Duration::from_millis(2));
            }
            until(&mut pair.source, "active");
            progresses(&mut pair.source);
        }
        over.store(true, Ordering::SeqCst);
        pair.source.must("set max-bandwidth 0");
        pair.source.must_end_in("completed");
    });
    pair.arrives();
    pair.quit();
}

#[test]
fn a_destination_that_misses_the_break_takes_the_source_again() {
    for channels in [0, 2] {
        let mut pair = Pair::new(&format!("half-open-{channels}"), channels, 120_000);
        pair.destination.must("cancel");
        pair.destination.must_end_in("cancelled");
        // Its own patience is longer than the test's.
        pair.destination.must("set stall-timeout 3600000");
        pair.destination.send("in tcp::0");
        pair.address = pair.destination.listening();
        pair.relay = Relay::new(&pair.address);
        pair.begin();
        progresses(&mut pair.destination);
        for _ in 0..3 {
            pair.relay.lose_sources();
            let end = Instant::now() + program::MOVE;
            while pair.relay.links() == 0 {
                assert!(Instant::now() < end, "{}", pair.source.command("error"));
                std::thread::sleep(Duration::from_millis(2));
            }
            until(&mut pair.source, "active");
            progresses(&mut pair.destination);
            pair.relay.whole();
        }
        pair.arrives();
        pair.quit();
    }
}

#[test]
fn whoever_survives_says_why() {
    for source_dies in [true, false] {
        let mut pair = Pair::new(if source_dies { "dead-source" } else { "dead-destination" }, 2, 700);
        pair.begin();
        progresses(&mut pair.destination);
        pair.relay.close(true);
        pair.relay.cut_all();
        until(&mut pair.source, "reconnecting");
        until(&mut pair.destination, "reconnecting");
        let Pair { mut source, mut destination, .. } = pair;
        let survivor = if source_dies {
            source.kill();
            &mut destination
        } else {
            destination.kill();
            &mut source
        };
        survivor.must_end_in("failed");
        let why = value(survivor, "error");
        assert!(why.contains("connect") && why.contains("resume-timeout"), "{why}");
        assert_eq!(
            value(survivor, if source_dies { "memory" } else { "counts" }),
            if source_dies { "0" } else { "1" }
        );
    }
}

/// Numbers drawn by a printed seed.
struct Draw(u64);

impl Draw {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

/// Breaks connections again and again, at drawn places, and lets the guest arrive.
fn breaks_again_and_again(name: &str, channels: u32) {
    let mut draw = Draw(seed() | 1);
    let mut pair = Pair::new(name, channels, 60_000);
    pair.begin();
    for _ in 0..6 {
        let came = pair.relay.came();
        pair.relay.cut_after(1 + draw.below(1 << 20));
        std::thread::sleep(Duration::from_millis(20 + draw.below(80)));
        pair.relay.cut(usize::try_from(draw.below(u64::from(channels) + 1)).unwrap());
        let end = Instant::now() + program::MOVE;
        while pair.relay.came() == came {
            assert!(Instant::now() < end, "{}", pair.source.command("error"));
            std::thread::sleep(Duration::from_millis(2));
        }
        until(&mut pair.source, "active");
        until(&mut pair.destination, "active");
        progresses(&mut pair.source);
        progresses(&mut pair.destination);
        assert_eq!(value(&mut pair.source, "counts"), "1", "the guest runs on");
    }
    // After GO none may break.
    pair.relay.cut_after(u64::MAX);
    pair.arrives();
    pair.quit();
}

#[test]
fn a_guest_arrives_whole_however_often_its_connection_breaks() {
    breaks_again_and_again("one-stream", 0);
}

#[test]
fn a_guest_arrives_whole_however_often_one_of_its_connections_breaks() {
    for channels in [1, 2, 4] {
        breaks_again_and_again(&format!("channels-{channels}"), channels);
    }
}

#[test]
fn another_address_may_be_given_meanwhile() {
    let mut pair = Pair::new("address", 2, 60_000);
    let refused = pair.source.command("resume tcp:127.0.0.1:1");
    assert!(refused.starts_with(&format!("error {} ", libc::EINVAL)), "{refused}");
    pair.begin();
    progresses(&mut pair.destination);
    pair.relay.close(true);
    pair.relay.cut_all();
    until(&mut pair.source, "reconnecting");
    until(&mut pair.destination, "reconnecting");
    assert_eq!(value(&mut pair.source, "counts"), "1", "the guest runs on");
    // Another incarnation refuses, and is not the worse for it.
    let dir = scratch("address-stranger");
    let mut stranger = start("stranger", &dir, "0");
    stranger.send("in tcp::0");
    let strange = stranger.listening();
    let untouched = value(&mut stranger, "memory");
    pair.source.must(&format!("resume {strange}"));
    let end = Instant::now() + program::MOVE;
    while !value(&mut pair.source, "error").contains("knows nothing of the migration") {
        assert!(Instant::now() < end, "{}", value(&mut pair.source, "error"));
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(pair.source.status_text("state"), "reconnecting");
    assert_eq!(value(&mut stranger, "memory"), untouched);
    let other = Relay::new(&pair.address);
    pair.source.must(&format!("resume {}", other.uri));
    until(&mut pair.source, "active");
    progresses(&mut pair.destination);
    pair.arrives();
    pair.quit();
}

#[test]
fn when_the_time_is_over_the_guest_stays_and_nothing_of_it_is_elsewhere() {
    let mut pair = Pair::new("over", 2, 300);
    pair.begin();
    progresses(&mut pair.destination);
    pair.relay.close(true);
    pair.relay.cut_all();
    pair.source.must_end_in("failed");
    pair.destination.must_end_in("failed");
    for side in [&mut pair.source, &mut pair.destination] {
        let why = value(side, "error");
        assert!(why.contains("resume-timeout") && why.contains(&format!("\"errno\":{}", libc::ETIMEDOUT)), "{why}");
    }
    assert_eq!(value(&mut pair.source, "counts"), "1");
    assert_eq!(value(&mut pair.destination, "memory"), "0");
    pair.quit();
}

#[test]
fn a_cancel_is_obeyed_while_there_is_no_connection() {
    let mut pair = Pair::new("cancel", 1, 60_000);
    pair.begin();
    progresses(&mut pair.destination);
    pair.relay.close(true);
    pair.relay.cut_all();
    until(&mut pair.source, "reconnecting");
    until(&mut pair.destination, "reconnecting");
    pair.source.must("cancel");
    pair.source.must_end_in("cancelled");
    pair.destination.must("cancel");
    pair.destination.must_end_in("cancelled");
    assert_eq!(value(&mut pair.destination, "memory"), "0");
    assert_eq!(value(&mut pair.source, "counts"), "1");
    pair.quit();
}

#[test]
fn a_destination_does_not_wait_for_a_source_that_was_cancelled() {
    let mut pair = Pair::new("told", 2, 60_000);
    pair.begin();
    progresses(&mut pair.destination);
    pair.source.must("cancel");
    pair.source.must_end_in("cancelled");
    pair.destination.must_end_in("failed");
    let why = value(&mut pair.destination, "error");
    // Words at the end of the stream, or, where it was cut amid something, over a connection of their own.
    let told = ["the migration was cancelled at the source", "the source gave the attempt up"];
    assert!(told.iter().any(|words| why.contains(words)), "{why}");
    assert_eq!(value(&mut pair.destination, "memory"), "0");
    pair.quit();
}

#[test]
fn a_source_that_is_cancelled_out_of_reach_says_so_over_another_connection() {
    let mut pair = Pair::new("farewell", 2, 3_600_000);
    pair.begin();
    progresses(&mut pair.destination);
    // Its words at the end of the stream are not heard, and the destination has nothing to miss for a long time.
    pair.relay.swallow();
    pair.source.must("cancel");
    pair.source.must_end_in("cancelled");
    pair.destination.must_end_in("failed");
    let why = value(&mut pair.destination, "error");
    assert!(why.contains("the source gave the attempt up"), "{why}");
    assert_eq!(value(&mut pair.destination, "memory"), "0");
    pair.quit();
}

/// Serves QMP, and is connected to it.
fn client(program: &mut Program, dir: &Path) -> Client {
    let socket = dir.join(&program.name);
    program.must(&format!("qmp unix:{}", socket.display()));
    Client::ready(&socket)
}

#[test]
fn a_broken_migration_goes_on_by_qmp() {
    let mut pair = Pair::new("by-qmp", 2, 60_000);
    let dir = scratch("by-qmp-sockets");
    let (mut here, mut there) = (client(&mut pair.source, &dir), client(&mut pair.destination, &dir));
    pair.begin();
    for side in [&mut here, &mut there] {
        let refused = side.try_run("migrate-recover", json!({"uri": "tcp:127.0.0.1:1"}));
        assert_eq!(refused, Err("Migrate recover can only be run when postcopy is paused.".to_owned()));
    }
    // By each of the two ways QEMU has.
    for (command, more) in [("migrate-recover", json!({})), ("migrate", json!({"resume": true}))] {
        progresses(&mut pair.destination);
        pair.relay.close(true);
        pair.relay.cut_all();
        until(&mut pair.source, "reconnecting");
        until(&mut pair.destination, "reconnecting");
        for side in [&mut here, &mut there] {
            let now = side.run("query-migrate");
            assert!(now["status"] == "reconnecting" && now["error-desc"].is_string(), "{now}");
        }
        let elsewhere = there.try_run("migrate-recover", json!({"uri": "tcp:127.0.0.1:1"}));
        assert!(elsewhere.as_ref().is_err_and(|e| e.contains(&pair.address)), "{elsewhere:?}");
        assert_eq!(there.try_run("migrate-recover", json!({"uri": pair.address})), Ok(json!({})));
        let refused = here.try_run("migrate", json!({"uri": pair.address}));
        assert_eq!(refused, Err("There's a migration process in progress".to_owned()));
        assert!(here.try_run("migrate-recover", json!({"uri": "fd:3"})).is_err());
        assert_eq!(pair.source.status_text("state"), "reconnecting");
        let relay = Relay::new(&pair.address);
        let mut arguments = json!({"uri": relay.uri});
        arguments.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        assert_eq!(here.try_run(command, arguments), Ok(json!({})));
        until(&mut pair.source, "active");
        pair.relay = relay;
    }
    pair.arrives();
    pair.quit();
}
