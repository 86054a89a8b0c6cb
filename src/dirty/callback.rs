//! Dirty sources: whatever else writes guest memory and keeps a log of it, behind callbacks of C.
#![allow(non_camel_case_types, reason = "these are the names in C")]
#![allow(unsafe_code, reason = "calls the C callbacks of dirty sources")]

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use super::nap::Naps;
use super::{Found, Kind, Tracker};
use crate::bitmap::WORD_BITS;
use crate::error::{Error, Result, returned};
use crate::ram::{Block, PAGE, RamList};
use crate::sys::kvm::DirtyLog;
use crate::sys::sized::{SizedStruct, sized_copy};
use crate::thread::lock;

/// Flag of a dirty source: it reports every write to guest memory, not just those of a device. RAM then needs no other
/// tracker.
pub const VMIG_SOURCE_ALL_WRITES: u64 = 1;

/// Pages of a RAM block as a bitmap: bit n of word n / 64 is page `first` + n, of 4096 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct vmig_dirty_bitmap {
    /// sizeof(vmig_dirty_bitmap) of the library: do not read members beyond it.
    pub size: usize,
    /// Name of the block.
    pub ram: *const c_char,
    /// Where page `first` is in this process.
    pub host: *mut c_void,
    /// First page of the block that the bitmap is about; a multiple of 64.
    pub first: u64,
    /// How many pages.
    pub pages: u64,
    /// One bit for each, in words of 64.
    pub bits: *mut u64,
}

/// A source of dirty pages: a device in another process (vhost-user), a device behind an IOMMU (VFIO), an emulator's own
/// log.
///
/// The struct is copied. Callbacks run on a thread of the library without the big lock, one at a time for each source.
/// They return 0 or more, or a negative errno, which fails the migration with an error that names source and block; the
/// guest goes on. They may call the vmig functions marked `[cb]`, and must not wait for the big lock's holder. What the
/// library passes is valid during the call. With option `dispatch=manual` each call is a callback of its own for
/// vmig_dispatch().
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct vmig_dirty_source {
    /// Size of the struct: VMIG_SIZED(vmig_dirty_source).
    pub size: usize,
    /// Name for errors and the status, 1 to 255 printable bytes. Copied.
    pub name: *const c_char,
    /// Sum of VMIG_SOURCE_... flags.
    pub flags: u64,
    /// A migration begins: from here on writes are to be noted. NULL: they always are.
    pub start: Option<unsafe extern "C" fn(opaque: *mut c_void) -> c_int>,
    /// Set the bits of pages of one block that were written since `start`, or since they were last reported; with `clear`,
    /// since they were last cleared. All bits are zero before the call; called for each block, and once more when the
    /// guest is stopped. Too many bits cost time, a missing one is silent loss. Bits beyond `pages` are refused. A source
    /// forgets what it reports before the call returns; what is written afterwards is reported by the next call. Required.
    pub sync: Option<unsafe extern "C" fn(opaque: *mut c_void, bitmap: *const vmig_dirty_bitmap) -> c_int>,
    /// Pages whose bits are set are about to be read: writes to them from here on are to be reported anew. All of them were
    /// reported by the last `sync`. NULL: reporting them clears them. For sources whose clearing makes the guest wait.
    pub clear: Option<unsafe extern "C" fn(opaque: *mut c_void, bitmap: *const vmig_dirty_bitmap) -> c_int>,
    /// The migration is over. Once for each `start` that succeeded. NULL: nothing to do.
    pub stop: Option<unsafe extern "C" fn(opaque: *mut c_void)>,
    /// The last call, when the source was removed or the guest is freed; not if adding it failed. NULL: nothing to do.
    pub destroy: Option<unsafe extern "C" fn(opaque: *mut c_void)>,
}

// SAFETY: repr(C), size first, members of 8 bytes without padding, all zero is valid.
unsafe impl SizedStruct for vmig_dirty_source {
    const NAME: &'static str = "vmig_dirty_source";
    const REQUIRED: usize = std::mem::offset_of!(vmig_dirty_source, clear);
}

type Report = unsafe extern "C" fn(*mut c_void, *const vmig_dirty_bitmap) -> c_int;

/// Pages behind a block's last for which its bitmap has room, too: who writes beyond the end is found out by them.
const SLACK: u64 = PAGE * 8;

/// Where the VMM may be called back.
pub trait Caller: Send + Sync {
    /// Makes `call` there, waits for it, and says what it returned.
    fn call(&self, what: &str, call: &mut (dyn FnMut() -> c_int + Send)) -> Result<c_int>;

    /// Makes `call` there, some time; nobody waits.
    fn post(&self, what: &str, call: Box<dyn FnOnce() + Send>);
}

