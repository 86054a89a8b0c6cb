//! KVM's dirty log through slots that overlap, start anywhere, are read-only, or change behind the library's back.
#![allow(clippy::unwrap_used, reason = "a test")]
#![allow(unsafe_code, reason = "maps memory for a slot")]

mod common;
#[path = "common/program.rs"]
mod program;
#[path = "common/qmp.rs"]
mod qmp;

use common::{c_program, scratch, skip, without_kvm};
use kvm_bindings::{KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VmFd};
use program::Program;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;
use vmig::dirty::choice::Choice;
use vmig::dirty::cursor::Cursor;
use vmig::dirty::hub::Hub;
use vmig::dirty::kvm_log::KvmLog;
use vmig::dirty::kvm_slots::KvmTracker;
use vmig::dirty::write_protect::WriteProtect;
use vmig::ram::{BlockSpec, PAGE, Ram};
use vmig::sys::kvm::{CLEAR_MAX, Vm};

fn start(dir: &Path, name: &str, args: &[&str]) -> Program {
    let program = Program::start(name, dir, &c_program("slots"), args);
    assert_eq!(program.reply(), "ready");
    program
}

fn batches(program: &mut Program) -> u64 {
    program.command("batches").strip_prefix("batches ").unwrap().parse().unwrap()
}

