//! Device tables as C sees them. The text of each item is what a C author reads in the header.
#![allow(non_camel_case_types, reason = "these are the names in C")]

use std::ffi::{c_char, c_int, c_void};

use crate::sys::sized::SizedStruct;

/// Ends a table of fields. Use VMIG_END.
pub const VMIG_KIND_END: u32 = 0;
/// uint8_t; 1 byte.
pub const VMIG_KIND_U8: u32 = 1;
/// uint16_t; 2 bytes, big-endian on the wire.
pub const VMIG_KIND_U16: u32 = 2;
/// uint32_t; 4 bytes, big-endian on the wire.
pub const VMIG_KIND_U32: u32 = 3;
/// uint64_t; 8 bytes, big-endian on the wire.
pub const VMIG_KIND_U64: u32 = 4;
/// `width` raw bytes, sent as they are.
pub const VMIG_KIND_BYTES: u32 = 5;
/// int8_t; 1 byte.
pub const VMIG_KIND_I8: u32 = 6;
/// int16_t; 2 bytes, big-endian on the wire.
pub const VMIG_KIND_I16: u32 = 7;
/// int32_t; 4 bytes, big-endian on the wire.
pub const VMIG_KIND_I32: u32 = 8;
/// int64_t; 8 bytes, big-endian on the wire.
pub const VMIG_KIND_I64: u32 = 9;
/// bool; 1 byte. A value other than 0 and 1 is an error on both sides.
pub const VMIG_KIND_BOOL: u32 = 10;
/// Expiry of a timer: uint64_t, nanoseconds of the guest's clock; UINT64_MAX means not armed.
pub const VMIG_KIND_TIMER: u32 = 11;
/// A struct with a table of its own, `nested`; its fields (and parts) are sent in place.
pub const VMIG_KIND_STRUCT: u32 = 12;
/// `width` bytes on the wire that mean nothing: zero when sent, ignored when read. No memory belongs to them.
pub const VMIG_KIND_UNUSED: u32 = 13;
/// Not a field: the rows after it exist since version `since` of the table. Use VMIG_SINCE.
pub const VMIG_KIND_SINCE: u32 = 14;
/// int; a file descriptor, -1 for none. It travels over a unix socket between two processes that use this library, and
/// only there: another transport refuses a device that has one, before the guest is stopped. What arrives is a new
/// descriptor of the same open file, close-on-exec, and the VMM's once the migration has succeeded; if it fails after the
/// device was loaded the library closes the descriptor and sets the member to -1, so use it no earlier than in a
/// run-state handler or the start hook. What the member held before is overwritten, not closed. The source's descriptor
/// stays open and its own. Not behind a pointer.
pub const VMIG_KIND_FD: u32 = 15;

/// Flag of a field: the member is a pointer to the elements, not the elements. It must not be NULL when there are
/// elements to save or to load; `pre_load` is the place to allocate.
pub const VMIG_FIELD_POINTER: u32 = 1;

/// Flag of a device: its state is sent at setup, while the guest still runs, and loaded before RAM.
pub const VMIG_DEVICE_EARLY: u32 = 1;

/// Flag of a device: loading it writes guest RAM (a callback of it does). Memory that is handed over by its file is
/// read-only until the guest has arrived, so such a device refuses option `hand-over`; and memory that differs from the
/// source's, option `verify`.
pub const VMIG_DEVICE_WRITES_RAM: u32 = 2;

/// Flag of a device: saved again where it was just loaded it has other bytes, because it has something that goes on by
/// itself, as a clock. Option `verify` then compares only the bytes that travelled.
pub const VMIG_DEVICE_VARIES: u32 = 4;

