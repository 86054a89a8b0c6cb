//! One guest: registering its parts, and starting, steering and watching its migrations. The safe face of the library.

mod before;
mod writers;

use std::ffi::c_int;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::{Duration, Instant};

use crate::dirty::Tracker;
use crate::dirty::callback::Source;
use crate::dirty::hub::Hub;
use crate::dirty::kvm_log::KvmLog;
use crate::dirty::kvm_ring::KvmRing;
use crate::dirty::kvm_slots::{KvmTracker, Switch};
use crate::dirty::rate::Meter;
use crate::error::{Error, Result};
use crate::incoming::reception::Reception;
use crate::kvm::{self, Kvm};
use crate::metrics::{self, Labels, Numbers};
use crate::options::{Opt, Options};
use crate::outgoing::route::Route;
use crate::ram::Ram;
use crate::section::list::{Content, Entry, SectionList};
use crate::status::Status;
use crate::switchover::keeper::Keeper;
use crate::sys::kvm::Vm;
use crate::thread::{Handle, Threads, lock};
use crate::transport::Means;
use crate::transport::custom::Scheme;
use crate::transport::file::{FdSets, KeepsFdSets};
use crate::vmm::{Level, Moment, Phase, Reasons, Vmm};
use crate::wire::hello;

mod manual;
mod migrating;
mod parts;
mod trial;

pub use parts::KvmSlot;

/// The option that is no setting of a migration, but says how the guest is owned.
const EPOCH: &str = "epoch";
/// Priority of the handler that completes the vCPUs' last exits and reads their clock: first of all at the stop, since
/// other handlers may want to see what the vCPUs did; last of all at the start.
const KVM_HANDLER_PRIORITY: i32 = i32::MAX;

/// KVM's part of a guest.
struct WithKvm {
    kvm: Arc<Kvm>,
    tracker: Arc<dyn KvmTracker>,
}

impl std::fmt::Debug for WithKvm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "WithKvm({:?}, {})", self.kvm, self.tracker.name())
    }
}

/// A guest and everything the library knows of it.
#[derive(Debug)]
pub struct Machine {
    ram: Arc<Ram>,
    sections: Arc<SectionList>,
    dirty: Arc<Hub>,
    options: Arc<Options>,
    status: Arc<Status>,
    threads: Arc<Threads>,
    /// What addresses need.
    means: Means,
    kvm: Arc<Mutex<Option<WithKvm>>>,
    sources: Mutex<Vec<Arc<Source>>>,
    /// Measurements of the dirty rate.
    meter: Arc<Meter>,
    /// What asking a destination measured last: saving the devices, and a round trip.
    asked: Mutex<(Duration, Duration)>,
    /// KVM's dirty rings, where the VMM enabled them.
    ring: OnceLock<Arc<KvmRing>>,
    /// What a destination is sent to build itself from.
    config: Mutex<Option<Arc<[u8]>>>,
    /// Held while what is registered changes, and by a migration from the moment it looks at that until everybody knows
    /// that it runs: what is added is part of it, or is refused.
    changing: Arc<Mutex<()>>,
    /// How many threads ask a destination just now.
    asking: Arc<AtomicUsize>,
    /// Thread of the present or last migration.
    worker: Mutex<Option<Handle<()>>>,
    listening: Mutex<Option<String>>,
    /// The way of the outgoing migration that runs; nothing of one that ended is kept.
    route: Mutex<Weak<Route>>,
    /// Who may run the guest; outlives the migrations.
    keeper: Arc<Keeper>,
    /// Who comes in; outlives the migrations, too, for questions about them.
    reception: Arc<Reception>,
    /// Dropped last: the VMM is promised that its own `destroy` comes after all others.
    vmm: Arc<Vmm>,
}

impl Machine {
    /// A guest with these hooks and nothing registered yet.
    pub fn new(vmm: Vmm) -> Result<Self> {
        let (threads, keeper) = (Arc::<Threads>::default(), Arc::new(Keeper::new()?));
        Ok(Self {
            reception: Arc::new(Reception::new(&keeper, &threads)?),
            means: Means { threads: Arc::clone(&threads), schemes: Arc::default(), fd_sets: FdSets::default() },
            keeper,
            status: Arc::new(Status::with_feed(Arc::clone(vmm.feed()))?),
            vmm: Arc::new(vmm),
            ram: Arc::default(),
            sections: Arc::default(),
            dirty: Arc::default(),
            options: Arc::default(),
            threads,
            kvm: Arc::default(),
            sources: Mutex::default(),
            meter: Arc::default(),
            asked: Mutex::default(),
            ring: OnceLock::new(),
            config: Mutex::default(),
            changing: Arc::default(),
            asking: Arc::default(),
            worker: Mutex::default(),
            listening: Mutex::default(),
            route: Mutex::default(),
        })
    }

    /// The VMM as we see it: big lock, run state, log.
    pub fn vmm(&self) -> &Arc<Vmm> {
        &self.vmm
    }

    /// Where the present or last migration stands.
    pub fn status(&self) -> &Arc<Status> {
        &self.status
    }

