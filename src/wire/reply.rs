//! Replies: what a destination tells a source on the return path.

use super::command::ERROR_MAX;
use super::input::Input;
use super::output::Put;
use crate::error::{Error, Result};

/// Votes as they travel; 0 is none.
pub const OWNED: u32 = 1;
/// See [`OWNED`].
pub const NEVER: u32 = 2;
/// See [`OWNED`].
pub const UNKNOWN: u32 = 3;

const SHUT: u16 = 1;
const PONG: u16 = 2;
const SWITCHOVER_ACK: u16 = 7;
/// Ours, between two vmigs only: be64 length and a JSON error follow.
const ERROR: u16 = 0x5600;
/// Ours, after a SHUT with 0: be64 nanoseconds that the handlers and the start hook took.
const STARTED: u16 = 0x5601;
/// Ours, with option `verify`.
const SAME: u16 = 0x5620;
const DIFFERS: u16 = 0x5621;
/// Ours: the switchover's words, see docs/switchover.md.
const READY: u16 = 0x5610;
const VOTE: u16 = 0x5611;
/// Ours, between two vmigs that agreed on it.
const ACK: u16 = 0x5630;

/// The replies of a precopy migration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// The last one: 0 = loaded, anything else = failed.
    Shut(u32),
    /// Answer to a PING.
    Pong(u32),
    /// The destination is ready for the guest to stop.
    SwitchoverAck,
    /// The guest runs, after its start took so many nanoseconds; 0 if it is left paused.
    Started(u64),
    /// Why a SHUT with an error, or the vote NEVER, is about to follow.
    Error(Error),
    /// Everything that was hashed is the same here.
    Same,
    /// A block, by its number in the list of hashes, differs in this granule: which page is it?
    Differs(u32, u64),
    /// Ready to run the guest of the attempt with this epoch, says this incarnation.
    Ready(u64, u64),
    /// What became of the attempt with this epoch: incarnation, and one of [`OWNED`], [`NEVER`], [`UNKNOWN`].
    Vote(u64, u64, u32),
    /// Every byte before the sync point with this number lies in guest RAM.
    Ack(u64),
}

/// Reads a reply.
pub fn read(input: &mut dyn Input) -> Result<Reply> {
    let at = input.position();
    let number = input.u16()?;
    let len = input.u16()?;
    let want = match number {
        SHUT | PONG => 4,
        STARTED | ACK => 8,
        DIFFERS => 12,
        READY => 16,
        VOTE => 20,
        SWITCHOVER_ACK | ERROR | SAME => 0,
        3 | 4 => return Err(Error::invalid(format!("reply byte {at:#x}: a page request outside of postcopy"))),
        _ => return Err(Error::invalid(format!("reply byte {at:#x}: unknown reply {number:#x}"))),
    };
    if len != want {
        let text = format!("reply byte {at:#x}: reply {number:#x} has the wrong length");
        return Err(Error::invalid(text).expected_got(want, len));
    }
    Ok(match number {
        SHUT => Reply::Shut(input.u32()?),
        PONG => Reply::Pong(input.u32()?),
        SWITCHOVER_ACK => Reply::SwitchoverAck,
        STARTED => Reply::Started(input.u64()?),
        SAME => Reply::Same,
        DIFFERS => Reply::Differs(input.u32()?, input.u64()?),
        ACK => Reply::Ack(input.u64()?),
        READY => Reply::Ready(input.u64()?, input.u64()?),
        VOTE => {
            let (epoch, incarnation, vote) = (input.u64()?, input.u64()?, input.u32()?);
            if !(OWNED..=UNKNOWN).contains(&vote) {
                return Err(Error::invalid(format!("reply byte {at:#x}: {vote} is no vote")));
            }
            Reply::Vote(epoch, incarnation, vote)
        }
        _ => {
            let len = input.u64()?;
            let json = input.blob("the destination's error", len, ERROR_MAX)?;
            let json = serde_json::from_slice(&json).unwrap_or_default();
            let unreadable = || Error::new(libc::EIO, "the destination failed; its error could not be read");
            Reply::Error(Error::from_json(&json).unwrap_or_else(unreadable).on_side("destination"))
        }
    })
}

