//! A VMM with one thread (`dispatch=manual`), whose loop is busy 50 ms at a time: tests/c/single.c in separate processes.

#[path = "common/program.rs"]
mod program;

mod common;
#[path = "resume/relay.rs"]
mod relay;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use program::Program;
use relay::Relay;

/// Longer than a sleepy VMM is given to dispatch, and much longer than a busy one needs.
const SLEEP_MS: u32 = 900;

fn single(name: &str, dir: &Path, role: &str) -> Program {
    Program::start(name, dir, &common::c_program("single"), &[role])
}

fn fact(vmm: &mut Program, key: &str) -> u64 {
    let line = vmm.command("facts");
    let found = line.split(' ').find_map(|w| w.strip_prefix(key)?.strip_prefix('=')?.parse().ok());
    found.unwrap_or_else(|| vmm.fail(&format!("no {key} in '{line}'")))
}

/// The guest makes progress here.
fn must_live(vmm: &mut Program) {
    let counter = |vmm: &mut Program| vmm.command("counter");
    let before = counter(vmm);
    let end = Instant::now() + Duration::from_secs(30);
    while counter(vmm) == before {
        assert!(Instant::now() < end, "{}: the guest stands still at {before}", vmm.name);
    }
}

fn moved(from: &mut Program, to: &mut Program) {
    to.send("incoming tcp:127.0.0.1:0");
    let address = to.listening();
    from.must(&format!("migrate {address}"));
}

#[test]
fn a_guest_goes_there_and_back_between_loops_that_are_busy() {
    let dir = common::scratch("single");
    let (mut a, mut b) = (single("a", &dir, "guest"), single("b", &dir, "empty"));
    must_live(&mut a);
    for _ in 0..2 {
        moved(&mut a, &mut b);
        a.must_end_in("completed");
        b.must_end_in("completed");
        assert_eq!((fact(&mut a, "running"), fact(&mut a, "one-go")), (0, 1), "from stop to save in one go");
        assert!(fact(&mut a, "syncs") > 1 && fact(&mut a, "clears") > 0, "the dirty source is asked");
        assert_eq!(fact(&mut b, "built"), 1, "who is a destination is built once");
        must_live(&mut b);
        // The guest that is gone stands still, and the one that came is whole.
        b.must("pause");
        b.must("check");
        b.must("resume");
        std::mem::swap(&mut a, &mut b);
    }
    a.quit();
    b.quit();
}

#[test]
fn calls_that_wait_run_the_callbacks_themselves() {
    let dir = common::scratch("single");
    let (mut a, mut b) = (single("a", &dir, "guest"), single("b", &dir, "empty"));
    moved(&mut a, &mut b);
    // From here on neither loop turns: everything happens inside vmig_wait.
    b.send("wait");
    a.must("wait");
    assert_eq!(b.reply(), "ok");
    a.must_end_in("completed");
    must_live(&mut b);
    a.quit();
    b.quit();
}

#[test]
fn freeing_the_guest_amid_a_migration_waits_for_nobody() {
    for pages in ["max-bandwidth 1M", "max-bandwidth 0"] {
        let dir = common::scratch("single");
        let (mut a, mut b) = (single("a", &dir, "guest"), single("b", &dir, "empty"));
        a.must(&format!("set {pages}"));
        moved(&mut a, &mut b);
        // vmig_free comes without another turn of the loop; the program checks that each setup had its cleanup.
        a.quit();
        b.ended_in();
        b.quit();
    }
}

fn until(vmm: &mut Program, state: &str) {
    let end = Instant::now() + program::MOVE;
    while vmm.status_text("state") != state {
        if Instant::now() > end {
            let why = vmm.command("error");
            vmm.fail(&format!("it is not {state}: {why}"));
        }
    }
}

