//! A small real KVM guest: flat 64-bit paging, code in ring 3, so that it also runs natively where KVM itself runs
//! without hardware virtualization.
#![allow(unsafe_code, reason = "guest memory is mapped and shared with the guest")]
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "test support outside of test functions; the numbers are small"
)]
#![allow(unreachable_pub, reason = "shared by unit tests and tests of the crate's outside")]
#![allow(dead_code, reason = "each test uses its own part of this")]

use std::os::fd::{AsRawFd, RawFd};

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_pit_config, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};

/// Guest memory of a VM, at guest physical 0.
pub const MEM: usize = 8 << 20;
/// Where guest code starts.
pub const CODE: u64 = 0x1_0000;
/// Where guest data starts.
pub const DATA: u64 = 0x20_0000;
/// The port whose write ends a run of [`Guest::run`].
pub const DOORBELL: u16 = 0x10;
/// Mapped by the guest's tables, but no memory.
pub const HOLE: u64 = MEM as u64;
/// A port the guest reads.
pub const SENSOR: u16 = 0x30;

const PML4: u64 = 0x4000;
const PDPT: u64 = 0x5000;
const PD: u64 = 0x6000;

/// Counts in r12 and at [rsi], and rings the doorbell every rcx rounds, then every 4096.
pub const COUNT: [u8; 22] = [
    0x49, 0xff, 0xc4, // inc r12
    0x4c, 0x89, 0x26, // mov [rsi], r12
    0x48, 0xff, 0xc9, // dec rcx
    0x75, 0xf5, // jnz 0
    0xe6, 0x10, // out DOORBELL, al
    0x48, 0xc7, 0xc1, 0x00, 0x10, 0x00, 0x00, // mov rcx, 4096
    0xeb, 0xea, // jmp 0
];

/// Writes r12 to rcx pages from rsi on, then rings for ever.
pub const WRITE_PAGES: [u8; 19] = [
    0x4c, 0x89, 0x26, // mov [rsi], r12
    0x48, 0x81, 0xc6, 0x00, 0x10, 0x00, 0x00, // add rsi, 4096
    0x48, 0xff, 0xc9, // dec rcx
    0x75, 0xf1, // jnz 0
    0xe6, 0x10, // out DOORBELL, al
    0xeb, 0xfc, // jmp out
];

/// Reads the sensor, then rings with its value, for ever.
pub const READ_SENSOR: [u8; 6] = [
    0xe4, 0x30, // in al, SENSOR
    0xe6, 0x10, // out DOORBELL, al
    0xeb, 0xfa, // jmp 0
];

/// As [`COUNT`], and adds xmm1 to xmm0 each round, whose low half goes to [rsi + 8].
pub const COUNT_XMM: [u8; 35] = [
    0x66, 0x0f, 0xd4, 0xc1, // paddq xmm0, xmm1
    0x66, 0x48, 0x0f, 0x7e, 0xc0, // movq rax, xmm0
    0x48, 0x89, 0x46, 0x08, // mov [rsi + 8], rax
    0x49, 0xff, 0xc4, // inc r12
    0x4c, 0x89, 0x26, // mov [rsi], r12
    0x48, 0xff, 0xc9, // dec rcx
    0x75, 0xe8, // jnz 0
    0xe6, 0x10, // out DOORBELL, al
    0x48, 0xc7, 0xc1, 0x00, 0x10, 0x00, 0x00, // mov rcx, 4096
    0xeb, 0xdd, // jmp 0
];

/// Turns until [rsi] is not 0, then rings.
pub const WAIT_FLAG: [u8; 9] = [
    0x80, 0x3e, 0x00, // cmp byte [rsi], 0
    0x74, 0xfb, // je 0
    0xe6, 0x10, // out DOORBELL, al
    0xeb, 0xfc, // jmp out
];

/// Reads 8 bytes at [rbx] into rax and to [rsi], then rings.
pub const READ_RBX: [u8; 10] = [
    0x48, 0x8b, 0x03, // mov rax, [rbx]
    0x48, 0x89, 0x06, // mov [rsi], rax
    0xe6, 0x10, // out DOORBELL, al
    0xeb, 0xfc, // jmp out
];

pub struct Guest {
    pub vcpus: Vec<VcpuFd>,
    pub vm: VmFd,
    pub kvm: Kvm,
    pub mem: *mut u8,
}

// SAFETY: the mapping is not tied to a thread; tests read it only while the guest is stopped.
unsafe impl Send for Guest {}

#[derive(Clone, Copy)]
pub struct Shape {
    pub vcpus: usize,
    pub irqchip: bool,
    pub cpuid: bool,
}

/// /dev/kvm, or None with the reason printed.
pub fn kvm() -> Option<Kvm> {
    match Kvm::new() {
        Ok(kvm) => Some(kvm),
        Err(error) => {
            eprintln!("SKIP: /dev/kvm: {error}");
            None
        }
    }
}

impl Guest {
    pub fn new(shape: Shape) -> Option<Self> {
        Self::prepared(shape, |_| ())
    }

