//! Where pages go: the blocks by name, what of them arrived, and what need not be touched.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use super::Job;
use crate::bitmap::Bitmap;
use crate::error::Result;
use crate::ram::fresh::{Care, Freshness, freshen};
use crate::ram::prepare::{self, Limits, Preparer};
use crate::ram::presence::{Hint, Presence};
use crate::ram::survey::{Part, Survey};
use crate::ram::{Block, RamList};

/// A block that pages arrive for.
#[derive(Debug)]
pub(super) struct Target {
    /// The block.
    pub(super) block: Arc<Block>,
    /// Pages that may hold something: every other one is certainly zero.
    written: Bitmap,
    /// Who populates the block ahead of the data, and its number there.
    ahead: OnceLock<(Arc<Preparer>, usize)>,
}

impl Target {
    /// Pages are about to be written.
    pub(super) fn mark(&self, first: usize, count: usize) {
        self.came(first, count);
        self.written.set_range(first, count);
    }

    /// A page is zero at the source. One that is zero here already is not touched: it need not even exist. It is mapped.
    pub(super) fn zero(&self, page: usize) {
        self.came(page, 1);
        if self.written.test(page) {
            self.block.zero_page(page);
        }
    }
}

impl Target {
    /// Pages are zero at the source, see [`zero`](Self::zero).
    pub(super) fn zero_run(&self, first: usize, pages: usize) -> Result<()> {
        self.came(first, pages);
        let (mut at, end) = (first, first + pages);
        while at < end
            && let Some((from, count)) = self.written.next_run(at, end - at).filter(|(from, _)| *from < end)
        {
            at = (from + count).min(end);
            self.block.check_mapped(&(from..at))?;
            (from..at).for_each(|page| self.block.zero_page(page));
        }
        Ok(())
    }

    fn came(&self, first: usize, count: usize) {
        if let Some((ahead, number)) = self.ahead.get() {
            ahead.arrived(*number, first..first + count);
        }
    }
}

/// The blocks of a migration, by name.
pub(super) type Targets = Arc<HashMap<String, Arc<Target>>>;

/// Makes all blocks that pages will arrive for read as zero, by the way each kind of memory needs, where that can be
/// proven. Shared memory is left alone unless the source said that it is not its own (`compared`): else its guest would
/// lose its memory with ours. Memory that is gone is an error before anything is written there.
pub(super) fn prepare(job: &Job, ram: &RamList, compared: bool) -> Result<Targets> {
    let survey = Survey::new();
    let mut targets = HashMap::new();
    for block in ram.iter().filter(|b| b.is_sent()) {
        block.check_mapped(&(0..block.pages()))?;
        let written = Bitmap::new(block.pages())?;
        match &survey {
            Ok(survey) => {
                let keep = !compared && survey.parts(block, None).iter().any(Part::is_shared);
                let fresh =
                    freshen(block, survey, Care { keep, ..Care::default() }, &|| job.status.check_but_link())?;
                mark_existing(block, survey, &fresh, &written);
            }
            Err(_) => drop(written.set_range(0, block.pages())),
        }
        targets.insert(
            block.name().to_owned(),
            Arc::new(Target { block: Arc::clone(block), written, ahead: OnceLock::new() }),
        );
    }
    Ok(Arc::new(targets))
}

/// The guest did not come: throws away what did, so that nobody takes it for one. Shared memory is left alone as above.
pub(super) fn discard(job: &Job, ram: &RamList, compared: bool) {
    let Ok(survey) = Survey::new() else { return };
    for block in ram.iter().filter(|b| b.is_sent()) {
        let keep = !compared && survey.parts(block, None).iter().any(Part::is_shared);
        let fresh = freshen(block, &survey, Care { keep, ..Care::default() }, &|| Ok(()));
        if let Err(error) = fresh {
            job.vmm
                .log()
                .to("incoming")
                .warning(format_args!("memory of RAM block '{}' was not given back: {error}", block.name()));
        }
    }
}

/// Marks what could not be made zero, but for pages that do not exist: looking at one of shared memory would make it.
fn mark_existing(block: &Arc<Block>, survey: &Survey, fresh: &Freshness, written: &Bitmap) {
    if fresh.is_proven() {
        return;
    }
    let presence = Presence::new(block, survey, None);
    for (pages, _) in &fresh.unproven {
        presence.each_existing(pages.clone(), |range| {
            written.set_range(range.start, range.len());
        });
    }
}

/// Populates the blocks ahead of the data, where the source said that they have content. Memory that is not prepared is
/// populated as it is written, so a failure only costs time.
pub(super) fn populate(job: &Job, targets: &Targets, hints: Vec<(String, Hint)>, threads: usize) -> Result<()> {
    if hints.iter().all(|(_, hint)| hint.content() == 0) {
        return Ok(());
    }
    let survey = Survey::new()?;
    let mut blocks = Vec::new();
    let mut plans = Vec::new();
    for (name, hint) in hints {
        if let Some(target) = targets.get(&name) {
            plans.push(prepare::Target::new(&target.block, hint, &survey, false));
            blocks.push(target);
        }
    }
    let preparer = Arc::new(Preparer::start(
        &job.threads,
        plans,
        Limits { threads, nice: job.options.nice(), ..Limits::default() },
    )?);
    for (number, target) in blocks.into_iter().enumerate() {
        let _ = target.ahead.set((Arc::clone(&preparer), number));
    }
    Ok(())
}
