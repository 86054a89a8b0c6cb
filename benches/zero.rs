//! Touched pages of zeros: how fast each vector unit finds them, beside plain reading of the same memory.
#![allow(unsafe_code, reason = "the search for zeros takes raw memory")]
#![allow(missing_docs, reason = "criterion's macros write functions without")]

use std::hint::black_box;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use vmig::zero::{self, MASK_PAGES, Unit};

const PAGE: usize = 4096;
/// Larger than any cache of the machine.
const LARGE: usize = 256 << 20;
/// Fits a core's own cache.
const SMALL: usize = 256 << 10;

/// Touched memory and where its first page starts, in words.
fn memory(len: usize) -> (Vec<u64>, usize) {
    let mut words = vec![1u64; (len + PAGE) / 8];
    let skip = words.as_ptr().align_offset(PAGE);
    words.fill(0);
    (words, skip)
}

fn read_all(words: &[u64]) -> u64 {
    words.iter().fold(0, |all, w| all | w)
}

fn zero_pages(unit: Unit, words: &[u64]) -> u32 {
    let masks = words.chunks_exact(MASK_PAGES * PAGE / 8).map(|chunk| {
        // SAFETY: aligned memory of our own, a whole number of pages; the unit is one of those available.
        unsafe { unit.mask(chunk.as_ptr().cast(), MASK_PAGES) }.count_ones()
    });
    masks.sum()
}

fn zeros(c: &mut Criterion) {
    for (name, len) in [("zeros in memory", LARGE), ("zeros in cache", SMALL)] {
        let (words, skip) = memory(len);
        let words = &words[skip..skip + len / 8];
        let mut group = c.benchmark_group(name);
        group.throughput(Throughput::Bytes(len as u64));
        group.bench_function("plain read", |b| b.iter(|| read_all(black_box(words))));
        for unit in Unit::available() {
            group.bench_function(BenchmarkId::new("mask", format!("{unit:?}")), |b| {
                b.iter(|| assert_eq!(zero_pages(unit, black_box(words)) as usize, len / PAGE));
            });
        }
        group.bench_function("page by page", |b| {
            b.iter(|| {
                let pages = black_box(words).chunks_exact(PAGE / 8);
                // SAFETY: a page of our own.
                pages.filter(|page| unsafe { zero::is_zero(page.as_ptr().cast()) }).count()
            });
        });
        group.finish();
    }
}

fn data(c: &mut Criterion) {
    let (mut words, skip) = memory(SMALL);
    let mut group = c.benchmark_group("a page that is not zero, in cache");
    for (name, at) in [("first word", 0), ("middle word", 256), ("word 200", 200)] {
        words.fill(0);
        words[skip..].iter_mut().skip(at).step_by(PAGE / 8).for_each(|w| *w = 1);
        let words = &words[skip..skip + SMALL / 8];
        group.throughput(Throughput::Elements((SMALL / PAGE) as u64));
        group.bench_function(name, |b| b.iter(|| assert_eq!(zero_pages(Unit::widest(), black_box(words)), 0)));
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10).warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_millis(800));
    targets = zeros, data
}
criterion_main!(benches);
