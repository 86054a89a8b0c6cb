//! Device tables: the shape of a device's state, declared once and used to save, load, describe and compare.
//!
//! Offsets are relative to the device's base address. [`Table::checked`] turns a table into a [`Checked`] one, so the
//! code that walks it need not doubt it.

use std::sync::Arc;

use crate::error::Result;

/// Encoding of one element. All integers are big-endian on the wire, native in memory.
#[derive(Clone, Debug)]
pub enum Kind {
    /// Unsigned integer of 1, 2, 4 or 8 bytes.
    Unsigned(usize),
    /// Signed integer of 1, 2, 4 or 8 bytes.
    Signed(usize),
    /// One byte, 0 or 1.
    Bool,
    /// This many raw bytes.
    Bytes(usize),
    /// Expiry in nanoseconds of the virtual clock, 8 bytes; all ones: not armed.
    Timer,
    /// A file descriptor: 4 bytes on the wire that say which of those that travel beside the stream; an int in memory,
    /// -1 for none.
    Fd,
    /// Another table's fields (and its parts), in line; the number is the size of one element in memory. Nothing on
    /// the wire names the inner version, so it is always read at the version the inner table has.
    Struct(Arc<Table>, usize),
    /// This many bytes, zero when written, ignored when read; nothing in memory.
    Unused(usize),
}

/// How many elements a field has.
#[derive(Clone, Debug)]
pub enum Count {
    /// One.
    One,
    /// A fixed number.
    Fixed(u32),
    /// As many as an unsigned or signed integer field of the *same* table says; at most `max`.
    /// That field comes earlier in the table, so the reader knows the count before the elements.
    Field {
        /// Index of the count's field in `Table::fields`.
        index: usize,
        /// Room in memory, in elements.
        max: u32,
    },
}

/// One row of a table.
#[derive(Clone, Debug)]
pub struct Field {
    /// Name in descriptions and errors.
    pub name: String,
    /// Encoding of one element.
    pub kind: Kind,
    /// Number of elements, back to back.
    pub count: Count,
    /// First version of the table that has the field.
    pub since: u32,
    /// Where it is, relative to the base.
    pub offset: usize,
    /// The memory at `offset` holds a pointer to the elements instead of the elements.
    pub pointer: bool,
}

/// What a device does around saving and loading. Called with the big lock held.
pub trait Hooks: Send + Sync {
    /// Whether the device has code for this callback, by its name here.
    fn has(&self, _callback: &str) -> bool {
        true
    }
    /// Of a part: send it? Without the hook a part is always sent.
    fn needed(&self, _device: *mut u8) -> Result<bool> {
        Ok(true)
    }
    /// Before the fields are read.
    fn pre_save(&self, _device: *mut u8) -> Result<()> {
        Ok(())
    }
    /// After the fields and parts were read; also called when saving failed after `pre_save` succeeded.
    fn post_save(&self, _device: *mut u8) -> Result<()> {
        Ok(())
    }
    /// Before the fields are written.
    fn pre_load(&self, _device: *mut u8) -> Result<()> {
        Ok(())
    }
    /// After the fields (and parts) were written.
    fn post_load(&self, _device: *mut u8, _version: u32) -> Result<()> {
        Ok(())
    }
}

/// The shape of a device's state.
#[derive(Clone)]
pub struct Table {
    /// Name of the section, or `parent/tail` of a part (subsection).
    pub name: String,
    /// Version written.
    pub version: u32,
    /// Oldest version read.
    pub oldest: u32,
    /// Fields in stream order.
    pub fields: Vec<Field>,
    /// Optional parts, sent after the fields when `needed`.
    pub parts: Vec<Arc<Table>>,
    /// The device's own code, if any.
    pub hooks: Option<Arc<dyn Hooks>>,
    /// FULL section that goes out in the setup walk.
    pub early: bool,
    /// Loading it writes guest RAM.
    pub writes_ram: bool,
    /// Saved again where it was loaded it may have other bytes.
    pub varies: bool,
}

impl Table {
    /// An empty table that reads and writes one version.
    pub fn new(name: impl Into<String>, version: u32) -> Self {
        Self {
            name: name.into(),
            version,
            oldest: version,
            fields: Vec::new(),
            parts: Vec::new(),
            hooks: None,
            early: false,
            writes_ram: false,
            varies: false,
        }
    }

