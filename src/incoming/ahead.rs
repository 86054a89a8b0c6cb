//! Guest memory made present ahead of the data: the first touch of a page costs more than its bytes on the network.
//!
//! A thread of its own does it, a little ahead of the receiver, and only where the guest turns out to have pages: a
//! stretch is prepared once the one before it was found to be dense. So a guest that never touched most of its memory
//! does not get it here either, but for one such stretch at the end of each dense region. How large the pages are is
//! the VMM's choice, made with madvise before.

use std::sync::{Arc, Condvar, Mutex};

use super::Job;
use crate::ram::{Block, PAGE_BYTES};
use crate::thread::{Handle, lock};

/// Pages looked at together: 2 MiB.
const GRANULE: usize = (2 << 20) / PAGE_BYTES;
/// Whole pages in a granule that make it dense.
const DENSE: usize = GRANULE / 2;
/// Whole pages in one packet of a parallel channel that make a stretch dense.
const PACKET_DENSE: usize = 64;
/// Granules prepared ahead: enough to keep the thread busy, and little to waste.
const REACH: usize = 16;

/// A wish: granules of a block.
#[derive(Debug)]
struct Wish {
    block: Arc<Block>,
    next: usize,
    end: usize,
}

#[derive(Debug, Default)]
struct State {
    wish: Option<Wish>,
    over: bool,
}

#[derive(Debug, Default)]
struct Shared {
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
    /// Starts the thread. None, with a line in the log, where that fails: it only saves time.
    pub(super) fn start(job: &Job) -> Option<Self> {
        let shared = Arc::<Shared>::default();
        let ours = Arc::clone(&shared);
        match job.threads.spawn("prepare_ram", move || {
            ours.work();
            Ok(())
        }) {
            Ok(thread) => Some(Self { shared, thread }),
            Err(error) => {
                job.vmm.log().error(format_args!("memory is not prepared ahead of the data: {error}"));
                None
            }
        }
    }

    /// What tells the thread where the data is.
    pub(super) fn scout(&self) -> Scout {
        Scout { shared: Arc::clone(&self.shared), at: None, seen: 0 }
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
    /// Prepares what is wished for, the newest wish first, until the end.
    fn work(&self) {
        // Pages come in ascending order, so one number per block tells what was done.
        let mut done: Vec<(Arc<Block>, usize)> = Vec::new();
        while let Some((block, granule)) = self.next(&mut done) {
            let first = granule * GRANULE;
            // Too old a kernel, or no memory: the data's own first touch will do, or tell.
            if block.populate(first, GRANULE.min(block.pages() - first)).is_err() {
                return;
            }
        }
    }

    /// Waits for a granule that is not done yet. None: it is over.
    fn next(&self, done: &mut Vec<(Arc<Block>, usize)>) -> Option<(Arc<Block>, usize)> {
        let mut state = lock(&self.state);
        loop {
            if state.over {
                return None;
            }
            if let Some(Wish { block, next, end }) = state.wish.take() {
                let at = done.iter().position(|(b, _)| Arc::ptr_eq(b, &block)).unwrap_or_else(|| {
                    done.push((Arc::clone(&block), 0));
                    done.len() - 1
                });
                let granule = next.max(done[at].1);
                if granule < end {
                    done[at].1 = granule + 1;
                    state.wish = Some(Wish { block: Arc::clone(&block), next: granule + 1, end });
                    return Some((block, granule));
                }
            }
            state = self.changed.wait(state).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
    }

    fn wish(&self, block: &Arc<Block>, next: usize) {
        let end = block.pages().div_ceil(GRANULE).min(next + REACH);
        if next < end {
            lock(&self.state).wish = Some(Wish { block: Arc::clone(block), next, end });
            self.changed.notify_one();
        }
    }
}

/// Counts the pages that arrive.
#[derive(Debug)]
pub(super) struct Scout {
    shared: Arc<Shared>,
    at: Option<(Arc<Block>, usize)>,
    seen: usize,
}

impl Scout {
    /// Whole pages of one packet arrived: many that lie close together are a dense stretch.
    pub(super) fn saw_packet(&self, block: &Arc<Block>, pages: &[usize]) {
        let (Some(first), Some(last)) = (pages.iter().min(), pages.iter().max()) else { return };
        if pages.len() >= PACKET_DENSE && last - first < 2 * pages.len() {
            self.shared.wish(block, last / GRANULE + 1);
        }
    }

    /// A whole page arrived.
    pub(super) fn saw(&mut self, block: &Arc<Block>, page: usize) {
        let granule = page / GRANULE;
        if !matches!(&self.at, Some((b, g)) if *g == granule && Arc::ptr_eq(b, block)) {
            (self.at, self.seen) = (Some((Arc::clone(block), granule)), 0);
        }
        self.seen += 1;
        if self.seen == DENSE {
            self.shared.wish(block, granule + 1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ram::{BlockSpec, PAGE, Ram};

    fn block(pages: usize) -> (Vec<u8>, Arc<Block>) {
        let memory = vec![0; (pages + 1) * PAGE_BYTES];
        let host = memory.as_ptr().cast_mut();
        let host = host.wrapping_add(host.align_offset(PAGE_BYTES));
        let len = pages as u64 * PAGE;
        let spec =
            BlockSpec { name: "ram".into(), host, len, gpa: 0, marked: true, shared_storage: false, file: None };
        (memory, Ram::default().add(spec).unwrap())
    }

    #[test]
    fn only_what_follows_a_dense_stretch_is_prepared_and_only_once() {
        let (_memory, block) = block(GRANULE * (REACH + 3) + 7);
        let ahead = Arc::<Shared>::default();
        let mut scout = Scout { shared: Arc::clone(&ahead), at: None, seen: 0 };
        (0..DENSE - 1).for_each(|page| scout.saw(&block, page));
        assert!(lock(&ahead.state).wish.is_none(), "not dense yet");
        scout.saw(&block, DENSE);
        let mut done = Vec::new();
        let mut take = |n: usize| -> Vec<usize> { (0..n).map(|_| ahead.next(&mut done).unwrap().1).collect() };
        assert_eq!(take(3), [1, 2, 3]);
        (GRANULE..2 * GRANULE).for_each(|page| scout.saw(&block, page));
        assert_eq!(take(REACH - 2), (4..REACH + 2).collect::<Vec<_>>(), "up to 16 behind granule 1");
        (3 * GRANULE..4 * GRANULE).for_each(|page| scout.saw(&block, page));
        assert_eq!(take(2), [REACH + 2, REACH + 3], "up to the end of the block");
        (0..GRANULE).for_each(|page| scout.saw(&block, page));
        lock(&ahead.state).over = true;
        assert!(ahead.next(&mut Vec::new()).is_none());
    }

    #[test]
    fn preparing_changes_no_byte() {
        let (mut memory, block) = block(GRANULE + 1);
        memory.fill(7);
        block.populate(0, GRANULE + 1).unwrap();
        assert!(memory.iter().all(|byte| *byte == 7));
    }
}
