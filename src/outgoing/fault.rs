//! Test builds only (feature `fault-injection`): loses one dirty bit, to show that the checks of the demo notice.
//!
//! Chosen by the environment, `VMIG_FAULT=drop-dirty`. The page whose bit is lost is one whose bytes certainly differ
//! from what was sent: a page that was dirtied between the clearing of its bit and the reading of its bytes is dirty,
//! but went out in its new form already. Later bits of that page are lost too, or the next round would mend it.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hasher};
use std::sync::Mutex;

use crate::dirty::set::DirtySet;
use crate::error::Result;
use crate::ram::Block;
use crate::thread::lock;

/// Digests of the pages as they were just after they were sent.
#[derive(Debug)]
pub(super) struct LostPage {
    wanted: bool,
    sent: Mutex<HashMap<u64, u64>>,
    lost: Mutex<Option<(usize, usize)>>,
}

impl Default for LostPage {
    fn default() -> Self {
        let wanted = std::env::var("VMIG_FAULT").is_ok_and(|v| v == "drop-dirty");
        Self { wanted, sent: Mutex::default(), lost: Mutex::default() }
    }
}

impl LostPage {
    /// These pages just went out.
    pub(super) fn sent(&self, block: &Block, pages: &[usize]) {
        if self.wanted {
            let mut sent = lock(&self.sent);
            for page in pages {
                sent.insert(key(block, *page), digest(block, *page));
            }
        }
    }

    /// After each sync: forgets the page, as if its dirty bit had never been seen.
    pub(super) fn lose(&self, set: &DirtySet) -> Result<()> {
        let mut lost = lock(&self.lost);
        if self.wanted && lost.is_none() {
            *lost = self.changed_page(set);
        }
        let Some((block, page)) = *lost else { return Ok(()) };
        set.clear(block, page..page + 1)?;
        set.take(block, page, 1);
        Ok(())
    }

    /// A dirty page that is no longer what was sent.
    fn changed_page(&self, set: &DirtySet) -> Option<(usize, usize)> {
        let sent = lock(&self.sent);
        for index in 0..set.len() {
            let block = set.block(index);
            let mut from = 0;
            while let Some((page, _)) = set.next_run(index, from, 1) {
                from = page + 1;
                if sent.get(&key(block, page)).is_some_and(|old| *old != digest(block, page)) {
                    return Some((index, page));
                }
            }
        }
        None
    }
}

/// Where the page lies in this process: unique among all blocks.
fn key(block: &Block, page: usize) -> u64 {
    block.host_address(page as u64 * crate::ram::PAGE)
}

fn digest(block: &Block, page: usize) -> u64 {
    let mut hasher = DefaultHasher::new();
    block.each_word(page, |word| hasher.write_u64(word));
    hasher.finish()
}
