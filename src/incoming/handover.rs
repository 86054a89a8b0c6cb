//! The switchover between two vmigs, destination side: from PREPARE until the guest is here, or never will be. Carries out
//! what the rules of `switchover` say, and tells them what happened.

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::door::Door;
use super::hand::Hand;
use super::{Job, Memory, Peer, target};
use crate::error::{Error, Result};
use crate::options::Opt;
use crate::ram::RamList;
use crate::status::State;
use crate::switchover::{Action, Event, Incarnation, Message, Phase, Resolution, Vote};
use crate::transport;
use crate::transport::stream::{StreamInput, StreamOutput};
use crate::vmm::RunReport;
use crate::wire::command::Command;
use crate::wire::hello::Attempt;
use crate::wire::reply::{self, Reply};
use crate::wire::stream::{self, Element};

/// Between two tries of the release hook.
const PAUSE: Duration = Duration::from_millis(100);
/// How long a word may take from its first byte to its last.
const WORD: Duration = Duration::from_secs(2);

/// A message as the source is told it.
pub(super) fn reply_of(message: &Message) -> Option<Reply> {
    match *message {
        Message::Ready { epoch, incarnation } => Some(Reply::Ready(epoch, incarnation.0)),
        Message::Vote { epoch, incarnation, vote } => {
            let vote = match vote {
                Vote::Owned => reply::OWNED,
                Vote::Never => reply::NEVER,
                Vote::Unknown => reply::UNKNOWN,
            };
            Some(Reply::Vote(epoch, incarnation.0, vote))
        }
        _ => None,
    }
}

/// A guest of which everything was sent.
pub(super) struct Handover<'a> {
    job: &'a Job,
    peer: &'a mut Peer,
    input: &'a mut StreamInput,
    /// Whether the guest ran at the source; or what was missing.
    loaded: Result<bool>,
    /// None: given back, or kept by the guest.
    hand: Option<Hand<'a>>,
    memory: Option<Memory>,
    /// Blocks whose pages came: thrown away if the guest does not.
    came: RamList,
    linked: bool,
    /// When `switchover-timeout` is over; none: it starts with the next wait.
    deadline: Option<Instant>,
    retry: Option<Instant>,
    cancelled: bool,
    /// The source broke the connection off before GO, and goes on over another: what came is kept.
    again: bool,
    events: VecDeque<Event>,
    why: Option<Error>,
    /// What became of the connection, which by itself is no reason to fail.
    lost: Option<Error>,
    started: Option<RunReport>,
}

impl<'a> Handover<'a> {
    pub(super) fn new(
        job: &'a Job,
        peer: &'a mut Peer,
        input: &'a mut StreamInput,
        loaded: Result<bool>,
        hand: Hand<'a>,
        memory: Memory,
    ) -> Self {
        Self {
            job,
            peer,
            input,
            loaded,
            came: Arc::clone(hand.rest()),
            hand: Some(hand),
            memory: Some(memory),
            linked: true,
            deadline: None,
            retry: None,
            cancelled: false,
            again: false,
            events: VecDeque::new(),
            why: None,
            lost: None,
            started: None,
        }
    }

    /// Goes on until the guest is here or never will be by this attempt. On failure nothing of it is left. Some: the source
    /// goes on from what came, over another connection.
    pub(super) fn run(mut self, attempt: Attempt, door: &Door) -> Result<Option<(Error, Memory)>> {
        let keeper = &self.job.keeper;
        door.keep();
        keeper.remember(attempt.epoch, attempt.migration);
        keeper.drive();
        let mut event = Event::Heard(Message::Prepare { epoch: attempt.epoch });
        loop {
            let mut next = None;
            for action in keeper.step(event) {
                next = self.carry_out(action).or(next);
            }
            if matches!(keeper.phase(), Phase::Owner | Phase::Empty) {
                break;
            }
            let Some(happened) = next.or_else(|| self.await_event()) else { break };
            event = happened;
        }
        if keeper.phase() == Phase::Owner {
            self.peer.hang_up();
            return Ok(None);
        }
        if keeper.phase() == Phase::Empty && self.again {
            keeper.rest();
            self.job.status.found_again();
            let why = self.why.unwrap_or_else(|| Error::new(libc::ECONNRESET, "the connection broke"));
            return Ok(Some((why, self.memory.unwrap_or_default())));
        }
        self.again = false;
        self.forget();
        self.peer.let_words_arrive();
        let unused =
            || Error::new(libc::EEXIST, "another guest came here with this epoch before: the source tries again");
        Err(self.why.unwrap_or_else(unused).on_side("destination"))
    }

