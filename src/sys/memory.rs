//! Memory of this process: making it present.
#![allow(unsafe_code, reason = "system calls live here")]

use crate::error::{Error, Result};

/// Makes `len` bytes from `address` on present and writable; not one byte of them changes.
pub fn populate(address: u64, len: u64) -> Result<()> {
    let too_far = |_| Error::invalid("memory out of reach");
    let (address, len) = (usize::try_from(address).map_err(too_far)?, usize::try_from(len).map_err(too_far)?);
    let start = std::ptr::with_exposed_provenance_mut::<libc::c_void>(address);
    // SAFETY: this advice faults pages in and leaves their bytes alone; the kernel refuses what is not mapped.
    if unsafe { libc::madvise(start, len, libc::MADV_POPULATE_WRITE) } < 0 {
        return Err(Error::last_os("madvise(MADV_POPULATE_WRITE)"));
    }
    Ok(())
}
