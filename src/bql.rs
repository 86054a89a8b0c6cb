//! The big lock: device state and registrations are touched only by the thread that holds it.
//!
//! Ours is a ticket lock. Whoever comes first is served first, so a vCPU that takes the lock in a tight loop cannot
//! keep the migration thread out, nor the other way round. A VMM that has such a lock already brings its own. One with a
//! single thread (`dispatch=manual`) needs none: its thread has it always, and nobody else ever.

use std::marker::PhantomData;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use self::ticket::TicketLock;
use crate::error::{Error, Result};
use crate::sys::clock::monotonic_ns;
use crate::thread::home::Home;
use crate::thread::{current_token, lock};

/// What the ticket lock is made of; its model test compiles the same file with loom's.
mod sync {
    pub(super) use std::hint::spin_loop;
    pub(super) use std::sync::Mutex;
    pub(super) use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

    pub(super) use crossbeam_utils::sync::{Parker, Unparker};

    pub(super) use crate::thread::{current_token, lock};

    /// How often the next in line looks again before it sleeps: about a microsecond, less than waking a thread costs.
    pub(super) const SPINS_MAX: u32 = 64;
}
mod ticket;

/// A lock the VMM brings.
pub trait RawLock: Send + Sync {
    /// Waits for the lock. Never called by a thread that is known to hold it.
    fn lock(&self);
    /// Gives it up. Called on the thread that took it.
    fn unlock(&self);
    /// Does this thread hold it? None: the VMM cannot tell.
    fn held(&self) -> Option<bool> {
        None
    }
}

/// The big lock of one guest. Not recursive.
pub struct Bql {
    kind: Kind,
    home: Arc<Home>,
    wakes: Mutex<u64>,
    woken: Condvar,
    counters: Counters,
}

enum Kind {
    Own(TicketLock),
    External { raw: Box<dyn RawLock>, holders: Mutex<Vec<Holder>> },
}

/// A thread that locked the VMM's lock through us. The VMM may drop its lock behind our back, in a condition wait of
/// its own, so there can be several.
#[derive(Clone, Copy)]
struct Holder {
    token: usize,
    since_ns: u64,
}

/// What the lock cost so far. Times in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BqlStats {
    /// Times the lock was taken.
    pub acquisitions: u64,
    /// Times it was not free; of a VMM's own lock only those where a thread that locked through us had it.
    pub contended: u64,
    /// Time spent waiting for it, over all threads.
    pub wait_total_ns: u64,
    /// Longest wait.
    pub wait_max_ns: u64,
    /// Time it was held.
    pub hold_total_ns: u64,
    /// Longest hold.
    pub hold_max_ns: u64,
}

#[derive(Default)]
struct Counters {
    acquisitions: AtomicU64,
    contended: AtomicU64,
    wait_total_ns: AtomicU64,
    wait_max_ns: AtomicU64,
    hold_total_ns: AtomicU64,
    hold_max_ns: AtomicU64,
}

impl Bql {
    /// The library's own lock.
    pub fn new() -> Self {
        Self::with(Kind::Own(TicketLock::new()))
    }

    /// The VMM's lock.
    pub fn external(raw: Box<dyn RawLock>) -> Self {
        Self::with(Kind::External { raw, holders: Mutex::default() })
    }

    fn with(kind: Kind) -> Self {
        Self {
            kind,
            home: Arc::default(),
            wakes: Mutex::default(),
            woken: Condvar::new(),
            counters: Counters::default(),
        }
    }

    /// The VMM's thread, if it has only one.
    pub fn home(&self) -> &Arc<Home> {
        &self.home
    }

    /// Whether somebody has the lock now, or the VMM alone can know.
    pub fn is_taken(&self) -> bool {
        match &self.kind {
            Kind::Own(own) => own.owner() != 0,
            Kind::External { .. } => true,
        }
    }

    /// Waits for the lock, in order of arrival. `EDEADLK` if this thread holds it already. Does nothing for a VMM with one
    /// thread.
    pub fn lock(&self) -> Result<()> {
        if self.home.is_manual() {
            return self.home.require_here("take the big lock");
        }
        if self.held() {
            return Err(Error::new(libc::EDEADLK, "this thread holds the big lock already; it is not recursive"));
        }
        let waited_ns = match &self.kind {
            Kind::Own(own) => own.acquire().1,
            Kind::External { raw, holders } => {
                let contended = !lock(holders).is_empty();
                let asked_ns = monotonic_ns();
                raw.lock();
                let since_ns = monotonic_ns();
                lock(holders).push(Holder { token: current_token(), since_ns });
                contended.then(|| since_ns.saturating_sub(asked_ns))
            }
        };
        self.counters.acquired(waited_ns);
        Ok(())
    }

    /// Gives the lock to whoever waits longest. `EPERM` if this thread does not hold it.
    pub fn unlock(&self) -> Result<()> {
        if self.home.is_manual() {
            return self.home.require_here("give the big lock up");
        }
        if !self.held() {
            return Err(Error::new(libc::EPERM, "this thread does not hold the big lock, so it cannot unlock it"));
        }
        match &self.kind {
            Kind::Own(own) => {
                self.counters.released(own.since_ns());
                own.release();
            }
            Kind::External { raw, holders } => {
                let token = current_token();
                let mut list = lock(holders);
                // Not listed when the VMM took its lock itself and unlocks through us: then the hold is not counted.
                let at = list.iter().position(|holder| holder.token == token);
                let taken = at.map(|at| list.swap_remove(at));
                drop(list);
                if let Some(holder) = taken {
                    self.counters.released(holder.since_ns);
                }
                raw.unlock();
            }
        }
        Ok(())
    }

