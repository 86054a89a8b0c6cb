//! From the tables of C to our own, believing nothing: NULL, garbage, cycles and sizes end in errors.
#![allow(unsafe_code, reason = "reads tables of C callers")]

use std::ffi::{c_char, c_int, c_void};
use std::sync::Arc;

use super::cdevice::*;
use super::check::{DEPTH_MAX, FIELDS_MAX, NAME_MAX};
use super::device::Device;
use super::list::{Content, Entry};
use super::table::{Checked, Count, Field, Hooks, Kind, Table};
use crate::error::{Error, Result, returned};
use crate::sys::sized::sized_copy;

/// Rows read in search of a table's end before it is taken for missing.
const ROWS_MAX: usize = 4096;
/// Parts read in search of the list's end before it is taken for missing.
const PARTS_MAX: usize = 256;

/// What a device says about itself: nothing is fine by default.
#[derive(Debug)]
pub enum Declared {
    /// It has state, of this shape.
    State(Checked),
    /// It has none (`fields` is NULL).
    Stateless {
        /// Name.
        name: String,
        /// Version.
        version: u32,
        /// Oldest version.
        oldest: u32,
    },
}

impl vmig_device {
    /// Copies and checks the table at `device`, with everything below it, and its priority.
    ///
    /// # Safety
    /// `device` is NULL or leads to a `vmig_device`, as do the pointers in it; strings end with NUL, fields with
    /// VMIG_END, parts with NULL, or go on for as long as the limits here. The callbacks accept the device the table
    /// is registered with, as long as it is registered.
    pub unsafe fn declared(device: *const vmig_device) -> Result<(Declared, i32)> {
        let mut convert = Convert { rows: 0 };
        // SAFETY: the caller vouches for the pointer.
        let c = unsafe { sized_copy(device) }?;
        if c.fields.is_null() {
            return Ok((stateless(&c)?, c.priority));
        }
        if c.needed.is_some() {
            return Err(Error::invalid("needed is for parts; a device is always sent"));
        }
        // SAFETY: the caller vouches for the pointers in the struct.
        let mut table = unsafe { convert.table(&c, 0) }?;
        let unknown = c.flags & !(VMIG_DEVICE_EARLY | VMIG_DEVICE_WRITES_RAM | VMIG_DEVICE_VARIES);
        if unknown != 0 {
            return Err(Error::invalid(format!("unknown flags {unknown:#x}")).in_section(&table.name));
        }
        table.early = c.flags & VMIG_DEVICE_EARLY != 0;
        table.varies = c.flags & VMIG_DEVICE_VARIES != 0;
        table.writes_ram = c.flags & VMIG_DEVICE_WRITES_RAM != 0;
        Ok((Declared::State(table.checked()?), c.priority))
    }
}

impl Entry {
    /// What to register for the device `dev` of the kind `device`: with state or declared without.
    ///
    /// # Safety
    /// As for [`vmig_device::declared`], and for `dev` as for [`Device::new`].
    pub unsafe fn of_device(device: *const vmig_device, instance: u32, dev: *mut c_void) -> Result<Self> {
        // SAFETY: the caller vouches for the table.
        let (declared, priority) = unsafe { vmig_device::declared(device) }?;
        let entry = match declared {
            Declared::State(table) => {
                let (name, version, oldest) = (table.name.clone(), table.version, table.oldest);
                // SAFETY: the caller vouches for `dev`.
                let device = unsafe { Device::new(table, instance, dev.cast()) }?;
                Self { oldest, ..Self::new(name, instance, version, Content::State(Arc::new(device))) }
            }
            Declared::Stateless { name, version, oldest } => {
                Self { oldest, ..Self::new(name, instance, version, Content::None) }
            }
        };
        Ok(Self { priority, key: dev.addr(), ..entry })
    }
}

