//! How bytes get to the other side: one trait, and its kinds by the scheme of a URI.

pub mod channel;
#[cfg(test)]
mod frames_tests;
pub mod socket;
pub mod stream;
pub mod uri;

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use crate::error::{Error, Result};
use crate::options::Opt;
use crate::sys::eventfd::Wake;
pub use crate::sys::fdpass::FDS_MAX;
use crate::sys::io::{self, Piece, Room};
use channel::FdChannel;
use uri::Uri;

/// The option that every limit of a [`Channel`] comes from, unless its caller says better.
pub const STALL: &str = Opt::StallTimeout.name();
/// The option that limits connecting, up to the first answer.
pub const CONNECT: &str = Opt::ConnectTimeout.name();

/// A connection to the other side. All calls are safe from several threads; one reads, one writes.
pub trait Channel: Send + Sync + std::fmt::Debug {
    /// Reads once, waiting for at most `limit` (for ever without); 0 is the end. `ETIMEDOUT` if nothing came,
    /// `ECANCELED` if the migration's wake was raised meanwhile.
    fn read(&self, buf: &mut [u8], limit: Option<Duration>) -> Result<usize>;

    /// The same into room outside of Rust's memory.
    fn read_room(&self, rooms: &mut [Room<'_>], limit: Option<Duration>) -> Result<usize>;

    /// Writes once, waiting for room for at most `limit`; returns how many bytes went.
    fn write(&self, pieces: &[Piece<'_>], limit: Duration) -> Result<usize>;

    /// Writes last words, even where the wake was raised, waiting for room for at most `limit`.
    fn write_last(&self, bytes: &[u8], limit: Duration) -> Result<()>;

    /// No more writes: the peer sees the end of the stream.
    fn close_write(&self);

    /// Ends both directions; calls of other threads that wait come back.
    fn shutdown(&self);

    /// Whether the peer can answer on this channel.
    fn is_two_way(&self) -> bool;

    /// Whether the connection ended or failed, or the peer was silent too long: nothing more can be expected of it.
    fn is_lost(&self) -> bool;

    /// The descriptor, to wait for it beside others.
    fn descriptor(&self) -> Result<Arc<OwnedFd>>;

    /// Whether file descriptors can travel over this channel: a unix socket.
    fn passes_fds(&self) -> bool {
        false
    }

    /// From here on descriptors are kept that arrive with bytes read; before, the kernel closes them.
    fn expect_fds(&self) {}

    /// The oldest `count` descriptors that arrived, which came with bytes read before this call. `EPROTO`: there are
    /// fewer; those are kept.
    fn take_fds(&self, count: usize) -> Result<Vec<OwnedFd>> {
        Err(no_fds(count))
    }

    /// How many descriptors arrived and were not taken.
    fn fds_left(&self) -> usize {
        0
    }

    /// Writes once; the descriptors, at most [`FDS_MAX`], arrive with the first byte. Returns how many bytes went.
    fn write_fds(&self, _bytes: &[u8], fds: &[BorrowedFd<'_>], _limit: Duration) -> Result<usize> {
        Err(no_fds(fds.len()))
    }
}

fn no_fds(count: usize) -> Error {
    Error::new(libc::EPROTO, format!("{count} file descriptors cannot travel over this connection"))
}

/// Refuses a descriptor that is closed, before one of ours takes its number.
pub fn check(uri: &Uri) -> Result<()> {
    match uri {
        Uri::Fd(fd) => io::duplicate(*fd).map(drop),
        Uri::Tcp { .. } | Uri::Unix { .. } => Ok(()),
    }
}

/// Where a migration goes to.
#[derive(Clone, Debug)]
pub enum Target {
    /// Somebody listens there.
    Address(Uri),
    /// A connection that exists already.
    Ready(Arc<FdChannel>),
}

impl Target {
    /// Understands `uri`. A descriptor is copied at once: the caller may close its own, whose number may then be
    /// another file's.
    pub fn new(uri: Uri, wake: &Arc<Wake>) -> Result<Self> {
        Ok(match uri {
            Uri::Tcp { .. } | Uri::Unix { .. } => Target::Address(uri),
            Uri::Fd(fd) => Target::Ready(Arc::new(FdChannel::of_caller(fd, true, wake)?)),
        })
    }

    /// Connects.
    pub fn connect(&self, wake: &Arc<Wake>, limit: Duration) -> Result<Arc<dyn Channel>> {
        Ok(match self {
            Target::Address(uri) => Arc::new(socket::connect(uri, wake, limit)?),
            Target::Ready(channel) => Arc::clone(channel) as Arc<dyn Channel>,
        })
    }
}

/// What waits for a source.
#[derive(Debug)]
pub enum Listener {
    /// A listening socket.
    Socket(socket::Listener),
    /// A connection that exists already.
    Ready(Arc<FdChannel>),
}

/// Listens at `uri`.
pub fn listen(uri: &Uri, wake: &Arc<Wake>) -> Result<Listener> {
    Ok(match uri {
        Uri::Tcp { .. } | Uri::Unix { .. } => Listener::Socket(socket::Listener::new(uri)?),
        Uri::Fd(fd) => Listener::Ready(Arc::new(FdChannel::of_caller(*fd, false, wake)?)),
    })
}

impl Listener {
    /// Where it listens, as a URI; with the real port.
    pub fn address(&self) -> Option<&str> {
        match self {
            Listener::Socket(listener) => Some(listener.address()),
            Listener::Ready(_) => None,
        }
    }
}
