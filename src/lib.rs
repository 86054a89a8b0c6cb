//! vmig gives any hypervisor or emulator that can call C (a "VMM") live migration.
//!
//! C programs read `include/vmig.h`; this is the map of the inside. The modules below stand in floor order: a module
//! uses only those listed before it, and the two halves never use each other (tests/floors.rs keeps it so).
//!
//! # Where does a line go?
//!
//! | a line that … | goes to |
//! |---|---|
//! | lays out bytes | [`wire`] |
//! | makes a system call | [`sys`] |
//! | decides *when* or *how fast* | [`pacing`], and the loops of [`outgoing`] and [`incoming`] |
//! | decides *whether it is allowed* | [`status`], [`options`]; *who may run*: [`switchover`] |
//! | touches guest bytes | [`ram`] |
//! | knows which pages were written | [`dirty`] |
//! | saves or loads a device | [`section`]; of KVM itself: [`kvm`] |
//! | calls a C function pointer | [`vmm`] for hooks, run-state handlers and connections, [`section`] for devices |
//! | takes a C pointer | [`capi`] |
//! | speaks QMP | [`qmp`] |
//!
//! # Words
//!
//! *Source* and *destination* are the two sides; a *section* is a named piece of state in the stream; an *iteration* is
//! one round over the dirty pages while the guest runs; *pending* is what is left to send; the *threshold* is how much
//! may be left when the guest is stopped (bandwidth x downtime limit); the *switchover* is everything from the stop to
//! the last byte; *downtime* is how long the guest stands still; the *big lock* is the VMM's one lock (QEMU's BQL).

// Ground: knows nothing of migration.
pub mod error;
pub mod sys;
pub mod thread;
pub mod bql;
pub mod bitmap;
pub mod zero;
// Nouns: what a migration is about. No I/O, no threads; time is passed in.
pub mod options;
pub mod pacing;
pub mod status;
pub mod trace;
pub mod metrics;
pub mod ram;
pub mod wire;
pub mod switchover;
// Means: each varies with the world outside, so each is one trait and its kinds.
pub mod transport;
pub mod dirty;
pub mod section;
pub mod kvm;
pub mod vmm;
// Verbs: the two halves.
pub mod outgoing;
pub mod incoming;
// Front desk, and the door in.
pub mod machine;
pub mod qmp;
pub mod capi;
