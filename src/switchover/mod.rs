//! Who may run the guest: the switchover protocol as one pure function of one side's state and what happened to it.
//!
//! [`step`] takes a [`Side`] and an [`Event`] and gives the next side and the [`Action`]s to carry out, in order. It does
//! no I/O, takes no lock and knows no clock. Both halves drive it with real connections and hooks; the model checker of
//! tests/switchover_model.rs drives the same function with every loss, delay, failure and crash it can think of. The
//! rules are the rows of [`table::ROWS`]; what they guarantee and what an operator must know is in docs/switchover.md.
//!
//! # Driving it
//!
//! - One side, one driver: events are handed in one after the other, and the actions of one are carried out before the
//!   next. Other threads (cancel, resolve) queue their event and wake the driver.
//! - An action that [waits](Action::is_task) ends in [`Event::Done`] or [`Event::Failed`]; until then nothing else is
//!   handed in. So no row has to say what a message means while a hook runs.
//! - [`Action::Arm`] starts `switchover-timeout` anew, [`Action::RetryLater`] a short pause; when they are over the
//!   driver hands in [`Event::Deadline`] and [`Event::RetryDue`]. An event that no row awaits is old news and ignored.
//! - A connection that breaks, or whose peer breaks the rules, is [`Event::LinkLost`], once; a connection that comes in
//!   its place is opened only after that.

pub mod keeper;
pub mod table;

use table::{Do, If, On, ROWS, Row};

/// Counts the acquisitions of a guest, by anyone: it travels with the guest and only grows, so a disk lock can fence by
/// it. An attempt is known by the epoch `e` its source owns with; the destination acquires `e + 1`, and a source that
/// takes the guest back acquires `e + 2`, so no two attempts share an epoch.
pub type Epoch = u64;

pub use crate::wire::ask::EPOCH_MAX;

/// Votes a side keeps; of older attempts it knows nothing any more, which is always safe to say.
pub const VOTES_MAX: usize = 64;

/// Which handle: drawn at random when it is made. A process that was restarted, or another one at the same address, is
/// another incarnation and knows nothing of what was promised there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Incarnation(pub u64);

/// Where a side stands. The first part leads a guest away, the second lets one arrive; both begin or end in `Owner`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Phase {
    /// Has the guest, running or paused. The only phase (with the next) that may `cont`.
    Owner,
    /// Still owns the guest, which is stopped until the user says continue (`pause-before-switchover`).
    PreSwitchover,
    /// The release hook runs.
    Releasing,
    /// The last pages, the devices and PREPARE are under way; READY is to come.
    Preparing,
    /// READY is here; GO or a cancel, whichever was decided first.
    Deciding,
    /// GO may have been seen: from here on the guest never resumes here by itself.
    Committed,
    /// The answer to GO got lost; reconnects and repeats GO.
    Asking,
    /// Nobody answered in time; the fence hook is asked.
    Fencing,
    /// Only an operator can know.
    Unknown,
    /// The reacquire hook runs, to take the guest back.
    TakingBack,
    /// The reacquire hook failed and will be called again.
    TakeBackLater,
    /// The reacquire hook failed until the deadline: the guest is stopped here and nowhere else.
    Held,
    /// No guest here.
    Empty,
    /// Everything was received; devices are loaded and checked.
    Loading,
    /// The reacquire hook runs, for a guest that arrives.
    Acquiring,
    /// READY was said; GO or ABORT is to come.
    Ready,
    /// READY was said and the connection is lost: the source may ask again, or be dead.
    Stranded,
    /// GO came; the start hook runs.
    Starting,
    /// An operator said RUN; the start hook runs.
    Rescuing,
    /// NEVER was said; the release hook runs.
    Refusing,
    /// The release hook failed and will be called again.
    RefuseLater,
}

/// Every phase.
pub const PHASES: [Phase; 21] = [
    Phase::Owner,
    Phase::PreSwitchover,
    Phase::Releasing,
    Phase::Preparing,
    Phase::Deciding,
    Phase::Committed,
    Phase::Asking,
    Phase::Fencing,
    Phase::Unknown,
    Phase::TakingBack,
    Phase::TakeBackLater,
    Phase::Held,
    Phase::Empty,
    Phase::Loading,
    Phase::Acquiring,
    Phase::Ready,
    Phase::Stranded,
    Phase::Starting,
    Phase::Rescuing,
    Phase::Refusing,
    Phase::RefuseLater,
];

impl Phase {
    /// Whether this side owns the guest: `vmig_start` and `cont` are `EPERM` otherwise.
    pub fn owns(self) -> bool {
        matches!(self, Phase::Owner | Phase::PreSwitchover)
    }

    /// Whether the guest may execute here: the owner, and who is about to become it.
    pub fn may_run(self) -> bool {
        self.owns() || matches!(self, Phase::Starting | Phase::Rescuing)
    }

