//! What may happen next, and what must never be.

use super::world::{ADA, BOB, By, EVE, Move, World, is_arriving, is_leaving};
use vmig::switchover::table::Row;
use vmig::switchover::{Action, Event, Message, Phase, Resolution};

/// How much may happen in one history.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    pub attempts: u8,
    pub reconnects: u8,
    pub crashes: bool,
    /// Nothing goes wrong, nobody changes his mind, and everybody has time.
    pub fair: bool,
    /// The operator decides without having found out anything.
    pub rash: bool,
    /// Only this rule is looked at.
    pub only: Option<&'static str>,
}

impl Bounds {
    /// So many attempts and reconnects, and with `crashes` one crash of either side.
    pub const fn new(attempts: u8, reconnects: u8, crashes: bool) -> Self {
        Self { attempts, reconnects, crashes, fair: false, rash: false, only: None }
    }
}

/// More messages than this in one direction are a flood.
const INBOX_MAX: usize = 6;

pub fn moves(world: &World, bounds: Bounds, out: &mut Vec<Move>) {
    possible(world, bounds, out);
    if bounds.fair {
        out.retain(|m| m.is_fair() || matches!(m, Move::Migrate { to: BOB, .. } | Move::Continue(_)));
    }
}

fn possible(world: &World, bounds: Bounds, out: &mut Vec<Move>) {
    for who in 0..world.all.len() {
        process_moves(world, bounds, who, out);
    }
    if world.late.is_some_and(|(who, _)| world.all[who].listens()) {
        out.push(Move::HearLate);
    }
    for (link, l) in world.links.iter().enumerate() {
        for end in 0..2 {
            let p = &world.all[l.ends[end]];
            if !l.open[end] || !p.listens() {
                continue;
            }
            if let Some(message) = l.inbox[end].first() {
                out.push(Move::Hear { link, end });
                // PREPARE ends a stream, and a stream that broke is not read on.
                let may_be_late = world.late.is_none() && !matches!(message, Message::Prepare { .. });
                out.extend(may_be_late.then_some(Move::Delay { link, end }));
            }
            out.push(if l.open[1 - end] { Move::Cut { link, end } } else { Move::Notice { link, end } });
        }
    }
}

fn process_moves(world: &World, bounds: Bounds, who: usize, out: &mut Vec<Move>) {
    let p = &world.all[who];
    if !p.alive || p.foreign {
        return;
    }
    let phase = p.phase();
    if bounds.crashes && who != EVE && !world.crashes[who] {
        out.push(Move::Crash(who));
    }
    let before_go = matches!(phase, Phase::PreSwitchover | Phase::Releasing | Phase::Preparing | Phase::Deciding);
    if before_go && !p.cancel {
        out.push(Move::AskCancel(who));
    }
    if let Some(task) = p.task {
        task_moves(world, who, task, out);
        return;
    }
    if phase == Phase::Owner && world.attempts < bounds.attempts && world.link_of(who, 0).is_none() {
        for to in (0..3).filter(|to| *to != who) {
            let other = &world.all[to];
            if other.counts() && other.listens() && other.phase() == Phase::Empty && world.link_of(to, 1).is_none() {
                out.extend([false, true].map(|wait| Move::Migrate { from: who, to, wait }));
            }
        }
    }
    match phase {
        Phase::PreSwitchover => out.extend([Move::Continue(who), Move::Fail(who)]),
        Phase::Preparing => out.push(Move::Fail(who)),
        Phase::Ready | Phase::Stranded => out.push(Move::CancelArrival(who)),
        _ => (),
    }
    if p.cancel && matches!(phase, Phase::PreSwitchover | Phase::Preparing) {
        out.push(Move::HearCancel(who));
    }
    if p.armed {
        out.push(Move::Deadline(who));
    }
    if p.retry {
        out.push(Move::Retry(who));
    }
    if p.reconnecting && world.reconnects < bounds.reconnects {
        // The one it was, or whoever has its address now.
        let mut there = vec![p.to];
        there.extend((who == ADA && p.to == BOB).then_some(EVE));
        out.extend(
            there.iter().filter(|to| world.all[**to].listens()).map(|to| Move::Reconnect { from: who, to: *to }),
        );
    }
    if phase.named().is_some() {
        let legal =
            [Resolution::Run, Resolution::Discard].into_iter().filter(|r| bounds.rash || world.may_resolve(who, *r));
        out.extend(legal.map(|what| Move::Resolve(who, what)));
    }
}

