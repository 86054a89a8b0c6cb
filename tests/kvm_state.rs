//! vCPU, interrupt controller and clock state between two real KVM VMs of this process.
#![cfg(target_arch = "x86_64")]
#![allow(unsafe_code, reason = "xsave areas and kvm_run's union are raw in kvm-ioctls")]
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "test support outside of test functions; the numbers are small"
)]

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kvm_bindings::{KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, kvm_irqchip, kvm_mp_state};
use kvm_ioctls::VcpuExit;
use vmig::error::Result;
use vmig::kvm::{Entry, Kvm, attach};
use vmig::section::Part;
use vmig::thread::Threads;
use vmig::wire::input::{Input, Slice};

#[path = "../src/sys/kvm_guest.rs"]
mod kvm_guest;
use kvm_guest::{COUNT_XMM, DATA, Guest, HOLE, READ_RBX, READ_SENSOR, SENSOR, Shape, WAIT_FLAG};

const SHAPE: Shape = Shape { vcpus: 1, irqchip: true, cpuid: true };
/// The second vCPU waits for its SIPI for ever.
const PAIR: Shape = Shape { vcpus: 2, ..SHAPE };

fn attached(guest: &Guest) -> Arc<Kvm> {
    attach(Arc::new(Threads::new()), guest.vm.as_raw_fd(), &guest.vcpu_fds()).unwrap()
}

/// The sections in stream order, each with its body.
fn save(kvm: &Arc<Kvm>) -> Result<Vec<(Entry, Vec<u8>)>> {
    let mut entries = kvm.sections()?;
    entries.sort_by_key(|entry| -entry.priority);
    let body = |entry: Entry| {
        let mut body = Vec::new();
        entry.section.complete(&mut body)?;
        Ok((entry, body))
    };
    entries.into_iter().map(body).collect()
}

fn load(kvm: &Arc<Kvm>, saved: &[(Entry, Vec<u8>)]) -> Result<()> {
    let entries = kvm.sections()?;
    for (from, body) in saved {
        let same = |e: &&Entry| (e.name, e.instance) == (from.name, from.instance);
        let to = entries.iter().find(same).unwrap_or_else(|| panic!("no {from:?} here"));
        let mut input = Slice::new(body);
        let apply = to.section.parse(Part::Full, from.version, &mut input)?;
        assert_eq!(input.position(), body.len() as u64, "{from:?} was not read to its end");
        apply()?;
    }
    Ok(())
}

fn moved(source: &Guest, target: &Guest) -> (Vec<(Entry, Vec<u8>)>, Arc<Kvm>) {
    let from = attached(source);
    from.ready(None).unwrap();
    from.clock_stop().unwrap();
    let saved = save(&from).unwrap();
    target.copy_memory_from(source);
    let to = attached(target);
    load(&to, &saved).unwrap();
    (saved, to)
}

/// Fields of a body as (name, bytes), by the section's own description.
fn fields(entry: &Entry, body: &[u8]) -> Vec<(String, Vec<u8>)> {
    let description = entry.section.describe(body);
    let mut at = 0;
    let mut all = Vec::new();
    for field in description["fields"].as_array().unwrap() {
        let size = field["size"].as_u64().unwrap() as usize * field["array_len"].as_u64().unwrap_or(1) as usize;
        all.push((field["name"].as_str().unwrap().to_owned(), body[at..at + size].to_vec()));
        at += size;
    }
    assert_eq!(at, body.len(), "the description of {entry:?} covers the body");
    all
}

