//! The page loop: takes dirty pages and sends them, as packets on the lanes or as records of the plain stream.

use std::sync::Arc;

use crate::dirty::cursor::{Cursor, Run};
use crate::dirty::hub::Hub;
use crate::dirty::set::DirtySet;
use crate::error::Result;
use crate::ram::PAGE;
use crate::ram::presence::Presence;
use crate::ram::survey::Survey;
use crate::sys::io::{IOV_MAX, Piece};
use crate::transport::stream::StreamOutput;
use crate::wire::packet::PAGES_MAX;
use crate::wire::ram;
use crate::wire::stream::{self, SectionName};

use super::lanes::Lanes;

const RAM_ID: u32 = 1;
/// Pages per vectored write of the plain stream: a record's head and its page are two pieces.
const BATCH: usize = IOV_MAX / 2;

/// Who looks for pages of zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FindZeros {
    /// Nobody.
    Nobody,
    /// The migration thread: zero pages are records of the main stream.
    Here,
    /// The lanes.
    Lanes,
}

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

/// Pages of the run at hand that do not exist, and so are zero without a look.
#[derive(Debug, Default)]
struct Absent {
    first: usize,
    pages: Vec<bool>,
}

impl Absent {
    /// Asks the kernel. The run's dirty bits were taken before, for asking counts as reading.
    fn find(&mut self, presence: &[Presence], run: &Run) {
        self.first = run.first;
        self.pages.clear();
        let Some(presence) = presence.get(run.block).filter(|p| !p.is_hopeless()) else { return };
        self.pages.resize(run.pages, false);
        presence.each_absent(run.first..run.first + run.pages, |range| {
            self.pages[range.start - run.first..range.end - run.first].fill(true);
        });
    }

    fn contains(&self, page: usize) -> bool {
        self.pages.get(page - self.first).is_some_and(|absent| *absent)
    }
}

/// Sends pages; remembers where it was.
#[derive(Debug)]
pub(super) struct RamSender {
    find_zeros: FindZeros,
    lanes: Option<Lanes>,
    /// All lanes meet at the end of each section (as QEMU did before 8.1), not at a mark once a round.
    meet_each_section: bool,
    cursor: Cursor,
    /// In the first round: which pages of each block exist at all. Later everything that is dirty does.
    presence: Vec<Presence>,
    absent: Absent,
    /// Block of the last record: the next one of the same block needs no name.
    last: Option<usize>,
    /// Records without their pages, of one batch.
    heads: Vec<u8>,
    /// Heads and pages in stream order, of one batch.
    order: Vec<Next>,
    normal: u64,
    zero: u64,
    #[cfg(feature = "fault-injection")]
    fault: Arc<super::fault::LostPage>,
}

impl RamSender {
    pub(super) fn new(find_zeros: FindZeros, meet_each_section: bool) -> Self {
        let heads = Vec::with_capacity(BATCH * ram::RECORD_MAX / 4);
        let order = Vec::with_capacity(2 * BATCH);
        Self {
            find_zeros,
            lanes: None,
            meet_each_section,
            cursor: Cursor::default(),
            presence: Vec::new(),
            absent: Absent::default(),
            last: None,
            heads,
            order,
            normal: 0,
            zero: 0,
            #[cfg(feature = "fault-injection")]
            fault: Arc::default(),
        }
    }

    /// Pages go over these lanes from now on.
    pub(super) fn use_lanes(&mut self, lanes: Lanes) {
        #[cfg(feature = "fault-injection")]
        lanes.watch(&self.fault);
        self.lanes = Some(lanes);
    }

    /// Whether a lane broke: the destination may know why.
    pub(super) fn is_broken(&self) -> bool {
        self.lanes.as_ref().is_some_and(Lanes::are_broken)
    }

    /// Ends the lanes.
    pub(super) fn close(&mut self) {
        if let Some(lanes) = &mut self.lanes {
            lanes.close();
        }
    }

    /// Bytes written on the lanes, pages sent whole, pages sent as zero.
    pub(super) fn counts(&self) -> (u64, u64, u64) {
        let (written, normal, zero) = self.lanes.as_ref().map_or((0, 0, 0), Lanes::counts);
        (written, self.normal + normal, self.zero + zero)
    }

    /// A new round: from the start.
    pub(super) fn new_round(&mut self) {
        self.cursor = Cursor::default();
        self.presence = Vec::new();
    }