    /// Adds a single element that every version has, in place.
    pub fn with(mut self, name: impl Into<String>, kind: Kind, offset: usize) -> Self {
        self.fields.push(Field::new(name, kind, offset));
        self
    }

    /// Fields of a body of `version` that are file descriptors, by their paths; parts are not looked into.
    pub fn fd_fields(&self, version: u32) -> Vec<String> {
        let mut found = Vec::new();
        for field in self.fields.iter().filter(|field| field.since <= version) {
            match &field.kind {
                Kind::Fd => found.push(field.name.clone()),
                Kind::Struct(inner, _) => {
                    found.extend(inner.fd_fields(inner.version).iter().map(|name| format!("{}.{name}", field.name)));
                }
                _ => (),
            }
        }
        found
    }

    /// Whether it or anything below it has a field that is a file descriptor.
    pub fn has_fds(&self) -> bool {
        let field = |field: &Field| match &field.kind {
            Kind::Fd => true,
            Kind::Struct(inner, _) => inner.has_fds(),
            _ => false,
        };
        self.fields.iter().any(field) || self.parts.iter().any(|part| part.has_fds())
    }

    /// Whether it or anything below it has code of the VMM's.
    pub fn has_hooks(&self) -> bool {
        let field = |field: &Field| matches!(&field.kind, Kind::Struct(inner, _) if inner.has_hooks());
        self.hooks.is_some() || self.fields.iter().any(field) || self.parts.iter().any(|part| part.has_hooks())
    }

    /// Fields that are file descriptors in a body saved now: those of parts too, if they are needed. \[bql\]
    pub fn fds_to_send(&self, device: *mut u8) -> Result<Vec<String>> {
        let mut found = self.fd_fields(self.version);
        let nested = self.fields.iter().filter_map(|field| match &field.kind {
            Kind::Struct(inner, _) => Some((field, inner)),
            _ => None,
        });
        // Whether a part of an element is needed is not asked: it would take a walk over the elements.
        for (field, inner) in nested.filter(|(_, inner)| inner.parts.iter().any(|part| part.has_fds())) {
            found.push(format!("{} (a part of '{}')", field.name, inner.name));
        }
        for part in self.parts.iter().filter(|part| part.has_fds()) {
            if part.hooks.as_ref().map_or(Ok(true), |hooks| hooks.needed(device))? {
                found.extend(part.fds_to_send(device)?.iter().map(|name| format!("{}:{name}", part.name)));
            }
        }
        Ok(found)
    }
}

impl Field {
    /// A single element that every version has, in place.
    pub fn new(name: impl Into<String>, kind: Kind, offset: usize) -> Self {
        Self { name: name.into(), kind, count: Count::One, since: 1, offset, pointer: false }
    }
}

impl Kind {
    /// Size of one element in memory.
    pub fn memory_size(&self) -> usize {
        match self {
            Kind::Unsigned(n) | Kind::Signed(n) | Kind::Bytes(n) | Kind::Struct(_, n) => *n,
            Kind::Bool => 1,
            Kind::Fd => size_of::<std::ffi::c_int>(),
            Kind::Timer => 8,
            Kind::Unused(_) => 0,
        }
    }

    /// Bytes of one element on the wire; none for structs, whose size depends on what is in them.
    pub fn wire_size(&self) -> Option<usize> {
        match self {
            Kind::Struct(..) => None,
            Kind::Unused(n) => Some(*n),
            Kind::Fd => Some(4),
            other => Some(other.memory_size()),
        }
    }

    /// Width of the integers whose bytes change places between memory and wire.
    pub(crate) fn swap_width(&self) -> usize {
        match self {
            Kind::Unsigned(n) | Kind::Signed(n) => *n,
            Kind::Timer => 8,
            _ => 1,
        }
    }
}

impl Count {
    /// The most elements there can be.
    pub fn max(&self) -> u32 {
        match self {
            Count::One => 1,
            Count::Fixed(n) => *n,
            Count::Field { max, .. } => *max,
        }
    }
}

/// A table that kept every rule of [`Table::checked`], as did all tables below it. It cannot change any more.
#[derive(Clone, Debug)]
pub struct Checked(pub(super) Arc<Table>);

impl std::ops::Deref for Checked {
    type Target = Table;

    fn deref(&self) -> &Table {
        &self.0
    }
}

impl std::fmt::Debug for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Table").field("name", &self.name).field("version", &self.version).finish_non_exhaustive()
    }
}
