//! The source half: connect, say hello, set up, iterate while the guest runs, complete with the guest stopped.

mod aftermath;
mod check;
mod complete;
mod farewell;
#[cfg(feature = "fault-injection")]
mod fault;
mod greet;
mod hand;
mod handover;
mod lanes;
mod numbers;
mod patience;
mod replies;
mod resume;
pub mod route;
mod sender;
mod sections;
mod slow;
mod stretch;
mod toll;
mod total;
mod verify;

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::dirty::choice::Choice;
use crate::dirty::hub::Hub;
use crate::dirty::kvm_ring::KvmRing;
use crate::dirty::set::DirtySet;
use crate::error::{Error, Result};
use crate::kvm::Kvm;
use crate::options::{Opt, Options};
use crate::pacing::{self, Approach, Convergence, Rate};
use crate::ram::presence::{Hint, Presence};
use crate::ram::{Block, PAGE, RamList};
use crate::section::list::Entry;
use crate::status::watch::phase;
use crate::status::{State, Status, store_time};
use crate::switchover::Phase;
use crate::switchover::keeper::Keeper;
use crate::sys::eventfd::Wake;
use crate::sys::io;
use crate::thread::Threads;
use crate::transport::stream::StreamOutput;
use crate::transport::{Channel, STALL};
use crate::vmm::{StopReason, Vmm};
use crate::wire::ask::MigrationId;
use crate::wire::command::Command;
use crate::wire::frame::Bodies;
use crate::wire::stream;
pub use check::{Report, check};
use complete::{Lap, Saved};
use farewell::Farewell;
use hand::HandOver;
use handover::Rest;
use patience::Patience;
use replies::Replies;
use resume::Resuming;
use route::Route;
use sections::SectionSaver;
use sender::{FindZeros, RamSender};
use slow::Slow;
use toll::Toll;
use total::TotalTime;
use verify::Verify;

/// Longest a section or the page loop works before the loop looks up (errors, limits, other sections).
const SLICE: Duration = Duration::from_millis(50);
/// Bytes the sections may send in one turn, so that none keeps RAM waiting, nor fills our memory.
const SECTION_SLICE: u64 = 8 << 20;
/// Fewer bytes of pages at once are not worth their packet, however low the bandwidth limit.
const WRITE_MIN: u64 = 64 << 10;
/// How often the loop looks for permission to switch over when nothing else is left to do.
const NAP: Duration = Duration::from_millis(10);
/// How long a failing source tries to tell the destination why: the guest waits no longer for that.
const LAST_WRITE: Duration = Duration::from_millis(200);
/// How long a failing source listens for the destination's reason.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// What a migration needs; the pieces of a guest, never the whole.
#[derive(Debug)]
pub struct Job {
    /// Where to.
    pub route: Arc<Route>,
    /// Guest RAM at the start.
    pub ram: RamList,
    /// Sections at the start.
    pub sections: Arc<[Entry]>,
    /// vCPUs, if the library knows them.
    pub kvm: Option<Arc<Kvm>>,
    /// What the destination is to build itself from.
    pub config: Option<Arc<[u8]>>,
    /// Dirty pages.
    pub dirty: Arc<Hub>,
    /// KVM's dirty rings, where the VMM enabled them.
    pub ring: Option<Arc<KvmRing>>,
    /// Stop and start.
    pub vmm: Arc<Vmm>,
    /// Where it stands.
    pub status: Arc<Status>,
    /// Options as they were at the start.
    pub options: Options,
    /// Options that may change meanwhile.
    pub live: Arc<Options>,
    /// Threads of the guest.
    pub threads: Arc<Threads>,
    /// Raised by cancel and by the first error.
    pub wake: Arc<Wake>,
    /// Who may run the guest.
    pub keeper: Arc<Keeper>,
    /// The name of this migration.
    pub migration: MigrationId,
}

/// How a migration that did not fail ended.
enum Outcome {
    /// The destination has the guest.
    Completed,
    /// The destination may have the guest: the answer was lost, for this reason.
    Unknown(Error),
    /// The switchover between two vmigs went as far as it needs this connection.
    Switched(Rest),
}

