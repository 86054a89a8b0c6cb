//! vmig gives any hypervisor or emulator that can call C live migration.
//!
//! The modules below stand in floor order: a module uses only those listed before it (tests/floors.rs keeps it so).

pub mod error;
pub mod sys;
pub mod thread;
pub mod bql;
pub mod bitmap;
pub mod options;
pub mod pacing;
pub mod status;
pub mod ram;
pub mod wire;
pub mod transport;
pub mod dirty;
pub mod section;
pub mod kvm;
pub mod vmm;
pub mod outgoing;
pub mod incoming;
pub mod machine;
pub mod capi;