/// Sets vector registers: xmm1 = 3 and, where the host has AVX, a pattern in the upper half of ymm5.
fn set_vectors(guest: &Guest) -> bool {
    let vcpu = &guest.vcpus[0];
    let mut sregs = vcpu.get_sregs().unwrap();
    sregs.cr4 |= 1 << 18;
    vcpu.set_sregs(&sregs).unwrap();
    let mut xcrs = vcpu.get_xcrs().unwrap();
    xcrs.xcrs[0].value = 7;
    let avx = vcpu.set_xcrs(&xcrs).is_ok();
    let mut xsave = vcpu.get_xsave().unwrap();
    // XMM1 of the legacy area; XSTATE_BV: x87, SSE and, in the extended area from byte 576 on, AVX.
    xsave.region[176 / 4] = 3;
    xsave.region[128] |= 3;
    if avx {
        xsave.region[(576 + 5 * 16) / 4] = 0xdead_beef;
        xsave.region[128] |= 4;
    }
    // SAFETY: the vCPU's xsave state is what a kvm_xsave holds; no larger feature was asked for.
    unsafe { vcpu.set_xsave(&xsave) }.unwrap();
    avx
}

/// A guest that counted for a while, with something to lose in every device.
fn busy_guest() -> Option<Guest> {
    let mut guest = Guest::new(PAIR)?;
    guest.start_at(0, &COUNT_XMM);
    if !set_vectors(&guest) {
        eprintln!("this host has no AVX: ymm registers are not checked");
    }
    for _ in 0..5 {
        guest.run(0);
    }
    let mut debug = guest.vcpus[0].get_debug_regs().unwrap();
    debug.db[1] = 0x1234;
    guest.vcpus[0].set_debug_regs(&debug).unwrap();
    let mut chip = kvm_irqchip { chip_id: KVM_IRQCHIP_IOAPIC, ..Default::default() };
    guest.vm.get_irqchip(&mut chip).unwrap();
    // SAFETY: KVM filled the I/O APIC's arm.
    let ioapic = unsafe { &mut chip.chip.ioapic };
    ioapic.redirtbl[4].bits = 0x1_0034;
    guest.vm.set_irqchip(&chip).unwrap();
    let mut chip = kvm_irqchip { chip_id: KVM_IRQCHIP_PIC_MASTER, ..Default::default() };
    guest.vm.get_irqchip(&mut chip).unwrap();
    chip.chip.pic.imr = 0xa5;
    guest.vm.set_irqchip(&chip).unwrap();
    let mut pit = guest.vm.get_pit2().unwrap();
    (pit.channels[2].count, pit.channels[2].mode, pit.channels[2].gate) = (0x4321, 3, 1);
    guest.vm.set_pit2(&pit).unwrap();
    Some(guest)
}

