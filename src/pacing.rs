//! When and how fast, as pure functions of numbers: bandwidth estimate, rate limit, threshold, convergence.
//!
//! Time is passed in. The model is QEMU's: windows of 100 ms, and a threshold of bandwidth x downtime limit.

pub mod dirty_limit;
pub mod dirtying;
pub mod downtime;
pub mod forecast;
pub mod ladder;
pub mod throttle;
#[cfg(test)]
mod forecast_tests;
#[cfg(test)]
mod history_tests;

use std::time::Duration;

/// Length of the window in which bandwidth is measured and limited.
pub const WINDOW: Duration = Duration::from_millis(100);

/// How fast the last bytes went.
#[derive(Debug)]
pub struct Rate {
    window_start: Duration,
    /// Written in this window.
    moved: u64,
    /// Bytes per second over the last whole window; before that, since the start.
    measured: u64,
    round_start: Duration,
    /// Written in this round.
    round: u64,
    /// Bytes per second over the last whole round. A window in which there was little to write, or the VMM was waited for,
    /// says too little of the link.
    of_round: u64,
}

impl Rate {
    /// Starts the first window at `now`.
    pub fn new(now: Duration) -> Self {
        Self { window_start: now, moved: 0, measured: 0, round_start: now, round: 0, of_round: 0 }
    }

    /// Accounts `bytes` that just left, and closes the window if it is over.
    pub fn moved(&mut self, now: Duration, bytes: u64) {
        self.moved = self.moved.saturating_add(bytes);
        self.round = self.round.saturating_add(bytes);
        let age = now.saturating_sub(self.window_start);
        if age >= WINDOW {
            self.measured = per_second(self.moved, age);
            self.window_start = now;
            self.moved = 0;
        }
    }

    /// A round ended, all of which left.
    pub fn round_over(&mut self, now: Duration) {
        self.of_round = per_second(self.round, now.saturating_sub(self.round_start));
        (self.round_start, self.round) = (now, 0);
    }

    /// Bytes per second: the last whole window's, or the current one's while there is none; the last whole round's if that
    /// is more.
    pub fn bandwidth(&self, now: Duration) -> u64 {
        self.of_window(now).max(self.of_round)
    }

    /// The same of the window alone: how fast it goes now.
    pub fn of_window(&self, now: Duration) -> u64 {
        match self.measured {
            0 => per_second(self.moved, now.saturating_sub(self.window_start)),
            measured => measured,
        }
    }
}

/// The bandwidth limit: a bucket that fills at the limit and is emptied by what is written.
///
/// A write may go when the bucket is not in debt, so that what was written never exceeds what the limit allows by more
/// than one write; that holds across changes of the limit, because time passed counts at the smaller of the two.
#[derive(Debug, Default)]
pub struct Bucket {
    /// To the good, or owed: billionths of a byte, so that nothing is lost to rounding.
    level: i128,
    /// When the level was right, and the limit since.
    at: Duration,
    limit: u64,
}

impl Bucket {
    /// Time a writer may be late and still catch up.
    const CREDIT: Duration = Duration::from_millis(5);

    /// Takes `bytes` under `limit` bytes per second (0 = no limit), or says how long to wait before asking again.
    pub fn take(&mut self, now: Duration, limit: u64, bytes: u64) -> Option<Duration> {
        let in_time = |limit: u64, time: Duration| i128::from(limit).saturating_mul(nanos(time));
        let gained = in_time(self.limit.min(limit), now.saturating_sub(self.at));
        (self.at, self.limit) = (now, limit);
        if limit == 0 {
            self.level = 0;
            return None;
        }
        self.level = self.level.saturating_add(gained).min(in_time(limit, Self::CREDIT));
        if self.level < 0 {
            let wait = self.level.unsigned_abs().div_ceil(u128::from(limit));
            return Some(Duration::from_nanos(u64::try_from(wait).unwrap_or(u64::MAX)));
        }
        self.charge(bytes);
        None
    }

    /// Takes `bytes` that were written already.
    pub fn charge(&mut self, bytes: u64) {
        if self.limit > 0 {
            self.level = self.level.saturating_sub(i128::from(bytes) * 1_000_000_000);
        }
    }
}

fn nanos(time: Duration) -> i128 {
    i128::try_from(time.as_nanos()).unwrap_or(i128::MAX)
}

