//! The switchover: stop, save, send the rest, hand over.
//!
//! The order is the point. Stop hook and handlers come first, because they may write guest memory; device state is
//! saved into a buffer next, because saving may write guest memory too; only then the last dirty pages are harvested
//! and sent; and the devices go out behind all pages, so that a device which reads guest RAM while it loads sees the
//! final RAM. Between two vmigs `handover` goes on from there. Elsewhere the very last byte is the handover: before it
//! the guest is ours whatever happens, after it the destination may run it.

use std::time::{Duration, Instant};

use super::handover::Course;
use super::replies::{Replies, Verdict};
use super::{Migration, Outcome, hand};
use crate::error::{Error, Result};
use crate::options::Opt;
use crate::pacing::downtime::{Downtime, Parts};
use crate::status::watch::phase;
use crate::status::{State, store_time};
use crate::switchover::Phase;
use crate::sys::clock::monotonic_ns;
use crate::vmm::StopReason;
use crate::wire::command::Command;
use crate::wire::frame::Bodies;
use crate::wire::stream;

/// How long a source that knows the guest is gone waits to hear how its start went: only to report it.
const START_WAIT: Duration = Duration::from_secs(1);

/// A stop watch.
pub(super) struct Lap(Instant);

impl Lap {
    /// Starts now.
    pub(super) fn new() -> Self {
        Self(Instant::now())
    }

    /// Time since the last call.
    pub(super) fn time(&mut self) -> Duration {
        let now = Instant::now();
        now - std::mem::replace(&mut self.0, now)
    }
}

/// Device state, and how long it took to save it.
#[derive(Debug)]
pub(super) struct Saved {
    pub(super) bodies: Bodies,
    pub(super) took: Duration,
}

impl Migration<'_> {
    /// Stops the guest and hands it over.
    pub(super) fn complete(&mut self, stopped: &mut bool) -> Result<Outcome> {
        let expected = self.known().predict(self.left).unwrap_or_default();
        let mut took = Downtime { expected, ..Downtime::default() };
        self.sections.about_to_switch();
        self.let_vcpus_come();
        let wait = self.job.options.on(Opt::PauseBeforeSwitchover);
        let job = self.job;
        let mut course = Course::new(&mut took.actual);
        let mut next = Ok(());
        // From the stop to the last device in one go: a VMM whose one thread does this between other work must not make
        // the guest stand still in between.
        let stop = job.vmm.dispatch().run("the stop hook", || {
            let stop = phase(c"stop", || job.vmm.stop(StopReason::Migration))?;
            *stopped = true;
            course.took.stop = Duration::from_nanos(stop.hook_ns + stop.handlers_ns);
            course.restart_lap();
            if !wait {
                // A cancel that came while the guest was being stopped is noticed here.
                next = job.status.advance(State::Device);
            }
            match (wait || next.is_err(), self.votes) {
                (true, _) => (),
                (false, true) => self.up_to_devices(&mut course),
                (false, false) => self.saved = Some(self.save_devices()),
            }
            Ok(stop)
        });
        let stop = stop.map_err(|e| e.in_phase("stop"))?;
        store_time(&job.status.counters.stop, course.took.stop);
        let result = next.and_then(|()| match self.votes {
            true => self.switch_over(course, wait),
            false => self.stopped(course.took, wait),
        });
        // A paused guest was not stopped by us.
        if stop.changed {
            took.total = Duration::from_nanos(monotonic_ns().saturating_sub(stop.began.monotonic_ns));
            let left = match &result {
                Ok(Outcome::Switched(_)) => self.job.keeper.phase() == Phase::Empty,
                other => matches!(other, Ok(Outcome::Completed)),
            };
            if left {
                store_time(&self.job.status.counters.downtime, took.total);
            }
        }
        self.job.status.set_downtime(took);
        result
    }

    /// The guest stands still, and goes where nobody votes.
    fn stopped(&mut self, took: &mut Parts, wait: bool) -> Result<Outcome> {
        if wait {
            self.job.status.advance(State::PreSwitchover)?;
            self.job.status.await_go_on()?;
        }
        let mut lap = Lap::new();
        let Saved { mut bodies, took: saving } = self.saved_devices()?;
        let description = self.sections.description(&self.job.options.machine());
        stream::put_end_of_stream(&mut bodies.bytes, &description)?;
        took.devices = saving + lap.time();
        let (rest, _) = bodies.split_last().ok_or_else(|| Error::invalid("an empty description"))?;
        self.send_rest(&rest, took, &mut lap).map_err(|e| e.in_phase("complete"))?;
        if self.replies.is_none() {
            let limit = self.job.options.time(Opt::StallTimeout);
            self.channel.is_taken(limit).map_err(|e| e.in_phase("complete"))?;
        }
        // As late as it can still be undone: a write that is not seen here is one the destination never gets.
        let set = self.set.as_ref();
        set.map_or(Ok(()), |set| self.job.dirty.check_quiet(set)).map_err(|e| e.in_phase("complete"))?;
        took.devices += lap.time();
        self.hand_over(took, &mut lap)
    }

    /// What was saved when the guest was stopped, or is saved now.
    pub(super) fn saved_devices(&mut self) -> Result<Saved> {
        let saved = self.saved.take().unwrap_or_else(|| self.save_devices());
        saved.map_err(|e| e.in_phase("save"))
    }

    /// END bodies and device bodies, into one buffer. The big lock covers just this.
    pub(super) fn save_devices(&mut self) -> Result<Saved> {
        phase(c"save", || self.save_devices_now())
    }

    fn save_devices_now(&mut self) -> Result<Saved> {
        let mut lap = Lap::new();
        let mut bodies = Bodies::default();
        let clock_ns = self.job.vmm.clock_ns();
        let sections = &mut self.sections;
        self.job.vmm.with_bql("the saving of devices", || sections.complete(&mut bodies, clock_ns))?;
        // A pause that came during the switchover travels too; from here on there is none.
        let reasons = self.job.vmm.seal()?;
        self.sections.global_state(&mut bodies, reasons.without(StopReason::Migration).is_empty())?;
        bodies.begin();
        Ok(Saved { bodies, took: lap.time() })
    }

    /// The last pages, then the devices.
    pub(super) fn send_rest(&mut self, devices: &Bodies, took: &mut Parts, lap: &mut Lap) -> Result<()> {
        phase(c"last-pages", || self.send_rest_now(devices, took, lap))
    }

    fn send_rest_now(&mut self, devices: &Bodies, took: &mut Parts, lap: &mut Lap) -> Result<()> {
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
        hand::pass_device_fds(&mut self.out, &self.sections.take_fds())?;
        // Whatever is written behind this counts as the handover.
        self.may_speak = false;
        self.write_bodies(devices)?;
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
            let taken = self.channel.finish(self.job.options.time(Opt::StallTimeout));
            took.load = lap.time();
            return Ok(taken.map_or_else(|error| Outcome::Unknown(doubtful(&error)), |()| Outcome::Completed));
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

    /// What the destination says, or does not.
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

/// What was written went to somebody who failed afterwards: who runs the guest, if it was a way to a destination?
fn doubtful(error: &Error) -> Error {
    let text = format!(
        "everything of the guest was written, but then {}: find out whether the guest runs, or can run, from what was \
         written, then call vmig_resolve",
        error.text()
    );
    Error::new(error.errno(), text).in_phase("switchover").on_side("source")
}
