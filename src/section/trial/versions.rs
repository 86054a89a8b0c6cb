//! States of other releases: older and newer versions, with and without parts, and what earlier releases really saved.

use super::tables::{as_of, needed, with_parts};
use super::{Must, Part, Say, Trial};
use crate::error::{Error, Result};
use crate::section::Section;
use crate::section::list::Bindings;
use crate::section::table::Table;

/// Old versions of a table that are made and loaded.
const VERSIONS_MAX: u32 = 64;
/// Tail of a part that nobody has.
const NOBODYS: &str = "vmig-unknown";

impl Trial<'_> {
    pub(super) fn versions(&self) -> Result<()> {
        let (newest, oldest) = (self.version(), self.rig.entry.oldest);
        for version in [newest.checked_add(1), Some(u32::MAX), oldest.checked_sub(1), Some(0)].into_iter().flatten() {
            if (oldest..=newest).contains(&version) {
                continue;
            }
            self.refuses_version(version)?;
        }
        let olds = oldest..newest;
        if self.rig.subject.device.is_none() {
            let have = |version: &u32| self.rig.plan.samples.iter().any(|sample| sample.version == *version);
            if let Some(missing) = olds.clone().take(VERSIONS_MAX as usize).find(|version| !have(version)) {
                let text = format!("version {missing} is said to load, which only a sample of it can show");
                self.rig.say(Say::Note, &text);
            }
        }
        let mut tried = 0;
        for version in olds.rev().take(VERSIONS_MAX as usize) {
            tried += u32::from(self.takes_old(version)?);
        }
        let text =
            format!("versions: {oldest} to {newest} are read, {tried} older ones made from the table and loaded");
        self.rig.say(Say::Step, &text);
        Ok(())
    }

    fn refuses_version(&self, version: u32) -> Result<()> {
        const TEST: &str = "version";
        let entry = self.rig.entry;
        let what = format!("version {version}");
        let mut bindings = Bindings::new([entry.clone()].as_slice().into());
        let bound = bindings.bind(1, &entry.name, entry.instance, version).map(drop);
        match bound {
            Err(error) if error.to_string().contains(&entry.name) => {}
            other => return Err(self.rig.finding(TEST, format!("{what} is not refused by name: {other:?}"))),
        }
        self.case(TEST, &what, version, &self.saved, Must::Refuse).map(drop)
    }

    /// The body of the device as `table` describes it.
    fn saved_as(&self, table: Table) -> Result<Option<Vec<u8>>> {
        let Some(device) = self.rig.subject.device else { return Ok(None) };
        let other = device.as_if(table)?;
        let mut body = Vec::new();
        self.rig.with_lock(|| other.complete(&mut body))?;
        Ok(Some(body))
    }

    /// The table with the faults' hooks around: what variants are made from.
    fn table(&self) -> Option<Table> {
        let device = self.rig.subject.device?;
        Some(super::tables::under_test(device.table(), &self.rig.faults, 0))
    }

    fn takes_old(&self, version: u32) -> Result<bool> {
        let Some(table) = self.table() else { return Ok(false) };
        let what = format!("version {version}, made from the fields it had");
        let body = self.saved_as(as_of(&table, version));
        let body = body.map_err(|e| self.rig.finding("old version", format!("{what}: it cannot be saved: {e}")))?;
        let Some(body) = body else { return Ok(false) };
        self.case("old version", &what, version, &vec![(Part::Full, body)], Must::Load)?;
        Ok(true)
    }

    /// Parts absent, present, older, newer, unknown.
    pub(super) fn parts(&self) -> Result<()> {
        let Some(table) = self.table() else { return Ok(()) };
        let parts: Vec<Table> = table.parts.iter().map(|part| Table::clone(part)).collect();
        for (index, part) in parts.iter().enumerate() {
            self.tries_part(&table, &parts, index, part)?;
        }
        if parts.len() > 1 {
            self.loads_as("no part at all", with_parts(&table, []), Must::Load)?;
            self.loads_as("all parts", with_parts(&table, parts.iter().map(needed)), Must::Either)?;
        }
        let stranger = Table::new(format!("{}/{NOBODYS}", table.name), 1);
        self.loads_as(
            "a part that nobody knows",
            with_parts(&table, parts.iter().cloned().chain([stranger])),
            Must::Refuse,
        )?;
        self.rig.say(Say::Step, &format!("parts: {} tried absent, present and in other versions", parts.len()));
        Ok(())
    }

    fn tries_part(&self, table: &Table, parts: &[Table], index: usize, part: &Table) -> Result<()> {
        let name = &part.name;
        let with = |part: Option<Table>| {
            let mut parts = parts.to_vec();
            match part {
                Some(part) => parts[index] = needed(&part),
                None => drop(parts.remove(index)),
            }
            with_parts(table, parts)
        };
        self.loads_as(&format!("without part '{name}'"), with(None), Must::Load)?;
        self.loads_as(&format!("with part '{name}'"), with(Some(part.clone())), Must::Either)?;
        for version in (part.oldest..part.version).rev().take(VERSIONS_MAX as usize) {
            let what = format!("with part '{name}' of version {version}, made from the fields it had");
            self.loads_as(&what, with(Some(as_of(part, version))), Must::Either)?;
        }
        if let Some(version) = part.oldest.checked_sub(1).filter(|version| *version > 0) {
            self.loads_as(
                &format!("with part '{name}' of version {version}"),
                with(Some(as_of(part, version))),
                Must::Refuse,
            )?;
        }
        if let Some(version) = part.version.checked_add(1) {
            let newer = Table { version, ..part.clone() };
            self.loads_as(&format!("with part '{name}' of version {version}"), with(Some(newer)), Must::Refuse)?;
        }
        Ok(())
    }

    /// Saves the device as `table` describes it, and loads that.
    fn loads_as(&self, what: &str, table: Table, must: Must) -> Result<()> {
        match self.saved_as(table) {
            Ok(Some(body)) => self.case("parts", what, self.version(), &vec![(Part::Full, body)], must).map(drop),
            Ok(None) => Ok(()),
            // A part that is not needed may have nothing to be saved from.
            Err(error) => {
                self.rig.say(Say::Note, &format!("parts: {what}: not tried, for it cannot be saved: {error}"));
                Ok(())
            }
        }
    }

    /// What earlier releases saved still loads.
    pub(super) fn samples(&self) -> Result<()> {
        const TEST: &str = "sample";
        let samples = &self.rig.plan.samples;
        if samples.is_empty() {
            return Ok(());
        }
        if self.rig.subject.section.is_iterative() {
            return Err(Error::invalid("samples are single bodies, which an iterative section does not have")
                .in_section(&self.rig.entry.name));
        }
        if self.rig.subject.device.is_some_and(|device| device.table().has_fds()) {
            return Err(Error::invalid("a sample's file descriptors are gone: a device that has some takes none")
                .in_section(&self.rig.entry.name));
        }
        for (index, sample) in samples.iter().enumerate() {
            let what = format!("sample {index}, version {}, {} bytes", sample.version, sample.bytes.len());
            let state = vec![(Part::Full, self.body(&sample.bytes)?)];
            self.case(TEST, &what, sample.version, &state, Must::Load)?;
        }
        self.rig.say(Say::Step, &format!("samples: {} loaded", samples.len()));
        Ok(())
    }
}
