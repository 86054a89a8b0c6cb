//! How fast the guest dirties its memory, measured while it runs and no migration does.
//!
//! Two windows, in each of which what was dirtied since its beginning is counted at moments ever further apart: see
//! [`crate::pacing::dirtying`]. Nothing of it is kept in the trackers when it is over.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::Kind;
use super::choice::Choice;
use super::cursor::Cursor;
use super::hub::Hub;
use super::kvm_ring::KvmRing;
use super::places::Places;
use super::sample::Samples;
use super::set::DirtySet;
use crate::bitmap::{Bitmap, Scan};
use crate::error::{Error, Result};
use crate::pacing::dirtying::{Dirtying, PARTS, join, looks};
use crate::pacing::per_second;
use crate::ram::presence::GRANULE;
use crate::ram::{PAGE, RamList};
use crate::sys::clock::monotonic_ns;
use crate::sys::eventfd::Wake;
use crate::sys::io;
use crate::thread::lock;

/// Milliseconds a measurement may take.
pub const PERIOD_MS: std::ops::RangeInclusive<u64> = 50..=60_000;
/// Pages of each GiB that may be sampled, and how many are if nobody says.
pub const SAMPLES: std::ops::RangeInclusive<u64> = 128..=16_384;
/// See [`SAMPLES`].
pub const SAMPLES_DEFAULT: u64 = 512;
/// Pages taken from a dirty set at once.
const TAKEN: usize = 4096;

/// How it is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// By hashes of some pages.
    Sampling,
    /// By the trackers a migration would use.
    Bitmap,
    /// By KVM's dirty rings, each vCPU by itself.
    Ring,
}

/// What is measured.
#[derive(Clone, Copy, Debug)]
pub struct Ask {
    /// How.
    pub mode: Mode,
    /// For how long.
    pub period: Duration,
    /// Pages of each GiB, when sampling; else 0.
    pub samples: u64,
    /// Trackers.
    pub choice: Choice,
}

/// Where it stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum State {
    /// Nothing was ever measured.
    #[default]
    None,
    /// It is being measured.
    Measuring,
    /// It was measured.
    Measured,
    /// It was to be, and was not.
    Failed,
}

/// The present or last measurement.
#[derive(Clone, Debug, Default)]
pub struct Now {
    /// Where it stands.
    pub state: State,
    /// What was asked for.
    pub ask: Option<Ask>,
    /// When, on the monotonic clock.
    pub began_ns: u64,
    /// What was found.
    pub found: Option<Arc<Dirtying>>,
    /// Why nothing was.
    pub error: Option<Error>,
}

/// The measurements of a guest, one at a time.
#[derive(Debug, Default)]
pub struct Meter {
    inner: Mutex<Inner>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Inner {
    now: Now,
    /// Ends the one that runs.
    wake: Option<Arc<Wake>>,
    /// Why it is to end.
    why: Option<Error>,
}

impl Meter {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        lock(&self.inner)
    }

    /// The present or last one.
    pub fn now(&self) -> Now {
        self.lock().now.clone()
    }

    /// `EBUSY` while something is measured.
    pub fn check_idle(&self) -> Result<()> {
        match self.lock().now.state {
            State::Measuring => Err(Error::new(libc::EBUSY, "the dirty rate is being measured")),
            _ => Ok(()),
        }
    }

    /// Begins one; `wake` ends it.
    pub fn begin(&self, ask: Ask, wake: &Arc<Wake>) -> Result<()> {
        self.check_idle()?;
        let now = Now { state: State::Measuring, ask: Some(ask), began_ns: monotonic_ns(), ..Now::default() };
        *self.lock() = Inner { now, wake: Some(Arc::clone(wake)), why: None };
        Ok(())
    }

