//! Which pages of a block exist at all, so that what was never touched is not read.
//!
//! A page is called absent only where it certainly is, and therefore reads as zero at the moment it is asked for:
//! asking counts as reading. Whoever tracks writes clears a page's dirty bit before asking, or loses a write that
//! falls between the two. Every doubt, and every failure to find out, makes a page exist.

use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::survey::{Backing, Part, Survey};
use super::{Block, PAGE, index};
use crate::error::{Error, Result};
use crate::sys::pagemap::{self, Pagemap, Way};

/// Answers which pages of one block are absent. Many threads may ask at once.
#[derive(Debug)]
pub struct Presence {
    block: Arc<Block>,
    parts: Vec<Part>,
    tables: Option<Pagemap>,
    /// The tables as the older kernel interface tells them: it holds the lock of a huge page's entry while it looks,
    /// and so cannot find one gone that is just being moved.
    entries: Option<Pagemap>,
}

impl Presence {
    /// Proves what it can. `fd`: see [`Survey::parts`].
    pub fn new(block: &Arc<Block>, survey: &Survey, fd: Option<BorrowedFd<'_>>) -> Self {
        Self::with_tables(block, survey, fd, Pagemap::open().ok())
    }

    /// With a given way to ask the page tables, or none.
    pub fn with_tables(
        block: &Arc<Block>,
        survey: &Survey,
        fd: Option<BorrowedFd<'_>>,
        tables: Option<Pagemap>,
    ) -> Self {
        let parts = survey.parts(block, fd);
        let huge = tables.is_some() && parts.iter().any(|part| matches!(part.backing, Backing::PrivateHuge));
        let entries = huge.then(|| Pagemap::open_with(Way::Entries).ok()).flatten();
        Self { block: Arc::clone(block), parts, tables, entries }
    }

    /// What is known of the block: its parts, each with the reason.
    pub fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// Whether no page of the block can ever be called absent: asking is a waste of time.
    pub fn is_hopeless(&self) -> bool {
        self.parts.iter().all(|part| !self.is_proven(part))
    }

    fn is_proven(&self, part: &Part) -> bool {
        match part.backing {
            Backing::Private => self.tables.is_some(),
            Backing::PrivateHuge => self.entries.is_some(),
            Backing::Memory(_) => true,
            Backing::Unproven => false,
        }
    }

    /// Calls `f` with each range of `pages` that is absent, and so zero, now; ascending. Returns how many pages.
    ///
    /// Ask for a chunk just before reading it (a few MiB), after its dirty bits were cleared.
    pub fn each_absent(&self, pages: Range<usize>, mut f: impl FnMut(Range<usize>)) -> usize {
        let mut absent = 0;
        for part in self.parts_of(&pages) {
            let wanted = clip(&part.pages, &pages);
            let mut at = wanted.start;
            let mut give = |range: Range<usize>| {
                if range.start < range.end {
                    absent += range.len();
                    f(range);
                }
            };
            let result = self.existing(part, wanted.clone(), &mut |range: Range<usize>| {
                give(at..range.start.max(at));
                at = at.max(range.end);
            });
            if result.is_ok() {
                give(at..wanted.end.max(at));
            }
        }
        absent
    }

    /// Calls `f` with each range of `pages` that exists, or may; ascending. Returns how many pages.
    pub fn each_existing(&self, pages: Range<usize>, mut f: impl FnMut(Range<usize>)) -> usize {
        let (mut at, mut existing) = (pages.start, 0);
        let end = pages.end.min(self.block.pages());
        let mut give = |range: Range<usize>| {
            if range.start < range.end {
                existing += range.len();
                f(range);
            }
        };
        self.each_absent(pages, |range| {
            give(at..range.start);
            at = range.end;
        });
        give(at..end);
        existing
    }

