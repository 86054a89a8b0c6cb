//! The dirty pages of one reader.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::Tracker;
use crate::bitmap::{Bitmap, Scan};
use crate::error::Result;
use crate::ram::{Block, RamList};

/// One bitmap per block. The hub adds to it, its reader takes from it.
pub struct DirtySet {
    blocks: Vec<(Arc<Block>, Bitmap)>,
    trackers: Vec<Arc<dyn Tracker>>,
    count: AtomicUsize,
}

impl std::fmt::Debug for DirtySet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "DirtySet({} blocks, {} pages)", self.len(), self.pages())
    }
}

impl DirtySet {
    /// The blocks of `list` whose bytes travel, every page dirty; these trackers know of writes to them.
    pub(super) fn all(list: &RamList, trackers: &[Arc<dyn Tracker>]) -> Result<Self> {
        let mut blocks = Vec::new();
        let mut count = 0;
        for block in list.iter().filter(|b| b.is_sent()) {
            let map = Bitmap::new(block.pages())?;
            count += map.set_range(0, block.pages());
            blocks.push((Arc::clone(block), map));
        }
        Ok(Self { blocks, trackers: trackers.to_vec(), count: AtomicUsize::new(count) })
    }

    /// Blocks, by index.
    pub fn blocks(&self) -> impl Iterator<Item = &Arc<Block>> + Clone {
        self.blocks.iter().map(|(block, _)| block)
    }

    /// Number of blocks.
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Whether there is no block.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// A block by index.
    pub fn block(&self, index: usize) -> &Arc<Block> {
        &self.blocks[index].0
    }

    /// Dirty pages in all blocks.
    pub fn pages(&self) -> usize {
        self.count.load(Ordering::Acquire)
    }

    /// Adds pages of a block, by a log of it from page `first` on; a block that is not in the set is not this reader's.
    pub fn add(&self, block: &Arc<Block>, first: usize, log: &[u64]) {
        self.add_to(block, |map| map.merge(first, log));
    }

    /// Every page is dirty again.
    pub(super) fn add_all(&self) {
        let added: usize = self.blocks.iter().map(|(block, map)| map.set_range(0, block.pages())).sum();
        self.count.fetch_add(added, Ordering::AcqRel);
    }

    /// Adds pages of a block by words of a bitmap of it.
    pub fn add_words(&self, block: &Arc<Block>, words: &[(usize, u64)]) {
        self.add_to(block, |map| map.set_words(words));
    }

    fn add_to(&self, block: &Arc<Block>, add: impl FnOnce(&Bitmap) -> usize) {
        if let Some((_, map)) = self.blocks.iter().find(|(b, _)| Arc::ptr_eq(b, block)) {
            self.count.fetch_add(add(map), Ordering::AcqRel);
        }
    }

    /// Pages of a block that were taken are dirty again.
    pub fn put_back(&self, index: usize, first: usize, pages: usize) {
        self.count.fetch_add(self.blocks[index].1.set_range(first, pages), Ordering::AcqRel);
    }

    /// The first run of dirty pages of a block at or after `from`, at most `max` long, as (first page, pages).
    pub fn next_run(&self, index: usize, from: usize, max: usize) -> Option<(usize, usize)> {
        self.blocks[index].1.next_run(from, max)
    }

    /// Takes up to `max` pages of a block from where `scan` is on, in runs (first page, pages); returns how many, 0: the end.
    /// What is read after this call is newer than every mark taken.
    pub fn take_runs(&self, index: usize, scan: &mut Scan, max: usize, give: impl FnMut(usize, usize)) -> usize {
        let taken = self.blocks[index].1.take_runs(scan, max, give);
        self.count.fetch_sub(taken, Ordering::AcqRel);
        taken
    }

    /// Pages are about to be read: writes to them from here on are reported anew.
    pub fn clear(&self, index: usize, pages: Range<usize>) -> Result<()> {
        self.trackers.iter().try_for_each(|tracker| tracker.clear(self.block(index), pages.clone()))
    }

    /// Takes a run: what is read after this call is newer than every mark taken.
    pub fn take(&self, index: usize, first: usize, pages: usize) {
        let taken = self.blocks[index].1.take_range(first, pages);
        self.count.fetch_sub(taken, Ordering::AcqRel);
    }
}
