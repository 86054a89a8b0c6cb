//! The n-th system call of each kind, and the n-th callback, fails during a small migration, at either side: nothing
//! crashes or hangs, the error says what failed, the guest is where it belongs, nothing is left behind, and the next
//! attempt succeeds.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;
mod kill;
#[path = "common/program.rs"]
mod program;

use common::{built, points, run, scratch, words};
use kill::over::Over;
use kill::world::{DOORS, Outcome, Struck, Way, World};
use std::{
    collections::{BTreeMap, BTreeSet},
    panic::{AssertUnwindSafe, catch_unwind},
    process::Command,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

/// As in tests/c/doors: what a kind is called, and the words of the error it fails with.
const NAMES: [(&str, &str); DOORS] = [
    ("read", "Input/output error"),
    ("write", "Input/output error"),
    ("poll", "Cannot allocate memory"),
    ("mmap", "Cannot allocate memory"),
    ("ioctl", "Input/output error"),
    ("open", "Too many open files"),
    ("stat", "Input/output error"),
    ("socket", "No buffer space available"),
    ("thread", "Resource temporarily unavailable"),
    ("spawn", "Cannot allocate memory"),
];
const CALLBACK: (&str, &str) = ("callback", "Numerical argument out of domain");
const WORKERS: usize = 8;

#[derive(Clone, Copy, Debug)]
struct Point {
    at_source: bool,
    over: Over,
    multifd: bool,
    way: Way,
}

impl Point {
    fn name(self) -> (&'static str, &'static str) {
        match self.way {
            Way::Door(door, _) => NAMES[door],
            Way::Callback(_) => CALLBACK,
        }
    }
}

fn world() -> World {
    World::with_doors(scratch("faults"), built("c-fault/mortal"))
}

/// Every call of every kind there is in a migration that goes well.
fn all_points() -> Vec<Point> {
    let mut world = world();
    let mut all = Vec::new();
    let sides = [true, false].into_iter().flat_map(|at_source| {
        let command = if at_source { Over::Command } else { Over::ListeningCommand };
        let ways = [(Over::Unix, false), (Over::Unix, true), (Over::Own, true), (command, false)];
        ways.map(|(over, multifd)| (at_source, over, multifd))
    });
    for (at_source, over, multifd) in sides {
        let doors = world.strike(at_source, over, multifd, Way::Door(0, 0));
        let callbacks = world.strike(at_source, over, multifd, Way::Callback(0));
        assert_eq!((doors.outcome, callbacks.outcome), (Outcome::Moved, Outcome::Moved));
        let ways =
            doors.calls.iter().enumerate().flat_map(|(door, n)| (1..=*n).map(move |call| Way::Door(door, call)));
        let ways = ways.chain((1..=callbacks.calls[0]).map(Way::Callback));
        all.extend(ways.map(|way| Point { at_source, over, multifd, way }));
        println!(
            "source {at_source}, over {over:?}, multifd {multifd}: {:?}, {} callbacks",
            doors.calls, callbacks.calls[0]
        );
    }
    all
}

#[derive(Default)]
struct Tally {
    tried: AtomicUsize,
    missed: AtomicUsize,
    outcomes: Mutex<BTreeMap<(bool, &'static str, Outcome), usize>>,
    /// Errors that do not say what failed.
    unclear: Mutex<BTreeSet<String>>,
    failed: Mutex<Vec<String>>,
}

impl Tally {
    fn take(&self, point: Point, struck: &Struck) {
        if !struck.hit {
            self.missed.fetch_add(1, Ordering::Relaxed);
            return;
        }
        self.tried.fetch_add(1, Ordering::Relaxed);
        let (name, error) = point.name();
        *self.outcomes.lock().unwrap().entry((point.at_source, name, struck.outcome)).or_default() += 1;
        // A destination that cannot read what a stranger says goes on to listen.
        if struck.outcome != Outcome::Moved && struck.failed && !struck.words.contains(error) {
            self.unclear.lock().unwrap().insert(format!("{point:?}: {}", struck.words));
        }
    }
}

#[test]
fn whatever_fails_the_guest_is_where_it_belongs() {
    let all = all_points();
    let chosen = points("faults", all.len(), 160);
    let (next, tally) = (AtomicUsize::new(0), Tally::default());
    std::thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                let mut world = world();
                while let Some(index) = chosen.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let point = all[*index];
                    let result = catch_unwind(AssertUnwindSafe(|| {
                        let mut strike = || world.strike(point.at_source, point.over, point.multifd, point.way);
                        let struck = strike();
                        // A side that got no processor for so long was taken for dead before the call failed.
                        if struck.words.contains("option 'stall-timeout'") { strike() } else { struck }
                    }));
                    match result {
                        Ok(struck) => tally.take(point, &struck),
                        Err(_) => tally.failed.lock().unwrap().push(format!("{point:?}")),
                    }
                }
            });
        }
    });
    for (what, count) in tally.outcomes.lock().unwrap().iter() {
        println!("{what:?}: {count}");
    }
    let (tried, missed) = (tally.tried.into_inner(), tally.missed.into_inner());
    println!("points tried: {tried}; calls that did not come: {missed}");
    let (failed, unclear) = (tally.failed.into_inner().unwrap(), tally.unclear.into_inner().unwrap());
    assert!(failed.is_empty(), "{} points failed, see above: {failed:#?}", failed.len());
    assert!(unclear.is_empty(), "errors that do not name what failed: {unclear:#?}");
    assert!(tried >= chosen.len() / 2, "most calls must come");
}

/// The library that is installed goes to the kernel by its own doors, that of these tests by no other.
#[test]
fn no_installed_library_has_these_doors() {
    let undefined = |path: &str| words(&run(Command::new("nm").arg("-u").arg(built(path))));
    let (release, fault) = (undefined("lib/libvmig.a"), undefined("fault/lib/libvmig.a"));
    let doors: Vec<&str> = fault.split_whitespace().filter_map(|word| word.strip_prefix("door_")).collect();
    assert!(doors.len() > 30, "{doors:?}");
    assert!(!release.contains("door_"));
    for name in doors {
        assert!(release.split_whitespace().any(|word| word == name), "{name}");
        assert!(!fault.split_whitespace().any(|word| word == name), "{name} is called past the doors");
    }
}
