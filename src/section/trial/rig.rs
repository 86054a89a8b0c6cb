//! Saving and loading one device again and again, and looking at what that did to it.
#![allow(unsafe_code, reason = "compares the memory of a device, whose owner says how much it is")]

use std::sync::Arc;

use super::faults::Faults;
use super::tables::Extent;
use super::{Plan, Say, Subject};
use crate::bql::Bql;
use crate::error::{Error, Result};
use crate::section::codec::{Mark, marks};
use crate::section::list::Entry;
use crate::section::memory::{copy_in, copy_out};
use crate::section::{Part, Pending};
use crate::wire::input::{Input, Slice};

/// Most state a device under test may have.
const STATE_MAX: usize = 256 << 20;
/// Bodies of an iterative section.
const BODIES_MAX: usize = 4096;
/// What an iterative section is allowed in one body.
const BUDGET: u64 = 1 << 20;
/// Bytes in front of a body that say how long it is, where there are such.
pub(super) const FRAME: usize = 4;

/// What a device sends: its bodies in order.
pub(super) type State = Vec<(Part, Vec<u8>)>;

/// The device and what it is tried with.
pub(super) struct Rig<'a> {
    pub(super) entry: &'a Entry,
    pub(super) subject: Subject<'a>,
    pub(super) faults: Arc<Faults>,
    pub(super) plan: &'a Plan<'a>,
    bql: &'a Bql,
    extent: Extent,
}

/// How a load ended.
pub(super) enum Loaded {
    Yes,
    /// Refused; `true`: after the device was touched.
    No(Error, bool),
}

impl<'a> Rig<'a> {
    pub(super) fn new(
        entry: &'a Entry,
        subject: Subject<'a>,
        faults: Arc<Faults>,
        plan: &'a Plan<'a>,
        bql: &'a Bql,
    ) -> Self {
        let extent = subject.device.map(|device| Extent::of(device.table())).unwrap_or_default();
        Self { entry, subject, faults, plan, bql, extent }
    }

    /// Whether a body begins with its length.
    pub(super) fn framed(&self) -> bool {
        self.subject.device.is_none()
    }

    /// What is wrong with the device.
    pub(super) fn finding(&self, test: &str, text: impl Into<String>) -> Error {
        Error::new(libc::EBADMSG, text).in_section(&self.entry.name).in_phase(test)
    }

    /// Runs `f` with the big lock held.
    pub(super) fn with_lock<T>(&self, f: impl FnOnce() -> Result<T>) -> Result<T> {
        let _bql = self.bql.guard()?;
        f()
    }

    /// All that the device would send.
    pub(super) fn save(&self) -> Result<State> {
        let section = &self.subject.section;
        {
            let _bql = self.bql.guard()?;
            section.prepare()?;
            if !section.is_iterative() {
                let mut body = Vec::new();
                let saved = section.complete(&mut body);
                section.cleanup();
                return saved.map(|()| vec![(Part::Full, body)]);
            }
        }
        let saved = self.save_in_parts();
        let _bql = self.bql.guard()?;
        section.cleanup();
        saved
    }

    fn save_in_parts(&self) -> Result<State> {
        let section = &self.subject.section;
        let (mut state, mut size) = (State::new(), 0);
        let mut add = |part, body: Vec<u8>| {
            size += body.len();
            // A body of four bytes is an empty one, and that of an iteration is not sent.
            if part != Part::Iterate || body.len() > FRAME {
                state.push((part, body));
            }
            if size <= STATE_MAX && state.len() <= BODIES_MAX {
                return Ok(());
            }
            let text = format!("more than {BODIES_MAX} bodies or {STATE_MAX} bytes: too much to be tested");
            Err(Error::new(libc::EFBIG, text))
        };
        let mut body = Vec::new();
        {
            let _bql = self.bql.guard()?;
            section.setup(&mut body)?;
        }
        add(Part::Start, std::mem::take(&mut body))?;
        for _ in 0..BODIES_MAX {
            if section.pending_exact()? == Pending::default() || !section.is_active_iterate() {
                break;
            }
            let done = section.iterate(&mut body, BUDGET)?;
            add(Part::Iterate, std::mem::take(&mut body))?;
            if done {
                break;
            }
        }
        {
            let _bql = self.bql.guard()?;
            section.complete(&mut body)?;
        }
        add(Part::End, body)?;
        Ok(state)
    }

    /// Loads a state of `version`.
    pub(super) fn load(&self, version: u32, state: &State) -> Result<Loaded> {
        let section = &self.subject.section;
        let _bql = self.bql.guard()?;
        let calls = self.faults.count();
        let mut touched = false;
        let loaded = section.load_setup().and_then(|()| {
            for (part, body) in state {
                let mut input = Slice::new(body);
                let apply = section.parse(*part, version, &mut input)?;
                if !input.rest().is_empty() {
                    let text = format!("{} bytes are left over", input.rest().len());
                    return Err(Error::invalid(text).at_byte(input.position()).in_section(&self.entry.name));
                }
                touched = true;
                apply()?;
            }
            Ok(())
        });
        section.load_cleanup(loaded.is_ok());
        Ok(match loaded {
            Ok(()) => Loaded::Yes,
            Err(error) => Loaded::No(error, touched || self.faults.count() != calls),
        })
    }

