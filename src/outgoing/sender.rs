//! The page loop: takes dirty pages, and writes them as records of the plain stream.

use std::sync::Arc;

use crate::dirty::hub::Hub;
use crate::dirty::set::DirtySet;
use crate::error::Result;
use crate::ram::PAGE;
use crate::sys::io::{IOV_MAX, Piece};
use crate::transport::stream::StreamOutput;
use crate::wire::ram;
use crate::wire::stream::{self, SectionName};

const RAM_ID: u32 = 1;
/// Pages per vectored write: a record's head and its page are two pieces.
const BATCH: usize = IOV_MAX / 2;
/// Bytes of a page on the wire, roughly: what a budget is divided by.
const PAGE_ON_WIRE: u64 = PAGE + 8;

/// What goes out next: bytes of the head buffer, or a page.
#[derive(Clone, Copy, Debug)]
enum Next {
    Head { start: usize, end: usize },
    Page { block: usize, page: usize },
}

#[cfg(feature = "fault-injection")]
impl Next {
    fn page(&self) -> Option<(usize, usize)> {
        match *self {
            Next::Page { block, page } => Some((block, page)),
            Next::Head { .. } => None,
        }
    }
}

/// Sends pages; remembers where it was.
#[derive(Debug)]
pub(super) struct RamSender {
    find_zeros: bool,
    block: usize,
    page: usize,
    /// Block of the last record: the next one of the same block needs no name.
    last: Option<usize>,
    /// Records without their pages, of one batch.
    heads: Vec<u8>,
    /// Heads and pages in stream order, of one batch.
    order: Vec<Next>,
    normal: u64,
    zero: u64,
    #[cfg(feature = "fault-injection")]
    fault: super::fault::LostPage,
}

impl RamSender {
    pub(super) fn new(find_zeros: bool) -> Self {
        let heads = Vec::with_capacity(BATCH * ram::RECORD_MAX / 4);
        let order = Vec::with_capacity(2 * BATCH);
        Self {
            find_zeros,
            block: 0,
            page: 0,
            last: None,
            heads,
            order,
            normal: 0,
            zero: 0,
            #[cfg(feature = "fault-injection")]
            fault: super::fault::LostPage::default(),
        }
    }

    /// Pages sent whole.
    pub(super) fn normal_pages(&self) -> u64 {
        self.normal
    }

    /// Pages sent as zero.
    pub(super) fn zero_pages(&self) -> u64 {
        self.zero
    }

    /// A new set: from the start.
    pub(super) fn begin(&mut self, _set: &Arc<DirtySet>) {
        (self.block, self.page, self.last) = (0, 0, None);
    }

    /// A new round: from the start.
    pub(super) fn new_round(&mut self) {
        (self.block, self.page) = (0, 0);
    }

    /// The START section.
    pub(super) fn put_setup(&self, set: &DirtySet, out: &mut Vec<u8>) -> Result<()> {
        let name = SectionName { name: ram::NAME.to_owned(), instance: 0, version: ram::VERSION };
        stream::put_start(out, RAM_ID, &name)?;
        ram::put_setup(out, set.blocks().map(|b| (b.name(), b.len())))?;
        ram::put_end(out);
        stream::put_footer(out, RAM_ID);
        Ok(())
    }

    /// Begins a PART section.
    pub(super) fn begin_part(&self, out: &mut StreamOutput) -> Result<()> {
        let mut bytes = Vec::new();
        stream::put_part(&mut bytes, RAM_ID);
        out.write(&bytes)
    }

    /// Begins the END section.
    pub(super) fn begin_end(&mut self, out: &mut StreamOutput) -> Result<()> {
        let mut bytes = Vec::new();
        stream::put_end(&mut bytes, RAM_ID);
        out.write(&bytes)
    }

    /// Ends a PART or END section.
    pub(super) fn end_part(&self, out: &mut StreamOutput) -> Result<()> {
        let mut bytes = Vec::new();
        ram::put_end(&mut bytes);
        stream::put_footer(&mut bytes, RAM_ID);
        out.write(&bytes)
    }

    /// Sends one batch of about `budget` bytes at most. False: no page is dirty.
    pub(super) fn send_batch(
        &mut self,
        set: &DirtySet,
        hub: &Hub,
        out: &mut StreamOutput,
        budget: u64,
    ) -> Result<bool> {
        let most = usize::try_from(budget.div_ceil(PAGE_ON_WIRE)).unwrap_or(BATCH).clamp(1, BATCH);
        self.heads.clear();
        self.order.clear();
        let mut room = most;
        while room > 0 {
            let Some((index, first, pages)) = self.next_run(set, room) else { break };
            let block = set.block(index);
            // The kernel's bit and ours are gone before a byte is read: a write from here on is found again.
            hub.clear(block, first..first + pages)?;
            set.take(index, first, pages);
            for page in first..first + pages {
                self.add(set, index, page)?;
            }
            room -= pages;
        }
        if room == most {
            return Ok(false);
        }
        self.write(set, out)?;
        #[cfg(feature = "fault-injection")]
        self.fault.sent(set, self.order.iter().filter_map(Next::page));
        Ok(true)
    }

    /// Test builds only: forgets a page that was dirtied since it was sent.
    #[cfg(feature = "fault-injection")]
    pub(super) fn lose_a_page(&mut self, set: &DirtySet, hub: &Hub) -> Result<()> {
        self.fault.lose(set, hub)
    }

    /// The next dirty run, going round all blocks once.
    fn next_run(&mut self, set: &DirtySet, max: usize) -> Option<(usize, usize, usize)> {
        if set.pages() == 0 {
            return None;
        }
        for _ in 0..=set.len() {
            if self.block >= set.len() {
                (self.block, self.page) = (0, 0);
            }
            if let Some((first, pages)) = set.next_run(self.block, self.page, max) {
                self.page = first + pages;
                return Some((self.block, first, pages));
            }
            (self.block, self.page) = (self.block + 1, 0);
        }
        None
    }

    /// Adds a page to the batch.
    fn add(&mut self, set: &DirtySet, index: usize, page: usize) -> Result<()> {
        let block = set.block(index);
        let name = (self.last != Some(index)).then(|| block.name());
        self.last = Some(index);
        let offset = page as u64 * PAGE;
        let start = self.heads.len();
        if self.find_zeros && block.is_zero(page) {
            ram::put_zero(&mut self.heads, name, offset)?;
            self.zero += 1;
            self.extend_head(start);
        } else {
            ram::put_page(&mut self.heads, name, offset)?;
            self.normal += 1;
            self.extend_head(start);
            self.order.push(Next::Page { block: index, page });
        }
        Ok(())
    }

    /// Heads that follow each other are one piece.
    fn extend_head(&mut self, start: usize) {
        let now = self.heads.len();
        match self.order.last_mut() {
            Some(Next::Head { end, .. }) if *end == start => *end = now,
            _ => self.order.push(Next::Head { start, end: now }),
        }
    }

    fn write(&self, set: &DirtySet, out: &mut StreamOutput) -> Result<()> {
        let piece = |next: &Next| match *next {
            Next::Head { start, end } => Piece::of(&self.heads[start..end]),
            Next::Page { block, page } => set.block(block).piece(page, 1),
        };
        let mut pieces: Vec<Piece<'_>> = self.order.iter().map(piece).collect();
        out.write_pieces(&mut pieces)
    }
}
