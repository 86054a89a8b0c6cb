//! Hashes of guest RAM: of each page, and of each granule over those of its pages, so that two sides which differ find the
//! first page by looking at one granule. What option `verify` compares.
//!
//! Memory that does not exist reads as zero and is not touched; what is not mapped any more is an error. A page is copied
//! before it is hashed: guest memory never has a Rust reference.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use super::presence::{GRANULE, Presence};
use super::survey::Survey;
use super::{Block, PAGE, PAGE_BYTES, RamList};
use crate::error::{Error, Result};
use crate::thread::{Handle, Threads};

/// Pages copied at a time: few enough that the copy is still in the cache when it is hashed.
const STEP: usize = 8;
/// Between two looks whether the hashing is still wanted.
const LOOK: Duration = Duration::from_millis(20);

/// Hashes of all RAM whose bytes travel, or is handed over, at one moment.
#[derive(Debug)]
pub struct Digest {
    blocks: Vec<BlockDigest>,
}

/// Hashes of one block.
#[derive(Debug)]
pub struct BlockDigest {
    block: Arc<Block>,
    granules: Vec<u64>,
    /// Of a granule's pages; none: all of them are zero.
    pages: Vec<Option<Vec<u64>>>,
}

/// A page whose hashes differ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Differing {
    /// Name of its block.
    pub block: String,
    /// Its offset there, in bytes.
    pub offset: u64,
    /// What its hash should be, and what it is.
    pub hashes: [u64; 2],
}

/// The hash of one page as it is now; `copy` is used for it.
pub fn page_hash(block: &Block, page: usize, copy: &mut Vec<u8>) -> u64 {
    copy.clear();
    block.piece(page, 1).take_into(copy, PAGE_BYTES);
    xxh3_64(copy)
}

/// The hash of a page of zeros.
pub fn zero_hash() -> u64 {
    xxh3_64(&[0; PAGE_BYTES])
}

/// What the threads share.
#[derive(Debug)]
struct Work {
    /// Each block with the number of its first granule among all.
    blocks: Vec<(usize, Arc<Block>, Presence)>,
    granules: usize,
    next: AtomicUsize,
    stop: AtomicBool,
    zero: u64,
}

/// A granule's number among all, its hash, and its pages' unless all are zero.
type Found = (usize, u64, Option<Vec<u64>>);

impl Digest {
    /// Hashes the blocks of `list`, with so many threads. Ends early with the error of `check`.
    pub fn of(threads: &Threads, list: &RamList, count: usize, check: &dyn Fn() -> Result<()>) -> Result<Self> {
        let work = Arc::new(Work::new(list)?);
        let mut handles = Vec::new();
        for n in 0..count.clamp(1, work.granules.max(1)) {
            let own = Arc::clone(&work);
            match threads.spawn(&format!("verify_{n}"), move || own.run()) {
                Ok(handle) => handles.push(handle),
                Err(error) if n == 0 => return Err(error),
                // One thread fewer is only slower.
                Err(_) => break,
            }
        }
        let mut digest = Self::empty(&work)?;
        let mut result = Ok(());
        for handle in &handles {
            match join(handle, &work.stop, check) {
                Ok(found) => digest.take(&work, found),
                // The others are to end, too.
                Err(error) => {
                    work.stop.store(true, Ordering::Release);
                    result = result.and(Err(error));
                }
            }
        }
        result.map(|()| digest)
    }

    fn empty(work: &Work) -> Result<Self> {
        let of = |block: &Arc<Block>| {
            let count = block.pages().div_ceil(GRANULE);
            let (mut granules, mut pages) = (Vec::new(), Vec::new());
            let no_room = |_| Error::no_memory("hashes of guest RAM", count as u64 * 32);
            granules.try_reserve_exact(count).map_err(no_room)?;
            granules.resize(count, 0);
            pages.try_reserve_exact(count).map_err(no_room)?;
            pages.resize_with(count, || None);
            Ok(BlockDigest { block: Arc::clone(block), granules, pages })
        };
        Ok(Self { blocks: work.blocks.iter().map(|(_, block, _)| of(block)).collect::<Result<_>>()? })
    }

