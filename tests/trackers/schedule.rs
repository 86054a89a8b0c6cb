//! The one property of every tracker: a page that is written while it is tracked is reported at least once, across sync,
//! clear, failed attempts, other readers and changes of RAM between attempts.
//!
//! A schedule is a drawn sequence of such steps, with writers beside it. Each reader is a copy of the memory that takes what
//! is dirty as a migration does: page taken, cleared, then read. At the end, when nobody writes any more, every copy must be
//! equal to the memory, and nothing may be left to report.

#![allow(unreachable_pub, reason = "parts of one test file")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use vmig::dirty::choice::Choice;
use vmig::dirty::cursor::Cursor;
use vmig::dirty::hub::Hub;
use vmig::dirty::set::DirtySet;
use vmig::ram::{Block, BlockSpec, Ram, RamList};

use super::memory::{Kind, Memory, PAGE};
use super::source::Faults;
use crate::common::{AtEnd, Rng};

/// Writes pages of the guest, in the way the tracker is told of.
pub trait Writer: Send {
    /// Changes `pages` pages from `page` on, if they are (all) in its reach.
    fn write(&mut self, place: &Place, page: usize, pages: usize, value: u64);
}

/// A block with its memory.
#[derive(Clone, Debug)]
pub struct Place {
    pub block: Arc<Block>,
    pub memory: Arc<Memory>,
}

/// What is tracked, by what, and who writes.
pub struct World {
    pub ram: Arc<Ram>,
    pub hub: Hub,
    pub choice: Choice,
    pub places: Vec<Place>,
    pub writers: Vec<Box<dyn Writer>>,
    /// Which kind of block may be added between attempts.
    pub plug: Option<Kind>,
    pub marked: bool,
    /// Pages before that are nobody's to write.
    pub first: usize,
    /// Of sources that fail.
    pub faults: Vec<Arc<Faults>>,
}

impl World {
    pub fn empty(choice: Choice) -> Self {
        let (ram, hub) = (Arc::default(), Hub::default());
        Self {
            ram,
            hub,
            choice,
            places: Vec::new(),
            writers: Vec::new(),
            plug: None,
            marked: false,
            first: 0,
            faults: Vec::new(),
        }
    }

    fn may_fail(&self) -> bool {
        !self.faults.is_empty()
    }

    /// Does `f` while no source fails.
    fn while_sound<T>(&self, f: impl FnOnce() -> T) -> T {
        let before: Vec<usize> = self.faults.iter().map(|faults| faults.every.swap(0, Ordering::SeqCst)).collect();
        let done = f();
        self.faults.iter().zip(before).for_each(|(faults, every)| faults.every.store(every, Ordering::SeqCst));
        done
    }

    /// Adds a block over `memory`; its number in the guest's life names it.
    pub fn add(&mut self, memory: Arc<Memory>, name: String) -> Arc<Block> {
        let len = (memory.pages * PAGE) as u64;
        let (host, marked) = (memory.at, self.marked);
        let spec = BlockSpec { name, host, len, gpa: 0, marked, shared_storage: false, file: None };
        let block = self.ram.add(spec).unwrap();
        self.places.push(Place { block: Arc::clone(&block), memory });
        block
    }
}

/// Fails if it failed, unless that is the error of a source that may fail.
fn well_or_fault<T>(done: vmig::error::Result<T>, may_fail: bool) -> Option<T> {
    done.inspect_err(|e| assert!(may_fail && e.text().contains("dirty source 'log'"), "{e}")).ok()
}

/// A copy of the memory, and what it has still to take.
struct Reader {
    set: Arc<DirtySet>,
    list: RamList,
    cursor: Cursor,
    copy: Vec<Vec<u64>>,
}

impl Reader {
    fn new(world: &World) -> Self {
        let list = world.ram.list();
        let begin = || well_or_fault(world.hub.subscribe(&list, world.choice), world.may_fail());
        let set = begin().unwrap_or_else(|| world.while_sound(|| begin().expect("a sound source fails")));
        assert_eq!(set.pages(), list.iter().map(|b| b.pages()).sum::<usize>(), "an attempt begins with all pages");
        let copy = list.iter().map(|b| vec![u64::MAX; b.pages()]).collect();
        Self { set, list, cursor: Cursor::default(), copy }
    }

    /// Takes up to `max` pages. False: none was dirty.
    fn take(&mut self, world: &World, max: usize) -> bool {
        if !self.cursor.take(&self.set, max).unwrap() {
            return false;
        }
        for run in self.cursor.runs() {
            let block = self.set.block(run.block);
            let place = world.places.iter().find(|p| Arc::ptr_eq(&p.block, block)).unwrap();
            for page in run.first..run.first + run.pages {
                self.copy[run.block][page] = place.memory.read(page);
            }
        }
        true
    }

    /// The guest stands still: what is left is taken, and then the copy is exact.
    fn finish(mut self, world: &World, what: &str) {
        while self.take(world, 4096) {}
        self.compare(world, what);
        // Reading may have made pages that were in no table, which is no write but may look like one; once.
        world.hub.sync().unwrap();
        while self.take(world, 4096) {}
        self.compare(world, what);
        world.hub.check_quiet(&self.set).unwrap_or_else(|e| panic!("{what}: {e}"));
        world.hub.unsubscribe(&self.set);
    }

