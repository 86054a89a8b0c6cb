//! The run state: a set of reasons to be stopped. The guest runs if and only if the set is empty.
//!
//! One mutex is held across a stop or start with all its handlers, and never while anybody waits for a peer. The hooks
//! run without the big lock, or a vCPU that waits for it could never park; the handlers run with it.

use std::fmt;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use crate::bql::Bql;
use crate::error::{Error, Result};
use crate::status::feed::{Feed, News};
use crate::sys::clock::monotonic_ns;
use crate::thread::{current_token, fence, lock, try_lock};

use super::dispatch::Dispatch;
use super::handlers::{Moment, Registry, RunHandler, Walk};
use super::log::Log;

/// What the VMM does for us. Called without the big lock, on the thread that asked.
pub trait Hooks: Send + Sync {
    /// Returns once no vCPU and no device runs. On failure the guest still runs.
    fn stop(&self) -> Result<()>;
    /// Lets the guest run. Fails only if it did not run one instruction.
    fn start(&self) -> Result<()>;
    /// Tells the network that the guest lives here now.
    fn announce(&self) {}
    /// Gives up what the guest holds besides memory, and was acquired with this epoch.
    fn release(&self, _epoch: u64) -> Result<()> {
        Ok(())
    }
    /// Acquires it with this epoch, higher than any before. On failure nothing is held.
    fn reacquire(&self, _epoch: u64) -> Result<()> {
        Ok(())
    }
    /// Makes certain that nobody has run or will run the guest with this epoch.
    fn fence(&self, _epoch: u64) -> Result<()> {
        Err(Error::new(libc::ENOSYS, "the VMM has no fence hook"))
    }
    /// Switches KVM's dirty log of a memory slot.
    fn log_dirty(&self, slot: u32, _on: bool) -> Result<()> {
        let text = format!("cannot switch the dirty log of memory slot {slot}: the VMM has no log_dirty hook");
        Err(Error::new(libc::ENOTSUP, text))
    }
    /// Other memory is behind a RAM block from now on.
    fn ram_replaced(&self, _ram: &ReplacedRam<'_>) -> Result<()> {
        Ok(())
    }
    /// A source sent this configuration: everything it needs is to be registered now.
    fn config(&self, _blob: &[u8]) -> Result<()> {
        Ok(())
    }
    /// Has the vCPUs stand still for so many percent of the time.
    fn throttle(&self, _percent: u32) -> Result<()> {
        Err(Error::new(libc::ENOTSUP, "the VMM has no throttle hook"))
    }
    /// Whether `throttle` can work.
    fn has_throttle(&self) -> bool {
        false
    }
    /// Whether `config` does anything.
    fn has_config(&self) -> bool {
        false
    }
    /// Whether `log_dirty` can work.
    fn has_log_dirty(&self) -> bool {
        false
    }
}

/// A RAM block that shows other memory than before.
#[derive(Clone, Copy, Debug)]
pub struct ReplacedRam<'a> {
    /// Name of the block.
    pub name: &'a str,
    /// Its start in this process.
    pub host: u64,
    /// Bytes.
    pub len: u64,
    /// The file that is mapped there now.
    pub fd: BorrowedFd<'a>,
    /// Where in the file the block begins, in bytes.
    pub offset: u64,
}

/// Why a guest is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum StopReason {
    /// Somebody paused it.
    User = 1,
    /// A migration is switching over.
    Migration = 2,
    /// It cannot go on.
    Error = 4,
    /// It belongs to another host, or does not belong to us yet.
    NotOwner = 8,
}

impl fmt::Display for StopReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::User => "user",
            Self::Migration => "migration",
            Self::Error => "error",
            Self::NotOwner => "not-owner",
        })
    }
}

/// A set of stop reasons.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reasons(u8);

impl Reasons {
    /// None: the guest runs.
    pub const NONE: Self = Self(0);

    /// Whether `reason` is in the set.
    pub fn contains(self, reason: StopReason) -> bool {
        self.0 & reason as u8 != 0
    }

    /// Whether there is none.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The set with `reason`.
    #[must_use]
    pub fn with(self, reason: StopReason) -> Self {
        Self(self.0 | reason as u8)
    }