    fn take(&mut self, work: &Work, found: Vec<Found>) {
        for (granule, sum, pages) in found {
            let (at, granule) = work.locate(granule);
            let block = &mut self.blocks[at];
            (block.granules[granule], block.pages[granule]) = (sum, pages);
        }
    }

    /// The blocks, in the order of the list.
    pub fn blocks(&self) -> &[BlockDigest] {
        &self.blocks
    }

    /// The first page that has other contents than it had in `before`, which is of the same list.
    pub fn first_changed(&self, before: &Self) -> Option<Differing> {
        self.blocks.iter().zip(&before.blocks).find_map(|(now, before)| {
            let granule = now.first_differing(&before.granules)?;
            now.first_page(granule, &before.pages_of(granule))
        })
    }
}

impl BlockDigest {
    /// Its block's name.
    pub fn name(&self) -> &str {
        self.block.name()
    }

    /// The hash of each granule.
    pub fn granules(&self) -> &[u64] {
        &self.granules
    }

    /// The first granule that differs from these.
    pub fn first_differing(&self, theirs: &[u64]) -> Option<usize> {
        self.granules.iter().zip(theirs).position(|(ours, theirs)| ours != theirs)
    }

    /// Hashes of the pages of a granule that the block has.
    pub fn pages_of(&self, granule: usize) -> Vec<u64> {
        let zeros = || vec![zero_hash(); granule_pages(&self.block, granule)];
        self.pages[granule].clone().unwrap_or_else(zeros)
    }

    /// Pages a granule has.
    pub fn granule_pages(&self, granule: usize) -> usize {
        granule_pages(&self.block, granule)
    }

    /// The first page of a granule that differs from what its hashes should be.
    pub fn first_page(&self, granule: usize, expected: &[u64]) -> Option<Differing> {
        let ours = self.pages_of(granule);
        let page = ours.iter().zip(expected).position(|(ours, expected)| ours != expected)?;
        let offset = (granule * GRANULE + page) as u64 * PAGE;
        Some(Differing { block: self.name().to_owned(), offset, hashes: [expected[page], ours[page]] })
    }
}

/// Pages a granule of the block has: the last one may be short.
fn granule_pages(block: &Block, granule: usize) -> usize {
    block.pages().saturating_sub(granule * GRANULE).min(GRANULE)
}

/// The hash of a granule, of those of its pages.
fn fold(pages: &[u64]) -> u64 {
    let mut sum = Xxh3::new();
    pages.iter().for_each(|page| sum.update(&page.to_be_bytes()));
    sum.digest()
}

fn join(handle: &Handle<Vec<Found>>, stop: &AtomicBool, check: &dyn Fn() -> Result<()>) -> Result<Vec<Found>> {
    let mut given_up = None;
    loop {
        match handle.join(Some(LOOK)) {
            Err(error) if error.errno() == libc::ETIMEDOUT => {
                if given_up.is_none()
                    && let Err(error) = check()
                {
                    stop.store(true, Ordering::Release);
                    given_up = Some(error);
                }
            }
            result => return given_up.map_or(result, Err),
        }
    }
}

impl Work {
    fn new(list: &RamList) -> Result<Self> {
        let survey = Survey::new()?;
        let (mut blocks, mut granules) = (Vec::new(), 0);
        for block in list.iter().filter(|b| b.is_sent()) {
            blocks.push((granules, Arc::clone(block), Presence::new(block, &survey, None)));
            granules += block.pages().div_ceil(GRANULE);
        }
        let zero = zero_hash();
        Ok(Self { blocks, granules, next: AtomicUsize::new(0), stop: AtomicBool::new(false), zero })
    }

    /// Which block a granule belongs to, and its number there.
    fn locate(&self, granule: usize) -> (usize, usize) {
        let at = self.blocks.partition_point(|(first, ..)| *first <= granule).saturating_sub(1);
        (at, granule - self.blocks[at].0)
    }

    /// The body of a thread: granule by granule, until there are none.
    fn run(&self) -> Result<Vec<Found>> {
        let mut found = Vec::new();
        let mut copy = Vec::new();
        copy.try_reserve_exact(STEP * PAGE_BYTES).map_err(|_| Error::no_memory("pages", 0))?;
        while !self.stop.load(Ordering::Acquire) {
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            if number >= self.granules {
                break;
            }
            let (at, granule) = self.locate(number);
            let (_, block, presence) = &self.blocks[at];
            let (sum, pages) = self.granule(block, presence, granule, &mut copy)?;
            found.try_reserve(1).map_err(|_| Error::no_memory("hashes of guest RAM", self.granules as u64 * 40))?;
            found.push((number, sum, pages));
        }
        Ok(found)
    }

