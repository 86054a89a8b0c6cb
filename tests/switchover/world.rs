//! The world the switchover lives in: three processes, the connections between them, an operator, and bad luck.
//!
//! `Ada` has the guest, `Bob` is to get it, and `Eve` is another handle that may answer at Bob's address. A process is
//! the real [`Side`] and what a driver keeps beside it; every transition goes through the real `step_by`.

use vmig::switchover::table::Row;
use vmig::switchover::{Action, Epoch, Event, Incarnation, Message, Phase, Resolution, Side, step_by};

pub const ADA: usize = 0;
pub const BOB: usize = 1;
pub const EVE: usize = 2;

/// A handle in its process, with what its driver keeps.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Process {
    pub side: Side,
    pub alive: bool,
    /// Busy with another guest: what it owns is not ours.
    pub foreign: bool,
    /// Answers whatever incarnation is asked.
    pub careless: bool,
    /// Whom it migrates to.
    pub to: usize,
    /// What it is carrying out.
    pub task: Option<Action>,
    pub armed: bool,
    pub retry: bool,
    pub reconnecting: bool,
    /// A cancel was asked for, and decided before GO.
    pub cancel: bool,
    /// GO was decided before a cancel.
    pub committed: bool,
    /// The epoch its resources are acquired with.
    pub lock: Option<Epoch>,
    /// The release hook failed to the last.
    pub leftover: bool,
    /// Its memory holds the guest.
    pub copy: bool,
}

impl Process {
    fn new(side: Side) -> Self {
        Self {
            alive: true,
            foreign: false,
            careless: false,
            to: BOB,
            task: None,
            armed: false,
            retry: false,
            reconnecting: false,
            cancel: false,
            committed: false,
            lock: None,
            leftover: false,
            copy: false,
            side,
        }
    }

    pub fn phase(&self) -> Phase {
        self.side.phase
    }

    /// Not dead, and not some other guest's.
    pub fn counts(&self) -> bool {
        self.alive && !self.foreign
    }

    /// Alive and ready to be handed an event.
    pub fn listens(&self) -> bool {
        self.alive && self.task.is_none()
    }

    /// The epoch it runs the guest with, if it may.
    pub fn runs_with(&self) -> Option<Epoch> {
        let arriving = matches!(self.phase(), Phase::Starting | Phase::Rescuing);
        self.phase().may_run().then(|| self.side.epoch + u64::from(arriving))
    }
}

/// A connection. What one end sent before it closed can still be read at the other, until that one finds it broken.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Link {
    /// Source and destination.
    pub ends: [usize; 2],
    /// To the destination of the attempt; else somebody just asks.
    pub meant: bool,
    pub open: [bool; 2],
    /// Messages on their way to each end.
    pub inbox: [Vec<Message>; 2],
}

/// Everything there is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct World {
    pub all: [Process; 3],
    pub links: Vec<Link>,
    /// A message of a connection that is gone, still on its way to somebody.
    pub late: Option<(usize, Message)>,
    pub attempts: u8,
    pub reconnects: u8,
    pub crashes: [bool; 2],
    /// The highest epoch the guest ever ran with, and who ran with which.
    pub highest: Epoch,
    pub owned: [u8; 3],
    /// Attempts a process promised never to own.
    pub refused: [u8; 3],
    /// The guest died in a crash, as it would without any migration, or an operator gave up the side that held it.
    pub killed: bool,
    /// The first rule of conduct that was broken.
    pub wrong: Option<&'static str>,
}

/// What may happen next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Move {
    // The user's.
    Migrate {
        from: usize,
        to: usize,
        wait: bool,
    },
    Continue(usize),
    AskCancel(usize),
    CancelArrival(usize),
    // The operator's.
    Resolve(usize, Resolution),
    // What goes its way.
    Hear {
        link: usize,
        end: usize,
    },
    HearLate,
    HearCancel(usize),
    Reconnect {
        from: usize,
        to: usize,
    },
    Finish(usize, Event),
    Deadline(usize),
    Retry(usize),
    /// An end finds that the other has closed.
    Notice {
        link: usize,
        end: usize,
    },
    // Bad luck.
    Cut {
        link: usize,
        end: usize,
    },
    /// The same, and what was under way comes later.
    Delay {
        link: usize,
        end: usize,
    },
    Fail(usize),
    Crash(usize),
}

/// Who makes a move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    User,
    Operator,
    Nature,
    BadLuck,
}

impl Move {
    /// Goes its way without anybody's doing, and in time.
    pub fn is_fair(self) -> bool {
        self.by() == By::Nature && !matches!(self, Move::Deadline(_))
    }

