//! Comparing CPUID as two VMMs set it, bit by bit.

use super::feature;
use super::state::CpuidEntry;
use crate::wire::cpu::Leaf;

/// `KVM_CPUID_FLAG_SIGNIFCANT_INDEX`: the entry is for one subleaf.
const BY_INDEX: u32 = 1;

/// Differences named in one sentence at most; more would drown the first.
const NAMED_MAX: usize = 32;

const REGISTERS: [&str; 4] = ["eax", "ebx", "ecx", "edx"];

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

/// The leaves without what says nothing about the machine, so that vCPUs of one guest are alike.
pub(super) fn leaves(entries: &[CpuidEntry]) -> Vec<Leaf> {
    let leaf = |e: &CpuidEntry| {
        let index = (e.flags & BY_INDEX != 0).then_some(e.index);
        let masks = ignored(e.function, index.unwrap_or(0));
        let values = [e.eax, e.ebx, e.ecx, e.edx];
        Leaf { function: e.function, index, registers: std::array::from_fn(|i| values[i] & !masks[i]) }
    };
    entries.iter().map(leaf).collect()
}

/// A register of a leaf that is not the same on the two sides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Difference {
    pub(super) function: u32,
    pub(super) index: Option<u32>,
    pub(super) register: usize,
    pub(super) source: u32,
    pub(super) here: u32,
}

impl Difference {
    /// `leaf 0x7 subleaf 0x0 ebx`.
    pub(super) fn place(&self) -> String {
        let subleaf = self.index.map_or_else(String::new, |index| format!(" subleaf {index:#x}"));
        format!("leaf {:#x}{subleaf} {}", self.function, REGISTERS[self.register])
    }

    /// `bit 5 (avx2) is set at the source only, bits 3, 8 (bmi2) are set at the destination only`.
    pub(super) fn bits(&self) -> String {
        let changed = self.source ^ self.here;
        let side = |bits: u32, side: &str| {
            let all: Vec<String> = (0..32).filter(|n| bits >> n & 1 != 0).map(|n| self.bit(n)).collect();
            match all.len() {
                0 => None,
                1 => Some(format!("bit {} is set at the {side} only", all[0])),
                _ => Some(format!("bits {} are set at the {side} only", all.join(", "))),
            }
        };
        let sides = [side(self.source & changed, "source"), side(self.here & changed, "destination")];
        sides.into_iter().flatten().collect::<Vec<_>>().join(", ")
    }

    fn bit(&self, number: u32) -> String {
        match feature::name(self.function, self.index.unwrap_or(0), self.register, number) {
            Some(name) => format!("{number} ({name})"),
            None => number.to_string(),
        }
    }
}

/// Every register that differs.
pub(super) fn differences(source: &[Leaf], here: &[Leaf]) -> Vec<Difference> {
    let same = |a: &Leaf, b: &Leaf| a.function == b.function && a.index.unwrap_or(0) == b.index.unwrap_or(0);
    // A leaf that is missing reads as zeros, and so does one that is there and empty.
    let registers = |leaves: &[Leaf], wanted: &Leaf| {
        leaves.iter().find(|leaf| same(leaf, wanted)).map_or([0; 4], |leaf| leaf.registers)
    };
    let here_only = here.iter().filter(|leaf| !source.iter().any(|other| same(leaf, other)));
    let mut found = Vec::new();
    for leaf in source.iter().chain(here_only) {
        let (theirs, ours) = (registers(source, leaf), registers(here, leaf));
        for register in (0..4).filter(|i| theirs[*i] != ours[*i]) {
            let (source, here) = (theirs[register], ours[register]);
            found.push(Difference { function: leaf.function, index: leaf.index, register, source, here });
        }
    }
    found
}

/// All of them in one sentence.
pub(super) fn in_words(found: &[Difference]) -> String {
    let mut words: Vec<String> =
        found.iter().take(NAMED_MAX).map(|d| format!("{}: {}", d.place(), d.bits())).collect();
    if found.len() > NAMED_MAX {
        words.push(format!("and {} more", found.len() - NAMED_MAX));
    }
    words.join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, flags: u32, values: [u32; 4]) -> CpuidEntry {
        let [eax, ebx, ecx, edx] = values;
        CpuidEntry { function, index, flags, eax, ebx, ecx, edx }
    }

    fn between(source: &[CpuidEntry], here: &[CpuidEntry]) -> String {
        in_words(&differences(&leaves(source), &leaves(here)))
    }

    #[test]
    fn leaf_register_and_bits_are_named() {
        let source = [entry(1, 0, 0, [1, 2, 0, 0]), entry(7, 0, BY_INDEX, [0, 0x8000_0020, 0, 0])];
        let here = [entry(7, 0, BY_INDEX, [0, 0b1000, 0, 0]), entry(1, 0, 0, [1, 2, 0, 0])];
        assert_eq!(
            between(&source, &here),
            "leaf 0x7 subleaf 0x0 ebx: bits 5 (avx2), 31 (avx512vl) are set at the source only, \
             bit 3 (bmi1) is set at the destination only"
        );
    }

    #[test]
    fn what_follows_the_guest_is_left_out_and_nothing_else() {
        let source = [entry(1, 0, 0, [0, 0x0100_0000, 1 << 27, 1 << 9]), entry(0xd, 0, BY_INDEX, [7, 832, 832, 0])];
        let here = [entry(1, 0, 0, [0, 0, 0, 0]), entry(0xd, 0, BY_INDEX, [7, 576, 832, 0])];
        assert_eq!(between(&source, &here), "");
        let here = [entry(1, 0, 0, [0, 0x0001_0000, 0, 0]), entry(0xd, 0, BY_INDEX, [7, 576, 833, 0])];
        assert_eq!(differences(&leaves(&source), &leaves(&here)).len(), 2);
    }

    #[test]
    fn a_missing_leaf_is_a_leaf_of_zeros() {
        assert_eq!(between(&[entry(5, 0, 0, [0; 4])], &[]), "");
        assert_eq!(
            between(&[], &[entry(5, 0, 0, [0, 0, 0, 1])]),
            "leaf 0x5 edx: bit 0 is set at the destination only"
        );
    }

    #[test]
    fn a_sentence_has_an_end() {
        let many: Vec<CpuidEntry> = (0..40).map(|n| entry(0x100 + n, 0, 0, [1, 0, 0, 0])).collect();
        assert!(between(&many, &[]).ends_with("; and 8 more"));
    }
}
