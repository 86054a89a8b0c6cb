//! Presence, freshness and population over real mappings of every kind.
#![allow(unsafe_code, reason = "makes and touches mappings of every kind")]
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;
#[path = "memory/maps.rs"]
mod maps;

use std::fs::File;
use std::io::Write;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::{Rng, points, skip};
use maps::*;
use vmig::error::Error;
use vmig::ram::fresh::{Care, freshen};
use vmig::ram::prepare::{Limits, Preparer, Target};
use vmig::ram::presence::{GRANULE, Hint, Presence};
use vmig::ram::survey::Survey;
use vmig::ram::{PAGE, PAGE_BYTES};
use vmig::sys::pagemap::{Pagemap, Way};
use vmig::thread::Threads;

const GIB: usize = 1 << 30;

fn each_kind(pages: usize, mut f: impl FnMut(Kind, Map)) {
    // After the mapping is gone: or the pool would keep its pages.
    let _pool = Pool::new(2 * pages / GRANULE + 2);
    let mut without_huge = false;
    for kind in KINDS {
        match Map::new(kind, pages) {
            Some(map) => f(kind, map),
            None if matches!(kind, HugePrivate | HugeShared) => without_huge = true,
            None => panic!("no memory for {kind:?}"),
        }
    }
    let _ = without_huge && skip("hugetlb", "no huge pages can be set aside");
}

fn absent_of(presence: &Presence, pages: Range<usize>) -> Vec<usize> {
    let mut list = Vec::new();
    let count = presence.each_absent(pages.clone(), |range| list.extend(range));
    assert_eq!(count, list.len());
    assert!(list.is_sorted() && list.iter().all(|page| pages.contains(page)));
    let mut existing = Vec::new();
    presence.each_existing(pages.clone(), |range| existing.extend(range));
    let mut both = [list.clone(), existing].concat();
    both.sort_unstable();
    assert_eq!(both, pages.clone().collect::<Vec<_>>(), "each page is absent or exists");
    assert_eq!(presence.is_absent(pages.clone()), list.len() == pages.len());
    for some in (pages.start..pages.end).step_by(16).map(|at| at..pages.end.min(at + 16)) {
        let all = some.clone().all(|page| list.binary_search(&page).is_ok());
        assert_eq!(presence.is_absent(some.clone()), all, "{some:?}");
    }
    list
}

/// Whether the kind can be proven with page tables known (or not).
fn provable(kind: Kind, tables: bool) -> bool {
    match kind {
        Private | Locked | HugePrivate => tables,
        // Without a descriptor the file can only be opened with a privilege.
        SharedAnonymous => {
            std::fs::read_dir("/proc/self/map_files").unwrap().flatten().any(|e| File::open(e.path()).is_ok())
        }
        SharedMemfd | SharedShm => true,
        PrivateMemfd | PrivateFile | SharedFile | HugeShared => false,
    }
}

#[test]
fn a_page_with_content_is_never_absent() {
    let _turn = turn();
    const PAGES: usize = 2 * GRANULE;
    let mut rng = Rng::new("presence");
    let ways = [Some(Way::Scan), Some(Way::Entries), None];
    each_kind(PAGES, |kind, map| {
        let file = matches!(kind, SharedMemfd | SharedShm | SharedFile | HugeShared | PrivateMemfd | PrivateFile);
        let other = file.then(|| map.again());
        let block = map.block();
        let mut touched = vec![false; PAGES];
        for round in 0..12 {
            for _ in 0..rng.below(60) {
                let (page, run) = (rng.below(PAGES), 1 + rng.below(5));
                let pages = page..(page + run).min(PAGES);
                touched[pages.clone()].fill(true);
                for page in pages {
                    match (&other, rng.below(3)) {
                        // Private mappings of the file see what comes in through the other one, too.
                        (Some(other), 0) => other.write(page, 7),
                        _ => map.write(page, 9),
                    }
                }
            }
            let survey = Survey::new().unwrap();
            for way in ways {
                let tables = way.map(|way| Pagemap::open_with(way).unwrap());
                let known = tables.is_some();
                let presence = Presence::with_tables(&block, &survey, map.fd(), tables);
                let reason = &presence.parts()[0].reason;
                assert_eq!(presence.is_hopeless(), !provable(kind, known), "{kind:?} {way:?}: {reason}");
                let from = rng.below(PAGES);
                let part = from..from + rng.below(PAGES - from + 1);
                for pages in [0..PAGES, part] {
                    let absent = absent_of(&presence, pages.clone());
                    let wrong = absent.iter().find(|page| touched[**page]);
                    assert_eq!(wrong, None, "{kind:?} {way:?} round {round}: absent, but {reason}");
                    let exact = provable(kind, known) && !matches!(kind, Locked | HugePrivate);
                    let untouched = pages.filter(|page| !touched[*page]).count();
                    assert!(
                        !exact || absent.len() == untouched,
                        "{kind:?} {way:?}: {} missed",
                        untouched - absent.len()
                    );
                }
            }
        }
        // The oracle itself: what is called touched has content, through every mapping.
        assert!((0..PAGES).all(|page| (map.read(page) != 0) == touched[page]), "{kind:?}");
    });
}

