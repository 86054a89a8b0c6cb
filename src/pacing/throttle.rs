//! Auto-converge: a guest that dirties more than the link sends is slowed down, in steps. QEMU's schedule.

use std::time::Duration;

use crate::options::{Opt, Options};

/// What is judged is at least so much time.
const PERIOD: Duration = Duration::from_secs(1);

/// What the user says; percent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// A round counts against the guest when it dirtied more than this share of what was sent.
    pub trigger: u64,
    /// The first step.
    pub initial: u32,
    /// Each further one.
    pub increment: u32,
    /// The last steps are smaller: no further than needed.
    pub tailslow: bool,
    /// Never more.
    pub max: u32,
}

impl Config {
    /// As the options have it.
    pub fn of(options: &Options) -> Self {
        let percent = |option| u32::try_from(options.get(option)).unwrap_or(0);
        Self {
            trigger: options.get(Opt::ThrottleTrigger),
            initial: percent(Opt::ThrottleInitial),
            increment: percent(Opt::ThrottleIncrement),
            tailslow: options.on(Opt::ThrottleTailslow),
            max: percent(Opt::ThrottleMax),
        }
    }
}

/// The throttle of one migration.
#[derive(Debug)]
pub struct Throttle {
    hits: u32,
    percent: u32,
}

impl Throttle {
    /// The guest runs at full speed.
    pub fn new() -> Self {
        Self { hits: 0, percent: 0 }
    }

    /// What it is throttled by.
    pub fn percent(&self) -> u32 {
        self.percent
    }

    /// A round is over, in which so many bytes were dirtied and so many sent: whether something is to be done. Every second
    /// round that counts against the guest.
    pub fn is_due(&mut self, trigger: u64, dirtied: u64, sent: u64) -> bool {
        if u128::from(dirtied) * 100 <= u128::from(sent) * u128::from(trigger) {
            return false;
        }
        self.hits = (self.hits + 1) % 2;
        self.hits == 0
    }

    /// The same; the new percentage, if there is one.
    pub fn round(&mut self, config: &Config, dirtied: u64, sent: u64) -> Option<u32> {
        if !self.is_due(config.trigger, dirtied, sent) {
            return None;
        }
        let next = match self.percent {
            0 => config.initial,
            now => {
                now + if config.tailslow {
                    config.increment.min(ideal(config, now, dirtied, sent))
                } else {
                    config.increment
                }
            }
        };
        let next = next.min(config.max.max(config.initial));
        (next != self.percent).then(|| {
            self.percent = next;
            next
        })
    }
}

/// Judges the guest by what it dirtied and what was sent in periods of a second or more.
#[derive(Debug, Default)]
pub struct Judge {
    throttle: Throttle,
    began: Duration,
    dirtied: u64,
    sent_before: u64,
}

impl Judge {
    /// What the guest is throttled by.
    pub fn percent(&self) -> u32 {
        self.throttle.percent()
    }

    /// `dirtied` bytes more were found, and `sent` bytes were sent so far, `now` since the beginning. The new percentage, if
    /// there is one.
    pub fn round(&mut self, now: Duration, config: &Config, dirtied: u64, sent: u64) -> Option<u32> {
        let (dirtied, sent) = self.period(now, dirtied, sent)?;
        self.throttle.round(config, dirtied, sent)
    }

    /// The same; whether something is to be done.
    pub fn is_due(&mut self, now: Duration, trigger: u64, dirtied: u64, sent: u64) -> bool {
        let period = self.period(now, dirtied, sent);
        period.is_some_and(|(dirtied, sent)| self.throttle.is_due(trigger, dirtied, sent))
    }

    /// Begins anew, with a guest at full speed.
    pub fn restart(&mut self, now: Duration, sent: u64) {
        *self = Self { began: now, sent_before: sent, ..Self::default() };
    }

