//! What is owed to KVM, on the rings of a real guest.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::os::fd::AsRawFd;

use kvm_bindings::{KVM_CAP_DIRTY_LOG_RING, KVM_EXIT_DIRTY_RING_FULL, kvm_enable_cap};
use kvm_ioctls::{Cap, Kvm, VcpuExit};

use super::*;
use crate::ram::{BlockSpec, Ram};
use crate::sys::kvm_guest::{CODE, DATA, Guest, MEM, Shape, WRITE_PAGES};

const ENTRIES: u64 = 256;

/// A guest that is tracked by its ring, with no thread that empties it.
fn tracked() -> Option<(Guest, KvmRing)> {
    let has = Kvm::new().map_or(0, |kvm| kvm.check_extension_int(Cap::DirtyLogRing));
    if has <= 0 {
        eprintln!("SKIP: no KVM, or one without dirty rings");
        return None;
    }
    let guest = Guest::prepared(Shape { vcpus: 1, irqchip: false, cpuid: true }, |vm| {
        let mut cap = kvm_enable_cap { cap: KVM_CAP_DIRTY_LOG_RING, ..Default::default() };
        cap.args[0] = ENTRIES * 16;
        vm.enable_cap(&cap).unwrap();
    })?;
    guest.start_at(0, &WRITE_PAGES);
    let rings = KvmRing::find(&guest.vcpu_fds()).unwrap();
    let ring = KvmRing::new(Vm::dup(guest.vm.as_raw_fd()).unwrap(), rings, Arc::default(), None);
    let ram = Ram::default();
    let (name, host, len) = ("ram".to_owned(), guest.mem, MEM as u64);
    let block =
        ram.add(BlockSpec { name, host, len, gpa: 0, marked: false, shared_storage: false, file: None }).unwrap();
    ring.add_slot(0, 0, &block, 0, len, 0).unwrap();
    ring.shared.switch_on(None).unwrap();
    Some((guest, ring))
}

/// The guest writes pages; false: it stands at its full ring before it is through.
fn write(guest: &mut Guest, page: u64, pages: u64) -> bool {
    let vcpu = &mut guest.vcpus[0];
    let mut regs = vcpu.get_regs().unwrap();
    (regs.rip, regs.rsi, regs.rcx) = (CODE, DATA + page * 4096, pages);
    vcpu.set_regs(&regs).unwrap();
    match vcpu.run().unwrap() {
        VcpuExit::IoOut(..) => true,
        VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL) => false,
        other => panic!("unexpected exit {other:?}"),
    }
}

/// Takes all that the ring has and does not give it back.
fn take(ring: &KvmRing) -> usize {
    lock(&ring.shared.rings).vcpus[0].ring.take(usize::MAX, |_, _| ())
}

#[test]
fn what_was_taken_is_owed_until_kvm_has_it() {
    let Some((mut guest, ring)) = tracked() else { return };
    assert!(write(&mut guest, 0, 50));
    // Nothing is owed that nobody took.
    assert_eq!(lock(&ring.shared.rings).owed(), 0);
    let taken = take(&ring);
    assert!(taken >= 50);
    let mut rings = lock(&ring.shared.rings);
    assert_eq!(rings.owed(), taken);
    // An error forgets nothing, nor does a call that is interrupted before its first entry, every time.
    assert_eq!(rings.give_back(|| Err(Error::new(libc::EIO, "no"))).unwrap_err().errno(), libc::EIO);
    let mut tries = 0;
    let error = rings.give_back(|| {
        tries += 1;
        Ok(0)
    });
    let error = error.unwrap_err();
    assert_eq!((error.errno(), tries), (libc::EINTR, TRIES));
    assert!(error.text().contains(&format!("{taken} entries")), "{error}");
    assert_eq!((rings.owed(), rings.unprotected), (taken, false), "what was not given back is protected later");
    // One that gets through ends it; no more are made, nor any when nothing is owed.
    let mut calls = 0;
    let mut reset = || {
        calls += 1;
        if calls < 3 { Ok(0) } else { ring.shared.slots.vm.reset_dirty_rings() }
    };
    rings.give_back(&mut reset).unwrap();
    rings.give_back(&mut reset).unwrap();
    assert_eq!((calls, rings.owed(), rings.unprotected), (3, 0, false));
    drop(rings);
    // All of it is protected again.
    assert!(write(&mut guest, 0, 50));
    assert!(take(&ring) >= 50);
}

