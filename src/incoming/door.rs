//! The door of a destination: sorts connections by their first four bytes.
//!
//! A main connection begins with `QEVM` or `VMIG`, a channel with its magic; a channel may come first and waits until
//! its migration is known. A connection that says nothing is held for a moment, and as many as could be ours; a second
//! main connection is closed without disturbing the first.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::sys::eventfd::Wake;
use crate::sys::io;
use crate::transport::channel::FdChannel;
use crate::transport::socket;
use crate::transport::{CONNECT, Channel, Listener};
use crate::wire::packet;

/// How long a connection may take to say what it is.
const SORT_TIME: Duration = Duration::from_secs(10);
/// Connections held at a time: all channels a source can have, its main one, and one more.
const HELD_MAX: usize = packet::CHANNELS_MAX as usize + 2;

/// A connection that has not said what it is.
#[derive(Debug)]
struct Unsorted {
    channel: FdChannel,
    until: Instant,
}

/// What came through the door.
#[derive(Debug)]
pub(super) struct Door {
    listener: Option<socket::Listener>,
    ready: Option<Arc<dyn Channel>>,
    unsorted: Vec<Unsorted>,
    main: Option<Arc<dyn Channel>>,
    channels: Vec<Arc<dyn Channel>>,
    /// Why the last connection was dropped that had not said what it is.
    broken: Option<Error>,
}

impl Door {
    pub(super) fn new(listener: Listener) -> Self {
        let (listener, ready): (_, Option<Arc<dyn Channel>>) = match listener {
            Listener::Socket(listener) => (Some(listener), None),
            Listener::Ready(channel) => (None, Some(channel)),
        };
        Self { listener, ready, unsorted: Vec::new(), main: None, channels: Vec::new(), broken: None }
    }

    /// Waits for the main connection; only a raised wake ends the wait.
    pub(super) fn main(&mut self, wake: &Arc<Wake>) -> Result<Arc<dyn Channel>> {
        if let Some(channel) = self.ready.take() {
            return Ok(channel);
        }
        loop {
            if let Some(main) = self.main.take() {
                return Ok(main);
            }
            self.turn(wake, None, true)?;
        }
    }

    /// Waits for `count` channels, which come within `limit`.
    pub(super) fn channels(&mut self, count: u8, wake: &Arc<Wake>, limit: Duration) -> Result<Vec<Arc<dyn Channel>>> {
        let deadline = Instant::now() + limit;
        while self.channels.len() < usize::from(count) {
            if self.listener.is_none() {
                return Err(Error::invalid("channels for pages need a listening socket, not a lone descriptor"));
            }
            let have = self.channels.len();
            self.turn(wake, Some(deadline), false).map_err(|e| match e.errno() {
                libc::ETIMEDOUT => self.too_few(limit).expected_got(count, have),
                _ => e,
            })?;
        }
        Ok(self.channels.drain(..usize::from(count)).collect())
    }

    fn too_few(&self, limit: Duration) -> Error {
        let secs = limit.as_secs_f32();
        let text = format!("{secs} seconds (option '{CONNECT}'): not all channels of the source came in time");
        let text = match &self.broken {
            None => text,
            Some(why) => format!("{text}, and a connection broke: {}", why.text()),
        };
        Error::new(libc::ETIMEDOUT, text).by_option(CONNECT)
    }

    /// Whether one more channel came. Only connections that have not said what they are are waited for, for `patience`.
    pub(super) fn has_channel(&mut self, wake: &Arc<Wake>, patience: Duration) -> Result<bool> {
        let mut until = Instant::now();
        let end = until + patience;
        while self.channels.is_empty() && self.listener.is_some() {
            match self.turn(wake, Some(until), false) {
                Err(error) if error.errno() != libc::ETIMEDOUT => return Err(error),
                Err(_) if self.unsorted.is_empty() || until == end => break,
                _ => until = if self.unsorted.is_empty() { until } else { end },
            }
        }
        Ok(!self.channels.is_empty())
    }

    /// Waits for one thing to happen, and sorts.
    fn turn(&mut self, wake: &Arc<Wake>, deadline: Option<Instant>, want_main: bool) -> Result<()> {
        let Some(listener) = &self.listener else { return Err(Error::invalid("nobody can connect")) };
        let mut held = Vec::new();
        for unsorted in &self.unsorted {
            held.push(unsorted.channel.descriptor()?);
        }
        let mut fds: Vec<_> = held.iter().map(|fd| fd.as_fd()).collect();
        if self.unsorted.len() + self.channels.len() < HELD_MAX {
            fds.push(listener.as_fd());
        }
        let next = self.unsorted.iter().map(|u| u.until).chain(deadline).min();
        let woken = match io::wait_any(&fds, wake.as_fd(), next) {
            Ok(None) => return wake.check(),
            Ok(Some(index)) => Some(index),
            Err(error) if error.errno() == libc::ETIMEDOUT => None,
            Err(error) => return Err(error),
        };
        match woken {
            Some(index) if index < self.unsorted.len() => self.sort(index, want_main)?,
            Some(_) => {
                if let Some(channel) = listener.accept(wake)? {
                    self.unsorted.push(Unsorted { channel, until: Instant::now() + SORT_TIME });
                }
            }
            None => {
                let now = Instant::now();
                self.unsorted.retain(|u| u.until > now);
                if deadline.is_some_and(|at| at <= now) {
                    return Err(Error::new(libc::ETIMEDOUT, "nothing came in time"));
                }
            }
        }
        Ok(())
    }

    /// Finds out what a connection is. What is neither is taken for the main one when that is wanted: its first bytes
    /// are then named in the error.
    fn sort(&mut self, index: usize, want_main: bool) -> Result<()> {
        let mut first = [0; 4];
        let there = match self.unsorted[index].channel.peek(&mut first) {
            Ok(n) => n,
            Err(error) => {
                // Most likely it closed before it said anything.
                self.broken = Some(error);
                self.unsorted.swap_remove(index);
                return Ok(());
            }
        };
        let done = there < first.len() && io::peer_is_done(self.unsorted[index].channel.descriptor()?.as_fd());
        if there < first.len() && !done {
            // A few bytes are readable, so poll would return at once; the rest is on its way.
            std::thread::sleep(Duration::from_millis(1));
            if self.unsorted[index].until <= Instant::now() {
                self.unsorted.swap_remove(index);
            }
            return Ok(());
        }
        let channel: Arc<dyn Channel> = Arc::new(self.unsorted.swap_remove(index).channel);
        if first == packet::MAGIC.to_be_bytes() {
            self.channels.push(channel);
        } else if want_main && self.main.is_none() {
            self.main = Some(channel);
        }
        Ok(())
    }
}
