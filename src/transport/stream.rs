//! Buffered reading and counted writing over a channel.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Channel;
use crate::error::{Error, Result};
use crate::ram::PAGE_BYTES;
use crate::sys::io::Piece;
use crate::wire::frame::{self, Bodies};
use crate::wire::input::{Input, PEEK_MAX, ends_early};

/// Room of a reader: large enough that a system call is rare, small enough to stay in the cache while it is copied out.
const BUFFER: usize = 256 << 10;
/// Room for the small messages of a return path.
const BUFFER_SMALL: usize = 4 << 10;
/// Room of a writer of frames: for one of the largest.
const FRAMES_ROOM: usize = frame::HEAD + frame::LEN_MAX;

/// Where a reader's bytes come from, and how long they may take.
#[derive(Debug)]
struct Wire {
    channel: Arc<dyn Channel>,
    limit: Option<Duration>,
    /// The moment by which everything wanted must be there, and how long that is from where it was set.
    deadline: Option<(Instant, Duration)>,
}

impl Wire {
    /// Reads once, as far as the peer may still be waited for.
    fn receive(&self, room: &mut [u8]) -> Result<usize> {
        let Some((deadline, limit)) = self.deadline else { return self.channel.read(room, self.limit) };
        let what = "the peer took the connection, but did not answer within";
        let late = || Error::timeout(super::CONNECT, limit, what);
        let left = deadline.saturating_duration_since(Instant::now());
        // Bytes that trickle do not make it longer.
        if left.is_zero() {
            return Err(late());
        }
        self.channel.read(room, Some(left)).map_err(|e| if e.errno() == libc::ETIMEDOUT { late() } else { e })
    }

    /// Fills `room`, with bytes that stand at `position` of the stream or just before.
    fn fill(&self, room: &mut [u8], position: u64) -> Result<()> {
        let mut filled = 0;
        while filled < room.len() {
            match self.receive(&mut room[filled..])? {
                0 => return Err(ends_early(position, (room.len() - filled) as u64)),
                n => filled += n,
            }
        }
        Ok(())
    }
}

/// The reading side of a stream.
#[derive(Debug)]
pub struct StreamInput {
    wire: Wire,
    /// The stream comes in frames.
    frames: bool,
    /// How the frame begins that arrived other than it was sent.
    rejected: Option<Vec<u8>>,
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    /// Position in the stream of `buffer[start]`.
    position: u64,
}

impl StreamInput {
    /// Reads a migration stream; fails when the peer is silent for `limit`.
    pub fn new(channel: Arc<dyn Channel>, limit: Duration) -> Self {
        Self::with_room(channel, Some(limit), BUFFER)
    }

    /// Reads replies, which may take as long as they like.
    pub fn of_replies(channel: Arc<dyn Channel>) -> Self {
        Self::with_room(channel, None, BUFFER_SMALL)
    }

    fn with_room(channel: Arc<dyn Channel>, limit: Option<Duration>, room: usize) -> Self {
        let buffer = vec![0; room].into_boxed_slice();
        let wire = Wire { channel, limit, deadline: None };
        Self { wire, frames: false, rejected: None, buffer, start: 0, end: 0, position: 0 }
    }

    /// Changes how long the peer may be silent.
    pub fn set_limit(&mut self, limit: Duration) {
        self.wire.limit = Some(limit);
    }

    /// From here on everything must come by `deadline`, which is `limit` after connecting began.
    pub fn set_deadline(&mut self, deadline: Option<(Instant, Duration)>) {
        self.wire.deadline = deadline;
    }

    /// From here on the peer sends frames.
    pub fn expect_frames(&mut self) -> Result<()> {
        if self.buffered() > 0 {
            return Err(Error::new(
                libc::EPROTO,
                "the peer sent more before it could know that checksums are wanted",
            ));
        }
        // What is left of a frame when the next is needed is less than a page.
        self.buffer = vec![0; frame::LEN_MAX + PAGE_BYTES].into_boxed_slice();
        (self.start, self.end, self.frames) = (0, 0, true);
        Ok(())
    }

