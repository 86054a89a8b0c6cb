//! The bits, and two levels of summary above them: what is not marked is not looked at.
//!
//! `filled` has a bit per word of `words`, `top` a bit per word of `filled`, so one word of `top` stands for a GiB of
//! guest RAM. A summary bit that is clear promises that nothing is marked below; one that is set promises nothing.
//!
//! # Why no mark is lost
//!
//! A setter sets the bit below first and looks at the summary after; it returns only when it saw both summary bits set
//! or set them itself, so a mark whose setter returned can be found from the top. A taker either clears the summary
//! first and takes what is below after ([`Taken`]), or takes first and clears the summary of what it left empty, then
//! looks again below and sets it back if something came in between ([`Bitmap::lower`]). Either way: for a setter to
//! skip a summary bit it must have read it before the taker cleared it; its mark was set before that, and the taker
//! looks below after that, so the taker finds it. This is an argument about one order of all operations, hence
//! sequential consistency throughout; on x86 it costs nothing beside an atomic read-modify-write. It holds for each
//! pair of levels by itself. Between a taker's clearing and setting back, *another* taker may miss a mark: it is found
//! by a later scan, so who must see every mark scans when no other taker is at work.
//!
//! Setting a bit is always an atomic read-modify-write: testing first and skipping the write loses marks, because a
//! taker that read the old bit may read the page's bytes before the write that the mark is about.

use super::atomic::{AtomicU64, Ordering::Relaxed, Ordering::SeqCst};
use crate::error::{Error, Result};

/// Bits per word.
pub const WORD_BITS: usize = u64::BITS as usize;
/// Source words that a merge skips at once if they are all zero: a cache line.
const STRIDE: usize = 8;

/// A fixed number of bits, all zero at first.
#[derive(Debug)]
pub struct Bitmap {
    words: Box<[AtomicU64]>,
    filled: Box<[AtomicU64]>,
    top: Box<[AtomicU64]>,
    bits: usize,
}

/// Bits `from..to` of a word that holds bits `at..at + 64`.
fn between(at: usize, from: usize, to: usize) -> u64 {
    let above = u64::MAX << from.saturating_sub(at).min(WORD_BITS - 1);
    let below = match to - at {
        left if left < WORD_BITS => (1 << left) - 1,
        _ => u64::MAX,
    };
    above & below
}

/// The positions of the bits set.
fn each_bit(mut bits: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let at = bits.trailing_zeros() as usize;
        bits &= bits.checked_sub(1)?;
        Some(at)
    })
}

fn zeroed(count: usize) -> Result<Box<[AtomicU64]>> {
    let mut words = Vec::new();
    words.try_reserve_exact(count).map_err(|_| Error::no_memory("a dirty bitmap", count as u64 * 8))?;
    words.resize_with(count, || AtomicU64::new(0));
    Ok(words.into_boxed_slice())
}

