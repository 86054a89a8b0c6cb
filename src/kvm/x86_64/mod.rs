//! x86-64: the guest's vCPUs, interrupt controllers, PIT and kvmclock.

mod compare;
mod cpuid;
mod feature;
mod msr;
mod section;
mod state;
mod transfer;
mod vcpu;

#[cfg(test)]
mod order_tests;

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::RawFd;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kvm_bindings::kvm_clock_data;

use self::compare::Known;
use self::section::{KvmSection, Transfer};
use self::state::{ClockState, IrqchipState, PitState, VcpuState};
use self::vcpu::Notes;
use super::worker::{Bench, Job};
use super::{Entry, Reentry};
use crate::error::{Error, Result};
use crate::sys::kvm::Vm;
use crate::sys::kvm_x86::{Machine, Vcpu, failed};
use crate::thread::{Threads, lock};

/// Loaded first: vCPUs find their interrupt lines and the I/O APIC in place, and what an I/O APIC injects while it
/// loads is overwritten by the lapic that follows (kvm_set_ioapic injects pending lines, arch/x86/kvm/ioapic.c).
const PRIORITY_IRQCHIP: i32 = 130;
const PRIORITY_PIT: i32 = 120;
const PRIORITY_VCPU: i32 = 110;
/// Last: writing kvmclock wants the vCPUs' TSCs in place (kvm_vm_ioctl_set_clock pairs it with them).
const PRIORITY_CLOCK: i32 = 100;

/// How long a vCPU may take to leave `KVM_RUN` unless told otherwise.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// Exits a vCPU may need until its last instruction is complete: a wide access across pages is split into a few.
const EXITS_MAX: u32 = 64;

/// The KVM side of a guest.
#[derive(Debug)]
pub struct Kvm {
    machine: Machine,
    /// Dropped before `threads`, which waits for their threads.
    vcpus: Vec<Bench<Vcpu>>,
    threads: Arc<Threads>,
    /// MSRs to read, in the order they are to be written.
    msrs: Vec<u32>,
    state: Arc<Mutex<Shared>>,
}

#[derive(Debug)]
struct Shared {
    stop_timeout: Duration,
    /// Every vCPU's last exit was completed since it ran last.
    ready: bool,
    /// Exits (vCPU, reason) that completing an exit led to and nobody handled yet.
    unfinished: BTreeMap<usize, u32>,
    /// kvmclock, as read at the stop or as loaded; taken at the start.
    clock: Option<u64>,
    unreadable_msrs: BTreeSet<u32>,
    /// States being read, by vCPU: the first section that is saved has all of them read at once.
    captures: BTreeMap<usize, Job<Captured>>,
    /// The vCPUs as they were when nobody ran them last.
    known: Option<Vec<Known>>,
}

/// A vCPU's state, and the MSRs that could not be read.
type Captured = (Box<VcpuState>, Vec<u32>);

/// Duplicates the VMM's fds and takes stock. Makes no call that waits for a running vCPU.
///
/// Calls on vCPUs are made on short-lived threads of `threads`. One whose vCPU stays inside `KVM_RUN` lasts until the
/// vCPU comes out; the registry joins it then.
pub fn attach(threads: Arc<Threads>, vm_fd: RawFd, vcpu_fds: &[RawFd]) -> Result<Arc<Kvm>> {
    drop(Vm::dup(vm_fd)?);
    let machine = Machine::dup(vm_fd)?;
    let msrs = msr::in_order(machine.msr_indices()?);
    let mut vcpus = Vec::new();
    for (index, fd) in vcpu_fds.iter().enumerate() {
        let vcpu = machine.vcpu(*fd).map_err(|error| error.context(format_args!("vCPU {index}")))?;
        vcpus.push(Bench::new(index, vcpu));
    }
    let shared = Shared {
        stop_timeout: STOP_TIMEOUT,
        ready: false,
        unfinished: BTreeMap::new(),
        clock: None,
        unreadable_msrs: BTreeSet::new(),
        captures: BTreeMap::new(),
        known: None,
    };
    Ok(Arc::new(Kvm { machine, threads, vcpus, msrs, state: Arc::new(Mutex::new(shared)) }))
}

impl Kvm {
    /// How long a vCPU may take to leave `KVM_RUN` before the migration fails, naming it.
    pub fn set_stop_timeout(&self, timeout: Duration) {
        lock(&self.state).stop_timeout = timeout;
    }

