//! Before a migration: how fast the guest dirties its memory, and what a migration would come to.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Machine;
use crate::dirty::choice::Choice;
use crate::dirty::rate::{self, Ask, Mode, Now, PERIOD_MS, SAMPLES, SAMPLES_DEFAULT, State};
use crate::error::{Error, Result};
use crate::options::{Opt, Options};
use crate::pacing::dirtying::Dirtying;
use crate::pacing::downtime::Known;
use crate::pacing::forecast::{Forecast, Question};
use crate::pacing::throttle::Config;
use crate::sys::eventfd::Wake;
use crate::thread::{lock, try_lock};
use crate::vmm::StopReason;

/// What passes before the first pages arrive, about: connections, both hellos, the dirty log, and a destination that has
/// to make memory before it can take any.
const START: Duration = Duration::from_millis(100);
/// Why a measurement ends when a migration begins.
pub(super) const CUT_SHORT: &str = "a migration began before the dirty rate was measured";

impl Machine {
    /// Starts to measure how fast the guest dirties its memory. \[any\]
    pub fn measure_dirty_rate(&self, mode: Mode, period_ms: u64, samples: u64) -> Result<()> {
        let ask = self.ask(mode, period_ms, samples)?;
        let not_now = "cannot measure the dirty rate now";
        // What is registered is what is measured. Who changes it may be calling back, here for example, so nobody waits.
        let Some(_one) = try_lock(&self.changing) else {
            let text = format!("{not_now}: another thread registers or removes something, or begins to migrate");
            return Err(Error::new(libc::EBUSY, text));
        };
        // A migration begins before this or after it, and ends it then.
        let _begins = lock(&self.worker);
        self.check_unasked().map_err(|e| e.context(not_now))?;
        self.status.check_idle().map_err(|e| e.context(not_now))?;
        if self.vmm.reasons().contains(StopReason::NotOwner) || !self.keeper.phase().owns() {
            let text = format!("{not_now}: the guest is not here: it left, or did not arrive yet");
            return Err(Error::new(libc::EPERM, text));
        }
        let wake = Arc::new(Wake::new()?);
        self.meter.begin(ask, &wake).map_err(|e| e.context(not_now))?;
        let (meter, hub, list) = (Arc::clone(&self.meter), Arc::clone(&self.dirty), self.ram.list());
        let (ring, on_panic) = (self.ring.get().cloned(), Arc::clone(&self.meter));
        let body = move || {
            meter.finish(rate::measure(&hub, &list, &ask, ring.as_deref(), &wake));
            Ok(())
        };
        let spawned = self.threads.spawn_with("dirty_rate", body, move |panic| on_panic.finish(Err(panic.clone())));
        spawned.map(drop).inspect_err(|error| self.meter.finish(Err(error.clone())))
    }

    fn ask(&self, mode: Mode, period_ms: u64, samples: u64) -> Result<Ask> {
        let (least, most) = (PERIOD_MS.start(), PERIOD_MS.end());
        if !PERIOD_MS.contains(&period_ms) {
            let text = format!("the dirty rate is measured for {least} to {most} ms, not for {period_ms}");
            return Err(Error::invalid(text));
        }
        let choice = Choice::of(&self.options);
        let samples = match (mode, samples) {
            (Mode::Sampling, 0) => SAMPLES_DEFAULT,
            _ => samples,
        };
        match mode {
            Mode::Bitmap | Mode::Ring if samples > 0 => {
                return Err(Error::invalid("pages are sampled in mode page-sampling only"));
            }
            Mode::Sampling if !SAMPLES.contains(&samples) => {
                let (least, most) = (SAMPLES.start(), SAMPLES.end());
                let text = format!("{least} to {most} pages of each GiB can be sampled, not {samples}");
                return Err(Error::invalid(text));
            }
            Mode::Bitmap if choice == Choice::Nothing => {
                let text = "option 'dirty-tracker' is none: without a tracker the dirty rate can only be sampled";
                return Err(Error::invalid(text).by_option(Opt::DirtyTracker.name()));
            }
            Mode::Ring if self.ring.get().is_none() => {
                let text = "the dirty rate cannot be measured by rings: the VMM did not enable KVM's dirty rings \
                            (KVM_CAP_DIRTY_LOG_RING comes before the first vCPU, then vmig_use_kvm)";
                return Err(Error::invalid(text));
            }
            _ => {}
        }
        Ok(Ask { mode, period: Duration::from_millis(period_ms), samples, choice })
    }

