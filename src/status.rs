//! Where a migration stands: its state, its numbers, its news, its first error, and whether it may still be cancelled.

mod numbers;
mod state;
pub mod feed;
pub mod watch;

use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::pacing::downtime::Downtime;
use crate::pacing::ladder::Step;
use crate::sys::eventfd::{EventFd, Wake};
use crate::thread::lock;
use feed::Feed;
pub use numbers::{Counters, Snapshot, store_time};
pub use state::{STATES, Side, State};
use watch::{Tally, Teller, Watch};

/// News kept for a reader who does not come; the oldest are dropped.
const NEWS_MAX: usize = 256;

#[derive(Debug)]
struct Shared {
    state: State,
    side: Option<Side>,
    error: Option<Error>,
    /// It is only that the connection broke.
    error_is_link: bool,
    /// While reconnecting: what broke it, or why the last try failed.
    trouble: Option<Error>,
    news: VecDeque<Snapshot>,
    events: bool,
    /// The handover may have been seen by the peer: no way back.
    committed: bool,
    /// Nothing goes on by itself: an operator must say how.
    waits_for_word: bool,
    /// An unknown outcome is one that nobody drives: only an operator decides it.
    undriven: bool,
    started: Option<Instant>,
    ended: Option<Instant>,
    downtime: Downtime,
    /// The VMM builds itself: what is registered now is what migrates.
    registering: bool,
    watch: Watch,
    wake: Arc<Wake>,
}

impl Shared {
    /// Time since the present or last migration was asked for, up to its end.
    fn elapsed(&self) -> Duration {
        let until = self.ended.unwrap_or_else(Instant::now);
        self.started.map_or(Duration::ZERO, |at| until.saturating_duration_since(at))
    }
}

/// Status of one guest's migrations, shared by all threads.
#[derive(Debug)]
pub struct Status {
    shared: Mutex<Shared>,
    changed: Condvar,
    readable: EventFd,
    /// The moving numbers.
    pub counters: Counters,
}

impl Status {
    /// No migration yet, and nobody is told of one.
    pub fn new() -> Result<Self> {
        Self::with_feed(Arc::default())
    }

