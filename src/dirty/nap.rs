//! Chunks of memory that sleep: no page of them exists, so nobody wrote there, and nothing need be asked or protected.
//!
//! A log that begins all set stays so where nothing is cleared. So a chunk in which no page exists when it is first to be
//! cleared is left as it is, *asleep*: who writes there makes a page, which the next read of the log finds. Only until it
//! was cleared once, because from then on what it had may be elsewhere.

use std::ops::Range;

use crate::bitmap::WORD_BITS;
use crate::error::{Error, Result};
use crate::ram::presence::Presence;
use crate::sys::kvm::CLEAR_MAX;

/// Pages of a chunk: what is cleared by one call into the kernel.
pub(super) const CHUNK: usize = CLEAR_MAX as usize;

/// What became of a chunk since tracking began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Chunk {
    /// It was never cleared.
    Untouched,
    /// It was not cleared, because no page of it existed.
    Asleep,
    /// It was cleared, or found to have a page since.
    Awake,
}

/// The chunks of a log.
#[derive(Debug)]
pub(super) struct Naps {
    pages: usize,
    /// The block's page that the log starts at.
    first: usize,
    /// Tells which chunks may sleep; none if that cannot be found out.
    presence: Option<Presence>,
    chunks: Vec<Chunk>,
}

impl Naps {
    /// For a log of so many pages from page `first` of its block on.
    pub(super) fn new(first: usize, pages: usize) -> Result<Self> {
        let mut chunks = Vec::new();
        let count = pages.div_ceil(CHUNK);
        chunks.try_reserve_exact(count).map_err(|_| Error::no_memory("a dirty log", count as u64))?;
        chunks.resize(count, Chunk::Untouched);
        Ok(Self { pages, first, presence: None, chunks })
    }

    /// The log begins, all set.
    pub(super) fn begin(&mut self, presence: Option<Presence>) {
        self.chunks.fill(Chunk::Untouched);
        self.presence = presence;
    }

    /// The log ends.
    pub(super) fn end(&mut self) {
        self.presence = None;
    }

    /// Pages of the log that chunks have.
    pub(super) fn pages_of(&self, chunks: &Range<usize>) -> Range<usize> {
        Self::pages_in(chunks.clone(), self.pages)
    }

    /// Pages that chunks of a log of `pages` pages have.
    pub(super) fn pages_in(chunks: Range<usize>, pages: usize) -> Range<usize> {
        chunks.start * CHUNK..(chunks.end * CHUNK).min(pages)
    }

    /// Chunks that have these pages.
    pub(super) fn chunks_of(pages: &Range<usize>) -> Range<usize> {
        pages.start / CHUNK..pages.end.div_ceil(CHUNK)
    }

    /// Runs of chunks whose log is the kernel's own; all that the others' log says is that it begins all set.
    pub(super) fn each_awake(&self, f: impl FnMut(Range<usize>)) {
        self.each_run(|chunk| chunk == Chunk::Awake, f);
    }

    fn each_run(&self, is: impl Fn(Chunk) -> bool, mut f: impl FnMut(Range<usize>)) {
        let mut at = 0;
        while let Some(first) = self.chunks[at..].iter().position(|c| is(*c)).map(|n| at + n) {
            at = first + self.chunks[first..].iter().take_while(|c| is(**c)).count();
            f(first..at);
        }
    }

    /// Whether no page of these exists, of the log.
    fn is_absent(&self, pages: &Range<usize>) -> bool {
        let of_block = self.first + pages.start..self.first + pages.end;
        self.presence.as_ref().is_some_and(|presence| presence.is_absent(of_block))
    }

    /// After the log was read: takes out what sleeps on, and wakes the others. All that a chunk's log says is then
    /// found, because nothing of it was ever cleared.
    pub(super) fn wake(&mut self, log: &mut [u64]) {
        let mut sleeping = Vec::new();
        self.each_run(|chunk| chunk == Chunk::Asleep, |run| sleeping.push(run));
        for run in sleeping {
            let together = self.pages_of(&run);
            if self.is_absent(&together) {
                words_of(log, &together).fill(0);
                continue;
            }
            for chunk in run {
                let pages = self.pages_of(&(chunk..chunk + 1));
                match self.is_absent(&pages) {
                    true => words_of(log, &pages).fill(0),
                    false => self.chunks[chunk] = Chunk::Awake,
                }
            }
        }
    }

    /// Before a chunk is cleared: whether it is left asleep instead. Never later than the first time: pages of it may be
    /// elsewhere with what they had before.
    pub(super) fn falls_asleep(&mut self, chunk: usize) -> bool {
        let pages = self.pages_of(&(chunk..chunk + 1));
        let asleep = self.chunks[chunk] == Chunk::Untouched && self.is_absent(&pages);
        self.chunks[chunk] = if asleep { Chunk::Asleep } else { Chunk::Awake };
        asleep
    }
}

/// The words of a log that have these pages, the first of which begins a word.
pub(super) fn words_of<'a>(log: &'a mut [u64], pages: &Range<usize>) -> &'a mut [u64] {
    &mut log[pages.start / WORD_BITS..pages.end.div_ceil(WORD_BITS)]
}
