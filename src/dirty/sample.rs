//! Dirtied memory by samples: hashes of some pages, taken again later. Needs no tracker, costs the guest nothing, and sees
//! every writer, but not a page that got its old content back, nor what is smaller than the distance between two samples.

use std::time::Instant;

use super::places::Places;
use super::rate::{Probe, Whole};
use crate::error::{Error, Result};
use crate::ram::digest::{page_hash, zero_hash};
use crate::ram::presence::GRANULE;
use crate::ram::{PAGE, PAGE_BYTES};
use crate::sys::random::random;

/// A GiB, for which the number of samples is given.
const GIB: u64 = 1 << 30;

/// One sampled page.
#[derive(Clone, Copy, Debug)]
struct Sample {
    block: usize,
    page: usize,
    /// It did not exist: nothing.
    hash: Option<u64>,
    changed: bool,
    /// In any window.
    noted: bool,
    /// Bytes it stands for.
    grain: u64,
}

/// The samples of a guest.
pub(super) struct Samples<'a> {
    places: &'a Places,
    samples: Vec<Sample>,
    check: &'a dyn Fn() -> Result<()>,
}

impl<'a> Samples<'a> {
    /// So many of each GiB: in each stretch of equal length one, anywhere in it.
    pub(super) fn new(places: &'a Places, per_gib: u64, check: &'a dyn Fn() -> Result<()>) -> Result<Self> {
        let mut samples = Vec::new();
        let mut state = u64::from_ne_bytes(random()?);
        for (index, block) in places.blocks().enumerate() {
            let pages = block.pages() as u64;
            let wanted = u128::from(block.len()) * u128::from(per_gib) / u128::from(GIB);
            let count = u64::try_from(wanted).unwrap_or(pages).clamp(1, pages);
            let no_memory = |_| Error::no_memory("samples of guest RAM", count * size_of::<Sample>() as u64);
            samples.try_reserve(usize::try_from(count).unwrap_or(usize::MAX)).map_err(no_memory)?;
            for n in 0..count {
                let (first, end) = (pages * n / count, pages * (n + 1) / count);
                let page = first + drawn(&mut state) % (end - first).max(1);
                let page = usize::try_from(page).unwrap_or(0);
                let grain = block.len() / count;
                samples.push(Sample { block: index, page, hash: None, changed: false, noted: false, grain });
            }
        }
        Ok(Self { places, samples, check })
    }

    /// Calls `f` with each sample and the hash it has now; nothing where its page does not exist.
    fn each(&mut self, mut f: impl FnMut(&mut Sample, Option<u64>)) -> Result<()> {
        let mut copy = Vec::new();
        copy.try_reserve_exact(PAGE_BYTES).map_err(|_| Error::no_memory("a page", PAGE))?;
        let mut mapped = None;
        for sample in &mut self.samples {
            (self.check)()?;
            // Samples ascend: the kernel is asked once for all of a granule.
            let (block, first) = (self.places.block(sample.block), sample.page / GRANULE * GRANULE);
            if mapped != Some((sample.block, first)) {
                block.check_mapped(&(first..block.pages().min(first + GRANULE)))?;
                mapped = Some((sample.block, first));
            }
            let absent = self.places.is_absent(sample.block, sample.page);
            let now = (!absent).then(|| page_hash(block, sample.page, &mut copy));
            f(sample, now);
        }
        Ok(())
    }
}

/// splitmix64.
fn drawn(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl Probe for Samples<'_> {
    fn restart(&mut self, whole: &mut Whole) -> Result<Instant> {
        self.note(whole)?;
        let begin = Instant::now();
        self.each(|sample, now| (sample.hash, sample.changed) = (now, false))?;
        Ok(begin + begin.elapsed() / 2)
    }

    fn look(&mut self) -> Result<u64> {
        let (mut bytes, zero) = (0, zero_hash());
        self.each(|sample, now| {
            // A page that came to be without anybody writing it, by a read, is zero as it was before.
            sample.changed |= now.unwrap_or(zero) != sample.hash.unwrap_or(zero);
            bytes += if sample.changed { sample.grain } else { 0 };
        })?;
        Ok(bytes)
    }

    fn note(&mut self, whole: &mut Whole) -> Result<()> {
        for sample in self.samples.iter_mut().filter(|sample| sample.changed && !sample.noted) {
            sample.noted = true;
            whole.add(self.places.part(sample.block, sample.page), sample.grain);
        }
        Ok(())
    }

    fn grain(&self) -> u64 {
        self.samples.iter().map(|sample| sample.grain).max().unwrap_or(PAGE)
    }
}
