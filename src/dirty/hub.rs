//! The one harvester of a guest: asks the trackers and gives what they found to every reader.

use std::sync::{Arc, Mutex, MutexGuard};

use super::Tracker;
use super::choice::{Choice, Plan};
use super::set::DirtySet;
use super::write_protect::WriteProtect;
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
    /// What tracked last, as bits and in words. Apart, because a callback that is asked for what was written may ask for
    /// this.
    last: Mutex<(u32, String)>,
}

#[derive(Default)]
struct Inner {
    /// What was registered.
    trackers: Vec<Arc<dyn Tracker>>,
    readers: Vec<Reader>,
    /// The trackers that run, and for what; also when everybody who read has left them on.
    running: Option<Plan>,
    /// Whether this kernel write-protects; asked once.
    write_protect: Option<Result<Arc<WriteProtect>>>,
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

    /// Forgets a tracker; refused while somebody reads.
    pub fn remove_tracker(&self, tracker: &Arc<dyn Tracker>) -> Result<()> {
        let mut inner = self.lock();
        if !inner.readers.is_empty() {
            return Err(Error::new(libc::EBUSY, "dirty tracking cannot be removed while a migration runs"));
        }
        inner.rest();
        inner.trackers.retain(|t| !Arc::ptr_eq(t, tracker));
        Ok(())
    }

    /// Starts reading: every page of `list` is dirty at first. The first reader starts the trackers, for its blocks:
    /// later ones cannot have more.
    pub fn subscribe(&self, list: &RamList, choice: Choice) -> Result<Arc<DirtySet>> {
        let mut inner = self.lock();
        if let Some(first) = inner.readers.first() {
            if let Some(block) = list.iter().find(|b| !first.list.iter().any(|other| Arc::ptr_eq(b, other))) {
                let text = format!("RAM block '{}' is not tracked by the migration that runs", block.name());
                return Err(Error::new(libc::EBUSY, text));
            }
        } else {
            inner.rest();
            *lock(&self.last) = inner.begin(list, choice)?;
        }
        let trackers: Vec<_> = inner.running.iter().flat_map(Plan::trackers).cloned().collect();
        let set = Arc::new(DirtySet::all(list, &trackers).inspect_err(|_| {
            if inner.readers.is_empty() {
                inner.rest();
            }
        })?);
        inner.readers.push(Reader { set: Arc::clone(&set), list: Arc::clone(list) });
        Ok(set)
    }

    /// Whether writes to `list` could be tracked as `choice` says, or why not. Nothing of the guest is touched.
    pub fn rehearse(&self, list: &RamList, choice: Choice) -> Result<()> {
        self.lock().plan(list, choice).map(drop)
    }

    /// What tracks now or tracked last: a sum of [`Kind::bit`](super::Kind::bit) (or
    /// [`NOTHING_BIT`](super::choice::NOTHING_BIT)), and in words. Empty: nothing ever did.
    pub fn in_use(&self) -> (u32, String) {
        lock(&self.last).clone()
    }

    /// Ends reading. The last reader stops the trackers.
    pub fn unsubscribe(&self, set: &Arc<DirtySet>) {
        self.leave(set);
        self.rest();
    }

    /// Ends reading, and leaves the trackers as they are, because to stop them takes long (KVM's log: up to 20 ms a GiB).
    pub fn leave(&self, set: &Arc<DirtySet>) {
        self.lock().readers.retain(|r| !Arc::ptr_eq(&r.set, set));
    }

    /// Stops trackers that run though nobody reads: a guest runs on here, or nobody comes back.
    pub fn rest(&self) {
        self.lock().rest();
    }

    /// Stops all trackers: nobody reads any more, even who never said so.
    pub fn end(&self) {
        let mut inner = self.lock();
        inner.readers.clear();
        inner.rest();
    }

    /// Gives every reader what was written since the last call.
    pub fn sync(&self) -> Result<()> {
        let inner = self.lock();
        for tracker in inner.running.iter().flat_map(Plan::trackers) {
            let done = tracker.sync(&mut |block, first, words| {
                inner.readers.iter().for_each(|r| r.set.add(block, first, words));
            });
            if let Err(error) = done {
                // What it took and could not tell is anybody's guess, so whoever goes on reading has everything to read.
                inner.readers.iter().for_each(|r| r.set.add_all());
                return Err(error);
            }
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
        if self.readers.is_empty()
            && let Some(plan) = self.running.take()
        {
            plan.trackers().for_each(|t| t.stop());
        }
    }

    /// The trackers that `choice` takes for `list`.
    fn plan(&mut self, list: &RamList, choice: Choice) -> Result<Plan> {
        let Self { trackers, write_protect, .. } = self;
        let probed = std::cell::RefCell::new(write_protect);
        Plan::new(choice, trackers, list, &|| {
            let mut probed = probed.borrow_mut();
            let found = probed.get_or_insert_with(|| WriteProtect::new().map(Arc::new));
            found.clone().map(|tracker| tracker as Arc<dyn Tracker>)
        })
    }

    /// Starts them; says which they are.
    fn begin(&mut self, list: &RamList, choice: Choice) -> Result<(u32, String)> {
        let plan = self.plan(list, choice)?;
        for (i, (tracker, blocks)) in plan.parts.iter().enumerate() {
            if let Err(error) = tracker.start(blocks) {
                plan.trackers().take(i).for_each(|t| t.stop());
                return Err(error.context(format_args!("starting dirty tracker {}", tracker.name())));
            }
        }
        // A log may begin with every page set. Reading it now lets the first round clear it chunk by chunk;
        // otherwise the second round would send everything again.
        for tracker in plan.trackers() {
            if let Err(error) = tracker.sync(&mut |_, _, _| ()) {
                plan.trackers().for_each(|t| t.stop());
                return Err(error.context("reading the dirty log for the first time"));
            }
        }
        let names = (plan.bits(), plan.describe());
        self.running = Some(plan);
        Ok(names)
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