/// A guest on its way to a destination, through a network that can break, and too slow a way to arrive.
fn under_way(dir: &Path, channels: usize, options: &[&str]) -> (Program, Program, Relay) {
    let (mut a, mut b) = (single("a", dir, "guest"), single("b", dir, "empty"));
    a.must("set resume-timeout 60000");
    a.must(if channels == 0 { "set multifd off" } else { "set multifd-channels 2" });
    // Slow enough not to arrive; without that limit it does at once, however busy the machine is.
    for option in ["max-bandwidth 4M", "downtime-limit 1500"].iter().chain(options) {
        a.must(&format!("set {option}"));
    }
    b.send("incoming tcp:127.0.0.1:0");
    let relay = Relay::new(&b.listening());
    a.must(&format!("migrate {}", relay.uri));
    until(&mut a, "active");
    (a, b, relay)
}

/// The guest arrives, whole, and everything that was begun on either side has ended.
fn arrives(mut a: Program, mut b: Program) {
    a.must("set max-bandwidth 0");
    a.must_end_in("completed");
    b.must_end_in("completed");
    assert!(a.command("throttled").contains("value, ") || a.command("throttled").contains(" 0, "));
    must_live(&mut b);
    b.must("pause");
    b.must("check");
    for vmm in [&mut a, &mut b] {
        assert_eq!(fact(vmm, "setups"), fact(vmm, "cleanups"), "each setup has its cleanup");
    }
    assert_eq!(fact(&mut a, "running"), 0);
    a.quit();
    b.quit();
}

/// Both sides lose the connection and have another.
fn breaks(a: &mut Program, b: &mut Program, relay: &Relay, cut: impl Fn()) {
    let setups = |vmm: &mut Program| fact(vmm, "setups");
    let (here, there, end) = (setups(a), setups(b), Instant::now() + program::MOVE);
    let came = relay.came();
    cut();
    while relay.came() == came || setups(a) == here || setups(b) == there {
        if Instant::now() > end {
            let why = a.command("error");
            a.fail(&format!("there is no other connection: {why}"));
        }
    }
    until(a, "active");
    until(b, "active");
}

#[test]
fn connections_break_and_all_callbacks_come_again_on_the_one_thread() {
    for channels in [0, 2] {
        let dir = common::scratch("single-breaks");
        let (mut a, mut b, relay) = under_way(&dir, channels, &[]);
        for turn in 0..4 {
            breaks(&mut a, &mut b, &relay, || match turn % 2 {
                0 => relay.cut(relay.links() - 1),
                _ => relay.cut_after(1 + 50_000 * turn),
            });
            must_live(&mut a);
            // Only this connection's are under way.
            assert_eq!(fact(&mut a, "setups") - fact(&mut a, "cleanups"), 1);
            assert_eq!(fact(&mut b, "setups") - fact(&mut b, "cleanups"), 1);
            assert_eq!((fact(&mut a, "halts"), fact(&mut b, "built")), (0, 1), "the guest runs on");
        }
        assert!(fact(&mut b, "setups") >= 5);
        arrives(a, b);
    }
}

#[test]
fn a_connection_that_breaks_while_the_one_thread_stops_the_guest_is_resumed() {
    for channels in [0, 2] {
        let dir = common::scratch("single-stop");
        let (mut a, mut b, relay) = under_way(&dir, channels, &[]);
        for turn in 1..=2 {
            a.must("hold");
            a.must("set max-bandwidth 0");
            a.await_news(&format!("note stopped {turn}"));
            relay.cut_all();
            a.must("now go on");
            let end = Instant::now() + program::MOVE;
            while fact(&mut a, "running") == 0 || a.status_text("state") != "active" {
                assert!(Instant::now() < end, "{}", a.command("error"));
            }
            must_live(&mut a);
            assert_eq!((fact(&mut a, "halts"), fact(&mut b, "running")), (turn, 0), "taken back, and runs on");
        }
        arrives(a, b);
    }
}

/// Waits until the throttle hook was told just this, and the status says so.
fn throttled(vmm: &mut Program, steps: &str) {
    let end = Instant::now() + program::MOVE;
    loop {
        let told = vmm.command("throttled");
        let (hook, _) = told.rsplit_once(',').unwrap_or_else(|| vmm.fail(&told));
        if told == steps {
            return;
        }
        assert!(steps.starts_with(hook) && Instant::now() < end, "{told}, not {steps}");
    }
}

