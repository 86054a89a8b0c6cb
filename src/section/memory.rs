//! The only four ways device memory is touched. Addresses come from checked tables.
#![allow(unsafe_code, reason = "device state lives behind the pointers a VMM registered")]

use std::ffi::c_int;

use crate::error::{Error, Result};

/// Appends the `len` bytes at `from` to `out`.
///
/// # Safety
/// `from` is readable for `len` bytes and nobody writes them meanwhile.
pub(super) unsafe fn copy_in(from: *const u8, len: usize, out: &mut Vec<u8>) -> Result<()> {
    out.try_reserve(len).map_err(|_| Error::no_memory("device state", len as u64))?;
    let start = out.len();
    let room = out.spare_capacity_mut().as_mut_ptr().cast::<u8>();
    // SAFETY: the caller vouches for `from`; `room` has `len` bytes because they were just reserved, and memory the
    // vector owns cannot be the device's.
    unsafe { std::ptr::copy_nonoverlapping(from, room, len) };
    // SAFETY: the bytes up to `start + len` are within the capacity and were all written.
    unsafe { out.set_len(start + len) };
    Ok(())
}

/// Writes `bytes` at `to`.
///
/// # Safety
/// `to` is writable for `bytes.len()` bytes and nobody reads or writes them meanwhile.
pub(super) unsafe fn copy_out(bytes: &[u8], to: *mut u8) {
    // SAFETY: the caller vouches for `to`; staged bytes belong to the library and cannot be the device's.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
}

/// The `int` kept at `at`.
///
/// # Safety
/// `at` is readable for the size of an int and nobody writes there meanwhile.
pub(super) unsafe fn int_at(at: *const u8) -> c_int {
    // SAFETY: the caller vouches for `at`; the read does not need alignment.
    unsafe { at.cast::<c_int>().read_unaligned() }
}

/// The pointer kept at `at`.
///
/// # Safety
/// `at` is readable for the size of a pointer and nobody writes there meanwhile.
pub(super) unsafe fn pointer_at(at: *const u8) -> *mut u8 {
    // SAFETY: the caller vouches for `at`; the read does not need alignment.
    unsafe { at.cast::<*mut u8>().read_unaligned() }
}