    /// MSRs that KVM lists but that some vCPU could not read, as far as a state was saved.
    pub fn unreadable_msrs(&self) -> Vec<u32> {
        lock(&self.state).unreadable_msrs.iter().copied().collect()
    }

    /// The sections of this guest: one per vCPU, and those of the devices the VM has in the kernel.
    pub fn sections(self: &Arc<Self>) -> Result<Vec<Entry>> {
        let mut entries = Vec::new();
        if self.machine.ioapic()?.is_some() {
            entries.push(self.entry::<IrqchipState>(0, PRIORITY_IRQCHIP)?);
        }
        match self.machine.vm().get_pit2() {
            Ok(_) => entries.push(self.entry::<PitState>(0, PRIORITY_PIT)?),
            Err(e) if matches!(e.errno(), libc::ENXIO | libc::EINVAL) => {}
            Err(e) => return Err(failed("KVM_GET_PIT2", &e)),
        }
        for index in 0..self.vcpus.len() {
            entries.push(self.entry::<VcpuState>(index, PRIORITY_VCPU)?);
        }
        entries.push(self.entry::<ClockState>(0, PRIORITY_CLOCK)?);
        Ok(entries)
    }

    fn entry<S: Transfer>(self: &Arc<Self>, index: usize, priority: i32) -> Result<Entry> {
        let instance = u32::try_from(index).map_err(|_| Error::invalid("too many vCPUs"))?;
        let section = Arc::new(KvmSection::<S>::new(Arc::clone(self), index)?);
        Ok(Entry { name: S::NAME, instance, priority, version: 1, section })
    }

    /// Completes every vCPU's last exit, without running the guest. Call it when the stop hook returned and before
    /// device state is saved: until then the guest's registers do not show what a port or MMIO read returned.
    ///
    /// An instruction may need a further exit (an access that crosses into another page, a string of port reads).
    /// `reentry` is then called, on this thread, to handle what `kvm_run` of that vCPU asks for, as the VMM's vCPU
    /// thread would. Without it that is `EBUSY`, the exit stays on record for the next call, and a guest that goes on
    /// instead needs it handled before its next `KVM_RUN`; see [`unfinished`](Self::unfinished).
    pub fn ready(&self, reentry: Option<Reentry<'_>>) -> Result<()> {
        let mut vcpus: Vec<usize> = (0..self.vcpus.len()).collect();
        for _ in 0..EXITS_MAX {
            self.answer(reentry)?;
            let shared = Arc::clone(&self.state);
            self.on_vcpus(&vcpus, move |index, vcpu| {
                if let Some(reason) = vcpu.complete_exit()? {
                    lock(&shared).unfinished.insert(index, reason);
                }
                Ok(())
            })?;
            let mut shared = lock(&self.state);
            if shared.unfinished.is_empty() {
                shared.ready = true;
                return Ok(());
            }
            vcpus = shared.unfinished.keys().copied().collect();
        }
        let index = vcpus.first().copied().unwrap_or_default();
        Err(Error::new(libc::EBUSY, format!("vCPU {index} still asks for exits after {EXITS_MAX} of them")))
    }

    /// vCPUs whose `kvm_run` holds an exit that KVM came to in [`ready`](Self::ready) and nobody handled.
    pub fn unfinished(&self) -> Vec<usize> {
        lock(&self.state).unfinished.keys().copied().collect()
    }

    /// Has the exits on record handled: KVM takes the next `KVM_RUN` as the answer, whatever `kvm_run` holds.
    fn answer(&self, reentry: Option<Reentry<'_>>) -> Result<()> {
        let asked = lock(&self.state).unfinished.clone();
        for (index, reason) in asked {
            let Some(reentry) = reentry else {
                return Err(Error::new(
                    libc::EBUSY,
                    format!(
                        "vCPU {index} needs its next exit (reason {reason}) handled before its instruction is \
                         complete: in the stop hook, call KVM_RUN with immediate_exit and handle exits until EINTR"
                    ),
                ));
            };
            reentry(index)?;
            lock(&self.state).unfinished.remove(&index);
        }
        Ok(())
    }

    /// Reads kvmclock. To be called at the stop, when the vCPUs have stopped.
    pub fn clock_stop(&self) -> Result<()> {
        let clock = self.machine.vm().get_clock().map_err(|e| failed("KVM_GET_CLOCK", &e))?.clock;
        lock(&self.state).clock = Some(clock);
        Ok(())
    }