impl Bitmap {
    /// Room for `bits` bits.
    pub fn new(bits: usize) -> Result<Self> {
        let words = bits.div_ceil(WORD_BITS);
        let groups = words.div_ceil(WORD_BITS);
        let top = groups.div_ceil(WORD_BITS);
        Ok(Self { words: zeroed(words)?, filled: zeroed(groups)?, top: zeroed(top)?, bits })
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

    /// Whether bit `bit` is set.
    pub fn test(&self, bit: usize) -> bool {
        self.words[bit / WORD_BITS].load(SeqCst) >> (bit % WORD_BITS) & 1 != 0
    }

    /// The bits of one word.
    pub fn word(&self, word: usize) -> u64 {
        self.words[word].load(SeqCst)
    }

    /// Sets bits of one word, and leaves the summary to the caller; returns how many were not set before.
    #[inline]
    fn put(&self, word: usize, bits: u64) -> usize {
        // A whole word needs no loop of compare and exchange.
        let before = match bits {
            u64::MAX => self.words[word].swap(bits, SeqCst),
            _ => self.words[word].fetch_or(bits, SeqCst),
        };
        (bits & !before).count_ones() as usize
    }

    /// Words `words` of a group were marked: the summary shows it when this returns.
    #[inline]
    fn raise(&self, group: usize, words: u64) {
        if self.filled[group].load(SeqCst) & words != words {
            self.filled[group].fetch_or(words, SeqCst);
        }
        let bit = 1 << (group % WORD_BITS);
        // Also where the level below was there already: who set it may not have come here yet.
        if self.top[group / WORD_BITS].load(SeqCst) & bit == 0 {
            self.top[group / WORD_BITS].fetch_or(bit, SeqCst);
        }
    }

    /// Words `words` of a group were left empty: clears their summary, unless they are not empty any more.
    fn lower(&self, group: usize, words: u64) {
        let rest = self.filled[group].fetch_and(!words, SeqCst) & !words;
        let mut back = 0;
        for i in each_bit(words) {
            back |= u64::from(self.words[group * WORD_BITS + i].load(SeqCst) != 0) << i;
        }
        if back != 0 {
            self.raise(group, back);
        } else if rest == 0 {
            let bit = 1 << (group % WORD_BITS);
            let top = &self.top[group / WORD_BITS];
            top.fetch_and(!bit, SeqCst);
            if self.filled[group].load(SeqCst) != 0 {
                top.fetch_or(bit, SeqCst);
            }
        }
    }

    /// Sets the given bits of one word; returns how many were not set before. Bits past the end are ignored.
    #[inline]
    pub fn or_word(&self, word: usize, bits: u64) -> usize {
        let bits = bits & between(word * WORD_BITS, 0, self.bits);
        if bits == 0 {
            return 0;
        }
        let new = self.put(word, bits);
        self.raise(word / WORD_BITS, 1 << (word % WORD_BITS));
        new
    }

    /// Takes all bits of one word.
    pub fn take_word(&self, word: usize) -> u64 {
        // A plain look first keeps idle words shared between caches; a mark made after it is found next time.
        if self.words[word].load(Relaxed) == 0 {
            return 0;
        }
        let bits = self.words[word].swap(0, SeqCst);
        self.lower(word / WORD_BITS, 1 << (word % WORD_BITS));
        bits
    }

    /// Takes every word that is not empty, as (word, bits), in order; what the iterator did not give stays.
    pub fn take_words(&self) -> Taken<'_> {
        Taken { map: self, next_top: 0, groups: 0, group: 0, left: 0, batch: [0; BATCH], given: 0, ready: 0 }
    }

    /// The part of `start..start + len` that exists.
    #[inline]
    fn clip(&self, start: usize, len: usize) -> (usize, usize) {
        let end = start.saturating_add(len).min(self.bits);
        (start.min(end), end)
    }

    /// Sets a range; returns how many bits were not set before.
    // Inlined so that where the count is not wanted the mark of a page is one plain `lock or`.
    #[inline]
    pub fn set_range(&self, start: usize, len: usize) -> usize {
        let (start, end) = self.clip(start, len);
        if start == end {
            return 0;
        }
        let (first, last) = (start / WORD_BITS, (end - 1) / WORD_BITS);
        let mut new = 0;
        for group in first / WORD_BITS..=last / WORD_BITS {
            let base = group * WORD_BITS;
            let (from, to) = (first.max(base), last.min(base + WORD_BITS - 1));
            for word in from..=to {
                new += self.put(word, between(word * WORD_BITS, start, end));
            }
            self.raise(group, between(base, from, to + 1));
        }
        new
    }

