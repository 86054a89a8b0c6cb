//! Every interleaving of threads that take the big lock, tried by loom (up to a few preemptions) on the same source file with
//! loom's atomics.

use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, Ordering::Relaxed};
use loom::thread;

mod sync {
    pub(super) use loom::hint::spin_loop;
    use loom::sync::{Arc, Condvar};
    pub(super) use loom::sync::{Mutex, MutexGuard};
    pub(super) use std::sync::atomic::Ordering;

    /// One look: more of them are no more ways to interleave, only more runs.
    pub(super) const SPINS_MAX: u32 = 1;

    pub(super) use crate::thread::model::AtomicU64;
    pub(super) use loom::sync::atomic::AtomicUsize;

    /// A token that is kept: who unparks first is not missed.
    pub(super) struct Parker(Unparker);

    #[derive(Clone)]
    pub(super) struct Unparker(Arc<(Mutex<bool>, Condvar)>);

    impl Parker {
        pub(super) fn new() -> Self {
            Self(Unparker(Arc::new((Mutex::new(false), Condvar::new()))))
        }

        pub(super) fn unparker(&self) -> &Unparker {
            &self.0
        }

        pub(super) fn park(&self) {
            let (token, changed) = &*self.0.0;
            let mut token = lock(token);
            while !*token {
                token = changed.wait(token).unwrap();
            }
            *token = false;
        }
    }

    impl Unparker {
        pub(super) fn unpark(&self) {
            *lock(&self.0.0) = true;
            self.0.1.notify_one();
        }
    }

    pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
        mutex.lock().unwrap()
    }

    /// loom's threads are one of the system's. Nobody asks here who it is.
    pub(super) fn current_token() -> usize {
        1
    }
}
#[path = "ticket.rs"]
#[allow(dead_code, clippy::duplicate_mod, reason = "the same code on purpose; the model uses a part")]
mod ticket;

use ticket::TicketLock;

/// Preemptions in one run: the number of runs grows with it steeply.
const PREEMPTIONS: usize = 3;

/// Threads that each take the lock so many times, and count what they do without any order of their own: who does not see
/// what the one before it did counts wrongly. loom also finds a run in which somebody waits for ever.
fn model(turns: &'static [u64]) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(PREEMPTIONS);
    builder.check(move || {
        let shared = Arc::new((TicketLock::new(), AtomicU64::new(0)));
        let work = |(lock, served): &(TicketLock, AtomicU64), turns: u64| {
            for _ in 0..turns {
                let (ticket, _) = lock.acquire();
                assert_eq!(served.load(Relaxed), ticket, "served in the order of their tickets, one at a time");
                served.store(ticket + 1, Relaxed);
                lock.release();
            }
        };
        let threads: Vec<_> = turns[1..]
            .iter()
            .map(|turns| {
                let shared = Arc::clone(&shared);
                thread::spawn(move || work(&shared, *turns))
            })
            .collect();
        work(&shared, turns[0]);
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        assert_eq!(shared.1.load(Relaxed), turns.iter().sum::<u64>());
    });
}

#[test]
fn two_threads_take_turns() {
    model(&[2, 2]);
}

#[test]
fn of_three_threads_each_is_served() {
    model(&[1, 1, 1]);
}