    /// What may keep the guest from migrating, besides its sections.
    pub fn sections(&self) -> &SectionList {
        &self.sections
    }

    /// The library's threads for this guest.
    pub fn threads(&self) -> &Arc<Threads> {
        &self.threads
    }

    /// Everything that can be counted, in Prometheus' text format.
    pub fn metrics(&self, labels: &Labels<'_>) -> String {
        let numbers = Numbers {
            now: self.status.snapshot(),
            downtime: self.status.downtime(),
            tally: self.status.tally(),
            bql: self.vmm.bql().stats(),
            threads: self.threads.list().len(),
        };
        metrics::text(&numbers, labels)
    }

    /// A device wrote guest RAM. Wait-free. \[any\]
    pub fn mark_dirty(&self, host: u64, len: u64) {
        self.ram.mark(host, len);
    }

    /// Takes over vCPUs, interrupt controllers, clock and dirty log of a KVM guest. \[bql\]
    pub fn use_kvm(&self, vm_fd: c_int, vcpu_fds: &[c_int]) -> Result<()> {
        let _one = self.check_registering("use KVM")?;
        let mut slot = lock(&self.kvm);
        if slot.is_some() {
            return Err(Error::new(libc::EEXIST, "vmig_use_kvm was called before for this guest"));
        }
        let kvm = kvm::attach(Arc::clone(&self.threads), vm_fd, vcpu_fds)?;
        let (vm, rings) = (Vm::dup(vm_fd)?, KvmRing::find(vcpu_fds)?);
        // Once for the guest's slots, and once for the hub.
        let (tracker, for_hub): (Arc<dyn KvmTracker>, Arc<dyn Tracker>) = if rings.is_empty() {
            let log = Arc::new(KvmLog::new(vm, self.switch())?);
            (Arc::<KvmLog>::clone(&log), log)
        } else {
            // Manual protection must stay off: with it KVM would not protect what a ring is to tell of.
            let ring = Arc::new(KvmRing::new(vm, rings, Arc::clone(&self.threads), self.switch()));
            let _ = self.ring.set(Arc::clone(&ring));
            (Arc::<KvmRing>::clone(&ring), ring)
        };
        let entries = kvm.sections()?;
        let handler = kvm_handler(&kvm);
        let mut added: Vec<usize> = Vec::new();
        let key = Arc::as_ptr(&kvm) as usize;
        for entry in entries {
            let mut full = Entry::new(entry.name, entry.instance, entry.version, Content::State(entry.section));
            full.priority = entry.priority;
            full.key = key;
            if let Err(error) = self.sections.add(full) {
                if !added.is_empty() {
                    self.sections.remove(key)?;
                }
                return Err(error);
            }
            added.push(key);
        }
        let registered =
            self.vmm.add_handler("KVM", KVM_HANDLER_PRIORITY, handler).and_then(|_| self.dirty.add_tracker(for_hub));
        if let Err(error) = registered {
            self.sections.remove(key)?;
            return Err(error);
        }
        *slot = Some(WithKvm { kvm, tracker });
        Ok(())
    }

    /// How logging is switched: by the VMM's hook if there is one.
    fn switch(&self) -> Option<Switch> {
        let vmm = Arc::clone(&self.vmm);
        let switch = move |slot, on| {
            if on {
                return vmm.log_dirty(slot, on);
            }
            // Where a migration ends nobody may wait for a VMM that waits for just that.
            vmm.end_log_dirty(slot);
            Ok(())
        };
        self.vmm.has_log_dirty().then(|| Box::new(switch) as Switch)
    }

    /// Adds a kind of connection.
    pub fn add_scheme(&self, scheme: Arc<dyn Scheme>) -> Result<()> {
        self.means.schemes.add(scheme)
    }

    /// What `file:/dev/fdset/N` means from now on; false: somebody said so already.
    pub fn keep_fd_sets(&self, keeper: Arc<dyn KeepsFdSets>) -> bool {
        self.means.fd_sets.keep(keeper)
    }

    /// Sets an option.
    pub fn set(&self, name: &str, value: &str) -> Result<()> {
        let busy = self.status.check_idle().is_err();
        if name == Opt::Dispatch.name() {
            return self.set_dispatch(value, busy);
        }
        if name == EPOCH && !busy {
            let options = Options::default();
            options.set_text(name, value, false)?;
            return self.keeper.set_epoch(options.get(Opt::Epoch));
        }
        self.options.set_text(name, value, busy)?;
        self.apply();
        Ok(())
    }

    /// Tells those who keep a copy what options say now.
    fn apply(&self) {
        self.vmm.dispatch().set_timeout(self.options.get(Opt::DispatchTimeout));
        if let Some(level) = Level::of(self.options.get(Opt::LogLevel)) {
            self.vmm.log().set_level(level);
        }
    }

