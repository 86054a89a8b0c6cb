use std::sync::atomic::{AtomicU64, Ordering};

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
