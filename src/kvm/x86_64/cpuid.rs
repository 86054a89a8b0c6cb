//! Comparing CPUID as two VMMs set it, bit by bit.

use super::state::CpuidEntry;

/// `KVM_CPUID_FLAG_SIGNIFCANT_INDEX`: the entry is for one subleaf.
const BY_INDEX: u32 = 1;

/// Differences named at most; more would drown the first.
const NAMED_MAX: usize = 32;

/// Bits that follow the guest's own doing (or name the vCPU), so they say nothing about the machine.
/// Order: eax, ebx, ecx, edx.
fn ignored(function: u32, index: u32) -> [u32; 4] {
    match (function, index) {
        // ebx 31-24: APIC id, compared with the local APIC. ecx 27: OSXSAVE follows CR4. ecx 3: MONITOR follows
        // IA32_MISC_ENABLE. edx 9: APIC follows IA32_APIC_BASE.
        (1, _) => [0, 0xff00_0000, 1 << 27 | 1 << 3, 1 << 9],
        // ecx 4: OSPKE follows CR4.
        (7, 0) => [0, 0, 1 << 4, 0],
        // edx: x2APIC id.
        (0xb | 0x1f, _) => [0, 0, 0, u32::MAX],
        // ebx: size of the xsave area for what XCR0 (subleaf 1: and IA32_XSS) enables right now.
        (0xd, 0 | 1) => [0, u32::MAX, 0, 0],
        // eax 7: PV_UNHALT follows KVM_CAP_X86_DISABLE_EXITS in older kernels.
        (0x4000_0001, _) => [1 << 7, 0, 0, 0],
        // eax: extended APIC id; ebx, ecx: core and node of this vCPU, part of its id.
        (0x8000_001e, _) => [u32::MAX, 0xff, 0xff, 0],
        _ => [0; 4],
    }
}

fn registers(entry: &CpuidEntry) -> [(&'static str, u32); 4] {
    [("eax", entry.eax), ("ebx", entry.ebx), ("ecx", entry.ecx), ("edx", entry.edx)]
}

fn leaf(entry: &CpuidEntry) -> String {
    if entry.flags & BY_INDEX != 0 {
        format!("leaf {:#x} subleaf {:#x}", entry.function, entry.index)
    } else {
        format!("leaf {:#x}", entry.function)
    }
}

fn same_leaf(a: &CpuidEntry, b: &CpuidEntry) -> bool {
    let index = |e: &CpuidEntry| if e.flags & BY_INDEX != 0 { e.index } else { 0 };
    a.function == b.function && index(a) == index(b)
}

/// Every difference, as `leaf 0x7 subleaf 0x0 ebx: bits 5 are set at the source only`.
pub(super) fn differences(source: &[CpuidEntry], here: &[CpuidEntry]) -> Vec<String> {
    let mut found = Vec::new();
    for entry in source {
        // A leaf that is missing reads as zeros, and so does one that is there and empty.
        let other = here.iter().find(|other| same_leaf(entry, other));
        let other = other.copied().unwrap_or(CpuidEntry { eax: 0, ebx: 0, ecx: 0, edx: 0, ..*entry });
        compare(entry, &other, &mut found);
    }
    for entry in here.iter().filter(|entry| !source.iter().any(|other| same_leaf(entry, other))) {
        compare(&CpuidEntry { eax: 0, ebx: 0, ecx: 0, edx: 0, ..*entry }, entry, &mut found);
    }
    if found.len() > NAMED_MAX {
        let more = found.len() - NAMED_MAX;
        found.truncate(NAMED_MAX);
        found.push(format!("and {more} more"));
    }
    found
}

fn compare(source: &CpuidEntry, here: &CpuidEntry, found: &mut Vec<String>) {
    let masks = ignored(source.function, if source.flags & BY_INDEX != 0 { source.index } else { 0 });
    for (((name, theirs), (_, ours)), mask) in registers(source).into_iter().zip(registers(here)).zip(masks) {
        let bits = (theirs ^ ours) & !mask;
        if bits != 0 {
            let list = |bits: u32| {
                let numbers = (0..32).filter(|n| bits >> n & 1 != 0).map(|n| n.to_string());
                numbers.collect::<Vec<_>>().join(",")
            };
            let mut sides = Vec::new();
            if theirs & bits != 0 {
                sides.push(format!("bits {} are set at the source only", list(theirs & bits)));
            }
            if ours & bits != 0 {
                sides.push(format!("bits {} are set here only", list(ours & bits)));
            }
            found.push(format!("{} {name}: {}", leaf(source), sides.join(", ")));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, flags: u32, values: [u32; 4]) -> CpuidEntry {
        let [eax, ebx, ecx, edx] = values;
        CpuidEntry { function, index, flags, eax, ebx, ecx, edx }
    }

    #[test]
    fn leaf_register_and_bits_are_named() {
        let source = [entry(1, 0, 0, [1, 2, 0, 0]), entry(7, 0, BY_INDEX, [0, 0b100100, 0, 0])];
        let here = [entry(7, 0, BY_INDEX, [0, 0b1000, 0, 0]), entry(1, 0, 0, [1, 2, 0, 0])];
        assert_eq!(
            differences(&source, &here),
            ["leaf 0x7 subleaf 0x0 ebx: bits 2,5 are set at the source only, bits 3 are set here only"]
        );
    }

    #[test]
    fn what_follows_the_guest_is_left_out_and_nothing_else() {
        let source = [entry(1, 0, 0, [0, 0x0100_0000, 1 << 27, 1 << 9]), entry(0xd, 0, BY_INDEX, [7, 832, 832, 0])];
        let here = [entry(1, 0, 0, [0, 0, 0, 0]), entry(0xd, 0, BY_INDEX, [7, 576, 832, 0])];
        assert!(differences(&source, &here).is_empty());
        let here = [entry(1, 0, 0, [0, 0x0001_0000, 0, 0]), entry(0xd, 0, BY_INDEX, [7, 576, 833, 0])];
        assert_eq!(differences(&source, &here).len(), 2);
    }

    #[test]
    fn a_missing_leaf_is_a_leaf_of_zeros() {
        assert!(differences(&[entry(5, 0, 0, [0; 4])], &[]).is_empty());
        assert_eq!(differences(&[], &[entry(5, 0, 0, [0, 0, 0, 1])]), ["leaf 0x5 edx: bits 0 are set here only"]);
    }
}
