//! One side of the switchover, shared by the threads of a handle.
//!
//! The thread of a migration drives it. Everybody else only asks: what the vote on an attempt is, what epoch the guest
//! is owned with; or leaves the operator's word for the driver and waits until it was obeyed.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use super::{Action, EPOCH_MAX, Epoch, Event, Incarnation, Message, Phase, Resolution, Side, VOTES_MAX, Vote, step};
use crate::error::{Error, Result};
use crate::sys::eventfd::{EventFd, Wake};
use crate::sys::random::random;
use crate::thread::{current_token, lock};
use crate::wire::ask::{Ask, MigrationId};

/// The first epoch of a guest, unless the user says another.
pub const FIRST_EPOCH: Epoch = 1;

/// What to do with a question that came on a connection of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// Answer it with this.
    Vote(Message),
    /// It is about the attempt that the driver has at hand: only it knows.
    Driver(Message),
}

#[derive(Debug)]
struct Shared {
    side: Side,
    /// Token of the thread that drives.
    driver: Option<usize>,
    /// The operator's word, until the driver takes it.
    word: Option<Resolution>,
    /// The word that the driver took, until it was obeyed or not.
    taken: Option<Resolution>,
    /// Whether it was, until whoever left it has read that.
    obeyed: Option<Result<()>>,
    /// Which migration the attempts with these epochs belong to: those that arrived here.
    attempts: VecDeque<(Epoch, MigrationId)>,
}

/// One side and its driver.
#[derive(Debug)]
pub struct Keeper {
    shared: Mutex<Shared>,
    changed: Condvar,
    bell: EventFd,
    quit: Arc<Wake>,
}

impl Keeper {
    /// Of a handle that is new: whether its guest is to run or to be replaced is not known yet.
    pub fn new() -> Result<Self> {
        let incarnation = Incarnation(u64::from_be_bytes(random()?));
        let shared = Shared {
            side: Side::owner(incarnation, FIRST_EPOCH),
            driver: None,
            word: None,
            taken: None,
            obeyed: None,
            attempts: VecDeque::new(),
        };
        Ok(Self {
            shared: Mutex::new(shared),
            changed: Condvar::new(),
            bell: EventFd::new()?,
            quit: Arc::new(Wake::new()?),
        })
    }

    /// Where it stands.
    pub fn phase(&self) -> Phase {
        lock(&self.shared).side.phase
    }

    /// The epoch it owns with, or of the present or last attempt.
    pub fn epoch(&self) -> Epoch {
        lock(&self.shared).side.epoch
    }

    /// Which handle this is.
    pub fn incarnation(&self) -> Incarnation {
        lock(&self.shared).side.incarnation
    }

    /// The guest is owned with this epoch: for a guest that had others in an earlier life.
    pub fn set_epoch(&self, epoch: Epoch) -> Result<()> {
        let mut shared = lock(&self.shared);
        let side = &mut shared.side;
        if side.phase != Phase::Owner {
            return Err(Error::new(libc::EPERM, "the guest is not owned here: its epoch comes with it"));
        }
        if epoch < side.epoch {
            let text = "an epoch only grows: a lock that remembers the highest would fence this guest";
            return Err(Error::invalid(text).expected_got(format!("at least {}", side.epoch), epoch));
        }
        if epoch > EPOCH_MAX {
            return Err(Error::invalid("the epoch is too high").expected_got(format!("at most {EPOCH_MAX}"), epoch));
        }
        side.epoch = epoch;
        Ok(())
    }

    /// A guest is expected: whoever was here before is not owned. Returns what to [restore](Self::restore).
    pub fn expect(&self) -> (Phase, Epoch) {
        let side = &mut lock(&self.shared).side;
        let before = (side.phase, side.epoch);
        side.phase = Phase::Empty;
        before
    }

    /// Nobody came, and nothing was touched.
    pub fn restore(&self, (phase, epoch): (Phase, Epoch)) {
        let side = &mut lock(&self.shared).side;
        (side.phase, side.epoch) = (phase, epoch);
    }

    /// A guest came or went by a way that has no epochs (a QEMU, a file): whether it is owned here now.
    pub fn moved_without_votes(&self, owned: bool) {
        let side = &mut lock(&self.shared).side;
        if owned {
            side.epoch = (side.epoch + 1).min(EPOCH_MAX);
        }
        side.phase = if owned { Phase::Owner } else { Phase::Empty };
    }

