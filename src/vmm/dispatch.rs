//! Callbacks of a VMM with one thread: they wait in a queue until that thread dispatches them.
//!
//! Nobody can wait in a circle here. A library thread waits for the VMM's thread with no lock of ours held that this
//! thread would wait for; the VMM's thread waits for library threads only in [`Dispatch::pump`], which runs the queue
//! meanwhile, and never inside a callback. What waits for the VMM's thread has a limit, unless the thread is at it.
#![allow(unsafe_code, reason = "a task of the queue borrows from the thread that waits for it")]

use std::collections::VecDeque;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::sys::eventfd::EventFd;
use crate::thread::home::{Home, Inside};
use crate::thread::{fence, lock};

/// Log lines that wait at most; later ones are lost, and counted.
const LINES_MAX: usize = 256;
/// How often a wait looks at what it waits for. Callbacks are not waited for so long: they end the nap.
const TICK: Duration = Duration::from_millis(2);
/// The name of the option that says how long a callback waits.
pub const TIMEOUT: &str = "dispatch-timeout";

type Task = Box<dyn FnOnce() + Send>;

struct Entry {
    id: u64,
    task: Task,
    is_line: bool,
}

#[derive(Default)]
struct Queue {
    last_id: u64,
    entries: VecDeque<Entry>,
    /// What other threads want done outside of callbacks.
    errands: VecDeque<Entry>,
    /// No errand is taken any more.
    closed: bool,
    /// The callback that runs now.
    running: Option<u64>,
    /// The errand that does; callbacks may run inside of it.
    on_errand: Option<u64>,
    /// A task was not run in time: the next ones do not wait until somebody dispatches again.
    absent: bool,
    /// Log lines among the entries, and those there was no room for.
    lines: usize,
    lost: u64,
}

/// The queue of one guest.
pub struct Dispatch {
    home: Arc<Home>,
    queue: Mutex<Queue>,
    changed: Condvar,
    /// Made when it is first needed.
    fd: OnceLock<EventFd>,
    timeout_ms: AtomicU64,
}

impl Queue {
    fn push(&mut self, task: Task, is_line: bool) -> u64 {
        self.last_id += 1;
        self.lines += usize::from(is_line);
        self.entries.push_back(Entry { id: self.last_id, task, is_line });
        self.last_id
    }

    /// The oldest, if it came no later than `last`.
    fn pop(&mut self, last: u64) -> Option<Entry> {
        self.entries.front().filter(|entry| entry.id <= last)?;
        let entry = self.entries.pop_front()?;
        self.lines -= usize::from(entry.is_line);
        Some(entry)
    }

    fn push_errand(&mut self, task: Task) -> u64 {
        self.last_id += 1;
        self.errands.push_back(Entry { id: self.last_id, task, is_line: false });
        self.last_id
    }

    /// The oldest, if it came no later than `last` and none is being done.
    fn next_errand(&mut self, last: u64) -> Option<Entry> {
        self.errands.front().filter(|entry| entry.id <= last && self.on_errand.is_none())?;
        let entry = self.errands.pop_front()?;
        self.on_errand = Some(entry.id);
        Some(entry)
    }

    /// One that was not begun.
    fn take_back(&mut self, id: u64) -> Option<Entry> {
        let lanes = [&mut self.entries, &mut self.errands];
        lanes.into_iter().find_map(|lane| lane.remove(lane.iter().position(|entry| entry.id == id)?))
    }

    fn runs(&self, id: u64) -> bool {
        self.running == Some(id) || self.on_errand == Some(id)
    }

    fn is_done(&self, id: u64) -> bool {
        !self.runs(id) && !self.entries.iter().chain(&self.errands).any(|entry| entry.id == id)
    }

    /// Nothing waits.
    fn is_empty(&self) -> bool {
        self.entries.is_empty() && self.errands.is_empty()
    }
}

impl Dispatch {
    /// An empty queue for that thread.
    pub fn new(home: &Arc<Home>) -> Self {
        let timeout_ms = AtomicU64::new(u64::from(u32::MAX));
        Self {
            home: Arc::clone(home),
            queue: Mutex::default(),
            changed: Condvar::new(),
            fd: OnceLock::new(),
            timeout_ms,
        }
    }

    /// Whose queue it is.
    pub fn home(&self) -> &Home {
        &self.home
    }

