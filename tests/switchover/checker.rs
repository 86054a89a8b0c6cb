//! The same world for stateright, an independent model checker: safety, and that the interesting states are reached.

use super::moves::{Bounds, RULES, after, moves};
use super::world::{EVE, Move, World};
use stateright::{Model, Property};
use vmig::switchover::Phase;
use vmig::switchover::table::ROWS;

pub struct Switchover {
    pub start: Vec<World>,
    pub bounds: Bounds,
}

fn rule<const N: usize>(_: &Switchover, world: &World) -> bool {
    RULES[N].1(world)
}

fn anybody(world: &World, phase: Phase) -> bool {
    world.all.iter().any(|p| p.counts() && p.phase() == phase)
}

impl Model for Switchover {
    type State = World;
    type Action = Move;

    fn init_states(&self) -> Vec<World> {
        self.start.clone()
    }

    fn actions(&self, world: &World, out: &mut Vec<Move>) {
        moves(world, self.bounds, out);
    }

    fn next_state(&self, world: &World, what: Move) -> Option<World> {
        Some(after(world, ROWS, what))
    }

    fn properties(&self) -> Vec<Property<Self>> {
        macro_rules! always {
            ($($n:literal)*) => { vec![$(Property::always(RULES[$n].0, rule::<$n>)),*] };
        }
        let mut all = always!(0 1 2 3 4 5 6 7 8 9 10 11);
        assert_eq!(all.len(), RULES.len());
        // A model in which nothing happens keeps every rule.
        all.extend([
            Property::sometimes("the guest goes there and back", |_, w: &World| {
                w.owned[0] & 1 << 2 != 0 && w.owned[1] & 2 != 0
            }),
            Property::sometimes("the guest goes on to a third", |_, w: &World| w.owned[EVE] & 1 << 2 != 0),
            Property::sometimes("a second attempt succeeds", |_, w: &World| w.owned[1] & 1 << 3 != 0),
            Property::sometimes("held", |_, w: &World| anybody(w, Phase::Held)),
            Property::sometimes("unknown, and it arrived", |_, w: &World| {
                anybody(w, Phase::Unknown) && w.owned[1] & 2 != 0
            }),
            Property::sometimes("unknown, and it did not", |_, w: &World| {
                anybody(w, Phase::Unknown) && w.refused[1] & 1 != 0
            }),
            Property::sometimes("an operator saves the copy of a dead source", |_, w: &World| {
                anybody(w, Phase::Rescuing) && !w.all[0].alive
            }),
        ]);
        all
    }
}
