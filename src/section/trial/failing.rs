//! Each callback fails once, and memory runs out: the device must be as good afterwards as before.

use super::faults::{Call, Faults, Moment, moments};
use super::rig::{FRAME, Loaded};
use super::{Say, Trial};
use crate::error::{Error, Result};

/// Points of a body at which memory runs out.
const ROOMS_MAX: usize = 64;

impl Trial<'_> {
    pub(super) fn fails(&self) -> Result<()> {
        let saves = self.calls_of(|| self.rig.save().map(drop))?;
        let loads = self.calls_of(|| self.rig.load(self.version(), &self.saved).map(drop))?;
        let mut tried = 0;
        for (saving, calls) in [(true, &saves), (false, &loads)] {
            for (at, call) in calls.iter().enumerate() {
                for moment in moments(&call.callback) {
                    self.failing(at, call, *moment, saving)?;
                    tried += 1;
                }
            }
        }
        self.rig.say(Say::Step, &format!("failing callbacks: {tried} tried"));
        self.no_memory()
    }

    fn calls_of(&self, run: impl Fn() -> Result<()>) -> Result<Vec<Call>> {
        self.rig.faults.arm(None);
        run()?;
        let calls = self.rig.faults.made();
        if self.rig.faults.count() > calls.len() {
            let text = format!("more than {} calls: only the first are made to fail", Faults::CALLS_MAX);
            self.rig.say(Say::Note, &text);
        }
        Ok(calls)
    }

    /// Call `at` fails; the error says whose it was, and the device goes on.
    fn failing(&self, at: usize, call: &Call, moment: Moment, saving: bool) -> Result<()> {
        const TEST: &str = "failing callback";
        let when = if moment == Moment::Start { "instead of being called" } else { "after it was called" };
        let what = format!("{} of {} (call {at}) fails {when}", call.callback, call.owner);
        self.rig.say(Say::Case, &format!("{TEST}: {what}"));
        self.rig.faults.arm(Some((at, moment)));
        let result = match saving {
            true => self.rig.save().map(drop),
            false => self.rig.load(self.version(), &self.saved).and_then(|loaded| match loaded {
                Loaded::Yes => Ok(()),
                Loaded::No(error, _) => Err(error),
            }),
        };
        self.rig.faults.arm(None);
        self.failed_well(TEST, &what, result, Some(call))?;
        self.as_before(TEST, &what, saving)
    }

    fn failed_well(&self, test: &str, what: &str, result: Result<()>, call: Option<&Call>) -> Result<()> {
        let text = match result {
            Ok(()) => "nobody notices".to_owned(),
            Err(error) => {
                let said = error.to_string();
                let callback = call.is_none_or(|call| said.contains(&call.callback));
                if said.contains(&self.rig.entry.name) && callback {
                    return Ok(());
                }
                format!("the error does not say so: {said}")
            }
        };
        Err(self.rig.finding(test, format!("{what}: {text}")))
    }

    /// A source goes on with its guest, so it must be as it was; a destination takes the next attempt.
    fn as_before(&self, test: &str, what: &str, saving: bool) -> Result<()> {
        let finding = |text: &str| self.rig.finding(test, format!("{what}: afterwards {text}"));
        if saving {
            let now = self.rig.save().map_err(|e: Error| finding(&format!("it cannot be saved: {e}")))?;
            self.same(test, &now, "it is saved otherwise than before").map_err(|e| finding(e.text()))?;
            let changed = self.rig.changed(&self.settled, self.rig.plan.varies)?;
            if let Some(text) = changed {
                return Err(finding(&format!("it is not what it was: {text}")));
            }
        }
        self.restore(test).map_err(|e| finding(e.text()))
    }

    /// vmig_put fails where a body has become so long: whoever does not look at its result must not mind.
    fn no_memory(&self) -> Result<()> {
        const TEST: &str = "no memory";
        let longest = self.saved.iter().map(|(_, body)| body.len()).max().unwrap_or(0);
        if !self.rig.framed() || longest <= FRAME {
            return Ok(());
        }
        let longest = longest - FRAME;
        let step = longest.div_ceil(ROOMS_MAX);
        for room in (0..longest).step_by(step) {
            let what = format!("vmig_put fails after {room} bytes of a body");
            self.rig.say(Say::Case, &format!("{TEST}: {what}"));
            self.rig.faults.set_room(Some(room as u64));
            let saved = self.rig.save().map(drop);
            self.rig.faults.set_room(None);
            self.failed_well(TEST, &what, saved, None)?;
            self.as_before(TEST, &what, true)?;
        }
        self.rig.say(Say::Step, &format!("no memory: {} tried", longest.div_ceil(step)));
        Ok(())
    }
}