#[test]
fn a_page_written_before_the_question_is_never_absent() {
    let _turn = turn();
    const PAGES: usize = 32 * GRANULE;
    let seed = common::seed();
    for kind in [Private, SharedMemfd] {
        let map = Map::new(kind, PAGES).unwrap();
        let presence = Presence::new(&map.block(), &Survey::new().unwrap(), map.fd());
        let written: Vec<AtomicBool> = (0..PAGES).map(|_| AtomicBool::new(false)).collect();
        let done = AtomicBool::new(false);
        let asked = std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut rng = Rng::new("writer");
                for _ in 0..PAGES {
                    let page = rng.below(PAGES);
                    map.write(page, 1);
                    written[page].store(true, Ordering::Release);
                }
                done.store(true, Ordering::Release);
            });
            // Meanwhile the kernel moves pages about: into huge pages, and to make room for them.
            scope.spawn(|| {
                for granule in (0..32).cycle().take_while(|_| !done.load(Ordering::Acquire)) {
                    map.collapse(granule);
                    let _ = std::fs::write("/proc/sys/vm/compact_memory", "1");
                }
            });
            let mut asked = 0;
            loop {
                let last = done.load(Ordering::Acquire);
                let before: Vec<bool> = written.iter().map(|w| w.load(Ordering::Acquire)).collect();
                let wrong = |range: Range<usize>| range.into_iter().find(|page| before[*page]);
                presence.each_absent(0..PAGES, |range| {
                    assert_eq!(wrong(range), None, "{kind:?}, seed {seed}: absent, but written before the question");
                });
                asked += 1;
                if last {
                    break asked;
                }
            }
        });
        println!("{kind:?}: asked {asked} times");
        assert!(asked > 1);
    }
}

#[test]
fn huge_pages_are_absent_until_they_are_touched() {
    let _turn = turn();
    let _pool = Pool::new(4);
    let Some(map) = Map::new(HugePrivate, 3 * GRANULE) else {
        let _ = skip("hugetlb", "no huge pages can be set aside");
        return;
    };
    map.write(GRANULE + 5, 1);
    let presence = Presence::new(&map.block(), &Survey::new().unwrap(), None);
    let want: Vec<usize> = (0..GRANULE).chain(2 * GRANULE..3 * GRANULE).collect();
    assert_eq!(absent_of(&presence, 0..3 * GRANULE), want);
    assert_eq!(absent_of(&presence, GRANULE + 3..GRANULE + 4), [0usize; 0]);
}

