//! Trying a device: what its author promised by registering it, checked before a migration finds out.
//!
//! Everything goes through the same code as a migration; only the stream is made here. The device is put back after each
//! case, which is itself a check: what it was saved as must bring it back from wherever it is.

mod cases;
pub mod faults;
mod failing;
pub mod ops;
mod rig;
pub(super) mod tables;
mod versions;

#[cfg(test)]
mod tests;

use std::ops::Range;
use std::sync::Arc;

use super::device::Device;
use super::list::Entry;
use super::{Part, Section};
use crate::bql::Bql;
use crate::error::{Error, Result};
use crate::sys::random::random;
use crate::wire::output::Put;
use faults::Faults;
use rig::{FRAME, Loaded, Names, Rig, State};

/// Bytes that are saved and loaded for the cases of one test, unless a number of cases is given.
const WORK: u64 = 2 << 30;
/// Cases of one test in which a device of any size is tried.
const CASES_MIN: u64 = 256;

/// A section made for a test, and the table behind it if there is one.
pub struct Subject<'a> {
    /// The same state, through faults.
    pub section: Box<dyn Section + 'a>,
    /// The device whose table describes it.
    pub device: Option<&'a Device>,
    /// What its callbacks get.
    pub at: *mut u8,
}

/// How many bytes of a device's memory may be looked at, from the pointer on that it was registered with.
#[derive(Debug, Default)]
pub struct Memory(usize);

impl Memory {
    /// So many.
    ///
    /// # Safety
    /// They are there, and as long as a plan with this is used nobody uses them but the callbacks of the device.
    #[allow(unsafe_code, reason = "the device's memory is its owner's word")]
    pub unsafe fn new(len: usize) -> Self {
        Self(len)
    }
}

/// What is said while a device is tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Say {
    /// Something is wrong with it.
    Finding,
    /// Something looks wrong, or could not be tried.
    Note,
    /// A test is over.
    Step,
    /// A case begins.
    Case,
}

/// State that an earlier release saved.
#[derive(Clone, Debug)]
pub struct Sample {
    /// Its version.
    pub version: u32,
    /// As [`Plan::saved`] got it.
    pub bytes: Vec<u8>,
}

/// What is called with the device's pointer, and the big lock held.
pub type Reset<'a> = dyn Fn(*mut u8) -> Result<()> + 'a;
/// What takes a state and its version.
pub type Take<'a> = dyn Fn(u32, &[u8]) + 'a;
/// What takes a line.
pub type Hear<'a> = dyn Fn(Say, &str) + 'a;

/// How to try a device.
pub struct Plan<'a> {
    /// Of what is drawn; 0: draw it, too.
    pub seed: u64,
    /// Cases of each test; 0: as many as go into a fixed amount of bytes.
    pub cases: u64,
    /// Two saves of one state may differ.
    pub varies: bool,
    /// Bytes of the device's memory that are looked at.
    pub memory: Memory,
    /// Those of them that are no state.
    pub transient: Vec<Range<usize>>,
    /// What earlier releases saved.
    pub samples: Vec<Sample>,
    /// Makes the device one that was just switched on.
    pub reset: Option<Box<Reset<'a>>>,
    /// Takes the state as it was saved.
    pub saved: Box<Take<'a>>,
    /// Takes what is said.
    pub say: Box<Hear<'a>>,
}

/// Tries the section of `entry`. `EBADMSG`: something is wrong with it. In any case it is put back. \[free\]
pub fn run(entry: &Entry, bql: &Bql, plan: &mut Plan<'_>) -> Result<()> {
    let Some(section) = entry.section() else {
        (plan.say)(Say::Step, &format!("'{}' was declared without state: there is nothing to try", entry.name));
        return Ok(());
    };
    if plan.seed == 0 {
        plan.seed = u64::from_ne_bytes(random()?).max(1);
    }
    let faults = Arc::<Faults>::default();
    let Some(subject) = section.subject(&faults) else {
        let text = "a section of the library itself, which has tests of its own";
        return Err(Error::new(libc::EOPNOTSUPP, text).in_section(&entry.name));
    };
    if !subject.section.is_active() {
        let text = "is_active says that it takes no part in a migration now, so there is nothing to try";
        return Err(Error::invalid(text).in_section(&entry.name));
    }
    if subject.at.is_null() && plan.memory.0 > 0 {
        return Err(Error::invalid("memory is given for a device without a pointer").in_section(&entry.name));
    }
    plan.varies |= subject.device.is_some_and(|device| device.table().varies);
    let rig = Rig::new(entry, subject, faults, plan, bql);
    let memory = rig.memory()?;
    let saved = rig.save().map_err(|e| rig.finding("save", format!("the device cannot be saved: {e}")))?;
    let names = Names::of(&rig, &saved);
    let settled = rig.memory()?;
    let trial = Trial { rig, saved, names, memory, settled };
    let result = trial.all();
    trial.rig.faults.arm(None);
    trial.rig.faults.set_room(None);
    if let Err(error) = &result {
        trial.rig.say(Say::Finding, &error.to_string());
    }
    match (result, trial.put_back()) {
        (Ok(()), back) => back,
        (Err(error), Ok(())) => Err(error),
        (Err(error), Err(back)) => Err(error.hint(format_args!("and it is not what it was: {back}"))),
    }
}

