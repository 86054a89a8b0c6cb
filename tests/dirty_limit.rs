//! Dirty limits on KVM's rings, and dirty rates by them, with two vCPUs: one writes all over memory, the other counts in a
//! page of its own.
#![allow(clippy::unwrap_used, reason = "a test")]
#![allow(unsafe_code, reason = "makes and deletes slots")]

mod common;
#[path = "../src/sys/kvm_guest.rs"]
mod kvm_guest;

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::{skip, without_kvm};
use kvm_bindings::{KVM_CAP_DIRTY_LOG_RING, KVM_EXIT_DIRTY_RING_FULL, kvm_enable_cap, kvm_userspace_memory_region};
use kvm_guest::{CODE, COUNT, DATA, Guest, MEM, Shape, WRITE_PAGES};
use kvm_ioctls::{Cap, Kvm, VcpuExit, VcpuFd};
use vmig::dirty::choice::Choice;
use vmig::dirty::hub::Hub;
use vmig::dirty::kvm_ring::KvmRing;
use vmig::dirty::kvm_slots::KvmTracker;
use vmig::dirty::rate::{Ask, Mode, measure};
use vmig::dirty::{Kind, Tracker};
use vmig::ram::{Block, BlockSpec, Ram};
use vmig::sys::eventfd::Wake;
use vmig::sys::kvm::Vm;
use vmig::thread::Threads;

const ENTRIES: u64 = 1024;
/// Pages that the writer goes round in; the counter's is behind them.
const HOT: u64 = 1024;
const COUNTER_CODE: u64 = CODE + 0x1000;
const LIMIT: u64 = 4 << 20;
const PATIENCE: Duration = Duration::from_secs(60);

struct World {
    guest: Guest,
    ring: Arc<KvmRing>,
    hub: Hub,
    ram: Ram,
    quit: Arc<AtomicBool>,
    /// Rounds of each vCPU.
    turns: Arc<[AtomicU64; 2]>,
}

/// Ends the vCPUs' threads.
struct Quit(Arc<AtomicBool>);

impl Drop for Quit {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Two vCPUs of one guest that has rings, neither of which runs yet.
fn world() -> Option<World> {
    if without_kvm() {
        return None;
    }
    if Kvm::new().unwrap().check_extension_int(Cap::DirtyLogRing) <= 0 {
        let _ = skip("kvm", "this KVM has no dirty rings");
        return None;
    }
    let guest = Guest::prepared(Shape { vcpus: 2, irqchip: false, cpuid: true }, |vm| {
        let mut cap = kvm_enable_cap { cap: KVM_CAP_DIRTY_LOG_RING, ..Default::default() };
        cap.args[0] = ENTRIES * 16;
        vm.enable_cap(&cap).unwrap();
    })?;
    guest.start_at(0, &WRITE_PAGES);
    guest.enter_ring3(1);
    guest.write(COUNTER_CODE, &COUNT);
    let mut regs = guest.vcpus[1].get_regs().unwrap();
    (regs.rip, regs.rsi) = (COUNTER_CODE, DATA + HOT * 4096);
    guest.vcpus[1].set_regs(&regs).unwrap();
    let ram = Ram::default();
    let (name, host, len) = ("ram".to_owned(), guest.mem, MEM as u64);
    let block =
        ram.add(BlockSpec { name, host, len, gpa: 0, marked: false, shared_storage: false, file: None }).unwrap();
    let rings = KvmRing::find(&guest.vcpu_fds()).unwrap();
    let vm = Vm::dup(guest.vm.as_raw_fd()).unwrap();
    let ring = Arc::new(KvmRing::new(vm, rings, Arc::<Threads>::default(), None));
    ring.add_slot(0, 0, &block, 0, MEM as u64, 0).unwrap();
    let hub = Hub::default();
    hub.add_tracker(Arc::<KvmRing>::clone(&ring)).unwrap();
    Some(World { guest, ring, hub, ram, quit: Arc::default(), turns: Arc::default() })
}

/// The number of each slot beside the guest's own, and where it shows the first pages of RAM again.
fn extra() -> impl Iterator<Item = (u32, u64)> {
    (1..=8).map(|number| (number, (64 << 20) + u64::from(number) * (1 << 20)))
}

/// Makes such a slot; with no bytes: deletes it.
fn set_slot(guest: &Guest, (slot, guest_phys_addr): (u32, u64), memory_size: u64) -> Result<(), kvm_ioctls::Error> {
    let userspace_addr = guest.mem as u64;
    let region = kvm_userspace_memory_region { slot, flags: 0, guest_phys_addr, memory_size, userspace_addr };
    // SAFETY: the guest's memory stays mapped as long as the guest is there.
    unsafe { guest.vm.set_user_memory_region(region) }
}

/// What a VMM's vCPU thread does.
fn run(mut vcpu: VcpuFd, index: usize, ring: &KvmRing, quit: &AtomicBool, turns: &AtomicU64) {
    let begin = |vcpu: &VcpuFd| {
        let mut regs = vcpu.get_regs().unwrap();
        (regs.rip, regs.rsi, regs.rcx, regs.r12) = (CODE, DATA, HOT, regs.r12 + 1);
        vcpu.set_regs(&regs).unwrap();
    };
    if index == 0 {
        begin(&vcpu);
    }
    while !quit.load(Ordering::Relaxed) {
        match vcpu.run().unwrap() {
            VcpuExit::IoOut(..) => {
                turns.fetch_add(1, Ordering::Relaxed);
                if index == 0 {
                    begin(&vcpu);
                }
            }
            VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL) => ring.ring_full(index).unwrap(),
            other => panic!("vCPU {index}: unexpected exit {other:?}"),
        }
    }
}

