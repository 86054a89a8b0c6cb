//! The door down: every system call and raw read, one file per kernel interface, safe outside.

pub mod clock;
pub mod eventfd;
pub mod futex;
pub mod fdpass;
pub mod io;
pub mod kvm;
pub mod kvm_ring;
#[cfg(target_arch = "x86_64")]
pub mod kvm_x86;
pub mod memory;
pub mod pagemap;
pub mod process;
pub mod random;
pub mod signal;
pub mod sized;
pub mod thread_sys;
pub mod userfaultfd;

#[cfg(all(test, target_arch = "x86_64"))]
pub(crate) mod kvm_guest;
#[cfg(all(test, target_arch = "x86_64"))]
mod kvm_tests;