/// Runs a migration from start to end; the body of the thread `live_migration`.
pub fn run(job: &Job) {
    let (mut stopped, mut farewell) = (false, None);
    let result = attempt(job, &mut stopped, &mut farewell);
    settle(job, result, stopped);
    // KVM takes up to 20 ms a GiB for it: the guest goes on first, and the user hears of it. One that left needs it never.
    if job.keeper.phase() != Phase::Empty {
        job.dirty.rest();
    }
    farewell.iter().for_each(|words| words.say_at_leisure(job));
}

/// Leaves the guest where it belongs and reports.
fn settle(job: &Job, result: Result<Outcome>, stopped: bool) {
    job.vmm.unseal();
    let give_away = || {
        if let Err(error) = job.vmm.stop(StopReason::NotOwner) {
            job.vmm.log().to("outgoing").error(format_args!("after the guest left: {error}"));
        }
    };
    match result {
        Ok(Outcome::Switched(rest)) => aftermath::settle(job, rest),
        Ok(Outcome::Completed) => {
            give_away();
            job.keeper.moved_without_votes(false);
            job.status.end(Ok(()));
        }
        Ok(Outcome::Unknown(error)) => {
            give_away();
            job.status.end_unknown(error);
        }
        Err(error) => {
            let mut error = first_error(job, error);
            if stopped && let Err(second) = resume(&job.vmm) {
                let text =
                    format!("{error}; and the guest stays paused here, because it could not be resumed: {second}");
                error = Error::new(error.errno(), text);
            }
            job.status.end(Err(error));
        }
    }
}

/// What failed first, in the phase that failed by it.
fn first_error(job: &Job, error: Error) -> Error {
    let phase = error.place().phase.clone();
    let first = job.status.cause(error);
    match phase {
        Some(phase) => first.in_phase(&phase),
        None => first,
    }
}

/// Sends pages as the options say.
fn new_sender(job: &Job) -> RamSender {
    let find_zeros = match job.options.get(Opt::ZeroPageDetection) {
        0 => FindZeros::Nobody,
        1 => FindZeros::Here,
        _ => FindZeros::Lanes,
    };
    RamSender::new(find_zeros, job.options.on(Opt::MultifdFlushAfterEachSection))
}

/// Lets the guest run on here. Should that fail it is left as paused by the user, so that vmig_start can try again.
fn resume(vmm: &Arc<Vmm>) -> Result<()> {
    let guest = Arc::clone(vmm);
    vmm.dispatch().run_or_leave("the start hook", move || {
        guest.start(StopReason::Migration).map(drop).or_else(|error| {
            guest.stop(StopReason::User)?;
            guest.start(StopReason::Migration)?;
            Err(error)
        })
    })
}

/// Whether a connection that breaks in this way was closed or left alone by the peer, who may have said why.
fn is_peers_doing(errno: i32) -> bool {
    matches!(errno, libc::EPIPE | libc::ECONNRESET | libc::ETIMEDOUT)
}

/// Everything between connecting and the outcome. What was set up is undone on every path.
fn attempt(job: &Job, stopped: &mut bool, farewell: &mut Option<Farewell>) -> Result<Outcome> {
    let total = TotalTime::start(job).map_err(|e| e.in_phase("connect"))?;
    let limit = job.options.time(Opt::ConnectTimeout);
    let answer_by = Instant::now() + limit;
    let channel = job.route.target().connect(&job.wake, limit).map_err(|e| e.in_phase("connect"))?;
    let mut migration = Migration::new(job, channel, total, answer_by);
    let result = migration.phases(stopped);
    migration.hang_up(result, farewell)
}