    /// This attempt arrives here.
    pub fn remember(&self, epoch: Epoch, migration: MigrationId) {
        let attempts = &mut lock(&self.shared).attempts;
        if attempts.len() == VOTES_MAX {
            attempts.pop_front();
        }
        attempts.push_back((epoch, migration));
    }

    /// The calling thread drives from here on.
    pub fn drive(&self) {
        lock(&self.shared).driver = Some(current_token());
    }

    /// What becomes of the side by an event, and what is to be done. The driver's only.
    pub fn step(&self, event: Event) -> Vec<Action> {
        let mut shared = lock(&self.shared);
        let (next, actions) = step(&shared.side, event);
        shared.side = next;
        actions
    }

    /// The driver is about to wait in a named state. A word that led back to one was not obeyed, for this reason.
    pub fn idle(&self, why: Option<&Error>) {
        let mut shared = lock(&self.shared);
        if shared.taken.take().is_some() {
            let unknown = || Error::new(libc::EAGAIN, "the state did not change");
            shared.obeyed = Some(Err(why.cloned().unwrap_or_else(unknown)));
            self.changed.notify_all();
        }
    }

    /// The driver is done: whoever left word hears whether it came true.
    pub fn rest(&self) {
        let mut shared = lock(&self.shared);
        shared.driver = None;
        if let Some(word) = shared.word.take().or(shared.taken.take()) {
            let owner = shared.side.phase == Phase::Owner;
            let came_true = if word == Resolution::Run { owner } else { shared.side.phase == Phase::Empty };
            let error = || Error::new(libc::EALREADY, "the switchover was decided otherwise before");
            shared.obeyed = Some(if came_true { Ok(()) } else { Err(error()) });
        }
        self.changed.notify_all();
    }

    /// Whether somebody drives, and waits for an operator's word or may take one.
    pub fn may_resolve(&self) -> bool {
        let shared = lock(&self.shared);
        shared.driver.is_some() && shared.side.phase.named().is_some()
    }

