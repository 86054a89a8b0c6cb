//! The guest, and what is done to it.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kvm_bindings::kvm_userspace_memory_region;
use vmig::dirty::choice::Choice;
use vmig::dirty::cursor::Cursor;
use vmig::dirty::hub::Hub;
use vmig::dirty::kvm_log::KvmLog;
use vmig::dirty::kvm_slots::KvmTracker;
use vmig::ram::{BlockSpec, Ram};
use vmig::sys::kvm::Vm;
use vmig::wire::packet::PAGES_MAX;

use crate::kvm_guest::{DATA, Guest, Shape};

const GIB: u64 = 1 << 30;
const SIZES_GIB: [u64; 3] = [1, 8, 16];
/// What the guest writes to: as many pages, however large the slot.
const HOT_PAGES: u64 = GIB / 4096;
/// Where the guest sees the slot.
const BASE: u64 = 4 * GIB;
/// Where its page tables for it are.
const TABLES: u64 = 0x30_0000;
const SLOT: u32 = 1;
const REPEATS: usize = 5;
/// Rounds over what is dirty, in each repeat.
const ROUNDS: usize = 5;
const LOOK: Duration = Duration::from_millis(500);

// Writes page after page and keeps the longest time between two in [rsi]; rings once [rsi + 8] is not 0.
std::arch::global_asm!(
    ".pushsection .rodata",
    "stall_code:",
    "rdtsc",
    "shl rdx, 32",
    "lea r8, [rax + rdx]",
    "2: imul r13, rbx",
    "add r13, r9",
    "mov rcx, r13",
    "shr rcx, 32",
    "imul rcx, r10",
    "shr rcx, 32",
    "imul rcx, r12",
    "inc qword ptr [rdi + rcx]",
    "rdtsc",
    "shl rdx, 32",
    "add rax, rdx",
    "mov rdx, rax",
    "sub rax, r8",
    "mov r8, rdx",
    "cmp rax, [rsi]",
    "jbe 3f",
    "mov [rsi], rax",
    "3: cmp qword ptr [rsi + 8], 0",
    "je 2b",
    "out 0x10, al",
    "stall_code_end:",
    ".popsection",
);
unsafe extern "C" {
    static stall_code: u8;
    static stall_code_end: u8;
}

fn code() -> &'static [u8] {
    let (start, end) = (&raw const stall_code, &raw const stall_code_end);
    // SAFETY: the two symbols are the ends of the constant bytes above.
    unsafe { std::slice::from_raw_parts(start, end.addr() - start.addr()) }
}

fn map(len: u64) -> *mut u8 {
    let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    let len = usize::try_from(len).unwrap();
    // SAFETY: a new mapping of our own.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), len, prot, flags | libc::MAP_NORESERVE, -1, 0) };
    assert_ne!(at, libc::MAP_FAILED);
    at.cast()
}

/// A guest whose slot is `gib` large, ready to run.
fn guest(gib: u64) -> Option<(Guest, *mut u8)> {
    let guest = Guest::new(Shape { vcpus: 1, irqchip: false, cpuid: true })?;
    let host = map(gib * GIB);
    let stride = gib * GIB / HOT_PAGES;
    for page in 0..HOT_PAGES {
        // SAFETY: inside the mapping, which nobody else uses yet.
        unsafe { host.wrapping_add(usize::try_from(page * stride).unwrap()).write(1) };
    }
    for n in 0..gib {
        let directory = TABLES + n * 4096;
        // Present, writable, user, accessed, dirty; 2 MiB each.
        guest.write(0x5000 + (BASE / GIB + n) * 8, &(directory | 0x27).to_le_bytes());
        for entry in 0..512 {
            guest.write(directory + entry * 8, &((BASE + n * GIB + (entry << 21)) | 0xe7).to_le_bytes());
        }
    }
    let region = kvm_userspace_memory_region {
        slot: SLOT,
        flags: 0,
        guest_phys_addr: BASE,
        memory_size: gib * GIB,
        userspace_addr: host as u64,
    };
    // SAFETY: the mapping stays until the process ends.
    unsafe { guest.vm.set_user_memory_region(region) }.unwrap();
    guest.start_at(0, code());
    let mut regs = guest.vcpus[0].get_regs().unwrap();
    (regs.rdi, regs.r10, regs.r12) = (BASE, HOT_PAGES, stride);
    (regs.rbx, regs.r9, regs.r13) = (6_364_136_223_846_793_005, 1_442_695_040_888_963_407, 1);
    guest.vcpus[0].set_regs(&regs).unwrap();
    Some((guest, host))
}