#[test]
fn the_shared_zero_page_is_zero_and_dropped_pages_are_absent_again() {
    let _turn = turn();
    let map = Map::new(Private, 64).unwrap();
    map.advise(0..64, libc::MADV_NOHUGEPAGE);
    (0..32).for_each(|page| assert_eq!(map.read(page), 0));
    (8..16).for_each(|page| map.write(page, 1));
    let presence = Presence::new(&map.block(), &Survey::new().unwrap(), None);
    assert_eq!(absent_of(&presence, 0..64), (0..8).chain(16..64).collect::<Vec<_>>());
    map.advise(10..12, libc::MADV_DONTNEED);
    assert_eq!(absent_of(&presence, 8..16), [10, 11]);
    let old = Pagemap::open_with(Way::Entries).unwrap();
    let presence = Presence::with_tables(&map.block(), &Survey::new().unwrap(), None, Some(old));
    // The older interface cannot tell the zero page from another.
    assert_eq!(absent_of(&presence, 0..64), [10, 11].into_iter().chain(32..64).collect::<Vec<_>>());
}

#[test]
fn a_block_of_several_mappings_is_judged_part_by_part() {
    let _turn = turn();
    let map = Map::new(Private, 64).unwrap();
    let file = memfd(0).unwrap();
    (&file).write_all(&[5; 8 * PAGE_BYTES]).unwrap();
    file.set_len(10 * PAGE).unwrap();
    let place = |page: usize, pages: usize, flags: i32, offset: i64| {
        let start = map.start.wrapping_add(page * PAGE_BYTES).cast();
        let (protection, fd) = (libc::PROT_READ | libc::PROT_WRITE, file.as_raw_fd());
        // SAFETY: replaces a part of our own mapping.
        let at = unsafe { libc::mmap(start, pages * PAGE_BYTES, protection, libc::MAP_FIXED | flags, fd, offset) };
        assert_eq!(at, start);
    };
    place(16, 4, libc::MAP_PRIVATE, 0);
    // Eight pages of which the first two have content, the next two are a hole, and the rest is past the end.
    place(32, 8, libc::MAP_SHARED, 6 * 4096);
    let gap = map.start.wrapping_add(50 * PAGE_BYTES).cast();
    // SAFETY: unmaps a part of our own mapping, which nobody touches afterwards.
    assert_eq!(unsafe { libc::munmap(gap, 2 * PAGE_BYTES) }, 0);
    map.write(1, 1);
    let survey = Survey::new().unwrap();
    let presence = Presence::new(&map.block(), &survey, Some(file.as_fd()));
    let absent: Vec<usize> = absent_of(&presence, 0..64);
    let want: Vec<usize> = (0..64).filter(|p| *p != 1 && !(16..20).contains(p) && !(32..34).contains(p)).collect();
    let want: Vec<usize> = want.into_iter().filter(|p| !(36..40).contains(p) && !(50..52).contains(p)).collect();
    assert_eq!(absent, want);
    let fresh = freshen(&map.block(), &survey, Care::default(), &|| Ok(())).unwrap();
    let unproven: Vec<_> = fresh.unproven.iter().map(|(pages, why)| (pages.clone(), why.as_str())).collect();
    assert_eq!(unproven, [(50..52, "nothing is mapped there")]);
    assert!((16..20).chain(32..36).all(|page| map.read(page) == 0));
}

#[test]
fn memory_of_a_fault_handler_is_left_to_it() {
    let _turn = turn();
    if common::without_userfaultfd() {
        return;
    }
    const WRITE_PROTECT: u64 = 1 << 1;
    let map = Map::new(Private, 64).unwrap();
    map.write(3, 1);
    let fd = Uffd::new();
    let absent = |map: &Map| {
        let survey = Survey::new().unwrap();
        absent_of(&Presence::new(&map.block(), &survey, None), 0..64).len()
    };
    assert_eq!(absent(&map), 63);
    fd.register(&map, WRITE_PROTECT);
    assert_eq!(absent(&map), 63, "write protection supplies no pages");
    fd.unregister(&map);
    fd.register(&map, 1);
    assert_eq!(absent(&map), 0);
    let survey = Survey::new().unwrap();
    let fresh = freshen(&map.block(), &survey, Care::default(), &|| Ok(())).unwrap();
    assert_eq!(fresh.unproven, [(0..64, "a userfaultfd handler may supply its pages".to_owned())]);
    assert_eq!(map.read(3), 1, "not even what is there");
    let mut hint = Hint::new(64).unwrap();
    hint.add(0..64);
    let threads = Threads::new();
    let target = Target::new(&map.block(), hint, &survey, false);
    let report = Preparer::start(&threads, vec![target], Limits::default()).unwrap().finish();
    assert_eq!((report.planned, report.error), (0, None), "populating would wait for the handler");
    fd.unregister(&map);
    assert_eq!(absent(&map), 63);
}

