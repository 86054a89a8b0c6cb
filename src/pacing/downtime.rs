//! What the time a guest stands still is made of: before, as far as it can be known, and after.

use std::time::Duration;

use super::{threshold, time_for};

/// The parts of a switchover, in their order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Parts {
    /// The stop hook and the run-state handlers.
    pub stop: Duration,
    /// Saving device state, and sending it.
    pub devices: Duration,
    /// The last harvest of dirty pages.
    pub sync: Duration,
    /// Sending them.
    pub ram: Duration,
    /// From the last byte to the destination's word that it loaded everything.
    pub load: Duration,
    /// The destination's run-state handlers and start hook.
    pub start: Duration,
    /// Between two vmigs: GO on its way there and its answer back.
    pub go: Duration,
    /// Option `verify`: hashing and comparing, and hashing again before GO.
    pub verify: Duration,
}

impl Parts {
    /// Of a prediction: what hashing all memory once takes.
    pub fn hash(&self) -> Duration {
        self.verify.saturating_sub(self.load) / 2
    }

    /// All of it.
    pub fn total(&self) -> Duration {
        let others = [self.devices, self.sync, self.ram, self.load, self.start, self.go, self.verify];
        others.iter().fold(self.stop, |a, b| a.saturating_add(*b))
    }
}

/// What is known while the guest still runs. What was never measured counts as nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Known {
    /// What stopping and starting took here the last time: the destination's VMM is taken for one like ours.
    pub stop: Duration,
    /// See `stop`.
    pub start: Duration,
    /// What the devices took in an earlier attempt.
    pub devices: Duration,
    /// The last harvest.
    pub sync: Duration,
    /// From a PING to its PONG.
    pub round_trip: Duration,
    /// Two vmigs: GO and its answer are a round trip more.
    pub votes: bool,
    /// Bytes per second.
    pub bandwidth: u64,
    /// What hashing all memory took, with option `verify`; it is done twice.
    pub hash: Duration,
}

impl Known {
    /// What a switchover would take with `pending` bytes left; none while the bandwidth is unknown.
    pub fn predict(&self, pending: u64) -> Option<Parts> {
        let ram = time_for(pending, self.bandwidth)?;
        let Self { stop, start, devices, sync, round_trip: load, votes, hash, .. } = *self;
        let go = if votes { load } else { Duration::ZERO };
        // What came of it is compared, which is a way there and back, too.
        let compared = if hash.is_zero() { Duration::ZERO } else { load };
        let verify = hash.saturating_mul(2).saturating_add(compared);
        Some(Parts { stop, devices, sync, ram, load, start, go, verify })
    }

    /// Bytes that may be left so that the guest stands still no longer than `limit`.
    ///
    /// What the limit is eaten up by besides pages counts for half of it at most: a guest with slow handlers would else
    /// never be moved, and that its limit cannot be kept is in the prediction.
    pub fn threshold(&self, limit: Duration) -> u64 {
        let others = self.predict(0).map_or(Duration::ZERO, |parts| parts.total());
        threshold(self.bandwidth, limit - others.min(limit / 2))
    }
}

/// A switchover beside its prediction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Downtime {
    /// As it was predicted when the guest was stopped.
    pub expected: Parts,
    /// As it was. Of the destination's start only what it told.
    pub actual: Parts,
    /// From the stop hook's call to the last word of the destination.
    pub total: Duration,
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_prediction_is_the_sum_of_what_is_known() {
        let known = Known {
            stop: MS,
            start: 2 * MS,
            devices: 3 * MS,
            sync: 4 * MS,
            round_trip: 5 * MS,
            votes: false,
            bandwidth: 1_000_000,
            hash: 6 * MS,
        };
        let parts = known.predict(6000).unwrap();
        assert_eq!((parts.ram, parts.load, parts.total()), (6 * MS, 5 * MS, 38 * MS));
        let parts = Known { votes: true, ..known }.predict(6000).unwrap();
        assert_eq!((parts.go, parts.total()), (5 * MS, 43 * MS));
        assert_eq!(parts.hash(), 6 * MS);
        assert!(Known::default().predict(1).is_none(), "no bandwidth yet");
    }

    #[test]
    fn what_is_not_pages_leaves_less_for_pages() {
        let known = Known { bandwidth: 1_000_000, stop: 10 * MS, ..Known::default() };
        assert_eq!(known.threshold(100 * MS), 90_000);
        assert_eq!(known.threshold(12 * MS), 6_000, "at least half of the limit is for pages");
        assert_eq!(Known::default().threshold(100 * MS), 0);
    }
}