    /// The named state, for status: what an operator sees when nobody owns the guest, and may [resolve](Event::Resolve).
    pub fn named(self) -> Option<&'static str> {
        match self {
            Phase::Held => Some("held"),
            Phase::Asking | Phase::Fencing | Phase::Unknown | Phase::Stranded => Some("switchover-unknown"),
            _ => None,
        }
    }
}

/// What a destination says of an attempt, when asked by a repeated GO.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Vote {
    /// The guest was taken over here.
    Owned,
    /// The guest was not taken over here, and never will be.
    Never,
    /// Nothing is known of this attempt here.
    Unknown,
}

/// What the two sides tell each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the fields are the same throughout")]
pub enum Message {
    /// Source: all pages and devices came before this; load and check them.
    Prepare { epoch: Epoch },
    /// Destination: ready to run the guest. Its incarnation is the only one that may answer from now on.
    Ready { epoch: Epoch, incarnation: Incarnation },
    /// Source: run it. May be repeated; then it asks for the vote.
    Go { epoch: Epoch, incarnation: Incarnation },
    /// Source: the attempt is off. Never follows GO.
    Abort { epoch: Epoch },
    /// Destination: OWNED, NEVER or UNKNOWN, and who says so.
    Vote { epoch: Epoch, incarnation: Incarnation, vote: Vote },
}

/// What an operator decides in a named state. docs/switchover.md says what he must have found out before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Resolution {
    /// This side is to own the guest.
    Run,
    /// This side is to give it up.
    Discard,
}

/// What happened to a side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// The guest was stopped for the switchover, the destination agreeing (`switchover-ack`). With `wait` the user is
    /// to say [`Continue`](Event::Continue) first.
    Begin {
        /// `pause-before-switchover` is on.
        wait: bool,
    },
    /// The user's `migrate-continue`.
    Continue,
    /// The user's cancel, at either side. At the source it is handed in only if it was decided before GO was.
    Cancel,
    /// [`Action::Decide`] decided for GO: from here on a cancel is refused.
    Committed,
    /// A message came.
    Heard(Message),
    /// There is a connection to the peer again.
    Linked,
    /// The connection broke, and was closed.
    LinkLost,
    /// The action that was waited for succeeded.
    Done,
    /// The action that was waited for failed; or, between actions, anything did that ends the attempt.
    Failed,
    /// `switchover-timeout` is over.
    Deadline,
    /// The pause before the next try is over.
    RetryDue,
    /// The operator's word.
    Resolve(Resolution),
}

/// What a side does. Those marked *task* end in [`Event::Done`] or [`Event::Failed`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Task: the release hook, for what was acquired with this epoch.
    Release(Epoch),
    /// Task: the reacquire hook, with a higher epoch than ever. One that failed holds nothing.
    Reacquire(Epoch),
    /// Task: the fence hook. Done: nobody has ever run, or will ever run, the guest with this epoch.
    Fence(Epoch),
    /// Task: load and check what was received.
    Load,
    /// Task: start the guest, unless it was paused at the source. Failed: it did not run a single instruction.
    Start,
    /// Task: one compare-and-swap between GO and cancel. Ends in [`Event::Committed`] or [`Event::Cancel`].
    Decide,
    /// Send this, if there is a connection. For PREPARE: after the last pages and the devices.
    Send(Message),
    /// Close the connection, if there is one, when what was sent is flushed.
    Close,
    /// Try to connect to the destination again until it works or the deadline is over; then [`Event::Linked`].
    Reconnect,
    /// Start `switchover-timeout` anew.
    Arm,
    /// Start the pause before the next try.
    RetryLater,
    /// The guest is ours as before: let it run, unless the user paused it. Should that fail it is ours and paused.
    Resume,
    /// The guest is ours now: the announce hook, when it runs.
    Announce,
    /// The guest is not ours: its memory may be freed or used for another.
    Forget,
}

impl Action {
    /// Whether the driver hands in nothing but the result until the action is done.
    pub fn is_task(self) -> bool {
        use Action::{Decide, Fence, Load, Reacquire, Release, Start};
        matches!(self, Release(_) | Reacquire(_) | Fence(_) | Load | Start | Decide)
    }
}

/// One side of a switchover. Kept as long as the handle: the votes must outlive the attempts.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Side {
    /// Who this is.
    pub incarnation: Incarnation,
    /// Where it stands.
    pub phase: Phase,
    /// Of an owner the epoch it owns with, else that of the present or last attempt.
    pub epoch: Epoch,
    /// Who said READY: at the source, the only one whose votes count.
    pub peer: Option<Incarnation>,
    /// What was decided here about attempts, oldest first.
    votes: Vec<(Epoch, Vote)>,
}

