//! What C callbacks return: `>= 0` is fine, a negative errno is not.

use std::ffi::c_int;

use crate::error::{Error, Result, strerror};

/// The result of callback `callback` of `owner` (such as `device 'uart'`): its value, or its errno as an error.
pub(super) fn returned(owner: &str, callback: &str, value: c_int) -> Result<c_int> {
    if value >= 0 {
        return Ok(value);
    }
    match value.checked_neg().filter(|errno| *errno < 4096) {
        Some(errno) => Err(Error::new(errno, format!("{callback} of {owner} failed: {}", strerror(errno)))),
        None => Err(Error::new(libc::EIO, format!("{callback} of {owner} failed with {value}, which is no errno"))),
    }
}
