//! Write protection without KVM: the kernel protects pages asynchronously (userfaultfd) and tells which were written since
//! (`PAGEMAP_SCAN`). Nobody answers faults: the first write to a protected page ends its protection and goes on.
//!
//! Nothing is protected when tracking begins, so everything counts as written; a chunk is protected when its pages are about
//! to be read. What was written between the last sync and that moment is kept for the next sync (`seen`), because no reader
//! has been told of it. It is writes through this process's mapping that are seen: by its threads, its vCPUs, and the kernel
//! on its behalf.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use super::nap::{CHUNK, Naps, words_of};
use super::{Found, Kind, Tracker};
use crate::bitmap::WORD_BITS;
use crate::error::{Error, Result, strerror};
use crate::ram::presence::Presence;
use crate::ram::survey::{Backing, Part, Survey};
use crate::ram::{Block, PAGE, RamList};
use crate::sys::memory;
use crate::sys::pagemap::{Look, Pagemap, Way};
use crate::sys::userfaultfd::Guarded;
use crate::thread::lock;

/// Bytes one call into the kernel looks at: it holds a lock of our address space meanwhile.
const STEP: u64 = 256 << 20;
/// Bytes whose protection is ended by one call: all faults wait for it.
const END_STEP: u64 = CHUNK as u64 * PAGE;

/// Tracks any memory of this process.
#[derive(Debug)]
pub struct WriteProtect {
    running: Mutex<Option<Running>>,
}

#[derive(Debug)]
struct Running {
    guarded: Guarded,
    tables: Pagemap,
    blocks: Vec<Watched>,
}

/// A piece of a block that is one mapping.
#[derive(Debug)]
struct Piece {
    /// Host addresses, extended to whole pages of the mapping.
    range: Range<u64>,
    /// Size of these pages.
    page: u64,
    /// Private anonymous memory of small pages: what is in no table was never written, or was thrown away. In a file a
    /// page may have been written and be in no table since, so there the tables keep a mark for it.
    private: bool,
}

impl Piece {
    fn of(block: &Block, part: &Part) -> Result<Self> {
        let host = |page: usize| block.host_address(page as u64 * PAGE);
        let range = host(part.pages.start)..host(part.pages.end);
        if part.mapping.is_none() {
            return Err(block.gone(&part.pages));
        }
        let private = matches!(part.backing, Backing::Private);
        let page = if private { PAGE } else { memory::page_size_at(range.start).unwrap_or(0) };
        if !page.is_power_of_two() || page < PAGE {
            let name = block.name();
            let text = format!("the kernel does not say which size the pages of RAM block '{name}' have");
            return Err(Error::new(libc::EOPNOTSUPP, text));
        }
        Ok(Self { range: range.start & !(page - 1)..range.end.next_multiple_of(page), page, private })
    }

    /// What of `range` lies in the piece, in whole pages of it.
    fn within(&self, range: &Range<u64>) -> Range<u64> {
        let start = range.start.max(self.range.start) & !(self.page - 1);
        let end = range.end.min(self.range.end).next_multiple_of(self.page);
        start..end.max(start)
    }

    fn look(&self, protect: bool) -> Look {
        // Without protecting, the kernel looks at a huge page (hugetlb) without a lock, and may miss one that is just being
        // moved.
        Look { protect: protect || self.page > PAGE, absent: !self.private }
    }
}

/// A block and its log.
#[derive(Debug)]
struct Watched {
    block: Arc<Block>,
    pieces: Vec<Piece>,
    /// What the last sync told and nobody cleared since.
    told: Vec<u64>,
    /// What was found written when its chunk was protected, and nobody was told of.
    seen: Vec<u64>,
    naps: Naps,
}

impl Watched {
    fn new(block: &Arc<Block>, survey: &Survey) -> Result<Self> {
        let words = block.pages().div_ceil(WORD_BITS);
        let zeros = || {
            let mut zeros = Vec::new();
            zeros.try_reserve_exact(words).map_err(|_| Error::no_memory("a dirty log", words as u64 * 8))?;
            zeros.resize(words, 0u64);
            Ok(zeros)
        };
        let parts = survey.parts(block, None);
        let pieces = parts.iter().map(|part| Piece::of(block, part)).collect::<Result<_>>()?;
        let mut naps = Naps::new(0, block.pages())?;
        naps.begin(Some(Presence::new(block, survey, None)));
        Ok(Self { block: Arc::clone(block), pieces, told: zeros()?, seen: zeros()?, naps })
    }

    fn addresses(&self, pages: &Range<usize>) -> Range<u64> {
        self.block.host_address(pages.start as u64 * PAGE)..self.block.host_address(pages.end as u64 * PAGE)
    }