impl Side {
    /// A side that has a guest and owns it with this epoch.
    pub fn owner(incarnation: Incarnation, epoch: Epoch) -> Self {
        Self { phase: Phase::Owner, epoch, ..Self::empty(incarnation) }
    }

    /// A side without a guest.
    pub fn empty(incarnation: Incarnation) -> Self {
        Self { incarnation, phase: Phase::Empty, epoch: 0, peer: None, votes: Vec::new() }
    }

    /// What this side says of an attempt with that incarnation. Of another incarnation it knows nothing.
    pub fn vote(&self, epoch: Epoch, incarnation: Incarnation) -> Vote {
        let kept = self.votes.iter().find(|(about, _)| *about == epoch);
        kept.filter(|_| incarnation == self.incarnation).map_or(Vote::Unknown, |(_, vote)| *vote)
    }

    fn keep(&mut self, vote: Vote) {
        if self.votes.len() == VOTES_MAX {
            self.votes.remove(0);
        }
        self.votes.push((self.epoch, vote));
    }

    /// Whether a row's condition holds for an event.
    fn meets(&self, condition: If, event: &Event) -> bool {
        let (epoch, incarnation) = match *event {
            Event::Heard(Message::Go { epoch, incarnation }) => (epoch, incarnation == self.incarnation),
            Event::Heard(Message::Vote { epoch, incarnation, .. }) => (epoch, Some(incarnation) == self.peer),
            Event::Heard(Message::Prepare { epoch } | Message::Abort { epoch } | Message::Ready { epoch, .. }) => {
                (epoch, true)
            }
            _ => (self.epoch, true),
        };
        match condition {
            If::Always => true,
            If::Epoch => epoch == self.epoch,
            If::Exact => epoch == self.epoch && incarnation,
            If::New => epoch <= EPOCH_MAX && self.votes.iter().all(|(about, _)| *about != epoch),
        }
    }

    /// Does what a row says; what concerns the outside is returned.
    fn perform(&mut self, what: Do, event: &Event) -> Option<Action> {
        let (epoch, incarnation) = (self.epoch, self.incarnation);
        let send = |message| Some(Action::Send(message));
        match what {
            Do::Release(epochs) => Some(Action::Release(epoch + epochs)),
            Do::Reacquire(epochs) => Some(Action::Reacquire(epoch + epochs)),
            Do::Fence(epochs) => Some(Action::Fence(epoch + epochs)),
            Do::SendPrepare => send(Message::Prepare { epoch }),
            Do::SendReady => send(Message::Ready { epoch, incarnation }),
            Do::SendGo => send(Message::Go { epoch, incarnation: self.peer? }),
            Do::SendAbort => send(Message::Abort { epoch }),
            Do::Vote(vote) => {
                self.keep(vote);
                send(Message::Vote { epoch, incarnation, vote })
            }
            Do::Answer => match *event {
                Event::Heard(Message::Go { epoch, incarnation: whom }) => {
                    send(Message::Vote { epoch, incarnation, vote: self.vote(epoch, whom) })
                }
                // Refused, and what was voted on an attempt of this number was another guest's.
                Event::Heard(Message::Prepare { epoch }) => {
                    send(Message::Vote { epoch, incarnation, vote: Vote::Unknown })
                }
                _ => None,
            },
            Do::Own(epochs) => {
                self.epoch += epochs;
                None
            }
            Do::Plain(action) => Some(action),
        }
    }

    /// Learns what a message tells: which attempt this is, and who is at the other end.
    fn learn(&mut self, event: &Event) {
        match *event {
            Event::Begin { .. } => self.peer = None,
            Event::Heard(Message::Prepare { epoch }) => self.epoch = epoch,
            Event::Heard(Message::Ready { incarnation, .. }) => self.peer = Some(incarnation),
            _ => (),
        }
    }
}

/// What becomes of a side by an event, and what is to be done, in this order.
pub fn step(side: &Side, event: Event) -> (Side, Vec<Action>) {
    step_by(ROWS, side, event)
}

/// [`step`] by other rules: for tests that break one and see whether anybody notices.
pub fn step_by(rows: &[Row], side: &Side, event: Event) -> (Side, Vec<Action>) {
    let mut next = side.clone();
    let on = On::of(&event);
    let fits = |row: &&Row| row.at.is_none_or(|at| at == side.phase) && row.on == on && side.meets(row.when, &event);
    let Some(row) = rows.iter().find(fits) else {
        return (next, Vec::new());
    };
    next.phase = row.to.unwrap_or(side.phase);
    if next.phase != side.phase {
        next.learn(&event);
    }
    let actions = row.then.iter().filter_map(|what| next.perform(*what, &event)).collect();
    (next, actions)
}

#[cfg(test)]
mod tests;
