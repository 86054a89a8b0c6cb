//! A channel over one descriptor: socket, pipe or file.

use std::collections::VecDeque;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use socket2::SockRef;

use super::Channel;
use crate::error::{Error, Result};
use crate::sys::eventfd::{EventFd, Wake};
use crate::sys::fdpass;
use crate::sys::io::{self, FdKind, Piece, Ready, Room};
use crate::thread::lock;

/// A descriptor that bytes go through. Never blocks in the kernel: it waits in poll(2), where a wake reaches it.
#[derive(Debug)]
pub struct FdChannel {
    /// Gone once a one-way channel was closed: that is how the peer of a pipe sees the end.
    fd: Mutex<Option<Arc<OwnedFd>>>,
    kind: FdKind,
    wake: Arc<Wake>,
    /// Of a pipe: raised when it is closed, because others may wait for it, and poll(2) would not tell them.
    closed: Option<EventFd>,
    passes_fds: bool,
    /// Descriptors that arrive are kept.
    keeps_fds: AtomicBool,
    /// Those that were not taken yet.
    arrived: Mutex<VecDeque<OwnedFd>>,
    /// It ended, or failed, or the peer was silent too long.
    lost: AtomicBool,
}

/// Descriptors kept at most: what a guest's memory and devices may have, and an end for a peer that sends on and on.
const ARRIVED_MAX: usize = 8192;

impl FdChannel {
    /// Takes a descriptor of our own.
    pub fn new(fd: OwnedFd, wake: &Arc<Wake>) -> Result<Self> {
        let kind = io::kind_of(fd.as_fd())?;
        if kind == FdKind::Pipe {
            io::set_nonblocking(fd.as_fd())?;
        }
        let passes_fds = kind == FdKind::Socket && fdpass::can_pass(fd.as_fd());
        let closed = if kind == FdKind::Pipe { Some(EventFd::new()?) } else { None };
        let (fd, wake) = (Mutex::new(Some(Arc::new(fd))), Arc::clone(wake));
        let (keeps_fds, lost) = (AtomicBool::new(false), AtomicBool::new(false));
        Ok(Self { fd, kind, wake, closed, passes_fds, arrived: Mutex::default(), keeps_fds, lost })
    }

    /// Takes a copy of a caller's descriptor, which must be open for the direction.
    pub fn of_caller(fd: i32, writing: bool, wake: &Arc<Wake>) -> Result<Self> {
        let mut own = io::duplicate(fd)?;
        let (can_read, can_write) = io::access_of(own.as_fd())?;
        if writing && !can_write || !writing && !can_read {
            let what = if writing { "writing" } else { "reading" };
            return Err(Error::new(libc::EBADF, format!("fd {fd} is not open for {what}")));
        }
        if io::kind_of(own.as_fd())? == FdKind::Pipe
            && let Some(pipe) = io::reopen_pipe(own.as_fd(), writing)
        {
            own = pipe;
        }
        Self::new(own, wake)
    }

    fn fd(&self) -> Result<Arc<OwnedFd>> {
        lock(&self.fd).clone().ok_or_else(closed_here)
    }

    /// Reads once, keeping the descriptors that come along.
    fn read_keeping_fds(&self, fd: &OwnedFd, buf: &mut [u8]) -> Result<Option<usize>> {
        let got = fdpass::receive(fd.as_fd(), buf).map_err(|e| Error::from_io("reading from the peer", &e))?;
        let Some(got) = got else { return Ok(None) };
        if got.dropped {
            let text = "file descriptors of the peer got lost on the way: more came in one message than may, or this \
                        process may not open as many (RLIMIT_NOFILE)";
            return Err(Error::new(libc::EMFILE, text));
        }
        let mut kept = lock(&self.arrived);
        if kept.len() + got.fds.len() > ARRIVED_MAX {
            return Err(Error::new(libc::EPROTO, "the peer sends more file descriptors than a guest can have"));
        }
        kept.extend(got.fds);
        Ok(Some(got.bytes))
    }

    /// Takes note if nothing more can be expected of the connection.
    fn note(&self, result: Result<usize>) -> Result<usize> {
        if is_end(&result) {
            self.lost.store(true, Ordering::Release);
        }
        result
    }

    fn close(&self, how: Shutdown) {
        let mut fd = lock(&self.fd);
        match (self.kind, &*fd) {
            (FdKind::Socket, Some(fd)) => drop(SockRef::from(&**fd).shutdown(how)),
            _ => {
                *fd = None;
                self.closed.iter().for_each(EventFd::set);
            }
        }
    }

    fn wait(&self, fd: &OwnedFd, writing: bool, limit: Option<Duration>) -> Result<()> {
        let deadline = limit.map(|limit| Instant::now() + limit);
        let closed = self.closed.as_ref().map(|closed| closed.as_fd());
        match io::wait_or_closed(Some(fd.as_fd()), writing, (self.wake.as_fd(), closed), deadline)? {
            Ready::Fd => Ok(()),
            Ready::Woken => self.wake.check().and_then(|()| match self.closed {
                Some(_) => Err(closed_here()),
                None => Ok(()),
            }),
            Ready::TimedOut => {
                let what = if writing { "took" } else { "sent" };
                let what = format!("the peer {what} no byte for");
                Err(Error::timeout(super::STALL, limit.unwrap_or_default(), what))
            }
        }
    }

