//! KVM's x86 state: what `kvm-ioctls` leaves unsafe or does not wrap, and fds of the caller.
#![allow(unsafe_code, reason = "fds of the caller, unions of the kernel's ABI and ioctls kvm-ioctls does not wrap")]

use std::os::fd::{AsRawFd, IntoRawFd, RawFd};

use kvm_bindings::{
    KVM_CAP_ADJUST_CLOCK, KVM_CAP_DEBUGREGS, KVM_CAP_EXCEPTION_PAYLOAD, KVM_CAP_MP_STATE, KVM_CAP_SREGS2,
    KVM_CAP_TSC_CONTROL, KVM_CAP_TSC_DEADLINE_TIMER, KVM_CAP_VCPU_EVENTS, KVM_CAP_X86_SMM,
    KVM_CAP_X86_TRIPLE_FAULT_EVENT, KVM_CAP_XCRS, KVM_CAP_XSAVE, KVM_CAP_XSAVE2, KVM_IRQCHIP_IOAPIC,
    KVM_MAX_CPUID_ENTRIES, KVM_STATE_NESTED_FORMAT_VMX, KVM_STATE_NESTED_GUEST_MODE, kvm_ioapic_state, kvm_irqchip,
    kvm_pic_state, kvm_sregs2, kvm_xsave,
};
use kvm_ioctls::{Kvm, KvmNestedStateBuffer, VcpuFd, VmFd};

use super::kvm::{check_kind, dup, errno, ior, iow};
use crate::error::{Error, Result, strerror};

const GET_XSAVE: libc::c_ulong = ior::<kvm_xsave>(0xa4);
const SET_XSAVE: libc::c_ulong = iow::<kvm_xsave>(0xa5);
const GET_SREGS2: libc::c_ulong = ior::<kvm_sregs2>(0xcc);
const SET_SREGS2: libc::c_ulong = iow::<kvm_sregs2>(0xcd);
/// Declared with the old structure, although it writes as much as `KVM_CAP_XSAVE2` says.
const GET_XSAVE2: libc::c_ulong = ior::<kvm_xsave>(0xcf);

/// Room for a vCPU's xsave area; AMX, the largest component today, makes it 11 KiB.
pub const XSAVE_MAX: usize = 16 << 10;

/// `KVM_NMSR`-like limit of the kernel: entries in one `KVM_GET_MSRS` or `KVM_SET_MSRS`.
pub const MSRS_MAX: usize = 256;

/// Capabilities without which state that a vCPU may have is lost on the way.
const NEEDED: [(u32, &str); 10] = [
    (KVM_CAP_MP_STATE, "mp-state"),
    (KVM_CAP_ADJUST_CLOCK, "adjust-clock"),
    (KVM_CAP_VCPU_EVENTS, "vcpu-events"),
    (KVM_CAP_DEBUGREGS, "debugregs"),
    (KVM_CAP_XSAVE, "xsave"),
    (KVM_CAP_XCRS, "xcrs"),
    (KVM_CAP_TSC_DEADLINE_TIMER, "tsc-deadline-timer"),
    (KVM_CAP_X86_SMM, "smm"),
    (KVM_CAP_EXCEPTION_PAYLOAD, "exception-payload"),
    (KVM_CAP_X86_TRIPLE_FAULT_EVENT, "triple-fault-event"),
];

/// An error of a KVM call, as `what: strerror`.
pub fn failed(what: impl std::fmt::Display, error: &kvm_ioctls::Error) -> Error {
    Error::new(error.errno().max(1), format!("{what}: {}", strerror(error.errno())))
}

/// The VM: its irqchip, PIT and clock, and what its vCPUs have in common.
#[derive(Debug)]
pub struct Machine {
    kvm: Kvm,
    vm: VmFd,
    features: Features,
}

/// What KVM offers here.
#[derive(Clone, Copy, Debug)]
struct Features {
    sregs2: bool,
    /// Bytes of an xsave area; 0: only the old ioctl of 4 KiB exists.
    xsave2: usize,
}

