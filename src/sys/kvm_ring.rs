//! KVM's dirty rings: one for each vCPU, which the VMM enabled before it made the vCPUs.
#![allow(unsafe_code, reason = "maps rings that the kernel writes, and raw ioctls")]

use std::mem::offset_of;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU32, Ordering};

use kvm_bindings::kvm_dirty_gfn;

use super::kvm::dup;
use crate::error::{Error, Result};

/// `KVM_DIRTY_LOG_PAGE_OFFSET`: the page of a vCPU's file that its ring begins at, on every architecture that has one.
const RING_PAGE: usize = 64;
/// `KVM_DIRTY_RING_MAX_ENTRIES`.
const ENTRIES_MAX: usize = 65536;
/// `KVM_DIRTY_GFN_F_DIRTY`: the kernel filled the entry.
const DIRTY: u32 = 1;
/// `KVM_DIRTY_GFN_F_RESET`: we took it.
const TAKEN: u32 = 2;
const PAGE: usize = 4096;
const ENTRY: usize = size_of::<kvm_dirty_gfn>();

/// The ring of one vCPU.
#[derive(Debug)]
pub struct Ring {
    map: NonNull<kvm_dirty_gfn>,
    entries: usize,
    /// The entry that is taken next.
    next: usize,
    /// Known to be that. Somebody may have emptied the ring before us, and in an empty one nothing tells.
    found: bool,
    _vcpu: OwnedFd,
}

// SAFETY: the mapping belongs to the value alone and is not tied to the thread that made it.
unsafe impl Send for Ring {}

/// Whether a page of the vCPU's file belongs to its ring: the kernel refuses to map these privately, and them alone.
fn is_ring(vcpu: RawFd, page: usize) -> bool {
    let offset = libc::off_t::try_from(page * PAGE).unwrap_or(libc::off_t::MAX);
    // SAFETY: a new mapping at a place the kernel chooses changes nothing that exists.
    let map = unsafe { libc::mmap(ptr::null_mut(), PAGE, libc::PROT_READ, libc::MAP_PRIVATE, vcpu, offset) };
    if map == libc::MAP_FAILED {
        return std::io::Error::last_os_error().raw_os_error() == Some(libc::EINVAL);
    }
    // SAFETY: the mapping is ours and nobody knows it.
    unsafe { libc::munmap(map, PAGE) };
    false
}

impl Ring {
    /// The ring of the vCPU; none if the VMM did not enable rings.
    pub fn of(vcpu: RawFd) -> Result<Option<Self>> {
        if !is_ring(vcpu, RING_PAGE) {
            return Ok(None);
        }
        let mut pages = 1;
        while pages < ENTRIES_MAX * ENTRY / PAGE && is_ring(vcpu, RING_PAGE + 2 * pages - 1) {
            pages *= 2;
        }
        let copy = dup(vcpu, "a vCPU")?;
        let offset = libc::off_t::try_from(RING_PAGE * PAGE).unwrap_or(libc::off_t::MAX);
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at a place the kernel chooses changes nothing that exists.
        let map = unsafe {
            libc::mmap(ptr::null_mut(), pages * PAGE, protection, libc::MAP_SHARED, copy.as_raw_fd(), offset)
        };
        let map = NonNull::new(map.cast()).filter(|_| map != libc::MAP_FAILED);
        let map = map.ok_or_else(|| Error::last_os("mapping a vCPU's dirty ring"))?;
        let mut ring = Self { map, entries: pages * PAGE / ENTRY, next: 0, found: false, _vcpu: copy };
        ring.found = ring.find_next();
        Ok(Some(ring))
    }

    /// Finds the entry that is to be taken next by those that are filled or taken. False: there are none.
    fn find_next(&mut self) -> bool {
        let state = |n: usize| self.flags(n).load(Ordering::Acquire) & (DIRTY | TAKEN);
        let next = match (0..self.entries).find(|n| state(*n) == DIRTY) {
            // The kernel fills forwards, so what is before the first stays as it is.
            Some(filled) => {
                let before = (0..self.entries).take_while(|n| state(filled + self.entries - n - 1) == DIRTY).count();
                Some(filled + self.entries - before)
            }
            // The kernel may fill entries by now: those that were taken end before them.
            None => (0..self.entries).find(|n| state(*n) & TAKEN != 0 && state(n + 1) & TAKEN == 0).map(|n| n + 1),
        };
        self.next = next.unwrap_or(0) % self.entries;
        next.is_some()
    }

    /// Entries it has room for.
    pub fn entries(&self) -> usize {
        self.entries
    }

    fn flags(&self, entry: usize) -> &AtomicU32 {
        // SAFETY: inside the ring, by the remainder.
        let at = unsafe { self.map.add(entry % self.entries) };
        let flags = at.as_ptr().cast::<u8>().wrapping_add(offset_of!(kvm_dirty_gfn, flags)).cast::<u32>();
        // SAFETY: aligned, mapped as long as self; the kernel and we touch it by atomic accesses alone.
        unsafe { AtomicU32::from_ptr(flags) }
    }

    /// Whether at least so many entries wait to be taken.
    pub fn has(&self, entries: usize) -> bool {
        let entries = entries.clamp(1, self.entries);
        let is_filled = |n: usize| self.flags(n).load(Ordering::Acquire) & (DIRTY | TAKEN) == DIRTY;
        match self.found {
            true => is_filled(self.next + entries - 1),
            // So many in a row have one of these, wherever they begin; fewer may, too, which does no harm.
            false => (0..self.entries).step_by(entries).any(is_filled),
        }
    }

    /// Takes entries, at most `most`, as (slot, page of the slot); returns how many. They are the kernel's again only after
    /// `Vm::reset_dirty_rings`.
    pub fn take(&mut self, most: usize, mut f: impl FnMut(u32, u64)) -> usize {
        self.found = self.found || self.find_next();
        if !self.found {
            return 0;
        }
        let mut taken = 0;
        // One more turn than there is room for cannot be: what was taken is not given again before a reset.
        while taken < most.min(self.entries)
            && self.flags(self.next).load(Ordering::Acquire) & (DIRTY | TAKEN) == DIRTY
        {
            // SAFETY: inside the ring, because `next` is; the kernel does not touch an entry it filled.
            let entry = unsafe { self.map.add(self.next) };
            // SAFETY: as above; aligned and initialised by the kernel.
            let entry_now = unsafe { entry.read_volatile() };
            f(entry_now.slot, entry_now.offset);
            self.flags(self.next).store(DIRTY | TAKEN, Ordering::Release);
            self.next = (self.next + 1) % self.entries;
            taken += 1;
        }
        taken
    }

    /// How many of the entries that were taken KVM has not got back: it goes by their order, as `take` does.
    pub fn owed(&self) -> usize {
        let before = |n: &usize| self.flags(self.next + self.entries - n).load(Ordering::Acquire);
        (1..=self.entries).take_while(|n| before(n) & TAKEN != 0).count()
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and its borrows have ended.
        unsafe { libc::munmap(self.map.as_ptr().cast(), self.entries * ENTRY) };
    }
}
