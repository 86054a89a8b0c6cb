//! Threads of the library: named, deaf to signals, fenced against panics, listed and joined.
//!
//! Each guest has its own registry, so nothing is left behind when the guest is freed.

#[cfg(test)]
pub(crate) mod model;
pub mod home;

use std::any::Any;
use std::fmt::Display;
use std::mem::ManuallyDrop;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::sys::thread_sys;

/// The most threads one guest may have: far more than channels, and a bound on what a bug can start.
pub const THREADS_MAX: usize = 1024;

/// How long `spawn` waits for a new thread to report its id; only `list` is poorer when that passes.
const START_WAIT: Duration = Duration::from_secs(1);

/// How long a join waits for the kernel to forget the thread: that takes microseconds, unless its id was given to a
/// new thread at once.
const GONE_WAIT: Duration = Duration::from_millis(100);

/// Locks a mutex of ours. Panics are fenced, and what our mutexes guard is consistent between statements.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The same, if nobody has it now.
pub fn try_lock<T>(mutex: &Mutex<T>) -> Option<MutexGuard<'_, T>> {
    match mutex.try_lock() {
        Ok(guard) => Some(guard),
        Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
        Err(TryLockError::WouldBlock) => None,
    }
}

/// A number that tells the calling thread from all others alive. Never 0.
pub fn current_token() -> usize {
    thread_local! {
        // Its address is the number: no system call, no global counter, and a forked child keeps its own.
        static MARK: u8 = const { 0 };
    }
    MARK.with(|mark| std::ptr::from_ref(mark).addr())
}

/// Runs `f`; a panic becomes an error that names `what` and repeats the panic's text.
pub fn fence<T>(what: impl Display, f: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(f)).unwrap_or_else(|payload| Err(panic_error(what, payload)))
}

fn panic_error(what: impl Display, payload: Box<dyn Any + Send>) -> Error {
    let text = payload.downcast_ref::<&str>().map(|text| (*text).to_owned());
    let text = text.or_else(|| payload.downcast_ref::<String>().cloned()).unwrap_or_else(|| "(no text)".to_owned());
    // A payload may panic as it is dropped; what that throws is leaked rather than risked again.
    let _leaked = catch_unwind(AssertUnwindSafe(|| drop(payload))).map_err(ManuallyDrop::new);
    Error::new(libc::EIO, format!("{what} panicked: {text}"))
}

/// The threads of one guest.
#[derive(Debug, Default)]
pub struct Threads {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    list: Mutex<List>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct List {
    next: u64,
    closed: bool,
    /// Threads taken out of `entries` whose join is under way.
    joining: usize,
    entries: Vec<Entry>,
}

#[derive(Debug)]
struct Entry {
    id: u64,
    name: String,
    /// 0 until the thread runs.
    tid: i32,
    /// 0 until the thread runs.
    token: usize,
    done: bool,
    /// None only while `spawn` is still at work.
    join: Option<JoinHandle<()>>,
}

/// A thread started by [`Threads::spawn`]. Dropping it leaves the thread running and known to the registry.
#[derive(Debug)]
pub struct Handle<T> {
    shared: Arc<Shared>,
    id: u64,
    name: String,
    outcome: Arc<Mutex<Option<Result<T>>>>,
}

impl Threads {
    /// An empty registry.
    pub fn new() -> Self {
        Self::default()
    }

    /// Starts a thread. Its kernel name is the first 15 bytes of `name`; a panic becomes the result of the join.
    pub fn spawn<T, F>(&self, name: &str, f: F) -> Result<Handle<T>>
    where
        T: Send + 'static,
        F: FnOnce() -> Result<T> + Send + 'static,
    {
        self.spawn_with(name, f, |_| ())
    }

