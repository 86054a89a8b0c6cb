//! The switchover protocol, in every order of events: cut connections, messages that are lost or late, reconnects,
//! another handle at the old address, hooks that fail, deadlines, cancels, crashes of either side, an operator.
//!
//! The model (tests/switchover) drives the very function both halves use, and checks in every state: never two owners;
//! no owner only in a named state; from every state some resolve leads to one owner; and the rest of
//! `moves::RULES`. Then it breaks each row of the rules in every way it knows and sees whether a check notices.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;
mod switchover;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use stateright::{Checker, Model};
use switchover::checker::Switchover;
use switchover::explore::{Broken, explore};
use switchover::moves::Bounds;
use switchover::mutants::{self, Mutant};
use switchover::world::{EVE, World};
use vmig::switchover::table::{Do, On, ROWS, Row};
use vmig::switchover::{Action, Epoch, Event, Incarnation, Message, Phase, Side, step};

/// Two epochs of the source, two reconnects, one crash of either side.
const ALL: Bounds = Bounds::new(2, 2, true);
/// Nothing goes wrong.
const FAIR: Bounds = Bounds { fair: true, ..Bounds::new(1, 0, false) };
/// What mutants are tried in, the cheapest first.
const LADDER: [Bounds; 4] = [FAIR, Bounds::new(1, 1, false), Bounds::new(1, 2, true), Bounds::new(2, 0, false)];
/// Mutants that `make check` draws.
const SAMPLE: usize = 400;

/// What Eve may be when she answers at Bob's address: unused, or used and free again; or ready for, owner of, or done
/// with another guest whose attempt happens to have the same epoch, and careless of whom she is taken for.
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
        World::new(eve(&refused), false, false),
        World::new(eve(&ready), true, false),
        World::new(eve(&stranded), true, false),
        World::new(eve(&owner), true, true),
        World::new(eve(&refused), true, true),
    ]
}

fn tell(what: &str, broken: &Broken) -> String {
    let path: Vec<String> = broken.path.iter().map(|m| format!("  {m:?}")).collect();
    format!("{what}: broken: {}\n{}\n  ends in {:?}", broken.rule, path.join("\n"), broken.end)
}

#[test]
fn on_a_fair_day_the_guest_arrives() {
    let seen = explore(&starts(), ROWS, FAIR).unwrap_or_else(|broken| panic!("{}", tell("fair", &broken)));
    assert!(seen.settled > 0);
}

/// stateright and our own walk, which also looks for states that cannot end well, must find the same states, no rule
/// broken, and what is of interest reached.
#[test]
fn nothing_breaks_a_rule() {
    let checker = Switchover { start: starts(), bounds: ALL }.checker().threads(2).spawn_bfs().join();
    println!("states explored: {} ({ALL:?})", checker.unique_state_count());
    checker.assert_properties();
    let states = checker.unique_state_count();
    drop(checker);
    let seen = explore(&starts(), ROWS, ALL).unwrap_or_else(|broken| panic!("{}", tell("rules", &broken)));
    println!("and again: {seen:?}");
    assert_eq!(seen.states, states);
}

/// The rules with another row in the place of one.
fn with(at: Phase, on: On, to: Phase, then: &'static [Do]) -> Vec<Row> {
    let place = ROWS.iter().position(|row| row.at == Some(at) && row.on == on).unwrap();
    let mut rules = ROWS.to_vec();
    rules[place] = Row { to: Some(to), then, ..rules[place] };
    rules
}

