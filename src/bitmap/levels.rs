//! The bits, and two levels of summary above them: what is not marked is not looked at.
//!
//! `filled` has a bit per word of `words`, `top` a bit per word of `filled`, so one word of `top` stands for a GiB of
//! guest RAM. A summary bit that is clear promises that nothing is marked below; one that is set promises nothing.
//!
//! # Why no mark is lost
//!
//! A setter sets the bit below first and looks at the summary after; it returns only when it saw both summary bits set
//! or set them itself, so a mark whose setter returned can be found from the top. A taker clears the bits of `filled`
//! first and takes the words after; what it leaves in them it shows again ([`Bitmap::raise`]). Where it emptied a word
//! of `filled` it clears the bit of `top`, then looks at `filled` again and sets the bit back if something came in
//! between ([`Bitmap::lower`]). Either way: for a setter to skip a summary bit it must have read it before the taker
//! cleared it; its mark was set before that, and the taker looks below after that, so the taker finds it. This is an
//! argument about one order of all operations, hence sequential consistency throughout; on x86 it costs nothing beside
//! an atomic read-modify-write. It holds for each pair of levels by itself. Between a taker's clearing and setting back,
//! *another* taker may miss a mark: it is found by a later scan, so who must see every mark scans when no other taker is
//! at work.
//!
//! Setting a bit is always an atomic read-modify-write: testing first and skipping the write loses marks, because a
//! taker that read the old bit may read the page's bytes before the write that the mark is about.

use super::atomic::{AtomicU64, Ordering::Relaxed, Ordering::SeqCst};
use crate::error::{Error, Result};
use crate::sys::memory::prefetch;

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

