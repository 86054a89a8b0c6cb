//! Callbacks that fail on purpose: the n-th call of a run returns an error, instead of being made or after it was made.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use crate::error::{Result, returned};
use crate::section::check::BODY_MAX;
use crate::section::table::Hooks;
use crate::thread::lock;

/// When a call that is to fail does so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Moment {
    /// At its first line: it is not called at all.
    Start,
    /// At its last: it did its work.
    End,
}

/// A call that was made: of whom, and which.
#[derive(Clone, Debug)]
pub(super) struct Call {
    pub(super) owner: String,
    pub(super) callback: String,
}

#[derive(Debug, Default)]
struct Calls {
    made: Vec<Call>,
    count: usize,
    strike: Option<(usize, Moment)>,
}

/// What the callbacks of a section under test pass through.
#[derive(Debug)]
pub struct Faults {
    calls: Mutex<Calls>,
    room: AtomicU64,
}

impl Default for Faults {
    fn default() -> Self {
        Self { calls: Mutex::default(), room: AtomicU64::new(BODY_MAX) }
    }
}

impl Faults {
    /// Calls kept by name; a device with more is tried at the first ones.
    pub(super) const CALLS_MAX: usize = 1024;

    /// Makes the call, unless it is the one to fail at its start; fails afterwards if it is the one to fail at its end.
    pub(in crate::section) fn around<T>(
        &self,
        owner: &str,
        callback: &str,
        call: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let strike = {
            let mut calls = lock(&self.calls);
            if calls.made.len() < Self::CALLS_MAX {
                calls.made.push(Call { owner: owner.to_owned(), callback: callback.to_owned() });
            }
            calls.count += 1;
            calls.strike.filter(|(at, _)| *at + 1 == calls.count).map(|(_, moment)| moment)
        };
        let fault = || returned(owner, callback, -libc::EIO).map(|_| ());
        if strike == Some(Moment::Start) {
            fault()?;
        }
        let value = call()?;
        if strike == Some(Moment::End) {
            fault()?;
        }
        Ok(value)
    }

    /// Forgets the calls so far; of those to come call `strike` fails.
    pub(super) fn arm(&self, strike: Option<(usize, Moment)>) {
        *lock(&self.calls) = Calls { strike, ..Calls::default() };
    }

    /// Calls since [`arm`](Self::arm).
    pub(super) fn count(&self) -> usize {
        lock(&self.calls).count
    }

    /// The first of them by name.
    pub(super) fn made(&self) -> Vec<Call> {
        lock(&self.calls).made.clone()
    }

    /// Bytes of a body after which memory runs out.
    pub(in crate::section) fn room(&self) -> u64 {
        self.room.load(Ordering::Relaxed)
    }

    /// Sets it; none: as much as a body may have.
    pub(super) fn set_room(&self, room: Option<u64>) {
        self.room.store(room.unwrap_or(BODY_MAX), Ordering::Relaxed);
    }
}

/// When it is fair to a device that `callback` fails.
pub(super) fn moments(callback: &str) -> &'static [Moment] {
    match callback {
        // Nothing is called to undo what it did.
        "pre_save" => &[Moment::Start],
        // A question, without work to do.
        "needed" => &[Moment::Start],
        // Not to call it at all would leave undone what it has to undo.
        "post_save" => &[Moment::End],
        _ => &[Moment::Start, Moment::End],
    }
}

/// Hooks of a table, with the faults in between.
pub(super) struct Faulty {
    pub(super) owner: String,
    pub(super) hooks: Arc<dyn Hooks>,
    pub(super) faults: Arc<Faults>,
}

impl Faulty {
    fn around<T: Default>(&self, callback: &str, call: impl FnOnce(&dyn Hooks) -> Result<T>) -> Result<T> {
        if !self.hooks.has(callback) {
            return call(&*self.hooks);
        }
        self.faults.around(&self.owner, callback, || call(&*self.hooks))
    }
}

impl Hooks for Faulty {
    fn has(&self, callback: &str) -> bool {
        self.hooks.has(callback)
    }

    fn needed(&self, device: *mut u8) -> Result<bool> {
        self.around("needed", |hooks| hooks.needed(device))
    }

    fn pre_save(&self, device: *mut u8) -> Result<()> {
        self.around("pre_save", |hooks| hooks.pre_save(device))
    }

    fn post_save(&self, device: *mut u8) -> Result<()> {
        self.around("post_save", |hooks| hooks.post_save(device))
    }

    fn pre_load(&self, device: *mut u8) -> Result<()> {
        self.around("pre_load", |hooks| hooks.pre_load(device))
    }

    fn post_load(&self, device: *mut u8, version: u32) -> Result<()> {
        self.around("post_load", |hooks| hooks.post_load(device, version))
    }
}