    /// Does one thing; what comes of it, if the rules are to know at once.
    fn carry_out(&mut self, action: Action) -> Option<Event> {
        match action {
            Action::Load => Some(self.result(self.loaded.clone().map(drop))),
            Action::Reacquire(epoch) => {
                let result = self.job.vmm.reacquire(epoch).map_err(|e| e.in_phase("reacquire"));
                Some(self.result(result))
            }
            Action::Start => {
                let result = self.start();
                Some(self.result(result))
            }
            Action::Release(epoch) => {
                let result = self.job.vmm.release(epoch).map_err(|e| e.in_phase("release"));
                if let Err(error) = &result {
                    self.job.vmm.log().to("incoming").error(format_args!("after the guest did not arrive: {error}"));
                }
                Some(self.result(result))
            }
            Action::Send(message) => self.send(&message).err().map(|error| {
                self.why.get_or_insert(error.in_phase("switchover"));
                self.lose_link()
            }),
            Action::Arm => {
                self.deadline = None;
                None
            }
            Action::RetryLater => {
                self.retry = Some(Instant::now() + PAUSE);
                None
            }
            Action::Announce => {
                if self.started.is_some_and(|report| report.changed) {
                    self.job.vmm.announce();
                }
                None
            }
            Action::Forget => {
                self.forget();
                None
            }
            // The others belong to the source.
            _ => None,
        }
    }

    fn result(&mut self, result: Result<()>) -> Event {
        match result {
            Ok(()) => Event::Done,
            Err(error) => {
                self.why.get_or_insert(error);
                Event::Failed
            }
        }
    }

    /// GO: the memory that was handed over is the guest's from now on, and the guest runs unless it was paused.
    fn start(&mut self) -> Result<()> {
        let run = self.loaded.clone()? && self.job.options.on(Opt::Autostart);
        if let Some(hand) = &mut self.hand {
            hand.open().map_err(|e| e.in_phase("hand over"))?;
        }
        let report = self.job.vmm.take_over(run).map_err(|e| e.in_phase("start"));
        match report {
            Ok(report) => {
                self.started = Some(report);
                if let Some(hand) = self.hand.take() {
                    hand.keep();
                }
                Ok(())
            }
            Err(error) => {
                // An operator may try again; else the source has its memory back before it hears of it.
                match self.job.keeper.phase() {
                    Phase::Rescuing => self.job.status.uncommit(),
                    _ => self.hand = None,
                }
                Err(error)
            }
        }
    }

    fn send(&mut self, message: &Message) -> Result<()> {
        let Some(said) = reply_of(message).filter(|_| self.linked) else { return Ok(()) };
        let mut bytes = Vec::new();
        match (message, &self.why, self.started) {
            (Message::Vote { vote: Vote::Owned, .. }, _, Some(took)) => {
                reply::put(&mut bytes, &Reply::Started(took.hook_ns + took.handlers_ns));
            }
            (Message::Vote { vote: Vote::Never, .. }, Some(why), _) => {
                reply::put(&mut bytes, &Reply::Error(why.clone().on_side("destination")));
            }
            _ => (),
        }
        reply::put(&mut bytes, &said);
        self.peer.write(&bytes)
    }

    /// Nothing of the guest is left here, unless it is still to come.
    fn forget(&mut self) {
        if self.again {
            return;
        }
        self.hand = None;
        // It prepares memory that is thrown away next.
        if self.memory.take().is_some() {
            target::discard(self.job, &self.came, true);
        }
    }

    fn lose_link(&mut self) -> Event {
        self.linked = false;
        self.peer.hang_up();
        Event::LinkLost
    }

    /// Waits for the next thing to happen; none: the handle is being freed.
    fn await_event(&mut self) -> Option<Event> {
        let keeper = &self.job.keeper;
        loop {
            if let Some(event) = self.events.pop_front() {
                return Some(self.admit(event));
            }
            self.show();
            if keeper.quit().is_raised() && keeper.phase() == Phase::RefuseLater {
                return None;
            }
            keeper.bell().clear();
            if let Some(word) = keeper.take_word() {
                return Some(self.admit(word));
            }
            if self.receive_visitor() {
                continue;
            }
            if !self.cancelled && self.job.wake.is_raised() {
                return Some(self.cancel());
            }
            let limit = self.job.options.time(Opt::SwitchoverTimeout);
            let deadline = *self.deadline.get_or_insert_with(|| Instant::now() + limit);
            if self.linked && self.input.buffered() > 0 {
                return Some(self.hear());
            }
            let retry = self.retry.filter(|_| keeper.phase() == Phase::RefuseLater);
            let now = Instant::now();
            if now >= deadline {
                let lost = self.lost.as_ref().map(|e| format!(" ({})", e.text())).unwrap_or_default();
                let what = format!("the source said neither GO nor ABORT{lost} within");
                let late = Error::timeout(Opt::SwitchoverTimeout.name(), limit, what);
                self.why.get_or_insert(late.in_phase("switchover"));
                return Some(Event::Deadline);
            }
            if retry.is_some_and(|at| at <= now) {
                return Some(Event::RetryDue);
            }
            if self.wait(retry.map_or(deadline, |at| at.min(deadline))) {
                return Some(self.hear());
            }
        }
    }

