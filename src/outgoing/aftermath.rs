//! The switchover between two vmigs, source side, when its connection is gone: asks the destination again, takes the
//! guest back, or waits for an operator's word.

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::handover::{Rest, message_of};
use super::{Job, resume};
use crate::error::{Error, Result};
use crate::options::Opt;
use crate::status::State;
use crate::switchover::{Action, Event, Message, Phase};
use crate::transport::stream::{StreamInput, StreamOutput};
use crate::transport::{self, Channel};
use crate::vmm::StopReason;
use crate::wire::ask::{self, Ask};
use crate::wire::reply;

/// Between two tries of a hook, and of a connection.
const PAUSE: Duration = Duration::from_millis(100);
/// Longest try of a connection: an operator's word waits for it.
const TRY: Duration = Duration::from_secs(2);
/// How long a reply may take from its first byte to its last.
const REPLY: Duration = Duration::from_secs(2);

/// What the driver waits for next.
struct Aftermath<'a> {
    job: &'a Job,
    link: Option<Arc<dyn Channel>>,
    /// When `switchover-timeout` is over; none: it starts with the next wait.
    deadline: Option<Instant>,
    /// When a hook is to be called again.
    retry: Option<Instant>,
    /// A connection is to be made; not before then.
    reconnect: Option<Instant>,
    /// Why the guest did not leave, or is not known to.
    why: Error,
    /// The last thing that went wrong with it.
    trouble: Option<Error>,
    /// The operator gave up a guest that was nowhere else.
    dropped: bool,
}

/// Goes on until the guest has an owner, or the handle is freed. Leaves the guest where it belongs and reports.
pub(super) fn settle(job: &Job, rest: Rest) {
    let keeper = &job.keeper;
    let mut aftermath = Aftermath::new(job, rest.why);
    aftermath.run(rest.actions, true);
    match keeper.phase() {
        Phase::Owner => aftermath.take_back(),
        Phase::Empty if aftermath.dropped => job.status.end(Err(aftermath.why)),
        Phase::Empty => job.status.end(Ok(())),
        // The handle is being freed.
        _ => aftermath.show(true),
    }
    keeper.rest();
}

/// Takes the guest back before GO, and lets it run as before. Some: it is held here, or the handle is being freed, and
/// this is left to settle.
pub(super) fn take_back(job: &Job, rest: Rest) -> Result<Option<Rest>> {
    let mut aftermath = Aftermath::new(job, rest.why);
    aftermath.run(rest.actions, false);
    if job.keeper.phase() != Phase::Owner {
        return Ok(Some(Rest { actions: VecDeque::new(), why: Some(aftermath.why) }));
    }
    job.keeper.rest();
    job.vmm.start(StopReason::NotOwner)?;
    resume(&job.vmm)?;
    Ok(None)
}

impl<'a> Aftermath<'a> {
    fn new(job: &'a Job, why: Option<Error>) -> Self {
        job.vmm.unseal();
        if job.keeper.phase() != Phase::Owner
            && let Err(error) = job.vmm.stop(StopReason::NotOwner)
        {
            job.vmm.log().to("outgoing").error(format_args!("after the guest was let go: {error}"));
        }
        let why = why.unwrap_or_else(|| Error::new(libc::ECANCELED, "the migration was cancelled"));
        Self { job, link: None, deadline: None, retry: None, reconnect: None, why, trouble: None, dropped: false }
    }

    /// Until the guest has an owner; without `patient`, or nobody but an operator knows who it is.
    fn run(&mut self, mut actions: VecDeque<Action>, patient: bool) {
        loop {
            let mut next = None;
            while let Some(action) = actions.pop_front() {
                next = self.carry_out(action).or(next);
            }
            let phase = self.job.keeper.phase();
            if matches!(phase, Phase::Owner | Phase::Empty) || (phase == Phase::Held && !patient) {
                return;
            }
            let event = match next {
                Some(event) => event,
                None => {
                    self.show(false);
                    let Some(event) = self.await_event() else { return };
                    event
                }
            };
            actions = self.job.keeper.step(event).into();
            self.dropped = phase == Phase::Held && self.job.keeper.phase() == Phase::Empty;
        }
    }

    /// Does one thing; what comes of it, if the rules are to know at once.
    fn carry_out(&mut self, action: Action) -> Option<Event> {
        let vmm = &self.job.vmm;
        match action {
            Action::Reacquire(epoch) => Some(self.result(vmm.reacquire(epoch), "reacquire")),
            Action::Fence(epoch) => Some(self.result(vmm.fence(epoch), "fence")),
            Action::Close => {
                if let Some(link) = self.link.take() {
                    link.shutdown();
                }
                None
            }
            Action::Reconnect => {
                self.link = None;
                // The first try is at once; after that a peer that hangs up at once is not asked without a pause.
                self.reconnect = Some(self.reconnect.map_or_else(Instant::now, |_| Instant::now() + PAUSE));
                None
            }
            Action::Send(Message::Go { epoch, incarnation }) => {
                let ask = Ask { migration: self.job.migration, epoch, incarnation: incarnation.0 };
                self.ask(&ask).err().map(|error| {
                    self.trouble = Some(error);
                    Event::LinkLost
                })
            }
            Action::Arm => {
                self.deadline = None;
                None
            }
            Action::RetryLater => {
                self.retry = Some(Instant::now() + PAUSE);
                None
            }
            // Done when the guest has an owner; the others belong to the destination, or need the first connection.
            _ => None,
        }
    }

