//! A body that was taken from a stream and checked: applied to the device, or described.
#![allow(unsafe_code, reason = "device state lives behind the pointers a VMM registered")]

use std::collections::VecDeque;
use std::os::fd::OwnedFd;

use serde_json::{Map, Value, json};

use super::codec::{Path, parse, place, swap};
use super::fds::Inbox;
use super::memory::copy_out;
use super::table::{Checked, Count, Field, Kind, Table};
use crate::error::{Error, Result};
use crate::wire::input::Slice;

/// Most objects of one device's description; a body with more is described as a whole.
pub const OBJECTS_MAX: usize = 65536;

/// A body that kept every rule of its table and waits to be applied.
#[derive(Debug)]
pub struct Staged<'t> {
    pub(super) table: &'t Table,
    pub(super) version: u32,
    /// The fields back to back, in wire order, without unused space and without headers of parts.
    pub(super) bytes: Vec<u8>,
    /// What the bytes alone do not say, in the order of the walk: the size of each variable array; after the fields
    /// of a table that can have parts how many came, then each one's index and version in front of its own entries.
    pub(super) script: Vec<u32>,
    /// The descriptors of the fields that are some, in the order of the walk.
    pub(super) fds: VecDeque<Option<OwnedFd>>,
}

impl Staged<'_> {
    /// Writes the body to the device at `base`, with the device's hooks around it. \[bql\]
    ///
    /// # Safety
    /// The memory at `base` has the shape the table describes, once `pre_load` ran (pointers included: each is NULL
    /// or leads to room for as many elements as the table allows), and nobody else uses it during the call.
    pub unsafe fn apply(self, base: *mut u8) -> Result<()> {
        // SAFETY: the caller vouches for the memory at `base`; a body parsed without descriptors places none.
        unsafe { self.apply_placing(base, &Inbox::default()) }
    }

    /// The same, and `inbox` keeps the descriptors that were put into members, until the migration's end. \[bql\]
    ///
    /// # Safety
    /// As for [`apply`](Self::apply); the device stays registered until the migration has ended.
    pub unsafe fn apply_placing(mut self, base: *mut u8, inbox: &Inbox) -> Result<()> {
        let (script, fds) = (Script(self.script.iter()), &mut self.fds);
        let mut apply = Apply { bytes: &mut self.bytes, script, fds, inbox, path: Path::default() };
        // SAFETY: the caller vouches for the memory at `base`.
        unsafe { apply.table(self.table, self.version, base) }.map_err(|e| e.in_section(&self.table.name))
    }

    /// Keys `vmsd_name`, `version`, `fields` and, if any were sent, `subsections`. `E2BIG`: more than [`OBJECTS_MAX`].
    pub fn describe(&self) -> Result<Value> {
        let mut describe = Describe { script: Script(self.script.iter()), objects: 0 };
        Ok(describe.table(self.table, self.version)?.0)
    }
}

/// The JSON description of `body`, which was saved with the same table.
pub fn describe(table: &Checked, body: &[u8]) -> Result<Value> {
    parse(table, table.version, &mut Slice::new(body))?.describe()
}

struct Script<'s>(std::slice::Iter<'s, u32>);

impl Script<'_> {
    fn next(&mut self) -> Result<u32> {
        self.0.next().copied().ok_or_else(|| Error::new(libc::EIO, "a staged body does not match its table"))
    }

    fn elements(&mut self, field: &Field) -> Result<u32> {
        match field.count {
            // The upper bound was checked; to take it again costs nothing and memory safety hangs on it.
            Count::Field { max, .. } => Ok(self.next()?.min(max)),
            _ => Ok(field.count.max()),
        }
    }

    fn parts(&mut self, table: &Table) -> Result<u32> {
        if table.parts.is_empty() { Ok(0) } else { self.next() }
    }

    fn part<'t>(&mut self, table: &'t Table) -> Result<(&'t Table, u32)> {
        let index = self.next()? as usize;
        let part = table.parts.get(index);
        let part = part.ok_or_else(|| Error::new(libc::EIO, "a staged body does not match its table"))?;
        Ok((part, self.next()?))
    }
}

struct Apply<'s, 't> {
    bytes: &'s mut [u8],
    script: Script<'s>,
    fds: &'s mut VecDeque<Option<OwnedFd>>,
    inbox: &'s Inbox,
    path: Path<'t>,
}

