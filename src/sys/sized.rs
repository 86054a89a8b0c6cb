//! Structs that grow: they start with their own size, so that a program and a library of different age can meet.
#![allow(unsafe_code, reason = "reads and writes memory a C caller points to")]

use std::ptr;

use crate::error::{Error, Result};

/// The most any sized struct may claim to be. A size beyond it is an uninitialised field, not a newer program.
pub const SIZE_MAX: usize = 4096;

/// A struct of the C API that starts with `size_t size`.
///
/// # Safety
/// The type is `repr(C)`, its first member is `size: usize`, it has no padding, and all zero bytes are a valid value.
pub unsafe trait SizedStruct: Copy {
    /// The C name, for errors.
    const NAME: &'static str;
    /// Bytes of the oldest version: less than this is refused.
    const REQUIRED: usize;
}

/// The size a struct claims, checked as far as it can be without knowing more than the pointer.
///
/// # Safety
/// `from` is null or points to a readable `size_t`.
unsafe fn claimed<T: SizedStruct>(from: *const T) -> Result<usize> {
    let name = T::NAME;
    if from.is_null() {
        return Err(Error::invalid(format!("the pointer to {name} is NULL")));
    }
    if !from.is_aligned() {
        return Err(Error::invalid(format!("the pointer to {name} is not aligned")));
    }
    // SAFETY: not null, aligned, and by this function's contract at least the size can be read.
    let size = unsafe { from.cast::<usize>().read() };
    if size == 0 {
        return Err(Error::invalid(format!("{name}.size is 0: start it with VMIG_SIZED({name})")));
    }
    if size < T::REQUIRED || size % align_of::<T>() != 0 {
        return Err(Error::invalid(format!("{name}.size is no size this struct ever had"))
            .expected_got(format!("at least {}, a multiple of {}", T::REQUIRED, align_of::<T>()), size));
    }
    if size > SIZE_MAX {
        return Err(Error::new(libc::E2BIG, format!("{name}.size is beyond any version of it"))
            .expected_got(format!("at most {SIZE_MAX}"), size));
    }
    Ok(size)
}

/// Copies a struct the caller gave: shorter than ours, the rest is zero; longer, the tail must be zero (`E2BIG`).
/// A null pointer, a size of 0 or less than the oldest version is `EINVAL`.
///
/// # Safety
/// `from` is null or points to a struct that starts with its size in bytes, all of which can be read.
pub unsafe fn sized_copy<T: SizedStruct>(from: *const T) -> Result<T> {
    // SAFETY: this function's contract covers the callee's.
    let size = unsafe { claimed(from)? };
    let ours = size_of::<T>();
    for at in ours..size {
        // SAFETY: `at` is below the claimed size, all of which can be read by this function's contract.
        if unsafe { from.cast::<u8>().wrapping_add(at).read() } != 0 {
            let text = format!("{} uses members this library does not know, from byte {at} on", T::NAME);
            return Err(Error::new(libc::E2BIG, text).expected_got(format!("{ours} bytes, or zeros after"), size));
        }
    }
    let mut copy = std::mem::MaybeUninit::<T>::zeroed();
    // SAFETY: both sides have at least min(ours, size) bytes, and the copy is our own stack, so they do not overlap.
    unsafe { ptr::copy_nonoverlapping(from.cast::<u8>(), copy.as_mut_ptr().cast::<u8>(), ours.min(size)) };
    // SAFETY: zeroes are a valid T by the trait's contract, and what was copied is a prefix of the caller's T.
    Ok(unsafe { copy.assume_init() })
}

/// Fills a struct the caller gave: shorter than ours, the rest is dropped; longer, the rest becomes zero. Its size
/// stays the caller's. Nothing is written on failure.
///
/// # Safety
/// `to` is null or points to a struct that starts with its size in bytes, all of which can be written.
pub unsafe fn sized_fill<T: SizedStruct>(to: *mut T, value: &T) -> Result<()> {
    // SAFETY: what can be written can be read; this function's contract covers the callee's.
    let size = unsafe { claimed(to.cast_const())? };
    let (head, ours) = (size_of::<usize>(), size_of::<T>());
    // SAFETY: the size was read from there, and a struct's bytes after it are its own.
    let body = unsafe { to.cast::<u8>().add(head) };
    // SAFETY: the caller's struct has `size` bytes, of which `head` are passed.
    unsafe { ptr::write_bytes(body, 0, size - head) };
    // SAFETY: a T is at least its size member.
    let from = unsafe { ptr::from_ref(value).cast::<u8>().add(head) };
    // SAFETY: both sides have min(ours, size) bytes, of which `head` are passed; `value` is a live reference, so the
    // caller's memory is another object.
    unsafe { ptr::copy_nonoverlapping(from, body, ours.min(size) - head) };
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[repr(C)]
    #[derive(Clone, Copy, Debug, PartialEq)]
    struct Pair {
        size: usize,
        a: u64,
        b: u64,
    }
    // SAFETY: repr(C) integers without padding, size first.
    unsafe impl SizedStruct for Pair {
        const NAME: &'static str = "pair";
        const REQUIRED: usize = 16;
    }

    fn copy(words: &[u64]) -> Result<Pair> {
        // The words are as long as the size they claim, or the claim is refused before the rest is read.
        // SAFETY: see above.
        unsafe { sized_copy(words.as_ptr().cast::<Pair>()) }
    }

    #[test]
    fn every_size_is_judged() {
        let errno = |words: &[u64]| copy(words).unwrap_err().errno();
        assert_eq!(copy(&[24, 1, 2]).unwrap(), Pair { size: 24, a: 1, b: 2 });
        assert_eq!(copy(&[16, 1]).unwrap(), Pair { size: 16, a: 1, b: 0 });
        assert_eq!(copy(&[40, 1, 2, 0, 0]).unwrap(), Pair { size: 40, a: 1, b: 2 });
        assert_eq!(errno(&[40, 1, 2, 0, 1]), libc::E2BIG);
        assert_eq!(errno(&[40, 1, 2, 1 << 56, 0]), libc::E2BIG);
        for bad in [0, 1, 8, 15, 17, 23, 25] {
            assert_eq!(errno(&[bad]), libc::EINVAL, "size {bad}");
        }
        assert_eq!(errno(&[!7]), libc::E2BIG);
        // SAFETY: null is part of the contract.
        assert_eq!(unsafe { sized_copy::<Pair>(ptr::null()) }.unwrap_err().errno(), libc::EINVAL);
        let odd = ptr::without_provenance::<Pair>(0x1001);
        // SAFETY: a misaligned pointer is refused before it is read.
        assert_eq!(unsafe { sized_copy(odd) }.unwrap_err().errno(), libc::EINVAL);
    }

    #[test]
    fn filling_keeps_the_callers_size_and_stays_inside_it() {
        let value = Pair { size: 24, a: 1, b: 2 };
        let fill = |size: u64| {
            let mut words = [7; 6];
            words[0] = size;
            // SAFETY: the array is longer than any size used here.
            unsafe { sized_fill(words.as_mut_ptr().cast::<Pair>(), &value) }.map(|()| words)
        };
        assert_eq!(fill(16).unwrap(), [16, 1, 7, 7, 7, 7]);
        assert_eq!(fill(24).unwrap(), [24, 1, 2, 7, 7, 7]);
        assert_eq!(fill(40).unwrap(), [40, 1, 2, 0, 0, 7]);
        assert_eq!(fill(8).unwrap_err().errno(), libc::EINVAL);
    }
}