/// The guest runs: it wrote more.
fn runs(program: &mut Program) {
    let goal = batches(program) + 20;
    let end = std::time::Instant::now() + program::REPLY;
    while batches(program) < goal {
        if std::time::Instant::now() > end {
            program.fail("the guest stands still");
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

fn waiting(dir: &Path) -> (Program, String) {
    let mut destination = start(dir, "destination", &["incoming"]);
    destination.send("incoming tcp:127.0.0.1:0");
    let address = destination.listening();
    (destination, address)
}

/// Starts a migration that does not end before the bandwidth is set free.
fn slow(source: &mut Program, address: &str) {
    source.must("set max-bandwidth 4M");
    source.must(&format!("migrate {address}"));
    let end = std::time::Instant::now() + program::MOVE;
    while source.status_text("state") != "active" {
        if std::time::Instant::now() > end {
            source.fail("the migration does not get going");
        }
    }
}

/// Waits until the hook was called so often.
fn switched(source: &mut Program, times: u64) {
    let end = std::time::Instant::now() + program::MOVE;
    while source.command("switched") != format!("switched {times}") {
        if std::time::Instant::now() > end {
            source.fail(&format!("the hook was not called {times} times"));
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

/// Waits until the vCPU stands at its ring because of its limit.
fn is_held_up(source: &mut Program) {
    let end = std::time::Instant::now() + program::MOVE;
    while source.command("dirt").ends_with("throttle=0") {
        if std::time::Instant::now() > end {
            source.fail("no limit holds the vCPU up");
        }
    }
}

/// The log of a guest that stayed is switched off behind the state's back.
fn falls_silent(source: &mut Program) {
    let end = std::time::Instant::now() + program::MOVE;
    while source.command("logging") != "logging off" {
        if std::time::Instant::now() > end {
            source.fail("the dirty log is not switched off");
        }
    }
}

/// A whole migration: what the destination began with is what the source ended with.
fn moves_well(dir: &Path, source: &mut Program) {
    let (mut destination, address) = waiting(dir);
    source.must("set max-bandwidth 0");
    source.must(&format!("migrate {address}"));
    arrives_well(source, &mut destination);
}

fn arrives_well(source: &mut Program, destination: &mut Program) {
    arrives_whole(source, destination);
    assert_eq!(source.command("logging"), "logging on", "left as it is when the guest left");
}

fn arrives_whole(source: &mut Program, destination: &mut Program) {
    source.must_end_in("completed");
    destination.must_end_in("completed");
    let arrived = destination.await_news("hashed");
    assert_eq!(source.command("hash").strip_prefix("hash"), arrived.strip_prefix("hashed"), "memory differs");
    runs(destination);
}

#[test]
fn memory_is_whole_through_any_slots() {
    if without_kvm() {
        return;
    }
    for hook in [false, true] {
        let dir = scratch("slots");
        let mut source = start(&dir, "source", if hook { &["hook"] } else { &[] });
        runs(&mut source);
        assert_eq!(source.command("logging"), "logging off");
        let (mut destination, address) = waiting(&dir);
        slow(&mut source, &address);
        assert_eq!(source.command("logging"), "logging on");
        source.must("flash 1");
        runs(&mut source);
        source.must("flash 2");
        source.must("set max-bandwidth 0");
        arrives_well(&mut source, &mut destination);
        // Six slots, each switched on by the hook if there is one, else by the library.
        assert_eq!(source.command("switched"), if hook { "switched 6" } else { "switched 0" });
        source.quit();
        destination.quit();
    }
}

/// The same by KVM's dirty rings, which the VMM enabled: a small one, at which the vCPU stands now and then, and a large
/// one. And by write protection, though there is KVM.
#[test]
fn memory_is_whole_by_rings_and_by_write_protection() {
    if without_kvm() {
        return;
    }
    let ring = Kvm::new().unwrap().check_extension_int(kvm_ioctls::Cap::DirtyLogRing);
    for (args, option, tracker) in [
        (&["ring=256"][..], "auto", "value kvm-ring (low, main, rom)"),
        (&["ring=65536", "hook"][..], "kvm-ring", "value kvm-ring (low, main, rom)"),
        (&[][..], "kvm-log", "value kvm-log (low, main, rom)"),
        (&[][..], "write-protect", "value write-protect (low, main, rom)"),
    ] {
        if (!args.is_empty() && ring <= 0 && skip("kvm", "this KVM has no dirty rings"))
            || (option == "write-protect" && WriteProtect::new().is_err_and(|e| skip("userfaultfd", e.text())))
        {
            continue;
        }
        let dir = scratch("rings");
        let mut source = start(&dir, "source", args);
        source.must(&format!("set dirty-tracker {option}"));
        runs(&mut source);
        for end in ["cancelled", "completed"] {
            let (mut destination, address) = waiting(&dir);
            slow(&mut source, &address);
            source.must("flash 1");
            runs(&mut source);
            assert_eq!(source.command("tracker"), tracker);
            if end == "cancelled" {
                source.must("cancel");
                source.must_end_in("cancelled");
                destination.must_end_in("failed");
                // What is left in the rings must not hold the vCPU.
                runs(&mut source);
                destination.quit();
                continue;
            }
            source.must("set max-bandwidth 0");
            arrives_whole(&mut source, &mut destination);
            destination.quit();
        }
        if args.first() == Some(&"ring=256") {
            assert_ne!(source.command("full"), "full 0", "a ring of 256 entries fills up");
        }
        source.quit();
    }
}

/// A hook that switches logging off may ask what vCPUs do, and wait for one that stands at its ring: when a limit is lifted,
/// by the VMM or a client, and when a migration ends; with one thread it is called on that.
#[test]
fn a_hook_may_ask_about_vcpus_and_wait_for_them() {
    if without_kvm() {
        return;
    }
    if Kvm::new().unwrap().check_extension_int(kvm_ioctls::Cap::DirtyLogRing) <= 0 {
        let _ = skip("kvm", "this KVM has no dirty rings");
        return;
    }
    for args in [&["ring=256", "hook"][..], &["ring=256", "hook", "manual"]] {
        let dir = scratch("asks");
        let mut source = start(&dir, "source", args);
        source.must("limit -1048576");
        is_held_up(&mut source);
        source.must("limit -0");
        switched(&mut source, 2 * 6);
        runs(&mut source);

        let socket = dir.join("qmp");
        source.must(&format!("listen unix:{}", socket.display()));
        let mut client = qmp::Client::ready(&socket);
        client.try_run("set-vcpu-dirty-limit", serde_json::json!({"dirty-rate": 1})).unwrap();
        is_held_up(&mut source);
        client.run("cancel-vcpu-dirty-limit");
        switched(&mut source, 4 * 6);
        runs(&mut source);

        let (destination, address) = waiting(&dir);
        slow(&mut source, &address);
        runs(&mut source);
        source.must("cancel");
        source.must_end_in("cancelled");
        switched(&mut source, 6 * 6);
        runs(&mut source);
        destination.quit();
        source.quit();
    }
}

#[test]
fn logging_is_off_after_every_end() {
    if without_kvm() {
        return;
    }
    for hook in [false, true] {
        let dir = scratch("ends");
        let mut source = start(&dir, "source", if hook { &["hook"] } else { &[] });
        for end in ["cancelled", "failed"] {
            let (mut destination, address) = waiting(&dir);
            slow(&mut source, &address);
            assert_eq!(source.command("logging"), "logging on");
            match end {
                "cancelled" => source.must("cancel"),
                _ => destination.kill(),
            }
            source.must_end_in(end);
            falls_silent(&mut source);
            runs(&mut source);
        }
        moves_well(&dir, &mut source);
        if hook {
            source.send("incoming tcp:127.0.0.1:0");
            source.listening();
            assert_eq!(source.command("logging"), "logging off", "a guest may come back");
            source.quit();
        } else {
            assert_eq!(source.command("quit"), "freed: logging off");
            source.wait_end(0);
        }
    }
}

/// Slots stay as they are registered while a migration runs, and may change before and after.
#[test]
fn slots_neither_come_nor_go_while_a_migration_runs() {
    if without_kvm() {
        return;
    }
    let dir = scratch("settled");
    let mut source = start(&dir, "source", &[]);
    // The part of "main" that is seen twice: without it every page has a slot still.
    source.must("forget 4");
    for end in ["cancelled", "completed"] {
        let (mut destination, address) = waiting(&dir);
        slow(&mut source, &address);
        for (command, what) in [("register 4", "add KVM slot 4"), ("forget 3", "remove KVM slot 3")] {
            let answer = source.command(command);
            let why = format!("cannot {what} now: a migration is in progress (state active)");
            assert!(answer.contains(&why), "{command}: {answer}");
            assert!(answer.contains("vmig_wait") && answer.contains("vmig_cancel"), "{command}: {answer}");
        }
        if end == "cancelled" {
            source.must("cancel");
            source.must_end_in("cancelled");
            destination.must_end_in("failed");
            source.must("register 4");
            source.must("forget 4");
            source.must("register 4");
        } else {
            source.must("set max-bandwidth 0");
            arrives_well(&mut source, &mut destination);
        }
        destination.quit();
    }
    source.quit();
}

/// How a slot is changed during a migration, and what must come of it: an error with these words, or no harm.
const TAMPERED: [(&str, u32, Option<&str>); 6] = [
    ("off", 2, Some("no dirty log")),
    ("gone", 4, Some("no dirty log")),
    ("smaller", 3, Some("it has another size now")),
    ("larger", 4, Some("it is larger now")),
    ("again", 1, None),
    ("again", 3, None),
];

#[test]
fn a_slot_changed_behind_our_back_is_named_or_harmless() {
    if without_kvm() {
        return;
    }
    for (how, slot, words) in TAMPERED {
        let dir = scratch("tamper");
        let mut source = start(&dir, "source", &[]);
        let (mut destination, address) = waiting(&dir);
        slow(&mut source, &address);
        runs(&mut source);
        source.must(&format!("{how} {slot}"));
        runs(&mut source);
        source.must("set max-bandwidth 0");
        match words {
            None => arrives_well(&mut source, &mut destination),
            Some(words) => {
                source.must_end_in("failed");
                destination.must_end_in("failed");
                let why = source.command("error");
                let block = "RAM block 'main'";
                // What is found first, at a read of the log or while clearing it, depends on the moment.
                let found = why.contains(words) || why.contains("KVM_CLEAR_DIRTY_LOG") || why.contains("any more");
                assert!(found && why.contains(block) && why.contains(&format!("slot {slot}")), "{how} {slot}: {why}");
                runs(&mut source);
                if how != "off" {
                    source.must(&format!("back {slot}"));
                }
                falls_silent(&mut source);
                moves_well(&dir, &mut source);
            }
        }
        source.quit();
    }
}

/// The library does not bring a slot back to life that the VMM deleted.
#[test]
fn a_deleted_slot_stays_deleted() {
    if without_kvm() {
        return;
    }
    let dir = scratch("deleted");
    let mut source = start(&dir, "source", &[]);
    let (_destination, address) = waiting(&dir);
    slow(&mut source, &address);
    source.must("gone 5");
    source.must("set max-bandwidth 0");
    source.must_end_in("failed");
    assert!(source.command("error").contains("'rom'"));
    assert_eq!(source.command("present 5"), "present no");
    source.quit();
}

#[test]
fn ram_that_nobody_tracks_is_refused_by_name() {
    if without_kvm() {
        return;
    }
    let dir = scratch("untracked");
    let mut source = start(&dir, "source", &[]);
    let (_destination, address) = waiting(&dir);
    source.must("forget 2");
    source.must("set dirty-tracker kvm-log");
    source.must(&format!("migrate {address}"));
    source.must_end_in("failed");
    let why = source.command("error");
    // Slot 4 shows a part of what slot 2 did: the hole begins behind it.
    let hole = (37 + 64 * 20 + 11) * 4096;
    assert!(why.contains("RAM block 'main'") && why.contains(&format!("{hole:#x}")), "{why}");
    assert_eq!(source.command("logging"), "logging off");
    runs(&mut source);
    // Unless somebody else can: a block that KVM does not see all of is protected.
    source.must("set dirty-tracker auto");
    if !WriteProtect::new().is_err_and(|e| skip("userfaultfd", e.text())) {
        let (mut destination, address) = waiting(&dir);
        source.must(&format!("migrate {address}"));
        arrives_whole(&mut source, &mut destination);
        assert_eq!(source.command("tracker"), "value kvm-log (low, rom), write-protect (main)");
        destination.quit();
    }
    source.quit();
}

/// A VM whose only slot, number 3, has so many pages.
fn vm_with_slot(pages: usize) -> (VmFd, *mut u8) {
    let vm = Kvm::new().unwrap().create_vm().unwrap();
    let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    let len = pages as u64 * PAGE;
    // SAFETY: a new mapping of our own, which stays until the process ends.
    let host = unsafe { libc::mmap(std::ptr::null_mut(), len.try_into().unwrap(), prot, flags, -1, 0) };
    assert_ne!(host, libc::MAP_FAILED);
    let (guest_phys_addr, userspace_addr) = (0x1000_0000, host as u64);
    let region = kvm_userspace_memory_region { slot: 3, flags: 0, guest_phys_addr, memory_size: len, userspace_addr };
    // SAFETY: the mapping stays until the process ends.
    unsafe { vm.set_user_memory_region(region) }.unwrap();
    (vm, host.cast())
}

/// The pages KVM calls dirty, as (first, end). With manual protection asking changes nothing.
fn kernel_log(vm: &VmFd, pages: usize) -> Vec<(usize, usize)> {
    let words = vm.get_dirty_log(3, pages * 4096).unwrap();
    let dirty: Vec<usize> = (0..pages).filter(|page| words[page / 64] >> (page % 64) & 1 != 0).collect();
    dirty.chunk_by(|a, b| a + 1 == *b).map(|run| (run[0], run[run.len() - 1] + 1)).collect()
}

/// A VM with one slot of so many pages, its memory, and a hub that reads its log.
fn logged(pages: usize) -> Option<(VmFd, *mut u8, Ram, Hub)> {
    let (vm, host) = vm_with_slot(pages);
    if vm.check_extension_raw(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.into()) & 3 != 3 {
        let _ = skip("kvm", "the kernel has no dirty logs that begin all set");
        return None;
    }
    let (ram, hub) = (Ram::default(), Hub::default());
    let len = pages as u64 * PAGE;
    let spec = BlockSpec { name: "ram".into(), host, len, gpa: 0, marked: false, shared_storage: false, file: None };
    let block = ram.add(spec).unwrap();
    let log = KvmLog::new(Vm::dup(vm.as_raw_fd()).unwrap(), None).unwrap();
    log.add_slot(3, 0, &block, 0, len, 0x1000_0000).unwrap();
    hub.add_tracker(Arc::new(log)).unwrap();
    Some((vm, host, ram, hub))
}

/// Memory that nobody touched stays out of the kernel's reach until somebody does.
#[test]
fn what_does_not_exist_is_not_cleared() {
    if without_kvm() {
        return;
    }
    let most = usize::try_from(CLEAR_MAX).unwrap();
    let pages = 3 * most + 100;
    let Some((vm, host, ram, hub)) = logged(pages) else { return };
    // SAFETY: a page of the mapping.
    let touch = |page: usize| unsafe { host.wrapping_add(page * 4096).write_volatile(1) };
    touch(most + 7);

    let set = hub.subscribe(&ram.list(), Choice::Auto).unwrap();
    let mut cursor = Cursor::default();
    while cursor.take(&set, most).unwrap() {}
    assert_eq!(kernel_log(&vm, pages), [(0, most), (2 * most, pages)], "only what exists was cleared");
    hub.sync().unwrap();
    assert_eq!(set.pages(), 0, "what still does not exist was not written");

    touch(3 * most + 99);
    hub.sync().unwrap();
    assert_eq!(set.next_run(0, 0, usize::MAX), Some((3 * most, 100)), "all of its chunk may have been");
    while cursor.take(&set, most).unwrap() {}
    assert_eq!(kernel_log(&vm, pages), [(0, most), (2 * most, 3 * most)]);
    touch(3 * most + 99);
    hub.sync().unwrap();
    assert_eq!(set.pages(), 0, "from here on KVM tells what the guest writes");

    // SAFETY: a range of the mapping.
    let gone = unsafe { libc::madvise(host.wrapping_add(most * 4096).cast(), most * 4096, libc::MADV_DONTNEED) };
    assert_eq!(gone, 0);
    hub.leave(&set);
    let again = hub.subscribe(&ram.list(), Choice::Auto).unwrap();
    assert_eq!(again.pages(), pages, "a new attempt begins with all pages");
    while cursor.take(&again, most).unwrap() {}
    assert_eq!(kernel_log(&vm, pages), [(0, 3 * most)], "and sleeps anew");
    hub.leave(&again);
    assert!(vm.get_dirty_log(3, pages * 4096).is_ok(), "left on");
    hub.rest();
    assert!(vm.get_dirty_log(3, pages * 4096).is_err(), "switched off");
}

/// No call into the kernel makes a vCPU wait for long: switching logging on protects nothing, reading protects nothing,
/// and one clearing protects a bounded number of pages.
#[test]
fn no_call_arms_a_whole_slot() {
    if without_kvm() {
        return;
    }
    let most = usize::try_from(CLEAR_MAX).unwrap();
    let pages = 3 * most + 100;
    let Some((vm, host, ram, hub)) = logged(pages) else { return };
    for page in 0..pages {
        // SAFETY: a page of the mapping.
        unsafe { host.wrapping_add(page * 4096).write_volatile(1) };
    }
    let set = hub.subscribe(&ram.list(), Choice::Auto).unwrap();
    assert_eq!(kernel_log(&vm, pages), [(0, pages)], "what is dirty is not protected");
    let mut cursor = Cursor::default();
    assert!(cursor.take(&set, 1).unwrap());
    assert_eq!(kernel_log(&vm, pages), [(most, pages)], "protected just before it is sent");
    hub.sync().unwrap();
    assert_eq!(kernel_log(&vm, pages), [(most, pages)]);

    let ours = Vm::dup(vm.as_raw_fd()).unwrap();
    let error = ours.clear_dirty_log(3, 0, CLEAR_MAX + 64, &vec![!0; most / 64 + 1]).unwrap_err();
    assert_eq!(error.errno(), libc::EINVAL);
    assert_eq!(kernel_log(&vm, pages), [(most, pages)], "nothing was asked of the kernel");
    // More than one call may clear: in pieces.
    set.clear(0, most - 1..2 * most + 1).unwrap();
    assert_eq!(kernel_log(&vm, pages), [(3 * most, pages)]);
    hub.leave(&set);
    hub.rest();
    assert!(vm.get_dirty_log(3, pages * 4096).is_err(), "switched off");
}