    /// No migration yet.
    pub fn with_feed(feed: Arc<Feed>) -> Result<Self> {
        Ok(Self {
            shared: Mutex::new(Shared {
                state: State::None,
                side: None,
                error: None,
                error_is_link: false,
                trouble: None,
                news: VecDeque::with_capacity(NEWS_MAX),
                events: true,
                committed: false,
                waits_for_word: false,
                undriven: false,
                started: None,
                ended: None,
                downtime: Downtime::default(),
                registering: false,
                watch: Watch::new(feed),
                wake: Arc::new(Wake::new()?),
            }),
            changed: Condvar::new(),
            readable: EventFd::new()?,
            counters: Counters::default(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        lock(&self.shared)
    }

    /// When the present or last migration was asked for.
    pub fn began(&self) -> Option<Instant> {
        self.lock().started
    }

    /// `EBUSY` while a migration runs.
    pub fn check_idle(&self) -> Result<()> {
        check_idle(&self.lock())
    }

    /// `EBUSY` while a migration runs, unless it waits for the VMM to build itself.
    pub fn check_may_register(&self) -> Result<()> {
        let shared = self.lock();
        if shared.registering {
            return Ok(());
        }
        check_idle(&shared).map_err(|busy| {
            let what =
                "what migrates was settled when it began; wait until it is over (vmig_wait) or end it (vmig_cancel)";
            Error::new(busy.errno(), format!("{}: {what}", busy.text()))
        })
    }

    /// Lets the VMM register while a migration runs, or no longer.
    pub fn allow_registering(&self, allow: bool) {
        self.lock().registering = allow;
    }

    /// Starts a migration, or says why not. Cancel and the first error raise `wake`.
    pub fn begin(&self, side: Side, events: bool, wake: &Arc<Wake>) -> Result<()> {
        self.begin_watched(side, events, wake, None)
    }

    /// The same, and tells of everything that happens until it has ended.
    pub fn begin_watched(&self, side: Side, events: bool, wake: &Arc<Wake>, teller: Option<Teller>) -> Result<()> {
        let mut shared = self.lock();
        check_idle(&shared)?;
        shared.watch.begin(teller);
        shared.wake = Arc::clone(wake);
        self.counters.clear();
        shared.side = Some(side);
        shared.error = None;
        shared.error_is_link = false;
        shared.trouble = None;
        shared.events = events;
        shared.committed = false;
        shared.waits_for_word = false;
        shared.undriven = false;
        shared.registering = false;
        shared.started = Some(Instant::now());
        shared.ended = None;
        self.become_locked(&mut shared, State::Setup);
        Ok(())
    }

    fn become_locked(&self, shared: &mut Shared, to: State) {
        debug_assert!(shared.state.may_become(to), "{} -> {}", shared.state.name(), to.name());
        if shared.state == State::Active {
            self.counters.precopy.store(self.counters.transferred.load(Ordering::Relaxed), Ordering::Relaxed);
        }
        let from = std::mem::replace(&mut shared.state, to);
        if to.is_final() {
            shared.ended = Some(Instant::now());
        }
        let snapshot = self.snapshot_of(shared);
        shared.watch.state(from, &snapshot, shared.events);
        if shared.events {
            if shared.news.len() == NEWS_MAX {
                shared.news.pop_front();
            }
            shared.news.push_back(snapshot);
            self.readable.set();
        }
        self.changed.notify_all();
    }

    /// Moves on; `ECANCELED` if a cancel came first.
    pub fn advance(&self, to: State) -> Result<()> {
        let mut shared = self.lock();
        if shared.state == State::Cancelling {
            return shared.wake.check();
        }
        self.become_locked(&mut shared, to);
        Ok(())
    }

    /// The first pass over all pages begins, which is no news to who polls.
    pub fn tell_first_pass(&self) {
        let shared = self.lock();
        shared.watch.pass(&self.snapshot_of(&shared), shared.events);
    }

    /// A point worth telling (a new iteration) without a change of state.
    pub fn tell(&self) {
        let mut shared = self.lock();
        let snapshot = self.snapshot_of(&shared);
        shared.watch.iteration(&snapshot, shared.events);
        if shared.events && shared.news.len() < NEWS_MAX {
            shared.news.push_back(snapshot);
            self.readable.set();
        }
    }

    /// The ladder took a step.
    pub fn tell_step(&self, step: Step) {
        let mut shared = self.lock();
        let snapshot = self.snapshot_of(&shared);
        shared.watch.step(&snapshot, step);
        if shared.events && shared.news.len() < NEWS_MAX {
            shared.news.push_back(snapshot);
            self.readable.set();
        }
    }

    /// From here on the peer may own the guest. Loses against a cancel that came first.
    pub fn commit(&self) -> Result<()> {
        let mut shared = self.lock();
        shared.wake.check()?;
        shared.committed = true;
        Ok(())
    }

    /// What was committed did not come about, and may be cancelled again.
    pub fn uncommit(&self) {
        self.lock().committed = false;
    }

    /// Whether [`commit`](Self::commit) won.
    pub fn is_committed(&self) -> bool {
        self.lock().committed
    }

    /// Asks a running migration to end. Nothing to do if none runs; refused once the guest was handed over.
    pub fn cancel(&self) -> Result<()> {
        let mut shared = self.lock();
        if shared.state.is_final() || shared.state == State::Cancelling {
            return Ok(());
        }
        if shared.committed {
            return Err(Error::new(libc::EBUSY, "too late to cancel: the guest was handed over to the destination"));
        }
        if shared.state == State::Held {
            let text = "nothing is left to cancel: the guest is stopped here and could not be taken back; vmig_resolve \
                        decides";
            return Err(Error::new(libc::EBUSY, text));
        }
        self.become_locked(&mut shared, State::Cancelling);
        shared.wake.raise();
        Ok(())
    }

    /// Keeps the first error of the migration and ends its waits.
    pub fn fail(&self, error: Error) {
        let mut shared = self.lock();
        if shared.state.is_final() || shared.state == State::Cancelling {
            return;
        }
        if std::mem::take(&mut shared.error_is_link) {
            shared.error = None;
        }
        shared.error.get_or_insert(error);
        shared.wake.raise();
        self.changed.notify_all();
    }

    /// This is why, as the peer says or we tell it: whatever else goes wrong is the consequence.
    pub fn blame(&self, error: Error) {
        let mut shared = self.lock();
        if !shared.state.is_final() && shared.state != State::Cancelling {
            (shared.error, shared.error_is_link) = (Some(error), false);
        }
    }

    /// As [`fail`](Self::fail), for a connection that broke: [`lose_link`](Self::lose_link) may go on from it.
    pub fn fail_link(&self, error: Error) {
        let mut shared = self.lock();
        // A destination that waits for GO shows an error all the time.
        let failed = shared.error.is_some() && shared.state != State::SwitchoverUnknown;
        if shared.state.is_final() || shared.state == State::Cancelling || failed || shared.committed {
            return;
        }
        (shared.error, shared.error_is_link) = (Some(error), true);
        shared.wake.raise();
        self.changed.notify_all();
    }

    /// Whether all that ended the migration's waits is that its connection broke.
    pub fn is_link_lost(&self) -> bool {
        self.lock().error_is_link
    }

    /// The connection broke, or another try failed, for this reason; every thread that used it was joined. Fails, with
    /// the reason, if the migration ends for another one.
    pub fn lose_link(&self, why: Error) -> Result<()> {
        let mut shared = self.lock();
        if let Some(error) = shared.error.clone().filter(|_| !shared.error_is_link) {
            return Err(error);
        }
        if !shared.state.may_reconnect() || shared.committed {
            return shared.wake.check().and(Err(why));
        }
        (shared.error, shared.error_is_link) = (None, false);
        let why = why.on_side(shared.side.map_or("", Side::name));
        shared.trouble = Some(why);
        shared.wake.lower();
        if shared.state != State::Reconnecting {
            self.become_locked(&mut shared, State::Reconnecting);
        }
        Ok(())
    }

    /// As [`check`](Self::check), for work that outlives the connection: that it broke is no failure.
    pub fn check_but_link(&self) -> Result<()> {
        match self.is_link_lost() {
            true => Ok(()),
            false => self.check(),
        }
    }

    /// Fails if another thread of the migration failed, with its error.
    pub fn check(&self) -> Result<()> {
        let shared = self.lock();
        match &shared.error {
            Some(error) => Err(error.clone()),
            None if shared.committed => Ok(()),
            None => shared.wake.check(),
        }
    }

    /// The first error so far, or `error` if there was none: what a failing phase should report, since an error
    /// elsewhere is often what broke it.
    pub fn cause(&self, error: Error) -> Error {
        self.lock().error.clone().unwrap_or(error)
    }

    /// Ends the migration: completed, failed, or (if a cancel was asked for) cancelled.
    pub fn end(&self, result: Result<()>) {
        let mut shared = self.lock();
        match result {
            Ok(()) => {
                // What was not known for a while is.
                shared.error = None;
                self.become_locked(&mut shared, State::Completed);
            }
            Err(_) if shared.state == State::Cancelling => {
                shared.error = None;
                self.become_locked(&mut shared, State::Cancelled);
            }
            Err(error) => {
                let side = shared.side.map_or("", Side::name);
                let error = error.on_side(side);
                shared.watch.error(shared.elapsed(), &error);
                shared.error = Some(error);
                self.become_locked(&mut shared, State::Failed);
            }
        }
    }

    /// Nobody owns the guest, for the reason given: `SwitchoverUnknown` or `Held`. With `waits` nothing goes on by itself.
    pub fn name(&self, state: State, error: Error, waits: bool) {
        let mut shared = self.lock();
        // A cancel that came just now says how it ends, and so does a source that goes on.
        if state == State::SwitchoverUnknown && (shared.state == State::Cancelling || shared.error_is_link) {
            return;
        }
        shared.watch.error(shared.elapsed(), &error);
        (shared.error, shared.error_is_link) = (Some(error), false);
        shared.waits_for_word = waits;
        match shared.state == state {
            true => self.changed.notify_all(),
            false => self.become_locked(&mut shared, state),
        }
    }

    /// The handover's answer got lost, for the reason given.
    pub fn end_unknown(&self, error: Error) {
        self.lock().undriven = true;
        self.name(State::SwitchoverUnknown, error, true);
    }

    /// Whether an operator's word decides alone: `EALREADY` where a driver shows an unknown outcome that it has just decided.
    pub fn check_undriven(&self) -> Result<()> {
        let shared = self.lock();
        match shared.state == State::SwitchoverUnknown && !shared.undriven {
            true => {
                Err(Error::new(libc::EALREADY, "the switchover was decided a moment ago: look at the state again"))
            }
            false => Ok(()),
        }
    }

    /// The word came: something goes on again.
    pub fn goes_on(&self) {
        self.lock().waits_for_word = false;
    }

    /// A destination whose source was lost has it again.
    pub fn found_again(&self) {
        let mut shared = self.lock();
        if shared.state == State::SwitchoverUnknown {
            shared.error = None;
            self.become_locked(&mut shared, State::Active);
        }
    }

    /// Waits in `PreSwitchover` for the user to go on. Fails if the migration was cancelled, or failed.
    pub fn await_go_on(&self) -> Result<()> {
        let mut shared = self.lock();
        while shared.state == State::PreSwitchover && shared.error.is_none() {
            shared = self.changed.wait(shared).unwrap_or_else(PoisonError::into_inner);
        }
        match (&shared.error, shared.state) {
            (Some(error), _) => Err(error.clone()),
            (None, State::Cancelling) => shared.wake.check(),
            _ => Ok(()),
        }
    }

    /// The user says go on.
    pub fn go_on(&self) -> Result<()> {
        let mut shared = self.lock();
        if shared.state != State::PreSwitchover {
            let text = format!("no migration waits in pre-switchover: it is in state {}", shared.state.name());
            return Err(Error::invalid(text));
        }
        self.become_locked(&mut shared, State::Device);
        Ok(())
    }

    /// Decides an unknown switchover that has no driver: failed if the guest runs here, completed if it runs there.
    pub fn resolve(&self, here: bool) -> Result<()> {
        let mut shared = self.lock();
        if shared.state != State::SwitchoverUnknown {
            let text = format!("nothing to resolve: the migration is in state {}", shared.state.name());
            return Err(Error::invalid(text));
        }
        self.become_locked(&mut shared, if here { State::Failed } else { State::Completed });
        Ok(())
    }

    /// What the guest's standstill was made of; of an earlier migration until this one stopped the guest.
    pub fn downtime(&self) -> Downtime {
        self.lock().downtime
    }

    /// Takes note of a switchover, as far as it got.
    pub fn set_downtime(&self, downtime: Downtime) {
        let mut shared = self.lock();
        shared.watch.blackout(shared.elapsed(), downtime);
        shared.downtime = downtime;
    }

    /// Nobody is told of what happens any more, whether the migration has ended or not.
    pub fn stop_telling(&self) {
        self.lock().watch.close();
    }

    /// How many migrations ended, and how.
    pub fn tally(&self) -> Tally {
        self.lock().watch.tally
    }

    /// The present state.
    pub fn state(&self) -> State {
        self.lock().state
    }

    /// The error of the present or last migration.
    pub fn error(&self) -> Option<Error> {
        let shared = self.lock();
        let trouble = shared.trouble.as_ref().filter(|_| shared.state == State::Reconnecting);
        shared.error.as_ref().or(trouble).cloned()
    }

    /// Waits until no migration runs (true), or until the deadline. One from which only an operator's word leads on counts
    /// as ended.
    pub fn wait(&self, deadline: Option<Instant>) -> bool {
        let mut shared = self.lock();
        loop {
            if shared.state.is_final() || shared.waits_for_word {
                return true;
            }
            shared = match deadline {
                None => self.changed.wait(shared).unwrap_or_else(PoisonError::into_inner),
                Some(at) => {
                    let left = at.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return false;
                    }
                    self.changed.wait_timeout(shared, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }

    /// The numbers now.
    pub fn snapshot(&self) -> Snapshot {
        self.snapshot_of(&self.lock())
    }

    fn snapshot_of(&self, shared: &Shared) -> Snapshot {
        self.counters.snapshot(shared.state, shared.side, shared.elapsed())
    }

    /// The next piece of news, oldest first.
    pub fn next_news(&self) -> Option<Snapshot> {
        let mut shared = self.lock();
        let next = shared.news.pop_front();
        if shared.news.is_empty() {
            self.readable.clear();
        }
        next
    }

    /// Readable while there is news.
    pub fn event_fd(&self) -> &EventFd {
        &self.readable
    }
}

fn check_idle(shared: &Shared) -> Result<()> {
    match shared.state.is_final() {
        true => Ok(()),
        false => {
            let text = format!("a migration is in progress (state {})", shared.state.name());
            Err(Error::new(libc::EBUSY, text))
        }
    }
}

#[cfg(test)]
mod tests;
