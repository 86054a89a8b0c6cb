//! Migrations of a guest: started in either direction, asked about, ended, and decided by an operator.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use super::before::CUT_SHORT;
use super::{Machine, WithKvm, kvm_of};
use crate::error::{Error, Result};
use crate::incoming::door::Door;
use crate::incoming::{self, Parts, TakeStock};
use crate::options::Opt;
use crate::outgoing::route::Route;
use crate::outgoing::{self, Report};
use crate::ram::Ram;
use crate::section::list::SectionList;
use crate::status::watch::{self, Teller};
use crate::status::{Side, State, Status};
use crate::switchover::Resolution;
use crate::sys::eventfd::Wake;
use crate::sys::random::random;
use crate::thread::lock;
use crate::trace;
use crate::transport::Target;
use crate::transport::uri::Uri;
use crate::vmm::StopReason;
use crate::wire::ask::MigrationId;

/// A destination is being asked; begun while `changing` is held.
struct Asking(Arc<AtomicUsize>);

impl Asking {
    fn begin(asking: &Arc<AtomicUsize>) -> Self {
        asking.fetch_add(1, Ordering::SeqCst);
        Self(Arc::clone(asking))
    }
}

impl Drop for Asking {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Machine {
    /// Starts to migrate to `uri`; returns at once.
    pub fn outgoing(&self, uri: &str) -> Result<()> {
        self.catch_up("migrate")?;
        let uri = self.checked(uri)?;
        let wake = Arc::new(Wake::new()?);
        let one = lock(&self.changing);
        self.check_unasked()?;
        let job = self.source_job(uri, Arc::clone(&self.status), &wake)?;
        let route = Arc::downgrade(&job.route);
        let end_measurement = self.measurement_end();
        self.launch(one, (Side::Source, "live_migration"), &wake, move || match end_measurement() {
            Ok(()) => outgoing::run(&job),
            Err(error) => job.status.end(Err(error)),
        })?;
        *lock(&self.route) = route;
        *lock(&self.listening) = None;
        Ok(())
    }

    /// Frees the thread of the last migration, which has ended. Its result went to the status.
    pub(super) fn join_last(&self) {
        let last = lock(&self.worker).take();
        if let Some(last) = last {
            self.leave_route();
            let _ = last.join(None);
        }
    }

    /// Asks the destination at `uri` what differs, and measures what a migration would wait for. Nothing is stopped or
    /// changed on either side. \[free\]
    pub fn check(&self, uri: &str) -> Result<Report> {
        self.vmm.bql().require_free("check a migration")?;
        self.catch_up("check a migration")?;
        let uri = self.checked(uri)?;
        // What happens is nobody's news.
        let (status, wake) = (Arc::new(Status::new()?), Arc::new(Wake::new()?));
        let (job, _asking) = {
            let _one = lock(&self.changing);
            self.status.check_idle()?;
            self.meter.check_idle()?;
            (self.source_job(uri, status, &wake)?, Asking::begin(&self.asking))
        };
        let report = outgoing::check(&job)?;
        // What was measured is of use for a forecast.
        *lock(&self.asked) = (report.devices.took, report.hello.saturating_sub(report.compare));
        Ok(report)
    }

    /// What migrates, is measured or is registered may not change while a destination is asked about it.
    pub(super) fn check_unasked(&self) -> Result<()> {
        match self.asking.load(Ordering::SeqCst) {
            0 => Ok(()),
            _ => Err(Error::new(libc::EBUSY, "a destination is being asked (vmig_check)")),
        }
    }

