//! What may happen to bytes on their way: cut off, and changed by a bit.

use super::rig::{FRAME, State};
use super::{CASES_MIN, Must, Outcome, Say, Trial, WORK};
use crate::error::Result;

/// Ends in messages.
const RUNS_MAX: usize = 8;

/// Numbers that look drawn by lot, the same for the same seed (splitmix64).
struct Draw(u64);

impl Draw {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % end.max(1)
    }
}

impl Trial<'_> {
    /// Which of `all` points are tried: all of them, or as many as are asked for, the first and the last among them.
    fn points(&self, all: u64) -> Vec<u64> {
        let bytes: u64 = self.saved.iter().map(|(_, body)| body.len() as u64).sum();
        let most = match self.rig.plan.cases {
            // A case that is not refused saves and loads twice.
            0 => (WORK / (4 * bytes).max(1)).max(CASES_MIN),
            cases => cases.max(2),
        };
        if all <= most {
            return (0..all).collect();
        }
        let mut draw = Draw(self.rig.plan.seed);
        let mut points: Vec<u64> = (2..most).map(|_| draw.below(all)).collect();
        points.extend([0, all - 1]);
        points.sort_unstable();
        points.dedup();
        points
    }

    /// Which body point `point` of all bytes is in, and where in it.
    fn find(&self, mut point: u64) -> Option<(usize, usize)> {
        for (index, (_, body)) in self.saved.iter().enumerate() {
            match usize::try_from(point) {
                Ok(at) if at < body.len() => return Some((index, at)),
                _ => point -= body.len() as u64,
            }
        }
        None
    }

    fn tell(&self, test: &str, tried: usize, all: u64, [refused, taken]: [usize; 2]) {
        let text =
            format!("{test}: {tried} of {all} tried: {refused} times refused, {taken} times taken without harm");
        self.rig.say(Say::Step, &text);
    }

    /// A body that ends anywhere: as the stream has it, and where a body has a length, with one that says so.
    pub(super) fn cuts(&self) -> Result<()> {
        const TEST: &str = "truncation";
        let all = self.saved.iter().map(|(_, body)| body.len() as u64).sum();
        let (mut tried, mut outcomes) = (0, [0; 2]);
        let mut state = self.saved.clone();
        for point in self.points(all) {
            let Some((index, at)) = self.find(point) else { continue };
            let what = format!("cut before {}", self.names.place(index, at));
            let mut run = |body: Vec<u8>| -> Result<()> {
                state[index].1 = body;
                let outcome = self.case(TEST, &what, self.version(), &state, Must::Either)?;
                outcomes[usize::from(outcome != Outcome::Refused)] += 1;
                Ok(())
            };
            let body = &self.saved[index].1;
            run(body[..at].to_vec())?;
            if self.rig.framed() && at >= FRAME {
                run(self.body(&body[FRAME..at])?)?;
            }
            state[index].1.clone_from(body);
            tried += 1;
        }
        self.tell(TEST, tried, all, outcomes);
        self.more()
    }

    /// A byte too many.
    fn more(&self) -> Result<()> {
        for (index, (_, body)) in self.saved.iter().enumerate().take(RUNS_MAX) {
            let mut state = self.saved.clone();
            state[index].1 = self.body(&[&body[self.frame()..], &[0]].concat())?;
            let what = format!("a byte of 0 after {} bytes", body.len() - self.frame());
            self.case("too long", &what, self.version(), &state, Must::Either)?;
        }
        Ok(())
    }

    /// Each bit the other way round.
    pub(super) fn flips(&self) -> Result<()> {
        const TEST: &str = "bit flip";
        let bytes: u64 = self.saved.iter().map(|(_, body)| body.len() as u64).sum();
        let points = self.points(bytes * 8);
        let whole = points.len() as u64 == bytes * 8;
        let (mut tried, mut outcomes) = (0, [0; 2]);
        let mut state: State = self.saved.clone();
        // For each byte in turn: somebody noticed that it changed.
        let mut noticed = vec![false; usize::try_from(if whole { bytes } else { 0 }).unwrap_or(0)];
        for point in points {
            let Some((index, at)) = self.find(point / 8) else { continue };
            // A number that is not a descriptor's could be that of a file somebody else has open.
            if self.names.is_fd(at) {
                continue;
            }
            let bit = point % 8;
            let what = format!("bit {bit} of {}", self.names.place(index, at));
            state[index].1[at] ^= 1 << bit;
            let outcome = self.case(TEST, &what, self.version(), &state, Must::Either)?;
            state[index].1[at] ^= 1 << bit;
            outcomes[usize::from(outcome != Outcome::Refused)] += 1;
            tried += 1;
            if outcome != (Outcome::Taken { differs: false })
                && let Some(seen) = usize::try_from(point / 8).ok().and_then(|byte| noticed.get_mut(byte))
            {
                *seen = true;
            }
        }
        self.tell(TEST, tried, bytes * 8, outcomes);
        self.unnoticed(&noticed);
        Ok(())
    }

    /// Bytes that travel, and of which nothing is seen afterwards whatever they are.
    fn unnoticed(&self, noticed: &[bool]) {
        if self.rig.plan.varies {
            return;
        }
        let quiet = |byte: &usize| {
            let place = self.find(*byte as u64);
            !noticed[*byte] && place.is_some_and(|(_, at)| !self.names.is_fd(at) && !self.names.is_unused(at))
        };
        let (mut at, mut runs) = (0, 0);
        while let Some(start) = (at..noticed.len()).find(quiet) {
            let end = (start..noticed.len()).find(|byte| !quiet(byte)).unwrap_or(noticed.len());
            let Some((index, byte)) = self.find(start as u64) else { return };
            let text = format!(
                "{} bytes from {} on can be anything: no flip was refused, or seen in what is saved next",
                end - start,
                self.names.place(index, byte)
            );
            self.rig.say(Say::Note, &text);
            (at, runs) = (end, runs + 1);
            if runs == RUNS_MAX {
                return;
            }
        }
    }
}
