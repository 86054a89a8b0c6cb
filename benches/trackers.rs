//! What each dirty tracker costs: the writer, for its first write to a page after that was cleared; and the harvester, for
//! a GiB of memory.
#![allow(missing_docs, reason = "criterion's macros write functions without")]
#![allow(clippy::unwrap_used, reason = "a benchmark")]

#[cfg(target_arch = "x86_64")]
#[path = "trackers/x86.rs"]
mod kvm;
#[cfg(target_arch = "x86_64")]
#[path = "../src/sys/kvm_guest.rs"]
mod kvm_guest;
#[path = "../tests/trackers/memory.rs"]
mod memory;
#[path = "trackers/source.rs"]
mod source;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main};
use vmig::dirty::choice::Choice;
use vmig::dirty::cursor::Cursor;
use vmig::dirty::hub::Hub;
use vmig::dirty::set::DirtySet;
use vmig::dirty::{Kind as Tracker, write_protect::WriteProtect};
use vmig::ram::{Block, BlockSpec, PAGE, Ram};

use memory::{Kind, Memory};

const GIB_PAGES: usize = 1 << 18;
/// Of the pages of a GiB, one in so many is written.
const PART: usize = 8;
/// Pages cleared at once, as the sender of pages does in its first round.
const TAKEN: usize = 4096;

/// A block that is tracked, by whatever the hub has.
pub(crate) struct Tracked {
    ram: Ram,
    hub: Hub,
    set: Option<Arc<DirtySet>>,
    choice: Choice,
}

impl Tracked {
    pub(crate) fn new(at: *mut u8, pages: usize, marked: bool, choice: Choice) -> (Self, Arc<Block>) {
        let (ram, hub) = (Ram::default(), Hub::default());
        let (name, len) = ("ram".to_owned(), pages as u64 * PAGE);
        let spec = BlockSpec { name, host: at, len, gpa: 0, marked, shared_storage: false, file: None };
        let block = ram.add(spec).unwrap();
        (Self { ram, hub, set: None, choice }, block)
    }

    pub(crate) fn hub(&self) -> &Hub {
        &self.hub
    }

    pub(crate) fn begin(&mut self) {
        self.set = Some(self.hub.subscribe(&self.ram.list(), self.choice).unwrap());
    }

    /// All that is dirty is taken, and so protected.
    pub(crate) fn take(&self) {
        let mut cursor = Cursor::default();
        while cursor.take(self.set.as_ref().unwrap(), TAKEN).unwrap() {}
    }

    pub(crate) fn sync(&self) {
        self.hub.sync().unwrap();
    }

    pub(crate) fn dirty(&self) -> usize {
        self.set.as_ref().unwrap().pages()
    }
}

/// One row: what `timed` takes after everything was taken; `after` looks at what it did.
pub(crate) fn row(
    group: &mut BenchmarkGroup<'_, WallTime>,
    name: &str,
    mut before: impl FnMut(),
    mut timed: impl FnMut(),
    mut after: impl FnMut(),
) {
    group.bench_function(name, |b| {
        b.iter_custom(|rounds| {
            (0..rounds).fold(Duration::ZERO, |sum, _| {
                before();
                let start = Instant::now();
                timed();
                let took = start.elapsed();
                after();
                sum + took
            })
        });
    });
}

fn write(memory: &Memory, step: usize) {
    (0..memory.pages).step_by(step).for_each(|page| memory.word(page).store(1, Ordering::Relaxed));
}

