//! Attempts that fail or are cancelled, in every phase and from several threads at once: the guest runs on, nothing of it is
//! left at the destination, and the attempt that succeeds moves all of it.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;
#[path = "words/pair.rs"]
mod pair;
#[path = "common/program.rs"]
mod program;
#[path = "words/relay.rs"]
mod relay;

use std::net::TcpListener;

use common::scratch;
use pair::{Pair, counts, refuses, start, until, value};
use program::Program;
use relay::{GO, PONG, PREPARE, READY, Relay, VOTE, Word};

/// Threads that cancel at the same moment.
const TOGETHER: &str = "cancels 8";

/// A destination that failed has thrown away everything before it says so.
fn is_empty(destination: &mut Program, states: &[&str]) {
    let state = destination.ended_in();
    // Looked at at once: whoever reads the state may use the memory.
    assert_eq!(value(destination, "memory"), "0", "{state}: nothing of the guest is left");
    assert!(states.contains(&state.as_str()), "{state}: {}", destination.command("error"));
    refuses(destination, "start", libc::EPERM);
}

/// The source is brought to a phase and cancelled there.
struct Phase {
    name: &'static str,
    word: Word,
    /// What is said to the two sides before.
    source: &'static [&'static str],
    destination: &'static [&'static str],
    reach: fn(&mut Pair),
    /// What was held is let go.
    release: fn(&mut Pair),
}

fn out(pair: &mut Pair) {
    let uri = pair.relay.uri.clone();
    pair.source.must(&format!("out {uri}"));
}

const PHASES: [Phase; 8] = [
    Phase {
        name: "active",
        word: PONG,
        source: &[],
        destination: &[],
        reach: |pair| {
            pair.until_held();
            until(&mut pair.source, "active");
        },
        release: |pair| pair.relay.pass(),
    },
    Phase {
        name: "pre-switchover",
        word: VOTE,
        source: &["set pause-before-switchover on"],
        destination: &[],
        reach: |pair| {
            out(pair);
            until(&mut pair.source, "pre-switchover");
        },
        release: |pair| {
            pair.source.must_end_in("cancelled");
            pair.source.must("set pause-before-switchover off");
        },
    },
    Phase {
        name: "stop",
        word: VOTE,
        source: &["hold stop"],
        destination: &[],
        reach: |pair| {
            out(pair);
            pair.source.await_news("note held");
        },
        release: |pair| pair.source.must("hold none"),
    },
    Phase {
        name: "release",
        word: VOTE,
        source: &["hold release"],
        destination: &[],
        reach: |pair| {
            out(pair);
            pair.source.await_news("note held");
        },
        release: |pair| pair.source.must("hold none"),
    },
    Phase {
        name: "prepare",
        word: PREPARE,
        source: &[],
        destination: &[],
        reach: Pair::until_held,
        release: |pair| pair.relay.pass(),
    },
    Phase {
        name: "reacquire",
        word: VOTE,
        source: &[],
        destination: &["hold reacquire"],
        reach: |pair| {
            out(pair);
            pair.destination.await_news("note held");
        },
        release: |pair| pair.destination.must("hold none"),
    },
    Phase {
        name: "ready",
        word: READY,
        source: &[],
        destination: &[],
        reach: Pair::until_held,
        release: |pair| pair.relay.pass(),
    },
    Phase {
        name: "verified",
        word: READY,
        source: &["set verify on"],
        destination: &[],
        reach: Pair::until_held,
        release: |pair| pair.relay.pass(),
    },
];

impl Phase {
    fn reached(&self) -> Pair {
        let mut pair = Pair::new(self.name, self.word);
        if self.word == VOTE {
            pair.relay.pass();
        }
        self.source.iter().for_each(|line| pair.source.must(line));
        self.destination.iter().for_each(|line| pair.destination.must(line));
        (self.reach)(&mut pair);
        pair
    }
}

#[test]
fn many_threads_cancel_in_every_phase_before_go() {
    for phase in &PHASES {
        println!("{}", phase.name);
        let mut pair = phase.reached();
        // None of them waits for what is held.
        assert_eq!(value(&mut pair.source, TOGETHER), "0", "{}", phase.name);
        (phase.release)(&mut pair);
        pair.source.must_end_in("cancelled");
        assert_eq!(value(&mut pair.source, "error"), "none", "{}", phase.name);
        is_empty(&mut pair.destination, &["failed"]);
        // Once more, and nothing is there to cancel.
        assert_eq!(value(&mut pair.source, TOGETHER), "0", "{}", phase.name);
        assert_eq!(pair.source.status_text("state"), "cancelled");
        pair.stayed();
        pair.moves_after_all();
        pair.quit();
    }
}