    /// It is over.
    pub fn finish(&self, result: Result<Dirtying>) {
        let mut inner = self.lock();
        let why = inner.why.take();
        match result {
            Ok(found) => (inner.now.state, inner.now.found) = (State::Measured, Some(Arc::new(found))),
            Err(error) => (inner.now.state, inner.now.error) = (State::Failed, Some(why.unwrap_or(error))),
        }
        inner.wake = None;
        self.changed.notify_all();
    }

    /// Asks the one that runs, if one does, to end for this reason.
    pub fn cut_short(&self, why: &str) {
        let mut inner = self.lock();
        if let Some(wake) = inner.wake.clone() {
            inner.why.get_or_insert_with(|| Error::new(libc::ECANCELED, why));
            wake.raise();
        }
    }

    /// The same, and waits for it, if need be so long.
    pub fn end(&self, why: &str, limit: Duration) -> Result<()> {
        self.cut_short(why);
        let measuring = |inner: &mut Inner| inner.now.state == State::Measuring;
        let waited = self.changed.wait_timeout_while(self.lock(), limit, measuring);
        match waited.unwrap_or_else(PoisonError::into_inner).1.timed_out() {
            true => Err(Error::new(
                libc::ETIMEDOUT,
                "the measurement of the dirty rate did not end: a callback still runs",
            )),
            false => Ok(()),
        }
    }
}

/// What was dirtied in both windows, and where.
#[derive(Debug, Default)]
pub(super) struct Whole {
    places: [u64; PARTS],
}

impl Whole {
    /// Bytes in a part of memory that were not dirty before.
    pub(super) fn add(&mut self, part: usize, bytes: u64) {
        self.places[part] += bytes;
    }

    fn bytes(&self) -> u64 {
        self.places.iter().sum()
    }
}

/// Finds what is dirtied.
pub(super) trait Probe {
    /// Notes what was found, and begins anew: nothing is dirty. Says since when.
    fn restart(&mut self, whole: &mut Whole) -> Result<Instant>;
    /// Bytes dirtied since then.
    fn look(&mut self) -> Result<u64>;
    /// Notes what was found and was not noted before.
    fn note(&mut self, whole: &mut Whole) -> Result<()>;
    /// Bytes that one observation stands for.
    fn grain(&self) -> u64;
}

/// Asks trackers.
struct Tracked<'a> {
    hub: &'a Hub,
    places: &'a Places,
    set: Arc<DirtySet>,
    cursor: Cursor,
    /// Noted pages of each block.
    noted: Vec<Bitmap>,
    /// The first restart is past.
    begun: bool,
    check: &'a dyn Fn() -> Result<()>,
}

impl<'a> Tracked<'a> {
    fn new(
        hub: &'a Hub,
        list: &RamList,
        choice: Choice,
        places: &'a Places,
        check: &'a dyn Fn() -> Result<()>,
    ) -> Result<Self> {
        let noted = places.blocks().map(|block| Bitmap::new(block.pages())).collect::<Result<_>>()?;
        let set = hub.subscribe(list, choice)?;
        Ok(Self { hub, places, set, cursor: Cursor::default(), noted, begun: false, check })
    }

    /// Takes everything that is dirty, in the kernel too.
    fn take(&mut self, whole: &mut Whole) -> Result<()> {
        let Self { set, cursor, .. } = self;
        while cursor.take(set, TAKEN)? {
            (self.check)()?;
            if self.begun {
                cursor.runs().iter().for_each(|run| {
                    note(whole, self.places, &self.noted[run.block], run.block, run.first..run.first + run.pages);
                });
            }
        }
        Ok(())
    }
}

/// Notes pages of a block that were not noted before.
fn note(whole: &mut Whole, places: &Places, noted: &Bitmap, block: usize, pages: std::ops::Range<usize>) {
    let mut at = pages.start;
    while at < pages.end {
        let end = pages.end.min((at / GRANULE + 1) * GRANULE);
        whole.add(places.part(block, at), noted.set_range(at, end - at) as u64 * PAGE);
        at = end;
    }
}

