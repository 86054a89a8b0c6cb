//! Memory of each kind, and what may befall it while it is tracked.
#![allow(dead_code, reason = "the benchmark uses a part of this")]
#![allow(unreachable_pub, reason = "parts of one test file")]
#![allow(unsafe_code, reason = "maps memory and writes to it")]

use std::sync::atomic::{AtomicU64, Ordering};

pub const PAGE: usize = 4096;
pub const HUGE: usize = 2 << 20;

/// What the memory of a block is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Private,
    Shared,
    Hugetlb,
    /// A private mapping of a file.
    File,
}

/// A mapping of pages. A page's content is its first word.
#[derive(Debug)]
pub struct Memory {
    pub at: *mut u8,
    pub pages: usize,
    whole: (*mut u8, usize),
}

// SAFETY: the mapping is not tied to a thread, and its words are only touched atomically.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    /// New memory; none if the system has no such memory left. It begins `skip` pages into its mapping.
    pub fn new(kind: Kind, pages: usize, skip: usize) -> Option<Self> {
        let len = ((pages + skip) * PAGE).next_multiple_of(if kind == Kind::Hugetlb { HUGE } else { PAGE });
        let (flags, name) = match kind {
            Kind::Private => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, None),
            Kind::Shared => (libc::MAP_SHARED, Some(0)),
            Kind::Hugetlb => (libc::MAP_SHARED, Some(libc::MFD_HUGETLB)),
            Kind::File => (libc::MAP_PRIVATE, Some(0)),
        };
        // SAFETY: the name is a literal that ends.
        let fd = name.map_or(-1, |flags| unsafe { libc::memfd_create(c"guest".as_ptr(), flags) });
        // SAFETY: takes no pointers; -1 is refused.
        unsafe { libc::ftruncate(fd, i64::try_from(len).unwrap()) };
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping of our own.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, flags, fd, 0) };
        if fd >= 0 {
            // SAFETY: ours, and not used any more.
            unsafe { libc::close(fd) };
        }
        if at == libc::MAP_FAILED {
            return None;
        }
        let at: *mut u8 = at.cast();
        Some(Self { at: at.wrapping_add(skip * PAGE), pages, whole: (at, len) })
    }

    /// Memory that somebody else keeps mapped.
    pub fn borrowed(at: *mut u8, pages: usize) -> Self {
        Self { at, pages, whole: (at, 0) }
    }

    pub fn word(&self, page: usize) -> &AtomicU64 {
        assert!(page < self.pages);
        // SAFETY: the first word of a page of the mapping, which lives as long as self and is only touched atomically.
        unsafe { AtomicU64::from_ptr(self.at.wrapping_add(page * PAGE).cast()) }
    }

    pub fn read(&self, page: usize) -> u64 {
        self.word(page).load(Ordering::SeqCst)
    }

    /// Something that moves pages about and changes no content. Whether it can be done is the kernel's business.
    pub fn disturb(&self, page: usize, pages: usize, advice: libc::c_int) {
        let pages = pages.min(self.pages - page);
        // SAFETY: a range of the mapping, and no advice that is given here changes contents.
        unsafe { libc::madvise(self.at.wrapping_add(page * PAGE).cast(), pages * PAGE, advice) };
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, or its length is 0, and nobody uses it any more.
        unsafe { libc::munmap(self.whole.0.cast(), self.whole.1) };
    }
}
