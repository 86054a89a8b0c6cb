//! KVM's dirty log: one bitmap per memory slot, kept by the kernel.
//!
//! With manual protection reading the log changes nothing; pages become clean, and write-protected again, only when
//! they are cleared, and that happens chunk by chunk just before a chunk is read, so that no vCPU waits long. Logs that
//! start all set make switching logging on cheap: nothing is protected until it is first cleared.
//!
//! Clearing costs the kernel 20 ns a page, also where there is none: see `nap`.

use std::ops::Range;
use std::sync::Arc;

use super::kvm_slots::{KvmTracker, Placed, Slots, Switch};
use super::nap::{Naps, words_of};
use super::{Found, Kind, Tracker};
use crate::error::Result;
use crate::ram::presence::Presence;
use crate::ram::survey::Survey;
use crate::ram::{Block, PAGE, RamList};
use crate::sys::kvm::{DirtyLog, Vm};

/// A slot with its log.
#[derive(Debug)]
struct Logged {
    placed: Placed,
    /// With manual protection: what the last read found and nobody cleared since.
    log: DirtyLog,
    /// Logging is on: the block migrates page by page.
    on: bool,
    /// It was read well since logging was switched on.
    read: bool,
    naps: Naps,
}

impl AsRef<Placed> for Logged {
    fn as_ref(&self) -> &Placed {
        &self.placed
    }
}

/// Tracks a guest by KVM's dirty log.
pub struct KvmLog {
    manual: bool,
    slots: Slots<Logged>,
}

impl std::fmt::Debug for KvmLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "KvmLog({} slots, manual protection {})", self.slots.lock().len(), self.manual)
    }
}

impl KvmLog {
    /// A tracker for the VM. `switch` switches logging; without it the library sets the slot's flags itself.
    pub fn new(vm: Vm, switch: Option<Switch>) -> Result<Self> {
        let manual = vm.enable_manual_protect()?.manual;
        Ok(Self { manual, slots: Slots::new(vm, switch) })
    }

    /// The same as on a kernel without manual protection: reading a log protects all pages of it that are dirty.
    pub fn without_manual_protection(vm: Vm, switch: Option<Switch>) -> Self {
        Self { manual: false, slots: Slots::new(vm, switch) }
    }
}

impl KvmTracker for KvmLog {
    fn add_slot(&self, number: u32, flags: u32, block: &Arc<Block>, offset: u64, len: u64, gpa: u64) -> Result<()> {
        let placed = Placed::new(number, flags, block, offset, len, gpa)?;
        let log = DirtyLog::new(len / PAGE)?;
        let naps = Naps::new(placed.first, placed.pages())?;
        self.slots.add(Logged { placed, log, on: false, read: false, naps })
    }

    fn remove_slot(&self, number: u32) -> Result<()> {
        self.slots.remove(number)
    }

    fn remove_block(&self, block: &Arc<Block>) {
        self.slots.remove_block(block);
    }
}

impl Tracker for KvmLog {
    fn kind(&self) -> Kind {
        Kind::KvmLog
    }

    fn start(&self, list: &RamList) -> Result<()> {
        let survey = self.manual.then(Survey::new).and_then(Result::ok);
        let mut slots = self.slots.lock();
        for index in 0..slots.len() {
            let logged = &mut slots[index];
            logged.read = false;
            logged.on = list.iter().any(|block| Arc::ptr_eq(block, &logged.placed.block));
            if !logged.on {
                continue;
            }
            logged.naps.begin(survey.as_ref().map(|survey| Presence::new(&logged.placed.block, survey, None)));
            if let Err(error) = self.slots.set_logging(&logged.placed.slot, true) {
                let error = logged.placed.named(error);
                for logged in slots[..index].iter().filter(|logged| logged.on) {
                    // The error that matters is the first; what was switched on is harmless but slow.
                    let _ = self.slots.set_logging(&logged.placed.slot, false);
                }
                return Err(error);
            }
        }
        Ok(())
    }

    fn stop(&self) {
        for logged in self.slots.lock().iter_mut().filter(|logged| logged.on) {
            logged.read = false;
            logged.on = false;
            logged.naps.end();
            // Setting a slot makes it, so one that the VMM deleted or changed meanwhile must be left alone. Whatever
            // fails here, the guest runs on.
            if self.slots.switch.is_some()
                || self.slots.vm.get_dirty_log(logged.placed.slot.slot, &mut logged.log).is_ok()
            {
                let _ = self.slots.set_logging(&logged.placed.slot, false);
            }
        }
    }

    fn sync(&self, found: &mut Found<'_>) -> Result<()> {
        for logged in self.slots.lock().iter_mut().filter(|logged| logged.on) {
            let number = logged.placed.slot.slot;
            // What a read that fails leaves behind no reader has seen: nothing may be cleared by it.
            logged.read = false;
            self.slots.vm.get_dirty_log(number, &mut logged.log).map_err(|e| logged.placed.named(e))?;
            logged.read = true;
            logged.naps.wake(logged.log.words_mut());
            found(&logged.placed.block, logged.placed.first, logged.log.words());
        }
        Ok(())
    }

    fn clear(&self, block: &Block, pages: Range<usize>) -> Result<()> {
        if !self.manual {
            return Ok(());
        }
        for logged in self.slots.lock().iter_mut().filter(|s| std::ptr::eq(&*s.placed.block, block)) {
            let slot = logged.placed.range();
            let (start, end) = (pages.start.max(slot.start), pages.end.min(slot.end));
            if start < end {
                let cleared = clear_chunks(&self.slots.vm, logged, start - slot.start..end - slot.start);
                cleared.map_err(|e| logged.placed.named(e))?;
            }
        }
        Ok(())
    }

    fn covers(&self, block: &Block) -> Vec<Range<usize>> {
        self.slots.covers(block)
    }
}

/// Clears every chunk that `pages` (of the slot) touches and that was not cleared since the last read of the log.
///
/// Only bits that were read are cleared: all readers have them. A bit set since then stays, and is found again.
fn clear_chunks(vm: &Vm, logged: &mut Logged, pages: Range<usize>) -> Result<()> {
    // Before the first read of an all-set log there is nothing to clear by: the first round reads the log first.
    if !logged.read {
        return Ok(());
    }
    for chunk in Naps::chunks_of(&pages) {
        let pages = logged.naps.pages_of(&(chunk..chunk + 1));
        let words = words_of(logged.log.words_mut(), &pages);
        if words.iter().all(|w| *w == 0) {
            continue;
        }
        if !logged.naps.falls_asleep(chunk) {
            let (slot, count) = (logged.placed.slot.slot, u32::try_from(pages.len()).unwrap_or(u32::MAX));
            vm.clear_dirty_log(slot, pages.start as u64, count, words)?;
        }
        words.fill(0);
    }
    Ok(())
}
