//! Two processes of tests/c/switchover.c, with a relay between them that holds one word back.
#![allow(dead_code, reason = "each test file uses its own part of this")]
#![allow(clippy::unwrap_used, reason = "a test")]

use std::path::Path;
use std::time::{Duration, Instant};

use super::common::{c_program, scratch};
use super::program::{self, Program};
use super::relay::{Relay, Word};

/// Source and destination, the relay between them, and what the guest was.
pub(crate) struct Pair {
    pub(crate) source: Program,
    pub(crate) destination: Program,
    pub(crate) relay: Relay,
    pub(crate) address: String,
}

pub(crate) fn start(name: &str, dir: &Path, fill: &str) -> Program {
    let mut program = Program::start(name, dir, &c_program("switchover"), &[fill]);
    program.must("set multifd off");
    program
}

impl Pair {
    /// A guest that counts, and a destination that listens; the relay holds `word`.
    pub(crate) fn new(name: &str, word: Word) -> Pair {
        Pair::with(name, word, 30_000)
    }

    /// The same with another `switchover-timeout` at the destination.
    pub(crate) fn with(name: &str, word: Word, timeout: u32) -> Pair {
        let dir = scratch(name);
        let (mut source, mut destination) = (start("source", &dir, "33"), start("destination", &dir, "0"));
        source.must("start");
        destination.must(&format!("set switchover-timeout {timeout}"));
        destination.send("in tcp::0");
        let address = destination.listening();
        let relay = Relay::new(&address, word);
        assert_eq!(hooks(&mut source), "start");
        Pair { source, destination, relay, address }
    }

    /// Migrates until the relay holds its word.
    pub(crate) fn until_held(&mut self) {
        self.source.must(&format!("out {}", self.relay.uri));
        self.relay.held();
    }

    /// Both end, in these states.
    pub(crate) fn end_in(&mut self, source: &str, destination: &str) {
        self.source.must_end_in(source);
        self.destination.must_end_in(destination);
    }

    /// The guest is at the source, and has never run elsewhere.
    pub(crate) fn stayed(&mut self) {
        counts(&mut self.source, true);
        counts(&mut self.destination, false);
        refuses(&mut self.destination, "start", libc::EPERM);
    }

    /// The guest is at the destination, and nowhere else.
    pub(crate) fn left(&mut self) {
        counts(&mut self.destination, true);
        counts(&mut self.source, false);
        refuses(&mut self.source, "start", libc::EPERM);
    }

    /// Nothing is in the way any more: the guest moves.
    pub(crate) fn moves_after_all(&mut self) {
        self.destination.send("in tcp::0");
        let address = self.destination.listening();
        self.source.must(&format!("out {address}"));
        self.end_in("completed", "completed");
        self.left();
    }

    pub(crate) fn quit(self) {
        self.source.quit();
        self.destination.quit();
    }
}

pub(crate) fn value(program: &mut Program, command: &str) -> String {
    let line = program.command(command);
    line.strip_prefix("value ").unwrap_or_else(|| panic!("{command}: {line}")).to_owned()
}

/// What was called since the last time.
pub(crate) fn hooks(program: &mut Program) -> String {
    value(program, "hooks")
}

pub(crate) fn counts(program: &mut Program, on: bool) {
    // Whoever stands still is only looked at for a moment.
    let reasons = value(program, "reasons");
    assert_eq!(reasons == "0", on, "{}: stopped for {reasons}", program.name);
    if on {
        assert_eq!(value(program, "counts"), "1", "{}: the guest runs", program.name);
    } else {
        let hash = value(program, "hash");
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(value(program, "hash"), hash, "{}: the guest stands", program.name);
    }
}

pub(crate) fn refuses(program: &mut Program, command: &str, errno: i32) -> String {
    let line = program.command(command);
    let wanted = format!("error {errno} ");
    line.strip_prefix(&wanted).unwrap_or_else(|| panic!("{command}: '{line}', not '{wanted}'")).to_owned()
}

/// Waits until a side is in this state, which it may leave again.
pub(crate) fn until(program: &mut Program, state: &str) {
    let end = Instant::now() + program::MOVE;
    while program.status_text("state") != state {
        assert!(Instant::now() < end, "{} is not {state}", program.name);
        std::thread::sleep(Duration::from_millis(2));
    }
}
