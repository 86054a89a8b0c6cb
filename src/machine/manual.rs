//! A VMM with one thread: what it calls to be called back, and how its own calls wait.

use std::time::{Duration, Instant};

use super::Machine;
use crate::error::{Error, Result};
use crate::options::{Opt, Options};
use crate::sys::eventfd::EventFd;
use crate::thread::lock;
use crate::vmm::dispatch::not_manual;

/// While the guest stands still, how long a dispatch waits for the next callback: a loop that is busy with other things
/// between two of them would be felt.
const LINGER: Duration = Duration::from_millis(2);
/// How long it stays for that altogether.
const LINGER_MAX: Duration = Duration::from_millis(50);

/// The option's value.
pub(super) fn name(manual: bool) -> String {
    if manual { "manual" } else { "auto" }.to_owned()
}

impl Machine {
    /// Says where the VMM is called back. On the thread that made the handle.
    pub(super) fn set_dispatch(&self, value: &str, busy: bool) -> Result<()> {
        let (options, name) = (Options::default(), Opt::Dispatch.name());
        options.set_text(name, value, busy)?;
        let manual = options.get(Opt::Dispatch) == 1;
        let dispatch = self.vmm.dispatch();
        if dispatch.home().is_manual() == manual {
            return Ok(());
        }
        if !dispatch.home().is_here() {
            let text = format!("option '{name}' is set by the thread that made the handle: callbacks run there then");
            return Err(Error::new(libc::EPERM, text));
        }
        dispatch.home().require_outside("set option 'dispatch'")?;
        if manual && self.vmm.bql().is_taken() {
            let text = "option 'dispatch' cannot become manual while a thread has the big lock, nor for a VMM with a \
                        lock of its own (vmig_ops.lock): with one thread there is none";
            return Err(Error::new(libc::EBUSY, text));
        }
        dispatch.set_timeout(self.options.get(Opt::DispatchTimeout));
        dispatch.set_manual(manual)
    }

    /// Runs the callbacks that wait, and what others may not do themselves; how many it were. On the thread that made the
    /// handle.
    pub fn dispatch(&self) -> Result<usize> {
        let dispatch = self.vmm.dispatch();
        if !dispatch.home().is_manual() {
            return Err(not_manual());
        }
        dispatch.home().require_outside("dispatch")?;
        let until = Instant::now() + LINGER_MAX;
        let mut ran = dispatch.run_queued() + dispatch.run_errands();
        while ran > 0 && !self.vmm.is_running() && Instant::now() < until && dispatch.await_more(LINGER) {
            ran += dispatch.run_queued();
        }
        Ok(ran)
    }

    /// Readable while callbacks wait. \[any\]
    pub fn dispatch_fd(&self) -> Result<&EventFd> {
        self.vmm.dispatch().fd()
    }

    /// For a call that may wait: on the thread for it, outside of callbacks, and with none left over.
    pub(super) fn catch_up(&self, what: &str) -> Result<()> {
        let dispatch = self.vmm.dispatch();
        if dispatch.home().is_manual() {
            dispatch.home().require_outside(what)?;
            dispatch.run_queued();
        }
        Ok(())
    }

    /// Before something goes away that callbacks in the queue may be about. Inside of one they cannot run.
    pub(super) fn run_left(&self, what: &str) -> Result<()> {
        let dispatch = self.vmm.dispatch();
        match dispatch.home().require_outside(what) {
            Ok(()) => {
                dispatch.run_queued();
                Ok(())
            }
            Err(_) if dispatch.is_quiet() => Ok(()),
            Err(_) => {
                let text = format!("cannot {what} from inside this callback: others wait for vmig_dispatch()");
                Err(Error::new(libc::EBUSY, text))
            }
        }
    }

    /// Pauses the guest, or takes the pause back, for the user. \[free\]
    pub fn pause(&self, pause: bool) -> Result<()> {
        use crate::vmm::StopReason::User;
        self.catch_up(if pause { "stop the guest" } else { "start the guest" })?;
        if pause { self.vmm.stop(User) } else { self.vmm.start(User) }.map(drop)
    }

    /// Gives the big lock up until somebody wakes those who wait for that; see [`crate::bql::Bql::wait`].
    pub fn bql_wait(&self, timeout: Option<Duration>) -> Result<bool> {
        let (bql, dispatch) = (self.vmm.bql(), self.vmm.dispatch());
        if !dispatch.home().is_manual() {
            return bql.wait(timeout);
        }
        dispatch.home().require_outside("wait for a wake")?;
        let seen = bql.wakes();
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        Ok(dispatch.pump(deadline, || (bql.wakes() != seen).then_some(())).is_some())
    }

    /// Waits until the thread of the last migration has ended, and has its last callbacks.
    pub(super) fn join_worker(&self) -> Result<()> {
        let worker = lock(&self.worker).take();
        worker.map_or(Ok(()), |worker| self.join(|limit| worker.join(limit)))
    }

    /// The same for every thread of the library.
    pub(super) fn join_all(&self) -> Result<()> {
        self.join(|limit| self.threads.join_all(limit))
    }

    /// Waits for threads that may wait for callbacks. `join` is told how long it waits.
    pub fn join(&self, join: impl Fn(Option<Duration>) -> Result<()>) -> Result<()> {
        let dispatch = self.vmm.dispatch();
        if !dispatch.home().is_manual() {
            return join(None);
        }
        let joined = || match join(Some(Duration::ZERO)) {
            Err(error) if error.errno() == libc::ETIMEDOUT => None,
            ended => Some(ended),
        };
        let result = dispatch.pump(None, joined).unwrap_or(Ok(()));
        dispatch.run_queued();
        result
    }
}
