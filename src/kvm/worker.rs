//! Work on a vCPU that may still be inside `KVM_RUN`, with a deadline.
//!
//! Every ioctl on a vCPU fd waits, uninterruptibly, until the vCPU left `KVM_RUN`. So it is made on a thread of its
//! own: first one that changes nothing, then, if nobody gave up meanwhile, the work.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};

const PROBING: u8 = 0;
const WORKING: u8 = 1;
const GIVEN_UP: u8 = 2;

/// One vCPU `V`, and the thread of an earlier job that was given up, if it still waits.
#[derive(Debug)]
pub(super) struct Bench<V> {
    index: usize,
    vcpu: Arc<Mutex<V>>,
    straggler: Mutex<Option<JoinHandle<()>>>,
}

/// A job under way.
pub(super) struct Job<'a, V, T> {
    bench: &'a Bench<V>,
    gate: Arc<AtomicU8>,
    done: Receiver<Result<T>>,
    thread: JoinHandle<()>,
}

impl<V: Send + 'static> Bench<V> {
    pub(super) fn new(index: usize, vcpu: V) -> Self {
        Self { index, vcpu: Arc::new(Mutex::new(vcpu)), straggler: Mutex::new(None) }
    }

    /// Starts `probe`, then `work`, on a thread. Fails at once if the vCPU still holds up an earlier job.
    pub(super) fn start<T: Send + 'static>(
        &self,
        probe: impl FnOnce(&V) -> Result<()> + Send + 'static,
        work: impl FnOnce(&mut V) -> Result<T> + Send + 'static,
    ) -> Result<Job<'_, V, T>> {
        self.collect()?;
        let gate = Arc::new(AtomicU8::new(PROBING));
        let (tell, done) = sync_channel(1);
        let (vcpu, at_gate) = (Arc::clone(&self.vcpu), Arc::clone(&gate));
        let thread = spawn(format!("kvm-vcpu-{}", self.index), move || {
            let mut vcpu = lock(&vcpu);
            let probed = probe(&vcpu);
            if at_gate.compare_exchange(PROBING, WORKING, Ordering::AcqRel, Ordering::Acquire).is_ok() {
                // The receiver may have given up on slow work; then nobody wants the result.
                let _ = tell.send(probed.and_then(|()| work(&mut vcpu)));
            }
        })?;
        Ok(Job { bench: self, gate, done, thread })
    }

    /// Joins the thread of a job that was given up, if it ended meanwhile.
    fn collect(&self) -> Result<()> {
        let mut straggler = lock(&self.straggler);
        match straggler.take() {
            Some(thread) if !thread.is_finished() => {
                *straggler = Some(thread);
                Err(self.still_running("it has been there since an earlier attempt"))
            }
            Some(thread) => {
                let _ = thread.join();
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn still_running(&self, detail: &str) -> Error {
        let index = self.index;
        Error::new(
            libc::ETIMEDOUT,
            format!("vCPU {index} is still inside KVM_RUN ({detail}): the stop hook must kick and park every vCPU"),
        )
    }
}

impl<V> Bench<V> {
    /// Waits for a thread that was given up until `deadline`; one that is still stuck then is left to end by itself,
    /// as soon as its vCPU leaves `KVM_RUN`.
    pub(super) fn wind_up(&self, deadline: Instant) {
        let Some(thread) = lock(&self.straggler).take() else { return };
        while !thread.is_finished() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        if thread.is_finished() {
            let _ = thread.join();
        }
    }
}

impl<V: Send + 'static, T: Send + 'static> Job<'_, V, T> {
    /// The job's result, or an error naming the vCPU that did not leave `KVM_RUN` before `deadline`.
    pub(super) fn wait(self, deadline: Instant, timeout: Duration) -> Result<T> {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut got = self.done.recv_timeout(left);
        let mut detail = format!("waited {} ms", timeout.as_millis());
        if matches!(got, Err(RecvTimeoutError::Timeout)) {
            let gave_up = self.gate.compare_exchange(PROBING, GIVEN_UP, Ordering::AcqRel, Ordering::Acquire);
            if gave_up.is_err() {
                // The vCPU was outside KVM_RUN and work began: it deserves its own time.
                got = self.done.recv_timeout(timeout);
                detail = "it entered KVM_RUN again while its state was read or written".to_owned();
            }
        }
        match got {
            Ok(result) => {
                let _ = self.thread.join();
                result
            }
            Err(RecvTimeoutError::Timeout) => {
                *lock(&self.bench.straggler) = Some(self.thread);
                Err(self.bench.still_running(&detail))
            }
            Err(RecvTimeoutError::Disconnected) => {
                let _ = self.thread.join();
                Err(Error::new(libc::EIO, format!("the thread working on vCPU {} panicked", self.bench.index)))
            }
        }
    }
}

/// The one place where this module makes threads.
fn spawn(name: String, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    let what = format!("starting thread {name}");
    std::thread::Builder::new().name(name).spawn(body).map_err(|e| Error::from_io(what, &e))
}

/// A panic while the lock was held has been reported; the data behind it is replaced as a whole, never half.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;

    const LONG: Duration = Duration::from_secs(10);

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
        let (free, touched) = (Stuck::default(), Arc::new(AtomicBool::new(false)));
        let bench = Bench::new(3, Arc::clone(&free));
        let timeout = Duration::from_millis(30);
        let mark = Arc::clone(&touched);
        let job = bench.start(|v| probe(v), move |_| Ok(mark.store(true, Ordering::Release))).unwrap();
        let error = job.wait(Instant::now() + timeout, timeout).unwrap_err();
        assert_eq!(error.errno(), libc::ETIMEDOUT);
        assert!(error.text().contains("vCPU 3"), "{error}");
        let again = bench.start(|v| probe(v), |_| Ok(())).err().expect("the vCPU is still stuck");
        assert!(again.text().contains("earlier attempt"), "{again}");
        free.store(true, Ordering::Release);
        bench.wind_up(Instant::now() + LONG);
        assert!(!touched.load(Ordering::Acquire));
        let job = bench.start(|v| probe(v), |_| Ok(7)).unwrap();
        assert_eq!(job.wait(Instant::now() + LONG, timeout), Ok(7));
    }

    #[test]
    fn work_that_hangs_or_panics_is_reported() {
        let free = Arc::new(AtomicBool::new(true));
        let bench = Bench::new(0, free);
        let timeout = Duration::from_millis(20);
        let slow = |_: &mut Stuck| -> Result<()> {
            std::thread::sleep(Duration::from_millis(200));
            Ok(())
        };
        let error = bench.start(|v| probe(v), slow).unwrap().wait(Instant::now() + timeout, timeout).unwrap_err();
        assert!(error.text().contains("again"), "{error}");
        bench.wind_up(Instant::now() + LONG);
        let panics = |_: &mut Stuck| -> Result<()> { panic!("on purpose") };
        let error = bench.start(|v| probe(v), panics).unwrap().wait(Instant::now() + LONG, timeout).unwrap_err();
        assert_eq!(error.errno(), libc::EIO);
    }
}