    fn compare(&self, world: &World, what: &str) {
        for (copy, block) in self.copy.iter().zip(self.list.iter()) {
            let place = world.places.iter().find(|p| Arc::ptr_eq(&p.block, block)).unwrap();
            for (page, copied) in copy.iter().enumerate() {
                let now = place.memory.read(page);
                assert_eq!(*copied, now, "{what}: page {page} of {} was written and not reported", block.name());
            }
        }
    }
}

/// Runs one schedule drawn from `rng`. `what` names it in failures.
pub fn run(mut world: World, rng: &mut Rng, what: &str) -> World {
    let stop = AtomicBool::new(false);
    let mut readers = vec![Reader::new(&world)];
    let (mut value, mut plugged) = (1, 0);
    let steps = 10 + rng.below(30);
    let mut step = 0;
    while step < steps {
        // Some steps run beside a writer that never rests, some alone.
        let mut writers = std::mem::take(&mut world.writers);
        let busy = rng.below(2) == 0 && !writers.is_empty();
        let mut beside = if busy { Some(writers.remove(rng.below(writers.len()))) } else { None };
        stop.store(false, Ordering::SeqCst);
        let seed = rng.next();
        let places = world.places.clone();
        std::thread::scope(|scope| {
            let _ended = AtEnd(|| stop.store(true, Ordering::SeqCst));
            if let Some(writer) = &mut beside {
                let (stop, places) = (&stop, &places);
                scope.spawn(move || {
                    let mut state = seed | 1;
                    while !stop.load(Ordering::SeqCst) {
                        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                        let place = &places[usize::try_from(state >> 60).unwrap() % places.len()];
                        let page = usize::try_from(state >> 33).unwrap() % place.memory.pages;
                        writer.write(place, page, 1, state | 1 << 63);
                    }
                });
            }
            // Some steps run beside somebody else's syncs.
            if rng.below(3) == 0 {
                let (stop, hub, pause) = (&stop, &world.hub, Duration::from_micros(rng.below(300) as u64));
                let may_fail = world.may_fail();
                scope.spawn(move || {
                    while !stop.load(Ordering::SeqCst) {
                        well_or_fault(hub.sync(), may_fail);
                        std::thread::sleep(pause);
                    }
                });
            }
            let until = step + 1 + rng.below(6);
            while step < until {
                step += 1;
                value += 1;
                let calm = &mut writers;
                match rng.below(10) {
                    0..4 if !calm.is_empty() => {
                        let writer = rng.below(calm.len());
                        for _ in 0..1 + rng.below(40) {
                            let place = &places[rng.below(places.len())];
                            let page = rng.below(place.memory.pages);
                            let pages = 1 + if rng.below(8) == 0 { rng.below(place.memory.pages - page) } else { 0 };
                            calm[writer].write(place, page, pages.min(300), value);
                        }
                    }
                    4..6 => {
                        well_or_fault(world.hub.sync(), world.may_fail());
                    }
                    6 => {
                        let place = &places[rng.below(places.len())];
                        let moves = [libc::MADV_PAGEOUT, libc::MADV_COLD, libc::MADV_COLLAPSE, libc::MADV_HUGEPAGE];
                        let (page, advice) = (rng.below(place.memory.pages), moves[rng.below(moves.len())]);
                        place.memory.disturb(page, 1 + rng.below(1024), advice);
                    }
                    _ => {
                        let reader = rng.below(readers.len());
                        let most = 1 + rng.below(3000);
                        let many = rng.below(4);
                        (0..=many).all(|_| readers[reader].take(&world, most));
                    }
                }
            }
        });
        writers.extend(beside);
        world.writers = writers;
        match rng.below(8) {
            // An attempt fails, and perhaps another begins; RAM may change when nobody reads.
            0 => {
                let reader = readers.swap_remove(rng.below(readers.len()));
                match rng.below(3) {
                    0 => world.hub.leave(&reader.set),
                    _ => world.hub.unsubscribe(&reader.set),
                }
                if readers.is_empty() {
                    change_ram(&mut world, rng, &mut plugged);
                    readers.push(Reader::new(&world));
                }
            }
            1 if readers.len() < 3 => readers.push(Reader::new(&world)),
            _ => {}
        }
    }
    world.faults.iter().for_each(|faults| faults.every.store(0, Ordering::SeqCst));
    world.hub.sync().unwrap();
    for reader in readers {
        reader.finish(&world, what);
    }
    world
}

fn change_ram(world: &mut World, rng: &mut Rng, plugged: &mut usize) {
    let Some(kind) = world.plug else { return };
    if rng.below(2) == 0 && world.places.len() > 1 {
        world.hub.rest();
        let gone = world.places.swap_remove(1 + rng.below(world.places.len() - 1));
        world.ram.remove(gone.block.name()).unwrap();
    }
    if rng.below(2) == 0 && world.places.len() < 4 {
        *plugged += 1;
        if let Some(memory) = Memory::new(kind, size(kind, rng), 0) {
            world.add(Arc::new(memory), format!("plugged {plugged}"));
        }
    }
}

/// So many pages that chunks (4096 of them), words and huge pages are cut in all ways.
pub fn size(kind: Kind, rng: &mut Rng) -> usize {
    match kind {
        Kind::Hugetlb => 512 * (1 + rng.below(3)),
        _ => [1, 63, 64, 65, 511, 4095, 4096, 4097, 5000, 9000][rng.below(10)],
    }
}
