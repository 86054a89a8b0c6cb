//! KVM's dirty rings: each vCPU notes the pages it writes in a ring of its own, until somebody takes the notes.
//!
//! The VMM enables rings before it makes vCPUs; here they are found, never switched. A page that was taken is protected
//! again when its entry is reset, and kept (`kept`) until the next sync tells it. So that no vCPU stands at a full ring,
//! a thread takes what there is once a ring is a quarter full, not earlier: a page that is written all the time costs a
//! fault for each reset. A vCPU that found its ring full (`KVM_EXIT_DIRTY_RING_FULL`) hands over through its VMM, and goes
//! on when its ring has room.
//!
//! A vCPU with a dirty limit (`limit`) has its ring emptied no faster than the limit says, but for syncs, which take
//! everything: so whoever writes too fast stands at a full ring, a moment at a time, and nobody else is slowed down.
//!
//! What KVM itself writes outside of any vCPU is in no ring; where that can be (arm64), KVM keeps a bitmap beside them,
//! which is read at every sync.

use std::ops::Range;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use super::kvm_slots::{KvmTracker, Placed, Slots, Switch};
use super::{Found, Kind, Tracker};
use crate::bitmap::WORD_BITS;
use crate::error::{Error, Result};
use crate::pacing::dirty_limit::Meter;
use crate::ram::{Block, RamList};
use crate::sys::eventfd::Wake;
use crate::sys::io;
use crate::sys::kvm::{DirtyLog, Vm};
use crate::sys::kvm_ring::Ring;
use crate::thread::{Handle, Threads, current_token, lock};
use limit::{PERIOD, now};

mod limit;
#[cfg(all(test, target_arch = "x86_64"))]
mod tests;
pub use limit::VcpuDirt;

/// Between two looks of the harvester at how full the rings are.
const LOOK: Duration = Duration::from_millis(2);
/// It harvests when a ring is full to one part in so many.
const PART: usize = 4;
/// A ring that is less full than one part in so many has room.
const ROOM: usize = 2;
/// So often KVM is asked to take entries back, if it ends early.
const TRIES: usize = 16;

/// A slot with what was taken of it.
#[derive(Debug)]
struct Noted {
    placed: Placed,
    on: bool,
    /// Pages taken from rings and not told yet.
    kept: Vec<u64>,
    /// KVM's bitmap beside the rings, where it keeps one.
    beside: Option<DirtyLog>,
}

impl AsRef<Placed> for Noted {
    fn as_ref(&self) -> &Placed {
        &self.placed
    }
}

/// A vCPU's ring, and how fast it fills.
#[derive(Debug)]
struct Vcpu {
    ring: Ring,
    meter: Meter,
    /// Pages taken from it so far, of slots that are tracked.
    taken: u64,
}

impl Vcpu {
    /// Entries of its ring that may be given back.
    fn allowed(&mut self, now: Duration, suspended: bool) -> usize {
        if suspended { usize::MAX } else { self.meter.allowed(now) }
    }
}

#[derive(Debug)]
struct Rings {
    vcpus: Vec<Vcpu>,
    /// The guest is being stopped: no vCPU is held up at its ring.
    suspended: bool,
    /// Of the meters.
    period: Duration,
    period_began: Duration,
    /// What went wrong where nobody could be told; the next sync fails with it.
    trouble: Option<Error>,
    /// KVM may have left pages unprotected that it was given back, until logging is switched on anew.
    unprotected: bool,
}

impl Rings {
    fn owed(&self) -> usize {
        self.vcpus.iter().map(|vcpu| vcpu.ring.owed()).sum()
    }

    /// Gives KVM the entries that were taken, also those that an earlier try left: a vCPU whose ring is full of them would
    /// never go on.
    fn give_back(&mut self, mut reset: impl FnMut() -> Result<usize>) -> Result<()> {
        let mut owed = self.owed();
        for _ in 0..TRIES {
            if owed == 0 {
                return Ok(());
            }
            let given = reset()?;
            owed = self.owed();
            if given > 0 && owed > 0 {
                // Signals are blocked, but a debugger or SIGSTOP still gets through. KVM protects pages of several entries
                // at a time, and skips it for the last ones when it ends early.
                self.unprotected = true;
            }
        }
        match owed {
            0 => Ok(()),
            _ => {
                let text = format!(
                    "KVM did not take back {owed} entries of dirty rings in {TRIES} calls of KVM_RESET_DIRTY_RINGS: \
                     something interrupts every one of them"
                );
                Err(Error::new(libc::EINTR, text))
            }
        }
    }
}

