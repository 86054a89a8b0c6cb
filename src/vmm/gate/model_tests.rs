//! Every interleaving of vCPUs and of those who close the gate, tried by loom (up to a few preemptions) on the same source
//! file with loom's atomics.
#![allow(unsafe_code, reason = "what loom guards is reached by its pointers")]

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::thread;

mod sync {
    use loom::sync::atomic::{AtomicU32, Ordering::AcqRel};
    use loom::sync::{Condvar, Mutex};
    use std::time::Instant;

    /// A number and who sleeps on it. Every access is a read-modify-write, because loom lets a sequentially consistent load
    /// return an old value.
    #[derive(Debug)]
    pub(super) struct Word {
        value: AtomicU32,
        sleepers: Mutex<()>,
        woken: Condvar,
    }

    impl Word {
        pub(super) fn new(value: u32) -> Self {
            Self { value: AtomicU32::new(value), sleepers: Mutex::new(()), woken: Condvar::new() }
        }
        pub(super) fn load(&self) -> u32 {
            self.value.fetch_or(0, AcqRel)
        }
        pub(super) fn swap(&self, value: u32) -> u32 {
            self.value.swap(value, AcqRel)
        }
        pub(super) fn add(&self, value: u32) -> u32 {
            self.value.fetch_add(value, AcqRel)
        }
        pub(super) fn sub(&self, value: u32) -> u32 {
            self.value.fetch_sub(value, AcqRel)
        }
        pub(super) fn turn(&self, from: u32, to: u32) -> bool {
            self.value.compare_exchange(from, to, AcqRel, std::sync::atomic::Ordering::Acquire).is_ok()
        }
        /// As the kernel does it: the number is looked at and the thread put to sleep in one step. No deadline ever comes.
        pub(super) fn wait(&self, value: u32, _: Option<Instant>) {
            let sleepers = self.sleepers.lock().unwrap();
            if self.load() == value {
                drop(self.woken.wait(sleepers).unwrap());
            }
        }
        pub(super) fn wake_all(&self) {
            drop(self.sleepers.lock().unwrap());
            self.woken.notify_all();
        }
    }

    pub(super) fn breathe() {
        loom::thread::yield_now();
    }
}
#[path = "core.rs"]
#[allow(
    dead_code,
    unreachable_pub,
    clippy::duplicate_mod,
    reason = "the same code on purpose; the model uses a part"
)]
mod core;

use self::core::{Core, Entered};

/// Preemptions in one run: the number of runs grows with it steeply.
const PREEMPTIONS: usize = 3;

/// A gate, and what only those inside may read and only who has stopped them may write: loom reports a race.
struct Guest {
    core: Core,
    /// 1: the vCPU is to come out, in the tests that end the gate.
    told: sync::Word,
    state: UnsafeCell<u32>,
}

fn every_order(vcpus: usize, f: impl Fn(Arc<Guest>) + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(PREEMPTIONS);
    let guest = move || Guest { core: Core::new(vcpus), told: sync::Word::new(0), state: UnsafeCell::new(0) };
    builder.check(move || f(Arc::new(guest())));
}

/// Goes in as a vCPU does, runs, and comes out.
fn run_once(guest: &Guest, vcpu: usize) {
    loop {
        match guest.core.enter(vcpu, || {}) {
            Entered::Inside => break,
            Entered::Closed(epoch) => guest.core.await_change(epoch, None),
            Entered::Ended => panic!("nobody ended it"),
            Entered::Twice => panic!("twice"),
        }
    }
    guest.state.with(|state| {
        // SAFETY: loom checks that nobody writes meanwhile.
        std::hint::black_box(unsafe { *state });
    });
    assert!(guest.core.exit(vcpu));
}

fn write_while_stopped(guest: &Guest) {
    guest.core.close();
    assert!(guest.core.await_empty(None));
    guest.state.with_mut(|state| {
        // SAFETY: loom checks that nobody reads meanwhile.
        unsafe { *state += 1 };
    });
    guest.core.open();
}

fn start(guest: &Arc<Guest>, vcpus: usize) -> Vec<thread::JoinHandle<()>> {
    let one = |vcpu| {
        let guest = Arc::clone(guest);
        thread::spawn(move || run_once(&guest, vcpu))
    };
    (0..vcpus).map(one).collect()
}

#[test]
fn nobody_is_inside_a_closed_gate_and_everybody_gets_in_again() {
    every_order(2, |guest| {
        let vcpus = start(&guest, 2);
        guest.core.open();
        write_while_stopped(&guest);
        vcpus.into_iter().for_each(|vcpu| vcpu.join().unwrap());
    });
}

#[test]
fn closing_again_counts_anew() {
    every_order(1, |guest| {
        let vcpus = start(&guest, 1);
        guest.core.open();
        write_while_stopped(&guest);
        write_while_stopped(&guest);
        vcpus.into_iter().for_each(|vcpu| vcpu.join().unwrap());
    });
}