    /// A guest to whose VM something is done before it has a vCPU.
    pub fn prepared(shape: Shape, prepare: impl FnOnce(&VmFd)) -> Option<Self> {
        let kvm = kvm()?;
        let vm = kvm.create_vm().unwrap();
        prepare(&vm);
        if shape.irqchip {
            vm.create_irq_chip().unwrap();
            vm.create_pit2(kvm_pit_config::default()).unwrap();
        }
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping of our own.
        let mem = unsafe { libc::mmap(std::ptr::null_mut(), MEM, prot, flags, -1, 0) };
        assert_ne!(mem, libc::MAP_FAILED);
        let mut guest = Self { vcpus: Vec::new(), vm, kvm, mem: mem.cast() };
        guest.set_slot(0, MEM as u64, 0);
        guest.write(PML4, &(PDPT | 0x27).to_le_bytes());
        guest.write(PDPT, &(PD | 0x27).to_le_bytes());
        for n in 0..=(HOLE >> 21) {
            // Present, writable, user, accessed, dirty, 2 MiB.
            guest.write(PD + n * 8, &(n << 21 | 0xe7).to_le_bytes());
        }
        for index in 0..shape.vcpus {
            let vcpu = guest.vm.create_vcpu(index as u64).unwrap();
            if shape.cpuid {
                vcpu.set_cpuid2(&guest.cpuid(index)).unwrap();
            }
            guest.vcpus.push(vcpu);
        }
        Some(guest)
    }

    /// CPUID of vCPU `index`: what KVM supports, with its APIC id.
    pub fn cpuid(&self, index: usize) -> CpuId {
        let mut cpuid = self.kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap();
        for entry in cpuid.as_mut_slice() {
            match entry.function {
                1 => entry.ebx = entry.ebx & 0x00ff_ffff | (index as u32) << 24,
                0xb | 0x1f => entry.edx = index as u32,
                _ => {}
            }
        }
        cpuid
    }

    pub fn set_slot(&self, slot: u32, len: u64, flags: u32) {
        self.set_part(slot, 0, len, 0, flags);
    }

    /// A slot that shows `len` bytes of the memory from `offset` on at `gpa`.
    pub fn set_part(&self, slot: u32, offset: u64, len: u64, gpa: u64, flags: u32) {
        assert!(offset + len <= MEM as u64);
        let region = kvm_userspace_memory_region {
            slot,
            flags,
            guest_phys_addr: gpa,
            memory_size: len,
            userspace_addr: self.mem as u64 + offset,
        };
        // SAFETY: the mapping outlives the VM's use of it.
        unsafe { self.vm.set_user_memory_region(region) }.unwrap();
    }

    /// Puts `code` at [`CODE`] and vCPU `index` into ring 3 at its start.
    pub fn start_at(&self, index: usize, code: &[u8]) {
        self.write(CODE, code);
        self.enter_ring3(index);
    }

    pub fn enter_ring3(&self, index: usize) {
        let vcpu = &self.vcpus[index];
        let mut sregs = vcpu.get_sregs().unwrap();
        let flat = |selector: u16, type_: u8, l: u8| kvm_segment {
            base: 0,
            limit: u32::MAX,
            selector,
            type_,
            present: 1,
            dpl: 3,
            db: 1 - l,
            s: 1,
            l,
            g: 1,
            ..Default::default()
        };
        sregs.cs = flat(0x33, 11, 1);
        let data = flat(0x2b, 3, 0);
        (sregs.ss, sregs.ds, sregs.es, sregs.fs, sregs.gs) = (data, data, data, data, data);
        // A TSS at 0, all zeros: its I/O bitmap allows every port that is asked for here.
        sregs.tr = kvm_segment { limit: 0x2fff, selector: 0x40, type_: 11, present: 1, ..Default::default() };
        sregs.cr3 = PML4;
        sregs.cr4 = 1 << 5 | 1 << 9 | 1 << 10;
        sregs.cr0 = 0x8000_0033;
        sregs.efer = 0x500;
        vcpu.set_sregs(&sregs).unwrap();
        let mut regs = vcpu.get_regs().unwrap();
        (regs.rip, regs.rsp, regs.rsi, regs.rcx, regs.rflags) = (CODE, 0x2_0000, DATA, 1000, 2);
        vcpu.set_regs(&regs).unwrap();
    }

    /// Runs vCPU `index` until it rings; returns the byte it rang with. Anything else is a failure.
    pub fn run(&mut self, index: usize) -> u8 {
        match self.vcpus[index].run().unwrap() {
            VcpuExit::IoOut(DOORBELL, data) => data[0],
            other => panic!("unexpected exit {other:?}"),
        }
    }

    pub fn write(&self, gpa: u64, bytes: &[u8]) {
        assert!(gpa as usize + bytes.len() <= MEM);
        // SAFETY: inside the mapping, and no vCPU runs.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.mem.wrapping_add(gpa as usize), bytes.len()) };
    }

    pub fn read_u64(&self, gpa: u64) -> u64 {
        assert!(gpa as usize + 8 <= MEM && gpa % 8 == 0);
        // SAFETY: inside the mapping, aligned, and no vCPU runs.
        unsafe { self.mem.wrapping_add(gpa as usize).cast::<u64>().read_volatile() }
    }

    pub fn copy_memory_from(&self, other: &Self) {
        // SAFETY: two mappings of MEM bytes each, no vCPU runs.
        unsafe { std::ptr::copy_nonoverlapping(other.mem, self.mem, MEM) };
    }

    pub fn vcpu_fds(&self) -> Vec<RawFd> {
        self.vcpus.iter().map(AsRawFd::as_raw_fd).collect()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.vcpus.clear();
        // SAFETY: the mapping is ours; the VM may still refer to the addresses but runs no vCPU any more.
        unsafe { libc::munmap(self.mem.cast(), MEM) };
    }
}
