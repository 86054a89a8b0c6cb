//! riscv64: not yet.

use std::os::fd::RawFd;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::thread::Threads;

/// KVM state of a guest; cannot be had on this architecture yet.
#[derive(Debug)]
pub enum Kvm {}

/// `ENOSYS`: the state of a riscv64 vCPU is not described yet.
pub fn attach(_threads: Arc<Threads>, _vm_fd: RawFd, _vcpu_fds: &[RawFd]) -> Result<Arc<Kvm>> {
    Err(Error::new(libc::ENOSYS, "KVM state of riscv64 guests is not supported yet; register vCPUs as own devices"))
}
