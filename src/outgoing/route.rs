//! Where a migration goes to, which the user may change while its connection is broken.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex};

use crate::error::Result;
use crate::sys::eventfd::{EventFd, Wake};
use crate::thread::lock;
use crate::transport::Target;

/// The way to the destination, shared by the migration and its user.
#[derive(Debug)]
pub struct Route {
    target: Mutex<Target>,
    changed: EventFd,
    left: Arc<Wake>,
}

impl Route {
    /// To this target.
    pub fn new(target: Target) -> Result<Self> {
        Ok(Self { target: Mutex::new(target), changed: EventFd::new()?, left: Arc::new(Wake::new()?) })
    }

    /// Where to.
    pub fn target(&self) -> Target {
        lock(&self.target).clone()
    }

    /// From now on to this one.
    pub fn change(&self, target: Target) {
        *lock(&self.target) = target;
        self.changed.set();
    }

    /// Somebody waits for the end of the migration's thread, whose state is said: what is only polite is left.
    pub fn leave(&self) {
        self.left.raise();
    }

    pub(super) fn left(&self) -> &Arc<Wake> {
        &self.left
    }

    /// The next wait is for a change that comes from now on.
    pub(super) fn looked(&self) {
        self.changed.clear();
    }
}

impl AsFd for Route {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.changed.as_fd()
    }
}
