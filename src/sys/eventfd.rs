//! eventfd(2): a counter that poll(2) can wait for.
#![allow(unsafe_code, reason = "system calls live here")]

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Error, Result};

/// A non-blocking, close-on-exec eventfd.
#[derive(Debug)]
pub struct EventFd(OwnedFd);

impl EventFd {
    /// A new one, not readable.
    pub fn new() -> Result<Self> {
        // SAFETY: eventfd takes no pointers.
        let fd = unsafe { libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC) };
        if fd < 0 {
            return Err(Error::last_os("eventfd"));
        }
        // SAFETY: the kernel just gave us this descriptor and nobody else knows it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Makes it readable.
    pub fn set(&self) {
        let one = 1u64.to_ne_bytes();
        // SAFETY: the buffer is a live array of the length given. A full counter (EAGAIN) is readable already.
        let _ = unsafe { libc::write(self.0.as_raw_fd(), one.as_ptr().cast(), one.len()) };
    }

    /// Makes it not readable.
    pub fn clear(&self) {
        let mut count = [0u8; 8];
        // SAFETY: the buffer is a live array of the length given. EAGAIN means it was not readable.
        let _ = unsafe { libc::read(self.0.as_raw_fd(), count.as_mut_ptr().cast(), count.len()) };
    }

    /// The descriptor, for poll(2) by a C caller; stays ours.
    pub fn raw(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A flag that ends every wait of the threads that watch it.
#[derive(Debug)]
pub struct Wake {
    fd: EventFd,
    raised: AtomicBool,
}

impl Wake {
    /// A flag that is down.
    pub fn new() -> Result<Self> {
        Ok(Self { fd: EventFd::new()?, raised: AtomicBool::new(false) })
    }

    /// Raises it; idempotent, from any thread.
    pub fn raise(&self) {
        self.raised.store(true, Ordering::Release);
        self.fd.set();
    }

    /// Lowers it: nobody who saw it up is there any more.
    pub fn lower(&self) {
        self.fd.clear();
        self.raised.store(false, Ordering::Release);
    }

    /// Whether it was raised.
    pub fn is_raised(&self) -> bool {
        self.raised.load(Ordering::Acquire)
    }

    /// `ECANCELED` once raised.
    pub fn check(&self) -> Result<()> {
        match self.is_raised() {
            true => Err(Error::new(libc::ECANCELED, "the migration was cancelled")),
            false => Ok(()),
        }
    }
}

impl AsFd for Wake {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
