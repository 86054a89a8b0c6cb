//! The convergence policy over whole histories of a migration: recorded ones, and ones made up from a dirty rate.

use super::downtime::Known;
use super::*;

const MS: Duration = Duration::from_millis(1);
const LIMIT: Duration = Duration::from_millis(300);
const GIB: u64 = 1 << 30;

fn policy() -> Convergence {
    Convergence::new(8, Duration::from_secs(2))
}

/// A guest and a link: what a round takes is what was pending by the bandwidth, and what is pending then is what the guest
/// dirtied meanwhile, at most its working set.
struct History {
    bandwidth: u64,
    working_set: u64,
    /// Bytes per second at a moment.
    dirty: fn(Duration) -> u64,
}

/// How a migration ended: when, after how many rounds, and with how much left; and the least that was left after any round
/// since the first moment it might have ended.
#[derive(Debug)]
struct End {
    at: Duration,
    rounds: u32,
    left: u64,
    first_allowed: Option<Duration>,
    least: u64,
}

impl History {
    fn run(&self) -> Option<End> {
        /// A round has a cost of its own: the harvest, and a round trip.
        const ROUND: Duration = Duration::from_micros(300);
        let known = Known { bandwidth: self.bandwidth, ..Known::default() };
        let (mut policy, mut now, mut pending) = (policy(), Duration::ZERO, GIB);
        let (mut first_allowed, mut least) = (None, u64::MAX);
        for rounds in 1..1000 {
            let begin = now;
            now += time_for(pending, self.bandwidth)? + ROUND;
            // In small steps: the rate changes within a round.
            let step = (now - begin) / 100;
            let dirtied: u64 = (0..100).map(|n| threshold((self.dirty)(begin + step * n), step)).sum();
            pending = dirtied.min(self.working_set);
            let threshold = known.threshold(LIMIT);
            if pending <= threshold {
                first_allowed.get_or_insert(now);
                least = least.min(pending);
            }
            if policy.decide(now, pending, threshold) {
                return Some(End { at: now, rounds, left: pending, first_allowed, least });
            }
        }
        None
    }

    /// Ends, within the policy's patience, never with more than the limit allows, and not far above the least it saw.
    fn ends(&self) -> End {
        let end = self.run().expect("it ends");
        let allowed = end.first_allowed.expect("it was allowed");
        assert!(end.left <= threshold(self.bandwidth, LIMIT), "{end:?}");
        assert!(end.at <= allowed + Duration::from_secs(2) + LIMIT, "patience ends: {end:?}");
        end
    }
}

#[test]
fn an_idle_guest_is_moved_with_next_to_nothing_left() {
    let end = History { bandwidth: GIB, working_set: 4096, dirty: |_| 4_096_000 }.ends();
    assert!(end.left <= 4096 && end.rounds <= 3, "{end:?}");
}

#[test]
fn a_constant_rate_is_followed_down_to_its_floor() {
    for (percent, dirty) in [(5, (|_| GIB / 20) as fn(Duration) -> u64), (25, |_| GIB / 4), (50, |_| GIB / 2)] {
        let end = History { bandwidth: GIB, working_set: GIB / 2, dirty }.ends();
        // The floor is what is dirtied in a round of nothing; a round may stop shrinking at a tenth above it.
        let allowed = threshold(GIB, LIMIT);
        assert!(end.left < allowed / 50, "{percent} %: stopped with {} of {allowed}", end.left);
        assert!(end.rounds <= 12, "{percent} %: {end:?}");
    }
}

#[test]
fn a_rate_beyond_the_link_is_never_allowed_unless_its_working_set_is_small() {
    let large = History { bandwidth: GIB, working_set: GIB, dirty: |_| 2 * GIB };
    assert!(large.run().is_none());
    let small = History { bandwidth: GIB, working_set: 64 << 20, dirty: |_| 2 * GIB }.ends();
    assert!(small.left <= 64 << 20 && small.rounds <= 10, "{small:?}");
}

#[test]
fn bursts_are_not_mistaken_for_the_end() {
    // 20 ms of work, 80 ms of rest.
    let burst = |at: Duration| if at.as_millis() % 100 < 20 { GIB / 2 } else { 0 };
    let end = History { bandwidth: GIB, working_set: 64 << 20, dirty: burst }.ends();
    assert!(end.left <= end.least.saturating_mul(2).max(1 << 20), "{end:?}");
}

#[test]
fn a_shrinking_rate_is_waited_for_and_a_growing_one_is_not() {
    let shrinking = |at: Duration| (GIB / 2) >> (at.as_millis() / 500).min(20);
    let end = History { bandwidth: GIB, working_set: GIB / 4, dirty: shrinking }.ends();
    assert_eq!(end.left, end.least, "at the bottom: {end:?}");
    let growing = |at: Duration| (GIB / 64) << (at.as_millis() / 200).min(8);
    let end = History { bandwidth: GIB, working_set: GIB / 4, dirty: growing }.ends();
    assert!(end.at <= end.first_allowed.unwrap() + 3 * LIMIT, "not longer than two more rounds: {end:?}");
}

/// Rounds of real migrations of a 512 MiB guest, by the example VMM's benchmark guest over loopback: microseconds since the
/// start and bytes left at each look, and bytes per second. The round in which the guest should be stopped, by hand.
#[test]
fn recorded_histories() {
    struct Recorded {
        what: &'static str,
        bandwidth: u64,
        rounds: &'static [(u64, u64)],
        stop: usize,
    }
    let all = [
        Recorded { what: "idle", bandwidth: 1_155_577_222, rounds: &[(384_767, 4096), (439_237, 4096)], stop: 1 },
        Recorded {
            what: "32 MB/s",
            bandwidth: 796_576_513,
            rounds: &[(338_553, 8_454_144), (378_134, 1_376_256), (382_156, 131_072), (386_227, 131_072)],
            stop: 3,
        },
        Recorded {
            what: "260 MB/s",
            bandwidth: 3_956_813_341,
            rounds: &[
                (128_196, 29_884_416),
                (135_086, 1_835_008),
                (135_760, 262_144),
                (136_269, 16_384),
                (136_639, 245_760),
            ],
            stop: 4,
        },
        Recorded {
            what: "520 MB/s",
            bandwidth: 1_174_489_171,
            rounds: &[
                (773_779, 134_217_728),
                (827_975, 6_115_328),
                (829_979, 937_984),
                (830_626, 217_088),
                (832_119, 1_118_208),
            ],
            stop: 4,
        },
    ];
    for Recorded { what, bandwidth, rounds, stop } in all {
        let known = Known { bandwidth, ..Known::default() };
        let mut policy = policy();
        let stopped = rounds
            .iter()
            .position(|(at, left)| policy.decide(Duration::from_micros(*at), *left, known.threshold(LIMIT)));
        assert_eq!(stopped, Some(stop), "{what}");
    }
    assert!(policy().decide(MS, 0, 0), "nothing left: at once");
}
