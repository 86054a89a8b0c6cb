//! Reading bytes of a stream, wherever they come from.

use crate::error::{Error, Result};

/// The most a reader may ask to look ahead: a subsection's type, length and name, with room to spare.
pub const PEEK_MAX: usize = 1024;

/// A stream that is read once, in order. All integers on the wire are big-endian.
pub trait Input {
    /// Fills `buf`, or fails with `EIO` naming the position where the bytes ran out.
    fn read(&mut self, buf: &mut [u8]) -> Result<()>;

    /// Looks at the next `n <= PEEK_MAX` bytes without taking them. Waits only for those `n`.
    fn peek(&mut self, n: usize) -> Result<&[u8]>;

    /// Bytes taken so far.
    fn position(&self) -> u64;

    /// Takes one byte.
    fn u8(&mut self) -> Result<u8> {
        let mut b = [0; 1];
        self.read(&mut b)?;
        Ok(b[0])
    }

    /// Takes two bytes.
    fn u16(&mut self) -> Result<u16> {
        let mut b = [0; 2];
        self.read(&mut b)?;
        Ok(u16::from_be_bytes(b))
    }

    /// Takes four bytes.
    fn u32(&mut self) -> Result<u32> {
        let mut b = [0; 4];
        self.read(&mut b)?;
        Ok(u32::from_be_bytes(b))
    }

    /// Takes eight bytes.
    fn u64(&mut self) -> Result<u64> {
        let mut b = [0; 8];
        self.read(&mut b)?;
        Ok(u64::from_be_bytes(b))
    }

    /// Takes a counted string: one length byte, then that many bytes of UTF-8 (ASCII in practice).
    fn counted_string(&mut self) -> Result<String> {
        let at = self.position();
        let len = usize::from(self.u8()?);
        let mut bytes = [0; 255];
        self.read(&mut bytes[..len])?;
        match std::str::from_utf8(&bytes[..len]) {
            Ok(text) => Ok(text.to_owned()),
            Err(_) => Err(Error::invalid(format!("the name at byte {at:#x} of the stream is not UTF-8")).at_byte(at)),
        }
    }

    /// Takes `len` bytes, refusing more than `limit` and growing with what really arrives: a length from the wire
    /// is never allocated up front.
    fn blob(&mut self, what: &str, len: u64, limit: u64) -> Result<Vec<u8>> {
        const STEP: usize = 64 << 10;
        let at = self.position();
        if len > limit {
            return Err(Error::invalid(format!("{what} at byte {at:#x} is longer than its limit"))
                .at_byte(at)
                .expected_got(format!("at most {limit} bytes"), len));
        }
        let mut left = usize::try_from(len).map_err(|_| Error::no_memory(what, len))?;
        let mut bytes = Vec::new();
        while left > 0 {
            let (start, step) = (bytes.len(), left.min(STEP));
            bytes.try_reserve(step).map_err(|_| Error::no_memory(what, len))?;
            bytes.resize(start + step, 0);
            self.read(&mut bytes[start..])?;
            left -= step;
        }
        Ok(bytes)
    }
}

/// A stream that is all there.
#[derive(Debug)]
pub struct Slice<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Slice<'a> {
    /// Reads `bytes` from the start.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// What was not taken yet.
    pub fn rest(&self) -> &'a [u8] {
        &self.bytes[self.at..]
    }

    fn need(&self, n: usize) -> Result<&'a [u8]> {
        match self.rest().get(..n) {
            Some(bytes) => Ok(bytes),
            None => Err(ends_early(self.bytes.len() as u64, (n - self.rest().len()) as u64)),
        }
    }
}

impl Input for Slice<'_> {
    fn read(&mut self, buf: &mut [u8]) -> Result<()> {
        buf.copy_from_slice(self.need(buf.len())?);
        self.at += buf.len();
        Ok(())
    }

    fn peek(&mut self, n: usize) -> Result<&[u8]> {
        debug_assert!(n <= PEEK_MAX);
        self.need(n)
    }

    fn position(&self) -> u64 {
        self.at as u64
    }
}

/// The error every input gives when bytes run out.
pub fn ends_early(position: u64, missing: u64) -> Error {
    let text = format!("the stream ends at byte {position:#x}, at least {missing} bytes before it should");
    Error::ended(text).at_byte(position)
}