#[test]
fn a_close_that_was_given_up_leaves_nothing_behind() {
    every_order(2, |guest| {
        let vcpus = start(&guest, 2);
        guest.core.open();
        guest.core.close();
        // Nobody is waited for: somebody did not come out in time.
        guest.core.open();
        write_while_stopped(&guest);
        vcpus.into_iter().for_each(|vcpu| vcpu.join().unwrap());
    });
}

/// A halted vCPU: it comes out when it is told to, and returns when the gate has ended.
fn run_until_the_end(guest: &Guest) {
    loop {
        match guest.core.enter(0, || _ = guest.told.swap(0)) {
            Entered::Inside => {
                while guest.told.load() == 0 {
                    guest.told.wait(0, None);
                }
                assert!(guest.core.exit(0));
            }
            Entered::Closed(epoch) => guest.core.await_change(epoch, None),
            Entered::Ended => return,
            Entered::Twice => panic!("twice"),
        }
    }
}

fn tell(guest: &Guest) {
    guest.told.swap(1);
    guest.told.wake_all();
}

/// As the gate's `end` does it.
fn end(guest: &Guest) {
    guest.core.end();
    if guest.core.is_inside(0) {
        tell(guest);
    }
}

/// loom reports a vCPU that sleeps for ever.
fn ends(before: impl Fn(&Guest) + Sync + Send + 'static) {
    every_order(1, move |guest| {
        let its = Arc::clone(&guest);
        let vcpu = thread::spawn(move || run_until_the_end(&its));
        before(&guest);
        end(&guest);
        vcpu.join().unwrap();
        assert_eq!(guest.core.enter(0, || {}), Entered::Ended);
    });
}

#[test]
fn a_vcpu_that_waits_hears_of_the_end() {
    ends(|_| {});
}

#[test]
fn a_vcpu_that_is_halted_hears_of_the_end() {
    ends(|guest| guest.core.open());
}

#[test]
fn an_end_while_another_closes_is_heard_by_both() {
    every_order(1, |guest| {
        guest.core.open();
        let (its, closers) = (Arc::clone(&guest), Arc::clone(&guest));
        let vcpu = thread::spawn(move || run_until_the_end(&its));
        let closer = thread::spawn(move || {
            closers.core.close();
            if closers.core.is_awaited(0) {
                tell(&closers);
            }
            assert!(closers.core.await_empty(None));
            assert!(closers.core.is_closed());
            closers.core.open();
        });
        end(&guest);
        closer.join().unwrap();
        vcpu.join().unwrap();
        assert!(!guest.core.is_closed());
    });
}

/// Two threads that go in as the same vCPU: at most one gets in, and it is the one that is told to come out.
#[test]
fn of_two_threads_at_one_place_the_one_inside_is_told() {
    struct Place {
        core: Core,
        /// Which thread sat down last.
        who: sync::Word,
        told: [sync::Word; 2],
    }
    fn run(place: &Place, me: u32) {
        let told = &place.told[me as usize];
        let sit = || {
            place.who.swap(me);
            told.swap(0);
        };
        if place.core.enter(0, sit) == Entered::Inside {
            while told.load() == 0 {
                told.wait(0, None);
            }
            assert!(place.core.exit(0));
        }
    }
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(PREEMPTIONS);
    builder.check(|| {
        let told = [sync::Word::new(0), sync::Word::new(0)];
        let place = Arc::new(Place { core: Core::new(1), who: sync::Word::new(9), told });
        place.core.open();
        let one = |me| {
            let place = Arc::clone(&place);
            thread::spawn(move || run(&place, me))
        };
        let threads = [one(0), one(1)];
        place.core.close();
        if place.core.is_awaited(0) {
            let told = &place.told[place.who.load() as usize];
            told.swap(1);
            told.wake_all();
        }
        assert!(place.core.await_empty(None));
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    });
}

/// Who is sent to nap while it goes in is told, or looks when it is inside.
#[test]
fn a_nap_that_comes_while_a_vcpu_goes_in_is_seen() {
    every_order(1, |guest| {
        guest.core.open();
        let nap = Arc::new(sync::Word::new(0));
        let (its, its_nap) = (Arc::clone(&guest), Arc::clone(&nap));
        let vcpu = thread::spawn(move || {
            assert_eq!(its.core.enter(0, || _ = its.told.swap(0)), Entered::Inside);
            if its_nap.load() == 0 {
                while its.told.load() == 0 {
                    its.told.wait(0, None);
                }
            }
            assert!(its.core.exit(0));
        });
        nap.swap(1);
        if guest.core.is_inside(0) {
            tell(&guest);
        }
        vcpu.join().unwrap();
    });
}
