//! Commands (exec:) that hang when the migration is cancelled or the guest freed: nothing of them is left, no process, no
//! zombie, no descriptor, no thread; the VMM is `c_program("mortal")`.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;
#[path = "common/program.rs"]
mod program;

use common::{c_program, scratch};
use program::Program;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(30);
const LOOK: Duration = Duration::from_millis(5);

/// What hangs, `@` being a time nobody else sleeps, some minutes: alone, as a pipeline, deaf to SIGTERM, in a group that has
/// lost its shell; and LOUD, which never stops filling standard error, alone and deaf to SIGTERM behind a shell that is gone.
const SOURCES: [&str; 6] = [
    "exec sleep @",
    "cat | sleep @ | sleep @",
    "trap '' TERM; sleep @ | sleep @; sleep @",
    "sleep @ & head -c 90000 >/dev/null; exec sleep @",
    "exec LOUD",
    "(trap '' TERM; exec LOUD) & exec sleep @",
];
const DESTINATIONS: [&str; 6] = [
    "exec sleep @",
    "sleep @ | sleep @ | cat",
    "trap '' TERM; printf VMIG; sleep @; sleep @",
    "printf QEVM; sleep @ & exec sleep @",
    "printf VMIG; exec LOUD",
    "(trap '' TERM; exec LOUD) & exec sleep @",
];
fn command_of(command: &str, mark: &str) -> String {
    command.replace("LOUD", "cat /dev/zero @ >&2").replace('@', mark)
}

fn mark(case: usize) -> String {
    format!("6{case:02}.{}", std::process::id())
}

/// The processes, zombies too, that have a word of this kind; a zombie has no words, but a parent.
fn processes(mark: &str, parent: Option<u32>) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().map_while(Result::ok) {
        let Ok(line) = fs::read_to_string(entry.path().join("stat")) else { continue };
        let words = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let its = line.rsplit(") ").next().and_then(|rest| rest.split(' ').nth(1)?.parse::<u32>().ok());
        let of_parent = parent.is_some() && its == parent;
        if of_parent || String::from_utf8_lossy(&words).split('\0').any(|word| word == mark) {
            found.push(line);
        }
    }
    found
}

fn wait(what: &str, vmm: &Program, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !done() {
        if Instant::now() > end {
            vmm.fail(what);
        }
        std::thread::sleep(LOOK);
    }
}

fn vmm(dir: &Path, guest: bool) -> Program {
    let board = dir.join("board");
    fs::write(&board, [0; 4096]).unwrap();
    let args = [board.to_str().unwrap(), "guest"];
    let vmm = Program::start("vmm", dir, &c_program("mortal"), &args[..if guest { 2 } else { 1 }]);
    assert_eq!(vmm.reply(), "ready");
    vmm
}

/// Begins, and waits until the command hangs.
fn begin(vmm: &mut Program, is_source: bool, command: &str, mark: &str) {
    let last = if command.ends_with("LOUD") { "(cat)" } else { "(sleep)" };
    let command = command_of(command, mark);
    if is_source {
        // More than a pipe holds is sent, and then nothing moves.
        vmm.must(&format!("migrate exec:{command}"));
    } else {
        let answer = vmm.command(&format!("incoming exec:{command}"));
        assert!(answer.starts_with("listening"), "{answer}");
    }
    wait("the command does not come to hang", vmm, || processes(mark, None).iter().any(|line| line.contains(last)));
    std::thread::sleep(10 * LOOK);
}

/// Descriptors, threads and children are what they were; the thread that reaped a command may need another moment.
fn must_be_left(vmm: &mut Program, before: &str, command: &str) {
    let end = Instant::now() + PATIENCE;
    loop {
        let now = vmm.command("left");
        if now == before {
            return;
        }
        if Instant::now() > end {
            vmm.fail(&format!("{command}: '{now}', before it was '{before}'"));
        }
        std::thread::sleep(LOOK);
    }
}

fn cases() -> impl Iterator<Item = (bool, &'static str)> {
    SOURCES.map(|command| (true, command)).into_iter().chain(DESTINATIONS.map(|command| (false, command)))
}

#[test]
fn a_cancel_leaves_nothing_of_a_command_that_hangs() {
    let mut sides = [true, false].map(|guest| vmm(&scratch("hanging"), guest));
    for (case, (is_source, command)) in cases().enumerate() {
        let vmm = &mut sides[usize::from(!is_source)];
        let (mark, before) = (mark(case), vmm.command("left"));
        begin(vmm, is_source, command, &mark);
        vmm.must("cancel");
        vmm.must_end_in("cancelled");
        let id = vmm.id();
        wait(&format!("{command}: something is left: {:?}", processes(&mark, Some(id))), vmm, || {
            processes(&mark, Some(id)).is_empty()
        });
        must_be_left(vmm, &before, command);
        if is_source {
            vmm.must("check");
        }
    }
    sides.into_iter().for_each(Program::quit);
}

#[test]
fn a_guest_that_is_freed_leaves_nothing_of_a_command_that_hangs() {
    for (case, (is_source, command)) in cases().enumerate() {
        let mark = mark(case + 20);
        let mut vmm = vmm(&scratch("hanging"), is_source);
        begin(&mut vmm, is_source, command, &mark);
        vmm.quit();
        let left = processes(&mark, None);
        assert!(left.is_empty(), "{command}: {left:?}");
    }
}

/// It took the guest and does not end: who has the guest is not known, and the operator says.
#[test]
fn a_command_that_took_all_and_hangs_is_killed_and_leaves_a_question() {
    let mut vmm = vmm(&scratch("hanging"), true);
    let (mark, before) = (mark(40), vmm.command("left"));
    vmm.must("set stall-timeout 500");
    vmm.must(&format!("migrate exec:cat >/dev/null; exec sleep {mark}"));
    vmm.must_end_in("switchover-unknown");
    let why = vmm.command("error");
    assert!(why.contains("took everything, but did not end within"), "{why}");
    vmm.must("resolve 1");
    let id = vmm.id();
    wait("something is left", &vmm, || processes(&mark, Some(id)).is_empty());
    must_be_left(&mut vmm, &before, "it");
    vmm.must("check");
    vmm.quit();
}

/// A shell that ends is over, although somebody it leaves behind goes on with its standard error.
#[test]
fn a_command_that_ended_is_not_waited_for_while_others_write_on() {
    for is_source in [true, false] {
        let mut vmm = vmm(&scratch("hanging"), is_source);
        let (mark, before) = (mark(41 + usize::from(is_source)), vmm.command("left"));
        let command = command_of("exec:LOUD & sleep .3; exit 3", &mark);
        if is_source {
            vmm.must(&format!("migrate {command}"));
        } else {
            let answer = vmm.command(&format!("incoming {command}"));
            assert!(answer.starts_with("listening"), "{answer}");
        }
        vmm.must_end_in("failed");
        let why = vmm.command("error");
        assert!(why.contains("ended with status 3 and said: "), "{why}");
        wait("something is left", &vmm, || processes(&mark, None).is_empty());
        must_be_left(&mut vmm, &before, &command);
        vmm.quit();
    }
}
