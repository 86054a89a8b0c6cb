//! Guest memory made present ahead of the data, where the source gives no hints where it has any: the first touch of a
//! page costs more than its bytes on the network.
//!
//! A thread of its own does it, a little ahead of the receiver: what follows a full stretch is prepared. What was
//! prepared for nothing stays below an eighth of what arrived, so a guest that never touched most of its memory does not
//! get it here either, in whatever pattern it uses it. How large the pages are is the VMM's choice, made with madvise
//! before.

use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use super::Job;
use crate::error::{Error, Result};
use crate::ram::Block;
use crate::ram::presence::GRANULE;
use crate::sys::thread_sys;
use crate::thread::{Handle, lock};

/// Whole pages that make a granule (2 MiB) full: what it then has in vain is next to nothing.
const FULL: u16 = 480;
/// Granules prepared ahead: enough to keep the thread busy, and little to waste.
const REACH: usize = 16;
/// Granules that may be prepared for nothing before any proved useful.
const TRUST: usize = 8;
/// And one more for so many full ones that arrived.
const TRUST_PART: usize = 8;
/// In a granule's count: it was prepared by us.
const MADE: u16 = 1 << 15;

/// A block, and what is known of its granules: whole pages that arrived, as far as [`FULL`], and [`MADE`].
#[derive(Debug)]
struct Place {
    block: Arc<Block>,
    counts: Box<[AtomicU16]>,
}

impl Place {
    fn new(block: &Arc<Block>) -> Result<Self> {
        let granules = block.pages().div_ceil(GRANULE);
        let mut counts = Vec::new();
        counts.try_reserve_exact(granules).map_err(|_| Error::no_memory("counts of pages", granules as u64 * 2))?;
        counts.resize_with(granules, AtomicU16::default);
        Ok(Self { block: Arc::clone(block), counts: counts.into_boxed_slice() })
    }

    /// Whole pages that arrived, and whether we prepared it.
    fn look(&self, granule: usize) -> (u16, bool) {
        let count = self.counts[granule].load(Ordering::Relaxed);
        (count & !MADE, count & MADE != 0)
    }
}

/// A wish: granules of a block.
#[derive(Debug)]
struct Wish {
    place: usize,
    next: usize,
    end: usize,
}

#[derive(Debug, Default)]
struct State {
    wish: Option<Wish>,
    /// Granules that arrived full.
    full: usize,
    /// Granules prepared that are not full, or not yet.
    unused: usize,
    over: bool,
}

#[derive(Debug)]
struct Shared {
    places: Vec<Place>,
    state: Mutex<State>,
    changed: Condvar,
}

/// The thread `prepare_ram`; ends with this.
#[derive(Debug)]
pub(super) struct Ahead {
    shared: Arc<Shared>,
    thread: Handle<()>,
}

impl Ahead {
    /// Starts the thread, for these blocks.
    pub(super) fn start<'a>(job: &Job, blocks: impl Iterator<Item = &'a Arc<Block>>) -> Result<Self> {
        let shared = Arc::new(Shared::new(blocks)?);
        let ours = Arc::clone(&shared);
        let nice = job.options.nice();
        let thread = job.threads.spawn("prepare_ram", move || {
            thread_sys::stand_back(nice);
            ours.work();
            Ok(())
        })?;
        Ok(Self { shared, thread })
    }

    /// What tells the thread where the data is.
    pub(super) fn scout(&self) -> Scout {
        Scout { shared: Arc::clone(&self.shared) }
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        lock(&self.shared.state).over = true;
        self.shared.changed.notify_all();
        // It returns nothing, and the guest does not depend on it.
        let _ = self.thread.join(None);
    }
}