/// A migration that has a connection.
struct Migration<'a> {
    job: &'a Job,
    channel: Arc<dyn Channel>,
    out: StreamOutput,
    replies: Option<Replies>,
    /// The destination is a vmig and can answer: both say hello.
    to_vmig: bool,
    /// It took our offer to switch over in four words.
    votes: bool,
    /// Connections for pages that the destination takes.
    channels_most: u8,
    /// The stream is where a command may come, when no section is open.
    may_speak: bool,
    sections: SectionSaver<'a>,
    verify: Option<Verify>,
    set: Option<Arc<DirtySet>>,
    sender: RamSender,
    /// Where blocks had pages when they were first looked at.
    existing: Vec<(Arc<Block>, Hint)>,
    /// Where each block that travels has pages.
    presence: Arc<[Presence]>,
    hand: HandOver,
    rate: Rate,
    toll: Arc<Toll>,
    accounted: u64,
    /// Of the main stream, what was charged to the toll.
    charged: u64,
    pings: u32,
    total: TotalTime,
    resuming: Resuming,
    /// When a vmig must have answered the hello.
    answer_by: Instant,
    begun: Instant,
    /// Time in which the VMM was waited for and nothing was under way: it says nothing about the link.
    link_idle: Cell<Duration>,
    last_sync: Instant,
    /// What the last harvest and the last PING took.
    sync_took: Duration,
    round_trip: Duration,
    /// Bytes that were left when the guest was last thought of being stopped.
    left: u64,
    slow: Slow,
    /// Device state that was saved when the guest was stopped, and how long that took.
    saved: Option<Result<Saved>>,
}

impl<'a> Migration<'a> {
    fn new(job: &'a Job, channel: Arc<dyn Channel>, total: TotalTime, answer_by: Instant) -> Self {
        let stall = job.options.time(Opt::StallTimeout);
        let to_vmig = channel.is_two_way() && job.options.get(Opt::Peer) == 0;
        Self {
            job,
            out: StreamOutput::new(Arc::clone(&channel), stall),
            channel,
            replies: None,
            to_vmig,
            votes: false,
            channels_most: u8::MAX,
            may_speak: false,
            sections: SectionSaver::new(&job.sections, !to_vmig),
            verify: None,
            set: None,
            sender: new_sender(job),
            existing: Vec::new(),
            presence: Arc::default(),
            hand: HandOver::nothing(job),
            rate: Rate::new(Duration::ZERO),
            toll: Toll::new(job),
            accounted: 0,
            charged: 0,
            pings: 0,
            total,
            resuming: Resuming::new(job.options.on(Opt::ResumeTimeout)),
            answer_by,
            begun: Instant::now(),
            link_idle: Cell::default(),
            last_sync: Instant::now(),
            sync_took: Duration::ZERO,
            round_trip: Duration::ZERO,
            left: 0,
            slow: Slow::new(job),
            saved: None,
        }
    }

    fn phases(&mut self, stopped: &mut bool) -> Result<Outcome> {
        phase(c"prepare", || self.prepare()).map_err(|e| e.in_phase("prepare"))?;
        let lost =
            phase(c"hello", || self.unless_lost(|migration| migration.greet().map_err(|e| e.in_phase("hello"))))?;
        let lost = phase(c"setup", || self.set_up(lost))?;
        self.job.status.counters.iteration.store(1, Ordering::Relaxed);
        self.job.status.tell_first_pass();
        match lost {
            Some(why) => self.reconnect(why)?,
            None => self.job.status.advance(State::Active)?,
        }
        store_time(&self.job.status.counters.setup, self.begun.elapsed());
        self.publish();
        self.over_connections(stopped)
    }

    /// Once only the dirty log; the stream unless the connection is `lost` already. Why it is lost now, if it is.
    fn set_up(&mut self, lost: Option<Error>) -> Result<Option<Error>> {
        self.subscribe().map_err(|e| e.in_phase("setup"))?;
        match lost {
            None => self.unless_lost(|migration| migration.open_stream().map_err(|e| e.in_phase("setup"))),
            lost => Ok(lost),
        }
    }

    /// Everything behind the setup, as far as this connection goes.
    fn proceed(&mut self, stopped: &mut bool) -> Result<Outcome> {
        phase(c"iterate", || self.iterate())
            .and_then(|()| self.total.is_kept(self.job))
            .map_err(|e| e.in_phase("iterate"))?;
        phase(c"complete", || self.complete(stopped))
    }

    /// Sections may refuse before anything is sent.
    fn prepare(&mut self) -> Result<()> {
        self.job.vmm.with_bql("the sections' prepare", || self.sections.prepare())
    }

