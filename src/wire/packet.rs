//! Packets of the parallel channels: QEMU's multifd format.
//!
//! A channel opens with one init packet. Then packets of a fixed header and the pages it lists follow, one block each,
//! at most [`PAGES_MAX`] pages. Nothing ever comes back on a channel.

use super::checksum::{Sum, altered};
use crate::error::{Error, Result};
use crate::ram::{PAGE, PAGE_BYTES};

/// First word of every packet, and of a connection that is a channel.
pub const MAGIC: u32 = 0x1122_3344;
const VERSION: u32 = 1;
/// Bytes of the init packet.
pub const INIT_BYTES: usize = 64;
/// Bytes of a packet's header.
pub const HEADER_BYTES: usize = 320 + 8 * PAGES_MAX;
/// Pages a packet can carry.
pub const PAGES_MAX: usize = 128;
/// Channels of one migration.
pub const CHANNELS_MAX: u8 = 64;

const FLAG_SYNC: u32 = 1;
/// Ours, between two vmigs that agreed on it: the offsets are pairs of an offset and a number of zero pages.
const FLAG_ZERO_RUNS: u32 = 0x100;
/// Runs of zero pages in one packet.
pub const ZERO_RUNS_MAX: usize = PAGES_MAX / 2;
/// Between two vmigs that agreed on resuming: the migration's 16 bytes and the be32 attempt; zero elsewhere.
const INIT_TAG_AT: usize = 32;
/// Bytes of a [`Tag`].
pub const TAG_BYTES: usize = 20;
/// CRC32C of the first 60 bytes of an init packet, and in a header of the header and of the pages, between two vmigs that
/// agreed on it; zero elsewhere.
const INIT_SUM_AT: usize = 60;
const HEADER_SUM_AT: usize = 40;
const PAGES_SUM_AT: usize = 44;
const NAME_AT: usize = 64;
const OFFSETS_AT: usize = 320;

/// Which connection of which migration a channel belongs to; zeros where nobody asks.
pub type Tag = [u8; TAG_BYTES];

/// The tag of an attempt.
pub fn tag(migration: &[u8; 16], attempt: u32) -> Tag {
    let mut tag = [0; TAG_BYTES];
    tag[..16].copy_from_slice(migration);
    tag[16..].copy_from_slice(&attempt.to_be_bytes());
    tag
}

/// The tag in an init packet.
pub fn tag_of(init: &[u8; INIT_BYTES]) -> Tag {
    let mut tag = [0; TAG_BYTES];
    tag.copy_from_slice(&init[INIT_TAG_AT..INIT_TAG_AT + TAG_BYTES]);
    tag
}

/// The init packet of channel `id`.
pub fn init(id: u8, checksum: bool, tag: &Tag) -> [u8; INIT_BYTES] {
    let mut out = [0; INIT_BYTES];
    out[..4].copy_from_slice(&MAGIC.to_be_bytes());
    out[4..8].copy_from_slice(&VERSION.to_be_bytes());
    out[24] = id;
    out[INIT_TAG_AT..INIT_TAG_AT + TAG_BYTES].copy_from_slice(tag);
    if checksum {
        let sum = Sum::of(&out[..INIT_SUM_AT]);
        out[INIT_SUM_AT..].copy_from_slice(&sum.to_be_bytes());
    }
    out
}

/// The id in an init packet, of `channels` channels. Its uuid must be ours, which is none.
pub fn read_init(bytes: &[u8; INIT_BYTES], channels: u8, checksum: bool) -> Result<u8> {
    let (expected, got) = (word(bytes, INIT_SUM_AT), Sum::of(&bytes[..INIT_SUM_AT]));
    if checksum && expected != got {
        return Err(altered("it", expected, got));
    }
    check_start(bytes)?;
    if bytes[8..24].iter().any(|b| *b != 0) {
        return Err(Error::invalid("the source has a VM uuid, which a destination without one refuses"));
    }
    let id = bytes[24];
    if id >= channels {
        return Err(Error::invalid("a channel's id is beyond the number of channels")
            .expected_got(format!("below {channels}"), id));
    }
    Ok(id)
}

