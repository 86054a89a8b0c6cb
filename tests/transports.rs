//! One test of what a connection is, run over every kind there is: tcp, unix, fd (sockets, pipes), custom (callbacks over
//! a socket pair), exec, file. Here a channel is used as the migration uses it, and its other end is the test's.
#![allow(clippy::unwrap_used, reason = "a test")]
#![allow(unsafe_code, reason = "signals, FIFOs, and callbacks as a C program has them")]
#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_possible_wrap, reason = "a test")]

mod common;
#[path = "transports/kinds.rs"]
mod kinds;
#[path = "transports/scheme.rs"]
mod scheme;

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kinds::{IN, Kind, LONG, OUT, Peer, TWO_WAY, World, connected};
use vmig::sys::io::{Piece, Room};
use vmig::transport::Channel;

/// More than any buffer on the way holds.
const MUCH: usize = 9 << 20;
const SHORT: Duration = Duration::from_millis(60);

fn pattern(len: usize) -> Vec<u8> {
    (0..len as u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}

/// Writes all, in pieces of every size; how many writes that took.
fn write_all(channel: &dyn Channel, bytes: &[u8], steps: &[usize]) -> vmig::error::Result<usize> {
    let (mut at, mut writes, mut step) = (0, 0, steps.iter().cycle());
    while at < bytes.len() {
        let most = at + step.next().unwrap().min(&(bytes.len() - at));
        let middle = at + (most - at) / 3;
        let sent = channel.write(&[Piece::of(&bytes[at..middle]), Piece::of(&bytes[middle..most])], LONG)?;
        assert!(sent > 0 && sent <= most - at);
        (at, writes) = (at + sent, writes + 1);
    }
    Ok(writes)
}

/// Reads until the end, in pieces of every size, into slices and rooms by turns.
fn read_all(channel: &dyn Channel, steps: &[usize]) -> vmig::error::Result<Vec<u8>> {
    let (mut all, mut step) = (Vec::new(), steps.iter().cycle());
    let mut buf = vec![0; *steps.iter().max().unwrap()];
    for turn in 0.. {
        let some = &mut buf[..*step.next().unwrap()];
        let got = match turn % 2 {
            0 => channel.read(some, Some(LONG))?,
            _ => channel.read_room(&mut [Room::of(some)], Some(LONG))?,
        };
        if got == 0 {
            break;
        }
        all.extend_from_slice(&some[..got]);
    }
    Ok(all)
}

/// What arrives at the other end, read in odd pieces; a file's content is there when we are done.
fn peer_reads(peer: &mut Peer) -> Vec<u8> {
    if let Peer::File(path) = peer {
        let all = std::fs::read(path).unwrap();
        assert_eq!(&all[..6], b"before", "what stands before the offset is untouched");
        return all[6..].to_vec();
    }
    let (mut all, mut buf) = (Vec::new(), vec![0; 70_001]);
    for turn in 0_usize.. {
        let step = [1, 70_001, 13, 4096][turn % 4];
        match peer.read(&mut buf[..step]).unwrap() {
            0 => break,
            n => all.extend_from_slice(&buf[..n]),
        }
    }
    all
}

/// Sends everything from us to the peer, or from the peer to us, and compares.
fn transfer(kind: Kind, out: bool, bytes: &[u8], steps: &[usize]) -> usize {
    let mut world = World::new(kind, bytes);
    let (ours, mut writes) = (Arc::clone(&world.ours), 0);
    std::thread::scope(|scope| {
        if out {
            let is_file = matches!(world.peer, Peer::File(_));
            let peer = &mut world.peer;
            let reader = (!is_file).then(|| scope.spawn(|| peer_reads(peer)));
            writes = write_all(&*ours, bytes, steps).unwrap();
            ours.close_write();
            if let Some(reader) = reader {
                assert!(reader.join().unwrap() == bytes, "{kind:?}: other bytes arrived");
            }
        } else {
            let peer = &mut world.peer;
            let writer = scope.spawn(|| {
                bytes.chunks(77_777).for_each(|some| peer.write_all(some).unwrap());
                peer.close_write();
            });
            assert!(read_all(&*ours, steps).unwrap() == bytes, "{kind:?}: other bytes came");
            writer.join().unwrap();
        }
    });
    if out && matches!(world.peer, Peer::File(_)) {
        assert!(peer_reads(&mut world.peer) == bytes, "{kind:?}: other bytes in the file");
    }
    drop(ours);
    world.end();
    writes
}

#[test]
fn what_is_written_in_pieces_of_any_size_arrives() {
    let bytes = pattern(MUCH);
    for kind in OUT {
        transfer(kind, true, &bytes, &[1, 7, 4096, 300_000, 3 << 20]);
    }
    for kind in IN {
        transfer(kind, false, &bytes, &[1, 7, 4096, 300_000, 3 << 20]);
    }
}

#[test]
fn thousands_of_tiny_writes_arrive_in_order() {
    let bytes = pattern(20_000);
    for kind in OUT {
        let writes = transfer(kind, true, &bytes, &[1, 2, 1]);
        assert!(writes > 10_000, "{kind:?}: only {writes}");
    }
    for kind in IN {
        transfer(kind, false, &bytes, &[1, 2, 3]);
    }
}

extern "C" fn nothing(_: libc::c_int) {}

/// Set when it goes, which it does when a test fails, too.
struct AtEnd<'a>(&'a AtomicBool);

