//! Which tracker watches which RAM block.

use std::fmt::Write;
use std::ops::Range;
use std::sync::Arc;

use super::{Kind, Tracker};
use crate::error::{Error, Result};
use crate::options::{Opt, Options};
use crate::ram::{Block, PAGE, RamList};

/// What option `dirty-tracker` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// Whatever sees all writes: KVM where its slots are known, the VMM where it says so, write protection elsewhere.
    Auto,
    /// This one alone, and the VMM's own marks and sources.
    Only(Kind),
    /// None: the guest is stopped before its memory is sent.
    Nothing,
}

impl Choice {
    /// The option's value.
    pub fn of(options: &Options) -> Self {
        match options.get(Opt::DirtyTracker) {
            0 => Self::Auto,
            1 => Self::Only(Kind::KvmLog),
            2 => Self::Only(Kind::KvmRing),
            3 => Self::Only(Kind::WriteProtect),
            4 => Self::Only(Kind::Callback),
            _ => Self::Nothing,
        }
    }
}

/// Who tracks what.
pub(super) struct Plan {
    /// Each tracker with its blocks.
    pub(super) parts: Vec<(Arc<dyn Tracker>, RamList)>,
    /// Blocks whose writes the VMM alone reports.
    reported: Vec<Arc<Block>>,
    nothing: bool,
}

/// Gives the tracker that any memory can have, or the reason why this kernel has none.
pub(super) type Anywhere<'a> = dyn Fn() -> Result<Arc<dyn Tracker>> + 'a;

impl Plan {
    /// Chooses among the registered `trackers`; RAM whose writes nobody would see is refused.
    pub(super) fn new(
        choice: Choice,
        trackers: &[Arc<dyn Tracker>],
        list: &RamList,
        anywhere: &Anywhere<'_>,
    ) -> Result<Self> {
        let mut plan = Self { parts: Vec::new(), reported: Vec::new(), nothing: choice == Choice::Nothing };
        if plan.nothing {
            return Ok(plan);
        }
        let sent: Vec<&Arc<Block>> = list.iter().filter(|b| b.is_sent()).collect();
        let is_asked = |kind: Kind| kind == Kind::Callback || matches!(choice, Choice::Only(only) if only == kind);
        let mut used: Vec<&Arc<dyn Tracker>> = Vec::new();
        for tracker in trackers {
            let kind = tracker.kind();
            if is_asked(kind) || (choice == Choice::Auto && kind != Kind::WriteProtect) {
                used.push(tracker);
            }
        }
        if let Choice::Only(kind @ (Kind::KvmLog | Kind::KvmRing)) = choice {
            check_present(kind, &used, trackers)?;
        }
        let mut protected = Vec::new();
        for block in sent.iter().copied() {
            let by_vmm = block.is_marked() || choice == Choice::Only(Kind::Callback);
            match (choice, uncovered(&used, block)) {
                (Choice::Only(Kind::WriteProtect), _) => protected.push(Arc::clone(block)),
                (_, None) => {}
                (_, Some(_)) if by_vmm => plan.reported.push(Arc::clone(block)),
                (Choice::Auto, Some(_)) => protected.push(Arc::clone(block)),
                (_, Some(page)) => return Err(unseen(block, page, None)),
            }
        }
        let rest: RamList = list.iter().filter(|b| !protected.iter().any(|p| Arc::ptr_eq(p, b))).cloned().collect();
        for tracker in used {
            let blocks = if tracker.kind() == Kind::Callback { list } else { &rest };
            plan.parts.push((Arc::clone(tracker), Arc::clone(blocks)));
        }
        if let Some(block) = protected.first() {
            let tracker = anywhere().map_err(|why| match choice {
                Choice::Auto => unseen(block, uncovered_page(&plan.parts, block), Some(&why)),
                _ => why.context("option 'dirty-tracker' is write-protect, but"),
            })?;
            plan.parts.push((tracker, protected.into()));
        }
        Ok(plan)
    }