    /// The set without `reason`.
    #[must_use]
    pub fn without(self, reason: StopReason) -> Self {
        Self(self.0 & !(reason as u8))
    }
}

impl From<StopReason> for Reasons {
    fn from(reason: StopReason) -> Self {
        Self(reason as u8)
    }
}

impl fmt::Display for Reasons {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all = [StopReason::User, StopReason::Migration, StopReason::Error, StopReason::NotOwner];
        let names: Vec<String> = all.iter().filter(|r| self.contains(**r)).map(ToString::to_string).collect();
        f.write_str(if names.is_empty() { "none".to_owned() } else { names.join(", ") }.as_str())
    }
}

/// What a stop or start did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RunReport {
    /// False: only the set changed, or not even that; no hook was called and the times are 0.
    pub changed: bool,
    /// Before the first hook or handler: where a downtime begins.
    pub began: Moment,
    /// What the handlers were told.
    pub at: Moment,
    /// Time the hook took.
    pub hook_ns: u64,
    /// Time all handlers took, the wait for the big lock included.
    pub handlers_ns: u64,
    /// `CLOCK_MONOTONIC` when all was done: where a downtime ends.
    pub ended_ns: u64,
}

/// The run state before somebody was expected to arrive.
#[derive(Clone, Copy, Debug)]
pub struct Before(Reasons);

/// Time the guest has run, over all hosts.
struct Clock {
    base_ns: u64,
    since_ns: Option<u64>,
}

/// One guest's VMM: the run state and what belongs to it.
pub struct Vmm {
    // Declared before the hooks: handlers go first, the VMM's own pointer last.
    handlers: Registry,
    run: Mutex<()>,
    /// Token of the thread inside `run`; 0: none.
    runner: AtomicUsize,
    reasons: AtomicU8,
    /// Nobody stopped or started the guest through us yet: whether it runs is the VMM's secret.
    fresh: AtomicBool,
    /// Whether the guest arrives paused is decided: the user's word comes too late.
    sealed: AtomicBool,
    /// Nanoseconds the last stop and the last start took.
    took: [AtomicU64; 2],
    clock: Mutex<Clock>,
    bql: Arc<Bql>,
    log: Arc<Log>,
    feed: Arc<Feed>,
    /// Where callbacks run.
    dispatch: Arc<Dispatch>,
    hooks: Box<dyn Hooks>,
}

impl Vmm {
    /// A guest that is stopped for `reasons`, or runs if there are none. No hook is called.
    ///
    /// Without reasons it may also be that the VMM did not start it yet: the first `start` calls the hook.
    pub fn new(hooks: Box<dyn Hooks>, bql: Arc<Bql>, log: Arc<Log>, reasons: Reasons) -> Self {
        let dispatch = Arc::new(Dispatch::new(bql.home()));
        Self::with_dispatch(hooks, bql, log, reasons, dispatch)
    }

    /// The same with a queue that was made before, for the big lock's thread.
    pub fn with_dispatch(
        hooks: Box<dyn Hooks>,
        bql: Arc<Bql>,
        log: Arc<Log>,
        reasons: Reasons,
        dispatch: Arc<Dispatch>,
    ) -> Self {
        let clock = Clock { base_ns: 0, since_ns: reasons.is_empty().then(monotonic_ns) };
        Self {
            handlers: Registry::default(),
            run: Mutex::new(()),
            runner: AtomicUsize::new(0),
            reasons: AtomicU8::new(reasons.0),
            fresh: AtomicBool::new(reasons.is_empty()),
            sealed: AtomicBool::new(false),
            took: Default::default(),
            clock: Mutex::new(clock),
            bql,
            log,
            feed: Arc::default(),
            dispatch,
            hooks,
        }
    }

    /// Where callbacks run.
    pub fn dispatch(&self) -> &Arc<Dispatch> {
        &self.dispatch
    }

    /// Runs `f`, which calls devices back, with the big lock, where the VMM may be called back. \[free\]
    pub fn with_bql<T: Send>(&self, what: &str, f: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        self.dispatch.run(what, || {
            let _bql = self.bql.guard()?;
            f()
        })
    }

