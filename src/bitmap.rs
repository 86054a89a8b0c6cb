//! Atomic bitmap: one bit per page, set by many threads, taken by one.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Error, Result};

/// Bits per word.
pub const WORD_BITS: usize = u64::BITS as usize;

/// A fixed number of bits, all zero at first.
///
/// Setting is always an atomic read-modify-write: testing a bit first and skipping the write loses marks against a
/// concurrent take.
#[derive(Debug)]
pub struct Bitmap {
    words: Box<[AtomicU64]>,
    bits: usize,
}

impl Bitmap {
    /// Room for `bits` bits.
    pub fn new(bits: usize) -> Result<Self> {
        let count = bits.div_ceil(WORD_BITS);
        let mut words = Vec::new();
        words.try_reserve_exact(count).map_err(|_| Error::no_memory("a dirty bitmap", count as u64 * 8))?;
        words.resize_with(count, AtomicU64::default);
        Ok(Self { words: words.into_boxed_slice(), bits })
    }

    /// Number of bits.
    pub fn len(&self) -> usize {
        self.bits
    }

    /// Whether there is no bit at all.
    pub fn is_empty(&self) -> bool {
        self.bits == 0
    }

    /// Number of words.
    pub fn words(&self) -> usize {
        self.words.len()
    }

    /// Bits of word `word` that exist.
    fn mask(&self, word: usize) -> u64 {
        match self.bits - word * WORD_BITS {
            left if left < WORD_BITS => (1 << left) - 1,
            _ => u64::MAX,
        }
    }

    /// Whether bit `bit` is set.
    pub fn test(&self, bit: usize) -> bool {
        self.words[bit / WORD_BITS].load(Ordering::Acquire) >> (bit % WORD_BITS) & 1 != 0
    }

    /// The bits of one word.
    pub fn word(&self, word: usize) -> u64 {
        self.words[word].load(Ordering::Acquire)
    }

    /// Sets the given bits of one word; returns how many were not set before. Bits past the end are ignored.
    pub fn or_word(&self, word: usize, bits: u64) -> usize {
        let bits = bits & self.mask(word);
        if bits == 0 {
            return 0;
        }
        let before = self.words[word].fetch_or(bits, Ordering::AcqRel);
        (bits & !before).count_ones() as usize
    }

    /// Takes all bits of one word.
    pub fn take_word(&self, word: usize) -> u64 {
        // A plain look first keeps idle words shared between caches; a mark made after it is found next time.
        if self.words[word].load(Ordering::Relaxed) == 0 {
            return 0;
        }
        self.words[word].swap(0, Ordering::AcqRel)
    }

    /// Calls `f(word, bits)` for each word that bits `start..start + len` touch; clipped to the bitmap.
    fn each_word(&self, start: usize, len: usize, mut f: impl FnMut(usize, u64)) {
        let end = start.saturating_add(len).min(self.bits);
        let mut at = start;
        while at < end {
            let bit = at % WORD_BITS;
            let n = (WORD_BITS - bit).min(end - at);
            f(at / WORD_BITS, (u64::MAX >> (WORD_BITS - n)) << bit);
            at += n;
        }
    }

    /// Sets a range; returns how many bits were not set before.
    pub fn set_range(&self, start: usize, len: usize) -> usize {
        let mut new = 0;
        self.each_word(start, len, |word, bits| new += self.or_word(word, bits));
        new
    }

    /// Takes a range; returns how many bits were set. What is read after this call is newer than every mark taken.
    pub fn take_range(&self, start: usize, len: usize) -> usize {
        let mut taken = 0;
        self.each_word(start, len, |word, bits| {
            let before = self.words[word].fetch_and(!bits, Ordering::AcqRel);
            taken += (before & bits).count_ones() as usize;
        });
        taken
    }

    /// Merges `words` so that their lowest bit becomes bit `first`; returns how many bits were not set before.
    pub fn merge(&self, first: usize, words: &[u64]) -> usize {
        let (word, shift) = (first / WORD_BITS, first % WORD_BITS);
        let mut new = 0;
        for (i, &bits) in words.iter().enumerate() {
            if bits == 0 || word + i >= self.words.len() {
                continue;
            }
            new += self.or_word(word + i, bits << shift);
            if shift != 0 && word + i + 1 < self.words.len() {
                new += self.or_word(word + i + 1, bits >> (WORD_BITS - shift));
            }
        }
        new
    }

    /// Number of bits set.
    pub fn count(&self) -> usize {
        self.words.iter().map(|w| w.load(Ordering::Relaxed).count_ones() as usize).sum()
    }

