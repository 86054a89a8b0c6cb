//! What else writes guest memory, or knows who did: dirty sources, and the dirty rings of vCPUs.

use std::ffi::{c_int, c_void};
use std::sync::Arc;

use super::Machine;
use crate::dirty::callback::{Caller, Source};
use crate::dirty::choice::Choice;
use crate::dirty::kvm_ring::{KvmRing, VcpuDirt};
use crate::dirty::{Kind, Tracker};
use crate::error::{Error, Result};
use crate::options::{Opt, Options};
use crate::thread::lock;
use crate::vmm::dispatch::Dispatch;

/// Dirty sources a guest may have at once.
const SOURCES_MAX: usize = 1024;

impl Caller for Dispatch {
    fn call(&self, what: &str, call: &mut (dyn FnMut() -> c_int + Send)) -> Result<c_int> {
        self.run(what, || Ok(call()))
    }

    fn post(&self, what: &str, call: Box<dyn FnOnce() + Send>) {
        self.post(what, call);
    }
}

impl Machine {
    /// KVM's dirty rings.
    pub fn ring(&self) -> Result<&Arc<KvmRing>> {
        self.ring.get().ok_or_else(|| {
            Error::invalid(
                "no dirty rings are known: vmig_use_kvm comes first, and KVM_CAP_DIRTY_LOG_RING before that",
            )
        })
    }

    /// How fast each vCPU dirties memory and may; none are known without rings.
    pub fn vcpu_dirt(&self) -> Vec<VcpuDirt> {
        self.ring.get().map_or_else(Vec::new, |ring| ring.dirt())
    }

    /// Limits how fast a vCPU dirties memory, or all; 0: no longer. With one thread it is for that thread, outside of
    /// callbacks: whoever switches the log waits for its hook. \[free\]
    pub fn limit_vcpu(&self, vcpu: Option<usize>, limit: u64) -> Result<()> {
        // A log that is still to be switched off is switched off before it is switched on.
        self.catch_up("limit a vCPU")?;
        self.ring()?.set_limit(vcpu, limit)
    }

    /// The same for a client of QMP: it is done where the VMM may be called back.
    pub fn limit_vcpu_there(&self, vcpu: Option<usize>, limit: u64) -> Result<()> {
        let home = self.vmm.dispatch().home();
        if !home.is_manual() || home.is_here() {
            return self.limit_vcpu(vcpu, limit);
        }
        self.vmm.dispatch().run("the limit of a vCPU", || self.ring()?.set_limit(vcpu, limit))
    }

    /// What the options that slow a guest down need, and cannot go with.
    pub fn check_slowing_down(&self, options: &Options) -> Result<()> {
        let [converge, limit, ladder] = [Opt::AutoConverge, Opt::DirtyLimit, Opt::Ladder].map(|o| options.on(o));
        let (option, text) = match () {
            () if limit && converge => {
                (Opt::DirtyLimit, "options 'dirty-limit' and 'auto-converge' do not go together: take one of them")
            }
            () if ladder && (limit || converge) => (
                Opt::Ladder,
                "option 'ladder' slows the guest down by itself: leave 'auto-converge' and 'dirty-limit' off",
            ),
            () if limit && self.ring.get().is_none() => (
                Opt::DirtyLimit,
                "option 'dirty-limit' needs KVM's dirty rings, which the VMM enables before it makes vCPUs",
            ),
            () if limit && !matches!(Choice::of(options), Choice::Auto | Choice::Only(Kind::KvmRing)) => {
                (Opt::DirtyLimit, "option 'dirty-limit' needs option 'dirty-tracker' to be auto or kvm-ring")
            }
            () if converge && !self.vmm.has_throttle() => (
                Opt::AutoConverge,
                "option 'auto-converge' needs a way to slow the guest down: vmig_ops.throttle or vmig_ops.gate",
            ),
            () => return Ok(()),
        };
        Err(Error::invalid(text).by_option(option.name()))
    }

    /// Adds something else that knows of writes. \[bql\]
    pub fn add_dirty_source(&self, source: Source) -> Result<()> {
        let what = format!("add dirty source '{}'", source.given_name());
        let _one = self.check_registering(what)?;
        let mut sources = lock(&self.sources);
        if sources.len() == SOURCES_MAX {
            return Err(Error::new(libc::ENOSPC, format!("a guest has at most {SOURCES_MAX} dirty sources")));
        }
        if sources.iter().any(|other| other.has_pointer_of(&source)) {
            let text = format!("dirty source '{}': one with the same opaque pointer was added", source.given_name());
            return Err(Error::new(libc::EEXIST, text));
        }
        let source = Arc::new(source);
        self.dirty.add_tracker(Arc::<Source>::clone(&source))?;
        source.adopt(Arc::<Dispatch>::clone(self.vmm.dispatch()));
        sources.push(source);
        Ok(())
    }

    /// Forgets a dirty source by its pointer; returns it, so that its last callback runs without any lock of ours but the
    /// big one. \[bql\]
    pub fn remove_dirty_source(&self, opaque: *mut c_void) -> Result<Arc<Source>> {
        let _one = self.check_removing("remove a dirty source")?;
        let mut sources = lock(&self.sources);
        let Some(at) = sources.iter().position(|source| source.is_of(opaque)) else {
            return Err(Error::new(libc::ENOENT, "no dirty source with this opaque pointer was added"));
        };
        let tracker: Arc<dyn Tracker> = Arc::<Source>::clone(&sources[at]);
        self.dirty.remove_tracker(&tracker)?;
        Ok(sources.swap_remove(at))
    }

    /// What finds the pages that are written, of the present or last migration from here: bits, and words.
    pub fn trackers(&self) -> (u32, String) {
        self.dirty.in_use()
    }
}