/// The two words that guest and host share.
struct Shared<'a> {
    longest: &'a AtomicU64,
    end: &'a AtomicU64,
    khz: f64,
}

impl Shared<'_> {
    /// The guest's longest gap in milliseconds while `f` ran, and how long that took.
    fn during<R>(&self, f: impl FnOnce() -> R) -> (f64, f64, R) {
        self.longest.store(0, Ordering::SeqCst);
        let start = Instant::now();
        let result = f();
        let took = start.elapsed().as_secs_f64() * 1e3;
        // A gap that is just ending shows with the next write.
        std::thread::sleep(Duration::from_millis(5));
        (self.longest.load(Ordering::SeqCst) as f64 / self.khz, took, result)
    }
}

const PHASES: [&str; 6] = ["no logging", "switching on", "first round", "reading", "later rounds", "switching off"];

/// Gap and time of each phase, of one guest's life as a source.
fn migrate(shared: &Shared<'_>, hub: &Hub, ram: &Ram) -> [(f64, f64); PHASES.len()] {
    let mut seen = [(0f64, 0f64); PHASES.len()];
    let mut put = |phase: usize, gap: f64, took: f64| {
        seen[phase] = (seen[phase].0.max(gap), seen[phase].1.max(took));
    };
    let (gap, took, ()) = shared.during(|| std::thread::sleep(LOOK));
    put(0, gap, took);
    let (gap, took, set) = shared.during(|| hub.subscribe(&ram.list(), Choice::Auto).unwrap());
    put(1, gap, took);
    for round in 0..ROUNDS {
        let (gap, took, ()) = shared.during(|| {
            let mut cursor = Cursor::default();
            while cursor.take(&set, PAGES_MAX).unwrap() {}
        });
        put(if round == 0 { 2 } else { 4 }, gap, took);
        let (gap, took, ()) = shared.during(|| hub.sync().unwrap());
        put(3, gap, took);
    }
    let (gap, took, ()) = shared.during(|| {
        hub.leave(&set);
        hub.rest();
    });
    put(5, gap, took);
    seen
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn measure_size(gib: u64) -> bool {
    let Some((guest, host)) = guest(gib) else { return false };
    // SAFETY: inside the guest's first mapping, aligned; guest and host use these two words alone.
    let words = unsafe { &*guest.mem.wrapping_add(usize::try_from(DATA).unwrap()).cast::<[AtomicU64; 2]>() };
    let khz = f64::from(guest.vcpus[0].get_tsc_khz().unwrap());
    let shared = Shared { longest: &words[0], end: &words[1], khz };
    let ram = Ram::default();
    let spec = BlockSpec {
        name: "ram".into(),
        host,
        len: gib * GIB,
        gpa: BASE,
        marked: false,
        shared_storage: false,
        file: None,
    };
    let block = ram.add(spec).unwrap();
    let log = KvmLog::new(Vm::dup(guest.vm.as_raw_fd()).unwrap(), None).unwrap();
    log.add_slot(SLOT, 0, &block, 0, gib * GIB, BASE).unwrap();
    let hub = Hub::default();
    hub.add_tracker(Arc::new(log)).unwrap();
    let mut guest = guest;
    std::thread::scope(|scope| {
        let runner = scope.spawn(|| guest.run(0));
        std::thread::sleep(8 * LOOK);
        let lives: Vec<_> = (0..REPEATS).map(|_| migrate(&shared, &hub, &ram)).collect();
        shared.end.store(1, Ordering::SeqCst);
        runner.join().unwrap();
        for (phase, name) in PHASES.iter().enumerate() {
            let of = |f: fn(&(f64, f64)) -> f64| lives.iter().map(|life| f(&life[phase])).collect::<Vec<_>>();
            let (gaps, times) = (of(|v| v.0), of(|v| v.1));
            let most = gaps.iter().copied().fold(0.0, f64::max);
            println!("| {gib} GiB | {name} | {:.2} | {most:.2} | {:.1} |", median(gaps), median(times));
        }
    });
    // SAFETY: the mapping is ours, and no vCPU runs any more.
    unsafe { libc::munmap(host.cast(), usize::try_from(gib * GIB).unwrap()) };
    true
}

pub(crate) fn measure() {
    println!("| slot | what happens | longest stall of {REPEATS}, median ms | worst ms | it takes, median ms |");
    println!("|---|---|---|---|---|");
    for gib in SIZES_GIB {
        if !measure_size(gib) {
            return;
        }
    }
}