impl Shared {
    fn new<'a>(blocks: impl Iterator<Item = &'a Arc<Block>>) -> Result<Self> {
        let places = blocks.map(Place::new).collect::<Result<_>>()?;
        Ok(Self { places, state: Mutex::default(), changed: Condvar::new() })
    }

    /// Prepares what is wished for, the newest wish first, until the end.
    fn work(&self) {
        while let Some((place, granule)) = self.next() {
            let block = &self.places[place].block;
            let first = granule * GRANULE;
            // Too old a kernel, or no memory: the data's own first touch will do, or tell.
            if block.populate(first, GRANULE.min(block.pages() - first)).is_err() {
                return;
            }
        }
    }

    /// Waits for a granule that is to be prepared. None: it is over.
    fn next(&self) -> Option<(usize, usize)> {
        let mut state = lock(&self.state);
        loop {
            if state.over {
                return None;
            }
            if let Some(granule) = self.choose(&mut state) {
                return Some(granule);
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn choose(&self, state: &mut State) -> Option<(usize, usize)> {
        if state.unused >= TRUST + state.full / TRUST_PART {
            return None;
        }
        let wish = state.wish.as_mut()?;
        let place = &self.places[wish.place];
        let granule = (wish.next..wish.end).find(|granule| matches!(place.look(*granule), (..FULL, false)))?;
        place.counts[granule].fetch_or(MADE, Ordering::Relaxed);
        wish.next = granule + 1;
        state.unused += 1;
        Some((wish.place, granule))
    }

    /// A granule is full: the next ones may be, too.
    fn is_full(&self, place: usize, granule: usize) {
        let place_at = &self.places[place];
        let mut state = lock(&self.state);
        state.full += 1;
        state.unused -= usize::from(place_at.look(granule).1);
        let end = place_at.counts.len().min(granule + 1 + REACH);
        state.wish = Some(Wish { place, next: granule + 1, end });
        self.changed.notify_one();
    }
}

/// Counts the pages that arrive.
#[derive(Clone, Debug)]
pub(super) struct Scout {
    shared: Arc<Shared>,
}

impl Scout {
    /// Whole pages arrived.
    pub(super) fn saw(&self, block: &Arc<Block>, pages: &[usize]) {
        let Some(place) = self.shared.places.iter().position(|p| Arc::ptr_eq(&p.block, block)) else { return };
        for pages in pages.chunk_by(|a, b| a / GRANULE == b / GRANULE) {
            let granule = pages[0] / GRANULE;
            if self.shared.places[place].look(granule).0 >= FULL {
                continue;
            }
            let more = u16::try_from(pages.len()).unwrap_or(FULL);
            let before = self.shared.places[place].counts[granule].fetch_add(more, Ordering::Relaxed) & !MADE;
            if before < FULL && before + more >= FULL {
                self.shared.is_full(place, granule);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ram::{BlockSpec, PAGE, PAGE_BYTES, Ram};

    fn block(pages: usize) -> (Vec<u8>, Arc<Block>) {
        let memory = vec![0; (pages + 1) * PAGE_BYTES];
        let host = memory.as_ptr().cast_mut();
        let host = host.wrapping_add(host.align_offset(PAGE_BYTES));
        let len = pages as u64 * PAGE;
        let spec =
            BlockSpec { name: "ram".into(), host, len, gpa: 0, marked: true, shared_storage: false, file: None };
        (memory, Ram::default().add(spec).unwrap())
    }

    /// Granules prepared until the thread would wait.
    fn made(shared: &Shared) -> Vec<usize> {
        let mut state = lock(&shared.state);
        std::iter::from_fn(|| shared.choose(&mut state)).map(|(_, granule)| granule).collect()
    }

    #[test]
    fn only_what_follows_a_full_stretch_is_prepared_and_only_once() {
        let (_memory, block) = block(GRANULE * 40 + 7);
        let shared = Arc::new(Shared::new([&block].into_iter()).unwrap());
        let scout = Scout { shared: Arc::clone(&shared) };
        let fill = |granules: std::ops::Range<usize>| {
            (granules.start * GRANULE..granules.end * GRANULE).for_each(|page| scout.saw(&block, &[page]));
        };
        (0..usize::from(FULL) - 1).for_each(|page| scout.saw(&block, &[page]));
        assert!(made(&shared).is_empty(), "not full yet");
        scout.saw(&block, &[usize::from(FULL) - 1, GRANULE]);
        assert_eq!(made(&shared), (1..=TRUST).collect::<Vec<_>>(), "so many on trust");
        assert!(made(&shared).is_empty());
        fill(1..3);
        assert_eq!(made(&shared), [TRUST + 1, TRUST + 2], "one more for each that was of use");
        fill(3..30);
        // All that was prepared was of use, and trust has grown by one for eight full ones.
        assert_eq!(made(&shared), (30..30 + TRUST + 3).collect::<Vec<_>>());
        fill(30..40);
        assert!(made(&shared).is_empty(), "the last, short granule was prepared before");
        fill(0..2);
        assert!(made(&shared).is_empty());
    }

    #[test]
    fn what_is_prepared_for_nothing_stays_an_eighth_of_what_arrives() {
        let (_memory, block) = block(GRANULE * 600);
        let shared = Arc::new(Shared::new([&block].into_iter()).unwrap());
        let scout = Scout { shared: Arc::clone(&shared) };
        let (mut arrived, mut in_vain) = (0, 0);
        for granule in (0..600).step_by(5) {
            let pages: Vec<usize> = (granule * GRANULE..(granule + 1) * GRANULE).collect();
            pages.chunks(100).for_each(|pages| scout.saw(&block, pages));
            arrived += 1;
            in_vain += made(&shared).iter().filter(|granule| **granule % 5 != 0).count();
            assert!(in_vain <= TRUST + arrived / TRUST_PART, "{in_vain} beside {arrived}");
        }
        assert!(in_vain > TRUST);
    }

    #[test]
    fn preparing_changes_no_byte() {
        let (mut memory, block) = block(GRANULE + 1);
        memory.fill(7);
        block.populate(0, GRANULE + 1).unwrap();
        assert!(memory.iter().all(|byte| *byte == 7));
    }
}
