//! `exec:`: a command's standard input and output.
//!
//! A thread watches each command: it keeps the end of what the command says on standard error, hears how it ends, and
//! kills it if it goes on when nobody wants it any more.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::channel::FdChannel;
use super::{Channel, STALL};
use crate::error::{Error, Result};
use crate::sys::eventfd::{EventFd, Wake};
use crate::sys::io::{self, FdKind, Piece, Room};
use crate::sys::process::{self, Child, Exit};
use crate::thread::{Threads, lock};

/// What is kept of standard error: its last bytes.
const SAID_MAX: usize = 2000;
/// What is shown of a command.
const SHOWN_MAX: usize = 200;
/// How long a command that nobody wants any more may go on by itself, and how long after SIGTERM.
const PATIENCE: Duration = Duration::from_millis(500);
/// How long one that was killed may take to be gone.
const KILL_WAIT: Duration = Duration::from_secs(5);
/// Readings that empty a pipe, however fast somebody fills it.
const LAST_READINGS: usize = 16;
/// Between two looks at what it did not take yet.
const NAP: Duration = Duration::from_millis(1);
/// How long one that closed its end may take to say why, by ending.
const WHY_WAIT: Duration = Duration::from_secs(1);

/// A command, and the connection to it.
#[derive(Debug)]
pub struct ExecChannel {
    input: FdChannel,
    output: FdChannel,
    watch: Arc<Watch>,
    wake: Arc<Wake>,
    answers: bool,
}

/// What the channel and the thread know of a command.
#[derive(Debug)]
struct Watch {
    command: String,
    bell: EventFd,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    exit: Option<Exit>,
    /// Nobody wants it any more.
    released: bool,
    /// We told it to end: how it ends says nothing.
    killed: bool,
    said: Vec<u8>,
}