/// What the harvester and the tracker share. Lock order: users, switching, rings, slots.
struct Shared {
    /// Held while a slot's log is switched, and to take a slot away: KVM would make one anew that was deleted meanwhile.
    switching: Mutex<()>,
    /// The thread that is in the hook for that; 0: none.
    switcher: AtomicUsize,
    rings: Mutex<Rings>,
    slots: Slots<Noted>,
    /// A limit was lifted: who stands at a ring looks again.
    lifted: Condvar,
}

/// Who wants writes to be logged.
#[derive(Debug, Default)]
struct Users {
    /// A migration, or another reader of the hub.
    readers: bool,
    /// A vCPU has a limit without one.
    limits: bool,
}

/// Tracks a guest by KVM's dirty rings.
pub struct KvmRing {
    shared: Arc<Shared>,
    threads: Arc<Threads>,
    users: Mutex<Users>,
    harvester: Mutex<Option<(Handle<()>, Arc<Wake>)>>,
}

impl std::fmt::Debug for KvmRing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "KvmRing({} rings)", lock(&self.shared.rings).vcpus.len())
    }
}

impl KvmRing {
    /// The rings of these vCPUs; none if the VMM did not enable them.
    pub fn find(vcpus: &[RawFd]) -> Result<Vec<Ring>> {
        let rings: Vec<Ring> = vcpus.iter().filter_map(|fd| Ring::of(*fd).transpose()).collect::<Result<_>>()?;
        if !rings.is_empty() && rings.len() != vcpus.len() {
            return Err(Error::invalid("some vCPUs have a dirty ring and some have none: they are not of one VM"));
        }
        Ok(rings)
    }

    /// A tracker for the VM with these rings. `switch` switches logging; without it the library sets the slot's flags.
    pub fn new(vm: Vm, rings: Vec<Ring>, threads: Arc<Threads>, switch: Option<Switch>) -> Self {
        let vcpus = rings.into_iter().map(|ring| Vcpu { ring, meter: Meter::default(), taken: 0 }).collect();
        let (period, period_began) = (PERIOD, Duration::ZERO);
        let rings = Rings { vcpus, suspended: false, period, period_began, trouble: None, unprotected: false };
        Self {
            shared: Arc::new(Shared {
                switching: Mutex::default(),
                switcher: AtomicUsize::new(0),
                rings: Mutex::new(rings),
                slots: Slots::new(vm, switch),
                lifted: Condvar::new(),
            }),
            threads,
            users: Mutex::default(),
            harvester: Mutex::default(),
        }
    }

    /// Logging and the harvester on, for the first user.
    fn begin(&self, users: &Users, list: Option<&RamList>) -> Result<()> {
        self.shared.switch_on(list)?;
        if lock(&self.harvester).is_some() {
            return Ok(());
        }
        self.start_harvester().inspect_err(|_| self.rest(users))
    }

    fn start_harvester(&self) -> Result<()> {
        let wake = Arc::new(Wake::new()?);
        let (shared, seen) = (Arc::clone(&self.shared), Arc::clone(&wake));
        {
            let mut rings = lock(&shared.rings);
            rings.period_began = now();
            rings.vcpus.iter_mut().for_each(|vcpu| vcpu.meter.restart(now()));
        }
        let harvester = self.threads.spawn("dirty_ring", move || {
            shared.watch(&seen);
            Ok(())
        })?;
        *lock(&self.harvester) = Some((harvester, wake));
        Ok(())
    }

    /// All off, if nobody is left who wants it.
    fn rest(&self, users: &Users) {
        if users.readers || users.limits {
            return;
        }
        self.end_harvester();
        self.shared.switch_off(|_| true);
        let mut rings = lock(&self.shared.rings);
        let mut slots = self.shared.slots.lock();
        // A vCPU that stands at a full ring must go on.
        let _ = self.shared.harvest(&mut rings, &mut slots);
        rings.unprotected = false;
        rings.vcpus.iter_mut().for_each(|vcpu| vcpu.meter.restart(now()));
    }

    /// Pages that each vCPU made dirty so far, in the order of the vCPUs: one that is taken and written again counts again.
    pub fn taken(&self) -> Vec<u64> {
        lock(&self.shared.rings).vcpus.iter().map(|vcpu| vcpu.taken).collect()
    }

    fn end_harvester(&self) {
        if let Some((harvester, wake)) = lock(&self.harvester).take() {
            wake.raise();
            // It ends by itself and has nothing to return.
            let _ = harvester.join(None);
        }
    }
}

impl Shared {
    /// Takes everything from all rings, and gives them back to KVM.
    fn harvest(&self, rings: &mut Rings, slots: &mut [Noted]) -> Result<()> {
        self.take(rings, slots, |_| usize::MAX)
    }

