//! Populates guest memory of the destination ahead of the data, on threads of its own.
//!
//! First-touch faults cost more than the network. Only granules (2 MiB) that are at least half full at the source are
//! populated whole, and of those only the fullest, so that what is populated without need stays below an eighth of the
//! content: a sparse guest costs what it uses, in whatever pattern. The rest is populated as it is written.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use super::Block;
use super::fresh::untouchable;
use super::presence::{GRANULE, GRANULE_BYTES, Hint};
use super::survey::{Backing, Part, Survey};
use crate::error::{Error, Result};
use crate::sys::memory::{self, Advice};
use crate::sys::thread_sys;
use crate::thread::{Handle, Threads, lock};

/// Memory populated without need is at most the content divided by this.
const EXTRA_PART: usize = 8;
/// The emptiest granule that is ever populated whole, in pages of a full one.
const FILL_MIN: usize = GRANULE / 2;
/// The most stretches that are advised to use huge pages: each may split a mapping, and a process may have only some
/// ten thousand.
const HUGE_RUNS_MAX: usize = 512;
/// How long a thread that is ahead enough sleeps at most before it looks again.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// How much to do at once.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Threads: 1 for each channel is plenty. At least 1.
    pub threads: usize,
    /// Bytes populated whose data has not begun to arrive. At least one granule.
    pub ahead: u64,
    /// Whether huge pages may be asked for.
    pub huge: bool,
    /// Added to the nice value of the threads.
    pub nice: i32,
}

impl Default for Limits {
    fn default() -> Self {
        Self { threads: 1, ahead: 128 << 20, huge: true, nice: 0 }
    }
}

/// A block to prepare.
#[derive(Debug)]
pub struct Target {
    block: Arc<Block>,
    hint: Hint,
    parts: Vec<Part>,
    thp: Vec<Thp>,
}

/// What a part does about huge pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Thp {
    /// It cannot, or must not be told to, use them.
    Off,
    /// It uses them where it is advised to.
    Advised,
    /// It uses them anywhere: a page in an empty granule would cost 2 MiB.
    Anywhere,
}

impl Target {
    /// A block, what of it has content at the source, and whether the VMM keeps its contents (then nothing is done).
    pub fn new(block: &Arc<Block>, hint: Hint, survey: &Survey, keep: bool) -> Self {
        let mut parts = survey.parts(block, None);
        parts.retain(|part| untouchable(block, part, keep).is_none());
        let thp = parts.iter().map(|part| thp_of(part, survey)).collect();
        Self { block: Arc::clone(block), hint, parts, thp }
    }

    /// The part a granule lies in, if it lies in one.
    fn part_of(&self, granule: usize) -> Option<usize> {
        let pages = self.pages_of(granule);
        self.parts.iter().position(|part| part.pages.start <= pages.start && pages.end <= part.pages.end)
    }

    fn pages_of(&self, granule: usize) -> Range<usize> {
        let first = granule * GRANULE;
        first..first + self.hint.granule_pages(granule)
    }

    /// Pages with content out of 512, also for a short granule.
    fn fill(&self, granule: usize) -> usize {
        let count = self.hint.counts().get(granule).copied().unwrap_or(0);
        usize::from(count) * GRANULE / self.hint.granule_pages(granule).max(1)
    }
}

fn thp_of(part: &Part, survey: &Survey) -> Thp {
    let file = match part.backing {
        Backing::Private => "enabled",
        _ if part.in_memory => "shmem_enabled",
        _ => return Thp::Off,
    };
    let policy = memory::huge_page_policy(file).unwrap_or_default();
    let flags = part.mapping.as_ref().and_then(|m| survey.flags_of(m)).unwrap_or_default();
    let has = |flag| flags.split(' ').any(|f| f == flag);
    match policy.as_str() {
        _ if has("nh") => Thp::Off,
        "madvise" | "advise" if has("hg") => Thp::Anywhere,
        "madvise" | "advise" => Thp::Advised,
        "always" if file == "enabled" => Thp::Anywhere,
        _ => Thp::Off,
    }
}

/// Granules that follow each other, to be populated.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Run {
    target: usize,
    part: usize,
    granules: Range<usize>,
}

