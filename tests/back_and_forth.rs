//! The example VMM's KVM guest moves back and forth between two processes, again and again, while connections are cut,
//! freeze and close, destinations are killed before they have the guest, and moves are cancelled. The guest checks its
//! memory all the while and counts: no number is ever missing, and none is counted twice.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;
mod kill;
#[path = "common/program.rs"]
mod program;

use common::{Rng, c_program, scratch, without_kvm};
use kill::messages::{Phase, Way};
use kill::relay::{Fault, Point, Relay};
use program::{MOVE, Program};
use std::{
    collections::BTreeMap,
    env,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

const VCPUS: usize = 2;
/// Moves with VMIG_ALL=1, and without.
const MOVES: [usize; 2] = [200, 12];
const LOOK: Duration = Duration::from_millis(5);
const TCP: &str = "tcp:127.0.0.1:0";
const LISTEN: &str = "incoming tcp:127.0.0.1:0";
const UNDECIDED: [&str; 2] = ["switchover-unknown", "held"];

/// The processes a guest has been in, and what became of its moves.
struct Life {
    dir: PathBuf,
    rng: Rng,
    /// What processes that are gone had counted.
    counted: [Vec<u32>; VCPUS],
    processes: usize,
    outcomes: BTreeMap<(Fault, String), usize>,
}

impl Life {
    fn spawn(&mut self, more: &[&str]) -> Program {
        self.processes += 1;
        let mut args = vec!["--mem", "64", "--vcpus", "2", "--events-fd", "1", "--pages", "2048"];
        args.extend(["--set", "stall-timeout 1000", "--set", "connect-timeout 1000"]);
        args.extend(["--set", "switchover-timeout 3000"]);
        args.extend(more);
        Program::start(&format!("vmm-{}", self.processes), &self.dir, &c_program("vmm"), &args)
    }

    /// Where something goes wrong next, if it does.
    fn draw(&mut self) -> Point {
        const FAULTS: [Fault; 11] = [
            Fault::None,
            Fault::None,
            Fault::Cut,
            Fault::CutInside,
            Fault::CutForGood,
            Fault::HalfClose,
            Fault::Freeze,
            Fault::Delay(100),
            Fault::Delay(1500),
            Fault::KillDestination,
            Fault::Cancel,
        ];
        // About as many messages as there are: of a move that has ended before its point nothing is wrong.
        const PLACES: [(Way, Phase, usize); 5] = [
            (Way::There, Phase::Precopy, 150),
            (Way::Back, Phase::Precopy, 8),
            (Way::There, Phase::LastPages, 20),
            (Way::There, Phase::Devices, 12),
            (Way::Back, Phase::Devices, 2),
        ];
        let fault = FAULTS[self.rng.below(FAULTS.len())];
        // From the devices on a destination that dies may be the one that has the guest.
        let places = if fault == Fault::KillDestination { &PLACES[..3] } else { &PLACES[..] };
        let (way, phase, count) = places[self.rng.below(places.len())];
        Point { way, phase, index: self.rng.below(count), fault }
    }

    /// The guest counts on, without a gap and without a second one anywhere.
    fn counts_on(&self, what: &str, owner: &Program, other: Option<&Program>) {
        for cpu in 0..VCPUS {
            owner.await_generations(cpu, 1);
            let mut all = self.counted[cpu].clone();
            for program in other.into_iter().chain([owner]) {
                all.extend(program.cpu(cpu).generations);
            }
            all.sort_unstable();
            let wanted: Vec<u32> = (1..).take(all.len()).collect();
            assert_eq!(all, wanted, "{what}: generations of vCPU {cpu}");
        }
    }

    /// A process that is gone; what it counted stays.
    fn bury(&mut self, mut program: Program) {
        program.kill();
        for (cpu, counted) in self.counted.iter_mut().enumerate() {
            counted.extend(program.cpu(cpu).generations);
        }
    }
}

/// The state, once nothing goes on by itself: what is undecided is told with its reason then.
fn settled(program: &mut Program) -> Option<String> {
    let state = program.status_text("state");
    let ended = ["none", "completed", "failed", "cancelled"].contains(&state.as_str());
    let stuck = UNDECIDED.contains(&state.as_str()) && program.command("error") != "failure none";
    (ended || stuck).then_some(state)
}

fn await_settled(program: &mut Program) -> String {
    let end = Instant::now() + MOVE;
    loop {
        if let Some(state) = settled(program) {
            return state;
        }
        if Instant::now() > end {
            program.fail("the move does not end");
        }
        std::thread::sleep(LOOK);
    }
}

/// The state, once it will not change any more.
fn await_end(program: &mut Program) -> String {
    let end = Instant::now() + MOVE;
    loop {
        let state = program.status_text("state");
        if ["completed", "failed", "cancelled"].contains(&state.as_str()) {
            return state;
        }
        if Instant::now() > end {
            program.fail("the move does not end");
        }
        std::thread::sleep(LOOK);
    }
}

/// Until the source has settled; does at the point what the relay cannot.
fn watch(
    relay: &Relay,
    fault: Fault,
    source: &mut Program,
    destination: &mut Option<Program>,
    life: &mut Life,
) -> String {
    let end = Instant::now() + MOVE;
    loop {
        if relay.reached.recv_timeout(LOOK).is_ok() {
            match fault {
                Fault::KillDestination => {
                    let program = destination.take().unwrap();
                    assert_eq!(program.cpu(0).beats, 0, "a fresh destination was killed, before it had the guest");
                    life.bury(program);
                }
                Fault::Cancel => drop(source.command("cancel")),
                _ => continue,
            }
            relay.thaw();
        }
        if let Some(state) = settled(source) {
            relay.thaw();
            return state;
        }
        if Instant::now() > end {
            source.fail("the move does not end");
        }
    }
}

/// One attempt. The owner afterwards, and the other process if it lives.
fn turn(life: &mut Life, number: usize, mut source: Program, other: Option<Program>) -> (Program, Option<Program>) {
    let mut point = life.draw();
    // Only a fresh process has certainly counted nothing when it is killed.
    let mut destination = match other {
        Some(other) if point.fault == Fault::KillDestination => {
            life.bury(other);
            None
        }
        other => other,
    };
    match &mut destination {
        Some(program) => program.send(LISTEN),
        None => destination = Some(life.spawn(&["--incoming", TCP])),
    }
    let address = destination.as_ref().unwrap().listening();
    point.index *= usize::from(point.fault != Fault::None);
    let relay = Relay::new(&life.dir, &address, point, &[]);
    source.must(&format!("migrate {}", relay.uri));
    let here = watch(&relay, point.fault, &mut source, &mut destination, life);
    let what = format!("move {number}, {point:?}, the source {here}");
    let there = destination.as_mut().map(|to| {
        if here != "completed" && !UNDECIDED.contains(&here.as_str()) && to.status_text("state") == "setup" {
            to.must("cancel"); // nobody came
        }
        await_settled(to)
    });
    drop(relay);
    let moved = decide(&what, &mut source, destination.as_mut(), &here, there.as_deref());
    *life
        .outcomes
        .entry((point.fault, format!("{here}, {}", if moved { "moved" } else { "stayed" })))
        .or_default() += 1;
    let (owner, other) = if moved { (destination.unwrap(), Some(source)) } else { (source, destination) };
    life.counts_on(&what, &owner, other.as_ref());
    (owner, other)
}

/// Whether the guest moved; what the states leave open is decided as an operator would who looks at both sides.
fn decide(what: &str, source: &mut Program, to: Option<&mut Program>, here: &str, there: Option<&str>) -> bool {
    let arrived = there == Some("completed");
    if let Some(to) = to
        && there.is_some_and(|there| UNDECIDED.contains(&there))
    {
        // Refused if its own deadline was faster.
        to.command("resolve there");
    }
    match here {
        "completed" => assert!(arrived, "{what}: the source let go, the destination {there:?}"),
        here if UNDECIDED.contains(&here) => {
            // Refused if it found the destination again meanwhile.
            source.command(if arrived { "resolve there" } else { "resolve here" });
            let end = await_end(source);
            assert_eq!(end == "completed", arrived, "{what}: the source {end}, the destination {there:?}");
        }
        _ => assert!(!arrived, "{what}: the destination {there:?}"),
    }
    arrived
}

fn compare(dir: &Path, source: &mut Program, destination: &Program, hash: &Path) {
    destination.await_news("hashed");
    let here = dir.join("here");
    source.must(&format!("hash {}", here.display()));
    assert!(std::fs::read(here).unwrap() == std::fs::read(hash).unwrap(), "the memory that arrived is another one");
}

#[test]
fn two_hundred_moves_with_faults() {
    if without_kvm() {
        return;
    }
    let dir = scratch("back-and-forth");
    let counted = [Vec::new(), Vec::new()];
    let mut life = Life { dir, rng: Rng::new("back-and-forth"), counted, processes: 0, outcomes: BTreeMap::new() };
    let mut owner = life.spawn(&[]);
    assert_eq!(owner.reply(), "running");
    let mut other = None;
    let moves = MOVES[usize::from(!env::var("VMIG_ALL").is_ok_and(|v| v == "1"))];
    for number in 0..moves {
        (owner, other) = turn(&mut life, number, owner, other);
    }
    for (what, count) in &life.outcomes {
        println!("{what:?}: {count}");
    }
    println!("moves tried: {moves}, in {} processes", life.processes);
    // The last move is a good one, to a process of its own, and every page is compared.
    let hash = life.dir.join("there");
    let mut last = life.spawn(&["--incoming", TCP, "--hash-at-start", hash.to_str().unwrap()]);
    let address = last.listening();
    owner.must(&format!("migrate {address}"));
    owner.must_end_in("completed");
    last.must_end_in("completed");
    compare(&life.dir, &mut owner, &last, &hash);
    if let Some(other) = other {
        life.bury(other);
    }
    life.counts_on("the last move", &last, Some(&owner));
    owner.quit();
    last.quit();
}