/// Big-endian integer fields of a body.
fn number(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// Names of fields that differ, but for what goes on by itself: the TSC (MSR 0x10), the lapic's current count and
/// the moment at which the PIT's counters were loaded.
fn differing(entry: &Entry, one: &[u8], two: &[u8]) -> Vec<String> {
    let (one, two) = (fields(entry, one), fields(entry, two));
    assert_eq!(one.len(), two.len());
    let mut found = Vec::new();
    for ((name, mut one), (_, mut two)) in one.into_iter().zip(two) {
        assert_eq!(one.len(), two.len(), "{name}");
        for bytes in [&mut one, &mut two] {
            match (entry.name, name.as_str()) {
                ("kvm-vcpu", "lapic") => bytes[0x390..0x394].fill(0),
                ("kvm-vcpu", "msrs") => {
                    let tsc = bytes.chunks_mut(12).find(|msr| number(&msr[..4]) == 0x10).unwrap();
                    tsc[4..].fill(0);
                }
                ("kvm-pit", "channels") => {
                    let size = bytes.len() / 3;
                    bytes.chunks_mut(size).for_each(|channel| channel[size - 8..].fill(0));
                }
                _ => {}
            }
        }
        if one != two {
            found.push(format!("{name}: {one:x?} != {two:x?}"));
        }
    }
    found
}

#[test]
fn state_saved_after_loading_is_the_state_that_was_loaded() {
    let Some(source) = busy_guest() else { return };
    let target = Guest::new(PAIR).unwrap();
    let (saved, kvm) = moved(&source, &target);
    let again = save(&kvm).unwrap();
    let names: Vec<_> = saved.iter().map(|(entry, _)| (entry.name, entry.instance)).collect();
    assert_eq!(names, [("kvm-irqchip", 0), ("kvm-pit", 0), ("kvm-vcpu", 0), ("kvm-vcpu", 1), ("kvm-clock", 0)]);
    for ((entry, one), (_, two)) in saved.iter().zip(&again) {
        assert_eq!(differing(entry, one, two), [""; 0], "{entry:?}");
    }
    let waiting = fields(&saved[3].0, &saved[3].1);
    assert_eq!(number(&waiting[0].1), u64::from(kvm_bindings::KVM_MP_STATE_UNINITIALIZED));
    let get = |name: &str| fields(&saved[2].0, &saved[2].1).into_iter().find(|f| f.0 == name).unwrap().1;
    assert_eq!(number(&get("tsc_khz")), u64::from(source.vcpus[0].get_tsc_khz().unwrap()));
    assert_eq!(number(&get("cpuid_len")), source.vcpus[0].get_cpuid2(256).unwrap().as_slice().len() as u64);
    let xsave = get("xsave");
    assert_eq!(xsave[176], 3);
    if source.vcpus[0].get_xcrs().unwrap().xcrs[0].value == 7 {
        assert_eq!(xsave[576 + 80..576 + 84], 0xdead_beef_u32.to_le_bytes());
    }
    eprintln!("MSRs KVM lists and cannot read here: {:x?}", attached(&source).unreadable_msrs());
}

/// The comparison above finds what it should: a fresh VM differs in every section.
#[test]
fn state_of_another_vm_differs() {
    let Some(source) = busy_guest() else { return };
    let target = Guest::new(PAIR).unwrap();
    let (one, two) = (save(&attached(&source)).unwrap(), save(&attached(&target)).unwrap());
    for ((entry, one), (_, two)) in one.iter().zip(&two) {
        // The second vCPU is fresh in both.
        assert_eq!(differing(entry, one, two).is_empty(), entry.instance == 1, "{entry:?}");
    }
}

#[test]
fn a_guest_goes_on_where_it_was() {
    let Some(mut source) = busy_guest() else { return };
    source.run(0);
    let counted = source.read_u64(DATA);
    assert_eq!(source.read_u64(DATA + 8), counted * 3);
    let mut target = Guest::new(PAIR).unwrap();
    let (_, kvm) = moved(&source, &target);
    kvm.clock_start().unwrap();
    for round in 1..=3 {
        target.run(0);
        assert_eq!(target.read_u64(DATA), counted + round * 4096);
        assert_eq!(target.read_u64(DATA + 8), (counted + round * 4096) * 3, "xmm0 or xmm1 went lost");
    }
    // And so can the source, when the migration failed.
    source.run(0);
    assert_eq!(source.read_u64(DATA), counted + 4096);
}

/// A port read the VMM answered, but KVM has not put into al yet, arrives: the guest does not ask again.
#[test]
fn an_answered_port_read_travels() {
    let Some(mut source) = Guest::new(SHAPE) else { return };
    source.start_at(0, &READ_SENSOR);
    match source.vcpus[0].run().unwrap() {
        VcpuExit::IoIn(SENSOR, data) => data[0] = 0x5a,
        other => panic!("unexpected exit {other:?}"),
    }
    let mut target = Guest::new(SHAPE).unwrap();
    moved(&source, &target);
    assert_eq!(target.run(0), 0x5a);
    // At the source, too, after a failed migration.
    assert_eq!(source.run(0), 0x5a);
}

/// A read across two pages of a device is two exits: the second has to be handled before the state is complete.
#[test]
fn a_further_exit_is_asked_for() {
    let Some(mut source) = Guest::new(SHAPE) else { return };
    source.start_at(0, &READ_RBX);
    let mut regs = source.vcpus[0].get_regs().unwrap();
    regs.rbx = HOLE + 0xffc;
    source.vcpus[0].set_regs(&regs).unwrap();
    match source.vcpus[0].run().unwrap() {
        VcpuExit::MmioRead(at, data) if at == HOLE + 0xffc => data.copy_from_slice(&[1, 2, 3, 4]),
        other => panic!("unexpected exit {other:?}"),
    }
    let kvm = attached(&source);
    for _ in 0..2 {
        let error = kvm.ready(None).unwrap_err();
        assert!(error.errno() == libc::EBUSY && error.text().contains("vCPU 0 needs its next exit"), "{error}");
        assert_eq!(kvm.unfinished(), [0]);
    }
    assert_eq!(save(&kvm).err().map(|error| error.errno()), Some(libc::EBUSY));
    let asked = Mutex::new(Vec::new());
    {
        let vcpu = Mutex::new(&mut source.vcpus[0]);
        let answer = |index: usize| {
            let mut vcpu = vcpu.lock().unwrap();
            // SAFETY: the exit reason is MMIO, so KVM filled that arm.
            let mmio = unsafe { &mut vcpu.get_kvm_run().__bindgen_anon_1.mmio };
            mmio.data[..4].copy_from_slice(&[5, 6, 7, 8]);
            asked.lock().unwrap().push((index, mmio.phys_addr, mmio.len));
            Ok(())
        };
        kvm.ready(Some(&answer)).unwrap();
    }
    assert_eq!(*asked.lock().unwrap(), [(0, HOLE + 0x1000, 4)]);
    let mut target = Guest::new(SHAPE).unwrap();
    moved(&source, &target);
    target.run(0);
    assert_eq!(target.read_u64(DATA).to_le_bytes(), [1, 2, 3, 4, 5, 6, 7, 8]);
}

/// A vCPU that was not parked is named in time, for every call that needs it, and is fine once it is.
#[test]
fn a_running_vcpu_is_named_instead_of_waited_for() {
    let Some(mut guest) = Guest::new(Shape { vcpus: 2, ..SHAPE }) else { return };
    guest.start_at(0, &WAIT_FLAG);
    guest.start_at(1, &WAIT_FLAG);
    guest.vcpus[1].set_mp_state(kvm_mp_state { mp_state: kvm_bindings::KVM_MP_STATE_RUNNABLE }).unwrap();
    let threads = Arc::new(Threads::new());
    let kvm = attach(Arc::clone(&threads), guest.vm.as_raw_fd(), &guest.vcpu_fds()).unwrap();
    kvm.set_stop_timeout(Duration::from_millis(100));
    kvm.ready(None).unwrap();
    let mut running = guest.vcpus.remove(1);
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            let exit = running.run();
            assert!(matches!(exit, Ok(VcpuExit::IoOut(..))), "{exit:?}");
        });
        // Attaching and asking what there is does not wait for it.
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(kvm.sections().unwrap().len(), 5);
        for detail in ["waited 100 ms", "since an earlier attempt"] {
            let begin = Instant::now();
            let error = kvm.ready(None).unwrap_err();
            assert!(begin.elapsed() < Duration::from_secs(2));
            assert_eq!(error.errno(), libc::ETIMEDOUT);
            assert!(error.text().contains("vCPU 1 is still inside KVM_RUN"), "{error}");
            assert!(error.text().contains(detail), "{error}");
        }
        kvm.rest();
        let end = Instant::now() + Duration::from_secs(10);
        while threads.list().len() > 1 {
            assert!(Instant::now() < end, "only the thread of the stuck vCPU stays");
        }
        guest.write(DATA, &[1]);
        thread.join().unwrap();
    });
    let end = Instant::now() + Duration::from_secs(10);
    while let Err(error) = kvm.ready(None) {
        assert!(Instant::now() < end, "{error}");
    }
    save(&kvm).unwrap();
    drop(kvm);
    threads.join_all(Some(Duration::from_secs(1))).unwrap();
}

