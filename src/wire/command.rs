//! Commands: what a source tells a destination between sections.

use super::input::{Input, Slice};
use super::output::Put;
use crate::error::{Error, Result};

const OPEN_RETURN_PATH: u16 = 1;
const PING: u16 = 2;
const ADVISE: u16 = 3;
const LISTEN: u16 = 4;
const RUN: u16 = 5;
const DISCARD: u16 = 6;
const PACKAGE: u16 = 7;
const COLO: u16 = 8;
const RESUME: u16 = 9;
const ASK_BITMAP: u16 = 10;
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

/// A command of QEMU's postcopy, which a destination of ours refuses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Postcopy {
    /// The guest may be started before all pages came: page sizes of host and target.
    Advise(Option<(u64, u64)>),
    /// Be ready to answer for pages that are missing.
    Listen,
    /// Start the guest.
    Run,
    /// These pages of the block come again: offset and length in bytes.
    Discard(String, Vec<(u64, u64)>),
    /// So many bytes of the stream follow in one piece.
    Package(u32),
    /// The source goes on after a lost connection.
    Resume,
    /// Which pages of this block are there?
    AskBitmap(String),
    /// Checkpoints follow.
    Colo,
}

/// A command, whether a destination of ours takes it or not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Any {
    /// It does.
    Taken(Command),
    /// It does not.
    Postcopy(Postcopy),
}

/// Names of QEMU's other commands, for the error that refuses them.
fn name(number: u16) -> &'static str {
    match number {
        ADVISE..=DISCARD | RESUME | ASK_BITMAP => "a postcopy command",
        PACKAGE => "PACKAGED (postcopy)",
        COLO => "ENABLE_COLO",
        _ => "unknown",
    }
}

/// Reads any command after its type byte.
pub fn read_any(input: &mut dyn Input) -> Result<Any> {
    let at = input.position();
    let (number, len) = (input.u16()?, input.u16()?);
    if !(ADVISE..=ASK_BITMAP).contains(&number) {
        return taken(input, at, number, len).map(Any::Taken);
    }
    let payload = input.blob("a command", len.into(), len.into())?;
    let mut payload = Slice::new(&payload);
    let command = postcopy(&mut payload, number);
    match command.ok().filter(|_| payload.rest().is_empty()) {
        Some(command) => Ok(Any::Postcopy(command)),
        None => {
            let text = format!("byte {at:#x}: command {number:#x} ({}) makes no sense", name(number));
            Err(Error::invalid(text).at_byte(at))
        }
    }
}

fn postcopy(payload: &mut Slice<'_>, number: u16) -> Result<Postcopy> {
    Ok(match number {
        ADVISE if payload.rest().is_empty() => Postcopy::Advise(None),
        ADVISE => Postcopy::Advise(Some((payload.u64()?, payload.u64()?))),
        LISTEN => Postcopy::Listen,
        RUN => Postcopy::Run,
        DISCARD => {
            let (version, block, end) = (payload.u8()?, payload.counted_string()?, payload.u8()?);
            if (version, end) != (0, 0) {
                return Err(Error::invalid("unknown form"));
            }
            let mut ranges = Vec::new();
            while !payload.rest().is_empty() {
                ranges.push((payload.u64()?, payload.u64()?));
            }
            Postcopy::Discard(block, ranges)
        }
        PACKAGE => Postcopy::Package(payload.u32()?),
        COLO => Postcopy::Colo,
        RESUME => Postcopy::Resume,
        _ => Postcopy::AskBitmap(payload.counted_string()?),
    })
}

/// Reads a command that a destination of ours can take, after its type byte.
pub fn read(input: &mut dyn Input) -> Result<Command> {
    let at = input.position();
    let (number, len) = (input.u16()?, input.u16()?);
    taken(input, at, number, len)
}

fn taken(input: &mut dyn Input, at: u64, number: u16, len: u16) -> Result<Command> {
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
    fn commands_of_postcopy_are_read_where_they_are_wanted() {
        let cases = [
            (&b"\0\x03\0\0"[..], Postcopy::Advise(None)),
            (b"\0\x03\0\x10\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\x10\0", Postcopy::Advise(Some((4096, 4096)))),
            (b"\0\x04\0\0", Postcopy::Listen),
            (b"\0\x05\0\0", Postcopy::Run),
            (
                b"\0\x06\0\x14\0\x01a\0\0\0\0\0\0\0\x20\0\0\0\0\0\0\0\x10\0",
                Postcopy::Discard("a".into(), vec![(0x2000, 0x1000)]),
            ),
            (b"\0\x07\0\x04\0\0\0\x09", Postcopy::Package(9)),
            (b"\0\x08\0\0", Postcopy::Colo),
            (b"\0\x09\0\0", Postcopy::Resume),
            (b"\0\x0a\0\x02\x01b", Postcopy::AskBitmap("b".into())),
        ];
        for (bytes, command) in cases {
            assert_eq!(read_any(&mut Slice::new(bytes)).unwrap(), Any::Postcopy(command.clone()));
            assert!(read(&mut Slice::new(bytes)).is_err(), "{command:?} is not for our destination");
            for len in 0..bytes.len() {
                assert!(read_any(&mut Slice::new(&bytes[..len])).is_err(), "{command:?} cut at {len}");
            }
            let mut long = bytes.to_vec();
            long[3] += 1;
            long.push(0);
            assert!(read_any(&mut Slice::new(&long)).is_err(), "{command:?} with a byte too many");
        }
        let mut ping = Vec::new();
        put(&mut ping, Command::Ping(3));
        assert_eq!(read_any(&mut Slice::new(&ping)).unwrap(), Any::Taken(Command::Ping(3)));
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