impl Drop for AtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Signals without SA_RESTART rain on the thread that works: EINTR is no end, and loses nothing.
#[test]
fn signals_do_no_harm() {
    // SAFETY: an all-zero sigaction is valid.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as usize;
    // SAFETY: the action was filled above; the handler does nothing.
    assert_eq!(unsafe { libc::sigaction(libc::SIGUSR1, &raw const action, std::ptr::null_mut()) }, 0);
    let bytes = pattern(MUCH);
    // SAFETY: pthread_self takes no arguments.
    let me = unsafe { libc::pthread_self() };
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                // SAFETY: the thread lives: it waits for this one at the end of the scope.
                unsafe { libc::pthread_kill(me, libc::SIGUSR1) };
                std::thread::sleep(Duration::from_micros(200));
            }
        });
        let _end = AtEnd(&over);
        for kind in OUT {
            transfer(kind, true, &bytes, &[300_000, 1]);
        }
        for kind in IN {
            transfer(kind, false, &bytes, &[300_000, 1]);
        }
    });
}

#[test]
fn each_direction_ends_by_itself() {
    for kind in TWO_WAY {
        let mut world = World::new(kind, &[]);
        world.ours.write(&[Piece::of(b"question")], LONG).unwrap();
        world.ours.close_write();
        assert_eq!(peer_reads(&mut world.peer), b"question", "{kind:?}");
        assert!(world.ours.write(&[Piece::of(b"more")], SHORT).is_err(), "{kind:?}: closed for writing");
        world.peer.write_all(b"answer").unwrap();
        world.peer.close_write();
        assert_eq!(read_all(&*world.ours, &[3]).unwrap(), b"answer", "{kind:?}");
        assert_eq!(world.ours.read(&mut [0; 4], Some(LONG)).unwrap(), 0, "{kind:?}: the end stays the end");
        world.end();
    }
}

fn fill(channel: &dyn Channel, limit: Duration) -> vmig::error::Error {
    let bytes = pattern(1 << 20);
    loop {
        if let Err(error) = channel.write(&[Piece::of(&bytes)], limit) {
            return error;
        }
    }
}

#[test]
fn a_peer_that_stalls_is_noticed_both_ways() {
    for kind in OUT.into_iter().filter(|kind| !kind.is_file()) {
        let world = World::new(kind, &[]);
        let error = fill(&*world.ours, SHORT);
        assert_eq!(error.errno(), libc::ETIMEDOUT, "{kind:?}: {error}");
        assert_eq!(error.text(), "the peer took no byte for 0.06 seconds (option 'stall-timeout')", "{kind:?}");
        world.end();
    }
    for kind in IN.into_iter().filter(|kind| !kind.is_file()) {
        let world = World::new(kind, &[]);
        let error = world.ours.read(&mut [0; 9], Some(SHORT)).unwrap_err();
        assert_eq!(error.text(), "the peer sent no byte for 0.06 seconds (option 'stall-timeout')", "{kind:?}");
        world.end();
    }
}

/// Runs `end` while another thread waits in a read, or in a write; what that came to.
fn ended_by(kind: Kind, writing: bool, end: fn(&World)) -> i32 {
    let world = World::new(kind, &[]);
    let ours = Arc::clone(&world.ours);
    let waits = std::thread::spawn(move || match writing {
        true => fill(&*ours, LONG).errno(),
        false => ours.read(&mut [0; 9], None).map_or_else(|e| e.errno(), |n| n as i32),
    });
    std::thread::sleep(SHORT);
    end(&world);
    let errno = waits.join().unwrap();
    world.end();
    errno
}

