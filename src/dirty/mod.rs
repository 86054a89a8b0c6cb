//! Which pages were written: trackers know, one hub asks them, and everybody who cares reads from the hub.
//!
//! The discipline. A page's bit is taken, in the kernel too, *before* its bytes are read. A bit that was taken is owed
//! until the page arrived, so an attempt to a new destination starts with all pages. A write that nobody reports is
//! silent loss, so RAM that no tracker covers is refused.

pub mod callback;
pub mod choice;
pub mod cursor;
pub mod hub;
pub mod kvm_log;
pub mod kvm_ring;
pub mod kvm_slots;
mod nap;
mod places;
pub mod rate;
mod sample;
pub mod sent;
pub mod set;
pub mod write_protect;

use std::ops::Range;
use std::sync::Arc;

use crate::error::Result;
use crate::ram::{Block, RamList};

/// Takes what a tracker found: in `block`, from page `first` on, the pages whose bits are set.
pub type Found<'a> = dyn FnMut(&Arc<Block>, usize, &[u64]) + 'a;

/// Kinds of trackers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// KVM's dirty log.
    KvmLog,
    /// KVM's dirty ring.
    KvmRing,
    /// Write protection by the kernel, without KVM.
    WriteProtect,
    /// The VMM itself: marks and dirty sources.
    Callback,
}

impl Kind {
    /// Its name, as option `dirty-tracker` has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::KvmLog => "kvm-log",
            Self::KvmRing => "kvm-ring",
            Self::WriteProtect => "write-protect",
            Self::Callback => "callback",
        }
    }

    /// Its bit in a sum of kinds.
    pub const fn bit(self) -> u32 {
        1 << self as u32
    }
}

/// Something that knows which pages the guest wrote.
///
/// Calls come without the big lock, one at a time but for `clear`: that comes at any time, also beside a `sync`, and must
/// not clear what no reader has been told of yet.
pub trait Tracker: Send + Sync {
    /// Which kind it is.
    fn kind(&self) -> Kind;

    /// Its name in the status.
    fn name(&self) -> String {
        self.kind().name().to_owned()
    }

    /// Starts tracking the blocks of `list`. What was written before may or may not be reported.
    fn start(&self, list: &RamList) -> Result<()>;

    /// Stops tracking; called once for each `start` that succeeded.
    fn stop(&self);

    /// Reports every page written since `start`, unless [`clear`](Self::clear) was called for it after the write.
    /// A page may be reported too often, never too rarely.
    fn sync(&self, found: &mut Found<'_>) -> Result<()>;

    /// The given pages are about to be read: from here on a write to them is reported anew.
    fn clear(&self, block: &Block, pages: Range<usize>) -> Result<()>;

    /// Pages of `block` whose writes are seen.
    fn covers(&self, block: &Block) -> Vec<Range<usize>>;
}
