//! Moving bytes between descriptors and memory, and waiting for descriptors.
#![allow(unsafe_code, reason = "system calls live here")]

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};

/// The most pieces one vectored write takes (`IOV_MAX` of Linux).
pub const IOV_MAX: usize = 1024;

/// A piece of memory the kernel may read. Guest memory changes under us, so it is never a `&[u8]`.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct Piece<'a>(libc::iovec, PhantomData<&'a [u8]>);

impl<'a> Piece<'a> {
    /// A piece of our own memory.
    pub fn of(bytes: &'a [u8]) -> Self {
        Self(libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() }, PhantomData)
    }

    /// A piece of somebody else's memory.
    ///
    /// # Safety
    /// `start` must stay readable for `len` bytes for as long as `'a`; its bytes may change meanwhile.
    pub unsafe fn raw(start: *const u8, len: usize) -> Self {
        Self(libc::iovec { iov_base: start.cast_mut().cast(), iov_len: len }, PhantomData)
    }

    /// Where it starts, for whoever copies it.
    pub fn as_ptr(&self) -> *const u8 {
        self.0.iov_base.cast_const().cast()
    }

    /// Bytes in the piece.
    pub fn len(&self) -> usize {
        self.0.iov_len
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Moves at most `most` bytes to the end of `out`, whose capacity is there already; how many.
    pub fn take_into(&mut self, out: &mut Vec<u8>, most: usize) -> usize {
        let n = self.len().min(most).min(out.capacity() - out.len());
        let room = out.spare_capacity_mut().as_mut_ptr();
        // SAFETY: the piece is readable for n bytes (its constructor's promise) and the spare capacity is writable for as
        // many; it is our own, so the two do not overlap. Bytes that change meanwhile are copied in either form.
        unsafe { std::ptr::copy_nonoverlapping(self.0.iov_base.cast(), room, n) };
        // SAFETY: n more bytes, within the capacity, were just initialised.
        unsafe { out.set_len(out.len() + n) };
        self.advance(n);
        n
    }

    /// Drops the first `n` bytes (at most all).
    pub fn advance(&mut self, n: usize) {
        let n = n.min(self.0.iov_len);
        // SAFETY: n is at most the piece's length, so the result stays inside it or one past its end.
        self.0.iov_base = unsafe { self.0.iov_base.byte_add(n) };
        self.0.iov_len -= n;
    }
}

/// A piece of somebody else's memory that the kernel may write.
#[repr(transparent)]
pub struct Room<'a>(libc::iovec, PhantomData<&'a mut [u8]>);

impl<'a> Room<'a> {
    /// Room in our own memory.
    pub fn of(bytes: &'a mut [u8]) -> Self {
        Self(libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }, PhantomData)
    }

    /// Copies as much of `bytes` as fits to its start; how much.
    pub fn fill(&mut self, bytes: &[u8]) -> usize {
        let n = bytes.len().min(self.len());
        // SAFETY: the room is writable for n bytes (its constructor's promise) and no Rust reference to it exists, so it
        // does not overlap with `bytes`.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.0.iov_base.cast(), n) };
        n
    }

    /// Where it starts, for whoever fills it.
    pub fn as_ptr(&self) -> *mut u8 {
        self.0.iov_base.cast()
    }

    /// Room in somebody else's memory.
    ///
    /// # Safety
    /// `start` must stay writable for `len` bytes for as long as `'a`; others may read and write it meanwhile, and no
    /// Rust reference to it exists.
    pub unsafe fn raw(start: *mut u8, len: usize) -> Self {
        Self(libc::iovec { iov_base: start.cast(), iov_len: len }, PhantomData)
    }

    /// Bytes of room.
    pub fn len(&self) -> usize {
        self.0.iov_len
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Drops the first `n` bytes (at most all).
    pub fn advance(&mut self, n: usize) {
        let n = n.min(self.0.iov_len);
        // SAFETY: n is at most the room's length, so the result stays inside it or one past its end.
        self.0.iov_base = unsafe { self.0.iov_base.byte_add(n) };
        self.0.iov_len -= n;
    }
}

/// What kind of descriptor bytes go through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FdKind {
    /// Both directions, `shutdown`, no SIGPIPE.
    Socket,
    /// One direction.
    Pipe,
    /// A regular file or device: always ready.
    File,
}