    /// The first run of set bits at or after `from`, at most `max` long, as (start, length).
    pub fn next_run(&self, from: usize, max: usize) -> Option<(usize, usize)> {
        let start = self.next(from, false)?;
        let end = self.next(start, true).unwrap_or(self.bits);
        Some((start, (end - start).min(max)))
    }

    /// The first bit at or after `from` that is set (or, inverted, clear).
    fn next(&self, from: usize, invert: bool) -> Option<usize> {
        let flip = if invert { u64::MAX } else { 0 };
        let mut word = from / WORD_BITS;
        let mut skip = u64::MAX << (from % WORD_BITS);
        while word < self.words.len() {
            let bits = (self.words[word].load(Ordering::Acquire) ^ flip) & skip;
            if bits != 0 {
                let at = word * WORD_BITS + bits.trailing_zeros() as usize;
                return (at < self.bits).then_some(at);
            }
            skip = u64::MAX;
            word += 1;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn model(map: &Bitmap) -> Vec<bool> {
        (0..map.len()).map(|i| map.test(i)).collect()
    }

    #[test]
    fn bits_past_the_end_do_not_exist() {
        let map = Bitmap::new(70).unwrap();
        assert_eq!(map.or_word(1, u64::MAX), 6);
        assert_eq!(map.set_range(0, 1000), 64);
        assert_eq!(map.count(), 70);
        assert_eq!(map.next_run(0, usize::MAX), Some((0, 70)));
        assert_eq!(map.next_run(70, 1), None);
        assert!(Bitmap::new(0).unwrap().next_run(0, 1).is_none());
    }

    #[test]
    fn marks_survive_a_concurrent_take() {
        let map = Bitmap::new(64).unwrap();
        let pages: Vec<AtomicU64> = (0..64).map(|_| AtomicU64::new(0)).collect();
        let rounds = 20_000u64;
        let mut seen = [0u64; 64];
        let copy = |seen: &mut [u64; 64]| {
            while let Some((start, len)) = map.next_run(0, 64) {
                map.take_range(start, len);
                for page in start..start + len {
                    seen[page] = pages[page].load(Ordering::Relaxed);
                }
            }
        };
        std::thread::scope(|s| {
            let writer = |half: usize| {
                let (map, pages) = (&map, &pages);
                s.spawn(move || {
                    for n in 1..=rounds {
                        let page = (usize::try_from(n).unwrap() * 7) % 32 + 32 * half;
                        pages[page].store(n, Ordering::Relaxed);
                        map.set_range(page, 1);
                    }
                })
            };
            let writers = [writer(0), writer(1)];
            while !writers.iter().all(|w| w.is_finished()) {
                copy(&mut seen);
            }
        });
        copy(&mut seen);
        for page in 0..64 {
            assert_eq!(seen[page], pages[page].load(Ordering::Relaxed), "page {page} lost its last write");
        }
    }

    proptest! {
        #[test]
        fn merging_shifts(bits in 1usize..300, first in 0usize..320, words in prop::collection::vec(any::<u64>(), 0..5)) {
            let map = Bitmap::new(bits).unwrap();
            let want: Vec<bool> = (0..bits).map(|i| {
                let at = i.checked_sub(first);
                at.is_some_and(|at| words.get(at / 64).is_some_and(|w| w >> (at % 64) & 1 != 0))
            }).collect();
            let new = map.merge(first, &words);
            prop_assert_eq!(model(&map), want.clone());
            prop_assert_eq!(new, want.iter().filter(|b| **b).count());
            prop_assert_eq!(map.merge(first, &words), 0);
        }

        #[test]
        fn behaves_like_a_vector_of_bools(
            bits in 1usize..300,
            ops in prop::collection::vec((any::<bool>(), 0usize..320, 0usize..150), 0..40),
        ) {
            let map = Bitmap::new(bits).unwrap();
            let mut want = vec![false; bits];
            for (set, start, len) in ops {
                let range = start.min(bits)..(start + len).min(bits);
                let changed = want[range.clone()].iter().filter(|b| **b != set).count();
                want[range].fill(set);
                let got = if set { map.set_range(start, len) } else { map.take_range(start, len) };
                prop_assert_eq!(got, changed);
                prop_assert_eq!(model(&map), want.clone());
            }
            let (mut runs, mut from) = (vec![false; bits], 0);
            while let Some((start, len)) = map.next_run(from, 17) {
                prop_assert!((1..=17).contains(&len) && start >= from);
                runs[start..start + len].fill(true);
                from = start + len;
            }
            prop_assert_eq!(runs, want);
        }
    }
}
