//! The dirty bitmap: scanning what is set, merging a log, marking a page; from 1 GiB to 4 TiB of guest RAM.
#![allow(missing_docs, reason = "criterion's macros write functions without")]

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use vmig::bitmap::{Bitmap, WORD_BITS};

const PAGES_PER_GIB: usize = 1 << 18;
const TIB: usize = 1024;
const SIZES_GIB: [usize; 7] = [1, 4, 16, 64, 256, TIB, 4 * TIB];
/// One page in so many is dirty.
const SPARSE: usize = 1000;

/// Evenly mixed numbers below `limit`, the same ones in every run.
fn drawn(limit: usize, count: usize) -> impl Iterator<Item = usize> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    (0..count).map(move |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        usize::try_from((u128::from(state) * limit as u128) >> 64).unwrap_or(0)
    })
}

/// Marks 0.1 % of the pages in runs of `run`; returns how many calls that took.
fn mark(map: &Bitmap, run: usize) -> usize {
    let count = map.len() / SPARSE / run;
    drawn(map.len() - run, count).for_each(|page| {
        map.set_range(page, run);
    });
    count
}

/// As the hub takes marks: word by word.
fn take_words(map: &Bitmap) -> usize {
    map.take_words().map(|(_, bits)| bits.count_ones() as usize).sum()
}

/// As a sender takes pages: run by run.
fn take_runs(map: &Bitmap) -> usize {
    let (mut taken, mut from) = (0, 0);
    while let Some((start, len)) = map.next_run(from, 256) {
        taken += map.take_range(start, len);
        from = start + len;
    }
    taken
}

type Take = fn(&Bitmap) -> usize;

fn scan(c: &mut Criterion) {
    let ways = [("words", take_words as Take), ("runs", take_runs as Take)];
    for (name, run) in [("take, nothing dirty", 0), ("take, 0.1 % in runs of 64", 64), ("take, 0.1 % single", 1)] {
        let mut group = c.benchmark_group(name);
        for gib in SIZES_GIB {
            let map = Bitmap::new(gib * PAGES_PER_GIB).expect("memory for the bitmap");
            for (way, take) in ways {
                group.throughput(Throughput::Elements((map.len() / SPARSE) as u64));
                group.bench_function(BenchmarkId::new(way, format!("{gib} GiB")), |b| {
                    // Timed by hand: marking is the larger part and leaves the map where a guest's would be, in memory.
                    b.iter_custom(|rounds| {
                        (0..rounds).fold(Duration::ZERO, |sum, _| {
                            if run > 0 {
                                mark(&map, run);
                            }
                            let start = Instant::now();
                            let taken = take(black_box(&map));
                            let time = start.elapsed();
                            assert_eq!(taken > 0, run > 0);
                            sum + time
                        })
                    });
                });
            }
        }
        group.finish();
    }
}

fn merge(c: &mut Criterion) {
    let mut group = c.benchmark_group("merge a log");
    for gib in SIZES_GIB {
        let map = Bitmap::new(gib * PAGES_PER_GIB).expect("memory for the bitmap");
        let words = map.words();
        group.throughput(Throughput::Bytes(words as u64 * 8));
        let mut log = vec![1u64; words];
        log.fill(0);
        let mut run = |name: &str, log: &[u64], first: usize| {
            group.bench_function(BenchmarkId::new(name, format!("{gib} GiB")), |b| {
                b.iter(|| map.merge(black_box(first), black_box(log)));
            });
        };
        run("empty", &log, 0);
        for page in drawn(map.len(), map.len() / SPARSE / 64) {
            log[page / WORD_BITS] = u64::MAX;
        }
        run("0.1 % in runs of 64", &log, 0);
        if gib <= TIB {
            log.fill(u64::MAX);
            run("full", &log, 0);
            log.fill(0x5555_5555_5555_5555);
            run("half full, shifted", &log, 17);
        }
    }
    group.bench_function("plain read/1024 GiB", |b| {
        let log = vec![1u64; TIB * PAGES_PER_GIB / WORD_BITS];
        b.iter(|| black_box(&log).iter().fold(0, |all, w| all | w));
    });
    group.finish();
}

fn marks(c: &mut Criterion) {
    let mut group = c.benchmark_group("mark a page");
    let map = Bitmap::new(16 * PAGES_PER_GIB).expect("memory for the bitmap");
    group.bench_function("the same", |b| {
        b.iter(|| {
            black_box(&map).set_range(black_box(77), 1);
        })
    });
    let pages: Vec<usize> = drawn(map.len(), 4096).collect();
    let mut next = pages.iter().cycle();
    group.bench_function("random of 16 GiB", |b| {
        b.iter(|| {
            black_box(&map).set_range(*next.next().expect("a cycle"), 1);
        });
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10).warm_up_time(Duration::from_millis(100)).measurement_time(Duration::from_millis(500));
    targets = scan, merge, marks
}
criterion_main!(benches);