    /// What was dirtied and sent in the period that ends now, if one does.
    fn period(&mut self, now: Duration, dirtied: u64, sent: u64) -> Option<(u64, u64)> {
        self.dirtied = self.dirtied.saturating_add(dirtied);
        if now.saturating_sub(self.began) < PERIOD {
            return None;
        }
        let period = (self.dirtied, sent.saturating_sub(self.sent_before));
        (self.began, self.dirtied, self.sent_before) = (now, 0, sent);
        Some(period)
    }
}

impl Default for Throttle {
    fn default() -> Self {
        Self::new()
    }
}

/// By how much more the guest would have to be slowed down to dirty just what is allowed: of the time it still gets, the
/// share that is too much.
fn ideal(config: &Config, percent: u32, dirtied: u64, sent: u64) -> u32 {
    let now = u128::from(100 - percent.min(100));
    let allowed = u128::from(sent) * u128::from(config.trigger) / 100;
    let kept = now * allowed / u128::from(dirtied.max(1));
    u32::try_from(now.saturating_sub(kept)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEFAULTS: Config = Config { trigger: 50, initial: 20, increment: 10, tailslow: false, max: 99 };

    #[test]
    fn every_second_round_that_counts_is_a_step_up_to_the_most() {
        let mut throttle = Throttle::new();
        let steps: Vec<_> = (0..20).map(|_| throttle.round(&DEFAULTS, 60, 100)).collect();
        let some: Vec<_> = steps.iter().skip(1).step_by(2).flatten().copied().collect();
        assert_eq!(some, [20, 30, 40, 50, 60, 70, 80, 90, 99]);
        assert!(steps.iter().step_by(2).all(Option::is_none) && steps[19].is_none(), "{steps:?}");
        assert_eq!(throttle.percent(), 99);
    }

    #[test]
    fn a_guest_within_the_threshold_is_left_alone() {
        let mut throttle = Throttle::new();
        for (dirtied, sent) in [(50, 100), (0, 0), (49, 100), (u64::MAX / 2, u64::MAX)] {
            assert_eq!(throttle.round(&DEFAULTS, dirtied, sent), None);
        }
        assert_eq!(throttle.round(&DEFAULTS, 51, 100), None, "the first hit");
        assert_eq!(throttle.round(&DEFAULTS, 10, 100), None);
        assert_eq!(throttle.round(&DEFAULTS, 1, 0), Some(20), "the second, though not in a row");
    }

    #[test]
    fn the_tail_is_slow() {
        let config = Config { tailslow: true, ..DEFAULTS };
        let mut throttle = Throttle::new();
        let mut step = |dirtied| {
            throttle.round(&config, dirtied, 100);
            throttle.round(&config, dirtied, 100)
        };
        // Of the 80 % left to the guest a tenth is too much, then (of 72) a quarter: more than the increment.
        assert_eq!([step(55), step(55), step(100)], [Some(20), Some(28), Some(38)]);
    }

    #[test]
    fn a_guest_is_judged_by_the_second() {
        const MS: Duration = Duration::from_millis(1);
        let mut judge = Judge::default();
        assert_eq!(judge.round(900 * MS, &DEFAULTS, 40, 100), None);
        assert_eq!(judge.round(1000 * MS, &DEFAULTS, 20, 110), None, "60 of 110: the first hit");
        assert_eq!(judge.round(1999 * MS, &DEFAULTS, 900, 120), None, "not yet");
        assert_eq!(judge.round(2000 * MS, &DEFAULTS, 0, 121), Some(20));
        assert_eq!((judge.round(3000 * MS, &DEFAULTS, 9, 121), judge.percent()), (None, 20));
        assert_eq!(judge.round(4000 * MS, &DEFAULTS, 5, 131), None, "5 of 10 may be");
    }

    #[test]
    fn the_most_is_never_below_the_first_step() {
        let mut throttle = Throttle::new();
        let config = Config { initial: 30, max: 25, ..DEFAULTS };
        throttle.round(&config, 9, 1);
        assert_eq!(throttle.round(&config, 9, 1), Some(30));
    }
}