#[test]
fn garbage_becomes_zero_in_the_way_each_kind_needs() {
    let _turn = turn();
    const PAGES: usize = 3 * GRANULE;
    let dropped = [(Private, "dropped"), (SharedAnonymous, "hole punched"), (SharedMemfd, "hole punched")];
    let dropped = [&dropped[..], &[(SharedShm, "hole punched")]].concat();
    for pinned in [false, true] {
        each_kind(PAGES, |kind, map| {
            (0..PAGES).filter(|page| page % 3 != 1).for_each(|page| map.write(page, !0));
            let resident = map.smaps("Rss") + map.smaps("Shared_Hugetlb") + map.smaps("Private_Hugetlb");
            let care = Care { pinned, fd: map.fd(), ..Care::default() };
            let fresh = freshen(&map.block(), &Survey::new().unwrap(), care, &|| Ok(())).unwrap();
            assert!(fresh.is_proven(), "{kind:?}: {fresh:?}");
            let by_drop = dropped.iter().find(|(k, _)| *k == kind && !pinned).map(|(_, how)| *how);
            let how = by_drop.unwrap_or("zeros written where it was not zero");
            assert_eq!(fresh.done, [(0..PAGES, how)], "{kind:?}");
            let block = map.block();
            let now = map.smaps("Rss") + map.smaps("Shared_Hugetlb") + map.smaps("Private_Hugetlb");
            assert_eq!(now == 0, by_drop.is_some(), "{kind:?}: {now} bytes left of {resident}");
            // What a device or mlock(2) relies on did not move: nothing was given back.
            assert!(by_drop.is_some() || now >= resident, "{kind:?}: {now} bytes left of {resident}");
            assert_eq!((0..PAGES).find(|page| !block.is_zero(*page)), None, "{kind:?}");
        });
    }
}

#[test]
fn what_is_not_ours_to_write_is_left_alone() {
    let _turn = turn();
    let map = Map::new(Private, 2 * GRANULE).unwrap();
    (0..map.pages()).for_each(|page| map.write(page, 4));
    let full = |map: &Map, keep| {
        let mut hint = Hint::new(map.pages()).unwrap();
        hint.add(0..map.pages());
        Target::new(&map.block(), hint, &Survey::new().unwrap(), keep)
    };
    let keep = Care { keep: true, ..Care::default() };
    let fresh = freshen(&map.block(), &Survey::new().unwrap(), keep, &|| Ok(())).unwrap();
    assert!(!fresh.is_proven() && fresh.done.is_empty());
    let fresh = freshen(&map.block_as(true), &Survey::new().unwrap(), Care::default(), &|| Ok(())).unwrap();
    assert_eq!(fresh.unproven, [(0..map.pages(), "both sides share its contents".to_owned())]);
    map.protect(libc::PROT_READ);
    let fresh = freshen(&map.block(), &Survey::new().unwrap(), Care::default(), &|| Ok(())).unwrap();
    assert_eq!(fresh.unproven, [(0..map.pages(), "it is mapped read-only".to_owned())]);
    let threads = Threads::new();
    for keep in [true, false] {
        let report = Preparer::start(&threads, vec![full(&map, keep)], Limits::default()).unwrap().finish();
        assert_eq!((report.planned, report.huge_runs), (0, 0));
    }
    assert!((0..map.pages()).all(|page| map.read(page) == 4));
    map.protect(libc::PROT_READ | libc::PROT_WRITE);
    let stop = || Err(Error::new(libc::ECANCELED, "enough"));
    let error = freshen(&map.block(), &Survey::new().unwrap(), Care::default(), &stop).unwrap_err();
    assert_eq!(error.errno(), libc::ECANCELED);
    assert!((0..map.pages()).all(|page| map.read(page) == 4), "stopped before the first step");
}

