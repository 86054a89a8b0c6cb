//! How fast one vCPU dirties memory, and how fast it may: the per-vCPU dirty limit. Pages of its dirty ring are given back
//! no faster than the limit says, so that a vCPU beyond it stands at a full ring; who writes less never notices.

use std::time::Duration;

use super::{Bucket, per_second, threshold};

/// What an entry of a ring stands for.
const PAGE: u64 = 4096;

/// What is given back at once is this much time's worth: a vCPU at its limit stands still that long at a time, no longer.
pub const TURN: Duration = Duration::from_millis(10);
/// What had to be taken although the limit did not allow it (a sync takes everything) is owed for no longer than this.
const OWED: Duration = Duration::from_millis(200);

/// One vCPU's meter.
#[derive(Debug, Default)]
pub struct Meter {
    /// Bytes per second; 0: none. By the VMM or its operator, and by a migration: the lower one counts.
    asked: u64,
    imposed: u64,
    bucket: Bucket,
    /// In the present period.
    began: Duration,
    pages: u64,
    stood: Duration,
    last: Speed,
    given: u64,
}

/// What a vCPU did in a period.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Speed {
    /// Bytes per second it dirtied.
    pub rate: u64,
    /// Percent of the time it was made to stand still.
    pub percent: u64,
    /// How long it stood still, in the whole period.
    pub stood: Duration,
    /// Pages it dirtied.
    pub pages: u64,
    /// Length of the period.
    pub period: Duration,
}

impl Meter {
    /// The limit in bytes per second; 0: none.
    pub fn limit(&self) -> u64 {
        match (self.asked, self.imposed) {
            (0, limit) | (limit, 0) => limit,
            (asked, imposed) => asked.min(imposed),
        }
    }

    /// What was asked for; 0: nothing.
    pub fn asked(&self) -> u64 {
        self.asked
    }

    /// The VMM or its operator limits the vCPU; 0: no longer.
    pub fn ask(&mut self, limit: u64) {
        self.asked = limit;
    }

    /// A migration limits it; 0: no longer.
    pub fn impose(&mut self, limit: u64) {
        self.imposed = limit;
    }

    /// Pages that may be given back now.
    pub fn allowed(&mut self, now: Duration) -> usize {
        match self.limit() {
            0 => usize::MAX,
            limit => match self.bucket.take(now, limit, 0) {
                None => usize::try_from(threshold(limit, TURN) / PAGE).unwrap_or(usize::MAX).max(1),
                Some(_) => 0,
            },
        }
    }

    /// So many pages were given back.
    pub fn took(&mut self, pages: usize) {
        self.pages = self.pages.saturating_add(pages as u64);
        self.given = self.given.saturating_add(pages as u64);
        let limit = self.limit();
        if limit > 0 {
            let most = threshold(limit, OWED).max(PAGE);
            self.bucket.charge((pages as u64).saturating_mul(PAGE).min(most));
        }
    }

    /// Pages that were given back, ever.
    pub fn given(&self) -> u64 {
        self.given
    }

    /// It was made to stand still for so long.
    pub fn stood(&mut self, time: Duration) {
        self.stood = self.stood.saturating_add(time);
    }

    /// A period is over.
    pub fn end_period(&mut self, now: Duration) {
        let period = now.saturating_sub(self.began);
        let percent = (self.stood.as_nanos() * 100).checked_div(period.as_nanos()).unwrap_or(0).min(100);
        self.last = Speed {
            rate: per_second(self.pages.saturating_mul(PAGE), period),
            percent: u64::try_from(percent).unwrap_or(100),
            stood: self.stood,
            pages: self.pages,
            period,
        };
        (self.began, self.pages, self.stood) = (now, 0, Duration::ZERO);
    }

    /// A period begins, and nothing is known of the last.
    pub fn restart(&mut self, now: Duration) {
        self.end_period(now);
        self.last = Speed::default();
    }

    /// What it did in the last whole period.
    pub fn speed(&self) -> Speed {
        self.last
    }
}

