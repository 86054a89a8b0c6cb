//! Guest RAM: blocks, addresses, and the only code that touches guest bytes.
//!
//! Guest RAM is foreign memory: a vCPU or a device may change it at any time, so it is never a Rust reference, only
//! an address that the VMM promised to keep mapped while the block is registered.
#![allow(unsafe_code, reason = "guest bytes are touched here and nowhere else")]

pub mod digest;
pub mod fresh;
pub mod handed;
pub mod prepare;
pub mod presence;
pub mod survey;

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use crate::bitmap::Bitmap;
use crate::error::{Error, Result};
use crate::sys::io::{Piece, Room};
use crate::sys::memory::{self, Advice};
use crate::thread::lock;
use crate::zero;
use handed::MemoryFile;
use survey::Survey;

/// Page size of the stream.
pub const PAGE: u64 = 4096;
/// The same as a length in memory.
pub const PAGE_BYTES: usize = 4096;
/// Blocks a guest may register over its life; their places are never used twice.
pub const BLOCKS_MAX: usize = 1024;

/// A contiguous piece of guest RAM, known to both sides by its name.
#[derive(Debug)]
pub struct Block {
    name: String,
    host: *mut u8,
    len: u64,
    gpa: u64,
    /// Every write is reported with `vmig_dirty`: no other tracking is needed.
    marked: bool,
    /// Lies in storage both sides see; its bytes do not travel.
    shared_storage: bool,
    /// Pages written by devices (or the emulator) since the last harvest.
    marks: Bitmap,
    /// The file behind it, if the VMM said so; another one once a guest arrived with its memory.
    file: Mutex<Option<Arc<MemoryFile>>>,
    /// Its memory was handed over: a guest elsewhere may be using it.
    given: AtomicBool,
    live: AtomicBool,
}

// SAFETY: `host` is only an address; every access to the memory behind it goes through raw reads and writes that
// expect concurrent change, and the VMM keeps it mapped while the block is registered.
unsafe impl Send for Block {}
// SAFETY: as above; all other fields are atomics or never change.
unsafe impl Sync for Block {}

/// How a block is described at registration.
#[derive(Clone, Debug)]
pub struct BlockSpec {
    /// Name, the same on both sides.
    pub name: String,
    /// Start in this process; page aligned.
    pub host: *mut u8,
    /// Bytes; a multiple of the page size.
    pub len: u64,
    /// Guest-physical address; page aligned.
    pub gpa: u64,
    /// See [`Block`].
    pub marked: bool,
    /// See [`Block`].
    pub shared_storage: bool,
    /// The file it is a shared mapping of; checked.
    pub file: Option<Arc<MemoryFile>>,
}

impl Block {
    fn new(spec: BlockSpec) -> Result<Self> {
        let BlockSpec { name, host, len, gpa, marked, shared_storage, file } = spec;
        if name.is_empty() || name.len() > 255 || name.bytes().any(|b| b.is_ascii_control()) {
            return Err(Error::invalid(format!(
                "a RAM block's name has 1 to 255 printable bytes, '{}' does not",
                name.escape_default()
            )));
        }
        let bad = |what: &str, got: String| {
            Err(Error::invalid(format!("RAM block '{name}': {what} must be a multiple of {PAGE}, not {got}")))
        };
        let address = host as u64;
        if address == 0 {
            return Err(Error::invalid(format!("RAM block '{name}' has no host address")));
        }
        if address % PAGE != 0 {
            return bad("the host address", format!("{address:#x}"));
        }
        if len == 0 || len % PAGE != 0 {
            return bad("the length", len.to_string());
        }
        if gpa % PAGE != 0 {
            return bad("the guest address", format!("{gpa:#x}"));
        }
        if address.checked_add(len).is_none() || gpa.checked_add(len).is_none() || isize::try_from(len).is_err() {
            return Err(Error::invalid(format!("RAM block '{name}' of {len} bytes does not fit its address space")));
        }
        let marks =
            Bitmap::new(usize::try_from(len / PAGE).map_err(|_| Error::no_memory("a dirty bitmap", len / 8))?)?;
        let (live, given, named) = (AtomicBool::new(true), AtomicBool::new(false), file.clone());
        let block = Self { name, host, len, gpa, marked, shared_storage, marks, file: Mutex::new(file), given, live };
        if let Some(file) = named {
            block.check_file(&file, &Survey::new()?)?;
        }
        Ok(block)
    }