    pub fn by(self) -> By {
        match self {
            Move::Migrate { .. } | Move::Continue(_) | Move::AskCancel(_) | Move::CancelArrival(_) => By::User,
            Move::Resolve(..) => By::Operator,
            Move::Cut { .. } | Move::Delay { .. } | Move::Fail(_) | Move::Crash(_) => By::BadLuck,
            _ => By::Nature,
        }
    }
}

/// Leading a guest away, not yet settled: what a source goes through.
pub fn is_leaving(phase: Phase) -> bool {
    use Phase::*;
    matches!(
        phase,
        PreSwitchover | Releasing | Preparing | Deciding | Committed | Asking | Fencing | Unknown | TakingBack
    ) || matches!(phase, TakeBackLater | Held)
}

/// Letting a guest arrive, with the chance that it will.
pub fn is_arriving(phase: Phase) -> bool {
    use Phase::*;
    matches!(phase, Loading | Acquiring | Ready | Stranded | Starting | Rescuing)
}

/// Phases that share a deadline.
fn stage(phase: Phase) -> u8 {
    use Phase::*;
    match phase {
        Owner | Empty | PreSwitchover | Releasing | Fencing | Unknown | Held | Loading | Acquiring => 0,
        Preparing | Deciding => 1,
        Committed => 2,
        Asking => 3,
        TakingBack | TakeBackLater => 4,
        Ready | Stranded | Starting | Rescuing => 5,
        Refusing | RefuseLater => 6,
    }
}

/// A set of epochs; only broken rules get beyond the last.
pub fn bit(epoch: Epoch) -> u8 {
    1 << epoch.min(7)
}

impl World {
    /// Ada has the guest.
    pub fn new(eve: Side, foreign: bool, careless: bool) -> Self {
        let mut all = [
            Process::new(Side::owner(Incarnation(ADA as u64), 0)),
            Process::new(Side::empty(Incarnation(BOB as u64))),
            Process { foreign, careless, ..Process::new(eve) },
        ];
        (all[ADA].lock, all[ADA].copy) = (Some(0), true);
        Self {
            all,
            links: Vec::new(),
            late: None,
            attempts: 0,
            reconnects: 0,
            crashes: [false; 2],
            highest: 0,
            owned: [1, 0, 0],
            refused: [0; 3],
            killed: false,
            wrong: None,
        }
    }

    /// Has the guest, for better or worse: without it the guest is lost.
    pub fn holds(&self, who: usize) -> bool {
        let p = &self.all[who];
        p.counts() && (p.phase().may_run() || is_leaving(p.phase()) && p.side.epoch == self.highest)
    }

    /// What the operator must have found out before he says so.
    pub fn may_resolve(&self, who: usize, what: Resolution) -> bool {
        let p = &self.all[who];
        let moved_on = self.highest > p.side.epoch;
        if what == Resolution::Discard {
            // Not while the start hook runs: it may fail yet.
            let arrived = moved_on && self.all.iter().all(|o| !o.alive || o.phase().owns() || !o.phase().may_run());
            // Or to let the destination have it, which waits for the operator.
            let wanted = |o: &Process| o.counts() && o.phase() == Phase::Stranded && o.side.epoch == self.highest;
            let yielded = p.phase() == Phase::Held && self.all.iter().any(wanted);
            return arrived || yielded || p.phase() == Phase::Stranded;
        }
        let mut others = (0..3).filter(|other| *other != who).map(|other| &self.all[other]).filter(|o| o.counts());
        !moved_on
            && others.all(|other| match other.phase() {
                Phase::Empty | Phase::Refusing | Phase::RefuseLater => true,
                // In `held` the source knows that no GO was sent, or that it was refused.
                phase => p.phase() == Phase::Held && is_arriving(phase) && !phase.may_run(),
            })
    }

    pub fn say(&mut self, what: &'static str) {
        self.wrong.get_or_insert(what);
    }

    /// The link on which `who` is this end.
    pub fn link_of(&self, who: usize, end: usize) -> Option<usize> {
        self.links.iter().position(|l| l.ends[end] == who && l.open[end])
    }

    pub fn connect(&mut self, from: usize, to: usize) {
        let meant = self.all[from].to == to;
        self.links.push(Link { ends: [from, to], meant, open: [true; 2], inbox: Default::default() });
    }

    fn post(&mut self, who: usize, message: Message, via: Option<usize>) {
        let as_source = matches!(message, Message::Prepare { .. } | Message::Go { .. } | Message::Abort { .. });
        let end = usize::from(!as_source);
        if let Some(link) = via.or_else(|| self.link_of(who, end)) {
            let link = &mut self.links[link];
            if link.open[end] && link.open[1 - end] {
                link.inbox[1 - end].push(message);
            }
        }
    }

