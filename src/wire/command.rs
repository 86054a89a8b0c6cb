//! Commands: what a source tells a destination between sections.

use super::input::Input;
use super::output::Put;
use crate::error::{Error, Result};

const OPEN_RETURN_PATH: u16 = 1;
const PING: u16 = 2;
const SWITCHOVER_START: u16 = 11;
/// Ours, between two vmigs only: be64 length and a JSON error follow.
const ERROR: u16 = 0x5600;
const FDS: u16 = 0x5601;
/// Longest JSON error.
pub const ERROR_MAX: u64 = 64 << 10;
/// Ours, with option `verify`: bytes follow two of these three, see `digest`.
const HASH: u16 = 0x5620;
const HASHES: u16 = 0x5621;
const PAGE_HASHES: u16 = 0x5622;
/// Ours: the switchover's words, see docs/switchover.md.
const PREPARE: u16 = 0x5610;
const GO: u16 = 0x5611;
const ABORT: u16 = 0x5612;
/// Ours, between two vmigs that agreed on it.
const SYNC_POINT: u16 = 0x5630;

/// The commands of a precopy migration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Answer from now on.
    OpenReturnPath,
    /// Answer with PONG and this value.
    Ping(u32),
    /// The guest is stopped; the last sections follow.
    SwitchoverStart,
    /// So many file descriptors came with these bytes, for the bodies that follow.
    Fds(u32),
    /// All pages and devices came: hash them.
    Hash,
    /// The hashes of the source follow.
    Hashes,
    /// The hashes of the pages of the granule that was said to differ follow.
    PageHashes,
    /// All pages and devices of the attempt with this epoch came before this. Ends the stream of sections.
    Prepare(u64),
    /// Run the guest: the attempt's epoch, and the incarnation that said READY.
    Go(u64, u64),
    /// The attempt with this epoch is off.
    Abort(u64),
    /// Why nothing follows, or an ABORT does.
    Error(Error),
    /// Acknowledge this number when every byte before it lies in guest RAM.
    SyncPoint(u64),
}

/// Names of QEMU's other commands, for the error that refuses them.
fn name(number: u16) -> &'static str {
    match number {
        3..=6 | 9 | 10 => "a postcopy command",
        7 => "PACKAGED (postcopy)",
        8 => "ENABLE_COLO",
        _ => "unknown",
    }
}

/// Reads a command after its type byte.
pub fn read(input: &mut dyn Input) -> Result<Command> {
    let at = input.position();
    let number = input.u16()?;
    let len = input.u16()?;
    let want = match number {
        OPEN_RETURN_PATH | SWITCHOVER_START | ERROR | HASH | HASHES | PAGE_HASHES => 0,
        PING | FDS => 4,
        PREPARE | ABORT | SYNC_POINT => 8,
        GO => 16,
        _ => {
            let text = format!("byte {at:#x}: command {number:#x} ({}) is not supported", name(number));
            return Err(Error::invalid(text).at_byte(at));
        }
    };
    if len != want {
        let text = format!("byte {at:#x}: command {number:#x} has the wrong length");
        return Err(Error::new(libc::ERANGE, text).at_byte(at).expected_got(want, len));
    }
    Ok(match number {
        OPEN_RETURN_PATH => Command::OpenReturnPath,
        PING => Command::Ping(input.u32()?),
        FDS => Command::Fds(input.u32()?),
        HASH => Command::Hash,
        HASHES => Command::Hashes,
        PAGE_HASHES => Command::PageHashes,
        PREPARE => Command::Prepare(input.u64()?),
        ABORT => Command::Abort(input.u64()?),
        SYNC_POINT => Command::SyncPoint(input.u64()?),
        GO => Command::Go(input.u64()?, input.u64()?),
        ERROR => {
            let len = input.u64()?;
            let json = input.blob("the source's error", len, ERROR_MAX)?;
            Command::Error(error_of(&json))
        }
        _ => Command::SwitchoverStart,
    })
}

fn error_of(json: &[u8]) -> Error {
    let json = serde_json::from_slice(json).unwrap_or_default();
    let unreadable = || Error::new(libc::EIO, "the source failed; its error could not be read");
    Error::from_json(&json).unwrap_or_else(unreadable).on_side("source")
}

