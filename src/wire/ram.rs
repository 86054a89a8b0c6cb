//! Bodies of the `ram` section: words of address and flags, names, pages.

use super::input::Input;
use super::output::Put;
use crate::error::{Error, Result};
use crate::ram::PAGE;

/// Version of the section.
pub const VERSION: u32 = 4;
/// Name of the section.
pub const NAME: &str = "ram";
/// Blocks a peer may announce.
pub const BLOCKS_MAX: usize = crate::ram::BLOCKS_MAX;

const ZERO: u64 = 0x002;
const MEM_SIZE: u64 = 0x004;
const PAGE_DATA: u64 = 0x008;
const EOS: u64 = 0x010;
const CONTINUE: u64 = 0x020;
const XBZRLE: u64 = 0x040;
const HOOK: u64 = 0x080;
const MULTIFD_FLUSH: u64 = 0x200;

/// Ours, between two vmigs that agreed on it: the number of zero pages from the offset on follows.
const ZERO_RUN: u64 = 0x400;
/// Pages of one such record.
pub const ZERO_RUN_MAX: u64 = 1 << 20;

/// One record of a body. `name`: none means the block of the record before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// The list of blocks follows, these many bytes of guest RAM in all.
    Setup {
        /// Sum of the blocks' lengths.
        total: u64,
    },
    /// A page of zeros.
    Zero {
        /// Block.
        name: Option<String>,
        /// Offset in the block.
        offset: u64,
    },
    /// Pages of zeros.
    ZeroRun {
        /// Block.
        name: Option<String>,
        /// Offset of the first in the block.
        offset: u64,
        /// How many, at most [`ZERO_RUN_MAX`].
        pages: u64,
    },
    /// A page; its bytes follow.
    Page {
        /// Block.
        name: Option<String>,
        /// Offset in the block.
        offset: u64,
    },
    /// What changed in a page since it was last sent; so many bytes follow. QEMU's XBZRLE.
    Delta {
        /// Block.
        name: Option<String>,
        /// Offset in the block.
        offset: u64,
        /// Bytes that follow.
        len: u16,
    },
    /// A point at which all channels meet.
    Flush,
    /// End of the body.
    End,
}

/// Reads a record, up to a page's bytes.
pub fn read(input: &mut dyn Input) -> Result<Record> {
    let mut at = input.position();
    let mut word = input.u64()?;
    // RDMA's hooks carry nothing here.
    while word & (PAGE - 1) & !CONTINUE == HOOK {
        at = input.position();
        word = input.u64()?;
    }
    let (offset, flags) = (word & !(PAGE - 1), word & (PAGE - 1));
    let name = |input: &mut dyn Input| match flags & CONTINUE {
        0 => input.counted_string().map(Some),
        _ => Ok(None),
    };
    match flags & !CONTINUE {
        ZERO => {
            let name = name(input)?;
            match input.u8()? {
                0 => Ok(Record::Zero { name, offset }),
                fill => Err(wrong(at, format!("a page filled with {fill:#04x} instead of zeros"))),
            }
        }
        ZERO_RUN => {
            let name = name(input)?;
            match input.u64()? {
                pages @ 1..=ZERO_RUN_MAX => Ok(Record::ZeroRun { name, offset, pages }),
                pages => Err(wrong(at, format!("a run of {pages} zero pages instead of 1 to {ZERO_RUN_MAX}"))),
            }
        }
        PAGE_DATA => Ok(Record::Page { name: name(input)?, offset }),
        MEM_SIZE => Ok(Record::Setup { total: offset }),
        EOS => Ok(Record::End),
        XBZRLE => {
            let name = name(input)?;
            match (input.u8()?, input.u16()?) {
                (1, len) if u64::from(len) <= PAGE => Ok(Record::Delta { name, offset, len }),
                (kind, len) => Err(wrong(at, format!("a page as an XBZRLE delta of kind {kind} and {len} bytes"))),
            }
        }
        MULTIFD_FLUSH => Ok(Record::Flush),
        _ => Err(wrong(at, format!("unknown combination of flags {flags:#x}"))),
    }
}

fn wrong(at: u64, text: String) -> Error {
    Error::invalid(format!("byte {at:#x}: {text}")).at_byte(at).in_section(NAME)
}