/// Bytes of one write under a limit: two milliseconds' worth, so that writes are even, at most `most`.
pub fn at_once(limit: u64, most: u64) -> u64 {
    match limit {
        0 => most,
        _ => (limit / 500).clamp(1, most),
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

/// The last rounds: the guest is stopped only after a round that began when the end was near, because before such a
/// round the destination is waited for, and what still lies in sockets must not be waited for with the guest stopped.
#[derive(Debug)]
pub struct Approach {
    policy: Convergence,
    near: bool,
}

impl Approach {
    /// By a policy.
    pub fn new(policy: Convergence) -> Self {
        Self { policy, near: false }
    }

    /// Whether the destination is to be waited for before the round ends.
    pub fn is_near(&self) -> bool {
        self.near
    }

    /// A round ended with `pending` bytes left, and it is `allowed` to stop the guest: switch over now?
    pub fn decide(&mut self, now: Duration, pending: u64, threshold: u64, allowed: bool) -> bool {
        let was_near = std::mem::replace(&mut self.near, pending <= threshold);
        self.policy.decide(now, pending, threshold) && allowed && was_near
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_window_measures() {
        let mut rate = Rate::new(Duration::ZERO);
        rate.moved(10 * MS, 60);
        assert_eq!(rate.bandwidth(10 * MS), 6000);
        rate.moved(100 * MS, 60);
        assert_eq!(rate.bandwidth(101 * MS), 1200);
        rate.moved(150 * MS, 1000);
        assert_eq!(rate.bandwidth(150 * MS), 1200, "the last whole window's");
    }

    #[test]
    fn a_window_of_waiting_does_not_hide_how_fast_the_round_was() {
        let mut rate = Rate::new(Duration::ZERO);
        rate.moved(100 * MS, 1000);
        rate.moved(200 * MS, 0);
        assert_eq!(rate.bandwidth(200 * MS), 0);
        rate.round_over(200 * MS);
        assert_eq!(rate.bandwidth(200 * MS), 5000);
        rate.moved(300 * MS, 900);
        assert_eq!(rate.bandwidth(300 * MS), 9000, "the window's is more");
        rate.moved(400 * MS, 0);
        rate.round_over(400 * MS);
        assert_eq!(rate.bandwidth(400 * MS), 4500, "the last round's, not an older one's");
    }

    /// Writes packets of the sizes given as fast as the bucket lets them go, for a second under each limit; the most
    /// that was ever written beyond what the limits allow, and how much was written.
    fn worst_excess(limits: &[u64], sizes: &[u64], late: Duration) -> (i64, u64) {
        let (mut bucket, mut now) = (Bucket::default(), Duration::ZERO);
        let (mut written, mut allowed, mut worst) = (0u64, 0u64, i64::MIN);
        let mut sizes = sizes.iter().cycle();
        for limit in limits {
            let (begin, before) = (now, allowed);
            bucket.take(now, *limit, 0);
            while now < begin + Duration::from_secs(1) {
                let size = *sizes.next().unwrap();
                while let Some(wait) = bucket.take(now, *limit, size) {
                    now += wait + late;
                }
                written += size;
                allowed = before + threshold(*limit, now - begin);
                worst = worst.max(i64::try_from(written).unwrap() - i64::try_from(allowed).unwrap());
            }
        }
        (worst, written)
    }

    #[test]
    fn the_limit_is_kept_to_one_packet() {
        const PACKET: u64 = 525_632;
        for late in [Duration::ZERO, MS / 10, 3 * MS] {
            for limits in
                [&[200_000_000][..], &[200_000_000, 10_000_000, 900_000_000], &[1_000_000, 5_000_000_000, 1]]
            {
                let (worst, _) = worst_excess(limits, &[PACKET, 4096, 1344], late);
                assert!(
                    worst <= i64::try_from(PACKET).unwrap(),
                    "{worst} bytes too many: {limits:?}, late by {late:?}"
                );
            }
        }
        let (_, written) = worst_excess(&[200_000_000; 4], &[PACKET], MS);
        assert!(written > 790_000_000, "being late by a millisecond costs nothing: {written}");
        let mut free = Bucket::default();
        assert!((0..1000).all(|_| free.take(MS, 0, u64::MAX).is_none()), "no limit");
        assert_eq!([0, 100, 2_000_000, 1 << 40].map(|limit| at_once(limit, 524_288)), [524_288, 1, 4000, 524_288]);
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
    fn the_destination_is_waited_for_before_the_guest_is_stopped() {
        let mut approach = Approach::new(Convergence::new(0, Duration::ZERO));
        assert!(!approach.decide(MS, 500, 100, true) && !approach.is_near());
        assert!(!approach.decide(2 * MS, 50, 100, true), "it was not near when this round began");
        assert!(approach.is_near() && !approach.decide(3 * MS, 50, 100, false), "not allowed yet");
        assert!(approach.decide(4 * MS, 50, 100, true));
        assert!(!approach.decide(5 * MS, 500, 100, true) && !approach.is_near(), "too much again");
    }

    #[test]
    fn patience_ends() {
        let halving = (0..40).map(|n| 1u64 << (39 - n));
        assert_eq!(switch(&mut Convergence::new(3, Duration::from_secs(2)), halving.clone(), u64::MAX), Some(3));
        assert_eq!(switch(&mut Convergence::new(100, 5 * MS), halving.clone(), u64::MAX), Some(5));
        assert_eq!(switch(&mut Convergence::new(0, 5 * MS), halving, u64::MAX), Some(0), "as QEMU does");
    }
}
