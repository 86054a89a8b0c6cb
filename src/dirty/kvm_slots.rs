//! Memory slots of a KVM guest: which part of which block each shows. What KVM's log and its ring have in common.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use super::Tracker;
use crate::error::{Error, Result};
use crate::ram::{Block, PAGE};
use crate::sys::kvm::{LOG_DIRTY_PAGES, Slot, Vm};
use crate::thread::lock;

/// Slots a guest may register.
const SLOTS_MAX: usize = 4096;

/// Switches a slot's logging by the VMM's hook.
pub type Switch = Box<dyn Fn(u32, bool) -> Result<()> + Send + Sync>;

/// A tracker that is told of slots.
pub trait KvmTracker: Tracker {
    /// Registers a slot: `len` bytes of `block` from `offset` on, seen by the guest at `gpa`.
    fn add_slot(&self, number: u32, flags: u32, block: &Arc<Block>, offset: u64, len: u64, gpa: u64) -> Result<()>;

    /// Forgets a slot.
    fn remove_slot(&self, number: u32) -> Result<()>;

    /// Forgets the slots of a block that goes away.
    fn remove_block(&self, block: &Arc<Block>);
}

/// A memory slot that shows (a part of) a block.
#[derive(Debug)]
pub(super) struct Placed {
    pub(super) slot: Slot,
    pub(super) block: Arc<Block>,
    /// The block's page that the slot starts at.
    pub(super) first: usize,
}

impl Placed {
    pub(super) fn new(number: u32, flags: u32, block: &Arc<Block>, offset: u64, len: u64, gpa: u64) -> Result<Self> {
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
        let slot = Slot { slot: number, flags: flags & !LOG_DIRTY_PAGES, gpa, len, host: block.host_address(offset) };
        let first = usize::try_from(offset / PAGE).map_err(|_| Error::no_memory("a dirty log", len))?;
        Ok(Self { slot, block: Arc::clone(block), first })
    }

    pub(super) fn pages(&self) -> usize {
        usize::try_from(self.slot.len / PAGE).unwrap_or(usize::MAX)
    }

    /// Pages of the block.
    pub(super) fn range(&self) -> Range<usize> {
        self.first..self.first + self.pages()
    }

    /// Says which RAM an error of the slot is about.
    pub(super) fn named(&self, error: Error) -> Error {
        let range = self.range();
        let (from, to) = (range.start as u64 * PAGE, range.end as u64 * PAGE);
        error
            .context(format!("KVM slot {} (RAM block '{}', {from:#x} to {to:#x})", self.slot.slot, self.block.name()))
            .in_section("ram")
    }
}

/// The slots of a guest, each with what a tracker keeps beside it.
pub(super) struct Slots<T> {
    pub(super) vm: Vm,
    pub(super) switch: Option<Switch>,
    list: Mutex<Vec<T>>,
}

impl<T: AsRef<Placed>> Slots<T> {
    /// `switch` switches logging; without it the library sets the slot's flags itself.
    pub(super) fn new(vm: Vm, switch: Option<Switch>) -> Self {
        Self { vm, switch, list: Mutex::default() }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Vec<T>> {
        lock(&self.list)
    }

    pub(super) fn add(&self, new: T) -> Result<()> {
        let mut list = self.lock();
        let number = new.as_ref().slot.slot;
        if list.len() == SLOTS_MAX {
            return Err(Error::new(libc::ENOSPC, format!("more than {SLOTS_MAX} KVM slots")));
        }
        if list.iter().any(|s| s.as_ref().slot.slot == number) {
            return Err(Error::new(libc::EEXIST, format!("KVM slot {number} is registered already")));
        }
        list.push(new);
        Ok(())
    }

    pub(super) fn remove(&self, number: u32) -> Result<()> {
        let mut list = self.lock();
        match list.iter().position(|s| s.as_ref().slot.slot == number) {
            Some(at) => {
                list.remove(at);
                Ok(())
            }
            None => Err(Error::new(libc::ENOENT, format!("KVM slot {number} is not registered"))),
        }
    }

    pub(super) fn remove_block(&self, block: &Arc<Block>) {
        self.lock().retain(|s| !Arc::ptr_eq(&s.as_ref().block, block));
    }

    pub(super) fn set_logging(&self, slot: &Slot, on: bool) -> Result<()> {
        match &self.switch {
            Some(switch) => switch(slot.slot, on),
            None => self.vm.set_slot(&Slot { flags: slot.flags | if on { LOG_DIRTY_PAGES } else { 0 }, ..*slot }),
        }
    }

    pub(super) fn covers(&self, block: &Block) -> Vec<Range<usize>> {
        let list = self.lock();
        list.iter().map(AsRef::as_ref).filter(|s| std::ptr::eq(&*s.block, block)).map(Placed::range).collect()
    }
}
