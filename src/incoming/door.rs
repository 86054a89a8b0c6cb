//! The door of one incoming migration: its main connection and its channels, as the reception sorted them.

use std::os::fd::AsFd;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::reception::{Line, Reception};
use crate::error::{Error, Result};
use crate::status::Status;
use crate::sys::eventfd::Wake;
use crate::sys::io;
use crate::thread::lock;
use crate::transport::{self, CONNECT, Channel, Listener, Means, Target, uri::Uri};
use crate::wire::ask::MigrationId;

/// Between two looks at connections that have not said what they are.
const LOOK: Duration = Duration::from_millis(5);
/// How long channels are waited for when one broke that may be of them.
const BROKEN: Duration = Duration::from_millis(200);

/// Where a source comes in. Dropped, nobody else does; the address is free again unless it was kept.
#[derive(Debug)]
pub struct Door {
    line: Option<Arc<Line>>,
    ready: Mutex<Option<Target>>,
    reception: Arc<Reception>,
}

impl Door {
    /// Listens at `uri`, or takes the connection it names.
    pub fn open(reception: &Arc<Reception>, uri: &Uri, means: &Means, wake: &Arc<Wake>) -> Result<Self> {
        let (line, ready) = match reception.line(uri)? {
            Some(line) => (Some(line), None),
            None => match transport::listen(uri, means, wake)? {
                Listener::Many(listening) => (Some(reception.add(uri, listening)?), None),
                Listener::Once(target) => (None, Some(target)),
            },
        };
        Ok(Self { line, ready: Mutex::new(ready), reception: Arc::clone(reception) })
    }

    /// Where it listens, with the real port.
    pub fn address(&self) -> Option<&str> {
        self.line.as_ref().map(|line| line.address())
    }

    /// Questions about what arrived here will be answered at this address from now on.
    pub(super) fn keep(&self) {
        if let Some(line) = &self.line {
            line.keep();
        }
    }

    /// Whether a source can connect again.
    pub(super) fn is_line(&self) -> bool {
        self.line.is_some()
    }

    /// The source of this migration may connect again. A newer connection ends the one that is in use.
    pub(super) fn let_rejoin(&self, migration: MigrationId, status: &Arc<Status>) {
        if let Some(line) = &self.line {
            line.let_rejoin(migration, status);
        }
    }

    /// The connection is not in use any more.
    pub(super) fn await_knock(&self) {
        if let Some(line) = &self.line {
            line.await_knock();
        }
    }

    /// Waits for the source to connect again, until the deadline or until the wake is raised.
    pub(super) fn knocked(&self, wake: &Arc<Wake>, deadline: Instant) -> Result<Arc<dyn Channel>> {
        let Some(line) = &self.line else { return Err(Error::invalid("nobody can connect")) };
        loop {
            line.bell()?.clear();
            if let Some(caller) = line.take_knock()? {
                return caller.channel(wake);
            }
            self.wait(line, wake, Some(deadline))?;
        }
    }

    /// Waits for a main connection; only a raised wake ends the wait.
    pub(super) fn main(&self, wake: &Arc<Wake>) -> Result<Arc<dyn Channel>> {
        if let Some(target) = lock(&self.ready).take() {
            return target.connect(wake, Duration::ZERO);
        }
        let Some(line) = &self.line else { return Err(Error::invalid("nobody can connect")) };
        loop {
            line.bell()?.clear();
            if let Some(caller) = line.take_main() {
                return caller.channel(wake);
            }
            self.wait(line, wake, None)?;
        }
    }

    /// Waits for `count` channels, which come within `limit`.
    pub(super) fn channels(&self, count: u8, wake: &Arc<Wake>, limit: Duration) -> Result<Vec<Arc<dyn Channel>>> {
        let deadline = Instant::now() + limit;
        let Some(line) = &self.line else {
            return Err(Error::invalid("channels for pages need a listening socket, not a lone descriptor"));
        };
        loop {
            line.bell()?.clear();
            if let Some(callers) = line.take_channels(usize::from(count)) {
                return callers.into_iter().map(|caller| caller.channel(wake)).collect();
            }
            self.wait(line, wake, Some(deadline)).map_err(|e| match e.errno() {
                libc::ETIMEDOUT => too_few(line, limit).expected_got(count, line.channels()),
                _ => e,
            })?;
        }
    }

    /// Waits for one of `count` channels, until the deadline; of which one that broke, as far as anybody knows, does not come
    /// again before its source has made another main connection.
    pub(super) fn channel(&self, count: u8, wake: &Arc<Wake>, deadline: Instant) -> Result<Arc<dyn Channel>> {
        let Some(line) = &self.line else { return Err(Error::invalid("nobody can connect")) };
        let mut until = deadline;
        loop {
            line.bell()?.clear();
            if let Some(caller) = line.take_channels(1).and_then(|mut callers| callers.pop()) {
                return caller.channel(wake);
            }
            let broken = line.broken();
            if broken.is_some() {
                until = until.min(Instant::now() + BROKEN);
            }
            self.wait(line, wake, Some(until)).map_err(|e| match (e.errno(), broken) {
                (libc::ETIMEDOUT, Some(why)) => {
                    let text = format!("a channel of the source broke: {}", why.text());
                    Error::new(libc::ECONNRESET, text)
                }
                (libc::ETIMEDOUT, None) => {
                    let text = format!("not all {count} channels of the source came in time (option '{CONNECT}')");
                    Error::new(libc::ETIMEDOUT, text).by_option(CONNECT)
                }
                _ => e,
            })?;
        }
    }

    /// A channel came, and broke before it said whose it is.
    pub(super) fn channel_broke(&self, error: Error) {
        if let Some(line) = &self.line {
            line.broke(error);
        }
    }

    /// Whether one more channel came. Only connections that have not said what they are are waited for, for `patience`.
    pub(super) fn has_channel(&self, wake: &Arc<Wake>, patience: Duration) -> Result<bool> {
        let Some(line) = &self.line else { return Ok(false) };
        let end = Instant::now() + patience;
        while line.channels() == 0 && !line.is_quiet() && Instant::now() < end {
            line.bell()?.clear();
            let until = end.min(Instant::now() + LOOK);
            match self.wait(line, wake, Some(until)) {
                Err(error) if error.errno() != libc::ETIMEDOUT => return Err(error),
                _ => (),
            }
        }
        Ok(line.channels() > 0)
    }

    /// A guest comes: every other source is told that it comes too late.
    pub(super) fn shut_out_others(&self) {
        if let Some(line) = &self.line {
            self.reception.shut_out_others(line);
        }
    }

    /// Waits until something comes, or until nothing can any more.
    fn wait(&self, line: &Line, wake: &Arc<Wake>, deadline: Option<Instant>) -> Result<()> {
        self.reception.check(line)?;
        match io::wait_any(&[line.bell()?.as_fd()], wake.as_fd(), deadline)? {
            None => wake.check(),
            Some(_) => Ok(()),
        }
    }
}

fn too_few(line: &Line, limit: Duration) -> Error {
    let secs = limit.as_secs_f32();
    let text = format!("{secs} seconds (option '{CONNECT}'): not all channels of the source came in time");
    let text = match line.broken() {
        None => text,
        Some(why) => format!("{text}, and a connection broke: {}", why.text()),
    };
    Error::new(libc::ETIMEDOUT, text).by_option(CONNECT)
}

impl Drop for Door {
    fn drop(&mut self) {
        if let Some(line) = self.line.take() {
            self.reception.close(&line);
        }
    }
}