/// Writes a reply.
pub fn put(out: &mut Vec<u8>, reply: &Reply) {
    match reply {
        Reply::Shut(status) => {
            out.u16(SHUT);
            out.u16(4);
            out.u32(*status);
        }
        Reply::Pong(value) => {
            out.u16(PONG);
            out.u16(4);
            out.u32(*value);
        }
        Reply::SwitchoverAck => {
            out.u16(SWITCHOVER_ACK);
            out.u16(0);
        }
        Reply::Started(ns) => {
            out.u16(STARTED);
            out.u16(8);
            out.u64(*ns);
        }
        Reply::Same => {
            out.u16(SAME);
            out.u16(0);
        }
        Reply::Differs(block, granule) => {
            out.u16(DIFFERS);
            out.u16(12);
            out.u32(*block);
            out.u64(*granule);
        }
        Reply::Ack(number) => {
            out.u16(ACK);
            out.u16(8);
            out.u64(*number);
        }
        Reply::Ready(epoch, incarnation) => {
            out.u16(READY);
            out.u16(16);
            out.u64(*epoch);
            out.u64(*incarnation);
        }
        Reply::Vote(epoch, incarnation, vote) => {
            out.u16(VOTE);
            out.u16(20);
            out.u64(*epoch);
            out.u64(*incarnation);
            out.u32(*vote);
        }
        Reply::Error(error) => {
            let json = error.to_json_for_peer().to_string();
            out.u16(ERROR);
            out.u16(0);
            out.u64(json.len() as u64);
            out.bytes(json.as_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::input::Slice;
    use super::*;

    #[test]
    fn round_trip_and_refusals() {
        let error = Error::invalid("no such block").in_section("ram").on_side("destination");
        let words = [Reply::Ready(1, u64::MAX), Reply::Vote(2, 3, NEVER), Reply::Same, Reply::Differs(1, 1 << 40)];
        let others = [
            Reply::Shut(3),
            Reply::Pong(1),
            Reply::SwitchoverAck,
            Reply::Started(7),
            Reply::Ack(8),
            Reply::Error(error),
        ];
        for reply in others.into_iter().chain(words) {
            let mut out = Vec::new();
            put(&mut out, &reply);
            assert_eq!(read(&mut Slice::new(&out)).unwrap(), reply);
            for len in 0..out.len() {
                assert!(read(&mut Slice::new(&out[..len])).is_err(), "{reply:?} cut at {len}");
            }
            out[3] ^= 1;
            assert_eq!(read(&mut Slice::new(&out)).unwrap_err().errno(), libc::EINVAL);
        }
        for vote in [0, 4, u32::MAX] {
            let mut out = Vec::new();
            put(&mut out, &Reply::Vote(1, 2, vote));
            assert_eq!(read(&mut Slice::new(&out)).unwrap_err().errno(), libc::EINVAL, "{vote}");
        }
        for number in [0u16, 3, 4, 5, 8, 0x5602] {
            let bytes = [number.to_be_bytes(), [0, 0]].concat();
            assert_eq!(read(&mut Slice::new(&bytes)).unwrap_err().errno(), libc::EINVAL, "{number}");
        }
    }

    #[test]
    fn an_unreadable_error_is_still_an_error() {
        let bytes = b"\x56\x00\0\0\0\0\0\0\0\0\0\x02{}";
        let Reply::Error(error) = read(&mut Slice::new(bytes)).unwrap() else { panic!("not an error") };
        assert!(error.text().contains("could not be read"));
        let long = b"\x56\x00\0\0\xff\xff\xff\xff\xff\xff\xff\xff";
        assert_eq!(read(&mut Slice::new(long)).unwrap_err().errno(), libc::EINVAL);
    }
}
