//! The switchover between two vmigs in separate processes (tests/c/switchover.c), with a relay that loses its words:
//! who runs the guest in the end, what the hooks were told, and what an operator may decide.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;
#[path = "common/program.rs"]
mod program;
#[path = "words/pair.rs"]
mod pair;
#[path = "common/qmp.rs"]
mod qmp;
#[path = "words/relay.rs"]
mod relay;

use common::scratch;
use pair::{Pair, counts, hooks, refuses, start, until, value};
use relay::{GO, PREPARE, READY, VOTE, Word};
use serde_json::json;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;
use vmig::wire::ask::{self, Ask, MigrationId};
use vmig::wire::input::Slice;
use vmig::wire::reply::{self, Reply};

const SHORT: &str = "set switchover-timeout 300";

#[test]
fn hooks_see_the_epochs_of_every_attempt() {
    let mut pair = Pair::new("epochs", VOTE);
    pair.until_held();
    pair.relay.pass();
    pair.end_in("completed", "completed");
    assert_eq!(hooks(&mut pair.source), "stop release=1");
    assert_eq!(hooks(&mut pair.destination), "reacquire=2 start announce");
    pair.left();
    assert_eq!(value(&mut pair.destination, "get epoch"), "2");
    // And back.
    std::mem::swap(&mut pair.source, &mut pair.destination);
    pair.moves_after_all();
    assert_eq!(hooks(&mut pair.source), "stop release=2");
    assert_eq!(hooks(&mut pair.destination), "reacquire=3 start announce");
    pair.quit();
}

#[test]
fn an_epoch_may_be_set_where_the_guest_is_owned_and_only_grows() {
    let mut pair = Pair::new("set-epoch", VOTE);
    pair.relay.pass();
    pair.source.must("set epoch 41");
    refuses(&mut pair.source, "set epoch 40", libc::EINVAL);
    refuses(&mut pair.destination, "set epoch 50", libc::EBUSY);
    pair.source.must(&format!("out {}", pair.relay.uri));
    pair.end_in("completed", "completed");
    refuses(&mut pair.source, "set epoch 50", libc::EPERM);
    assert_eq!(value(&mut pair.destination, "get epoch"), "42");
    pair.quit();
}

#[test]
fn a_lost_answer_is_asked_for() {
    let mut pair = Pair::new("asks", VOTE);
    pair.until_held();
    pair.relay.cut();
    until(&mut pair.source, "switchover-unknown");
    refuses(&mut pair.source, "start", libc::EPERM);
    refuses(&mut pair.source, "cancel", libc::EBUSY);
    pair.relay.open();
    pair.end_in("completed", "completed");
    assert_eq!(value(&mut pair.source, "error"), "none");
    assert_eq!(hooks(&mut pair.source), "stop release=1");
    assert_eq!(hooks(&mut pair.destination), "reacquire=2 start announce");
    pair.left();
    pair.quit();
}

#[test]
fn a_lost_go_is_repeated_and_starts_the_guest_once() {
    let mut pair = Pair::new("go-again", GO);
    pair.until_held();
    pair.relay.cut();
    until(&mut pair.destination, "switchover-unknown");
    counts(&mut pair.destination, false);
    pair.relay.open();
    pair.end_in("completed", "completed");
    assert_eq!(hooks(&mut pair.destination), "reacquire=2 start announce");
    pair.left();
    pair.quit();
}

#[test]
fn a_source_whose_connection_hangs_asks_on_another() {
    let mut pair = Pair::new("hangs", GO);
    pair.relay.open();
    pair.source.must(SHORT);
    pair.until_held();
    // Neither side hears that the connection is of no use: the destination learns it by the question.
    pair.end_in("completed", "completed");
    assert_eq!(hooks(&mut pair.destination), "reacquire=2 start announce");
    pair.left();
    pair.quit();
}

#[test]
fn a_start_that_fails_gives_the_guest_back() {
    let mut pair = Pair::new("start-fails", VOTE);
    pair.relay.pass();
    pair.destination.must("fail start");
    pair.source.must(&format!("out {}", pair.relay.uri));
    pair.end_in("failed", "failed");
    assert_eq!(hooks(&mut pair.source), "stop release=1 reacquire=3 start");
    assert_eq!(hooks(&mut pair.destination), "reacquire=2 start release=2");
    let why = value(&mut pair.source, "error");
    assert!(why.contains("the start hook returned") && why.contains("\"side\":\"destination\""), "{why}");
    assert_eq!(value(&mut pair.destination, "memory"), "0", "nothing of the guest is left");
    pair.stayed();
    pair.destination.must("fail none");
    pair.moves_after_all();
    assert_eq!(hooks(&mut pair.source), "stop release=3");
    assert_eq!(hooks(&mut pair.destination), "reacquire=4 start announce");
    pair.quit();
}

