//! Where pages go: the blocks by name, what of them arrived, and what need not be touched.

use std::collections::HashMap;
use std::sync::Arc;

use super::Job;
use crate::bitmap::Bitmap;
use crate::error::Result;
use crate::ram::Block;
use crate::ram::fresh::{Care, freshen};
use crate::ram::survey::Survey;

/// A block that pages arrive for.
#[derive(Debug)]
pub(super) struct Target {
    /// The block.
    pub(super) block: Arc<Block>,
    /// Pages that were written, if every other one is certainly zero.
    written: Option<Bitmap>,
}

impl Target {
    /// Pages are about to be written.
    pub(super) fn mark(&self, first: usize, count: usize) {
        if let Some(written) = &self.written {
            written.set_range(first, count);
        }
    }

    /// A page is zero at the source. One that is zero here already is not touched: it need not even exist.
    pub(super) fn zero(&self, page: usize) {
        match &self.written {
            Some(written) if !written.test(page) => (),
            _ => self.block.zero_page(page),
        }
    }
}

/// The blocks of a migration, by name.
pub(super) type Targets = Arc<HashMap<String, Arc<Target>>>;

/// Makes all blocks that pages will arrive for read as zero, by the way each kind of memory needs, where that can be
/// proven.
pub(super) fn prepare(job: &Job) -> Result<Targets> {
    let survey = Survey::new();
    let mut targets = HashMap::new();
    for block in job.ram.iter().filter(|b| b.is_sent()) {
        let mut written = None;
        if let Ok(survey) = &survey {
            let fresh = freshen(block, survey, Care::default(), &|| job.status.check())?;
            if fresh.is_proven() {
                written = Some(Bitmap::new(block.pages())?);
            }
        }
        targets.insert(block.name().to_owned(), Arc::new(Target { block: Arc::clone(block), written }));
    }
    Ok(Arc::new(targets))
}
