//! Who is inside, and how the gate is closed: the protocol between vCPU threads and the one that stops them. Compiled
//! twice: model_tests.rs tries every interleaving of it.
//!
//! A vCPU says that it is inside and then looks whether the gate is closed; who closes says so and then looks who is
//! inside. So at least one of them sees the other. Whoever was seen inside is marked, and counts down when it leaves. The
//! same holds for who ends the gate, and for who sends vCPUs to nap, except that nobody is waited for.
//!
//! Before it says so it takes its place, which of many threads one can, and sits down: who sees it inside sees how it is
//! reached. One that only took its place is outside still, and is yet to look.

use std::time::Instant;

use super::sync::{Word, breathe};

const OUT: u32 = 0;
const IN: u32 = 1;
/// Inside, and whoever closes the gate waits for it.
const AWAITED: u32 = 2;
/// A thread took the place and is about to say that it is inside.
const COMING: u32 = 3;

/// What became of an attempt to enter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Entered {
    Inside,
    /// The gate is closed; the number to wait on.
    Closed(u32),
    /// It never opens again.
    Ended,
    /// It is inside already, or another thread is going in as the same vCPU.
    Twice,
}

/// The gate and its vCPUs.
#[derive(Debug)]
pub(super) struct Core {
    /// Odd: closed. Changes whenever somebody who waits should look.
    epoch: Word,
    /// 1: nobody goes in any more.
    ended: Word,
    /// vCPUs that are waited for, and one more while they are being looked for.
    awaited: Word,
    vcpus: Box<[Padded]>,
}

/// A line of the cache each: vCPUs come and go without disturbing each other.
#[derive(Debug)]
#[repr(align(128))]
struct Padded(Word);

impl Core {
    /// A closed gate.
    pub(super) fn new(vcpus: usize) -> Self {
        let vcpus = (0..vcpus).map(|_| Padded(Word::new(OUT))).collect();
        Self { epoch: Word::new(1), ended: Word::new(0), awaited: Word::new(0), vcpus }
    }

    pub(super) fn vcpus(&self) -> usize {
        self.vcpus.len()
    }

    pub(super) fn is_inside(&self, vcpu: usize) -> bool {
        matches!(self.vcpus[vcpu].0.load(), IN | AWAITED)
    }

    pub(super) fn is_awaited(&self, vcpu: usize) -> bool {
        self.vcpus[vcpu].0.load() == AWAITED
    }

    pub(super) fn is_closed(&self) -> bool {
        self.epoch.load() % 2 == 1
    }

    pub(super) fn has_ended(&self) -> bool {
        self.ended.load() != 0
    }

    /// Goes in, if the gate is open. `sit` stores how it is told to come out: what it stores is seen by whoever sees it
    /// inside, and nobody else stores meanwhile.
    pub(super) fn enter(&self, vcpu: usize, sit: impl FnOnce()) -> Entered {
        if !self.vcpus[vcpu].0.turn(OUT, COMING) {
            return Entered::Twice;
        }
        sit();
        self.vcpus[vcpu].0.swap(IN);
        // In this order: an end that is not seen here is yet to change the epoch, and to look who is inside.
        let epoch = self.epoch.load();
        let ended = self.has_ended();
        if !ended && epoch % 2 == 0 {
            return Entered::Inside;
        }
        self.exit(vcpu);
        if ended { Entered::Ended } else { Entered::Closed(epoch) }
    }

    /// Goes out; false: it was not inside.
    pub(super) fn exit(&self, vcpu: usize) -> bool {
        let state = &self.vcpus[vcpu].0;
        // Again only if somebody closed or opened the gate in between.
        loop {
            let was = state.load();
            if !matches!(was, IN | AWAITED) {
                return false;
            }
            if state.turn(was, OUT) {
                if was == AWAITED {
                    self.one_less();
                }
                return true;
            }
        }
    }

    fn one_less(&self) {
        if self.awaited.sub(1) == 1 {
            self.awaited.wake_all();
        }
    }

    /// Closes an open gate: from here on nobody goes in, and those inside are awaited. One at a time.
    pub(super) fn close(&self) {
        self.awaited.add(1);
        self.epoch.add(1);
        for Padded(vcpu) in &self.vcpus {
            self.awaited.add(1);
            if !vcpu.turn(IN, AWAITED) {
                self.one_less();
            }
        }
        self.one_less();
    }

    /// Waits until nobody is inside, or the deadline; whether nobody is.
    pub(super) fn await_empty(&self, deadline: Option<Instant>) -> bool {
        loop {
            let left = self.awaited.load();
            if left == 0 {
                return true;
            }
            if deadline.is_some_and(|at| at <= Instant::now()) {
                return false;
            }
            self.awaited.wait(left, deadline);
        }
    }

    /// Opens a closed gate, whether or not everybody had left. One at a time.
    pub(super) fn open(&self) {
        for Padded(vcpu) in &self.vcpus {
            if vcpu.turn(AWAITED, IN) {
                self.awaited.sub(1);
            }
        }
        // One that just left counts itself down, and must not do so in the count of the next close.
        while self.awaited.load() != 0 {
            breathe();
        }
        self.epoch.add(1);
        self.epoch.wake_all();
    }

    /// Number to wait on for a change.
    pub(super) fn epoch(&self) -> u32 {
        self.epoch.load()
    }

    /// Waits for a change, or the deadline; may return early.
    pub(super) fn await_change(&self, epoch: u32, deadline: Option<Instant>) {
        self.epoch.wait(epoch, deadline);
    }

    /// From here on nobody goes in; who waits looks again. Those inside are to be told afterwards.
    pub(super) fn end(&self) {
        self.ended.swap(1);
        self.shake();
    }

    /// Has everybody who waits look again.
    pub(super) fn shake(&self) {
        self.epoch.add(2);
        self.epoch.wake_all();
    }
}