    /// Like [`spawn`](Self::spawn); `on_panic` also learns of a panic at once, on the thread itself.
    pub fn spawn_with<T, F, P>(&self, name: &str, f: F, on_panic: P) -> Result<Handle<T>>
    where
        T: Send + 'static,
        F: FnOnce() -> Result<T> + Send + 'static,
        P: FnOnce(&Error) + Send + 'static,
    {
        let id = self.shared.admit(name)?;
        let outcome = Arc::new(Mutex::new(None));
        let (shared, slot, full) = (Arc::clone(&self.shared), Arc::clone(&outcome), name.to_owned());
        let body = move || {
            shared.update(id, |entry| (entry.tid, entry.token) = (thread_sys::tid(), current_token()));
            let result = catch_unwind(AssertUnwindSafe(f)).unwrap_or_else(|payload| {
                let error = panic_error(format_args!("thread '{full}'"), payload);
                // The panic itself is the news; a second one in its handler adds nothing.
                let _ = fence("on_panic", || {
                    on_panic(&error);
                    Ok(())
                });
                Err(error)
            });
            *lock(&slot) = Some(result);
            shared.update(id, |entry| entry.done = true);
        };
        let spawned = thread_sys::with_signals_blocked(|| Builder::new().name(name.to_owned()).spawn(body))
            .and_then(|io| io.map_err(|e| Error::from_io(format_args!("cannot start thread '{name}'"), &e)));
        match spawned {
            Ok(join) => self.shared.update(id, |entry| entry.join = Some(join)),
            Err(error) => {
                lock(&self.shared.list).entries.retain(|entry| entry.id != id);
                self.shared.changed.notify_all();
                return Err(error);
            }
        }
        let started = |list: &List| list.entries.iter().all(|entry| entry.id != id || entry.tid != 0);
        drop(self.shared.wait(Instant::now().checked_add(START_WAIT), started));
        Ok(Handle { shared: Arc::clone(&self.shared), id, name: name.to_owned(), outcome })
    }

    /// Full name and kernel id of every thread that runs now.
    pub fn list(&self) -> Vec<(String, i32)> {
        let list = lock(&self.shared.list);
        let running = list.entries.iter().filter(|entry| !entry.done && entry.tid != 0);
        running.map(|entry| (entry.name.clone(), entry.tid)).collect()
    }

    /// Takes no new threads and waits until all are gone from the kernel, too. The caller told them to end before.
    ///
    /// `ETIMEDOUT` names those that still run, and may be tried again; `EDEADLK` from one of the threads itself.
    pub fn join_all(&self, timeout: Option<Duration>) -> Result<()> {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        {
            let mut list = lock(&self.shared.list);
            let me = current_token();
            if let Some(own) = list.entries.iter().find(|entry| entry.token == me && !entry.done) {
                return Err(Error::new(libc::EDEADLK, format!("thread '{}' cannot wait for its own end", own.name)));
            }
            list.closed = true;
        }
        loop {
            let ready = |list: &List| list.is_empty() || list.entries.iter().any(Entry::can_join);
            let list = self.shared.wait(deadline, ready);
            if list.is_empty() {
                return Ok(());
            }
            let Some(at) = list.entries.iter().position(Entry::can_join) else {
                let names: Vec<&str> = list.entries.iter().map(|entry| entry.name.as_str()).collect();
                return Err(Error::new(libc::ETIMEDOUT, format!("these threads did not end: {}", names.join(", "))));
            };
            self.shared.reap(list, at);
        }
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        // Fails only when one of the threads owns the registry: then nobody is left to wait for it.
        let _ = self.join_all(None);
    }
}

impl<T> Handle<T> {
    /// The full name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Waits for the thread's end and takes its result. `ETIMEDOUT` may be tried again; a second join is `EINVAL`.
    pub fn join(&self, timeout: Option<Duration>) -> Result<T> {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let find = |list: &List| list.entries.iter().position(|entry| entry.id == self.id);
        let me = current_token();
        if lock(&self.shared.list).entries.iter().any(|entry| entry.id == self.id && entry.token == me) {
            return Err(Error::new(libc::EDEADLK, format!("thread '{}' cannot wait for its own end", self.name)));
        }
        let ended = |list: &List| find(list).is_none_or(|at| list.entries[at].can_join());
        let list = self.shared.wait(deadline, ended);
        match find(&list) {
            Some(at) if list.entries[at].can_join() => self.shared.reap(list, at),
            Some(_) => {
                return Err(Error::new(libc::ETIMEDOUT, format!("thread '{}' did not end in time", self.name)));
            }
            None => drop(list),
        }
        let result = lock(&self.outcome).take();
        result.unwrap_or_else(|| Err(Error::invalid(format!("thread '{}' was joined before", self.name))))
    }

