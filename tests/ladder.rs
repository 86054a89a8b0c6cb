//! Guests that dirty more than the link takes, led up the ladder to each of its ends: tests/c/gated.c (a software guest behind
//! a gate) and tests/c/slots.c (a KVM guest with a dirty ring) in separate processes.
#![allow(clippy::unwrap_used, reason = "a test")]

#[path = "common/program.rs"]
mod program;

mod common;

use std::path::Path;
use std::time::{Duration, Instant};

use program::Program;

/// How long anything here may take.
const PATIENCE: Duration = Duration::from_secs(100);

fn number(vmm: &mut Program, command: &str) -> u64 {
    let line = vmm.command(command);
    let found = line.strip_prefix("value ").and_then(|n| n.parse().ok());
    found.unwrap_or_else(|| vmm.fail(&format!("'{command}' was answered by '{line}'")))
}

/// A number of the line that a command answers with.
fn part(vmm: &mut Program, command: &str, name: &str) -> u64 {
    let line = vmm.command(command);
    let value = line.split(' ').find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
    value.and_then(|n| n.parse().ok()).unwrap_or_else(|| vmm.fail(&format!("no {name} in '{line}'")))
}

fn slow(vmm: &mut Program, name: &str) -> u64 {
    part(vmm, "slow", name)
}