    /// The big lock.
    pub fn bql(&self) -> &Arc<Bql> {
        &self.bql
    }

    /// The log.
    pub fn log(&self) -> &Arc<Log> {
        &self.log
    }

    /// What happens to the guest, for whoever watches all of it.
    pub fn feed(&self) -> &Arc<Feed> {
        &self.feed
    }

    /// The same for what must happen: if nobody dispatches it in time, it runs when somebody does. \[free\]
    pub fn with_bql_or_later(self: &Arc<Self>, what: &str, f: impl FnOnce() + Send + 'static) -> Result<()> {
        let bql = Arc::clone(&self.bql);
        self.dispatch.run_or_leave(what, move || {
            let _bql = bql.guard()?;
            f();
            Ok(())
        })
    }

    /// Why the guest is stopped. \[any\]
    pub fn reasons(&self) -> Reasons {
        Reasons(self.reasons.load(Ordering::SeqCst))
    }

    /// Whether the guest runs. While it is being stopped or started: whether it may. \[any\]
    pub fn is_running(&self) -> bool {
        self.reasons().is_empty()
    }

    /// Adds a reason, and stops the guest if it was the first. A reason that is there already is fine. \[free\]
    ///
    /// Stop hook, then the handlers. On failure the reason is not added and the guest runs, as before; should it not
    /// start again after a failed handler, it stays stopped for the reason `Error` and the text says so. `EDEADLK`
    /// from inside a hook or handler, or with the big lock held.
    pub fn stop(&self, reason: StopReason) -> Result<RunReport> {
        self.where_it_may("the stop hook", || {
            let _run = self.enter("stop")?;
            self.check_unsealed(reason)?;
            let before = self.reasons();
            if before.is_empty() {
                return self.dispatch.here().map(|_inside| self.halt(reason)).transpose();
            }
            self.set(before.with(reason));
            Ok(Some(RunReport::default()))
        })
    }

    /// Does what may have to call the VMM back: here, or (none: it has to, and this is not the thread for it) there. What
    /// calls nobody must not depend on whether somebody dispatches: the guest may not be ours any more.
    fn where_it_may(&self, what: &str, change: impl Fn() -> Result<Option<RunReport>> + Sync) -> Result<RunReport> {
        match change()? {
            Some(report) => Ok(report),
            None => self.dispatch.run(what, || change().map(Option::unwrap_or_default)),
        }
    }

    /// Takes a reason away, and starts the guest if it was the last. A reason that is not there is fine. \[free\]
    ///
    /// Start handlers, then the hook. On failure the guest is stopped for the same reasons as before, and the handlers
    /// know. `EPERM` for the user while the guest is not ours. `EDEADLK` as for `stop`.
    pub fn start(&self, reason: StopReason) -> Result<RunReport> {
        self.where_it_may("the start hook", || {
            let _run = self.enter("start")?;
            self.check_unsealed(reason)?;
            let before = self.reasons();
            if before.contains(StopReason::NotOwner) && reason == StopReason::User {
                return Err(Error::new(libc::EPERM, "cannot start: this host does not own the guest"));
            }
            let after = before.without(reason);
            let first = self.fresh.load(Ordering::Relaxed) && reason == StopReason::User;
            if after.is_empty() && (!before.is_empty() || first) {
                return self.dispatch.here().map(|_inside| self.resume()).transpose();
            }
            self.set(after);
            Ok(Some(RunReport::default()))
        })
    }

    /// The reasons as they will travel: until [`unseal`](Self::unseal) the user cannot pause or resume (`EBUSY`). \[free\]
    pub fn seal(&self) -> Result<Reasons> {
        let _run = self.enter("hand over")?;
        self.sealed.store(true, Ordering::Relaxed);
        Ok(self.reasons())
    }

    /// The user may pause and resume again.
    pub fn unseal(&self) {
        self.sealed.store(false, Ordering::Relaxed);
    }

    fn check_unsealed(&self, reason: StopReason) -> Result<()> {
        if reason == StopReason::User && self.sealed.load(Ordering::Relaxed) {
            let text = "the guest is being handed over to the destination: pause or resume it where it arrives";
            return Err(Error::new(libc::EBUSY, text));
        }
        Ok(())
    }