/// Finds out what `fd` is.
pub fn kind_of(fd: BorrowedFd<'_>) -> Result<FdKind> {
    let mut stat = std::mem::MaybeUninit::<libc::stat>::uninit();
    // SAFETY: stat points to room for one struct stat.
    if unsafe { libc::fstat(fd.as_raw_fd(), stat.as_mut_ptr()) } < 0 {
        return Err(Error::last_os(format!("fd {}", fd.as_raw_fd())));
    }
    // SAFETY: fstat succeeded, so it filled the struct.
    let mode = unsafe { stat.assume_init() }.st_mode & libc::S_IFMT;
    Ok(match mode {
        libc::S_IFSOCK => FdKind::Socket,
        libc::S_IFIFO => FdKind::Pipe,
        _ => FdKind::File,
    })
}

/// Whether `fd` was opened for reading and for writing.
pub fn access_of(fd: BorrowedFd<'_>) -> Result<(bool, bool)> {
    // SAFETY: F_GETFL takes no pointer.
    let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) };
    if flags < 0 {
        return Err(Error::last_os(format!("fd {}", fd.as_raw_fd())));
    }
    let mode = flags & libc::O_ACCMODE;
    Ok((mode != libc::O_WRONLY, mode != libc::O_RDONLY))
}

/// A close-on-exec copy of a caller's descriptor, so that the caller may close theirs.
pub fn duplicate(fd: i32) -> Result<OwnedFd> {
    if fd < 0 {
        return Err(Error::new(libc::EBADF, format!("fd {fd} is not a descriptor")));
    }
    // SAFETY: only borrowed for the call below; fcntl reports EBADF if the number is not open.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    fd.try_clone_to_owned().map_err(|e| Error::from_io(format!("fd {}", fd.as_raw_fd()), &e))
}

/// A pipe's end with flags of its own, not blocking: those of a copy would be shared with the caller's descriptor, whose
/// reads and writes would begin to fail. None where the kernel does not let us.
pub fn reopen_pipe(fd: BorrowedFd<'_>, writing: bool) -> Option<OwnedFd> {
    let mut options = std::fs::OpenOptions::new();
    options.read(!writing).write(writing).custom_flags(libc::O_NONBLOCK);
    options.open(format!("/proc/self/fd/{}", fd.as_raw_fd())).ok().map(OwnedFd::from)
}

/// Switches `O_NONBLOCK` on.
pub fn set_nonblocking(fd: BorrowedFd<'_>) -> Result<()> {
    // SAFETY: F_GETFL takes no pointer.
    let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) };
    // SAFETY: F_SETFL takes an integer.
    if flags < 0 || unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) } < 0 {
        return Err(Error::last_os("fcntl(O_NONBLOCK)"));
    }
    Ok(())
}

/// Sets the permission bits of a socket that is not bound yet; bind(2) gives them to the file it creates.
pub fn set_mode(fd: BorrowedFd<'_>, mode: u32) -> Result<()> {
    // SAFETY: fchmod takes no pointer.
    if unsafe { libc::fchmod(fd.as_raw_fd(), mode) } < 0 {
        return Err(Error::last_os("fchmod"));
    }
    Ok(())
}

/// Writes pieces once. `Ok(None)`: the descriptor is full, wait for it.
pub fn write(fd: BorrowedFd<'_>, kind: FdKind, pieces: &[Piece<'_>]) -> io::Result<Option<usize>> {
    let pieces = &pieces[..pieces.len().min(IOV_MAX)];
    let sent = if kind == FdKind::Socket {
        // SAFETY: an all-zero msghdr is valid: no name, no control data.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = pieces.as_ptr().cast_mut().cast();
        message.msg_iovlen = pieces.len();
        // SAFETY: each Piece is an iovec whose memory is readable (its constructor's promise); sendmsg only reads.
        unsafe { libc::sendmsg(fd.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) }
    } else {
        let count = i32::try_from(pieces.len()).unwrap_or(i32::MAX);
        // SAFETY: as above; writev only reads the pieces.
        unsafe { libc::writev(fd.as_raw_fd(), pieces.as_ptr().cast(), count) }
    };
    transferred(sent)
}

/// Reads once. `Ok(None)`: nothing there yet, wait for it; `Ok(Some(0))`: the end.
pub fn read(fd: BorrowedFd<'_>, kind: FdKind, buf: &mut [u8]) -> io::Result<Option<usize>> {
    let got = if kind == FdKind::Socket {
        // SAFETY: buf is writable for its length.
        unsafe { libc::recv(fd.as_raw_fd(), buf.as_mut_ptr().cast(), buf.len(), libc::MSG_DONTWAIT) }
    } else {
        // SAFETY: buf is writable for its length.
        unsafe { libc::read(fd.as_raw_fd(), buf.as_mut_ptr().cast(), buf.len()) }
    };
    transferred(got)
}

