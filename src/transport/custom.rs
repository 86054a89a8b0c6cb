//! Connections of the VMM's own making. No descriptor, no poll(2): they are asked with a time limit, over and over, and
//! cancels and deadlines are looked at in between.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::channel::{FdChannel, is_end};
use super::uri::{SCHEMES, is_scheme};
use super::{CONNECT, Channel, STALL};
use crate::error::{Error, Result};
use crate::sys::eventfd::Wake;
use crate::sys::io::{self, FdKind, Piece, Room};
use crate::thread::lock;

/// The longest one call may wait: a cancel waits for it.
const ASK: Duration = Duration::from_millis(50);
/// Bytes of a connection that are looked at before it is known what it is.
const AHEAD: usize = 64;

/// One connection, as the VMM made it. Dropped, it is closed; no call is under way then.
pub trait Link: Send + Sync + std::fmt::Debug {
    /// Reads what is there into the first of `room`, or waits for at most `limit`; none: nothing came; 0: the end.
    fn read(&self, room: &Room<'_>, limit: Duration) -> Result<Option<usize>>;
    /// Writes what there is room for, or waits for at most `limit`; none: there is no room.
    fn write(&self, piece: &Piece<'_>, limit: Duration) -> Result<Option<usize>>;
    /// No more writes (and, `both`, no more reads): calls that wait come back.
    fn shutdown(&self, both: bool);
}

/// A place where the VMM listens. Dropped, it does no more.
pub trait Entrance: Send + Sync + std::fmt::Debug {
    /// The next connection, if one comes within `limit`.
    fn accept(&self, limit: Duration) -> Result<Option<Box<dyn Link>>>;
}

/// A connection that is being made. Dropped before it is, it is given up.
pub trait Attempt {
    /// Goes on for at most `limit`; none: not yet.
    fn go_on(&mut self, limit: Duration) -> Result<Option<Box<dyn Link>>>;
}

/// A kind of connection the VMM added.
pub trait Scheme: Send + Sync + std::fmt::Debug {
    /// What stands before the colon.
    fn name(&self) -> &str;
    /// Whether more than one connection to an address is possible.
    fn has_channels(&self) -> bool;
    /// Begins to connect to what follows the colon.
    fn connect(&self, address: &str) -> Result<Box<dyn Attempt + '_>>;
    /// Listens at what follows the colon.
    fn listen(&self, address: &str) -> Result<Box<dyn Entrance>>;
}

/// The schemes of one guest.
#[derive(Debug, Default)]
pub struct Schemes(Mutex<Vec<Arc<dyn Scheme>>>);

/// Schemes a guest may have.
const SCHEMES_MAX: usize = 64;

impl Schemes {
    /// Adds one.
    pub fn add(&self, scheme: Arc<dyn Scheme>) -> Result<()> {
        let name = scheme.name();
        if !is_scheme(name) {
            let text = format!(
                "'{}' cannot be a scheme: take up to 32 small letters, digits, +, - and ., a letter first",
                name.escape_default()
            );
            return Err(Error::invalid(text));
        }
        let mut all = lock(&self.0);
        if SCHEMES.contains(&name) || all.iter().any(|other| other.name() == name) {
            return Err(Error::new(libc::EEXIST, format!("there is a scheme '{name}' already")));
        }
        if all.len() >= SCHEMES_MAX {
            return Err(Error::new(libc::ENOSPC, format!("a guest has at most {SCHEMES_MAX} schemes")));
        }
        all.push(scheme);
        Ok(())
    }

    /// The one of this name.
    pub fn find(&self, name: &str) -> Result<Arc<dyn Scheme>> {
        let found = lock(&self.0).iter().find(|scheme| scheme.name() == name).cloned();
        found.ok_or_else(|| {
            let known = SCHEMES.join(", ");
            let text = format!("unknown migration protocol '{name}'; take {known}, or add it with vmig_add_channel");
            Error::invalid(text)
        })
    }
}

/// What was read before anybody wanted it.
#[derive(Debug, Default)]
struct Ahead {
    bytes: Vec<u8>,
    /// What ended it: the end of the stream (none), or an error.
    over: Option<Option<Error>>,
}

/// A connection nobody works with yet.
#[derive(Debug)]
pub struct Connection {
    link: Box<dyn Link>,
    ahead: Mutex<Ahead>,
    /// One at a time.
    writing: Mutex<()>,
}

impl Connection {
    /// A new one.
    pub fn new(link: Box<dyn Link>) -> Self {
        Self { link, ahead: Mutex::default(), writing: Mutex::default() }
    }

    /// Looks at up to [`AHEAD`] bytes without taking them, waiting at most `limit` for the first; and whether no more
    /// will come.
    fn look(&self, bytes: &mut [u8], limit: Duration) -> (usize, bool) {
        let mut ahead = lock(&self.ahead);
        if ahead.over.is_none() && ahead.bytes.len() < bytes.len().min(AHEAD) {
            let mut some = [0; AHEAD];
            let most = AHEAD - ahead.bytes.len();
            let limit = if ahead.bytes.is_empty() { limit } else { Duration::ZERO };
            match self.link.read(&Room::of(&mut some[..most]), limit) {
                Ok(None) => (),
                Ok(Some(0)) => ahead.over = Some(None),
                Ok(Some(n)) => ahead.bytes.extend_from_slice(&some[..n]),
                Err(error) => ahead.over = Some(Some(error)),
            }
        }
        let n = ahead.bytes.len().min(bytes.len());
        bytes[..n].copy_from_slice(&ahead.bytes[..n]);
        (n, ahead.over.is_some())
    }

    /// Reads once, what was looked at first.
    fn read(&self, room: &mut Room<'_>, limit: Duration) -> Result<Option<usize>> {
        let mut ahead = lock(&self.ahead);
        if !ahead.bytes.is_empty() {
            let n = room.fill(&ahead.bytes);
            ahead.bytes.drain(..n);
            return Ok(Some(n));
        }
        match &ahead.over {
            None => self.link.read(room, limit),
            Some(None) => Ok(Some(0)),
            Some(Some(error)) => Err(error.clone()),
        }
    }

    fn write(&self, piece: &Piece<'_>, limit: Duration) -> Result<Option<usize>> {
        let _one = lock(&self.writing);
        self.link.write(piece, limit)
    }
}

/// A connection in use.
#[derive(Debug)]
pub struct CustomChannel {
    connection: Connection,
    wake: Arc<Wake>,
    closed: AtomicBool,
    write_closed: AtomicBool,
    /// It ended, or failed, or the peer was silent too long.
    lost: AtomicBool,
}

impl CustomChannel {
    /// Connects to `address`.
    pub fn connect(scheme: &dyn Scheme, address: &str, wake: &Arc<Wake>, limit: Duration) -> Result<Self> {
        let deadline = Instant::now() + limit;
        let words = || format!("connecting to {}:{address}", scheme.name());
        let mut attempt = scheme.connect(address).map_err(|e| e.context(words()))?;
        loop {
            wake.check()?;
            let left = deadline.saturating_duration_since(Instant::now());
            if let Some(link) = attempt.go_on(left.min(ASK)).map_err(|e| e.context(words()))? {
                return Ok(Self::new(Connection::new(link), wake));
            }
            if left.is_zero() {
                return Err(Error::timeout(CONNECT, limit, format!("{}: no answer within", words())));
            }
        }
    }

    /// Works with a connection.
    fn new(connection: Connection, wake: &Arc<Wake>) -> Self {
        let [closed, write_closed, lost] = [const { AtomicBool::new(false) }; 3];
        Self { connection, wake: Arc::clone(wake), closed, write_closed, lost }
    }

    /// Asks until there is an answer, and takes note if nothing more can be expected.
    fn ask(
        &self,
        what: &str,
        limit: Option<Duration>,
        shut: &AtomicBool,
        f: impl FnMut(Duration) -> Result<Option<usize>>,
    ) -> Result<usize> {
        let result = self.ask_on(what, limit, shut, f);
        if is_end(&result) {
            self.lost.store(true, Ordering::Release);
        }
        result
    }

    fn ask_on(
        &self,
        what: &str,
        limit: Option<Duration>,
        shut: &AtomicBool,
        mut f: impl FnMut(Duration) -> Result<Option<usize>>,
    ) -> Result<usize> {
        let deadline = limit.map(|limit| Instant::now() + limit);
        loop {
            if shut.load(Ordering::Acquire) {
                return Err(Error::new(libc::ESHUTDOWN, "the connection was closed on this side"));
            }
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if let Some(n) = f(left.map_or(ASK, |left| left.min(ASK)))? {
                return Ok(n);
            }
            self.wake.check()?;
            if let (Some(limit), Some(Duration::ZERO)) = (limit, left) {
                return Err(Error::timeout(STALL, limit, format!("the peer {what} no byte for")));
            }
        }
    }
}

impl Channel for CustomChannel {
    fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }

    fn read(&self, buf: &mut [u8], limit: Option<Duration>) -> Result<usize> {
        let mut room = Room::of(buf);
        self.ask("sent", limit, &self.closed, |ask| self.connection.read(&mut room, ask))
    }

    fn read_room(&self, rooms: &mut [Room<'_>], limit: Option<Duration>) -> Result<usize> {
        let Some(room) = rooms.iter_mut().find(|room| !room.is_empty()) else { return Ok(0) };
        self.ask("sent", limit, &self.closed, |ask| self.connection.read(room, ask))
    }

    fn write(&self, pieces: &[Piece<'_>], limit: Duration) -> Result<usize> {
        let Some(piece) = pieces.iter().find(|piece| !piece.is_empty()) else { return Ok(0) };
        self.ask("took", Some(limit), &self.write_closed, |ask| self.connection.write(piece, ask))
    }

    fn write_last(&self, bytes: &[u8], limit: Duration) -> Result<()> {
        let (deadline, mut rest) = (Instant::now() + limit, bytes);
        while !rest.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.connection.write(&Piece::of(rest), left.min(ASK))? {
                Some(n) => rest = &rest[n..],
                None if left.is_zero() => return Err(Error::new(libc::ETIMEDOUT, "no room for the last words")),
                None => (),
            }
        }
        Ok(())
    }

    fn close_write(&self) {
        if !self.write_closed.swap(true, Ordering::AcqRel) {
            self.connection.link.shutdown(false);
        }
    }

    fn shutdown(&self) {
        self.write_closed.store(true, Ordering::Release);
        if !self.closed.swap(true, Ordering::AcqRel) {
            self.connection.link.shutdown(true);
        }
    }

    fn is_two_way(&self) -> bool {
        true
    }

    fn look(&self, patience: Duration) -> Option<bool> {
        let (there, over) = self.connection.look(&mut [0], patience);
        Some(there > 0 || over)
    }
}

/// Somebody who connected and may not have said yet who they are.
#[derive(Debug)]
pub enum Caller {
    /// At a socket.
    Socket(OwnedFd),
    /// At an entrance of the VMM's own.
    Custom(Connection),
}

impl Caller {
    /// The connection to them.
    pub fn channel(self, wake: &Arc<Wake>) -> Result<Arc<dyn Channel>> {
        Ok(match self {
            Caller::Socket(fd) => Arc::new(FdChannel::new(fd, wake)?),
            Caller::Custom(connection) => Arc::new(CustomChannel::new(connection, wake)),
        })
    }

    /// What can be polled for.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Caller::Socket(fd) => Some(fd.as_fd()),
            Caller::Custom(_) => None,
        }
    }