fn task_moves(world: &World, who: usize, task: Action, out: &mut Vec<Move>) {
    match task {
        Action::Decide if world.all[who].cancel => out.push(Move::Finish(who, Event::Cancel)),
        Action::Decide => out.push(Move::Finish(who, Event::Committed)),
        // A fence that says yes knows what an operator must know.
        Action::Fence(_) => {
            out.push(Move::Finish(who, Event::Failed));
            out.extend(world.may_resolve(who, Resolution::Run).then_some(Move::Finish(who, Event::Done)));
        }
        _ => out.extend([Move::Finish(who, Event::Done), Move::Fail(who)]),
    }
}

/// The world after a move.
pub fn after(world: &World, rules: &[Row], what: Move) -> World {
    let mut w = world.clone();
    match what {
        Move::Migrate { from, to, wait } => {
            w.attempts += 1;
            w.all[from].to = to;
            w.connect(from, to);
            w.feed(rules, from, Event::Begin { wait }, None);
        }
        Move::Continue(who) => w.feed(rules, who, Event::Continue, None),
        Move::AskCancel(who) => w.all[who].cancel = true,
        Move::CancelArrival(who) | Move::HearCancel(who) => w.feed(rules, who, Event::Cancel, None),
        Move::Resolve(who, what) => {
            w.killed |= what == Resolution::Discard && w.all[who].phase() == Phase::Held; // his decision
            w.feed(rules, who, Event::Resolve(what), None);
        }
        Move::Hear { link, end } => {
            let message = w.links[link].inbox[end].remove(0);
            w.hear(rules, w.links[link].ends[end], message, Some((link, end)));
        }
        Move::HearLate => {
            let late = w.late.take();
            late.into_iter().for_each(|(who, message)| w.hear(rules, who, message, None));
        }
        Move::Delay { link, end } => {
            w.late = w.links[link].inbox[end].first().map(|m| (w.links[link].ends[end], *m));
            w.lose(rules, link, end);
        }
        Move::Reconnect { from, to } => {
            w.reconnects += 1;
            w.all[from].reconnecting = false;
            // The old connection is closed unread before a new one is taken.
            let old = w.links.iter().position(|l| l.ends == [from, to] && l.open[1]);
            old.into_iter().for_each(|link| w.lose(rules, link, 1));
            w.connect(from, to);
            w.feed(rules, from, Event::Linked, None);
            if to == w.all[from].to && is_arriving(w.all[to].phase()) {
                w.feed(rules, to, Event::Linked, None);
            }
        }
        Move::Finish(who, event) => w.finish(rules, who, event),
        Move::Fail(who) if w.all[who].task.is_some() => w.finish(rules, who, Event::Failed),
        Move::Fail(who) => w.feed(rules, who, Event::Failed, None),
        Move::Deadline(who) => {
            w.all[who].armed = false;
            w.feed(rules, who, Event::Deadline, None);
        }
        Move::Retry(who) => {
            w.all[who].retry = false;
            w.feed(rules, who, Event::RetryDue, None);
        }
        Move::Notice { link, end } | Move::Cut { link, end } => w.lose(rules, link, end),
        Move::Crash(who) => w.crash(who),
    }
    w.links.retain(|l| l.open != [false; 2]);
    w
}

