//! Where a reader is in its dirty set: takes what is dirty, in the kernel too, many pages at a time.

use super::set::DirtySet;
use crate::bitmap::Scan;
use crate::error::Result;

/// Pages of a block, by its index in the set, whose dirty bits were taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Index of the block.
    pub block: usize,
    /// The first page.
    pub first: usize,
    /// How many.
    pub pages: usize,
}

/// A place in a dirty set.
#[derive(Debug, Default)]
pub struct Cursor {
    block: usize,
    scan: Scan,
    runs: Vec<Run>,
}

impl Cursor {
    /// What was taken last, in order, of one block.
    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// Takes up to `max` pages of the next block that has any, going round all blocks once. False: nothing is dirty.
    pub fn take(&mut self, set: &DirtySet, max: usize) -> Result<bool> {
        self.runs.clear();
        // The block it begins with comes twice: at last what lies before the place.
        for _ in 0..=set.len() {
            if self.block >= set.len() {
                (self.block, self.scan) = (0, Scan::default());
            }
            if set.pages() == 0 || self.take_here(set, max)? {
                break;
            }
            (self.block, self.scan) = (self.block + 1, Scan::default());
        }
        Ok(!self.runs.is_empty())
    }

    /// Takes up to `max` pages of the block it is in. False: nothing is dirty there from its place on.
    ///
    /// The kernel's bits and ours are gone when this returns, so a write from then on is found again.
    pub fn take_here(&mut self, set: &DirtySet, max: usize) -> Result<bool> {
        self.runs.clear();
        let block = self.block;
        set.take_runs(block, &mut self.scan, max, |first, pages| self.runs.push(Run { block, first, pages }));
        if let (Some(first), Some(last)) = (self.runs.first(), self.runs.last()) {
            set.clear(block, first.first..last.first + last.pages)?;
        }
        Ok(!self.runs.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::super::choice::Choice;
    use super::super::hub::Hub;
    use super::*;
    use crate::bitmap::WORD_BITS;
    use crate::ram::{BlockSpec, PAGE, PAGE_BYTES, Ram};

    /// Blocks of so many pages, never touched.
    fn ram(pages: &[usize]) -> Ram {
        let ram = Ram::default();
        let mut host: *mut u8 = std::ptr::without_provenance_mut(PAGE_BYTES);
        for (n, pages) in pages.iter().enumerate() {
            let len = *pages as u64 * PAGE;
            let gpa = host.addr() as u64;
            ram.add(BlockSpec {
                name: format!("ram{n}"),
                host,
                len,
                gpa,
                marked: true,
                shared_storage: false,
                file: None,
            })
            .unwrap();
            host = host.wrapping_add(pages * PAGE_BYTES);
        }
        ram
    }

    fn take(cursor: &mut Cursor, set: &DirtySet, max: usize) -> Vec<(usize, usize, usize)> {
        let before = set.pages();
        let found = cursor.take(set, max).unwrap();
        let runs: Vec<_> = cursor.runs().iter().map(|r| (r.block, r.first, r.pages)).collect();
        assert_eq!(found, !runs.is_empty());
        assert_eq!(before - set.pages(), runs.iter().map(|r| r.2).sum::<usize>(), "counted");
        runs
    }

    #[test]
    fn goes_round_all_blocks_and_never_mixes_two() {
        let (hub, ram) = (Hub::default(), ram(&[100, 70, 64]));
        let set = hub.subscribe(&ram.list(), Choice::Auto).unwrap();
        let mut cursor = Cursor::default();
        assert_eq!(take(&mut cursor, &set, 110), [(0, 0, 100)]);
        assert_eq!(take(&mut cursor, &set, 30), [(1, 0, 30)]);
        // Dirty again: in another block found after everything else, in the word at hand at once.
        set.add(set.block(0), 7, &[0b1011]);
        set.add(set.block(1), 3, &[1]);
        assert!(cursor.take_here(&set, 5).unwrap());
        assert_eq!(cursor.runs(), [(3, 1), (30, 4)].map(|(first, pages)| Run { block: 1, first, pages }));
        let mut rest = Vec::new();
        while set.pages() > 0 {
            rest.extend(take(&mut cursor, &set, 64));
        }
        let want = [(1, 34, 36), (2, 0, 64), (0, 7, 2), (0, 10, 1)];
        assert_eq!(rest, want);
        assert!(!cursor.take_here(&set, WORD_BITS).unwrap());
        set.add(set.block(0), 9, &[1]);
        assert_eq!(take(&mut cursor, &set, 64), [(0, 9, 1)], "before its place in the block it is in");
        assert!(take(&mut cursor, &set, 64).is_empty());
        hub.leave(&set);
    }

    #[test]
    fn no_blocks_no_pages() {
        let (hub, ram) = (Hub::default(), Ram::default());
        let set = hub.subscribe(&ram.list(), Choice::Auto).unwrap();
        assert!(take(&mut Cursor::default(), &set, 1).is_empty());
    }
}
