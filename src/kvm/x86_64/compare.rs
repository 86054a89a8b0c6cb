//! What a migration tells the other side of the CPUs, and what has to be the same there.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use super::Kvm;
use super::cpuid;
use super::msr;
use super::vcpu::current_cpuid;
use crate::error::{Error, Result};
use crate::sys::kvm_x86::Vcpu;
use crate::thread::lock;
use crate::wire::cpu::{Cpu, Leaf, Vcpus};

/// Differences of one kind that are named; the others are counted.
const NAMED_MAX: usize = 64;
/// Two TSCs count as equally fast up to this: KVM's own tolerance (tsc_tolerance_ppm).
const PPM: u64 = 250;

/// What was found out of a vCPU while it was outside KVM_RUN.
#[derive(Clone, Debug)]
pub(super) struct Known {
    cpuid: Vec<Leaf>,
    tsc_khz: u32,
    /// Of the MSRs that KVM lists those that this vCPU has.
    msrs: Vec<u32>,
    lapic: bool,
}

fn look(vcpu: &Vcpu, msrs: &[u32]) -> Result<Known> {
    let (found, _) = msr::read(vcpu, msrs)?;
    Ok(Known {
        cpuid: cpuid::leaves(&current_cpuid(vcpu)?),
        tsc_khz: vcpu.fd().get_tsc_khz().unwrap_or(0),
        msrs: found.iter().map(|msr| msr.index).collect(),
        lapic: vcpu.fd().get_lapic().is_ok(),
    })
}

impl Kvm {
    /// Looks at all vCPUs, which are outside KVM_RUN, and keeps what it finds.
    pub(super) fn get_to_know(&self) -> Result<()> {
        let all: Vec<usize> = (0..self.vcpus.len()).collect();
        let seen: Arc<Mutex<Vec<Option<Known>>>> = Arc::new(Mutex::new(vec![None; all.len()]));
        let (into, msrs) = (Arc::clone(&seen), self.msrs.clone());
        self.on_vcpus(&all, move |index, vcpu| {
            let known = look(vcpu, &msrs)?;
            if let Some(slot) = lock(&into).get_mut(index) {
                *slot = Some(known);
            }
            Ok(())
        })?;
        let known = lock(&seen).iter().cloned().collect();
        lock(&self.state).known = known;
        Ok(())
    }

    /// A vCPU gets its state: what was known of it may have been that it had no CPUID yet, or another TSC.
    pub(super) fn will_load(&self, index: usize, tsc_khz: u32) {
        let mut state = lock(&self.state);
        let known = state.known.as_ref().and_then(|all| all.get(index));
        if !known.is_some_and(|vcpu| !vcpu.cpuid.is_empty() && vcpu.tsc_khz == tsc_khz) {
            state.known = None;
        }
    }

    /// What this side has. `stopped`: nobody runs the vCPUs, so they can be looked at; otherwise it is told what was found
    /// when they were started last, if that was through the library.
    pub fn facts(&self, stopped: bool) -> Result<Cpu> {
        if stopped {
            let looked = self.get_to_know();
            self.rest();
            looked?;
        }
        let known = lock(&self.state).known.clone();
        let irqchip = match (self.machine.ioapic()?, &known) {
            (Some(_), _) => "kernel",
            (None, Some(vcpus)) if vcpus.iter().any(|v| v.lapic) => "split",
            (None, Some(_)) => "none",
            (None, None) => "",
        };
        Ok(Cpu {
            arch: "x86_64".to_owned(),
            msrs: match &known {
                Some(vcpus) => {
                    let all: BTreeSet<u32> = vcpus.iter().flat_map(|v| v.msrs.iter().copied()).collect();
                    all.into_iter().collect()
                }
                // Which of them the vCPUs have is not known: the values are compared when they are loaded.
                None => Vec::new(),
            },
            vcpus: known.as_deref().map(grouped),
            xsave_components: self.machine.xsave_components()?,
            xsave_size: self.machine.xsave_size() as u64,
            capabilities: self.machine.capabilities(),
            irqchip: irqchip.to_owned(),
            tsc_scales: self.machine.tsc_scales(),
        })
    }

    /// Everything that keeps the source's CPUs from running here. What this side has beyond that is no difference, except
    /// in CPUID, which the guest sees. A vCPU that has no CPUID here gets the source's.
    pub fn compare(&self, source: &Cpu, here: &Cpu) -> Vec<Error> {
        // An MSR that KVM lists here counts, whether or not these vCPUs could read it before they have their CPUID.
        differences(source, here, &self.msrs)
    }
}