    /// Leaves the operator's word and waits until it was obeyed, or why it was not. `EINVAL`: there is nothing to decide.
    /// The waits of the driver have their own limits.
    pub fn resolve(&self, word: Resolution) -> Result<()> {
        self.ask(word)?;
        let mut shared = lock(&self.shared);
        loop {
            if let Some(result) = shared.obeyed.take() {
                return result;
            }
            shared = self.changed.wait(shared).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// What became of the word, if it was obeyed or not; for who left it by [`ask`](Self::ask).
    pub fn take_answer(&self) -> Option<Result<()>> {
        lock(&self.shared).obeyed.take()
    }

    /// Leaves the operator's word. `EINVAL`: there is nothing to decide.
    pub fn ask(&self, word: Resolution) -> Result<()> {
        let mut shared = lock(&self.shared);
        if shared.driver == Some(current_token()) {
            return Err(Error::new(libc::EDEADLK, "cannot resolve from a callback of the switchover itself"));
        }
        if shared.driver.is_none() || shared.side.phase.named().is_none() {
            return Err(Error::invalid("nothing to resolve: the guest has an owner, or is about to have one"));
        }
        // Whoever left the last one may not have read the answer yet.
        if shared.word.is_some() || shared.taken.is_some() || shared.obeyed.is_some() {
            return Err(Error::new(libc::EBUSY, "another call to resolve is under way"));
        }
        shared.word = Some(word);
        self.bell.set();
        Ok(())
    }

    /// The operator's word, if there is a new one. The driver's only.
    pub fn take_word(&self) -> Option<Event> {
        let mut shared = lock(&self.shared);
        let word = shared.word.take()?;
        shared.taken = Some(word);
        Some(Event::Resolve(word))
    }

    /// Rings when word was left, or a question came: the driver waits for it beside its connection.
    pub fn bell(&self) -> &EventFd {
        &self.bell
    }

    /// Ends the driver's waits in named states: the handle is being freed.
    pub fn quit(&self) -> &Arc<Wake> {
        &self.quit
    }

    /// Says what is known of an attempt, in any phase. A stranger's, and one that is too old, is UNKNOWN.
    pub fn asked(&self, ask: &Ask) -> Asked {
        let shared = lock(&self.shared);
        let (epoch, whom) = (ask.epoch, Incarnation(ask.incarnation));
        let go = Message::Go { epoch, incarnation: whom };
        let side = &shared.side;
        let known = shared.attempts.iter().any(|attempt| *attempt == (epoch, ask.migration));
        let open = matches!(side.phase, Phase::Ready | Phase::Stranded | Phase::Starting | Phase::Rescuing);
        if known && open && shared.driver.is_some() && epoch == side.epoch && whom == side.incarnation {
            return Asked::Driver(go);
        }
        let vote = if known { side.vote(epoch, whom) } else { Vote::Unknown };
        Asked::Vote(Message::Vote { epoch, incarnation: side.incarnation, vote })
    }
}

impl AsFd for Keeper {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: MigrationId = MigrationId([1; 16]);

    fn ask(keeper: &Keeper, migration: MigrationId, epoch: Epoch) -> Vote {
        let incarnation = lock(&keeper.shared).side.incarnation.0;
        match keeper.asked(&Ask { migration, epoch, incarnation }) {
            Asked::Vote(Message::Vote { vote, .. }) => vote,
            other => panic!("{other:?}"),
        }
    }

    /// A destination that took a guest over.
    fn arrived() -> Keeper {
        let keeper = Keeper::new().unwrap();
        keeper.expect();
        keeper.remember(4, ID);
        let incarnation = lock(&keeper.shared).side.incarnation;
        let heard = Event::Heard;
        let go = heard(Message::Go { epoch: 4, incarnation });
        for event in [heard(Message::Prepare { epoch: 4 }), Event::Done, Event::Done, go, Event::Done] {
            keeper.step(event);
        }
        keeper
    }

    #[test]
    fn votes_are_for_those_who_know_the_attempt() {
        let keeper = arrived();
        assert_eq!((keeper.phase(), keeper.epoch()), (Phase::Owner, 5));
        assert_eq!(ask(&keeper, ID, 4), Vote::Owned);
        assert_eq!(ask(&keeper, MigrationId([2; 16]), 4), Vote::Unknown);
        assert_eq!(ask(&keeper, ID, 6), Vote::Unknown);
        let stranger = Ask { migration: ID, epoch: 4, incarnation: 0 };
        assert!(matches!(keeper.asked(&stranger), Asked::Vote(Message::Vote { vote: Vote::Unknown, .. })));
    }

    #[test]
    fn an_epoch_only_grows() {
        let keeper = arrived();
        assert_eq!(keeper.set_epoch(4).unwrap_err().errno(), libc::EINVAL);
        assert_eq!(keeper.set_epoch(EPOCH_MAX + 1).unwrap_err().errno(), libc::EINVAL);
        keeper.set_epoch(9).unwrap();
        let before = keeper.expect();
        assert_eq!(keeper.set_epoch(10).unwrap_err().errno(), libc::EPERM);
        keeper.restore(before);
        assert_eq!((keeper.phase(), keeper.epoch()), (Phase::Owner, 9));
    }

    #[test]
    fn there_is_nothing_to_resolve_without_a_driver() {
        let keeper = arrived();
        assert_eq!(keeper.resolve(Resolution::Run).unwrap_err().errno(), libc::EINVAL);
    }

    #[test]
    fn an_answer_waits_for_who_asked() {
        let keeper = Keeper::new().unwrap();
        lock(&keeper.shared).side.phase = Phase::Held;
        std::thread::scope(|scope| scope.spawn(|| keeper.drive()).join().unwrap());
        let refused = || keeper.ask(Resolution::Run).unwrap_err().errno();
        keeper.ask(Resolution::Run).unwrap();
        assert_eq!(refused(), libc::EBUSY);
        assert_eq!(keeper.take_word(), Some(Event::Resolve(Resolution::Run)));
        assert_eq!(refused(), libc::EBUSY);
        keeper.idle(None);
        assert_eq!(refused(), libc::EBUSY, "the answer was not read");
        assert_eq!(keeper.take_answer().unwrap().unwrap_err().errno(), libc::EAGAIN);
        keeper.ask(Resolution::Discard).unwrap();
        keeper.rest();
        assert_eq!(keeper.take_answer().unwrap().unwrap_err().errno(), libc::EALREADY);
    }
}
