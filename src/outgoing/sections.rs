//! Saving sections: what is sent when, in which order, and what describes it.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::error::Result;
use crate::section::builtin;
use crate::section::fds::Outbox;
use crate::section::list::Entry;
use crate::section::{Pending, Section};
use crate::wire::frame::Bodies;
use crate::wire::hello::Device;
use crate::wire::stream::{self, SectionName};

/// Ids below this are the library's own; the ids of the list are shifted by it.
pub(super) const FIRST_ID: u32 = 16;
const TIMER_ID: u32 = 0;
const GLOBAL_STATE_ID: u32 = 2;

/// What saving takes, as far as it could be tried.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rehearsal {
    /// Time it took.
    pub took: Duration,
    /// Bytes it gave.
    pub bytes: u64,
    /// Devices that were saved for it.
    pub timed: u32,
    /// Devices that were not: only a stopped guest's can be saved.
    pub untimed: u32,
}

/// The sections of one migration, in walking order.
#[derive(Debug)]
pub(super) struct SectionSaver<'a> {
    entries: &'a Arc<[Entry]>,
    /// Which of them take part: asked once, so that a section does not leave in the middle.
    takes_part: Vec<bool>,
    /// How many `setup` calls were tried: those are the ones to clean up.
    set_up: usize,
    /// Descriptions of what was sent; none are made for a vmig, which has compared the devices and would not read them.
    devices: Option<Vec<Value>>,
    /// Fields that are descriptors: device, instance, path.
    fd_fields: Vec<(String, u32, String)>,
    fds: Outbox,
}

fn name_of(entry: &Entry) -> SectionName {
    SectionName { name: entry.name.clone(), instance: entry.instance, version: entry.version }
}

impl<'a> SectionSaver<'a> {
    pub(super) fn new(entries: &'a Arc<[Entry]>, describe: bool) -> Self {
        Self {
            entries,
            takes_part: vec![false; entries.len()],
            set_up: 0,
            devices: describe.then(Vec::new),
            fd_fields: Vec::new(),
            fds: Outbox::default(),
        }
    }

    /// Asks every section whether it takes part and is ready: the first refusal is the migration's. \[bql\]
    pub(super) fn prepare(&mut self) -> Result<()> {
        for (entry, takes_part) in self.entries.iter().zip(&mut self.takes_part) {
            if let Some(section) = entry.section()
                && section.is_active()
            {
                *takes_part = true;
                section.prepare().map_err(|e| e.in_section(&entry.name))?;
                let fields = section.fds_to_send()?.into_iter();
                self.fd_fields.extend(fields.map(|field| (entry.name.clone(), entry.instance, field)));
            }
        }
        Ok(())
    }

    /// Sections that take part.
    fn active(&self) -> impl Iterator<Item = (&'a Entry, &'a dyn Section)> {
        let sections = self.entries.iter().zip(&self.takes_part).filter(|(_, takes_part)| **takes_part);
        sections.filter_map(|(entry, _)| Some((entry, entry.section()?.as_ref())))
    }

    /// What the destination must know.
    pub(super) fn devices(&self) -> Vec<Device> {
        let device = |(entry, section): (&Entry, &dyn Section)| Device {
            name: name_of(entry),
            fds: section.fd_fields(entry.version),
            shape: Arc::new(section.shape(entry.version, None)),
        };
        self.active().map(device).collect()
    }

    /// Saves what can be saved while the guest runs without an effect on it, only to see what it takes. \[bql\]
    pub(super) fn rehearse(&self) -> Result<Rehearsal> {
        let mut seen = Rehearsal::default();
        for (entry, section) in self.active() {
            let (begin, mut bytes) = (Instant::now(), Vec::new());
            match section.rehearse(&mut bytes).map_err(|e| e.in_section(&entry.name))? {
                true => {
                    seen.timed += 1;
                    seen.took += begin.elapsed();
                    seen.bytes += bytes.len() as u64;
                }
                false => seen.untimed += 1,
            }
        }
        Ok(seen)
    }

    /// Fields that are file descriptors, by device and instance, as `prepare` found them.
    pub(super) fn fd_fields(&self) -> &[(String, u32, String)] {
        &self.fd_fields
    }

    /// The descriptors of bodies that were written since the last call.
    pub(super) fn take_fds(&mut self) -> Vec<OwnedFd> {
        self.fds.take()
    }

    /// START of iterative sections, FULL of early ones. \[bql\]
    pub(super) fn setup(&mut self, out: &mut Bodies) -> Result<()> {
        for (index, entry) in self.entries.iter().enumerate() {
            let Some(section) = entry.section().filter(|_| self.takes_part[index]) else { continue };
            let id = FIRST_ID + entry.id;
            if section.is_iterative() {
                self.set_up = index + 1;
                out.begin();
                stream::put_start(&mut out.bytes, id, &name_of(entry))?;
                section.setup(&mut out.bytes).map_err(|e| e.in_section(&entry.name))?;
                stream::put_footer(&mut out.bytes, id);
            } else if section.is_early() {
                self.full(out, entry, section.as_ref())?;
            }
        }
        Ok(())
    }

    /// FULL of one section.
    fn full(&mut self, out: &mut Bodies, entry: &Entry, section: &dyn Section) -> Result<()> {
        let id = FIRST_ID + entry.id;
        out.begin();
        let out = &mut out.bytes;
        stream::put_full(out, id, &name_of(entry))?;
        let start = out.len();
        section.complete_with_fds(out, &mut self.fds).map_err(|e| e.in_section(&entry.name))?;
        let end = out.len();
        stream::put_footer(out, id);
        self.describe(&entry.name, entry.instance, || section.describe(&out[start..end]));
        Ok(())
    }

