//! The dirty log of a real guest: what is seen, and what happens to slots behind our back.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "test support outside of test functions; the numbers are small"
)]

use std::os::fd::AsRawFd;

use kvm_bindings::{KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, kvm_enable_cap};

use super::kvm::{DirtyLog, LOG_DIRTY_PAGES, ManualProtect, Slot, Vm};

use super::kvm_guest::{CODE, DATA, Guest, MEM, Shape, WRITE_PAGES};

const PAGES: u64 = MEM as u64 >> 12;
const SHAPE: Shape = Shape { vcpus: 1, irqchip: false, cpuid: true };

/// A guest with slot 0 logged and everything cleared once.
fn logged() -> Option<(Guest, Vm, DirtyLog)> {
    let guest = Guest::new(SHAPE)?;
    let vm = Vm::dup(guest.vm.as_raw_fd()).unwrap();
    let got = vm.enable_manual_protect().unwrap();
    assert_eq!(got, ManualProtect { manual: true, initially_set: true }, "an old kernel, or KVM changed");
    guest.start_at(0, &WRITE_PAGES);
    guest.set_slot(0, MEM as u64, LOG_DIRTY_PAGES);
    let mut log = DirtyLog::new(PAGES).unwrap();
    vm.get_dirty_log(0, &mut log).unwrap();
    assert!(log.words().iter().all(|w| *w == u64::MAX), "a log starts all set");
    let bits = log.words().to_vec();
    vm.clear_dirty_log(0, 0, PAGES as u32, &bits).unwrap();
    vm.get_dirty_log(0, &mut log).unwrap();
    assert!(log.words().iter().all(|w| *w == 0));
    Some((guest, vm, log))
}

/// Lets the guest write `pages` pages from `gpa` on.
fn dirty(guest: &mut Guest, gpa: u64, pages: u64) {
    let mut regs = guest.vcpus[0].get_regs().unwrap();
    (regs.rip, regs.rsi, regs.rcx) = (CODE, gpa, pages);
    guest.vcpus[0].set_regs(&regs).unwrap();
    guest.run(0);
}

/// Dirty pages of the data. Walking the tables for the guest KVM may also mark these and the code.
fn set(log: &DirtyLog) -> Vec<u64> {
    (DATA >> 12..log.pages()).filter(|page| log.words()[*page as usize / 64] >> (page % 64) & 1 != 0).collect()
}

#[test]
fn a_write_shows_until_it_is_cleared_and_shows_again() {
    let Some((mut guest, vm, mut log)) = logged() else { return };
    let first = DATA >> 12;
    dirty(&mut guest, DATA, 100);
    vm.get_dirty_log(0, &mut log).unwrap();
    assert_eq!(set(&log), (first..first + 100).collect::<Vec<_>>());
    vm.get_dirty_log(0, &mut log).unwrap();
    assert_eq!(set(&log).len(), 100, "reading does not clear");
    // Only the first group is cleared: the rest stays.
    let bits = [log.words()[first as usize / 64]];
    vm.clear_dirty_log(0, first, 64, &bits).unwrap();
    vm.get_dirty_log(0, &mut log).unwrap();
    assert_eq!(set(&log), (first + 64..first + 100).collect::<Vec<_>>());
    dirty(&mut guest, DATA + 0x3000, 1);
    vm.get_dirty_log(0, &mut log).unwrap();
    assert!(set(&log).contains(&(first + 3)), "cleared pages are protected again");
}

#[test]
fn a_slot_of_another_size_is_found_out() {
    let Some((guest, vm, mut log)) = logged() else { return };
    for len in [MEM as u64 - 0x1000, MEM as u64 / 2, 0x1000] {
        guest.set_slot(0, 0, 0);
        guest.set_slot(0, len, LOG_DIRTY_PAGES);
        assert_eq!(vm.get_dirty_log(0, &mut log).unwrap_err().errno(), libc::ESTALE, "{len:#x}");
    }
    // Growing within the last group, and by whole groups, seen with a log for fewer pages than the slot has.
    guest.set_slot(0, 0, 0);
    guest.set_slot(0, MEM as u64, LOG_DIRTY_PAGES);
    for pages in [PAGES - 1, PAGES - 63, PAGES - 64, PAGES / 2, 64, 1] {
        let mut small = DirtyLog::new(pages).unwrap();
        let error = vm.get_dirty_log(0, &mut small).unwrap_err();
        assert_eq!(error.errno(), libc::ESTALE, "{pages} pages: {error}");
    }
    vm.get_dirty_log(0, &mut log).unwrap();
}

