//! The registered sections in their order, what blocks migration, and the ids a stream uses for sections.

use std::sync::{Arc, Mutex, MutexGuard};

use super::Section;
use super::check;
use super::codec::version_fits;
use crate::error::{Error, Result};
use crate::thread::lock;

/// Most sections of one guest, devices without state included.
pub const SECTIONS_MAX: usize = 16384;
/// Most reasons not to migrate at a time.
pub const BLOCKERS_MAX: usize = 1024;
/// Longest reason, in bytes.
pub const REASON_MAX: usize = 1024;

/// What a device has to send. It has to say so; nothing defaults to fine.
#[derive(Clone)]
pub enum Content {
    /// State, in this section.
    State(Arc<dyn Section>),
    /// Nothing, and it was declared so.
    None,
}

/// A registered section.
#[derive(Clone)]
pub struct Entry {
    /// Name in the stream.
    pub name: String,
    /// Which of several sections of the name.
    pub instance: u32,
    /// Version that is sent.
    pub version: u32,
    /// Oldest version that is read.
    pub oldest: u32,
    /// Higher comes first.
    pub priority: i32,
    /// Label in the stream, never used twice. Given by the list.
    pub id: u32,
    /// What to remove the section by: the device's address or the VMM's pointer; 0: it cannot be removed.
    pub key: usize,
    /// What it sends.
    pub content: Content,
}

impl std::fmt::Debug for Entry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Entry").field("name", &self.name).field("instance", &self.instance).finish_non_exhaustive()
    }
}

impl Entry {
    /// An entry of default priority that reads one version and cannot be removed.
    pub fn new(name: impl Into<String>, instance: u32, version: u32, content: Content) -> Self {
        Self { name: name.into(), instance, version, oldest: version, priority: 0, id: 0, key: 0, content }
    }

    /// Its section, unless it has no state.
    pub fn section(&self) -> Option<&Arc<dyn Section>> {
        match &self.content {
            Content::State(section) => Some(section),
            Content::None => None,
        }
    }
}

/// A reason not to migrate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blocker {
    /// What to remove it by; positive.
    pub id: i32,
    /// For people: what cannot be migrated, and why.
    pub reason: String,
}

/// All sections of a guest. The inner lock is never held while a section is called or dropped.
#[derive(Debug, Default)]
pub struct SectionList {
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    /// In walking order.
    entries: Vec<Entry>,
    /// A copy of `entries`, made when it is asked for: a migration keeps the one it began with.
    snapshot: Option<Arc<[Entry]>>,
    next_id: u32,
    blockers: Vec<Blocker>,
    next_blocker: i32,
}

impl Default for Inner {
    fn default() -> Self {
        Self { entries: Vec::new(), snapshot: None, next_id: 0, blockers: Vec::new(), next_blocker: 1 }
    }
}

impl SectionList {
    /// An empty list.
    pub fn new() -> Self {
        Self::default()
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        lock(&self.inner)
    }

    /// Adds an entry behind those of its priority and gives it an id, which is returned. `EEXIST`: name and instance
    /// are taken. On failure the entry is dropped unregistered.
    pub fn add(&self, mut entry: Entry) -> Result<u32> {
        check::name("the section", &entry.name)?;
        if entry.oldest > entry.version {
            return Err(Error::invalid("oldest <= version must hold").in_section(&entry.name));
        }
        let section = entry.section().cloned();
        let id = {
            let mut inner = self.inner();
            let same = |e: &&Entry| e.name == entry.name && e.instance == entry.instance;
            if inner.entries.iter().any(|e| same(&e)) {
                let text = format!("a section of this name with instance {} exists already", entry.instance);
                return Err(Error::new(libc::EEXIST, text).in_section(&entry.name));
            }
            if inner.entries.len() >= SECTIONS_MAX {
                return Err(Error::new(libc::ENOSPC, format!("more than {SECTIONS_MAX} sections")));
            }
            let id = inner.next_id;
            inner.next_id = id.checked_add(1).ok_or_else(|| Error::new(libc::ENOSPC, "no section ids left"))?;
            entry.id = id;
            let at = inner.entries.partition_point(|e| e.priority >= entry.priority);
            inner.entries.insert(at, entry);
            // Old snapshots share their sections with the list, so nothing is freed here with the lock held.
            inner.snapshot = None;
            id
        };
        if let Some(section) = section {
            section.registered();
        }
        Ok(id)
    }

    /// Removes every entry with this key and returns them, to be dropped where the caller may run callbacks.
    pub fn remove(&self, key: usize) -> Result<Vec<Entry>> {
        if key == 0 {
            return Err(Error::invalid("NULL identifies no device"));
        }
        let mut inner = self.inner();
        let (gone, kept): (Vec<_>, Vec<_>) = inner.entries.drain(..).partition(|e| e.key == key);
        inner.entries = kept;
        if gone.is_empty() {
            return Err(Error::new(libc::ENOENT, "no device or section was registered with this pointer"));
        }
        inner.snapshot = None;
        Ok(gone)
    }