impl Machine {
    /// Duplicates the caller's VM fd, which was checked to be one.
    pub fn dup(fd: RawFd) -> Result<Self> {
        let kvm = Kvm::new().map_err(|e| failed("opening /dev/kvm (for the list of MSRs)", &e))?;
        let copy = dup(fd, "the VM")?.into_raw_fd();
        // SAFETY: `copy` is a fresh fd that only the VmFd will own, and the caller checked that it is a VM.
        let vm =
            unsafe { kvm.create_vmfd_from_rawfd(copy) }.map_err(|e| failed("asking for the size of kvm_run", &e))?;
        let cap = |cap: u32| usize::try_from(vm.check_extension_raw(cap.into())).unwrap_or(0);
        let features = Features { sregs2: cap(KVM_CAP_SREGS2) > 0, xsave2: cap(KVM_CAP_XSAVE2) };
        if features.xsave2 > XSAVE_MAX {
            return Err(Error::new(libc::ENOSYS, "this host's xsave area is larger than this version of vmig knows")
                .expected_got(format!("at most {XSAVE_MAX} bytes"), features.xsave2));
        }
        Ok(Self { kvm, vm, features })
    }

    /// Duplicates a vCPU fd of the caller and maps its `kvm_run`. Makes no call that waits for a running vCPU.
    pub fn vcpu(&self, fd: RawFd) -> Result<Vcpu> {
        check_kind(fd, "KVM vCPU", "kvm-vcpu")?;
        let copy = dup(fd, "a vCPU")?.into_raw_fd();
        // SAFETY: `copy` is a fresh fd that only the VcpuFd will own.
        let fd = unsafe { self.vm.create_vcpu_from_rawfd(copy) }
            .map_err(|e| failed(format_args!("fd {fd} is not a KVM vCPU: mapping its kvm_run"), &e))?;
        Ok(Vcpu { fd, features: self.features })
    }

    /// The VM's calls that `kvm-ioctls` wraps safely.
    pub fn vm(&self) -> &VmFd {
        &self.vm
    }

    /// Of the capabilities that matter to a vCPU's state those that KVM has here, by name.
    pub fn capabilities(&self) -> Vec<String> {
        let has = |cap: u32| self.vm.check_extension_raw(cap.into()) > 0;
        NEEDED.iter().filter(|(cap, _)| has(*cap)).map(|(_, name)| (*name).to_owned()).collect()
    }

    /// Whether vCPUs can have a TSC of any frequency.
    pub fn tsc_scales(&self) -> bool {
        self.vm.check_extension_raw(KVM_CAP_TSC_CONTROL.into()) > 0
    }

    /// Bytes of a vCPU's xsave area.
    pub fn xsave_size(&self) -> usize {
        self.features.xsave2.max(size_of::<kvm_xsave>())
    }