/// A rule in words, and whether it holds.
pub type Rule = (&'static str, fn(&World) -> bool);

/// The rules that hold in every state.
pub const RULES: [Rule; 12] = [
    ("never two owners", |w| runners(w).count() <= 1),
    ("an owner has the resources and the memory", |w| {
        runners(w).all(|who| w.all[who].lock == w.all[who].runs_with() && w.all[who].copy)
    }),
    ("the guest is lost only by the crash of its holder", |w| w.killed || (0..3).any(|who| w.holds(who))),
    ("no owner only in a named state, or on the way to one", |w| {
        let ends = |who: usize| {
            let p = &w.all[who];
            p.phase().named().is_some() || p.task.is_some() || p.armed
        };
        w.killed || runners(w).next().is_some() || (0..3).any(|who| w.holds(who) && ends(who))
    }),
    ("every wait has a deadline", |w| {
        use Phase::*;
        let waits = |p| {
            matches!(p, Preparing | Committed | Asking | TakingBack | TakeBackLater | Ready | Stranded)
                || matches!(p, Refusing | RefuseLater)
        };
        w.all.iter().all(|p| !p.counts() || !waits(p.phase()) || p.armed)
    }),
    ("who has no guest keeps nothing of it", |w| {
        let clean = |p: &super::world::Process| !p.copy && (p.lock.is_none() || p.leftover);
        w.all.iter().all(|p| !p.counts() || p.phase() != Phase::Empty || p.task.is_some() || clean(p))
    }),
    ("a connection ends with its attempt", |w| {
        use Phase::*;
        let linked = |p| matches!(p, PreSwitchover | Releasing | Preparing | Deciding | Committed | Asking);
        (0..3).all(|who| w.link_of(who, 0).is_none() || linked(w.all[who].phase()))
    }),
    ("a task fits its phase", |w| {
        use Phase::*;
        w.all.iter().all(|p| match (p.phase(), p.task) {
            (Releasing | Refusing, task) => matches!(task, Some(Action::Release(_))),
            (TakingBack | Acquiring, task) => matches!(task, Some(Action::Reacquire(_))),
            (Fencing, task) => matches!(task, Some(Action::Fence(_))),
            (Loading, task) => matches!(task, Some(Action::Load)),
            (Starting | Rescuing, task) => matches!(task, Some(Action::Start)),
            (Deciding, task) => matches!(task, Some(Action::Decide)),
            (TakeBackLater | RefuseLater, task) => task.is_none() && p.retry,
            (_, task) => task.is_none(),
        })
    }),
    ("who counts on a connection has one, and who has none knows it", |w| {
        use Phase::*;
        (0..3).filter(|who| w.all[*who].counts()).all(|who| match w.all[who].phase() {
            PreSwitchover | Preparing | Committed => w.link_of(who, 0).is_some(),
            Ready => w.link_of(who, 1).is_some(),
            Stranded => !w.links.iter().any(|l| l.meant && l.ends[1] == who && l.open[1]),
            _ => true,
        })
    }),
    ("nobody is in doubt before GO was decided", |w| {
        use Phase::*;
        w.all.iter().all(|p| p.committed || !matches!(p.phase(), Committed | Asking | Fencing | Unknown))
    }),
    ("nothing is said without end", |w| w.links.iter().all(|l| l.inbox.iter().all(|i| i.len() <= INBOX_MAX))),
    ("every step is right", |w| w.wrong.is_none()),
];

fn runners(w: &World) -> impl Iterator<Item = usize> {
    (0..3).filter(|who| w.all[*who].counts() && w.all[*who].phase().may_run())
}

/// Where a side may stay for ever.
pub fn is_at_rest(phase: Phase) -> bool {
    matches!(phase, Phase::Owner | Phase::PreSwitchover | Phase::Held | Phase::Unknown | Phase::Empty)
}

/// Nothing goes on by itself.
pub fn is_quiet(moves: &[Move]) -> bool {
    !moves.iter().any(|m| m.by() == By::Nature)
}

/// One owner, and nobody else who has to do with the guest.
pub fn is_settled(w: &World) -> bool {
    let (owners, others): (Vec<_>, Vec<_>) = w.all.iter().filter(|p| p.counts()).partition(|p| p.phase().owns());
    owners.len() == 1 && others.iter().all(|p| p.phase() == Phase::Empty)
}

/// Somebody still has what it takes to run the guest.
pub fn can_be_saved(w: &World) -> bool {
    (0..3).any(|who| {
        let p = &w.all[who];
        w.holds(who) || p.counts() && is_arriving(p.phase()) && p.side.epoch == w.highest
    })
}

/// The guest has an owner, and nobody else leads it anywhere. A destination may still wait for its deadline.
pub fn is_owned(w: &World) -> bool {
    let owners = w.all.iter().filter(|p| p.counts() && p.phase().owns()).count();
    owners == 1 && !w.all.iter().any(|p| p.counts() && is_leaving(p.phase()) && !p.phase().owns())
}

/// Needs no operator and no deadline to end well, if luck turns now: nobody crashed, and who has lost the answer, or
/// may lose it, can still ask for it.
pub fn needs_nobody(w: &World, bounds: Bounds) -> bool {
    use Phase::*;
    let leaving = |p: &Phase| is_leaving(*p) && *p != PreSwitchover;
    let phases = || w.all.iter().filter(|p| p.counts()).map(|p| p.phase()).filter(leaving);
    let asking = phases().filter(|p| matches!(p, Deciding | Committed | Asking)).count();
    !w.killed
        && w.crashes == [false; 2]
        && phases().next().is_some()
        && phases().all(|p| !matches!(p, Fencing | Unknown | Held))
        && asking + usize::from(w.reconnects) <= usize::from(bounds.reconnects)
}
