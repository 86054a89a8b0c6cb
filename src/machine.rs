//! One guest: registering its parts, and starting, steering and watching its migrations. The safe face of the library.

use std::ffi::c_int;
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use crate::dirty::hub::Hub;
use crate::dirty::kvm_log::{KvmLog, Switch};
use crate::error::{Error, Result};
use crate::incoming::door::Door;
use crate::incoming::reception::Reception;
use crate::incoming::{Parts, TakeStock};
use crate::kvm::{self, Kvm};
use crate::options::{Opt, Options};
use crate::outgoing::Report;
use crate::outgoing::route::Route;
use crate::ram::{BlockSpec, Ram};
use crate::section::builtin;
use crate::section::list::{Content, Entry, SectionList};
use crate::status::{Side, State, Status};
use crate::switchover::Resolution;
use crate::switchover::keeper::Keeper;
use crate::sys::eventfd::Wake;
use crate::sys::kvm::Vm;
use crate::sys::random::random;
use crate::thread::{Handle, Threads, lock};
use crate::transport::custom::Scheme;
use crate::transport::file::{FdSets, KeepsFdSets};
use crate::transport::uri::Uri;
use crate::transport::{Means, Target};
use crate::vmm::{Moment, Phase, Reasons, StopReason, Vmm};
use crate::wire::ask::MigrationId;
use crate::wire::{hello, ram as wire_ram};
use crate::{incoming, outgoing};

/// The option that is no setting of a migration, but says how the guest is owned.
const EPOCH: &str = "epoch";
/// Priority of the handler that completes the vCPUs' last exits and reads their clock: first of all at the stop, since
/// other handlers may want to see what the vCPUs did; last of all at the start.
const KVM_HANDLER_PRIORITY: i32 = i32::MAX;

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

/// KVM's part of a guest.
#[derive(Debug)]
struct WithKvm {
    kvm: Arc<Kvm>,
    log: Arc<KvmLog>,
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
    /// What a destination is sent to build itself from.
    config: Mutex<Option<Arc<[u8]>>>,
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
            vmm: Arc::new(vmm),
            ram: Arc::default(),
            sections: Arc::default(),
            dirty: Arc::default(),
            options: Arc::default(),
            status: Arc::new(Status::new()?),
            threads,
            kvm: Arc::default(),
            config: Mutex::default(),
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

    /// Name and kernel id of each thread of the library.
    pub fn threads(&self) -> Vec<(String, c_int)> {
        self.threads.list()
    }

    /// What is registered is what migrates: nothing may change while a migration runs. \[bql\]
    fn check_registering(&self, what: &str) -> Result<()> {
        self.vmm.bql().require_held(what)?;
        self.status.check_may_register().map_err(|e| e.context(format_args!("cannot {what} now")))
    }

    /// Registers guest RAM. \[bql\]
    pub fn add_ram(&self, spec: BlockSpec) -> Result<()> {
        self.check_registering("add RAM")?;
        self.ram.add(spec).map(drop)
    }

    /// Forgets guest RAM and its KVM slots. \[bql\]
    pub fn remove_ram(&self, name: &str) -> Result<()> {
        self.check_registering("remove RAM")?;
        let block = self.ram.find(name);
        self.ram.remove(name)?;
        if let (Some(block), Some(kvm)) = (block, &*lock(&self.kvm)) {
            kvm.log.remove_block(&block);
        }
        Ok(())
    }

    /// A device wrote guest RAM. Wait-free. \[any\]
    pub fn mark_dirty(&self, host: u64, len: u64) {
        self.ram.mark(host, len);
    }

    /// Takes over vCPUs, interrupt controllers, clock and dirty log of a KVM guest. \[bql\]
    pub fn use_kvm(&self, vm_fd: c_int, vcpu_fds: &[c_int]) -> Result<()> {
        self.check_registering("use KVM")?;
        let mut slot = lock(&self.kvm);
        if slot.is_some() {
            return Err(Error::new(libc::EEXIST, "vmig_use_kvm was called before for this guest"));
        }
        let kvm = kvm::attach(Arc::clone(&self.threads), vm_fd, vcpu_fds)?;
        let log = Arc::new(KvmLog::new(Vm::dup(vm_fd)?, self.switch())?);
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
        let registered = self
            .vmm
            .add_handler("KVM", KVM_HANDLER_PRIORITY, handler)
            .and_then(|_| self.dirty.add_tracker(Arc::<KvmLog>::clone(&log)));
        if let Err(error) = registered {
            self.sections.remove(key)?;
            return Err(error);
        }
        *slot = Some(WithKvm { kvm, log });
        Ok(())
    }

