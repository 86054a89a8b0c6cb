use std::sync::atomic::{AtomicU64, Ordering};

use super::*;
use proptest::prelude::*;

fn model(map: &Bitmap) -> Vec<bool> {
    (0..map.len()).map(|i| map.test(i)).collect()
}

#[test]
fn bits_past_the_end_do_not_exist() {
    let map = Bitmap::new(70).unwrap();
    assert_eq!(map.merge(64, &[u64::MAX]), 6);
    assert_eq!(map.set_range(0, 1000), 64);
    assert_eq!(map.count(), 70);
    assert_eq!(map.next_run(0, usize::MAX), Some((0, 70)));
    assert_eq!(map.next_run(70, 1), None);
    assert!(Bitmap::new(0).unwrap().next_run(0, 1).is_none());
}

/// What a scan gives, in batches of at most `max`, none of which ends within a word that it could have given whole.
fn scanned(map: &Bitmap, max: usize) -> Vec<usize> {
    let (mut scan, mut pages) = (Scan::default(), Vec::new());
    loop {
        let before = pages.len();
        let mut ends = Vec::new();
        let taken = map.take_runs(&mut scan, max, |first, len| {
            assert!(len > 0 && ends.last().is_none_or(|end| *end < first), "runs are as long as they can be");
            pages.extend(first..first + len);
            ends.push(first + len);
        });
        assert_eq!(pages.len() - before, taken);
        assert!(taken <= max);
        let Some(last) = pages[before..].last() else { return pages };
        assert!(map.word(last / WORD_BITS) == 0 || pages[before] / WORD_BITS == last / WORD_BITS, "split a word");
    }
}

#[test]
fn a_scan_crosses_groups_and_leaves_no_trace() {
    let map = Bitmap::new(3 << 20).unwrap();
    let pages: Vec<usize> = (0..map.len()).filter(|p| p % 100_003 < 70 || p % 4099 == 0).collect();
    for max in [usize::MAX, 1, 64, 128] {
        pages.iter().for_each(|page| assert_eq!(map.set_range(*page, 1), 1));
        assert_eq!(scanned(&map, max), pages);
        assert_eq!(map.count(), 0);
        assert_eq!(map.next_group(0), None, "the summary is empty, too");
    }
    assert_eq!(map.take_some(&mut Scan::default(), 0, |_, _| ()), 0);
}

#[test]
fn a_summary_that_shows_too_much_is_no_end() {
    // As a setter leaves it that was overtaken by a taker between the bits and their summary.
    let map = Bitmap::new(1 << 20).unwrap();
    map.raise(3, 0);
    map.raise(4, 0b110);
    map.set_range(0, 1);
    map.set_range(77 * WORD_BITS * WORD_BITS, 2);
    assert_eq!(map.take_some(&mut Scan::default(), 100, |_, _| ()), 3);
    assert_eq!(map.next_group(0), None);
}

#[test]
fn what_a_scan_did_not_take_stays() {
    let map = Bitmap::new(100_000).unwrap();
    map.set_range(10, 90_000);
    let mut scan = Scan::default();
    assert_eq!(map.take_some(&mut scan, 200, |_, _| ()), 54 + 128);
    // A scan that was given up claims nothing, and another one begins at the start.
    map.set_range(3, 1);
    assert_eq!(scanned(&map, 64), [3].into_iter().chain(192..90_010).collect::<Vec<_>>());
    assert_eq!(map.take_some(&mut scan, 200, |_, _| ()), 0, "what it had looked at is gone");
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
        map.take_runs(&mut Scan::default(), 10, |start, len| {
            for page in start..start + len {
                seen[page] = pages[page].load(Ordering::Relaxed);
            }
        });
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
        max in 1usize..200,
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
        let copy = Bitmap::new(bits).unwrap();
        copy.merge(0, &(0..map.words()).map(|w| map.word(w)).collect::<Vec<_>>());
        prop_assert_eq!(scanned(&copy, max), (0..bits).filter(|page| want[*page]).collect::<Vec<_>>());
        prop_assert_eq!(copy.count(), 0);
        let (mut runs, mut from) = (vec![false; bits], 0);
        while let Some((start, len)) = map.next_run(from, 17) {
            prop_assert!((1..=17).contains(&len) && start >= from);
            runs[start..start + len].fill(true);
            from = start + len;
        }
        prop_assert_eq!(runs, want);
    }
}
