//! A KVM guest that writes pages when it is told to.
#![allow(unreachable_pub, reason = "parts of one test file")]

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::Duration;

use kvm_bindings::{KVM_CAP_DIRTY_LOG_RING, KVM_EXIT_DIRTY_RING_FULL, kvm_enable_cap};
use kvm_ioctls::{Cap, Kvm, VcpuExit, VcpuFd};
use vmig::dirty::Kind;
use vmig::dirty::choice::Choice;
use vmig::dirty::kvm_log::KvmLog;
use vmig::dirty::kvm_ring::KvmRing;
use vmig::dirty::kvm_slots::KvmTracker;
use vmig::sys::kvm::Vm;
use vmig::sys::signal::{EmptyHandler, kill_thread};
use vmig::sys::thread_sys::tid;
use vmig::thread::Threads;

use super::memory::Memory;
use super::schedule::{Place, World, Writer};
use crate::common::Rng;
use crate::kvm_guest::{CODE, DATA, Guest, MEM, Shape, WRITE_PAGES};

const PAGES: usize = MEM / 4096;
const FIRST: usize = (DATA / 4096) as usize;

/// Kicks the thread that runs a vCPU all the time, as a VMM does now and then.
struct Kicker {
    /// The thread; 0: none runs the vCPU.
    whom: Arc<Mutex<i32>>,
    quit: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// For all kickers of the process, as long as it lives.
static HANDLER: OnceLock<EmptyHandler> = OnceLock::new();

impl Kicker {
    fn new(every: Duration) -> Self {
        HANDLER.get_or_init(|| EmptyHandler::install(libc::SIGUSR1).unwrap());
        let (whom, quit) = (Arc::<Mutex<i32>>::default(), Arc::<AtomicBool>::default());
        let (to, end) = (Arc::clone(&whom), Arc::clone(&quit));
        let kick = move || {
            while !end.load(Ordering::Relaxed) {
                let tid = to.lock().unwrap();
                if *tid != 0 {
                    kill_thread(*tid, libc::SIGUSR1).unwrap();
                }
                drop(tid);
                std::thread::sleep(every);
            }
        };
        Self { whom, quit, thread: Some(std::thread::spawn(kick)) }
    }
}

impl Drop for Kicker {
    fn drop(&mut self) {
        self.quit.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
    }
}

/// Part of the guest's memory that it sees a second time, from `HOLE` on.
#[derive(Clone, Copy)]
struct Alias {
    first: usize,
    pages: usize,
}

/// Writes as the guest: a vCPU of it runs and stores.
struct Vcpu {
    vcpu: VcpuFd,
    index: usize,
    /// Its memory is mapped as long as it is there.
    _guest: Arc<Mutex<Guest>>,
    ring: Option<Arc<KvmRing>>,
    kicker: Option<Kicker>,
    alias: Option<Alias>,
}

impl Vcpu {
    fn kicked(&self, tid: i32) {
        if let Some(kicker) = &self.kicker {
            *kicker.whom.lock().unwrap() = tid;
        }
    }
}

impl Writer for Vcpu {
    fn write(&mut self, _place: &Place, page: usize, pages: usize, value: u64) {
        // Below that are its code and tables.
        let page = FIRST + page % (PAGES - FIRST);
        let mut pages = pages.min(PAGES - page);
        let mut at = page * 4096;
        let in_it = |alias: &Alias| value % 3 == 0 && (alias.first..alias.first + alias.pages).contains(&page);
        if let Some(alias) = self.alias.filter(in_it) {
            at = MEM + (page - alias.first) * 4096;
            pages = pages.min(alias.first + alias.pages - page);
        }
        let mut regs = self.vcpu.get_regs().unwrap();
        (regs.rip, regs.rsi, regs.rcx, regs.r12) = (CODE, at as u64, pages as u64, value);
        self.vcpu.set_regs(&regs).unwrap();
        self.kicked(tid());
        loop {
            match self.vcpu.run() {
                Ok(VcpuExit::IoOut(..)) => break,
                Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) => {
                    self.ring.as_ref().unwrap().ring_full(self.index).unwrap();
                }
                Err(error) if error.errno() == libc::EINTR => {}
                other => panic!("unexpected exit {other:?}"),
            }
        }
        self.kicked(0);
    }
}

/// A device of the guest: writes from here, and marks.
struct Device(Arc<vmig::ram::Ram>);

impl Writer for Device {
    fn write(&mut self, place: &Place, page: usize, pages: usize, value: u64) {
        let page = FIRST + page % (PAGES - FIRST);
        for page in page..PAGES.min(page + pages) {
            place.memory.word(page).store(value, Ordering::SeqCst);
            self.0.mark(place.block.host_address(page as u64 * 4096), 8);
        }
    }
}

/// Entries a ring may have at most; 0: there are none.
pub fn ring_entries() -> usize {
    usize::try_from(Kvm::new().map_or(0, |kvm| kvm.check_extension_int(Cap::DirtyLogRing))).unwrap_or(0) / 16
}

/// A slot of the guest.
struct Slot {
    number: u32,
    offset: usize,
    pages: usize,
    gpa: usize,
}

