//! The knock of a source whose connection broke: the first bytes of its next one, before its hello.
//!
//! The frame is the magic `VRES`, a version (both be32), the migration's 16 bytes, the number of the connection, counted
//! from 1, and whether the source only says that it will not come again (both be32). Its length is fixed, so that whoever
//! sits at the door can read it whole before anybody is let in. It has no answer of its own: the one of the hello is.

use super::ask::MigrationId;
use super::input::Input;
use super::output::Put;
use crate::error::{Error, Result};

/// First word of a knock.
pub const MAGIC: u32 = 0x5652_4553;
/// Bytes of a knock.
pub const LEN: usize = 32;
const VERSION: u32 = 1;

/// Who is at the door, and what for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Knock {
    /// The migration that is to go on.
    pub migration: MigrationId,
    /// How many connections were tried before this one: each has a higher number than the one before.
    pub number: u32,
    /// Nobody comes any more.
    pub over: bool,
}

/// Writes a knock.
pub fn put(out: &mut Vec<u8>, knock: &Knock) {
    out.u32(MAGIC);
    out.u32(VERSION);
    out.bytes(&knock.migration.0);
    out.u32(knock.number);
    out.u32(knock.over.into());
}

/// Reads a knock.
pub fn read(input: &mut dyn Input) -> Result<Knock> {
    let (magic, version) = (input.u32()?, input.u32()?);
    if (magic, version) != (MAGIC, VERSION) {
        let text = "a migration would go on in a form that is not known here";
        return Err(Error::new(libc::ENOTSUP, text).expected_got(VERSION, version));
    }
    let mut id = [0; 16];
    input.read(&mut id)?;
    let (number, over) = (input.u32()?, input.u32()?);
    if number == 0 || over > 1 {
        return Err(Error::new(
            libc::EPROTO,
            "a source would go on without having begun, or for a reason not known here",
        ));
    }
    Ok(Knock { migration: MigrationId(id), number, over: over == 1 })
}

#[cfg(test)]
mod tests {
    use super::super::input::Slice;
    use super::*;

    #[test]
    fn round_trip_and_refusals() {
        for over in [false, true] {
            let knock = Knock { migration: MigrationId([9; 16]), number: 7, over };
            let mut out = Vec::new();
            put(&mut out, &knock);
            assert_eq!((out.len(), read(&mut Slice::new(&out)).unwrap()), (LEN, knock));
            for len in 0..LEN {
                assert!(read(&mut Slice::new(&out[..len])).is_err(), "cut at {len}");
            }
            for (at, errno) in [(7, libc::ENOTSUP), (27, libc::EPROTO), (28, libc::EPROTO)] {
                let mut wrong = out.clone();
                wrong[at] ^= 7;
                assert_eq!(read(&mut Slice::new(&wrong)).unwrap_err().errno(), errno, "byte {at}");
            }
        }
    }
}