    /// Whether all of `pages` are absent, and so zero, now; as [`each_absent`](Self::each_absent), but looks no further
    /// than the first page that exists.
    pub fn is_absent(&self, pages: Range<usize>) -> bool {
        let host = |page: usize| self.block.host_address(0) + page as u64 * PAGE;
        let mut proven = 0;
        for part in self.parts_of(&pages) {
            let wanted = clip(&part.pages, &pages);
            if wanted.is_empty() {
                continue;
            }
            let (tables, swapped) = match (&part.backing, &self.tables, &self.entries) {
                (Backing::Private, Some(tables), _) => (Some(tables), true),
                (Backing::PrivateHuge, _, Some(entries)) => (Some(entries), true),
                (Backing::Memory(_), tables, _) => (tables.as_ref(), false),
                _ => return false,
            };
            let shown = tables.map_or(Ok(false), |t| t.any(host(wanted.start)..host(wanted.end), swapped));
            if !matches!(shown, Ok(false)) {
                return false;
            }
            if let Backing::Memory(file) = &part.backing {
                if !matches!(is_hole(file, part, &wanted), Ok(true)) {
                    return false;
                }
            }
            proven += wanted.len();
        }
        proven == pages.len()
    }

    /// How much of each granule exists: what the source tells the destination to prepare.
    ///
    /// A hint may be wrong: what is unproven counts as far as our page tables show it.
    pub fn hint(&self) -> Result<Hint> {
        let mut hint = Hint::new(self.block.pages())?;
        for part in &self.parts {
            let mut add = |range| hint.add(range);
            if self.is_proven(part) {
                // A failure on the way only shortens the hint.
                let _ = self.existing(part, part.pages.clone(), &mut add);
            } else if let Some(tables) = &self.tables {
                let _ = self.in_tables(tables, true, part.pages.clone(), &mut add);
            }
        }
        Ok(hint)
    }

    fn parts_of(&self, pages: &Range<usize>) -> impl Iterator<Item = &Part> {
        let first = self.parts.partition_point(|part| part.pages.end <= pages.start);
        let end = pages.end;
        self.parts[first..].iter().take_while(move |part| part.pages.start < end)
    }

    /// Existing pages of one part, ascending. On failure, everything after the last range given is unknown.
    fn existing(&self, part: &Part, pages: Range<usize>, f: &mut dyn FnMut(Range<usize>)) -> Result<()> {
        match (&part.backing, &self.tables, &self.entries) {
            (Backing::Private, Some(tables), _) => self.in_tables(tables, true, pages, f),
            (Backing::PrivateHuge, _, Some(entries)) => self.in_tables(entries, true, pages, f),
            (Backing::Memory(file), tables, _) => {
                let mut at = pages.start;
                let mut result = Ok(());
                if let Some(tables) = tables {
                    // What our tables have is in the file. Looked at first because the kernel tells a run in one go.
                    let shown = self.in_tables(tables, false, pages.clone(), &mut |range| {
                        if result.is_ok() {
                            result = in_file(file, part, at..range.start, f);
                        }
                        if result.is_ok() {
                            f(range.clone());
                        }
                        at = range.end;
                    });
                    result.and(shown)?;
                }
                in_file(file, part, at..pages.end, f)
            }
            _ => Err(Error::new(libc::EOPNOTSUPP, part.reason.clone())),
        }
    }

    fn in_tables(
        &self,
        tables: &Pagemap,
        swapped: bool,
        pages: Range<usize>,
        f: &mut dyn FnMut(Range<usize>),
    ) -> Result<()> {
        let host = self.block.host_address(0);
        let range = host + pages.start as u64 * PAGE..host + pages.end as u64 * PAGE;
        tables.each(range, swapped, &mut |found| {
            // Of a huge page that reaches beyond what was asked for, only what was asked for.
            let first = index(found.start.saturating_sub(host) / PAGE);
            f(clip(&(first..index((found.end - host) / PAGE)), &pages));
        })
    }
}

