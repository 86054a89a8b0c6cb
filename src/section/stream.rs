//! What custom sections write to and read from: bytes with a sticky error, behind an opaque handle for C.
#![allow(unsafe_code, reason = "turns the handles of C callbacks back into the values they stand for")]
#![allow(non_camel_case_types, reason = "these are the names in C")]

use super::check::BODY_MAX;
use crate::error::{Error, Result};
use crate::wire::output::Put;

/// Where a section's callback puts its bytes. Valid only during the callback that got it.
#[derive(Debug)]
pub struct vmig_writer {
    _private: [u8; 0],
}

/// Where a section's callback gets its bytes from. Valid only during the callback that got it.
#[derive(Debug)]
pub struct vmig_reader {
    _private: [u8; 0],
}

/// Collects one body. The first error stays: what is put afterwards is dropped, and the body fails.
#[derive(Debug)]
pub struct Writer {
    bytes: Vec<u8>,
    /// Where the body begins; `bytes` may hold other bodies before it.
    start: usize,
    /// Bytes the body may have.
    room: u64,
    error: Option<Error>,
}

impl Writer {
    /// Appends a framed body to `out`, of which `fill` writes the bytes: be32 length, bytes. On failure `out` is as it
    /// was.
    pub fn frame<T>(out: &mut Vec<u8>, fill: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        Self::frame_within(out, BODY_MAX, fill)
    }

    /// The same, as if there were memory for `room` bytes only.
    pub(super) fn frame_within<T>(
        out: &mut Vec<u8>,
        room: u64,
        fill: impl FnOnce(&mut Self) -> Result<T>,
    ) -> Result<T> {
        let before = out.len();
        out.u32(0);
        let mut writer = Self { start: out.len(), bytes: std::mem::take(out), room, error: None };
        let filled = fill(&mut writer);
        *out = writer.bytes;
        // The sticky error came first and says more than the callback that noticed it.
        let done = match writer.error {
            Some(error) => Err(error),
            None => filled,
        };
        let len = out.len() - writer.start;
        match (done, u32::try_from(len)) {
            (Ok(done), Ok(len)) => {
                out[before..before + 4].copy_from_slice(&len.to_be_bytes());
                Ok(done)
            }
            (done, _) => {
                out.truncate(before);
                done.and(Err(Error::new(libc::EFBIG, "a body is longer than 4 GiB")))
            }
        }
    }

    /// Appends `bytes`. `EFBIG` beyond the limit for one body (1 GiB), `ENOMEM`; both stay.
    pub fn put(&mut self, bytes: &[u8]) -> Result<()> {
        if let Some(error) = &self.error {
            return Err(error.clone());
        }
        let len = (self.len() as u64).saturating_add(bytes.len() as u64);
        let put = if len > BODY_MAX {
            Err(Error::new(libc::EFBIG, "the body is longer than its limit")
                .expected_got(format!("at most {BODY_MAX} bytes"), len))
        } else if len > self.room {
            Err(Error::no_memory("a section's body", len))
        } else {
            self.bytes.try_reserve(bytes.len()).map_err(|_| Error::no_memory("a section's body", len))
        };
        match put {
            Ok(()) => self.bytes.extend_from_slice(bytes),
            Err(ref error) => self.error = Some(error.clone()),
        }
        put
    }

    /// Bytes put so far.
    pub fn len(&self) -> usize {
        self.bytes.len() - self.start
    }

    /// Nothing was put yet.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The handle C callbacks get for this writer.
    pub fn handle(&mut self) -> *mut vmig_writer {
        std::ptr::from_mut(self).cast()
    }

    /// The writer behind a handle; none for NULL.
    ///
    /// # Safety
    /// `handle` is NULL or from [`handle`](Self::handle), of a writer that lives on and that nobody else uses during
    /// `'a`: true inside the callback that got it.
    pub unsafe fn from_handle<'a>(handle: *mut vmig_writer) -> Option<&'a mut Self> {
        // SAFETY: the caller vouches for the handle, which was a `Writer` before.
        unsafe { handle.cast::<Self>().as_mut() }
    }
}

/// Hands out one body. The first error stays: what is read afterwards is zero.
#[derive(Debug)]
pub struct Reader {
    bytes: Vec<u8>,
    at: usize,
    error: Option<Error>,
}

impl Reader {
    /// Reads `bytes` from the start.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self { bytes, at: 0, error: None }
    }

    /// Fills `buf`. `EIO` naming the offset if the body ends before, and from then on; `buf` is zero then.
    pub fn get(&mut self, buf: &mut [u8]) -> Result<()> {
        if self.error.is_none() && buf.len() > self.left() {
            let text = format!(
                "load reads {} bytes at byte {:#x} of a body of {:#x} bytes",
                buf.len(),
                self.at,
                self.bytes.len()
            );
            self.error = Some(Error::new(libc::EIO, text));
        }
        if let Some(error) = &self.error {
            buf.fill(0);
            return Err(error.clone());
        }
        buf.copy_from_slice(&self.bytes[self.at..][..buf.len()]);
        self.at += buf.len();
        Ok(())
    }

    /// The next `N` bytes, zero after an error. A big-endian integer is one `from_be_bytes` away.
    pub fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        // The error stays and fails the body; that is the point of it.
        let _ = self.get(&mut bytes);
        bytes
    }

    /// Bytes not read yet.
    pub fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    /// The first error, if there was one.
    pub fn error(&self) -> Option<&Error> {
        self.error.as_ref()
    }

    /// Fails unless all was read without an error.
    pub fn finish(self) -> Result<()> {
        match self.error {
            Some(error) => Err(error),
            None if self.left() > 0 => Err(Error::invalid(format!(
                "load leaves {} bytes unread, from byte {:#x} of a body of {:#x} bytes",
                self.left(),
                self.at,
                self.bytes.len()
            ))),
            None => Ok(()),
        }
    }

    /// The handle C callbacks get for this reader.
    pub fn handle(&mut self) -> *mut vmig_reader {
        std::ptr::from_mut(self).cast()
    }

    /// The reader behind a handle; none for NULL.
    ///
    /// # Safety
    /// `handle` is NULL or from [`handle`](Self::handle), of a reader that lives on and that nobody else uses during
    /// `'a`: true inside the callback that got it.
    pub unsafe fn from_handle<'a>(handle: *mut vmig_reader) -> Option<&'a mut Self> {
        // SAFETY: the caller vouches for the handle, which was a `Reader` before.
        unsafe { handle.cast::<Self>().as_mut() }
    }
}
