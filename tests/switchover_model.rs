#![allow(clippy::unwrap_used, reason = "a test")]
mod common;
#[path = "switchover/explore.rs"]
mod explore;
#[path = "switchover/moves.rs"]
mod moves;
#[path = "switchover/mutants.rs"]
mod mutants;
#[path = "switchover/world.rs"]
mod world;
use moves::Bounds;
use vmig::switchover::table::ROWS;
use vmig::switchover::{Epoch, Event, Incarnation, Message, Side, step};
use world::{EVE, World};

/// What Eve may be when she answers at Bob's address: unused; or ready for, owner of, or done with another guest whose
/// attempt happens to have the same epoch.
fn starts() -> Vec<World> {
    let eve = |events: &[Event]| {
        let unused = Side::empty(Incarnation(EVE as u64));
        events.iter().fold(unused, |side, event| step(&side, *event).0)
    };
    let epoch: Epoch = 0;
    let ready = [Event::Heard(Message::Prepare { epoch }), Event::Done, Event::Done];
    let stranded = [&ready[..], &[Event::LinkLost]].concat();
    let go = Event::Heard(Message::Go { epoch, incarnation: Incarnation(EVE as u64) });
    let owner = [&ready[..], &[go, Event::Done]].concat();
    let refused = [&ready[..], &[Event::Deadline, Event::Done]].concat();
    vec![
        World::new(eve(&[]), false, false),
        World::new(eve(&refused), false, false), // used for another guest, and free again
        World::new(eve(&ready), true, false),
        World::new(eve(&stranded), true, false),
        World::new(eve(&owner), true, true),
        World::new(eve(&refused), true, true),
    ]
}

#[test]
fn quick() {
    for (attempts, reconnects, crashes) in [(1,0,false),(1,1,false),(1,2,true),(2,0,false),(2,1,false),(2,2,true)] {
        let t = std::time::Instant::now();
        let b = Bounds { attempts, reconnects, crashes, fair: (attempts, reconnects) == (1, 0) };
        match explore::explore(&starts(), ROWS, b) {
            Ok(seen) => println!("{b:?} {seen:?} {:?}", t.elapsed()),
            Err(bad) => { println!("{b:?} {} {:#?} {:?}", bad.rule, bad.path, bad.end); panic!() }
        }
    }
}

#[test]
fn mutate() {
    let all = mutants::all();
    let next = std::sync::atomic::AtomicUsize::new(0);
    std::thread::scope(|s| for _ in 0..4 { s.spawn(|| loop {
        let n = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let Some(m) = all.get(n) else { break };
        let rules = m.rules();
        let mut result = None;
        for (attempts, reconnects, crashes, fair) in [(1,0,false,true),(1,1,false,false),(1,2,true,false),(2,0,false,false)] {
            let b = Bounds { attempts, reconnects, crashes, fair };
            if let Err(bad) = explore::explore(&starts(), &rules, b) { result = Some((b, bad.rule)); break; }
        }
        match result { Some((b, rule)) => println!("{} CAUGHT {} at {b:?}", m.name(), rule), None => println!("{} SURVIVED", m.name()) }
    }); });
    println!("{} mutants", all.len());
}
