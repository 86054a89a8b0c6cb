//! vmig gives any hypervisor or emulator that can call C (a "VMM") live migration.
//!
//! C programs read `include/vmig.h`; this is the map of the inside. The modules below stand in floor order: a module
//! uses only those listed before it, and the two halves never use each other (tests/floors.rs keeps it so).
//! docs/design.md says why things are as they are.
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
//! | tells others what happens | [`status`] for states and events, [`trace`], [`metrics`]; log lines: [`vmm`] |
//! | is the tool's | `src/bin/vmig`; the man pages': `man` |
//!
//! # What is where?
//!
//! | module | what |
//! |---|---|
//! | [`error`] | one error type: errno for C, a sentence for people, the place it belongs to for programs |
//! | [`sys`] | every system call, a file for each kernel interface, safe outside |
//! | [`thread`] | named threads, fenced against panics, listed and joined; the one thread of a VMM that has no other |
//! | [`bql`] | the big lock: the library's own or the VMM's |
//! | [`bitmap`] | a bit for each page, set by many and taken by one |
//! | [`zero`] | finds pages of zeros |
//! | [`options`] | the one table of options, for the C API, QMP and their page |
//! | [`pacing`] | when and how fast: bandwidth, convergence, downtime, throttle, dirty limits, ladder, forecast |
//! | [`status`] | state, numbers, first error and news of a migration; who is told of them |
//! | [`trace`] | what happens, as lines of a file |
//! | [`metrics`] | numbers for Prometheus |
//! | [`ram`] | blocks and addresses; which pages exist, fresh and populated memory, files that are handed over, hashes |
//! | [`wire`] | bytes to values and back: QEMU's stream, and what two vmigs add |
//! | [`switchover`] | who may run the guest: the protocol as one pure function |
//! | [`transport`] | a connection, and its kinds: sockets, commands, files, descriptors, the VMM's own |
//! | [`dirty`] | trackers of writes, the hub that asks them, what was sent and may not be there; the dirty rate |
//! | [`section`] | devices by tables, sections by callbacks, and the trial of both |
//! | [`kvm`] | vCPUs, interrupt controllers and clock as sections; comparing CPUs |
//! | [`vmm`] | the VMM as we see it: hooks, run state, vCPU gate, connections, its thread's queue of callbacks, log |
//! | [`outgoing`] | the source half |
//! | [`incoming`] | the destination half |
//! | [`machine`] | one guest: registering, starting, steering and watching; the safe face of the library |
//! | [`qmp`] | QMP: the same operations for the tools that drive QEMU |
//! | [`capi`] | what C calls; a file for each chapter of the header |
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
