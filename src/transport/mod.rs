//! How bytes get to the other side: one trait, and its kinds by the scheme of a URI.

pub mod channel;
pub mod custom;
pub mod exec;
pub mod file;
#[cfg(test)]
mod frames_tests;
pub mod socket;
pub mod stream;
pub mod uri;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::options::Opt;
use crate::sys::eventfd::Wake;
pub use crate::sys::fdpass::FDS_MAX;
use crate::sys::io::{self, Piece, Room};
use crate::thread::Threads;
use channel::FdChannel;
use custom::{CustomChannel, Entrance, Scheme, Schemes};
use exec::ExecChannel;
use file::FdSets;
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

    /// The descriptor, to wait for it beside others; none: there is none, or it was closed.
    fn descriptor(&self) -> Option<Arc<OwnedFd>> {
        None
    }

    /// Of a channel without a descriptor: whether something can be read, or comes within `patience`. None: wait for
    /// the descriptor.
    fn look(&self, _patience: Duration) -> Option<bool> {
        None
    }

    /// Bytes written that the peer's system does not have yet; none where that cannot be known.
    fn on_its_way(&self) -> Option<u64> {
        None
    }

    /// Everything but the last byte was written to a peer that does not answer: fails if it can be known within `limit`
    /// that not all of it is taken. What fails here can still be undone.
    fn is_taken(&self, _limit: Duration) -> Result<()> {
        Ok(())
    }

    /// Everything was written to a peer that does not answer: closes, and waits for at most `limit` until it took it, as
    /// far as that can be known.
    fn finish(&self, _limit: Duration) -> Result<()> {
        self.close_write();
        Ok(())
    }

    /// Everything was read from a peer that is not answered: fails if it turns out within `limit` that it failed.
    fn ended_well(&self, _limit: Duration) -> Result<()> {
        Ok(())
    }

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

/// How long a channel without a descriptor is asked whether it has something, before others are looked at.
const LOOK: Duration = Duration::from_millis(5);
/// Between two tries of a poll(2) that lacks memory.
const PAUSE: Duration = Duration::from_millis(100);

/// Waits until there is something to read (true), or `bell` rings, or `wake` is raised, or it is `until` (false).
pub fn hears(
    channel: Option<&dyn Channel>,
    bell: BorrowedFd<'_>,
    wake: BorrowedFd<'_>,
    until: Option<Instant>,
) -> bool {
    let fd = channel.and_then(|channel| channel.descriptor());
    let mut fds = vec![bell];
    fds.extend(fd.as_ref().map(|fd| fd.as_fd()));
    loop {
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        let looked = channel.and_then(|channel| channel.look(left.map_or(LOOK, |left| left.min(LOOK))));
        if looked == Some(true) {
            return true;
        }
        let asks = looked.is_some() && left.is_none_or(|left| !left.is_zero());
        match io::wait_any(&fds, wake, if asks { Some(Instant::now()) } else { until }) {
            Ok(woken) => return woken == Some(1),
            Err(error) if error.errno() == libc::ETIMEDOUT && asks => (),
            // The time is up, which the caller sees.
            Err(error) if error.errno() == libc::ETIMEDOUT => return false,
            Err(_) => {
                std::thread::sleep(PAUSE);
                return false;
            }
        }
    }
}

/// What an address may need besides itself.
#[derive(Clone, Debug)]
pub struct Means {
    /// For threads that watch commands.
    pub threads: Arc<Threads>,
    /// Schemes the VMM added.
    pub schemes: Arc<Schemes>,
    /// Files by numbers instead of names.
    pub fd_sets: FdSets,
}

impl Means {
    /// Refuses a descriptor that is closed, before one of ours takes its number, and a scheme that nobody knows.
    pub fn check(&self, uri: &Uri) -> Result<()> {
        match uri {
            Uri::Fd(fd) => io::duplicate(*fd).map(drop),
            Uri::Custom { scheme, .. } => self.schemes.find(scheme).map(drop),
            Uri::File { path, .. } => self.fd_sets.check(path),
            _ => Ok(()),
        }
    }
}