    /// The trackers.
    pub(super) fn trackers(&self) -> impl Iterator<Item = &Arc<dyn Tracker>> {
        self.parts.iter().map(|(tracker, _)| tracker)
    }

    /// In words: each tracker and the blocks whose writes it reports.
    pub(super) fn describe(&self) -> String {
        if self.nothing {
            return "none (the guest is stopped before its memory is sent)".to_owned();
        }
        let mut text = String::new();
        let mut add = |what: &str, blocks: &mut dyn Iterator<Item = &Arc<Block>>| {
            let names: Vec<&str> = blocks.map(|b| b.name()).collect();
            if !names.is_empty() {
                let comma = if text.is_empty() { "" } else { ", " };
                let _ = write!(text, "{comma}{what} ({})", names.join(", "));
            }
        };
        for (tracker, blocks) in &self.parts {
            add(&tracker.name(), &mut blocks.iter().filter(|b| b.is_sent() && !tracker.covers(b).is_empty()));
        }
        add(Kind::Callback.name(), &mut self.reported.iter());
        text
    }

    /// Bit n: the tracker of number n (see [`Kind`]) is used.
    pub(super) fn bits(&self) -> u32 {
        let covers = |(tracker, blocks): &&(Arc<dyn Tracker>, RamList)| {
            tracker.kind() == Kind::Callback || blocks.iter().any(|b| b.is_sent() && !tracker.covers(b).is_empty())
        };
        let mut bits = self.parts.iter().filter(covers).fold(0, |bits, (tracker, _)| bits | tracker.kind().bit());
        if !self.reported.is_empty() {
            bits |= Kind::Callback.bit();
        }
        if self.nothing { NOTHING_BIT } else { bits }
    }
}

/// The bit of "no tracker".
pub const NOTHING_BIT: u32 = 16;

/// The first page of a block whose writes none of the trackers sees.
fn uncovered(trackers: &[&Arc<dyn Tracker>], block: &Block) -> Option<usize> {
    let mut ranges: Vec<Range<usize>> = trackers.iter().flat_map(|t| t.covers(block)).collect();
    ranges.sort_by_key(|r| r.start);
    let mut next = 0;
    for range in ranges {
        if range.start > next {
            break;
        }
        next = next.max(range.end);
    }
    (next < block.pages()).then_some(next)
}

fn uncovered_page(parts: &[(Arc<dyn Tracker>, RamList)], block: &Block) -> usize {
    let trackers: Vec<_> = parts.iter().map(|(tracker, _)| tracker).collect();
    uncovered(&trackers, block).unwrap_or(0)
}

fn unseen(block: &Block, page: usize, why: Option<&Error>) -> Error {
    let (name, offset) = (block.name(), page as u64 * PAGE);
    let why = why.map(|why| format!("; write protection cannot be used: {}", why.text())).unwrap_or_default();
    Error::invalid(format!(
        "writes to RAM block '{name}' from offset {offset:#x} on would not be seen: register its KVM slots with \
         vmig_add_kvm_slot, or set VMIG_RAM_MARKED and report every write with vmig_dirty, or set option \
         'dirty-tracker'{why}"
    ))
    .in_section("ram")
    .by_option("dirty-tracker")
}

fn check_present(kind: Kind, used: &[&Arc<dyn Tracker>], all: &[Arc<dyn Tracker>]) -> Result<()> {
    if used.iter().any(|t| t.kind() == kind) {
        return Ok(());
    }
    let text = match (kind, all.iter().find(|t| matches!(t.kind(), Kind::KvmLog | Kind::KvmRing))) {
        (_, None) => "the library knows of no KVM guest: call vmig_use_kvm and vmig_add_kvm_slot",
        (Kind::KvmRing, Some(_)) => {
            "the VMM did not enable KVM's dirty ring: KVM_CAP_DIRTY_LOG_RING must come before the first vCPU"
        }
        _ => "the VMM enabled KVM's dirty ring, which has no log beside it",
    };
    let text = format!("option 'dirty-tracker' is {}, but {text}", kind.name());
    Err(Error::invalid(text).in_section("ram").by_option("dirty-tracker"))
}