/// Mistakes that real systems made, or that suggest themselves: each must be found, for what it is.
#[test]
fn known_mistakes_are_found() {
    use Phase::*;
    const ARM: Do = Do::Plain(Action::Arm);
    const CLOSE: Do = Do::Plain(Action::Close);
    const START: Do = Do::Plain(Action::Start);
    const FORGET: Do = Do::Plain(Action::Forget);
    const BACK: &[Do] = &[CLOSE, ARM, Do::Reacquire(2)];
    let two = "never two owners";
    let lost = "the guest is lost only by the crash of its holder";
    let without = "an owner has the resources and the memory";
    let resume = &[Do::Own(2), Do::Plain(Action::Resume)];
    let cases = [
        ("a lost answer is taken for a failure", with(Committed, On::LinkLost, TakingBack, BACK), two),
        ("silence is taken for a failure", with(Committed, On::Deadline, TakingBack, BACK), two),
        ("nobody's knowledge is taken for NEVER", with(Asking, On::NotKnown, TakingBack, BACK), two),
        ("silence is taken for success", with(Asking, On::Deadline, Empty, &[CLOSE, FORGET]), lost),
        ("the destination runs without GO", with(Ready, On::Deadline, Starting, &[START]), two),
        ("a lost source is taken for dead", with(Ready, On::LinkLost, Rescuing, &[START]), two),
        ("the guest resumes without its resources", with(Preparing, On::LinkLost, Owner, resume), without),
    ];
    for (mistake, rules, rule) in cases {
        let bounds = Bounds { only: Some(rule), ..Bounds::new(1, 1, false) };
        let broken = explore(&starts(), &rules, bounds).expect_err(mistake);
        println!("{}", tell(mistake, &broken));
        assert_eq!(broken.rule, rule, "{mistake}");
    }
}

/// No protocol helps against an operator who says RUN without having found out.
#[test]
fn a_rash_operator_makes_two_owners() {
    let bounds = Bounds { rash: true, only: Some("never two owners"), ..Bounds::new(1, 1, false) };
    let broken = explore(&starts(), ROWS, bounds).expect_err("he should");
    println!("{}", tell("a rash operator", &broken));
    assert!(broken.path.iter().any(|m| matches!(m, switchover::world::Move::Resolve(..))));
}

/// Mutants nothing can notice within the bounds, and why.
const EQUIVALENT: [(&str, &str); 3] = [
    (
        "Committed, Owned: accepts Epoch",
        "on the connection of the attempt nobody answers but the destination; only a later connection meets strangers",
    ),
    ("Committed, Never: accepts Epoch", "the same"),
    (
        "Committed, Owned: accepts Always",
        "and a late OWNED is about an attempt that this source lost the guest by: it owns again after a third only",
    ),
];

/// Which rule notices, if any does.
fn who_notices(mutant: Mutant) -> Option<&'static str> {
    let rules = mutant.rules();
    LADDER.iter().find_map(|bounds| explore(&starts(), &rules, *bounds).err()).map(|broken| broken.rule)
}

#[test]
fn every_row_matters() {
    let all = mutants::all();
    let drawn = common::points("switchover mutants", all.len(), SAMPLE);
    let next = AtomicUsize::new(0);
    let noticed = Mutex::new(Vec::new());
    let work = || {
        while let Some(n) = drawn.get(next.fetch_add(1, Ordering::Relaxed)) {
            let found = (all[*n].name(), who_notices(all[*n]));
            noticed.lock().unwrap_or_else(PoisonError::into_inner).push(found);
        }
    };
    std::thread::scope(|scope| (0..2).for_each(|_| drop(scope.spawn(work))));
    let noticed = noticed.into_inner().unwrap();
    assert_eq!(noticed.len(), drawn.len());
    let mut by_rule = std::collections::BTreeMap::new();
    noticed.iter().for_each(|(_, rule)| *by_rule.entry(rule.unwrap_or("(nobody)")).or_insert(0) += 1);
    println!("mutants tried: {} of {}, noticed by:", drawn.len(), all.len());
    by_rule.iter().for_each(|(rule, count)| println!("  {count:5} {rule}"));
    let listed = |name: &str| EQUIVALENT.iter().any(|(equivalent, _)| *equivalent == name);
    let wrong: Vec<_> = noticed.iter().filter(|(name, rule)| listed(name) == rule.is_some()).collect();
    assert!(wrong.is_empty(), "unnoticed, or noticed though listed as equivalent: {wrong:#?}");
    let names: Vec<String> = all.iter().map(|m| m.name()).collect();
    let stale: Vec<_> = EQUIVALENT.iter().filter(|(name, _)| !names.iter().any(|n| n == name)).collect();
    assert!(stale.is_empty(), "listed, but no mutant: {stale:?}");
}
