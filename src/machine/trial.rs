//! Trying a device, for the tests of its VMM.

use super::Machine;
use crate::error::{Error, Result};
use crate::section::trial::{self, Plan};
use crate::thread::{fence, lock};

impl Machine {
    /// Tries a device or section with everything a migration could do to it; `EBADMSG` if something is wrong. \[free\]
    pub fn try_device(&self, name: &str, instance: u32, plan: &mut Plan<'_>) -> Result<()> {
        const WHAT: &str = "test a device";
        // The callbacks are called right here, so in a VMM with one thread this must be that one.
        self.vmm.dispatch().home().require_outside(WHAT)?;
        self.vmm.bql().require_free(WHAT)?;
        let one = lock(&self.changing);
        self.status.check_idle()?;
        self.vmm.check_still(WHAT)?;
        let entries = self.sections.snapshot();
        let Some(entry) = entries.iter().find(|e| e.name == name && e.instance == instance) else {
            let text = format!("no device or section '{}' with instance {instance}", name.escape_default());
            return Err(Error::new(libc::ENOENT, text));
        };
        let blocker = self.sections.block(&format!("device '{name}' is being tested"))?;
        drop(one);
        // A panic of ours must not leave the guest blocked.
        let tried = fence("testing a device", || trial::run(entry, self.vmm.bql(), plan));
        self.sections.unblock(blocker)?;
        tried
    }
}
