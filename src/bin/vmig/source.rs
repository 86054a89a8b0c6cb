//! Bytes of a file or a pipe, read once and in order, with a limited look ahead.

use std::io::{ErrorKind, Read};

use vmig::error::{Error, Result};
use vmig::wire::frame;
use vmig::wire::input::{Input, PEEK_MAX, ends_early};

/// The most that is looked ahead, and with it the memory that a stream can make us use.
pub(crate) const AHEAD_MAX: usize = 32 << 20;
const STEP: usize = 64 << 10;

/// See the module.
pub(crate) struct Source {
    reader: Box<dyn Read>,
    /// What was read; bytes before `at` were taken.
    bytes: Vec<u8>,
    at: usize,
    /// Of the stream, where `at` is.
    position: u64,
    /// The reader has no more.
    ended: bool,
    /// The stream travels in frames with checksums.
    framed: bool,
}

impl Source {
    /// Reads from `reader`, which is at `position` of its file.
    pub(crate) fn new(reader: Box<dyn Read>, position: u64) -> Self {
        Self { reader, bytes: Vec::new(), at: 0, position, ended: false, framed: false }
    }

    /// From here on everything is in frames with checksums, which are checked and taken off.
    pub(crate) fn unframe(&mut self) -> Result<()> {
        let raw = self.bytes.split_off(self.at);
        (self.bytes, self.at) = (Vec::new(), 0);
        let rest = std::mem::replace(&mut self.reader, Box::new(std::io::empty()));
        self.reader = Box::new(std::io::Cursor::new(raw).chain(rest));
        (self.ended, self.framed) = (false, true);
        Ok(())
    }

    /// What comes next, up to `most` bytes: fewer only where the stream ends.
    pub(crate) fn ahead(&mut self, most: usize) -> Result<&[u8]> {
        let most = most.min(AHEAD_MAX);
        while self.bytes.len() - self.at < most && !self.ended {
            self.fill()?;
        }
        let rest = &self.bytes[self.at..];
        Ok(&rest[..rest.len().min(most)])
    }

    /// Whether nothing comes any more.
    pub(crate) fn is_at_end(&mut self) -> Result<bool> {
        self.ahead(1).map(<[u8]>::is_empty)
    }

    /// Leaves out `count` bytes.
    pub(crate) fn skip(&mut self, mut count: u64) -> Result<()> {
        let mut room = [0; 4096];
        while count > 0 {
            let step = usize::try_from(count).unwrap_or(usize::MAX).min(room.len());
            self.read(&mut room[..step])?;
            count -= step as u64;
        }
        Ok(())
    }

    /// Reads a step more.
    fn fill(&mut self) -> Result<()> {
        if self.at > self.bytes.len() / 2 {
            self.bytes.drain(..self.at);
            self.at = 0;
        }
        if self.framed {
            return self.fill_frame();
        }
        self.append(STEP).map(|got| self.ended = got < STEP)
    }

    fn fill_frame(&mut self) -> Result<()> {
        let before = self.bytes.len();
        let position = self.position + (before - self.at) as u64;
        let got = self.append(frame::HEAD)?;
        let head = self.bytes.split_off(before);
        let Some(head) = head.first_chunk().filter(|_| got == frame::HEAD) else {
            self.ended = true;
            return if got == 0 { Ok(()) } else { Err(ends_early(position, (frame::HEAD - got) as u64)) };
        };
        let head = frame::read_head(head, position)?;
        let got = self.append(head.len)?;
        if got < head.len {
            self.bytes.truncate(before);
            return Err(ends_early(position, (head.len - got) as u64));
        }
        head.check(&self.bytes[before..], position)
    }

    /// Appends `count` bytes, or those that there are; how many.
    fn append(&mut self, count: usize) -> Result<usize> {
        let before = self.bytes.len();
        self.bytes.try_reserve(count).map_err(|_| Error::no_memory("a stream", (before + count) as u64))?;
        self.bytes.resize(before + count, 0);
        let mut got = 0;
        while got < count {
            match self.reader.read(&mut self.bytes[before + got..]) {
                Ok(0) => break,
                Ok(more) => got += more,
                Err(error) if error.kind() == ErrorKind::Interrupted => (),
                Err(error) => {
                    self.bytes.truncate(before);
                    return Err(Error::from_io("reading the stream", &error));
                }
            }
        }
        self.bytes.truncate(before + got);
        Ok(got)
    }
}

impl Input for Source {
    fn read(&mut self, buf: &mut [u8]) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let want = (buf.len() - done).min(STEP);
            let there = self.ahead(want)?;
            let step = there.len();
            if step == 0 {
                return Err(ends_early(self.position, (buf.len() - done) as u64));
            }
            buf[done..done + step].copy_from_slice(there);
            (self.at, self.position, done) = (self.at + step, self.position + step as u64, done + step);
        }
        Ok(())
    }

    fn peek(&mut self, n: usize) -> Result<&[u8]> {
        debug_assert!(n <= PEEK_MAX);
        let position = self.position;
        let there = self.ahead(n)?;
        match there.len() == n {
            true => Ok(there),
            false => Err(ends_early(position + there.len() as u64, (n - there.len()) as u64)),
        }
    }

    fn position(&self) -> u64 {
        self.position
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gives a few bytes at a time.
    struct Slow(Vec<u8>, usize);

    impl Read for Slow {
        fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
            let step = buf.len().min(3).min(self.0.len() - self.1);
            buf[..step].copy_from_slice(&self.0[self.1..][..step]);
            self.1 += step;
            Ok(step)
        }
    }

    fn source(bytes: &[u8]) -> Source {
        Source::new(Box::new(Slow(bytes.to_vec(), 0)), 0)
    }

    #[test]
    fn looking_ahead_takes_nothing() {
        let bytes: Vec<u8> = (0..=255).cycle().take(200_000).collect();
        let mut input = source(&bytes);
        for at in 0..40_000 {
            assert_eq!(input.ahead(at % 700 + 1).unwrap(), &bytes[5 * at..(5 * at + at % 700 + 1).min(bytes.len())]);
            let mut five = [0; 5];
            input.read(&mut five).unwrap();
            assert_eq!((five.as_slice(), input.position()), (&bytes[5 * at..][..5], 5 * at as u64 + 5));
        }
        assert!(input.is_at_end().unwrap());
        let error = input.u8().unwrap_err();
        assert_eq!((error.place().byte, error.errno()), (Some(200_000), libc::EIO));
    }

    #[test]
    fn frames_are_taken_off_and_checked() {
        let framed = |body: &[u8]| {
            let mut out = [&[0; frame::HEAD][..], body].concat();
            frame::seal(&mut out);
            out
        };
        let mut bytes = [b"plain".to_vec(), framed(b"abc"), framed(&[7; 70_000])].concat();
        let open = |bytes: &[u8]| {
            let mut input = source(bytes);
            input.skip(5)?;
            input.unframe()?;
            let mut out = vec![0; 70_003];
            input.read(&mut out)?;
            assert!(input.is_at_end()?);
            Ok::<_, Error>(out)
        };
        assert_eq!(open(&bytes).unwrap()[..4], *b"abc\x07");
        assert_eq!(open(&bytes[..bytes.len() - 1]).unwrap_err().errno(), libc::EIO);
        bytes[40_000] ^= 1;
        let error = open(&bytes).unwrap_err();
        assert_eq!(error.errno(), libc::EBADMSG, "{error}");
    }
}
