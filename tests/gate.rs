//! A VMM without pause logic, whose vCPU threads go through a gate: tests/c/gated.c in separate processes.

#[path = "common/program.rs"]
mod program;

mod common;

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use program::Program;

fn gated(name: &str, dir: &Path, role: &str, vcpus: &str) -> Program {
    Program::start(name, dir, &common::c_program("gated"), &[role, vcpus])
}

fn number(vmm: &mut Program, command: &str) -> u64 {
    let line = vmm.command(command);
    let found = line.strip_prefix("value ").and_then(|n| n.parse().ok());
    found.unwrap_or_else(|| vmm.fail(&format!("'{command}' was answered by '{line}'")))
}

fn must_live(vmm: &mut Program) {
    let before = number(vmm, "counter");
    let end = Instant::now() + Duration::from_secs(60);
    while number(vmm, "counter") == before {
        assert!(Instant::now() < end, "{}: the guest stands still at {before}", vmm.name);
    }
}

#[test]
fn a_guest_moves_there_and_back_through_the_gate() {
    for vcpus in ["1", "6", "24"] {
        let dir = common::scratch("gate");
        let (mut a, mut b) = (gated("a", &dir, "guest", vcpus), gated("b", &dir, "empty", vcpus));
        must_live(&mut a);
        for _ in 0..3 {
            b.send("incoming tcp:127.0.0.1:0");
            let address = b.listening();
            a.must(&format!("migrate {address}"));
            a.must_end_in("completed");
            b.must_end_in("completed");
            must_live(&mut b);
            b.must("pause");
            b.must("check");
            let stopped = number(&mut b, "counter");
            std::thread::sleep(Duration::from_millis(20));
            assert_eq!(number(&mut b, "counter"), stopped, "a paused guest runs");
            b.must("resume");
            std::mem::swap(&mut a, &mut b);
        }
        a.quit();
        b.quit();
    }
}

/// The guest dirties more than the limit lets go, and no downtime would do: it is slowed down until it fits.
#[test]
fn a_guest_that_does_not_converge_is_throttled_by_the_gate() {
    let dir = common::scratch("throttle");
    let (mut a, mut b) = (gated("a", &dir, "guest", "2"), gated("b", &dir, "empty", "2"));
    for option in ["auto-converge on", "max-bandwidth 1M", "downtime-limit 20"] {
        a.must(&format!("set {option}"));
    }
    must_live(&mut a);
    b.send("incoming tcp:127.0.0.1:0");
    let address = b.listening();
    a.must(&format!("migrate {address}"));
    let end = Instant::now() + Duration::from_secs(60);
    let mut seen = Vec::new();
    while seen.len() < 3 {
        assert!(Instant::now() < end, "throttled by {seen:?} only");
        let percent = number(&mut a, "throttled");
        if percent > 0 && seen.last() != Some(&percent) {
            seen.push(percent);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(seen, [20, 30, 40], "QEMU's steps");
    let told = a.command("qmp {\"execute\": \"query-migrate\"}");
    assert!(told.contains("\"cpu-throttle-percentage\":40"), "{told}");
    must_live(&mut a);
    a.must("set max-bandwidth 0");
    a.must_end_in("completed");
    b.must_end_in("completed");
    let told = a.command("qmp {\"execute\": \"query-migrate\"}");
    assert!(told.contains("\"completed\"") && !told.contains("throttle"), "{told}");
    must_live(&mut b);
    b.must("pause");
    b.must("check");
    a.quit();
    b.quit();
}

fn runs_through(word: &str) {
    let out = common::run(Command::new("timeout").args(["-k", "5", "60"]).arg(common::c_program("gated")).arg(word));
    assert!(common::words(&out).contains("done"));
}

#[test]
fn misuse_is_refused() {
    runs_through("misuse");
}

/// The one that is refused leaves nothing behind: the other is told to come out, and named.
#[test]
fn two_threads_as_one_vcpu_are_told_apart() {
    runs_through("twins");
}