    /// Components of xsave that KVM keeps of a vCPU, as bits of XCR0 and IA32_XSS.
    pub fn xsave_components(&self) -> Result<u64> {
        let supported = self.kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES);
        let supported = supported.map_err(|e| failed("KVM_GET_SUPPORTED_CPUID", &e))?;
        let leaf = |index| supported.as_slice().iter().find(|e| e.function == 0xd && e.index == index);
        let pair = |low: u32, high: u32| u64::from(high) << 32 | u64::from(low);
        let (user, supervisor) = (leaf(0).map(|e| pair(e.eax, e.edx)), leaf(1).map(|e| pair(e.ecx, e.edx)));
        Ok(user.unwrap_or(0) | supervisor.unwrap_or(0))
    }

    /// Indices of the MSRs a vCPU's state consists of.
    pub fn msr_indices(&self) -> Result<Vec<u32>> {
        let list = self.kvm.get_msr_index_list().map_err(|e| failed("KVM_GET_MSR_INDEX_LIST", &e))?;
        Ok(list.as_slice().to_vec())
    }

    /// One of the two PICs; none if the VM has no interrupt controller in the kernel.
    pub fn pic(&self, chip_id: u32) -> Result<Option<kvm_pic_state>> {
        // SAFETY: KVM filled the `pic` arm for this chip id; any bytes are valid for it.
        Ok(self.chip(chip_id)?.map(|chip| unsafe { chip.chip.pic }))
    }

    /// Writes one of the two PICs.
    pub fn set_pic(&self, chip_id: u32, pic: kvm_pic_state) -> Result<()> {
        let mut chip = kvm_irqchip { chip_id, ..Default::default() };
        chip.chip.pic = pic;
        self.vm.set_irqchip(&chip).map_err(|e| failed(format_args!("KVM_SET_IRQCHIP (PIC {chip_id})"), &e))
    }

    /// The I/O APIC; none if the VM has no interrupt controller in the kernel.
    pub fn ioapic(&self) -> Result<Option<IoApic>> {
        let Some(chip) = self.chip(KVM_IRQCHIP_IOAPIC)? else { return Ok(None) };
        // SAFETY: KVM filled the `ioapic` arm for this chip id; any bytes are valid for it.
        let state = unsafe { chip.chip.ioapic };
        let mut redirects = [0; 24];
        for (to, from) in redirects.iter_mut().zip(&state.redirtbl) {
            // SAFETY: both arms of an entry are the same 64 bits.
            *to = unsafe { from.bits };
        }
        let kvm_ioapic_state { base_address, ioregsel, id, irr, .. } = state;
        Ok(Some(IoApic { base_address, ioregsel, id, irr, redirects }))
    }

    /// Writes the I/O APIC.
    pub fn set_ioapic(&self, ioapic: &IoApic) -> Result<()> {
        let IoApic { base_address, ioregsel, id, irr, redirects } = *ioapic;
        let mut state = kvm_ioapic_state { base_address, ioregsel, id, irr, ..Default::default() };
        for (to, from) in state.redirtbl.iter_mut().zip(redirects) {
            to.bits = from;
        }
        let mut chip = kvm_irqchip { chip_id: KVM_IRQCHIP_IOAPIC, ..Default::default() };
        chip.chip.ioapic = state;
        self.vm.set_irqchip(&chip).map_err(|e| failed("KVM_SET_IRQCHIP (I/O APIC)", &e))
    }

    fn chip(&self, chip_id: u32) -> Result<Option<kvm_irqchip>> {
        let mut chip = kvm_irqchip { chip_id, ..Default::default() };
        match self.vm.get_irqchip(&mut chip) {
            Ok(()) => Ok(Some(chip)),
            Err(e) if e.errno() == libc::ENXIO => Ok(None),
            Err(e) => Err(failed(format_args!("KVM_GET_IRQCHIP {chip_id}"), &e)),
        }
    }
}

/// State of the I/O APIC, its redirection entries as plain integers.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IoApic {
    /// Where its registers are in guest memory.
    pub base_address: u64,
    /// Selected register.
    pub ioregsel: u32,
    /// Its id.
    pub id: u32,
    /// Lines that are up.
    pub irr: u32,
    /// Redirection table.
    pub redirects: [u64; 24],
}

/// A vCPU fd of the caller, duplicated, with `kvm_run` mapped a second time.
#[derive(Debug)]
pub struct Vcpu {
    fd: VcpuFd,
    features: Features,
}

impl Vcpu {
    /// The vCPU's calls that `kvm-ioctls` wraps safely.
    pub fn fd(&self) -> &VcpuFd {
        &self.fd
    }

    /// Waits until the vCPU is outside `KVM_RUN` and finds out whether the fd is a vCPU; changes nothing.
    pub fn probe(&self) -> Result<()> {
        self.fd.get_regs().map(drop).map_err(|e| match e.errno() {
            libc::ENOTTY => Error::invalid("the fd is not a KVM vCPU"),
            libc::EIO => Error::new(libc::EIO, "the vCPU belongs to another process"),
            _ => failed("KVM_GET_REGS", &e),
        })
    }