/// Where a migration goes to, or what it comes from if nobody needs to be listened for.
#[derive(Clone, Debug)]
pub enum Target {
    /// Somebody listens there.
    Address(Uri),
    /// A connection that exists already.
    Ready(Arc<dyn Channel>),
    /// A file to be written.
    File {
        /// Path.
        path: String,
        /// Where in it the stream begins.
        offset: u64,
        /// What the path may be a number in.
        sets: FdSets,
    },
    /// A command to be run.
    Exec {
        /// For the shell.
        command: String,
        /// What it writes is read.
        answers: bool,
        /// For the thread that watches it.
        threads: Arc<Threads>,
    },
    /// A connection of the VMM's own making.
    Custom {
        /// How it is made.
        scheme: Arc<dyn Scheme>,
        /// Where to.
        address: String,
    },
}

impl Target {
    /// Where `uri` leads. A descriptor is copied at once: the caller may close its own, whose number may then be
    /// another file's. `answers`: a command is not only written to.
    pub fn new(uri: Uri, answers: bool, means: &Means, wake: &Arc<Wake>) -> Result<Self> {
        Ok(match uri {
            Uri::Tcp { .. } | Uri::Unix { .. } | Uri::Vsock { .. } => Target::Address(uri),
            Uri::Fd(fd) => Target::Ready(Arc::new(FdChannel::of_caller(fd, true, wake)?)),
            Uri::File { path, offset } => Target::File { path, offset, sets: means.fd_sets.clone() },
            Uri::Exec(command) => Target::Exec { command, answers, threads: Arc::clone(&means.threads) },
            Uri::Custom { scheme, address } => Target::Custom { scheme: means.schemes.find(&scheme)?, address },
        })
    }

    /// Connects.
    pub fn connect(&self, wake: &Arc<Wake>, limit: Duration) -> Result<Arc<dyn Channel>> {
        Ok(match self {
            Target::Address(uri) => Arc::new(socket::connect(uri, wake, limit)?),
            Target::Ready(channel) => Arc::clone(channel),
            Target::File { path, offset, sets } => Arc::new(file::create(path, *offset, sets, wake)?),
            Target::Exec { command, answers, threads } => {
                Arc::new(ExecChannel::new(command, *answers, threads, wake)?)
            }
            Target::Custom { scheme, address } => Arc::new(CustomChannel::connect(&**scheme, address, wake, limit)?),
        })
    }

    /// Whether it takes connections for pages beside the main one.
    pub fn has_channels(&self) -> bool {
        match self {
            Target::Address(_) => true,
            Target::Custom { scheme, .. } => scheme.has_channels(),
            _ => false,
        }
    }

    /// Whether somebody may answer who is connected to once more.
    pub fn can_be_asked(&self) -> bool {
        self.has_channels() || matches!(self, Target::Exec { answers: true, .. })
    }
}

/// What waits for a source.
#[derive(Debug)]
pub enum Listener {
    /// Anybody can connect.
    Many(Listening),
    /// A single connection, to be taken when it is wanted.
    Once(Target),
}

/// Where anybody can connect.
#[derive(Debug)]
pub enum Listening {
    /// A listening socket.
    Socket(socket::Listener),
    /// An entrance of the VMM's own making, and its URI.
    Custom(String, Box<dyn Entrance>),
}

/// Listens at `uri`.
pub fn listen(uri: &Uri, means: &Means, wake: &Arc<Wake>) -> Result<Listener> {
    Ok(match uri {
        Uri::Tcp { .. } | Uri::Unix { .. } | Uri::Vsock { .. } => {
            Listener::Many(Listening::Socket(socket::Listener::new(uri)?))
        }
        Uri::Fd(fd) => Listener::Once(Target::Ready(Arc::new(FdChannel::of_caller(*fd, false, wake)?))),
        Uri::File { path, offset } => {
            Listener::Once(Target::Ready(Arc::new(file::read(path, *offset, &means.fd_sets, wake)?)))
        }
        Uri::Exec(_) => Listener::Once(Target::new(uri.clone(), true, means, wake)?),
        Uri::Custom { scheme, address } => {
            let words = format!("{scheme}:{address}");
            let entrance = means.schemes.find(scheme)?.listen(address);
            let entrance = entrance.map_err(|e| e.context(format_args!("listening on {words}")))?;
            Listener::Many(Listening::Custom(words, entrance))
        }
    })
}
