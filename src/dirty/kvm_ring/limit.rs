//! Dirty limits of vCPUs, with a migration or without, and how fast each dirties memory.

use std::sync::{PoisonError, TryLockError};
use std::time::{Duration, Instant};

use super::{KvmRing, LOOK, ROOM, Vcpu};
use crate::error::{Error, Result};
use crate::pacing::dirty_limit::{Speed, TURN};
use crate::sys::clock::monotonic_ns;
use crate::thread::lock;

/// What a speed is measured over, if nobody says otherwise.
pub(super) const PERIOD: Duration = Duration::from_secs(1);

/// The meters' clock.
pub(super) fn now() -> Duration {
    Duration::from_nanos(monotonic_ns())
}

/// A vCPU's limit, and what it did in the last period.
#[derive(Clone, Copy, Debug)]
pub struct VcpuDirt {
    /// Bytes per second; 0: none. The lower one of what was asked for and what a migration imposes.
    pub limit: u64,
    /// What was asked for.
    pub asked: u64,
    /// What it did.
    pub speed: Speed,
    /// Entries of its ring.
    pub entries: usize,
}

impl KvmRing {
    /// How many vCPUs there are.
    pub fn vcpus(&self) -> usize {
        lock(&self.shared.rings).vcpus.len()
    }

    /// Whether writes are logged in the rings now.
    pub fn is_in_use(&self) -> bool {
        lock(&self.harvester).is_some()
    }

    /// Each vCPU's limit and speed. Speeds are known while a migration runs, or a limit is set.
    pub fn dirt(&self) -> Vec<VcpuDirt> {
        let rings = lock(&self.shared.rings);
        let dirt = |vcpu: &Vcpu| VcpuDirt {
            limit: vcpu.meter.limit(),
            asked: vcpu.meter.asked(),
            speed: vcpu.meter.speed(),
            entries: vcpu.ring.entries(),
        };
        rings.vcpus.iter().map(dirt).collect()
    }

    /// A vCPU stands at a full ring: gives it room, as soon as its limit allows that, and returns after a moment in any
    /// case; KVM then says again that the ring is full. Any thread.
    pub fn ring_full(&self, vcpu: usize) -> Result<()> {
        let begin = Instant::now();
        // Emptying a ring takes time as well, which is not its limit's doing.
        let mut held_up: Option<Instant> = None;
        let mut rings = lock(&self.shared.rings);
        let many = rings.vcpus.len();
        if vcpu >= many {
            return Err(no_vcpu(vcpu, many));
        }
        let result = loop {
            let (now, suspended, before) = (now(), rings.suspended, rings.vcpus[vcpu].meter.given());
            let taken =
                self.shared.take(&mut rings, &mut self.shared.slots.lock(), |one| one.allowed(now, suspended));
            let Vcpu { ring, meter, .. } = &rings.vcpus[vcpu];
            let has_room = meter.given() > before || !ring.has(ring.entries() / ROOM);
            let left = TURN.saturating_sub(begin.elapsed());
            if taken.is_err() || suspended || has_room || left.is_zero() {
                break taken;
            }
            held_up.get_or_insert_with(Instant::now);
            rings = self.shared.lifted.wait_timeout(rings, left.min(LOOK)).unwrap_or_else(PoisonError::into_inner).0;
        };
        if let Some(since) = held_up {
            rings.vcpus[vcpu].meter.stood(since.elapsed());
        }
        result
    }

    /// Limits a vCPU, or all, to so many bytes per second; 0: no longer. Needs no migration.
    pub fn set_limit(&self, vcpu: Option<usize>, limit: u64) -> Result<()> {
        let mut users = match self.users.try_lock() {
            Ok(users) => users,
            Err(TryLockError::Poisoned(users)) => users.into_inner(),
            // Whoever has it may wait for the caller: a VMM with one thread.
            Err(TryLockError::WouldBlock) => {
                let text = "the dirty log is just being switched on or off: set the limit a moment later";
                return Err(Error::new(libc::EBUSY, text));
            }
        };
        let before = self.ask(vcpu, limit)?;
        let wanted = lock(&self.shared.rings).vcpus.iter().any(|vcpu| vcpu.meter.asked() > 0);
        // Each time, for slots may have been added meanwhile.
        if wanted && let Err(error) = self.begin(&users, None) {
            for (vcpu, limit) in before.into_iter().enumerate() {
                self.ask(Some(vcpu), limit)?;
            }
            return Err(error.context("logging what vCPUs write"));
        }
        users.limits = wanted;
        self.rest(&users);
        Ok(())
    }

    /// The guest goes away: no limit keeps anything on.
    pub fn end_limits(&self) {
        let mut users = lock(&self.users);
        lock(&self.shared.rings).vcpus.iter_mut().for_each(|vcpu| vcpu.meter.ask(0));
        users.limits = false;
        self.rest(&users);
    }

    /// Sets limits; what they were.
    fn ask(&self, vcpu: Option<usize>, limit: u64) -> Result<Vec<u64>> {
        let mut rings = lock(&self.shared.rings);
        let many = rings.vcpus.len();
        if let Some(vcpu) = vcpu.filter(|vcpu| *vcpu >= many) {
            return Err(no_vcpu(vcpu, many));
        }
        let before = rings.vcpus.iter().map(|vcpu| vcpu.meter.asked()).collect();
        let chosen = |at: usize| vcpu.is_none_or(|vcpu| vcpu == at);
        let some = rings.vcpus.iter_mut().enumerate().filter(|(at, _)| chosen(*at));
        some.for_each(|(_, vcpu)| vcpu.meter.ask(limit));
        self.shared.lifted.notify_all();
        Ok(before)
    }

    /// A migration limits all vCPUs, beside what was asked for; 0: no longer.
    pub fn impose(&self, limit: u64) {
        let mut rings = lock(&self.shared.rings);
        rings.vcpus.iter_mut().for_each(|vcpu| vcpu.meter.impose(limit));
        self.shared.lifted.notify_all();
    }

    /// The guest is about to be stopped, so that nobody is to be found standing at a ring; or it goes on.
    pub fn suspend(&self, suspend: bool) {
        lock(&self.shared.rings).suspended = suspend;
        self.shared.lifted.notify_all();
    }

    /// What speeds are measured over.
    pub fn set_period(&self, period: Duration) {
        lock(&self.shared.rings).period = period;
    }
}

fn no_vcpu(vcpu: usize, many: usize) -> Error {
    Error::invalid(format!("there is no vCPU {vcpu}: vmig_use_kvm was given {many}"))
}