/// Fills room once. `Ok(None)`: nothing there yet, wait for it; `Ok(Some(0))`: the end.
pub fn read_room(fd: BorrowedFd<'_>, kind: FdKind, rooms: &mut [Room<'_>]) -> io::Result<Option<usize>> {
    let count = rooms.len().min(IOV_MAX);
    let got = if kind == FdKind::Socket {
        // SAFETY: an all-zero msghdr is valid: no name, no control data.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = rooms.as_mut_ptr().cast();
        message.msg_iovlen = count;
        // SAFETY: each Room is an iovec whose memory is writable (its constructor's promise).
        unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) }
    } else {
        let count = i32::try_from(count).unwrap_or(i32::MAX);
        // SAFETY: as above.
        unsafe { libc::readv(fd.as_raw_fd(), rooms.as_ptr().cast(), count) }
    };
    transferred(got)
}

/// Looks at up to `buf.len()` bytes of a socket without taking them; nothing there yet is 0, the end an error.
pub fn peek(fd: BorrowedFd<'_>, buf: &mut [u8]) -> io::Result<usize> {
    // SAFETY: buf is writable for its length.
    let got = unsafe {
        libc::recv(fd.as_raw_fd(), buf.as_mut_ptr().cast(), buf.len(), libc::MSG_DONTWAIT | libc::MSG_PEEK)
    };
    match transferred(got)? {
        Some(0) => Err(io::ErrorKind::UnexpectedEof.into()),
        n => Ok(n.unwrap_or(0)),
    }
}

pub(super) fn transferred(n: isize) -> io::Result<Option<usize>> {
    if let Ok(n) = usize::try_from(n) {
        return Ok(Some(n));
    }
    let error = io::Error::last_os_error();
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(None),
        _ => Err(error),
    }
}

/// What ended a wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ready {
    /// The descriptor is ready, or broken: the next call tells.
    Fd,
    /// The other descriptor was raised.
    Woken,
    /// Neither, in time.
    TimedOut,
}

/// Waits until `fd` is ready for reading (or writing), `wake` is readable, or the deadline passes.
pub fn wait(
    fd: Option<BorrowedFd<'_>>,
    writing: bool,
    wake: BorrowedFd<'_>,
    deadline: Option<Instant>,
) -> Result<Ready> {
    wait_or_closed(fd, writing, (wake, None), deadline)
}

/// The same with one more descriptor that ends the wait as `wake` does.
pub fn wait_or_closed(
    fd: Option<BorrowedFd<'_>>,
    writing: bool,
    (wake, closed): (BorrowedFd<'_>, Option<BorrowedFd<'_>>),
    deadline: Option<Instant>,
) -> Result<Ready> {
    let events = if writing { libc::POLLOUT } else { libc::POLLIN };
    let number = |fd: Option<BorrowedFd<'_>>| fd.map_or(-1, |fd| fd.as_raw_fd());
    let mut fds = [
        libc::pollfd { fd: wake.as_raw_fd(), events: libc::POLLIN, revents: 0 },
        libc::pollfd { fd: number(fd), events, revents: 0 },
        libc::pollfd { fd: number(closed), events: libc::POLLIN, revents: 0 },
    ];
    loop {
        let timeout = deadline.map_or(-1, |at| millis_up(at.saturating_duration_since(Instant::now())));
        // SAFETY: fds is a live array of three entries; poll ignores negative descriptors.
        let n = unsafe { libc::poll(fds.as_mut_ptr(), 3, timeout) };
        if n < 0 {
            let error = io::Error::last_os_error();
            if error.kind() == io::ErrorKind::Interrupted {
                continue;
            }
            return Err(Error::from_io("poll", &error));
        }
        if fds[0].revents != 0 || fds[2].revents != 0 {
            return Ok(Ready::Woken);
        }
        if fds[1].revents != 0 {
            return Ok(Ready::Fd);
        }
        if deadline.is_some_and(|at| at <= Instant::now()) {
            return Ok(Ready::TimedOut);
        }
    }
}

fn millis_up(left: Duration) -> i32 {
    i32::try_from(left.as_micros().div_ceil(1000)).unwrap_or(i32::MAX)
}

