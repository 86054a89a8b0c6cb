//! Commands: what a source tells a destination between sections.

use super::input::Input;
use super::output::Put;
use crate::error::{Error, Result};

const OPEN_RETURN_PATH: u16 = 1;
const PING: u16 = 2;
const SWITCHOVER_START: u16 = 11;
/// Ours, between two vmigs only.
const FDS: u16 = 0x5601;

/// The commands of a precopy migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Answer from now on.
    OpenReturnPath,
    /// Answer with PONG and this value.
    Ping(u32),
    /// The guest is stopped; the last sections follow.
    SwitchoverStart,
    /// So many file descriptors came with these bytes, for the bodies that follow.
    Fds(u32),
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
        OPEN_RETURN_PATH | SWITCHOVER_START => 0,
        PING | FDS => 4,
        _ => {
            let text = format!("byte {at:#x}: command {number:#x} ({}) is not supported", name(number));
            return Err(Error::invalid(text));
        }
    };
    if len != want {
        let text = format!("byte {at:#x}: command {number:#x} has the wrong length");
        return Err(Error::new(libc::ERANGE, text).expected_got(want, len));
    }
    Ok(match number {
        OPEN_RETURN_PATH => Command::OpenReturnPath,
        PING => Command::Ping(input.u32()?),
        FDS => Command::Fds(input.u32()?),
        _ => Command::SwitchoverStart,
    })
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
    }
}

#[cfg(test)]
mod tests {
    use super::super::input::Slice;
    use super::*;

    #[test]
    fn round_trip_and_refusals() {
        for command in [Command::OpenReturnPath, Command::Ping(7), Command::SwitchoverStart, Command::Fds(3)] {
            let mut out = Vec::new();
            put(&mut out, command);
            assert_eq!(read(&mut Slice::new(&out)).unwrap(), command);
            out[3] ^= 1;
            assert_eq!(read(&mut Slice::new(&out)).unwrap_err().errno(), libc::ERANGE);
        }
        for number in [0u16, 3, 7, 8, 12, 0x5600, 0xffff] {
            let mut out = Vec::new();
            out.u16(number);
            out.u16(0);
            assert_eq!(read(&mut Slice::new(&out)).unwrap_err().errno(), libc::EINVAL, "{number}");
        }
    }
}
