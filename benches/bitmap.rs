//! The dirty bitmap: harvesting and taking what is dirty, merging a log, marking a page; from 1 GiB to 4 TiB of guest RAM.
#![allow(missing_docs, reason = "criterion's macros write functions without")]

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use vmig::bitmap::{Bitmap, WORD_BITS};
use vmig::dirty::choice::Choice;
use vmig::dirty::cursor::Cursor;
use vmig::dirty::hub::Hub;
use vmig::dirty::set::DirtySet;
use vmig::ram::{BlockSpec, PAGE, PAGE_BYTES, Ram};
use vmig::wire::packet::PAGES_MAX;

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

/// A guest of one block, its writes reported by the VMM, and a reader of them.
struct Guest {
    ram: Ram,
    hub: Hub,
    set: Arc<DirtySet>,
}

impl Guest {
    /// Nothing is dirty. Its memory is never touched, so there need not be any.
    fn new(gib: usize) -> Self {
        let (ram, hub) = (Ram::default(), Hub::default());
        let (host, len) = (std::ptr::without_provenance_mut(PAGE_BYTES), (gib * PAGES_PER_GIB) as u64 * PAGE);
        let spec =
            BlockSpec { name: "ram".into(), host, len, gpa: 0, marked: true, shared_storage: false, file: None };
        ram.add(spec).expect("a block");
        let set = hub.subscribe(&ram.list(), Choice::Auto).expect("memory for the bitmaps");
        let guest = Self { ram, hub, set };
        guest.take();
        guest
    }

    /// Marks 0.1 % of the pages in runs of `run`, which the hub does not know of yet; how many marks.
    fn write(&self, run: usize) {
        let block = self.set.block(0);
        let marks = block.marks();
        drawn(marks.len() - run, marks.len() / SPARSE / run).for_each(|page| {
            marks.set_range(page, run);
        });
    }

    /// Takes all that is dirty, as the sender of pages does: a packet at a time.
    fn take(&self) -> usize {
        let (mut cursor, mut taken) = (Cursor::default(), 0);
        while cursor.take(&self.set, PAGES_MAX).expect("no tracker that could fail") {
            taken += black_box(cursor.runs()).iter().map(|run| run.pages).sum::<usize>();
        }
        taken
    }
}

/// What a round costs before and beside its pages: the hub's harvest of what was marked, and the sender's taking.
fn round(c: &mut Criterion) {
    for (name, run) in [("nothing dirty", 0), ("0.1 % in runs of 64", 64), ("0.1 % single", 1)] {
        for gib in SIZES_GIB {
            let guest = Guest::new(gib);
            let mut group = c.benchmark_group(name);
            group.throughput(Throughput::Elements((guest.set.block(0).pages() / SPARSE) as u64));
            // Timed by hand: marking is the larger part and leaves the maps where a guest's would be, in memory.
            let mut timed = |name: &str, harvest: bool| {
                group.bench_function(BenchmarkId::new(name, format!("{gib} GiB")), |b| {
                    b.iter_custom(|rounds| {
                        (0..rounds).fold(Duration::ZERO, |sum, _| {
                            if run > 0 {
                                guest.write(run);
                            }
                            let start = Instant::now();
                            guest.hub.sync().expect("no tracker that could fail");
                            let synced = start.elapsed();
                            let start = Instant::now();
                            let taken = guest.take();
                            let took = start.elapsed();
                            assert_eq!(taken > 0, run > 0);
                            sum + if harvest { synced } else { took }
                        })
                    });
                });
            };
            timed("harvest", true);
            timed("take", false);
            group.finish();
            drop(guest.ram);
        }
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
        log.fill(0);
        for page in drawn(map.len(), map.len() / SPARSE) {
            log[page / WORD_BITS] |= 1 << (page % WORD_BITS);
        }
        run("0.1 % single", &log, 0);
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
    targets = round, merge, marks
}
criterion_main!(benches);