    fn describe(&mut self, name: &str, instance: u32, description: impl FnOnce() -> Value) {
        if let Some(devices) = &mut self.devices {
            let mut description = description();
            description["name"] = name.into();
            description["instance_id"] = instance.into();
            devices.push(description);
        }
    }

    /// One PART of every section that wants one. True: nothing left for now.
    pub(super) fn iterate(&self, out: &mut Bodies, budget: u64) -> Result<bool> {
        let mut done = true;
        for (entry, section) in self.active().filter(|(_, s)| s.is_iterative() && s.is_active_iterate()) {
            let left = budget.saturating_sub(out.bytes.len() as u64);
            if left == 0 {
                return Ok(false);
            }
            let id = FIRST_ID + entry.id;
            out.begin();
            let out = &mut out.bytes;
            let start = out.len();
            stream::put_part(out, id);
            let body = out.len();
            done &= section.iterate(out, left).map_err(|e| e.in_section(&entry.name))?;
            match out.len() == body {
                true => out.truncate(start),
                false => stream::put_footer(out, id),
            }
        }
        Ok(done)
    }

    /// What the iterative sections have left, cheaply.
    pub(super) fn pending_estimate(&self) -> Result<Pending> {
        self.sum(|section| section.pending_estimate())
    }

    /// What the iterative sections have left, exactly.
    pub(super) fn pending_exact(&self) -> Result<Pending> {
        self.sum(|section| section.pending_exact())
    }

    fn sum(&self, pending: impl Fn(&dyn Section) -> Result<Pending>) -> Result<Pending> {
        let mut sum = Pending::default();
        for (entry, section) in self.active().filter(|(_, s)| s.is_iterative()) {
            let pending = pending(section).map_err(|e| e.in_section(&entry.name))?;
            sum.must_precopy = sum.must_precopy.saturating_add(pending.must_precopy);
            sum.can_postcopy = sum.can_postcopy.saturating_add(pending.can_postcopy);
        }
        Ok(sum)
    }

    /// Whether any section must be asked while the guest runs.
    pub(super) fn are_iterative(&self) -> bool {
        self.active().any(|(_, section)| section.is_iterative())
    }

    /// The guest is about to be stopped.
    pub(super) fn about_to_switch(&self) {
        self.active().for_each(|(_, section)| section.about_to_switch());
    }

    /// Everything that is saved with the guest stopped: END of iterative sections, FULL of devices. \[bql\]
    pub(super) fn complete(&mut self, out: &mut Bodies, clock_ns: u64) -> Result<()> {
        for (entry, section) in self.active().filter(|(_, s)| s.is_iterative()) {
            let id = FIRST_ID + entry.id;
            out.begin();
            let out = &mut out.bytes;
            stream::put_end(out, id);
            section.complete(out).map_err(|e| e.in_section(&entry.name))?;
            stream::put_footer(out, id);
        }
        self.builtin(out, TIMER_ID, builtin::TIMER, builtin::describe_timer, |out| {
            builtin::put_timer(out, clock_ns);
        })?;
        let devices: Vec<_> = self.active().filter(|(_, s)| !s.is_iterative() && !s.is_early()).collect();
        for (entry, section) in devices {
            self.full(out, entry, section)?;
        }
        Ok(())
    }

    /// Whether the guest runs: the last section.
    pub(super) fn global_state(&mut self, out: &mut Bodies, runs: bool) -> Result<()> {
        self.builtin(out, GLOBAL_STATE_ID, builtin::GLOBAL_STATE, builtin::describe_global_state, |out| {
            builtin::put_global_state(out, runs);
        })
    }

    fn builtin(
        &mut self,
        out: &mut Bodies,
        id: u32,
        (name, version): (&str, u32),
        description: fn() -> Value,
        body: impl FnOnce(&mut Vec<u8>),
    ) -> Result<()> {
        out.begin();
        let out = &mut out.bytes;
        stream::put_full(out, id, &SectionName { name: name.to_owned(), instance: 0, version })?;
        body(out);
        stream::put_footer(out, id);
        self.describe(name, 0, description);
        Ok(())
    }

    /// The JSON that describes the stream. For a vmig it is empty but for its last byte, which is the handover.
    pub(super) fn description(&mut self, machine: &str) -> Vec<u8> {
        let Some(devices) = self.devices.take() else { return b"{}".to_vec() };
        let configuration = json!({"vmsd_name": "configuration", "version": 1, "fields": [
            {"name": "len", "type": "uint32", "size": 4},
            {"name": "name", "type": "buffer", "size": machine.len()},
        ]});
        let json = json!({
            "configuration": configuration,
            "page_size": crate::ram::PAGE,
            "devices": devices,
            "vmig": {"library": env!("CARGO_PKG_VERSION")},
        });
        json.to_string().into_bytes()
    }

    /// What undoes every setup that was tried, once; none: there was no setup. \[bql\]
    pub(super) fn cleanup(&mut self) -> Option<impl FnOnce() + Send + use<>> {
        let tried = std::mem::take(&mut self.set_up);
        let (entries, takes_part) = (Arc::clone(self.entries), self.takes_part.clone());
        (tried > 0).then_some(move || {
            let sections = entries.iter().zip(takes_part).take(tried).filter(|(_, takes_part)| *takes_part);
            let sections = sections.filter_map(|(entry, _)| entry.section()).filter(|section| section.is_iterative());
            sections.for_each(|section| section.cleanup());
        })
    }
}