    /// How the frame begins that arrived other than it was sent: no more than a hint what it was.
    pub fn rejected(&self) -> Option<&[u8]> {
        self.rejected.as_deref()
    }

    /// Takes in the next frame, behind what is there.
    fn next_frame(&mut self) -> Result<()> {
        let at = self.position + self.buffered() as u64;
        let mut head = [0; frame::HEAD];
        self.wire.fill(&mut head, at)?;
        let head = frame::read_head(&head, at)?;
        let room = self.end..self.end + head.len;
        let Some(room) = self.buffer.get_mut(room) else {
            return Err(Error::new(libc::EPROTO, "a frame came that there is no room for"));
        };
        self.wire.fill(room, at)?;
        head.check(room, at).inspect_err(|_| self.rejected = Some(room[..room.len().min(PEEK_MAX)].to_vec()))?;
        self.end += head.len;
        Ok(())
    }

    /// Makes at least `n` bytes available, `n` at most the room.
    fn need(&mut self, n: usize) -> Result<()> {
        while self.end - self.start < n {
            if self.start == self.end {
                (self.start, self.end) = (0, 0);
            } else if self.frames || self.buffer.len() - self.start < n {
                self.buffer.copy_within(self.start..self.end, 0);
                (self.start, self.end) = (0, self.end - self.start);
            }
            if self.frames {
                self.next_frame()?;
                continue;
            }
            let got = self.wire.receive(&mut self.buffer[self.end..])?;
            if got == 0 {
                let have = self.end - self.start;
                return Err(ends_early(self.position + have as u64, (n - have) as u64));
            }
            self.end += got;
        }
        Ok(())
    }

    fn advance(&mut self, n: usize) {
        self.start += n;
        self.position += n as u64;
    }

    /// Takes a page in place and gives it to `f`.
    pub fn page(&mut self, f: impl FnOnce(&[u8; PAGE_BYTES])) -> Result<()> {
        self.need(PAGE_BYTES)?;
        let (page, _) = self.buffer[self.start..self.end].split_first_chunk().ok_or_else(|| ends_early(0, 0))?;
        f(page);
        self.advance(PAGE_BYTES);
        Ok(())
    }

    /// Bytes that have arrived and were not taken.
    pub fn buffered(&self) -> usize {
        self.end - self.start
    }
}

impl Input for StreamInput {
    fn read(&mut self, buf: &mut [u8]) -> Result<()> {
        let mut filled = 0;
        while filled < buf.len() {
            self.need(1)?;
            let n = (self.end - self.start).min(buf.len() - filled);
            buf[filled..filled + n].copy_from_slice(&self.buffer[self.start..self.start + n]);
            self.advance(n);
            filled += n;
        }
        Ok(())
    }

    fn peek(&mut self, n: usize) -> Result<&[u8]> {
        debug_assert!(n <= PEEK_MAX);
        self.need(n)?;
        Ok(&self.buffer[self.start..self.start + n])
    }

    fn position(&self) -> u64 {
        self.position
    }
}

/// The writing side of a stream.
#[derive(Debug)]
pub struct StreamOutput {
    channel: Arc<dyn Channel>,
    limit: Duration,
    written: u64,
    broken: bool,
    /// The stream goes out in frames, which are put together here.
    frames: Option<Vec<u8>>,
}

impl StreamOutput {
    /// Writes to `channel`; fails when the peer takes nothing for `limit`.
    pub fn new(channel: Arc<dyn Channel>, limit: Duration) -> Self {
        Self { channel, limit, written: 0, broken: false, frames: None }
    }

    /// Bytes written so far.
    pub fn written(&self) -> u64 {
        self.written
    }

    /// Bytes written since the last call of this.
    pub fn take_written(&mut self) -> u64 {
        std::mem::take(&mut self.written)
    }

