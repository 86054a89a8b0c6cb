//! What a migration would come to, worked out before it begins: the same policy as a real one, over the dirtying that was
//! measured instead of a guest.
//!
//! Round after round is sent at the bandwidth given, and the guest dirties meanwhile what its curve says. A page that was
//! dirty in the round before was written not long ago; how that tells on whether it is written again follows from the
//! curve alone, for guests that go round in their memory and for those that write anywhere (see `left_after`).
//!
//! A forecast that a little more or less of either speed would turn into another is none: it says so.

use std::fmt::Write;
use std::time::Duration;

use super::dirtying::{Dirtying, PARTS, mul};
use super::downtime::Known;
use super::throttle::{Config, Judge};
use super::{Approach, Convergence, time_for};

/// Rounds that are worked out at most; real ones that are not over then have no end that could be foretold.
const ROUNDS_MAX: u64 = 20_000;
/// Rounds without a change after which there will be none.
const STILL: u32 = 4;
/// What a round takes besides its bytes at least: a harvest, and pings when the end is near.
const ROUND_MIN: Duration = Duration::from_millis(1);
/// Percent by which dirtying and bandwidth may be other than they were said to be.
const DOUBT: u64 = 5;
/// Percent by which more or less is written again in a round than by the curve. Who goes round in memory is ahead of what is
/// sent, or behind it, and where it will be when a round begins nobody knows; for who writes anywhere it is the same.
const LUCK_ROUND: u64 = 50;
const LUCK_ANYWHERE: u64 = 10;
/// Percent by which a forecast may be wrong, and what is too short to matter.
const WRONG: u32 = 30;
const SHORT: Duration = Duration::from_millis(5);

/// What is asked.
#[derive(Clone, Debug)]
pub struct Question<'a> {
    /// What the guest does.
    pub dirtying: &'a Dirtying,
    /// Bytes per second the way to the destination takes; 0: not known.
    pub bandwidth: u64,
    /// Option `max-bandwidth`; 0: no limit.
    pub limit: u64,
    /// Option `avail-switchover-bandwidth`; 0: what the way takes.
    pub switchover_bandwidth: u64,
    /// Option `downtime-limit`.
    pub downtime_limit: Duration,
    /// Option `convergence-rounds`.
    pub rounds: u64,
    /// Option `convergence-time`.
    pub time: Duration,
    /// Option `total-timeout`; nothing: no limit.
    pub total_timeout: Duration,
    /// With option `auto-converge`.
    pub throttle: Option<Config>,
    /// What passes before the first page arrives.
    pub start: Duration,
    /// The guest is stopped before its memory is sent (option `dirty-tracker` none).
    pub stop_first: bool,
    /// What a switchover is made of besides pages; its bandwidth is not looked at.
    pub known: Known,
}

/// Whether it will get there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nobody can say.
    Unknown,
    /// It will come to its end.
    Converges,
    /// It will go on for ever, or until `total-timeout`.
    DoesNot,
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Forecast {
    /// Whether it will get there.
    pub verdict: Verdict,
    /// From the command to the end; if it does not get there, when that is certain.
    pub total: Duration,
    /// Rounds while the guest runs.
    pub rounds: u64,
    /// How long the guest will stand still; if it does not get there, how long it would have to.
    pub downtime: Duration,
    /// Bytes that will be left when it is stopped, or be left again and again.
    pub left: u64,
    /// Bytes sent altogether.
    pub sent: u64,
    /// Percent by which it will be throttled at last.
    pub throttle: u32,
    /// Why, in a sentence.
    pub why: String,
}

impl Forecast {
    /// Nobody can say, for this reason.
    pub fn unknown(why: impl Into<String>) -> Self {
        Self {
            verdict: Verdict::Unknown,
            total: Duration::ZERO,
            rounds: 0,
            downtime: Duration::ZERO,
            left: 0,
            sent: 0,
            throttle: 0,
            why: why.into(),
        }
    }
}

/// One way it may go.
#[derive(Clone, Debug)]
struct Course {
    converges: bool,
    now: Duration,
    rounds: u64,
    left: u64,
    sent: u64,
    downtime: Duration,
    throttle: u32,
    /// The longest round.
    longest: Duration,
    threshold: u64,
    pace: u64,
}

/// Percent of what was measured and given (dirtying, bandwidth), and of what is worked out to be written again.
type Doubt = (u64, u64, u64);

