//! Run-state handlers: what is told that the guest stops and starts, in which order, and how a failure is undone.

use std::fmt;
use std::sync::{Arc, Mutex};

use crate::bql::Bql;
use crate::error::{Error, Result};
use crate::sys::clock::{monotonic_ns, wall_ns};
use crate::thread::{fence, lock};

/// The most handlers one guest may have.
pub const HANDLERS_MAX: usize = 4096;

/// What is happening.
///
/// `PrepareStart` undoes `PrepareStop` and `Starting` undoes `Stopped`; a call that failed needs no undoing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Phase {
    /// The guest has just stopped; comes to every handler before any gets `Stopped`.
    PrepareStop = 0,
    /// The guest is stopped.
    Stopped = 1,
    /// The guest is about to start; comes to every handler before any gets `Starting`.
    PrepareStart = 2,
    /// The guest starts next.
    Starting = 3,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::PrepareStop => "prepare-stop",
            Self::Stopped => "stopped",
            Self::PrepareStart => "prepare-start",
            Self::Starting => "starting",
        })
    }
}

/// A point in time, on both clocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moment {
    /// Nanoseconds since 1970.
    pub wall_ns: u64,
    /// `CLOCK_MONOTONIC` of this host, in nanoseconds.
    pub monotonic_ns: u64,
}

impl Moment {
    /// Now.
    pub fn now() -> Self {
        Self { wall_ns: wall_ns(), monotonic_ns: monotonic_ns() }
    }
}

/// Is told of stops and starts, with the big lock held, on the thread that stops or starts the guest.
pub trait RunHandler: Send + Sync {
    /// `at` is the same for all handlers of one stop (just after the stop hook) or start (before the first handler).
    fn run(&self, phase: Phase, at: &Moment) -> Result<()>;
}

impl<F: Fn(Phase, &Moment) -> Result<()> + Send + Sync> RunHandler for F {
    fn run(&self, phase: Phase, at: &Moment) -> Result<()> {
        self(phase, at)
    }
}

struct Entry {
    id: u32,
    priority: i32,
    name: String,
    handler: Arc<dyn RunHandler>,
}

impl Entry {
    fn call(&self, phase: Phase, at: &Moment, bql: &Bql) -> Result<()> {
        let who = format!("run-state handler {} '{}' (priority {}) in {phase}", self.id, self.name, self.priority);
        let done = fence(&who, || self.handler.run(phase, at).map_err(|e| e.context(format_args!("{who} failed"))));
        if bql.held() {
            return done;
        }
        // The handlers after it count on the lock.
        bql.lock()?;
        done.and(Err(Error::new(libc::EPERM, format!("{who} returned without the big lock it was called with"))))
    }
}

/// The handlers of one guest, in start order: ascending priority, then order of registration.
#[derive(Default)]
pub(super) struct Registry {
    list: Mutex<List>,
}

#[derive(Default)]
struct List {
    last_id: u32,
    /// A stop or start walks the handlers, so the list stays as it is.
    walking: bool,
    entries: Vec<Arc<Entry>>,
}

impl Registry {
    pub(super) fn add(&self, name: &str, priority: i32, handler: Arc<dyn RunHandler>) -> Result<u32> {
        let mut list = lock(&self.list);
        list.still("add a run-state handler")?;
        if list.entries.len() >= HANDLERS_MAX {
            return Err(Error::new(libc::ENOSPC, format!("a guest has at most {HANDLERS_MAX} run-state handlers")));
        }
        // Ids travel through C as positive ints and are never used twice.
        let id = list.last_id + 1;
        if i32::try_from(id).is_err() {
            return Err(Error::new(libc::ENOSPC, "this guest has used up its run-state handler ids"));
        }
        list.last_id = id;
        let at = list.entries.partition_point(|entry| entry.priority <= priority);
        list.entries.insert(at, Arc::new(Entry { id, priority, name: name.to_owned(), handler }));
        Ok(id)
    }

    pub(super) fn remove(&self, id: u32) -> Result<()> {
        let mut list = lock(&self.list);
        list.still("remove a run-state handler")?;
        let Some(at) = list.entries.iter().position(|entry| entry.id == id) else {
            return Err(Error::new(libc::ENOENT, format!("there is no run-state handler {id}")));
        };
        let entry = list.entries.remove(at);
        // Dropping the handler calls out, so no lock of ours is held.
        drop(list);
        drop(entry);
        Ok(())
    }

    /// Freezes the list for one stop or start. `stopped`: the handlers were told of a stop, or never of a start.
    pub(super) fn walk<'a>(&'a self, bql: &'a Bql, stopped: bool) -> Walk<'a> {
        let mut list = lock(&self.list);
        list.walking = true;
        let steps = list.entries.iter().map(|entry| Step::new(Arc::clone(entry), stopped)).collect();
        Walk { steps, bql, _still: Still(self) }
    }
}

impl List {
    fn still(&self, what: &str) -> Result<()> {
        if self.walking {
            return Err(Error::new(
                libc::EBUSY,
                format!("cannot {what} while the guest is being stopped or started"),
            ));
        }
        Ok(())
    }
}

struct Still<'a>(&'a Registry);

impl Drop for Still<'_> {
    fn drop(&mut self) {
        lock(&self.0.list).walking = false;
    }
}

struct Step {
    entry: Arc<Entry>,
    prepared: bool,
    stopped: bool,
}

impl Step {
    fn new(entry: Arc<Entry>, stopped: bool) -> Self {
        Self { entry, prepared: stopped, stopped }
    }
}

/// One stop or start: remembers how far each handler came, so that undoing it calls exactly those that need it.
pub(super) struct Walk<'a> {
    // Before `_still`: once handlers may be removed again, no one else may hold them.
    steps: Vec<Step>,
    bql: &'a Bql,
    _still: Still<'a>,
}

impl Walk<'_> {
    /// Tells of the stop whoever does not know yet: prepares first, descending. Ends at the first failure.
    pub(super) fn stop(&mut self, at: &Moment) -> Result<()> {
        for step in self.steps.iter_mut().rev() {
            step.go(Phase::PrepareStop, at, self.bql)?;
        }
        self.steps.iter_mut().rev().try_for_each(|step| step.go(Phase::Stopped, at, self.bql))
    }

    /// Tells of the start whoever does not know yet: prepares first, ascending. Ends at the first failure.
    pub(super) fn start(&mut self, at: &Moment) -> Result<()> {
        for step in &mut self.steps {
            step.go(Phase::PrepareStart, at, self.bql)?;
        }
        self.steps.iter_mut().try_for_each(|step| step.go(Phase::Starting, at, self.bql))
    }

    /// Like [`stop`](Self::stop), but failures hold nobody up: the guest is stopped, whether a handler likes it or not.
    pub(super) fn stop_again(&mut self, at: &Moment, mut failed: impl FnMut(Error)) {
        for phase in [Phase::PrepareStop, Phase::Stopped] {
            self.steps.iter_mut().rev().filter_map(|step| step.go(phase, at, self.bql).err()).for_each(&mut failed);
        }
    }
}

impl Step {
    /// Makes the call unless the handler is there already.
    fn go(&mut self, phase: Phase, at: &Moment, bql: &Bql) -> Result<()> {
        let (flag, after) = match phase {
            Phase::PrepareStop => (&mut self.prepared, true),
            Phase::Stopped => (&mut self.stopped, true),
            Phase::PrepareStart => (&mut self.prepared, false),
            Phase::Starting => (&mut self.stopped, false),
        };
        if *flag != after {
            self.entry.call(phase, at, bql)?;
            *flag = after;
        }
        Ok(())
    }
}