    /// `EBUSY` if the guest runs, as far as is known: of a fresh one nobody knows.
    pub fn check_still(&self, what: &str) -> Result<()> {
        if self.is_running() && !self.fresh.load(Ordering::Relaxed) {
            return Err(Error::new(libc::EBUSY, format!("cannot {what} while the guest runs: vmig_stop it first")));
        }
        Ok(())
    }

    /// The guest is about to arrive from elsewhere. `EBUSY` if one runs here: its memory would be overwritten.
    ///
    /// Of a fresh guest no hook is called, for it never ran.
    pub fn expect_arrival(&self) -> Result<Before> {
        let _run = self.enter_at_once("replace")?;
        let before = Before(self.reasons());
        if self.is_running() && !self.fresh.load(Ordering::Relaxed) {
            let text = "the guest runs here: stop it with vmig_stop before another one may take its place";
            return Err(Error::new(libc::EBUSY, text));
        }
        self.fresh.store(false, Ordering::Relaxed);
        self.freeze_clock();
        self.set(before.0.with(StopReason::NotOwner));
        Ok(before)
    }

    /// Nobody arrived, and nothing was touched: the guest that was here is still here, and stopped.
    pub fn nobody_arrived(&self, before: Before) {
        let Ok(_run) = self.enter("keep") else { return };
        if !before.0.contains(StopReason::NotOwner) {
            let now = self.reasons().without(StopReason::NotOwner);
            self.set(if now.is_empty() { StopReason::User.into() } else { now });
        }
    }

    /// Adds a handler and returns its id, which is never 0. \[bql\]
    ///
    /// `EBUSY` while the guest is being stopped or started: a handler that joined halfway would miss its half. One that
    /// is added while the guest is stopped is told of the next start.
    pub fn add_handler(&self, name: &str, priority: i32, handler: Arc<dyn RunHandler>) -> Result<u32> {
        self.handlers.add(name, priority, handler)
    }

    /// Removes and drops a handler; when this returns it is not called any more. `EBUSY` as for adding. \[bql\]
    pub fn remove_handler(&self, id: u32) -> Result<()> {
        self.handlers.remove(id)
    }

    /// Nanoseconds the guest has run, over all hosts: what its timers count. Stands still while it is stopped. \[any\]
    pub fn clock_ns(&self) -> u64 {
        let clock = lock(&self.clock);
        clock.base_ns.saturating_add(clock.since_ns.map_or(0, |since| monotonic_ns().saturating_sub(since)))
    }

    /// Sets the clock to what the source sent. `EBUSY` if the guest runs: its timers would jump.
    pub fn set_clock_ns(&self, ns: u64) -> Result<()> {
        let mut clock = lock(&self.clock);
        if clock.since_ns.is_some() {
            return Err(Error::new(libc::EBUSY, "cannot set the virtual clock of a running guest"));
        }
        clock.base_ns = ns;
        Ok(())
    }

    /// What the last stop and the last start took, hooks and handlers; nothing if there was none. \[any\]
    pub fn took(&self) -> [Duration; 2] {
        [0, 1].map(|which: usize| Duration::from_nanos(self.took[which].load(Ordering::Relaxed)))
    }

    /// Calls the announce hook, if any. A hook that panics is logged: the guest runs here all the same. \[free\]
    pub fn announce(&self) {
        let told = self.call("the announce hook", || {
            self.hooks.announce();
            Ok(())
        });
        if let Err(error) = told {
            self.log.to("vmm").error(error);
        }
    }

    /// Calls the release hook, if any. \[free\]
    pub fn release(&self, epoch: u64) -> Result<()> {
        self.call("the release hook", || self.hooks.release(epoch))
    }

    /// Calls the reacquire hook, if any. \[free\]
    pub fn reacquire(&self, epoch: u64) -> Result<()> {
        self.call("the reacquire hook", || self.hooks.reacquire(epoch))
    }

    /// Calls the fence hook; without one nothing is certain. \[free\]
    pub fn fence(&self, epoch: u64) -> Result<()> {
        self.call("the fence hook", || self.hooks.fence(epoch))
    }

