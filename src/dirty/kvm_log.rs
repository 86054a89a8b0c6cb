//! KVM's dirty log: one bitmap per memory slot, kept by the kernel.
//!
//! With manual protection reading the log changes nothing; pages become clean, and write-protected again, only when
//! they are cleared, and that happens chunk by chunk just before a chunk is read, so that no vCPU waits long. Logs that
//! start all set make switching logging on cheap: nothing is protected until it is first cleared.
//!
//! Clearing costs the kernel 20 ns a page, also where there is none: see [`nap`](super::nap).

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use super::nap::{Naps, words_of};
use super::{Found, Kind, Tracker};
use crate::error::{Error, Result};
use crate::ram::presence::Presence;
use crate::ram::survey::Survey;
use crate::ram::{Block, PAGE, RamList};
use crate::sys::kvm::{DirtyLog, LOG_DIRTY_PAGES, Slot, Vm};
use crate::thread::lock;

/// Slots a guest may register.
const SLOTS_MAX: usize = 4096;

/// Switches a slot's logging by the VMM's hook.
pub type Switch = Box<dyn Fn(u32, bool) -> Result<()> + Send + Sync>;

/// A memory slot that shows (a part of) a block.
#[derive(Debug)]
struct Logged {
    slot: Slot,
    block: Arc<Block>,
    /// The block's page that the slot starts at.
    first: usize,
    /// With manual protection: what the last read found and nobody cleared since.
    log: DirtyLog,
    /// Logging is on: the block migrates page by page.
    on: bool,
    /// It was read well since logging was switched on.
    read: bool,
    naps: Naps,
}

impl Logged {
    fn pages(&self) -> usize {
        usize::try_from(self.slot.len / PAGE).unwrap_or(usize::MAX)
    }

    /// Pages of the block.
    fn range(&self) -> Range<usize> {
        self.first..self.first + self.pages()
    }
}

/// Tracks a guest by KVM's dirty log.
pub struct KvmLog {
    vm: Vm,
    manual: bool,
    switch: Option<Switch>,
    slots: Mutex<Vec<Logged>>,
}

impl std::fmt::Debug for KvmLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "KvmLog({} slots, manual protection {})", self.lock().len(), self.manual)
    }
}

