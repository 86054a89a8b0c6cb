//! The bandwidth limit at work: whoever writes while the guest runs pays here first, whatever connection it is.

use std::sync::atomic::{AtomicBool, Ordering};
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
            wake: Arc::clone(wake),
            lifted: AtomicBool::new(false),
        })
    }

    /// Bytes per second just now; 0 = no limit.
    pub(super) fn limit(&self) -> u64 {
        match self.lifted.load(Ordering::Relaxed) {
            true => 0,
            false => self.live.get(Opt::MaxBandwidth),
        }
    }

    /// No limit from here on.
    pub(super) fn lift(&self) {
        self.lifted.store(true, Ordering::Relaxed);
    }

    /// Bytes written without paying first: whoever writes next waits the longer.
    pub(super) fn charge(&self, bytes: u64) {
        lock(&self.bucket).charge(bytes);
    }

    /// Waits until `bytes` may be written. Fails when the migration ends meanwhile.
    pub(super) fn pay(&self, bytes: u64) -> Result<()> {
        if self.limit() == 0 {
            // The bucket has to know: what is written without a limit is no debt.
            lock(&self.bucket).take(self.began.elapsed(), 0, bytes);
            return Ok(());
        }
        self.wait_in_line()?;
        let paid = self.pay_now(bytes);
        lock(&self.line).served += 1;
        self.moved.notify_all();
        paid
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_without_a_limit_is_no_debt() {
        let (live, wake) = (Arc::new(Options::default()), Arc::new(Wake::new().unwrap()));
        let toll = Toll::of(&live, &wake);
        let limit = |text| live.set_text("max-bandwidth", text, true).unwrap();
        limit("1G");
        toll.pay(1).unwrap();
        limit("0");
        toll.pay(0).unwrap();
        toll.charge(1 << 50);
        limit("1G");
        assert!(lock(&toll.bucket).take(toll.began.elapsed(), toll.limit(), 1).is_none());
        toll.charge(1 << 50);
        wake.raise();
        assert_eq!(toll.pay(1).unwrap_err().errno(), libc::ECANCELED, "in debt, and ended by the migration's end");
    }
}