/// The fill from which on granules are populated whole.
fn fill_wanted(targets: &[Target]) -> usize {
    let mut granules = [0usize; GRANULE + 1];
    let mut content = 0;
    for target in targets {
        content += target.hint.content();
        for granule in 0..target.hint.counts().len() {
            granules[target.fill(granule).min(GRANULE)] += 1;
        }
    }
    let mut extra = 0;
    let enough = (FILL_MIN..=GRANULE).rev().take_while(|fill| {
        extra += granules[*fill] * (GRANULE - fill);
        extra <= content / EXTRA_PART
    });
    enough.last().unwrap_or(GRANULE)
}

fn plan(targets: &[Target]) -> Vec<Run> {
    let wanted = fill_wanted(targets);
    let mut runs: Vec<Run> = Vec::new();
    for (index, target) in targets.iter().enumerate() {
        for granule in 0..target.hint.counts().len() {
            if target.fill(granule) < wanted {
                continue;
            }
            let Some(part) = target.part_of(granule) else { continue };
            match runs.last_mut() {
                Some(run) if (run.target, run.part, run.granules.end) == (index, part, granule) => {
                    run.granules.end += 1;
                }
                _ => runs.push(Run { target: index, part, granules: granule..granule + 1 }),
            }
        }
    }
    runs
}

const PLANNED: u8 = 1;
const TAKEN: u8 = 2;
const ARRIVED: u8 = 3;

#[derive(Debug)]
struct Shared {
    targets: Vec<Target>,
    runs: Vec<Run>,
    /// Of each target, of each granule: how far it is. 0: not to be populated.
    states: Vec<Box<[AtomicU8]>>,
    ahead: usize,
    stop: AtomicBool,
    work: Mutex<Work>,
    moved: Condvar,
}

#[derive(Debug, Default)]
struct Work {
    run: usize,
    done: usize,
    /// Granules populated, or being populated, whose data has not begun to arrive.
    outstanding: usize,
    populated: usize,
    huge_runs: usize,
    given_up: Vec<usize>,
    error: Option<Error>,
}

/// What was done.
#[derive(Clone, Debug)]
pub struct Report {
    /// Bytes populated.
    pub populated: u64,
    /// Bytes that were to be populated.
    pub planned: u64,
    /// Stretches advised to use huge pages.
    pub huge_runs: usize,
    /// The first failure. Its block was given up; its pages are populated as they are written.
    pub error: Option<Error>,
}

/// Threads that populate. Dropping it stops them.
#[derive(Debug)]
pub struct Preparer {
    shared: Arc<Shared>,
    handles: Vec<Handle<()>>,
}

impl Preparer {
    /// Begins to populate, in the order of `targets`, after these were made fresh.
    pub fn start(threads: &Threads, targets: Vec<Target>, limits: Limits) -> Result<Self> {
        let runs = plan(&targets);
        let mut states = Vec::new();
        for target in &targets {
            let count = target.hint.counts().len();
            let mut of = Vec::new();
            of.try_reserve_exact(count).map_err(|_| Error::no_memory("the state of memory", count as u64))?;
            of.resize_with(count, AtomicU8::default);
            states.push(of.into_boxed_slice());
        }
        for run in &runs {
            for granule in run.granules.clone() {
                states[run.target][granule].store(PLANNED, Ordering::Relaxed);
            }
        }
        let work = Work { huge_runs: if limits.huge { advise_huge(&targets, &runs) } else { 0 }, ..Work::default() };
        let ahead = usize::try_from(limits.ahead / GRANULE_BYTES).unwrap_or(usize::MAX).max(1);
        let stop = AtomicBool::new(false);
        let shared = Shared { targets, runs, states, ahead, stop, work: Mutex::new(work), moved: Condvar::new() };
        let mut preparer = Self { shared: Arc::new(shared), handles: Vec::new() };
        for n in 0..limits.threads.max(1) {
            let shared = Arc::clone(&preparer.shared);
            let spawned = threads.spawn(&format!("populate_{n}"), move || {
                thread_sys::stand_back(limits.nice);
                shared.work();
                Ok(())
            });
            match spawned {
                Ok(handle) => preparer.handles.push(handle),
                // One thread fewer is slower, none is useless.
                Err(e) if n == 0 => return Err(e),
                Err(_) => break,
            }
        }
        Ok(preparer)
    }

    /// Records for these pages of a target have come, zero pages included: population moves on. Wait-free but for the
    /// first record of a granule.
    pub fn arrived(&self, target: usize, pages: Range<usize>) {
        let Some(states) = self.shared.states.get(target) else { return };
        let granules = pages.start / GRANULE..pages.end.div_ceil(GRANULE).min(states.len());
        for state in states.get(granules).unwrap_or_default() {
            if state.load(Ordering::Relaxed) == ARRIVED || state.swap(ARRIVED, Ordering::AcqRel) != TAKEN {
                continue;
            }
            lock(&self.shared.work).outstanding -= 1;
            self.shared.moved.notify_one();
        }
    }