    /// How logging is switched: by the VMM's hook if there is one.
    fn switch(&self) -> Option<Switch> {
        let vmm = Arc::clone(&self.vmm);
        self.vmm.has_log_dirty().then(|| Box::new(move |slot, on| vmm.log_dirty(slot, on)) as Switch)
    }

    /// Registers a KVM memory slot, whose dirty log is then read. \[bql\]
    pub fn add_kvm_slot(&self, slot: &KvmSlot<'_>) -> Result<()> {
        self.check_registering("add a KVM slot")?;
        let kvm = lock(&self.kvm);
        let Some(kvm) = &*kvm else {
            return Err(Error::invalid("call vmig_use_kvm before registering KVM slots"));
        };
        let Some(block) = self.ram.find(slot.ram) else {
            let text = format!("KVM slot {}: there is no RAM block '{}'", slot.number, slot.ram.escape_default());
            return Err(Error::new(libc::ENOENT, text));
        };
        kvm.log.add_slot(slot.number, slot.flags, &block, slot.offset, slot.len, slot.gpa)
    }

    /// Forgets a KVM memory slot. \[bql\]
    pub fn remove_kvm_slot(&self, number: u32) -> Result<()> {
        self.check_registering("remove a KVM slot")?;
        match &*lock(&self.kvm) {
            Some(kvm) => kvm.log.remove_slot(number),
            None => Err(Error::new(libc::ENOENT, format!("KVM slot {number} is not registered"))),
        }
    }

    /// Registers a device or section. \[bql\]
    pub fn add_section(&self, entry: Entry) -> Result<()> {
        self.check_registering("add a device")?;
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
        self.check_registering("remove a device")?;
        self.sections.remove(key)
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
        if name == EPOCH && !busy {
            let options = Options::default();
            options.set_text(name, value, false)?;
            return self.keeper.set_epoch(options.get(Opt::Epoch));
        }
        self.options.set_text(name, value, busy)
    }

    /// An option's value; also `listen-address`.
    pub fn get(&self, name: &str) -> Result<String> {
        if name == "listen-address" {
            let address = lock(&self.listening).clone();
            return address.ok_or_else(|| Error::new(libc::ENOTCONN, "no incoming migration listens"));
        }
        match name {
            EPOCH => Ok(self.keeper.epoch().to_string()),
            _ => self.options.get_text(name),
        }
    }

    /// Sets what a destination is sent before both sides compare what they have; empty: nothing.
    pub fn set_config(&self, blob: &[u8]) -> Result<()> {
        self.status.check_idle()?;
        if blob.len() as u64 > hello::CONFIG_MAX {
            let text = format!("a configuration has at most {} bytes, not {}", hello::CONFIG_MAX, blob.len());
            return Err(Error::new(libc::E2BIG, text));
        }
        let mut copy = Vec::new();
        copy.try_reserve_exact(blob.len()).map_err(|_| Error::no_memory("a configuration", blob.len() as u64))?;
        copy.extend_from_slice(blob);
        *lock(&self.config) = (!copy.is_empty()).then(|| copy.into());
        Ok(())
    }

    /// Starts to migrate to `uri`; returns at once.
    pub fn outgoing(&self, uri: &str) -> Result<()> {
        let uri = self.checked(uri)?;
        let wake = Arc::new(Wake::new()?);
        let job = self.source_job(uri, Arc::clone(&self.status), &wake)?;
        let route = Arc::downgrade(&job.route);
        self.launch(Side::Source, "live_migration", &wake, move || outgoing::run(&job))?;
        *lock(&self.route) = route;
        *lock(&self.listening) = None;
        Ok(())
    }

    /// Asks the destination at `uri` what differs, and measures what a migration would wait for. Nothing is stopped or
    /// changed on either side. \[free\]
    pub fn check(&self, uri: &str) -> Result<Report> {
        self.vmm.bql().require_free("check a migration")?;
        self.status.check_idle()?;
        let uri = self.checked(uri)?;
        // What happens is nobody's news.
        let job = self.source_job(uri, Arc::new(Status::new()?), &Arc::new(Wake::new()?))?;
        outgoing::check(&job)
    }