fn stateless(c: &vmig_device) -> Result<Declared> {
    // SAFETY: the caller of `declared` vouches for the strings.
    let name = unsafe { text("vmig_device.name", c.name) }?;
    let hooks = c.needed.is_some() || c.pre_save.is_some() || c.post_save.is_some();
    let hooks = hooks || c.pre_load.is_some() || c.post_load.is_some() || c.flags != 0;
    if hooks || !c.parts.is_null() {
        return Err(Error::invalid(
            "fields is NULL, which declares a device without state, but there are parts, callbacks or flags; \
             an empty table is { VMIG_END }",
        )
        .in_section(name));
    }
    let oldest = if c.oldest == 0 { c.version } else { c.oldest };
    let table = Table { oldest, ..Table::new(name, c.version) }.checked()?;
    Ok(Declared::Stateless { name: table.name.clone(), version: c.version, oldest })
}

struct Convert {
    rows: usize,
}

impl Convert {
    /// # Safety
    /// As for [`vmig_device::declared`].
    unsafe fn table(&mut self, c: &vmig_device, depth: usize) -> Result<Table> {
        // SAFETY: the caller vouches for the string.
        let name = unsafe { text("vmig_device.name", c.name) }?;
        if depth >= DEPTH_MAX {
            return Err(Error::invalid(format!(
                "tables are nested deeper than {DEPTH_MAX} at '{name}'; does one contain itself?"
            )));
        }
        let mut table = Table::new(name, c.version);
        if c.oldest != 0 {
            table.oldest = c.oldest;
        }
        if c.fields.is_null() {
            return Err(Error::invalid("fields is NULL; an empty table is { VMIG_END }").in_section(&table.name));
        }
        table.hooks = CHooks::of(c, &table.name, depth);
        // SAFETY: the caller vouches for fields and parts.
        unsafe { self.fields(c.fields, &mut table, depth) }.map_err(|e| e.in_section(&table.name))?;
        // SAFETY: as above.
        unsafe { self.parts(c.parts, &mut table, depth) }.map_err(|e| e.in_section(&table.name))?;
        Ok(table)
    }

    /// # Safety
    /// As for [`vmig_device::declared`].
    unsafe fn fields(&mut self, rows: *const vmig_field, table: &mut Table, depth: usize) -> Result<()> {
        let mut since = 1;
        for at in 0..ROWS_MAX {
            // SAFETY: the caller vouches for every row up to the end, which was not seen yet.
            let row = unsafe { rows.wrapping_add(at).read_unaligned() };
            self.rows += 1;
            if self.rows > FIELDS_MAX {
                return Err(Error::invalid(format!("more than {FIELDS_MAX} rows, with all nested tables")));
            }
            match row.kind {
                VMIG_KIND_END => return Ok(()),
                VMIG_KIND_SINCE => since = row.since,
                _ => {
                    // SAFETY: the caller vouches for the strings.
                    let name = unsafe { row_name(&row, at) }?;
                    // SAFETY: the caller vouches for what the row leads to.
                    let field = unsafe { self.field(&row, &name, since, table, depth) };
                    table.fields.push(field.map_err(|e| e.in_field(name))?);
                }
            }
        }
        Err(Error::invalid(format!("no VMIG_END within {ROWS_MAX} rows")))
    }

