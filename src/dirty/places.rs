//! Where in memory something lies, by the order in which memory is sent; and how much of it has to be sent at all.

use std::ops::Range;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::pacing::dirtying::PARTS;
use crate::ram::presence::{GRANULE, Presence};
use crate::ram::survey::Survey;
use crate::ram::{Block, PAGE, RamList};

/// Existing pages of each granule that are looked at for zeros: one of so many.
const ZERO_STEP: usize = 128;

/// The blocks that travel, with what is in them.
#[derive(Debug)]
pub(super) struct Places {
    blocks: Vec<Placed>,
    content: u64,
}

#[derive(Debug)]
struct Placed {
    block: Arc<Block>,
    /// Of each granule, the part of all content at which it begins.
    parts: Vec<u8>,
    presence: Option<Presence>,
}

impl Places {
    /// Looks at all memory of the list. `check` may end it.
    pub(super) fn new(list: &RamList, check: &dyn Fn() -> Result<()>) -> Result<Self> {
        let survey = Survey::new().ok();
        let mut found = Vec::new();
        let mut all = 0u64;
        for block in list.iter().filter(|b| b.is_sent()) {
            let presence = survey.as_ref().map(|survey| Presence::new(block, survey, None));
            let counts = counts(block, presence.as_ref(), check)?;
            all += counts.iter().sum::<u64>();
            found.push((Arc::clone(block), counts, presence));
        }
        let mut before = 0u64;
        let blocks = found.into_iter().map(|(block, counts, presence)| {
            let begins = counts.iter().map(|count| {
                let part = before * PARTS as u64 / all.max(1);
                before += count;
                u8::try_from(part.min(PARTS as u64 - 1)).unwrap_or(0)
            });
            Placed { block, parts: begins.collect(), presence }
        });
        Ok(Self { blocks: blocks.collect(), content: all * PAGE })
    }

    /// Bytes whose content has to be sent.
    pub(super) fn content(&self) -> u64 {
        self.content
    }

    /// A block by index.
    pub(super) fn block(&self, index: usize) -> &Arc<Block> {
        &self.blocks[index].block
    }

    /// The blocks.
    pub(super) fn blocks(&self) -> impl Iterator<Item = &Arc<Block>> {
        self.blocks.iter().map(|placed| &placed.block)
    }

    /// Which of [`PARTS`] parts of all content a page of a block is in.
    pub(super) fn part(&self, block: usize, page: usize) -> usize {
        self.blocks[block].parts.get(page / GRANULE).map_or(0, |part| usize::from(*part))
    }

    /// Whether a page does not exist, and must not be looked at: that might make it.
    pub(super) fn is_absent(&self, block: usize, page: usize) -> bool {
        self.blocks[block].presence.as_ref().is_some_and(|presence| presence.is_absent(page..page + 1))
    }
}

/// Pages with content of each granule: those that exist, less the share of zeros among some of them.
fn counts(block: &Arc<Block>, presence: Option<&Presence>, check: &dyn Fn() -> Result<()>) -> Result<Vec<u64>> {
    let mut counts = Vec::new();
    let granules = block.pages().div_ceil(GRANULE);
    counts.try_reserve_exact(granules).map_err(|_| Error::no_memory("a map of memory", block.len()))?;
    for first in (0..block.pages()).step_by(GRANULE) {
        check()?;
        let pages = first..block.pages().min(first + GRANULE);
        block.check_mapped(&pages)?;
        let (mut existing, mut looked, mut zero) = (0, 0, 0);
        let mut look = |range: Range<usize>| {
            existing += range.len() as u64;
            for page in range.step_by(ZERO_STEP) {
                looked += 1;
                zero += u64::from(block.is_zero(page));
            }
        };
        match presence {
            Some(presence) => drop(presence.each_existing(pages, look)),
            None => look(pages),
        }
        counts.push(existing - (existing * zero).checked_div(looked).unwrap_or(0));
    }
    Ok(counts)
}