impl<'t> Apply<'_, 't> {
    /// # Safety
    /// `base` is as for [`Staged::apply`].
    unsafe fn table(&mut self, table: &'t Table, version: u32, base: *mut u8) -> Result<()> {
        if let Some(hooks) = &table.hooks {
            hooks.pre_load(base)?;
        }
        for field in table.fields.iter().filter(|field| field.since <= version) {
            let count = self.script.elements(field)?;
            // SAFETY: the caller vouches for the memory at `base`.
            unsafe { self.field(field, base, count) }?;
        }
        for _ in 0..self.script.parts(table)? {
            let (part, version) = self.script.part(table)?;
            // SAFETY: the caller vouches for the memory at `base`; a part describes the same memory.
            unsafe { self.table(part, version, base) }.map_err(|e| e.in_section(&part.name))?;
        }
        match &table.hooks {
            Some(hooks) => hooks.post_load(base, version),
            None => Ok(()),
        }
    }

    /// # Safety
    /// `base` is as for [`Staged::apply`], and `count` is at most what the table allows.
    unsafe fn field(&mut self, field: &'t Field, base: *mut u8, count: u32) -> Result<()> {
        if matches!(field.kind, Kind::Unused(_)) {
            return Ok(());
        }
        // SAFETY: the caller vouches for the memory at `base`.
        let at = unsafe { place(field, base, count) }.map_err(|e| self.path.blame(e, field))?;
        if let Kind::Struct(inner, stride) = &field.kind {
            for element in 0..count {
                self.path.enter(field, element);
                // SAFETY: there is room for as many elements as the table allows, back to back.
                unsafe { self.table(inner, inner.version, at.wrapping_add(element as usize * stride)) }?;
                self.path.leave();
            }
            return Ok(());
        }
        let element = field.kind.wire_size().unwrap_or(0);
        let len = count as usize * element;
        let bytes = std::mem::take(&mut self.bytes);
        let Some((bytes, rest)) = bytes.split_at_mut_checked(len) else {
            return Err(Error::new(libc::EIO, "a staged body does not match its table"));
        };
        self.bytes = rest;
        if matches!(field.kind, Kind::Fd) {
            for index in 0..count as usize {
                let fd = self.fds.pop_front().flatten();
                // SAFETY: an int of the device, which has room for as many as allowed and stays registered.
                unsafe { self.inbox.place(fd, at.wrapping_add(index * field.kind.memory_size())) };
            }
            return Ok(());
        }
        swap(&field.kind, bytes);
        // SAFETY: a checked table's offsets lie within the device, and it has room for as many elements as allowed.
        unsafe { copy_out(bytes, at) };
        Ok(())
    }
}

struct Describe<'s> {
    script: Script<'s>,
    objects: usize,
}

impl Describe<'_> {
    /// The object of a table, and how many bytes it has on the wire.
    fn table(&mut self, table: &Table, version: u32) -> Result<(Value, u64)> {
        self.objects += 1 + table.fields.len();
        if self.objects > OBJECTS_MAX {
            return Err(Error::new(libc::E2BIG, format!("a description of more than {OBJECTS_MAX} objects")));
        }
        let (mut fields, mut size) = (Vec::new(), 0);
        for field in table.fields.iter().filter(|field| field.since <= version) {
            let count = self.script.elements(field)?;
            size += self.field(field, count, &mut fields)?;
        }
        let mut parts = Vec::new();
        for _ in 0..self.script.parts(table)? {
            let (part, version) = self.script.part(table)?;
            let (value, below) = self.table(part, version)?;
            parts.push(value);
            size += 6 + part.name.len() as u64 + below;
        }
        let mut object = Map::new();
        object.insert("vmsd_name".into(), table.name.as_str().into());
        object.insert("version".into(), version.into());
        object.insert("fields".into(), fields.into());
        if !parts.is_empty() {
            object.insert("subsections".into(), parts.into());
        }
        Ok((object.into(), size))
    }

    fn field(&mut self, field: &Field, count: u32, out: &mut Vec<Value>) -> Result<u64> {
        let Kind::Struct(inner, _) = &field.kind else {
            let element = field.kind.wire_size().unwrap_or(0) as u64;
            let all = element * u64::from(count);
            let mut object = json!({"name": field.name, "type": type_name(&field.kind), "size": element});
            if matches!(field.kind, Kind::Bytes(1)) {
                object["size"] = all.into();
            } else if !matches!(field.count, Count::One) {
                object["array_len"] = count.into();
            }
            out.push(object);
            return Ok(all);
        };
        let object =
            |value: Value, size: u64| json!({"name": field.name, "type": "struct", "size": size, "struct": value});
        let mut total = 0;
        if matches!(field.count, Count::One) || !uniform(inner) {
            for element in 0..count {
                let (value, size) = self.table(inner, inner.version)?;
                let mut object = object(value, size);
                if !matches!(field.count, Count::One) {
                    object["index"] = element.into();
                }
                out.push(object);
                total += size;
            }
        } else {
            // Elements of one shape take nothing from the script, so one description does for all of them.
            let (value, size) = self.table(inner, inner.version)?;
            let mut object = object(value, size);
            object["array_len"] = count.into();
            out.push(object);
            total = size * u64::from(count);
        }
        Ok(total)
    }
}

/// Whether all elements of `table` look the same on the wire.
fn uniform(table: &Table) -> bool {
    let fixed = |field: &Field| match &field.kind {
        Kind::Struct(inner, _) => uniform(inner),
        _ => true,
    };
    table.parts.is_empty() && table.fields.iter().all(|f| fixed(f) && !matches!(f.count, Count::Field { .. }))
}

fn type_name(kind: &Kind) -> String {
    match kind {
        Kind::Unsigned(n) => format!("uint{}", n * 8),
        Kind::Signed(n) => format!("int{}", n * 8),
        Kind::Bool => "bool".into(),
        Kind::Bytes(_) => "buffer".into(),
        Kind::Timer => "timer".into(),
        Kind::Fd => "fd".into(),
        Kind::Struct(..) => "struct".into(),
        Kind::Unused(_) => "unused_buffer".into(),
    }
}
