//! Every state that can be reached, once; and whether each can end well.

use std::collections::HashMap;
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};

use super::moves::{
    Bounds, RULES, after, can_be_saved, is_at_rest, is_owned, is_quiet, is_settled, moves, needs_nobody,
};
use super::world::{ADA, By, Move, World};
use vmig::switchover::Phase;
use vmig::switchover::table::Row;

/// More than the right rules reach: a broken table may run away.
const STATES_MAX: usize = 4_000_000;

/// What was seen.
#[derive(Debug, Default)]
pub struct Seen {
    pub states: usize,
    pub steps: usize,
    pub quiet: usize,
    pub settled: usize,
}

/// A rule that was broken, and how it came to that.
#[derive(Debug)]
pub struct Broken {
    pub rule: &'static str,
    pub path: Vec<Move>,
    pub end: Box<World>,
}

struct Node {
    /// From where, by which move; the first has none.
    from: Option<(u32, Move)>,
    /// Where it goes on to without bad luck, and whether by itself.
    next: Vec<(u32, bool)>,
    is: [bool; 4],
}

// What is known of a node.
const SETTLED: usize = 0;
const OWNED: usize = 1;
const CAN_BE_SAVED: usize = 2;
const NEEDS_NOBODY: usize = 3;

struct Search<'a> {
    rules: &'a [Row],
    bounds: Bounds,
    index: HashMap<u64, u32>,
    nodes: Vec<Node>,
    todo: std::collections::VecDeque<(u32, World)>,
}

/// Walks through everything within the bounds. States are told apart by a hash of 64 bits, as stateright does.
pub fn explore(start: &[World], rules: &[Row], bounds: Bounds) -> Result<Seen, Broken> {
    let mut search = Search { rules, bounds, index: HashMap::new(), nodes: Vec::new(), todo: Default::default() };
    let mut seen = Seen::default();
    for world in start {
        search.reach(world.clone(), None)?;
    }
    let mut options = Vec::new();
    while let Some((at, world)) = search.todo.pop_front() {
        options.clear();
        moves(&world, bounds, &mut options);
        let (quiet, settled) = (is_quiet(&options), is_settled(&world));
        seen.quiet += usize::from(quiet);
        seen.settled += usize::from(quiet && settled);
        search.nodes[at as usize].is[SETTLED] = quiet && settled;
        if bounds.fair && options.is_empty() && !(settled && world.all[ADA].phase() == Phase::Empty) {
            return Err(search.broken("on a fair day the guest arrives", at, world));
        }
        if quiet && search.heeds_ends() && !world.all.iter().all(|p| !p.counts() || is_at_rest(p.phase())) {
            return Err(search.broken("nobody waits for what will not come", at, world));
        }
        for what in &options {
            let next = search.reach(after(&world, rules, *what), Some((at, *what)))?;
            seen.steps += 1;
            if matches!(what.by(), By::Nature | By::Operator) {
                search.nodes[at as usize].next.push((next, what.is_fair()));
            }
        }
    }
    seen.states = search.nodes.len();
    let lost =
        search.stuck(CAN_BE_SAVED, SETTLED, false).map(|at| ("from every state some resolve leads to one owner", at));
    let alone = || search.stuck(NEEDS_NOBODY, OWNED, true).map(|at| ("who can still ask needs no operator", at));
    match lost.or_else(alone).filter(|_| search.heeds_ends()) {
        None => Ok(seen),
        Some((rule, at)) => {
            let end = search.replay(start, at);
            Err(search.broken(rule, at, end))
        }
    }
}

impl Search<'_> {
    fn reach(&mut self, world: World, from: Option<(u32, Move)>) -> Result<u32, Broken> {
        let hash = BuildHasherDefault::<DefaultHasher>::default().hash_one(&world);
        if let Some(at) = self.index.get(&hash) {
            return Ok(*at);
        }
        let at = u32::try_from(self.nodes.len()).unwrap();
        self.index.insert(hash, at);
        let is = [false, is_owned(&world), can_be_saved(&world), needs_nobody(&world, self.bounds)];
        self.nodes.push(Node { from, next: Vec::new(), is });
        if let Some((rule, _)) = RULES.iter().filter(|(rule, _)| self.heeds(rule)).find(|(_, holds)| !holds(&world)) {
            let rule = world.wrong.filter(|_| self.bounds.only.is_none()).unwrap_or(rule);
            return Err(self.broken(rule, at, world));
        }
        if self.nodes.len() > STATES_MAX {
            return Err(self.broken("there is an end to it", at, world));
        }
        self.todo.push_back((at, world));
        Ok(at)
    }

    fn heeds(&self, rule: &str) -> bool {
        self.bounds.only.is_none_or(|only| only == rule)
    }

    /// Whether every history must be able to end well: not on a fair day, which has no deadlines.
    fn heeds_ends(&self) -> bool {
        !self.bounds.fair && self.bounds.only.is_none()
    }

    fn path(&self, mut at: u32) -> Vec<Move> {
        let mut path = Vec::new();
        while let Some((before, what)) = self.nodes[at as usize].from {
            path.push(what);
            at = before;
        }
        path.reverse();
        path
    }

    fn broken(&self, rule: &'static str, at: u32, end: World) -> Broken {
        Broken { rule, path: self.path(at), end: Box::new(end) }
    }

    /// The first state of this kind from which no way leads to one of that kind; `fair`: no operator and no deadline.
    fn stuck(&self, kind: usize, goal: usize, fair: bool) -> Option<u32> {
        let mut before = vec![Vec::new(); self.nodes.len()];
        for (at, node) in self.nodes.iter().enumerate() {
            for (next, _) in node.next.iter().filter(|(_, by_itself)| *by_itself || !fair) {
                before[*next as usize].push(u32::try_from(at).unwrap());
            }
        }
        let mut well: Vec<bool> = self.nodes.iter().map(|n| n.is[goal]).collect();
        let mut todo: Vec<usize> = (0..well.len()).filter(|at| well[*at]).collect();
        while let Some(at) = todo.pop() {
            for earlier in &before[at] {
                if !std::mem::replace(&mut well[*earlier as usize], true) {
                    todo.push(*earlier as usize);
                }
            }
        }
        let bad = (0..well.len()).find(|at| self.nodes[*at].is[kind] && !well[*at]);
        bad.map(|at| u32::try_from(at).unwrap())
    }

    fn replay(&self, start: &[World], at: u32) -> World {
        let mut first = at;
        while let Some((before, _)) = self.nodes[first as usize].from {
            first = before;
        }
        let mut world = start[first as usize].clone();
        for what in self.path(at) {
            world = after(&world, self.rules, what);
        }
        world
    }
}
