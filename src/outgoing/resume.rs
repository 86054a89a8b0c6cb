//! A connection that breaks before GO (option `resume-timeout`): the guest runs on here, taken back if it was stopped, and
//! the migration goes on over another connection.
//!
//! What the destination has is never asked. What may not be there is known here: pages sent since the last point that it
//! acknowledged, and what was written since. Everything else about the stream starts afresh: iterative sections from their
//! setup, lanes, frames, the block of the last record.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::farewell::Farewell;
use super::handover::Rest;
use super::patience::Patience;
use super::sections::SectionSaver;
use super::toll::Toll;
use super::{LAST_WORDS, Migration, Outcome, aftermath, new_sender};
use crate::dirty::sent::Sent;
use crate::error::{Error, Result};
use crate::options::Opt;
use crate::status::State;
use crate::sys::io;
use crate::transport::STALL;
use crate::transport::stream::StreamOutput;
use crate::wire::ask::MigrationId;
use crate::wire::command::Command;
use crate::wire::knock::{self, Knock};
use crate::wire::packet::{self, TAG_BYTES, Tag};
use crate::wire::stream;

/// At least so often, in bytes sent, a point is numbered.
const POINT: u64 = 256 << 20;
/// Between two tries of a connection.
const PAUSE: Duration = Duration::from_millis(100);
/// Longest try of a connection: another address may be given meanwhile.
const TRY: Duration = Duration::from_secs(2);

/// How far a migration is that may go on over another connection.
#[derive(Debug)]
pub(super) struct Resuming {
    /// The option is on.
    on: bool,
    /// The destination was asked, and may agree before we hear of it.
    asked: bool,
    /// The destination agreed.
    agreed: bool,
    /// Connections tried before this one.
    attempt: u32,
    /// When this connection was made.
    pub(super) linked: Instant,
    pub(super) before: Before,
}

/// What earlier connections carried.
#[derive(Debug, Default)]
pub(super) struct Before {
    /// Bytes, and those of them that went over channels.
    pub(super) bytes: u64,
    pub(super) on_lanes: u64,
    /// Pages sent whole, and as zero.
    pub(super) normal: u64,
    pub(super) zero: u64,
}

impl Resuming {
    pub(super) fn new(on: bool) -> Self {
        Self { on, asked: false, agreed: false, attempt: 0, linked: Instant::now(), before: Before::default() }
    }

    /// Whether the option asks for it.
    pub(super) fn is_on(&self) -> bool {
        self.on
    }

    /// Whether this connection goes on from another.
    pub(super) fn goes_on(&self) -> bool {
        self.attempt > 0
    }

    /// The hello is written; or its answer is here, which may have agreed.
    pub(super) fn ask(&mut self, waits: bool) {
        self.asked = self.on && waits;
    }

    /// Whether the destination agreed to go on after this connection breaks.
    pub(super) fn is_agreed(&self) -> bool {
        self.agreed
    }
}

fn knock_of(migration: MigrationId, number: u32, over: bool) -> Vec<u8> {
    let mut bytes = Vec::new();
    knock::put(&mut bytes, &Knock { migration, number, over });
    bytes
}

fn refused(to_vmig: bool) -> Error {
    let text = match to_vmig {
        true => {
            "option 'resume-timeout' is set, but the destination cannot be connected to again: it was given a descriptor \
             instead of an address, or does not allow features resume and switchover"
        }
        false => {
            "option 'resume-timeout' needs a destination that uses this library and can answer, at an address: not a \
                  QEMU, a pipe or a descriptor"
        }
    };
    Error::new(libc::ENOTSUP, text).by_option(Opt::ResumeTimeout.name())
}