    /// The device's memory, if its owner said how much it is.
    pub(super) fn memory(&self) -> Result<Vec<u8>> {
        let _bql = self.bql.guard()?;
        let mut bytes = Vec::new();
        // SAFETY: whoever made the plan's `Memory` vouched for so many bytes at the device's pointer, which with the big
        // lock held nobody else writes.
        unsafe { copy_in(self.subject.at, self.plan.memory.0, &mut bytes) }?;
        Ok(bytes)
    }

    /// Bytes of the device's memory of which it is known that they may change: `values` says whether what travels
    /// counts.
    fn may_change(&self, at: usize, values: bool) -> bool {
        let within = |ranges: &[std::ops::Range<usize>]| ranges.iter().any(|range| range.contains(&at));
        let table = within(&self.extent.pointers) || within(&self.extent.loose);
        within(&self.plan.transient) || table || (values && within(&self.extent.values))
    }

    /// The first byte of the device's memory that changed and should not have; `values` as above.
    pub(super) fn changed(&self, before: &[u8], values: bool) -> Result<Option<String>> {
        let now = self.memory()?;
        let differs = |at: &usize| now[*at] != before[*at] && !self.may_change(*at, values);
        let Some(at) = (0..now.len()).find(differs) else { return Ok(None) };
        let end = (at..now.len()).find(|at| !differs(at)).unwrap_or(now.len());
        let what = match end - at {
            1 => format!("byte {at} of its memory was {:#04x} and is {:#04x}", before[at], now[at]),
            len => format!("{len} bytes of its memory from byte {at} on changed"),
        };
        let travels = self.extent.values.iter().any(|range| range.contains(&at));
        let what = match (travels, self.framed()) {
            (true, _) | (_, true) => what,
            (false, false) => format!("{what}; no field of the table covers it"),
        };
        Ok(Some(what))
    }

    /// Writes bytes of the device's memory that are not what they were.
    pub(super) fn put_back(&self, before: &[u8]) -> Result<()> {
        let now = self.memory()?;
        let _bql = self.bql.guard()?;
        let ours = |at: usize| {
            [&self.plan.transient, &self.extent.pointers].iter().all(|r| r.iter().all(|r| !r.contains(&at)))
        };
        for at in (0..now.len()).filter(|at| now[*at] != before[*at] && ours(*at)) {
            // SAFETY: as in `memory`: within the bytes that are there.
            unsafe { copy_out(&before[at..=at], self.subject.at.wrapping_add(at)) };
        }
        Ok(())
    }

    /// Where two states differ first, and how; `names` are those of the first.
    pub(super) fn difference(&self, a: &State, b: &State, names: &Names) -> Option<String> {
        for (index, ((_, a), (_, b))) in a.iter().zip(b).enumerate() {
            if let Some(at) = (0..a.len().min(b.len())).find(|at| a[*at] != b[*at]) {
                return Some(format!("{} was {:#04x} and is {:#04x}", names.place(index, at), a[at], b[at]));
            }
            if a.len() != b.len() {
                let place = names.place(index, a.len().min(b.len()));
                return Some(format!("{} bytes were saved, and are now {}, from {place} on", a.len(), b.len()));
            }
        }
        (a.len() != b.len()).then(|| format!("it was saved in {} bodies, and is now in {}", a.len(), b.len()))
    }

    pub(super) fn say(&self, what: Say, text: &str) {
        (self.plan.say)(what, text);
    }
}

/// What is where in a saved state.
pub(super) struct Names {
    marks: Vec<Mark>,
    frame: usize,
    bodies: usize,
}

impl Names {
    pub(super) fn of(rig: &Rig<'_>, state: &State) -> Self {
        let marks = match (rig.subject.device, state.first()) {
            (Some(device), Some((_, body))) => marks(device.table(), body).unwrap_or_default(),
            _ => Vec::new(),
        };
        Self { marks, frame: if rig.framed() { FRAME } else { 0 }, bodies: state.len() }
    }

    fn mark(&self, byte: usize) -> Option<&Mark> {
        let after = self.marks.partition_point(|mark| mark.at <= byte as u64);
        after.checked_sub(1).map(|at| &self.marks[at])
    }

    /// Whether it is a file descriptor's, which is not touched.
    pub(super) fn is_fd(&self, byte: usize) -> bool {
        self.mark(byte).is_some_and(|mark| mark.fd)
    }

    pub(super) fn is_unused(&self, byte: usize) -> bool {
        self.mark(byte).is_some_and(|mark| mark.unused)
    }

    /// Byte `byte` of body `index` in words.
    pub(super) fn place(&self, index: usize, byte: usize) -> String {
        let body = if self.bodies > 1 { format!(" of body {index}") } else { String::new() };
        if byte < self.frame {
            return format!("byte {byte} of the length{body}");
        }
        let field = self.mark(byte).map_or_else(String::new, |mark| format!(" (field '{}')", mark.name));
        format!("byte {}{body}{field}", byte - self.frame)
    }
}
