//! CRC32C of what travels, by the processor's own instruction where it has one.

use crate::error::Error;

/// The name it has in the hello and in option `checksum`.
pub const NAME: &str = "crc32c";
/// Bytes that are copied and summed at a time: little enough to stay in the cache in between, and enough for the sum to
/// run at full speed.
pub const STEP: usize = 32 << 10;

/// A sum over bytes as they come.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sum(u32);

impl Sum {
    /// The sum of these bytes.
    pub fn of(bytes: &[u8]) -> u32 {
        crc32c::crc32c(bytes)
    }

    /// Goes on with these.
    pub fn add(&mut self, bytes: &[u8]) {
        self.0 = crc32c::crc32c_append(self.0, bytes);
    }

    /// Of all so far.
    pub fn value(self) -> u32 {
        self.0
    }
}

/// `EBADMSG`: what arrived is not what was sent.
pub fn altered(what: impl std::fmt::Display, expected: u32, got: u32) -> Error {
    let text = format!("{what} arrived other than it was sent: the checksum (CRC32C) differs");
    Error::new(libc::EBADMSG, text).expected_got(format!("{expected:#010x}"), format!("{got:#010x}"))
}