    /// # Safety
    /// As for [`vmig_device::declared`].
    unsafe fn field(
        &mut self,
        row: &vmig_field,
        name: &str,
        since: u32,
        table: &Table,
        depth: usize,
    ) -> Result<Field> {
        if row.reserved32 != 0 || row.reserved != [0; 2] {
            return Err(Error::invalid("a reserved member is not zero; use the VMIG_... macros"));
        }
        if row.flags & !VMIG_FIELD_POINTER != 0 {
            return Err(Error::invalid(format!("unknown flags {:#x}", row.flags)));
        }
        // SAFETY: the caller vouches for the nested table.
        let kind = unsafe { self.kind(row, depth) }?;
        if row.kind != VMIG_KIND_UNUSED && row.width != kind.memory_size() {
            return Err(
                Error::invalid("the width does not belong to the kind").expected_got(kind.memory_size(), row.width)
            );
        }
        let max = u32::try_from(row.count).map_err(|_| Error::invalid("more than 2^32 - 1 elements"))?;
        let count = if !row.count_field.is_null() {
            // SAFETY: the caller vouches for the string.
            let of = unsafe { text("the name of the field with the number of elements", row.count_field) }?;
            let index = table.fields.iter().position(|f| f.name == of).ok_or_else(|| {
                Error::invalid(format!("the field '{of}' with the number of elements must come earlier in the table"))
            })?;
            Count::Field { index, max }
        } else if max == 1 {
            Count::One
        } else {
            Count::Fixed(max)
        };
        let since = if row.since == 0 { since } else { row.since };
        let pointer = row.flags & VMIG_FIELD_POINTER != 0;
        Ok(Field { name: name.to_owned(), kind, count, since, offset: row.offset, pointer })
    }

    /// # Safety
    /// As for [`vmig_device::declared`].
    unsafe fn kind(&mut self, row: &vmig_field, depth: usize) -> Result<Kind> {
        if row.kind != VMIG_KIND_STRUCT && !row.nested.is_null() {
            return Err(Error::invalid("a nested table is for structs only"));
        }
        Ok(match row.kind {
            VMIG_KIND_U8 => Kind::Unsigned(1),
            VMIG_KIND_U16 => Kind::Unsigned(2),
            VMIG_KIND_U32 => Kind::Unsigned(4),
            VMIG_KIND_U64 => Kind::Unsigned(8),
            VMIG_KIND_I8 => Kind::Signed(1),
            VMIG_KIND_I16 => Kind::Signed(2),
            VMIG_KIND_I32 => Kind::Signed(4),
            VMIG_KIND_I64 => Kind::Signed(8),
            VMIG_KIND_BOOL => Kind::Bool,
            VMIG_KIND_TIMER => Kind::Timer,
            VMIG_KIND_FD => Kind::Fd,
            VMIG_KIND_BYTES => Kind::Bytes(row.width),
            VMIG_KIND_UNUSED => Kind::Unused(row.width),
            VMIG_KIND_STRUCT => {
                // SAFETY: the caller vouches for the nested table.
                let c = unsafe { sized_copy(row.nested) }?;
                if c.needed.is_some() || c.flags != 0 {
                    return Err(Error::invalid("a nested table has neither needed nor flags"));
                }
                // SAFETY: as above.
                Kind::Struct(Arc::new(unsafe { self.table(&c, depth + 1) }?), row.width)
            }
            other => return Err(Error::invalid(format!("unknown kind {other}"))),
        })
    }

    /// # Safety
    /// As for [`vmig_device::declared`].
    unsafe fn parts(&mut self, parts: *const *const vmig_device, table: &mut Table, depth: usize) -> Result<()> {
        if parts.is_null() {
            return Ok(());
        }
        for at in 0..PARTS_MAX {
            // SAFETY: the caller vouches for every entry up to the NULL, which was not seen yet.
            let part = unsafe { parts.wrapping_add(at).read_unaligned() };
            if part.is_null() {
                return Ok(());
            }
            // SAFETY: the caller vouches for the part.
            let c = unsafe { sized_copy(part) }?;
            if c.flags != 0 {
                return Err(Error::invalid("a part has no flags"));
            }
            // SAFETY: as above.
            table.parts.push(Arc::new(unsafe { self.table(&c, depth + 1) }?));
        }
        Err(Error::invalid(format!("no NULL within {PARTS_MAX} parts")))
    }
}

/// # Safety
/// As for [`vmig_device::declared`].
unsafe fn row_name(row: &vmig_field, at: usize) -> Result<String> {
    if row.kind == VMIG_KIND_UNUSED && row.name.is_null() {
        return Ok(format!("unused{at}"));
    }
    // SAFETY: the caller vouches for the string.
    unsafe { text("vmig_field.name", row.name) }
}