    /// The entries as of now, in walking order.
    pub fn snapshot(&self) -> Arc<[Entry]> {
        let mut inner = self.inner();
        if let Some(snapshot) = &inner.snapshot {
            return snapshot.clone();
        }
        let snapshot: Arc<[Entry]> = inner.entries.as_slice().into();
        inner.snapshot = Some(snapshot.clone());
        snapshot
    }

    /// Adds a reason not to migrate and returns its id.
    pub fn block(&self, reason: &str) -> Result<i32> {
        if reason.is_empty() || reason.len() > REASON_MAX {
            return Err(Error::invalid(format!("a reason not to migrate has 1 to {REASON_MAX} bytes")));
        }
        let mut inner = self.inner();
        let id = inner.next_blocker;
        if inner.blockers.len() >= BLOCKERS_MAX || id == i32::MAX {
            return Err(Error::new(libc::ENOSPC, format!("more than {BLOCKERS_MAX} reasons not to migrate")));
        }
        inner.next_blocker = id + 1;
        inner.blockers.push(Blocker { id, reason: reason.to_owned() });
        Ok(id)
    }

    /// Takes a reason back. `ENOENT`: there is none with this id.
    pub fn unblock(&self, id: i32) -> Result<()> {
        let mut inner = self.inner();
        match inner.blockers.iter().position(|b| b.id == id) {
            Some(at) => {
                inner.blockers.remove(at);
                Ok(())
            }
            None => Err(Error::new(libc::ENOENT, format!("no reason not to migrate has the id {id}"))),
        }
    }

    /// The reasons not to migrate, oldest first.
    pub fn blockers(&self) -> Vec<Blocker> {
        self.inner().blockers.clone()
    }

    /// `EBUSY` with all reasons if there are any.
    pub fn check_unblocked(&self) -> Result<()> {
        let reasons: Vec<String> = self.blockers().into_iter().map(|b| b.reason).collect();
        if reasons.is_empty() {
            return Ok(());
        }
        Err(Error::new(libc::EBUSY, format!("migration is blocked: {}", reasons.join("; "))))
    }
}

/// Which entry each id of an incoming stream stands for.
#[derive(Debug)]
pub struct Bindings {
    entries: Arc<[Entry]>,
    /// For each entry the id and version of its last START or FULL.
    bound: Vec<Option<(u32, u32)>>,
}

impl Bindings {
    /// Nothing is bound yet.
    pub fn new(entries: Arc<[Entry]>) -> Self {
        let bound = vec![None; entries.len()];
        Self { entries, bound }
    }

    /// The entry a START or FULL section names, bound to `id` from now on.
    pub fn bind(&mut self, id: u32, name: &str, instance: u32, version: u32) -> Result<(&Entry, &Arc<dyn Section>)> {
        let found = self.entries.iter().position(|e| e.name == name && e.instance == instance);
        let Some(at) = found else {
            return Err(self.unknown(name, instance));
        };
        let entry = &self.entries[at];
        let Some(section) = entry.section() else {
            return Err(Error::invalid(
                "the other side sends state of a device that was declared without state here",
            )
            .in_section(name));
        };
        version_fits(name, version, entry.version, entry.oldest).map_err(|e| e.in_section(name))?;
        self.bound[at] = Some((id, version));
        Ok((entry, section))
    }

    /// Fails if a section with state here got none: nothing defaults to fine. `complete`: whether the stream had all of
    /// the section's bodies.
    pub fn check_complete(&self, takes_part: &[bool], complete: impl Fn(u32) -> bool) -> Result<()> {
        for ((entry, bound), takes_part) in self.entries.iter().zip(&self.bound).zip(takes_part) {
            let Some(section) = entry.section().filter(|_| *takes_part) else { continue };
            let what = match bound {
                None => "no state",
                Some((id, _)) if section.is_iterative() && !complete(*id) => "only a part of the state",
                Some(_) => continue,
            };
            let text = format!("the stream has {what} of '{}' (instance {})", entry.name, entry.instance);
            return Err(Error::new(libc::ENOENT, text).in_section(&entry.name));
        }
        Ok(())
    }

    /// The entry and version bound to `id`, for PART and END. Of several, the first in walking order.
    pub fn find(&self, id: u32) -> Result<(&Entry, &Arc<dyn Section>, u32)> {
        let bound = self.entries.iter().zip(&self.bound);
        let mut found = bound.filter_map(|(entry, bound)| match (entry.section(), bound) {
            (Some(section), Some((bound, version))) if *bound == id => Some((entry, section, *version)),
            _ => None,
        });
        found.next().ok_or_else(|| {
            Error::invalid(format!("section id {id} was not introduced by a START section before its PART or END"))
        })
    }

    fn unknown(&self, name: &str, instance: u32) -> Error {
        let same: Vec<String> =
            self.entries.iter().filter(|e| e.name == name).take(8).map(|e| e.instance.to_string()).collect();
        let text = if same.is_empty() {
            format!(
                "unknown section '{name}' instance {instance}: no device or section of this name is registered here"
            )
        } else {
            let same = same.join(", ");
            format!("unknown instance {instance} of section '{name}': registered here with instance {same}")
        };
        Error::invalid(text).in_section(name)
    }
}