impl ExecChannel {
    /// Runs `command`. `answers`: what it writes is the peer's answers, not only noise.
    pub fn new(command: &str, answers: bool, threads: &Threads, wake: &Arc<Wake>) -> Result<Self> {
        let shown = shown(command);
        let spawned = process::spawn_shell(command).map_err(|e| e.context(format_args!("exec:{shown}")))?;
        let watch = Arc::new(Watch {
            command: shown,
            bell: EventFd::new()?,
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        io::set_nonblocking(spawned.errors.as_fd())?;
        let input = FdChannel::new(spawned.input, wake)?;
        let output = FdChannel::new(spawned.output, wake)?;
        let (ours, on_panic) = (Arc::clone(&watch), Arc::clone(&watch));
        let (child, errors) = (spawned.child, spawned.errors);
        let body = move || {
            ours.work(child, &errors);
            Ok(())
        };
        threads.spawn_with("exec", body, move |_| on_panic.ended(Exit::Unknown))?;
        Ok(Self { input, output, watch, wake: Arc::clone(wake), answers })
    }

    /// What an error on our side of a pipe means, which the command knows better.
    fn why(&self, error: Error, doing: &str) -> Error {
        if error.errno() != libc::EPIPE {
            return error;
        }
        let how = match self.watch.await_end(WHY_WAIT) {
            Some(exit) => self.watch.words(exit),
            None => "closed its standard input, and goes on".to_owned(),
        };
        Error::new(error.errno(), format!("{doing} the command '{}': it {how}", self.watch.command))
    }
}

impl Channel for ExecChannel {
    fn read(&self, buf: &mut [u8], limit: Option<Duration>) -> Result<usize> {
        match self.output.read(buf, limit)? {
            0 if !buf.is_empty() => self.watch.check_end(WHY_WAIT).map(|()| 0),
            n => Ok(n),
        }
    }

    fn read_room(&self, rooms: &mut [Room<'_>], limit: Option<Duration>) -> Result<usize> {
        match self.output.read_room(rooms, limit)? {
            0 if rooms.iter().any(|room| !room.is_empty()) => self.watch.check_end(WHY_WAIT).map(|()| 0),
            n => Ok(n),
        }
    }

    fn write(&self, pieces: &[Piece<'_>], limit: Duration) -> Result<usize> {
        self.input.write(pieces, limit).map_err(|e| self.why(e, "writing to"))
    }

    fn write_last(&self, bytes: &[u8], limit: Duration) -> Result<()> {
        self.input.write_last(bytes, limit)
    }

    fn close_write(&self) {
        self.input.close_write();
    }

    fn shutdown(&self) {
        self.input.shutdown();
        self.output.shutdown();
        self.watch.release();
    }

    fn is_two_way(&self) -> bool {
        self.answers
    }

    fn is_lost(&self) -> bool {
        self.input.is_lost() || self.output.is_lost()
    }

    fn descriptor(&self) -> Option<Arc<OwnedFd>> {
        self.output.descriptor()
    }

    fn is_taken(&self, limit: Duration) -> Result<()> {
        let (deadline, pipe) = (Instant::now() + limit, self.input.descriptor());
        let left = || pipe.as_ref().map_or(Ok(0), |pipe| io::unread(pipe.as_fd()));
        // There is no waiting for an empty pipe.
        while left()? > 0 {
            self.wake.check()?;
            if self.watch.await_end(NAP).is_some() && left()? > 0 {
                return Err(self.why(Error::new(libc::EPIPE, "ended"), "writing to"));
            }
            if Instant::now() >= deadline {
                let what = format!("the command '{}' took no byte for", self.watch.command);
                return Err(Error::timeout(STALL, limit, what));
            }
        }
        Ok(())
    }

    fn finish(&self, limit: Duration) -> Result<()> {
        self.input.close_write();
        match self.watch.await_end(limit) {
            Some(_) => self.watch.check_end(Duration::ZERO),
            None => {
                let what = format!("the command '{}' took everything, but did not end within", self.watch.command);
                Err(Error::timeout(STALL, limit, what))
            }
        }
    }

    fn ended_well(&self, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        let mut drain = [0; 4096];
        // Nobody answers: a command that waits for the end of its input must see it.
        self.input.close_write();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.output.read(&mut drain, Some(left)) {
                Ok(0) => return self.watch.check_end(deadline.saturating_duration_since(Instant::now())),
                Ok(_) if !left.is_zero() => (),
                Ok(_) => return Ok(()),
                // It has said what we need, and may go on with something else.
                Err(error) if error.errno() == libc::ETIMEDOUT => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }
}

impl Drop for ExecChannel {
    fn drop(&mut self) {
        self.watch.release();
    }
}

impl Watch {
    fn release(&self) {
        lock(&self.state).released = true;
        self.bell.set();
    }

    fn ended(&self, exit: Exit) {
        lock(&self.state).exit = Some(exit);
        self.changed.notify_all();
    }

    /// How it ended, if it does within `limit`.
    fn await_end(&self, limit: Duration) -> Option<Exit> {
        let deadline = Instant::now() + limit;
        let mut state = lock(&self.state);
        while state.exit.is_none() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        state.exit
    }

    /// Fails if it ends within `limit`, and not well.
    fn check_end(&self, limit: Duration) -> Result<()> {
        match self.await_end(limit) {
            None | Some(Exit::Status(0) | Exit::Unknown) => Ok(()),
            Some(_) if lock(&self.state).killed => Ok(()),
            Some(exit) => Err(Error::new(libc::EIO, format!("the command '{}' {}", self.command, self.words(exit)))),
        }
    }

    fn words(&self, exit: Exit) -> String {
        let how = match exit {
            Exit::Status(status) => format!("ended with status {status}"),
            Exit::Signal(signal) => format!("was killed by signal {signal}"),
            Exit::Unknown => "ended".to_owned(),
        };
        let state = lock(&self.state);
        let said = String::from_utf8_lossy(&state.said);
        let said: String = said.trim().chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        if said.is_empty() { how } else { format!("{how} and said: {said}") }
    }

    /// The body of the thread.
    fn work(&self, mut child: Child, errors: &OwnedFd) {
        let mut listens = true;
        let mut next: Option<(Instant, Option<i32>)> = None;
        loop {
            let mut fds = vec![child.as_fd()];
            // One that never falls silent would put off what is due.
            if listens && next.is_none_or(|(at, _)| Instant::now() < at) {
                fds.push(errors.as_fd());
            }
            match io::wait_any(&fds, self.bell.as_fd(), next.map(|(at, _)| at)) {
                Ok(Some(0)) => break,
                Ok(Some(_)) => listens = self.hear(errors),
                Ok(None) => {
                    self.bell.clear();
                    next.get_or_insert((Instant::now() + PATIENCE, Some(libc::SIGTERM)));
                }
                Err(error) if error.errno() == libc::ETIMEDOUT => match next.and_then(|(_, signal)| signal) {
                    // The kernel holds it; nothing more can be done.
                    None => return self.ended(Exit::Unknown),
                    Some(signal) => next = Some(self.kill(&child, signal)),
                },
                // poll(2) lacks memory, and must not be asked without a pause.
                Err(_) => std::thread::sleep(WHY_WAIT),
            }
        }
        // What it leaves behind may write on.
        for _ in 0..LAST_READINGS {
            if !(listens && self.hear(errors) && io::is_readable(errors.as_fd())) {
                break;
            }
        }
        // What is left of a pipeline ends with it.
        if lock(&self.state).killed {
            child.signal(libc::SIGKILL);
        }
        let exit = child.reap();
        self.ended(exit.unwrap_or(Exit::Unknown));
    }

    /// What comes next, and when.
    fn kill(&self, child: &Child, signal: i32) -> (Instant, Option<i32>) {
        lock(&self.state).killed = true;
        child.signal(signal);
        let now = Instant::now();
        if signal == libc::SIGTERM { (now + PATIENCE, Some(libc::SIGKILL)) } else { (now + KILL_WAIT, None) }
    }

    /// Reads what was said on standard error; false: no more will be.
    fn hear(&self, errors: &OwnedFd) -> bool {
        let mut some = [0; 4096];
        match io::read(errors.as_fd(), FdKind::Pipe, &mut some) {
            Ok(Some(0)) | Err(_) => false,
            Ok(None) => true,
            Ok(Some(n)) => {
                let said = &mut lock(&self.state).said;
                said.extend_from_slice(&some[..n]);
                let over = said.len().saturating_sub(SAID_MAX);
                said.drain(..over);
                true
            }
        }
    }
}

fn shown(command: &str) -> String {
    let start: String = command.chars().take(SHOWN_MAX).collect();
    let more = if start.len() < command.len() { "..." } else { "" };
    format!("{}{more}", start.escape_debug())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the thread makes of a command whose standard error never falls silent; none: it is still at it.
    fn loud(command: &str, released: bool) -> Option<Exit> {
        let spawned = process::spawn_shell(command).unwrap();
        let noise = std::fs::File::open("/dev/zero").unwrap().into();
        let watch = Arc::new(Watch {
            command: shown(command),
            bell: EventFd::new().unwrap(),
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        if released {
            watch.release();
        }
        let ours = Arc::clone(&watch);
        std::thread::spawn(move || ours.work(spawned.child, &noise));
        watch.await_end(Duration::from_secs(30))
    }

    #[test]
    fn noise_keeps_nobody_from_being_killed() {
        assert_eq!(loud("exec sleep 70", true), Some(Exit::Signal(libc::SIGTERM)));
        assert_eq!(loud("trap '' TERM; sleep 70; sleep 70", true), Some(Exit::Signal(libc::SIGKILL)));
    }

    #[test]
    fn noise_that_a_command_leaves_behind_is_not_heard_to_its_end() {
        assert_eq!(loud("exit 3", false), Some(Exit::Status(3)));
    }
}
