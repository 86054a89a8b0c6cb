//! The numbers of a migration: what is left, how fast it goes, and what the downtime would be.

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::Migration;
use crate::error::Result;
use crate::options::Opt;
use crate::pacing::downtime::Known;
use crate::ram::PAGE;
use crate::status::store_time;

impl Migration<'_> {
    /// Bytes left, RAM and sections, just after a sync.
    pub(super) fn pending(&self) -> Result<u64> {
        let sections = self.ask_sections("pending_exact", |sections| sections.pending_exact())?;
        Ok((self.dirty_pages() as u64 * PAGE).saturating_add(sections.total()))
    }

    pub(super) fn threshold(&self) -> u64 {
        self.known().threshold(self.downtime_limit())
    }

    /// How long the guest may stand still: by the option, or longer by the ladder.
    pub(super) fn downtime_limit(&self) -> Duration {
        let limit = self.job.live.time(Opt::DowntimeLimit);
        self.slow.downtime().map_or(limit, |longer| longer.max(limit))
    }

    /// What a prediction of the downtime is made of.
    pub(super) fn known(&self) -> Known {
        let [stop, start] = self.job.vmm.took();
        Known {
            stop,
            start,
            devices: self.job.status.downtime().actual.devices,
            sync: self.sync_took,
            round_trip: self.round_trip,
            votes: self.votes,
            bandwidth: self.bandwidth(),
            hash: self.verify.as_ref().map_or(Duration::ZERO, |verify| verify.took),
        }
    }

    /// Bytes per second to expect at the switchover.
    pub(super) fn bandwidth(&self) -> u64 {
        match self.job.live.get(Opt::AvailSwitchoverBandwidth) {
            0 => self.rate.bandwidth(self.link_time()),
            given => given,
        }
    }

    /// Takes note of what went out since the last call.
    pub(super) fn account(&mut self) {
        self.toll.charge(self.out.written() - self.charged);
        self.charged = self.out.written();
        let written = self.out.written() + self.sender.counts().0;
        self.rate.moved(self.link_time(), written - self.accounted);
        self.accounted = written;
        self.publish();
    }

    /// Brings the numbers others look at up to date.
    pub(super) fn publish(&self) {
        let counters = &self.job.status.counters;
        let left = (self.dirty_pages() + self.sender.waiting()) as u64 * PAGE;
        counters.remaining.store(left, Ordering::Relaxed);
        let (on_lanes, normal, zero) = self.sender.counts();
        let before = &self.resuming.before;
        counters.transferred.store(before.bytes + self.out.written() + on_lanes, Ordering::Relaxed);
        counters.channel_bytes.store(before.on_lanes + on_lanes, Ordering::Relaxed);
        counters.normal_pages.store(before.normal + normal, Ordering::Relaxed);
        counters.zero_pages.store(before.zero + zero, Ordering::Relaxed);
        counters.bandwidth.store(self.rate.of_window(self.link_time()), Ordering::Relaxed);
        store_time(&counters.downtime_limit, self.downtime_limit());
        if let Some(parts) = self.known().predict(left) {
            store_time(&counters.expected_downtime, parts.total());
        }
    }
}