#[test]
fn hooks_that_fail_before_ready_leave_the_guest_here() {
    for (here, hook, words) in [(true, "release", "epoch 1"), (false, "reacquire", "epoch 2")] {
        let mut pair = Pair::new("hook-fails", VOTE);
        pair.relay.pass();
        let side = if here { &mut pair.source } else { &mut pair.destination };
        side.must(&format!("fail {hook}"));
        pair.source.must(&format!("out {}", pair.relay.uri));
        pair.end_in("failed", "failed");
        let why = value(&mut pair.source, "error");
        assert!(why.contains(&format!("the {hook} hook ({words})")), "{why}");
        assert_eq!(hooks(&mut pair.source), "stop release=1 reacquire=3 start");
        assert_eq!(hooks(&mut pair.destination), if here { "none" } else { "reacquire=2" });
        assert_eq!(value(&mut pair.destination, "memory"), "0", "nothing of the guest is left");
        pair.stayed();
        pair.source.must("fail none");
        pair.destination.must("fail none");
        pair.moves_after_all();
        pair.quit();
    }
}

#[test]
fn a_destination_that_hears_no_go_votes_never() {
    let mut pair = Pair::with("no-go", GO, 300);
    pair.until_held();
    pair.end_in("failed", "failed");
    assert_eq!(hooks(&mut pair.destination), "reacquire=2 release=2");
    let why = value(&mut pair.source, "error");
    assert!(why.contains("neither GO nor ABORT") && why.contains("\"side\":\"destination\""), "{why}");
    assert_eq!(hooks(&mut pair.source), "stop release=1 reacquire=3 start");
    // GO comes at last, and is refused.
    pair.relay.pass();
    pair.stayed();
    pair.moves_after_all();
    pair.quit();
}

#[test]
fn a_source_that_hears_no_ready_takes_the_guest_back() {
    let mut pair = Pair::new("no-ready", READY);
    pair.source.must(SHORT);
    pair.until_held();
    pair.end_in("failed", "failed");
    assert_eq!(hooks(&mut pair.source), "stop release=1 reacquire=3 start");
    assert_eq!(hooks(&mut pair.destination), "reacquire=2 release=2");
    let why = value(&mut pair.destination, "error");
    assert!(why.contains("did not say READY") && why.contains("\"side\":\"source\""), "{why}");
    pair.stayed();
    pair.moves_after_all();
    pair.quit();
}

/// The destination died after READY, and the source cannot know whether it ran the guest.
fn died(name: &str, word: Word) -> Pair {
    let mut pair = Pair::new(name, word);
    pair.source.must(SHORT);
    pair.source.must("fail fence");
    pair.until_held();
    pair.destination.kill();
    pair.relay.cut();
    pair.source.must_end_in("switchover-unknown");
    assert_eq!(hooks(&mut pair.source), "stop release=1 fence=2");
    let why = value(&mut pair.source, "error");
    assert!(why.contains("vmig_resolve") && why.contains("fence hook"), "{why}");
    refuses(&mut pair.source, "start", libc::EPERM);
    refuses(&mut pair.source, "cancel", libc::EBUSY);
    refuses(&mut pair.source, "out tcp:127.0.0.1:1", libc::EPERM);
    counts(&mut pair.source, false);
    pair
}

#[test]
fn a_dead_destination_is_resolved_to_here() {
    let mut pair = died("dead-here", GO);
    // What cannot be taken back is held, and the word that said so hears it.
    pair.source.must("fail reacquire");
    let text = refuses(&mut pair.source, "resolve run", libc::EDOM);
    assert!(text.contains("reacquire hook (epoch 3)"), "{text}");
    pair.source.must_end_in("held");
    refuses(&mut pair.source, "start", libc::EPERM);
    refuses(&mut pair.source, "cancel", libc::EBUSY);
    assert!(hooks(&mut pair.source).starts_with("reacquire=3 reacquire=3"), "it was tried again");
    pair.source.must("fail none");
    pair.source.must("resolve run");
    pair.source.must_end_in("failed");
    assert_eq!(hooks(&mut pair.source), "reacquire=3 start");
    counts(&mut pair.source, true);
    refuses(&mut pair.source, "resolve run", libc::EINVAL);
    let dir = scratch("dead-here-again");
    pair.destination = start("destination", &dir, "0");
    pair.moves_after_all();
    pair.quit();
}