/// Patterns in which 1 GiB of 64 GiB is in use.
const PATTERNS: [&str; 7] = [
    "every other page",
    "random pages",
    "eight pages in 2 MiB",
    "three of five pages",
    "nine of ten pages",
    "two halves",
    "one piece",
];

fn in_use(pattern: usize, pages: usize, rng: &mut Rng) -> Vec<usize> {
    let content = GIB / PAGE_BYTES;
    let mut list: Vec<usize> = match pattern {
        0 => (0..content).map(|n| 2 * n).collect(),
        1 => (0..content).map(|n| n * 64 + rng.below(64)).collect(),
        2 => (0..content).map(|n| n / 8 * 512 + n % 8).collect(),
        3 => (0..content).map(|n| n / 3 * 5 + n % 3).collect(),
        4 => (0..content).map(|n| n / 9 * 10 + n % 9).collect(),
        5 => (0..content / 2).chain(pages - content / 2..pages).collect(),
        _ => (pages / 2 + 100..pages / 2 + 100 + content).collect(),
    };
    list.sort_unstable();
    assert_eq!(list.len(), content);
    list
}

#[test]
fn a_sparse_guest_costs_what_it_uses() {
    let _turn = turn();
    let pages = 64 * GIB / PAGE_BYTES;
    let mut rng = Rng::new("sparse");
    for point in points("sparse", 2 * PATTERNS.len(), 4) {
        let (pattern, kind) = (point / 2, [Private, SharedMemfd][point % 2]);
        let (source, target) = (Map::new(kind, pages).unwrap(), Map::new(kind, pages).unwrap());
        let list = in_use(pattern, pages, &mut rng);
        list.iter().for_each(|page| source.write(*page, 1));
        let asked = Instant::now();
        let presence = Presence::new(&source.block(), &Survey::new().unwrap(), None);
        let hint = presence.hint().unwrap();
        let asked = asked.elapsed();
        assert_eq!(hint.content(), list.len());
        let survey = Survey::new().unwrap();
        let fresh = freshen(&target.block(), &survey, Care::default(), &|| Ok(())).unwrap();
        assert!(fresh.is_proven());
        let threads = Threads::new();
        let what = Target::new(&target.block(), hint, &survey, false);
        let limits = Limits { threads: 2, ..Limits::default() };
        let preparer = Preparer::start(&threads, vec![what], limits).unwrap();
        let began = Instant::now();
        let mut sent = 0;
        let step = 512;
        for start in (0..pages).step_by(step) {
            presence.each_existing(start..start + step, |range| {
                sent += range.len();
                range.clone().for_each(|page| target.write(page, source.read(page)));
            });
            preparer.arrived(0, start..start + step);
        }
        let took = began.elapsed();
        let report = preparer.finish();
        assert_eq!(report.error, None);
        assert_eq!(sent, list.len());
        assert!(list.iter().all(|page| target.read(*page) == 1));
        let used = [source.cost(), target.cost()];
        let name = PATTERNS[pattern];
        println!(
            "{kind:?}, {name}: hint {asked:?}, move {took:?}, resident {} and {} MiB, {report:?}",
            used[0] >> 20,
            used[1] >> 20
        );
        assert!(used.iter().all(|bytes| *bytes <= GIB + GIB / 4), "{kind:?}, {name}: {used:?}");
        assert!(pattern < 4 || report.planned >= GIB as u64 * 9 / 10, "{kind:?}, {name}: {report:?}");
    }
}