/// vCPUs that are alike, together.
fn grouped(vcpus: &[Known]) -> Vec<Vcpus> {
    let mut groups: Vec<Vcpus> = Vec::new();
    for (index, vcpu) in (0u32..).zip(vcpus) {
        match groups.iter_mut().find(|g| g.cpuid == vcpu.cpuid && g.tsc_khz == vcpu.tsc_khz) {
            Some(group) => group.indices.push(index),
            None => {
                let (cpuid, tsc_khz) = (vcpu.cpuid.clone(), vcpu.tsc_khz);
                groups.push(Vcpus { indices: vec![index], cpuid, tsc_khz });
            }
        }
    }
    groups
}

fn error(field: impl Into<String>, text: impl Into<String>) -> Error {
    Error::invalid(text).in_section("cpu").in_field(field)
}

fn differences(source: &Cpu, here: &Cpu, msrs: &[u32]) -> Vec<Error> {
    let mut found = Vec::new();
    if source.arch != here.arch {
        let text = "a guest cannot change its architecture";
        return vec![error("architecture", text).differs(&source.arch, &here.arch)];
    }
    // Empty: this side could not tell, for the guest runs.
    if source.irqchip != here.irqchip && !source.irqchip.is_empty() && !here.irqchip.is_empty() {
        let text = "the interrupt controllers are not in the same place";
        found.push(error("irqchip", text).differs(&source.irqchip, &here.irqchip));
    }
    let lacking: Vec<_> = source.capabilities.iter().filter(|c| !here.capabilities.contains(c)).collect();
    name_some(&mut found, "KVM capabilities", &lacking, |name| {
        error(format!("KVM capability {name}"), "the destination's KVM lacks what the source's has")
            .differs("yes", "no")
    });
    let ours: BTreeSet<u32> = msrs.iter().copied().collect();
    let lacking: Vec<_> = source.msrs.iter().filter(|msr| !ours.contains(msr)).collect();
    name_some(&mut found, "MSRs", &lacking, |msr| {
        error(format!("MSR {msr:#x}"), "the destination's KVM does not have this MSR").differs("present", "missing")
    });
    compare_xsave(source, here, &mut found);
    if let (Some(theirs), Some(ours)) = (&source.vcpus, &here.vcpus) {
        compare_vcpus(theirs, ours, here.tsc_scales, &mut found);
    }
    found
}

/// An error for each, up to a limit; the others are counted.
fn name_some<T>(found: &mut Vec<Error>, what: &str, all: &[T], each: impl Fn(&T) -> Error) {
    found.extend(all.iter().take(NAMED_MAX).map(each));
    if all.len() > NAMED_MAX {
        found.push(error(what, format!("{} more like this", all.len() - NAMED_MAX)));
    }
}

fn compare_xsave(source: &Cpu, here: &Cpu, found: &mut Vec<Error>) {
    let (theirs, ours) = (source.xsave_components, here.xsave_components);
    if theirs & !ours != 0 {
        let bits: Vec<String> = (0..64).filter(|n| (theirs & !ours) >> n & 1 != 0).map(|n| n.to_string()).collect();
        let text = format!("the destination's KVM does not keep component {} of vCPUs", bits.join(", "));
        found.push(error("xsave components", text).differs(format!("{theirs:#x}"), format!("{ours:#x}")));
    }
    if source.xsave_size > here.xsave_size {
        let text = "the destination's KVM keeps less of vCPUs than the source's";
        let size = |bytes: u64| format!("{bytes} bytes");
        found.push(error("xsave size", text).differs(size(source.xsave_size), size(here.xsave_size)));
    }
}

fn compare_vcpus(source: &[Vcpus], here: &[Vcpus], scales: bool, found: &mut Vec<Error>) {
    for ours in here {
        let indices: BTreeSet<u32> = ours.indices.iter().copied().collect();
        for theirs in source {
            let both: Vec<u32> = theirs.indices.iter().copied().filter(|index| indices.contains(index)).collect();
            let Some(vcpus) = listed(&both) else { continue };
            // Without any, this vCPU gets the source's.
            if !ours.cpuid.is_empty() {
                let differences = cpuid::differences(&theirs.cpuid, &ours.cpuid);
                name_some(found, "CPUID", &differences, |d| {
                    error(format!("CPUID {}", d.place()), format!("{vcpus}: {}", d.bits()))
                        .differs(format!("{:#x}", d.source), format!("{:#x}", d.here))
                });
            }
            if theirs.tsc_khz != 0 && !scales && !same_speed(theirs.tsc_khz, ours.tsc_khz) {
                let text = format!("{vcpus}: the TSC is not equally fast, and this host cannot scale it");
                let khz = |khz: u32| format!("{khz} kHz");
                found.push(error("TSC frequency", text).differs(khz(theirs.tsc_khz), khz(ours.tsc_khz)));
            }
        }
    }
}