    /// Asks the kernel about `pages`: calls `f` with the block's pages that were written, and with more of the same huge
    /// pages. On failure `f` was called with all of `pages`: what the kernel protected before it failed is not lost.
    fn each_written(
        &self,
        tables: &Pagemap,
        pages: &Range<usize>,
        protect: bool,
        f: &mut dyn FnMut(Range<usize>),
    ) -> Result<()> {
        let (start, asked) = (self.block.host_address(0), self.addresses(pages));
        for piece in self.pieces.iter().filter(|p| p.range.start < asked.end && asked.start < p.range.end) {
            let range = piece.within(&asked);
            let done = tables.each_written(&range, STEP.max(piece.page), piece.look(protect), &mut |found| {
                let first = found.start.saturating_sub(start) / PAGE;
                let end = (found.end.saturating_sub(start) / PAGE).min(self.block.pages() as u64);
                f(usize::try_from(first).unwrap_or(usize::MAX)..usize::try_from(end).unwrap_or(0));
            });
            if let Err(error) = done {
                f(pages.clone());
                return Err(self.failed(&range, &error));
            }
        }
        Ok(())
    }

    fn failed(&self, range: &Range<u64>, error: &io::Error) -> Error {
        let name = self.block.name();
        let errno = error.raw_os_error().unwrap_or(libc::EIO);
        let offset = range.start.saturating_sub(self.block.host_address(0));
        let text = match errno {
            libc::EPERM => format!(
                "the memory of RAM block '{name}' at or after offset {offset:#x} was replaced by another mapping while \
                 writes to it were tracked: remove the block before its memory changes"
            ),
            _ => format!("looking for writes to RAM block '{name}' at {offset:#x}: {}", strerror(errno)),
        };
        Error::new(errno, text).in_section("ram")
    }

    /// Tells everything written since it was cleared.
    fn sync(&mut self, tables: &Pagemap, found: &mut Found<'_>) -> Result<()> {
        let pages = self.block.pages();
        // For the kernel a hole was never written.
        self.block.check_mapped(&(0..pages))?;
        let mut told = std::mem::take(&mut self.told);
        for (told, seen) in told.iter_mut().zip(&mut self.seen) {
            *told |= std::mem::take(seen);
        }
        let mut next = 0;
        let mut result = Ok(());
        self.naps.each_awake(|chunks| {
            // What was never cleared, and so never protected, was written for all we know.
            set(&mut told, &self.naps.pages_of(&(next..chunks.start)));
            next = chunks.end;
            let asked = self.naps.pages_of(&chunks);
            let done = self.each_written(tables, &asked, false, &mut |found| set(&mut told, &found));
            result = std::mem::replace(&mut result, Ok(())).and(done);
        });
        set(&mut told, &(next * CHUNK..pages));
        self.naps.wake(&mut told);
        found(&self.block, 0, &told);
        self.told = told;
        result
    }

    /// Protects every chunk that `pages` touches and of which something was told.
    fn clear(&mut self, tables: &Pagemap, pages: &Range<usize>) -> Result<()> {
        for chunk in Naps::chunks_of(pages) {
            let pages = self.naps.pages_of(&(chunk..chunk + 1));
            if words_of(&mut self.told, &pages).iter().all(|w| *w == 0) {
                continue;
            }
            self.block.check_mapped(&pages)?;
            if !self.naps.falls_asleep(chunk) {
                let mut seen = std::mem::take(&mut self.seen);
                let told = &self.told;
                let done = self.each_written(tables, &pages, true, &mut |found| {
                    found.for_each(|page| {
                        let bit = 1 << (page % WORD_BITS);
                        if told[page / WORD_BITS] & bit == 0 {
                            seen[page / WORD_BITS] |= bit;
                        }
                    });
                });
                self.seen = seen;
                done?;
            }
            words_of(&mut self.told, &pages).fill(0);
        }
        Ok(())
    }
}

/// Sets the bits of `pages`.
fn set(words: &mut [u64], pages: &Range<usize>) {
    let mut at = pages.start;
    while at < pages.end {
        let (word, bit) = (at / WORD_BITS, at % WORD_BITS);
        let count = (WORD_BITS - bit).min(pages.end - at);
        words[word] |= (u64::MAX >> (WORD_BITS - count)) << bit;
        at += count;
    }
}

