//! Frames: the pieces that a checksummed stream travels in. Be32 length, be32 CRC32C of the bytes that follow, be32 CRC32C of
//! these eight bytes, and the bytes. No byte of a frame is believed before all of them are there and are right.

use super::checksum::{Sum, altered};
use crate::error::{Error, Result};

/// Bytes before those of the stream.
pub const HEAD: usize = 12;
/// Bytes of the stream in one frame.
pub const LEN_MAX: usize = 256 << 10;

/// Makes a frame of `frame`, whose first [`HEAD`] bytes are room for its head.
pub fn seal(frame: &mut [u8]) {
    let (head, body) = frame.split_at_mut(HEAD);
    debug_assert!((1..=LEN_MAX).contains(&body.len()));
    head[..4].copy_from_slice(&u32::try_from(body.len()).unwrap_or(u32::MAX).to_be_bytes());
    head[4..8].copy_from_slice(&Sum::of(body).to_be_bytes());
    let own = Sum::of(&head[..8]);
    head[8..].copy_from_slice(&own.to_be_bytes());
}

/// What a frame's head says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// Bytes that follow.
    pub len: usize,
    sum: u32,
}

/// Checks a head that came at `position` of the stream.
pub fn read_head(head: &[u8; HEAD], position: u64) -> Result<Head> {
    let word = |at: usize| head[at..].first_chunk().map_or(0, |b| u32::from_be_bytes(*b));
    let (expected, got) = (word(8), Sum::of(&head[..8]));
    if expected != got {
        return Err(altered(format_args!("byte {position:#x}: the head of a frame"), expected, got));
    }
    let len = word(0);
    match usize::try_from(len).ok().filter(|len| (1..=LEN_MAX).contains(len)) {
        Some(len) => Ok(Head { len, sum: word(4) }),
        None => Err(Error::invalid(format!("byte {position:#x}: a frame of a length it cannot have"))
            .expected_got(format!("1 to {LEN_MAX} bytes"), len)),
    }
}

impl Head {
    /// Checks the bytes that followed, from `position` of the stream on.
    pub fn check(&self, body: &[u8], position: u64) -> Result<()> {
        let got = Sum::of(body);
        if got == self.sum {
            return Ok(());
        }
        let end = position + body.len() as u64;
        Err(altered(format_args!("byte {position:#x}: what stands there up to byte {end:#x}"), self.sum, got))
    }
}

/// Bytes of a stream, and where in them something begins that is best found in a frame of its own.
#[derive(Debug, Default)]
pub struct Bodies {
    /// The bytes.
    pub bytes: Vec<u8>,
    cuts: Vec<usize>,
}

impl Bodies {
    /// Something begins here.
    pub fn begin(&mut self) {
        self.cuts.push(self.bytes.len());
    }

    /// Without the last byte, which is returned beside.
    pub fn split_last(mut self) -> Option<(Self, u8)> {
        let last = self.bytes.pop()?;
        Some((self, last))
    }

    /// The bodies, none of them empty.
    pub fn iter(&self) -> impl Iterator<Item = &[u8]> {
        let starts = std::iter::once(0).chain(self.cuts.iter().copied());
        let ends = self.cuts.iter().copied().chain([self.bytes.len()]);
        starts.zip(ends).filter_map(|(start, end)| self.bytes.get(start..end)).filter(|part| !part.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(body: &[u8]) -> Vec<u8> {
        let mut out = vec![0; HEAD];
        out.extend(body);
        seal(&mut out);
        out
    }

    fn open(bytes: &[u8]) -> Result<Vec<u8>> {
        let (head, body) = bytes.split_first_chunk().unwrap();
        let head = read_head(head, 7)?;
        head.check(&body[..head.len.min(body.len())], 7)?;
        Ok(body.to_vec())
    }

    #[test]
    fn no_single_bit_may_differ() {
        // The check value of CRC32C, which every table of it lists.
        assert_eq!(Sum::of(b"123456789"), 0xe306_9283);
        let good = frame(b"123456789");
        assert_eq!(good[..8], *b"\0\0\0\x09\xe3\x06\x92\x83");
        assert_eq!(open(&good).unwrap(), b"123456789");
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            let error = open(&bad).unwrap_err();
            assert_eq!(error.errno(), libc::EBADMSG, "bit {bit}: {error}");
            let head = error.text().contains("the head of a frame");
            assert_eq!(head, bit < HEAD * 8, "bit {bit}: {error}");
        }
    }

    #[test]
    fn lengths_have_limits() {
        for len in [0, LEN_MAX + 1, usize::try_from(u32::MAX).unwrap()] {
            let mut head = [0; HEAD];
            head[..4].copy_from_slice(&u32::try_from(len).unwrap().to_be_bytes());
            let own = Sum::of(&head[..8]);
            head[8..].copy_from_slice(&own.to_be_bytes());
            assert_eq!(read_head(&head, 0).unwrap_err().errno(), libc::EINVAL, "{len}");
        }
    }

    #[test]
    fn parts_are_all_there_and_in_order() {
        let mut bodies = Bodies::default();
        bodies.begin();
        bodies.bytes.extend(b"ab");
        bodies.begin();
        bodies.begin();
        bodies.bytes.extend(b"c}");
        assert_eq!(bodies.iter().collect::<Vec<_>>(), [&b"ab"[..], b"c}"]);
        let (rest, last) = bodies.split_last().unwrap();
        assert_eq!((rest.iter().collect::<Vec<_>>(), last), (vec![&b"ab"[..], b"c"], b'}'));
        assert!(Bodies::default().split_last().is_none() && Bodies::default().iter().next().is_none());
    }
}