/// The writer's side: nanoseconds for each page.
fn writers(c: &mut Criterion) {
    let mut group = c.benchmark_group("dirty a page");
    let memory = Memory::new(Kind::Private, GIB_PAGES / 16, 0).unwrap();
    write(&memory, 1);
    group.throughput(Throughput::Elements(memory.pages as u64));
    row(&mut group, "untracked", || (), || write(&memory, 1), || ());
    let (mut marks, block) = Tracked::new(memory.at, memory.pages, true, Choice::Auto);
    marks.begin();
    let all = || (0..memory.pages).for_each(|page| marks.ram.mark(block.host_address(page as u64 * PAGE), 8));
    row(&mut group, "vmig_dirty alone", || marks.take(), all, || marks.sync());
    for (name, kind) in [("private", Kind::Private), ("shared", Kind::Shared), ("hugetlb", Kind::Hugetlb)] {
        // There may be no huge pages.
        let Some(memory) = Memory::new(kind, GIB_PAGES / 16, 0) else { continue };
        write(&memory, 1);
        if WriteProtect::new().is_err() {
            continue;
        }
        let (mut tracked, _) = Tracked::new(memory.at, memory.pages, false, Choice::Only(Tracker::WriteProtect));
        tracked.begin();
        row(
            &mut group,
            &format!("write-protect, {name}"),
            || tracked.take(),
            || write(&memory, 1),
            || {
                tracked.sync();
                assert_eq!(tracked.dirty(), memory.pages);
            },
        );
    }
    #[cfg(target_arch = "x86_64")]
    kvm::writers(&mut group);
    group.finish();
}

/// The harvester's side: milliseconds for a GiB all of whose pages exist.
fn harvest(c: &mut Criterion) {
    for (name, part) in [("sync a GiB, nothing written", 0), ("sync a GiB, one page in 8 written", PART)] {
        let mut group = c.benchmark_group(name);
        for (name, kind, marked) in [
            ("marks", Kind::Private, true),
            ("write-protect, private", Kind::Private, false),
            ("write-protect, shared", Kind::Shared, false),
        ] {
            if !marked && WriteProtect::new().is_err() {
                continue;
            }
            let memory = Memory::new(kind, GIB_PAGES, 0).unwrap();
            write(&memory, 1);
            let (mut tracked, block) = Tracked::new(memory.at, memory.pages, marked, Choice::Auto);
            tracked.begin();
            let before = || {
                tracked.take();
                if part > 0 {
                    write(&memory, part);
                }
                if part > 0 && marked {
                    (0..memory.pages).step_by(part).for_each(|page| {
                        block.marks().set_range(page, 1);
                    });
                }
            };
            let count = memory.pages.checked_div(part).unwrap_or(0);
            row(&mut group, name, before, || tracked.sync(), || assert_eq!(tracked.dirty(), count));
        }
        let memory = Memory::new(Kind::Private, GIB_PAGES, 0).unwrap();
        let (mut tracked, _) = Tracked::new(memory.at, memory.pages, false, Choice::Auto);
        source::add(&tracked);
        tracked.begin();
        let count = memory.pages.checked_div(part).unwrap_or(0);
        let before = || {
            tracked.take();
            if part > 0 {
                source::write(part);
            }
        };
        row(&mut group, "dirty source", before, || tracked.sync(), || assert_eq!(tracked.dirty(), count));
        #[cfg(target_arch = "x86_64")]
        if part == 0 {
            kvm::harvest(&mut group);
        }
        group.finish();
    }
    #[cfg(target_arch = "x86_64")]
    {
        let mut group = c.benchmark_group("sync a page written");
        kvm::written(&mut group);
        group.finish();
    }
    if WriteProtect::new().is_ok() {
        let mut group = c.benchmark_group("protect a GiB");
        let memory = Memory::new(Kind::Private, GIB_PAGES, 0).unwrap();
        write(&memory, 1);
        let (mut tracked, _) = Tracked::new(memory.at, memory.pages, false, Choice::Only(Tracker::WriteProtect));
        tracked.begin();
        let before = || {
            write(&memory, 1);
            tracked.sync();
        };
        row(&mut group, "write-protect, private", before, || tracked.take(), || ());
        group.finish();
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10).warm_up_time(Duration::from_millis(100)).measurement_time(Duration::from_millis(500));
    targets = writers, harvest
}
criterion_main!(benches);
