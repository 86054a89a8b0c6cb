//! A channel over one descriptor: socket, pipe or file.

use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use socket2::SockRef;

use super::Channel;
use crate::error::{Error, Result};
use crate::sys::eventfd::Wake;
use crate::sys::io::{self, FdKind, Piece, Ready, Room};
use crate::thread::lock;

/// A descriptor that bytes go through. Never blocks in the kernel: it waits in poll(2), where a wake reaches it.
#[derive(Debug)]
pub struct FdChannel {
    /// Gone once a one-way channel was closed: that is how the peer of a pipe sees the end.
    fd: Mutex<Option<Arc<OwnedFd>>>,
    kind: FdKind,
    wake: Arc<Wake>,
}

impl FdChannel {
    /// Takes a descriptor of our own.
    pub fn new(fd: OwnedFd, wake: &Arc<Wake>) -> Result<Self> {
        let kind = io::kind_of(fd.as_fd())?;
        if kind == FdKind::Pipe {
            io::set_nonblocking(fd.as_fd())?;
        }
        Ok(Self { fd: Mutex::new(Some(Arc::new(fd))), kind, wake: Arc::clone(wake) })
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

    /// Looks at the first bytes without taking them; how many of `buf` are there already.
    pub fn peek(&self, buf: &mut [u8]) -> Result<usize> {
        io::peek(self.fd()?.as_fd(), buf).map_err(|e| Error::from_io("looking at a connection", &e))
    }

    /// The descriptor, to wait for it beside others.
    pub fn descriptor(&self) -> Result<Arc<OwnedFd>> {
        self.fd()
    }

    fn fd(&self) -> Result<Arc<OwnedFd>> {
        let fd = lock(&self.fd).clone();
        fd.ok_or_else(|| Error::new(libc::ESHUTDOWN, "the connection was closed on this side"))
    }

    fn close(&self, how: Shutdown) {
        let mut fd = lock(&self.fd);
        match (self.kind, &*fd) {
            (FdKind::Socket, Some(fd)) => drop(SockRef::from(&**fd).shutdown(how)),
            _ => *fd = None,
        }
    }

    fn wait(&self, fd: &OwnedFd, writing: bool, limit: Option<Duration>) -> Result<()> {
        let deadline = limit.map(|limit| Instant::now() + limit);
        match io::wait(Some(fd.as_fd()), writing, self.wake.as_fd(), deadline)? {
            Ready::Fd => Ok(()),
            Ready::Woken => self.wake.check(),
            Ready::TimedOut => {
                let (what, secs) = (if writing { "took" } else { "sent" }, limit.unwrap_or_default().as_secs_f32());
                Err(Error::new(libc::ETIMEDOUT, format!("the peer {what} no byte for {secs} seconds")))
            }
        }
    }
}

impl Channel for FdChannel {
    fn read(&self, buf: &mut [u8], limit: Option<Duration>) -> Result<usize> {
        let fd = self.fd()?;
        loop {
            match io::read(fd.as_fd(), self.kind, buf) {
                Ok(Some(n)) => return Ok(n),
                Ok(None) => self.wait(&fd, false, limit)?,
                Err(error) => return Err(Error::from_io("reading from the peer", &error)),
            }
        }
    }

    fn read_room(&self, rooms: &mut [Room<'_>], limit: Option<Duration>) -> Result<usize> {
        let fd = self.fd()?;
        loop {
            match io::read_room(fd.as_fd(), self.kind, rooms) {
                Ok(Some(n)) => return Ok(n),
                Ok(None) => self.wait(&fd, false, limit)?,
                Err(error) => return Err(Error::from_io("reading from the peer", &error)),
            }
        }
    }

    fn write(&self, pieces: &[Piece<'_>], limit: Duration) -> Result<usize> {
        let fd = self.fd()?;
        loop {
            match io::write(fd.as_fd(), self.kind, pieces) {
                Ok(Some(n)) => return Ok(n),
                Ok(None) => self.wait(&fd, true, Some(limit))?,
                Err(error) => return Err(Error::from_io("writing to the peer", &error)),
            }
        }
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
}