/// The callbacks with their pointer. Whoever may call them shares one, so `destroy` comes last.
struct Callbacks {
    ops: vmig_dirty_source,
    opaque: *mut c_void,
    /// Where they run. Set once the pointer is ours: from then on `destroy` is due.
    caller: OnceLock<Arc<dyn Caller>>,
}

// SAFETY: the pointer is only handed back to the VMM, which is told on which threads its callbacks run.
unsafe impl Send for Callbacks {}
// SAFETY: as above; everything else never changes.
unsafe impl Sync for Callbacks {}

/// A source.
pub struct Source {
    name: String,
    callbacks: Arc<Callbacks>,
    blocks: Mutex<Vec<Watched>>,
}

impl std::fmt::Debug for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Source({})", self.name)
    }
}

#[derive(Debug)]
struct Watched {
    block: Arc<Block>,
    name: CString,
    /// What the source fills.
    log: DirtyLog,
    /// With `clear`: what was told and not cleared since.
    told: Vec<u64>,
}

impl Watched {
    fn words(&self) -> usize {
        self.block.pages().div_ceil(WORD_BITS)
    }

    fn bitmap(&mut self, pages: &Range<usize>) -> vmig_dirty_bitmap {
        vmig_dirty_bitmap {
            size: size_of::<vmig_dirty_bitmap>(),
            ram: self.name.as_ptr(),
            host: std::ptr::with_exposed_provenance_mut(
                usize::try_from(self.block.host_address(pages.start as u64 * PAGE)).unwrap_or(0),
            ),
            first: pages.start as u64,
            pages: pages.len() as u64,
            bits: self.log.words_mut().as_mut_ptr(),
        }
    }

    /// The first bit that was set where the block has no page.
    fn beyond(&self) -> Option<usize> {
        let (pages, words) = (self.block.pages(), self.log.words());
        let bits = |word: usize| match (word + 1) * WORD_BITS {
            end if end <= pages => 0,
            end if end - pages < WORD_BITS => words[word] & u64::MAX << (pages % WORD_BITS),
            _ => words[word],
        };
        let from = pages / WORD_BITS;
        (from..words.len()).find(|word| bits(*word) != 0).map(|w| w * WORD_BITS + bits(w).trailing_zeros() as usize)
    }
}

impl Source {
    /// A source from the callbacks of C. Until [`Source::adopt`] `opaque` stays the caller's.
    ///
    /// # Safety
    /// `source` is NULL or leads to a sized struct whose callbacks accept `opaque` on any thread until `destroy`.
    pub unsafe fn new(source: *const vmig_dirty_source, opaque: *mut c_void) -> Result<Self> {
        // SAFETY: the caller vouches for the pointer.
        let ops = unsafe { sized_copy(source) }?;
        if ops.name.is_null() {
            return Err(Error::invalid("vmig_dirty_source.name is NULL"));
        }
        // SAFETY: not NULL; the caller vouches for the string.
        let name = unsafe { CStr::from_ptr(ops.name) }.to_str().unwrap_or_default().to_owned();
        if name.is_empty() || name.len() > 255 || name.bytes().any(|b| b.is_ascii_control()) {
            return Err(Error::invalid("vmig_dirty_source.name must have 1 to 255 printable bytes"));
        }
        if ops.flags & !VMIG_SOURCE_ALL_WRITES != 0 {
            return Err(Error::invalid(format!("vmig_dirty_source.flags {:#x} has unknown bits", ops.flags)));
        }
        if ops.sync.is_none() {
            return Err(Error::invalid(format!("dirty source '{name}' has no sync callback")));
        }
        let callbacks = Arc::new(Callbacks { ops, opaque, caller: OnceLock::new() });
        Ok(Self { name, callbacks, blocks: Mutex::default() })
    }

    /// From here on `caller` calls, and `destroy` is due at the end.
    pub fn adopt(&self, caller: Arc<dyn Caller>) {
        // Whoever added it does so once.
        let _ = self.callbacks.caller.set(caller);
    }

    /// Whether this is the source of that pointer.
    pub fn is_of(&self, opaque: *mut c_void) -> bool {
        self.callbacks.opaque == opaque
    }

    /// Whether both have the same pointer.
    pub fn has_pointer_of(&self, other: &Self) -> bool {
        self.is_of(other.callbacks.opaque)
    }