    /// An address that can be used: asked before a descriptor of ours could take the number that it names.
    pub fn checked(&self, uri: &str) -> Result<Uri> {
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
        self.check_slowing_down(&self.options)?;
        // Most commands only write; one that answers is waited for.
        let answers = self.options.is_set(Opt::ReturnPath) && self.options.on(Opt::ReturnPath);
        let target = Target::new(uri, answers, &self.means, wake)?;
        if self.options.is_set(Opt::Multifd) && self.options.on(Opt::Multifd) && !target.has_channels() {
            // QEMU's words.
            return Err(Error::invalid("Migration requires multi-channel URIs (e.g. tcp)"));
        }
        let stop_timeout = self.options.time(Opt::StopTimeout);
        Ok(outgoing::Job {
            route: Arc::new(Route::new(target)?),
            ram: self.ram.list(),
            sections: self.sections.snapshot(),
            kvm: kvm_of(&self.kvm, stop_timeout),
            config: lock(&self.config).clone(),
            dirty: Arc::clone(&self.dirty),
            ring: self.ring.get().cloned(),
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
        self.catch_up("listen")?;
        let uri = self.checked(uri)?;
        self.status.check_idle()?;
        self.end_measurement(CUT_SHORT)?;
        self.sections.check_unblocked()?;
        self.dirty.rest();
        let wake = Arc::new(Wake::new()?);
        let door = Door::open(&self.reception, &uri, &self.means, &wake)?;
        let one = lock(&self.changing);
        // Another migration or measurement may have begun meanwhile, and the guest would be taken away under it.
        self.status.check_idle()?;
        self.meter.check_idle()?;
        self.check_unasked()?;
        let parts = self.parts()?;
        let before = self.vmm.expect_arrival()?;
        let was = self.keeper.expect();
        let address = door.address().map(str::to_owned);
        let job = incoming::Job {
            parts,
            take_stock: self.take_stock(),
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
        let launched = self.launch(one, (Side::Destination, "incoming"), &wake, move || incoming::run(&job, door));
        launched.inspect_err(|_| {
            self.vmm.nobody_arrived(before);
            self.keeper.restore(was);
        })?;
        *lock(&self.listening) = address;
        Ok(())
    }

    /// How a destination finds out what is registered when the VMM has built itself.
    fn take_stock(&self) -> Arc<TakeStock> {
        let (ram, sections, kvm) = (Arc::clone(&self.ram), Arc::clone(&self.sections), Arc::clone(&self.kvm));
        let (stop_timeout, changing) = (self.options.time(Opt::StopTimeout), Arc::clone(&self.changing));
        Arc::new(move || {
            let _one = lock(&changing);
            parts(&ram, &sections, &kvm, stop_timeout)
        })
    }

    /// What is registered; while `changing` is held.
    fn parts(&self) -> Result<Parts> {
        parts(&self.ram, &self.sections, &self.kvm, self.options.time(Opt::StopTimeout))
    }

    pub(super) fn leave_route(&self) {
        if let Some(route) = lock(&self.route).upgrade() {
            route.leave();
        }
    }

    /// Starts the thread of a migration, for which `one` was held since it looked at what is registered; the one before it
    /// has ended and is joined first.
    fn launch(
        &self,
        one: MutexGuard<'_, ()>,
        (side, name): (Side, &str),
        wake: &Arc<Wake>,
        f: impl FnOnce() + Send + 'static,
    ) -> Result<()> {
        {
            // One migration at a time has a trace file, so who begins is decided with it.
            let _one = lock(&self.worker);
            let teller = self.start_trace(side)?;
            self.status.begin_watched(side, self.options.on(Opt::Events), wake, teller)?;
        }
        drop(one);
        self.join_last();
        let mut worker = lock(&self.worker);
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

    /// Starts the thread that writes down what happens, if it is wanted. It ends when nobody tells it any more.
    fn start_trace(&self, side: Side) -> Result<Option<Teller>> {
        let Some(path) = self.options.trace_file() else { return Ok(None) };
        self.status.check_idle()?;
        let file = trace::open(&path)?;
        let (teller, hearer) = watch::pair();
        let (status, vmm) = (Arc::clone(&self.status), Arc::clone(&self.vmm));
        self.threads.spawn("trace", move || {
            // No reason to disturb a migration.
            trace::write(file, side, &hearer, &status)
                .map_err(|error| vmm.log().to("trace").warning(error))
                .or(Ok(()))
        })?;
        Ok(Some(teller))
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
            let word = if here { Resolution::Run } else { Resolution::Discard };
            if !self.vmm.dispatch().home().is_manual() {
                return self.keeper.resolve(word);
            }
            self.keeper.ask(word)?;
            return self.vmm.dispatch().pump(None, || self.keeper.take_answer()).unwrap_or(Ok(()));
        }
        self.catch_up("resolve a switchover")?;
        if self.status.state() != State::SwitchoverUnknown {
            return self.status.resolve(here);
        }
        // Between a driver's last decision and the end the state still says unknown.
        self.status.check_undriven()?;
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
}

fn parts(ram: &Ram, sections: &SectionList, kvm: &Mutex<Option<WithKvm>>, stop_timeout: Duration) -> Result<Parts> {
    sections.check_unblocked()?;
    Ok(Parts { ram: ram.list(), sections: sections.snapshot(), kvm: kvm_of(kvm, stop_timeout) })
}