    fn granule(
        &self,
        block: &Block,
        presence: &Presence,
        granule: usize,
        copy: &mut Vec<u8>,
    ) -> Result<(u64, Option<Vec<u64>>)> {
        let first = granule * GRANULE;
        let count = granule_pages(block, granule);
        let mut sums = Vec::new();
        sums.try_reserve_exact(count).map_err(|_| Error::no_memory("hashes of guest RAM", block.len() / PAGE * 8))?;
        sums.resize(count, self.zero);
        block.check_mapped(&(first..first + count))?;
        presence.each_existing(first..first + count, |range| {
            for start in range.clone().step_by(STEP) {
                let some = STEP.min(range.end - start);
                copy.clear();
                block.piece(start, some).take_into(copy, some * PAGE_BYTES);
                for (page, bytes) in copy.chunks_exact(PAGE_BYTES).enumerate() {
                    sums[start - first + page] = xxh3_64(bytes);
                }
            }
        });
        let sum = fold(&sums);
        Ok((sum, sums.iter().any(|sum| *sum != self.zero).then_some(sums)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ram::{BlockSpec, Ram};

    const PAGES: usize = 2 * GRANULE + 3;

    #[derive(Clone)]
    #[repr(align(4096))]
    struct Page(#[expect(dead_code, reason = "only its memory counts")] [u8; PAGE_BYTES]);

    fn guest() -> (Vec<Page>, Ram) {
        let mut memory = vec![Page([0; PAGE_BYTES]); PAGES];
        let ram = Ram::default();
        for (name, from, pages) in [("low", 0, GRANULE + 3), ("high", GRANULE + 3, GRANULE)] {
            let host = memory[from..].as_mut_ptr().cast();
            let len = (pages * PAGE_BYTES) as u64;
            let spec =
                BlockSpec { name: name.into(), host, len, gpa: 0, marked: true, shared_storage: false, file: None };
            ram.add(spec).unwrap();
        }
        (memory, ram)
    }

    fn digest(ram: &Ram, threads: usize) -> Digest {
        Digest::of(&Threads::new(), &ram.list(), threads, &|| Ok(())).unwrap()
    }

    #[test]
    fn every_page_counts_and_the_first_that_changed_is_named() {
        let (_memory, ram) = guest();
        let before = digest(&ram, 1);
        assert!(digest(&ram, 3).first_changed(&before).is_none(), "the same memory, with other threads");
        let changed = |name: &str, page: usize, at: usize| {
            let block = ram.find(name).unwrap();
            let mut bytes = [0; PAGE_BYTES];
            bytes[at] = 1;
            block.write_page(page, &bytes);
            let now = digest(&ram, 2);
            let found = now.first_changed(&before).unwrap();
            block.zero_page(page);
            assert_eq!((found.block.as_str(), found.offset), (name, page as u64 * PAGE));
            assert_eq!(found.hashes, [xxh3_64(&[0; PAGE_BYTES]), xxh3_64(&bytes)]);
        };
        for (name, page, at) in
            [("low", 0, 0), ("low", GRANULE - 1, 4095), ("low", GRANULE + 2, 8), ("high", 0, 1), ("high", 511, 0)]
        {
            changed(name, page, at);
        }
        // Of two the first.
        let (low, high) = (ram.find("low").unwrap(), ram.find("high").unwrap());
        high.write_page(2, &[1; PAGE_BYTES]);
        low.write_page(GRANULE, &[1; PAGE_BYTES]);
        let found = digest(&ram, 2).first_changed(&before).unwrap();
        assert_eq!((found.block.as_str(), found.offset), ("low", GRANULE as u64 * PAGE));
    }

    #[test]
    fn hashing_ends_when_it_is_not_wanted_any_more() {
        let (_memory, ram) = guest();
        let work = Work::new(&ram.list()).unwrap();
        work.stop.store(true, Ordering::Release);
        assert!(work.run().unwrap().is_empty());
    }
}