    fn read_once(&self, buf: &mut [u8], limit: Option<Duration>) -> Result<usize> {
        let fd = self.fd()?;
        while self.keeps_fds.load(Ordering::Acquire) {
            match self.read_keeping_fds(&fd, buf)? {
                Some(n) => return Ok(n),
                None => self.wait(&fd, false, limit)?,
            }
        }
        loop {
            match io::read(fd.as_fd(), self.kind, buf) {
                Ok(Some(n)) => return Ok(n),
                Ok(None) => self.wait(&fd, false, limit)?,
                Err(error) => return Err(Error::from_io("reading from the peer", &error)),
            }
        }
    }

    fn read_room_once(&self, rooms: &mut [Room<'_>], limit: Option<Duration>) -> Result<usize> {
        let fd = self.fd()?;
        loop {
            match io::read_room(fd.as_fd(), self.kind, rooms) {
                Ok(Some(n)) => return Ok(n),
                Ok(None) => self.wait(&fd, false, limit)?,
                Err(error) => return Err(Error::from_io("reading from the peer", &error)),
            }
        }
    }

    fn write_once(&self, pieces: &[Piece<'_>], limit: Duration) -> Result<usize> {
        let fd = self.fd()?;
        loop {
            match io::write(fd.as_fd(), self.kind, pieces) {
                Ok(Some(n)) => return Ok(n),
                Ok(None) => self.wait(&fd, true, Some(limit))?,
                Err(error) => return Err(Error::from_io("writing to the peer", &error)),
            }
        }
    }
}

/// Whether nothing more can be expected of a connection that gave this.
pub(super) fn is_end(result: &Result<usize>) -> bool {
    match result {
        Ok(n) => *n == 0,
        // Memory of ours that is gone says nothing of the connection.
        Err(error) => !matches!(error.errno(), libc::ECANCELED | libc::EFAULT),
    }
}

fn closed_here() -> Error {
    Error::new(libc::ESHUTDOWN, "the connection was closed on this side")
}

impl Channel for FdChannel {
    fn read(&self, buf: &mut [u8], limit: Option<Duration>) -> Result<usize> {
        self.note(self.read_once(buf, limit))
    }

    fn read_room(&self, rooms: &mut [Room<'_>], limit: Option<Duration>) -> Result<usize> {
        self.note(self.read_room_once(rooms, limit))
    }

    fn write(&self, pieces: &[Piece<'_>], limit: Duration) -> Result<usize> {
        self.note(self.write_once(pieces, limit))
    }

    fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }

    fn write_last(&self, bytes: &[u8], limit: Duration) -> Result<()> {
        const NAP: Duration = Duration::from_millis(1);
        let (fd, deadline, mut rest) = (self.fd()?, Instant::now() + limit, bytes);
        while !rest.is_empty() {
            match io::write(fd.as_fd(), self.kind, &[Piece::of(rest)]) {
                Ok(Some(n)) => rest = &rest[n..],
                // Rare and short, so that it need not be a wait of its own kind.
                Ok(None) if Instant::now() < deadline => std::thread::sleep(NAP),
                Ok(None) => return Err(Error::new(libc::ETIMEDOUT, "no room for the last words")),
                Err(error) => return Err(Error::from_io("writing to the peer", &error)),
            }
        }
        Ok(())
    }

    fn close_write(&self) {
        self.close(Shutdown::Write);
    }

    fn shutdown(&self) {
        self.close(Shutdown::Both);
    }

    fn is_two_way(&self) -> bool {
        self.kind == FdKind::Socket
    }

    fn descriptor(&self) -> Option<Arc<OwnedFd>> {
        lock(&self.fd).clone()
    }

    fn on_its_way(&self) -> Option<u64> {
        let fd = self.fd().ok().filter(|_| self.kind == FdKind::Socket)?;
        io::on_its_way(fd.as_fd())
    }

    fn passes_fds(&self) -> bool {
        self.passes_fds
    }

    fn expect_fds(&self) {
        self.keeps_fds.store(self.passes_fds, Ordering::Release);
    }

    fn take_fds(&self, count: usize) -> Result<Vec<OwnedFd>> {
        let mut kept = lock(&self.arrived);
        if kept.len() < count {
            let text = "fewer file descriptors came than the peer announced";
            return Err(Error::new(libc::EPROTO, text).expected_got(count, kept.len()));
        }
        Ok(kept.drain(..count).collect())
    }

    fn fds_left(&self) -> usize {
        lock(&self.arrived).len()
    }

    fn write_fds(&self, bytes: &[u8], fds: &[BorrowedFd<'_>], limit: Duration) -> Result<usize> {
        if !self.passes_fds {
            return Err(super::no_fds(fds.len()));
        }
        let fd = self.fd()?;
        loop {
            match fdpass::send(fd.as_fd(), bytes, fds) {
                Ok(Some(n)) => return Ok(n),
                Ok(None) => self.wait(&fd, true, Some(limit))?,
                Err(error) => return Err(Error::from_io("passing file descriptors to the peer", &error)),
            }
        }
    }
}