    /// Name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Never: a block has at least a page.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Guest-physical address.
    pub fn gpa(&self) -> u64 {
        self.gpa
    }

    /// Number of pages.
    pub fn pages(&self) -> usize {
        self.marks.len()
    }

    /// Whether all writes are reported by marks.
    pub fn is_marked(&self) -> bool {
        self.marked
    }

    /// Whether its bytes travel.
    pub fn is_sent(&self) -> bool {
        !self.shared_storage
    }

    /// Host address of an offset, for the kernel (KVM slots).
    pub fn host_address(&self, offset: u64) -> u64 {
        self.host as u64 + offset
    }

    /// Pages marked by `vmig_dirty` since the last harvest.
    pub fn marks(&self) -> &Bitmap {
        &self.marks
    }

    /// Marks what of the block `host..host + len` covers. True if it covers any.
    fn mark(&self, host: u64, len: u64) -> bool {
        let start = self.host as u64;
        let from = host.max(start);
        let to = host.saturating_add(len).min(start + self.len);
        if from >= to || !self.live.load(Ordering::Acquire) {
            return false;
        }
        let first = (from - start) / PAGE;
        let last = (to - 1 - start) / PAGE;
        self.marks.set_range(index(first), index(last - first + 1));
        true
    }

    /// Address of a page.
    fn page(&self, page: usize, count: usize) -> *mut u8 {
        assert!(page.checked_add(count).is_some_and(|end| end <= self.pages()), "page outside of the block");
        // SAFETY: the pages lie inside the block (just checked), which is one mapping of `len` bytes.
        unsafe { self.host.add(page * PAGE_BYTES) }
    }

    /// Pages as a piece for a vectored write.
    pub fn piece(&self, page: usize, count: usize) -> Piece<'_> {
        let start = self.page(page, count);
        // SAFETY: inside the block, mapped while it is registered, which outlives the borrow of self.
        unsafe { Piece::raw(start, count * PAGE_BYTES) }
    }

    /// Pages as room for a vectored read.
    pub fn room(&self, page: usize, count: usize) -> Room<'_> {
        let start = self.page(page, count);
        // SAFETY: inside the block, mapped while it is registered, which outlives the borrow of self; guest memory
        // never has a Rust reference.
        unsafe { Room::raw(start, count * PAGE_BYTES) }
    }

    /// Refuses pages that are not all there any more: who looks at them dies.
    pub fn check_mapped(&self, pages: &Range<usize>) -> Result<()> {
        let (start, len) = self.span(pages);
        if memory::is_mapped(&(start..start + len)) { Ok(()) } else { Err(self.gone(pages)) }
    }

    /// What is said of them.
    pub fn gone(&self, pages: &Range<usize>) -> Error {
        let (name, from) = (&self.name, pages.start as u64 * PAGE);
        let text = format!(
            "a part of RAM block '{name}' at or after offset {from:#x} is not mapped any more: remove the block before \
             its memory is unmapped"
        );
        Error::new(libc::EFAULT, text).in_section("ram")
    }

    /// Whether a page reads as all zeros just now.
    pub fn is_zero(&self, page: usize) -> bool {
        // SAFETY: a whole page of the block, mapped while it is registered; it may change.
        unsafe { zero::is_zero(self.page(page, 1)) }
    }

    /// Test builds only: every word of a page, as it is just now.
    #[cfg(feature = "fault-injection")]
    pub fn each_word(&self, page: usize, mut f: impl FnMut(u64)) {
        let words = self.page(page, 1).cast::<u64>();
        for i in 0..PAGE_BYTES / 8 {
            // SAFETY: i < 512, so the word lies in the page; volatile because it may change under us.
            f(unsafe { words.wrapping_add(i).read_volatile() });
        }
    }

    /// Makes pages present, whatever they hold, so that a later write need not wait for memory.
    /// A failure means nothing but faults.
    pub fn populate(&self, page: usize, count: usize) -> Result<()> {
        self.advise(&(page..page + count), Advice::PopulateWrite).map_err(|e| {
            Error::from_io(format!("cannot populate {count} pages of RAM block '{}' at page {page}", self.name), &e)
        })
    }

    /// Host addresses of pages, for madvise(2).
    fn span(&self, pages: &Range<usize>) -> (u64, u64) {
        let start = self.page(pages.start, pages.len());
        (start.expose_provenance() as u64, (pages.len() * PAGE_BYTES) as u64)
    }

    /// Lets the kernel drop the contents of pages, in a way that reads as zero afterwards if `advice` fits the mapping.
    fn drop_pages(&self, pages: &Range<usize>, advice: Advice) -> io::Result<()> {
        let (start, len) = self.span(pages);
        // SAFETY: the pages lie inside the block (span checks), and the destination of a migration owns its contents.
        unsafe { memory::advise(start, len, advice) }
    }

    /// Advice that leaves contents alone.
    fn advise(&self, pages: &Range<usize>, advice: Advice) -> io::Result<()> {
        assert!(!matches!(advice, Advice::DontNeed | Advice::Remove), "{advice:?} changes contents");
        let (start, len) = self.span(pages);
        // SAFETY: the pages lie inside the block (span checks), and this advice changes no contents.
        unsafe { memory::advise(start, len, advice) }
    }

    /// Overwrites a page.
    pub fn write_page(&self, page: usize, bytes: &[u8; PAGE_BYTES]) {
        let to = self.page(page, 1);
        // SAFETY: `to` has room for a page, and `bytes` is our own memory, so they cannot overlap.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, PAGE_BYTES) }
    }

    /// Makes a page zero, without touching it if it reads as zero already (an absent page stays absent).
    pub fn zero_page(&self, page: usize) {
        if !self.is_zero(page) {
            let to = self.page(page, 1);
            // SAFETY: `to` has room for a page.
            unsafe { std::ptr::write_bytes(to, 0, PAGE_BYTES) }
        }
    }
}

