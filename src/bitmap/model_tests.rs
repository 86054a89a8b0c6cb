//! Every interleaving of setters and a taker, tried by loom (up to a few preemptions) on the same source file with loom's
//! atomics.

use loom::sync::Arc;
use loom::thread;

mod atomic {
    pub(super) use std::sync::atomic::Ordering;

    pub(super) use crate::thread::model::AtomicU64;
}
#[path = "levels.rs"]
#[allow(
    dead_code,
    unreachable_pub,
    clippy::duplicate_mod,
    reason = "the same code on purpose; the model uses a part"
)]
mod levels;

use levels::{Bitmap, Scan, WORD_BITS};

/// Preemptions in one run: races of so few levels need no more, and the number of runs grows with it steeply.
const PREEMPTIONS: usize = 3;

fn every_order(f: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(PREEMPTIONS);
    builder.check(f);
}

/// Everything that can be found from the top, twice, as the last scan of a migration does.
fn drain(map: &Bitmap) -> usize {
    let mut taken = 0;
    while let Some((start, len)) = map.next_run(0, usize::MAX) {
        taken += map.take_range(start, len);
    }
    taken
}

/// Setters beside a taker; then nothing that was set may be lost.
fn model(bits: usize, before: &'static [usize], setters: &'static [&'static [usize]], take: fn(&Bitmap) -> usize) {
    every_order(move || {
        let map = Arc::new(Bitmap::new(bits).unwrap());
        let set = |map: &Bitmap, bits: &[usize]| bits.iter().map(|b| map.set_range(*b, 1)).sum::<usize>();
        let mut new = set(&map, before);
        let threads: Vec<_> = setters
            .iter()
            .map(|bits| {
                let map = Arc::clone(&map);
                thread::spawn(move || set(&map, bits))
            })
            .collect();
        let mut taken = take(&map);
        new += threads.into_iter().map(|t| t.join().unwrap()).sum::<usize>();
        taken += drain(&map);
        assert_eq!(taken, new, "a mark was lost, or cannot be found from the top");
        assert_eq!(map.word(0), 0);
    });
}

fn take_all(map: &Bitmap) -> usize {
    map.take_some(&mut Scan::default(), usize::MAX, |_, _| ())
}

#[test]
fn a_setter_beside_a_scan() {
    model(2 * WORD_BITS, &[0], &[&[1, WORD_BITS]], take_all);
}

#[test]
fn two_setters_beside_a_scan() {
    model(WORD_BITS, &[], &[&[1], &[2]], take_all);
}

#[test]
fn a_setter_beside_a_scan_that_splits_a_word() {
    model(WORD_BITS, &[0, 1], &[&[2]], |map| map.take_some(&mut Scan::default(), 1, |_, _| ()));
}

#[test]
fn a_setter_beside_a_range_that_is_taken() {
    model(2 * WORD_BITS, &[0], &[&[1, WORD_BITS]], |map| map.take_range(0, WORD_BITS));
}

#[test]
fn two_setters_beside_a_range_that_is_taken() {
    model(WORD_BITS, &[0], &[&[0], &[2]], |map| map.take_range(0, 2));
}

#[test]
fn a_mark_whose_setter_returned_is_found() {
    // Even while another setter of the same word is still between the word and its summary.
    every_order(|| {
        let map = Arc::new(Bitmap::new(WORD_BITS).unwrap());
        let other = Arc::clone(&map);
        let slow = thread::spawn(move || other.set_range(0, 1));
        map.set_range(1, 1);
        let mut found = 0;
        map.take_some(&mut Scan::default(), usize::MAX, |_, bits| found |= bits);
        assert!(found & 2 != 0, "the mark was there and the scan passed it by");
        slow.join().unwrap();
    });
}
