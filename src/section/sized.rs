//! Structs of C callers that may be older or newer than the library: each begins with its own size.
#![allow(unsafe_code, reason = "reads structs of C callers")]

use std::mem::MaybeUninit;

use crate::error::{Error, Result};

/// Larger structs are taken for garbage instead of being read to their end.
pub const SIZE_MAX: usize = 64 << 10;

/// A `repr(C)` struct of C callers whose first field is `size: usize`.
///
/// # Safety
/// The type is `repr(C)`, begins with a `usize`, and all bytes zero are a valid value of each field, as is whatever C
/// may put there: integers, raw pointers, `Option` of function pointers.
pub unsafe trait Growing: Copy {
    /// Name in C, for errors.
    const NAME: &'static str;
}

/// A copy of the struct at `from`. `EINVAL`: NULL or without a size. A shorter struct's rest is zero; a longer one is
/// fine if its tail is zero, else `E2BIG`: it asks for something this library does not know.
///
/// # Safety
/// `from` is NULL or leads to a struct that is readable for as many bytes as its first field says.
pub unsafe fn read<T: Growing>(from: *const T) -> Result<T> {
    let name = T::NAME;
    if from.is_null() {
        return Err(Error::invalid(format!("{name} is NULL")));
    }
    // SAFETY: the struct begins with its size, and the caller vouches for as much; alignment is not assumed.
    let size = unsafe { from.cast::<usize>().read_unaligned() };
    if size < size_of::<usize>() || size > SIZE_MAX {
        return Err(Error::invalid(format!("{name}.size is {size}; begin with VMIG_SIZED({name})")));
    }
    let ours = size_of::<T>();
    for at in ours..size {
        // SAFETY: `at` is below the size the caller vouches for.
        let byte = unsafe { from.cast::<u8>().wrapping_add(at).read() };
        if byte != 0 {
            return Err(Error::new(
                libc::E2BIG,
                format!("{name} is newer than this library: byte {at} is set, which it does not know"),
            )
            .expected_got(format!("{ours} bytes"), format!("{size} bytes")));
        }
    }
    let mut copy = MaybeUninit::<T>::zeroed();
    // SAFETY: both sides have `min(size, ours)` bytes, and the copy is our own.
    unsafe { std::ptr::copy_nonoverlapping(from.cast::<u8>(), copy.as_mut_ptr().cast::<u8>(), size.min(ours)) };
    // SAFETY: zero is valid for each field, and so is whatever C put there.
    Ok(unsafe { copy.assume_init() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[repr(C)]
    #[derive(Clone, Copy, Debug, PartialEq)]
    struct Sample {
        size: usize,
        a: u64,
        b: u64,
    }

    // SAFETY: repr(C), begins with a usize, integers only.
    unsafe impl Growing for Sample {
        const NAME: &'static str = "sample";
    }

    fn read_words(words: &[u64]) -> Result<Sample> {
        // SAFETY: the tests below give sizes within the slice, or such that are refused.
        unsafe { read(words.as_ptr().cast()) }
    }

    #[test]
    fn old_and_new_structs_meet() {
        assert_eq!(read_words(&[24, 1, 2]).unwrap(), Sample { size: 24, a: 1, b: 2 });
        assert_eq!(read_words(&[16, 1, 99]).unwrap(), Sample { size: 16, a: 1, b: 0 }, "shorter: the rest is zero");
        assert_eq!(read_words(&[32, 1, 2, 0]).unwrap(), Sample { size: 32, a: 1, b: 2 }, "longer: zero tail");
        assert_eq!(read_words(&[32, 1, 2, 1 << 56]).unwrap_err().errno(), libc::E2BIG);
    }

    #[test]
    fn structs_without_a_sane_size_are_refused() {
        for size in [0, 7, SIZE_MAX as u64 + 1, u64::MAX] {
            assert_eq!(read_words(&[size, 1, 2]).unwrap_err().errno(), libc::EINVAL, "{size}");
        }
        // SAFETY: NULL is allowed.
        assert_eq!(unsafe { read::<Sample>(std::ptr::null()) }.unwrap_err().errno(), libc::EINVAL);
    }
}
