//! Writing integers and names into a buffer, big-endian.

use crate::error::{Error, Result};

/// The encoding side of [`Input`](super::input::Input).
pub trait Put {
    /// Appends raw bytes.
    fn bytes(&mut self, bytes: &[u8]);

    /// Appends one byte.
    fn u8(&mut self, value: u8) {
        self.bytes(&[value]);
    }

    /// Appends two bytes.
    fn u16(&mut self, value: u16) {
        self.bytes(&value.to_be_bytes());
    }

    /// Appends four bytes.
    fn u32(&mut self, value: u32) {
        self.bytes(&value.to_be_bytes());
    }

    /// Appends eight bytes.
    fn u64(&mut self, value: u64) {
        self.bytes(&value.to_be_bytes());
    }

    /// Appends a counted string; names longer than 255 bytes cannot be written.
    fn counted_string(&mut self, text: &str) -> Result<()> {
        let len = u8::try_from(text.len())
            .map_err(|_| Error::invalid(format!("the name '{text}' is longer than 255 bytes")))?;
        self.u8(len);
        self.bytes(text.as_bytes());
        Ok(())
    }
}

impl Put for Vec<u8> {
    fn bytes(&mut self, bytes: &[u8]) {
        self.extend_from_slice(bytes);
    }
}