    /// The same with rings that are a quarter full, and of vCPUs with a limit no more than that allows.
    fn harvest_allowed(&self, rings: &mut Rings, slots: &mut [Noted]) -> Result<()> {
        let (now, suspended) = (now(), rings.suspended);
        self.take(rings, slots, |vcpu| match vcpu.ring.has(vcpu.ring.entries() / PART) {
            true => vcpu.allowed(now, suspended),
            false => 0,
        })
    }

    /// Takes as many entries of each ring as `most` says, and gives them back to KVM.
    fn take(&self, rings: &mut Rings, slots: &mut [Noted], most: impl Fn(&mut Vcpu) -> usize) -> Result<()> {
        let Rings { vcpus, trouble, .. } = &mut *rings;
        for vcpu in vcpus {
            let most = most(vcpu);
            let Vcpu { ring, meter, taken: count } = vcpu;
            let taken = ring.take(most, |slot, page| {
                // Other slots are the VMM's own business.
                let Some(noted) = slots.iter_mut().find(|s| s.on && s.placed.slot.slot == slot) else { return };
                match usize::try_from(page).ok().filter(|page| *page < noted.placed.pages()) {
                    Some(page) => {
                        noted.kept[page / WORD_BITS] |= 1 << (page % WORD_BITS);
                        *count += 1;
                    }
                    None => {
                        let text =
                            format!("page {page} was written, which the slot did not have: the VMM set it again");
                        trouble.get_or_insert(noted.placed.named(Error::new(libc::ESTALE, text)));
                    }
                }
            });
            meter.took(taken);
        }
        rings.give_back(|| self.slots.vm.reset_dirty_rings())
    }

    /// The harvester's work: until `wake`.
    fn watch(&self, wake: &Wake) {
        while matches!(io::sleep(wake, LOOK), Ok(false)) {
            let mut rings = lock(&self.rings);
            if let Err(error) = self.look(&mut rings) {
                rings.trouble.get_or_insert(error);
            }
        }
    }

    fn look(&self, rings: &mut Rings) -> Result<()> {
        if rings.vcpus.iter().any(|vcpu| vcpu.ring.has(vcpu.ring.entries() / PART) || vcpu.ring.owed() > 0) {
            self.harvest_allowed(rings, &mut self.slots.lock())?;
        }
        let now = now();
        if now.saturating_sub(rings.period_began) >= rings.period {
            // What waits in rings was written in this period; what a limit holds back there, was not.
            let all = |vcpu: &mut Vcpu| if vcpu.meter.limit() == 0 { usize::MAX } else { 0 };
            self.take(rings, &mut self.slots.lock(), all)?;
            rings.period_began = now;
            rings.vcpus.iter_mut().for_each(|vcpu| vcpu.meter.end_period(now));
        }
        Ok(())
    }

    /// Switches logging of the slots in `list` on, or of all.
    fn switch_on(&self, list: Option<&RamList>) -> Result<()> {
        let is_in = |noted: &Noted| list.is_none_or(|list| list.iter().any(|b| Arc::ptr_eq(&noted.placed.block, b)));
        let wanted = self.numbers(|noted| !noted.on && is_in(noted));
        let switched = wanted.iter().try_for_each(|number| self.switch(*number, true));
        switched.inspect_err(|_| self.switch_off(|noted| wanted.contains(&noted.placed.slot.slot)))
    }

    /// Switches logging of these slots off, where it is on.
    fn switch_off(&self, ours: impl Fn(&Noted) -> bool) {
        for number in self.numbers(|noted| noted.on && ours(noted)) {
            // Whatever fails here, the guest runs on.
            let _ = self.switch(number, false);
        }
    }

    fn numbers(&self, which: impl Fn(&Noted) -> bool) -> Vec<u32> {
        self.slots.lock().iter().filter(|noted| which(noted)).map(|noted| noted.placed.slot.slot).collect()
    }

    /// Switches a slot's logging, unless it was taken away or stands so already. Neither rings nor slots are locked while the
    /// hook is called: it may ask what vCPUs do, or wait for one that stands at a full ring.
    fn switch(&self, number: u32, on: bool) -> Result<()> {
        let _stays = lock(&self.switching);
        let is_it = |noted: &&mut Noted| noted.placed.slot.slot == number;
        let mut slots = self.slots.lock();
        let Some(noted) = slots.iter_mut().find(is_it).filter(|noted| noted.on != on) else { return Ok(()) };
        noted.on = on;
        let slot = noted.placed.slot;
        drop(slots);
        self.switcher.store(current_token(), Ordering::Relaxed);
        let done = self.slots.set_logging(&slot, on);
        self.switcher.store(0, Ordering::Relaxed);
        match self.slots.lock().iter_mut().find(is_it) {
            Some(noted) if on => {
                done.and_then(|()| noted.look_beside(&self.slots.vm)).map_err(|e| noted.placed.named(e))
            }
            _ => done,
        }
    }