/// Reads the blocks that follow a setup record, as (name, length).
pub fn read_blocks(input: &mut dyn Input, total: u64) -> Result<Vec<(String, u64)>> {
    let mut blocks = Vec::new();
    let mut left = total;
    while left > 0 {
        if blocks.len() == BLOCKS_MAX {
            return Err(wrong(input.position(), format!("more than {BLOCKS_MAX} RAM blocks")));
        }
        let (name, len) = read_block(input, left)?;
        left -= len;
        blocks.push((name, len));
    }
    Ok(blocks)
}

/// Reads one of them, of which `left` bytes are left to announce, up to what capabilities add to it.
pub fn read_block(input: &mut dyn Input, left: u64) -> Result<(String, u64)> {
    let at = input.position();
    let name = input.counted_string()?;
    let len = input.u64()?;
    if len == 0 || len % PAGE != 0 || len > left {
        let text = format!("RAM block '{}' has {len} bytes, of {left} that are left", name.escape_default());
        return Err(wrong(at, text));
    }
    Ok((name, len))
}

/// Where a block's pages are in a file with `mapped-ram`: both places count from the file's first byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapped {
    /// Where the bitmap of pages with content is.
    pub bitmap_at: u64,
    /// Bytes of it.
    pub bitmap_len: u64,
    /// Where page 0 is; behind the block's last page the stream goes on.
    pub pages_at: u64,
}

/// Reads what `mapped-ram` adds to a block of `len` bytes.
pub fn read_mapped(input: &mut dyn Input, len: u64) -> Result<Mapped> {
    let at = input.position();
    let (version, page, bitmap_at, pages_at) = (input.u32()?, input.u64()?, input.u64()?, input.u64()?);
    if version != 1 || page != PAGE {
        return Err(wrong(at, format!("mapped-ram of version {version} with pages of {page} bytes")));
    }
    let bitmap_len = len.div_ceil(64 * PAGE) * 8;
    let end = bitmap_at.checked_add(bitmap_len);
    if bitmap_at < input.position() || end.is_none_or(|end| end > pages_at) || pages_at.checked_add(len).is_none() {
        return Err(wrong(at, format!("mapped-ram has its bitmap at {bitmap_at:#x} and its pages at {pages_at:#x}")));
    }
    Ok(Mapped { bitmap_at, bitmap_len, pages_at })
}

/// Writes the setup record.
pub fn put_setup<'a>(out: &mut Vec<u8>, blocks: impl Iterator<Item = (&'a str, u64)> + Clone) -> Result<()> {
    let total: u64 = blocks.clone().map(|(_, len)| len).sum();
    out.u64(total | MEM_SIZE);
    for (name, len) in blocks {
        out.counted_string(name)?;
        out.u64(len);
    }
    Ok(())
}

/// Most bytes a page record takes before the page itself.
pub const RECORD_MAX: usize = 8 + 1 + 255 + 1;

/// Writes a record of a zero page.
pub fn put_zero(out: &mut Vec<u8>, name: Option<&str>, offset: u64) -> Result<()> {
    put_word(out, name, offset | ZERO)?;
    out.u8(0);
    Ok(())
}

/// Writes a record of zero pages.
pub fn put_zero_run(out: &mut Vec<u8>, name: Option<&str>, offset: u64, pages: u64) -> Result<()> {
    put_word(out, name, offset | ZERO_RUN)?;
    out.u64(pages);
    Ok(())
}

/// Writes what comes before a page's bytes.
pub fn put_page(out: &mut Vec<u8>, name: Option<&str>, offset: u64) -> Result<()> {
    put_word(out, name, offset | PAGE_DATA)
}

fn put_word(out: &mut Vec<u8>, name: Option<&str>, word: u64) -> Result<()> {
    match name {
        Some(name) => {
            out.u64(word);
            out.counted_string(name)
        }
        None => {
            out.u64(word | CONTINUE);
            Ok(())
        }
    }
}

/// Marks the point at which all channels meet.
pub fn put_flush(out: &mut Vec<u8>) {
    out.u64(MULTIFD_FLUSH);
}

/// Ends a body.
pub fn put_end(out: &mut Vec<u8>) {
    out.u64(EOS);
}

#[cfg(test)]
mod tests {
    use super::super::input::Slice;
    use super::*;

