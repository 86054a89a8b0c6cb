//! Work on a vCPU that may still be inside `KVM_RUN`, with a deadline.
//!
//! Every ioctl on a vCPU fd waits, uninterruptibly, until the vCPU left `KVM_RUN`. So it is made on a thread of its
//! own: first one that changes nothing, then, if nobody gave up meanwhile, the work. The thread stays for the next job
//! until it is told to rest: starting one takes longer than reading a vCPU's state, and the guest waits.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::options::Opt;
use crate::thread::{Threads, fence, lock};

const PROBING: u8 = 0;
const WORKING: u8 = 1;
const GIVEN_UP: u8 = 2;

type Task = Box<dyn FnOnce() + Send>;

/// One vCPU `V`, on which at most one job works.
#[derive(Debug)]
pub(super) struct Bench<V> {
    index: usize,
    vcpu: Arc<Mutex<V>>,
    /// A job is not over; after a timeout it stays that way until the vCPU leaves `KVM_RUN`.
    busy: Arc<AtomicBool>,
    desk: Arc<Desk>,
}

/// Where the thread finds its next job.
#[derive(Default)]
struct Desk {
    state: Mutex<Waiting>,
    changed: Condvar,
}

#[derive(Default)]
struct Waiting {
    task: Option<Task>,
    has_thread: bool,
    rest: bool,
}

impl std::fmt::Debug for Desk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Desk(thread {})", lock(&self.state).has_thread)
    }
}

impl Desk {
    /// The body of the thread.
    fn work(&self) {
        loop {
            let mut state = lock(&self.state);
            while state.task.is_none() && !state.rest {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            let Some(task) = state.task.take() else {
                state.has_thread = false;
                return;
            };
            drop(state);
            task();
        }
    }
}

/// A job under way.
pub(super) struct Job<T> {
    index: usize,
    gate: Arc<AtomicU8>,
    outcome: Arc<Outcome<T>>,
}

impl<T> std::fmt::Debug for Job<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Job(vCPU {})", self.index)
    }
}

/// A job's result, once there is one.
struct Outcome<T> {
    result: Mutex<Option<Result<T>>>,
    there: Condvar,
}