#[test]
fn a_guest_that_is_slowed_down_is_let_go_while_there_is_no_connection() {
    let dir = common::scratch("single-slow");
    let options = ["auto-converge on", "max-bandwidth 16M", "downtime-limit 20", "max-cpu-throttle 30"];
    let (mut a, mut b, relay) = under_way(&dir, 0, &options);
    throttled(&mut a, "value 20 30, now 30");
    for steps in ["value 20 30 0", "value 20 30 0 20 30 0"] {
        relay.close(true);
        relay.cut_all();
        until(&mut a, "reconnecting");
        until(&mut b, "reconnecting");
        throttled(&mut a, &format!("{steps}, now 0"));
        relay.close(false);
        until(&mut a, "active");
        throttled(&mut a, &format!("{steps} 20 30, now 30"));
    }
    a.must("set downtime-limit 1500");
    arrives(a, b);
}

#[test]
fn freeing_the_guest_between_two_connections_waits_for_nobody() {
    let dir = common::scratch("single-free");
    let (mut a, mut b, relay) = under_way(&dir, 2, &[]);
    relay.close(true);
    relay.cut_all();
    until(&mut a, "reconnecting");
    until(&mut b, "reconnecting");
    must_live(&mut a);
    // Each has a connection's callbacks to end.
    a.quit();
    b.quit();
}

/// A client's line and the answer to it; `vmm` runs its loop meanwhile.
fn ask(client: &mut BufReader<UnixStream>, command: &str) -> String {
    ask_with(client, command, "{}")
}

/// The same with arguments.
fn ask_with(client: &mut BufReader<UnixStream>, command: &str, arguments: &str) -> String {
    let line = format!("{{\"execute\": \"{command}\", \"arguments\": {arguments}}}");
    writeln!(client.get_mut(), "{line}").expect("a connection of the VMM");
    loop {
        let mut line = String::new();
        client.read_line(&mut line).expect("a connection of the VMM");
        if !line.contains("\"event\"") {
            return line;
        }
    }
}

fn client(vmm: &mut Program, dir: &Path) -> BufReader<UnixStream> {
    let socket = dir.join(format!("{}.qmp", vmm.name));
    vmm.must(&format!("listen unix:{}", socket.display()));
    let stream = UnixStream::connect(&socket).expect("a connection of the VMM");
    stream.set_read_timeout(Some(Duration::from_secs(60))).expect("a connection of the VMM");
    let mut client = BufReader::new(stream);
    client.read_line(&mut String::new()).expect("a connection of the VMM");
    assert!(ask(&mut client, "qmp_capabilities").contains("return"));
    client
}

#[test]
fn commands_of_qmp_call_back_on_the_one_thread() {
    let dir = common::scratch("single");
    let mut vmm = single("a", &dir, "guest");
    let mut client = client(&mut vmm, &dir);
    must_live(&mut vmm);
    for _ in 0..3 {
        assert!(ask(&mut client, "stop").contains("return"));
        assert_eq!(fact(&mut vmm, "running"), 0);
        assert!(ask(&mut client, "query-status").contains("paused"));
        assert!(ask(&mut client, "cont").contains("return"));
        must_live(&mut vmm);
        assert!(ask(&mut client, "double-it").contains("\"twice\":2"));
    }
    let refused = vmm.command("qmp {\"execute\": \"migrate\", \"arguments\": {\"uri\": \"fd:1x\"}}");
    assert!(refused.contains("fd:1x") && !refused.contains("dispatch"), "{refused}");
    vmm.quit();
}

#[test]
fn clients_move_a_guest_of_one_thread() {
    let dir = common::scratch("single");
    let (mut a, mut b) = (single("a", &dir, "guest"), single("b", &dir, "empty"));
    let (mut to_a, mut to_b) = (client(&mut a, &dir), client(&mut b, &dir));
    must_live(&mut a);
    let uri = format!("{{\"uri\": \"unix:{}\"}}", dir.join("m").display());
    a.must("set max-bandwidth 100000");
    for (command, client) in [("migrate-incoming", &mut to_b), ("migrate", &mut to_a)] {
        let answer = ask_with(client, command, &uri);
        assert!(answer.contains("return"), "{answer}");
    }
    // Who waits for the end does what clients ask for, too.
    a.send("wait");
    for _ in 0..3 {
        let busy = ask_with(&mut to_a, "migrate", &uri);
        assert!(busy.contains("in progress"), "{busy}");
    }
    let faster = ask_with(&mut to_a, "migrate-set-parameters", "{\"max-bandwidth\": 0}");
    assert!(faster.contains("return"), "{faster}");
    assert_eq!(a.reply(), "ok");
    b.must_end_in("completed");
    must_live(&mut b);
    a.quit();
    b.quit();
}