/// A device with what it was at the beginning.
struct Trial<'a> {
    rig: Rig<'a>,
    saved: State,
    names: Names,
    /// Its memory before anything was done.
    memory: Vec<u8>,
    /// The same after it was saved once: `pre_save` may have put something into fields.
    settled: Vec<u8>,
}

/// How a state that was loaded must be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Must {
    Load,
    Refuse,
    /// Refuse it, or go on as if nothing was wrong.
    Either,
}

/// What became of a state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Refused,
    /// It was taken; whether the device then had another state than the one it was put back to.
    Taken {
        differs: bool,
    },
}

impl Trial<'_> {
    fn all(&self) -> Result<()> {
        let plan = self.rig.plan;
        let bytes: usize = self.saved.iter().map(|(_, body)| body.len()).sum();
        let head =
            format!("'{}' instance {}: version {}", self.rig.entry.name, self.rig.entry.instance, self.version());
        self.rig.say(Say::Step, &format!("{head}, {bytes} bytes, seed {}", plan.seed));
        if let [(Part::Full, body)] = self.saved.as_slice() {
            (plan.saved)(self.version(), &body[self.frame()..]);
        }
        self.saves_twice()?;
        self.comes_back()?;
        self.comes_back_from_reset()?;
        self.cuts()?;
        self.flips()?;
        self.versions()?;
        self.parts()?;
        self.samples()?;
        self.fails()
    }

    fn version(&self) -> u32 {
        self.rig.entry.version
    }

    fn frame(&self) -> usize {
        if self.rig.framed() { FRAME } else { 0 }
    }

    /// Saving changes nothing: a migration that is cancelled leaves a guest that goes on.
    fn saves_twice(&self) -> Result<()> {
        const TEST: &str = "save twice";
        self.rig.say(Say::Case, TEST);
        // What `pre_save` puts into fields is a part of saving them.
        if let Some(text) = self.rig.changed(&self.memory, true)? {
            return Err(self.rig.finding(TEST, format!("saving the device changed it: {text}")));
        }
        let again = self.rig.save();
        let again = again.map_err(|e| self.rig.finding(TEST, format!("it cannot be saved a second time: {e}")))?;
        self.same(TEST, &again, "two saves in a row differ")?;
        if let Some(text) = self.rig.changed(&self.settled, self.rig.plan.varies)? {
            return Err(self.rig.finding(TEST, format!("saving the device a second time changed it: {text}")));
        }
        self.rig.say(Say::Step, "save twice: the same bytes");
        Ok(())
    }

    fn same(&self, test: &str, now: &State, text: &str) -> Result<()> {
        if self.rig.plan.varies {
            return Ok(());
        }
        match self.rig.difference(&self.saved, now, &self.names) {
            Some(how) => Err(self.rig.finding(test, format!("{text}: {how}"))),
            None => Ok(()),
        }
    }

    /// What was saved is taken by the device it comes from, and saved again as it was.
    fn comes_back(&self) -> Result<()> {
        const TEST: &str = "save, load, save";
        self.rig.say(Say::Case, TEST);
        self.restore(TEST)?;
        if let Some(text) = self.rig.changed(&self.settled, self.rig.plan.varies)? {
            return Err(self.rig.finding(TEST, format!("loading what it was saved as changed it: {text}")));
        }
        self.rig.say(Say::Step, "save, load, save: the same bytes");
        Ok(())
    }

    /// The same by way of a device that was just switched on: what is not in the stream, or not loaded, is gone then.
    fn comes_back_from_reset(&self) -> Result<()> {
        const TEST: &str = "save, reset, load, save";
        let Some(reset) = &self.rig.plan.reset else { return Ok(()) };
        let reset = || self.rig.with_lock(|| reset(self.rig.subject.at));
        self.rig.say(Say::Case, TEST);
        reset().map_err(|e| self.rig.finding(TEST, format!("reset failed: {e}")))?;
        let fresh = self.rig.save();
        let fresh = fresh.map_err(|e| self.rig.finding(TEST, format!("after reset it cannot be saved: {e}")))?;
        if self.rig.difference(&self.saved, &fresh, &self.names).is_none() && !self.rig.plan.varies {
            let text = "after reset it is saved as before, so state that is forgotten is not missed: \
                        give the device another state before it is tried";
            self.rig.say(Say::Note, text);
        }
        reset().map_err(|e| self.rig.finding(TEST, format!("reset failed the second time: {e}")))?;
        self.restore(TEST)?;
        if let Some(text) = self.rig.changed(&self.settled, self.rig.plan.varies)? {
            let text = format!("loading does not bring back what a reset clears: {text}");
            return Err(self.rig.finding(TEST, text));
        }
        self.rig.say(Say::Step, "save, reset, load, save: the same bytes");
        Ok(())
    }

    /// Back to the beginning by loading what was saved, `after` something.
    fn restore(&self, after: &str) -> Result<()> {
        if let Loaded::No(error, _) = self.rig.load(self.version(), &self.saved)? {
            let text = format!("the device refuses what it was saved as: {error}");
            return Err(self.rig.finding(after, text));
        }
        let now = self.rig.save();
        let now =
            now.map_err(|e| self.rig.finding(after, format!("it cannot be saved after that was loaded: {e}")))?;
        self.same(after, &now, "what was saved was loaded, and is saved otherwise")
    }

    /// Loads `state`, `what` in words, and puts the device back.
    fn case(&self, test: &str, what: &str, version: u32, state: &State, must: Must) -> Result<Outcome> {
        self.rig.say(Say::Case, &format!("{test}: {what}"));
        let finding = |text: String| self.rig.finding(test, format!("{what}: {text}"));
        let outcome = match (self.rig.load(version, state)?, must) {
            (Loaded::No(error, _), Must::Load) => return Err(finding(format!("it is refused: {error}"))),
            (Loaded::Yes, Must::Refuse) => return Err(finding("it is not refused".to_owned())),
            (Loaded::No(error, touched), _) => {
                // A reason that does not say whose it is helps nobody on a machine with a hundred devices.
                if !error.to_string().contains(&self.rig.entry.name) {
                    return Err(finding(format!("the error does not name the device: {error}")));
                }
                if !touched {
                    return Ok(Outcome::Refused);
                }
                Outcome::Refused
            }
            (Loaded::Yes, _) => {
                let got = self.rig.save().map_err(|e| finding(format!("loads, but then it cannot be saved: {e}")))?;
                self.migrates_on(&got).map_err(|e| finding(e.text().to_owned()))?;
                let names = &self.names;
                Outcome::Taken { differs: self.rig.difference(&self.saved, &got, names).is_some() }
            }
        };
        self.restore(test).map_err(|e| finding(format!("afterwards {}", e.text())))?;
        Ok(outcome)
    }

    /// A state that a device takes is one it must be able to leave with.
    fn migrates_on(&self, state: &State) -> Result<()> {
        if let Loaded::No(error, _) = self.rig.load(self.version(), state)? {
            return Err(Error::invalid(format!("loads, but what is then saved is refused: {error}")));
        }
        let again = self.rig.save();
        let again = again.map_err(|e| Error::invalid(format!("loads, but then it cannot be saved twice: {e}")))?;
        match self.rig.difference(state, &again, &self.names) {
            Some(how) if !self.rig.plan.varies => Err(Error::invalid(format!(
                "loads, but what is then saved is not what is saved after a load of that: {how}"
            ))),
            _ => Ok(()),
        }
    }

    /// The device as it was before it was tried.
    fn put_back(&self) -> Result<()> {
        let mut loaded = self.rig.load(self.version(), &self.saved)?;
        if matches!(loaded, Loaded::No(..)) {
            // Whatever it was that does not let it in: with its memory as it was that may be gone.
            self.rig.put_back(&self.memory)?;
            loaded = self.rig.load(self.version(), &self.saved)?;
        }
        self.rig.put_back(&self.memory)?;
        match loaded {
            Loaded::No(error, _) if self.memory.is_empty() => Err(error),
            // All that is known of it is as it was; more than the finding says could only be guessed.
            _ => Ok(()),
        }
    }

    /// A body that `bytes` are the content of.
    fn body(&self, bytes: &[u8]) -> Result<Vec<u8>> {
        let mut body = Vec::new();
        body.try_reserve_exact(bytes.len() + FRAME).map_err(|_| Error::no_memory("a state", bytes.len() as u64))?;
        if self.rig.framed() {
            body.u32(u32::try_from(bytes.len()).map_err(|_| Error::invalid("a state of more than 4 GiB"))?);
        }
        body.extend_from_slice(bytes);
        Ok(body)
    }
}
