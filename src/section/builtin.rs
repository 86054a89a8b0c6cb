//! The two sections every stream has: `timer` (the virtual clock) and `globalstate` (does the guest run?).
//!
//! Their shapes are QEMU's; a stock QEMU sends and expects them.

use crate::error::{Error, Result};
use crate::wire::input::Input;
use crate::wire::output::Put;

/// Name and version of the clock's section.
pub const TIMER: (&str, u32) = ("timer", 2);
/// Name and version of the run state's section.
pub const GLOBAL_STATE: (&str, u32) = ("globalstate", 1);

const STATE_BYTES: usize = 32;
const STATE_PADDING: usize = 66;

/// Body of `timer`: no CPU ticks, the virtual clock.
pub fn put_timer(out: &mut Vec<u8>, clock_ns: u64) {
    out.u64(0);
    out.bytes(&[0; 8]);
    out.u64(clock_ns);
}

/// Reads the virtual clock.
pub fn read_timer(input: &mut dyn Input) -> Result<u64> {
    input.read(&mut [0; 16])?;
    input.u64()
}

/// Body of `globalstate`.
pub fn put_global_state(out: &mut Vec<u8>, running: bool) {
    let name = if running { "running" } else { "paused" };
    let mut text = [0; STATE_BYTES];
    text[..name.len()].copy_from_slice(name.as_bytes());
    // Length of the name and its NUL.
    out.u32(if running { 8 } else { 7 });
    out.bytes(&text);
    out.u8(1);
    out.u8(0);
    out.bytes(&[0; STATE_PADDING]);
}

/// Reads whether the guest runs.
pub fn read_global_state(input: &mut dyn Input) -> Result<bool> {
    let size = input.u32()?;
    let mut text = [0; STATE_BYTES];
    input.read(&mut text)?;
    input.read(&mut [0; 2 + STATE_PADDING])?;
    let end = text.iter().position(|b| *b == 0);
    let name = end.and_then(|end| std::str::from_utf8(&text[..end]).ok());
    match name {
        Some(name) if name.len() as u64 + 1 == u64::from(size) => match name {
            "running" => Ok(true),
            "paused" | "prelaunch" | "postmigrate" | "finish-migrate" | "suspended" => Ok(false),
            _ => Err(Error::invalid(format!("unknown run state '{}'", name.escape_default()))),
        },
        _ => Err(Error::invalid("the run state's name is damaged").expected_got("a name", format!("{size} bytes"))),
    }
}

/// Description of `timer` for the stream.
pub fn describe_timer() -> serde_json::Value {
    serde_json::json!({"vmsd_name": "timer", "version": 2, "fields": [
        {"name": "cpu_ticks_offset", "type": "int64", "size": 8},
        {"name": "unused", "type": "unused_buffer", "size": 8},
        {"name": "cpu_clock_offset", "type": "int64", "size": 8},
    ]})
}

/// Description of `globalstate` for the stream.
pub fn describe_global_state() -> serde_json::Value {
    serde_json::json!({"vmsd_name": "globalstate", "version": 1, "fields": [
        {"name": "size", "type": "uint32", "size": 4},
        {"name": "runstate", "type": "buffer", "size": STATE_BYTES},
        {"name": "has_vm_was_suspended", "type": "bool", "size": 1},
        {"name": "vm_was_suspended", "type": "bool", "size": 1},
        {"name": "unused", "type": "unused_buffer", "size": STATE_PADDING},
    ]})
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::input::Slice;

    #[test]
    fn sizes_are_qemus() {
        let (mut timer, mut state) = (Vec::new(), Vec::new());
        put_timer(&mut timer, 5);
        put_global_state(&mut state, true);
        assert_eq!((timer.len(), state.len()), (24, 104));
        let sum = |json: serde_json::Value| {
            json["fields"].as_array().unwrap().iter().map(|f| f["size"].as_u64().unwrap()).sum::<u64>()
        };
        assert_eq!((sum(describe_timer()), sum(describe_global_state())), (24, 104));
    }

    #[test]
    fn round_trip() {
        let mut out = Vec::new();
        put_timer(&mut out, 123);
        assert_eq!(read_timer(&mut Slice::new(&out)).unwrap(), 123);
        for running in [true, false] {
            let mut out = Vec::new();
            put_global_state(&mut out, running);
            assert_eq!(read_global_state(&mut Slice::new(&out)).unwrap(), running);
            out[6] ^= 1;
            assert!(read_global_state(&mut Slice::new(&out)).is_err());
            out[6] ^= 1;
            out[3] ^= 1;
            assert!(read_global_state(&mut Slice::new(&out)).is_err());
        }
    }
}