    /// Looks at what they say, without taking it or waiting: how many bytes there are, and whether no more will come.
    pub fn look(&self, bytes: &mut [u8]) -> Result<(usize, bool)> {
        match self {
            Caller::Socket(fd) => {
                let there = io::peek(fd.as_fd(), bytes).map_err(|e| Error::from_io("looking at a connection", &e))?;
                Ok((there, io::peer_is_done(fd.as_fd())))
            }
            Caller::Custom(connection) => match connection.look(bytes, Duration::ZERO) {
                (0, true) => {
                    let why = lock(&connection.ahead).over.clone().flatten();
                    Err(why.unwrap_or_else(|| Error::ended("a connection closed before it said what it is")))
                }
                looked => Ok(looked),
            },
        }
    }

    /// Takes and forgets what they said; false: they are gone.
    pub fn drain(&self, some: &mut [u8]) -> bool {
        match self {
            Caller::Socket(fd) => matches!(io::read(fd.as_fd(), FdKind::Socket, some), Ok(None | Some(1..))),
            Caller::Custom(connection) => {
                matches!(connection.read(&mut Room::of(some), Duration::ZERO), Ok(None | Some(1..)))
            }
        }
    }

    /// One write into an empty connection: it is taken whole, or they are gone and will ask again.
    pub fn say(&self, bytes: &[u8]) {
        let piece = Piece::of(bytes);
        match self {
            Caller::Socket(fd) => drop(io::write(fd.as_fd(), FdKind::Socket, &[piece])),
            Caller::Custom(connection) => drop(connection.write(&piece, ASK)),
        }
    }

    /// They will hear no more.
    pub fn close_write(&self) {
        match self {
            Caller::Socket(fd) => io::close_write(fd.as_fd()),
            Caller::Custom(connection) => connection.link.shutdown(false),
        }
    }
}
