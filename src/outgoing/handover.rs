//! The switchover between two vmigs, source side, while there is a connection: carries out what the rules of
//! `switchover` say, and tells them what happened. What comes after the connection is in `aftermath`.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::complete::Lap;
use super::replies::Said;
use super::{Migration, Outcome};
use crate::error::{Error, Result};
use crate::options::Opt;
use crate::pacing::downtime::Parts;
use crate::status::State;
use crate::switchover::{Action, Event, Incarnation, Message, Phase, Vote};
use crate::wire::command::Command;
use crate::wire::{reply, stream};

/// What is left to do when the connection is closed.
pub(super) struct Rest {
    /// Actions of the last event, in order.
    pub(super) actions: VecDeque<Action>,
    /// Why the guest did not leave, or is not known to.
    pub(super) why: Option<Error>,
}

/// How far a switchover is.
pub(super) struct Course<'a> {
    pub(super) took: &'a mut Parts,
    lap: Lap,
    /// What is to be done next.
    actions: VecDeque<Action>,
    /// When `switchover-timeout` is over; none: it starts with the next wait.
    deadline: Option<Instant>,
    /// PREPARE was written whole: the destination understands words now.
    prepared: bool,
    why: Option<Error>,
}

impl<'a> Course<'a> {
    /// At the stop.
    pub(super) fn new(took: &'a mut Parts) -> Self {
        Self { took, lap: Lap::new(), actions: VecDeque::new(), deadline: None, prepared: false, why: None }
    }

    /// The guest stands still: what takes time now belongs to the switchover.
    pub(super) fn restart_lap(&mut self) {
        self.lap = Lap::new();
    }

    fn failed(&mut self, error: Error) {
        self.why.get_or_insert(error);
    }
}

/// A word of the destination, as the rules know it.
pub(super) fn message_of(said: &reply::Reply) -> Option<Message> {
    match *said {
        reply::Reply::Ready(epoch, incarnation) => {
            Some(Message::Ready { epoch, incarnation: Incarnation(incarnation) })
        }
        reply::Reply::Vote(epoch, incarnation, vote) => {
            let vote = match vote {
                reply::OWNED => Vote::Owned,
                reply::NEVER => Vote::Never,
                _ => Vote::Unknown,
            };
            Some(Message::Vote { epoch, incarnation: Incarnation(incarnation), vote })
        }
        _ => None,
    }
}