/// The limit of each of `vcpus` vCPUs so that together they dirty no more than the share `trigger` (percent) of `bandwidth`.
/// Never below what the smallest limit of QEMU's is, 1 MB/s.
pub fn share(bandwidth: u64, trigger: u64, vcpus: usize) -> u64 {
    let all = u128::from(bandwidth) * u128::from(trigger) / 100;
    u64::try_from(all / vcpus.max(1) as u128).unwrap_or(u64::MAX).max(LOWEST)
}

/// The lowest limit that is imposed: a guest must live.
pub const LOWEST: u64 = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// A vCPU that writes as fast as it may into a ring of `ring` pages, for `time`; a sync takes everything every `sync`.
    /// Pages it wrote, and the longest it stood still.
    fn write(limit: u64, ring: usize, time: Duration, sync: Option<Duration>) -> (u64, Duration) {
        let (mut meter, mut now, mut wrote) = (Meter::default(), Duration::ZERO, 0);
        meter.ask(limit);
        let (mut used, mut since, mut longest, mut next_sync) = (0, Duration::ZERO, Duration::ZERO, sync);
        while now < time {
            // 4 GB/s: a millisecond is 1024 pages.
            let room = (ring - used).min(1024);
            used += room;
            wrote += room as u64;
            now += MS;
            if room > 0 {
                since = now;
            }
            longest = longest.max(now - since);
            let mut given = meter.allowed(now).min(used);
            if next_sync.is_some_and(|at| now >= at) {
                given = used;
                next_sync = sync.map(|every| now + every);
            }
            meter.took(given);
            used -= given;
        }
        (wrote, longest)
    }

    #[test]
    fn a_limit_is_kept_whatever_the_ring() {
        for limit in [1 << 20, 10 << 20, 100 << 20, 1 << 30] {
            for ring in [1024, 4096, 65536] {
                let (wrote, longest) = write(limit, ring, Duration::from_secs(10), None);
                let bytes = (wrote - ring as u64) * PAGE;
                assert!(bytes <= 10 * limit + limit / 50, "{limit} over a ring of {ring}: {bytes}");
                assert!(bytes >= 10 * limit - limit / 10, "{limit} over a ring of {ring}: {bytes}");
                assert!(longest <= 2 * TURN, "{limit}: stood still for {longest:?}");
            }
        }
    }

    #[test]
    fn a_sync_costs_a_ring_and_no_more_than_a_moment_s_debt() {
        let (limit, ring) = (10 << 20, 4096);
        let (wrote, longest) = write(limit, ring, Duration::from_secs(10), Some(Duration::from_secs(1)));
        let most = 10 * limit / PAGE + 11 * ring as u64;
        assert!(wrote <= most && longest <= OWED + 2 * TURN, "{wrote} of {most} pages, stood still for {longest:?}");
    }

    #[test]
    fn a_vcpu_below_its_limit_is_left_alone() {
        let mut meter = Meter::default();
        meter.ask(100 << 20);
        for ms in 0..5000u32 {
            // 90 MB/s: 23 pages a millisecond, given back at once.
            if ms % 10 == 0 {
                assert!(meter.allowed(MS * ms) >= 230, "at {ms} ms");
                meter.took(230);
            }
        }
        meter.end_period(5000 * MS);
        let speed = meter.speed();
        assert_eq!((speed.pages, speed.percent, speed.rate), (115_000, 0, 115_000 * PAGE / 5));
    }

    #[test]
    fn the_lower_of_two_limits_counts_and_none_is_none() {
        let mut meter = Meter::default();
        assert_eq!((meter.limit(), meter.allowed(MS)), (0, usize::MAX));
        meter.ask(10 << 20);
        meter.impose(5 << 20);
        assert_eq!((meter.limit(), meter.asked()), (5 << 20, 10 << 20));
        meter.ask(0);
        assert_eq!(meter.limit(), 5 << 20);
        meter.impose(0);
        assert_eq!((meter.limit(), meter.allowed(MS)), (0, usize::MAX));
    }

    #[test]
    fn a_share_is_never_nothing() {
        assert_eq!(share(800 << 20, 50, 4), 100 << 20);
        assert_eq!(share(0, 50, 4), LOWEST);
        assert_eq!(share(u64::MAX, 100, 1), u64::MAX);
        assert_eq!(share(1 << 30, 50, 0), 512 << 20);
    }
}
