//! A device's state is declared once, as a table of its struct's members; the same table saves, loads, describes and is
//! compared with the other side's. The macros check each member's type where they are used.

use std::ffi::{c_char, c_int, c_void};

use super::guest::vmig;
use super::{enter, guest, string};
use crate::section::cdevice::vmig_device;
use crate::section::list::Entry;

/// Adds a device: the state at `dev`, described by `kind`. `instance` tells apart devices of one name, the same on both
/// sides. Every device says what it has: a table, none (`fields` NULL), or a reason not to migrate (vmig_block()).
/// -EEXIST: name and instance are taken; -EBUSY while a migration runs. \[bql\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_add_device(
    m: *mut vmig,
    kind: *const vmig_device,
    instance: u32,
    dev: *mut c_void,
) -> c_int {
    enter("vmig_add_device", || {
        // SAFETY: the C contract of handles.
        let machine = unsafe { guest(m) }?;
        // SAFETY: the C contract of device tables; dev has the shape of the table until it is removed, and is only used
        // with the big lock, under which sections are saved and loaded.
        let entry = unsafe { Entry::of_device(kind, instance, dev) }?;
        machine.add_section(entry)?;
        Ok(0)
    })
}

/// Removes every device and section added with the pointer `dev`. -ENOENT: there is none; -EBUSY while a migration
/// runs. \[bql\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_remove_device(m: *mut vmig, dev: *mut c_void) -> c_int {
    enter("vmig_remove_device", || {
        // SAFETY: the C contract of handles.
        let machine = unsafe { guest(m) }?;
        machine.remove_section(dev as usize)?;
        Ok(0)
    })
}

/// Adds a reason not to migrate and returns its id, which is positive. Until it is taken back vmig_outgoing() and
/// vmig_incoming() fail with -EBUSY and all reasons. `reason` is for people and says what cannot be migrated and why.
/// \[any\]\[cb\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_block(m: *mut vmig, reason: *const c_char) -> c_int {
    enter("vmig_block", || {
        // SAFETY: the C contract of handles.
        let machine = unsafe { guest(m) }?;
        // SAFETY: the C contract of strings.
        machine.sections().block(unsafe { string("reason", reason) }?)
    })
}

/// Takes a reason not to migrate back, by its id. -ENOENT: there is none. \[any\]\[cb\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_unblock(m: *mut vmig, id: c_int) -> c_int {
    enter("vmig_unblock", || {
        // SAFETY: the C contract of handles.
        unsafe { guest(m) }?.sections().unblock(id)?;
        Ok(0)
    })
}
