//! The door in: what C calls. One file for each chapter of the header, in its order (build.rs has the list).
//!
//! Every function goes through `enter`: a panic becomes an error, never an unwind into C.
#![allow(unsafe_code, reason = "exporting symbols to C and reading what C passes is unsafe")]
#![allow(
    clippy::missing_safety_doc,
    reason = "the C contract (handles, strings, sized structs, threads) is stated once, in the header's opening"
)]
#![allow(non_camel_case_types, reason = "these are the names in C")]

pub mod channel;
pub mod check;
pub mod device;
pub mod dispatch;
pub mod gate;
pub mod guest;
pub mod migrate;
pub mod observe;
pub mod qmp;
pub mod ram;
pub mod rate;
pub mod run;
pub mod section;
pub mod trial;

use std::ffi::{CStr, CString, c_char, c_int};

use crate::error::{Error, Result, set_last};
use crate::machine::Machine;
use crate::qmp::Qmp;
use crate::thread::fence;
use guest::vmig;

/// Longest string a caller may pass; longer ones are not strings.
const TEXT_MAX: usize = 64 << 10;

/// The guest behind a handle.
///
/// # Safety
/// `m` is NULL or came from `vmig_new` and was not freed yet.
unsafe fn guest<'a>(m: *const vmig) -> Result<&'a Machine> {
    // SAFETY: this function's contract.
    unsafe { face(m) }.map(Qmp::machine)
}

/// The same with what speaks QMP for it.
///
/// # Safety
/// As for [`guest`].
unsafe fn face<'a>(m: *const vmig) -> Result<&'a Qmp> {
    // SAFETY: vmig_new made the pointer from a Box<Qmp>, and the caller says that it still lives.
    unsafe { m.cast::<Qmp>().as_ref() }.ok_or_else(|| Error::invalid("the guest handle is NULL"))
}

/// Runs the body of an entry point; failures become a negative errno and this thread's message.
fn enter(name: &str, f: impl FnOnce() -> Result<c_int>) -> c_int {
    match fence(name, f) {
        Ok(value) => value,
        Err(error) => set_last(&error),
    }
}

/// The same for an entry point that returns a string; failures become NULL and this thread's message.
fn enter_text(name: &str, f: impl FnOnce() -> Result<Option<String>>) -> *mut c_char {
    let text = fence(name, || {
        f()?.map(|text| CString::new(text).map_err(|_| Error::new(libc::EIO, "a text contains NUL"))).transpose()
    });
    match text {
        Ok(Some(text)) => text.into_raw(),
        Ok(None) => std::ptr::null_mut(),
        Err(error) => {
            set_last(&error);
            std::ptr::null_mut()
        }
    }
}

/// A string of the caller.
///
/// # Safety
/// `text` is NULL or ends with NUL.
unsafe fn string<'a>(what: &str, text: *const c_char) -> Result<&'a str> {
    // SAFETY: this function's contract.
    unsafe { long_string(what, text, TEXT_MAX) }
}

/// A string of the caller that may have `most` bytes.
///
/// # Safety
/// As for [`string`].
unsafe fn long_string<'a>(what: &str, text: *const c_char, most: usize) -> Result<&'a str> {
    if text.is_null() {
        return Err(Error::invalid(format!("{what} is NULL")));
    }
    // SAFETY: not NULL, and the caller says it ends with NUL.
    let text = unsafe { CStr::from_ptr(text) };
    match text.to_str() {
        Ok(text) if text.len() <= most => Ok(text),
        Ok(_) => Err(Error::invalid(format!("{what} is longer than {most} bytes"))),
        Err(_) => Err(Error::invalid(format!("{what} is not UTF-8"))),
    }
}
