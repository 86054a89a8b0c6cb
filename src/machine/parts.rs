//! What a guest is made of: RAM, KVM slots, devices. None of it changes while a migration runs.

use std::fmt::Display;
use std::sync::MutexGuard;

use super::Machine;
use crate::error::{Error, Result};
use crate::ram::BlockSpec;
use crate::section::builtin;
use crate::section::list::Entry;
use crate::thread::lock;
use crate::wire::ram as wire_ram;

/// A slot of KVM memory, as registered.
#[derive(Clone, Debug)]
pub struct KvmSlot<'a> {
    /// Number, address space in the upper half.
    pub number: u32,
    /// Flags without dirty logging.
    pub flags: u32,
    /// Name of the RAM block it shows.
    pub ram: &'a str,
    /// Where in the block it starts.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// Guest-physical address.
    pub gpa: u64,
}

impl Machine {
    /// What is registered is what migrates: nothing may change while a migration runs, nor, while what this returns is
    /// held, may one begin. \[bql\]
    pub(super) fn check_registering(&self, what: impl Display) -> Result<MutexGuard<'_, ()>> {
        self.vmm.bql().require_held(&what.to_string())?;
        let one = lock(&self.changing);
        let may = self.status.check_may_register().and_then(|()| self.meter.check_idle());
        let may = may.and_then(|()| self.check_unasked());
        may.map_err(|e| e.context(format_args!("cannot {what} now")))?;
        Ok(one)
    }

    /// The same for what goes away: with one thread, callbacks that are left for it come first. \[bql\]
    pub(super) fn check_removing(&self, what: impl Display) -> Result<MutexGuard<'_, ()>> {
        // Callbacks may come until it is held again.
        drop(self.check_registering(&what)?);
        // While one runs, the VMM builds itself in a callback that its thread waits for.
        if self.vmm.dispatch().home().is_manual() && self.status.check_idle().is_ok() {
            // The last migration's thread keeps what it had for another moment, and must not be the last that does.
            self.join_last();
            self.run_left(&what.to_string())?;
        }
        self.check_registering(what)
    }

    /// Registers guest RAM. \[bql\]
    pub fn add_ram(&self, spec: BlockSpec) -> Result<()> {
        let _one = self.check_registering(format_args!("add RAM block '{}'", spec.name.escape_default()))?;
        self.ram.add(spec).map(drop)
    }

    /// Forgets guest RAM and its KVM slots. \[bql\]
    pub fn remove_ram(&self, name: &str) -> Result<()> {
        let what = format!("remove RAM block '{}'", name.escape_default());
        drop(self.check_removing(&what)?);
        // What was left on when a guest left may still guard this memory.
        self.dirty.rest();
        let _one = self.check_registering(what)?;
        let block = self.ram.find(name);
        self.ram.remove(name)?;
        if let (Some(block), Some(kvm)) = (block, &*lock(&self.kvm)) {
            kvm.tracker.remove_block(&block);
        }
        Ok(())
    }

    /// Registers a KVM memory slot, whose dirty log is then read. \[bql\]
    pub fn add_kvm_slot(&self, slot: &KvmSlot<'_>) -> Result<()> {
        let _one = self.check_registering(format_args!("add KVM slot {}", slot.number))?;
        let kvm = lock(&self.kvm);
        let Some(kvm) = &*kvm else {
            return Err(Error::invalid("call vmig_use_kvm before registering KVM slots"));
        };
        let Some(block) = self.ram.find(slot.ram) else {
            let text = format!("KVM slot {}: there is no RAM block '{}'", slot.number, slot.ram.escape_default());
            return Err(Error::new(libc::ENOENT, text));
        };
        kvm.tracker.add_slot(slot.number, slot.flags, &block, slot.offset, slot.len, slot.gpa)
    }

    /// Forgets a KVM memory slot. \[bql\]
    pub fn remove_kvm_slot(&self, number: u32) -> Result<()> {
        let _one = self.check_removing(format_args!("remove KVM slot {number}"))?;
        match &*lock(&self.kvm) {
            Some(kvm) => kvm.tracker.remove_slot(number),
            None => Err(Error::new(libc::ENOENT, format!("KVM slot {number} is not registered"))),
        }
    }

    /// Registers a device or section. \[bql\]
    pub fn add_section(&self, entry: Entry) -> Result<()> {
        let _one = self.check_registering(format_args!("add device '{}'", entry.name.escape_default()))?;
        let reserved = [wire_ram::NAME, builtin::TIMER.0, builtin::GLOBAL_STATE.0];
        if reserved.contains(&entry.name.as_str()) {
            let text = format!("'{}' is a section of the library itself; take another name", entry.name);
            return Err(Error::new(libc::EEXIST, text));
        }
        self.sections.add(entry).map(drop)
    }

    /// Forgets a device or section by its key; returns it, so that its last callback runs without any lock of ours
    /// but the big one. \[bql\]
    pub fn remove_section(&self, key: usize) -> Result<Vec<Entry>> {
        let _one = self.check_removing("remove a device")?;
        self.sections.remove(key)
    }
}
