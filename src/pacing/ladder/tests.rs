use super::*;
use crate::pacing::downtime::Known;
use crate::pacing::{Convergence, threshold};

const MS: Duration = Duration::from_millis(1);
const SEC: Duration = Duration::from_secs(1);
const MIB: u64 = 1 << 20;
const PERCENT: Brake = Brake::Percent(20, 10, 99);
const RING: Brake = Brake::Limit { vcpus: 2, first: 0, trigger: 50 };

fn config(brake: Brake) -> Config {
    Config { downtime: 300 * MS, downtime_max: 2 * SEC, time: Duration::ZERO, brake }
}

/// A guest and a link. What is left after a round is what the guest dirtied in it, at most its working set, less what was
/// done to it.
#[derive(Clone, Copy, Debug)]
struct Guest {
    bandwidth: u64,
    working_set: u64,
    /// Bytes per second that each vCPU dirties.
    vcpus: [u64; 2],
    /// Percent by which that goes up and down, at random.
    noise: u64,
    seed: u64,
}

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Converged,
    Failed(Step),
}

#[derive(Debug)]
struct History {
    steps: Vec<(Duration, Step)>,
    rounds: u32,
    end: End,
    at: Duration,
    /// Bytes left, and what was allowed then.
    left: u64,
    downtime: Duration,
}

impl Guest {
    fn dice(&mut self) -> u64 {
        self.seed = self.seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.seed >> 33
    }

    fn dirties(&mut self, percent: u32, limit: u64) -> u64 {
        let one = |rate: u64| {
            let rate = rate * u64::from(100 - percent) / 100;
            if limit == 0 { rate } else { rate.min(limit) }
        };
        let all: u64 = self.vcpus.iter().map(|rate| one(*rate)).sum();
        let noise = self.dice() % (2 * self.noise + 1);
        all * (100 + noise - self.noise) / 100
    }

    /// Round after round as the source does it, with its convergence policy.
    fn run(mut self, config: &Config) -> History {
        let (mut ladder, mut policy) = (Ladder::default(), Convergence::new(8, 2 * SEC));
        let (mut now, mut pending, mut percent, mut limit) = (Duration::ZERO, 1024 * MIB, 0, 0);
        let mut history = History {
            steps: Vec::new(),
            rounds: 0,
            end: End::Converged,
            at: now,
            left: 0,
            downtime: config.downtime,
        };
        loop {
            let took = time_for(pending, self.bandwidth).unwrap() + MS;
            now += took;
            history.rounds += 1;
            pending = threshold(self.dirties(percent, limit), took).min(self.working_set);
            history.downtime = ladder.downtime().unwrap_or(config.downtime);
            let allowed = Known { bandwidth: self.bandwidth, ..Known::default() }.threshold(history.downtime);
            (history.at, history.left) = (now, pending);
            if policy.decide(now, pending, allowed) {
                return history;
            }
            let round = Round { now, pending, threshold: allowed, bandwidth: self.bandwidth };
            let Some(step) = ladder.round(config, &round) else { continue };
            history.steps.push((now, step));
            match step {
                Step::Downtime(_) => {}
                Step::Throttle(to) => percent = to,
                Step::Limit(to) => limit = to,
                Step::Exhausted | Step::Late => {
                    history.end = End::Failed(step);
                    return history;
                }
            }
            assert!(history.rounds < 100_000, "it never ends: {self:?}");
        }
    }
}

fn steps(history: &History) -> Vec<Step> {
    history.steps.iter().map(|(_, step)| *step).collect()
}

const BUSY: Guest = Guest { bandwidth: 100 * MIB, working_set: 128 * MIB, vcpus: [200 * MIB, 0], noise: 0, seed: 1 };

#[test]
fn a_longer_downtime_is_taken_where_one_would_do() {
    // 128 MiB at 100 MiB/s are 1.28 s: three doublings.
    let history = BUSY.run(&config(PERCENT));
    assert_eq!(steps(&history), [600, 1200, 2000].map(|ms| Step::Downtime(ms * MS)));
    assert_eq!(history.end, End::Converged);
}

#[test]
fn else_the_guest_is_slowed_down() {
    let narrow = Config { downtime_max: 500 * MS, ..config(PERCENT) };
    let history = BUSY.run(&narrow);
    let taken = steps(&history);
    // Below 100 MiB/s it shrinks by itself.
    assert_eq!(taken[..4], [20, 30, 40, 50].map(Step::Throttle));
    assert_eq!(history.end, End::Converged);
    let by_ring = BUSY.run(&Config { brake: RING, ..narrow });
    assert_eq!((steps(&by_ring).first(), by_ring.end), (Some(&Step::Limit(25 * MIB)), End::Converged));
    let given = Brake::Limit { vcpus: 2, first: 160 * MIB, trigger: 50 };
    let by_ring = BUSY.run(&Config { brake: given, ..narrow });
    assert_eq!(steps(&by_ring)[..2], [160, 80].map(|mb| Step::Limit(mb * MIB)));
}

#[test]
fn when_nothing_is_left_it_fails() {
    let narrow = Config { downtime_max: 400 * MS, ..config(Brake::None) };
    let history = BUSY.run(&narrow);
    assert_eq!(steps(&history), [Step::Downtime(400 * MS), Step::Exhausted]);
    // Not even at 99 %: a link that hardly moves.
    let slow = Guest { bandwidth: MIB / 4, vcpus: [4096 * MIB; 2], ..BUSY };
    for (brake, most) in [(PERCENT, 9), (RING, 1)] {
        let history = slow.run(&Config { brake, ..narrow });
        assert_eq!(history.end, End::Failed(Step::Exhausted));
        let slowed = steps(&history).iter().filter(|s| matches!(s, Step::Throttle(_) | Step::Limit(_))).count();
        assert_eq!(slowed, most, "{:?}", history.steps);
    }
}