    /// Whether this thread holds the lock.
    ///
    /// Of a VMM's lock that cannot tell: whether this thread took it through us. See [`knows_owner`](Self::knows_owner).
    pub fn held(&self) -> bool {
        if self.home.is_manual() {
            return self.home.is_here();
        }
        match &self.kind {
            Kind::Own(own) => own.owner() == current_token(),
            Kind::External { raw, holders } => raw.held().unwrap_or_else(|| {
                let token = current_token();
                lock(holders).iter().any(|holder| holder.token == token)
            }),
        }
    }

    /// False for a VMM's lock without `held`: then `held() == false` may mean that the VMM locked it directly.
    pub fn knows_owner(&self) -> bool {
        match &self.kind {
            Kind::Own(_) => true,
            Kind::External { raw, .. } => raw.held().is_some(),
        }
    }

    /// `EPERM` if this thread certainly does not hold the lock; `what` is the call that needs it.
    pub fn require_held(&self, what: &str) -> Result<()> {
        self.home.require_here(what)?;
        if self.held() || !self.knows_owner() {
            return Ok(());
        }
        Err(Error::new(libc::EPERM, format!("{what} must be called with the big lock held")))
    }

    /// `EDEADLK` if this thread holds the lock; `what` is the call that must wait without it. Of a VMM with one thread:
    /// if it is inside a callback.
    pub fn require_free(&self, what: &str) -> Result<()> {
        if self.home.is_manual() {
            return self.home.require_outside(what);
        }
        if self.held() {
            return Err(Error::new(libc::EDEADLK, format!("{what} must be called without the big lock")));
        }
        Ok(())
    }

    /// Takes the lock until the guard is dropped.
    pub fn guard(&self) -> Result<BqlGuard<'_>> {
        self.lock()?;
        Ok(BqlGuard { bql: self, _not_send: PhantomData })
    }

    /// Drops the lock, sleeps until [`wake_all`](Self::wake_all) or the timeout (none: for ever), takes it again.
    /// True: woken. `EPERM` if this thread does not hold it. No wake-up after the lock was dropped is missed.
    pub fn wait(&self, timeout: Option<Duration>) -> Result<bool> {
        // Read while the lock is held: whoever changes the condition needs the lock, so its wake comes later.
        let seen = self.wakes();
        self.unlock()?;
        let woken = self.sleep(seen, timeout.and_then(|timeout| Instant::now().checked_add(timeout)));
        self.lock()?;
        Ok(woken)
    }

    /// How often [`wake_all`](Self::wake_all) was called.
    pub fn wakes(&self) -> u64 {
        *lock(&self.wakes)
    }

    fn sleep(&self, seen: u64, deadline: Option<Instant>) -> bool {
        let mut wakes = lock(&self.wakes);
        while *wakes == seen {
            wakes = match deadline {
                None => self.woken.wait(wakes).unwrap_or_else(PoisonError::into_inner),
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return false;
                    }
                    self.woken.wait_timeout(wakes, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
        true
    }

    /// Wakes every thread in [`wait`](Self::wait). The lock should be held, as for the change it announces.
    pub fn wake_all(&self) {
        *lock(&self.wakes) += 1;
        self.woken.notify_all();
    }

    /// What the lock cost so far.
    pub fn stats(&self) -> BqlStats {
        let (get, from) = (|counter: &AtomicU64| counter.load(Ordering::Relaxed), &self.counters);
        BqlStats {
            acquisitions: get(&from.acquisitions),
            contended: get(&from.contended),
            wait_total_ns: get(&from.wait_total_ns),
            wait_max_ns: get(&from.wait_max_ns),
            hold_total_ns: get(&from.hold_total_ns),
            hold_max_ns: get(&from.hold_max_ns),
        }
    }
}

impl Default for Bql {
    fn default() -> Self {
        Self::new()
    }
}

impl std::fmt::Debug for Bql {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let external = matches!(self.kind, Kind::External { .. });
        f.debug_struct("Bql").field("external", &external).field("stats", &self.stats()).finish_non_exhaustive()
    }
}

/// The big lock, held by this thread until dropped.
#[derive(Debug)]
pub struct BqlGuard<'a> {
    bql: &'a Bql,
    /// The owner is a thread, so the guard stays on it.
    _not_send: PhantomData<*const ()>,
}

impl BqlGuard<'_> {
    /// See [`Bql::wait`].
    pub fn wait(&self, timeout: Option<Duration>) -> Result<bool> {
        self.bql.wait(timeout)
    }
}

impl Drop for BqlGuard<'_> {
    fn drop(&mut self) {
        // Fails only when a callback unlocked what it did not lock; there is nothing left to give up then.
        let _ = self.bql.unlock();
    }
}

impl Counters {
    fn acquired(&self, waited_ns: Option<u64>) {
        self.acquisitions.fetch_add(1, Ordering::Relaxed);
        if let Some(waited_ns) = waited_ns {
            self.contended.fetch_add(1, Ordering::Relaxed);
            self.wait_total_ns.fetch_add(waited_ns, Ordering::Relaxed);
            self.wait_max_ns.fetch_max(waited_ns, Ordering::Relaxed);
        }
    }

    fn released(&self, since_ns: u64) {
        let held_ns = monotonic_ns().saturating_sub(since_ns);
        self.hold_total_ns.fetch_add(held_ns, Ordering::Relaxed);
        self.hold_max_ns.fetch_max(held_ns, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod model_tests;
#[cfg(test)]
mod tests;