impl KvmLog {
    /// A tracker for the VM. `switch` switches logging; without it the library sets the slot's flags itself.
    pub fn new(vm: Vm, switch: Option<Switch>) -> Result<Self> {
        let manual = vm.enable_manual_protect()?.manual;
        Ok(Self { vm, manual, switch, slots: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Logged>> {
        lock(&self.slots)
    }

    /// Registers a slot: `len` bytes of `block` from `offset` on, seen by the guest at `gpa`.
    pub fn add_slot(
        &self,
        number: u32,
        flags: u32,
        block: &Arc<Block>,
        offset: u64,
        len: u64,
        gpa: u64,
    ) -> Result<()> {
        let name = block.name();
        let aligned = [offset, len, gpa].iter().all(|n| n % PAGE == 0);
        let inside = offset.checked_add(len).is_some_and(|end| end <= block.len());
        if !aligned || len == 0 || !inside || gpa.checked_add(len).is_none() {
            return Err(Error::invalid(format!(
                "KVM slot {number}: offset {offset:#x}, length {len:#x} and address {gpa:#x} must be page aligned and \
                 lie within RAM block '{name}' of {:#x} bytes",
                block.len()
            )));
        }
        let mut slots = self.lock();
        if slots.len() == SLOTS_MAX {
            return Err(Error::new(libc::ENOSPC, format!("more than {SLOTS_MAX} KVM slots")));
        }
        if slots.iter().any(|s| s.slot.slot == number) {
            return Err(Error::new(libc::EEXIST, format!("KVM slot {number} is registered already")));
        }
        let slot = Slot { slot: number, flags: flags & !LOG_DIRTY_PAGES, gpa, len, host: block.host_address(offset) };
        let log = DirtyLog::new(len / PAGE)?;
        let first = usize::try_from(offset / PAGE).map_err(|_| Error::no_memory("a dirty log", len))?;
        let naps = Naps::new(first, usize::try_from(len / PAGE).unwrap_or(usize::MAX))?;
        let block = Arc::clone(block);
        slots.push(Logged { slot, block, first, log, on: false, read: false, naps });
        Ok(())
    }

    /// Forgets a slot.
    pub fn remove_slot(&self, number: u32) -> Result<()> {
        let mut slots = self.lock();
        match slots.iter().position(|s| s.slot.slot == number) {
            Some(at) => {
                slots.remove(at);
                Ok(())
            }
            None => Err(Error::new(libc::ENOENT, format!("KVM slot {number} is not registered"))),
        }
    }

    /// Forgets the slots of a block that goes away.
    pub fn remove_block(&self, block: &Arc<Block>) {
        self.lock().retain(|s| !Arc::ptr_eq(&s.block, block));
    }

    fn set_logging(&self, slot: &Slot, on: bool) -> Result<()> {
        match &self.switch {
            Some(switch) => switch(slot.slot, on),
            None => self.vm.set_slot(&Slot { flags: slot.flags | if on { LOG_DIRTY_PAGES } else { 0 }, ..*slot }),
        }
    }
}

/// Says which RAM an error of a slot is about.
fn named(error: Error, slot: &Logged) -> Error {
    let range = slot.range();
    let (from, to) = (range.start as u64 * PAGE, range.end as u64 * PAGE);
    error
        .context(format!("KVM slot {} (RAM block '{}', {from:#x} to {to:#x})", slot.slot.slot, slot.block.name()))
        .in_section("ram")
}

impl Tracker for KvmLog {
    fn kind(&self) -> Kind {
        Kind::KvmLog
    }

    fn start(&self, list: &RamList) -> Result<()> {
        let survey = self.manual.then(Survey::new).and_then(Result::ok);
        let mut slots = self.lock();
        for index in 0..slots.len() {
            let logged = &mut slots[index];
            logged.read = false;
            logged.on = list.iter().any(|block| Arc::ptr_eq(block, &logged.block));
            if !logged.on {
                continue;
            }
            logged.naps.begin(survey.as_ref().map(|survey| Presence::new(&logged.block, survey, None)));
            if let Err(error) = self.set_logging(&logged.slot, true) {
                let error = named(error, logged);
                for logged in slots[..index].iter().filter(|logged| logged.on) {
                    // The error that matters is the first; what was switched on is harmless but slow.
                    let _ = self.set_logging(&logged.slot, false);
                }
                return Err(error);
            }
        }
        Ok(())
    }

    fn stop(&self) {
        for logged in self.lock().iter_mut().filter(|logged| logged.on) {
            logged.read = false;
            logged.on = false;
            logged.naps.end();
            // Setting a slot makes it, so one that the VMM deleted or changed meanwhile must be left alone. Whatever
            // fails here, the guest runs on.
            if self.switch.is_some() || self.vm.get_dirty_log(logged.slot.slot, &mut logged.log).is_ok() {
                let _ = self.set_logging(&logged.slot, false);
            }
        }
    }

    fn sync(&self, found: &mut Found<'_>) -> Result<()> {
        for logged in self.lock().iter_mut().filter(|logged| logged.on) {
            let number = logged.slot.slot;
            // What a read that fails leaves behind no reader has seen: nothing may be cleared by it.
            logged.read = false;
            self.vm.get_dirty_log(number, &mut logged.log).map_err(|e| named(e, logged))?;
            logged.read = true;
            logged.naps.wake(logged.log.words_mut());
            found(&logged.block, logged.first, logged.log.words());
        }
        Ok(())
    }

    fn clear(&self, block: &Block, pages: Range<usize>) -> Result<()> {
        if !self.manual {
            return Ok(());
        }
        for logged in self.lock().iter_mut().filter(|s| std::ptr::eq(&*s.block, block)) {
            let slot = logged.range();
            let (start, end) = (pages.start.max(slot.start), pages.end.min(slot.end));
            if start < end {
                clear_chunks(&self.vm, logged, start - slot.start..end - slot.start).map_err(|e| named(e, logged))?;
            }
        }
        Ok(())
    }

    fn covers(&self, block: &Block) -> Vec<Range<usize>> {
        self.lock().iter().filter(|s| std::ptr::eq(&*s.block, block)).map(Logged::range).collect()
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
            let (slot, count) = (logged.slot.slot, u32::try_from(pages.len()).unwrap_or(u32::MAX));
            vm.clear_dirty_log(slot, pages.start as u64, count, words)?;
        }
        words.fill(0);
    }
    Ok(())
}
