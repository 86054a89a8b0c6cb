//! One vCPU: reading and writing its state in the order KVM wants.

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVM_REG_GUEST_SSP, kvm_cpuid_entry2, kvm_lapic_state, kvm_mp_state,
    kvm_x86_reg_kvm, kvm_xcr, kvm_xcrs,
};

use super::cpuid;
use super::msr;
use super::state::{CpuidEntry, VcpuState, filled};
use crate::error::{Error, Result};
use crate::sys::kvm_x86::{Vcpu, failed};

/// What saving needs to know beside the vCPU, and what it finds out.
#[derive(Debug, Default)]
pub(super) struct Notes {
    /// MSRs to read, in the order they are to be written.
    pub(super) msrs: Vec<u32>,
    /// Those KVM lists but cannot read here.
    pub(super) unreadable: Vec<u32>,
}

/// One part of saving.
pub(super) type Save = fn(&Vcpu, &mut Notes, &mut VcpuState) -> Result<()>;
/// One part of loading.
pub(super) type Load = fn(&mut Vcpu, &VcpuState) -> Result<()>;

/// mp_state first: reading it makes KVM act on a pending INIT or SIPI (kvm_apic_accept_events in
/// kvm_arch_vcpu_ioctl_get_mpstate, arch/x86/kvm/x86.c), which resets registers. Events last: they are what the other
/// reads may still turn from pending into state.
pub(super) const SAVE: [(&str, Save); 12] = [
    ("mp_state", save_mp_state),
    ("cpuid", save_cpuid),
    ("tsc_khz", save_tsc_khz),
    ("regs", save_regs),
    ("sregs", save_sregs),
    ("xsave", save_xsave),
    ("xcrs", save_xcrs),
    ("debug", save_debug),
    ("lapic", save_lapic),
    ("msrs", save_msrs),
    ("ssp", save_ssp),
    ("events", save_events),
];

/// Why in this order (each has a test beside this file, or the place in the kernel it comes from):
/// CPUID before all, because KVM checks CR4, XCR0, xsave and MSRs against it. The TSC's frequency before the TSC.
/// sregs hold the APIC base, whose mode says how the lapic page is to be read. The lapic before the MSRs: writing
/// IA32_TSC_DEADLINE is ignored unless the LVT timer is in deadline mode. mp_state after sregs, which may set it (a
/// quirk for a vCPU at its reset vector). regs before events: KVM_SET_REGS drops a pending exception.
pub(super) const LOAD: [(&str, Load); 12] = [
    ("cpuid", load_cpuid),
    ("tsc_khz", load_tsc_khz),
    ("sregs", load_sregs),
    ("xcrs", load_xcrs),
    ("xsave", load_xsave),
    ("debug", load_debug),
    ("regs", load_regs),
    ("lapic", load_lapic),
    ("msrs", load_msrs),
    ("ssp", load_ssp),
    ("mp_state", load_mp_state),
    ("events", load_events),
];

/// Reads everything; the vCPU's last exit was completed before.
pub(super) fn save(vcpu: &Vcpu, notes: &mut Notes) -> Result<Box<VcpuState>> {
    if vcpu.nested()? {
        return Err(Error::new(
            libc::ENOTSUP,
            "the guest uses nested virtualization, whose state is not migrated yet; stop the guests inside it first",
        ));
    }
    let mut state = Box::<VcpuState>::default();
    for (name, step) in SAVE {
        step(vcpu, notes, &mut state).map_err(|error| error.in_field(name))?;
    }
    Ok(state)
}

/// Writes everything.
pub(super) fn load(vcpu: &mut Vcpu, state: &VcpuState) -> Result<()> {
    load_in_order(vcpu, state, &LOAD)
}

pub(super) fn load_in_order(vcpu: &mut Vcpu, state: &VcpuState, steps: &[(&str, Load)]) -> Result<()> {
    for (name, step) in steps {
        step(vcpu, state).map_err(|error| error.in_field(*name))?;
    }
    Ok(())
}

/// An array length of ours as it travels.
fn count(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}

fn save_mp_state(vcpu: &Vcpu, _: &mut Notes, state: &mut VcpuState) -> Result<()> {
    state.mp_state = vcpu.fd().get_mp_state().map_err(|e| failed("KVM_GET_MP_STATE", &e))?.mp_state;
    Ok(())
}

fn load_mp_state(vcpu: &mut Vcpu, state: &VcpuState) -> Result<()> {
    let mp_state = kvm_mp_state { mp_state: state.mp_state };
    vcpu.fd().set_mp_state(mp_state).map_err(|e| failed(format_args!("KVM_SET_MP_STATE {}", state.mp_state), &e))
}

