//! The thread of a VMM that has only one. Such a VMM asks to be called back there and nowhere else; then no lock is
//! needed, and none is taken.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::current_token;
use crate::error::{Error, Result};

/// Knows the thread that made the handle, and whether callbacks may run on others.
#[derive(Debug)]
pub struct Home {
    /// Callbacks run on that thread only.
    manual: AtomicBool,
    token: usize,
    /// How deep in callbacks that thread is; only it looks and counts.
    depth: AtomicUsize,
}

impl Home {
    /// Of the calling thread; callbacks may run anywhere.
    pub fn new() -> Self {
        Self { manual: AtomicBool::new(false), token: current_token(), depth: AtomicUsize::new(0) }
    }

    /// Whether callbacks run on that thread only.
    pub fn is_manual(&self) -> bool {
        self.manual.load(Ordering::Acquire)
    }

    /// From here on callbacks run there only, or anywhere.
    pub fn set_manual(&self, manual: bool) {
        self.manual.store(manual, Ordering::Release);
    }

    /// Whether this is that thread.
    pub fn is_here(&self) -> bool {
        self.token == current_token()
    }

    /// Leave to call back from this thread, for as long as it is kept; none: another thread must do it.
    pub fn may_call(&self) -> Option<Inside<'_>> {
        if !self.is_manual() {
            return Some(Inside(None));
        }
        self.is_here().then(|| {
            self.depth.fetch_add(1, Ordering::Relaxed);
            Inside(Some(self))
        })
    }

    /// `EPERM` on a thread that may not call `what`.
    pub fn require_here(&self, what: &str) -> Result<()> {
        if !self.is_manual() || self.is_here() {
            return Ok(());
        }
        let text = format!(
            "cannot {what} from this thread: option 'dispatch' is manual, so the thread that made the \
                            handle must do it"
        );
        Err(Error::new(libc::EPERM, text))
    }

    /// The same for a call that may wait; `EDEADLK` from inside a callback, which what it waits for may have to follow.
    pub fn require_outside(&self, what: &str) -> Result<()> {
        self.require_here(what)?;
        if self.is_manual() && self.depth.load(Ordering::Relaxed) > 0 {
            return Err(Error::new(libc::EDEADLK, format!("cannot {what} from inside a callback")));
        }
        Ok(())
    }
}

impl Default for Home {
    fn default() -> Self {
        Self::new()
    }
}

/// Leave to call back.
#[derive(Debug)]
pub struct Inside<'a>(Option<&'a Home>);

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        if let Some(home) = self.0 {
            home.depth.fetch_sub(1, Ordering::Relaxed);
        }
    }
}