#[test]
fn its_time_is_bounded() {
    let config = Config { time: 5 * SEC, downtime_max: 400 * MS, ..config(PERCENT) };
    let history = Guest { vcpus: [4096 * MIB; 2], ..BUSY }.run(&config);
    assert_eq!(history.end, End::Failed(Step::Late));
    let (first, last) = (history.steps[0].0, history.at);
    assert!(last - first >= 5 * SEC && last - first < 8 * SEC, "{history:?}");
    let mut ladder = Ladder { since: Some(SEC), steps: 3, ..Ladder::default() };
    assert!(!ladder.is_late(&config, 5 * SEC) && ladder.is_late(&config, 6 * SEC));
    ladder.restart();
    assert!(ladder.is_late(&config, 6 * SEC), "another connection does not give it more time");
    assert_eq!((ladder.steps(), ladder.downtime(), ladder.percent), (3, None, 0));
}

/// Guests and links of all kinds: it ends, in bounded steps and time, each step goes further than the one before and none too
/// far, and what converges by itself is left alone.
#[test]
fn any_history_ends_within_bounds() {
    let mut dice = Guest { seed: 42, ..BUSY };
    let mut seen = [0u32; 4];
    for number in 0..4000 {
        let guest = Guest {
            bandwidth: MIB << (dice.dice() % 11),
            working_set: MIB << (dice.dice() % 11),
            vcpus: [dice.dice() % (2048 * MIB), dice.dice() % (64 * MIB)],
            noise: dice.dice() % 60,
            seed: dice.dice(),
        };
        let time = Duration::from_secs(dice.dice() % 3 * 100);
        let brake = [Brake::None, PERCENT, RING][number % 3];
        let config = Config { downtime_max: MS * u32::try_from(dice.dice() % 4000).unwrap(), time, ..config(brake) };
        let history = guest.run(&config);
        let what = || format!("{guest:?} {config:?} {history:?}");
        let (mut downtime, mut percent, mut limit) = (config.downtime, 0, u64::MAX);
        for step in steps(&history) {
            match step {
                Step::Downtime(to) => {
                    assert!(to > downtime && to <= config.downtime_max, "{}", what());
                    downtime = to;
                }
                Step::Throttle(to) => {
                    assert!(to > percent && to <= 99 && brake == PERCENT, "{}", what());
                    percent = to;
                }
                Step::Limit(to) => {
                    assert!(to < limit && to >= LOWEST && brake == RING, "{}", what());
                    limit = to;
                }
                Step::Exhausted | Step::Late => {}
            }
        }
        assert!(history.steps.len() <= 4 + 12, "{}", what());
        // A step needs two whole periods that do not shrink, and no period begins before its round has ended.
        for pair in history.steps.windows(2) {
            assert!(pair[1].1 == Step::Late || pair[1].0 - pair[0].0 >= 2 * PERIOD, "{}", what());
        }
        match history.end {
            End::Converged => {
                let may = threshold(guest.bandwidth, history.downtime);
                assert!(
                    history.left <= may && history.downtime <= config.downtime.max(config.downtime_max),
                    "{}",
                    what()
                );
                seen[usize::from(!history.steps.is_empty())] += 1;
            }
            End::Failed(Step::Late) => {
                assert!(!time.is_zero() && history.at - history.steps[0].0 >= time, "{}", what());
                seen[2] += 1;
            }
            End::Failed(_) => {
                assert!(config.downtime_max <= config.downtime || downtime == config.downtime_max, "{}", what());
                assert!(brake != PERCENT || percent == 99, "{}", what());
                assert!(brake != RING || limit == LOWEST, "{}", what());
                seen[3] += 1;
            }
        }
        let calm = guest.vcpus.iter().sum::<u64>() * (100 + guest.noise) / 100 < guest.bandwidth / 2;
        if calm {
            assert_eq!(steps(&history), [], "{}", what());
        }
    }
    assert!(seen.iter().all(|n| *n > 50), "every end is seen often: {seen:?}");
}

/// Rounds of real migrations that came to their end by themselves (milliseconds, bytes left, bytes per second): no step.
#[test]
fn recorded_histories_that_converge_need_no_step() {
    type Recorded = (u64, &'static [(u64, u64)]);
    let all: [Recorded; 3] = [
        (796_576_513, &[(338, 8_454_144), (378, 1_376_256), (382, 131_072), (386, 131_072)]),
        (3_956_813_341, &[(128, 29_884_416), (135, 1_835_008), (135, 262_144), (136, 16_384), (136, 245_760)]),
        (1_174_489_171, &[(773, 134_217_728), (827, 6_115_328), (829, 937_984), (830, 217_088), (832, 1_118_208)]),
    ];
    for (bandwidth, rounds) in all {
        let mut ladder = Ladder::default();
        for (at, pending) in rounds {
            let threshold = Known { bandwidth, ..Known::default() }.threshold(300 * MS);
            let round = Round { now: MS * u32::try_from(*at).unwrap(), pending: *pending, threshold, bandwidth };
            assert_eq!(ladder.round(&config(PERCENT), &round), None);
        }
        assert_eq!(ladder.steps(), 0);
    }
}