    #[test]
    fn records_round_trip() {
        let mut out = Vec::new();
        put_zero(&mut out, Some("ram"), 0x3000).unwrap();
        put_page(&mut out, None, 0x4000).unwrap();
        put_zero_run(&mut out, None, 0x5000, 7).unwrap();
        put_end(&mut out);
        assert_eq!(out[..13], *b"\0\0\0\0\0\0\x30\x02\x03ram\0");
        let mut input = Slice::new(&out);
        let name = Some("ram".to_owned());
        assert_eq!(read(&mut input).unwrap(), Record::Zero { name, offset: 0x3000 });
        assert_eq!(read(&mut input).unwrap(), Record::Page { name: None, offset: 0x4000 });
        assert_eq!(read(&mut input).unwrap(), Record::ZeroRun { name: None, offset: 0x5000, pages: 7 });
        assert_eq!(read(&mut input).unwrap(), Record::End);
        for pages in [0, ZERO_RUN_MAX + 1, u64::MAX] {
            let mut out = Vec::new();
            put_zero_run(&mut out, Some("ram"), 0, pages).unwrap();
            assert!(read(&mut Slice::new(&out)).is_err(), "{pages} pages");
        }
    }

    #[test]
    fn impossible_flags_are_refused() {
        for flags in 0..PAGE {
            // A run's number of pages is missing here.
            let known = matches!(flags & !CONTINUE, ZERO | PAGE_DATA | MEM_SIZE | EOS | HOOK | MULTIFD_FLUSH);
            let mut bytes = (0x5000 | flags).to_be_bytes().to_vec();
            if flags & HOOK == 0 {
                bytes.extend([0; 2]);
            }
            bytes.extend(EOS.to_be_bytes());
            assert_eq!(read(&mut Slice::new(&bytes)).is_ok(), known, "flags {flags:#x}");
        }
    }

    #[test]
    fn a_page_is_not_filled_with_anything_but_zero() {
        let error = read(&mut Slice::new(&[0, 0, 0, 0, 0, 0, 0, 0x22, 7])).unwrap_err();
        assert_eq!(error.to_string(), "section 'ram': byte 0x0: a page filled with 0x07 instead of zeros");
    }

    #[test]
    fn a_delta_says_how_long_it_is() {
        let read = |kind: u8, len: [u8; 2]| {
            read(&mut Slice::new(&[&[0, 0, 0, 0, 0, 0, 0x70, 0x60, kind], &len[..]].concat()))
        };
        assert_eq!(read(1, [0, 4]).unwrap(), Record::Delta { name: None, offset: 0x7000, len: 4 });
        for (kind, len) in [(0, [0, 4]), (2, [0, 4]), (1, [0x10, 1])] {
            assert!(read(kind, len).is_err(), "{kind} {len:?}");
        }
    }

    #[test]
    fn places_in_a_file_go_forward_only() {
        let mapped = |version: u32, page: u64, bitmap: u64, pages: u64| {
            let mut out = Vec::new();
            out.u32(version);
            [page, bitmap, pages].iter().for_each(|n| out.u64(*n));
            read_mapped(&mut Slice::new(&out), 0x80_000)
        };
        let good = Mapped { bitmap_at: 0x81, bitmap_len: 16, pages_at: 0x100_000 };
        assert_eq!(mapped(1, PAGE, 0x81, 0x100_000).unwrap(), good);
        for (version, page, bitmap, pages) in [
            (2, PAGE, 0x81, 0x100_000),
            (1, 0, 0x81, 0x100_000),
            (1, PAGE, 0, 0x100_000),
            (1, PAGE, 0x100_000, 0x100_000),
            (1, PAGE, u64::MAX, 0x100_000),
            (1, PAGE, 0x81, u64::MAX),
        ] {
            assert!(mapped(version, page, bitmap, pages).is_err(), "{version} {page} {bitmap:#x} {pages:#x}");
        }
    }

    #[test]
    fn block_lists_are_checked() {
        let mut out = Vec::new();
        put_setup(&mut out, [("low", 0x2000), ("high", 0x1000)].into_iter()).unwrap();
        let mut input = Slice::new(&out);
        assert_eq!(read(&mut input).unwrap(), Record::Setup { total: 0x3000 });
        let blocks = read_blocks(&mut input, 0x3000).unwrap();
        assert_eq!(blocks, [("low".to_owned(), 0x2000), ("high".to_owned(), 0x1000)]);
        assert!(read_blocks(&mut Slice::new(&out[8..]), 0x1000).is_err(), "a block larger than the total");
    }
}