    /// The guest that arrived is ours from here on, and runs if it is to; else it is paused by the user. On failure it
    /// did not run an instruction, and is not ours. \[free\]
    pub fn take_over(&self, run: bool) -> Result<RunReport> {
        self.where_it_may("the start hook", || {
            let _run = self.enter("take over")?;
            if run {
                return self.dispatch.here().map(|_inside| self.resume()).transpose();
            }
            self.set(StopReason::User.into());
            Ok(Some(RunReport::default()))
        })
    }

    /// Switches KVM's dirty log of a slot by the VMM's hook. \[free\]
    pub fn log_dirty(&self, slot: u32, on: bool) -> Result<()> {
        self.call("the log_dirty hook", || self.hooks.log_dirty(slot, on))
    }

    /// Switches it off, now or when the VMM may be called back: nobody waits for it, and what fails only costs time.
    pub fn end_log_dirty(self: &Arc<Self>, slot: u32) {
        let vmm = Arc::clone(self);
        self.dispatch.post("the log_dirty hook", move || drop(vmm.hooks.log_dirty(slot, false)));
    }

    /// Tells the VMM that a RAM block shows other memory. \[free\]
    pub fn ram_replaced(&self, ram: &ReplacedRam<'_>) -> Result<()> {
        self.call("the ram_replaced hook", || self.hooks.ram_replaced(ram))
    }

    /// Lets the VMM build what a source's configuration asks for.
    pub fn config(&self, blob: &[u8]) -> Result<()> {
        self.call("the config hook", || self.hooks.config(blob))
    }

    /// Has the vCPUs stand still for so many percent of the time; 0: no longer. \[free\]
    pub fn throttle(&self, percent: u32) -> Result<()> {
        self.call("the throttle hook", || self.hooks.throttle(percent))
    }

    /// Whether that can work.
    pub fn has_throttle(&self) -> bool {
        self.hooks.has_throttle()
    }

    /// Calls a hook where the VMM may be called back.
    fn call(&self, what: &str, hook: impl FnOnce() -> Result<()> + Send) -> Result<()> {
        self.dispatch.run(what, || fence(what, hook))
    }

    /// Whether the VMM gave a config hook.
    pub fn has_config(&self) -> bool {
        self.hooks.has_config()
    }

    /// Whether the VMM gave a log_dirty hook.
    pub fn has_log_dirty(&self) -> bool {
        self.hooks.has_log_dirty()
    }