#[test]
fn a_dead_destination_is_resolved_to_there() {
    let mut pair = died("dead-there", VOTE);
    pair.source.must("resolve discard");
    pair.source.must_end_in("completed");
    refuses(&mut pair.source, "start", libc::EPERM);
    assert_eq!(hooks(&mut pair.source), "none");
    pair.source.quit();
}

#[test]
fn an_operator_decides_by_qmp() {
    let mut pair = died("by-qmp", GO);
    let socket = scratch("by-qmp-socket").join("qmp");
    pair.source.must(&format!("qmp unix:{}", socket.display()));
    let mut client = qmp::Client::ready(&socket);
    assert_eq!(client.run("query-migrate")["status"], "switchover-unknown");
    let wrong = client.try_run("vmig-resolve", json!({"decision": "maybe"}));
    assert_eq!(wrong, Err("Parameter 'decision' does not accept value 'maybe'".to_owned()));
    pair.source.must("fail reacquire");
    let failed = client.try_run("vmig-resolve", json!({"decision": "run"}));
    assert!(failed.as_ref().is_err_and(|e| e.contains("reacquire hook (epoch 3)")), "{failed:?}");
    assert_eq!(client.run("query-migrate")["status"], "held");
    pair.source.must("fail none");
    assert_eq!(client.try_run("vmig-resolve", json!({"decision": "run"})), Ok(json!({})));
    assert_eq!(client.status(), "failed");
    counts(&mut pair.source, true);
    let late = client.try_run("vmig-resolve", json!({"decision": "run"}));
    assert!(late.as_ref().is_err_and(|e| e.contains("nothing to resolve")), "{late:?}");
    pair.source.quit();

    let mut pair = died("by-qmp-there", VOTE);
    pair.source.must(&format!("qmp unix:{}", socket.display()));
    let mut client = qmp::Client::ready(&socket);
    assert_eq!(client.try_run("vmig-resolve", json!({"decision": "discard"})), Ok(json!({})));
    assert_eq!(client.status(), "completed");
    counts(&mut pair.source, false);
    pair.source.quit();
}

#[test]
fn a_fence_that_knows_needs_no_operator() {
    let mut pair = Pair::new("fenced", GO);
    pair.source.must(SHORT);
    pair.until_held();
    pair.destination.kill();
    pair.relay.cut();
    pair.source.must_end_in("failed");
    assert_eq!(hooks(&mut pair.source), "stop release=1 fence=2 reacquire=3 start");
    counts(&mut pair.source, true);
    pair.source.quit();
}

#[test]
fn an_operator_need_not_wait_for_the_answer() {
    for (word, state) in [("run", "failed"), ("discard", "completed")] {
        let mut pair = Pair::new("impatient", GO);
        pair.until_held();
        pair.destination.kill();
        pair.relay.cut();
        until(&mut pair.source, "switchover-unknown");
        pair.source.must(&format!("resolve {word}"));
        pair.source.must_end_in(state);
        counts(&mut pair.source, word == "run");
        pair.source.quit();
    }
}

#[test]
fn a_guest_that_cannot_be_taken_back_is_held() {
    let mut pair = Pair::new("held", VOTE);
    pair.relay.pass();
    pair.source.must(SHORT);
    pair.destination.must("fail start");
    pair.source.must("fail reacquire");
    pair.source.must(&format!("out {}", pair.relay.uri));
    pair.end_in("held", "failed");
    let why = value(&mut pair.source, "error");
    assert!(why.contains("vmig_resolve") && why.contains("reacquire hook (epoch 3)"), "{why}");
    refuses(&mut pair.source, "start", libc::EPERM);
    refuses(&mut pair.source, "resolve run", libc::EDOM);
    pair.source.must("resolve discard");
    pair.source.must_end_in("failed");
    refuses(&mut pair.source, "start", libc::EPERM);
    pair.quit();
}

#[test]
fn a_guest_whose_source_died_is_saved_or_refused() {
    for (word, state, after) in
        [("run", "completed", "start announce"), ("discard", "failed", "release=2"), ("", "failed", "release=2")]
    {
        let mut pair = Pair::with("stranded", GO, if word.is_empty() { 1000 } else { 30_000 });
        pair.until_held();
        pair.source.kill();
        pair.relay.cut();
        until(&mut pair.destination, "switchover-unknown");
        refuses(&mut pair.destination, "start", libc::EPERM);
        assert_eq!(hooks(&mut pair.destination), "reacquire=2");
        if word == "run" {
            // A start that fails changes nothing.
            pair.destination.must("fail start");
            refuses(&mut pair.destination, "resolve run", libc::EDOM);
            assert_eq!(hooks(&mut pair.destination), "start");
            assert_eq!(pair.destination.status_text("state"), "switchover-unknown");
            pair.destination.must("fail none");
        }
        if !word.is_empty() {
            pair.destination.must(&format!("resolve {word}"));
        }
        pair.destination.must_end_in(state);
        assert_eq!(hooks(&mut pair.destination), after, "{word}");
        counts(&mut pair.destination, word == "run");
        pair.destination.quit();
    }
}