/// A copy of the string at `from`, which ends within the limit for names.
///
/// # Safety
/// `from` is NULL or readable up to a NUL, or for 256 bytes.
pub(super) unsafe fn text(what: &str, from: *const c_char) -> Result<String> {
    if from.is_null() {
        return Err(Error::invalid(format!("{what} is NULL")));
    }
    let mut bytes = Vec::new();
    loop {
        // SAFETY: no NUL came before this byte, and it is among the first 256.
        let byte = unsafe { from.cast::<u8>().wrapping_add(bytes.len()).read() };
        if byte == 0 {
            break;
        }
        if bytes.len() == NAME_MAX {
            return Err(Error::invalid(format!("{what} is longer than {NAME_MAX} bytes")));
        }
        bytes.push(byte);
    }
    String::from_utf8(bytes).map_err(|_| Error::invalid(format!("{what} is not UTF-8")))
}

/// The callbacks of a C table.
struct CHooks {
    owner: String,
    needed: Option<unsafe extern "C" fn(*mut c_void) -> c_int>,
    pre_save: Option<unsafe extern "C" fn(*mut c_void) -> c_int>,
    post_save: Option<unsafe extern "C" fn(*mut c_void) -> c_int>,
    pre_load: Option<unsafe extern "C" fn(*mut c_void) -> c_int>,
    post_load: Option<unsafe extern "C" fn(*mut c_void, u32) -> c_int>,
}

impl CHooks {
    fn of(c: &vmig_device, name: &str, depth: usize) -> Option<Arc<dyn Hooks>> {
        let vmig_device { needed, pre_save, post_save, pre_load, post_load, .. } = *c;
        let any = needed.is_some() || pre_save.is_some() || post_save.is_some();
        if !any && pre_load.is_none() && post_load.is_none() {
            return None;
        }
        let owner = format!("{} '{name}'", if depth == 0 { "device" } else { "table" });
        Some(Arc::new(Self { owner, needed, pre_save, post_save, pre_load, post_load }))
    }

    fn call(&self, name: &str, f: Option<unsafe extern "C" fn(*mut c_void) -> c_int>, dev: *mut u8) -> Result<c_int> {
        let Some(f) = f else { return Ok(0) };
        // SAFETY: the caller of `declared` vouched that the callbacks accept the device they were registered with.
        returned(&self.owner, name, unsafe { f(dev.cast()) })
    }
}

impl Hooks for CHooks {
    fn has(&self, callback: &str) -> bool {
        match callback {
            "needed" => self.needed.is_some(),
            "pre_save" => self.pre_save.is_some(),
            "post_save" => self.post_save.is_some(),
            "pre_load" => self.pre_load.is_some(),
            _ => self.post_load.is_some(),
        }
    }

    fn needed(&self, device: *mut u8) -> Result<bool> {
        if self.needed.is_none() {
            return Ok(true);
        }
        self.call("needed", self.needed, device).map(|value| value > 0)
    }

    fn pre_save(&self, device: *mut u8) -> Result<()> {
        self.call("pre_save", self.pre_save, device).map(drop)
    }

    fn post_save(&self, device: *mut u8) -> Result<()> {
        self.call("post_save", self.post_save, device).map(drop)
    }

    fn pre_load(&self, device: *mut u8) -> Result<()> {
        self.call("pre_load", self.pre_load, device).map(drop)
    }

    fn post_load(&self, device: *mut u8, version: u32) -> Result<()> {
        let Some(f) = self.post_load else { return Ok(()) };
        // SAFETY: the caller of `declared` vouched that the callbacks accept the device they were registered with.
        returned(&self.owner, "post_load", unsafe { f(device.cast(), version) }).map(drop)
    }
}
