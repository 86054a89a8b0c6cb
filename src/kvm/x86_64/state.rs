//! The shapes: what is saved of a vCPU, the interrupt controllers, the PIT and the clock.

use std::sync::Arc;

use kvm_bindings::{
    kvm_debugregs, kvm_pic_state, kvm_pit_channel_state, kvm_regs, kvm_sregs2, kvm_vcpu_events, kvm_xcr,
};

use crate::kvm::layout::{Cell, counted, nested, rows, table};
use crate::section::table::{Kind, Table};
use crate::sys::kvm_x86::{IoApic, MSRS_MAX, XSAVE_MAX};

/// CPUID entries KVM takes at most.
pub(super) const CPUID_MAX: usize = 256;

/// Bytes of the local APIC's register page.
pub(super) const LAPIC_BYTES: usize = 1024;

/// One CPUID entry; a structure of our own because the kernel's has padding.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct CpuidEntry {
    pub(super) function: u32,
    pub(super) index: u32,
    pub(super) flags: u32,
    pub(super) eax: u32,
    pub(super) ebx: u32,
    pub(super) ecx: u32,
    pub(super) edx: u32,
}

/// One MSR.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Msr {
    pub(super) index: u32,
    pub(super) data: u64,
}

nested! {
    CpuidEntry, "cpuid-entry": function, index, flags, eax, ebx, ecx, edx;
    Msr, "msr": index, data;
    kvm_pic_state, "pic": last_irr, irr, imr, isr, priority_add, irq_base, read_reg_select, poll, special_mask,
        init_state, auto_eoi, rotate_on_auto_eoi, special_fully_nested_mode, init4, elcr, elcr_mask;
    IoApic, "ioapic": base_address, ioregsel, id, irr, redirects;
}

/// A vCPU.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct VcpuState {
    pub(super) mp_state: u32,
    pub(super) tsc_khz: u32,
    pub(super) cpuid_len: u32,
    pub(super) cpuid: [CpuidEntry; CPUID_MAX],
    pub(super) regs: kvm_regs,
    pub(super) sregs: kvm_sregs2,
    pub(super) xcrs_len: u32,
    pub(super) xcrs: [kvm_xcr; 16],
    pub(super) xsave_len: u32,
    pub(super) xsave: [u8; XSAVE_MAX],
    pub(super) debug: kvm_debugregs,
    /// 0 without a local APIC in the kernel.
    pub(super) lapic_len: u32,
    pub(super) lapic: [i8; LAPIC_BYTES],
    /// The TSC first: what depends on it follows.
    pub(super) msrs_len: u32,
    pub(super) msrs: [Msr; MSRS_MAX],
    pub(super) events: kvm_vcpu_events,
    /// Shadow stack pointer, which is no MSR; 0 where the vCPU has none.
    pub(super) ssp: u64,
}

impl Default for VcpuState {
    fn default() -> Self {
        Self {
            mp_state: 0,
            tsc_khz: 0,
            cpuid_len: 0,
            cpuid: [CpuidEntry::default(); CPUID_MAX],
            regs: kvm_regs::default(),
            sregs: kvm_sregs2::default(),
            xcrs_len: 0,
            xcrs: [kvm_xcr::default(); 16],
            xsave_len: 0,
            xsave: [0; XSAVE_MAX],
            debug: kvm_debugregs::default(),
            lapic_len: 0,
            lapic: [0; LAPIC_BYTES],
            msrs_len: 0,
            msrs: [Msr::default(); MSRS_MAX],
            events: kvm_vcpu_events::default(),
            ssp: 0,
        }
    }
}

/// The filled part of an array whose length a peer chose.
pub(super) fn filled<T>(array: &[T], len: u32) -> &[T] {
    let len = usize::try_from(len).unwrap_or(usize::MAX).min(array.len());
    &array[..len]
}

impl VcpuState {
    pub(super) fn cpuid(&self) -> &[CpuidEntry] {
        filled(&self.cpuid, self.cpuid_len)
    }

    pub(super) fn msrs(&self) -> &[Msr] {
        filled(&self.msrs, self.msrs_len)
    }
}

/// Both PICs and the I/O APIC.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct IrqchipState {
    pub(super) master: kvm_pic_state,
    pub(super) slave: kvm_pic_state,
    pub(super) ioapic: IoApic,
}

/// The PIT.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct PitState {
    pub(super) channels: [kvm_pit_channel_state; 3],
    pub(super) flags: u32,
}

/// The guest's kvmclock, in nanoseconds, as it stood when the vCPUs had stopped.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct ClockState {
    pub(super) clock: u64,
}

/// A structure with a table; plain data in which every bit pattern is a value.
pub(super) trait State: Copy + Default + Send + Sync + 'static {
    const NAME: &'static str;
    fn table() -> Table;
}

impl State for VcpuState {
    const NAME: &'static str = "kvm-vcpu";

    fn table() -> Table {
        let fields = rows!(VcpuState:
            mp_state, tsc_khz, cpuid_len, cpuid,
            regs.rax, regs.rbx, regs.rcx, regs.rdx, regs.rsi, regs.rdi, regs.rsp, regs.rbp,
            regs.r8, regs.r9, regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15, regs.rip, regs.rflags,
            sregs.cs, sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss, sregs.tr, sregs.ldt, sregs.gdt, sregs.idt,
            sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4, sregs.cr8, sregs.efer, sregs.apic_base, sregs.flags,
            sregs.pdptrs,
            xcrs_len, xcrs, xsave_len, xsave,
            debug.db, debug.dr6, debug.dr7, debug.flags,
            lapic_len, lapic, msrs_len, msrs,
            events.exception.injected, events.exception.nr, events.exception.has_error_code,
            events.exception.pending, events.exception.error_code,
            events.interrupt.injected, events.interrupt.nr, events.interrupt.soft, events.interrupt.shadow,
            events.nmi.injected, events.nmi.pending, events.nmi.masked,
            events.sipi_vector, events.flags,
            events.smi.smm, events.smi.pending, events.smi.smm_inside_nmi, events.smi.latched_init,
            events.triple_fault.pending, events.exception_has_payload, events.exception_payload,
            ssp,
        );
        let fields = counted(fields, "cpuid", "cpuid_len");
        let fields = counted(fields, "xcrs", "xcrs_len");
        let fields = counted(fields, "xsave", "xsave_len");
        let fields = counted(fields, "lapic", "lapic_len");
        table(Self::NAME, counted(fields, "msrs", "msrs_len"))
    }
}

impl State for IrqchipState {
    const NAME: &'static str = "kvm-irqchip";

    fn table() -> Table {
        table(Self::NAME, rows!(IrqchipState: master, slave, ioapic))
    }
}

impl State for PitState {
    const NAME: &'static str = "kvm-pit";

    fn table() -> Table {
        table(Self::NAME, rows!(PitState: channels, flags))
    }
}

impl State for ClockState {
    const NAME: &'static str = "kvm-clock";

    fn table() -> Table {
        table(Self::NAME, rows!(ClockState: clock))
    }
}