impl WriteProtect {
    /// Tries whether this kernel can do it, on a page of our own. The error says what it lacks.
    pub fn new() -> Result<Self> {
        let (guarded, tables) = (Guarded::new()?, tables()?);
        let trial = memory::OwnPage::new(true)?;
        let works = || {
            guarded.add(&trial.range())?;
            let look = |protect| {
                let mut found = 0;
                let look = Look { protect, absent: false };
                tables.each_written(&trial.range(), STEP, look, &mut |range| found += range.end - range.start)?;
                io::Result::Ok(found)
            };
            trial.write();
            let before = look(true)?;
            let protected = look(false)?;
            trial.write();
            io::Result::Ok((before, protected, look(false)?))
        };
        let got = works().map_err(|e| Error::from_io("write-protecting a page", &e))?;
        if got != (PAGE, 0, PAGE) {
            let text = "this kernel's asynchronous write protection does not tell what was written";
            return Err(
                Error::new(libc::EOPNOTSUPP, text).expected_got(format!("{:?}", (PAGE, 0, PAGE)), format!("{got:?}"))
            );
        }
        Ok(Self { running: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, Option<Running>> {
        lock(&self.running)
    }
}

fn tables() -> Result<Pagemap> {
    Pagemap::open_with(Way::Scan).map_err(|e| {
        let text = "this kernel has no PAGEMAP_SCAN: Linux 6.7 or later is needed";
        if e.errno() == libc::ENOTTY { Error::new(libc::EOPNOTSUPP, text) } else { e }
    })
}

/// Refuses two blocks in one huge page: what one is cleared of would be lost for the other.
fn check_apart(blocks: &[Watched]) -> Result<()> {
    for (i, watched) in blocks.iter().enumerate() {
        for other in &blocks[i + 1..] {
            let near =
                |a: &&Piece| other.pieces.iter().any(|b| a.range.start < b.range.end && b.range.start < a.range.end);
            if let Some(piece) = watched.pieces.iter().find(near) {
                let text = format!(
                    "RAM blocks '{}' and '{}' share a huge page of {} KiB, which cannot be write-protected for one alone",
                    watched.block.name(),
                    other.block.name(),
                    piece.page / 1024
                );
                return Err(Error::invalid(text).in_section("ram"));
            }
        }
    }
    Ok(())
}

impl Running {
    fn new(list: &RamList) -> Result<Self> {
        let survey = Survey::new()?;
        let sent = list.iter().filter(|b| b.is_sent());
        let blocks = sent.map(|block| Watched::new(block, &survey)).collect::<Result<Vec<_>>>()?;
        check_apart(&blocks)?;
        let running = Self { guarded: Guarded::new()?, tables: tables()?, blocks };
        for watched in &running.blocks {
            for piece in &watched.pieces {
                running.guarded.add(&piece.range).map_err(|e| {
                    let name = watched.block.name();
                    let why = match e.raw_os_error() {
                        Some(libc::EBUSY) => {
                            "it is registered with another userfaultfd, and memory can have but one".to_owned()
                        }
                        _ => e.to_string(),
                    };
                    let errno = e.raw_os_error().unwrap_or(libc::EIO);
                    Error::new(errno, format!("RAM block '{name}' cannot be write-protected: {why}"))
                        .in_section("ram")
                })?;
            }
        }
        Ok(running)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Bit by bit: to end it all at once would hold every fault of the process for the whole of guest memory.
        for piece in self.blocks.iter().flat_map(|watched| &watched.pieces) {
            let mut at = piece.range.start;
            while at < piece.range.end {
                let end = piece.range.end.min(at + END_STEP.max(piece.page));
                self.guarded.remove(&(at..end));
                at = end;
            }
        }
    }
}

impl Tracker for WriteProtect {
    fn kind(&self) -> Kind {
        Kind::WriteProtect
    }

    fn start(&self, list: &RamList) -> Result<()> {
        *self.lock() = Some(Running::new(list)?);
        Ok(())
    }

    fn stop(&self) {
        *self.lock() = None;
    }

    fn sync(&self, found: &mut Found<'_>) -> Result<()> {
        let mut running = self.lock();
        let Some(Running { tables, blocks, .. }) = &mut *running else { return Ok(()) };
        blocks.iter_mut().try_for_each(|watched| watched.sync(tables, found))
    }

    fn clear(&self, block: &Block, pages: Range<usize>) -> Result<()> {
        let mut running = self.lock();
        let Some(Running { tables, blocks, .. }) = &mut *running else { return Ok(()) };
        let watched = blocks.iter_mut().filter(|watched| std::ptr::eq(&*watched.block, block));
        watched.into_iter().try_for_each(|watched| watched.clear(tables, &pages))
    }

    fn covers(&self, block: &Block) -> Vec<Range<usize>> {
        std::iter::once(0..block.pages()).collect()
    }
}