/// One field of a device's state. Write it with the VMIG_... macros, which check the member's type and fill in every
/// member; a field written by hand must be zero where nothing is given.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct vmig_field {
    /// Name in errors and descriptions; unique in its table, at most 255 bytes. May be NULL for unused space.
    pub name: *const c_char,
    /// One of VMIG_KIND_...
    pub kind: u32,
    /// First version of the table that has the field; 0: that of the last VMIG_SINCE before it, or 1.
    pub since: u32,
    /// Offset of the member in its struct, in bytes.
    pub offset: usize,
    /// Size of one element in memory, in bytes. For unused space: its size on the wire.
    pub width: usize,
    /// Number of elements; with `count_field` the room there is, in elements.
    pub count: usize,
    /// Table of one element, for VMIG_KIND_STRUCT. It is always read at the version it has now, because nothing on
    /// the wire names it: to change a nested struct, add to the outer table or add a part.
    pub nested: *const vmig_device,
    /// Name of the integer field, earlier in the same table, that holds the number of elements; NULL: `count` it is.
    pub count_field: *const c_char,
    /// VMIG_FIELD_POINTER or 0.
    pub flags: u32,
    /// Zero.
    pub reserved32: u32,
    /// Zero.
    pub reserved: [usize; 2],
}

/// The state of a kind of device: one table saves, loads, describes and compares.
///
/// Everything here is copied when the device is added (strings, fields, nested tables, parts); the callbacks must stay
/// callable until the device is removed. Callbacks run on a thread of the library, big lock held. They get the pointer
/// given to vmig_add_device, or in a nested table a pointer to the element. They return 0, or a negative errno, which fails
/// the migration with an error that names device and callback; the guest goes on at the source. They must not wait, throw
/// or longjmp, nor call vmig functions other than those marked `[cb]`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct vmig_device {
    /// Size of the struct, in bytes: VMIG_SIZED(vmig_device).
    pub size: usize,
    /// Name of the section, the same on both sides, at most 255 bytes. A part is called "parent/tail", with no further
    /// '/' in the tail.
    pub name: *const c_char,
    /// Version that is sent; from 1.
    pub version: u32,
    /// Oldest version that is still read; 0: only `version`.
    pub oldest: u32,
    /// Fields in the order of the stream, ended by VMIG_END. NULL declares that the device has no state at all, which
    /// excludes parts and callbacks.
    pub fields: *const vmig_field,
    /// Optional parts (subsections), NULL-terminated; NULL: none. Their fields are relative to the same pointer. A
    /// part is sent when `needed` says so, and absence means that what it describes has its default value: set it in
    /// `pre_load`.
    pub parts: *const *const vmig_device,
    /// Of a part: > 0 to send it, 0 not to, negative errno to fail. NULL: always sent. Source.
    pub needed: Option<unsafe extern "C" fn(dev: *mut c_void) -> c_int>,
    /// Before the fields are read. Source.
    pub pre_save: Option<unsafe extern "C" fn(dev: *mut c_void) -> c_int>,
    /// After fields and parts were read; also when saving failed after `pre_save` succeeded. Source.
    pub post_save: Option<unsafe extern "C" fn(dev: *mut c_void) -> c_int>,
    /// Before the fields are written. All of the device's bytes have arrived and were checked. Destination.
    pub pre_load: Option<unsafe extern "C" fn(dev: *mut c_void) -> c_int>,
    /// After fields and parts were written; `version` is the one that arrived. Guest RAM is final, except for devices
    /// with VMIG_DEVICE_EARLY. Destination.
    pub post_load: Option<unsafe extern "C" fn(dev: *mut c_void, version: u32) -> c_int>,
    /// Sum of VMIG_DEVICE_... flags. Not of parts and nested tables.
    pub flags: u32,
    /// Devices are saved in descending priority, then in the order they were added. Not of parts and nested tables.
    pub priority: i32,
}

// SAFETY: repr(C), begins with a usize; integers, raw pointers and optional function pointers.
#[allow(unsafe_code, reason = "vouches for the struct's layout")]
unsafe impl SizedStruct for vmig_device {
    const NAME: &'static str = "vmig_device";
    const REQUIRED: usize = std::mem::offset_of!(vmig_device, fields);
}