    /// Sets several options, or none of them: each on its own, and then what they are together, must be allowed. Options
    /// that cannot change while a migration runs are refused then as `set` does.
    pub fn set_all(&self, settings: &[(&str, String)], check: impl FnOnce(&Options) -> Result<()>) -> Result<()> {
        let busy = self.status.check_idle().is_err();
        let tried = self.options.snapshot();
        for (name, value) in settings {
            if *name == Opt::Dispatch.name() && *value != self.get(name)? {
                let text = "option 'dispatch' says where the VMM is called back: the VMM itself sets it, alone";
                return Err(Error::new(libc::EPERM, text));
            }
            tried.set_text(name, value, busy)?;
        }
        check(&tried)?;
        // The one that may still be refused comes first.
        let (epoch, others): (Vec<_>, Vec<_>) = settings.iter().partition(|(name, _)| *name == EPOCH);
        epoch.iter().try_for_each(|(name, value)| self.set(name, value))?;
        // What was just allowed stays allowed: a migration that began meanwhile took its copy before or after.
        others.iter().try_for_each(|(name, value)| self.options.set_text(name, value, busy))?;
        self.apply();
        Ok(())
    }

    /// An option's value; also `listen-address` and `dirty-tracker-in-use`.
    pub fn get(&self, name: &str) -> Result<String> {
        if name == "listen-address" {
            let address = lock(&self.listening).clone();
            return address.ok_or_else(|| Error::new(libc::ENOTCONN, "no incoming migration listens"));
        }
        match name {
            "dirty-tracker-in-use" => Ok(self.trackers().1),
            EPOCH => Ok(self.keeper.epoch().to_string()),
            name if name == Opt::Dispatch.name() => Ok(manual::name(self.vmm.dispatch().home().is_manual())),
            _ => self.options.get_text(name),
        }
    }

    /// Sets what a destination is sent before both sides compare what they have; empty: nothing.
    pub fn set_config(&self, blob: &[u8]) -> Result<()> {
        if blob.len() as u64 > hello::CONFIG_MAX {
            let text = format!("a configuration has at most {} bytes, not {}", hello::CONFIG_MAX, blob.len());
            return Err(Error::new(libc::E2BIG, text));
        }
        let mut copy = Vec::new();
        copy.try_reserve_exact(blob.len()).map_err(|_| Error::no_memory("a configuration", blob.len() as u64))?;
        copy.extend_from_slice(blob);
        let _one = lock(&self.changing);
        self.status.check_idle()?;
        *lock(&self.config) = (!copy.is_empty()).then(|| copy.into());
        Ok(())
    }

    /// Waits until no migration runs; false at the timeout. \[free\]
    pub fn wait(&self, timeout: Option<Duration>) -> bool {
        let deadline = timeout.and_then(|t| Instant::now().checked_add(t));
        if !self.vmm.dispatch().home().is_manual() {
            return self.status.wait(deadline);
        }
        let dispatch = self.vmm.dispatch();
        let ended = || {
            let ended = self.status.wait(Some(Instant::now()));
            if !ended {
                dispatch.run_errands();
            }
            ended.then_some(())
        };
        dispatch.pump(deadline, ended).is_some()
    }

    /// Ends everything: a migration that runs is cancelled (or, once handed over, waited for), threads are joined.
    pub fn shut_down(&self) -> Result<()> {
        let cancelled = self.cancel();
        self.keeper.quit().raise();
        self.leave_route();
        self.reception.shut();
        if cancelled.is_err() {
            // Handed over already: the last answer is on its way and has its own time limit.
            self.wait(None);
        }
        if let Some(kvm) = &*lock(&self.kvm) {
            kvm.kvm.rest();
        }
        // It reads the trackers, which may have to be called back for that.
        let ended = self.join_worker().and(self.end_measurement("the guest was freed"));
        // Trackers have threads, too, and so has a trace file.
        self.dirty.end();
        self.ring.get().iter().for_each(|ring| ring.end_limits());
        self.status.stop_telling();
        self.join_all().and(ended)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if let Err(error) = self.shut_down() {
            self.vmm.log().to("machine").error(error);
        }
    }
}

/// The guest's vCPUs, told how long they may take to leave the guest.
fn kvm_of(slot: &Mutex<Option<WithKvm>>, stop_timeout: Duration) -> Option<Arc<Kvm>> {
    let slot = lock(slot);
    let kvm = &slot.as_ref()?.kvm;
    kvm.set_stop_timeout(stop_timeout);
    Some(Arc::clone(kvm))
}

/// Completes the vCPUs' last exits and keeps their clock while the guest is stopped.
fn kvm_handler(kvm: &Arc<Kvm>) -> Arc<dyn crate::vmm::RunHandler> {
    let kvm = Arc::clone(kvm);
    Arc::new(move |phase: Phase, _at: &Moment| match phase {
        Phase::PrepareStop => kvm.ready(None).and_then(|()| kvm.clock_stop()),
        Phase::Starting => kvm.clock_start(),
        Phase::Stopped | Phase::PrepareStart => Ok(()),
    })
}

/// Whether a new guest counts as stopped: no, but see [`Vmm::new`].
pub const NEW_GUEST: Reasons = Reasons::NONE;
