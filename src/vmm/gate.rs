//! The vCPU gate: stops, starts and slows down the vCPU threads of a VMM that has no pause logic of its own.
//!
//! A vCPU thread goes in before it runs the guest and comes out when it has handled what the run came back with. `core` is
//! who waits for whom; here is how those inside are told to come out.
#![allow(unsafe_code, reason = "the byte that makes a run come back is the VMM's memory")]

mod core;
mod sync {
    pub(super) use crate::sys::futex::{Word, breathe};
}

use std::ffi::c_int;
use std::sync::atomic::{AtomicI32, AtomicPtr, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use self::core::{Core, Entered};
use crate::error::{Error, Result};
use crate::sys::clock::monotonic_ns;
use crate::sys::signal::{EmptyHandler, has_handler, kill_thread};
use crate::sys::thread_sys;
use crate::thread::{Handle, Threads, lock};

/// The most vCPUs of one gate: more than any kernel runs.
pub const VCPUS_MAX: usize = 4096;
/// The highest percentage: above it a guest would not live.
pub const PERCENT_MAX: u32 = 99;
/// A vCPU that was told to come out and did not is told again: it may have been about to go to sleep in a system call.
const TELL_AGAIN: Duration = Duration::from_millis(1);
/// How long a throttled vCPU runs before each nap.
const SLICE: Duration = Duration::from_millis(10);

/// What a vCPU's run is interrupted by.
#[derive(Clone, Copy, Debug)]
pub struct Kick {
    /// Signal to its thread; 0: none.
    pub signal: c_int,
    /// The library installs a handler for it that does nothing.
    pub install: bool,
}

/// One vCPU's place.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Seat {
    /// Thread that was inside last.
    tid: AtomicI32,
    /// Set to 1 to have the run come back: `kvm_run.immediate_exit`, or what an interpreter looks at.
    flag: AtomicPtr<u8>,
    /// Throttled: it may not run before this.
    nap_until_ns: AtomicU64,
}

/// The gate of one guest. Closed at first.
#[derive(Debug)]
pub struct Gate {
    core: Core,
    seats: Box<[Seat]>,
    signal: c_int,
    timeout: Duration,
    /// One closes or opens at a time.
    closing: Mutex<()>,
    throttle: Mutex<Option<Throttle>>,
    // Dropped last: until then signals may come.
    _handler: Option<EmptyHandler>,
}

#[derive(Debug)]
struct Throttle {
    percent: Arc<(Mutex<u32>, Condvar)>,
    thread: Handle<()>,
    _threads: Threads,
}

impl Gate {
    /// A closed gate for so many vCPUs. `timeout`: how long they may take to come out.
    pub fn new(vcpus: usize, kick: Kick, timeout: Duration) -> Result<Arc<Self>> {
        if vcpus == 0 || vcpus > VCPUS_MAX {
            return Err(Error::invalid(format!("a gate has 1 to {VCPUS_MAX} vCPUs, not {vcpus}")));
        }
        let signal = kick.signal;
        let handler = match (signal, kick.install) {
            (0, true) => return Err(Error::invalid("VMIG_GATE_INSTALL needs a signal")),
            (0, false) => None,
            (_, install) => match (has_handler(signal)?, install) {
                (false, false) => {
                    let text = format!(
                        "signal {signal} has no handler, so it would end the process or do nothing: install \
                                        one, without SA_RESTART, or set VMIG_GATE_INSTALL"
                    );
                    return Err(Error::invalid(text));
                }
                (true, true) => {
                    let text =
                        format!("signal {signal} has a handler already, which VMIG_GATE_INSTALL would replace");
                    return Err(Error::new(libc::EBUSY, text));
                }
                (false, true) => Some(EmptyHandler::install(signal)?),
                (true, false) => None,
            },
        };
        let mut seats = Vec::new();
        seats.try_reserve_exact(vcpus).map_err(|_| Error::no_memory("a gate", vcpus as u64 * 256))?;
        seats.resize_with(vcpus, Seat::default);
        Ok(Arc::new(Self {
            core: Core::new(vcpus),
            seats: seats.into_boxed_slice(),
            signal,
            timeout,
            closing: Mutex::new(()),
            throttle: Mutex::default(),
            _handler: handler,
        }))
    }

    fn seat(&self, vcpu: usize) -> Result<&Seat> {
        self.seats.get(vcpu).ok_or_else(|| {
            Error::invalid(format!("there is no vCPU {vcpu} at this gate, which has {}", self.core.vcpus()))
        })
    }

