//! A relay that changes one bit on its way.
#![allow(dead_code, reason = "each test file uses its own part of this")]
#![allow(clippy::unwrap_used, reason = "a test")]

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

const INIT: usize = 64;
/// Bytes of a packet before its pages.
pub(crate) const HEADER: usize = 1344;
const SHORT: Duration = Duration::from_millis(50);

/// Which bit changes, once.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Bit {
    /// Of the first packet with pages of this block: at this byte of it.
    Packet(&'static str, usize),
    /// Of a channel's first packet.
    Init(usize),
    /// Of the main stream, so many bytes behind where these bytes are first seen.
    Behind(&'static [u8], usize),
}

/// All of `size` bytes, if they come.
fn take(from: &mut TcpStream, size: usize) -> Option<Vec<u8>> {
    let mut bytes = vec![0; size];
    from.read_exact(&mut bytes).ok().map(|()| bytes)
}

/// Passes a channel on, packet by packet.
fn pass_channel(mut from: TcpStream, mut to: TcpStream, bit: Bit) {
    let Some(mut init) = take(&mut from, INIT) else { return };
    if let Bit::Init(at) = bit {
        init[at] ^= 1;
    }
    let (mut sent, mut done) = (to.write_all(&init).is_ok(), false);
    while sent {
        let Some(header) = take(&mut from, HEADER) else { break };
        let size = u32::from_be_bytes(*header[20..].first_chunk().unwrap()) as usize;
        let Some(pages) = take(&mut from, size) else { break };
        let mut packet = [header, pages].concat();
        if let (Bit::Packet(block, at), false, 1..) = (bit, done, size)
            && packet[64..].starts_with(block.as_bytes())
            && at < packet.len()
        {
            packet[at] ^= 0x10;
            done = true;
        }
        sent = to.write_all(&packet).is_ok();
    }
    let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
}

/// Passes the main connection on; where the pattern may have begun it waits for more.
fn pass_main(mut from: TcpStream, mut to: TcpStream, bit: Bit) {
    let (pattern, behind) = if let Bit::Behind(pattern, behind) = bit { (pattern, behind) } else { (&b""[..], 0) };
    let (mut held, mut some, mut done) = (Vec::new(), [0; 65536], pattern.is_empty());
    from.set_read_timeout(Some(SHORT)).unwrap();
    loop {
        let more = match from.read(&mut some) {
            Ok(n @ 1..) => n,
            // Nothing more for now: it was not the pattern that had begun.
            Err(error) if error.kind() == ErrorKind::WouldBlock => 0,
            _ => break,
        };
        held.extend(&some[..more]);
        if !done {
            match held.windows(pattern.len()).position(|w| w == pattern) {
                Some(at) if at + behind < held.len() => (held[at + behind], done) = (held[at + behind] ^ 0x10, true),
                Some(_) if more > 0 => continue,
                None if more > 0 && (1..pattern.len()).any(|n| held.ends_with(&pattern[..n])) => continue,
                _ => (),
            }
        }
        if to.write_all(&held).is_err() {
            break;
        }
        held.clear();
    }
    let _ = to.shutdown(Shutdown::Write);
}

/// Between a source with `channels` and `address`.
pub(crate) fn relay(address: &str, channels: usize, bit: Bit) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (own, address) = (listener.local_addr().unwrap(), address.strip_prefix("tcp:").unwrap().to_owned());
    thread::spawn(move || {
        for n in 0..=channels {
            let Ok((source, _)) = listener.accept() else { return };
            let there = TcpStream::connect(&address).unwrap();
            let (mut back, mut forth) = (there.try_clone().unwrap(), source.try_clone().unwrap());
            thread::spawn(move || {
                let _ = std::io::copy(&mut back, &mut forth);
                let _ = forth.shutdown(Shutdown::Both);
            });
            let pass = if n == 0 { pass_main } else { pass_channel };
            thread::spawn(move || pass(source, there, bit));
        }
    });
    format!("tcp:{own}")
}