fn same_speed(theirs: u32, ours: u32) -> bool {
    u64::from(theirs.abs_diff(ours)) * 1_000_000 <= u64::from(ours) * PPM
}

/// `vCPU 3`, `vCPUs 0, 1, 2`, `vCPUs 0, 1, 2 and 13 more`; none if there is none.
fn listed(vcpus: &[u32]) -> Option<String> {
    const MOST: usize = 4;
    let some: Vec<String> = vcpus.iter().take(MOST).map(ToString::to_string).collect();
    let more = vcpus.len().saturating_sub(MOST);
    match (vcpus.len(), more) {
        (0, _) => None,
        (1, _) => Some(format!("vCPU {}", some[0])),
        (_, 0) => Some(format!("vCPUs {}", some.join(", "))),
        (..) => Some(format!("vCPUs {} and {more} more", some.join(", "))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cpu() -> Cpu {
        let leaf = Leaf { function: 7, index: Some(0), registers: [0, 0x20, 0, 0] };
        Cpu {
            arch: "x86_64".into(),
            vcpus: Some(vec![Vcpus { indices: vec![0, 1], cpuid: vec![leaf], tsc_khz: 2_000_000 }]),
            msrs: vec![0x10],
            xsave_components: 7,
            xsave_size: 4096,
            capabilities: vec!["xcrs".into()],
            irqchip: "kernel".into(),
            tsc_scales: false,
        }
    }

    fn between(source: &Cpu, here: &Cpu) -> Vec<String> {
        differences(source, here, &[0x10]).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn each_difference_has_its_words() {
        let mut source = cpu();
        source.vcpus.as_mut().unwrap()[0].tsc_khz = 2_400_000;
        source.vcpus.as_mut().unwrap()[0].cpuid[0].registers[1] = 0x8;
        source.msrs.push(0xc000_0104);
        (source.xsave_components, source.xsave_size) = (0x207, 8192);
        source.capabilities.push("smm".into());
        source.irqchip = "split".into();
        assert_eq!(
            between(&source, &cpu()),
            [
                "section 'cpu' field 'irqchip': the interrupt controllers are not in the same place \
                 (source: split, destination: kernel)",
                "section 'cpu' field 'KVM capability smm': the destination's KVM lacks what the source's has \
                 (source: yes, destination: no)",
                "section 'cpu' field 'MSR 0xc0000104': the destination's KVM does not have this MSR \
                 (source: present, destination: missing)",
                "section 'cpu' field 'xsave components': the destination's KVM does not keep component 9 of vCPUs \
                 (source: 0x207, destination: 0x7)",
                "section 'cpu' field 'xsave size': the destination's KVM keeps less of vCPUs than the source's \
                 (source: 8192 bytes, destination: 4096 bytes)",
                "section 'cpu' field 'CPUID leaf 0x7 subleaf 0x0 ebx': vCPUs 0, 1: bit 3 (bmi1) is set at the source \
                 only, bit 5 (avx2) is set at the destination only (source: 0x8, destination: 0x20)",
                "section 'cpu' field 'TSC frequency': vCPUs 0, 1: the TSC is not equally fast, and this host cannot \
                 scale it (source: 2400000 kHz, destination: 2000000 kHz)",
            ]
        );
    }

    #[test]
    fn more_at_the_destination_is_no_difference() {
        let mut here = cpu();
        here.msrs.push(0x11);
        (here.xsave_components, here.xsave_size) = (0xf, 9000);
        here.capabilities.push("smm".into());
        assert_eq!(between(&cpu(), &here), [""; 0]);
        // 250 ppm of 2 GHz are 500 kHz; a host that scales takes any.
        here.vcpus.as_mut().unwrap()[0].tsc_khz = 2_000_500;
        assert_eq!(between(&cpu(), &here), [""; 0]);
        here.vcpus.as_mut().unwrap()[0].tsc_khz = 2_001_000;
        assert_eq!(between(&cpu(), &here).len(), 1);
        here.tsc_scales = true;
        assert_eq!(between(&cpu(), &here), [""; 0]);
        here.vcpus.as_mut().unwrap()[0].cpuid.clear();
        assert_eq!(between(&cpu(), &here), [""; 0]);
        assert_eq!(between(&Cpu { vcpus: None, ..cpu() }, &here), [""; 0]);
    }

    #[test]
    fn a_long_list_ends() {
        let many = Cpu { msrs: (0x100..0x200).collect(), ..cpu() };
        let found = between(&many, &cpu());
        assert_eq!((found.len(), found[64].contains("192 more like this")), (65, true));
        assert_eq!(listed(&[0, 1, 2, 3, 7, 9]).unwrap(), "vCPUs 0, 1, 2, 3 and 2 more");
    }
}
