//! Makes a block read as zero before a migration arrives, so that pages that are zero at the source stay untouched.
//!
//! How depends on what the block lies in: private anonymous memory is dropped, a file in shared memory gets a hole.
//! Both would pull pages away from under a device that reaches them by physical address, break mlock(2), or give a huge
//! page's reservation back to the pool (a later fault would then kill the VMM): there, zeros are written, and only over
//! what is not zero.

use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::Block;
use super::presence::Presence;
use super::survey::{Backing, Part, Survey};
use crate::error::Result;
use crate::sys::memory::{self, Advice};

/// Pages between two looks at whether to stop: 256 MiB, some ten milliseconds of dropping.
const DROP_STEP: usize = 1 << 16;
/// The same for writing zeros: 2 MiB.
const WRITE_STEP: usize = 512;

/// What the VMM knows of a block.
#[derive(Clone, Copy, Debug, Default)]
pub struct Care<'a> {
    /// Not to be written at all: a ROM, or contents the VMM wants to keep.
    pub keep: bool,
    /// A device reaches it by physical address. Also assumed when the process has locked or pinned memory at all.
    pub pinned: bool,
    /// The file mapped there, if the VMM knows it.
    pub fd: Option<BorrowedFd<'a>>,
}

/// What became of a block.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Freshness {
    /// How each part was made zero.
    pub done: Vec<(Range<usize>, &'static str)>,
    /// Parts that may hold anything, and why.
    pub unproven: Vec<(Range<usize>, String)>,
}

impl Freshness {
    /// Whether every page reads as zero: one that is zero at the source and was not sent before need not be touched.
    pub fn is_proven(&self) -> bool {
        self.unproven.is_empty()
    }
}

/// Makes what it may of a block read as zero. `stop` is asked every few milliseconds, and only its error is returned:
/// parts that resist are reported as unproven.
pub fn freshen(
    block: &Arc<Block>,
    survey: &Survey,
    care: Care<'_>,
    stop: &dyn Fn() -> Result<()>,
) -> Result<Freshness> {
    let presence = Presence::new(block, survey, care.fd);
    // When in doubt, memory is pinned.
    let pinned = care.pinned || memory::pinned_kib().map_or(true, |kib| kib > 0);
    let mut fresh = Freshness::default();
    for part in presence.parts() {
        let pages = part.pages.clone();
        match untouchable(block, part, care.keep) {
            Some(why) => fresh.unproven.push((pages, why.to_owned())),
            None => match freshen_part(block, &presence, part, pinned, stop)? {
                Ok(how) => fresh.done.push((pages, how)),
                Err(e) => fresh.unproven.push((pages, e.to_string())),
            },
        }
    }
    Ok(fresh)
}

/// Why a part is left alone, if it is.
pub(super) fn untouchable(block: &Block, part: &Part, keep: bool) -> Option<&'static str> {
    match part.mapping {
        _ if keep => Some("the VMM keeps its contents"),
        _ if !block.is_sent() => Some("both sides share its contents"),
        None => Some("nothing is mapped there"),
        Some(_) if !part.is_writable() => Some("it is mapped read-only"),
        Some(_) if part.handled => Some("a userfaultfd handler may supply its pages"),
        Some(_) => None,
    }
}

fn freshen_part(
    block: &Block,
    presence: &Presence,
    part: &Part,
    pinned: bool,
    stop: &dyn Fn() -> Result<()>,
) -> Result<io::Result<&'static str>> {
    let drop = match part.backing {
        _ if pinned => None,
        Backing::Private => Some((Advice::DontNeed, "dropped")),
        _ if part.in_memory => Some((Advice::Remove, "hole punched")),
        _ => None,
    };
    if let Some((advice, how)) = drop {
        // Locked memory refuses; what part of it was dropped before it did is zero all the same.
        if in_steps(&part.pages, DROP_STEP, stop, |step| block.drop_pages(step, advice))?.is_ok() {
            return Ok(Ok(how));
        }
    }
    Ok(write_zeros(block, presence, part, stop)?.map(|()| "zeros written where it was not zero"))
}

/// Runs `f` over steps of a range, asking `stop` before each. The inner error ends it, too.
fn in_steps(
    pages: &Range<usize>,
    step: usize,
    stop: &dyn Fn() -> Result<()>,
    mut f: impl FnMut(&Range<usize>) -> io::Result<()>,
) -> Result<io::Result<()>> {
    for start in pages.clone().step_by(step) {
        stop()?;
        if let Err(e) = f(&(start..pages.end.min(start + step))) {
            return Ok(Err(e));
        }
    }
    Ok(Ok(()))
}

fn write_zeros(
    block: &Block,
    presence: &Presence,
    part: &Part,
    stop: &dyn Fn() -> Result<()>,
) -> Result<io::Result<()>> {
    let mut outcome: Result<io::Result<()>> = Ok(Ok(()));
    presence.each_existing(part.pages.clone(), |range| {
        if matches!(outcome, Ok(Ok(()))) {
            outcome = in_steps(&range, WRITE_STEP, stop, |step| zero_step(block, step));
        }
    });
    outcome
}

fn zero_step(block: &Block, pages: &Range<usize>) -> io::Result<()> {
    // A page that cannot be had (past a file's end, no huge page left, broken hardware) is an error here and a signal
    // if it were simply touched.
    guarded(block.advise(pages, Advice::PopulateRead))?;
    for page in pages.clone() {
        if !block.is_zero(page) {
            guarded(block.advise(&(page..page + 1), Advice::PopulateWrite))?;
            block.zero_page(page);
        }
    }
    Ok(())
}

/// Kernels before 5.14 cannot populate on demand: they go without this guard, as every access to guest RAM does.
fn guarded(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Ok(()),
        other => other,
    }
}