#[test]
fn kvmclock_does_not_see_the_pause() {
    let Some(guest) = Guest::new(SHAPE) else { return };
    let now = || guest.vm.get_clock().unwrap().clock;
    let kvm = attached(&guest);
    let before = now();
    kvm.clock_stop().unwrap();
    std::thread::sleep(Duration::from_millis(600));
    let free = now() - before;
    assert!(free >= 600_000_000, "the clock goes on by itself");
    kvm.clock_start().unwrap();
    assert!(now() - before < 300_000_000);
    // At the destination the pause is the whole way.
    kvm.clock_stop().unwrap();
    let saved = save(&kvm).unwrap();
    let target = Guest::new(SHAPE).unwrap();
    let other = attached(&target);
    load(&other, &saved).unwrap();
    std::thread::sleep(Duration::from_millis(600));
    other.clock_start().unwrap();
    let clock = number(&saved.last().unwrap().1);
    let there = target.vm.get_clock().unwrap().clock;
    assert!(there >= clock && there - clock < 300_000_000, "{clock} became {there}");
    // Nothing is left to write: a second start changes nothing.
    other.clock_start().unwrap();
    assert!(target.vm.get_clock().unwrap().clock >= there);
}

#[test]
fn a_vm_without_interrupt_controller_has_fewer_sections() {
    let bare = Shape { irqchip: false, ..SHAPE };
    let Some(mut source) = Guest::new(bare) else { return };
    source.start_at(0, &COUNT_XMM);
    source.run(0);
    let counted = source.read_u64(DATA);
    let mut target = Guest::new(bare).unwrap();
    let (saved, _) = moved(&source, &target);
    let names: Vec<_> = saved.iter().map(|(entry, _)| entry.name).collect();
    assert_eq!(names, ["kvm-vcpu", "kvm-clock"]);
    target.run(0);
    assert_eq!(target.read_u64(DATA), counted + 4096);
    // A vCPU with a lapic does not fit into a VM without.
    let full = save(&attached(&Guest::new(SHAPE).unwrap())).unwrap();
    let vcpu: Vec<_> = full.into_iter().filter(|(entry, _)| entry.name == "kvm-vcpu").collect();
    let error = load(&attached(&Guest::new(bare).unwrap()), &vcpu).unwrap_err();
    assert!(error.to_string().contains("section 'kvm-vcpu/0'"), "{error}");
    assert!(error.to_string().contains("no interrupt controller in the kernel"), "{error}");
}