#[test]
fn a_cancel_at_the_source_is_obeyed_until_go() {
    for word in [PREPARE, READY] {
        let mut pair = Pair::new("cancel", word);
        pair.until_held();
        pair.source.must("cancel");
        pair.source.must("cancel");
        pair.source.must_end_in("cancelled");
        assert_eq!(hooks(&mut pair.source), "stop release=1 reacquire=3 start");
        pair.relay.cut();
        pair.destination.must_end_in("failed");
        assert_eq!(value(&mut pair.destination, "memory"), "0", "nothing of the guest is left");
        pair.stayed();
        pair.moves_after_all();
        pair.quit();
    }
    for word in [GO, VOTE] {
        let mut pair = Pair::new("cancel-late", word);
        pair.until_held();
        refuses(&mut pair.source, "cancel", libc::EBUSY);
        pair.relay.pass();
        pair.end_in("completed", "completed");
        pair.left();
        pair.quit();
    }
}

#[test]
fn a_cancel_in_a_hook_of_the_source_is_obeyed() {
    let mut pair = Pair::new("cancel-hook", VOTE);
    pair.relay.pass();
    pair.source.must("hold release");
    pair.source.must(&format!("out {}", pair.relay.uri));
    pair.source.await_news("note held");
    pair.source.must("cancel");
    pair.source.must("hold none");
    pair.end_in("cancelled", "failed");
    assert_eq!(hooks(&mut pair.source), "stop release=1 reacquire=3 start");
    pair.stayed();
    pair.quit();
}

#[test]
fn a_cancel_at_the_destination_is_obeyed_until_go() {
    let mut pair = Pair::new("cancel-there", GO);
    pair.until_held();
    pair.destination.must("cancel");
    pair.end_in("failed", "cancelled");
    assert_eq!(hooks(&mut pair.destination), "reacquire=2 release=2");
    pair.relay.pass();
    pair.stayed();
    pair.moves_after_all();
    pair.quit();

    let mut pair = Pair::new("cancel-there-late", VOTE);
    pair.relay.pass();
    pair.destination.must("hold start");
    pair.source.must(&format!("out {}", pair.relay.uri));
    pair.destination.await_news("note held");
    refuses(&mut pair.destination, "cancel", libc::EBUSY);
    pair.destination.must("hold none");
    pair.end_in("completed", "completed");
    pair.quit();
}

#[test]
fn a_paused_guest_arrives_paused() {
    let mut pair = Pair::new("paused", VOTE);
    pair.relay.pass();
    pair.source.must("stop");
    pair.source.must(&format!("out {}", pair.relay.uri));
    pair.end_in("completed", "completed");
    assert_eq!(hooks(&mut pair.source), "stop release=1");
    assert_eq!(hooks(&mut pair.destination), "reacquire=2");
    assert_eq!(value(&mut pair.destination, "reasons"), "1");
    counts(&mut pair.destination, false);
    pair.destination.must("start");
    pair.left();
    pair.quit();
}

#[test]
fn a_user_is_asked_before_the_switchover() {
    let mut pair = Pair::new("asked", VOTE);
    pair.relay.pass();
    refuses(&mut pair.source, "continue", libc::EINVAL);
    for (name, value) in [("pause-before-switchover", "on"), ("switchover-ack", "on")] {
        pair.source.must(&format!("set {name} {value}"));
    }
    pair.source.must(&format!("out {}", pair.relay.uri));
    until(&mut pair.source, "pre-switchover");
    assert_eq!(hooks(&mut pair.source), "stop", "nothing is released yet");
    pair.source.must("cancel");
    pair.end_in("cancelled", "failed");
    assert_eq!(hooks(&mut pair.source), "start", "nothing had to be taken back");
    pair.stayed();
    pair.destination.send("in tcp::0");
    let address = pair.destination.listening();
    pair.source.must(&format!("out {address}"));
    until(&mut pair.source, "pre-switchover");
    pair.source.must("continue");
    pair.end_in("completed", "completed");
    assert_eq!(hooks(&mut pair.source), "stop release=1");
    pair.left();
    pair.quit();
}