#[test]
fn a_vmm_that_wants_huge_pages_gets_them_where_there_is_content() {
    let _turn = turn();
    let map = Map::new(Private, 64 * GRANULE).unwrap();
    map.advise(0..map.pages(), libc::MADV_HUGEPAGE);
    let mut hint = Hint::new(map.pages()).unwrap();
    let full = 8..24;
    (0..64).for_each(|n| hint.add(n * GRANULE..n * GRANULE + if full.contains(&n) { GRANULE } else { 8 }));
    let survey = Survey::new().unwrap();
    let threads = Threads::new();
    let what = Target::new(&map.block(), hint, &survey, false);
    let preparer = Preparer::start(&threads, vec![what], Limits::default()).unwrap();
    while !preparer.is_done() {
        std::thread::sleep(Duration::from_millis(1));
    }
    (0..64).for_each(|n| (0..8).for_each(|page| map.write(n * GRANULE + page, 1)));
    assert_eq!(map.smaps("Rss"), (16 * GRANULE + 48 * 8) * PAGE_BYTES);
    if map.smaps("AnonHugePages") == 0 && skip("thp", "no huge page to be had") {
        return;
    }
    assert_eq!(map.smaps("AnonHugePages"), 16 * GRANULE * PAGE_BYTES);
    assert_eq!(preparer.finish().huge_runs, 1);
    // Afterwards, the mapping is as the VMM made it.
    map.advise(0..GRANULE, libc::MADV_DONTNEED);
    map.write(0, 1);
    assert_eq!(map.smaps("AnonHugePages"), 17 * GRANULE * PAGE_BYTES);
}

#[test]
fn population_keeps_its_distance_and_stops_at_once() {
    let _turn = turn();
    let pages = GIB / PAGE_BYTES;
    let map = Map::new(Private, pages).unwrap();
    let mut hint = Hint::new(pages).unwrap();
    hint.add(0..pages);
    let threads = Threads::new();
    let survey = Survey::new().unwrap();
    let limits = Limits { threads: 2, ahead: 32 << 20, huge: true, nice: 0 };
    let start = |hint: &Hint| {
        Preparer::start(&threads, vec![Target::new(&map.block(), hint.clone(), &survey, false)], limits).unwrap()
    };
    let settled = |want: usize| {
        let deadline = Instant::now() + Duration::from_secs(20);
        while map.smaps("Rss") < want && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(map.smaps("Rss"), want);
    };
    let preparer = start(&hint);
    settled(32 << 20);
    preparer.arrived(0, 0..10 * GRANULE);
    preparer.arrived(0, 0..10 * GRANULE);
    settled(52 << 20);
    // Data that overtakes population is not populated for.
    preparer.arrived(0, 26 * GRANULE..36 * GRANULE);
    preparer.arrived(0, 10 * GRANULE..11 * GRANULE);
    settled(54 << 20);
    preparer.arrived(7, 0..1);
    preparer.arrived(0, pages..usize::MAX);
    preparer.stop();
    preparer.arrived(0, 0..pages);
    let report = preparer.finish();
    assert_eq!((report.populated, report.planned, report.error), (54 << 20, GIB as u64, None));
    settled(54 << 20);
    assert!(threads.list().is_empty());
    // All of it, once all of it arrives.
    let preparer = start(&hint);
    let deadline = Instant::now() + Duration::from_secs(60);
    let mut at = 0;
    while !preparer.is_done() && Instant::now() < deadline {
        preparer.arrived(0, at..at + 1);
        at = (at + GRANULE) % pages;
    }
    assert_eq!(preparer.finish().error, None);
}

