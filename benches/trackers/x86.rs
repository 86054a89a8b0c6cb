//! The same by KVM: its log, and its ring.
#![allow(unreachable_pub, reason = "parts of one benchmark")]
#![allow(unsafe_code, reason = "shows memory to a guest")]

use std::os::fd::AsRawFd;
use std::sync::Arc;

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Throughput};
use kvm_bindings::{KVM_CAP_DIRTY_LOG_RING, kvm_enable_cap, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use vmig::dirty::Kind;
use vmig::dirty::choice::Choice;
use vmig::dirty::kvm_log::KvmLog;
use vmig::dirty::kvm_ring::KvmRing;
use vmig::dirty::kvm_slots::KvmTracker;
use vmig::sys::kvm::Vm;
use vmig::thread::Threads;

use crate::kvm_guest::{CODE, DATA, Guest, MEM, Shape, WRITE_PAGES};
use crate::memory::{Kind as Backing, Memory};
use crate::{GIB_PAGES, Tracked, row};

const SHAPE: Shape = Shape { vcpus: 1, irqchip: false, cpuid: true };
/// Pages the guest writes at once; fewer than a ring of this size has entries.
const PAGES: u64 = (MEM as u64 - DATA) >> 12;
const ENTRIES: u64 = 65536;
/// The slot of a GiB, beside the guest's own.
const SLOT: u32 = 1;

fn guest(kind: Kind) -> Option<Guest> {
    let guest = Guest::prepared(SHAPE, |vm| {
        let mut cap = kvm_enable_cap { cap: KVM_CAP_DIRTY_LOG_RING, ..Default::default() };
        cap.args[0] = ENTRIES * 16;
        if kind == Kind::KvmRing {
            vm.enable_cap(&cap).unwrap();
        }
    })?;
    guest.start_at(0, &WRITE_PAGES);
    Some(guest)
}

fn tracker(vm: &VmFd, guest: &Guest, kind: Kind, tracked: &Tracked) -> Arc<dyn KvmTracker> {
    let vm = Vm::dup(vm.as_raw_fd()).unwrap();
    if kind == Kind::KvmRing {
        let rings = KvmRing::find(&guest.vcpu_fds()).unwrap();
        let ring = Arc::new(KvmRing::new(vm, rings, Arc::<Threads>::default(), None));
        tracked.hub().add_tracker(Arc::<KvmRing>::clone(&ring)).unwrap();
        return ring;
    }
    let log = Arc::new(KvmLog::new(vm, None).unwrap());
    tracked.hub().add_tracker(Arc::<KvmLog>::clone(&log)).unwrap();
    log
}

/// The guest's own memory, tracked.
fn small(guest: &Guest, kind: Kind) -> Tracked {
    let (tracked, block) = Tracked::new(guest.mem, MEM / 4096, false, Choice::Only(kind));
    let slots = tracker(&guest.vm, guest, kind, &tracked);
    slots.add_slot(0, 0, &block, 0, MEM as u64, 0).unwrap();
    tracked
}

/// The guest writes all its pages.
fn write(guest: &mut Guest) {
    let mut regs = guest.vcpus[0].get_regs().unwrap();
    (regs.rip, regs.rsi, regs.rcx) = (CODE, DATA, PAGES);
    guest.vcpus[0].set_regs(&regs).unwrap();
    guest.run(0);
}

/// A guest that writes, untracked and by either tracker.
pub fn writers(group: &mut BenchmarkGroup<'_, WallTime>) {
    group.throughput(Throughput::Elements(PAGES));
    if let Some(mut guest) = guest(Kind::KvmLog) {
        row(group, "a KVM guest, untracked", || (), || write(&mut guest), || ());
    }
    for kind in [Kind::KvmLog, Kind::KvmRing] {
        let Some(mut guest) = guest(kind) else { return };
        let mut tracked = small(&guest, kind);
        tracked.begin();
        row(group, kind.name(), || tracked.take(), || write(&mut guest), || tracked.sync());
    }
}

/// What a sync takes of pages that were written, each.
pub fn written(group: &mut BenchmarkGroup<'_, WallTime>) {
    group.throughput(Throughput::Elements(PAGES));
    for kind in [Kind::KvmLog, Kind::KvmRing] {
        let Some(mut guest) = guest(kind) else { return };
        let mut tracked = small(&guest, kind);
        tracked.begin();
        let before = || {
            tracked.take();
            write(&mut guest);
        };
        row(group, kind.name(), before, || tracked.sync(), || assert!(tracked.dirty() as u64 >= PAGES));
    }
}

/// A slot of a GiB of which nothing is written: the log has to be looked through, the ring is empty.
pub fn harvest(group: &mut BenchmarkGroup<'_, WallTime>) {
    for kind in [Kind::KvmLog, Kind::KvmRing] {
        let Some(guest) = guest(kind) else { return };
        let memory = Memory::new(Backing::Private, GIB_PAGES, 0).unwrap();
        (0..memory.pages).for_each(|page| memory.word(page).store(1, std::sync::atomic::Ordering::Relaxed));
        let (len, gpa) = ((GIB_PAGES as u64) << 12, 4u64 << 30);
        let region = kvm_userspace_memory_region {
            slot: SLOT,
            flags: 0,
            guest_phys_addr: gpa,
            memory_size: len,
            userspace_addr: memory.at as u64,
        };
        // SAFETY: the memory outlives the VM's use of it: no vCPU runs.
        unsafe { guest.vm.set_user_memory_region(region) }.unwrap();
        let (mut tracked, block) = Tracked::new(memory.at, memory.pages, false, Choice::Only(kind));
        let slots = tracker(&guest.vm, &guest, kind, &tracked);
        slots.add_slot(SLOT, 0, &block, 0, len, gpa).unwrap();
        tracked.begin();
        row(group, kind.name(), || tracked.take(), || tracked.sync(), || ());
    }
}