    fn result(&mut self, result: Result<()>, phase: &str) -> Event {
        match result {
            Ok(()) => Event::Done,
            Err(error) => {
                self.trouble = Some(error.in_phase(phase));
                Event::Failed
            }
        }
    }

    fn ask(&self, ask: &Ask) -> Result<()> {
        let Some(link) = &self.link else { return Err(Error::new(libc::ENOTCONN, "there is no connection")) };
        let mut bytes = Vec::new();
        ask::put(&mut bytes, ask);
        StreamOutput::new(Arc::clone(link), REPLY).write(&bytes)
    }

    /// Shows the named state, if it is one; with `over` nobody will go on from it.
    fn show(&self, over: bool) {
        let because = |text: &str| {
            let trouble = self.trouble.as_ref().map(|e| format!("; {}", e.text())).unwrap_or_default();
            let text = format!("{text} ({}{trouble})", self.why.text());
            Error::new(self.why.errno(), text).in_phase("switchover").on_side("source")
        };
        let phase = self.job.keeper.phase();
        let (state, text) = match phase {
            Phase::TakingBack | Phase::TakeBackLater if !over => return,
            Phase::Held | Phase::TakingBack | Phase::TakeBackLater => (
                State::Held,
                "the guest is stopped here and runs nowhere else, but it could not be taken back: call vmig_resolve",
            ),
            Phase::Unknown => (
                State::SwitchoverUnknown,
                "the guest was handed over, but the destination's answer got lost: find out whether it runs there, then \
                 call vmig_resolve",
            ),
            _ => (
                State::SwitchoverUnknown,
                "the guest was handed over, but the destination's answer got lost: it is asked again; vmig_resolve ends \
                 this earlier",
            ),
        };
        self.job.status.name(state, because(text), over || matches!(phase, Phase::Held | Phase::Unknown));
        self.job.keeper.idle(self.trouble.as_ref());
    }

    /// Waits for the next thing to happen; none: the handle is being freed.
    fn await_event(&mut self) -> Option<Event> {
        let keeper = &self.job.keeper;
        loop {
            if keeper.quit().is_raised() {
                return None;
            }
            keeper.bell().clear();
            if let Some(word) = keeper.take_word() {
                self.job.status.goes_on();
                return Some(word);
            }
            let phase = keeper.phase();
            let waits_for_word = matches!(phase, Phase::Held | Phase::Unknown);
            let limit = self.job.options.time(Opt::SwitchoverTimeout);
            let deadline = *self.deadline.get_or_insert_with(|| Instant::now() + limit);
            let now = Instant::now();
            if !waits_for_word && now >= deadline {
                return Some(Event::Deadline);
            }
            if phase == Phase::TakeBackLater && self.retry.is_some_and(|at| at <= now) {
                return Some(Event::RetryDue);
            }
            if phase == Phase::Asking && self.link.is_none() && self.reconnect.is_none_or(|at| at <= now) {
                match self.connect(deadline) {
                    Some(event) => return Some(event),
                    None => self.reconnect = Some(Instant::now() + PAUSE),
                }
            }
            let next = match phase {
                Phase::Asking if self.link.is_some() => Some(deadline),
                Phase::Asking => self.reconnect.map(|at| at.min(deadline)),
                Phase::TakeBackLater => self.retry.map(|at| at.min(deadline)),
                _ => None,
            };
            if self.wait(next) {
                return Some(self.hear());
            }
        }
    }

    /// Tries to connect. None: it did not work this time.
    fn connect(&mut self, deadline: Instant) -> Option<Event> {
        // What cannot be connected again has nobody to ask.
        let target = self.job.route.target();
        if !target.can_be_asked() {
            return Some(Event::Deadline);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        let limit = left.min(self.job.options.time(Opt::ConnectTimeout)).min(TRY);
        match target.connect(self.job.keeper.quit(), limit) {
            Ok(link) => {
                self.link = Some(link);
                Some(Event::Linked)
            }
            Err(error) => {
                self.trouble = Some(error);
                None
            }
        }
    }

    /// Waits until the connection, the bell, the end or the time; true: the connection has something to say.
    fn wait(&self, until: Option<Instant>) -> bool {
        let keeper = &self.job.keeper;
        transport::hears(self.link.as_deref(), keeper.bell().as_fd(), keeper.quit().as_fd(), until)
    }

    /// The answer on the connection.
    fn hear(&mut self) -> Event {
        let Some(link) = &self.link else { return Event::LinkLost };
        let mut input = StreamInput::new(Arc::clone(link), REPLY);
        match reply::read(&mut input).map(|said| message_of(&said)) {
            Ok(Some(message)) => Event::Heard(message),
            Ok(None) => Event::LinkLost,
            Err(error) => {
                self.trouble = Some(error);
                Event::LinkLost
            }
        }
    }

    /// The guest is ours as before.
    fn take_back(self) {
        let vmm = &self.job.vmm;
        // Whoever may have had its memory has let go of it.
        self.job.ram.iter().for_each(|block| block.set_given(false));
        let mut error = self.why;
        if let Err(second) = vmm.start(StopReason::NotOwner).and_then(|_| resume(vmm)) {
            let text = format!("{error}; and the guest stays paused here, because it could not be resumed: {second}");
            error = Error::new(error.errno(), text);
        }
        self.job.status.end(Err(error));
    }
}
