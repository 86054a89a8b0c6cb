//! A VMM with one thread (`dispatch=manual`), whose loop is busy 50 ms at a time: tests/c/single.c in separate processes.

#[path = "common/program.rs"]
mod program;

mod common;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use program::Program;

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

/// A client's line and the answer to it; `vmm` runs its loop meanwhile.
fn ask(client: &mut BufReader<UnixStream>, command: &str) -> String {
    writeln!(client.get_mut(), "{{\"execute\": \"{command}\"}}").expect("a connection of the VMM");
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
    // What has to wait on the one thread is asked for there.
    let request = r#"{"execute": "migrate", "arguments": {"uri": "tcp:127.0.0.1:1"}}"#;
    writeln!(client.get_mut(), "{request}").unwrap();
    let mut refused = String::new();
    while !refused.contains("error") {
        client.read_line(&mut refused).unwrap();
    }
    assert!(refused.contains("option 'dispatch' is manual"), "{refused}");
    let refused = vmm.command("qmp {\"execute\": \"migrate\", \"arguments\": {\"uri\": \"fd:1x\"}}");
    assert!(refused.contains("fd:1x") && !refused.contains("dispatch"), "{refused}");
    vmm.quit();
}

#[test]
fn a_command_that_nobody_dispatches_fails_and_freeing_the_guest_waits_for_none() {
    let dir = common::scratch("single");
    let mut vmm = single("a", &dir, "guest");
    let mut client = client(&mut vmm, &dir);
    vmm.must("set dispatch-timeout 200");
    vmm.must(&format!("sleepy 0 {SLEEP_MS}"));
    let failed = ask(&mut client, "stop");
    assert!(failed.contains("vmig_dispatch() was not called"), "{failed}");
    must_live(&mut vmm);
    vmm.must("set dispatch-timeout 60000");
    vmm.must("sleepy 0 60000");
    writeln!(client.get_mut(), "{{\"execute\": \"stop\"}}").unwrap();
    // It is being carried out, or was not begun: both are over when the guest is freed.
    vmm.quit();
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