#[test]
fn what_is_not_a_vcpu_is_refused() {
    let Some(guest) = Guest::new(SHAPE) else { return };
    let threads = Arc::new(Threads::new());
    let null = std::fs::File::open("/dev/null").unwrap();
    let wrong = |vcpu| attach(Arc::clone(&threads), guest.vm.as_raw_fd(), &[guest.vcpus[0].as_raw_fd(), vcpu]);
    // SAFETY: epoll_create1 takes flags and touches no memory.
    let epoll = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
    // SAFETY: the kernel just made it, for nobody else.
    let epoll = unsafe { OwnedFd::from_raw_fd(epoll) };
    for fd in [null.as_raw_fd(), guest.vm.as_raw_fd(), epoll.as_raw_fd()] {
        let error = wrong(fd).unwrap_err();
        assert!(error.text().contains(&format!("vCPU 1: fd {fd} is not a KVM vCPU")), "{error}");
    }
    assert_eq!(wrong(-1).unwrap_err().errno(), libc::EBADF);
    let error = attach(Arc::clone(&threads), guest.vcpus[0].as_raw_fd(), &[]).unwrap_err();
    assert!(error.text().contains("is not a KVM VM"), "{error}");
}

/// A body cut anywhere is refused before the vCPU is touched.
#[test]
fn a_truncated_body_leaves_the_vcpu_alone() {
    let Some(source) = busy_guest() else { return };
    let target = Guest::new(PAIR).unwrap();
    let saved = save(&attached(&source)).unwrap();
    let kvm = attached(&target);
    let before = save(&kvm).unwrap();
    for ((entry, body), to) in saved.iter().zip(kvm.sections().unwrap()) {
        for len in (0..body.len()).step_by(97).chain([body.len() - 1]) {
            let error = to.section.parse(Part::Full, 1, &mut Slice::new(&body[..len])).err();
            assert!(error.is_some_and(|e| e.errno() == libc::EIO), "{entry:?} cut to {len} bytes");
        }
    }
    for ((entry, one), (_, two)) in before.iter().zip(save(&kvm).unwrap()) {
        if entry.name != "kvm-clock" {
            assert_eq!(differing(entry, one, &two), [""; 0]);
        }
    }
}