/// Pages a file has, one by one: only those that somebody else put there come this far.
fn in_file(file: &std::fs::File, part: &Part, pages: Range<usize>, f: &mut dyn FnMut(Range<usize>)) -> Result<()> {
    let mut at = pages.start;
    while at < pages.end {
        let from = part.offset + (at - part.pages.start) as u64 * PAGE;
        let Some(found) = pagemap::next_data(file, from)? else {
            return beyond_end(file, part, at..pages.end, f);
        };
        let page = part.pages.start + index((found - part.offset) / PAGE);
        if page >= pages.end {
            break;
        }
        f(page..page + 1);
        at = page + 1;
    }
    Ok(())
}

/// Whether the file has none of the pages.
fn is_hole(file: &std::fs::File, part: &Part, pages: &Range<usize>) -> Result<bool> {
    let byte = |page: usize| part.offset + (page - part.pages.start) as u64 * PAGE;
    match pagemap::next_data(file, byte(pages.start))? {
        Some(found) => Ok(found >= byte(pages.end)),
        None => {
            let mut beyond = false;
            beyond_end(file, part, pages.clone(), &mut |_| beyond = true)?;
            Ok(!beyond)
        }
    }
}

/// A page past the end of its file is not zero: it cannot be read at all, and the reader shall learn that.
fn beyond_end(file: &std::fs::File, part: &Part, pages: Range<usize>, f: &mut dyn FnMut(Range<usize>)) -> Result<()> {
    let len = file.metadata().map_err(|e| Error::from_io("a guest RAM file", &e))?.len();
    let last = part.pages.start + index(len.saturating_sub(part.offset) / PAGE);
    if last < pages.end {
        f(last.max(pages.start)..pages.end);
    }
    Ok(())
}

fn clip(range: &Range<usize>, to: &Range<usize>) -> Range<usize> {
    range.start.max(to.start)..range.end.min(to.end)
}

/// Pages of a granule.
pub const GRANULE: usize = 512;
/// Bytes of a granule: a huge page of x86-64.
pub const GRANULE_BYTES: u64 = GRANULE as u64 * PAGE;

/// How many pages of each granule (2 MiB of a block) have content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hint {
    pages: usize,
    counts: Vec<u16>,
}

impl Hint {
    /// No content anywhere, for a block of `pages` pages.
    pub fn new(pages: usize) -> Result<Self> {
        let granules = pages.div_ceil(GRANULE);
        let mut counts = Vec::new();
        counts.try_reserve_exact(granules).map_err(|_| Error::no_memory("a content hint", granules as u64 * 2))?;
        counts.resize(granules, 0);
        Ok(Self { pages, counts })
    }

    /// Adds pages that have content, each once.
    pub fn add(&mut self, range: Range<usize>) {
        let mut at = range.start;
        let end = range.end.min(self.pages);
        while at < end {
            let stop = end.min((at / GRANULE + 1) * GRANULE);
            let granule = at / GRANULE;
            let more = u16::try_from(stop - at).unwrap_or(u16::MAX);
            self.set(granule, self.counts[granule].saturating_add(more));
            at = stop;
        }
    }

    /// Sets a granule's count, as far as it has so many pages; granules that do not exist are ignored.
    pub fn set(&mut self, granule: usize, count: u16) {
        let most = u16::try_from(self.granule_pages(granule)).unwrap_or(u16::MAX);
        if let Some(place) = self.counts.get_mut(granule) {
            *place = count.min(most);
        }
    }

    /// Pages with content, of each granule.
    pub fn counts(&self) -> &[u16] {
        &self.counts
    }

    /// Of each granule, whether all its pages have content.
    pub fn full(&self) -> impl Iterator<Item = bool> {
        self.counts.iter().enumerate().map(|(granule, count)| usize::from(*count) == self.granule_pages(granule))
    }

    /// Pages with content.
    pub fn content(&self) -> usize {
        self.counts.iter().map(|n| usize::from(*n)).sum()
    }

    /// Pages a granule has: the last one may be short.
    pub fn granule_pages(&self, granule: usize) -> usize {
        self.pages.saturating_sub(granule * GRANULE).min(GRANULE)
    }
}
