//! When and how fast, as pure functions of numbers: bandwidth estimate, rate limit, threshold, convergence.
//!
//! Time is passed in. The model is QEMU's: windows of 100 ms, and a threshold of bandwidth x downtime limit.

use std::time::Duration;

/// Length of the window in which bandwidth is measured and limited.
pub const WINDOW: Duration = Duration::from_millis(100);

/// Bytes allowed in the current window, and how fast the last ones went.
#[derive(Debug)]
pub struct Rate {
    window_start: Duration,
    /// Given away in this window: what the limit counts.
    spent: u64,
    /// Written in this window: what the bandwidth is made of.
    moved: u64,
    /// Bytes per second over the last whole window; before that, since the start.
    measured: u64,
}

impl Rate {
    /// Starts the first window at `now`.
    pub fn new(now: Duration) -> Self {
        Self { window_start: now, spent: 0, moved: 0, measured: 0 }
    }

    /// Takes `bytes` out of the window's budget.
    pub fn spend(&mut self, bytes: u64) {
        self.spent = self.spent.saturating_add(bytes);
    }

    /// Accounts `bytes` that just left, and closes the window if it is over.
    pub fn moved(&mut self, now: Duration, bytes: u64) {
        self.moved = self.moved.saturating_add(bytes);
        self.roll(now);
    }

    /// Closes the window if it is over; true if it did.
    pub fn roll(&mut self, now: Duration) -> bool {
        let age = now.saturating_sub(self.window_start);
        if age < WINDOW {
            return false;
        }
        self.measured = per_second(self.moved, age);
        self.window_start = now;
        (self.spent, self.moved) = (0, 0);
        true
    }

    /// Bytes that may still go out in this window under `limit` bytes per second (0 = no limit).
    pub fn budget(&self, limit: u64) -> u64 {
        match limit {
            0 => u64::MAX,
            _ => (limit / 10).max(1).saturating_sub(self.spent),
        }
    }

    /// Time until the window ends.
    pub fn left(&self, now: Duration) -> Duration {
        (self.window_start + WINDOW).saturating_sub(now)
    }

    /// Bytes per second: the last whole window's, or the current one's while there is none.
    pub fn bandwidth(&self, now: Duration) -> u64 {
        match self.measured {
            0 => per_second(self.moved, now.saturating_sub(self.window_start)),
            measured => measured,
        }
    }
}

/// `bytes` over `time` as bytes per second; 0 while no time passed.
pub fn per_second(bytes: u64, time: Duration) -> u64 {
    match time.as_nanos() {
        0 => 0,
        nanos => u64::try_from(u128::from(bytes) * 1_000_000_000 / nanos).unwrap_or(u64::MAX),
    }
}

/// Bytes that fit into `limit` at `bandwidth` bytes per second.
pub fn threshold(bandwidth: u64, limit: Duration) -> u64 {
    u64::try_from(u128::from(bandwidth) * limit.as_nanos() / 1_000_000_000).unwrap_or(u64::MAX)
}

/// Time for `bytes` at `bandwidth`; `None` while the bandwidth is unknown.
pub fn time_for(bytes: u64, bandwidth: u64) -> Option<Duration> {
    if bytes == 0 {
        return Some(Duration::ZERO);
    }
    let nanos = (u128::from(bytes) * 1_000_000_000).checked_div(u128::from(bandwidth))?;
    Some(Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX)))
}

/// When the guest is stopped: not at the first moment allowed, but at the bottom.
///
/// Asked once per round with the exact amount that is left. From the first moment that fits the threshold it goes on
/// while each round shrinks what is left by a tenth, at most `rounds` rounds and `time` long.
#[derive(Debug)]
pub struct Convergence {
    rounds: u64,
    time: Duration,
    allowed_since: Option<(Duration, u64)>,
    lowest: u64,
}

impl Convergence {
    /// A policy with its limits.
    pub fn new(rounds: u64, time: Duration) -> Self {
        Self { rounds, time, allowed_since: None, lowest: u64::MAX }
    }

    /// A round ended with `pending` bytes left: switch over now?
    pub fn decide(&mut self, now: Duration, pending: u64, threshold: u64) -> bool {
        let shrank = pending < self.lowest.saturating_sub(self.lowest / 10);
        self.lowest = self.lowest.min(pending);
        if pending > threshold {
            return false;
        }
        let (since, rounds) = self.allowed_since.get_or_insert((now, 0));
        let first = *rounds == 0;
        *rounds += 1;
        let late = *rounds > self.rounds || now.saturating_sub(*since) >= self.time;
        pending == 0 || late || !(shrank || first)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_window_limits_and_measures() {
        let mut rate = Rate::new(Duration::ZERO);
        assert_eq!(rate.budget(0), u64::MAX);
        assert_eq!(rate.budget(1000), 100);
        rate.spend(60);
        rate.moved(10 * MS, 60);
        assert_eq!((rate.budget(1000), rate.left(10 * MS)), (40, 90 * MS));
        assert_eq!(rate.bandwidth(10 * MS), 6000);
        rate.spend(60);
        rate.moved(20 * MS, 60);
        assert_eq!(rate.budget(1000), 0);
        assert_eq!(rate.budget(10_000), 880, "a raised limit counts at once");
        assert!(rate.roll(100 * MS));
        assert_eq!((rate.budget(1000), rate.bandwidth(101 * MS)), (100, 1200));
    }

    #[test]
    fn threshold_is_bandwidth_times_limit() {
        assert_eq!(threshold(1_000_000_000, 300 * MS), 300_000_000);
        assert_eq!(threshold(u64::MAX, Duration::from_secs(2000)), u64::MAX);
        assert_eq!(time_for(300_000_000, 1_000_000_000), Some(300 * MS));
        assert_eq!((time_for(1, 0), time_for(0, 0)), (None, Some(Duration::ZERO)));
    }

    /// Feeds rounds of `pending` one millisecond apart; the index of the round that switches over.
    fn switch(policy: &mut Convergence, pending: impl IntoIterator<Item = u64>, threshold: u64) -> Option<usize> {
        let mut now = Duration::ZERO;
        pending.into_iter().position(|left| {
            now += MS;
            policy.decide(now, left, threshold)
        })
    }

    #[test]
    fn the_guest_is_stopped_at_the_bottom() {
        let policy = || Convergence::new(8, Duration::from_secs(2));
        assert_eq!(switch(&mut policy(), [500, 90, 40, 10, 10, 10], 100), Some(4), "shrinking, then flat");
        assert_eq!(switch(&mut policy(), [0], 0), Some(0), "nothing left");
        assert_eq!(switch(&mut policy(), [80, 80, 80], 100), Some(1), "constant: one look is enough");
        assert_eq!(switch(&mut policy(), [80, 95, 99], 100), Some(1), "growing");
        assert_eq!(switch(&mut policy(), [500, 500, 500], 100), None, "never fits");
        assert_eq!(switch(&mut policy(), [80, 300, 40, 41], 100), Some(3), "a burst between, then the bottom");
    }

    #[test]
    fn patience_ends() {
        let halving = (0..40).map(|n| 1u64 << (39 - n));
        assert_eq!(switch(&mut Convergence::new(3, Duration::from_secs(2)), halving.clone(), u64::MAX), Some(3));
        assert_eq!(switch(&mut Convergence::new(100, 5 * MS), halving.clone(), u64::MAX), Some(5));
        assert_eq!(switch(&mut Convergence::new(0, 5 * MS), halving, u64::MAX), Some(0), "as QEMU does");
    }
}
