//! A device with much state sends it while the guest runs: its own callbacks write and read bodies in a format of its
//! own, which the library frames, so that a body read too short or too long is an error with a name and an offset.

use std::ffi::{c_char, c_int, c_void};

use super::guest::vmig;
use super::{enter, guest, string};
use crate::error::{Error, Result};
use crate::section::custom::Custom;
use crate::section::ops::vmig_section_ops;
use crate::section::stream::{Reader, Writer, vmig_reader, vmig_writer};

/// Adds a section with a format of its own, for devices with much state that is sent while the guest runs. `name` is
/// the same on both sides; `version` is what is sent. `destroy(opaque)`, if given, is called once, after every other
/// callback, and not if this call fails. vmig_remove_device(m, opaque) removes the section. -EEXIST: name and instance
/// are taken; -EBUSY while a migration runs. \[bql\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_add_section(
    m: *mut vmig,
    name: *const c_char,
    version: u32,
    ops: *const vmig_section_ops,
    opaque: *mut c_void,
    destroy: Option<unsafe extern "C" fn(opaque: *mut c_void)>,
) -> c_int {
    enter("vmig_add_section", || {
        // SAFETY: the C contract of handles.
        let machine = unsafe { guest(m) }?;
        // SAFETY: the C contract of strings.
        let name = unsafe { string("name", name) }?;
        // SAFETY: the C contract: the callbacks accept opaque on any thread until destroy.
        let custom = unsafe { Custom::new(name, version, ops, opaque, destroy) }?;
        machine.add_section(custom.entry())?;
        Ok(0)
    })
}

/// # Safety
/// As for [`Writer::from_handle`]; `bytes` is NULL or has `len` bytes.
unsafe fn put(out: *mut vmig_writer, bytes: *const c_void, len: usize) -> c_int {
    enter("vmig_put", || {
        // SAFETY: this function's contract.
        let writer = unsafe { Writer::from_handle(out) }.ok_or_else(|| Error::invalid("the writer is NULL"))?;
        if len == 0 {
            return Ok(0);
        }
        if bytes.is_null() || isize::try_from(len).is_err() {
            return Err(Error::invalid("the bytes to put are NULL, or too many"));
        }
        // SAFETY: not NULL, and this function's contract gives the length.
        let bytes = unsafe { std::slice::from_raw_parts(bytes.cast::<u8>(), len) };
        writer.put(bytes)?;
        Ok(0)
    })
}

/// Appends `len` bytes to the body. -EFBIG: it is longer than 1 GiB; -ENOMEM: no memory is left. The first error stays
/// and fails the body, so that results need not be checked one by one. Writers and readers work only in the callback
/// that got them. \[cb\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_put(out: *mut vmig_writer, bytes: *const c_void, len: usize) -> c_int {
    // SAFETY: the C contract of writers.
    unsafe { put(out, bytes, len) }
}

/// Appends one byte; fails as vmig_put() does. \[cb\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_put_u8(out: *mut vmig_writer, value: u8) -> c_int {
    // SAFETY: the C contract of writers; the byte is ours.
    unsafe { put(out, (&raw const value).cast(), 1) }
}

/// Appends two bytes, big-endian; fails as vmig_put() does. \[cb\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_put_u16(out: *mut vmig_writer, value: u16) -> c_int {
    let bytes = value.to_be_bytes();
    // SAFETY: the C contract of writers; the bytes are ours.
    unsafe { put(out, bytes.as_ptr().cast(), bytes.len()) }
}

/// Appends four bytes, big-endian; fails as vmig_put() does. \[cb\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_put_u32(out: *mut vmig_writer, value: u32) -> c_int {
    let bytes = value.to_be_bytes();
    // SAFETY: the C contract of writers; the bytes are ours.
    unsafe { put(out, bytes.as_ptr().cast(), bytes.len()) }
}

/// Appends eight bytes, big-endian; fails as vmig_put() does. \[cb\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_put_u64(out: *mut vmig_writer, value: u64) -> c_int {
    let bytes = value.to_be_bytes();
    // SAFETY: the C contract of writers; the bytes are ours.
    unsafe { put(out, bytes.as_ptr().cast(), bytes.len()) }
}

/// Fills `buf` with the next `len` bytes of the body. -EIO if there are fewer; `buf` is zero then, and the error stays
/// and fails the body. \[cb\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_get_bytes(input: *mut vmig_reader, buf: *mut c_void, len: usize) -> c_int {
    enter("vmig_get_bytes", || {
        // SAFETY: the C contract of readers.
        let reader = unsafe { reader(input) }?;
        if len == 0 {
            return Ok(0);
        }
        if buf.is_null() || isize::try_from(len).is_err() {
            return Err(Error::invalid("the buffer is NULL, or too long"));
        }
        // SAFETY: not NULL; the C contract says it has `len` bytes, and zeros are valid bytes.
        unsafe { std::ptr::write_bytes(buf.cast::<u8>(), 0, len) };
        // SAFETY: as above, and initialised now.
        reader.get(unsafe { std::slice::from_raw_parts_mut(buf.cast::<u8>(), len) })?;
        Ok(0)
    })
}

/// # Safety
/// As for [`Reader::from_handle`].
unsafe fn reader<'a>(input: *mut vmig_reader) -> Result<&'a mut Reader> {
    // SAFETY: this function's contract.
    unsafe { Reader::from_handle(input) }.ok_or_else(|| Error::invalid("the reader is NULL"))
}

/// # Safety
/// As for [`Reader::from_handle`].
unsafe fn take<const N: usize>(input: *mut vmig_reader) -> [u8; N] {
    let mut bytes = [0; N];
    enter("vmig_get", || {
        // SAFETY: this function's contract.
        bytes = unsafe { reader(input) }?.take();
        Ok(0)
    });
    bytes
}

/// The next byte; 0 after an error, which stays and fails the body. \[cb\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_get_u8(input: *mut vmig_reader) -> u8 {
    // SAFETY: the C contract of readers.
    u8::from_be_bytes(unsafe { take(input) })
}

/// The next two bytes as a big-endian number; 0 after an error. \[cb\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_get_u16(input: *mut vmig_reader) -> u16 {
    // SAFETY: the C contract of readers.
    u16::from_be_bytes(unsafe { take(input) })
}

/// The next four bytes as a big-endian number; 0 after an error. \[cb\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_get_u32(input: *mut vmig_reader) -> u32 {
    // SAFETY: the C contract of readers.
    u32::from_be_bytes(unsafe { take(input) })
}

/// The next eight bytes as a big-endian number; 0 after an error. \[cb\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_get_u64(input: *mut vmig_reader) -> u64 {
    // SAFETY: the C contract of readers.
    u64::from_be_bytes(unsafe { take(input) })
}

/// Bytes of the body that can still be read: those that were not read yet; 0 after an error, so that a loop over what is
/// left ends; 0 for NULL. \[cb\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_reader_left(input: *mut vmig_reader) -> usize {
    let mut left = 0;
    enter("vmig_reader_left", || {
        // SAFETY: the C contract of readers.
        let reader = unsafe { reader(input) }?;
        left = if reader.error().is_some() { 0 } else { reader.left() };
        Ok(0)
    });
    left
}
