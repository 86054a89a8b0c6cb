//! The page loop: takes dirty pages and sends them, as packets on the lanes or as records of the plain stream.

use std::sync::Arc;

use crate::dirty::sent::Sent;
use crate::dirty::set::DirtySet;
use crate::error::Result;
use crate::ram::presence::{Hint, Presence};
use crate::ram::{Block, PAGE};
use crate::sys::io::{IOV_MAX, Piece};
use crate::transport::stream::StreamOutput;
use crate::wire::packet::PAGES_MAX;
use crate::wire::ram;
use crate::wire::stream::{self, SectionName};

use super::lanes::Lanes;
use super::stretch::{Stretch, Stretches};

const RAM_ID: u32 = 1;
/// Pages per vectored write of the plain stream: a record's head and its page are two pieces.
const BATCH: usize = IOV_MAX / 2;

/// Stretches of one batch: many scattered small ones are a batch, too.
const STRETCHES: usize = PAGES_MAX;

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

/// Sends pages; remembers where it was.
#[derive(Debug)]
pub(super) struct RamSender {
    find_zeros: FindZeros,
    lanes: Option<Lanes>,
    /// A section was begun and not ended.
    open: bool,
    /// All lanes meet at the end of each section (as QEMU did before 8.1), not at a mark once a round.
    meet_each_section: bool,
    stretches: Stretches,
    /// The destination takes many absent pages in one record.
    zero_runs: bool,
    /// Block of the last record: the next one of the same block needs no name.
    last: Option<usize>,
    /// Records without their pages, of one batch.
    heads: Vec<u8>,
    /// Heads and pages in stream order, of one batch.
    order: Vec<Next>,
    normal: u64,
    zero: u64,
    /// With `resume-timeout`: what the destination has not acknowledged.
    pub(super) sent: Option<Sent>,
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
            open: false,
            meet_each_section,
            stretches: Stretches::default(),
            zero_runs: false,
            last: None,
            heads,
            order,
            normal: 0,
            zero: 0,
            sent: None,
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

    /// The destination takes many absent pages in one record.
    pub(super) fn use_zero_runs(&mut self) {
        self.zero_runs = true;
    }

    /// Whether it does.
    pub(super) fn has_zero_runs(&self) -> bool {
        self.zero_runs
    }

    /// Pages whose dirty bits were taken and that were not sent yet.
    pub(super) fn owed(&self) -> usize {
        self.stretches.owed()
    }

    /// Bytes sent over lanes that the destination's system does not have yet; none where that cannot be known.
    pub(super) fn on_its_way(&self) -> Option<u64> {
        self.lanes.as_ref().map_or(Some(0), Lanes::on_its_way)
    }

    /// Whether a lane broke: the destination may know why.
    pub(super) fn is_broken(&self) -> bool {
        self.lanes.as_ref().is_some_and(Lanes::are_broken)
    }

    /// Whether a lane's connection is gone.
    pub(super) fn is_lost(&self) -> bool {
        self.lanes.as_ref().is_some_and(Lanes::are_lost)
    }

    /// The connection broke: what may not have arrived is dirty again.
    pub(super) fn put_back(&mut self, set: &DirtySet) {
        self.stretches.put_back(set);
        if let Some(sent) = &mut self.sent {
            sent.give_back(|block, first, pages| set.put_back(block, first, pages));
        }
    }