    /// Whether its function has returned.
    pub fn is_done(&self) -> bool {
        !lock(&self.shared.list).entries.iter().any(|entry| entry.id == self.id && !entry.done)
    }
}

impl Entry {
    fn can_join(&self) -> bool {
        self.done && self.join.is_some()
    }
}

impl List {
    fn is_empty(&self) -> bool {
        self.entries.is_empty() && self.joining == 0
    }
}

impl Shared {
    /// Makes room for one more thread, after clearing away those that ended and nobody joined.
    fn admit(&self, name: &str) -> Result<u64> {
        if name.is_empty() || name.contains('\0') {
            return Err(Error::invalid("a thread's name is neither empty nor contains a NUL"));
        }
        let mut list = lock(&self.list);
        while let Some(at) = list.entries.iter().position(Entry::can_join) {
            self.reap(list, at);
            list = lock(&self.list);
        }
        if list.closed {
            return Err(Error::new(libc::ESHUTDOWN, format!("no thread '{name}': the guest is being freed")));
        }
        if list.entries.len() >= THREADS_MAX {
            let text = format!("no thread '{name}': the guest has {THREADS_MAX} threads already");
            return Err(Error::new(libc::EAGAIN, text));
        }
        list.next += 1;
        let id = list.next;
        list.entries.push(Entry { id, name: name.to_owned(), tid: 0, token: 0, done: false, join: None });
        Ok(id)
    }

    fn update(&self, id: u64, change: impl FnOnce(&mut Entry)) {
        if let Some(entry) = lock(&self.list).entries.iter_mut().find(|entry| entry.id == id) {
            change(entry);
        }
        self.changed.notify_all();
    }