    /// Waits until the connection, the bell, a cancel or the time; true: the connection has something to say.
    fn wait(&self, until: Instant) -> bool {
        let keeper = &self.job.keeper;
        // A cancel is heard once.
        let wake = if self.cancelled { keeper.quit() } else { &self.job.wake };
        let channel = self.linked.then(|| self.peer.channel());
        transport::hears(channel, keeper.bell().as_fd(), wake.as_fd(), Some(until))
    }

    /// The word on the connection.
    fn hear(&mut self) -> Event {
        self.input.set_limit(WORD);
        let mut word = stream::read_element(self.input);
        if let Ok(Element::Command(Command::Error(why))) = word {
            self.why.get_or_insert(why);
            word = stream::read_element(self.input);
        }
        let event = match word {
            Ok(Element::Command(Command::Go(epoch, incarnation))) => {
                Event::Heard(Message::Go { epoch, incarnation: Incarnation(incarnation) })
            }
            Ok(Element::Command(Command::Abort(epoch))) => {
                let text = "the source gave the attempt up";
                self.why.get_or_insert(Error::new(libc::ECONNABORTED, text).in_phase("switchover"));
                Event::Heard(Message::Abort { epoch })
            }
            Ok(_) => {
                self.lost =
                    Some(Error::new(libc::EPROTO, "the source said neither GO nor ABORT, but something else"));
                self.lose_link()
            }
            Err(error) => {
                self.lost = Some(error);
                self.lose_link()
            }
        };
        self.admit(event)
    }

    /// A question about this attempt: its connection takes the place of the one before.
    fn receive_visitor(&mut self) -> bool {
        let Some(visitor) = self.job.reception.visitor() else { return false };
        let Ok(channel) = visitor.caller.channel(self.job.keeper.quit()) else { return false };
        if self.linked {
            let lost = self.lose_link();
            self.events.push_back(lost);
        }
        self.peer.replace(Arc::clone(&channel), StreamOutput::new(Arc::clone(&channel), WORD));
        *self.input = StreamInput::new(channel, WORD);
        self.linked = true;
        self.lost = None;
        self.events.extend([Event::Linked, Event::Heard(visitor.go)]);
        true
    }

    /// GO, and an operator's RUN, are decided against cancel before they count.
    fn admit(&mut self, event: Event) -> Event {
        let keeper = &self.job.keeper;
        let phase = keeper.phase();
        let decides = match event {
            Event::Heard(Message::Go { epoch, incarnation }) => {
                matches!(phase, Phase::Ready | Phase::Stranded)
                    && (epoch, incarnation) == (keeper.epoch(), keeper.incarnation())
            }
            Event::Resolve(Resolution::Run) => phase == Phase::Stranded,
            _ => false,
        };
        if decides && self.job.status.commit().is_err() {
            self.events.push_front(event);
            return self.cancel();
        }
        event
    }

    /// The user's cancel, or a thread that failed.
    fn cancel(&mut self) -> Event {
        self.cancelled = true;
        // A source that comes again has taken the guest back: it would ask after a GO that it may have sent.
        if self.peer.agreed.is_some() && self.job.status.is_link_lost() {
            self.again = true;
            self.why.get_or_insert(self.job.status.cause(Error::new(libc::ECONNRESET, "the connection broke")));
            return Event::Heard(Message::Abort { epoch: self.job.keeper.epoch() });
        }
        let error =
            self.job.status.cause(Error::new(libc::ECANCELED, "the migration was cancelled at the destination"));
        self.why.get_or_insert(error);
        Event::Cancel
    }

    /// Shows that the source is lost, or found again.
    fn show(&self) {
        let phase = self.job.keeper.phase();
        if phase == Phase::Stranded {
            let text = "everything of the guest is here, but the source was lost before it said that the guest may run: \
                        unless it asks in time the guest goes on there; if it is dead, call vmig_resolve";
            let reason = self.why.as_ref().or(self.lost.as_ref());
            let why = reason.map(|e| format!(" ({})", e.text())).unwrap_or_default();
            let error = Error::new(libc::ECONNRESET, format!("{text}{why}")).in_phase("switchover");
            self.job.status.name(State::SwitchoverUnknown, error.on_side("destination"), false);
            self.job.keeper.idle(self.why.as_ref());
        } else {
            self.job.status.found_again();
        }
    }
}