impl World {
    /// Runs both vCPUs while `f` looks on.
    fn live<T>(self, f: impl FnOnce(&World) -> T) -> T {
        self.live_with([true, true], f)
    }

    /// The same with those who are to run.
    fn live_with<T>(mut self, runs: [bool; 2], f: impl FnOnce(&World) -> T) -> T {
        let mut vcpus = std::mem::take(&mut self.guest.vcpus);
        // Its ring is read as long as it is open.
        let kept: Vec<_> = (0..2).rev().filter(|index| !runs[*index]).map(|index| vcpus.remove(index)).collect();
        std::thread::scope(|scope| {
            let running = (0..2).filter(|index| runs[*index]);
            for (index, vcpu) in running.zip(vcpus) {
                let (ring, quit, turns) = (Arc::clone(&self.ring), Arc::clone(&self.quit), Arc::clone(&self.turns));
                scope.spawn(move || run(vcpu, index, &ring, &quit, &turns[index]));
            }
            // Also when a test fails: nobody waits for a guest that runs on.
            let _quit = Quit(Arc::clone(&self.quit));
            let found = f(&self);
            drop(kept);
            found
        })
    }

    fn turns(&self) -> [u64; 2] {
        [0, 1].map(|index: usize| self.turns[index].load(Ordering::Relaxed))
    }