#[test]
fn the_debt_is_counted_across_the_end_of_the_ring() {
    let Some((mut guest, ring)) = tracked() else { return };
    for turn in 0..20 {
        assert!(write(&mut guest, turn * 7, 60), "turn {turn}");
        let taken = take(&ring);
        let mut rings = lock(&ring.shared.rings);
        assert_eq!(rings.owed(), taken, "turn {turn}");
        rings.give_back(|| ring.shared.slots.vm.reset_dirty_rings()).unwrap();
        assert_eq!(rings.owed(), 0);
    }
}

#[test]
fn a_vcpu_at_a_ring_of_taken_entries_goes_on() {
    let Some((mut guest, ring)) = tracked() else { return };
    assert!(!write(&mut guest, 0, ENTRIES), "the ring is full before that");
    assert!(take(&ring) > 0);
    assert!(!write(&mut guest, 0, ENTRIES), "taken is not given back");
    // There is nothing new to take, and still somebody has to reset.
    ring.ring_full(0).unwrap();
    assert_eq!(lock(&ring.shared.rings).owed(), 0);
    assert!(write(&mut guest, 0, 10));
}

/// A VMM may make a handle for each migration: KVM goes on in its rings where it was.
#[test]
fn rings_that_were_in_use_are_taken_up_where_kvm_is() {
    let Some((mut guest, first)) = tracked() else { return };
    let sync = |ring: &KvmRing| {
        let mut pages = 0;
        ring.sync(&mut |_, _, kept| pages += kept.iter().map(|w| w.count_ones() as usize).sum::<usize>()).unwrap();
        pages
    };
    let mut last = first;
    // All given back; some taken and not given back; some not even taken; and once around.
    for turn in 0..12 {
        assert!(write(&mut guest, 0, 50), "turn {turn}");
        assert!((50..100).contains(&sync(&last)), "turn {turn}");
        match turn % 4 {
            0 => {}
            1 | 2 => {
                assert!(write(&mut guest, 0, 20));
                lock(&last.shared.rings).vcpus[0].ring.take(if turn % 4 == 1 { 20 } else { 5 }, |_, _| ());
            }
            _ => assert!(write(&mut guest, 0, 20)),
        }
        let rings = KvmRing::find(&guest.vcpu_fds()).unwrap();
        let next = KvmRing::new(Vm::dup(guest.vm.as_raw_fd()).unwrap(), rings, Arc::default(), None);
        let block = Arc::clone(&last.shared.slots.lock()[0].placed.block);
        next.add_slot(0, 0, &block, 0, MEM as u64, 0).unwrap();
        next.shared.switch_on(None).unwrap();
        sync(&next);
        assert_eq!(lock(&next.shared.rings).owed(), 0, "turn {turn}");
        last = next;
    }
}

#[test]
fn pages_that_may_be_unprotected_fail_every_sync_until_logging_begins_anew() {
    let Some((guest, ring)) = tracked() else { return };
    let list = Ram::default().list();
    // The limit keeps logging on when the migration ends.
    ring.set_limit(None, 1 << 40).unwrap();
    ring.start(&list).unwrap();
    ring.sync(&mut |_, _, _| ()).unwrap();
    lock(&ring.shared.rings).unprotected = true;
    for _ in 0..2 {
        assert_eq!(ring.sync(&mut |_, _, _| ()).unwrap_err().errno(), libc::EINTR);
    }
    ring.stop();
    assert!(lock(&ring.shared.rings).unprotected, "logging is still on");
    ring.start(&list).unwrap();
    ring.sync(&mut |_, _, _| ()).unwrap();
    ring.stop();
    lock(&ring.shared.rings).unprotected = true;
    ring.end_limits();
    assert!(!lock(&ring.shared.rings).unprotected);
    drop(guest);
}