    /// The present or last measurement. \[any\]
    pub fn dirty_rate(&self) -> Now {
        self.meter.now()
    }

    /// How long a measurement that is cut short may need: as long as a callback may wait, and run.
    fn end_limit(&self) -> Duration {
        self.options.time(Opt::DispatchTimeout) + self.options.time(Opt::StallTimeout)
    }

    /// What ends a measurement on the thread of a migration that begins.
    pub(super) fn measurement_end(&self) -> impl FnOnce() -> Result<()> + Send + 'static {
        let (meter, limit) = (Arc::clone(&self.meter), self.end_limit());
        move || meter.end(CUT_SHORT, limit)
    }

    /// The same here and now, callbacks run meanwhile.
    pub(super) fn end_measurement(&self, why: &str) -> Result<()> {
        if !self.vmm.dispatch().home().is_manual() {
            return self.meter.end(why, self.end_limit());
        }
        self.meter.cut_short(why);
        let idle = || self.meter.check_idle().ok();
        match self.vmm.dispatch().pump(Instant::now().checked_add(self.end_limit()), idle) {
            Some(()) => Ok(()),
            None => self.meter.check_idle(),
        }
    }

    /// What a migration would come to if the way took so many bytes per second; 0: as many as `max-bandwidth` says. \[any\]
    pub fn forecast(&self, bandwidth: u64) -> Forecast {
        let options = self.options.snapshot();
        let now = self.meter.now();
        let unknown = match now.state {
            State::None => {
                Some("what the guest dirties was not measured yet: vmig_measure_dirty_rate() comes first".into())
            }
            State::Measuring => Some("what the guest dirties is still being measured".into()),
            State::Failed => {
                now.error.map(|error| format!("what the guest dirties could not be measured: {}", error.text()))
            }
            State::Measured => self.beyond(&options).map(str::to_owned),
        };
        match (unknown, now.found) {
            (None, Some(dirtying)) => self.question(&options, &dirtying, bandwidth).answer(),
            (why, _) => Forecast::unknown(why.unwrap_or_default()),
        }
    }

    /// What the options ask for and no forecast knows.
    fn beyond(&self, options: &Options) -> Option<&'static str> {
        if options.on(Opt::Ladder) || options.on(Opt::DirtyLimit) {
            return Some(
                "options 'ladder' and 'dirty-limit' change what the guest may do as it goes, and no forecast knows how",
            );
        }
        if options.on(Opt::HandOver) {
            return Some("with option 'hand-over' memory is handed over, not copied, and its size does not matter");
        }
        let hash = self.status.downtime().expected.hash();
        (options.on(Opt::Verify) && hash.is_zero()).then_some(
            "option 'verify' hashes all memory with the guest stopped, and how long that takes was never measured",
        )
    }

    fn question<'a>(&self, options: &Options, dirtying: &'a Dirtying, bandwidth: u64) -> Question<'a> {
        let [stop, start] = self.vmm.took();
        let (before, (devices, round_trip)) = (self.status.downtime(), *lock(&self.asked));
        let hash = if options.on(Opt::Verify) { before.expected.hash() } else { Duration::ZERO };
        let known = Known {
            stop,
            start,
            devices: before.actual.devices.max(devices),
            sync: dirtying.sync,
            round_trip,
            votes: options.on(Opt::ReturnPath) && options.get(Opt::Peer) == 0,
            bandwidth: 0,
            hash,
        };
        Question {
            dirtying,
            bandwidth,
            limit: options.get(Opt::MaxBandwidth),
            switchover_bandwidth: options.get(Opt::AvailSwitchoverBandwidth),
            downtime_limit: options.time(Opt::DowntimeLimit),
            rounds: options.get(Opt::ConvergenceRounds),
            time: options.time(Opt::ConvergenceTime),
            total_timeout: options.time(Opt::TotalTimeout),
            throttle: options.on(Opt::AutoConverge).then(|| Config::of(options)),
            start: START,
            stop_first: Choice::of(options) == Choice::Nothing,
            known,
        }
    }
}