fn check_start(bytes: &[u8]) -> Result<()> {
    let (magic, version) = (word(bytes, 0), word(bytes, 4));
    if magic != MAGIC {
        return Err(Error::invalid("a channel's packet does not begin with its magic")
            .expected_got(format!("{MAGIC:#010x}"), format!("{magic:#010x}")));
    }
    if version != VERSION {
        return Err(Error::invalid("a channel's packet has another version").expected_got(VERSION, version));
    }
    Ok(())
}

fn word(bytes: &[u8], at: usize) -> u32 {
    bytes[at..].first_chunk().map_or(0, |b| u32::from_be_bytes(*b))
}

/// What a packet is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Pages: this many whole ones, whose bytes follow, and then this many zero ones.
    Pages {
        /// Whole pages.
        normal: usize,
        /// Zero pages.
        zero: usize,
    },
    /// So many runs of zero pages.
    ZeroRuns(usize),
    /// A point at which all channels meet.
    Sync,
}

/// A packet's header, as bytes that are written and read as they are.
#[derive(Clone, Debug)]
pub struct Header(Box<[u8; HEADER_BYTES]>);

impl Default for Header {
    fn default() -> Self {
        Self(Box::new([0; HEADER_BYTES]))
    }
}

impl Header {
    /// The bytes to send.
    pub fn bytes(&self) -> &[u8] {
        &self.0[..]
    }

