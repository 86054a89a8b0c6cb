//! Auto-converge: counts what the guest dirties against what is sent, and has it slowed down.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::Migration;
use crate::error::Result;
use crate::options::{Opt, Options};
use crate::pacing::throttle::{Config, Throttle};

/// What is judged is at least so much time.
const PERIOD: Duration = Duration::from_secs(1);

/// The present period.
#[derive(Debug, Default)]
pub(super) struct Slow {
    throttle: Throttle,
    /// What the VMM was told last.
    told: u32,
    began: Option<Instant>,
    dirtied: u64,
    sent_before: u64,
}

fn config(options: &Options) -> Config {
    let percent = |option| u32::try_from(options.get(option)).unwrap_or(0);
    Config {
        trigger: options.get(Opt::ThrottleTrigger),
        initial: percent(Opt::ThrottleInitial),
        increment: percent(Opt::ThrottleIncrement),
        tailslow: options.on(Opt::ThrottleTailslow),
        max: percent(Opt::ThrottleMax),
    }
}

impl Migration<'_> {
    /// After a sync, which found `dirty` bytes: slows the guest down if it is time to. Not when it stands still.
    pub(super) fn slow_down(&mut self, dirty: u64) -> Result<()> {
        if !self.job.options.on(Opt::AutoConverge) || !self.job.vmm.is_running() {
            return Ok(());
        }
        let (sent, slow) = (self.resuming.before.bytes + self.accounted, &mut self.slow);
        slow.dirtied = slow.dirtied.saturating_add(dirty);
        if slow.began.get_or_insert(self.begun).elapsed() < PERIOD {
            return Ok(());
        }
        let step = slow.throttle.round(&config(&self.job.live), slow.dirtied, sent - slow.sent_before);
        (slow.began, slow.dirtied, slow.sent_before) = (Some(Instant::now()), 0, sent);
        if let Some(percent) = step {
            self.job
                .vmm
                .log()
                .to("outgoing")
                .info(format_args!("the guest dirties memory too fast: throttled by {percent} %"));
            self.slow_to(percent)?;
        }
        Ok(())
    }

    fn slow_to(&mut self, percent: u32) -> Result<()> {
        self.job.status.counters.throttle.store(percent.into(), Ordering::Relaxed);
        self.slow.told = percent;
        self.job.vmm.throttle(percent)
    }

    /// Behind a connection that broke, for which the guest was let go: it is as slow as before, and what it did meanwhile
    /// does not count against it.
    pub(super) fn slow_down_again(&mut self) -> Result<()> {
        let sent = self.resuming.before.bytes + self.accounted;
        (self.slow.began, self.slow.dirtied, self.slow.sent_before) = (Some(Instant::now()), 0, sent);
        match self.slow.throttle.percent() {
            percent if percent != self.slow.told => self.slow_to(percent),
            _ => Ok(()),
        }
    }

    /// The guest may run at full speed again, here or wherever it is; the status still says how slow it was.
    pub(super) fn speed_up(&mut self) {
        if std::mem::take(&mut self.slow.told) == 0 {
            return;
        }
        let vmm = Arc::clone(&self.job.vmm);
        let end = move || vmm.throttle(0);
        if let Err(error) = self.job.vmm.dispatch().run_or_leave("the throttle hook", end) {
            self.job.vmm.log().to("outgoing").error(format_args!("the guest may still be throttled: {error}"));
        }
    }
}