/// CPUID as the VMM set it, with the few bits KVM keeps up to date.
pub(super) fn current_cpuid(vcpu: &Vcpu) -> Result<Vec<CpuidEntry>> {
    let cpuid = vcpu.fd().get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(|e| failed("KVM_GET_CPUID2", &e))?;
    let ours = |e: &kvm_cpuid_entry2| CpuidEntry {
        function: e.function,
        index: e.index,
        flags: e.flags,
        eax: e.eax,
        ebx: e.ebx,
        ecx: e.ecx,
        edx: e.edx,
    };
    Ok(cpuid.as_slice().iter().map(ours).collect())
}

fn save_cpuid(vcpu: &Vcpu, _: &mut Notes, state: &mut VcpuState) -> Result<()> {
    let entries = current_cpuid(vcpu)?;
    let room = state.cpuid.get_mut(..entries.len());
    let room = room.ok_or_else(|| Error::new(libc::E2BIG, "the vCPU has more than 256 CPUID entries"))?;
    room.copy_from_slice(&entries);
    state.cpuid_len = count(entries.len());
    Ok(())
}

/// Compares with what this VMM set; a vCPU without any CPUID gets the source's.
fn load_cpuid(vcpu: &mut Vcpu, state: &VcpuState) -> Result<()> {
    let here = current_cpuid(vcpu)?;
    if here.is_empty() && state.cpuid_len > 0 {
        let theirs = |e: &CpuidEntry| kvm_cpuid_entry2 {
            function: e.function,
            index: e.index,
            flags: e.flags,
            eax: e.eax,
            ebx: e.ebx,
            ecx: e.ecx,
            edx: e.edx,
            ..Default::default()
        };
        let entries: Vec<_> = state.cpuid().iter().map(theirs).collect();
        let cpuid = CpuId::from_entries(&entries).map_err(|_| Error::no_memory("CPUID", entries.len() as u64))?;
        return vcpu.fd().set_cpuid2(&cpuid).map_err(|e| failed("KVM_SET_CPUID2 with the source's CPUID", &e));
    }
    let found = cpuid::differences(&cpuid::leaves(state.cpuid()), &cpuid::leaves(&here));
    if found.is_empty() {
        return Ok(());
    }
    Err(Error::invalid(format!("this vCPU's CPUID is not the source's: {}", cpuid::in_words(&found))))
}

fn save_tsc_khz(vcpu: &Vcpu, _: &mut Notes, state: &mut VcpuState) -> Result<()> {
    // A host whose TSC is unstable has no frequency to tell: then there is nothing to hold the destination to.
    state.tsc_khz = match vcpu.fd().get_tsc_khz() {
        Ok(khz) => khz,
        Err(e) if e.errno() == libc::EIO => 0,
        Err(e) => return Err(failed("KVM_GET_TSC_KHZ", &e)),
    };
    Ok(())
}

fn load_tsc_khz(vcpu: &mut Vcpu, state: &VcpuState) -> Result<()> {
    let here = vcpu.fd().get_tsc_khz().unwrap_or(0);
    if state.tsc_khz == 0 || state.tsc_khz == here {
        return Ok(());
    }
    // KVM takes what is within 250 ppm of the host's frequency, or what the CPU can scale to.
    vcpu.fd().set_tsc_khz(state.tsc_khz).map_err(|e| {
        failed("the source's TSC frequency cannot be had on this host: KVM_SET_TSC_KHZ", &e)
            .expected_got(format!("{} kHz", state.tsc_khz), format!("{here} kHz"))
    })
}

fn save_regs(vcpu: &Vcpu, _: &mut Notes, state: &mut VcpuState) -> Result<()> {
    state.regs = vcpu.fd().get_regs().map_err(|e| failed("KVM_GET_REGS", &e))?;
    Ok(())
}

fn load_regs(vcpu: &mut Vcpu, state: &VcpuState) -> Result<()> {
    vcpu.fd().set_regs(&state.regs).map_err(|e| failed("KVM_SET_REGS", &e))
}

fn save_sregs(vcpu: &Vcpu, _: &mut Notes, state: &mut VcpuState) -> Result<()> {
    state.sregs = vcpu.sregs2()?;
    Ok(())
}

fn load_sregs(vcpu: &mut Vcpu, state: &VcpuState) -> Result<()> {
    vcpu.set_sregs2(&state.sregs)?;
    if state.lapic_len == 0 {
        vcpu.set_run_cr8(state.sregs.cr8);
    }
    Ok(())
}

fn save_xsave(vcpu: &Vcpu, _: &mut Notes, state: &mut VcpuState) -> Result<()> {
    state.xsave_len = count(vcpu.xsave(&mut state.xsave)?);
    Ok(())
}

fn load_xsave(vcpu: &mut Vcpu, state: &VcpuState) -> Result<()> {
    vcpu.set_xsave(&state.xsave)
}

fn save_xcrs(vcpu: &Vcpu, _: &mut Notes, state: &mut VcpuState) -> Result<()> {
    match vcpu.fd().get_xcrs() {
        Ok(xcrs) => {
            state.xcrs = xcrs.xcrs;
            state.xcrs_len = xcrs.nr_xcrs.min(count(state.xcrs.len()));
            Ok(())
        }
        // A CPU without xsave has no XCRs.
        Err(e) if e.errno() == libc::EINVAL => Ok(()),
        Err(e) => Err(failed("KVM_GET_XCRS", &e)),
    }
}