#[test]
fn what_cannot_be_populated_is_reported_and_no_signal() {
    let _turn = turn();
    let map = Map::new(SharedMemfd, 4 * GRANULE).unwrap();
    let file = map.file.as_ref().unwrap();
    (0..GRANULE).for_each(|page| map.write(page, 6));
    file.set_len(GRANULE as u64 * PAGE + 1).unwrap();
    let block = map.block();
    let survey = Survey::new().unwrap();
    let presence = Presence::new(&block, &survey, None);
    assert_eq!(absent_of(&presence, 0..4 * GRANULE), [0usize; 0]);
    let mut hint = Hint::new(4 * GRANULE).unwrap();
    hint.add(0..4 * GRANULE);
    let threads = Threads::new();
    let good = Map::new(Private, GRANULE).unwrap();
    let survey = Survey::new().unwrap();
    let mut small = Hint::new(GRANULE).unwrap();
    small.add(0..GRANULE);
    let targets = vec![Target::new(&block, hint, &survey, false), Target::new(&good.block(), small, &survey, false)];
    let preparer = Preparer::start(&threads, targets, Limits::default()).unwrap();
    while !preparer.is_done() {
        std::thread::yield_now();
    }
    let error = preparer.finish().error.unwrap();
    assert_eq!(error.errno(), libc::EFAULT);
    assert!(error.text().contains("RAM block 'ram' ahead, at page 512"), "{error}");
    assert_eq!(good.smaps("Rss"), GRANULE * PAGE_BYTES, "the other block is populated all the same");
    assert_eq!(block.populate(1000, 1).unwrap_err().errno(), libc::EFAULT);
    block.populate(0, 4).unwrap();
    let care = Care { pinned: true, ..Care::default() };
    let fresh = freshen(&block, &survey, care, &|| Ok(())).unwrap();
    assert_eq!(fresh.unproven.len(), 1, "what cannot be read is not known to be zero");
    assert!((0..GRANULE).all(|page| block.is_zero(page)));
}

#[test]
fn costs() {
    let _turn = turn();
    let all = std::env::var("VMIG_ALL").is_ok_and(|v| v == "1");
    let (sparse, full) = if all { (8 * GIB, 2 * GIB) } else { (GIB, GIB / 16) };
    for kind in [Private, SharedMemfd] {
        let map = Map::new(kind, sparse / PAGE_BYTES).unwrap();
        (0..256).for_each(|n| map.write(n * map.pages() / 256, 1));
        let survey = Survey::new().unwrap();
        let presence = Presence::new(&map.block(), &survey, map.fd());
        let began = Instant::now();
        let absent = presence.each_absent(0..map.pages(), |_| ());
        let whole = began.elapsed();
        assert_eq!(absent, map.pages() - 256);
        let began = Instant::now();
        let step = |start| presence.each_absent(start..start + 1024, |_| ());
        let absent: usize = (0..map.pages()).step_by(1024).map(step).sum();
        println!(
            "{kind:?} {} GiB, 256 pages touched: {whole:?}, in chunks of 4 MiB {:?}",
            sparse / GIB,
            began.elapsed()
        );
        assert_eq!(absent, map.pages() - 256);
    }
    for kind in [Private, SharedMemfd] {
        for (threads, huge) in [(1, false), (2, false), (1, true), (2, true)] {
            if huge && kind == SharedMemfd {
                continue;
            }
            measure_population(kind, full, threads, huge);
        }
    }
}

fn measure_population(kind: Kind, bytes: usize, count: usize, huge: bool) {
    let map = Map::new(kind, bytes / PAGE_BYTES).unwrap();
    let mut hint = Hint::new(map.pages()).unwrap();
    hint.add(0..map.pages());
    let survey = Survey::new().unwrap();
    let threads = Threads::new();
    let limits = Limits { threads: count, ahead: u64::MAX, huge, nice: 0 };
    let began = Instant::now();
    let what = Target::new(&map.block(), hint, &survey, false);
    let preparer = Preparer::start(&threads, vec![what], limits).unwrap();
    while !preparer.is_done() {
        std::thread::sleep(Duration::from_millis(1));
    }
    let took = began.elapsed();
    let report = preparer.finish();
    assert_eq!((report.populated, report.error), (bytes as u64, None));
    assert_eq!(map.smaps("Rss"), bytes);
    let began = Instant::now();
    let presence = Presence::new(&map.block(), &survey, map.fd());
    assert_eq!(presence.each_absent(0..map.pages(), |_| ()), 0);
    let asked = began.elapsed();
    let began = Instant::now();
    assert!(freshen(&map.block(), &survey, Care::default(), &|| Ok(())).unwrap().is_proven());
    let freshened = began.elapsed();
    println!(
        "{kind:?} {} MiB, {count} threads, huge {huge}: populate {took:?}, ask {asked:?}, make fresh {freshened:?}",
        bytes >> 20
    );
}