    /// Dirty logging on.
    fn subscribe(&mut self) -> Result<()> {
        self.rehearse_verify()?;
        self.presence = stretch::presence(self.hand.rest()).into();
        let set = self.job.dirty.subscribe(self.hand.rest(), Choice::of(&self.job.options))?;
        self.set = Some(Arc::clone(&set));
        let total: u64 = set.blocks().map(|b| b.len()).sum();
        self.job.status.counters.total.store(total, Ordering::Relaxed);
        self.remember_sent()
    }

    /// START of RAM and of every iterative section: what every connection begins with.
    fn open_stream(&mut self) -> Result<()> {
        let Some(set) = self.set.clone() else { return Err(Error::invalid("no RAM was set up")) };
        self.sender.setup(&set, Arc::clone(&self.presence), &self.existing, &mut self.out)?;
        let mut bodies = Bodies::default();
        self.job.vmm.with_bql("the sections' setup", || self.sections.setup(&mut bodies))?;
        hand::pass_device_fds(&mut self.out, &self.sections.take_fds())?;
        self.write_bodies(&bodies)?;
        self.last_sync = Instant::now();
        Ok(())
    }

    /// Nobody tracks writes: all that is done while the guest runs is to find out that the destination answers.
    fn await_switchover(&mut self) -> Result<()> {
        while !self.may_switch_over()? {
            self.job.status.check()?;
            io::sleep(&*self.job.wake, NAP)?;
        }
        self.left = self.pending()?;
        self.job.status.check()
    }

    /// Rounds over what is dirty, until what is left may be sent with the guest stopped.
    fn iterate(&mut self) -> Result<()> {
        if Choice::of(&self.job.options) == Choice::Nothing {
            return self.await_switchover();
        }
        let live = &self.job.live;
        let policy = Convergence::new(live.get(Opt::ConvergenceRounds), live.time(Opt::ConvergenceTime));
        let mut approach = Approach::new(policy);
        loop {
            self.job.status.check()?;
            self.check_ladder()?;
            let sections_done = self.iterate_sections()?;
            if self.dirty_pages() > 0 {
                self.send_part()?;
            }
            // A round is over when everything that was dirty at the last sync was sent; sections may go on for ever.
            let left = |sections: &SectionSaver<'_>| sections.pending_estimate().map(|left| left.total());
            let sections_left = if sections_done { 0 } else { self.ask_sections("pending_estimate", left)? };
            if self.dirty_pages() > 0 || sections_left > self.threshold() {
                continue;
            }
            let caught_up = approach.is_near();
            if caught_up {
                self.let_destination_catch_up()?;
            }
            self.sync()?;
            let pending = self.pending()?;
            self.left = pending;
            let threshold = self.threshold();
            let allowed = self.may_switch_over()?;
            if approach.decide(self.now(), pending, threshold, allowed) {
                return Ok(());
            }
            self.climb(pending, threshold)?;
            if pending == 0 && caught_up {
                io::sleep(&*self.job.wake, NAP)?;
            }
        }
    }

    /// Waits until the destination has loaded what was sent so far, where it can tell; then measures how long an answer
    /// takes when nothing else is under way. What is only the way there and back says nothing of the bandwidth: on a long
    /// way it would seem too little for any guest.
    fn let_destination_catch_up(&mut self) -> Result<()> {
        let mut lap = Lap::new();
        self.ping()?;
        let first = lap.time();
        self.ping()?;
        self.round_trip = lap.time();
        self.link_idle.set(self.link_idle.get() + self.round_trip + first.min(self.round_trip));
        Ok(())
    }

    /// A PING, and its PONG.
    fn ping(&mut self) -> Result<()> {
        let Some(replies) = &self.replies else { return Ok(()) };
        self.pings = self.pings.wrapping_add(1);
        let mut bytes = Vec::new();
        stream::put_command(&mut bytes, Command::Ping(self.pings));
        self.out.write(&bytes)?;
        let limit = self.job.options.time(Opt::StallTimeout);
        let mut patience = Patience::new(limit);
        while !replies.has_caught_up(self.pings, SLICE.min(limit)) {
            self.job.status.check()?;
            // The guest must not be handed over to somebody who is silent already.
            if patience.is_over(self.on_its_way()) {
                let what = "the destination, which has everything that was sent, answered no ping for";
                return Err(Error::timeout(STALL, limit, what));
            }
        }
        Ok(())
    }