    /// Ends population now: each thread is at most 2 MiB from its end. From any thread.
    pub fn stop(&self) {
        self.shared.stop.store(true, Ordering::Release);
        // Under the lock, or a thread between its look and its sleep would miss it.
        drop(lock(&self.shared.work));
        self.shared.moved.notify_all();
    }

    /// Stops, joins, and gives mappings that used huge pages anywhere that habit back.
    pub fn finish(mut self) -> Report {
        self.end();
        let work = lock(&self.shared.work);
        let planned: usize = self.shared.runs.iter().map(|run| run.granules.len()).sum();
        Report {
            populated: work.populated as u64 * GRANULE_BYTES,
            planned: planned as u64 * GRANULE_BYTES,
            huge_runs: work.huge_runs,
            error: work.error.clone(),
        }
    }

    /// Whether all that was planned is populated, or given up.
    pub fn is_done(&self) -> bool {
        self.handles.iter().all(Handle::is_done)
    }

    fn end(&mut self) {
        self.stop();
        if self.handles.is_empty() {
            return;
        }
        for handle in self.handles.drain(..) {
            // A panic there costs speed and nothing else.
            let _ = handle.join(None);
        }
        for target in &self.shared.targets {
            for (part, _) in target.parts.iter().zip(&target.thp).filter(|(_, thp)| **thp == Thp::Anywhere) {
                // Refused advice leaves a slower guest, not a wrong one.
                let _ = target.block.advise(&part.pages, Advice::HugePage);
            }
        }
    }
}

impl Drop for Preparer {
    fn drop(&mut self) {
        self.end();
    }
}

/// Asks for huge pages where whole granules will be filled, and for none elsewhere; returns for how many stretches.
fn advise_huge(targets: &[Target], runs: &[Run]) -> usize {
    for target in targets {
        for (part, _) in target.parts.iter().zip(&target.thp).filter(|(_, thp)| **thp == Thp::Anywhere) {
            // Refused advice costs memory or time, and nothing else; the same below.
            let _ = target.block.advise(&part.pages, Advice::NoHugePage);
        }
    }
    let mut fit: Vec<&Run> = runs.iter().filter(|run| targets[run.target].thp[run.part] != Thp::Off).collect();
    fit.sort_by_key(|run| std::cmp::Reverse(run.granules.len()));
    fit.truncate(HUGE_RUNS_MAX);
    let advised = fit.iter().filter(|run| {
        let target = &targets[run.target];
        let (first, last) = (target.pages_of(run.granules.start), target.pages_of(run.granules.end - 1));
        target.block.advise(&(first.start..last.end), Advice::HugePage).is_ok()
    });
    advised.count()
}

impl Shared {
    /// What each thread does.
    fn work(&self) {
        while let Some((target, granule)) = self.next() {
            let (block, pages) = (&self.targets[target].block, self.targets[target].pages_of(granule));
            let result = block.advise(&pages, Advice::PopulateWrite);
            let mut work = lock(&self.work);
            match result {
                Ok(()) => work.populated += 1,
                Err(e) => {
                    let text = format!("cannot populate RAM block '{}' ahead, at page {}", block.name(), pages.start);
                    work.error.get_or_insert_with(|| Error::from_io(text, &e));
                    work.given_up.push(target);
                }
            }
        }
    }

    /// The next granule to populate, when there is room for it. None: no more, or stopped.
    fn next(&self) -> Option<(usize, usize)> {
        let mut work = lock(&self.work);
        loop {
            if self.stop.load(Ordering::Acquire) {
                return None;
            }
            let run = self.runs.get(work.run)?;
            let granule = run.granules.start + work.done;
            if granule >= run.granules.end || work.given_up.contains(&run.target) {
                (work.run, work.done) = (work.run + 1, 0);
            } else if work.outstanding >= self.ahead {
                work = self.moved.wait_timeout(work, LOOK_AGAIN).unwrap_or_else(PoisonError::into_inner).0;
            } else {
                work.done += 1;
                let state = &self.states[run.target][granule];
                // Where data has arrived already, the pages are being populated by whoever writes it.
                if state.compare_exchange(PLANNED, TAKEN, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                    work.outstanding += 1;
                    return Some((run.target, granule));
                }
            }
        }
    }
}