    /// Takes a range; returns how many bits were set. What is read after this call is newer than every mark taken.
    pub fn take_range(&self, start: usize, len: usize) -> usize {
        let (start, end) = self.clip(start, len);
        if start == end {
            return 0;
        }
        let (first, last) = (start / WORD_BITS, (end - 1) / WORD_BITS);
        let mut taken = 0;
        let mut from = first / WORD_BITS;
        while let Some(group) = self.next_group(from).filter(|g| *g <= last / WORD_BITS) {
            let base = group * WORD_BITS;
            let span = between(base, first, last + 1);
            let mut empty = 0;
            for i in each_bit(self.filled[group].load(SeqCst) & span) {
                let word = base + i;
                let bits = between(word * WORD_BITS, start, end);
                let before = match bits {
                    u64::MAX => self.words[word].swap(0, SeqCst),
                    _ => self.words[word].fetch_and(!bits, SeqCst),
                };
                taken += (before & bits).count_ones() as usize;
                empty |= u64::from(before & !bits == 0) << i;
            }
            if empty != 0 {
                self.lower(group, empty);
            }
            from = group + 1;
        }
        taken
    }

    /// Merges `words` so that their lowest bit becomes bit `first`; returns how many bits were not set before.
    pub fn merge(&self, first: usize, words: &[u64]) -> usize {
        let (start, shift) = (first / WORD_BITS, first % WORD_BITS);
        let mut batch = Batch { map: self, group: 0, words: 0, new: 0 };
        // Bits of the word before that belong to the next one.
        let mut carry = 0;
        for (i, stride) in words.chunks(STRIDE).enumerate() {
            if carry == 0 && stride.iter().fold(0, |all, w| all | w) == 0 {
                continue;
            }
            for (j, &bits) in stride.iter().enumerate() {
                batch.put(start + i * STRIDE + j, bits << shift | carry);
                carry = (bits >> 1) >> (WORD_BITS - 1 - shift);
            }
        }
        batch.put(start + words.len(), carry);
        batch.finish()
    }

    /// Number of bits set.
    pub fn count(&self) -> usize {
        let (mut sum, mut from) = (0, 0);
        while let Some(group) = self.next_group(from) {
            for i in each_bit(self.filled[group].load(SeqCst)) {
                sum += self.words[group * WORD_BITS + i].load(Relaxed).count_ones() as usize;
            }
            from = group + 1;
        }
        sum
    }

    /// The first run of set bits at or after `from`, at most `max` long, as (start, length).
    pub fn next_run(&self, from: usize, max: usize) -> Option<(usize, usize)> {
        let start = self.next_set(from)?;
        let most = start.saturating_add(max).min(self.bits);
        let mut end = start;
        while end < most {
            let clear = !self.words[end / WORD_BITS].load(SeqCst) >> (end % WORD_BITS);
            if clear != 0 {
                end += clear.trailing_zeros() as usize;
                break;
            }
            end += WORD_BITS - end % WORD_BITS;
        }
        Some((start, end.min(most) - start))
    }

    /// The first set bit at or after `from`.
    fn next_set(&self, from: usize) -> Option<usize> {
        let mut word = from / WORD_BITS;
        let here = self.words.get(word)?.load(SeqCst) & u64::MAX << (from % WORD_BITS);
        if here != 0 {
            return Some(word * WORD_BITS + here.trailing_zeros() as usize);
        }
        loop {
            word = self.next_filled(word + 1)?;
            let bits = self.words[word].load(SeqCst);
            if bits != 0 {
                return Some(word * WORD_BITS + bits.trailing_zeros() as usize);
            }
        }
    }

    /// The first word at or after `from` whose summary is set.
    fn next_filled(&self, from: usize) -> Option<usize> {
        let mut group = from / WORD_BITS;
        let mut bits = self.filled.get(group)?.load(SeqCst) & u64::MAX << (from % WORD_BITS);
        while bits == 0 {
            group = self.next_group(group + 1)?;
            bits = self.filled[group].load(SeqCst);
        }
        Some(group * WORD_BITS + bits.trailing_zeros() as usize)
    }

    /// The first group at or after `from` whose summary is set.
    fn next_group(&self, from: usize) -> Option<usize> {
        let first = from / WORD_BITS;
        let mut keep = u64::MAX << (from % WORD_BITS);
        for (i, top) in self.top.get(first..)?.iter().enumerate() {
            let bits = top.load(SeqCst) & keep;
            if bits != 0 {
                return Some((first + i) * WORD_BITS + bits.trailing_zeros() as usize);
            }
            keep = u64::MAX;
        }
        None
    }
}