/// A question on a connection of its own, and its answer.
fn asked(address: &str, ask: &Ask) -> Reply {
    let mut stream = TcpStream::connect(address.strip_prefix("tcp:").unwrap()).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut bytes = Vec::new();
    ask::put(&mut bytes, ask);
    // In two pieces: the first four bytes are not all of it.
    stream.write_all(&bytes[..7]).unwrap();
    std::thread::sleep(Duration::from_millis(5));
    stream.write_all(&bytes[7..]).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    reply::read(&mut Slice::new(&answer)).unwrap()
}

/// The attempt of what a source said: from its hello, and its GO.
fn attempt_of(said: &[u8]) -> Ask {
    let text = String::from_utf8_lossy(said);
    let id = text.split("\"migration\":\"").nth(1).unwrap().get(..32).unwrap();
    let at = said.windows(5).position(|bytes| bytes == [8, 0x56, 0x11, 0, 16]).unwrap() + 5;
    let number = |at: usize| u64::from_be_bytes(said[at..at + 8].try_into().unwrap());
    Ask { migration: MigrationId::parse(id).unwrap(), epoch: number(at), incarnation: number(at + 8) }
}

#[test]
fn votes_are_told_to_those_who_know_the_attempt_for_as_long_as_the_handle_lives() {
    let mut pair = Pair::new("votes", VOTE);
    pair.until_held();
    let ask = attempt_of(&pair.relay.said());
    pair.relay.pass();
    pair.end_in("completed", "completed");
    let vote = |ask: &Ask| match asked(&pair.address, ask) {
        Reply::Vote(_, _, vote) => vote,
        other => panic!("{other:?}"),
    };
    assert_eq!(vote(&ask), reply::OWNED);
    assert_eq!(vote(&Ask { migration: MigrationId([7; 16]), ..ask }), reply::UNKNOWN);
    assert_eq!(vote(&Ask { epoch: ask.epoch + 1, ..ask }), reply::UNKNOWN);
    assert_eq!(vote(&Ask { incarnation: !ask.incarnation, ..ask }), reply::UNKNOWN);
    // Strangers who say nothing, or something else, keep nobody else from asking.
    let there = pair.address.strip_prefix("tcp:").unwrap();
    let silent: Vec<TcpStream> = (0..8).map(|_| TcpStream::connect(there).unwrap()).collect();
    let mut half = TcpStream::connect(there).unwrap();
    half.write_all(b"VAS").unwrap();
    let mut other = TcpStream::connect(there).unwrap();
    other.write_all(b"QEVM and so on").unwrap();
    assert_eq!(other.read(&mut [0]).unwrap_or(0), 0, "nobody is expected any more");
    assert_eq!(vote(&ask), reply::OWNED);
    drop((silent, half));
    // The guest leaves again, and the vote stands.
    std::mem::swap(&mut pair.source, &mut pair.destination);
    pair.moves_after_all();
    assert_eq!(asked(&pair.address, &ask), Reply::Vote(ask.epoch, ask.incarnation, reply::OWNED));
    pair.quit();
}

#[test]
fn a_refused_attempt_is_answered_never() {
    let mut pair = Pair::with("votes-never", GO, 300);
    pair.until_held();
    let ask = attempt_of(&pair.relay.said());
    pair.end_in("failed", "failed");
    assert_eq!(asked(&pair.address, &ask), Reply::Vote(ask.epoch, ask.incarnation, reply::NEVER));
    // The address that was kept takes another source in.
    pair.destination.send(&format!("in {}", pair.address));
    let address = pair.destination.listening();
    assert_eq!(address, pair.address);
    pair.source.must(&format!("out {address}"));
    pair.end_in("completed", "completed");
    assert_eq!(asked(&pair.address, &ask), Reply::Vote(ask.epoch, ask.incarnation, reply::NEVER));
    pair.quit();
}

#[test]
fn a_handle_is_freed_in_every_state() {
    // Whoever waits: the source for an answer, the destination for GO, either for an operator.
    let mut pair = died("free-unknown", GO);
    pair.source.quit();

    pair = Pair::new("free-asking", GO);
    pair.until_held();
    pair.destination.kill();
    pair.relay.cut();
    until(&mut pair.source, "switchover-unknown");
    pair.source.quit();

    pair = Pair::new("free-ready", GO);
    pair.until_held();
    pair.destination.quit();
    pair.source.must_end_in("failed");
    counts(&mut pair.source, true);
    pair.source.quit();

    pair = Pair::new("free-stranded", GO);
    pair.until_held();
    pair.source.kill();
    pair.relay.cut();
    until(&mut pair.destination, "switchover-unknown");
    pair.destination.quit();
}
