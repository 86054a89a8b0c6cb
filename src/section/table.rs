//! Device tables: the shape of a device's state, declared once and used to save, load, describe and compare.
//!
//! Offsets are relative to the device's base address. A table is checked when it is built, so the code that walks it
//! need not doubt it.

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
    /// Another table's fields (and its parts), in line; `stride` is the size of one element in memory.
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
    /// Of a part: send it? Without the hook a part is always sent.
    fn needed(&self, _device: *mut u8) -> bool {
        true
    }
    /// Before the fields are read.
    fn pre_save(&self, _device: *mut u8) -> Result<()> {
        Ok(())
    }
    /// After the fields were read; also called when saving failed after `pre_save` succeeded.
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
}

impl std::fmt::Debug for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Table").field("name", &self.name).field("version", &self.version).finish_non_exhaustive()
    }
}