    /// Waits until `ready` or the deadline; without a deadline, for as long as it takes.
    fn wait(&self, deadline: Option<Instant>, ready: impl Fn(&List) -> bool) -> MutexGuard<'_, List> {
        let mut list = lock(&self.list);
        while !ready(&list) {
            list = match deadline {
                None => self.changed.wait(list).unwrap_or_else(PoisonError::into_inner),
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        break;
                    }
                    self.changed.wait_timeout(list, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
        list
    }

    /// Joins an entry that can be joined: its function has returned, so this takes moments.
    fn reap(&self, mut list: MutexGuard<'_, List>, at: usize) {
        let entry = list.entries.remove(at);
        list.joining += 1;
        drop(list);
        // The body catches every panic, so there is nothing to learn from the result.
        let _ = entry.join.map(JoinHandle::join);
        // So that whoever counts threads afterwards counts none of ours.
        thread_sys::wait_gone(entry.tid, GONE_WAIT);
        lock(&self.list).joining -= 1;
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    const SOON: Option<Duration> = Some(Duration::from_millis(20));

    fn task(tid: i32, file: &str) -> std::io::Result<String> {
        std::fs::read_to_string(format!("/proc/self/task/{tid}/{file}"))
    }

    #[test]
    fn a_thread_is_named_listed_deaf_and_gone_after_join() {
        let threads = Threads::new();
        let (go, wait) = mpsc::channel::<()>();
        let name = "live_migration_of_guest_7";
        let handle =
            threads.spawn(name, move || wait.recv().map_err(|_| Error::invalid("early")).map(|()| 42)).unwrap();
        let list = threads.list();
        assert_eq!(list.len(), 1);
        let (full, tid) = list[0].clone();
        assert_eq!(full, name);
        assert_eq!(task(tid, "comm").unwrap().trim_end(), "live_migration_");
        let status = task(tid, "status").unwrap();
        assert!(status.contains("SigBlk:\tfffffffe7ffbfa27"), "{status}");
        assert_eq!(handle.join(SOON).unwrap_err().errno(), libc::ETIMEDOUT);
        assert!(!handle.is_done());
        go.send(()).unwrap();
        assert_eq!(handle.join(None), Ok(42));
        assert!(task(tid, "comm").is_err(), "the kernel still knows the thread");
        assert!(threads.list().is_empty() && handle.is_done());
        assert_eq!(handle.join(None).unwrap_err().errno(), libc::EINVAL);
    }

    #[test]
    fn a_panic_is_an_error_with_its_text() {
        let threads = Threads::new();
        let (tell, told) = mpsc::channel();
        let boom = || -> Result<()> { panic!("page {} is cursed", 7) };
        let handle = threads.spawn_with("return_path", boom, move |e| tell.send(e.clone()).unwrap()).unwrap();
        let error = handle.join(None).unwrap_err();
        assert_eq!(error.text(), "thread 'return_path' panicked: page 7 is cursed");
        assert_eq!(told.recv().unwrap(), error);
        let odd = threads.spawn("odd", || -> Result<()> { std::panic::panic_any(5u8) }).unwrap();
        assert_eq!(odd.join(None).unwrap_err().text(), "thread 'odd' panicked: (no text)");
    }

    #[test]
    fn a_payload_that_panics_when_dropped_is_survived() {
        struct Bomb;
        impl Drop for Bomb {
            fn drop(&mut self) {
                panic!("second");
            }
        }
        let error = fence("it", || -> Result<()> { std::panic::panic_any(Bomb) }).unwrap_err();
        assert_eq!(error.text(), "it panicked: (no text)");
    }

    #[test]
    fn join_all_names_the_stuck_and_closes_the_door() {
        let threads = Threads::new();
        let (go, wait) = mpsc::channel::<()>();
        drop(threads.spawn("quick", || Ok(())).unwrap());
        drop(threads.spawn("stuck", move || wait.recv().map_err(|_| Error::invalid("early"))).unwrap());
        let error = threads.join_all(SOON).unwrap_err();
        assert_eq!((error.errno(), error.text()), (libc::ETIMEDOUT, "these threads did not end: stuck"));
        assert_eq!(threads.spawn("late", || Ok(())).unwrap_err().errno(), libc::ESHUTDOWN);
        go.send(()).unwrap();
        threads.join_all(None).unwrap();
    }

    #[test]
    fn a_thread_cannot_wait_for_itself() {
        let threads = Arc::new(Threads::new());
        let (give, own) = mpsc::channel::<Handle<i32>>();
        let inner = Arc::clone(&threads);
        let (tell, told) = mpsc::channel();
        let handle = threads.spawn("selfish", move || {
            let all = inner.join_all(None).unwrap_err().errno();
            let mine = own.recv().unwrap();
            tell.send((all, mine.join(None).unwrap_err().errno())).unwrap();
            drop(inner);
            Ok(0)
        });
        give.send(handle.unwrap()).unwrap();
        assert_eq!(told.recv().unwrap(), (libc::EDEADLK, libc::EDEADLK));
        threads.join_all(None).unwrap();
    }

    #[test]
    fn forgotten_threads_are_cleared_away_and_many_joiners_are_fine() {
        let threads = Threads::new();
        for _ in 0..THREADS_MAX + 100 {
            drop(threads.spawn("brief", || Ok(())).unwrap());
        }
        let handles: Vec<_> = (0..8).map(|n| threads.spawn("worker", move || Ok(n)).unwrap()).collect();
        std::thread::scope(|scope| {
            scope.spawn(|| threads.join_all(None).unwrap());
            for (n, handle) in handles.iter().enumerate() {
                scope.spawn(move || assert_eq!(handle.join(None), Ok(n)));
            }
        });
        assert!(lock(&threads.shared.list).is_empty());
    }

    #[test]
    fn bad_names_are_refused() {
        let threads = Threads::new();
        for name in ["", "a\0b"] {
            assert_eq!(threads.spawn(name, || Ok(())).unwrap_err().errno(), libc::EINVAL);
        }
    }
}