    /// Lets KVM finish the last exit without running the guest. Some(reason): that led to a further exit, which the
    /// VMM has to handle.
    ///
    /// The VMM may use `immediate_exit` to kick its vCPU threads, so its value is put back.
    pub fn complete_exit(&mut self) -> Result<Option<u32>> {
        let before = self.fd.get_kvm_run().immediate_exit;
        self.fd.set_kvm_immediate_exit(1);
        let done = match self.fd.run() {
            Ok(_) => Ok(()),
            Err(e) => Err(e),
        };
        self.fd.set_kvm_immediate_exit(before);
        match done {
            Ok(()) => Ok(Some(self.fd.get_kvm_run().exit_reason)),
            // EAGAIN: a vCPU that was never started; it has nothing to finish.
            Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => Ok(None),
            Err(e) => Err(failed("KVM_RUN with immediate_exit", &e)),
        }
    }

    /// Without an interrupt controller in the kernel KVM takes CR8 from `kvm_run` at each entry.
    pub fn set_run_cr8(&mut self, cr8: u64) {
        self.fd.get_kvm_run().cr8 = cr8;
    }

    /// Segment, control and table registers; PDPTRs too where the kernel keeps them (see `flags`).
    pub fn sregs2(&self) -> Result<kvm_sregs2> {
        let mut sregs = kvm_sregs2::default();
        if self.features.sregs2 {
            // SAFETY: the kernel writes one kvm_sregs2 into `sregs`.
            let done = unsafe { libc::ioctl(self.fd.as_raw_fd(), GET_SREGS2, &raw mut sregs) };
            return check(done, "KVM_GET_SREGS2").map(|()| sregs);
        }
        let old = self.fd.get_sregs().map_err(|e| failed("KVM_GET_SREGS", &e))?;
        (sregs.cs, sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) =
            (old.cs, old.ds, old.es, old.fs, old.gs, old.ss);
        (sregs.tr, sregs.ldt, sregs.gdt, sregs.idt) = (old.tr, old.ldt, old.gdt, old.idt);
        (sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4, sregs.cr8) = (old.cr0, old.cr2, old.cr3, old.cr4, old.cr8);
        (sregs.efer, sregs.apic_base) = (old.efer, old.apic_base);
        Ok(sregs)
    }

    /// Writes them; with the old ioctl KVM reads the PDPTRs from guest memory, as CR3 says.
    pub fn set_sregs2(&self, sregs: &kvm_sregs2) -> Result<()> {
        if self.features.sregs2 {
            // SAFETY: the kernel reads one kvm_sregs2.
            let done = unsafe { libc::ioctl(self.fd.as_raw_fd(), SET_SREGS2, std::ptr::from_ref(sregs)) };
            return check(done, "KVM_SET_SREGS2");
        }
        let mut old = kvm_bindings::kvm_sregs::default();
        let new = sregs;
        (old.cs, old.ds, old.es, old.fs, old.gs, old.ss) = (new.cs, new.ds, new.es, new.fs, new.gs, new.ss);
        (old.tr, old.ldt, old.gdt, old.idt) = (new.tr, new.ldt, new.gdt, new.idt);
        (old.cr0, old.cr2, old.cr3, old.cr4, old.cr8) = (new.cr0, new.cr2, new.cr3, new.cr4, new.cr8);
        (old.efer, old.apic_base) = (new.efer, new.apic_base);
        self.fd.set_sregs(&old).map_err(|e| failed("KVM_SET_SREGS", &e))
    }

