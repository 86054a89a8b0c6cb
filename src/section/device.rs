//! A device with a table, as a section.
#![allow(unsafe_code, reason = "device state lives behind the pointers a VMM registered")]

use std::sync::Arc;

use super::codec::{parse_with_fds, save, save_with_fds};
use super::fds::{Inbox, Outbox};
use super::staged::describe;
use super::table::{Checked, Table};
use super::trial::Subject;
use super::trial::faults::Faults;
use super::trial::tables::under_test;
use super::{Apply, Part, Section};
use crate::error::{Error, Result};
use crate::wire::input::Input;
use crate::wire::shape::Shape;

/// State at an address, shaped by a table: one FULL body.
#[derive(Debug)]
pub struct Device {
    table: Checked,
    instance: u32,
    base: Base,
}

#[derive(Clone, Copy, Debug)]
struct Base(*mut u8);

impl Base {
    fn at(self) -> *mut u8 {
        self.0
    }
}

// SAFETY: the address is only followed with the big lock held, which `Device::new` made its caller promise to honour.
unsafe impl Send for Base {}
// SAFETY: as above; without the lock the address is only compared.
unsafe impl Sync for Base {}

impl Device {
    /// The device at `base`. `EINVAL` for a NULL `base` under a table that describes memory there.
    ///
    /// # Safety
    /// As long as the device lives, the memory at `base` has the shape the table describes: `table.extent()` bytes,
    /// and behind each pointer field NULL or room for as many elements as the table allows. Whenever `complete` or an
    /// applied body runs, the big lock is held, and nobody uses that memory without it.
    pub unsafe fn new(table: Checked, instance: u32, base: *mut u8) -> Result<Self> {
        if base.is_null() && table.extent() > 0 {
            return Err(
                Error::invalid("the device pointer is NULL, but its table has fields").in_section(&table.name)
            );
        }
        Ok(Self { table, instance, base: Base(base) })
    }

    /// The device's table.
    pub fn table(&self) -> &Checked {
        &self.table
    }

    /// The same device, as if `table` described it: made from its own, with fields and parts of that only.
    pub(super) fn as_if(&self, table: Table) -> Result<Self> {
        // SAFETY: the caller of `new` vouched for the memory as its table describes it, of which this one describes a part.
        unsafe { Self::new(table.checked()?, self.instance, self.base.0) }
    }

    /// Which of several devices of this name.
    pub fn instance(&self) -> u32 {
        self.instance
    }

    /// The address given at registration; it identifies the device when it is removed.
    pub fn base(&self) -> *mut u8 {
        self.base.0
    }
}

impl Section for Device {
    fn is_early(&self) -> bool {
        self.table.early
    }

    fn complete(&self, out: &mut Vec<u8>) -> Result<()> {
        // SAFETY: the caller of `new` vouched for the memory, and `complete` is called with the big lock held.
        unsafe { save(&self.table, self.base.0, out) }
    }

    /// Tables whose saving runs none of the VMM's code: memory under the big lock is just read.
    fn rehearse(&self, out: &mut Vec<u8>) -> Result<bool> {
        if self.table.has_hooks() || self.table.has_fds() {
            return Ok(false);
        }
        self.complete(out).map(|()| true)
    }

    fn complete_with_fds(&self, out: &mut Vec<u8>, fds: &mut Outbox) -> Result<()> {
        // SAFETY: as in `complete`.
        unsafe { save_with_fds(&self.table, self.base.0, out, fds) }
    }

    fn fd_fields(&self, version: u32) -> Vec<String> {
        self.table.fd_fields(version)
    }

    fn shape(&self, version: u32, peer: Option<&Shape>) -> Shape {
        self.table.shape(version, peer)
    }

    fn fds_to_send(&self) -> Result<Vec<String>> {
        self.table.fds_to_send(self.base.0).map_err(|e| e.in_section(&self.table.name))
    }

    fn saves_again(&self) -> bool {
        !self.table.has_fds() && !self.table.varies
    }

    fn writes_ram(&self) -> bool {
        self.table.writes_ram
    }

    fn parse<'a>(&'a self, part: Part, version: u32, input: &mut dyn Input) -> Result<Apply<'a>> {
        self.parse_with_fds(part, version, input, &Arc::default())
    }

    fn parse_with_fds<'a>(
        &'a self,
        part: Part,
        version: u32,
        input: &mut dyn Input,
        fds: &Arc<Inbox>,
    ) -> Result<Apply<'a>> {
        if part != Part::Full {
            return Err(Error::invalid("a device comes in one piece (FULL), not in START, PART and END")
                .in_section(&self.table.name));
        }
        let staged = parse_with_fds(&self.table, version, input, Some(fds))?;
        let (base, fds) = (self.base, Arc::clone(fds));
        // SAFETY: the caller of `new` vouched for the memory, and what `parse` returns runs with the big lock held;
        // nothing is unregistered while a migration runs.
        Ok(Box::new(move || unsafe { staged.apply_placing(base.at(), &fds) }))
    }

    fn subject(&self, faults: &Arc<Faults>) -> Option<Subject<'_>> {
        let section = self.as_if(under_test(&self.table, faults, 0)).ok()?;
        Some(Subject { section: Box::new(section), device: Some(self), at: self.base.0 })
    }

    fn describe(&self, body: &[u8]) -> serde_json::Value {
        describe(&self.table, body).unwrap_or_else(|_| super::raw_description(body))
    }
}