#[test]
fn many_threads_cancel_before_a_destination_answers() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut pair = Pair::new("silent", VOTE);
    pair.relay.pass();
    pair.source.must(&format!("out tcp:{}", listener.local_addr().unwrap()));
    let _silent = listener.accept().unwrap();
    assert_eq!(value(&mut pair.source, TOGETHER), "0");
    pair.source.must_end_in("cancelled");
    pair.stayed();
    out(&mut pair);
    pair.end_in("completed", "completed");
    pair.left();
    pair.quit();
}

#[test]
fn after_go_a_cancel_is_refused() {
    let mut pair = Pair::new("too-late", GO);
    pair.until_held();
    assert_eq!(value(&mut pair.source, TOGETHER), (-libc::EBUSY).to_string());
    let why = refuses(&mut pair.source, "cancel", libc::EBUSY);
    assert!(why.contains("too late to cancel"), "{why}");
    pair.relay.pass();
    pair.end_in("completed", "completed");
    assert_eq!(value(&mut pair.source, TOGETHER), "0", "nothing is left to cancel");
    pair.left();
    pair.quit();
}

#[test]
fn a_destination_is_cancelled_by_many_threads() {
    for (name, word, held) in [("there-listens", VOTE, ""), ("there-loads", VOTE, "reacquire"), ("there-go", GO, "")]
    {
        let mut pair = Pair::new(name, word);
        if held.is_empty() && word == VOTE {
            assert_eq!(value(&mut pair.destination, TOGETHER), "0", "{name}");
            pair.destination.must_end_in("cancelled");
            pair.destination.quit();
            counts(&mut pair.source, true);
            pair.source.quit();
            continue;
        }
        pair.destination.must(&format!("hold {}", if held.is_empty() { "none" } else { held }));
        if word == VOTE {
            pair.relay.pass();
            out(&mut pair);
            pair.destination.await_news("note held");
        } else {
            pair.until_held();
        }
        assert_eq!(value(&mut pair.destination, TOGETHER), "0", "{name}");
        pair.destination.must("hold none");
        pair.source.must_end_in("failed");
        let why = value(&mut pair.source, "error");
        assert!(why.contains("\"side\":\"destination\""), "{name}: {why}");
        is_empty(&mut pair.destination, &["cancelled"]);
        pair.stayed();
        pair.moves_after_all();
        pair.quit();
    }
}

/// An attempt that ends in `state` at the source, to a destination of its own.
fn attempt(
    source: &mut Program,
    name: &str,
    word: Word,
    state: &str,
    steps: impl FnOnce(&mut Program, &mut Program, &Relay),
) {
    let mut destination = start("destination", &scratch(name), "0");
    destination.send("in tcp::0");
    let relay = Relay::new(&destination.listening(), word);
    // Channels get through.
    relay.open();
    steps(source, &mut destination, &relay);
    source.must_end_in(state);
    is_empty(&mut destination, &["failed"]);
    counts(source, true);
    destination.quit();
}

#[test]
fn what_failed_attempts_took_is_not_lost() {
    let mut source = start("source", &scratch("retry"), "33");
    source.must("start");
    for round in 0..2 {
        source.must(&format!("set multifd {}", if round == 0 { "off" } else { "on" }));
        attempt(&mut source, "active", PONG, "cancelled", |source, _, relay| {
            source.must(&format!("out {}", relay.uri));
            relay.held();
            source.must("cancel");
            relay.pass();
        });
        attempt(&mut source, "reacquire", VOTE, "failed", |source, there, relay| {
            relay.pass();
            there.must("fail reacquire");
            source.must(&format!("out {}", relay.uri));
        });
        attempt(&mut source, "prepare", PREPARE, "failed", |source, _, relay| {
            source.must(&format!("out {}", relay.uri));
            relay.held();
            relay.cut();
        });
        attempt(&mut source, "ready", READY, "cancelled", |source, _, relay| {
            source.must(&format!("out {}", relay.uri));
            relay.held();
            source.must("cancel");
            relay.pass();
        });
        attempt(&mut source, "start", VOTE, "failed", |source, there, relay| {
            relay.pass();
            there.must("fail start");
            source.must(&format!("out {}", relay.uri));
        });
    }
    let mut destination = start("destination", &scratch("good"), "0");
    destination.send("in tcp::0");
    let address = destination.listening();
    source.must(&format!("out {address}"));
    source.must_end_in("completed");
    destination.must_end_in("completed");
    assert_eq!(value(&mut source, "hash"), value(&mut destination, "arrival"), "memory and devices are identical");
    // Whose guest completed elsewhere may free its memory: nobody of the library looks at it any more.
    source.must("unmap");
    refuses(&mut source, "start", libc::EPERM);
    counts(&mut destination, true);
    source.kill();
    counts(&mut destination, true);
    destination.quit();
}