    /// Writes kvmclock as it was at the stop (here or at the source), so that the pause takes no guest time, and
    /// tells guests that asked for it that they were paused. To be called at the start, before a vCPU runs.
    pub fn clock_start(&self) -> Result<()> {
        let clock = {
            let mut state = lock(&self.state);
            state.ready = false;
            state.unfinished.clear();
            state.captures.clear();
            state.clock.take()
        };
        let all: Vec<usize> = (0..self.vcpus.len()).collect();
        // For the hello of a migration that begins while they run; without it the destination compares when it loads.
        if lock(&self.state).known.is_none() {
            let _ = self.get_to_know();
        }
        let told = clock.map_or(Ok(()), |clock| self.tell_clock(clock, &all));
        self.rest();
        told
    }

    fn tell_clock(&self, clock: u64, all: &[usize]) -> Result<()> {
        self.set_clock(clock)?;
        self.on_vcpus(all, |_, vcpu| match vcpu.fd().kvmclock_ctrl() {
            // EINVAL: this guest does not use kvmclock.
            Err(e) if e.errno() != libc::EINVAL => Err(failed("KVM_KVMCLOCK_CTRL", &e)),
            _ => Ok(()),
        })
    }

    /// Threads that wait for work on vCPUs may end.
    pub fn rest(&self) {
        self.vcpus.iter().for_each(Bench::rest);
    }

    fn set_clock(&self, clock: u64) -> Result<()> {
        let data = kvm_clock_data { clock, ..Default::default() };
        self.machine.vm().set_clock(&data).map_err(|e| failed("KVM_SET_CLOCK", &e))
    }

    /// Runs `work` on these vCPUs at once, each on a thread of its own.
    fn on_vcpus(
        &self,
        indices: &[usize],
        work: impl Fn(usize, &mut Vcpu) -> Result<()> + Send + Clone + 'static,
    ) -> Result<()> {
        let timeout = lock(&self.state).stop_timeout;
        let deadline = Instant::now() + timeout;
        let (mut jobs, mut failure) = (Vec::new(), None);
        for &index in indices {
            let Some(bench) = self.vcpus.get(index) else { continue };
            let work = work.clone();
            match bench.start(&self.threads, Vcpu::probe, move |vcpu| work(index, vcpu)) {
                Ok(job) => jobs.push((index, job)),
                Err(error) => failure = failure.or(Some((index, error))),
            }
        }
        for (index, job) in jobs {
            // All are waited for, also after a failure: a thread must not be left behind unseen.
            if let Err(error) = job.wait(deadline, timeout) {
                failure = failure.or(Some((index, error)));
            }
        }
        match failure {
            None => Ok(()),
            Some((_, error)) if error.errno() == libc::ETIMEDOUT => Err(error),
            Some((index, error)) => Err(error.context(format_args!("vCPU {index}"))),
        }
    }

    fn on_vcpu<T: Send + 'static>(
        &self,
        index: usize,
        work: impl FnOnce(&mut Vcpu) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let timeout = lock(&self.state).stop_timeout;
        self.start_on(index, work)?.wait(Instant::now() + timeout, timeout)
    }

    fn start_on<T: Send + 'static>(
        &self,
        index: usize,
        work: impl FnOnce(&mut Vcpu) -> Result<T> + Send + 'static,
    ) -> Result<Job<T>> {
        let bench = self.vcpus.get(index).ok_or_else(|| Error::invalid(format!("there is no vCPU {index}")))?;
        bench.start(&self.threads, Vcpu::probe, work)
    }

    /// A vCPU's state. Whoever comes first has the states of all vCPUs read.
    fn capture(&self, index: usize) -> Result<Captured> {
        let mut state = lock(&self.state);
        if !state.captures.contains_key(&index) {
            state.captures.clear();
            for vcpu in 0..self.vcpus.len() {
                state.captures.insert(vcpu, self.start_capture(vcpu)?);
            }
        }
        let (timeout, job) = (state.stop_timeout, state.captures.remove(&index));
        drop(state);
        let job = job.map_or_else(|| self.start_capture(index), Ok)?;
        job.wait(Instant::now() + timeout, timeout)
    }

    fn start_capture(&self, index: usize) -> Result<Job<Captured>> {
        let mut notes = Notes { msrs: self.msrs.clone(), unreadable: Vec::new() };
        self.start_on(index, move |vcpu| Ok((vcpu::save(vcpu, &mut notes)?, notes.unreadable)))
    }
}
