//! The one harvester of a guest: asks the trackers and gives what they found to every reader.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use super::Tracker;
use super::set::DirtySet;
use crate::bitmap::Scan;
use crate::error::{Error, Result};
use crate::ram::{Block, PAGE, RamList};
use crate::thread::lock;

/// Marked pages given to the readers at once.
const HARVEST: usize = 4096;

/// Trackers and readers of one guest.
#[derive(Default)]
pub struct Hub {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    trackers: Vec<Arc<dyn Tracker>>,
    readers: Vec<Reader>,
    /// The trackers run though nobody reads.
    left_on: bool,
}

struct Reader {
    set: Arc<DirtySet>,
    list: RamList,
}

impl std::fmt::Debug for Hub {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let inner = self.lock();
        write!(f, "Hub({} trackers, {} readers)", inner.trackers.len(), inner.readers.len())
    }
}

impl Hub {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        lock(&self.inner)
    }

    /// Adds a tracker; refused while somebody reads.
    pub fn add_tracker(&self, tracker: Arc<dyn Tracker>) -> Result<()> {
        let mut inner = self.lock();
        if !inner.readers.is_empty() {
            return Err(Error::new(libc::EBUSY, "dirty tracking cannot be added while a migration runs"));
        }
        inner.trackers.push(tracker);
        Ok(())
    }

    /// Starts reading: every page of `list` is dirty at first. The first reader starts the trackers, for its blocks:
    /// later ones cannot have more.
    pub fn subscribe(&self, list: &RamList) -> Result<Arc<DirtySet>> {
        let mut inner = self.lock();
        check_covered(&inner.trackers, list)?;
        if let Some(first) = inner.readers.first()
            && let Some(block) = list.iter().find(|b| !first.list.iter().any(|other| Arc::ptr_eq(b, other)))
        {
            let text = format!("RAM block '{}' is not tracked by the migration that runs", block.name());
            return Err(Error::new(libc::EBUSY, text));
        }
        let set = Arc::new(DirtySet::all(list, &inner.trackers)?);
        if inner.readers.is_empty() {
            inner.rest();
            for (i, tracker) in inner.trackers.iter().enumerate() {
                if let Err(error) = tracker.start(list) {
                    inner.trackers[..i].iter().for_each(|t| t.stop());
                    return Err(error.context("switching dirty logging on"));
                }
            }
            // A log may begin with every page set. Reading it now lets the first round clear it chunk by chunk;
            // otherwise the second round would send everything again.
            for tracker in &inner.trackers {
                if let Err(error) = tracker.sync(&mut |_, _, _| ()) {
                    inner.trackers.iter().for_each(|t| t.stop());
                    return Err(error.context("reading the dirty log for the first time"));
                }
            }
        }
        inner.readers.push(Reader { set: Arc::clone(&set), list: Arc::clone(list) });
        Ok(set)
    }

    /// Ends reading, and leaves the trackers as they are, because to stop them takes long (KVM's log: up to 20 ms a GiB).
    pub fn leave(&self, set: &Arc<DirtySet>) {
        let mut inner = self.lock();
        let before = inner.readers.len();
        inner.readers.retain(|r| !Arc::ptr_eq(&r.set, set));
        inner.left_on |= before > 0 && inner.readers.is_empty();
    }

    /// Stops trackers that were left running, unless somebody reads again: a guest runs on here, or nobody comes back.
    pub fn rest(&self) {
        self.lock().rest();
    }

    /// Gives every reader what was written since the last call.
    pub fn sync(&self) -> Result<()> {
        let inner = self.lock();
        for tracker in &inner.trackers {
            tracker.sync(&mut |block, first, words| {
                inner.readers.iter().for_each(|r| r.set.add(block, first, words));
            })?;
        }
        inner.harvest_marks();
        Ok(())
    }

    /// Looks for writes after the last sync, when all pages were sent and nobody may write any more; names the first.
    pub fn check_quiet(&self, set: &DirtySet) -> Result<()> {
        self.sync()?;
        for index in 0..set.len() {
            if let Some((page, _)) = set.next_run(index, 0, 1) {
                let name = set.block(index).name();
                let offset = page as u64 * PAGE;
                return Err(Error::new(
                    libc::EBUSY,
                    format!(
                        "RAM block '{name}' was written at offset {offset:#x} after the guest was stopped and its \
                         memory sent: a device was still running when the stop hook and handlers had returned"
                    ),
                )
                .in_section("ram"));
            }
        }
        Ok(())
    }
}

impl Inner {
    fn rest(&mut self) {
        if std::mem::take(&mut self.left_on) {
            self.trackers.iter().for_each(|t| t.stop());
        }
    }

    /// Pages reported by `vmig_dirty`.
    fn harvest_marks(&self) {
        // Every reader's list is a snapshot; a block of any of them is harvested once, for all.
        let mut done: Vec<*const Block> = Vec::new();
        let mut words = Vec::new();
        for block in self.readers.iter().flat_map(|r| r.list.iter()) {
            if done.contains(&Arc::as_ptr(block)) {
                continue;
            }
            done.push(Arc::as_ptr(block));
            let mut scan = Scan::default();
            while block.marks().take_some(&mut scan, HARVEST, |word, bits| words.push((word, bits))) > 0 {
                self.readers.iter().for_each(|r| r.set.add_words(block, &words));
                words.clear();
            }
        }
    }
}

/// Refuses RAM whose writes nobody would see.
fn check_covered(trackers: &[Arc<dyn Tracker>], list: &RamList) -> Result<()> {
    for block in list.iter().filter(|b| b.is_sent() && !b.is_marked()) {
        let mut ranges: Vec<Range<usize>> = trackers.iter().flat_map(|t| t.covers(block)).collect();
        ranges.sort_by_key(|r| r.start);
        let mut next = 0;
        for range in ranges {
            if range.start > next {
                break;
            }
            next = next.max(range.end);
        }
        if next < block.pages() {
            let offset = next as u64 * PAGE;
            return Err(Error::invalid(format!(
                "writes to RAM block '{}' from offset {offset:#x} on would not be seen: register its KVM slots with \
                 vmig_add_kvm_slot, or set VMIG_RAM_MARKED and report every write with vmig_dirty",
                block.name()
            ))
            .in_section("ram"));
        }
    }
    Ok(())
}
