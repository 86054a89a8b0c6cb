//! How fast a guest dirties its memory, as a measurement found it and a forecast reads it.
//!
//! Bytes per second alone say little, because a page that is written again is not dirty twice: what counts is how many
//! distinct bytes are dirtied within a time, a curve that begins steep and flattens when the guest comes round to what it
//! wrote before. It is measured at moments ever further apart, in two windows; that the two agree is what makes a guest
//! *steady*, and a forecast possible.

use std::time::Duration;

use super::per_second;

/// Parts into which memory is divided, in the order it is sent, to say where the guest writes.
pub const PARTS: usize = 16;
/// Looks at each window: the last at its end, each one before at half the time.
pub const LOOKS: u32 = 9;
/// Percent by which two windows of a steady guest differ at most.
const STEADY: u64 = 25;
/// A curve that grew by less than one part in so many over its second half has flattened.
const FLAT: u64 = 10;
/// Hits (pages, or samples) that differ by chance alone: fewer say nothing about steadiness.
const CHANCE: u64 = 64;

/// Distinct bytes dirtied within a time from any moment on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Curve {
    /// Ascending in both.
    points: Vec<(Duration, u64)>,
    most: u64,
}

impl Curve {
    /// Through these points, in any order, and the origin; never more than `most`.
    pub fn new(mut points: Vec<(Duration, u64)>, most: u64) -> Self {
        points.retain(|(time, _)| !time.is_zero());
        points.sort_by_key(|(time, _)| *time);
        points.dedup_by_key(|(time, _)| *time);
        let mut top = 0;
        for (_, bytes) in &mut points {
            top = (*bytes).min(most).max(top);
            *bytes = top;
        }
        Self { points, most }
    }

    /// Its points, ascending.
    pub fn points(&self) -> &[(Duration, u64)] {
        &self.points
    }

    /// The longest time it was measured for.
    pub fn reach(&self) -> Duration {
        self.points.last().map_or(Duration::ZERO, |(time, _)| *time)
    }

    /// Bytes within all of that time.
    pub fn working_set(&self) -> u64 {
        self.points.last().map_or(0, |(_, bytes)| *bytes)
    }

    /// Whether the guest comes round: nearly nothing new was dirtied in the second half of the time.
    pub fn is_flat(&self) -> bool {
        let (half, all) = (self.at(self.reach() / 2), self.working_set());
        all - half <= all / FLAT
    }

    /// Whether the guest goes round, as far as can be seen: one that writes anywhere comes by what it did not write yet ever
    /// less often.
    pub fn goes_round(&self) -> bool {
        let all = self.working_set();
        let (most, half) = (self.time_of(all / 10 * 9), self.time_of(all / 20 * 9));
        !self.is_flat() || most.saturating_mul(10) < half.saturating_mul(28)
    }

    /// Bytes per second that become dirty while all are clean: up to the first moment at which `enough` were.
    pub fn rate(&self, enough: u64) -> u64 {
        let first = self.points.iter().find(|(_, bytes)| *bytes >= enough).or(self.points.last());
        first.map_or(0, |(time, bytes)| per_second(*bytes, *time))
    }

    /// Bytes within `time`. Beyond its reach a curve that has flattened stays, and another goes on as it did last.
    pub fn at(&self, time: Duration) -> u64 {
        let next = self.points.partition_point(|(at, _)| *at < time);
        let before = |index: usize| index.checked_sub(1).map_or((Duration::ZERO, 0), |index| self.points[index]);
        match self.points.get(next) {
            Some(point) => between(before(next), *point, time),
            None if self.points.is_empty() => 0,
            None => {
                let (half, end) = ((self.reach() / 2, self.at(self.reach() / 2)), before(next));
                if end.1 - half.1 <= end.1 / FLAT { end.1 } else { between(half, end, time).min(self.most) }
            }
        }
    }

    /// The time within which so many bytes are dirtied; its reach if it takes longer.
    pub fn time_of(&self, bytes: u64) -> Duration {
        let next = self.points.partition_point(|(_, below)| *below < bytes);
        let before = next.checked_sub(1).map_or((Duration::ZERO, 0), |index| self.points[index]);
        match self.points.get(next) {
            Some((time, more)) => {
                let part = mul(time.saturating_sub(before.0), bytes.saturating_sub(before.1), more - before.1);
                before.0.saturating_add(part)
            }
            None => self.reach(),
        }
    }
}

/// On the line through two points, also beyond the second.
fn between((from, low): (Duration, u64), (to, high): (Duration, u64), time: Duration) -> u64 {
    let (span, past) = (to.saturating_sub(from).as_nanos(), time.saturating_sub(from).as_nanos());
    let more = (u128::from(high - low).saturating_mul(past)).checked_div(span).unwrap_or(0);
    low.saturating_add(u64::try_from(more).unwrap_or(u64::MAX))
}

/// What a measurement found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dirtying {
    /// Distinct bytes by time.
    pub curve: Curve,
    /// Two windows agreed.
    pub steady: bool,
    /// Dirtied bytes by their place among what is sent first, in [`PARTS`] parts; how many of them are in each.
    pub places: [u64; PARTS],
    /// Bytes whose content has to be sent: what exists and is not zero.
    pub content: u64,
    /// Bytes that one observation stands for: a page, or of samples more.
    pub grain: u64,
    /// What a harvest of dirty pages takes; nothing if none was made.
    pub sync: Duration,
    /// Of each vCPU with a dirty ring, bytes per second that it made dirty.
    pub vcpus: Vec<u64>,
}

impl Dirtying {
    /// Bytes per second, of clean memory that becomes dirty.
    pub fn rate(&self) -> u64 {
        // The very first looks are too close to the beginning to be exact.
        self.curve.rate((self.curve.working_set() / 8).max(CHANCE * self.grain))
    }