/// Words of one group that were marked and are not in the summary yet.
struct Batch<'a> {
    map: &'a Bitmap,
    group: usize,
    words: u64,
    new: usize,
}

impl Batch<'_> {
    #[inline]
    fn put(&mut self, word: usize, bits: u64) {
        if bits == 0 || word >= self.map.words.len() {
            return;
        }
        let bits = bits & between(word * WORD_BITS, 0, self.map.bits);
        if word / WORD_BITS != self.group {
            self.flush();
            self.group = word / WORD_BITS;
        }
        self.new += self.map.put(word, bits);
        self.words |= 1 << (word % WORD_BITS);
    }

    fn flush(&mut self) {
        if self.words != 0 {
            self.map.raise(self.group, self.words);
            self.words = 0;
        }
    }

    fn finish(mut self) -> usize {
        self.flush();
        self.new
    }
}

/// Words looked at before the first of them is taken.
const BATCH: usize = 128;

/// Takes the words that are not empty; see [`Bitmap::take_words`].
#[derive(Debug)]
pub struct Taken<'a> {
    map: &'a Bitmap,
    /// The word of `top` to take next.
    next_top: usize,
    /// Groups that were taken from the `top` word before it and not looked into yet.
    groups: u64,
    /// The group that was looked into last, and its words that are not in the batch yet.
    group: usize,
    left: u64,
    batch: [usize; BATCH],
    given: usize,
    ready: usize,
}

impl Taken<'_> {
    /// Finds the next words by the summary, which is cleared on the way.
    fn refill(&mut self) {
        (self.given, self.ready) = (0, 0);
        while self.ready < BATCH && self.find_words() {
            for i in each_bit(self.left).take(BATCH - self.ready) {
                self.batch[self.ready] = self.group * WORD_BITS + i;
                self.ready += 1;
                self.left &= self.left - 1;
            }
        }
        // Plain looks at independent words wait for memory all at once; an atomic exchange waits alone. What is empty
        // by now is dropped: its summary was cleared before, so a mark from here on is found next time.
        let mut kept = 0;
        for at in 0..self.ready {
            let word = self.batch[at];
            self.batch[kept] = word;
            kept += usize::from(self.map.words[word].load(SeqCst) != 0);
        }
        self.ready = kept;
    }

    /// Makes `left` words of `group`; false if there are none any more.
    fn find_words(&mut self) -> bool {
        while self.left == 0 {
            while self.groups == 0 {
                let Some(top) = self.map.top.get(self.next_top) else { return false };
                if top.load(SeqCst) != 0 {
                    self.groups = top.swap(0, SeqCst);
                }
                self.next_top += 1;
            }
            self.group = (self.next_top - 1) * WORD_BITS + self.groups.trailing_zeros() as usize;
            self.groups &= self.groups - 1;
            self.left = self.map.filled[self.group].swap(0, SeqCst);
        }
        true
    }
}

impl Iterator for Taken<'_> {
    type Item = (usize, u64);

    fn next(&mut self) -> Option<(usize, u64)> {
        loop {
            if self.given == self.ready {
                self.refill();
                if self.ready == 0 {
                    return None;
                }
            }
            let word = self.batch[self.given];
            self.given += 1;
            let bits = self.map.words[word].swap(0, SeqCst);
            if bits != 0 {
                return Some((word, bits));
            }
        }
    }
}

impl Drop for Taken<'_> {
    /// Shows in the summary again what was found and not taken.
    fn drop(&mut self) {
        for word in &self.batch[self.given..self.ready] {
            self.map.raise(word / WORD_BITS, 1 << (word % WORD_BITS));
        }
        if self.left != 0 {
            self.map.raise(self.group, self.left);
        }
        if self.groups != 0 {
            self.map.top[self.next_top - 1].fetch_or(self.groups, SeqCst);
        }
    }
}