    fn until(&self, what: &str, is: impl Fn(&World) -> bool) {
        let end = Instant::now() + PATIENCE;
        while !is(self) {
            assert!(Instant::now() < end, "{what}: not in time: {:?}", self.ring.dirt());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// What each vCPU did in a whole period that began after now, in percent of standing still.
    fn stood(&self) -> [u64; 2] {
        let all = || self.ring.dirt().iter().map(|vcpu| vcpu.speed.period).collect::<Vec<_>>();
        for _ in 0..2 {
            let before = all();
            self.until("another period", |_| all() != before);
        }
        let dirt = self.ring.dirt();
        [0, 1].map(|index: usize| dirt[index].speed.percent)
    }
}

#[test]
fn who_writes_too_fast_stands_still_and_who_does_not_does_not() {
    let Some(world) = world() else { return };
    world.live(|world| {
        world.ring.set_limit(None, LIMIT).unwrap();
        world.until("the writer stands at its ring", |world| world.ring.dirt()[0].speed.percent > 0);
        let [writer, counter] = world.stood();
        assert!(writer > 50, "the writer stood still for {writer} % only");
        assert_eq!(counter, 0, "the one that counts was held up");
        let before = world.turns();
        world.until("both go on", |world| world.turns().iter().zip(before).all(|(now, before)| *now > before + 2));
        // Neither is limited any more.
        world.ring.set_limit(None, 0).unwrap();
        assert!(!world.ring.is_in_use() && world.ring.dirt().iter().all(|vcpu| vcpu.limit == 0));
        let before = world.turns();
        world.until("both go on", |world| world.turns().iter().zip(before).all(|(now, before)| *now > before + 2));
    });
}

/// Each vCPU has a rate of its own, and one that stands still has none.
#[test]
fn an_idle_vcpu_dirties_nothing_and_a_busy_one_is_told_from_it() {
    let ask = Ask { mode: Mode::Ring, period: Duration::from_millis(200), samples: 0, choice: Choice::Auto };
    for runs in [[true, false], [false, true], [true, true]] {
        let Some(world) = world() else { return };
        world.live_with(runs, |world| {
            let wake = Wake::new().unwrap();
            let end = Instant::now() + PATIENCE;
            // On a busy machine, until everybody who is to run did so meanwhile.
            loop {
                let before = world.turns();
                let found = measure(&world.hub, &world.ram.list(), &ask, Some(&world.ring), &wake).unwrap();
                let ran =
                    world.turns().iter().zip(before).map(|(now, before)| *now > before + 20).collect::<Vec<_>>();
                let [writer, counter] = found.vcpus[..] else { panic!("{found:?}") };
                assert!((runs[0] || writer == 0) && (runs[1] || counter == 0), "{found:?} by {runs:?}");
                let told = [writer > 0, counter > 0] == runs && (!runs[0] || writer > 10 * counter);
                if ran == runs && told {
                    break;
                }
                assert!(Instant::now() < end, "who ran: {ran:?}, of {runs:?}, and what was found: {found:?}");
            }
        });
    }
}

/// Only the one that is named; and what others make of that ring, at the same time, is complete.
#[test]
fn a_limit_is_one_vcpu_s_and_loses_no_page() {
    let Some(world) = world() else { return };
    let block: Arc<Block> = world.ram.find("ram").unwrap();
    world.live(|world| {
        assert!(world.ring.set_limit(Some(2), LIMIT).is_err(), "there is no such vCPU");
        world.ring.set_limit(Some(1), LIMIT).unwrap();
        let [writer, counter] = world.stood();
        assert_eq!((writer, counter), (0, 0), "the writer has no limit, and the other is far from its own");
        world.ring.set_limit(Some(0), LIMIT).unwrap();
        world.until("the writer stands at its ring", |world| world.ring.dirt()[0].speed.percent > 50);
        let set = world.hub.subscribe(&world.ram.list(), Choice::Only(Kind::KvmRing)).unwrap();
        // The page that is counted in is written all the time: each sync tells it anew once it was taken.
        let page = usize::try_from(DATA / 4096 + HOT).unwrap();
        for round in 0..50 {
            set.take(0, 0, block.pages());
            assert_eq!(set.pages(), 0);
            let before = world.turns()[1];
            world.until("it counts", |world| world.turns()[1] > before + 1);
            world.hub.sync().unwrap();
            let found = set.next_run(0, page, 1).map(|(first, _)| first);
            assert_eq!(found, Some(page), "round {round}: a write was lost");
        }
        // The limit outlives the reader, and the reader the limit.
        world.hub.unsubscribe(&set);
        assert!(world.ring.is_in_use() && world.ring.dirt()[0].limit == LIMIT);
        let set = world.hub.subscribe(&world.ram.list(), Choice::Only(Kind::KvmRing)).unwrap();
        world.ring.set_limit(None, 0).unwrap();
        assert!(world.ring.is_in_use());
        world.hub.unsubscribe(&set);
        assert!(!world.ring.is_in_use());
    });
}

/// The writer is held up at its ring when the migration says, and not a moment longer.
#[test]
fn a_suspended_limit_holds_nobody_up() {
    let Some(world) = world() else { return };
    world.live(|world| {
        world.ring.set_limit(None, 1 << 20).unwrap();
        world.until("the writer stands at its ring", |world| world.ring.dirt()[0].speed.percent > 50);
        world.ring.suspend(true);
        // However long its ring takes to empty.
        world.until("it does not", |world| world.ring.dirt()[0].speed.stood.is_zero());
        world.ring.suspend(false);
        world.until("it does again", |world| world.ring.dirt()[0].speed.percent > 50);
        world.ring.stop();
        assert!(world.ring.is_in_use(), "a reader's end is not the limit's");
        world.ring.set_limit(None, 0).unwrap();
    });
}

/// A slot that is taken away while logging is switched stays deleted: setting one makes it.
#[test]
fn limits_bring_no_deleted_slot_back() {
    let Some(world) = world() else { return };
    let block: Arc<Block> = world.ram.find("ram").unwrap();
    let quit = Quit(Arc::clone(&world.quit));
    std::thread::scope(|scope| {
        let (ring, stop) = (Arc::clone(&world.ring), Arc::clone(&world.quit));
        scope.spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                ring.set_limit(None, LIMIT).unwrap();
                ring.set_limit(None, 0).unwrap();
            }
        });
        let _quit = quit;
        for round in 0..200 {
            for (number, gpa) in extra() {
                set_slot(&world.guest, (number, gpa), 4096).unwrap();
                world.ring.add_slot(number, 0, &block, 0, 4096, gpa).unwrap();
            }
            for (number, gpa) in extra() {
                world.ring.remove_slot(number).unwrap();
                set_slot(&world.guest, (number, gpa), 0).unwrap();
            }
            for (number, gpa) in extra() {
                // Where one still was, another could not be.
                let other = (number + 100, gpa);
                assert!(set_slot(&world.guest, other, 4096).is_ok(), "round {round}: slot {number} is back");
                set_slot(&world.guest, other, 0).unwrap();
            }
        }
    });
}
