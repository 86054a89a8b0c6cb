//! A guest that dirties more than is sent: slowed down by auto-converge or dirty limits, or led up the ladder.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::{Job, Migration};
use crate::dirty::kvm_ring::KvmRing;
use crate::error::{Error, Result};
use crate::options::{Opt, Options};
use crate::pacing::dirty_limit::share;
use crate::pacing::ladder::{self, Brake, Ladder, Step};
use crate::pacing::throttle::{Config, Judge};
use crate::status::Status;
use crate::vmm::Vmm;

/// Bytes in a megabyte of option `vcpu-dirty-limit`.
const MB: u64 = 1 << 20;

/// What slows the guest down now. Released when it goes, whatever ends the migration.
#[derive(Debug)]
struct Brakes {
    vmm: Arc<Vmm>,
    status: Arc<Status>,
    ring: Option<Arc<KvmRing>>,
    throttled: bool,
}

/// How the guest is slowed down, and why.
#[derive(Debug)]
pub(super) struct Slow {
    brakes: Brakes,
    judge: Judge,
    ladder: Ladder,
}

impl Brakes {
    fn throttle(&mut self, percent: u32) -> Result<()> {
        self.throttled = true;
        self.status.counters.throttle.store(percent.into(), Ordering::Relaxed);
        self.vmm.throttle(percent)
    }

    fn limit(&self, rate: u64) {
        self.status.counters.dirty_limit.store(rate, Ordering::Relaxed);
        self.ring.iter().for_each(|ring| ring.impose(rate));
    }

    /// The guest may run at full speed again, here or wherever it is; the status still says how slow it was.
    fn release(&mut self) {
        if let Some(ring) = &self.ring {
            ring.impose(0);
            ring.suspend(false);
        }
        if !std::mem::take(&mut self.throttled) {
            return;
        }
        let vmm = Arc::clone(&self.vmm);
        let end = move || vmm.throttle(0);
        if let Err(error) = self.vmm.dispatch().run_or_leave("the throttle hook", end) {
            self.vmm.log().to("outgoing").error(format_args!("the guest may still be throttled: {error}"));
        }
    }
}

impl Drop for Brakes {
    fn drop(&mut self) {
        self.release();
    }
}

impl Slow {
    pub(super) fn new(job: &Job) -> Self {
        if let Some(ring) = &job.ring {
            ring.set_period(job.options.time(Opt::DirtyLimitPeriod));
        }
        let brakes = Brakes {
            vmm: Arc::clone(&job.vmm),
            status: Arc::clone(&job.status),
            ring: job.ring.clone(),
            throttled: false,
        };
        Self { brakes, judge: Judge::default(), ladder: Ladder::default() }
    }

    /// The downtime that the ladder allows, if it does.
    pub(super) fn downtime(&self) -> Option<Duration> {
        self.ladder.downtime()
    }
}

fn percent(options: &Options, option: Opt) -> u32 {
    u32::try_from(options.get(option)).unwrap_or(0)
}