    /// Waits until the vCPU may run, and goes in. `ECANCELED` once the gate has ended; `EBUSY`: it is inside.
    ///
    /// # Safety
    /// `flag` is null, or can be written until the gate is gone or was entered with another one.
    pub unsafe fn enter(&self, vcpu: usize, flag: *mut u8) -> Result<()> {
        let seat = self.seat(vcpu)?;
        if self.core.is_inside(vcpu) {
            return Err(self.twice(vcpu));
        }
        let sit = || {
            seat.tid.store(own_tid(), Ordering::Relaxed);
            seat.flag.store(flag, Ordering::Relaxed);
            self.set_flag(seat, 0);
        };
        loop {
            let epoch = self.core.epoch();
            let nap = nap_left(seat);
            if nap > 0 && !self.core.has_ended() {
                self.core.await_change(epoch, Instant::now().checked_add(Duration::from_nanos(nap)));
                continue;
            }
            match self.core.enter(vcpu, sit) {
                // Who sent it to nap before it was inside did not tell it.
                Entered::Inside if nap_left(seat) > 0 => drop(self.core.exit(vcpu)),
                Entered::Inside => return Ok(()),
                Entered::Closed(epoch) => self.core.await_change(epoch, None),
                Entered::Ended => {
                    return Err(Error::new(libc::ECANCELED, "the gate has ended: the vCPU's thread is to return"));
                }
                Entered::Twice => return Err(self.twice(vcpu)),
            }
        }
    }

    fn twice(&self, vcpu: usize) -> Error {
        let who = match self.core.is_inside(vcpu) {
            true => format!("thread {}", self.seats[vcpu].tid.load(Ordering::Relaxed)),
            false => "another thread is just going in".to_owned(),
        };
        let text = format!(
            "vCPU {vcpu} is inside the gate already ({who}): call vmig_gate_exit() before it enters \
                            again, and give each vCPU a number of its own"
        );
        Error::new(libc::EBUSY, text)
    }

    /// Comes out. `EINVAL`: it was not inside.
    pub fn exit(&self, vcpu: usize) -> Result<()> {
        self.seat(vcpu)?;
        match self.core.exit(vcpu) {
            true => Ok(()),
            false => {
                Err(Error::invalid(format!("vCPU {vcpu} is not inside the gate: vmig_gate_enter() comes first")))
            }
        }
    }

    fn set_flag(&self, seat: &Seat, value: u8) {
        let flag = seat.flag.load(Ordering::Relaxed);
        if !flag.is_null() {
            // SAFETY: `enter` was promised that the byte can be written; others look at it meanwhile, so it is atomic.
            unsafe { AtomicU8::from_ptr(flag) }.store(value, Ordering::SeqCst);
        }
    }

    /// Has a vCPU come out.
    fn kick(&self, vcpu: usize) -> Result<()> {
        let seat = &self.seats[vcpu];
        self.set_flag(seat, 1);
        if self.signal == 0 {
            return Ok(());
        }
        let tid = seat.tid.load(Ordering::Relaxed);
        kill_thread(tid, self.signal).map_err(|error| match error.errno() {
            libc::ESRCH => {
                let text =
                    format!("vCPU {vcpu}'s thread ({tid}) ended inside the gate: it did not call vmig_gate_exit()");
                Error::new(libc::ESRCH, text)
            }
            _ => error,
        })
    }

    /// Stops the guest: returns when every vCPU is outside, and none goes in. On failure the gate is open, as before.
    pub fn close(&self) -> Result<()> {
        let _one = lock(&self.closing);
        if self.core.is_closed() {
            return Ok(());
        }
        let me = own_tid();
        let own = |vcpu: &usize| self.core.is_inside(*vcpu) && self.seats[*vcpu].tid.load(Ordering::Relaxed) == me;
        if let Some(vcpu) = (0..self.core.vcpus()).find(own) {
            let text = format!(
                "vCPU {vcpu}'s own thread cannot stop the guest from inside the gate: it would wait for itself"
            );
            return Err(Error::new(libc::EDEADLK, text));
        }
        self.core.close();
        self.empty().inspect_err(|_| self.core.open())
    }

    /// Waits until those who are awaited have come out, and tells them to.
    fn empty(&self) -> Result<()> {
        let deadline = Instant::now() + self.timeout;
        loop {
            for vcpu in 0..self.core.vcpus() {
                if self.core.is_awaited(vcpu)
                    && let Err(error) = self.kick(vcpu)
                    && self.core.is_awaited(vcpu)
                {
                    return Err(error);
                }
            }
            if self.core.await_empty(Some(deadline.min(Instant::now() + TELL_AGAIN))) {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(self.late());
            }
        }
    }