    /// Keeps slots from being switched, so that one can go away; the hook itself need not wait for its own end.
    fn unswitched(&self) -> Option<MutexGuard<'_, ()>> {
        (self.switcher.load(Ordering::Relaxed) != current_token()).then(|| lock(&self.switching))
    }
}

impl Noted {
    /// Whether KVM keeps a bitmap beside the rings.
    fn look_beside(&mut self, vm: &Vm) -> Result<()> {
        let mut log = DirtyLog::new(self.placed.pages() as u64)?;
        self.beside = match vm.get_dirty_log(self.placed.slot.slot, &mut log) {
            Ok(()) => Some(log),
            Err(error) if error.errno() == libc::ENXIO => None,
            Err(error) => return Err(error),
        };
        Ok(())
    }
}

impl KvmTracker for KvmRing {
    fn add_slot(&self, number: u32, flags: u32, block: &Arc<Block>, offset: u64, len: u64, gpa: u64) -> Result<()> {
        let placed = Placed::new(number, flags, block, offset, len, gpa)?;
        let words = placed.pages().div_ceil(WORD_BITS);
        let mut kept = Vec::new();
        kept.try_reserve_exact(words).map_err(|_| Error::no_memory("a dirty log", words as u64 * 8))?;
        kept.resize(words, 0);
        self.shared.slots.add(Noted { placed, on: false, kept, beside: None })
    }

    fn remove_slot(&self, number: u32) -> Result<()> {
        let _unswitched = self.shared.unswitched();
        self.shared.slots.remove(number)
    }

    fn remove_block(&self, block: &Arc<Block>) {
        let _unswitched = self.shared.unswitched();
        self.shared.slots.remove_block(block);
    }
}

impl Tracker for KvmRing {
    fn kind(&self) -> Kind {
        Kind::KvmRing
    }

    fn start(&self, list: &RamList) -> Result<()> {
        let mut users = lock(&self.users);
        let unprotected = {
            let mut rings = lock(&self.shared.rings);
            let mut slots = self.shared.slots.lock();
            rings.suspended = false;
            // What an earlier attempt left is of no interest, even where it makes no sense any more, but would fill the rings.
            self.shared.harvest(&mut rings, &mut slots)?;
            slots.iter_mut().for_each(|noted| noted.kept.fill(0));
            rings.trouble = None;
            rings.unprotected
        };
        if unprotected {
            // A limit has kept logging on: KVM protects everything when it is switched on again.
            self.shared.switch_off(|_| true);
            lock(&self.shared.rings).unprotected = false;
        }
        self.begin(&users, (!users.limits).then_some(list))?;
        users.readers = true;
        Ok(())
    }

    fn stop(&self) {
        let mut users = lock(&self.users);
        users.readers = false;
        self.rest(&users);
    }

    fn sync(&self, found: &mut Found<'_>) -> Result<()> {
        let mut rings = lock(&self.shared.rings);
        let mut slots = self.shared.slots.lock();
        self.shared.harvest(&mut rings, &mut slots)?;
        if let Some(error) = rings.trouble.take() {
            return Err(error);
        }
        if rings.unprotected {
            let text = "KVM_RESET_DIRTY_RINGS was interrupted (the process was stopped, or is traced): writes to some pages \
                        may not have been noted; migrate again";
            return Err(Error::new(libc::EINTR, text));
        }
        for noted in slots.iter_mut().filter(|noted| noted.on) {
            found(&noted.placed.block, noted.placed.first, &noted.kept);
            noted.kept.fill(0);
            if let Some(log) = &mut noted.beside {
                let slot = noted.placed.slot.slot;
                self.shared.slots.vm.get_dirty_log(slot, log).map_err(|e| noted.placed.named(e))?;
                found(&noted.placed.block, noted.placed.first, log.words());
            }
        }
        Ok(())
    }

    fn clear(&self, _block: &Block, _pages: Range<usize>) -> Result<()> {
        Ok(())
    }

    fn covers(&self, block: &Block) -> Vec<Range<usize>> {
        self.shared.slots.covers(block)
    }
}

impl Drop for KvmRing {
    fn drop(&mut self) {
        self.end_harvester();
    }
}