    /// The next stretch; from here on it counts as sent.
    fn next(&mut self, set: &DirtySet, here: Option<usize>, most: (usize, usize)) -> Result<Option<Stretch>> {
        let next = self.stretches.next(set, here, most)?;
        if let (Some(sent), Some(stretch)) = (&mut self.sent, &next) {
            let bytes = if stretch.absent { 0 } else { stretch.pages as u64 * PAGE };
            sent.mark(stretch.block, stretch.first, stretch.pages, bytes);
        }
        Ok(next)
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

    /// Pages that wait to be written by the lanes.
    pub(super) fn waiting(&self) -> usize {
        self.lanes.as_ref().map_or(0, Lanes::waiting)
    }

    /// A new round: from the start.
    pub(super) fn new_round(&mut self) {
        self.stretches.new_round();
    }

    /// The START section. The first meeting comes before any page. `presence`, `existing`: see [`Stretches::look_for_absent`].
    pub(super) fn setup(
        &mut self,
        set: &DirtySet,
        presence: Arc<[Presence]>,
        existing: &[(Arc<Block>, Hint)],
        out: &mut StreamOutput,
    ) -> Result<()> {
        if self.find_zeros != FindZeros::Nobody {
            self.stretches.look_for_absent(set, presence, existing);
        }
        let mut bytes = Vec::new();
        let name = SectionName { name: ram::NAME.to_owned(), instance: 0, version: ram::VERSION };
        stream::put_start(&mut bytes, RAM_ID, &name)?;
        self.open = true;
        ram::put_setup(&mut bytes, set.blocks().map(|b| (b.name(), b.len())))?;
        out.write(&bytes)?;
        self.end_section(out, true)
    }

    /// Begins a PART section.
    pub(super) fn begin_part(&mut self, out: &mut StreamOutput) -> Result<()> {
        let mut bytes = Vec::new();
        stream::put_part(&mut bytes, RAM_ID);
        self.open = true;
        out.write(&bytes)
    }

    /// Begins the END section.
    pub(super) fn begin_end(&mut self, out: &mut StreamOutput) -> Result<()> {
        let mut bytes = Vec::new();
        stream::put_end(&mut bytes, RAM_ID);
        self.open = true;
        out.write(&bytes)
    }

    /// Ends a section; with `meet` all lanes meet here, so that what was sent before it has arrived before what
    /// follows is read. The destination is told before they do: over a slow link that takes long, and it would miss us.
    pub(super) fn end_section(&mut self, out: &mut StreamOutput, meet: bool) -> Result<()> {
        let meet = meet || self.meet_each_section;
        let mut bytes = Vec::new();
        if let Some(lanes) = self.lanes.as_ref().filter(|_| meet) {
            lanes.call_meeting();
            if !self.meet_each_section {
                ram::put_flush(&mut bytes);
            }
        }
        self.put_end(&mut bytes);
        out.write(&bytes)?;
        self.lanes.as_ref().filter(|_| meet).map_or(Ok(()), Lanes::await_meeting)
    }

    /// Ends a section that is open, so that something else can follow it.
    pub(super) fn put_end(&mut self, bytes: &mut Vec<u8>) {
        if std::mem::take(&mut self.open) {
            ram::put_end(bytes);
            stream::put_footer(bytes, RAM_ID);
        }
    }

    /// Sends one batch of at most about `most` pages, and at least one. False: no page is dirty.
    pub(super) fn send_batch(&mut self, set: &DirtySet, out: &mut StreamOutput, most: u64) -> Result<bool> {
        let most = usize::try_from(most).unwrap_or(BATCH).clamp(1, BATCH);
        self.stretches.check_mapped(set)?;
        match self.lanes.is_some() {
            true => self.send_packet(set, out, most.min(PAGES_MAX)),
            false => self.send_records(set, out, most),
        }
    }

    /// A packet's worth of pages, all of one block, to the lanes.
    fn send_packet(&mut self, set: &DirtySet, out: &mut StreamOutput, most: usize) -> Result<bool> {
        let Some(lanes) = &self.lanes else { return Ok(false) };
        let mut batch = lanes.empty_batch()?;
        self.heads.clear();
        let (mut here, mut stretches) = (None, 0);
        loop {
            // Absent pages weigh nothing.
            let left = PAGES_MAX - batch.pages.len() - batch.zeros.len();
            let room = left.min(most.saturating_sub(batch.pages.len()));
            if room == 0 || stretches == STRETCHES {
                break;
            }
            let most_absent = if self.zero_runs { usize::MAX } else { left };
            let Some(stretch) = self.next(set, here, (room, most_absent))? else { break };
            stretches += 1;
            let pages = stretch.first..stretch.first + stretch.pages;
            if stretch.absent && self.zero_runs {
                self.put_zero_run(set, &stretch)?;
                continue;
            }
            match self.find_zeros {
                FindZeros::Lanes if stretch.absent => batch.zeros.extend(pages),
                FindZeros::Here => {
                    for page in pages {
                        match stretch.absent || set.block(stretch.block).is_zero(page) {
                            true => self.put_zero(set, stretch.block, page)?,
                            false => batch.pages.push(page),
                        }
                    }
                }
                _ => batch.pages.extend(pages),
            }
            here = Some(stretch.block);
        }
        batch.block = here.map(|index| Arc::clone(set.block(index)));
        if let Some(lanes) = &self.lanes {
            lanes.send(batch)?;
        }
        out.write(&self.heads)?;
        Ok(stretches > 0)
    }

    /// The block's name, for a record whose block is not the last record's.
    fn name<'s>(&mut self, set: &'s DirtySet, index: usize) -> Option<&'s str> {
        let named = self.last == Some(index);
        self.last = Some(index);
        (!named).then(|| set.block(index).name())
    }

    fn put_zero(&mut self, set: &DirtySet, index: usize, page: usize) -> Result<()> {
        let name = self.name(set, index);
        self.zero += 1;
        ram::put_zero(&mut self.heads, name, page as u64 * PAGE)
    }

    fn put_zero_run(&mut self, set: &DirtySet, stretch: &Stretch) -> Result<()> {
        let name = self.name(set, stretch.block);
        self.zero += stretch.pages as u64;
        ram::put_zero_run(&mut self.heads, name, stretch.first as u64 * PAGE, stretch.pages as u64)
    }

    /// Records of the plain stream in one vectored write.
    fn send_records(&mut self, set: &DirtySet, out: &mut StreamOutput, most: usize) -> Result<bool> {
        self.heads.clear();
        self.order.clear();
        let (mut room, mut stretches) = (most, 0);
        while room > 0 && stretches < STRETCHES {
            let Some(stretch) = self.next(set, None, (room, room))? else { break };
            stretches += 1;
            if stretch.absent && self.zero_runs {
                let start = self.heads.len();
                self.put_zero_run(set, &stretch)?;
                self.extend_head(start);
                continue;
            }
            for page in stretch.first..stretch.first + stretch.pages {
                self.add_record(set, stretch.block, page, stretch.absent)?;
            }
            room -= stretch.pages;
        }
        self.write_records(set, out)?;
        #[cfg(feature = "fault-injection")]
        for (block, page) in self.order.iter().filter_map(Next::page) {
            self.fault.sent(set.block(block), &[page]);
        }
        Ok(stretches > 0)
    }

    /// Adds a page to the batch of records.
    fn add_record(&mut self, set: &DirtySet, index: usize, page: usize, absent: bool) -> Result<()> {
        let start = self.heads.len();
        if self.find_zeros != FindZeros::Nobody && (absent || set.block(index).is_zero(page)) {
            self.put_zero(set, index, page)?;
            self.extend_head(start);
        } else {
            let name = self.name(set, index);
            ram::put_page(&mut self.heads, name, page as u64 * PAGE)?;
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
    pub(super) fn lose_a_page(&mut self, set: &DirtySet) -> Result<()> {
        self.fault.lose(set)
    }
}
