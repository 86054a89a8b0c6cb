//! The library's own big lock: who comes first is served first. Compiled twice: model_tests.rs tries every interleaving of it.

use super::sync::{
    AtomicU64, AtomicUsize, Mutex, Ordering, Parker, SPINS_MAX, Unparker, current_token, lock, spin_loop,
};
use crate::sys::clock::monotonic_ns;

/// Tickets are drawn by an atomic add and served in that order; a thread whose turn it is not sleeps under its number.
pub(super) struct TicketLock {
    next: AtomicU64,
    serving: AtomicU64,
    /// Token of the thread being served; 0: none. Each thread only asks whether it is itself, so relaxed will do.
    owner: AtomicUsize,
    since_ns: AtomicU64,
    sleepers: Mutex<Vec<(u64, Unparker)>>,
}

impl TicketLock {
    /// Free.
    pub(super) fn new() -> Self {
        Self {
            next: AtomicU64::new(0),
            serving: AtomicU64::new(0),
            owner: AtomicUsize::new(0),
            since_ns: AtomicU64::new(0),
            sleepers: Mutex::new(Vec::new()),
        }
    }

    /// Token of the thread being served; 0: none.
    pub(super) fn owner(&self) -> usize {
        self.owner.load(Ordering::Relaxed)
    }

    /// Since when.
    pub(super) fn since_ns(&self) -> u64 {
        self.since_ns.load(Ordering::Relaxed)
    }

    /// Threads that drew a ticket and are not served yet, and the one that is.
    #[cfg(test)]
    pub(super) fn in_line(&self) -> u64 {
        self.next.load(Ordering::SeqCst) - self.serving.load(Ordering::SeqCst)
    }

    /// Nothing is left of those who slept.
    #[cfg(test)]
    pub(super) fn nobody_sleeps(&self) -> bool {
        lock(&self.sleepers).is_empty()
    }

    /// The ticket, and how long its turn took if it did not come at once.
    pub(super) fn acquire(&self) -> (u64, Option<u64>) {
        let ticket = self.next.fetch_add(1, Ordering::SeqCst);
        let asked_ns = monotonic_ns();
        let mut since_ns = asked_ns;
        let contended = self.serving.load(Ordering::SeqCst) != ticket;
        if contended {
            if !self.spin(ticket) {
                self.sleep(ticket);
            }
            since_ns = monotonic_ns();
        }
        self.owner.store(current_token(), Ordering::Relaxed);
        self.since_ns.store(since_ns, Ordering::Relaxed);
        (ticket, contended.then(|| since_ns.saturating_sub(asked_ns)))
    }

    fn spin(&self, ticket: u64) -> bool {
        for _ in 0..SPINS_MAX {
            match ticket - self.serving.load(Ordering::SeqCst) {
                0 => return true,
                1 => spin_loop(),
                _ => return false,
            }
        }
        false
    }

    /// Either this sees the new `serving`, or `release` finds the entry: both orders of the two mutex sections end so.
    fn sleep(&self, ticket: u64) {
        let parker = Parker::new();
        lock(&self.sleepers).push((ticket, parker.unparker().clone()));
        while self.serving.load(Ordering::SeqCst) != ticket {
            parker.park();
        }
        lock(&self.sleepers).retain(|(other, _)| *other != ticket);
    }

    /// Serves the next one; called by who is served.
    pub(super) fn release(&self) {
        self.owner.store(0, Ordering::Relaxed);
        let turn = self.serving.load(Ordering::Relaxed) + 1;
        self.serving.store(turn, Ordering::SeqCst);
        if self.next.load(Ordering::SeqCst) != turn {
            let sleepers = lock(&self.sleepers);
            let sleeper = sleepers.iter().find(|(ticket, _)| *ticket == turn).map(|(_, unparker)| unparker.clone());
            drop(sleepers);
            if let Some(unparker) = sleeper {
                unparker.unpark();
            }
        }
    }
}