impl<T> Outcome<T> {
    /// Waits for the result until `deadline`.
    fn wait(&self, deadline: Instant) -> Option<Result<T>> {
        let mut result = lock(&self.result);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if result.is_some() || left.is_zero() {
                return result.take();
            }
            result = self.there.wait_timeout(result, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl<V: Send + 'static> Bench<V> {
    pub(super) fn new(index: usize, vcpu: V) -> Self {
        Self { index, vcpu: Arc::new(Mutex::new(vcpu)), busy: Arc::default(), desk: Arc::default() }
    }

    /// Has a thread ready for the next job.
    pub(super) fn warm(&self, threads: &Threads) -> Result<()> {
        let mut state = lock(&self.desk.state);
        state.rest = false;
        if !state.has_thread {
            let desk = Arc::clone(&self.desk);
            state.has_thread = true;
            drop(state);
            let spawned = threads.spawn(&format!("kvm-vcpu-{}", self.index), move || {
                desk.work();
                Ok(())
            });
            if let Err(error) = spawned {
                lock(&self.desk.state).has_thread = false;
                return Err(error);
            }
        }
        Ok(())
    }

    /// Lets the thread go, when its job is done.
    pub(super) fn rest(&self) {
        lock(&self.desk.state).rest = true;
        self.desk.changed.notify_all();
    }

    /// Starts `probe`, then `work`, on the thread. Fails at once if the vCPU still holds up an earlier job.
    pub(super) fn start<T: Send + 'static>(
        &self,
        threads: &Threads,
        probe: impl FnOnce(&V) -> Result<()> + Send + 'static,
        work: impl FnOnce(&mut V) -> Result<T> + Send + 'static,
    ) -> Result<Job<T>> {
        if self.busy.swap(true, Ordering::AcqRel) {
            return Err(still_running(self.index, "it has been there since an earlier attempt"));
        }
        let gate = Arc::new(AtomicU8::new(PROBING));
        let outcome = Arc::new(Outcome { result: Mutex::new(None), there: Condvar::new() });
        let job = Job { index: self.index, gate: Arc::clone(&gate), outcome: Arc::clone(&outcome) };
        let (index, vcpu, busy) = (self.index, Arc::clone(&self.vcpu), Arc::clone(&self.busy));
        let task = move || {
            let result = fence(format_args!("work on vCPU {index}"), || {
                let mut vcpu = lock(&vcpu);
                let probed = probe(&vcpu);
                match gate.compare_exchange(PROBING, WORKING, Ordering::AcqRel, Ordering::Acquire) {
                    Ok(_) => probed.and_then(|()| work(&mut vcpu)),
                    Err(_) => Err(still_running(index, "given up")),
                }
            });
            // Free before anybody hears of it, and may bring the next job.
            busy.store(false, Ordering::Release);
            *lock(&outcome.result) = Some(result);
            outcome.there.notify_all();
        };
        if let Err(error) = self.warm(threads) {
            self.busy.store(false, Ordering::Release);
            return Err(error);
        }
        lock(&self.desk.state).task = Some(Box::new(task));
        self.desk.changed.notify_all();
        Ok(job)
    }
}

impl<V> Drop for Bench<V> {
    fn drop(&mut self) {
        lock(&self.desk.state).rest = true;
        self.desk.changed.notify_all();
    }
}

fn still_running(index: usize, detail: &str) -> Error {
    let text =
        format!("vCPU {index} is still inside KVM_RUN ({detail}): the stop hook must kick and park every vCPU");
    Error::new(libc::ETIMEDOUT, text).by_option(Opt::StopTimeout.name())
}

impl<T: Send + 'static> Job<T> {
    /// The job's result, or an error naming the vCPU that did not leave `KVM_RUN` before `deadline`. A job that is given up
    /// touches nothing when its vCPU comes out.
    pub(super) fn wait(self, deadline: Instant, timeout: Duration) -> Result<T> {
        if let Some(result) = self.outcome.wait(deadline) {
            return result;
        }
        if self.gate.compare_exchange(PROBING, GIVEN_UP, Ordering::AcqRel, Ordering::Acquire).is_ok() {
            return Err(still_running(self.index, &format!("waited {} ms", timeout.as_millis())));
        }
        // The vCPU was outside KVM_RUN and work began: it deserves its own time.
        let late = || Err(still_running(self.index, "it entered again while its state was read or written"));
        self.outcome.wait(Instant::now() + timeout).unwrap_or_else(late)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(10);
    const SHORT: Duration = Duration::from_millis(30);

    /// A vCPU that lets its first call through when told so.
    type Stuck = Arc<AtomicBool>;

    fn probe(free: &Stuck) -> Result<()> {
        while !free.load(Ordering::Acquire) {
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    #[test]
    fn a_job_given_up_touches_nothing_and_is_joined_later() {
        let threads = Threads::new();
        let (free, touched) = (Stuck::default(), Arc::new(AtomicBool::new(false)));
        let bench = Bench::new(3, Arc::clone(&free));
        let mark = Arc::clone(&touched);
        let work = move |_: &mut Stuck| {
            mark.store(true, Ordering::Release);
            Ok(())
        };
        let error = bench.start(&threads, probe, work).unwrap().wait(Instant::now() + SHORT, SHORT).unwrap_err();
        assert_eq!(error.errno(), libc::ETIMEDOUT);
        assert!(error.text().contains("vCPU 3"), "{error}");
        let again = bench.start(&threads, probe, |_| Ok(())).expect_err("the vCPU is still stuck");
        assert!(again.text().contains("earlier attempt"), "{again}");
        free.store(true, Ordering::Release);
        let end = Instant::now() + LONG;
        let value = loop {
            match bench.start(&threads, probe, |_| Ok(7)) {
                Ok(job) => break job.wait(Instant::now() + LONG, LONG).unwrap(),
                Err(error) => assert!(Instant::now() < end, "{error}"),
            }
        };
        assert!(value == 7 && !touched.load(Ordering::Acquire));
        drop(bench);
        threads.join_all(Some(LONG)).unwrap();
    }

    #[test]
    fn work_that_hangs_or_panics_is_reported_and_frees_the_vcpu() {
        let threads = Threads::new();
        let bench = Bench::new(0, Arc::new(AtomicBool::new(true)));
        let panics = |_: &mut Stuck| -> Result<()> { panic!("on purpose") };
        let error = bench.start(&threads, probe, panics).unwrap().wait(Instant::now() + LONG, LONG).unwrap_err();
        assert!(error.errno() == libc::EIO && error.text().contains("on purpose"), "{error}");
        let (go, wait) = std::sync::mpsc::channel::<()>();
        let slow = move |_: &mut Stuck| {
            let _ = wait.recv();
            Ok(())
        };
        // The first wait ends while the work is under way, or (on a slow machine) before it began: both are timeouts.
        let error = bench.start(&threads, probe, slow).unwrap().wait(Instant::now() + SHORT, SHORT).unwrap_err();
        assert_eq!(error.errno(), libc::ETIMEDOUT);
        drop(go);
        bench.rest();
        threads.join_all(Some(LONG)).unwrap();
    }
}