fn load_xcrs(vcpu: &mut Vcpu, state: &VcpuState) -> Result<()> {
    let from = filled(&state.xcrs, state.xcrs_len);
    if from.is_empty() {
        return Ok(());
    }
    let mut xcrs = kvm_xcrs { nr_xcrs: count(from.len()), ..Default::default() };
    xcrs.xcrs[..from.len()].copy_from_slice(from);
    let list = |x: &kvm_xcr| format!("XCR{} = {:#x}", x.xcr, x.value);
    vcpu.fd().set_xcrs(&xcrs).map_err(|e| {
        let values = from.iter().map(list).collect::<Vec<_>>().join(", ");
        failed(format_args!("KVM_SET_XCRS {values}"), &e)
    })
}

fn save_debug(vcpu: &Vcpu, _: &mut Notes, state: &mut VcpuState) -> Result<()> {
    state.debug = vcpu.fd().get_debug_regs().map_err(|e| failed("KVM_GET_DEBUGREGS", &e))?;
    Ok(())
}

fn load_debug(vcpu: &mut Vcpu, state: &VcpuState) -> Result<()> {
    vcpu.fd().set_debug_regs(&state.debug).map_err(|e| failed("KVM_SET_DEBUGREGS", &e))
}

fn save_lapic(vcpu: &Vcpu, _: &mut Notes, state: &mut VcpuState) -> Result<()> {
    match vcpu.fd().get_lapic() {
        Ok(lapic) => {
            state.lapic = lapic.regs;
            state.lapic_len = count(state.lapic.len());
            Ok(())
        }
        // The local APIC is the VMM's own device then.
        Err(e) if e.errno() == libc::EINVAL => Ok(()),
        Err(e) => Err(failed("KVM_GET_LAPIC", &e)),
    }
}

fn load_lapic(vcpu: &mut Vcpu, state: &VcpuState) -> Result<()> {
    if state.lapic_len == 0 {
        return Ok(());
    }
    if filled(&state.lapic, state.lapic_len).len() != state.lapic.len() {
        return Err(Error::invalid("the lapic page is not whole")
            .expected_got(format!("{} bytes", state.lapic.len()), state.lapic_len));
    }
    let lapic = kvm_lapic_state { regs: state.lapic };
    vcpu.fd().set_lapic(&lapic).map_err(|e| match e.errno() {
        libc::EINVAL => failed(
            "KVM_SET_LAPIC: this VM has no interrupt controller in the kernel, or the vCPU another APIC id",
            &e,
        ),
        _ => failed("KVM_SET_LAPIC", &e),
    })
}

fn save_msrs(vcpu: &Vcpu, notes: &mut Notes, state: &mut VcpuState) -> Result<()> {
    let (found, unreadable) = msr::read(vcpu, &notes.msrs)?;
    notes.unreadable = unreadable;
    let room = state.msrs.get_mut(..found.len());
    room.ok_or_else(|| Error::new(libc::E2BIG, "KVM lists more MSRs than this version of vmig knows"))?
        .copy_from_slice(&found);
    state.msrs_len = count(found.len());
    Ok(())
}

fn load_msrs(vcpu: &mut Vcpu, state: &VcpuState) -> Result<()> {
    msr::write(vcpu, state.msrs())?;
    msr::check_tsc(vcpu, state.msrs())
}

const SSP: u64 = kvm_x86_reg_kvm(KVM_REG_GUEST_SSP);

fn save_ssp(vcpu: &Vcpu, _: &mut Notes, state: &mut VcpuState) -> Result<()> {
    let mut value = [0; 8];
    state.ssp = match vcpu.fd().get_one_reg(SSP, &mut value) {
        Ok(_) => u64::from_le_bytes(value),
        // An older kernel, or a vCPU without shadow stacks, has nothing to save.
        Err(_) => 0,
    };
    Ok(())
}

fn load_ssp(vcpu: &mut Vcpu, state: &VcpuState) -> Result<()> {
    if state.ssp == 0 {
        return Ok(());
    }
    let set = vcpu.fd().set_one_reg(SSP, &state.ssp.to_le_bytes());
    set.map(drop).map_err(|e| failed("the guest uses shadow stacks: KVM_SET_ONE_REG of its pointer", &e))
}

fn save_events(vcpu: &Vcpu, _: &mut Notes, state: &mut VcpuState) -> Result<()> {
    state.events = vcpu.fd().get_vcpu_events().map_err(|e| failed("KVM_GET_VCPU_EVENTS", &e))?;
    Ok(())
}

fn load_events(vcpu: &mut Vcpu, state: &VcpuState) -> Result<()> {
    vcpu.fd()
        .set_vcpu_events(&state.events)
        .map_err(|e| failed(format_args!("KVM_SET_VCPU_EVENTS with flags {:#x}", state.events.flags), &e))
}
