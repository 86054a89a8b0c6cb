//! futex(2): sleeping on a number.
#![allow(unsafe_code, reason = "system calls live here")]

use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// A number that threads of this process can wait for.
#[derive(Debug, Default)]
pub struct Word(AtomicU32);

impl Word {
    /// A number.
    pub const fn new(value: u32) -> Self {
        Self(AtomicU32::new(value))
    }

    /// Its value.
    pub fn load(&self) -> u32 {
        self.0.load(Ordering::SeqCst)
    }

    /// Sets it, and returns what it was.
    pub fn swap(&self, value: u32) -> u32 {
        self.0.swap(value, Ordering::SeqCst)
    }

    /// Adds, wrapping, and returns what it was.
    pub fn add(&self, value: u32) -> u32 {
        self.0.fetch_add(value, Ordering::SeqCst)
    }

    /// Subtracts, wrapping, and returns what it was.
    pub fn sub(&self, value: u32) -> u32 {
        self.0.fetch_sub(value, Ordering::SeqCst)
    }

    /// Sets it to `to` if it is `from`; whether it was.
    pub fn turn(&self, from: u32, to: u32) -> bool {
        self.0.compare_exchange(from, to, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }

    /// Sleeps while the number is `value`, until it is woken or the deadline; may return early.
    pub fn wait(&self, value: u32, deadline: Option<Instant>) {
        let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
        if left == Some(Duration::ZERO) {
            return;
        }
        let time = left.map(|left| libc::timespec {
            tv_sec: libc::time_t::try_from(left.as_secs()).unwrap_or(libc::time_t::MAX),
            tv_nsec: i64::from(left.subsec_nanos()),
        });
        let time = time.as_ref().map_or(ptr::null(), ptr::from_ref);
        // SAFETY: the number and the time are live for the call. Whatever it returns, the caller looks again.
        unsafe {
            libc::syscall(libc::SYS_futex, self.0.as_ptr(), libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG, value, time)
        };
    }

    /// Wakes everybody who sleeps.
    pub fn wake_all(&self) {
        // SAFETY: the number is live for the call, and the kernel takes no other pointer for a wake.
        unsafe {
            libc::syscall(libc::SYS_futex, self.0.as_ptr(), libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG, i32::MAX)
        };
    }
}

/// Lets others go on for a moment.
pub fn breathe() {
    std::thread::yield_now();
}
