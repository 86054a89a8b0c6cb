//! arm64, riscv64: not yet. The same interface, of which only the error can be had.

use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Duration;

use super::{Entry, Reentry};
use crate::error::{Error, Result};
use crate::thread::Threads;
use crate::wire::cpu::Cpu;

/// KVM state of a guest; there is none on this architecture yet.
#[derive(Debug)]
pub enum Kvm {}

/// `ENOSYS`: the state of this architecture's vCPUs is not described yet.
pub fn attach(_threads: Arc<Threads>, _vm_fd: RawFd, _vcpu_fds: &[RawFd]) -> Result<Arc<Kvm>> {
    let arch = std::env::consts::ARCH;
    Err(Error::new(
        libc::ENOSYS,
        format!(
            "KVM state of {arch} guests is not supported yet; register vCPUs and interrupt controllers as devices"
        ),
    ))
}

impl Kvm {
    /// See x86-64.
    pub fn set_stop_timeout(&self, _timeout: Duration) {
        match *self {}
    }

    /// See x86-64.
    pub fn unreadable_msrs(&self) -> Vec<u32> {
        match *self {}
    }

    /// See x86-64.
    pub fn sections(self: &Arc<Self>) -> Result<Vec<Entry>> {
        match **self {}
    }

    /// See x86-64.
    pub fn facts(&self, _stopped: bool) -> Result<Cpu> {
        match *self {}
    }

    /// See x86-64.
    pub fn compare(&self, _source: &Cpu, _here: &Cpu) -> Vec<Error> {
        match *self {}
    }

    /// See x86-64.
    pub fn ready(&self, _reentry: Option<Reentry<'_>>) -> Result<()> {
        match *self {}
    }

    /// See x86-64.
    pub fn unfinished(&self) -> Vec<usize> {
        match *self {}
    }

    /// See x86-64.
    pub fn rest(&self) {
        match *self {}
    }

    /// See x86-64.
    pub fn clock_stop(&self) -> Result<()> {
        match *self {}
    }

    /// See x86-64.
    pub fn clock_start(&self) -> Result<()> {
        match *self {}
    }
}
