//! The question of a source that lost the answer to its GO: a connection of its own, one frame there, one reply back.
//!
//! The frame is the magic `VASK`, a version (both be32), the migration's 16 bytes, then epoch and incarnation of the GO
//! (both be64). It is answered by a VOTE reply. Its length is fixed, so whoever sends it cannot make us keep more.

use std::fmt;

use super::input::Input;
use super::output::Put;
use crate::error::{Error, Result};

/// First word of a question.
pub const MAGIC: u32 = 0x5641_534b;
/// Bytes of a question.
pub const LEN: usize = 40;
const VERSION: u32 = 1;

/// Highest epoch a source may name: high enough for ever, and far from overflow.
pub const EPOCH_MAX: u64 = 1 << 62;

/// A migration, drawn at random.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MigrationId(pub [u8; 16]);

impl MigrationId {
    /// Reads what `to_string` wrote.
    pub fn parse(text: &str) -> Option<Self> {
        let digits = text.len() == 32 && text.bytes().all(|b| b.is_ascii_hexdigit());
        u128::from_str_radix(text, 16).ok().filter(|_| digits).map(|n| Self(n.to_be_bytes()))
    }
}

impl fmt::Display for MigrationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

/// A GO that is repeated on a connection of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ask {
    /// Of which migration.
    pub migration: MigrationId,
    /// Of which attempt.
    pub epoch: u64,
    /// To whom: who said READY.
    pub incarnation: u64,
}

/// Writes a question.
pub fn put(out: &mut Vec<u8>, ask: &Ask) {
    out.u32(MAGIC);
    out.u32(VERSION);
    out.bytes(&ask.migration.0);
    out.u64(ask.epoch);
    out.u64(ask.incarnation);
}

/// Reads a question.
pub fn read(input: &mut dyn Input) -> Result<Ask> {
    let (magic, version) = (input.u32()?, input.u32()?);
    if (magic, version) != (MAGIC, VERSION) {
        let text = "a question about a switchover in a form that is not known here";
        return Err(Error::new(libc::ENOTSUP, text).expected_got(VERSION, version));
    }
    let mut id = [0; 16];
    input.read(&mut id)?;
    Ok(Ask { migration: MigrationId(id), epoch: input.u64()?, incarnation: input.u64()? })
}

#[cfg(test)]
mod tests {
    use super::super::input::Slice;
    use super::*;

    #[test]
    fn round_trip_and_refusals() {
        let ask = Ask { migration: MigrationId([9; 16]), epoch: 3, incarnation: u64::MAX };
        let mut out = Vec::new();
        put(&mut out, &ask);
        assert_eq!((out.len(), read(&mut Slice::new(&out)).unwrap()), (LEN, ask));
        for len in 0..LEN {
            assert!(read(&mut Slice::new(&out[..len])).is_err(), "cut at {len}");
        }
        out[7] ^= 2;
        assert_eq!(read(&mut Slice::new(&out)).unwrap_err().errno(), libc::ENOTSUP);
    }

    #[test]
    fn an_id_is_written_as_it_is_read() {
        let id = MigrationId([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 255]);
        assert_eq!(MigrationId::parse(&id.to_string()), Some(id));
        for bad in ["", "0", &"g".repeat(32), &"0".repeat(33), &format!("+{}", "0".repeat(31))] {
            assert_eq!(MigrationId::parse(bad), None, "{bad}");
        }
    }
}