    /// Whether a write failed: the peer may know why.
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// Writes all bytes.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.write_pieces(&mut [Piece::of(bytes)])
    }

    /// From here on everything goes out in frames. What others may write meanwhile is copied first, so that what was
    /// summed is what is sent.
    pub fn use_frames(&mut self) -> Result<()> {
        let (mut room, len) = (Vec::new(), FRAMES_ROOM);
        room.try_reserve_exact(len).map_err(|_| Error::no_memory("frames of the stream", len as u64))?;
        self.frames = Some(room);
        Ok(())
    }

    /// Writes last words of at most [`LEN_MAX`](frame::LEN_MAX) bytes, even where the wake was raised, waiting for room
    /// for at most `limit`.
    pub fn write_last(&mut self, bytes: &[u8], limit: Duration) -> Result<()> {
        if self.frames.is_none() {
            return self.channel.write_last(bytes, limit);
        }
        let framed = framed(bytes);
        self.channel.write_last(&framed, limit)
    }

    /// Writes all parts, each in frames of its own if there are frames.
    pub fn write_bodies(&mut self, bodies: &Bodies) -> Result<()> {
        let Some(mut room) = self.frames.take() else { return self.write(&bodies.bytes) };
        room.clear();
        let mut written = Ok(());
        for some in bodies.iter().flat_map(|part| part.chunks(frame::LEN_MAX)) {
            if FRAMES_ROOM - room.len() < frame::HEAD + some.len() {
                written = written.and_then(|()| self.write_raw(&mut [Piece::of(&room)]));
                room.clear();
            }
            let start = room.len();
            room.extend([0; frame::HEAD]);
            room.extend(some);
            frame::seal(&mut room[start..]);
        }
        let written = written.and_then(|()| self.write_raw(&mut [Piece::of(&room)]));
        self.frames = Some(room);
        written
    }

    /// Writes all bytes; the descriptors, at most [`FDS_MAX`](super::FDS_MAX), arrive with the first.
    pub fn write_fds(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<()> {
        if self.frames.is_some() {
            return self.write_fds_raw(&framed(bytes), fds);
        }
        self.write_fds_raw(bytes, fds)
    }

    fn write_fds_raw(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<()> {
        let sent = self.channel.write_fds(bytes, fds, self.limit).inspect_err(|_| self.broken = true)?;
        self.written += sent as u64;
        self.write_raw(&mut [Piece::of(&bytes[sent..])])
    }

    /// Writes all pieces, in order; leaves them empty.
    pub fn write_pieces(&mut self, pieces: &mut [Piece<'_>]) -> Result<()> {
        let Some(mut room) = self.frames.take() else { return self.write_raw(pieces) };
        let written = self.write_framed(pieces, &mut room);
        self.frames = Some(room);
        written
    }

    fn write_framed(&mut self, pieces: &mut [Piece<'_>], room: &mut Vec<u8>) -> Result<()> {
        let mut next = 0;
        while next < pieces.len() {
            room.clear();
            room.extend([0; frame::HEAD]);
            while next < pieces.len() && room.len() < FRAMES_ROOM {
                pieces[next].take_into(room, FRAMES_ROOM - room.len());
                next += usize::from(pieces[next].is_empty());
            }
            if room.len() > frame::HEAD {
                frame::seal(room);
                self.write_raw(&mut [Piece::of(room)])?;
            }
        }
        Ok(())
    }

    fn write_raw(&mut self, pieces: &mut [Piece<'_>]) -> Result<()> {
        let mut rest = pieces;
        loop {
            let skip = rest.iter().take_while(|p| p.is_empty()).count();
            rest = &mut rest[skip..];
            if rest.is_empty() {
                return Ok(());
            }
            let mut sent = self.channel.write(rest, self.limit).inspect_err(|_| self.broken = true)?;
            if sent == 0 {
                return Err(Error::new(libc::EIO, "the channel takes no more bytes"));
            }
            self.written += sent as u64;
            for piece in rest.iter_mut() {
                let n = sent.min(piece.len());
                piece.advance(n);
                sent -= n;
                if sent == 0 {
                    break;
                }
            }
        }
    }
}

/// A short message in a frame of its own.
fn framed(bytes: &[u8]) -> Vec<u8> {
    debug_assert!(bytes.len() <= frame::LEN_MAX, "one frame holds it");
    let mut framed = vec![0; frame::HEAD];
    framed.extend(bytes);
    frame::seal(&mut framed);
    framed
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;

    use super::super::channel::FdChannel;
    use super::*;
    use crate::sys::eventfd::Wake;

    const SECOND: Duration = Duration::from_secs(1);

    fn pair() -> (Arc<dyn Channel>, Arc<dyn Channel>, Arc<Wake>) {
        let (a, b) = UnixStream::pair().unwrap();
        let wake = Arc::new(Wake::new().unwrap());
        let channel = |s: UnixStream| Arc::new(FdChannel::new(OwnedFd::from(s), &wake).unwrap());
        (channel(a), channel(b), Arc::clone(&wake))
    }

    #[test]
    fn what_is_written_in_pieces_is_read_in_others() {
        let (a, b, _) = pair();
        let sent: Vec<u8> = (0..3_000_000u32).map(|n| n.to_le_bytes()[0] ^ n.to_le_bytes()[1]).collect();
        let reader = std::thread::spawn({
            let sent = sent.clone();
            move || {
                let mut input = StreamInput::new(b, SECOND);
                let mut at = 0;
                for step in (0..).map(|n: usize| [1, 7, 4096, 90_001, 300_000][n % 5]) {
                    let step = step.min(sent.len() - at);
                    if step == 0 {
                        break;
                    }
                    assert_eq!(input.peek(1).unwrap(), &sent[at..=at]);
                    let mut got = vec![0; step];
                    match step {
                        4096 => input.page(|page| got.copy_from_slice(page)).unwrap(),
                        _ => input.read(&mut got).unwrap(),
                    }
                    assert_eq!(got, &sent[at..at + step]);
                    at += step;
                    assert_eq!(input.position(), at as u64);
                }
                assert_eq!(input.buffered(), 0);
                assert_eq!(input.u8().unwrap_err().errno(), libc::EIO);
            }
        });
        let mut output = StreamOutput::new(Arc::clone(&a), SECOND);
        let mut pieces: Vec<Piece> = sent.chunks(1000).map(Piece::of).collect();
        output.write_pieces(&mut pieces).unwrap();
        assert_eq!(output.written(), sent.len() as u64);
        a.close_write();
        reader.join().unwrap();
    }

    #[test]
    fn a_silent_peer_is_noticed_both_ways() {
        let (a, b, _) = pair();
        let short = Duration::from_millis(20);
        let error = StreamInput::new(Arc::clone(&b), short).u8().unwrap_err();
        assert_eq!(error.to_string(), "the peer sent no byte for 0.02 seconds (option 'stall-timeout')");
        let error = StreamOutput::new(a, short).write(&vec![0; 64 << 20]).unwrap_err();
        assert_eq!(error.errno(), libc::ETIMEDOUT);
    }

    #[test]
    fn a_wake_ends_a_wait() {
        let (_a, b, wake) = pair();
        let reader = std::thread::spawn(move || StreamInput::of_replies(b).u8().unwrap_err().errno());
        wake.raise();
        assert_eq!(reader.join().unwrap(), libc::ECANCELED);
    }

    #[test]
    fn shutdown_ends_the_wait_of_another_thread() {
        let (_a, b, _) = pair();
        let reader = std::thread::spawn({
            let b = Arc::clone(&b);
            move || StreamInput::of_replies(b).u8().unwrap_err().errno()
        });
        b.shutdown();
        assert_eq!(reader.join().unwrap(), libc::EIO);
    }
}
