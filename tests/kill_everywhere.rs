//! Source, destination and network fail at every message of a small migration, in both directions. Afterwards at most one
//! guest runs; where none does a named state says so; the guest that survived is whole, and can be moved.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;
mod kill;
#[path = "common/program.rs"]
mod program;

use common::{c_program, points, scratch};
use kill::messages::{Phase, Way};
use kill::relay::{Counts, Fault, Point};
use kill::world::{Outcome, Shape, World};
use std::{
    collections::BTreeMap,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

const SHAPES: [Shape; 5] = [
    Shape { channels: 0, tcp: false, verify: false },
    Shape { channels: 2, tcp: false, verify: false },
    Shape { channels: 1, tcp: true, verify: false },
    Shape { channels: 0, tcp: true, verify: true },
    Shape { channels: 2, tcp: false, verify: true },
];
const FAULTS: [Fault; 10] = [
    Fault::Cut,
    Fault::CutInside,
    Fault::CutForGood,
    Fault::HalfClose,
    Fault::Freeze,
    Fault::Delay(30),
    Fault::Delay(300),
    Fault::KillSource,
    Fault::KillDestination,
    Fault::Cancel,
];
/// Worlds at once: most of them wait for a timeout.
const WORKERS: usize = 8;
/// Pages all look alike to the protocol: of more messages than this every one gets a fault, but not each gets all.
const PAGES_MAX: usize = 60;
/// Points drawn of those while the guest runs, and of those from its stop on.
const SAMPLES: [usize; 2] = [30, 50];

fn world(name: &str) -> World {
    World::new(scratch(name), c_program("mortal"))
}

/// A migration without a fault: how many messages there are.
fn survey(world: &mut World, shape: Shape) -> Counts {
    let point = Point { way: Way::There, phase: Phase::Precopy, index: 0, fault: Fault::None };
    let (_, counts, raw, outcome) = world.suffer(shape, point);
    assert_eq!((raw, outcome), (0, Outcome::Moved), "{shape:?}: every message is known");
    for way in [Way::There, Way::Back] {
        assert!(counts.iter().any(|((w, phase), n)| *w == way && *phase == Phase::Devices && *n > 0), "{counts:?}");
    }
    counts
}

/// Every message of every shape with every fault: while the guest runs, and from its stop on.
fn all_points(world: &mut World) -> [Vec<(Shape, Point)>; 2] {
    let mut all = [Vec::new(), Vec::new()];
    for shape in SHAPES {
        let counts = survey(world, shape);
        println!("{shape:?}: {counts:?}");
        for ((way, phase), count) in counts {
            let step = count.div_ceil(PAGES_MAX).max(1);
            for index in 0..count {
                let one = [FAULTS[index % FAULTS.len()]];
                let faults = if index % step == 0 { &FAULTS[..] } else { &one };
                let points = faults.iter().map(|fault| (shape, Point { way, phase, index, fault: *fault }));
                all[usize::from(phase != Phase::Precopy)].extend(points);
            }
        }
    }
    all
}

#[derive(Default)]
struct Tally {
    tried: AtomicUsize,
    missed: AtomicUsize,
    failed: AtomicBool,
    outcomes: Mutex<BTreeMap<(Phase, Fault, Outcome), usize>>,
}

#[test]
fn nobody_runs_twice_and_nothing_is_lost() {
    let mut first = world("kill-survey");
    let all = all_points(&mut first);
    drop(first);
    let draw = |part: usize| points("kill", all[part].len(), SAMPLES[part]).into_iter().map(move |i| (part, i));
    let chosen: Vec<(Shape, Point)> = (0..2).flat_map(draw).map(|(part, i)| all[part][i]).collect();
    let (next, tally) = (AtomicUsize::new(0), Tally::default());
    std::thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                let mut world = world("kill");
                while let Some(point) = chosen.get(next.fetch_add(1, Ordering::Relaxed)) {
                    try_one(&mut world, *point, &tally);
                    if tally.failed.load(Ordering::Relaxed) {
                        break;
                    }
                }
            });
        }
    });
    for (what, count) in tally.outcomes.lock().unwrap().iter() {
        println!("{what:?}: {count}");
    }
    let (tried, missed) = (tally.tried.into_inner(), tally.missed.into_inner());
    println!("points tried: {tried}; migrations that had ended before theirs: {missed}");
    assert!(!tally.failed.into_inner(), "see above");
    assert!(tried >= chosen.len() / 2, "most points must be reached");
}

fn try_one(world: &mut World, (shape, point): (Shape, Point), tally: &Tally) {
    let result = catch_unwind(AssertUnwindSafe(|| {
        let seen = world.suffer(shape, point);
        let decided = matches!(seen.3, Outcome::Stayed | Outcome::Moved | Outcome::Lost);
        assert!(!seen.0 || point.phase != Phase::Precopy || decided, "{seen:?}: nothing was handed over yet");
        seen
    }));
    let Ok((fired, _, _, outcome)) = result else {
        println!("failed at {shape:?} {point:?}");
        tally.failed.store(true, Ordering::Relaxed);
        return;
    };
    let counter = if fired { &tally.tried } else { &tally.missed };
    counter.fetch_add(1, Ordering::Relaxed);
    if fired {
        *tally.outcomes.lock().unwrap().entry((point.phase, point.fault, outcome)).or_default() += 1;
    }
}
