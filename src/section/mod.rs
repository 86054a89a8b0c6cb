//! What a migration carries besides RAM: sections, and the ordered list of them.

pub mod builtin;
pub mod cdevice;
pub mod check;
pub mod codec;
pub mod convert;
pub mod custom;
pub mod device;
pub mod fds;
pub mod list;
mod memory;
pub mod ops;
pub mod shape;
pub mod staged;
pub mod stream;
pub mod table;
pub mod trial;

#[cfg(test)]
mod check_tests;
#[cfg(test)]
mod codec_tests;
#[cfg(test)]
mod convert_tests;
#[cfg(test)]
mod custom_tests;
#[cfg(test)]
mod fd_tests;
#[cfg(test)]
mod hook_tests;
#[cfg(test)]
mod list_tests;
#[cfg(test)]
mod random_tests;

use std::sync::Arc;

use crate::error::Result;
use crate::wire::input::Input;
use crate::wire::shape::Shape;
use fds::{Inbox, Outbox};
use trial::Subject;
use trial::faults::Faults;

/// Bytes still to be sent by a section.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pending {
    /// Must be sent before the guest may run on the destination.
    pub must_precopy: u64,
    /// May also be sent afterwards.
    pub can_postcopy: u64,
}

impl Pending {
    /// All of it.
    pub fn total(&self) -> u64 {
        self.must_precopy.saturating_add(self.can_postcopy)
    }
}

/// What part of a section a body belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// First body of an iterative section.
    Start,
    /// Body sent while the guest runs.
    Iterate,
    /// Last body of an iterative section, guest stopped.
    End,
    /// Whole state of a device, in one body.
    Full,
}

/// What applies a parsed body to the device. Runs once, with the big lock held.
pub type Apply<'a> = Box<dyn FnOnce() -> Result<()> + Send + 'a>;

/// State that travels in the stream under a name.
///
/// Saving appends a body to a buffer, so the big lock is never held while a peer is waited for. Loading is two steps:
/// `parse` takes the body from the stream without the big lock and without touching the device; what it returns is
/// then run with the lock. A truncated body therefore never leaves a device half loaded.
pub trait Section: Send + Sync {
    /// The list took the section: from here on its owner need not free anything. No callback may run here.
    fn registered(&self) {}

    /// Whether the section takes part in this migration. \[bql\] or not.
    fn is_active(&self) -> bool {
        true
    }

    /// Whether `iterate` is worth calling now. Without the big lock.
    fn is_active_iterate(&self) -> bool {
        true
    }

    /// Asked before anything is sent; an error refuses the migration. Nothing needs to be undone for it. \[bql\]
    fn prepare(&self) -> Result<()> {
        Ok(())
    }

    /// True: START/PART/END bodies. False: one FULL body.
    fn is_iterative(&self) -> bool {
        false
    }

    /// A FULL section that goes out in the setup walk, while the guest still runs.
    fn is_early(&self) -> bool {
        false
    }

    /// Body of START. \[bql\]
    fn setup(&self, _out: &mut Vec<u8>) -> Result<()> {
        Ok(())
    }

    /// Cheap guess of what is left. Called in every loop, without the big lock.
    fn pending_estimate(&self) -> Result<Pending> {
        Ok(Pending::default())
    }

    /// Exact amount left. Called when the estimate is below the threshold, without the big lock.
    fn pending_exact(&self) -> Result<Pending> {
        self.pending_estimate()
    }

    /// Body of PART; at most about `budget` bytes. True: nothing left for now. Without the big lock.
    fn iterate(&self, _out: &mut Vec<u8>, _budget: u64) -> Result<bool> {
        Ok(true)
    }

    /// The guest is about to be stopped at the source: what can be prepared without touching the device need not be waited
    /// for then. On either side, without the big lock; a switchover need not follow.
    fn about_to_switch(&self) {}

    /// Body of END (iterative) or FULL, guest stopped (or running, if early). \[bql\]
    fn complete(&self, out: &mut Vec<u8>) -> Result<()>;

    /// The same, for a section that may have file descriptors: these go into `fds`. \[bql\]
    fn complete_with_fds(&self, out: &mut Vec<u8>, _fds: &mut Outbox) -> Result<()> {
        self.complete(out)
    }

    /// Saves as [`complete`](Self::complete) does, while the guest runs, only for the time and the bytes it takes. False:
    /// that might have an effect on the device, and was not done. \[bql\]
    fn rehearse(&self, _out: &mut Vec<u8>) -> Result<bool> {
        Ok(false)
    }

    /// Fields that are file descriptors in a body of `version`, parts not counted: both sides must agree on them.
    fn fd_fields(&self, _version: u32) -> Vec<String> {
        Vec::new()
    }

    /// What a body of `version` looks like, for the comparison with the peer; its parts at the versions that the peer has,
    /// where they can be read. Empty: only the section's own code knows.
    fn shape(&self, _version: u32, _peer: Option<&Shape>) -> Shape {
        Shape::new()
    }

    /// Fields that are file descriptors in a body saved now, parts included. \[bql\]
    fn fds_to_send(&self) -> Result<Vec<String>> {
        Ok(Vec::new())
    }

    /// Whether `complete` may also be called where it was loaded, and must give the bytes it was loaded from.
    fn saves_again(&self) -> bool {
        false
    }

    /// Whether loading writes guest RAM.
    fn writes_ram(&self) -> bool {
        false
    }

    /// Undoes `setup`; called exactly once for each setup that was tried. \[bql\]
    fn cleanup(&self) {}

    /// Called once before the first body arrives. \[bql\]
    fn load_setup(&self) -> Result<()> {
        Ok(())
    }

    /// Takes one body of `version` from `input`. Without the big lock.
    fn parse<'a>(&'a self, part: Part, version: u32, input: &mut dyn Input) -> Result<Apply<'a>>;

    /// The same, for a section that may have file descriptors: these are taken from `fds`.
    fn parse_with_fds<'a>(
        &'a self,
        part: Part,
        version: u32,
        input: &mut dyn Input,
        _fds: &Arc<Inbox>,
    ) -> Result<Apply<'a>> {
        self.parse(part, version, input)
    }

    /// The same state, for a test of the section, with callbacks that pass through `faults`. None: a section of the
    /// library's own.
    fn subject(&self, _faults: &Arc<Faults>) -> Option<Subject<'_>> {
        None
    }

    /// Undoes `load_setup`, told whether the migration succeeded; exactly once. \[bql\]
    fn load_cleanup(&self, _ok: bool) {}

    /// Entry for the stream's JSON description (keys `vmsd_name`, `version`, `fields`, `subsections`), for FULL
    /// sections. `body` is what `complete` appended.
    fn describe(&self, body: &[u8]) -> serde_json::Value {
        raw_description(body)
    }
}

/// Description of a body of which nothing is known but its size.
fn raw_description(body: &[u8]) -> serde_json::Value {
    serde_json::json!({"fields": [{"name": "data", "type": "buffer", "size": body.len()}]})
}
