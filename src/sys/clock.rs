//! Clocks as plain nanoseconds.
#![allow(unsafe_code, reason = "std's Instant hides the value that C callbacks are told")]

use std::time::{SystemTime, UNIX_EPOCH};

/// `CLOCK_MONOTONIC` in nanoseconds.
pub fn monotonic_ns() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is a live timespec, all the call writes to; the clock exists on every Linux, so it cannot fail.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    let (sec, nsec) = (u64::try_from(now.tv_sec).unwrap_or(0), u64::try_from(now.tv_nsec).unwrap_or(0));
    sec * 1_000_000_000 + nsec
}

/// Wall clock in nanoseconds since 1970; 0 on a machine whose clock stands before that.
pub fn wall_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |age| u64::try_from(age.as_nanos()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn monotonic_time_advances_with_real_time() {
        let before = monotonic_ns();
        std::thread::sleep(std::time::Duration::from_millis(5));
        assert!(monotonic_ns() - before >= 5_000_000);
    }
}
