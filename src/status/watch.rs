//! Who is told of everything that happens, as it happens: tracepoints, and somebody who writes it down elsewhere.

use std::ffi::CStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use super::feed::{Feed, News};
use super::{Snapshot, State};
use crate::error::Error;
use crate::pacing::downtime::Downtime;
use crate::pacing::ladder::Step;

/// Events that wait for a writer; what does not fit is lost, so that nobody who moves pages ever waits for a disk.
const WAITING_MAX: usize = 1024;

/// Something that happened; times are nanoseconds since the migration was asked for.
#[derive(Clone, Debug)]
pub enum Event {
    /// The state changed to this one.
    State(Snapshot),
    /// A round over the dirty pages begins.
    Iteration(Snapshot),
    /// The ladder took a step.
    Step(u64, Step),
    /// The guest stood still, as far as the switchover got.
    Blackout(u64, Box<Downtime>),
    /// Something failed.
    Error(u64, Box<Error>),
}

/// The side that tells.
#[derive(Debug)]
pub struct Teller {
    to: SyncSender<Event>,
    lost: Arc<AtomicU64>,
}

/// The side that listens. It hears no more when the migration has ended.
#[derive(Debug)]
pub struct Hearer {
    /// Events in their order.
    pub from: Receiver<Event>,
    lost: Arc<AtomicU64>,
}

/// Both sides.
pub fn pair() -> (Teller, Hearer) {
    let (to, from) = sync_channel(WAITING_MAX);
    let lost = Arc::<AtomicU64>::default();
    (Teller { to, lost: Arc::clone(&lost) }, Hearer { from, lost })
}

impl Teller {
    /// Never waits.
    fn tell(&self, event: Event) {
        if self.to.try_send(event).is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Hearer {
    /// Events that did not fit.
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }
}

/// How many migrations ended, and how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Well.
    pub completed: u64,
    /// By an error.
    pub failed: u64,
    /// By a cancel.
    pub cancelled: u64,
}

/// Tells whoever wants to know: tracepoints, who writes one migration down, and who watches the guest. Called with the
/// status locked: nothing here waits.
#[derive(Debug)]
pub(super) struct Watch {
    teller: Option<Teller>,
    feed: Arc<Feed>,
    pub(super) tally: Tally,
}

impl Watch {
    /// Of a guest that is watched by this.
    pub(super) fn new(feed: Arc<Feed>) -> Self {
        Self { teller: None, feed, tally: Tally::default() }
    }

    /// A migration begins, and this one is told of it.
    pub(super) fn begin(&mut self, teller: Option<Teller>) {
        self.teller = teller;
    }

    /// Nobody is told any more.
    pub(super) fn close(&mut self) {
        self.teller = None;
    }

    /// `events`: the user wants to hear of this migration.
    pub(super) fn state(&mut self, from: State, now: &Snapshot, events: bool) {
        let to = now.state;
        probe::probe!(vmig, state, from as u32, to as u32, now.elapsed);
        match to {
            State::Completed => self.tally.completed += 1,
            State::Failed => self.tally.failed += 1,
            State::Cancelled => self.tally.cancelled += 1,
            _ => (),
        }
        self.tell(|| Event::State(*now));
        if events {
            self.feed.push(News::State(to));
        }
        if to.is_final() {
            self.close();
        }
    }

    pub(super) fn iteration(&self, now: &Snapshot, events: bool) {
        self.tell(|| Event::Iteration(*now));
        self.pass(now, events);
    }

    /// A round begins. The trace need not be told of the first, with which the state changes.
    pub(super) fn pass(&self, now: &Snapshot, events: bool) {
        probe::probe!(vmig, iteration, now.iteration, now.remaining, now.dirty_rate, now.bandwidth);
        if events {
            self.feed.push(News::Pass(now.iteration));
        }
    }

    pub(super) fn step(&self, now: &Snapshot, step: Step) {
        probe::probe!(vmig, ladder, now.ladder, step.value());
        self.tell(|| Event::Step(now.elapsed, step));
    }

    pub(super) fn blackout(&self, elapsed: Duration, downtime: Downtime) {
        probe::probe!(vmig, blackout, nanos(downtime.total), nanos(downtime.expected.total()));
        self.tell(|| Event::Blackout(nanos(elapsed), Box::new(downtime)));
    }

    pub(super) fn error(&self, elapsed: Duration, error: &Error) {
        probe::probe!(vmig, error, error.errno());
        self.tell(|| Event::Error(nanos(elapsed), Box::new(error.clone())));
    }

    fn tell(&self, event: impl FnOnce() -> Event) {
        if let Some(teller) = &self.teller {
            teller.tell(event());
        }
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// Does `f` as a phase with this name: `vmig:phase_begin` and `vmig:phase_end` are tracepoints whose argument is the name.
/// One that nobody listens to is an instruction that does nothing.
pub fn phase<T>(name: &'static CStr, f: impl FnOnce() -> T) -> T {
    probe::probe!(vmig, phase_begin, name.as_ptr());
    let done = f();
    probe::probe!(vmig, phase_end, name.as_ptr());
    done
}