impl Migration<'_> {
    /// What calls the VMM back while the guest is about to leave, up to the state of its devices.
    pub(super) fn up_to_devices(&mut self, course: &mut Course<'_>) {
        self.job.keeper.drive();
        course.actions = self.job.keeper.step(Event::Begin { wait: false }).into();
        while let Some(action) = course.actions.front().copied() {
            if needs_no_connection(action) {
                return;
            }
            if let Action::Send(Message::Prepare { .. }) = action {
                self.saved = Some(self.save_devices());
                return;
            }
            course.actions.pop_front();
            if let Some(event) = self.carry_out(action, course) {
                course.actions = self.job.keeper.step(event).into();
            }
        }
    }

    /// Moves the ownership of a guest that is stopped. With `wait` the user is asked first; without, this goes on behind
    /// [`up_to_devices`](Self::up_to_devices).
    pub(super) fn switch_over(&mut self, mut course: Course<'_>, wait: bool) -> Result<Outcome> {
        self.job.keeper.drive();
        if wait {
            course.actions = self.job.keeper.step(Event::Begin { wait }).into();
        }
        loop {
            let mut next = None;
            while let Some(action) = course.actions.pop_front() {
                if needs_no_connection(action) {
                    course.actions.push_front(action);
                    return Ok(Outcome::Switched(Rest { actions: course.actions, why: course.why }));
                }
                next = self.carry_out(action, &mut course);
            }
            let event = next.unwrap_or_else(|| self.await_event(&mut course));
            course.actions = self.job.keeper.step(event).into();
        }
    }

    /// Does one thing; what comes of it, if the rules are to know at once.
    fn carry_out(&mut self, action: Action, course: &mut Course<'_>) -> Option<Event> {
        match action {
            Action::Release(epoch) => Some(match self.job.vmm.release(epoch) {
                Ok(()) => Event::Done,
                Err(error) => {
                    course.failed(error.in_phase("release"));
                    Event::Failed
                }
            }),
            Action::Send(Message::Prepare { epoch }) => self.send_all(epoch, course).err().map(|error| {
                let event = self.ending();
                course.failed(error);
                event
            }),
            Action::Decide => Some(self.decide(course)),
            Action::Send(Message::Go { epoch, incarnation }) => {
                self.word(Command::Go(epoch, incarnation.0)).err().map(|error| {
                    course.failed(error);
                    Event::LinkLost
                })
            }
            Action::Send(Message::Abort { epoch }) => {
                // In the middle of a section nobody would take it for a word.
                if course.prepared {
                    // The destination answers that we gave up, which is no reason.
                    course.why.iter().for_each(|why| self.job.status.blame(why.clone()));
                    // A destination that does not hear it has its deadline.
                    let why = course.why.as_ref().and_then(|why| self.words_for(why));
                    let told = why.map_or(Ok(()), |why| self.word(why));
                    let _ = told.and_then(|()| self.word(Command::Abort(epoch)));
                }
                None
            }
            Action::Arm => {
                course.deadline = None;
                None
            }
            // The others belong to the destination, or need no connection.
            _ => None,
        }
    }

    /// Devices and the last pages, then PREPARE.
    fn send_all(&mut self, epoch: u64, course: &mut Course<'_>) -> Result<()> {
        let mut devices = self.saved_devices()?.bodies;
        if self.verify.is_none() {
            stream::put_command(&mut devices.bytes, Command::Prepare(epoch));
        }
        course.took.devices = course.lap.time();
        self.send_rest(&devices, course.took, &mut course.lap).map_err(|e| e.in_phase("complete"))?;
        if self.verify.is_some() {
            self.verify().map_err(|e| e.in_phase("verify"))?;
            course.took.verify = course.lap.time();
            self.word(Command::Prepare(epoch))?;
        }
        course.prepared = true;
        self.publish();
        Ok(())
    }

    pub(super) fn word(&mut self, word: Command) -> Result<()> {
        let mut bytes = Vec::new();
        stream::put_command(&mut bytes, word);
        self.out.write(&bytes)
    }

    /// READY is here: the last moment at which a write to the stopped guest can be noticed, and a cancel obeyed.
    fn decide(&mut self, course: &mut Course<'_>) -> Event {
        course.took.load = course.lap.time();
        let same = self.verify_again().map_err(|e| e.in_phase("verify"));
        if self.verify.is_some() {
            course.took.verify += course.lap.time();
        }
        let quiet = same.and_then(|()| match &self.set {
            Some(set) => self.job.dirty.check_quiet(set).map_err(|e| e.in_phase("complete")),
            None => Ok(()),
        });
        match quiet.and_then(|()| self.job.status.check()).and_then(|()| self.job.status.commit()) {
            Ok(()) => Event::Committed,
            Err(error) => {
                course.failed(error);
                Event::Cancel
            }
        }
    }

    /// What an error on our side means.
    fn ending(&self) -> Event {
        match self.job.status.state() {
            State::Cancelling => Event::Cancel,
            _ if self.out.is_broken() || self.sender.is_broken() => Event::LinkLost,
            _ => Event::Failed,
        }
    }

    /// Waits for the next thing to happen.
    fn await_event(&mut self, course: &mut Course<'_>) -> Event {
        if self.job.keeper.phase() == Phase::PreSwitchover {
            let gone_on = self.job.status.advance(State::PreSwitchover).and_then(|()| self.job.status.await_go_on());
            return match gone_on {
                Ok(()) => Event::Continue,
                Err(error) => {
                    let event = self.ending();
                    course.failed(error);
                    if event == Event::LinkLost { Event::Failed } else { event }
                }
            };
        }
        let limit = self.job.options.time(Opt::SwitchoverTimeout);
        let deadline = *course.deadline.get_or_insert_with(|| Instant::now() + limit);
        let Some(replies) = &self.replies else { return Event::LinkLost };
        let (said, why) = replies.next_word(deadline.saturating_duration_since(Instant::now()));
        let event = match &said {
            Said::Word(word) => message_of(word).map_or(Event::Failed, Event::Heard),
            Said::Failed => Event::Failed,
            Said::Ended if self.job.status.is_committed() => Event::LinkLost,
            Said::Ended if self.job.status.state() == State::Cancelling => Event::Cancel,
            // From here on nobody hears an ABORT, and the connection is no error that ends the attempt.
            Said::Ended if self.job.status.is_link_lost() => Event::LinkLost,
            // Another thread of ours failed and ended everybody's waits.
            Said::Ended if self.job.wake.is_raised() => Event::Failed,
            Said::Ended => Event::LinkLost,
            Said::Nothing => Event::Deadline,
        };
        match (&event, why) {
            (Event::Heard(Message::Ready { .. }), _) => (),
            (Event::Heard(Message::Vote { vote: Vote::Owned, .. }), _) => {
                course.took.start = replies.started(Duration::ZERO).unwrap_or_default();
                course.took.go = course.lap.time().saturating_sub(course.took.start);
            }
            (Event::Deadline, _) => {
                let what = "the destination did not say READY, or what became of the guest, within";
                course.failed(Error::timeout(Opt::SwitchoverTimeout.name(), limit, what).in_phase("switchover"));
            }
            (Event::Failed, _) if self.job.wake.is_raised() => {
                course.failed(self.job.status.cause(Error::new(libc::EIO, "the migration failed")));
            }
            (_, why) => course.failed(
                why.unwrap_or_else(|| Error::new(libc::ECANCELED, "the migration was cancelled"))
                    .in_phase("complete"),
            ),
        }
        event
    }
}

/// What is done when the connection is closed, and everything that was set up is undone.
fn needs_no_connection(action: Action) -> bool {
    use Action::{Close, Forget, Reacquire, Reconnect, Resume};
    matches!(action, Close | Forget | Reacquire(_) | Reconnect | Resume)
}
