//! KVM's dirty rings: each vCPU notes the pages it writes in a ring of its own, until somebody takes the notes.
//!
//! The VMM enables rings before it makes vCPUs; here they are found, never switched. A page that was taken is protected
//! again when its entry is reset, and kept (`kept`) until the next sync tells it. So that no vCPU stands at a full ring,
//! a thread takes what there is once a ring is a quarter full, not earlier: a page that is written all the time costs a
//! fault for each reset. A vCPU that found its ring full (`KVM_EXIT_DIRTY_RING_FULL`) hands over through its VMM, and goes
//! on when all rings are empty.
//!
//! What KVM itself writes outside of any vCPU is in no ring; where that can be (arm64), KVM keeps a bitmap beside them,
//! which is read at every sync.

use std::ops::Range;
use std::os::fd::RawFd;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::kvm_slots::{KvmTracker, Placed, Slots, Switch};
use super::{Found, Kind, Tracker};
use crate::bitmap::WORD_BITS;
use crate::error::{Error, Result};
use crate::ram::{Block, RamList};
use crate::sys::eventfd::Wake;
use crate::sys::io;
use crate::sys::kvm::{DirtyLog, Slot, Vm};
use crate::sys::kvm_ring::Ring;
use crate::thread::{Handle, Threads, lock};

/// Between two looks of the harvester at how full the rings are.
const LOOK: Duration = Duration::from_millis(2);
/// It harvests when a ring is full to one part in so many.
const PART: usize = 4;

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

#[derive(Debug)]
struct Rings {
    rings: Vec<Ring>,
    /// What went wrong where nobody could be told; the next sync fails with it.
    trouble: Option<Error>,
}

/// What the harvester and the tracker share. Lock order: rings, slots.
struct Shared {
    rings: Mutex<Rings>,
    slots: Slots<Noted>,
}

/// Tracks a guest by KVM's dirty rings.
pub struct KvmRing {
    shared: Arc<Shared>,
    threads: Arc<Threads>,
    harvester: Mutex<Option<(Handle<()>, Arc<Wake>)>>,
}

impl std::fmt::Debug for KvmRing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "KvmRing({} rings)", lock(&self.shared.rings).rings.len())
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
        let rings = Mutex::new(Rings { rings, trouble: None });
        Self {
            shared: Arc::new(Shared { rings, slots: Slots::new(vm, switch) }),
            threads,
            harvester: Mutex::default(),
        }
    }

    /// A vCPU stands at a full ring: empties all. Any thread.
    pub fn ring_full(&self) -> Result<()> {
        self.shared.harvest(&mut lock(&self.shared.rings), &mut self.shared.slots.lock())
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
        let mut taken = 0;
        let Rings { rings, trouble } = rings;
        for ring in rings {
            taken += ring.take(|slot, page| {
                // Other slots are the VMM's own business.
                let Some(noted) = slots.iter_mut().find(|s| s.on && s.placed.slot.slot == slot) else { return };
                match usize::try_from(page).ok().filter(|page| *page < noted.placed.pages()) {
                    Some(page) => noted.kept[page / WORD_BITS] |= 1 << (page % WORD_BITS),
                    None => {
                        let text =
                            format!("page {page} was written, which the slot did not have: the VMM set it again");
                        trouble.get_or_insert(noted.placed.named(Error::new(libc::ESTALE, text)));
                    }
                }
            });
        }
        if taken > 0 {
            self.slots.vm.reset_dirty_rings()?;
        }
        Ok(())
    }

    /// The harvester's work: until `wake`.
    fn watch(&self, wake: &Wake) {
        while matches!(io::sleep(wake, LOOK), Ok(false)) {
            let mut rings = lock(&self.rings);
            if rings.rings.iter().any(|ring| ring.has(ring.entries() / PART)) {
                if let Err(error) = self.harvest(&mut rings, &mut self.slots.lock()) {
                    rings.trouble.get_or_insert(error);
                    return;
                }
            }
        }
    }

    /// Switches logging of the slots in `list` on. Nothing is locked while the hook is called: a VMM with one thread may
    /// stand at a full ring before it comes to the hook.
    fn switch_on(&self, list: &RamList) -> Result<()> {
        let wanted: Vec<Slot> = {
            let mut slots = self.slots.lock();
            slots.iter_mut().for_each(|noted| noted.kept.fill(0));
            let wanted =
                slots.iter().filter(|noted| list.iter().any(|block| Arc::ptr_eq(block, &noted.placed.block)));
            wanted.map(|noted| noted.placed.slot).collect()
        };
        for slot in wanted {
            self.with_slot(&slot, |noted| {
                noted.on = true;
                Ok(())
            })?;
            let done = self.slots.set_logging(&slot, true);
            let done = self.with_slot(&slot, |noted| {
                done.and_then(|()| noted.look_beside(&self.slots.vm)).map_err(|e| noted.placed.named(e))
            });
            if let Err(error) = done {
                self.switch_off(&mut self.slots.lock());
                return Err(error);
            }
        }
        Ok(())
    }

    fn with_slot(&self, slot: &Slot, f: impl FnOnce(&mut Noted) -> Result<()>) -> Result<()> {
        // None can go away while a migration runs.
        self.slots.lock().iter_mut().find(|noted| noted.placed.slot.slot == slot.slot).map_or(Ok(()), f)
    }

    fn switch_off(&self, slots: &mut [Noted]) {
        for noted in slots.iter_mut().filter(|noted| noted.on) {
            noted.on = false;
            // Whatever fails here, the guest runs on.
            let _ = self.slots.set_logging(&noted.placed.slot, false);
        }
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
        self.shared.slots.remove(number)
    }

    fn remove_block(&self, block: &Arc<Block>) {
        self.shared.slots.remove_block(block);
    }
}

impl Tracker for KvmRing {
    fn kind(&self) -> Kind {
        Kind::KvmRing
    }

    fn start(&self, list: &RamList) -> Result<()> {
        let wake = Arc::new(Wake::new()?);
        {
            let mut rings = lock(&self.shared.rings);
            let mut slots = self.shared.slots.lock();
            rings.trouble = None;
            // What an earlier attempt left is of no interest, but would fill the rings.
            self.shared.harvest(&mut rings, &mut slots)?;
        }
        self.shared.switch_on(list)?;
        let (shared, seen) = (Arc::clone(&self.shared), Arc::clone(&wake));
        let harvest = move || {
            shared.watch(&seen);
            Ok(())
        };
        match self.threads.spawn("dirty_ring", harvest) {
            Ok(harvester) => {
                *lock(&self.harvester) = Some((harvester, wake));
                Ok(())
            }
            Err(error) => {
                self.shared.switch_off(&mut self.shared.slots.lock());
                Err(error)
            }
        }
    }

    fn stop(&self) {
        self.end_harvester();
        let mut rings = lock(&self.shared.rings);
        let mut slots = self.shared.slots.lock();
        self.shared.switch_off(&mut slots);
        // A vCPU that stands at a full ring must go on.
        let _ = self.shared.harvest(&mut rings, &mut slots);
    }

    fn sync(&self, found: &mut Found<'_>) -> Result<()> {
        let mut rings = lock(&self.shared.rings);
        let mut slots = self.shared.slots.lock();
        self.shared.harvest(&mut rings, &mut slots)?;
        if let Some(error) = rings.trouble.take() {
            return Err(error);
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
