//! The numbers of a migration: counters that move, and what they are at one moment.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crossbeam_utils::CachePadded;

use super::{Side, State};

/// Numbers that move while a migration runs. Bytes, bytes per second, nanoseconds.
#[derive(Debug, Default)]
#[expect(missing_docs, reason = "Snapshot documents each")]
pub struct Counters {
    pub total: AtomicU64,
    pub remaining: CachePadded<AtomicU64>,
    pub transferred: CachePadded<AtomicU64>,
    pub normal_pages: CachePadded<AtomicU64>,
    pub zero_pages: CachePadded<AtomicU64>,
    pub iteration: AtomicU64,
    pub dirty_rate: AtomicU64,
    pub bandwidth: AtomicU64,
    pub expected_downtime: AtomicU64,
    pub precopy: AtomicU64,
    pub channel_bytes: AtomicU64,
    pub setup: AtomicU64,
    pub stop: AtomicU64,
    pub downtime: AtomicU64,
    pub throttle: AtomicU64,
    pub dirty_limit: AtomicU64,
    pub downtime_limit: AtomicU64,
    pub ladder: AtomicU64,
}

impl Counters {
    fn all(&self) -> [&AtomicU64; 18] {
        [
            &self.total,
            &self.remaining,
            &self.transferred,
            &self.normal_pages,
            &self.zero_pages,
            &self.iteration,
            &self.dirty_rate,
            &self.bandwidth,
            &self.expected_downtime,
            &self.precopy,
            &self.channel_bytes,
            &self.setup,
            &self.stop,
            &self.downtime,
            &self.throttle,
            &self.dirty_limit,
            &self.downtime_limit,
            &self.ladder,
        ]
    }

    /// Before a migration.
    pub(super) fn clear(&self) {
        self.all().iter().for_each(|counter| counter.store(0, Ordering::Relaxed));
    }

    /// The numbers now.
    pub(super) fn snapshot(&self, state: State, side: Option<Side>, elapsed: Duration) -> Snapshot {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let (remaining, bandwidth, dirty) = (get(&self.remaining), get(&self.bandwidth), get(&self.dirty_rate));
        Snapshot {
            state,
            side,
            iteration: get(&self.iteration),
            total: get(&self.total),
            remaining,
            transferred: get(&self.transferred),
            precopy: match state {
                State::Active => get(&self.transferred),
                _ => get(&self.precopy),
            },
            channel_bytes: get(&self.channel_bytes),
            normal_pages: get(&self.normal_pages),
            zero_pages: get(&self.zero_pages),
            dirty_rate: dirty,
            bandwidth,
            elapsed: u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX),
            setup: get(&self.setup),
            expected_downtime: get(&self.expected_downtime),
            stop: get(&self.stop),
            downtime: get(&self.downtime),
            throttle: get(&self.throttle),
            dirty_limit: get(&self.dirty_limit),
            downtime_limit: get(&self.downtime_limit),
            ladder: get(&self.ladder),
            eta: eta(state, remaining, bandwidth, dirty),
        }
    }
}

/// Stores a duration in a counter of nanoseconds.
pub fn store_time(counter: &AtomicU64, time: Duration) {
    counter.store(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
}

/// The numbers at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// State.
    pub state: State,
    /// Which half, if any migration was started yet.
    pub side: Option<Side>,
    /// Dirty-log syncs so far; 1 is the first pass over all pages.
    pub iteration: u64,
    /// Guest RAM that migrates, in bytes.
    pub total: u64,
    /// RAM still to send, in bytes.
    pub remaining: u64,
    /// Bytes on the wire.
    pub transferred: u64,
    /// Those of them that went while the guest ran.
    pub precopy: u64,
    /// Those of them that went over connections of their own.
    pub channel_bytes: u64,
    /// Pages sent whole.
    pub normal_pages: u64,
    /// Pages sent as zero.
    pub zero_pages: u64,
    /// Bytes per second the guest dirtied between the last two syncs.
    pub dirty_rate: u64,
    /// Bytes per second over the last 100 ms.
    pub bandwidth: u64,
    /// Nanoseconds since the start, final once ended.
    pub elapsed: u64,
    /// Nanoseconds the setup took.
    pub setup: u64,
    /// Nanoseconds the guest would be stopped if it were stopped now.
    pub expected_downtime: u64,
    /// Nanoseconds the stop hook and handlers took.
    pub stop: u64,
    /// Nanoseconds the guest was stopped by the migration.
    pub downtime: u64,
    /// Percent of the time the vCPUs are made to stand still.
    pub throttle: u64,
    /// Bytes per second each vCPU may dirty, by this migration; 0: no limit.
    pub dirty_limit: u64,
    /// Nanoseconds the guest may be stopped.
    pub downtime_limit: u64,
    /// Steps of the ladder that were taken.
    pub ladder: u64,
    /// Nanoseconds until completion at the present rates; `u64::MAX` while unknown.
    pub eta: u64,
}

/// What is left shrinks by bandwidth minus dirty rate; `u64::MAX` if it does not shrink.
fn eta(state: State, remaining: u64, bandwidth: u64, dirty_rate: u64) -> u64 {
    if state.is_final() {
        return 0;
    }
    let net = bandwidth.saturating_sub(dirty_rate);
    match crate::pacing::time_for(remaining, net) {
        Some(time) if bandwidth > 0 => u64::try_from(time.as_nanos()).unwrap_or(u64::MAX),
        _ => u64::MAX,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_eta_while_the_guest_is_faster_than_the_link() {
        assert_eq!(eta(State::Active, 1000, 10, 10), u64::MAX);
        assert_eq!(eta(State::Active, 1000, 1010, 10), 1_000_000_000);
        assert_eq!(eta(State::Active, 1000, 0, 0), u64::MAX);
    }
}