    fn late(&self) -> Error {
        let inside: Vec<usize> = (0..self.core.vcpus()).filter(|vcpu| self.core.is_awaited(*vcpu)).collect();
        let first = inside.first().copied().unwrap_or(0);
        let tid = self.seats[first].tid.load(Ordering::Relaxed);
        let text = format!(
            "{} of {} vCPUs did not leave the gate within {} seconds, the first of them vCPU {first} (thread {tid})",
            inside.len(),
            self.core.vcpus(),
            self.timeout.as_secs_f32()
        );
        Error::new(libc::ETIMEDOUT, text)
    }

    /// Lets the vCPUs run.
    pub fn open(&self) {
        let _one = lock(&self.closing);
        if self.core.is_closed() {
            self.core.open();
        }
    }

    /// Whether vCPUs may not run.
    pub fn is_closed(&self) -> bool {
        self.core.is_closed()
    }

    /// From here on nobody goes in any more; who waits or is inside is told to come out, once: whoever ends
    /// a gate may hold what a vCPU waits for, so only a close, before or after, waits and tells again.
    pub fn end(&self) {
        self.core.end();
        for vcpu in (0..self.core.vcpus()).filter(|vcpu| self.core.is_inside(*vcpu)) {
            // A thread that is gone need not be told.
            let _ = self.kick(vcpu);
        }
    }

    /// Has each vCPU stand still for so many percent of the time; 0: no longer.
    pub fn throttle(self: &Arc<Self>, percent: u32) -> Result<()> {
        if percent > PERCENT_MAX {
            return Err(Error::invalid(format!("vCPUs are throttled by 0 to {PERCENT_MAX} percent, not {percent}")));
        }
        let mut throttle = lock(&self.throttle);
        if let Some(running) = &*throttle {
            *lock(&running.percent.0) = percent;
            running.percent.1.notify_all();
            if percent == 0 {
                let _ = running.thread.join(None);
                *throttle = None;
                self.seats.iter().for_each(|seat| seat.nap_until_ns.store(0, Ordering::Relaxed));
                self.core.shake();
            }
            return Ok(());
        }
        if percent > 0 {
            let (threads, shared) = (Threads::new(), Arc::new((Mutex::new(percent), Condvar::new())));
            let (gate, seen) = (Arc::downgrade(self), Arc::clone(&shared));
            let thread = threads.spawn("vcpu_throttle", move || {
                while let Some(nap) = next_nap(&seen)
                    && let Some(gate) = gate.upgrade()
                {
                    gate.send_to_nap(nap);
                    drop(gate);
                    pause(&seen, nap);
                }
                Ok(())
            })?;
            *throttle = Some(Throttle { percent: shared, thread, _threads: threads });
        }
        Ok(())
    }

    fn send_to_nap(&self, nap: Duration) {
        let until = monotonic_ns().saturating_add(u64::try_from(nap.as_nanos()).unwrap_or(u64::MAX));
        for (vcpu, seat) in self.seats.iter().enumerate() {
            // In this order: one that is not inside yet looks when it is.
            seat.nap_until_ns.store(until, Ordering::SeqCst);
            if self.core.is_inside(vcpu) {
                // One that is gone is found when the guest is stopped.
                let _ = self.kick(vcpu);
            }
        }
    }
}

/// Nanoseconds of its nap that are left. Without one nobody asks for the time in vain.
fn nap_left(seat: &Seat) -> u64 {
    match seat.nap_until_ns.load(Ordering::SeqCst) {
        0 => 0,
        until => until.saturating_sub(monotonic_ns()),
    }
}

/// The kernel's number of this thread, asked for once: vCPUs enter often.
fn own_tid() -> c_int {
    thread_local! {
        static TID: c_int = thread_sys::tid();
    }
    TID.with(|tid| *tid)
}

/// Lets the vCPUs run for a slice; then how long they stand still. None: no throttling any more.
fn next_nap(percent: &(Mutex<u32>, Condvar)) -> Option<Duration> {
    pause(percent, SLICE);
    let percent = *lock(&percent.0);
    (percent > 0).then(|| SLICE * percent / (100 - percent).max(1))
}

/// Waits, but not when there is no throttling any more.
fn pause(percent: &(Mutex<u32>, Condvar), time: Duration) {
    let on = |percent: &mut u32| *percent > 0;
    drop(percent.1.wait_timeout_while(lock(&percent.0), time, on).unwrap_or_else(PoisonError::into_inner));
}

impl Drop for Gate {
    fn drop(&mut self) {
        if let Some(running) = lock(&self.throttle).take() {
            *lock(&running.percent.0) = 0;
            running.percent.1.notify_all();
        }
    }
}

#[cfg(test)]
mod model_tests;
#[cfg(test)]
mod tests;