#[test]
fn a_cancel_ends_every_wait() {
    for (kind, writing) in waits() {
        assert_eq!(ended_by(kind, writing, |world| world.wake.raise()), libc::ECANCELED, "{kind:?} {writing}");
    }
}

fn waits() -> impl Iterator<Item = (Kind, bool)> {
    let out = OUT.into_iter().filter(|kind| !kind.is_file()).map(|kind| (kind, true));
    out.chain(IN.into_iter().filter(|kind| !kind.is_file()).map(|kind| (kind, false)))
}

#[test]
fn shutdown_ends_the_waits_of_other_threads() {
    for (kind, writing) in waits() {
        let ended = ended_by(kind, writing, |world| world.ours.shutdown());
        let wanted = [0, libc::EPIPE, libc::ESHUTDOWN];
        assert!(wanted.contains(&ended), "{kind:?} {writing}: {ended}");
    }
}

#[test]
fn a_peer_that_goes_is_an_error_and_no_signal() {
    // SIGPIPE is ignored in Rust programs; tests/manners.rs has a program where it is not.
    for kind in OUT.into_iter().filter(|kind| !kind.is_file()) {
        let mut world = World::new(kind, &[]);
        world.ours.write(&[Piece::of(&pattern(5000))], LONG).unwrap();
        // Unread bytes make it a reset.
        world.peer = Peer::Pipe(None);
        let error = fill(&*world.ours, LONG);
        assert!([libc::EPIPE, libc::ECONNRESET].contains(&error.errno()), "{kind:?}: {error}");
        if TWO_WAY.contains(&kind) {
            let read = world.ours.read(&mut [0; 9], Some(LONG));
            assert!(read.as_ref().map_or_else(|e| e.errno() != libc::ETIMEDOUT, |n| *n == 0), "{kind:?}: {read:?}");
        }
        world.end();
    }
}

/// Whatever lies between us and the disk.
#[test]
fn a_full_disk_is_an_error_that_says_so() {
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    for (uri, errno) in [
        ("file:/dev/full".to_owned(), libc::ENOSPC),
        ("file:/dev/full,offset=4096".to_owned(), libc::ENOSPC),
        (format!("fd:{}", full.as_raw_fd()), libc::ENOSPC),
        ("exec:exec cat >/dev/full".to_owned(), libc::EPIPE),
        ("exec:cat | cat >/dev/full; exit 9".to_owned(), libc::EPIPE),
    ] {
        let (ours, threads) = connected(&uri);
        let error = fill(&*ours, LONG);
        assert!(error.errno() == errno && error.text().contains("No space left on device"), "{uri}: {error}");
        assert!(ours.is_lost(), "{uri}");
        drop(ours);
        threads.join_all(Some(LONG)).unwrap();
    }
}

#[test]
fn a_child_that_dies_is_an_error_with_its_status_and_words() {
    for (command, words) in [
        ("head -c 5000 >/dev/null; echo sorry >&2; exit 3", "it ended with status 3 and said: sorry"),
        ("head -c 5000 >/dev/null; kill -9 $$", "it was killed by signal 9"),
        ("exec no-such-program", "it ended with status 127"),
    ] {
        let (ours, threads) = connected(&format!("exec:{command}"));
        let error = fill(&*ours, LONG);
        assert!(error.errno() == libc::EPIPE && error.text().contains(words), "{command}: {error}");
        drop(ours);
        threads.join_all(Some(LONG)).unwrap();
    }
    for (command, came, words) in [
        ("printf abc; echo sorry >&2; exit 3", &b"abc"[..], "ended with status 3 and said: sorry"),
        ("printf abc; kill -9 $$", b"abc", "was killed by signal 9"),
        ("exit 4", b"", "ended with status 4"),
    ] {
        let (ours, threads) = connected(&format!("exec:{command}"));
        let mut got = Vec::new();
        let error = loop {
            let mut some = [0; 2];
            match ours.read(&mut some, Some(LONG)) {
                Ok(0) => panic!("{command}: a good end"),
                Ok(n) => got.extend_from_slice(&some[..n]),
                Err(error) => break error,
            }
        };
        assert!(got == came && error.errno() == libc::EIO && error.text().contains(words), "{command}: {error}");
        drop(ours);
        threads.join_all(Some(LONG)).unwrap();
    }
}
