//! A log of the VMM's own, handed over by a dirty source.
#![allow(unreachable_pub, reason = "parts of one test file")]
#![allow(unsafe_code, reason = "is called as C would be")]

use std::collections::HashMap;
use std::ffi::{CStr, c_int, c_void};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use vmig::dirty::callback::{Source, VMIG_SOURCE_ALL_WRITES, vmig_dirty_bitmap, vmig_dirty_source};
use vmig::dirty::choice::Choice;
use vmig::thread::home::Home;
use vmig::vmm::dispatch::Dispatch;

use super::memory::{Kind, Memory};
use super::schedule::{Place, World, Writer, size};
use crate::common::Rng;

/// Bits by the name of the block.
#[derive(Debug, Default)]
pub struct Log {
    bits: Mutex<HashMap<String, Arc<Vec<AtomicU64>>>>,
    /// A callback runs.
    inside: AtomicBool,
    faults: Arc<Faults>,
}

/// When the source fails.
#[derive(Debug, Default)]
pub struct Faults {
    /// Every call of so many; 0: none.
    pub every: AtomicUsize,
    calls: AtomicUsize,
}

impl Faults {
    fn is_due(&self) -> bool {
        let (every, calls) = (self.every.load(Ordering::SeqCst), self.calls.fetch_add(1, Ordering::SeqCst));
        every != 0 && calls % every == every - 1
    }
}

impl Log {
    fn of(&self, name: &str, pages: usize) -> Arc<Vec<AtomicU64>> {
        let mut all = self.bits.lock().unwrap();
        let new = || Arc::new((0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect());
        Arc::clone(all.entry(name.to_owned()).or_insert_with(new))
    }
}

/// Writes pages from `first` of a block on, and notes.
struct Noting {
    log: Arc<Log>,
    first: usize,
}

impl Writer for Noting {
    fn write(&mut self, place: &Place, page: usize, pages: usize, value: u64) {
        let bits = self.log.of(place.block.name(), place.block.pages());
        for page in self.first.max(page)..place.memory.pages.min(page + pages) {
            place.memory.word(page).store(value, Ordering::SeqCst);
            bits[page / 64].fetch_or(1 << (page % 64), Ordering::SeqCst);
        }
    }
}

/// The bitmap's words, and those of our log that they are about.
///
/// # Safety
/// As the library calls.
unsafe fn parts<'a>(
    opaque: *mut c_void,
    bitmap: *const vmig_dirty_bitmap,
) -> (&'a mut [u64], Arc<Vec<AtomicU64>>, usize) {
    // SAFETY: our own pointer.
    let log = unsafe { &*opaque.cast::<Log>() };
    // SAFETY: the library passes what the header promises.
    let bitmap = unsafe { &*bitmap };
    // SAFETY: as above.
    let name = unsafe { CStr::from_ptr(bitmap.ram) }.to_str().unwrap();
    let words = usize::try_from(bitmap.pages).unwrap().div_ceil(64);
    let first = usize::try_from(bitmap.first).unwrap();
    assert_eq!(first % 64, 0);
    // SAFETY: as above; the library does not look before the callback returns.
    (unsafe { std::slice::from_raw_parts_mut(bitmap.bits, words) }, log.of(name, first + words * 64), first / 64)
}

/// As the library promises: one callback of a source at a time.
fn alone(opaque: *mut c_void, f: impl FnOnce(&Log) -> c_int) -> c_int {
    // SAFETY: our own pointer.
    let log = unsafe { &*opaque.cast::<Log>() };
    assert!(!log.inside.swap(true, Ordering::SeqCst), "two callbacks of one source at once");
    let done = f(log);
    log.inside.store(false, Ordering::SeqCst);
    done
}

fn done(log: &Log) -> c_int {
    if log.faults.is_due() { -libc::EIO } else { 0 }
}

unsafe extern "C" fn take(opaque: *mut c_void, bitmap: *const vmig_dirty_bitmap) -> c_int {
    alone(opaque, |log| {
        // SAFETY: called as the library calls.
        let (words, bits, first) = unsafe { parts(opaque, bitmap) };
        words.iter_mut().enumerate().for_each(|(i, word)| *word |= bits[first + i].swap(0, Ordering::SeqCst));
        // Whatever it took is gone then.
        done(log)
    })
}

unsafe extern "C" fn look(opaque: *mut c_void, bitmap: *const vmig_dirty_bitmap) -> c_int {
    alone(opaque, |log| {
        // SAFETY: called as the library calls.
        let (words, bits, first) = unsafe { parts(opaque, bitmap) };
        words.iter_mut().enumerate().for_each(|(i, word)| *word |= bits[first + i].load(Ordering::SeqCst));
        done(log)
    })
}

unsafe extern "C" fn clear(opaque: *mut c_void, bitmap: *const vmig_dirty_bitmap) -> c_int {
    alone(opaque, |_| {
        // SAFETY: called as the library calls.
        let (words, bits, first) = unsafe { parts(opaque, bitmap) };
        words.iter().enumerate().for_each(|(i, word)| {
            bits[first + i].fetch_and(!*word, Ordering::SeqCst);
        });
        0
    })
}

/// A source that is asked and forgets, or one that is cleared; sometimes it fails.
pub fn world(clears: bool, rng: &mut Rng) -> Option<World> {
    let mut world = World::empty(Choice::Auto);
    world.plug = Some(Kind::Private);
    for n in 0..1 + rng.below(2) {
        let memory = Memory::new(Kind::Private, size(Kind::Private, rng), 0)?;
        world.add(Arc::new(memory), format!("ram{n}"));
    }
    let log = register(&mut world, clears, VMIG_SOURCE_ALL_WRITES, rng);
    world.writers = vec![Box::new(Noting { log: Arc::clone(&log), first: 0 }), Box::new(Noting { log, first: 0 })];
    Some(world)
}

/// A device with a log of its own, beside whatever tracks this world.
pub fn beside(world: &mut World, rng: &mut Rng) {
    let log = register(world, rng.below(2) == 0, 0, rng);
    world.writers.push(Box::new(Noting { log, first: world.first }));
}

fn register(world: &mut World, clears: bool, flags: u64, rng: &mut Rng) -> Arc<Log> {
    let log = Arc::new(Log::default());
    if rng.below(4) == 0 {
        log.faults.every.store(9 + rng.below(30), Ordering::SeqCst);
        world.faults.push(Arc::clone(&log.faults));
    }
    let ops = vmig_dirty_source {
        size: size_of::<vmig_dirty_source>(),
        name: c"log".as_ptr(),
        flags,
        start: None,
        sync: Some(if clears { look } else { take }),
        clear: clears.then_some(clear as _),
        stop: None,
        destroy: None,
    };
    // SAFETY: the callbacks take a Log, which the writers keep as long as the world lives.
    let source = unsafe { Source::new(&raw const ops, Arc::as_ptr(&log).cast_mut().cast()) }.unwrap();
    source.adopt(Arc::new(Dispatch::new(&Arc::new(Home::new()))));
    world.hub.add_tracker(Arc::new(source)).unwrap();
    log
}
