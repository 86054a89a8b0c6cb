//! getrandom(2): names that nobody else has.
#![allow(unsafe_code, reason = "system calls live here")]

use crate::error::{Error, Result};

/// Bytes nobody can guess. At most 256, which the kernel gives in one go.
pub fn random<const N: usize>() -> Result<[u8; N]> {
    const { assert!(N <= 256) }
    let mut bytes = [0; N];
    // SAFETY: the buffer is a live array of the length given.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), N, 0) };
    match usize::try_from(got) {
        Ok(n) if n == N => Ok(bytes),
        _ => Err(Error::last_os("getrandom")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_draws_differ() {
        assert_ne!(random::<16>().unwrap(), random::<16>().unwrap());
    }
}
