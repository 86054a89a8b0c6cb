//! The bandwidth limit at work: whoever writes while the guest runs pays here first, whatever connection it is.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::Job;
use crate::error::Result;
use crate::options::{Opt, Options};
use crate::pacing::Bucket;
use crate::sys::eventfd::Wake;
use crate::sys::io;
use crate::thread::lock;

/// How long a payer sleeps at most before it looks whether the limit was changed.
const LOOK: Duration = Duration::from_millis(10);

/// Limits above this, in bytes per second, are more than one connection may be able to write: others need not wait until
/// it has written what it paid for.
const TOGETHER: u64 = 1_000_000_000;

/// Who wants to write: how many came, and how many of them were served.
#[derive(Debug, Default)]
struct Line {
    came: u64,
    served: u64,
}

/// One bucket for all connections of a migration.
#[derive(Debug)]
pub(super) struct Toll {
    bucket: Mutex<Bucket>,
    /// First come, first served: else the main stream, which pays little and often, would find the bucket empty every time
    /// it looks.
    line: Mutex<Line>,
    moved: Condvar,
    began: Instant,
    live: Arc<Options>,
    /// What the destination takes at most; 0 = as much as there is.
    theirs: AtomicU64,
    wake: Arc<Wake>,
    /// The guest is stopped: nothing may hold its last bytes up.
    lifted: AtomicBool,
}

impl Toll {
    pub(super) fn new(job: &Job) -> Arc<Self> {
        Self::of(&job.live, &job.wake)
    }

    fn of(live: &Arc<Options>, wake: &Arc<Wake>) -> Arc<Self> {
        Arc::new(Self {
            bucket: Mutex::default(),
            line: Mutex::default(),
            moved: Condvar::new(),
            began: Instant::now(),
            live: Arc::clone(live),
            theirs: AtomicU64::new(0),
            wake: Arc::clone(wake),
            lifted: AtomicBool::new(false),
        })
    }

    /// Bytes per second just now; 0 = no limit.
    pub(super) fn limit(&self) -> u64 {
        match self.lifted.load(Ordering::Relaxed) {
            true => 0,
            false => match (self.live.get(Opt::MaxBandwidth), self.theirs.load(Ordering::Relaxed)) {
                (0, theirs) => theirs,
                (ours, 0) => ours,
                (ours, theirs) => ours.min(theirs),
            },
        }
    }

    /// The destination takes at most so many bytes per second.
    pub(super) fn limit_to(&self, bytes_per_second: u64) {
        self.theirs.store(bytes_per_second, Ordering::Relaxed);
    }

    /// No limit from here on.
    pub(super) fn lift(&self) {
        self.lifted.store(true, Ordering::Relaxed);
    }

    /// Bytes written without paying first: whoever writes next waits the longer.
    pub(super) fn charge(&self, bytes: u64) {
        lock(&self.bucket).charge(bytes);
    }

    /// Waits until `bytes` may be written, which is to be done while the turn is held: who paid and then has to wait for a
    /// processor would write together with the next. Fails when the migration ends meanwhile.
    pub(super) fn pay(&self, bytes: u64) -> Result<Turn<'_>> {
        let limit = self.limit();
        if limit == 0 {
            // The bucket has to know: what is written without a limit is no debt.
            lock(&self.bucket).take(self.began.elapsed(), 0, bytes);
            return Ok(Turn(None));
        }
        self.wait_in_line()?;
        let turn = Turn(Some(self));
        self.pay_now(bytes)?;
        Ok(if limit > TOGETHER { Turn(None) } else { turn })
    }

    /// Nobody leaves the line before it is their turn, but all at once when the migration ends.
    fn wait_in_line(&self) -> Result<()> {
        let mut line = lock(&self.line);
        let number = line.came;
        line.came += 1;
        while line.served != number {
            self.wake.check()?;
            line = self.moved.wait_timeout(line, LOOK).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }

    fn pay_now(&self, bytes: u64) -> Result<()> {
        loop {
            let wait = lock(&self.bucket).take(self.began.elapsed(), self.limit(), bytes);
            let Some(wait) = wait else { return Ok(()) };
            if io::sleep(&*self.wake, wait.min(LOOK))? {
                self.wake.check()?;
            }
        }
    }
}

/// The right to write what was paid for; dropped, it is the next one's turn.
#[derive(Debug)]
#[must_use]
pub(super) struct Turn<'a>(Option<&'a Toll>);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        if let Some(toll) = self.0 {
            lock(&toll.line).served += 1;
            toll.moved.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_one_waits_until_what_was_paid_is_written() {
        let (live, wake) = (Arc::new(Options::default()), Arc::new(Wake::new().unwrap()));
        let toll = Toll::of(&live, &wake);
        for (limit, waits) in [("500M", true), ("10G", false), ("0", false)] {
            live.set_text("max-bandwidth", limit, true).unwrap();
            let came = lock(&toll.line).came;
            let turn = toll.pay(1).unwrap();
            let paid = AtomicBool::new(false);
            std::thread::scope(|s| {
                s.spawn(|| {
                    drop(toll.pay(1).unwrap());
                    paid.store(true, Ordering::SeqCst);
                });
                while waits && lock(&toll.line).came < came + 2 {
                    std::thread::yield_now();
                }
                std::thread::sleep(if waits { 3 * LOOK } else { Duration::ZERO });
                assert!(!waits || !paid.load(Ordering::SeqCst), "at {limit}");
                // Others need nobody's leave: the scope would not end.
                if waits {
                    drop(turn);
                }
            });
            assert!(paid.load(Ordering::SeqCst));
        }
    }

    #[test]
    fn what_is_written_without_a_limit_is_no_debt() {
        let (live, wake) = (Arc::new(Options::default()), Arc::new(Wake::new().unwrap()));
        let toll = Toll::of(&live, &wake);
        let limit = |text| live.set_text("max-bandwidth", text, true).unwrap();
        limit("1G");
        drop(toll.pay(1).unwrap());
        limit("0");
        drop(toll.pay(0).unwrap());
        toll.charge(1 << 50);
        limit("1G");
        assert!(lock(&toll.bucket).take(toll.began.elapsed(), toll.limit(), 1).is_none());
        toll.charge(1 << 50);
        wake.raise();
        assert_eq!(toll.pay(1).unwrap_err().errno(), libc::ECANCELED, "in debt, and ended by the migration's end");
    }
}