impl Migration<'_> {
    /// After a sync, which found `dirty` bytes: slows the guest down if it is time to. Not when it stands still.
    pub(super) fn slow_down(&mut self, dirty: u64) -> Result<()> {
        let options = &self.job.options;
        let by_limit = options.on(Opt::DirtyLimit);
        if !(by_limit || options.on(Opt::AutoConverge)) || !self.job.vmm.is_running() {
            return Ok(());
        }
        let (now, sent, bandwidth, slow) = (self.now(), self.sent(), self.bandwidth(), &mut self.slow);
        let log = self.job.vmm.log().to("outgoing");
        if by_limit {
            let trigger = self.job.live.get(Opt::ThrottleTrigger);
            if slow.judge.is_due(now, trigger, dirty, sent) {
                let rate = match self.job.live.get(Opt::VcpuDirtyLimit) {
                    0 => share(bandwidth, trigger, slow.brakes.ring.as_ref().map_or(1, |ring| ring.vcpus())),
                    mb => mb.saturating_mul(MB),
                };
                log.info(format_args!(
                    "the guest dirties memory too fast: each vCPU may dirty {rate} bytes a second"
                ));
                slow.brakes.limit(rate);
            }
        } else if let Some(percent) = slow.judge.round(now, &Config::of(&self.job.live), dirty, sent) {
            log.info(format_args!("the guest dirties memory too fast: throttled by {percent} %"));
            slow.brakes.throttle(percent)?;
        }
        Ok(())
    }

    /// Bytes that left, over all connections.
    fn sent(&self) -> u64 {
        self.resuming.before.bytes + self.accounted
    }

    fn ladder_config(&self) -> ladder::Config {
        let (live, trigger) = (&self.job.live, self.job.live.get(Opt::ThrottleTrigger));
        let in_use = |ring: &&Arc<KvmRing>| ring.is_in_use();
        let brake = match self.job.ring.as_ref().filter(in_use) {
            Some(ring) => {
                let first = live.get(Opt::VcpuDirtyLimit).saturating_mul(MB);
                Brake::Limit { vcpus: ring.vcpus(), first, trigger }
            }
            None if self.job.vmm.has_throttle() => {
                let [first, more, most] = [Opt::ThrottleInitial, Opt::ThrottleIncrement, Opt::ThrottleMax]
                    .map(|option| percent(live, option));
                Brake::Percent(first, more, most)
            }
            None => Brake::None,
        };
        ladder::Config {
            downtime: live.time(Opt::DowntimeLimit),
            downtime_max: live.time(Opt::LadderDowntimeMax),
            time: live.time(Opt::LadderTime),
            brake,
        }
    }

    /// A round has ended with `pending` bytes left: takes the next step of the ladder if it is time to. Not with a guest
    /// that stands still: it converges.
    pub(super) fn climb(&mut self, pending: u64, threshold: u64) -> Result<()> {
        if !self.job.options.on(Opt::Ladder) || !self.job.vmm.is_running() {
            return Ok(());
        }
        let (config, now) = (self.ladder_config(), self.now());
        let round = ladder::Round { now, pending, threshold, bandwidth: self.bandwidth() };
        let Some(step) = self.slow.ladder.round(&config, &round) else { return Ok(()) };
        let steps = self.slow.ladder.steps();
        self.job.status.counters.ladder.store(steps, Ordering::Relaxed);
        match step {
            Step::Exhausted | Step::Late => return Err(self.fall(&config, step, pending, threshold)),
            Step::Downtime(_) => {}
            Step::Throttle(percent) => self.slow.brakes.throttle(percent)?,
            Step::Limit(rate) => self.slow.brakes.limit(rate),
        }
        self.publish();
        self.job.vmm.log().to("outgoing").warning(format_args!("the guest does not converge, step {steps}: {step}"));
        self.job.status.tell_step(step);
        Ok(())
    }

    /// Fails once the ladder's time is over, also in the middle of a round.
    pub(super) fn check_ladder(&self) -> Result<()> {
        if !self.job.options.on(Opt::Ladder) {
            return Ok(());
        }
        let config = self.ladder_config();
        match self.slow.ladder.is_late(&config, self.now()) {
            true => Err(self.fall(&config, Step::Late, self.left, self.threshold())),
            false => Ok(()),
        }
    }

    /// Why the ladder did not help, in numbers.
    fn fall(&self, config: &ladder::Config, step: Step, left: u64, threshold: u64) -> Error {
        let now = self.job.status.snapshot();
        let slowed = match (now.throttle, now.dirty_limit) {
            (0, 0) => "it was not slowed down".to_owned(),
            (0, limit) => format!("each vCPU was limited to {limit} dirtied bytes a second"),
            (percent, _) => format!("it was throttled by {percent} %"),
        };
        let what = format!(
            "the guest does not converge: after round {} {left} bytes were left and {threshold} may be, it dirties {} bytes a \
             second and {} are sent, it may stand still for {} ms of at most {} (option 'ladder-downtime-max') and {slowed}; \
             {step} after {} steps",
            now.iteration,
            now.dirty_rate,
            now.bandwidth,
            self.downtime_limit().as_millis(),
            config.downtime_max.as_millis(),
            now.ladder
        );
        self.job.status.tell_step(step);
        match step {
            Step::Late => Error::timeout(Opt::LadderTime.name(), config.time, what),
            _ => Error::new(libc::ETIMEDOUT, what).by_option(Opt::Ladder.name()),
        }
    }

    /// The guest is about to be stopped: no vCPU is to stand at its dirty ring then.
    pub(super) fn let_vcpus_come(&self) {
        self.job.ring.iter().for_each(|ring| ring.suspend(true));
    }

    /// The guest may run at full speed again, here or wherever it is; the status still says how slow it was.
    pub(super) fn speed_up(&mut self) {
        self.slow.brakes.release();
    }

    /// The connection broke: the guest need not be slow for one that is not there, and another may be faster.
    pub(super) fn begin_anew_at_full_speed(&mut self) {
        self.slow.brakes.release();
        let counters = &self.job.status.counters;
        counters.throttle.store(0, Ordering::Relaxed);
        counters.dirty_limit.store(0, Ordering::Relaxed);
        let (now, sent) = (self.now(), self.sent());
        self.slow.judge.restart(now, sent);
        self.slow.ladder.restart();
    }
}
