//! The switchover: stop, save, send the rest, hand over.
//!
//! The order is the point. Stop hook and handlers come first, because they may write guest memory; device state is
//! saved into a buffer next, because saving may write guest memory too; only then the last dirty pages are harvested
//! and sent; and the devices go out behind all pages, so that a device which reads guest RAM while it loads sees the
//! final RAM. The very last byte is the handover: before it the guest is ours whatever happens, after it the
//! destination may run it.

use std::time::{Duration, Instant};

use super::replies::{Replies, Verdict};
use super::{Migration, Outcome, hand};
use crate::error::{Error, Result};
use crate::options::Opt;
use crate::pacing::downtime::{Downtime, Parts};
use crate::status::store_time;
use crate::sys::clock::monotonic_ns;
use crate::vmm::StopReason;
use crate::wire::command::Command;
use crate::wire::frame::Bodies;
use crate::wire::stream;

/// How long a source that knows the guest is gone waits to hear how its start went: only to report it.
const START_WAIT: Duration = Duration::from_secs(1);

/// A stop watch.
struct Lap(Instant);

impl Lap {
    /// Time since the last call.
    fn time(&mut self) -> Duration {
        let now = Instant::now();
        now - std::mem::replace(&mut self.0, now)
    }
}

impl Migration<'_> {
    /// Stops the guest and hands it over.
    pub(super) fn complete(&mut self, stopped: &mut bool) -> Result<Outcome> {
        let expected = self.known().predict(self.left).unwrap_or_default();
        let mut took = Downtime { expected, ..Downtime::default() };
        self.sections.about_to_switch();
        let stop = self.job.vmm.stop(StopReason::Migration).map_err(|e| e.in_phase("stop"))?;
        *stopped = true;
        took.actual.stop = Duration::from_nanos(stop.hook_ns + stop.handlers_ns);
        store_time(&self.job.status.counters.stop, took.actual.stop);
        let result = self.stopped(&mut took.actual);
        // A paused guest was not stopped by us.
        if stop.changed {
            took.total = Duration::from_nanos(monotonic_ns().saturating_sub(stop.began.monotonic_ns));
            if matches!(result, Ok(Outcome::Completed)) {
                store_time(&self.job.status.counters.downtime, took.total);
            }
        }
        self.job.status.set_downtime(took);
        result
    }

    /// The guest stands still.
    fn stopped(&mut self, took: &mut Parts) -> Result<Outcome> {
        let mut lap = Lap(Instant::now());
        let devices = self.save_devices().map_err(|e| e.in_phase("save"))?;
        took.devices = lap.time();
        self.send_rest(devices, took, &mut lap).map_err(|e| e.in_phase("complete"))?;
        self.hand_over(took, &mut lap)
    }

    /// END bodies, device bodies and the description, into one buffer. The big lock covers just this.
    fn save_devices(&mut self) -> Result<Bodies> {
        let mut bodies = Bodies::default();
        let clock_ns = self.job.vmm.clock_ns();
        {
            let _bql = self.job.vmm.bql().guard()?;
            self.sections.complete(&mut bodies, clock_ns)?;
        }
        // A pause that came during the switchover travels too; from here on there is none.
        let reasons = self.job.vmm.seal()?;
        self.sections.global_state(&mut bodies, reasons.without(StopReason::Migration).is_empty())?;
        let description = self.sections.description(&self.job.options.machine());
        bodies.begin();
        stream::put_end_of_stream(&mut bodies.bytes, &description)?;
        Ok(bodies)
    }

    /// The last pages, then the devices, up to the last byte but one.
    fn send_rest(&mut self, devices: Bodies, took: &mut Parts, lap: &mut Lap) -> Result<()> {
        self.job.status.check()?;
        self.toll.lift();
        self.sync()?;
        took.sync = lap.time();
        let Some(set) = self.set.clone() else { return Err(Error::invalid("no RAM was set up")) };
        let mut bytes = Vec::new();
        stream::put_command(&mut bytes, Command::SwitchoverStart);
        self.write(&bytes)?;
        self.sender.begin_end(&mut self.out)?;
        while self.send_batch(&set)? {
            self.job.status.check()?;
        }
        self.sender.end_section(&mut self.out, true)?;
        took.ram = lap.time();
        let (rest, _) = devices.split_last().ok_or_else(|| Error::invalid("an empty description"))?;
        hand::pass_device_fds(&mut self.out, &self.sections.take_fds())?;
        self.write_bodies(&rest)?;
        // As late as it can still be undone: a write that is not seen here is one the destination never gets.
        self.job.dirty.check_quiet(&set)?;
        took.devices += lap.time();
        Ok(())
    }

    /// The last byte, and what the destination makes of it.
    fn hand_over(&mut self, took: &mut Parts, lap: &mut Lap) -> Result<Outcome> {
        self.job.status.commit()?;
        // The byte that closes the description. A write that fails was not sent: the guest is still ours.
        self.out.write(b"}")?;
        self.publish();
        let Some(replies) = &self.replies else {
            self.channel.close_write();
            took.load = lap.time();
            return Ok(Outcome::Completed);
        };
        let outcome = self.await_verdict(replies)?;
        took.load = lap.time();
        if self.to_vmig
            && let Outcome::Completed = outcome
        {
            took.start = replies.started(START_WAIT).unwrap_or_default();
        }
        Ok(outcome)
    }

    fn await_verdict(&self, replies: &Replies) -> Result<Outcome> {
        match replies.verdict(self.job.options.time(Opt::StallTimeout)) {
            Verdict::Loaded => Ok(Outcome::Completed),
            Verdict::Failed(error) => Err(error.in_phase("complete")),
            Verdict::Lost(error) => {
                let text = format!(
                    "the guest was handed over, but the destination's answer got lost ({}): find out whether it runs \
                     there, then call vmig_resolve",
                    error.text()
                );
                Ok(Outcome::Unknown(Error::new(error.errno(), text).in_phase("switchover").on_side("source")))
            }
        }
    }
}