/// Shows the guest its memory by one to three slots, cut at odd pages, and sometimes some of it once more.
fn cut(guest: &Guest, rng: &mut Rng) -> (Vec<Slot>, Option<Alias>) {
    let mut ends: Vec<usize> = (0..rng.below(3)).map(|_| 1 + 2 * rng.below(PAGES / 2)).collect();
    ends.push(PAGES);
    ends.sort_unstable();
    ends.dedup();
    let step = 1 + rng.below(5);
    let number = |n: usize| u32::try_from(n * step).unwrap();
    let mut slots = Vec::new();
    let mut offset = 0;
    for end in ends {
        slots.push(Slot { number: number(slots.len()), offset, pages: end - offset, gpa: offset * 4096 });
        offset = end;
    }
    let alias = (rng.below(2) == 0).then(|| {
        let first = FIRST + 1 + 2 * rng.below(600);
        Alias { first, pages: (1 + 2 * rng.below(256)).min(PAGES - first) }
    });
    if let Some(Alias { first, pages }) = alias {
        slots.push(Slot { number: number(slots.len()), offset: first, pages, gpa: MEM });
    }
    guest.set_slot(0, 0, 0);
    for slot in &slots {
        guest.set_part(slot.number, slot.offset as u64 * 4096, slot.pages as u64 * 4096, slot.gpa as u64, 0);
    }
    (slots, alias)
}

/// What tracks the guest.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum By {
    Log,
    /// As kernels did before they had manual protection.
    OldLog,
    Ring,
    WriteProtect,
}

/// A guest of one or two vCPUs and its device. Its memory is one block.
pub fn world(by: By, rng: &mut Rng) -> Option<World> {
    let shape = Shape { vcpus: 1 + rng.below(2), irqchip: false, cpuid: true };
    // The smallest are full all the time.
    let entries = [256, 1024, 65536][rng.below(3)].min(ring_entries());
    let mut guest = Guest::prepared(shape, |vm| {
        if by == By::Ring {
            let mut cap = kvm_enable_cap { cap: KVM_CAP_DIRTY_LOG_RING, ..Default::default() };
            cap.args[0] = entries as u64 * 16;
            vm.enable_cap(&cap).unwrap();
        }
    })?;
    (0..shape.vcpus).for_each(|index| guest.start_at(index, &WRITE_PAGES));
    let (slots, alias) = cut(&guest, rng);
    // The guest's memory stays mapped as long as the guest, which the writers have.
    let memory = Arc::new(Memory::borrowed(guest.mem, PAGES));
    let kind = match by {
        By::Log | By::OldLog => Kind::KvmLog,
        By::Ring => Kind::KvmRing,
        By::WriteProtect => Kind::WriteProtect,
    };
    let mut world = World { first: FIRST, ..World::empty(Choice::Only(kind)) };
    let block = world.add(memory, "ram".to_owned());
    let vm = Vm::dup(guest.vm.as_raw_fd()).unwrap();
    let mut ring = None;
    let add = |tracker: &dyn KvmTracker| {
        for slot in &slots {
            let [offset, len, gpa] = [slot.offset * 4096, slot.pages * 4096, slot.gpa].map(|n| n as u64);
            tracker.add_slot(slot.number, 0, &block, offset, len, gpa).unwrap();
        }
    };
    let rings = KvmRing::find(&guest.vcpu_fds()).unwrap();
    let found: Vec<usize> = rings.iter().map(vmig::sys::kvm_ring::Ring::entries).collect();
    assert_eq!(found, if by == By::Ring { vec![entries; shape.vcpus] } else { Vec::new() });
    match by {
        By::Ring => {
            let tracker = Arc::new(KvmRing::new(vm, rings, Arc::<Threads>::default(), None));
            add(&*tracker);
            if rng.below(2) == 0 {
                // Limits keep logging on when nobody reads.
                tracker.set_limit(None, [64 << 20, 4 << 30][rng.below(2)]).unwrap();
            }
            world.hub.add_tracker(Arc::<KvmRing>::clone(&tracker)).unwrap();
            ring = Some(tracker);
        }
        By::Log | By::OldLog => {
            let tracker = match by {
                By::Log => KvmLog::new(vm, None).unwrap(),
                _ => KvmLog::without_manual_protection(vm, None),
            };
            add(&tracker);
            world.hub.add_tracker(Arc::new(tracker)).unwrap();
        }
        By::WriteProtect => {}
    }
    world.writers = vec![Box::new(Device(Arc::clone(&world.ram)))];
    let vcpus = std::mem::take(&mut guest.vcpus);
    let guest = Arc::new(Mutex::new(guest));
    for (index, vcpu) in vcpus.into_iter().enumerate() {
        let kicker = (rng.below(2) == 0).then(|| Kicker::new(Duration::from_micros(1 + rng.below(50) as u64)));
        let vcpu = Vcpu { vcpu, index, _guest: Arc::clone(&guest), ring: ring.clone(), kicker, alias };
        world.writers.push(Box::new(vcpu));
    }
    Some(world)
}