impl Question<'_> {
    /// Works it out.
    pub fn answer(&self) -> Forecast {
        if self.bandwidth == 0 && self.limit == 0 {
            return Forecast::unknown("no bandwidth was given, and option 'max-bandwidth' sets none");
        }
        if !self.dirtying.steady && !self.stop_first {
            let text =
                "the guest was not steady: it dirtied much more in one half of the measurement than in the other";
            return Forecast::unknown(text);
        }
        let course = self.run((100, 100, 100));
        let mut forecast = course.forecast(self);
        if let Some(why) = self.doubt(&course) {
            (forecast.verdict, forecast.why) = (Verdict::Unknown, why);
        }
        forecast
    }

    /// Why what was worked out may not be said.
    fn doubt(&self, course: &Course) -> Option<String> {
        if self.stop_first {
            return None;
        }
        let (curve, longest) = (&self.dirtying.curve, course.longest);
        if !curve.is_flat() && longest > curve.reach() * 2 {
            return Some(format!(
                "a round would last {} ms, and what the guest dirties in so long was not measured: measure for longer \
                 than the {} ms it was",
                longest.as_millis(),
                curve.reach().as_millis()
            ));
        }
        let (more, less) = (100 + DOUBT, 100 - DOUBT);
        let luck = if curve.goes_round() { LUCK_ROUND } else { LUCK_ANYWHERE };
        let other_ways = [(more, less, 100), (less, more, 100), (100, 100, 100 + luck), (100, 100, 100 - luck)];
        other_ways.iter().find_map(|way| course.differs_from(&self.run(*way)))
    }

    /// Bytes per second while the guest runs, and with it stopped.
    fn bandwidths(&self, percent: u64) -> (u64, u64) {
        let part =
            |bytes: u64| u64::try_from(u128::from(bytes) * u128::from(percent) / 100).unwrap_or(u64::MAX).max(1);
        let link = if self.bandwidth == 0 { self.limit } else { self.bandwidth };
        let limit = if self.limit == 0 { u64::MAX } else { self.limit };
        let last = if self.switchover_bandwidth == 0 { link } else { self.switchover_bandwidth };
        // A limit is kept, whatever the way takes.
        (part(link).min(limit), part(last))
    }

    /// One migration, round after round.
    fn run(&self, (dirtying, bandwidth, luck): Doubt) -> Course {
        let (pace, last) = self.bandwidths(bandwidth);
        let known = Known { bandwidth: last, ..self.known };
        let expected = if self.switchover_bandwidth == 0 { pace } else { self.switchover_bandwidth };
        let threshold = Known { bandwidth: expected, ..self.known }.threshold(self.downtime_limit);
        let mut course = Course {
            converges: true,
            now: self.start,
            rounds: 0,
            left: self.dirtying.content,
            sent: self.dirtying.content,
            downtime: Duration::ZERO,
            throttle: 0,
            longest: Duration::ZERO,
            threshold,
            pace,
        };
        if !self.stop_first {
            course.iterate(self, dirtying, luck);
        }
        course.downtime = known.predict(course.left).unwrap_or_default().total();
        course
    }
}

impl Course {
    /// Rounds while the guest runs, until it is stopped or it is clear that it never will be.
    fn iterate(&mut self, question: &Question<'_>, percent: u64, luck: u64) {
        let mut approach = Approach::new(Convergence::new(question.rounds, question.time));
        let (mut judge, mut before, mut still) = (Judge::default(), None, 0);
        let extra = question.dirtying.sync.max(ROUND_MIN) + question.known.round_trip;
        for _ in 0..ROUNDS_MAX {
            let took = time_for(self.left, self.pace).unwrap_or(Duration::MAX).saturating_add(extra);
            self.now = self.now.saturating_add(took);
            self.rounds += 1;
            if !question.total_timeout.is_zero() && self.now > question.total_timeout {
                break;
            }
            // A throttled guest, or one that is faster than it was seen to be, lives at another speed.
            let lived = mul(took, percent * u64::from(100 - self.throttle.min(99)), 10_000);
            self.longest = self.longest.max(lived);
            let left = left_after(question.dirtying, lived, before, luck);
            before = Some(left);
            if let Some(config) = &question.throttle
                && let Some(step) = judge.round(self.now, config, left, self.sent)
            {
                (self.throttle, still) = (step, 0);
            }
            still = if left.abs_diff(self.left) <= left / 100 { still + 1 } else { 0 };
            self.left = left;
            if approach.decide(self.now, left, self.threshold, true) {
                self.sent = self.sent.saturating_add(left);
                return;
            }
            // A throttle that may yet be closed further is a change to come.
            let closing = question.throttle.is_some_and(|config| self.throttle < config.max.max(config.initial));
            if left > self.threshold && still >= STILL && !closing {
                break;
            }
            self.sent = self.sent.saturating_add(left);
        }
        self.converges = false;
    }

