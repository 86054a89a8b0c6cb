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
    let go = Event::Heard(Message::Go { epoch, incarnation: Incarnation(EVE as u64) });
    let owner = [&ready[..], &[go, Event::Done]].concat();
    let refused = [&ready[..], &[Event::Deadline, Event::Done]].concat();
    let mut worlds = vec![World::new(eve(&[]), false)];
    worlds.extend([&ready[..], &owner, &refused].map(|events| World::new(eve(events), true)));
    worlds
}

#[test]
fn quick() {
    for (attempts, reconnects, crashes) in [(1,1,false),(1,2,true),(2,0,false),(2,1,false),(2,2,true)] {
        let t = std::time::Instant::now();
        let b = Bounds { attempts, reconnects, crashes };
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
    std::thread::scope(|s| for _ in 0..3 { s.spawn(|| loop {
        let n = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let Some(m) = all.get(n) else { break };
        let rules = m.rules();
        let mut result = None;
        for (attempts, reconnects, crashes) in [(1,1,false),(1,2,true),(2,1,false)] {
            let b = Bounds { attempts, reconnects, crashes };
            if let Err(bad) = explore::explore(&starts(), &rules, b) { result = Some((b, bad.rule)); break; }
        }
        match result { Some((b, rule)) => println!("{} CAUGHT {} at {b:?}", m.name(), rule), None => println!("{} SURVIVED", m.name()) }
    }); });
    println!("{} mutants", all.len());
}