    fn shut(&mut self, link: usize, end: usize) {
        self.links[link].open[end] = false;
        self.links[link].inbox[end].clear();
    }

    /// Hands an event to a process and carries out what it answers.
    pub fn feed(&mut self, rules: &[Row], who: usize, event: Event, via: Option<usize>) {
        let before = self.all[who].side.clone();
        let (after, actions) = step_by(rules, &before, event);
        let p = &mut self.all[who];
        p.side = after;
        if stage(before.phase) != stage(p.phase()) {
            (p.armed, p.retry) = (false, false);
        }
        if p.phase() != Phase::Asking {
            p.reconnecting = false;
        }
        for action in &actions {
            self.act(who, *action, via);
        }
        self.watch(who, &before, event, &actions);
        if self.all[who].phase() == Phase::Owner {
            (self.all[who].cancel, self.all[who].committed) = (false, false);
        }
    }

    fn act(&mut self, who: usize, action: Action, via: Option<usize>) {
        if action.is_task() {
            return self.begin(who, action);
        }
        let p = &mut self.all[who];
        match action {
            Action::Send(message) => self.post(who, message, via),
            Action::Close => {
                let link = self.link_of(who, 0);
                link.into_iter().for_each(|link| self.shut(link, 0));
            }
            Action::Reconnect => p.reconnecting = true,
            Action::Arm => p.armed = true,
            Action::RetryLater => p.retry = true,
            Action::Forget => (p.copy, p.cancel, p.committed) = (false, false, false),
            _ => (), // Resume and Announce: watched
        }
    }

    fn begin(&mut self, who: usize, task: Action) {
        let p = &mut self.all[who];
        let wrong = match task {
            _ if p.task.is_some() => Some("a task was begun while another was carried out"),
            Action::Release(epoch) if p.lock != Some(epoch) => Some("what was not acquired was released"),
            Action::Fence(epoch) if epoch != p.side.epoch + 1 => Some("the wrong epoch was fenced"),
            _ => None,
        };
        p.copy |= task == Action::Load;
        p.task = Some(task);
        wrong.into_iter().for_each(|wrong| self.say(wrong));
    }

    /// A task ends. What it did in the world happens whatever the rules say.
    pub fn finish(&mut self, rules: &[Row], who: usize, event: Event) {
        let p = &mut self.all[who];
        let (task, done) = (p.task.take(), event == Event::Done);
        match task {
            Some(Action::Release(_)) if done => p.lock = None,
            Some(Action::Release(_)) if is_leaving(p.phase()) => p.lock = None, // the worst case: half of it is gone
            Some(Action::Release(_)) => p.leftover = true,
            Some(Action::Reacquire(epoch)) => p.lock = done.then_some(epoch),
            Some(Action::Decide) => p.committed = event == Event::Committed,
            _ => (),
        }
        self.feed(rules, who, event, None);
    }

    /// A message arrives, by a connection or, late, by none.
    pub fn hear(&mut self, rules: &[Row], who: usize, mut message: Message, via: Option<(usize, usize)>) {
        if let (true, Message::Go { incarnation, .. }) = (self.all[who].careless, &mut message) {
            *incarnation = self.all[who].side.incarnation;
        }
        let answers = |w: &Self| via.map_or(0, |(link, end)| w.links[link].inbox[1 - end].len());
        let (before, queued) = (self.all[who].side.clone(), answers(self));
        self.feed(rules, who, Event::Heard(message), via.map(|(link, _)| link));
        let answered = answers(self) > queued;
        let open = via.is_some_and(|(link, _)| self.links[link].open == [true; 2]);
        if !self.all[who].foreign {
            self.watch_hearing(who, &before, message, open.then_some(answered));
        }
    }

    /// An end finds its connection broken; what was under way to it is lost.
    pub fn lose(&mut self, rules: &[Row], link: usize, end: usize) {
        self.shut(link, end);
        let who = self.links[link].ends[end];
        if end == 0 || self.links[link].meant && is_arriving(self.all[who].phase()) {
            self.feed(rules, who, Event::LinkLost, None);
        }
    }

    pub fn crash(&mut self, who: usize) {
        let had = self.holds(who);
        self.crashes[who] = true;
        let incarnation = self.all[who].side.incarnation;
        self.all[who] = Process { alive: false, ..Process::new(Side::empty(incarnation)) };
        for end in 0..2 {
            for link in 0..self.links.len() {
                if self.links[link].ends[end] == who {
                    self.shut(link, end);
                }
            }
        }
        self.late = self.late.filter(|(to, _)| *to != who);
        self.killed |= had && !(0..3).any(|other| self.holds(other));
    }
}
