//! Test builds only (feature `fault-injection`): loses one dirty bit, to show that the checks of the demo notice.
//!
//! Chosen by the environment, `VMIG_FAULT=drop-dirty`. The page whose bit is lost is one whose bytes certainly differ
//! from what was sent: a page that was dirtied between the clearing of its bit and the reading of its bytes is dirty,
//! but went out in its new form already. Later bits of that page are lost too, or the next round would mend it.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hasher};

use crate::dirty::hub::Hub;
use crate::dirty::set::DirtySet;
use crate::error::Result;

/// Digests of the pages as they were just after they were sent.
#[derive(Debug)]
pub(super) struct LostPage {
    wanted: bool,
    sent: HashMap<(usize, usize), u64>,
    lost: Option<(usize, usize)>,
}

impl Default for LostPage {
    fn default() -> Self {
        Self {
            wanted: std::env::var("VMIG_FAULT").is_ok_and(|v| v == "drop-dirty"),
            sent: HashMap::new(),
            lost: None,
        }
    }
}

impl LostPage {
    /// These pages (block, page) just went out.
    pub(super) fn sent(&mut self, set: &DirtySet, pages: impl Iterator<Item = (usize, usize)>) {
        if self.wanted {
            for (block, page) in pages {
                self.sent.insert((block, page), digest(set, block, page));
            }
        }
    }

    /// After each sync: forgets the page, as if its dirty bit had never been seen.
    pub(super) fn lose(&mut self, set: &DirtySet, hub: &Hub) -> Result<()> {
        if self.wanted && self.lost.is_none() {
            self.lost = self.changed_page(set);
        }
        let Some((block, page)) = self.lost else { return Ok(()) };
        hub.clear(set.block(block), page..page + 1)?;
        set.take(block, page, 1);
        Ok(())
    }

    /// A dirty page that is no longer what was sent.
    fn changed_page(&self, set: &DirtySet) -> Option<(usize, usize)> {
        for block in 0..set.len() {
            let mut from = 0;
            while let Some((page, _)) = set.next_run(block, from, 1) {
                from = page + 1;
                if self.sent.get(&(block, page)).is_some_and(|old| *old != digest(set, block, page)) {
                    return Some((block, page));
                }
            }
        }
        None
    }
}

fn digest(set: &DirtySet, block: usize, page: usize) -> u64 {
    let mut hasher = DefaultHasher::new();
    set.block(block).each_word(page, |word| hasher.write_u64(word));
    hasher.finish()
}
