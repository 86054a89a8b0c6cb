//! What two vmigs tell each other of a KVM guest's CPUs in the hello.

use serde_json::{Value, json};

/// Longest name of a capability or of a kind.
const NAME_MAX: usize = 64;

/// A guest's CPUs, and what KVM of the host can do for them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cpu {
    /// Architecture: CPUs of two are never compared.
    pub arch: String,
    /// vCPUs, those that are alike together. None: they could not be read, because the guest runs.
    pub vcpus: Option<Vec<Vcpus>>,
    /// MSRs that a vCPU's state consists of.
    pub msrs: Vec<u32>,
    /// Components that KVM keeps of a vCPU's extended state, a bit for each.
    pub xsave_components: u64,
    /// Bytes that KVM needs for it.
    pub xsave_size: u64,
    /// Capabilities of KVM without which state is lost.
    pub capabilities: Vec<String>,
    /// Where interrupt controllers are: kernel, split or none.
    pub irqchip: String,
    /// KVM can run vCPUs with a TSC of another frequency than the host's.
    pub tsc_scales: bool,
}

/// vCPUs that are alike.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Vcpus {
    /// Which.
    pub indices: Vec<u32>,
    /// CPUID as it was set, without what follows the guest's doing or names the vCPU.
    pub cpuid: Vec<Leaf>,
    /// Frequency of the TSC in kHz; 0: none that could be told.
    pub tsc_khz: u32,
}

/// A leaf of CPUID.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Leaf {
    /// Leaf.
    pub function: u32,
    /// Subleaf, where it has some.
    pub index: Option<u32>,
    /// eax, ebx, ecx, edx.
    pub registers: [u32; 4],
}

pub(super) fn to_json(cpu: &Cpu) -> Value {
    let leaf = |l: &Leaf| json!([l.function, l.index, l.registers]);
    let group = |v: &Vcpus| {
        let leaves: Vec<Value> = v.cpuid.iter().map(leaf).collect();
        json!({"vcpus": v.indices, "cpuid": leaves, "tsc-khz": v.tsc_khz})
    };
    json!({
        "arch": cpu.arch,
        "vcpus": cpu.vcpus.as_ref().map(|all| all.iter().map(group).collect::<Vec<_>>()),
        "msrs": cpu.msrs,
        "xsave-components": cpu.xsave_components,
        "xsave-size": cpu.xsave_size,
        "kvm-capabilities": cpu.capabilities,
        "irqchip": cpu.irqchip,
        "tsc-scales": cpu.tsc_scales,
    })
}

/// Reads what [`to_json`] wrote.
pub(super) fn from_json(json: &Value) -> Option<Cpu> {
    let number = |key: &str| json.get(key)?.as_u64();
    let vcpus = match json.get("vcpus")? {
        Value::Null => None,
        groups => Some(groups.as_array()?.iter().map(group).collect::<Option<_>>()?),
    };
    Some(Cpu {
        arch: text(json.get("arch")?)?,
        vcpus,
        msrs: words(json.get("msrs")?)?,
        xsave_components: number("xsave-components")?,
        xsave_size: number("xsave-size")?,
        capabilities: json.get("kvm-capabilities")?.as_array()?.iter().map(text).collect::<Option<_>>()?,
        irqchip: text(json.get("irqchip")?)?,
        tsc_scales: json.get("tsc-scales").is_some_and(|v| v == true),
    })
}

fn group(json: &Value) -> Option<Vcpus> {
    Some(Vcpus {
        indices: words(json.get("vcpus")?)?,
        cpuid: json.get("cpuid")?.as_array()?.iter().map(leaf).collect::<Option<_>>()?,
        tsc_khz: word(json.get("tsc-khz")?)?,
    })
}

fn leaf(json: &Value) -> Option<Leaf> {
    let index = match json.get(1)? {
        Value::Null => None,
        index => Some(word(index)?),
    };
    Some(Leaf { function: word(json.get(0)?)?, index, registers: words(json.get(2)?)?.try_into().ok()? })
}

fn word(json: &Value) -> Option<u32> {
    u32::try_from(json.as_u64()?).ok()
}

fn words(json: &Value) -> Option<Vec<u32>> {
    json.as_array()?.iter().map(word).collect()
}

fn text(json: &Value) -> Option<String> {
    json.as_str().filter(|text| text.len() <= NAME_MAX).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cpu() -> Cpu {
        let leaf = |function, index| Leaf { function, index, registers: [1, 2, 3, u32::MAX] };
        Cpu {
            arch: "x86_64".into(),
            vcpus: Some(vec![Vcpus {
                indices: vec![0, 2],
                cpuid: vec![leaf(1, None), leaf(7, Some(0))],
                tsc_khz: 9,
            }]),
            msrs: vec![0x10, 0xc000_0080],
            xsave_components: 7,
            xsave_size: 4096,
            capabilities: vec!["xcrs".into()],
            irqchip: "kernel".into(),
            tsc_scales: true,
        }
    }

    #[test]
    fn round_trip() {
        assert_eq!(from_json(&to_json(&cpu())), Some(cpu()));
        let unread = Cpu { vcpus: None, ..cpu() };
        assert_eq!(from_json(&to_json(&unread)), Some(unread));
    }

    #[test]
    fn what_is_odd_is_refused() {
        let good = to_json(&cpu());
        let odd = [
            ("arch", json!(7)),
            ("arch", json!("a".repeat(65))),
            ("vcpus", json!(3)),
            ("vcpus", json!([{"vcpus": [0], "cpuid": [[1, null, [1, 2, 3]]], "tsc-khz": 1}])),
            ("vcpus", json!([{"vcpus": [-1], "cpuid": [], "tsc-khz": 1}])),
            ("msrs", json!([1u64 << 32])),
            ("xsave-size", json!(-1)),
            ("kvm-capabilities", json!([[]])),
            ("irqchip", json!(null)),
        ];
        for (key, value) in odd {
            let mut bad = good.clone();
            bad[key] = value;
            assert_eq!(from_json(&bad), None, "{key}: {}", bad[key]);
        }
    }
}
