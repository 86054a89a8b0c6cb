//! Pages that were sent and may not be there: what must be sent again after the connection broke.
//!
//! The source numbers points in what it sends; the destination acknowledges a point when every byte before it lies in
//! guest RAM. At most one point is under way, so two bitmaps to a block are enough: of the pages sent before it, and of
//! those sent since.

use crate::bitmap::{Bitmap, Scan};
use crate::error::Result;

/// Pages given back at once.
const GIVE_BACK: usize = 4096;

/// Pages sent since the last acknowledged point. One thread marks; a mark is a few atomic words for a run of pages.
#[derive(Debug)]
pub struct Sent {
    /// Of each block: sent before and since the point under way, in the order that `now` says.
    blocks: Vec<[Bitmap; 2]>,
    now: usize,
    point: u64,
    acknowledged: u64,
    since: u64,
}

impl Sent {
    /// For blocks of so many pages.
    pub fn new(blocks: impl Iterator<Item = usize>) -> Result<Self> {
        let blocks = blocks.map(|pages| Ok([Bitmap::new(pages)?, Bitmap::new(pages)?])).collect::<Result<_>>()?;
        Ok(Self { blocks, now: 0, point: 0, acknowledged: 0, since: 0 })
    }

    /// Pages are about to be sent; `bytes` of it count for the next point.
    pub fn mark(&mut self, block: usize, first: usize, pages: usize, bytes: u64) {
        self.blocks[block][self.now].set_range(first, pages);
        self.since += bytes;
    }

    /// Bytes sent since the last point.
    pub fn since(&self) -> u64 {
        self.since
    }

    /// The point that is under way.
    pub fn awaited(&self) -> Option<u64> {
        (self.point != self.acknowledged).then_some(self.point)
    }

    /// A new point: everything before it was written. None: one is under way.
    pub fn number(&mut self) -> Option<u64> {
        if self.awaited().is_some() {
            return None;
        }
        self.now ^= 1;
        self.since = 0;
        self.point += 1;
        Some(self.point)
    }

    /// The destination has everything before this point. An old one, and one that was not numbered yet, says nothing.
    pub fn acknowledge(&mut self, point: u64) {
        if self.awaited() == Some(point) {
            let before = self.now ^ 1;
            for block in &self.blocks {
                drain(&block[before], |_, _| ());
            }
            self.acknowledged = point;
        }
    }

    /// The connection broke: gives every page that may not be there, as (block, first, pages), and forgets it.
    pub fn give_back(&mut self, mut give: impl FnMut(usize, usize, usize)) {
        for (index, block) in self.blocks.iter().enumerate() {
            block.iter().for_each(|map| drain(map, |first, pages| give(index, first, pages)));
        }
        self.acknowledged = self.point;
        self.since = 0;
    }
}

fn drain(map: &Bitmap, mut give: impl FnMut(usize, usize)) {
    let mut scan = Scan::default();
    while map.take_runs(&mut scan, GIVE_BACK, &mut give) > 0 {}
}

#[cfg(test)]
#[path = "sent_tests.rs"]
mod tests;
