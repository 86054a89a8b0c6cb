//! A KVM guest that writes pages when it is told to.
#![allow(unreachable_pub, reason = "parts of one test file")]

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use kvm_bindings::{KVM_CAP_DIRTY_LOG_RING, KVM_EXIT_DIRTY_RING_FULL, kvm_enable_cap};
use kvm_ioctls::{Cap, Kvm, VcpuExit};
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
    _handler: EmptyHandler,
}

impl Kicker {
    fn new(every: Duration) -> Self {
        let handler = EmptyHandler::install(libc::SIGUSR1).unwrap();
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
        Self { whom, quit, thread: Some(std::thread::spawn(kick)), _handler: handler }
    }
}

impl Drop for Kicker {
    fn drop(&mut self) {
        self.quit.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
    }
}

/// Writes as the guest: its vCPU runs and stores.
struct Vcpu {
    guest: Arc<Mutex<Guest>>,
    ring: Option<Arc<KvmRing>>,
    kicker: Option<Kicker>,
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
        let pages = pages.min(PAGES - page);
        let mut guest = self.guest.lock().unwrap();
        let vcpu = &mut guest.vcpus[0];
        let mut regs = vcpu.get_regs().unwrap();
        (regs.rip, regs.rsi, regs.rcx, regs.r12) = (CODE, page as u64 * 4096, pages as u64, value);
        vcpu.set_regs(&regs).unwrap();
        self.kicked(tid());
        loop {
            match vcpu.run() {
                Ok(VcpuExit::IoOut(..)) => break,
                Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) => {
                    self.ring.as_ref().unwrap().ring_full(0).unwrap();
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

/// A guest tracked by KVM's log or ring, or by write protection. Its memory is one block, shown by two slots.
pub fn world(kind: Kind, rng: &mut Rng) -> Option<World> {
    let shape = Shape { vcpus: 1, irqchip: false, cpuid: true };
    // The smallest are full all the time.
    let entries = [256, 1024, 65536][rng.below(3)].min(ring_entries());
    let guest = Guest::prepared(shape, |vm| {
        if kind == Kind::KvmRing {
            let mut cap = kvm_enable_cap { cap: KVM_CAP_DIRTY_LOG_RING, ..Default::default() };
            cap.args[0] = entries as u64 * 16;
            vm.enable_cap(&cap).unwrap();
        }
    })?;
    guest.start_at(0, &WRITE_PAGES);
    // The guest's memory stays mapped as long as the guest, which the writers have.
    let memory = Arc::new(Memory::borrowed(guest.mem, PAGES));
    let mut world = World::empty(Choice::Only(kind));
    let block = world.add(memory, "ram".to_owned());
    let vm = Vm::dup(guest.vm.as_raw_fd()).unwrap();
    let mut ring = None;
    let add = |tracker: &dyn KvmTracker| tracker.add_slot(0, 0, &block, 0, MEM as u64, 0).unwrap();
    match kind {
        Kind::KvmRing => {
            let rings = KvmRing::find(&guest.vcpu_fds()).unwrap();
            assert_eq!(rings.iter().map(vmig::sys::kvm_ring::Ring::entries).collect::<Vec<_>>(), [entries]);
            let tracker = Arc::new(KvmRing::new(vm, rings, Arc::<Threads>::default(), None));
            add(&*tracker);
            if rng.below(2) == 0 {
                // Limits keep logging on when nobody reads.
                tracker.set_limit(None, [64 << 20, 4 << 30][rng.below(2)]).unwrap();
            }
            world.hub.add_tracker(Arc::<KvmRing>::clone(&tracker)).unwrap();
            ring = Some(tracker);
        }
        Kind::KvmLog => {
            assert!(KvmRing::find(&guest.vcpu_fds()).unwrap().is_empty(), "nobody enabled a ring");
            let tracker = Arc::new(KvmLog::new(vm, None).unwrap());
            add(&*tracker);
            world.hub.add_tracker(tracker).unwrap();
        }
        _ => {}
    }
    let ram = Arc::clone(&world.ram);
    let kicker = (rng.below(2) == 0).then(|| Kicker::new(Duration::from_micros(1 + rng.below(50) as u64)));
    let vcpu = Vcpu { guest: Arc::new(Mutex::new(guest)), ring, kicker };
    world.writers = vec![Box::new(vcpu), Box::new(Device(ram))];
    Some(world)
}