    /// Callbacks wait here from now on, or no longer: then what waits is done. On the VMM's thread, while no migration runs,
    /// outside of callbacks.
    pub fn set_manual(&self, manual: bool) -> Result<()> {
        if manual && self.fd.get().is_none() {
            // Only this thread sets it.
            let _ = self.fd.set(EventFd::new()?);
        }
        if !manual {
            self.run_queued();
        }
        {
            // Under the lock: nobody puts into the queue what is not dispatched any more.
            let _queue = lock(&self.queue);
            self.home.set_manual(manual);
        }
        if !manual {
            self.run_queued();
            self.run_errands();
        }
        Ok(())
    }

    /// The queue, if what is put into it is dispatched.
    fn open_queue(&self) -> Option<MutexGuard<'_, Queue>> {
        let queue = lock(&self.queue);
        self.home.is_manual().then_some(queue)
    }

    /// How long a callback waits to be dispatched.
    pub fn set_timeout(&self, limit_ms: u64) {
        self.timeout_ms.store(limit_ms, Ordering::Relaxed);
    }

    /// Readable while something waits in the queue.
    pub fn fd(&self) -> Result<&EventFd> {
        self.fd.get().filter(|_| self.home.is_manual()).ok_or_else(not_manual)
    }

    /// Leave to call back from this thread; see [`Home::may_call`].
    pub fn here(&self) -> Option<Inside<'_>> {
        self.home.may_call()
    }

    /// Runs `f` where the VMM may be called back, and waits for it. `ETIMEDOUT`: nobody dispatched it, and it will not run.
    pub fn run<T: Send>(&self, what: &str, f: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        if let Some(_inside) = self.here() {
            return f();
        }
        self.ask(what, f, |queue, task| queue.push(task, false))
    }

    /// Does for another thread what only the VMM's may, outside of callbacks: in [`run_errands`](Self::run_errands).
    /// `ETIMEDOUT`: that was not called, or will not be any more, and it is not done.
    pub fn errand<T: Send>(&self, what: &str, f: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        if !self.home.is_manual() || self.home.is_here() {
            return f();
        }
        self.ask(what, f, Queue::push_errand)
    }

    /// The same for what must happen: if nobody dispatches it in time, it runs when somebody does, or at the end.
    pub fn run_or_leave<T: Send + 'static>(
        &self,
        what: &str,
        f: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        if let Some(_inside) = self.here() {
            return f();
        }
        let slot = Arc::new(Mutex::new(None));
        let (result, name) = (Arc::clone(&slot), what.to_owned());
        let task: Task = Box::new(move || *lock(&result) = Some(fence(name, f)));
        match self.open_queue() {
            Some(mut queue) => {
                let id = queue.push(task, false);
                drop(self.wait_for(queue, id));
            }
            None => task(),
        }
        lock(&slot).take().unwrap_or_else(|| Err(self.nobody(what)))
    }

    /// The same for what nobody waits for: it runs in its turn, at the latest at the end. For what ends something that was
    /// begun here, so that there is never more of it than of what was waited for.
    pub fn post(&self, what: &str, f: impl FnOnce() + Send + 'static) {
        let name = what.to_owned();
        let f = move || {
            let _ = fence(name, || {
                f();
                Ok(())
            });
        };
        if let Some(_inside) = self.here() {
            return f();
        }
        let Some(mut queue) = self.open_queue() else { return f() };
        queue.push(Box::new(f), false);
        self.ring();
    }

    /// Whether nothing but log lines waits in the queue.
    pub fn is_quiet(&self) -> bool {
        let queue = lock(&self.queue);
        queue.entries.len() == queue.lines
    }

    /// A line of log: nobody waits for it.
    pub fn line(&self, write: impl FnOnce(u64) + Send + 'static) {
        if let Some(_inside) = self.here() {
            return write(0);
        }
        let Some(mut queue) = self.open_queue() else { return write(0) };
        if queue.lines == LINES_MAX {
            queue.lost += 1;
            return;
        }
        let lost = std::mem::take(&mut queue.lost);
        queue.push(Box::new(move || write(lost)), true);
        self.ring();
    }

    fn ring(&self) {
        self.fd.get().inspect(|fd| fd.set());
        self.changed.notify_all();
    }

    /// Has `f` run by the VMM's thread, or takes it back.
    fn ask<T: Send>(
        &self,
        what: &str,
        f: impl FnOnce() -> Result<T> + Send,
        push: impl FnOnce(&mut Queue, Task) -> u64,
    ) -> Result<T> {
        let mut result = None;
        let task: Box<dyn FnOnce() + Send + '_> = Box::new(|| result = Some(fence(what, f)));
        // SAFETY: only the lifetime changes. `await_task` returns when the task has run or was taken out of the queue and
        // dropped, and does not unwind; nobody else keeps it. So it is gone before anything it borrows.
        let task = unsafe { std::mem::transmute::<Box<dyn FnOnce() + Send + '_>, Task>(task) };
        self.await_task(task, push);
        result.unwrap_or_else(|| Err(self.nobody(what)))
    }

    /// Returns when the task has run, or will not. Does not unwind.
    fn await_task(&self, task: Task, push: impl FnOnce(&mut Queue, Task) -> u64) {
        let Some(mut queue) = self.open_queue() else { return task() };
        let id = push(&mut queue, task);
        let (mut queue, _) = self.wait_for(queue, id);
        let entry = queue.take_back(id);
        drop(queue);
        drop(entry);
    }

    /// Waits until a task has run; false: it was not begun in time. One that runs is waited for as long as it takes.
    fn wait_for<'a>(&self, mut queue: MutexGuard<'a, Queue>, id: u64) -> (MutexGuard<'a, Queue>, bool) {
        self.ring();
        let deadline = Instant::now() + self.timeout();
        let errand = queue.errands.iter().any(|entry| entry.id == id);
        loop {
            if queue.is_done(id) {
                return (queue, true);
            }
            if queue.runs(id) {
                queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || (queue.absent && !errand) || (queue.closed && errand) {
                // A thread that does no errands may well run callbacks.
                queue.absent |= !errand;
                return (queue, false);
            }
            queue = self.changed.wait_timeout(queue, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn timeout(&self) -> Duration {
        Duration::from_millis(self.timeout_ms.load(Ordering::Relaxed))
    }

    fn nobody(&self, what: &str) -> Error {
        let what = format!("vmig_dispatch() was not called, and {what} waited for it for");
        Error::timeout(TIMEOUT, self.timeout(), what)
    }

    /// Runs what waits in the queue now, and says how much it was. On the VMM's thread, outside of callbacks.
    pub fn run_queued(&self) -> usize {
        let _inside = self.here();
        let mut ran = 0;
        let mut queue = lock(&self.queue);
        queue.absent = false;
        let last = queue.last_id;
        while let Some(entry) = queue.pop(last) {
            queue.running = Some(entry.id);
            drop(queue);
            // Its result is with whoever waits for it; what nobody waits for has nobody to tell.
            let _ = fence("a callback", || {
                (entry.task)();
                Ok(())
            });
            ran += 1;
            queue = lock(&self.queue);
            queue.running = None;
            self.changed.notify_all();
        }
        self.quieten(&queue);
        ran
    }

    /// Does the errands that wait now, and says how many. On the VMM's thread, where it may call any function.
    pub fn run_errands(&self) -> usize {
        let mut ran = 0;
        let mut queue = lock(&self.queue);
        let last = queue.last_id;
        while let Some(entry) = queue.next_errand(last) {
            drop(queue);
            // Its result, a panic too, is with whoever waits for it.
            (entry.task)();
            ran += 1;
            queue = lock(&self.queue);
            queue.on_errand = None;
            self.changed.notify_all();
        }
        self.quieten(&queue);
        ran
    }

    /// No errand is begun any more: the guest is about to be freed.
    pub fn close_errands(&self) {
        lock(&self.queue).closed = true;
        self.changed.notify_all();
    }

    fn quieten(&self, queue: &Queue) {
        if let (true, Some(fd)) = (queue.is_empty(), self.fd.get()) {
            fd.clear();
        }
    }

    /// Waits until there is something to run; false: for so long there was nothing.
    pub fn await_more(&self, limit: Duration) -> bool {
        let queue = lock(&self.queue);
        let nothing = |queue: &mut Queue| queue.entries.is_empty();
        let waited = self.changed.wait_timeout_while(queue, limit, nothing);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    /// Waits on the VMM's thread, and runs the queue meanwhile, until `ready` has something or the deadline.
    pub fn pump<T>(&self, deadline: Option<Instant>, mut ready: impl FnMut() -> Option<T>) -> Option<T> {
        loop {
            self.run_queued();
            if let Some(value) = ready() {
                return Some(value);
            }
            let left = deadline.map_or(TICK, |at| at.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                return None;
            }
            self.await_more(left.min(TICK));
        }
    }
}

/// For a call that means something only with `dispatch=manual`.
pub fn not_manual() -> Error {
    Error::invalid("option 'dispatch' is not manual: callbacks come by themselves, on threads of the library")
}

impl fmt::Debug for Dispatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Dispatch").field("home", &self.home).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
