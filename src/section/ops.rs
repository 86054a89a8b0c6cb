//! The callbacks of a custom section as C sees them. The text of each item is what a C author reads in the header.
#![allow(non_camel_case_types, reason = "these are the names in C")]

use std::ffi::{c_int, c_void};

use super::stream::{vmig_reader, vmig_writer};
use crate::sys::sized::SizedStruct;

/// First body of an iterative section, from `setup`.
pub const VMIG_PART_START: u32 = 1;
/// Body sent while the guest runs, from `iterate`.
pub const VMIG_PART_ITERATE: u32 = 2;
/// Last body of an iterative section, from `complete`.
pub const VMIG_PART_END: u32 = 3;
/// Whole state in one body, from `complete` of a section that is not iterative.
pub const VMIG_PART_FULL: u32 = 4;

/// Flag of a section that is not iterative: it is sent at setup, while the guest still runs, and loaded before RAM.
pub const VMIG_SECTION_EARLY: u32 = 1;
/// Flag of a section: its `load` writes guest RAM. Memory that is handed over by its file is read-only until the guest
/// has arrived, so such a section refuses option `hand-over`.
pub const VMIG_SECTION_WRITES_RAM: u32 = 2;

/// Callbacks of a section with a format of its own.
///
/// A section is iterative if `iterate` is given: `setup` writes the first body, `iterate` further ones while the guest
/// runs, `complete` the last one with the guest stopped. Otherwise `complete` writes the only body. Each body is framed
/// by the library (be32 length, bytes), at most 1 GiB: `load` must read exactly what was written, or the migration
/// fails with an error that names section and offset.
///
/// The struct is copied when the section is added. All callbacks run on a thread of the library;
/// `[bql]` says the big lock is held, `[free]` that it is not. They return 0 or
/// more, or a negative errno, which fails the migration with an error that names section and callback; the guest goes
/// on at the source. They must not throw or longjmp; those marked `[bql]` must not wait. They may call the vmig
/// functions marked `[cb]`, and use their writer or reader until they return.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct vmig_section_ops {
    /// Size of the struct, in bytes: VMIG_SIZED(vmig_section_ops).
    pub size: usize,
    /// Which of several sections of this name.
    pub instance: u32,
    /// Oldest version that is still read; 0: only the version given when the section is added.
    pub oldest: u32,
    /// Sections are walked in descending priority, then in the order they were added.
    pub priority: i32,
    /// Sum of VMIG_SECTION_... flags.
    pub flags: u32,
    /// Positive: takes part in this migration, 0: not. NULL: always. Source. `[bql]` or `[free]`
    pub is_active: Option<unsafe extern "C" fn(opaque: *mut c_void) -> c_int>,
    /// Positive: `iterate` is worth calling now, 0: not. NULL: always. Source. `[free]`
    pub is_active_iterate: Option<unsafe extern "C" fn(opaque: *mut c_void) -> c_int>,
    /// Before anything is sent; an error refuses the migration. Source. `[bql]`
    pub prepare: Option<unsafe extern "C" fn(opaque: *mut c_void) -> c_int>,
    /// Writes the first body. Source. `[bql]`
    pub setup: Option<unsafe extern "C" fn(opaque: *mut c_void, out: *mut vmig_writer) -> c_int>,
    /// Cheap guess of the bytes left, called in every loop: those that must be sent before the guest may run on the
    /// destination, and those that may also follow. Both are zero before the call. Required if iterative. Source.
    /// `[free]`
    pub pending_estimate:
        Option<unsafe extern "C" fn(opaque: *mut c_void, must_precopy: *mut u64, can_postcopy: *mut u64) -> c_int>,
    /// The same, exactly; called when the estimate lets the guest be stopped. NULL: the estimate is exact. Source.
    /// `[free]`
    pub pending_exact:
        Option<unsafe extern "C" fn(opaque: *mut c_void, must_precopy: *mut u64, can_postcopy: *mut u64) -> c_int>,
    /// Writes the next body, about `budget` bytes at most; a body without a byte is not sent. Positive: nothing left for
    /// now, 0: more to come. Source. `[free]`
    pub iterate: Option<unsafe extern "C" fn(opaque: *mut c_void, out: *mut vmig_writer, budget: u64) -> c_int>,
    /// Writes the last or only body; the guest is stopped, unless VMIG_SECTION_EARLY. Required. Source. `[bql]`
    pub complete: Option<unsafe extern "C" fn(opaque: *mut c_void, out: *mut vmig_writer) -> c_int>,
    /// Undoes `setup`; exactly once for each `setup` that was tried, however the migration ended. Source. `[bql]`
    pub cleanup: Option<unsafe extern "C" fn(opaque: *mut c_void)>,
    /// Before the first body arrives. Destination. `[bql]`
    pub load_setup: Option<unsafe extern "C" fn(opaque: *mut c_void) -> c_int>,
    /// Reads one body, all of which has arrived; `part` is one of VMIG_PART_..., `version` the sender's. Required.
    /// Destination. `[bql]`
    pub load:
        Option<unsafe extern "C" fn(opaque: *mut c_void, part: u32, version: u32, input: *mut vmig_reader) -> c_int>,
    /// Undoes `load_setup`; exactly once, told whether (1) or not (0) the migration succeeded. Destination. `[bql]`
    pub load_cleanup: Option<unsafe extern "C" fn(opaque: *mut c_void, ok: c_int)>,
}

// SAFETY: repr(C), begins with a usize; integers and optional function pointers.
#[allow(unsafe_code, reason = "vouches for the struct's layout")]
unsafe impl SizedStruct for vmig_section_ops {
    const NAME: &'static str = "vmig_section_ops";
    const REQUIRED: usize = std::mem::offset_of!(vmig_section_ops, is_active);
}