/// The lowest `count` of the bits set.
fn lowest(bits: u64, count: usize) -> u64 {
    let mut lowest = bits;
    for _ in count..bits.count_ones() as usize {
        lowest &= !(1 << lowest.ilog2());
    }
    lowest
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
    pub(super) fn raise(&self, group: usize, words: u64) {
        if self.filled[group].load(SeqCst) & words != words {
            self.filled[group].fetch_or(words, SeqCst);
        }
        let bit = 1 << (group % WORD_BITS);
        // Also where the level below was there already: who set it may not have come here yet.
        if self.top[group / WORD_BITS].load(SeqCst) & bit == 0 {
            self.top[group / WORD_BITS].fetch_or(bit, SeqCst);
        }
    }

    /// Takes at most `max` bits from where `scan` is on, in ascending order, and gives each word's as (word, bits). Returns
    /// how many; 0: the end. A word is split only where it alone is too much.
    pub fn take_some(&self, scan: &mut Scan, max: usize, mut give: impl FnMut(usize, u64)) -> usize {
        let mut taken = 0;
        while let Some((group, words)) = scan.head(self) {
            let room = max - taken;
            let fit = match self.fitting(group, words, room) {
                0 if taken > 0 || max == 0 => break,
                0 => words & words.wrapping_neg(),
                fit => fit,
            };
            let (more, left) = self.take_words(group, fit, room, &mut give);
            taken += more;
            scan.leave(self, words & !fit | left);
        }
        taken
    }

    /// As many of these words, from the lowest on, as have no more than `max` bits.
    fn fitting(&self, group: usize, words: u64, max: usize) -> u64 {
        if max / WORD_BITS >= words.count_ones() as usize {
            return words;
        }
        let (mut room, mut fit) = (max, 0);
        for i in each_bit(words) {
            let count = self.words[group * WORD_BITS + i].load(SeqCst).count_ones() as usize;
            if count > room {
                break;
            }
            room -= count;
            fit |= 1 << i;
        }
        fit
    }

    /// As [`take_some`](Self::take_some), in runs, each as (start, length).
    pub fn take_runs(&self, scan: &mut Scan, max: usize, mut give: impl FnMut(usize, usize)) -> usize {
        let (mut start, mut end) = (0, 0);
        let taken = self.take_some(scan, max, |word, mut bits| {
            while bits != 0 {
                let from = bits.trailing_zeros();
                let to = from + (bits >> from).trailing_ones();
                let first = word * WORD_BITS + from as usize;
                if first != end {
                    if start < end {
                        give(start, end - start);
                    }
                    start = first;
                }
                end = word * WORD_BITS + to as usize;
                bits &= u64::MAX.checked_shl(to).unwrap_or(0);
            }
        });
        if start < end {
            give(start, end - start);
        }
        taken
    }

    /// Takes up to `max` bits of these words of a group; how many, and which of the words have some left.
    fn take_words(&self, group: usize, words: u64, max: usize, give: &mut impl FnMut(usize, u64)) -> (usize, u64) {
        self.forget(group, words);
        let (mut taken, mut left) = (0, 0);
        for i in each_bit(words) {
            let word = group * WORD_BITS + i;
            let bits = match max - taken {
                WORD_BITS.. => self.words[word].swap(0, SeqCst),
                room => {
                    let wanted = lowest(self.words[word].load(SeqCst), room);
                    let before = self.words[word].fetch_and(!wanted, SeqCst);
                    left |= u64::from(before & !wanted != 0) << i;
                    before & wanted
                }
            };
            if bits != 0 {
                taken += bits.count_ones() as usize;
                give(word, bits);
            }
        }
        if left != 0 {
            self.raise(group, left);
        }
        (taken, left)
    }

    /// Words `words` of a group are about to be taken: clears their summary first.
    fn forget(&self, group: usize, words: u64) {
        let filled = &self.filled[group];
        if filled.load(SeqCst) & !words != 0 {
            filled.fetch_and(!words, SeqCst);
            return;
        }
        // An exchange is cheaper, and mostly all words of a group are taken. What came in since is shown again.
        match filled.swap(0, SeqCst) & !words {
            0 => self.lower(group),
            more => self.raise(group, more),
        }
    }

    /// Nothing is marked in a group: the level above shows it, unless something is by now.
    fn lower(&self, group: usize) {
        let bit = 1 << (group % WORD_BITS);
        let top = &self.top[group / WORD_BITS];
        top.fetch_and(!bit, SeqCst);
        if self.filled[group].load(SeqCst) != 0 {
            top.fetch_or(bit, SeqCst);
        }
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
            let found = self.filled[group].load(SeqCst) & span;
            if found != 0 {
                self.forget(group, found);
            }
            let mut left = 0;
            for i in each_bit(found) {
                let word = base + i;
                let bits = between(word * WORD_BITS, start, end);
                let before = match bits {
                    u64::MAX => self.words[word].swap(0, SeqCst),
                    _ => self.words[word].fetch_and(!bits, SeqCst),
                };
                taken += (before & bits).count_ones() as usize;
                left |= u64::from(before & !bits != 0) << i;
            }
            if left != 0 {
                self.raise(group, left);
            }
            from = group + 1;
        }
        taken
    }

    /// Merges `words` so that their lowest bit becomes bit `first`; returns how many bits were not set before.
    pub fn merge(&self, first: usize, words: &[u64]) -> usize {
        let (start, shift) = (first / WORD_BITS, first % WORD_BITS);
        let mut batch = Batch::new(self);
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

    /// Sets the bits of these words; returns how many bits were not set before.
    pub fn set_words(&self, words: &[(usize, u64)]) -> usize {
        let mut batch = Batch::new(self);
        words.iter().for_each(|(word, bits)| batch.put(*word, *bits));
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
    pub(super) fn next_group(&self, from: usize) -> Option<usize> {
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

/// Words to be marked, which come from memory while more of them are found.
struct Batch<'a> {
    map: &'a Bitmap,
    list: [(usize, u64); BATCH],
    len: usize,
    new: usize,
}

impl<'a> Batch<'a> {
    fn new(map: &'a Bitmap) -> Self {
        Self { map, list: [(0, 0); BATCH], len: 0, new: 0 }
    }

    #[inline]
    fn put(&mut self, word: usize, bits: u64) {
        if bits == 0 || word >= self.map.words.len() {
            return;
        }
        prefetch(&self.map.words[word]);
        self.list[self.len] = (word, bits & between(word * WORD_BITS, 0, self.map.bits));
        self.len += 1;
        if self.len == BATCH {
            self.flush();
        }
    }

    fn flush(&mut self) {
        let (mut group, mut words) = (0, 0);
        for &(word, bits) in &self.list[..self.len] {
            if word / WORD_BITS != group {
                if words != 0 {
                    self.map.raise(group, words);
                }
                (group, words) = (word / WORD_BITS, 0);
            }
            self.new += self.map.put(word, bits);
            words |= 1 << (word % WORD_BITS);
        }
        if words != 0 {
            self.map.raise(group, words);
        }
        self.len = 0;
    }

    fn finish(mut self) -> usize {
        self.flush();
        self.new
    }
}

/// Words found before the first of them is marked.
const BATCH: usize = 128;
/// Groups that are fetched from memory before the first of them is taken.
const AHEAD: usize = 16;

/// Where [`Bitmap::take_some`] is, and what it takes next. It claims nothing: what was looked at and not taken stays.
#[derive(Clone, Debug, Default)]
pub struct Scan {
    /// Groups below it were looked at.
    next: usize,
    /// A ring of groups, each with the words of it that are to be taken.
    ahead: [(usize, u64); AHEAD],
    first: usize,
    len: usize,
}

impl Scan {
    /// The group at hand; none: the end.
    #[inline]
    fn head(&mut self, map: &Bitmap) -> Option<(usize, u64)> {
        if self.len == 0 {
            while self.len < AHEAD && self.look(map) {}
        }
        (self.len > 0).then(|| self.ahead[self.first])
    }

    /// Leaves `words` of the group at hand for later; without any goes on.
    #[inline]
    fn leave(&mut self, map: &Bitmap, words: u64) {
        self.ahead[self.first].1 = words;
        if words == 0 {
            self.first = (self.first + 1) % AHEAD;
            self.len -= 1;
            self.look(map);
        }
    }

    /// Adds the next group that is not empty. Its words come from memory while others are taken: an atomic exchange of
    /// a word that is not at hand would wait alone.
    #[inline]
    fn look(&mut self, map: &Bitmap) -> bool {
        let (group, words) = loop {
            let Some(group) = map.next_group(self.next) else { return false };
            self.next = group + 1;
            match map.filled[group].load(SeqCst) {
                0 => map.lower(group),
                words => break (group, words),
            }
        };
        for i in each_bit(words) {
            prefetch(&map.words[group * WORD_BITS + i]);
        }
        self.ahead[(self.first + self.len) % AHEAD] = (group, words);
        self.len += 1;
        true
    }
}