/// Waits until one of `fds` is readable (its index), `wake` is (none), or the deadline passes (`ETIMEDOUT`).
pub fn wait_any(fds: &[BorrowedFd<'_>], wake: BorrowedFd<'_>, deadline: Option<Instant>) -> Result<Option<usize>> {
    let entry = |fd: &BorrowedFd<'_>| libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    let mut polled: Vec<libc::pollfd> = std::iter::once(&wake).chain(fds).map(entry).collect();
    loop {
        let timeout = deadline.map_or(-1, |at| millis_up(at.saturating_duration_since(Instant::now())));
        // SAFETY: polled is a live vector of as many entries as it says.
        let n = unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, timeout) };
        if n < 0 && io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
            return Err(Error::last_os("poll"));
        }
        if polled[0].revents != 0 {
            return Ok(None);
        }
        if let Some(index) = polled[1..].iter().position(|p| p.revents != 0) {
            return Ok(Some(index));
        }
        if deadline.is_some_and(|at| at <= Instant::now()) {
            return Err(Error::new(libc::ETIMEDOUT, "nothing came in time"));
        }
    }
}

/// A descriptor that is waited for beside many others.
#[derive(Clone, Copy, Debug)]
pub struct Watch<'a> {
    /// Which.
    pub fd: BorrowedFd<'a>,
    /// Until it can be read (or accepted from).
    pub read: bool,
    /// Until it can be written.
    pub write: bool,
}

impl<'a> Watch<'a> {
    /// Until it can be read.
    pub fn reading(fd: BorrowedFd<'a>) -> Self {
        Self { fd, read: true, write: false }
    }
}

/// Waits until one of them is ready or broken, or for `limit`; of each whether it can be read, and written. One that is
/// waited for in neither way is not looked at.
pub fn wait_each(watches: &[Watch<'_>], limit: Option<Duration>) -> Result<Vec<(bool, bool)>> {
    let entry = |watch: &Watch<'_>| libc::pollfd {
        fd: if watch.read || watch.write { watch.fd.as_raw_fd() } else { -1 },
        events: if watch.read { libc::POLLIN } else { 0 } | if watch.write { libc::POLLOUT } else { 0 },
        revents: 0,
    };
    let mut polled: Vec<libc::pollfd> = watches.iter().map(entry).collect();
    // SAFETY: polled is a live vector of as many entries as it says.
    let n = unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, limit.map_or(-1, millis_up)) };
    if n < 0 && io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
        return Err(Error::last_os("poll"));
    }
    let broken = |p: &libc::pollfd| p.revents & !(libc::POLLIN | libc::POLLOUT) != 0;
    let ready = |(p, watch): (&libc::pollfd, &Watch<'_>)| {
        let is = |wanted: bool, bit| n > 0 && wanted && (p.revents & bit != 0 || broken(p));
        (is(watch.read, libc::POLLIN), is(watch.write, libc::POLLOUT))
    };
    Ok(polled.iter().zip(watches).map(ready).collect())
}

/// Whether something waits to be read or accepted.
pub fn is_readable(fd: BorrowedFd<'_>) -> bool {
    let mut polled = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one live entry.
    unsafe { libc::poll(&raw mut polled, 1, 0) > 0 }
}

/// Bytes written to a socket that the peer's system does not have yet; none where that cannot be known.
pub fn on_its_way(fd: BorrowedFd<'_>) -> Option<u64> {
    let mut count: libc::c_int = 0;
    // SAFETY: TIOCOUTQ, which is SIOCOUTQ for sockets, writes one int.
    let known = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCOUTQ, &raw mut count) == 0 };
    u64::try_from(count).ok().filter(|_| known)
}

/// Bytes in a pipe that its reader did not take yet.
pub fn unread(fd: BorrowedFd<'_>) -> Result<usize> {
    let mut count: libc::c_int = 0;
    // SAFETY: FIONREAD writes one int.
    if unsafe { libc::ioctl(fd.as_raw_fd(), libc::FIONREAD, &raw mut count) } < 0 {
        return Err(Error::last_os("ioctl(FIONREAD)"));
    }
    Ok(usize::try_from(count).unwrap_or_default())
}

/// Whether the peer of a socket sends no more.
pub fn peer_is_done(fd: BorrowedFd<'_>) -> bool {
    let mut polled = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLRDHUP, revents: 0 };
    // SAFETY: one live entry.
    unsafe { libc::poll(&raw mut polled, 1, 0) > 0 }
}

/// No more is written to this socket: the peer sees the end.
pub fn close_write(fd: BorrowedFd<'_>) {
    // It fails only where the peer is gone.
    let _ = socket2::SockRef::from(&fd).shutdown(std::net::Shutdown::Write);
}

/// Sleeps for `time`, or until `wake` is readable (true).
pub fn sleep(wake: &impl AsFd, time: Duration) -> Result<bool> {
    Ok(wait(None, false, wake.as_fd(), Some(Instant::now() + time))? == Ready::Woken)
}
