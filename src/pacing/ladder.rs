//! The ladder: what is done, one step after the other, with a guest that does not converge. Longer downtime where that
//! would do, else slowing the guest down, and failing when nothing is left, or the time is over.
//!
//! A round counts against the guest when more is left after it than may be, and no round before left a tenth more. Of the
//! periods of a second or more that end like this every second one is a step, as with QEMU's auto-converge.

use std::fmt;
use std::time::Duration;

use super::dirty_limit::{LOWEST, share};
use super::time_for;

/// What is judged is at least so much time.
pub const PERIOD: Duration = Duration::from_secs(1);
/// Each step allows so many times the downtime before.
const LONGER: u32 = 2;
/// The first of these steps, from a limit of nothing.
const LEAST: Duration = Duration::from_millis(10);
/// Periods that count against the guest before a step is taken.
const HITS: u32 = 2;

/// What can slow this guest down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Brake {
    /// Nothing.
    None,
    /// All vCPUs stand still for some percent of the time: the first step, what each further one adds, and the most.
    Percent(u32, u32, u32),
    /// Each of so many vCPUs dirties so many bytes per second at most, at first (0: its share of `trigger` percent of what
    /// is sent); each further step halves that.
    Limit {
        /// vCPUs.
        vcpus: usize,
        /// The first limit.
        first: u64,
        /// See `throttle-trigger-threshold`.
        trigger: u64,
    },
}

/// What the user says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// The downtime the ladder begins with.
    pub downtime: Duration,
    /// The longest it may allow.
    pub downtime_max: Duration,
    /// How long it may take, from its first step; zero: as long as there are steps.
    pub time: Duration,
    /// What can slow the guest down.
    pub brake: Brake,
}

/// What is known when a round ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Round {
    /// When.
    pub now: Duration,
    /// Bytes left to send.
    pub pending: u64,
    /// Bytes that may be left when the guest is stopped.
    pub threshold: u64,
    /// Bytes per second that are sent.
    pub bandwidth: u64,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The guest may stand still for so long.
    Downtime(Duration),
    /// The vCPUs stand still for so many percent of the time.
    Throttle(u32),
    /// Each vCPU dirties at most so many bytes per second.
    Limit(u64),
    /// Nothing is left to be done.
    Exhausted,
    /// The ladder's time is over.
    Late,
}

impl Step {
    /// Its name, in a trace.
    pub fn name(self) -> &'static str {
        match self {
            Self::Downtime(_) => "downtime",
            Self::Throttle(_) => "throttle",
            Self::Limit(_) => "dirty-limit",
            Self::Exhausted => "exhausted",
            Self::Late => "late",
        }
    }

    /// Milliseconds, percent, or bytes per second.
    pub fn value(self) -> u64 {
        match self {
            Self::Downtime(time) => u64::try_from(time.as_millis()).unwrap_or(u64::MAX),
            Self::Throttle(percent) => percent.into(),
            Self::Limit(rate) => rate,
            Self::Exhausted | Self::Late => 0,
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = self.value();
        match self {
            Self::Downtime(_) => write!(f, "it may stand still for {value} ms"),
            Self::Throttle(_) => write!(f, "its vCPUs are throttled by {value} %"),
            Self::Limit(_) => write!(f, "each vCPU may dirty {value} bytes a second"),
            Self::Exhausted => f.write_str("nothing is left to be done"),
            Self::Late => f.write_str("there is no time left"),
        }
    }
}

/// The ladder of one migration.
#[derive(Debug, Default)]
pub struct Ladder {
    steps: u64,
    hits: u32,
    began: Option<Duration>,
    /// The lowest rest of all rounds before this period, and in it.
    best: Option<u64>,
    lowest: Option<u64>,
    /// When the first step was taken.
    since: Option<Duration>,
    downtime: Option<Duration>,
    percent: u32,
    limit: u64,
}

impl Ladder {
    /// Steps taken.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// The downtime it allows, if it does.
    pub fn downtime(&self) -> Option<Duration> {
        self.downtime
    }

    /// Whether its time is over.
    pub fn is_late(&self, config: &Config, now: Duration) -> bool {
        let late = |since: Duration| now.saturating_sub(since) >= config.time;
        !config.time.is_zero() && self.since.is_some_and(late)
    }

    /// From the bottom again, over another connection: but for the time, which goes on.
    pub fn restart(&mut self) {
        *self = Self { since: self.since, steps: self.steps, ..Self::default() };
    }

    /// A round has ended: what is to be done, if anything.
    pub fn round(&mut self, config: &Config, round: &Round) -> Option<Step> {
        if self.is_late(config, round.now) {
            return Some(Step::Late);
        }
        let began = *self.began.get_or_insert(round.now);
        let lowest = self.lowest.map_or(round.pending, |lowest| lowest.min(round.pending));
        self.lowest = Some(lowest);
        if round.now.saturating_sub(began) < PERIOD && self.best.is_some() {
            return None;
        }
        (self.began, self.lowest) = (Some(round.now), None);
        let best = self.best.replace(self.best.map_or(lowest, |best| best.min(lowest)));
        let shrinks = best.is_none_or(|best| lowest < best - best / 10);
        if shrinks || lowest <= round.threshold {
            self.hits = 0;
            return None;
        }
        self.hits += 1;
        if self.hits < HITS {
            return None;
        }
        self.hits = 0;
        let step = self.step(config, round, lowest);
        if step != Step::Exhausted {
            self.steps += 1;
            self.since.get_or_insert(round.now);
        }
        Some(step)
    }

    /// A longer downtime if one that is allowed would do; else the guest is slowed down, as long as that goes on.
    fn step(&mut self, config: &Config, round: &Round, left: u64) -> Step {
        let longer = self.longer(config);
        let needed = time_for(left, round.bandwidth);
        let would_do = needed.is_some_and(|needed| needed <= config.downtime_max);
        let (downtime, slower) = match (longer, would_do) {
            (Some(longer), true) => (Some(longer), None),
            (longer, _) => match self.slower(config, round) {
                None => (longer, None),
                slower => (None, slower),
            },
        };
        self.downtime = downtime.or(self.downtime);
        downtime.map(Step::Downtime).or(slower).unwrap_or(Step::Exhausted)
    }

    fn longer(&self, config: &Config) -> Option<Duration> {
        let now = self.downtime.unwrap_or(config.downtime).max(config.downtime);
        let next = now.saturating_mul(LONGER).max(LEAST).min(config.downtime_max);
        (next > now).then_some(next)
    }

    fn slower(&mut self, config: &Config, round: &Round) -> Option<Step> {
        match config.brake {
            Brake::None => None,
            Brake::Percent(first, more, most) => {
                let next = if self.percent == 0 { first } else { self.percent.saturating_add(more) };
                let next = next.min(most.max(first));
                let higher = next > self.percent;
                self.percent = next.max(self.percent);
                higher.then_some(Step::Throttle(next))
            }
            Brake::Limit { vcpus, first, trigger } => {
                let next = match (self.limit, first) {
                    (0, 0) => share(round.bandwidth, trigger, vcpus),
                    (0, first) => first,
                    (limit, _) => (limit / 2).max(LOWEST.min(limit)),
                };
                let lower = self.limit == 0 || next < self.limit;
                self.limit = next;
                lower.then_some(Step::Limit(next))
            }
        }
    }
}

#[cfg(test)]
mod tests;