    fn iterate_sections(&mut self) -> Result<bool> {
        let budget = pacing::at_once(self.toll.limit(), SECTION_SLICE);
        let mut bodies = Bodies::default();
        let done = self.ask_sections("iterate", |sections| sections.iterate(&mut bodies, budget))?;
        self.write_bodies(&bodies)?;
        Ok(done)
    }

    /// Calls sections back while the guest runs, if there are any that want that.
    fn ask_sections<T: Send>(
        &self,
        what: &str,
        ask: impl FnOnce(&SectionSaver<'_>) -> Result<T> + Send,
    ) -> Result<T> {
        let sections = &self.sections;
        match sections.are_iterative() {
            true => self
                .beside_the_link(|| self.job.vmm.dispatch().run(&format!("the sections' {what}"), || ask(sections))),
            false => ask(sections),
        }
    }

    /// Bytes that the destination's system does not have yet; none where that cannot be known.
    fn on_its_way(&self) -> Option<u64> {
        Some(self.channel.on_its_way()?.saturating_add(self.sender.on_its_way()?))
    }

    /// Does what the VMM may take its time for.
    fn beside_the_link<T>(&self, f: impl FnOnce() -> T) -> T {
        let idle = self.on_its_way() == Some(0);
        let begin = Instant::now();
        let done = f();
        if idle {
            self.link_idle.set(self.link_idle.get() + begin.elapsed());
        }
        done
    }

    /// One PART of RAM: until the slice or the dirty pages are used up.
    fn send_part(&mut self) -> Result<()> {
        let Some(set) = self.set.clone() else { return Ok(()) };
        let until = Instant::now() + SLICE;
        self.sender.begin_part(&mut self.out)?;
        while self.send_batch(&set)? && Instant::now() < until && !self.is_point_due() {
            self.job.status.check()?;
        }
        // The last PART of a round: a page is under way at most once between two meetings.
        let over = self.dirty_pages() == 0 || self.is_point_due();
        self.sender.end_section(&mut self.out, over)?;
        if over { self.number_point() } else { Ok(()) }
    }

    /// Sends some dirty pages, as many as the bandwidth limit lets go in one write. False: there were none.
    fn send_batch(&mut self, set: &DirtySet) -> Result<bool> {
        let most = pacing::at_once(self.toll.limit(), u64::MAX).max(WRITE_MIN) / PAGE;
        // With lanes it is these that pay, when they know what is zero.
        drop(self.toll.pay(0)?);
        let sent = self.sender.send_batch(set, &mut self.out, most)?;
        self.account();
        Ok(sent)
    }

    /// Harvests the dirty log: a new round begins.
    fn sync(&mut self) -> Result<()> {
        let begin = Instant::now();
        self.beside_the_link(|| self.job.dirty.sync())?;
        self.sync_took = begin.elapsed();
        #[cfg(feature = "fault-injection")]
        if let Some(set) = &self.set {
            self.sender.lose_a_page(set)?;
        }
        self.sender.new_round();
        let age = self.last_sync.elapsed();
        self.last_sync = Instant::now();
        self.account();
        self.rate.round_over(self.link_time());
        let dirty = self.dirty_pages() as u64 * PAGE;
        self.slow_down(dirty)?;
        let counters = &self.job.status.counters;
        counters.dirty_rate.store(pacing::per_second(dirty, age), Ordering::Relaxed);
        counters.iteration.fetch_add(1, Ordering::Relaxed);
        self.publish();
        self.job.status.tell();
        Ok(())
    }

    /// A destination that refuses us may just hang up; after the handover nobody could tell that from a lost answer.
    fn may_switch_over(&self) -> Result<bool> {
        let Some(replies) = &self.replies else { return Ok(true) };
        let limit = self.job.options.time(Opt::StallTimeout);
        if !replies.answered() && self.resuming.linked.elapsed() > limit {
            return Err(Error::timeout(STALL, limit, "the destination did not answer the first ping within"));
        }
        Ok(replies.answered() && (!self.job.options.on(Opt::SwitchoverAck) || replies.acknowledged()))
    }

    fn dirty_pages(&self) -> usize {
        self.set.as_ref().map_or(0, |set| set.pages()) + self.sender.owed()
    }

    fn now(&self) -> Duration {
        self.begun.elapsed()
    }

    /// The time in which something could go over the link.
    fn link_time(&self) -> Duration {
        self.now().saturating_sub(self.link_idle.get())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        drop(self.toll.pay(0)?);
        self.out.write(bytes)?;
        self.account();
        Ok(())
    }

    fn write_bodies(&mut self, bodies: &Bodies) -> Result<()> {
        self.verify.as_mut().map_or(Ok(()), |verify| verify.sent(bodies))?;
        drop(self.toll.pay(0)?);
        self.out.write_bodies(bodies)?;
        self.account();
        Ok(())
    }

    /// Why the guest stays: of a connection that broke the destination's reason, if it sent one; any other error is the
    /// reason itself.
    fn reason(&self, error: Error) -> Error {
        let broken = (self.out.is_broken() || self.sender.is_broken()) && !self.job.wake.is_raised();
        let broken = broken && is_peers_doing(error.errno());
        let error = match &self.replies {
            Some(replies) if broken => replies.reason(LAST_WORDS).unwrap_or(error),
            _ => error,
        };
        self.job.status.fail(error.clone());
        error
    }

    /// Why a vmig gets no guest, in words for it; none if it said so itself.
    fn words_for(&self, error: &Error) -> Option<Command> {
        let error = match error.errno() {
            libc::ECANCELED => {
                let phase = error.place().phase.as_deref().unwrap_or("iterate");
                Error::new(libc::ECANCELED, "the migration was cancelled at the source").in_phase(phase)
            }
            _ => self.job.status.cause(error.clone()),
        };
        (error.place().side.as_deref() != Some("destination")).then(|| Command::Error(error.on_side("source")))
    }

    /// Tells a vmig why it will get no more, where the stream is between two messages and the words go out at once.
    fn say_why(&mut self, error: &Error) {
        if !self.may_speak || self.out.is_broken() {
            return;
        }
        let Some(words) = self.words_for(error) else { return };
        let mut bytes = Vec::new();
        self.sender.put_end(&mut bytes);
        stream::put_command(&mut bytes, words);
        // The destination may be gone; then there is nobody to tell. One that is awaited hears at least a farewell.
        let limit = if self.resuming.is_agreed() { LAST_WRITE / 4 } else { LAST_WRITE };
        let _ = self.out.write_last(&bytes, limit);
    }

    /// Undoes what was set up, once, whatever happened. What the destination is still to hear is left in `farewell`.
    fn hang_up(mut self, result: Result<Outcome>, farewell: &mut Option<Farewell>) -> Result<Outcome> {
        let result = match result {
            Err(error) => {
                let error = self.reason(error);
                self.say_why(&error);
                Err(error)
            }
            Ok(Outcome::Switched(rest)) if !self.job.status.is_committed() => {
                let why = rest.why.map(|why| first_error(self.job, self.reason(why)));
                why.iter().for_each(|why| self.say_why(why));
                Ok(Outcome::Switched(Rest { why, ..rest }))
            }
            Ok(outcome) => {
                self.hand.gave_away();
                Ok(outcome)
            }
        };
        self.speed_up();
        self.sender.close();
        self.channel.shutdown();
        if let Some(replies) = self.replies.take() {
            replies.join();
        }
        let why = match &result {
            Err(error) => Some(error),
            Ok(Outcome::Switched(rest)) if !self.job.status.is_committed() => rest.why.as_ref(),
            Ok(_) => None,
        };
        let unheard = why.is_some_and(|error| error.place().side.as_deref() != Some("destination"));
        *farewell = self.farewell().filter(|_| unheard).and_then(|words| words.say_at_once(self.job));
        if let Some(set) = self.set.take() {
            self.job.dirty.leave(&set);
        }
        self.clean_up();
        result
    }

    /// Undoes the sections' setups, once for each; if nobody dispatches now, before anything else that is dispatched.
    fn clean_up(&mut self) {
        if let Some(cleanup) = self.sections.cleanup()
            && let Err(error) = self.job.vmm.with_bql_or_later("the sections' cleanup", cleanup)
        {
            self.job.vmm.log().to("outgoing").error(format_args!("cleaning up after a migration: {error}"));
        }
    }
}