    /// Room for received bytes.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.0[..]
    }

    fn put(&mut self, at: usize, value: u32) {
        self.0[at..at + 4].copy_from_slice(&value.to_be_bytes());
    }

    fn start(&mut self, flags: u32, number: u64) {
        self.0.fill(0);
        self.put(0, MAGIC);
        self.put(4, VERSION);
        self.put(8, flags);
        self.0[24..32].copy_from_slice(&number.to_be_bytes());
    }

    /// Writes the checksums: of the pages that follow, which the caller knows, and of all else.
    pub fn seal(&mut self, pages: u32) {
        self.put(PAGES_SUM_AT, pages);
        self.put(HEADER_SUM_AT, self.sum());
    }

    /// Of the header, but for the place where this stands.
    fn sum(&self) -> u32 {
        let mut sum = Sum::default();
        sum.add(&self.0[..HEADER_SUM_AT]);
        sum.add(&self.0[PAGES_SUM_AT..]);
        sum.value()
    }

    /// Checks the header's checksum. Not a word of it is to be believed before.
    pub fn check(&self) -> Result<()> {
        let (expected, got) = (word(self.bytes(), HEADER_SUM_AT), self.sum());
        match expected == got {
            true => Ok(()),
            false => Err(altered("the header of a packet", expected, got)),
        }
    }

    /// The checksum of the pages that follow.
    pub fn pages_sum(&self) -> u32 {
        word(self.bytes(), PAGES_SUM_AT)
    }

    /// Makes it a sync packet.
    pub fn set_sync(&mut self, number: u64) {
        self.start(FLAG_SYNC, number);
    }

    /// Makes it a packet of pages of `block`, given by page number.
    pub fn set_pages(&mut self, number: u64, block: &str, normal: &[usize], zero: &[usize]) {
        debug_assert!(normal.len() + zero.len() <= PAGES_MAX && block.len() < 256);
        self.start(0, number);
        let small = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        self.put(12, small(PAGES_MAX));
        self.put(16, small(normal.len()));
        self.put(20, small(normal.len() * PAGE_BYTES));
        self.put(32, small(zero.len()));
        self.0[NAME_AT..NAME_AT + block.len()].copy_from_slice(block.as_bytes());
        for (slot, page) in self.0[OFFSETS_AT..].chunks_exact_mut(8).zip(normal.iter().chain(zero)) {
            slot.copy_from_slice(&(*page as u64 * PAGE).to_be_bytes());
        }
    }

    /// Makes it a packet of runs of zero pages of `block`, by first page and number of pages.
    pub fn set_zero_runs(&mut self, number: u64, block: &str, runs: &[(usize, usize)]) {
        debug_assert!(runs.len() <= ZERO_RUNS_MAX && block.len() < 256);
        self.start(FLAG_ZERO_RUNS, number);
        self.put(12, u32::try_from(PAGES_MAX).unwrap_or(u32::MAX));
        self.put(32, u32::try_from(runs.len()).unwrap_or(u32::MAX));
        self.0[NAME_AT..NAME_AT + block.len()].copy_from_slice(block.as_bytes());
        for (slot, (first, pages)) in self.0[OFFSETS_AT..].chunks_exact_mut(16).zip(runs) {
            slot[..8].copy_from_slice(&(*first as u64 * PAGE).to_be_bytes());
            slot[8..].copy_from_slice(&(*pages as u64).to_be_bytes());
        }
    }

    /// Offset and number of pages of run `index`.
    pub fn zero_run(&self, index: usize) -> (u64, u64) {
        (self.offset(2 * index), self.offset(2 * index + 1))
    }

    /// Checks a received header.
    pub fn kind(&self) -> Result<Kind> {
        let bytes = self.bytes();
        check_start(bytes)?;
        let flags = word(bytes, 8);
        if flags & !FLAG_SYNC != 0 && flags != FLAG_ZERO_RUNS {
            return Err(Error::invalid(
                "a channel's packet is compressed or carries device state, which is not supported",
            )
            .expected_got("flags 0 or 1", format!("{flags:#x}")));
        }
        let (alloc, normal, zero) = (word(bytes, 12), word(bytes, 16), word(bytes, 32));
        let fits = |n: u32| usize::try_from(n).ok().filter(|n| *n <= PAGES_MAX);
        let counts = (fits(alloc), fits(normal), fits(zero));
        let (Some(alloc), Some(normal), Some(zero)) = counts else {
            return Err(Error::invalid("a channel's packet claims more pages than one can carry")
                .expected_got(format!("at most {PAGES_MAX}"), format!("{alloc}, {normal}, {zero}")));
        };
        if normal + zero > alloc || word(bytes, 20) as usize != normal * PAGE_BYTES {
            return Err(Error::invalid("a channel's packet contradicts itself").expected_got(
                format!("{} bytes for {normal} pages of {alloc}", normal * PAGE_BYTES),
                format!("{} bytes, {zero} zero pages", word(bytes, 20)),
            ));
        }
        match flags {
            FLAG_SYNC if normal + zero > 0 => {
                Err(Error::invalid("a sync packet with pages is not supported (QEMU before 9.0 sends them)"))
            }
            FLAG_SYNC => Ok(Kind::Sync),
            FLAG_ZERO_RUNS if normal > 0 || !(1..=ZERO_RUNS_MAX).contains(&zero) => {
                Err(Error::invalid("a packet of zero runs with pages, or with too many of them")
                    .expected_got(format!("1 to {ZERO_RUNS_MAX} runs"), format!("{zero}, {normal} pages")))
            }
            FLAG_ZERO_RUNS => Ok(Kind::ZeroRuns(zero)),
            _ => Ok(Kind::Pages { normal, zero }),
        }
    }

    /// Name of the block.
    pub fn block(&self) -> Result<&str> {
        let name = &self.0[NAME_AT..OFFSETS_AT];
        let end = name.iter().position(|b| *b == 0).unwrap_or(name.len());
        std::str::from_utf8(&name[..end])
            .map_err(|_| Error::invalid("the block's name in a channel's packet is not UTF-8"))
    }

    /// Offset of page `index` in its block: first the whole pages, then the zero ones.
    pub fn offset(&self, index: usize) -> u64 {
        let at = OFFSETS_AT + 8 * index;
        self.0[at..].first_chunk().map_or(u64::MAX, |b| u64::from_be_bytes(*b))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_qemus() {
        assert_eq!((HEADER_BYTES, INIT_BYTES), (1344, 64));
    }

    #[test]
    fn pages_round_trip() {
        let mut header = Header::default();
        header.set_pages(7, "pc.ram", &[5, 6, 9], &[1]);
        assert_eq!(header.kind().unwrap(), Kind::Pages { normal: 3, zero: 1 });
        assert_eq!(header.block().unwrap(), "pc.ram");
        let offsets: Vec<u64> = (0..4).map(|i| header.offset(i)).collect();
        assert_eq!(offsets, [0x5000, 0x6000, 0x9000, 0x1000]);
        header.set_zero_runs(3, "pc.ram", &[(5, 7), (100, 1)]);
        assert_eq!(header.kind().unwrap(), Kind::ZeroRuns(2));
        assert_eq!((header.block().unwrap(), header.zero_run(1)), ("pc.ram", (100 * PAGE, 1)));
        header.put(16, 1);
        assert!(header.kind().is_err(), "runs and pages");
        header.set_sync(8);
        assert_eq!(header.kind().unwrap(), Kind::Sync);
        assert_eq!(header.bytes()[24..32], 8u64.to_be_bytes());
    }

    #[test]
    fn contradictions_are_refused() {
        let change = |at: usize, value: u32| {
            let mut header = Header::default();
            header.set_pages(0, "ram", &[1], &[2]);
            header.put(at, value);
            header.kind().unwrap_err().errno()
        };
        for (at, value) in [
            (0, 1),
            (4, 2),
            (8, 2),
            (8, 0x40),
            (8, 1),
            (12, 129),
            (12, 1),
            (16, 128),
            (16, u32::MAX),
            (20, 0),
            (32, 200),
        ] {
            assert_eq!(change(at, value), libc::EINVAL, "word at {at} = {value:#x}");
        }
    }

    #[test]
    fn an_init_packet_says_whose_it_is() {
        let tag = tag(&[7; 16], 3);
        let mut packet = init(1, true, &tag);
        assert_eq!((tag_of(&packet), read_init(&packet, 2, true).unwrap()), (tag, 1));
        packet[INIT_TAG_AT + 19] ^= 1;
        assert!(read_init(&packet, 2, true).is_err() && tag_of(&packet) != tag);
    }

    #[test]
    fn init_packets() {
        for checksum in [false, true] {
            assert_eq!(read_init(&init(3, checksum, &[0; TAG_BYTES]), 4, checksum).unwrap(), 3);
            assert!(read_init(&init(4, checksum, &[0; TAG_BYTES]), 4, checksum).is_err());
        }
        assert_eq!(read_init(&init(3, false, &[0; TAG_BYTES]), 4, true).unwrap_err().errno(), libc::EBADMSG);
        assert_eq!(read_init(&init(3, true, &[0; TAG_BYTES]), 4, false).unwrap(), 3);
        let mut uuid = init(0, false, &[0; TAG_BYTES]);
        uuid[20] = 1;
        assert!(read_init(&uuid, 1, false).unwrap_err().text().contains("uuid"));
        let mut magic = init(0, false, &[0; TAG_BYTES]);
        magic[0] = 0;
        assert!(read_init(&magic, 1, false).is_err());
    }

    #[test]
    fn no_single_bit_of_a_sealed_header_may_differ() {
        let mut header = Header::default();
        header.set_pages(7, "pc.ram", &[5, 6, 9], &[1]);
        header.seal(0x1234_5678);
        header.check().unwrap();
        assert_eq!((header.pages_sum(), header.kind().unwrap()), (0x1234_5678, Kind::Pages { normal: 3, zero: 1 }));
        for bit in 0..HEADER_BYTES * 8 {
            header.0[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(header.check().unwrap_err().errno(), libc::EBADMSG, "bit {bit}");
            header.0[bit / 8] ^= 1 << (bit % 8);
        }
        let mut init = init(3, true, &[0; TAG_BYTES]);
        for bit in 0..INIT_BYTES * 8 {
            init[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(read_init(&init, 4, true).unwrap_err().errno(), libc::EBADMSG, "bit {bit}");
            init[bit / 8] ^= 1 << (bit % 8);
        }
    }
}
