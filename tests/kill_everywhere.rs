//! Source, destination and network fail at every message of a small migration, in both directions. Afterwards at most one
//! guest runs; where none does a named state says so; the guest that survived is whole, and can be moved. With
//! `resume-timeout` a broken connection does not end the migration.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;
mod kill;
#[path = "common/program.rs"]
mod program;

use common::{c_program, points, scratch};
use kill::messages::{Phase, Way};
use kill::over::Over;
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

const fn shape(channels: usize, over: Over) -> Shape {
    Shape { channels, over, verify: false, resume: false }
}

const SHAPES: [Shape; 8] = [
    shape(0, Over::Unix),
    shape(2, Over::Unix),
    shape(1, Over::Tcp),
    Shape { verify: true, ..shape(0, Over::Tcp) },
    Shape { verify: true, ..shape(2, Over::Unix) },
    shape(1, Over::Own),
    shape(0, Over::Command),
    shape(0, Over::ListeningCommand),
];
/// The same, with a source that goes on over another connection, and what must not keep it from that, or must.
const RESUMED: [Shape; 5] = [
    Shape { resume: true, ..shape(0, Over::Unix) },
    Shape { resume: true, ..shape(2, Over::Tcp) },
    Shape { resume: true, verify: true, ..shape(1, Over::Unix) },
    Shape { resume: true, ..shape(0, Over::Own) },
    Shape { resume: true, ..shape(2, Over::Own) },
];
const BROKEN: [Fault; 6] =
    [Fault::Cut, Fault::CutInside, Fault::HalfClose, Fault::CutForGood, Fault::KillSource, Fault::KillDestination];
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
fn all_points(world: &mut World, shapes: &[Shape], faults: &[Fault]) -> [Vec<(Shape, Point)>; 2] {
    let mut all = [Vec::new(), Vec::new()];
    for shape in shapes.iter().copied() {
        let counts = survey(world, shape);
        println!("{shape:?}: {counts:?}");
        for ((way, phase), count) in counts {
            // What is said is the same over every kind of connection: there every third message meets all faults, the others one.
            let rare = if matches!(shape.over, Over::Unix | Over::Tcp) { 1 } else { 3 };
            let step = count.div_ceil(PAGES_MAX).max(rare);
            for index in 0..count {
                let one = [faults[index % faults.len()]];
                let chosen = if index % step == 0 { faults } else { &one };
                let points = chosen.iter().map(|fault| (shape, Point { way, phase, index, fault: *fault }));
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
    try_all("kill", &SHAPES, &FAULTS);
}

#[test]
fn a_migration_whose_connection_breaks_before_go_goes_on() {
    try_all("kill-resume", &RESUMED, &BROKEN);
}

fn try_all(name: &str, shapes: &[Shape], faults: &[Fault]) {
    let mut first = world(&format!("{name}-survey"));
    let all = all_points(&mut first, shapes, faults);
    drop(first);
    let draw = |part: usize| points(name, all[part].len(), SAMPLES[part]).into_iter().map(move |i| (part, i));
    let chosen: Vec<(Shape, Point)> = (0..2).flat_map(draw).map(|(part, i)| all[part][i]).collect();
    let (next, tally) = (AtomicUsize::new(0), Tally::default());
    std::thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                let mut world = world(name);
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
        let goes_on = shape.resume && matches!(point.fault, Fault::Cut | Fault::CutInside | Fault::HalfClose);
        // The two hellos come first: before them nothing is agreed.
        let agreed = point.phase != Phase::Precopy || point.index > 0;
        assert!(!(seen.0 && goes_on && agreed) || seen.3 == Outcome::Moved, "{seen:?}: it did not go on");
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