    /// Why this may not be said if the other may come, too.
    fn differs_from(&self, other: &Self) -> Option<String> {
        let (both, all) = (self.converges && other.converges, |course: &Self| course.now + course.downtime);
        let what = match () {
            () if self.converges != other.converges => "whether it converges",
            () if both && differ(all(self), all(other)) => "the total time",
            () if both && differ(self.downtime, other.downtime) => "the blackout",
            () => return None,
        };
        Some(format!(
            "too close to call: {what} hangs on less than {DOUBT} % of the dirtying and of the bandwidth, or on where in its \
             memory the guest will be"
        ))
    }

    fn forecast(&self, question: &Question<'_>) -> Forecast {
        let verdict = if self.converges { Verdict::Converges } else { Verdict::DoesNot };
        let total = if self.converges { self.now.saturating_add(self.downtime) } else { self.now };
        let &Self { rounds, downtime, left, sent, throttle, .. } = self;
        Forecast { verdict, total, rounds, downtime, left, sent, throttle, why: self.why(question) }
    }

    fn why(&self, question: &Question<'_>) -> String {
        let mb = |bytes: u64| bytes / 1_000_000;
        let rate = question.dirtying.rate();
        let mut text = String::new();
        // Writing to a string cannot fail.
        let _ = match (question.stop_first, self.converges) {
            (true, _) => write!(text, "the guest is stopped before its {} MB are sent", mb(self.left)),
            (_, true) => write!(
                text,
                "the guest dirties {} MB/s over {} MB, and {} MB/s are sent: {} MB are left after {} rounds",
                mb(rate),
                mb(question.dirtying.curve.working_set()),
                mb(self.pace),
                mb(self.left),
                self.rounds
            ),
            (_, false) if !question.total_timeout.is_zero() && self.now > question.total_timeout => write!(
                text,
                "it would take longer than option 'total-timeout' allows, with {} MB left after {} rounds",
                mb(self.left),
                self.rounds
            ),
            (_, false) => write!(
                text,
                "the guest dirties {} MB/s, and {} MB/s are sent: each round leaves {} MB, and {} MB may be left for option \
                 'downtime-limit'",
                mb(rate),
                mb(self.pace),
                mb(self.left),
                mb(self.threshold)
            ),
        };
        if self.throttle > 0 {
            let _ = write!(text, "; throttled by {} %", self.throttle);
        }
        text
    }
}

/// Bytes that are dirty after a round of `time`, in which `before` bytes were sent; none: it was the first, with all.
///
/// What was sent is what was written in the last `age`, with D(age) = `before`, and not sent since (A). A page that was not
/// in the round is dirty at its end if it was written in it: written in both together, but not before, is D(age + time) -
/// D(age). One that was in it is dirty if it was written after it was sent (B), in the last u of the round, for each u
/// alike: A and B is A + B - (A or B), and A or B is about what is written in age + u together. For a guest that writes
/// anywhere that is exact; one that goes round comes to no page twice before it has come to all, and so it is there, too.
fn left_after(dirtying: &Dirtying, time: Duration, before: Option<u64>, luck: u64) -> u64 {
    let curve = &dirtying.curve;
    let lucky = |bytes: u64| u64::try_from(u128::from(bytes) * u128::from(luck) / 100).unwrap_or(u64::MAX);
    let Some(before) = before else { return lucky(dirtying.after_first_pass(time)).min(curve.at(time)) };
    let age = curve.time_of(before);
    let written = curve.at(age);
    let new = curve.at(age.saturating_add(time)).saturating_sub(written);
    let parts = PARTS as u64;
    let again: u64 = (0..parts)
        .map(|n| {
            let u = mul(time, 2 * n + 1, 2 * parts);
            (written + curve.at(u)).saturating_sub(curve.at(age.saturating_add(u))) / parts
        })
        .sum();
    new.saturating_add(lucky(again)).min(curve.at(time))
}

/// Whether two times are so far from each other that one cannot stand for both.
fn differ(a: Duration, b: Duration) -> bool {
    let (less, more) = (a.min(b), a.max(b));
    more - less > SHORT && more.saturating_mul(100) > less.saturating_mul(100 + WRONG)
}