    /// An address that can be used: asked before a descriptor of ours could take the number that it names.
    fn checked(&self, uri: &str) -> Result<Uri> {
        let uri = Uri::parse(uri)?;
        self.means.check(&uri)?;
        Ok(uri)
    }

    /// What a migration from here needs, or why there can be none.
    fn source_job(&self, uri: Uri, status: Arc<Status>, wake: &Arc<Wake>) -> Result<outgoing::Job> {
        if self.vmm.reasons().contains(StopReason::NotOwner) || !self.keeper.phase().owns() {
            return Err(Error::new(libc::EPERM, "the guest is not here: it left, or did not arrive yet"));
        }
        self.sections.check_unblocked()?;
        if self.options.on(Opt::SwitchoverAck) && !self.options.on(Opt::ReturnPath) {
            return Err(Error::invalid("option 'switchover-ack' needs option 'return-path'"));
        }
        if self.options.on(Opt::HandOver) && !self.options.on(Opt::ReturnPath) {
            return Err(Error::invalid("option 'hand-over' needs option 'return-path'"));
        }
        self.check_resume_options()?;
        if self.options.on(Opt::Checksum) && self.options.get(Opt::Peer) == 1 {
            return Err(Error::invalid(
                "option 'checksum' needs a vmig at the other side, and option 'peer' says qemu",
            ));
        }
        // Most commands only write; one that answers is waited for.
        let answers = self.options.is_set(Opt::ReturnPath) && self.options.on(Opt::ReturnPath);
        let stop_timeout = self.options.time(Opt::StopTimeout);
        Ok(outgoing::Job {
            route: Arc::new(Route::new(Target::new(uri, answers, &self.means, wake)?)?),
            ram: self.ram.list(),
            sections: self.sections.snapshot(),
            kvm: kvm_of(&self.kvm, stop_timeout),
            config: lock(&self.config).clone(),
            dirty: Arc::clone(&self.dirty),
            vmm: Arc::clone(&self.vmm),
            status,
            options: self.options.snapshot(),
            live: Arc::clone(&self.options),
            threads: Arc::clone(&self.threads),
            wake: Arc::clone(wake),
            keeper: Arc::clone(&self.keeper),
            migration: MigrationId(random()?),
        })
    }

    /// Listens at `uri` for a guest; returns at once.
    pub fn incoming(&self, uri: &str) -> Result<()> {
        let uri = self.checked(uri)?;
        self.status.check_idle()?;
        let take_stock = self.take_stock();
        let parts = take_stock()?;
        self.dirty.rest();
        let wake = Arc::new(Wake::new()?);
        let door = Door::open(&self.reception, &uri, &self.means, &wake)?;
        let before = self.vmm.expect_arrival()?;
        let was = self.keeper.expect();
        let address = door.address().map(str::to_owned);
        let job = incoming::Job {
            parts,
            take_stock,
            vmm: Arc::clone(&self.vmm),
            status: Arc::clone(&self.status),
            options: self.options.snapshot(),
            threads: Arc::clone(&self.threads),
            before,
            wake: Arc::clone(&wake),
            keeper: Arc::clone(&self.keeper),
            was,
            reception: Arc::clone(&self.reception),
        };
        let launched = self.launch(Side::Destination, "incoming", &wake, move || incoming::run(&job, door));
        launched.inspect_err(|_| {
            self.vmm.nobody_arrived(before);
            self.keeper.restore(was);
        })?;
        *lock(&self.listening) = address;
        Ok(())
    }

    /// How a destination finds out what is registered, at the start and when the VMM has built itself.
    fn take_stock(&self) -> Arc<TakeStock> {
        let (ram, sections, kvm) = (Arc::clone(&self.ram), Arc::clone(&self.sections), Arc::clone(&self.kvm));
        let stop_timeout = self.options.time(Opt::StopTimeout);
        Arc::new(move || {
            sections.check_unblocked()?;
            Ok(Parts { ram: ram.list(), sections: sections.snapshot(), kvm: kvm_of(&kvm, stop_timeout) })
        })
    }

    fn leave_route(&self) {
        if let Some(route) = lock(&self.route).upgrade() {
            route.leave();
        }
    }