#[test]
fn a_command_that_nobody_dispatches_fails_and_freeing_the_guest_waits_for_none() {
    for (command, arguments) in [("stop", "{}"), ("vmig-resolve", r#"{"decision": "run"}"#)] {
        let dir = common::scratch("single");
        let mut vmm = single("a", &dir, "guest");
        let mut client = client(&mut vmm, &dir);
        vmm.must("set dispatch-timeout 200");
        vmm.must(&format!("sleepy 0 {SLEEP_MS}"));
        let failed = ask_with(&mut client, command, arguments);
        assert!(failed.contains("vmig_dispatch() was not called"), "{failed}");
        must_live(&mut vmm);
        vmm.must("set dispatch-timeout 60000");
        vmm.must("sleepy 0 60000");
        // It is being carried out, or was not begun: both are over when the guest is freed.
        writeln!(client.get_mut(), r#"{{"execute": "{command}", "arguments": {arguments}}}"#).unwrap();
        vmm.quit();
    }
}

/// Nobody dispatches from the `n`-th callback on, at one side: the guest must live on exactly one side then, and the
/// error must say what was missing.
fn sleepy_at(n: usize, side: &str) {
    let dir = common::scratch("single");
    let (mut a, mut b) = (single("a", &dir, "guest"), single("b", &dir, "empty"));
    for vmm in [&mut a, &mut b] {
        vmm.must("set dispatch-timeout 200");
        vmm.must("set stall-timeout 20000");
    }
    b.send("incoming tcp:127.0.0.1:0");
    let address = b.listening();
    let sleepy = if side == "source" { &mut a } else { &mut b };
    sleepy.must(&format!("sleepy {n} {SLEEP_MS}"));
    a.must(&format!("migrate {address}"));
    let source = a.ended_in();
    if source == "failed" && b.status_text("state") == "setup" {
        // The source failed before it said a word.
        b.must("cancel");
    }
    let destination = b.ended_in();
    // What was left for when somebody dispatches again has its time.
    std::thread::sleep(Duration::from_millis(u64::from(SLEEP_MS) + 200));
    let state = format!("{side} sleepy after {n} callbacks: {source}, {destination}");
    println!("{state}");
    match source.as_str() {
        "completed" => {
            assert_eq!((destination.as_str(), fact(&mut a, "running")), ("completed", 0), "{state}");
            must_live(&mut b);
        }
        "failed" => {
            assert!(destination != "completed" && fact(&mut b, "running") == 0, "{state}");
            let why = a.command("error");
            assert!(why.contains("vmig_dispatch() was not called") && why.contains("'dispatch-timeout'"), "{why}");
            must_live(&mut a);
            // And it can be moved later.
            for vmm in [&mut a, &mut b] {
                vmm.must("set dispatch-timeout 30000");
            }
            moved(&mut a, &mut b);
            a.must_end_in("completed");
            b.must_end_in("completed");
            must_live(&mut b);
        }
        other => panic!("{other}: {state}"),
    }
    a.quit();
    b.quit();
}

#[test]
fn a_source_that_nobody_dispatches_fails_and_its_guest_goes_on() {
    for n in common::points("sleepy-source", 24, 5) {
        sleepy_at(n, "source");
    }
}

#[test]
fn a_destination_that_nobody_dispatches_fails_and_the_guest_stays() {
    for n in common::points("sleepy-destination", 24, 5) {
        sleepy_at(n, "destination");
    }
}

#[test]
fn misuse_is_refused() {
    let out =
        common::run(Command::new("timeout").args(["-k", "5", "60"]).arg(common::c_program("single")).arg("misuse"));
    assert!(common::words(&out).contains("done"));
}
