//! Model specific registers: which, in which order, and what to do when one fails.

use kvm_bindings::{Msrs, kvm_msr_entry};

use super::state::Msr;
use crate::error::{Error, Result};
use crate::sys::kvm_x86::{MSRS_MAX, Vcpu, failed};

pub(super) const TSC: u32 = 0x10;
pub(super) const TSC_DEADLINE: u32 = 0x6e0;

/// The TSC first and the deadline last: KVM arms the timer from deadline minus TSC at the moment of the write
/// (start_sw_tscdeadline in arch/x86/kvm/lapic.c), and a later write of the TSC does not arm it anew.
pub(super) fn in_order(mut indices: Vec<u32>) -> Vec<u32> {
    indices.sort_by_key(|index| match *index {
        TSC => 0,
        TSC_DEADLINE => 2,
        _ => 1,
    });
    indices
}

fn entries(msrs: &[Msr]) -> Result<Msrs> {
    let entries: Vec<_> =
        msrs.iter().map(|m| kvm_msr_entry { index: m.index, data: m.data, ..Default::default() }).collect();
    Msrs::from_entries(&entries).map_err(|_| Error::no_memory("MSRs", msrs.len() as u64))
}

/// Reads those of `indices` that can be read; also returns the others.
pub(super) fn read(vcpu: &Vcpu, indices: &[u32]) -> Result<(Vec<Msr>, Vec<u32>)> {
    let (mut found, mut unreadable) = (Vec::new(), Vec::new());
    let mut rest = indices;
    while !rest.is_empty() {
        let asked: Vec<_> = rest.iter().take(MSRS_MAX).map(|&index| Msr { index, data: 0 }).collect();
        let mut msrs = entries(&asked)?;
        // KVM stops at the first it cannot read and says how many it did.
        let got = vcpu.fd().get_msrs(&mut msrs).map_err(|e| failed("KVM_GET_MSRS", &e))?.min(asked.len());
        found.extend(msrs.as_slice()[..got].iter().map(|e| Msr { index: e.index, data: e.data }));
        let skip = usize::from(got < asked.len());
        unreadable.extend(&rest[got..got + skip]);
        rest = &rest[got + skip..];
    }
    Ok((found, unreadable))
}

/// Writes `msrs` in their order.
pub(super) fn write(vcpu: &Vcpu, msrs: &[Msr]) -> Result<()> {
    let mut rest = msrs;
    while !rest.is_empty() {
        let batch = &rest[..rest.len().min(MSRS_MAX)];
        let set = vcpu.fd().set_msrs(&entries(batch)?).map_err(|e| failed("KVM_SET_MSRS", &e))?.min(batch.len());
        let skip = usize::from(set < batch.len());
        if let Some(refused) = batch.get(set) {
            accept_refusal(vcpu, *refused)?;
        }
        rest = &rest[set + skip..];
    }
    Ok(())
}

/// A refused write is no loss if the MSR has the value already, or if it is unknown here and was never used.
fn accept_refusal(vcpu: &Vcpu, msr: Msr) -> Result<()> {
    let (here, _) = read(vcpu, &[msr.index])?;
    let here = here.first().map(|found| found.data);
    if here == Some(msr.data) || (here.is_none() && msr.data == 0) {
        return Ok(());
    }
    let here = here.map_or_else(|| "no such MSR".to_owned(), |data| format!("{data:#x}"));
    Err(Error::invalid(format!("KVM does not take MSR {:#x} on this host", msr.index))
        .expected_got(format!("{:#x}", msr.data), here))
}

/// KVM without hardware virtualization takes a write of the TSC and goes on showing the host's. A guest may live with
/// a TSC that jumps ahead, but not with one that goes back.
pub(super) fn check_tsc(vcpu: &Vcpu, msrs: &[Msr]) -> Result<()> {
    let Some(saved) = msrs.iter().find(|msr| msr.index == TSC) else { return Ok(()) };
    let (here, _) = read(vcpu, &[TSC])?;
    match here.first() {
        Some(here) if here.data < saved.data => Err(Error::new(
            libc::ENOTSUP,
            "this host does not let the guest's TSC be set, and its own is behind the source's: time would go back",
        )
        .expected_got(format!("at least {:#x}", saved.data), format!("{:#x}", here.data))),
        _ => Ok(()),
    }
}
