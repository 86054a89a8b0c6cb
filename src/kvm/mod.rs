//! vCPU, interrupt controller and clock state of a KVM guest as ready sections, one module per architecture.

#[cfg(target_arch = "x86_64")]
mod layout;
#[cfg(target_arch = "x86_64")]
mod worker;
#[cfg(target_arch = "x86_64")]
mod x86_64;
#[cfg(target_arch = "x86_64")]
pub use x86_64::{Kvm, attach};

#[cfg(not(target_arch = "x86_64"))]
mod not_yet;
#[cfg(not(target_arch = "x86_64"))]
pub use not_yet::{Kvm, attach};

use std::sync::Arc;

use crate::error::Result;
use crate::section::Section;

/// Handles one more exit of the vCPU with this index; see [`Kvm::ready`].
pub type Reentry<'a> = &'a dyn Fn(usize) -> Result<()>;

/// A section of KVM state with its place in the stream.
pub struct Entry {
    /// Name in the stream.
    pub name: &'static str,
    /// vCPU index, else 0.
    pub instance: u32,
    /// Higher is saved and loaded earlier.
    pub priority: i32,
    /// Version its body is written in.
    pub version: u32,
    /// The section.
    pub section: Arc<dyn Section>,
}

impl std::fmt::Debug for Entry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { name, instance, priority, version, .. } = self;
        write!(f, "Entry({name}/{instance} priority {priority} version {version})")
    }
}