impl Migration<'_> {
    /// What a connection that goes on from another says before its hello.
    pub(super) fn knock(&self) -> Vec<u8> {
        match self.resuming.goes_on() {
            true => knock_of(self.job.migration, self.resuming.attempt, false),
            false => Vec::new(),
        }
    }

    /// Refuses the option where it could not work.
    pub(super) fn check_resume(&self) -> Result<()> {
        let can = self.to_vmig && self.job.route.target().has_channels();
        match self.resuming.on && !can {
            true => Err(refused(false)),
            false => Ok(()),
        }
    }

    /// What the destination made of the offer.
    pub(super) fn agree_to_resume(&mut self, taken: bool) -> Result<()> {
        if taken != self.resuming.on {
            return Err(if taken {
                Error::new(libc::EPROTO, "the destination would resume, which nobody asked for")
            } else {
                refused(true)
            });
        }
        self.resuming.agreed = taken;
        Ok(())
    }

    /// How the channels of this connection say whose they are.
    pub(super) fn tag(&self) -> Tag {
        match self.resuming.agreed {
            true => packet::tag(&self.job.migration.0, self.resuming.attempt),
            false => [0; TAG_BYTES],
        }
    }

    /// Remembers from here on what was sent.
    pub(super) fn remember_sent(&mut self) -> Result<()> {
        if let (true, Some(set)) = (self.resuming.agreed, &self.set) {
            self.sender.sent = Some(Sent::new(set.blocks().map(|block| block.pages()))?);
        }
        Ok(())
    }

    /// Whether so much was sent since the last point that another one is due.
    pub(super) fn is_point_due(&self) -> bool {
        self.sender.sent.as_ref().is_some_and(|sent| sent.since() >= POINT)
    }

    /// Numbers a point, behind a meeting of the lanes. At most one is under way, so that what may have to be sent again
    /// is no more than two of them apart. A round that ends before that is acknowledged goes without: on a long way, waiting
    /// would keep the link idle.
    pub(super) fn number_point(&mut self) -> Result<()> {
        if self.replies.is_none() || self.is_awaited(Duration::ZERO) && !self.is_point_due() {
            return Ok(());
        }
        let limit = self.job.options.time(Opt::StallTimeout);
        let mut patience = Patience::new(limit);
        while self.is_awaited(super::SLICE.min(limit)) {
            self.job.status.check()?;
            if patience.is_over(self.on_its_way()) {
                let what = "the destination acknowledged nothing of what was sent for";
                return Err(Error::timeout(STALL, limit, what));
            }
        }
        let Some(number) = self.sender.sent.as_mut().and_then(Sent::number) else { return Ok(()) };
        let mut bytes = Vec::new();
        stream::put_command(&mut bytes, Command::SyncPoint(number));
        self.write(&bytes)
    }

    /// Whether a point is under way still, after at most `limit`.
    fn is_awaited(&mut self, limit: Duration) -> bool {
        let (Some(sent), Some(replies)) = (&mut self.sender.sent, &self.replies) else { return false };
        if let Some(point) = sent.awaited() {
            sent.acknowledge(replies.point(point - 1, limit));
        }
        sent.awaited().is_some()
    }

    /// Does something; if it fails only by the connection, from which a destination that agreed goes on, the reason.
    pub(super) fn unless_lost(&mut self, what: impl FnOnce(&mut Self) -> Result<()>) -> Result<Option<Error>> {
        match what(self) {
            Err(error) if self.is_link_lost(&error) => Ok(Some(error)),
            result => result.map(|()| None),
        }
    }

    /// Everything behind the setup, over as many connections as it takes.
    pub(super) fn over_connections(&mut self, stopped: &mut bool) -> Result<Outcome> {
        loop {
            let why = match self.proceed(stopped) {
                Err(error) if !*stopped && self.is_link_lost(&error) => error,
                Ok(Outcome::Switched(rest)) if self.is_switch_lost(&rest) => {
                    let why =
                        rest.why.clone().unwrap_or_else(|| Error::new(libc::ECONNRESET, "the connection broke"));
                    // What completed for this connection may have halted what the guest needs.
                    self.clean_up();
                    match aftermath::take_back(self.job, rest)? {
                        None => *stopped = false,
                        Some(rest) => return Ok(Outcome::Switched(rest)),
                    }
                    why
                }
                result => return result,
            };
            self.reconnect(why)?;
        }
    }

    /// Whether all that is wrong is the connection.
    fn is_link_lost(&self, error: &Error) -> bool {
        let silent = error.errno() == libc::ETIMEDOUT && error.place().option.as_deref() == Some(STALL);
        self.resuming.agreed
            && self.job.status.state().may_reconnect()
            && (silent || self.channel.is_lost() || self.sender.is_lost())
    }

    /// Whether a switchover came to nothing before GO, and all that was wrong is the connection.
    fn is_switch_lost(&self, rest: &Rest) -> bool {
        let lost = |why: &Error| why.place().side.as_deref() != Some("destination") && self.is_link_lost(why);
        !self.job.status.is_committed() && rest.why.as_ref().is_some_and(lost)
    }

    /// Ends everything that used the connection. A destination that failed says so meanwhile: its reason.
    fn unlink(&mut self) -> Option<Error> {
        self.may_speak = false;
        // Devices are saved anew for another connection.
        self.saved = None;
        // It hears that nothing more comes, and has the time to say why it hung up.
        self.channel.close_write();
        let words = self.replies.as_ref().and_then(|replies| replies.reason(LAST_WORDS));
        let (on_lanes, normal, zero) = self.sender.counts();
        self.sender.close();
        self.channel.shutdown();
        if let Some(replies) = self.replies.take() {
            if let Some(sent) = &mut self.sender.sent {
                sent.acknowledge(replies.point(0, Duration::ZERO));
            }
            replies.join();
        }
        let before = &mut self.resuming.before;
        before.bytes += self.out.written() + on_lanes;
        before.on_lanes += on_lanes;
        before.normal += normal;
        before.zero += zero;
        (self.accounted, self.charged) = (0, 0);
        if let Some(set) = &self.set {
            self.sender.put_back(set);
        }
        // Whoever waited in the line of the old one may have left it.
        self.toll = Toll::new(self.job);
        let sent = self.sender.sent.take();
        self.sender = new_sender(self.job);
        self.sender.sent = sent;
        self.out = StreamOutput::new(Arc::clone(&self.channel), self.job.options.time(Opt::StallTimeout));
        words
    }

    /// The connection broke: makes another one, until the time is over.
    pub(super) fn reconnect(&mut self, why: Error) -> Result<()> {
        let limit = self.job.options.time(Opt::ResumeTimeout);
        let deadline = Instant::now() + limit;
        self.begin_anew_at_full_speed();
        if let Some(words) = self.unlink() {
            self.job.status.fail(words.clone());
            return Err(words);
        }
        // It may take long, and nothing is sent meanwhile that the guest could be too fast for.
        self.job.status.counters.throttle.store(0, Ordering::Relaxed);
        let mut why = why.in_phase("iterate");
        loop {
            self.job.status.lose_link(why.clone())?;
            self.publish();
            match self.try_again(deadline).and_then(|()| self.job.status.advance(State::Active)) {
                Ok(()) => return Ok(()),
                Err(error) => why = error.in_phase("reconnect"),
            }
            let words = self.unlink();
            self.job.status.lose_link(words.unwrap_or_else(|| why.clone()))?;
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let what = format!("{}; the destination could not be connected to again within", why.text());
                return Err(Error::timeout(Opt::ResumeTimeout.name(), limit, what).in_phase("reconnect"));
            }
            self.pause(left.min(PAUSE))?;
        }
    }

    /// Waits a moment, or until there is another address to try.
    fn pause(&self, time: Duration) -> Result<()> {
        let until = Some(Instant::now() + time);
        match io::wait_any(&[self.job.route.as_fd()], self.job.wake.as_fd(), until) {
            Err(error) if error.errno() != libc::ETIMEDOUT => Err(error),
            _ => {
                self.job.route.looked();
                Ok(())
            }
        }
    }

    /// One more connection, up to where pages can be sent.
    fn try_again(&mut self, deadline: Instant) -> Result<()> {
        let left = deadline.saturating_duration_since(Instant::now());
        let limit = self.job.options.time(Opt::ConnectTimeout).min(left).max(Duration::from_millis(1));
        self.answer_by = Instant::now() + limit;
        self.resuming.attempt = self.resuming.attempt.saturating_add(1);
        let channel = self.job.route.target().connect(&self.job.wake, limit.min(TRY))?;
        self.out = StreamOutput::new(Arc::clone(&channel), self.job.options.time(Opt::StallTimeout));
        self.channel = channel;
        self.clean_up();
        self.sections = SectionSaver::new(&self.job.sections, false);
        self.prepare()?;
        self.greet()?;
        self.open_stream()?;
        self.resuming.linked = Instant::now();
        Ok(())
    }

    /// For a destination that may be waiting for us when the migration is over.
    pub(super) fn farewell(&self) -> Option<Farewell> {
        let words = || knock_of(self.job.migration, self.resuming.attempt.saturating_add(1), true);
        (self.resuming.asked || self.resuming.agreed).then(|| Farewell(words()))
    }
}