    /// Starts the thread of a migration; the one before it has ended and is joined first.
    fn launch(&self, side: Side, name: &str, wake: &Arc<Wake>, f: impl FnOnce() + Send + 'static) -> Result<()> {
        let mut worker = lock(&self.worker);
        self.status.begin(side, self.options.on(Opt::Events), wake)?;
        if let Some(last) = worker.take() {
            self.leave_route();
            // Its result went to the status; this only frees the thread.
            let _ = last.join(None);
        }
        let (status, keeper) = (Arc::clone(&self.status), Arc::clone(&self.keeper));
        let body = move || {
            f();
            Ok(())
        };
        let spawned = self.threads.spawn_with(name, body, move |panic| {
            if !status.state().is_final() {
                status.end(Err(panic.clone()));
            }
            // Nobody may wait for a driver that is gone.
            keeper.rest();
        });
        match spawned {
            Ok(handle) => {
                *worker = Some(handle);
                Ok(())
            }
            Err(error) => {
                self.status.end(Err(error.clone()));
                Err(error)
            }
        }
    }

    /// Ends a migration that runs, if it may still be ended. \[any\]
    pub fn cancel(&self) -> Result<()> {
        self.status.cancel()
    }

    /// What `resume-timeout` cannot go with.
    fn check_resume_options(&self) -> Result<()> {
        if !self.options.on(Opt::ResumeTimeout) {
            return Ok(());
        }
        let text = match () {
            () if self.options.get(Opt::Peer) == 1 => {
                "option 'resume-timeout' needs a vmig at the other side, and option 'peer' says qemu"
            }
            () if !self.options.on(Opt::ReturnPath) => "option 'resume-timeout' needs option 'return-path'",
            () if self.options.on(Opt::HandOver) => {
                "options 'resume-timeout' and 'hand-over' do not go together: a unix socket to a process of this host does \
                 not break while that process lives"
            }
            () => return Ok(()),
        };
        Err(Error::invalid(text).by_option(Opt::ResumeTimeout.name()))
    }

    /// Where a migration whose connection broke is to find its destination. \[any\]
    pub fn resume(&self, uri: &str) -> Result<()> {
        let uri = self.checked(uri)?;
        let nowhere = || {
            Error::invalid(
                "a migration goes on at an address where its destination can listen, such as tcp:HOST:PORT",
            )
        };
        if matches!(uri, Uri::Fd(_) | Uri::Exec(_) | Uri::File { .. }) {
            return Err(nowhere());
        }
        let target = Target::new(uri, false, &self.means, &Arc::new(Wake::new()?))?;
        if !target.has_channels() {
            return Err(nowhere());
        }
        let now = self.status.snapshot();
        let route = lock(&self.route).upgrade().filter(|_| now.side == Some(Side::Source));
        match route.filter(|_| now.state == State::Reconnecting) {
            Some(route) => {
                route.change(target);
                Ok(())
            }
            None => {
                let text = "no outgoing migration waits for a connection here";
                Err(Error::invalid(text).expected_got("state reconnecting at the source", now.state.name()))
            }
        }
    }

    /// The user's word to a migration that waits in pre-switchover. \[any\]
    pub fn go_on(&self) -> Result<()> {
        self.status.go_on()
    }

    /// The outcome of an unknown switchover was found out: the guest runs here (again), or it does not. \[free\]
    pub fn resolve(&self, here: bool) -> Result<()> {
        self.vmm.bql().require_free("resolve a switchover")?;
        if self.keeper.may_resolve() {
            return self.keeper.resolve(if here { Resolution::Run } else { Resolution::Discard });
        }
        if self.status.state() != State::SwitchoverUnknown {
            return self.status.resolve(here);
        }
        if here {
            // The operator knows that nobody else uses the memory.
            self.ram.list().iter().for_each(|block| block.set_given(false));
            self.vmm.stop(StopReason::User)?;
            self.vmm.start(StopReason::Migration)?;
            self.vmm.start(StopReason::NotOwner)?;
            self.vmm.start(StopReason::User)?;
        }
        self.status.resolve(here)?;
        if !here {
            self.keeper.moved_without_votes(false);
        }
        Ok(())
    }

    /// Waits until no migration runs; false at the timeout. \[free\]
    pub fn wait(&self, timeout: Option<Duration>) -> bool {
        self.status.wait(timeout.and_then(|t| Instant::now().checked_add(t)))
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
        let joined = self.threads.join_all(None);
        self.dirty.rest();
        joined
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if let Err(error) = self.shut_down() {
            self.vmm.log().error(error);
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
