//! Frames over a real socket: whatever goes in comes out, and what changed on its way never does.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;

use super::Channel;
use super::channel::FdChannel;
use super::stream::{StreamInput, StreamOutput};
use crate::error::Result;
use crate::ram::PAGE_BYTES;
use crate::sys::eventfd::Wake;
use crate::sys::io::Piece;
use crate::wire::frame::{self, Bodies};
use crate::wire::input::Input;

const SECOND: Duration = Duration::from_secs(1);

fn channel(stream: UnixStream) -> Arc<dyn Channel> {
    Arc::new(FdChannel::new(OwnedFd::from(stream), &Arc::new(Wake::new().unwrap())).unwrap())
}

/// The bytes on the wire of these writes: each as one, in pieces, or as bodies.
fn on_the_wire(writes: &[(u8, Vec<Vec<u8>>)]) -> Vec<u8> {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let reader = std::thread::spawn(move || {
        let mut all = Vec::new();
        theirs.read_to_end(&mut all).map(|_| all)
    });
    let ours = channel(ours);
    let mut out = StreamOutput::new(Arc::clone(&ours), SECOND);
    out.use_frames().unwrap();
    for (way, parts) in writes {
        match way {
            0 => out.write(&parts.concat()).unwrap(),
            1 => out.write_pieces(&mut parts.iter().map(|p| Piece::of(p)).collect::<Vec<_>>()).unwrap(),
            _ => {
                let mut bodies = Bodies::default();
                parts.iter().for_each(|part| {
                    bodies.begin();
                    bodies.bytes.extend(part);
                });
                out.write_bodies(&bodies).unwrap();
            }
        }
    }
    ours.close_write();
    let wire = reader.join().unwrap().unwrap();
    assert_eq!(out.written(), wire.len() as u64);
    wire
}

/// What a reader makes of them: all bytes up to its error, and that.
fn read_back(wire: Vec<u8>, len: usize, step: usize) -> (Vec<u8>, Result<()>) {
    let (mut theirs, ours) = UnixStream::pair().unwrap();
    let writer = std::thread::spawn(move || {
        let _ = theirs.write_all(&wire).and_then(|()| theirs.shutdown(Shutdown::Write));
    });
    let mut input = StreamInput::new(channel(ours), SECOND);
    input.expect_frames().unwrap();
    let mut got = Vec::new();
    let mut read = || -> Result<()> {
        while got.len() < len {
            let step = step.min(len - got.len());
            if step == PAGE_BYTES {
                input.page(|page| got.extend(page))?;
            } else {
                let mut some = vec![0; step.min(1000)];
                some.copy_from_slice(input.peek(step.min(1000))?);
                input.read(&mut some)?;
                got.extend(some);
            }
            assert_eq!(input.position(), got.len() as u64);
        }
        Ok(())
    };
    let result = read();
    drop(input);
    writer.join().unwrap();
    (got, result)
}

fn writes() -> impl Strategy<Value = Vec<(u8, Vec<Vec<u8>>)>> {
    let size = prop_oneof![0..40_usize, Just(PAGE_BYTES), 0..20_000_usize];
    let part = (size, any::<u8>()).prop_map(|(size, seed)| {
        let byte = |n: usize| u8::try_from(n % 251).unwrap_or_default() ^ seed;
        (0..size).map(byte).collect::<Vec<u8>>()
    });
    prop::collection::vec((0..3_u8, prop::collection::vec(part, 0..6)), 1..5)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn what_goes_in_comes_out_and_nothing_else_does(
        writes in writes(),
        step in prop_oneof![1..9_usize, Just(PAGE_BYTES), 1..5000_usize],
        bit in any::<prop::sample::Index>(),
    ) {
        let sent = writes.iter().flat_map(|(_, parts)| parts.concat()).collect::<Vec<u8>>();
        let mut wire = on_the_wire(&writes);
        let (got, result) = read_back(wire.clone(), sent.len(), step);
        prop_assert!(result.is_ok() && got == sent, "{result:?}");
        if !wire.is_empty() {
            let bit = bit.index(wire.len() * 8);
            wire[bit / 8] ^= 1 << (bit % 8);
            let (got, result) = read_back(wire, sent.len(), step);
            prop_assert_eq!(result.map_err(|e| e.errno()), Err(libc::EBADMSG), "bit {}", bit);
            prop_assert!(sent.starts_with(&got), "nothing of a changed frame comes out");
        }
    }
}

#[test]
fn frames_of_the_largest_size_follow_each_other() {
    let large: Vec<u8> = (0..3 * frame::LEN_MAX + 5).map(|n| n.to_le_bytes()[1] ^ n.to_le_bytes()[0]).collect();
    for way in 0..3 {
        let wire = on_the_wire(&[(way, vec![large.clone()])]);
        assert_eq!(wire.len(), large.len() + 4 * frame::HEAD);
        let (got, result) = read_back(wire, large.len(), PAGE_BYTES);
        result.unwrap();
        assert!(got == large, "way {way}");
    }
}
