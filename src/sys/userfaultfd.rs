//! userfaultfd(2): write protection that needs nobody to answer faults, and whether a mapping is registered at all.
#![allow(unsafe_code, reason = "system calls live here")]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use super::memory::OwnPage;
use crate::error::{Error, Result};

/// Only faults of user mode are handed out: nobody needs privileges for that, and we never want to be handed any.
const USER_MODE_ONLY: i32 = 1;
const API: u64 = 0xAA;
/// Write protection of hugetlb and shared memory.
const FEATURE_WP_SHARED: u64 = 1 << 12;
/// Write protection of pages that do not exist.
const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
/// The kernel itself lets writers go on, and remembers.
const FEATURE_WP_ASYNC: u64 = 1 << 15;
const MODE_WP: u64 = 1 << 1;

#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioRegister {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioRange {
    start: u64,
    len: u64,
}

/// A descriptor of ours that the kernel just made.
fn owned(fd: RawFd) -> Option<OwnedFd> {
    // SAFETY: the kernel just gave us this descriptor and nobody else knows it.
    (fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A new context, by the system call or, where that is forbidden, by its device.
fn open() -> Result<OwnedFd> {
    // SAFETY: userfaultfd takes no pointers.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | USER_MODE_ONLY) };
    if let Some(fd) = i32::try_from(fd).ok().and_then(owned) {
        return Ok(fd);
    }
    let refused = Error::last_os("userfaultfd(2)");
    let by_device = File::options().read(true).write(true).open("/dev/userfaultfd").ok().and_then(|device| {
        // SAFETY: USERFAULTFD_IOC_NEW takes flags, no pointer.
        owned(unsafe { libc::ioctl(device.as_raw_fd(), libc::_IO(0xAA, 0), libc::O_CLOEXEC) })
    });
    by_device.ok_or(refused)
}

/// Agrees with the kernel on what the context can do; that must come first.
fn agree(uffd: &OwnedFd, features: u64) -> Result<()> {
    let mut api = UffdioApi { api: API, features, ioctls: 0 };
    // SAFETY: UFFDIO_API reads and fills one struct uffdio_api, which `api` is.
    match unsafe { libc::ioctl(uffd.as_raw_fd(), libc::_IOWR::<UffdioApi>(0xAA, 0x3F), &raw mut api) } {
        0.. => Ok(()),
        _ => Err(Error::last_os("UFFDIO_API")),
    }
}

/// Memory that is write-protected page by page, asynchronously: a write to a protected page ends its protection and goes
/// on. Which pages are protected [`Pagemap`](super::pagemap::Pagemap) tells. Dropped, it ends all protection.
#[derive(Debug)]
pub struct Guarded {
    uffd: OwnedFd,
}

impl Guarded {
    /// Guards nothing yet. The error says what the kernel lacks or forbids.
    pub fn new() -> Result<Self> {
        let uffd = open().map_err(|e| {
            let text = match e.errno() {
                libc::ENOSYS => "this kernel has no userfaultfd (CONFIG_USERFAULTFD)".to_owned(),
                libc::EPERM | libc::EACCES => format!(
                    "{e}: forbidden here, by a seccomp filter or the sysctl vm.unprivileged_userfaultfd of an old kernel, \
                     and /dev/userfaultfd cannot be opened either"
                ),
                _ => e.to_string(),
            };
            Error::new(e.errno(), text)
        })?;
        agree(&uffd, FEATURE_WP_SHARED | FEATURE_WP_UNPOPULATED | FEATURE_WP_ASYNC).map_err(|e| {
            let text = "this kernel's userfaultfd has no asynchronous write protection: Linux 6.7 or later is needed \
                        (CONFIG_PTE_MARKER_UFFD_WP, on x86-64 and arm64)";
            Error::new(libc::EOPNOTSUPP, text).expected_got("UFFD_FEATURE_WP_ASYNC", e.text())
        })?;
        Ok(Self { uffd })
    }

    /// Pages of `range` (of whole pages of its mapping) can be protected from now on; none is at first.
    pub fn add(&self, range: &Range<u64>) -> io::Result<()> {
        let mut register =
            UffdioRegister { start: range.start, len: range.end - range.start, mode: MODE_WP, ioctls: 0 };
        // SAFETY: UFFDIO_REGISTER reads and fills one struct uffdio_register, which `register` is. Asynchronous
        // protection changes nothing that a program can see.
        let done =
            unsafe { libc::ioctl(self.uffd.as_raw_fd(), libc::_IOWR::<UffdioRegister>(0xAA, 0), &raw mut register) };
        if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Ends that. What is not mapped any more needs none.
    pub fn remove(&self, range: &Range<u64>) {
        let what = UffdioRange { start: range.start, len: range.end - range.start };
        // SAFETY: UFFDIO_UNREGISTER reads one struct uffdio_range, which `what` is.
        let _ = unsafe { libc::ioctl(self.uffd.as_raw_fd(), libc::_IOR::<UffdioRange>(0xAA, 1), &raw const what) };
    }
}

/// Tells whether a mapping is registered with some userfaultfd, in constant time and without changing anything.
///
/// `UFFDIO_COPY` is refused with `ENOENT` where no userfaultfd is registered; elsewhere it gets as far as reading its
/// source, a page of ours that cannot be read.
#[derive(Debug)]
pub struct FaultProbe {
    uffd: OwnedFd,
    /// Cannot be read.
    source: OwnPage,
}

#[repr(C)]
struct UffdioCopy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}

impl FaultProbe {
    /// Fails where the kernel gives us no userfaultfd.
    pub fn new() -> Result<Self> {
        let uffd = open()?;
        agree(&uffd, 0)?;
        Ok(Self { uffd, source: OwnPage::new(false)? })
    }

    /// Whether the mapping that begins at `address` is registered, in whatever mode.
    pub fn is_registered(&self, address: u64) -> bool {
        let source = self.source.range();
        let mut copy =
            UffdioCopy { dst: address, src: source.start, len: source.end - source.start, mode: 0, copy: 0 };
        // SAFETY: UFFDIO_COPY reads and fills one struct uffdio_copy; it can write no guest byte, for its source is
        // inaccessible.
        let done = unsafe { libc::ioctl(self.uffd.as_raw_fd(), libc::_IOWR::<UffdioCopy>(0xAA, 3), &raw mut copy) };
        // Anything but the one clear answer counts as registered.
        done >= 0 || io::Error::last_os_error().raw_os_error() != Some(libc::ENOENT)
    }
}
