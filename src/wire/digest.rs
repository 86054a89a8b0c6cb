//! Hashes that two vmigs compare with option `verify`, behind the commands HASHES and PAGE_HASHES; docs/stream.md has the
//! layout.

use super::input::Input;
use super::output::Put;
use super::ram::BLOCKS_MAX;
use crate::error::{Error, Result};

/// What a source has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hashes {
    /// Of each block its name, and the hash of each granule.
    pub blocks: Vec<(String, Vec<u64>)>,
    /// Of each section but RAM its id, and the hash of its bodies.
    pub sections: Vec<(u32, u64)>,
}

/// Writes hashes.
pub fn put(out: &mut Vec<u8>, hashes: &Hashes) -> Result<()> {
    let many = || Error::new(libc::E2BIG, "too many hashes");
    let count = |n: usize| u32::try_from(n).map_err(|_| many());
    out.u32(count(hashes.blocks.len())?);
    for (name, granules) in &hashes.blocks {
        out.counted_string(name)?;
        out.u32(count(granules.len())?);
        put_pages(out, granules)?;
    }
    out.u32(count(hashes.sections.len())?);
    hashes.sections.iter().for_each(|(id, hash)| {
        out.u32(*id);
        out.u64(*hash);
    });
    Ok(())
}

/// Reads hashes: exactly `blocks` of them, of as many granules as `granules` says a block of that name has, and of at
/// most `sections`.
pub fn read(
    input: &mut dyn Input,
    blocks: usize,
    granules: &dyn Fn(&str) -> Option<usize>,
    sections: usize,
) -> Result<Hashes> {
    let mut hashes = Hashes::default();
    let at = input.position();
    let count = input.u32()?;
    if usize::try_from(count) != Ok(blocks) {
        let text = format!("byte {at:#x}: hashes of another number of RAM blocks than both sides have");
        return Err(Error::invalid(text).expected_got(blocks, count));
    }
    for _ in 0..blocks {
        let at = input.position();
        let name = input.counted_string()?;
        let count = input.u32()?;
        let known = !hashes.blocks.iter().any(|(other, _)| *other == name);
        match granules(&name).filter(|n| known && usize::try_from(count) == Ok(*n)) {
            Some(count) => hashes.blocks.push((name, read_pages(input, count)?)),
            None => {
                let shown = name.escape_default();
                let text = format!("byte {at:#x}: {count} hashes of RAM block '{shown}', which do not fit it");
                return Err(Error::invalid(text));
            }
        }
    }
    let at = input.position();
    let count = input.u32()?;
    if usize::try_from(count).is_ok_and(|count| count > sections) {
        let text = format!("byte {at:#x}: hashes of more sections than came");
        return Err(Error::invalid(text).expected_got(format!("at most {sections}"), count));
    }
    for _ in 0..count {
        hashes.sections.push((input.u32()?, input.u64()?));
    }
    Ok(hashes)
}

/// What [`skim`] finds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    /// A block, and how many granules of it were hashed.
    Block(String, u32),
    /// A section, and its hash.
    Section(u32, u64),
}

/// Reads hashes of a guest that is not known, and keeps none of them.
pub fn skim(input: &mut dyn Input, found: &mut dyn FnMut(u64, Part) -> Result<()>) -> Result<()> {
    let at = input.position();
    let blocks = input.u32()?;
    if usize::try_from(blocks).is_ok_and(|n| n > BLOCKS_MAX) {
        return Err(Error::invalid(format!("byte {at:#x}: hashes of {blocks} RAM blocks")).at_byte(at));
    }
    for _ in 0..blocks {
        let (at, name, count) = (input.position(), input.counted_string()?, input.u32()?);
        for _ in 0..count {
            input.u64()?;
        }
        found(at, Part::Block(name, count))?;
    }
    for _ in 0..input.u32()? {
        let at = input.position();
        found(at, Part::Section(input.u32()?, input.u64()?))?;
    }
    Ok(())
}

/// Writes the hashes of one granule's pages.
pub fn put_granule(out: &mut Vec<u8>, pages: &[u64]) -> Result<()> {
    let count = u32::try_from(pages.len()).map_err(|_| Error::new(libc::E2BIG, "too many hashes"))?;
    out.u32(count);
    put_pages(out, pages)
}

