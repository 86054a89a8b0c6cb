//! Descriptors of devices on their way: out of the device's struct at the source, into it at the destination.
//!
//! In a body a descriptor is a number (be32): which of the descriptors of this migration it is, or none. The descriptors
//! themselves travel beside the bytes, ahead of the bodies that name them.
#![allow(unsafe_code, reason = "takes members back that descriptors were put into")]

use std::ffi::c_int;
use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd};
use std::sync::Mutex;

use super::memory::{copy_out, int_at};
use crate::error::{Error, Result};
use crate::sys::io;
use crate::thread::lock;

/// Descriptors the devices of a guest may have.
pub const DEVICE_FDS_MAX: usize = 4096;
/// In a body: no descriptor.
pub const NO_FD: u32 = u32::MAX;
/// In memory: no descriptor.
const NONE: c_int = -1;

/// Descriptors that devices handed in while they were saved.
#[derive(Debug, Default)]
pub struct Outbox {
    waiting: Vec<OwnedFd>,
    gone: usize,
}

impl Outbox {
    /// Takes a copy of a device's descriptor; what stands for it in the body.
    pub(super) fn add(&mut self, fd: c_int) -> Result<u32> {
        if fd == NONE {
            return Ok(NO_FD);
        }
        let number = self.gone + self.waiting.len();
        if number == DEVICE_FDS_MAX {
            let text = format!("the devices of a guest have at most {DEVICE_FDS_MAX} descriptors");
            return Err(Error::new(libc::E2BIG, text));
        }
        let own = io::duplicate(fd).map_err(|e| e.context("neither -1 nor an open file descriptor"))?;
        self.waiting.push(own);
        u32::try_from(number).map_err(|_| Error::new(libc::E2BIG, "too many descriptors"))
    }

    /// The descriptors since the last call, in order.
    pub fn take(&mut self) -> Vec<OwnedFd> {
        self.gone += self.waiting.len();
        std::mem::take(&mut self.waiting)
    }

    /// Whether descriptors wait.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }
}

/// A member that a descriptor was put into, in the struct of a registered device.
#[derive(Clone, Copy, Debug)]
struct Member(*mut u8);

// SAFETY: only an address, followed with the big lock held.
unsafe impl Send for Member {}

#[derive(Debug, Default)]
struct Arrived {
    fds: Vec<Option<OwnedFd>>,
    placed: Vec<(Member, OwnedFd)>,
}

/// Descriptors that arrived, until the migration has succeeded; dropped before that they are closed.
#[derive(Debug, Default)]
pub struct Inbox(Mutex<Arrived>);

impl Inbox {
    /// More of them.
    pub fn add(&self, fds: Vec<OwnedFd>) -> Result<()> {
        let mut arrived = lock(&self.0);
        if arrived.fds.len() + fds.len() > DEVICE_FDS_MAX {
            return Err(Error::new(libc::E2BIG, format!("more than {DEVICE_FDS_MAX} descriptors of devices")));
        }
        arrived.fds.extend(fds.into_iter().map(Some));
        Ok(())
    }

    /// The descriptor a body names; none if it names none.
    pub(super) fn claim(&self, number: u32) -> Result<Option<OwnedFd>> {
        if number == NO_FD {
            return Ok(None);
        }
        let mut arrived = lock(&self.0);
        let slot = usize::try_from(number).ok().and_then(|index| arrived.fds.get_mut(index));
        let text = format!("descriptor {number} did not arrive, or was taken before");
        slot.and_then(Option::take).map(Some).ok_or_else(|| Error::new(libc::EPROTO, text))
    }

    /// Puts a descriptor, or none, into the member at `to`. \[bql\]
    ///
    /// # Safety
    /// `to` is an `int` of a registered device, and stays one until [`give`](Self::give) or
    /// [`take_back`](Self::take_back); with the big lock held nobody else uses it.
    pub(super) unsafe fn place(&self, fd: Option<OwnedFd>, to: *mut u8) {
        let number = fd.as_ref().map_or(NONE, AsRawFd::as_raw_fd);
        // SAFETY: the caller vouches for `to`.
        unsafe { copy_out(&number.to_ne_bytes(), to) };
        if let Some(fd) = fd {
            lock(&self.0).placed.push((Member(to), fd));
        }
    }

    /// Fails if a descriptor arrived that no device wanted.
    pub fn check_empty(&self) -> Result<()> {
        match lock(&self.0).fds.iter().flatten().count() {
            0 => Ok(()),
            n => Err(Error::new(libc::EPROTO, format!("{n} file descriptors came that no device has a field for"))),
        }
    }

    /// Whether descriptors were put into members.
    pub fn has_placed(&self) -> bool {
        !lock(&self.0).placed.is_empty()
    }

    /// The migration succeeded: the descriptors are the VMM's.
    pub fn give(&self) {
        for (_, fd) in std::mem::take(&mut lock(&self.0).placed) {
            // The number stands in the device's struct, whose owner closes it.
            let _ = fd.into_raw_fd();
        }
    }

    /// The migration failed: the members are -1 again, unless the VMM changed them, and the descriptors closed. \[bql\]
    pub fn take_back(&self) {
        let placed = std::mem::take(&mut lock(&self.0).placed);
        for (Member(at), fd) in placed {
            // SAFETY: the caller of `place` vouched for the member up to this call, big lock held.
            if unsafe { int_at(at) } == fd.as_raw_fd() {
                // SAFETY: as above.
                unsafe { copy_out(&NONE.to_ne_bytes(), at) };
            }
        }
    }
}