    /// The floating point and vector state; returns how many bytes of `area` it takes.
    pub fn xsave(&self, area: &mut [u8; XSAVE_MAX]) -> Result<usize> {
        let (request, size, name) = match self.features.xsave2 {
            0 => (GET_XSAVE, size_of::<kvm_xsave>(), "KVM_GET_XSAVE"),
            size => (GET_XSAVE2, size, "KVM_GET_XSAVE2"),
        };
        // SAFETY: the kernel writes at most KVM_CAP_XSAVE2 (or 4096) bytes, which attaching checked to fit.
        let done = unsafe { libc::ioctl(self.fd.as_raw_fd(), request, area.as_mut_ptr()) };
        check(done, name).map(|()| size)
    }

    /// Writes the floating point and vector state; what it needs beyond the saved bytes is zero, the initial state.
    pub fn set_xsave(&self, area: &[u8; XSAVE_MAX]) -> Result<()> {
        // SAFETY: the kernel reads at most KVM_CAP_XSAVE2 (or 4096) bytes, which attaching checked to fit.
        let done = unsafe { libc::ioctl(self.fd.as_raw_fd(), SET_XSAVE, area.as_ptr()) };
        check(done, "KVM_SET_XSAVE")
    }

    /// Whether the guest uses nested virtualization right now.
    pub fn nested(&self) -> Result<bool> {
        let mut state = KvmNestedStateBuffer::empty();
        match self.fd.nested_state(&mut state) {
            // More than a header: there is a VMCS or VMCB of an L2 guest.
            Ok(Some(_)) => Ok(true),
            Ok(None) if u32::from(state.format) == KVM_STATE_NESTED_FORMAT_VMX => {
                // SAFETY: the format says that KVM filled the `vmx` arm.
                let vmx = unsafe { state.hdr.vmx };
                // All ones: VMXON was not executed; 0: KVM has no VMX to tell about.
                Ok(!matches!(vmx.vmxon_pa, u64::MAX | 0))
            }
            Ok(None) => Ok(u32::from(state.flags) & KVM_STATE_NESTED_GUEST_MODE != 0),
            // Kernels without nested virtualization have no such call.
            Err(e) if matches!(e.errno(), libc::EINVAL | libc::ENOTTY) => Ok(false),
            Err(e) => Err(failed("KVM_GET_NESTED_STATE", &e)),
        }
    }
}

fn check(done: libc::c_int, what: &str) -> Result<()> {
    if done >= 0 {
        return Ok(());
    }
    let errno = errno();
    Err(Error::new(errno, format!("{what}: {}", strerror(errno))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::kvm_guest::{COUNT_XMM, Guest, Shape};

    /// Kernels before 5.16 and 5.17 lack the newer calls: what the older ones give must be the same.
    #[test]
    fn the_older_calls_give_the_same_state() {
        let Some(mut guest) = Guest::new(Shape { vcpus: 1, irqchip: true, cpuid: true }) else { return };
        guest.start_at(0, &COUNT_XMM);
        guest.run(0);
        let machine = Machine::dup(guest.vm.as_raw_fd()).unwrap();
        let new = machine.vcpu(guest.vcpu_fds()[0]).unwrap();
        let mut old = machine.vcpu(guest.vcpu_fds()[0]).unwrap();
        old.features = Features { sregs2: false, xsave2: 0 };
        let mut sregs = new.sregs2().unwrap();
        assert_eq!(old.sregs2().unwrap(), sregs);
        let (mut one, mut two) = (Box::new([0; XSAVE_MAX]), Box::new([0; XSAVE_MAX]));
        let (large, small) = (new.xsave(&mut one).unwrap(), old.xsave(&mut two).unwrap());
        assert!(large >= small && small == 4096);
        assert_eq!(one[..small], two[..small]);
        // And what is written by the older ones is read by the newer ones.
        sregs.cr2 = 0x1234_5000;
        two[160] ^= 0xff;
        old.set_sregs2(&sregs).unwrap();
        old.set_xsave(&two).unwrap();
        assert_eq!(new.sregs2().unwrap(), sregs);
        new.xsave(&mut one).unwrap();
        assert_eq!(one[..small], two[..small]);
    }
}