fn index(n: u64) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}

/// The blocks of a guest at one moment.
pub type RamList = Arc<[Arc<Block>]>;

/// All blocks a guest has and had.
#[derive(Debug)]
pub struct Ram {
    list: Mutex<RamList>,
    /// Filled once each, freed with the guest: `mark` walks them without a lock.
    places: Box<[OnceLock<Arc<Block>>]>,
    used: AtomicUsize,
    /// Marks that hit no block.
    missed: AtomicU64,
}

impl Default for Ram {
    fn default() -> Self {
        let places = (0..BLOCKS_MAX).map(|_| OnceLock::new()).collect();
        Self { list: Mutex::new(Arc::from([])), places, used: AtomicUsize::new(0), missed: AtomicU64::new(0) }
    }
}

impl Ram {
    fn lock(&self) -> std::sync::MutexGuard<'_, RamList> {
        lock(&self.list)
    }

    /// The blocks now, in the order they were added.
    pub fn list(&self) -> RamList {
        Arc::clone(&self.lock())
    }

    /// A block by name.
    pub fn find(&self, name: &str) -> Option<Arc<Block>> {
        self.lock().iter().find(|b| b.name == name).cloned()
    }

    /// Registers a block.
    pub fn add(&self, spec: BlockSpec) -> Result<Arc<Block>> {
        let block = Arc::new(Block::new(spec)?);
        let mut list = self.lock();
        for other in list.iter() {
            let overlap = |a: u64, b: u64| a < b + other.len && b < a + block.len;
            if other.name == block.name {
                return Err(Error::new(libc::EEXIST, format!("there is a RAM block '{}' already", block.name)));
            }
            if overlap(block.host as u64, other.host as u64) {
                return Err(Error::new(
                    libc::EEXIST,
                    format!("RAM block '{}' overlaps '{}' in host memory", block.name, other.name),
                ));
            }
        }
        let place = self.used.load(Ordering::Acquire);
        let Some(slot) = self.places.get(place) else {
            return Err(Error::new(
                libc::ENOSPC,
                format!("a guest can register {BLOCKS_MAX} RAM blocks over its life"),
            ));
        };
        let _ = slot.set(Arc::clone(&block));
        self.used.store(place + 1, Ordering::Release);
        *list = list.iter().cloned().chain([Arc::clone(&block)]).collect();
        Ok(block)
    }

    /// Forgets a block; marks for it are ignored from now on.
    pub fn remove(&self, name: &str) -> Result<()> {
        let mut list = self.lock();
        let Some(block) = list.iter().find(|b| b.name == name) else {
            return Err(Error::new(libc::ENOENT, format!("there is no RAM block '{}'", name.escape_default())));
        };
        block.live.store(false, Ordering::Release);
        // The block's place is never freed, but its file is the VMM's to close.
        *lock(&block.file) = None;
        *list = list.iter().filter(|b| b.name != name).cloned().collect();
        Ok(())
    }

    /// `host..host + len` was written by a device: marks its pages. Wait-free.
    pub fn mark(&self, host: u64, len: u64) {
        let used = self.used.load(Ordering::Acquire);
        let mut hit = false;
        for place in &self.places[..used] {
            if let Some(block) = place.get() {
                hit |= block.mark(host, len);
            }
        }
        if !hit && len > 0 {
            self.missed.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// How many marks hit no block: a device wrote where no RAM was registered.
    pub fn missed_marks(&self) -> u64 {
        self.missed.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[repr(align(4096))]
    struct Pages([u8; 4 * PAGE_BYTES]);

    fn spec(pages: &mut Pages) -> BlockSpec {
        BlockSpec {
            name: "ram".into(),
            host: pages.0.as_mut_ptr(),
            len: 4 * PAGE,
            gpa: 0,
            marked: true,
            shared_storage: false,
            file: None,
        }
    }

    #[test]
    fn pages_are_read_and_written() {
        let mut memory = Box::new(Pages([0; 4 * PAGE_BYTES]));
        let ram = Ram::default();
        let block = ram.add(spec(&mut memory)).unwrap();
        assert!(block.is_zero(3));
        for at in [0, 8, 4088, 4095] {
            let mut bytes = [0; PAGE_BYTES];
            bytes[at] = 1;
            block.write_page(3, &bytes);
            assert!(!block.is_zero(3) && block.is_zero(2), "byte {at}");
        }
        block.zero_page(3);
        assert!(block.is_zero(3));
        assert_eq!(block.piece(1, 3).len(), 3 * PAGE_BYTES);
    }

    #[test]
    #[should_panic(expected = "outside of the block")]
    fn no_page_outside_of_the_block() {
        let mut memory = Box::new(Pages([0; 4 * PAGE_BYTES]));
        Ram::default().add(spec(&mut memory)).unwrap().is_zero(4);
    }

    #[test]
    fn marks_cover_every_page_a_write_touches() {
        let mut memory = Box::new(Pages([0; 4 * PAGE_BYTES]));
        let ram = Ram::default();
        let block = ram.add(spec(&mut memory)).unwrap();
        let host = block.host_address(0);
        ram.mark(host + 4095, 2);
        assert_eq!(block.marks().next_run(0, 9), Some((0, 2)));
        ram.mark(host + 3 * PAGE, u64::MAX);
        assert!(block.marks().test(3) && !block.marks().test(2));
        ram.mark(host - 10, 10);
        ram.mark(host, 0);
        assert_eq!((block.marks().count(), ram.missed_marks()), (3, 1));
        ram.remove("ram").unwrap();
        ram.mark(host, 1);
        assert_eq!((ram.missed_marks(), ram.list().len()), (2, 0));
    }

    #[test]
    fn registration_is_checked() {
        let mut memory = Box::new(Pages([0; 4 * PAGE_BYTES]));
        let ram = Ram::default();
        let good = spec(&mut memory);
        let refused = |change: &dyn Fn(&mut BlockSpec)| {
            let mut bad = good.clone();
            change(&mut bad);
            ram.add(bad).unwrap_err()
        };
        assert_eq!(refused(&|s| s.name.clear()).errno(), libc::EINVAL);
        assert_eq!(refused(&|s| s.host = std::ptr::null_mut()).errno(), libc::EINVAL);
        assert_eq!(refused(&|s| s.host = s.host.wrapping_add(1)).errno(), libc::EINVAL);
        assert_eq!(refused(&|s| s.len = 0).errno(), libc::EINVAL);
        assert_eq!(refused(&|s| s.len = 4097).errno(), libc::EINVAL);
        assert_eq!(refused(&|s| s.len = u64::MAX - 4095).errno(), libc::EINVAL);
        assert_eq!(refused(&|s| s.gpa = 12).errno(), libc::EINVAL);
        ram.add(good.clone()).unwrap();
        assert_eq!(refused(&|_| ()).errno(), libc::EEXIST);
        let error = refused(&|s| s.name = "other".into());
        assert_eq!(error.to_string(), "RAM block 'other' overlaps 'ram' in host memory");
    }
}
