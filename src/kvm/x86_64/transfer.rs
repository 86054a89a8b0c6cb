//! Between KVM and the structures that travel.

use kvm_bindings::{KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_pit_state2};

use super::Kvm;
use super::section::Transfer;
use super::state::{ClockState, IrqchipState, PitState, VcpuState};
use super::vcpu;
use crate::error::{Error, Result};
use crate::sys::kvm_x86::failed;
use crate::thread::lock;

impl Transfer for VcpuState {
    fn capture(kvm: &Kvm, index: usize) -> Result<Box<Self>> {
        if !lock(&kvm.state).ready {
            kvm.ready(None)?;
        }
        let (state, unreadable) = kvm.capture(index)?;
        lock(&kvm.state).unreadable_msrs.extend(unreadable);
        Ok(state)
    }

    fn warm(kvm: &Kvm, index: usize) {
        if let Some(bench) = kvm.vcpus.get(index) {
            // Only a head start: a thread that cannot be had now is asked for again, and then it is an error.
            let _ = bench.warm(&kvm.threads);
        }
    }

    fn apply(self: Box<Self>, kvm: &Kvm, index: usize) -> Result<()> {
        kvm.will_load(index, self.tsc_khz);
        kvm.on_vcpu(index, move |vcpu| vcpu::load(vcpu, &self))
    }
}

fn no_chip() -> Error {
    Error::invalid("this VM has no interrupt controller in the kernel (KVM_CREATE_IRQCHIP), the source has one")
}

impl Transfer for IrqchipState {
    fn capture(kvm: &Kvm, _: usize) -> Result<Box<Self>> {
        let machine = &kvm.machine;
        let master = machine.pic(KVM_IRQCHIP_PIC_MASTER)?.ok_or_else(no_chip)?;
        let slave = machine.pic(KVM_IRQCHIP_PIC_SLAVE)?.ok_or_else(no_chip)?;
        let ioapic = machine.ioapic()?.ok_or_else(no_chip)?;
        Ok(Box::new(Self { master, slave, ioapic }))
    }

    fn apply(self: Box<Self>, kvm: &Kvm, _: usize) -> Result<()> {
        kvm.machine.set_pic(KVM_IRQCHIP_PIC_MASTER, self.master)?;
        kvm.machine.set_pic(KVM_IRQCHIP_PIC_SLAVE, self.slave)?;
        kvm.machine.set_ioapic(&self.ioapic)
    }
}

impl Transfer for PitState {
    fn capture(kvm: &Kvm, _: usize) -> Result<Box<Self>> {
        let pit = kvm.machine.vm().get_pit2().map_err(|e| failed("KVM_GET_PIT2", &e))?;
        Ok(Box::new(Self { channels: pit.channels, flags: pit.flags }))
    }

    fn apply(self: Box<Self>, kvm: &Kvm, _: usize) -> Result<()> {
        let pit = kvm_pit_state2 { channels: self.channels, flags: self.flags, ..Default::default() };
        kvm.machine.vm().set_pit2(&pit).map_err(|e| failed("KVM_SET_PIT2", &e))
    }
}

impl Transfer for ClockState {
    /// As read at the stop; read now if nobody did.
    fn capture(kvm: &Kvm, _: usize) -> Result<Box<Self>> {
        if lock(&kvm.state).clock.is_none() {
            kvm.clock_stop()?;
        }
        Ok(Box::new(Self { clock: lock(&kvm.state).clock.unwrap_or_default() }))
    }

    /// Written now, so that a failure is found before the guest is handed over, and again at the start.
    fn apply(self: Box<Self>, kvm: &Kvm, _: usize) -> Result<()> {
        kvm.set_clock(self.clock)?;
        lock(&kvm.state).clock = Some(self.clock);
        Ok(())
    }
}