fn until(vmm: &mut Program, what: &str, mut is: impl FnMut(&mut Program) -> bool) {
    let end = Instant::now() + PATIENCE;
    while !is(vmm) {
        if Instant::now() > end {
            let now = vmm.command("slow");
            vmm.fail(&format!("{what}: not in time; {now}"));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn must_live(vmm: &mut Program) {
    let before = number(vmm, "counter");
    until(vmm, "the guest runs", |vmm| number(vmm, "counter") > before);
}

/// A source whose guest writes 2 MiB over and over, and its destination, with a link of 1 MiB/s, on their way.
fn climbing(dir: &Path, options: &[&str]) -> (Program, Program) {
    let start = |name, role| Program::start(name, dir, &common::c_program("gated"), &[role, "2"]);
    let (mut a, mut b) = (start("a", "guest"), start("b", "empty"));
    // Until it wrote all of its memory there is less to send.
    until(&mut a, "the guest goes round", |a| number(a, "counter") > 400_000);
    for option in ["ladder on", "max-bandwidth 1M"].iter().chain(options) {
        a.must(&format!("set {option}"));
    }
    go(&mut a, &mut b);
    (a, b)
}

fn go(a: &mut Program, b: &mut Program) {
    b.send("incoming tcp:127.0.0.1:0");
    let address = b.listening();
    a.must(&format!("migrate {address}"));
}

/// Nothing is left of what slowed the guest down, and another attempt without it succeeds.
fn is_as_before(mut a: Program, mut b: Program) {
    assert_eq!(number(&mut a, "throttlers"), 0, "the guest is still throttled");
    must_live(&mut a);
    b.must_end_in("failed");
    a.must("set max-bandwidth 0");
    a.must("set downtime-limit 300");
    go(&mut a, &mut b);
    arrives(a, b);
}

fn arrives(mut a: Program, mut b: Program) {
    a.must_end_in("completed");
    b.must_end_in("completed");
    assert_eq!((number(&mut a, "throttlers"), number(&mut b, "throttlers")), (0, 0));
    must_live(&mut b);
    b.must("pause");
    b.must("check");
    a.quit();
    b.quit();
}

#[test]
fn a_longer_downtime_is_enough() {
    let dir = common::scratch("ladder");
    let trace = dir.join("trace");
    let to_trace = format!("trace-file {}", trace.display());
    let (mut a, b) = climbing(&dir, &["downtime-limit 250", "ladder-downtime-max 6000", &to_trace]);
    a.must_end_in("completed");
    let (steps, limit) = (slow(&mut a, "ladder"), slow(&mut a, "downtime-limit"));
    assert!((1..=5).contains(&steps) && limit > 250 && limit <= 6000, "{steps} steps to {limit} ms");
    assert_eq!(slow(&mut a, "throttle"), 0);
    let trace = std::fs::read_to_string(trace).unwrap();
    let told = trace.lines().filter(|line| line.contains("\"event\":\"ladder\""));
    assert_eq!(told.clone().count() as u64, steps, "{trace}");
    assert!(told.clone().all(|line| line.contains("\"step\":\"downtime\"")), "{trace}");
    arrives(a, b);
}

#[test]
fn when_no_downtime_would_do_the_guest_is_throttled_and_in_the_end_it_fails() {
    let dir = common::scratch("ladder");
    let (mut a, b) = climbing(&dir, &["downtime-limit 20", "ladder-downtime-max 40", "max-cpu-throttle 30"]);
    let mut seen = Vec::new();
    until(&mut a, "it fails", |a| {
        let percent = slow(a, "throttle");
        if percent > 0 && seen.last() != Some(&percent) {
            seen.push(percent);
            let told = a.command("qmp {\"execute\": \"query-migrate\"}");
            assert!(told.contains(&format!("\"cpu-throttle-percentage\":{percent}")), "{told}");
            assert!(told.contains("\"x-ladder\":{"), "{told}");
            // It may fail just now, and let the guest go.
            assert!(number(a, "throttlers") == 1 || a.status_text("state") == "failed");
        }
        a.status_text("state") == "failed"
    });
    assert_eq!(seen, [20, 30], "the options' steps");
    assert_eq!(slow(&mut a, "ladder"), 3, "two of them, and one for the downtime");
    let why = a.command("error");
    for words in [
        "does not converge",
        "at most 40",
        "throttled by 30 %",
        "bytes were left",
        "\"errno\":110",
        "\"option\":\"ladder\"",
    ] {
        assert!(why.contains(words), "no '{words}' in {why}");
    }
    is_as_before(a, b);
}

#[test]
fn its_time_is_bounded() {
    let dir = common::scratch("ladder");
    let (mut a, b) =
        climbing(&dir, &["downtime-limit 20", "ladder-downtime-max 20", "ladder-time 1", "cpu-throttle-initial 80"]);
    a.must_end_in("failed");
    let why = a.command("error");
    assert!(why.contains("ladder-time") && why.contains("throttled by 80 %"), "{why}");
    assert_eq!(slow(&mut a, "ladder"), 1);
    is_as_before(a, b);
}

#[test]
fn a_cancel_ends_it() {
    let dir = common::scratch("ladder");
    let (mut a, b) = climbing(&dir, &["downtime-limit 20", "ladder-downtime-max 20"]);
    until(&mut a, "throttled", |a| slow(a, "throttle") > 0);
    a.must("cancel");
    a.must_end_in("cancelled");
    is_as_before(a, b);
}

#[test]
fn a_throttled_guest_arrives_at_full_speed() {
    let dir = common::scratch("ladder");
    let (mut a, b) = climbing(&dir, &["downtime-limit 20", "ladder-downtime-max 20"]);
    until(&mut a, "throttled", |a| slow(a, "throttle") > 0);
    a.must("set max-bandwidth 0");
    arrives(a, b);
}

/// A broken connection: the guest need not be slow for a link that is not there.
#[test]
fn while_it_reconnects_the_guest_is_not_slowed_down() {
    let dir = common::scratch("ladder");
    let start = |name, role| Program::start(name, &dir, &common::c_program("gated"), &[role, "2"]);
    let (mut a, mut b) = (start("a", "guest"), start("b", "empty"));
    must_live(&mut a);
    let options =
        ["ladder on", "max-bandwidth 1M", "downtime-limit 20", "ladder-downtime-max 20", "resume-timeout 600000"];
    for option in options {
        a.must(&format!("set {option}"));
    }
    go(&mut a, &mut b);
    until(&mut a, "throttled", |a| slow(a, "throttle") > 0);
    let steps = slow(&mut a, "ladder");
    b.kill();
    until(&mut a, "reconnecting", |a| a.status_text("state") == "reconnecting");
    until(&mut a, "at full speed", |a| number(a, "throttlers") == 0);
    assert_eq!((slow(&mut a, "throttle"), slow(&mut a, "ladder")), (0, steps));
    must_live(&mut a);
    a.must("cancel");
    a.must_end_in("cancelled");
    a.quit();
}

#[test]
fn it_does_not_go_with_what_it_does_itself() {
    let dir = common::scratch("ladder");
    let mut a = Program::start("a", &dir, &common::c_program("gated"), &["guest", "1"]);
    a.must("set ladder on");
    for (option, words) in
        [("auto-converge", "slows the guest down by itself"), ("dirty-limit", "slows the guest down by itself")]
    {
        a.must(&format!("set {option} on"));
        let said = a.command("migrate tcp:127.0.0.1:1");
        assert!(said.contains(words), "{said}");
        a.must(&format!("set {option} off"));
    }
    a.must("set ladder off");
    a.must("set dirty-limit on");
    assert!(a.command("migrate tcp:127.0.0.1:1").contains("needs KVM's dirty rings"));
    a.must("set auto-converge on");
    assert!(a.command("migrate tcp:127.0.0.1:1").contains("do not go together"));
    a.quit();
}

/// A KVM guest with a ring of 1024 entries that writes all over 24 MiB; none if KVM has no rings here.
fn with_ring(dir: &Path) -> Option<(Program, Program)> {
    if common::without_kvm() {
        return None;
    }
    if kvm_ioctls::Kvm::new().unwrap().check_extension_int(kvm_ioctls::Cap::DirtyLogRing) == 0 {
        let _ = common::skip("kvm", "KVM has no dirty rings here");
        return None;
    }
    let start = |name, args: &[&str]| {
        let program = Program::start(name, dir, &common::c_program("slots"), args);
        assert_eq!(program.reply(), "ready");
        program
    };
    Some((start("a", &["ring=1024"]), start("b", &["incoming", "ring=1024"])))
}

/// Whether writes are logged: somebody takes them from the ring.
fn harvests(vmm: &mut Program) -> bool {
    vmm.command("qmp {\"execute\": \"query-migrationthreads\"}").contains("\"dirty_ring\"")
}

fn batches(vmm: &mut Program) -> u64 {
    vmm.command("batches").strip_prefix("batches ").unwrap().parse().unwrap()
}

fn runs(vmm: &mut Program) {
    let before = batches(vmm);
    until(vmm, "the guest runs", |vmm| batches(vmm) > before + 3);
}

fn arrives_whole(mut a: Program, mut b: Program) {
    a.must_end_in("completed");
    b.must_end_in("completed");
    let arrived = b.await_news("hashed");
    assert_eq!(a.command("hash").strip_prefix("hash"), arrived.strip_prefix("hashed"), "memory differs");
    assert_eq!(part(&mut a, "dirt", "limit"), 0);
    runs(&mut b);
    a.quit();
    b.quit();
}

#[test]
fn by_rings_vcpus_are_limited() {
    let dir = common::scratch("ladder");
    for (by, first) in [("ladder", 3 << 20), ("dirty-limit", 3 << 20), ("dirty-limit", 0)] {
        let Some((mut a, mut b)) = with_ring(&dir) else { return };
        let mb = (first >> 20).to_string();
        let set = [(by, "on"), ("downtime-limit", "20"), ("ladder-downtime-max", "20"), ("vcpu-dirty-limit", &mb)];
        for (option, value) in set {
            a.must(&format!("set {option} {value}"));
        }
        a.must("set max-bandwidth 8M");
        go(&mut a, &mut b);
        until(&mut a, "limited", |a| slow(a, "dirty-limit") > 0);
        let limit = slow(&mut a, "dirty-limit");
        let fits = match first {
            // Half of what is sent.
            0 => (1 << 20..8 << 20).contains(&limit),
            first => limit == first,
        };
        assert!(fits, "{by}: {limit}");
        assert_eq!((part(&mut a, "dirt", "limit"), slow(&mut a, "throttle")), (limit, 0));
        until(&mut a, "it stands at its ring", |a| part(a, "dirt", "throttle") > 50);
        let told = a.command("qmp {\"execute\": \"query-migrate\"}");
        assert!(told.contains("\"dirty-limit-throttle-time-per-round\":"), "{told}");
        runs(&mut a);
        if by == "ladder" {
            until(&mut a, "each step halves it", |a| slow(a, "dirty-limit") < limit);
        }
        a.must("cancel");
        a.must_end_in("cancelled");
        until(&mut a, "full speed again", |a| part(a, "dirt", "limit") == 0);
        runs(&mut a);
        b.must_end_in("failed");
        a.must("set max-bandwidth 0");
        a.must("set downtime-limit 300");
        go(&mut a, &mut b);
        arrives_whole(a, b);
    }
}

/// Without a migration, by the C API and QMP; and a migration of a guest that is limited anyway.
#[test]
fn a_limit_needs_no_migration() {
    let dir = common::scratch("limit");
    let Some((mut a, mut b)) = with_ring(&dir) else { return };
    let qmp = |a: &mut Program, request: &str| a.command(&format!("qmp {request}"));
    let query = "{\"execute\": \"query-vcpu-dirty-limit\"}";
    assert_eq!(qmp(&mut a, query), "value {\"return\":[]}");
    a.must("limit 4194304");
    assert!(harvests(&mut a));
    until(&mut a, "limited", |a| part(a, "dirt", "throttle") > 50);
    runs(&mut a);
    let set = "{\"execute\": \"set-vcpu-dirty-limit\", \"arguments\": {\"cpu-index\": 0, \"dirty-rate\": 6}}";
    assert_eq!(qmp(&mut a, set), "value {\"return\":{}}");
    assert!(qmp(&mut a, query).contains("\"limit-rate\":6"));
    assert!(qmp(&mut a, &set.replace(": 0,", ": 7,")).contains("no vCPU 7"));
    // The migration's own limit is the lower one while it lasts.
    for option in ["dirty-limit on", "vcpu-dirty-limit 2", "max-bandwidth 2M", "downtime-limit 10"] {
        a.must(&format!("set {option}"));
    }
    go(&mut a, &mut b);
    until(&mut a, "limited further", |a| part(a, "dirt", "limit") == 2 << 20);
    a.must("cancel");
    a.must_end_in("cancelled");
    until(&mut a, "the limit of before", |a| part(a, "dirt", "limit") == 6 << 20);
    until(&mut a, "and it is obeyed", |a| part(a, "dirt", "throttle") > 50);
    b.must_end_in("failed");
    a.must("set dirty-limit off");
    a.must("set max-bandwidth 0");
    a.must("set downtime-limit 300");
    go(&mut a, &mut b);
    a.must_end_in("completed");
    b.must_end_in("completed");
    let arrived = b.await_news("hashed");
    assert_eq!(a.command("hash").strip_prefix("hash"), arrived.strip_prefix("hashed"), "memory differs");
    assert_eq!(qmp(&mut a, "{\"execute\": \"cancel-vcpu-dirty-limit\"}"), "value {\"return\":{}}");
    assert_eq!(qmp(&mut a, query), "value {\"return\":[]}");
    b.must("limit -1073741824");
    b.must("limit 1048576");
    assert!(harvests(&mut b));
    until(&mut b, "limited here", |b| part(b, "dirt", "throttle") > 50);
    a.must("limit 1048576");
    a.quit();
    b.must("limit -0");
    assert!(!harvests(&mut b), "nobody wants it any more");
    runs(&mut b);
    b.quit();
}