/// Reads the hashes of one granule's pages, of which there are at most `most`.
pub fn read_granule(input: &mut dyn Input, most: usize) -> Result<Vec<u64>> {
    let at = input.position();
    let count = input.u32()?;
    match usize::try_from(count).ok().filter(|count| *count <= most) {
        Some(count) => read_pages(input, count),
        None => {
            let text = format!("byte {at:#x}: hashes of more pages than a granule has");
            Err(Error::invalid(text).at_byte(at).expected_got(format!("at most {most}"), count))
        }
    }
}

fn put_pages(out: &mut Vec<u8>, pages: &[u64]) -> Result<()> {
    out.try_reserve(pages.len() * 8).map_err(|_| Error::no_memory("hashes", pages.len() as u64 * 8))?;
    pages.iter().for_each(|hash| out.u64(*hash));
    Ok(())
}

/// Reads `count` hashes, which our own memory has.
fn read_pages(input: &mut dyn Input, count: usize) -> Result<Vec<u64>> {
    let len = count as u64 * 8;
    let bytes = input.blob("hashes", len, len)?;
    let mut pages = Vec::new();
    pages.try_reserve_exact(count).map_err(|_| Error::no_memory("hashes", len))?;
    pages.extend(bytes.chunks_exact(8).map(|b| b.iter().fold(0, |hash, byte| hash << 8 | u64::from(*byte))));
    Ok(pages)
}

#[cfg(test)]
mod tests {
    use super::super::input::Slice;
    use super::*;

    fn hashes() -> Hashes {
        Hashes {
            blocks: vec![("low".into(), vec![1, u64::MAX]), ("high".into(), vec![7])],
            sections: vec![(0, 3), (19, 1 << 63)],
        }
    }

    fn read_it(bytes: &[u8]) -> Result<Hashes> {
        let granules = |name: &str| ["low", "high"].contains(&name).then_some(if name == "low" { 2 } else { 1 });
        read(&mut Slice::new(bytes), 2, &granules, 2)
    }

    fn skimmed(bytes: &[u8]) -> Result<Vec<Part>> {
        let mut parts = Vec::new();
        skim(&mut Slice::new(bytes), &mut |_, part| {
            parts.push(part);
            Ok(())
        })?;
        Ok(parts)
    }

    #[test]
    fn hashes_of_an_unknown_guest_are_skimmed() {
        let mut out = Vec::new();
        put(&mut out, &hashes()).unwrap();
        let (low, high) = (Part::Block("low".into(), 2), Part::Block("high".into(), 1));
        assert_eq!(skimmed(&out).unwrap(), [low, high, Part::Section(0, 3), Part::Section(19, 1 << 63)]);
        for len in 0..out.len() {
            assert!(skimmed(&out[..len]).is_err(), "cut at {len}");
        }
        assert_eq!(skimmed(&[0xff; 64]).unwrap_err().errno(), libc::EINVAL);
    }

    #[test]
    fn a_granule_has_so_many_pages_at_most() {
        let mut out = Vec::new();
        put_granule(&mut out, &[5, 6, 7]).unwrap();
        assert_eq!(read_granule(&mut Slice::new(&out), 3).unwrap(), [5, 6, 7]);
        assert_eq!(read_granule(&mut Slice::new(&out), 2).unwrap_err().errno(), libc::EINVAL);
        assert!(read_granule(&mut Slice::new(&out[..out.len() - 1]), 3).is_err());
    }

    #[test]
    fn round_trip_and_refusals() {
        let mut out = Vec::new();
        put(&mut out, &hashes()).unwrap();
        assert_eq!(read_it(&out).unwrap(), hashes());
        for len in 0..out.len() {
            assert!(read_it(&out[..len]).is_err(), "cut at {len}");
        }
        let wrong: [fn(&mut Hashes); 6] = [
            |h| h.blocks.truncate(1),
            |h| h.blocks[1].0 = "low".into(),
            |h| h.blocks[1].0 = "other".into(),
            |h| h.blocks[0].1.push(0),
            |h| h.blocks[1].1.clear(),
            |h| h.sections.push((1, 1)),
        ];
        for (number, wrong) in wrong.into_iter().enumerate() {
            let mut other = hashes();
            wrong(&mut other);
            let mut out = Vec::new();
            put(&mut out, &other).unwrap();
            assert_eq!(read_it(&out).unwrap_err().errno(), libc::EINVAL, "{number}");
        }
    }
}