#[test]
fn a_slot_without_a_log_is_found_out() {
    let Some((guest, vm, mut log)) = logged() else { return };
    guest.set_slot(0, MEM as u64, 0);
    let error = vm.get_dirty_log(0, &mut log).unwrap_err();
    assert_eq!(error.errno(), libc::ENOENT);
    assert!(error.text().contains("KVM_MEM_LOG_DIRTY_PAGES"), "{error}");
    assert_eq!(vm.clear_dirty_log(0, 0, 64, &[0]).unwrap_err().errno(), libc::ENOENT);
    guest.set_slot(0, 0, 0);
    assert_eq!(vm.get_dirty_log(0, &mut log).unwrap_err().errno(), libc::ENOENT);
}

/// With logs that start all set, a slot deleted and made again between two reads loses nothing: all is dirty.
#[test]
fn a_slot_made_again_is_all_dirty() {
    let Some((mut guest, vm, mut log)) = logged() else { return };
    dirty(&mut guest, DATA, 10);
    guest.set_slot(0, 0, 0);
    guest.set_slot(0, MEM as u64, LOG_DIRTY_PAGES);
    vm.get_dirty_log(0, &mut log).unwrap();
    assert!(log.words().iter().all(|w| *w == u64::MAX));
}

/// Switching the log off and on again, as a second user of it may do, is the same.
#[test]
fn a_log_switched_off_and_on_is_all_dirty() {
    let Some((mut guest, vm, mut log)) = logged() else { return };
    dirty(&mut guest, DATA, 10);
    let slot = Slot { slot: 0, flags: 0, gpa: 0, len: MEM as u64, host: guest.mem as u64 };
    vm.set_slot(&slot).unwrap();
    vm.set_slot(&Slot { flags: LOG_DIRTY_PAGES, ..slot }).unwrap();
    vm.get_dirty_log(0, &mut log).unwrap();
    assert!(log.words().iter().all(|w| *w == u64::MAX));
}

/// Without "initially set" the same loses the ten pages, and nothing tells: why we ask for the flag.
#[test]
fn without_initially_set_a_slot_made_again_loses_pages() {
    let Some(mut guest) = Guest::new(SHAPE) else { return };
    let vm = Vm::dup(guest.vm.as_raw_fd()).unwrap();
    let mut cap = kvm_enable_cap { cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, ..Default::default() };
    cap.args[0] = u64::from(KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE);
    guest.vm.enable_cap(&cap).unwrap();
    guest.start_at(0, &WRITE_PAGES);
    guest.set_slot(0, MEM as u64, LOG_DIRTY_PAGES);
    dirty(&mut guest, DATA, 10);
    guest.set_slot(0, 0, 0);
    guest.set_slot(0, MEM as u64, LOG_DIRTY_PAGES);
    let mut log = DirtyLog::new(PAGES).unwrap();
    vm.get_dirty_log(0, &mut log).unwrap();
    assert_eq!(set(&log), [0; 0]);
}

#[test]
fn what_is_not_a_vm_is_refused() {
    let Some(guest) = Guest::new(SHAPE) else { return };
    let file = std::fs::File::open("/dev/null").unwrap();
    for fd in [guest.kvm.as_raw_fd(), guest.vcpus[0].as_raw_fd(), file.as_raw_fd()] {
        let error = Vm::dup(fd).unwrap_err();
        assert_eq!(error.errno(), libc::EINVAL, "{error}");
        assert!(error.text().contains(&format!("fd {fd} is not a KVM VM")), "{error}");
    }
    assert_eq!(Vm::dup(-1).unwrap_err().errno(), libc::EBADF);
}

#[test]
fn slots_and_capabilities_name_what_failed() {
    let Some(guest) = Guest::new(SHAPE) else { return };
    let vm = Vm::dup(guest.vm.as_raw_fd()).unwrap();
    let slot = Slot { slot: 3, flags: 0, gpa: 0x1000, len: 0x1000, host: guest.mem as u64 };
    let error = vm.set_slot(&slot).unwrap_err();
    assert_eq!(error.errno(), libc::EEXIST);
    assert!(error.text().contains("slot 3 at 0x1000"), "{error}");
    assert_eq!(vm.clear_dirty_log(0, 0, 65, &[0]).unwrap_err().errno(), libc::EINVAL);
    assert_eq!(DirtyLog::new(0).unwrap_err().errno(), libc::EINVAL);
    assert_eq!(DirtyLog::new(u64::MAX).unwrap_err().errno(), libc::ENOMEM);
}