    /// Its name, as the VMM gave it.
    pub fn given_name(&self) -> &str {
        &self.name
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Watched>> {
        lock(&self.blocks)
    }

    fn owner(&self) -> String {
        format!("dirty source '{}'", self.name)
    }

    fn call(&self, name: &str, callback: Report, watched: &mut Watched, pages: &Range<usize>) -> Result<()> {
        let called = self.run(name, |callbacks| {
            let bitmap = watched.bitmap(pages);
            // SAFETY: the VMM's own function and pointer, called as the header promises; the bitmap has room for the pages.
            unsafe { callback(callbacks.opaque, &raw const bitmap) }
        });
        called.map_err(|e| e.context(format_args!("RAM block '{}'", watched.block.name())).in_section("ram"))
    }

    /// Has `call` made where the VMM may be called back, and says what its value means.
    fn run(&self, name: &str, mut call: impl FnMut(&Callbacks) -> c_int + Send) -> Result<()> {
        let callbacks = &*self.callbacks;
        // One that is not adopted yet is not called.
        let Some(caller) = callbacks.caller.get() else { return Ok(()) };
        let value = caller.call(&format!("{name} of {}", self.owner()), &mut || call(callbacks))?;
        returned(&self.owner(), name, value).map(drop)
    }

    fn sync_block(&self, watched: &mut Watched, found: &mut Found<'_>) -> Result<()> {
        let Some(sync) = self.callbacks.ops.sync else { return Ok(()) };
        watched.log.words_mut().fill(0);
        let (pages, words) = (watched.block.pages(), watched.words());
        self.call("sync", sync, watched, &(0..pages))?;
        if let Some(page) = watched.beyond() {
            let name = watched.block.name();
            let text = format!(
                "{} reported page {page} of RAM block '{name}', which has {pages} pages: nothing it reports can be trusted",
                self.owner()
            );
            return Err(Error::new(libc::ERANGE, text).in_section("ram"));
        }
        let log = &watched.log.words()[..words];
        if self.callbacks.ops.clear.is_some() {
            watched.told.copy_from_slice(log);
        }
        found(&watched.block, 0, log);
        Ok(())
    }
}

impl Tracker for Source {
    fn kind(&self) -> Kind {
        Kind::Callback
    }

    fn name(&self) -> String {
        format!("{} '{}'", Kind::Callback.name(), self.name)
    }

    fn start(&self, list: &RamList) -> Result<()> {
        let mut blocks = Vec::new();
        for block in list.iter().filter(|b| b.is_sent()) {
            let mut told = Vec::new();
            let words = block.pages().div_ceil(WORD_BITS);
            told.try_reserve_exact(words).map_err(|_| Error::no_memory("a dirty bitmap", words as u64 * 8))?;
            told.resize(words, 0);
            // A block's name has no control characters, so no zero either.
            let name = CString::new(block.name()).unwrap_or_default();
            let log = DirtyLog::new((words * WORD_BITS) as u64 + SLACK)?;
            blocks.push(Watched { block: Arc::clone(block), name, log, told });
        }
        if let Some(start) = self.callbacks.ops.start {
            // SAFETY: the VMM's own function and pointer, called as the header promises.
            self.run("start", |callbacks| unsafe { start(callbacks.opaque) })?;
        }
        *self.lock() = blocks;
        Ok(())
    }

    fn stop(&self) {
        self.lock().clear();
        let (Some(stop), Some(caller)) = (self.callbacks.ops.stop, self.callbacks.caller.get()) else { return };
        let callbacks = Arc::clone(&self.callbacks);
        // Where a migration ends nobody may wait for a VMM that waits for just that.
        let call = move || {
            let callbacks = &*callbacks;
            // SAFETY: the VMM's own function and pointer, called as the header promises.
            unsafe { stop(callbacks.opaque) }
        };
        caller.post(&format!("stop of {}", self.owner()), Box::new(call));
    }

    fn sync(&self, found: &mut Found<'_>) -> Result<()> {
        self.lock().iter_mut().try_for_each(|watched| self.sync_block(watched, found))
    }

    fn clear(&self, block: &Block, pages: Range<usize>) -> Result<()> {
        let Some(clear) = self.callbacks.ops.clear else { return Ok(()) };
        let mut blocks = self.lock();
        let Some(watched) = blocks.iter_mut().find(|w| std::ptr::eq(&*w.block, block)) else { return Ok(()) };
        for chunk in Naps::chunks_of(&pages) {
            let pages = Naps::pages_in(chunk..chunk + 1, watched.block.pages());
            let words = pages.start / WORD_BITS..pages.end.div_ceil(WORD_BITS);
            if watched.told[words.clone()].iter().all(|word| *word == 0) {
                continue;
            }
            watched.log.words_mut()[..words.len()].copy_from_slice(&watched.told[words.clone()]);
            self.call("clear", clear, watched, &pages)?;
            watched.told[words].fill(0);
        }
        Ok(())
    }

    fn covers(&self, block: &Block) -> Vec<Range<usize>> {
        let all = self.callbacks.ops.flags & VMIG_SOURCE_ALL_WRITES != 0;
        all.then(|| 0..block.pages()).into_iter().collect()
    }
}

impl Drop for Callbacks {
    fn drop(&mut self) {
        if let (Some(_), Some(destroy)) = (self.caller.get(), self.ops.destroy) {
            // SAFETY: the source owns the pointer since it was added, and nobody has it any more.
            unsafe { destroy(self.opaque) }
        }
    }
}
