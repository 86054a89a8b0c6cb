//! A KVM guest whose VMM has no pause logic, or one thread only: tests/c/slots.c with the library's gate around KVM_RUN,
//! with `dispatch=manual`, and with connections that break on the way. Its memory arrives whole by every tracker.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;
#[path = "common/program.rs"]
mod program;
#[path = "resume/relay.rs"]
mod relay;

use common::{c_program, scratch, skip, without_kvm};
use kvm_ioctls::Kvm;
use program::Program;
use relay::Relay;
use std::path::Path;
use std::time::{Duration, Instant};
use vmig::dirty::write_protect::WriteProtect;

fn start(dir: &Path, name: &str, words: &[&str]) -> Program {
    let program = Program::start(name, dir, &c_program("slots"), words);
    assert_eq!(program.reply(), "ready");
    program
}

fn number(program: &mut Program, what: &str) -> u64 {
    let line = program.command(what);
    line.strip_prefix(what).and_then(|n| n.trim().parse().ok()).unwrap_or_else(|| program.fail(&line))
}

fn until(program: &mut Program, what: &str, is: impl Fn(&mut Program) -> bool) {
    let end = Instant::now() + program::MOVE;
    while !is(program) {
        if Instant::now() > end {
            let (why, now) = (program.command("error"), program.command("status"));
            program.fail(&format!("it is not {what}: {why}, {now}"));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The guest runs: it wrote more.
fn runs(program: &mut Program) {
    let goal = number(program, "batches") + 20;
    until(program, "running", |program| number(program, "batches") >= goal);
}

/// Kinds of VMM, and what each tracker is called there; none where this machine lacks it.
fn trackers() -> Vec<(Option<&'static str>, &'static str)> {
    let ring = Kvm::new().unwrap().check_extension_int(kvm_ioctls::Cap::DirtyLogRing) > 0;
    let protects = !WriteProtect::new().is_err_and(|e| skip("userfaultfd", e.text()));
    let mut found = vec![(None, "kvm-log")];
    found.extend((ring || !skip("kvm", "this KVM has no dirty rings")).then_some((Some("ring=1024"), "kvm-ring")));
    found.extend(protects.then_some((None, "write-protect")));
    found
}

/// Moves the guest on over connections that break `breaks` times while it runs.
fn moves(source: &mut Program, destination: &mut Program, tracker: &str, breaks: u64) {
    for option in [
        format!("dirty-tracker {tracker}").as_str(),
        "max-bandwidth 4M",
        if breaks > 0 { "resume-timeout 60000" } else { "resume-timeout 0" },
    ] {
        source.must(&format!("set {option}"));
    }
    destination.send("incoming tcp:127.0.0.1:0");
    let relay = Relay::new(&destination.listening());
    source.must(&format!("migrate {}", relay.uri));
    let active = |program: &mut Program| program.status_text("state") == "active";
    until(source, "active", active);
    let stops = number(source, "stops");
    for turn in 0..breaks {
        // In the middle of whatever it carries, so that pages of it are lost.
        let came = relay.came();
        relay.cut_after(1 + (turn * 77_777) % 500_000);
        until(source, "connected again", |_| relay.came() > came);
        until(source, "active", active);
        until(destination, "active", active);
        source.must("flash 1");
        runs(source);
    }
    assert_eq!(number(source, "stops"), stops, "the guest runs on");
    assert!(source.command("tracker").contains(tracker));
    source.must("set max-bandwidth 0");
    source.must_end_in("completed");
    destination.must_end_in("completed");
    let arrived = destination.news("hashed").pop().unwrap();
    assert_eq!(source.command("hash").strip_prefix("hash"), arrived.strip_prefix("hashed"), "memory differs");
    let stood = number(source, "batches");
    runs(destination);
    assert_eq!(number(source, "batches"), stood, "the guest that left stands still");
    assert_eq!(number(source, "stops"), stops + 1);
}

/// There and back, by every tracker.
fn everywhere(name: &str, words: &[&str], breaks: u64) {
    for (ring, tracker) in trackers() {
        let dir = scratch(name);
        let words: Vec<&str> = words.iter().copied().chain(ring).collect();
        let mut a = start(&dir, "a", &words);
        let mut b = start(&dir, "b", &[&words[..], &["incoming"]].concat());
        runs(&mut a);
        moves(&mut a, &mut b, tracker, breaks);
        moves(&mut b, &mut a, tracker, breaks);
        a.quit();
        b.quit();
    }
}

#[test]
fn a_guest_of_kvm_goes_through_the_gate() {
    if !without_kvm() {
        everywhere("kvm-gate", &["gate"], 0);
    }
}

#[test]
fn a_guest_of_kvm_has_a_vmm_with_one_thread() {
    if !without_kvm() {
        everywhere("kvm-manual", &["manual"], 0);
        everywhere("kvm-manual-gate", &["manual", "gate"], 0);
    }
}

#[test]
fn what_a_broken_connection_lost_is_sent_again_by_every_tracker() {
    if !without_kvm() {
        everywhere("kvm-breaks", &[], 4);
        everywhere("kvm-manual-breaks", &["manual", "gate"], 3);
    }
}
