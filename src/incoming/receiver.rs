//! RAM bodies into guest memory.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::ahead::Scout;
use super::lanes::Lanes;
use super::target::{Target, Targets};
use crate::error::{Error, Result};
use crate::ram::PAGE;
use crate::status::Status;
use crate::transport::stream::StreamInput;
use crate::wire::input::{Input, Slice};
use crate::wire::ram::{self, Record};

/// Pages that are looked at together, whether they are still mapped.
const LOOK_PAGES: usize = 256;

/// Receives pages; remembers the block of the last record.
#[derive(Debug)]
pub(super) struct RamReceiver {
    targets: Targets,
    last: Option<(Arc<Target>, usize)>,
    /// Pages of that block that were mapped when one of them came.
    mapped: Range<usize>,
    /// Where in the stream it stands.
    at: u64,
    /// Has memory prepared ahead.
    scout: Option<Scout>,
    normal: u64,
    zero: u64,
}

impl RamReceiver {
    pub(super) fn new(targets: &Targets, scout: Option<Scout>) -> Self {
        Self { targets: Arc::clone(targets), last: None, mapped: 0..0, at: 0, scout, normal: 0, zero: 0 }
    }

    /// Takes one body.
    pub(super) fn load(&mut self, input: &mut StreamInput, status: &Status, lanes: Option<&Lanes>) -> Result<()> {
        self.mapped = 0..0;
        match self.records(input, status, lanes) {
            Err(error) if error.errno() == libc::EBADMSG => Err(self.name_rejected(error, input)),
            result => result,
        }
    }

    /// Names the block whose pages the rejected frame holds, and the first of them as far as it can be made out.
    fn name_rejected(&self, error: Error, input: &StreamInput) -> Error {
        let (mut name, mut offset) = match &self.last {
            Some((target, page)) => (Some(target.block.name().to_owned()), *page as u64 * PAGE),
            None => (None, 0),
        };
        // It begins with a record, unless one was being read.
        if input.position() == self.at
            && let Ok(Record::Page { name: block, offset: first }) =
                ram::read(&mut Slice::new(input.rejected().unwrap_or_default()))
        {
            (name, offset) = (block.or(name), first);
        }
        match name {
            Some(name) => error.context(format_args!("from {offset:#x} of RAM block '{name}' on")).in_field(name),
            None => error,
        }
    }

    fn records(&mut self, input: &mut StreamInput, status: &Status, lanes: Option<&Lanes>) -> Result<()> {
        /// Records between two looks at cancel.
        const LOOK: u32 = 4096;
        let mut since = 0;
        loop {
            let at = input.position();
            self.at = at;
            match ram::read(input)? {
                Record::End => break,
                Record::Flush => match lanes {
                    Some(lanes) => lanes.meet()?,
                    None => return Err(no_lanes(at)),
                },
                Record::Delta { .. } => {
                    let text =
                        format!("byte {at:#x}: XBZRLE pages are not supported; switch xbzrle off at the source");
                    return Err(Error::invalid(text).at_byte(at));
                }
                Record::Setup { total } => self.setup(input, total, status)?,
                Record::Zero { name, offset } => {
                    let (target, page) = self.page(at, name, offset)?;
                    target.zero(page);
                    self.zero += 1;
                }
                Record::ZeroRun { name, offset, pages } => {
                    let (target, page) = self.page(at, name, offset)?;
                    let pages = usize::try_from(pages).unwrap_or(usize::MAX);
                    if pages > target.block.pages() - page {
                        let text = format!("byte {at:#x}: a run of pages beyond the end of RAM block");
                        return Err(Error::invalid(format!("{text} '{}'", target.block.name())).at_byte(at));
                    }
                    target.zero_run(page, pages)?;
                    self.zero += pages as u64;
                }
                Record::Page { name, offset } => {
                    let (target, page) = self.page(at, name, offset)?;
                    target.mark(page, 1);
                    input.page(|bytes| target.block.write_page(page, bytes))?;
                    if let (Some(scout), Some((target, _))) = (&self.scout, &self.last) {
                        scout.saw(&target.block, &[page]);
                    }
                    self.normal += 1;
                }
            }
            since += 1;
            if since == LOOK {
                since = 0;
                status.check()?;
            }
        }
        Ok(())
    }

    /// Whole and zero pages received.
    pub(super) fn counts(&self) -> (u64, u64) {
        (self.normal, self.zero)
    }

    /// The source's list of blocks: each must be here, with the same length.
    fn setup(&self, input: &mut StreamInput, total: u64, status: &Status) -> Result<()> {
        for (name, len) in ram::read_blocks(input, total)? {
            match self.targets.get(&name).map(|t| &t.block) {
                None => {
                    let shown = name.escape_default();
                    return Err(Error::new(libc::ENOENT, format!("there is no RAM block '{shown}' here")));
                }
                Some(block) if block.len() != len => {
                    return Err(Error::invalid(format!("RAM block '{name}' has another length here"))
                        .expected_got(format!("{:#x}", block.len()), format!("{len:#x}")));
                }
                Some(_) => (),
            }
        }
        status.counters.total.store(total, Ordering::Relaxed);
        Ok(())
    }

    /// Block and page of a record.
    fn page(&mut self, at: u64, name: Option<String>, offset: u64) -> Result<(&Arc<Target>, usize)> {
        if let Some(name) = name {
            let Some(target) = self.targets.get(&name) else {
                let text = format!("byte {at:#x}: there is no RAM block '{}' here", name.escape_default());
                return Err(Error::new(libc::ENOENT, text).at_byte(at));
            };
            self.last = Some((Arc::clone(target), 0));
            self.mapped = 0..0;
        }
        let Some((target, last)) = &mut self.last else {
            return Err(Error::invalid(format!("byte {at:#x}: the first page names no RAM block")).at_byte(at));
        };
        let block = &target.block;
        if offset >= block.len() {
            return Err(Error::invalid(format!("byte {at:#x}: a page outside of RAM block '{}'", block.name()))
                .at_byte(at)
                .expected_got(format!("an offset below {:#x}", block.len()), format!("{offset:#x}")));
        }
        let page = usize::try_from(offset / PAGE).map_err(|_| Error::invalid("a page out of reach"))?;
        *last = page;
        if !self.mapped.contains(&page) {
            let first = page - page % LOOK_PAGES;
            self.mapped = first..(first + LOOK_PAGES).min(block.pages());
            block.check_mapped(&self.mapped)?;
        }
        Ok((target, page))
    }
}

fn no_lanes(at: u64) -> Error {
    let text = format!(
        "byte {at:#x}: the source sends pages over parallel connections (multifd); set option 'multifd' here to on, and \
         'multifd-channels' to its number, before the source connects"
    );
    Error::invalid(text).at_byte(at)
}
