//! Work on a vCPU that may still be inside `KVM_RUN`, with a deadline.
//!
//! Every ioctl on a vCPU fd waits, uninterruptibly, until the vCPU left `KVM_RUN`. So it is made on a thread of its
//! own: first one that changes nothing, then, if nobody gave up meanwhile, the work.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::thread::{Handle, Threads, lock};

const PROBING: u8 = 0;
const WORKING: u8 = 1;
const GIVEN_UP: u8 = 2;

/// One vCPU `V`, on which at most one job works.
#[derive(Debug)]
pub(super) struct Bench<V> {
    index: usize,
    vcpu: Arc<Mutex<V>>,
    /// A job's thread lives; after a timeout it stays that way until the vCPU leaves `KVM_RUN`.
    busy: Arc<AtomicBool>,
}

/// A job under way.
pub(super) struct Job<T> {
    index: usize,
    gate: Arc<AtomicU8>,
    thread: Handle<T>,
}

/// Frees the bench when the job's thread ends, also by a panic.
struct Release(Arc<AtomicBool>);

impl Drop for Release {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

impl<V: Send + 'static> Bench<V> {
    pub(super) fn new(index: usize, vcpu: V) -> Self {
        Self { index, vcpu: Arc::new(Mutex::new(vcpu)), busy: Arc::default() }
    }

    /// Starts `probe`, then `work`, on a thread. Fails at once if the vCPU still holds up an earlier job.
    pub(super) fn start<T: Send + 'static>(
        &self,
        threads: &Threads,
        probe: impl FnOnce(&V) -> Result<()> + Send + 'static,
        work: impl FnOnce(&mut V) -> Result<T> + Send + 'static,
    ) -> Result<Job<T>> {
        if self.busy.swap(true, Ordering::AcqRel) {
            return Err(still_running(self.index, "it has been there since an earlier attempt"));
        }
        let release = Release(Arc::clone(&self.busy));
        let gate = Arc::new(AtomicU8::new(PROBING));
        let (index, vcpu, at_gate) = (self.index, Arc::clone(&self.vcpu), Arc::clone(&gate));
        let thread = threads.spawn(&format!("kvm-vcpu-{index}"), move || {
            let _release = release;
            let mut vcpu = lock(&vcpu);
            let probed = probe(&vcpu);
            match at_gate.compare_exchange(PROBING, WORKING, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => probed.and_then(|()| work(&mut vcpu)),
                Err(_) => Err(still_running(index, "given up")),
            }
        })?;
        Ok(Job { index, gate, thread })
    }
}

fn still_running(index: usize, detail: &str) -> Error {
    Error::new(
        libc::ETIMEDOUT,
        format!("vCPU {index} is still inside KVM_RUN ({detail}): the stop hook must kick and park every vCPU"),
    )
}

impl<T: Send + 'static> Job<T> {
    /// The job's result, or an error naming the vCPU that did not leave `KVM_RUN` before `deadline`. A thread that is
    /// given up touches nothing when its vCPU comes out, and is joined by its registry.
    pub(super) fn wait(self, deadline: Instant, timeout: Duration) -> Result<T> {
        let left = deadline.saturating_duration_since(Instant::now());
        // The work itself makes no call that ends in ETIMEDOUT.
        let late = |result: &Result<T>| matches!(result, Err(error) if error.errno() == libc::ETIMEDOUT);
        let result = self.thread.join(Some(left));
        if !late(&result) {
            return result;
        }
        if self.gate.compare_exchange(PROBING, GIVEN_UP, Ordering::AcqRel, Ordering::Acquire).is_ok() {
            return Err(still_running(self.index, &format!("waited {} ms", timeout.as_millis())));
        }
        // The vCPU was outside KVM_RUN and work began: it deserves its own time.
        let result = self.thread.join(Some(timeout));
        if late(&result) {
            return Err(still_running(self.index, "it entered again while its state was read or written"));
        }
        result
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
        let again = bench.start(&threads, probe, |_| Ok(())).err().expect("the vCPU is still stuck");
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
        threads.join_all(Some(LONG)).unwrap();
    }
}