impl Probe for Tracked<'_> {
    fn restart(&mut self, whole: &mut Whole) -> Result<Instant> {
        self.take(whole)?;
        let mut since = Instant::now();
        // To take all of it took a while, in which something was dirtied; to take that takes less.
        for _ in 0..2 {
            since = Instant::now();
            self.hub.sync()?;
            self.take(whole)?;
        }
        self.begun = true;
        Ok(since)
    }

    fn look(&mut self) -> Result<u64> {
        self.hub.sync()?;
        Ok(self.set.pages() as u64 * PAGE)
    }

    fn note(&mut self, whole: &mut Whole) -> Result<()> {
        for (index, noted) in self.noted.iter().enumerate() {
            let mut scan = Scan::default();
            let mut give = |first, pages| note(whole, self.places, noted, index, first..first + pages);
            while self.set.take_runs(index, &mut scan, TAKEN, &mut give) > 0 {}
        }
        Ok(())
    }

    fn grain(&self) -> u64 {
        PAGE
    }
}

impl Drop for Tracked<'_> {
    fn drop(&mut self) {
        self.hub.unsubscribe(&self.set);
    }
}

/// Measures; the body of a thread. `ring`: KVM's dirty rings, where there are any.
pub fn measure(hub: &Hub, list: &RamList, ask: &Ask, ring: Option<&KvmRing>, wake: &Wake) -> Result<Dirtying> {
    let check = || wake.check();
    let places = Places::new(list, &check)?;
    let tracked = |choice| Tracked::new(hub, list, choice, &places, &check);
    match ask.mode {
        Mode::Sampling => {
            let probe = Samples::new(&places, ask.samples, &check)?;
            // A look is no harvest.
            observe(probe, &places, ask.period, None, wake).map(|found| Dirtying { sync: Duration::ZERO, ..found })
        }
        Mode::Bitmap => observe(tracked(ask.choice)?, &places, ask.period, ring, wake),
        Mode::Ring => observe(tracked(Choice::Only(Kind::KvmRing))?, &places, ask.period, ring, wake),
    }
}

/// Two windows, each half of the period.
fn observe(
    mut probe: impl Probe,
    places: &Places,
    period: Duration,
    ring: Option<&KvmRing>,
    wake: &Wake,
) -> Result<Dirtying> {
    let mut whole = Whole::default();
    let since = probe.restart(&mut whole)?;
    let taken = |ring: Option<&KvmRing>| ring.map_or_else(Vec::new, KvmRing::taken);
    let (begin, before) = (Instant::now(), taken(ring));
    let (first, _) = window(&mut probe, since, period / 2, wake)?;
    let since = probe.restart(&mut whole)?;
    let (second, sync) = window(&mut probe, since, period / 2, wake)?;
    let (time, after) = (begin.elapsed(), taken(ring));
    probe.note(&mut whole)?;
    let most = places.blocks().map(|block| block.len()).sum();
    let (curve, steady) = join([&first, &second], (time, whole.bytes()), most, probe.grain());
    let vcpus = after.iter().zip(&before).map(|(after, before)| per_second((after - before) * PAGE, time)).collect();
    let (content, grain) = (places.content(), probe.grain());
    Ok(Dirtying { curve, steady, places: whole.places, content, grain, sync, vcpus })
}

/// Bytes dirtied at each look since `begin`, and how long the last look took.
fn window(
    probe: &mut impl Probe,
    begin: Instant,
    length: Duration,
    wake: &Wake,
) -> Result<(Vec<(Duration, u64)>, Duration)> {
    let (mut points, mut took) = (Vec::new(), Duration::ZERO);
    for due in looks(length) {
        let late = begin.elapsed();
        // Where a look takes long the early ones are left out, never the last.
        if late > due && due < length {
            continue;
        }
        if io::sleep(wake, due.saturating_sub(late))? {
            wake.check()?;
        }
        let before = begin.elapsed();
        let bytes = probe.look()?;
        took = begin.elapsed() - before;
        points.push((begin.elapsed(), bytes));
    }
    Ok((points, took))
}