    /// The START section. The first meeting comes before any page.
    pub(super) fn setup(&mut self, set: &DirtySet, out: &mut StreamOutput) -> Result<()> {
        if self.find_zeros != FindZeros::Nobody
            && let Ok(survey) = Survey::new()
        {
            self.presence = set.blocks().map(|block| Presence::new(block, &survey, None)).collect();
        }
        let mut bytes = Vec::new();
        let name = SectionName { name: ram::NAME.to_owned(), instance: 0, version: ram::VERSION };
        stream::put_start(&mut bytes, RAM_ID, &name)?;
        ram::put_setup(&mut bytes, set.blocks().map(|b| (b.name(), b.len())))?;
        out.write(&bytes)?;
        self.end_section(out, true)
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

    /// Ends a section; with `meet` all lanes meet first, so that what was sent before it has arrived before what
    /// follows is read.
    pub(super) fn end_section(&mut self, out: &mut StreamOutput, meet: bool) -> Result<()> {
        let mut bytes = Vec::new();
        if let Some(lanes) = &self.lanes
            && (meet || self.meet_each_section)
        {
            lanes.meet()?;
            if !self.meet_each_section {
                ram::put_flush(&mut bytes);
            }
        }
        ram::put_end(&mut bytes);
        stream::put_footer(&mut bytes, RAM_ID);
        out.write(&bytes)
    }

    /// Sends one batch of at most about `most` pages, and at least one. False: no page is dirty.
    pub(super) fn send_batch(
        &mut self,
        set: &DirtySet,
        hub: &Hub,
        out: &mut StreamOutput,
        most: u64,
    ) -> Result<bool> {
        let most = usize::try_from(most).unwrap_or(BATCH).clamp(1, BATCH);
        match self.lanes.is_some() {
            true => self.send_packet(set, hub, out, most.min(PAGES_MAX)),
            false => self.send_records(set, hub, out, most),
        }
    }

    /// A packet's worth of pages, all of one block, to the lanes.
    fn send_packet(&mut self, set: &DirtySet, hub: &Hub, out: &mut StreamOutput, most: usize) -> Result<bool> {
        let Some(lanes) = &self.lanes else { return Ok(false) };
        let mut batch = lanes.empty_batch()?;
        self.heads.clear();
        let mut taken = 0;
        let mut more = self.cursor.take(set, hub, most)?;
        while more {
            for run in self.cursor.runs() {
                self.absent.find(&self.presence, run);
                let block = set.block(run.block);
                for page in run.first..run.first + run.pages {
                    let absent = self.absent.contains(page);
                    if absent && self.find_zeros == FindZeros::Lanes {
                        batch.zeros.push(page);
                    } else if self.find_zeros == FindZeros::Here && (absent || block.is_zero(page)) {
                        let name = (self.last != Some(run.block)).then(|| block.name());
                        self.last = Some(run.block);
                        ram::put_zero(&mut self.heads, name, page as u64 * PAGE)?;
                        self.zero += 1;
                    } else {
                        batch.pages.push(page);
                    }
                }
                batch.block = Some(Arc::clone(block));
                taken += run.pages;
            }
            // Absent pages weigh nothing.
            let room = most.saturating_sub(batch.pages.len()).min(PAGES_MAX - taken);
            more = room > 0 && self.cursor.take_here(set, hub, room)?;
        }
        lanes.send(batch);
        out.write(&self.heads)?;
        Ok(taken > 0)
    }

    /// Records of the plain stream in one vectored write.
    fn send_records(&mut self, set: &DirtySet, hub: &Hub, out: &mut StreamOutput, most: usize) -> Result<bool> {
        self.heads.clear();
        self.order.clear();
        let mut room = most;
        while room > 0 && self.cursor.take(set, hub, room)? {
            for index in 0..self.cursor.runs().len() {
                let run = self.cursor.runs()[index];
                self.absent.find(&self.presence, &run);
                for page in run.first..run.first + run.pages {
                    self.add_record(set, run.block, page)?;
                }
                room -= run.pages;
            }
        }
        self.write_records(set, out)?;
        #[cfg(feature = "fault-injection")]
        for (block, page) in self.order.iter().filter_map(Next::page) {
            self.fault.sent(set.block(block), &[page]);
        }
        Ok(room < most)
    }

    /// Adds a page to the batch of records.
    fn add_record(&mut self, set: &DirtySet, index: usize, page: usize) -> Result<()> {
        let block = set.block(index);
        let name = (self.last != Some(index)).then(|| block.name());
        self.last = Some(index);
        let offset = page as u64 * PAGE;
        let start = self.heads.len();
        if self.find_zeros != FindZeros::Nobody && (self.absent.contains(page) || block.is_zero(page)) {
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

    fn write_records(&self, set: &DirtySet, out: &mut StreamOutput) -> Result<()> {
        let piece = |next: &Next| match *next {
            Next::Head { start, end } => Piece::of(&self.heads[start..end]),
            Next::Page { block, page } => set.block(block).piece(page, 1),
        };
        let mut pieces: Vec<Piece<'_>> = self.order.iter().map(piece).collect();
        out.write_pieces(&mut pieces)
    }

    /// Test builds only: forgets a page that was dirtied since it was sent.
    #[cfg(feature = "fault-injection")]
    pub(super) fn lose_a_page(&mut self, set: &DirtySet, hub: &Hub) -> Result<()> {
        self.fault.lose(set, hub)
    }
}