/// The source's error, if a stream of which this is the end ends with one.
pub fn last_words(end: &[u8]) -> Option<Error> {
    const HEAD: [u8; 4] = [ERROR.to_be_bytes()[0], ERROR.to_be_bytes()[1], 0, 0];
    let json = end.windows(HEAD.len()).enumerate().find_map(|(at, head)| {
        let (len, json) = end.get(at + HEAD.len()..)?.split_first_chunk()?;
        (head == HEAD && u64::from_be_bytes(*len) == json.len() as u64).then_some(json)
    })?;
    Some(error_of(json))
}

/// Writes a command after its type byte.
pub fn put(out: &mut Vec<u8>, command: Command) {
    match command {
        Command::OpenReturnPath => {
            out.u16(OPEN_RETURN_PATH);
            out.u16(0);
        }
        Command::Ping(value) => {
            out.u16(PING);
            out.u16(4);
            out.u32(value);
        }
        Command::SwitchoverStart => {
            out.u16(SWITCHOVER_START);
            out.u16(0);
        }
        Command::Fds(count) => {
            out.u16(FDS);
            out.u16(4);
            out.u32(count);
        }
        Command::Hash => {
            out.u16(HASH);
            out.u16(0);
        }
        Command::Hashes => {
            out.u16(HASHES);
            out.u16(0);
        }
        Command::PageHashes => {
            out.u16(PAGE_HASHES);
            out.u16(0);
        }
        Command::Prepare(epoch) => {
            out.u16(PREPARE);
            out.u16(8);
            out.u64(epoch);
        }
        Command::Go(epoch, incarnation) => {
            out.u16(GO);
            out.u16(16);
            out.u64(epoch);
            out.u64(incarnation);
        }
        Command::Abort(epoch) => {
            out.u16(ABORT);
            out.u16(8);
            out.u64(epoch);
        }
        Command::Error(error) => {
            let json = error.to_json_for_peer().to_string();
            out.u16(ERROR);
            out.u16(0);
            out.u64(json.len() as u64);
            out.bytes(json.as_bytes());
        }
        Command::SyncPoint(number) => {
            out.u16(SYNC_POINT);
            out.u16(8);
            out.u64(number);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::input::Slice;
    use super::*;

    #[test]
    fn round_trip_and_refusals() {
        let error = Command::Error(Error::invalid("late writer").in_section("ram").on_side("source"));
        let words = [Command::Prepare(1 << 40), Command::Go(5, u64::MAX), Command::Abort(6), error];
        let plain = [Command::OpenReturnPath, Command::Ping(7), Command::SwitchoverStart, Command::Fds(3)];
        let plain = plain.into_iter().chain([Command::SyncPoint(9)]);
        let verify = [Command::Hash, Command::Hashes, Command::PageHashes];
        for command in plain.chain(verify).chain(words) {
            let mut out = Vec::new();
            put(&mut out, command.clone());
            assert_eq!(read(&mut Slice::new(&out)).unwrap(), command);
            out[3] ^= 1;
            assert_eq!(read(&mut Slice::new(&out)).unwrap_err().errno(), libc::ERANGE);
        }
        for number in [0u16, 3, 7, 8, 12, 0x5602, 0xffff] {
            let mut out = Vec::new();
            out.u16(number);
            out.u16(0);
            assert_eq!(read(&mut Slice::new(&out)).unwrap_err().errno(), libc::EINVAL, "{number}");
        }
    }

    #[test]
    fn last_words_are_found_at_the_very_end() {
        let mut out = vec![8];
        put(&mut out, Command::Error(Error::invalid("late writer")));
        let with = |before: &[u8], after: &[u8]| last_words(&[before, &out, after].concat()).map(|e| e.to_string());
        assert_eq!(with(b"", b"").as_deref(), Some("source: late writer"));
        assert_eq!(with(b"\x56\0\0\0\x56\0\0", b"").as_deref(), Some("source: late writer"));
        assert_eq!((with(b"", b"x"), last_words(&out[..out.len() - 1]), last_words(b"")), (None, None, None));
    }
}