    fn enter(&self, what: &str) -> Result<Running<'_>> {
        self.check_enter(what)?;
        Ok(self.entered(lock(&self.run)))
    }

    /// The same without waiting for whoever stops or starts the guest just now.
    fn enter_at_once(&self, what: &str) -> Result<Running<'_>> {
        self.check_enter(what)?;
        match try_lock(&self.run) {
            Some(guard) => Ok(self.entered(guard)),
            None => {
                let text = format!("cannot {what} the guest while another thread stops or starts it");
                Err(Error::new(libc::EBUSY, text))
            }
        }
    }

    fn entered<'a>(&'a self, guard: MutexGuard<'a, ()>) -> Running<'a> {
        self.runner.store(current_token(), Ordering::Relaxed);
        Running { vmm: self, _guard: guard }
    }

    fn check_enter(&self, what: &str) -> Result<()> {
        let me = current_token();
        if self.runner.load(Ordering::Relaxed) == me {
            let text = format!("cannot {what} the guest from inside a stop or start hook or a run-state handler");
            return Err(Error::new(libc::EDEADLK, text));
        }
        // With one thread there is no lock, and others come here only for what calls nobody.
        if !self.dispatch.home().is_manual() {
            self.bql.require_free(what)?;
        }
        Ok(())
    }

    fn set(&self, reasons: Reasons) {
        self.reasons.store(reasons.0, Ordering::SeqCst);
    }

    /// Running -> stopped for `reason`.
    fn halt(&self, reason: StopReason) -> Result<RunReport> {
        let mut walk = self.handlers.walk(&self.bql, false);
        let began = Moment::now();
        fence("the stop hook", || self.hooks.stop())?;
        self.fresh.store(false, Ordering::Relaxed);
        self.freeze_clock();
        let at = Moment::now();
        self.set(reason.into());
        let stopped = self.bql.guard().and_then(|_bql| walk.stop(&at));
        if let Err(error) = stopped {
            return Err(self.recover(error, &mut walk));
        }
        let ended_ns = monotonic_ns();
        let (hook_ns, handlers_ns) = (since(began.monotonic_ns, at.monotonic_ns), since(at.monotonic_ns, ended_ns));
        self.took[0].store(hook_ns + handlers_ns, Ordering::Relaxed);
        self.feed.push(News::Stop);
        Ok(RunReport { changed: true, began, at, hook_ns, handlers_ns, ended_ns })
    }

    /// Lets the guest run on after a handler failed to stop.
    fn recover(&self, error: Error, walk: &mut Walk<'_>) -> Error {
        match self.bring_up(walk) {
            Ok(_) => error,
            Err(second) => {
                self.set(StopReason::Error.into());
                self.feed.push(News::Stop);
                let why = second.text();
                error.context(format_args!("the guest stays stopped (reason: error), because {why}; at first"))
            }
        }
    }

    /// Stopped -> running.
    fn resume(&self) -> Result<RunReport> {
        let report = self.bring_up(&mut self.handlers.walk(&self.bql, true))?;
        self.feed.push(News::Resume);
        Ok(report)
    }

    /// Start handlers and hook. On failure everything is stopped again and the reasons are as before.
    fn bring_up(&self, walk: &mut Walk<'_>) -> Result<RunReport> {
        let at = Moment::now();
        let told = self.bql.guard().and_then(|_bql| walk.start(&at));
        let hook_at = monotonic_ns();
        let started = told.and_then(|()| {
            // Before the hook: the first instruction may read the clock.
            let clock_ns = self.run_clock();
            fence("the start hook", || self.hooks.start()).inspect_err(|_| self.unrun_clock(clock_ns))
        });
        if let Err(error) = started {
            self.stop_again(walk);
            return Err(error);
        }
        self.set(Reasons::NONE);
        self.fresh.store(false, Ordering::Relaxed);
        let ended_ns = monotonic_ns();
        let (hook_ns, handlers_ns) = (since(hook_at, ended_ns), since(at.monotonic_ns, hook_at));
        self.took[1].store(hook_ns + handlers_ns, Ordering::Relaxed);
        Ok(RunReport { changed: true, began: at, at, hook_ns, handlers_ns, ended_ns })
    }

    fn stop_again(&self, walk: &mut Walk<'_>) {
        let at = Moment::now();
        let mut failures = Vec::new();
        match self.bql.guard() {
            Ok(_bql) => walk.stop_again(&at, |error| failures.push(error)),
            Err(error) => failures.push(error),
        }
        for error in failures {
            self.log.to("vmm").error(format_args!("while the guest was stopped again: {error}"));
        }
    }

    fn freeze_clock(&self) {
        let mut clock = lock(&self.clock);
        if let Some(since_ns) = clock.since_ns.take() {
            clock.base_ns = clock.base_ns.saturating_add(monotonic_ns().saturating_sub(since_ns));
        }
    }

    fn run_clock(&self) -> u64 {
        let mut clock = lock(&self.clock);
        clock.since_ns = Some(monotonic_ns());
        clock.base_ns
    }

    /// The guest did not run after all, so its clock did not either.
    fn unrun_clock(&self, base_ns: u64) {
        *lock(&self.clock) = Clock { base_ns, since_ns: None };
    }
}

impl fmt::Debug for Vmm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vmm").field("reasons", &self.reasons()).finish_non_exhaustive()
    }
}

/// This thread stops or starts the guest.
struct Running<'a> {
    vmm: &'a Vmm,
    _guard: MutexGuard<'a, ()>,
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.vmm.runner.store(0, Ordering::Relaxed);
    }
}

fn since(from_ns: u64, to_ns: u64) -> u64 {
    to_ns.saturating_sub(from_ns)
}

#[cfg(test)]
mod tests;