    /// Of the bytes that are dirtied within `time` of the beginning of a pass over all memory, those that are dirty
    /// again when it ends: what was written before it was sent went along.
    pub fn after_first_pass(&self, time: Duration) -> u64 {
        let all: u64 = self.places.iter().sum();
        let parts = PARTS as u64;
        let mut sum = 0u128;
        for (n, share) in (0..).zip(&self.places) {
            // Sent, on average, when the middle of its part is.
            let left = mul(time, 2 * (parts - n) - 1, 2 * parts);
            sum += u128::from(self.curve.at(left)) * u128::from(*share);
        }
        // Where nobody saw a place there was nothing to see.
        sum.checked_div(u128::from(all)).map_or(0, |bytes| u64::try_from(bytes).unwrap_or(u64::MAX))
    }
}

/// `time` x `n` / `of`.
pub(super) fn mul(time: Duration, n: u64, of: u64) -> Duration {
    let nanos = time.as_nanos().saturating_mul(u128::from(n)) / u128::from(of.max(1));
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

/// Moments at which a window of this length is looked at, ascending.
pub fn looks(window: Duration) -> impl Iterator<Item = Duration> {
    (0..LOOKS).rev().map(move |halvings| window / (1 << halvings))
}

/// The curve of two windows and of the whole period, each point (time, bytes); and whether the windows agree. `grain`: what
/// one observation stands for.
pub fn join(windows: [&[(Duration, u64)]; 2], whole: (Duration, u64), most: u64, grain: u64) -> (Curve, bool) {
    let [first, second] = windows.map(|points| Curve::new(points.to_vec(), most));
    let reach = first.reach().min(second.reach());
    let mut points = vec![whole];
    let mut steady = true;
    for time in looks(reach) {
        let (a, b) = (first.at(time), second.at(time));
        points.push((time, a / 2 + b / 2));
        let (more, difference) = (a.max(b), a.abs_diff(b));
        // Times that are short are much by chance, so only the later half of the looks is held against the guest.
        if time >= reach / 4 && more > CHANCE * grain {
            steady &= u128::from(difference) * 100 <= u128::from(more) * u128::from(STEADY);
        }
    }
    (Curve::new(points, most), steady)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn curve(points: &[(u32, u64)]) -> Curve {
        Curve::new(points.iter().map(|(ms, bytes)| (*ms * MS, *bytes)).collect(), 1000)
    }

    #[test]
    fn a_curve_goes_through_its_points_and_the_origin() {
        let c = curve(&[(20, 200), (10, 100), (40, 200)]);
        assert_eq!([0, 5, 10, 15, 20, 30, 40].map(|ms| c.at(ms * MS)), [0, 50, 100, 150, 200, 200, 200]);
        assert_eq!((c.at(100 * MS), c.working_set(), c.reach(), c.is_flat()), (200, 200, 40 * MS, true));
        let anywhere = curve(&[(5, 39), (10, 63), (20, 86), (40, 98), (80, 100)]);
        assert!(c.goes_round() && anywhere.is_flat() && !anywhere.goes_round());
        assert_eq!(
            [0, 50, 100, 150, 200, 201].map(|bytes| c.time_of(bytes)),
            [0, 5, 10, 15, 20, 40].map(|ms| ms * MS)
        );
        assert_eq!((c.rate(1), c.rate(150), c.rate(5000)), (10_000, 10_000, 5_000));
    }

    #[test]
    fn beyond_its_reach_it_goes_on_as_it_did_but_never_beyond_all_memory() {
        let c = curve(&[(10, 100), (20, 200)]);
        assert!(!c.is_flat());
        assert_eq!((c.at(30 * MS), c.at(10_000 * MS), c.at(Duration::MAX)), (300, 1000, 1000));
        assert_eq!((Curve::default().at(MS), Curve::default().rate(1), Curve::default().is_flat()), (0, 0, true));
        // What shrinks was seen wrongly; what is beyond all memory, too.
        assert_eq!(curve(&[(10, 100), (20, 50), (30, 4000)]).points()[1..], [(20 * MS, 100), (30 * MS, 1000)]);
    }

    #[test]
    fn two_windows_make_a_curve_and_tell_whether_the_guest_is_steady() {
        let window =
            |bytes: u64| looks(32 * MS).map(|t| (t, bytes * u64::try_from(t.as_millis()).unwrap())).collect();
        let (a, b, c): (Vec<_>, Vec<_>, Vec<_>) = (window(10), window(11), window(20));
        let (joined, steady) = join([&a, &b], (64 * MS, 640), 10_000, 1);
        assert!(steady);
        assert_eq!((joined.at(32 * MS), joined.reach(), joined.working_set()), (336, 64 * MS, 640));
        assert!(!join([&a, &c], (64 * MS, 640), 10_000, 1).1);
        assert!(join([&a, &c], (64 * MS, 640), 10_000, 10).1, "so few samples say nothing");
        assert!(join([&[], &[]], (MS, 0), 10, 1).1, "nothing is steady");
        assert_eq!(looks(64 * MS).collect::<Vec<_>>(), [1, 2, 4, 8, 16, 32, 64, 128, 256].map(|n| n * MS / 4));
    }

    #[test]
    fn what_is_written_before_it_is_sent_goes_along() {
        let all = |place: usize| {
            let mut d = Dirtying { curve: curve(&[(1000, 1000)]), ..Dirtying::default() };
            d.places[place] = 1;
            d.after_first_pass(320 * MS)
        };
        assert_eq!((all(0), all(PARTS - 1)), (310, 10), "at the beginning, at the end");
        assert_eq!(Dirtying::default().after_first_pass(MS), 0);
    }
}
