//! What goes out next: stretches of dirty pages that were taken, told apart by whether they exist at all.

use std::sync::Arc;

use crate::dirty::cursor::Cursor;
use crate::dirty::set::DirtySet;
use crate::error::Result;
use crate::ram::presence::{GRANULE, Hint, Presence};
use crate::ram::survey::Survey;
use crate::ram::{Block, RamList};

/// Pages taken at once while the kernel is asked which of them exist: as many as KVM's dirty log is cleared for at once.
pub(super) const TAKEN_MAX: usize = 4096;

/// Pages of a block that follow each other, whose dirty bits were taken.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stretch {
    /// Index of the block in the set.
    pub(super) block: usize,
    pub(super) first: usize,
    pub(super) pages: usize,
    /// None of them exists: they are zero without a look.
    pub(super) absent: bool,
}

/// Tells which pages exist of each block that travels; nothing where that cannot be found out. To be made before writes are
/// tracked: what kind of memory a block lies in is found slowly once it is registered with a userfaultfd.
pub(super) fn presence(list: &RamList) -> Vec<Presence> {
    let sent = list.iter().filter(|b| b.is_sent());
    let survey = Survey::new().ok();
    survey.map_or_else(Vec::new, |survey| sent.map(|block| Presence::new(block, &survey, None)).collect())
}

/// The dirty pages of a round, in order.
#[derive(Debug, Default)]
pub(super) struct Stretches {
    cursor: Cursor,
    /// In the first round: which pages of each block exist at all. Later everything that is dirty does.
    presence: Arc<[Presence]>,
    /// Of each block, granules (2 MiB) all of whose pages existed once: they are not asked for again.
    full: Vec<Vec<bool>>,
    /// Of the cursor's runs: the one at hand, how far it is given, and which of its pages are absent.
    run: usize,
    at: usize,
    absent: Vec<bool>,
    /// Pages taken and not given yet.
    owed: usize,
}

impl Stretches {
    /// From here on absent pages are told apart, until the round is over. `existing`: where blocks were seen to have
    /// pages before; what is gone since reads as zero.
    pub(super) fn look_for_absent(
        &mut self,
        set: &DirtySet,
        presence: Arc<[Presence]>,
        existing: &[(Arc<Block>, Hint)],
    ) {
        if presence.len() != set.len() {
            return;
        }
        self.presence = presence;
        let full = |block: &Arc<Block>| {
            let hint = existing.iter().find(|(seen, _)| Arc::ptr_eq(seen, block)).map(|(_, hint)| hint);
            hint.map_or_else(Vec::new, |hint| hint.full().collect())
        };
        self.full = set.blocks().map(full).collect();
    }

    /// A new round: from the start. What was taken is given first.
    pub(super) fn new_round(&mut self) {
        if self.owed == 0 {
            *self = Self::default();
        }
        self.presence = Arc::default();
    }

    /// Pages taken and not given yet.
    pub(super) fn owed(&self) -> usize {
        self.owed
    }

    /// What was taken and not given yet is dirty again.
    pub(super) fn put_back(&mut self, set: &DirtySet) {
        let mut at = self.at;
        for run in self.cursor.runs().iter().skip(self.run).filter(|_| self.owed > 0) {
            set.put_back(run.block, run.first + at, run.pages - at);
            at = 0;
        }
        *self = Self::default();
    }

    /// The next stretch, of block `here` if there is one: at most `most` pages, or `most_absent` absent ones.
    pub(super) fn next(
        &mut self,
        set: &DirtySet,
        here: Option<usize>,
        (most, most_absent): (usize, usize),
    ) -> Result<Option<Stretch>> {
        if self.owed == 0 && !self.take(set, here, most)? {
            return Ok(None);
        }
        let run = self.cursor.runs()[self.run];
        if here.is_some_and(|block| block != run.block) {
            return Ok(None);
        }
        let is_absent = |at: usize| self.absent.get(at).is_some_and(|absent| *absent);
        let absent = is_absent(self.at);
        let end = run.pages.min(self.at.saturating_add(if absent { most_absent } else { most }));
        let pages = (self.at..end).take_while(|at| is_absent(*at) == absent).count();
        let first = run.first + self.at;
        self.at += pages;
        self.owed -= pages;
        if self.at == run.pages && self.owed > 0 {
            (self.run, self.at) = (self.run + 1, 0);
            self.ask();
        }
        Ok(Some(Stretch { block: run.block, first, pages, absent }))
    }

    /// Before more of what was taken is read, which may be some time after: refuses memory that is gone.
    pub(super) fn check_mapped(&self, set: &DirtySet) -> Result<()> {
        let runs = self.cursor.runs();
        match (runs.get(self.run), runs.last()) {
            (Some(first), Some(last)) if self.owed > 0 => {
                set.block(first.block).check_mapped(&(first.first..last.first + last.pages))
            }
            _ => Ok(()),
        }
    }

    fn take(&mut self, set: &DirtySet, here: Option<usize>, most: usize) -> Result<bool> {
        let most = if self.presence.is_empty() { most } else { TAKEN_MAX };
        let more = match here {
            None => self.cursor.take(set, most)?,
            Some(_) => self.cursor.take_here(set, most)?,
        };
        self.owed = self.cursor.runs().iter().map(|run| run.pages).sum();
        (self.run, self.at) = (0, 0);
        if more {
            self.check_mapped(set)?;
            self.ask();
        }
        Ok(more)
    }

    /// Asks the kernel about the run at hand. Its dirty bits were taken before, for asking counts as reading.
    fn ask(&mut self) {
        self.absent.clear();
        let run = self.cursor.runs()[self.run];
        let Some(presence) = self.presence.get(run.block).filter(|p| !p.is_hopeless()) else { return };
        self.absent.resize(run.pages, false);
        let full = |page: usize| self.full[run.block].get(page / GRANULE).is_some_and(|full| *full);
        let (mut at, end) = (run.first, run.first + run.pages);
        while at < end {
            let is_full = full(at);
            let first = at;
            while at < end && full(at) == is_full {
                at = end.min((at / GRANULE + 1) * GRANULE);
            }
            if !is_full {
                presence.each_absent(first..at, |range| {
                    self.absent[range.start - run.first..range.end - run.first].fill(true);
                });
            }
        }
    }
}
