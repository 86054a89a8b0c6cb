//! Parallel channels: threads that receive packets straight into guest memory, and the meeting points between them.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::Job;
use super::ahead::{Ahead, Scout};
use super::door::Door;
use super::target::{Target, Targets};
use crate::error::{Error, Result};
use crate::options::Opt;
use crate::ram::{Block, PAGE, PAGE_BYTES};
use crate::sys::eventfd::Wake;
use crate::sys::io::Room;
use crate::sys::thread_sys;
use crate::thread::Handle;
use crate::thread::lock;
use crate::transport::{Channel, STALL};
use crate::wire::checksum::{STEP, Sum, altered};
use crate::wire::packet::{self, Header, INIT_BYTES, Kind, PAGES_MAX, Tag};
use crate::wire::ram::NAME;

/// How often a wait looks whether the migration was cancelled.
const LOOK: Duration = Duration::from_millis(20);

/// A lane that waits for the rest of a packet gives up first: it knows better what is missing.
const GRACE: Duration = Duration::from_millis(250);
/// How long a connection that has not said what it is may hold up the end: it may be a channel too many.
const LAST_LOOK: Duration = Duration::from_secs(1);

/// Where a lane is between two meetings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    /// Nothing came since the last meeting.
    Quiet,
    /// Packets came.
    Busy,
    /// It has read its packet for the present meeting.
    Arrived,
    /// The source closed it.
    Ended,
}

#[derive(Debug, Default)]
struct State {
    /// Each lane, by the id of its channel.
    standing: Vec<Standing>,
    /// Meetings that are over.
    met: u64,
    closing: bool,
    error: Option<Error>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    received: AtomicU64,
    normal: AtomicU64,
    zero: AtomicU64,
    targets: Targets,
    /// The source may send runs of zero pages.
    zero_runs: bool,
    /// Packets carry checksums.
    checksum: bool,
    limit: Duration,
}

/// The lanes of an incoming migration.
#[derive(Debug)]
pub(super) struct Lanes {
    shared: Arc<Shared>,
    lanes: Vec<(Arc<dyn Channel>, Handle<()>)>,
    wake: Arc<Wake>,
    /// All lanes meet at the end of every RAM section.
    meet_each_section: bool,
    /// Where more channels than agreed would come from.
    door: Option<Arc<Door>>,
}

impl State {
    /// Channels whose lane did not come to the present meeting yet.
    fn absent(&self) -> impl Iterator<Item = usize> {
        self.standing.iter().enumerate().filter(|(_, s)| **s != Standing::Arrived).map(|(id, _)| id)
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait_timeout(state, LOOK).unwrap_or_else(PoisonError::into_inner).0
    }

    fn fail(&self, error: Error) {
        let mut state = self.lock();
        state.error.get_or_insert(error);
        state.closing = true;
        self.changed.notify_all();
    }

    fn stands(&self, id: u8, standing: Standing) {
        self.lock().standing[usize::from(id)] = standing;
        self.changed.notify_all();
    }

    /// A lane read its sync packet: waits for the others, and for the main stream. False: the migration ends.
    fn meet(&self, id: u8) -> bool {
        let mut state = self.lock();
        let met = state.met;
        state.standing[usize::from(id)] = Standing::Arrived;
        self.changed.notify_all();
        while !state.closing && state.met == met {
            state = self.wait(state);
        }
        !state.closing
    }
}

impl Lanes {
    /// Starts a thread for each channel.
    pub(super) fn start(
        job: &Job,
        channels: Vec<(u8, Arc<dyn Channel>)>,
        targets: &Targets,
        ahead: Option<&Ahead>,
        (zero_runs, checksum): (bool, bool),
        resumed: bool,
    ) -> Result<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::new(State { standing: vec![Standing::Quiet; channels.len()], ..State::default() }),
            changed: Condvar::new(),
            received: AtomicU64::new(0),
            normal: AtomicU64::new(0),
            zero: AtomicU64::new(0),
            targets: Arc::clone(targets),
            zero_runs,
            checksum,
            limit: job.options.time(Opt::StallTimeout),
        });
        let mut lanes =
            Self { shared, lanes: Vec::new(), wake: Arc::clone(&job.wake), meet_each_section: false, door: None };
        let mut seen = [false; 256];
        for (id, channel) in channels {
            if std::mem::replace(&mut seen[usize::from(id)], true) {
                return Err(Error::invalid(format!("two channels have the id {id}")));
            }
            lanes.add(job, (id, channel), ahead.map(Ahead::scout), resumed)?;
        }
        Ok(lanes)
    }

    fn add(
        &mut self,
        job: &Job,
        (id, channel): (u8, Arc<dyn Channel>),
        scout: Option<Scout>,
        resumed: bool,
    ) -> Result<()> {
        let (shared, on_panic, wire) = (Arc::clone(&self.shared), Arc::clone(&self.shared), Arc::clone(&channel));
        let status = Arc::clone(&job.status);
        let nice = job.options.nice();
        let body = move || {
            thread_sys::stand_back(nice);
            let mut lane = Lane { shared: &shared, id, channel: wire.as_ref(), header: Header::default(), scout };
            let result = lane.work();
            // A source that still writes here hears that nobody reads any more.
            wire.shutdown();
            if let Err(error) = result {
                let error = error.in_section(NAME).context(format_args!("channel {id}"));
                shared.fail(error.clone());
                // The main stream may be waiting for the source, which waits for this channel. Why a connection broke that is
                // not resumed the source says there, and is heard first.
                match (wire.is_lost(), error.errno()) {
                    (true, _) if resumed => status.fail_link(error.in_phase("load")),
                    // Or somebody else failed before.
                    (true, _) | (false, libc::ECANCELED) => (),
                    (false, _) => status.fail(error.in_phase("load")),
                }
            }
            Ok(())
        };
        let handle = job.threads.spawn_with(&format!("channel-{id}"), body, move |e| on_panic.fail(e.clone()))?;
        self.lanes.push((channel, handle));
        Ok(())
    }

    /// The lanes meet at the end of every RAM section, too.
    pub(super) fn meet_each_section(&mut self) {
        self.meet_each_section = true;
    }

    /// Watches `door` for channels too many.
    pub(super) fn watch(&mut self, door: &Arc<Door>) {
        self.door = Some(Arc::clone(door));
    }

    /// A RAM section of the main stream is over.
    pub(super) fn end_of_section(&mut self) -> Result<()> {
        self.look_at_door(Duration::ZERO)?;
        match self.meet_each_section {
            true => self.meet(),
            false => self.check(),
        }
    }

    fn look_at_door(&mut self, patience: Duration) -> Result<()> {
        let Some(door) = &self.door else { return Ok(()) };
        if !door.has_channel(&self.wake, patience)? {
            return Ok(());
        }
        let text =
            "the source has more channels than option 'multifd-channels' says here: set it alike on both sides";
        Err(Error::invalid(text).expected_got(self.lanes.len(), "at least one more"))
    }

    /// The main stream reached a meeting point: waits for every lane, then lets them go on.
    pub(super) fn meet(&self) -> Result<()> {
        let deadline = Instant::now() + self.shared.limit + GRACE;
        let mut progress = (self.shared.received.load(Ordering::Relaxed), deadline);
        let mut state = self.shared.lock();
        while state.absent().next().is_some() {
            self.wake.check()?;
            if let Some(error) = &state.error {
                return Err(error.clone());
            }
            if let Some(id) = state.absent().find(|id| state.standing[*id] == Standing::Ended) {
                let text = format!("channel {id}: it ended before the meeting point of the main stream");
                return Err(Error::ended(text));
            }
            let received = self.shared.received.load(Ordering::Relaxed);
            if received != progress.0 {
                progress = (received, Instant::now() + self.shared.limit + GRACE);
            } else if Instant::now() >= progress.1 {
                let absent: Vec<String> = state.absent().map(|id| id.to_string()).collect();
                let text = format!(
                    "channel {} did not reach the meeting point of the main stream, and nothing came for",
                    absent.join(", ")
                );
                let arrived = self.lanes.len() - absent.len();
                return Err(Error::timeout(STALL, self.shared.limit, text).expected_got(self.lanes.len(), arrived));
            }
            state = self.shared.wait(state);
        }
        state.standing.fill(Standing::Quiet);
        state.met += 1;
        self.shared.changed.notify_all();
        Ok(())
    }

    /// Whether the connection of one is gone.
    pub(super) fn are_lost(&self) -> bool {
        self.lanes.iter().any(|(channel, _)| channel.is_lost())
    }

    /// Fails if a lane failed.
    pub(super) fn check(&self) -> Result<()> {
        self.shared.lock().error.clone().map_or(Ok(()), Err)
    }

    /// The main stream is over. What comes after the last meeting would never be waited for: source and destination do
    /// not agree on where they met, so that pages may be missing.
    pub(super) fn finish(&mut self) -> Result<()> {
        self.check()?;
        self.look_at_door(LAST_LOOK)?;
        let state = self.shared.lock();
        match state.standing.iter().position(|s| matches!(s, Standing::Busy | Standing::Arrived)) {
            Some(id) => {
                Err(Error::invalid(format!("channel {id}: a packet after the last meeting")).in_section(NAME))
            }
            None => Ok(()),
        }
    }

    /// Bytes received, whole pages, zero pages.
    pub(super) fn counts(&self) -> (u64, u64, u64) {
        let get = |n: &AtomicU64| n.load(Ordering::Relaxed);
        (get(&self.shared.received), get(&self.shared.normal), get(&self.shared.zero))
    }
}

impl Drop for Lanes {
    fn drop(&mut self) {
        self.shared.lock().closing = true;
        self.shared.changed.notify_all();
        for (channel, _) in &self.lanes {
            channel.shutdown();
        }
        for (_, handle) in self.lanes.drain(..) {
            // What went wrong is in the shared state already.
            let _ = handle.join(None);
        }
    }
}

/// The first packet of a channel: its id, and whose it is.
pub(super) fn read_init(channel: &dyn Channel, count: u8, limit: Duration, checksum: bool) -> Result<(u8, Tag)> {
    let mut init = [0; INIT_BYTES];
    let mut filled = 0;
    while filled < init.len() {
        match channel.read(&mut init[filled..], Some(limit))? {
            0 => return Err(Error::ended("a channel closed before its first packet was complete")),
            n => filled += n,
        }
    }
    Ok((packet::read_init(&init, count, checksum)?, packet::tag_of(&init)))
}

struct Lane<'a> {
    shared: &'a Shared,
    id: u8,
    channel: &'a dyn Channel,
    header: Header,
    scout: Option<Scout>,
}

impl Lane<'_> {
    fn work(&mut self) -> Result<()> {
        while self.read_header()? {
            if self.shared.checksum {
                self.header.check()?;
            }
            match self.header.kind()? {
                Kind::Sync => {
                    if !self.shared.meet(self.id) {
                        return Ok(());
                    }
                }
                Kind::Pages { normal, zero } => self.pages(normal, zero)?,
                Kind::ZeroRuns(count) => self.zero_runs(count)?,
            }
        }
        self.shared.stands(self.id, Standing::Ended);
        Ok(())
    }

    /// False: the channel ended between two packets.
    fn read_header(&mut self) -> Result<bool> {
        let bytes = self.header.bytes_mut();
        let mut filled = 0;
        while filled < bytes.len() {
            // Silence between packets is the main stream's business; within one it is not.
            let limit = (filled > 0).then_some(self.shared.limit);
            match self.channel.read(&mut bytes[filled..], limit) {
                Ok(0) if filled == 0 => return Ok(false),
                Ok(0) => return Err(Error::ended("the channel ended within a packet's header")),
                Ok(n) => {
                    if filled == 0 {
                        self.shared.stands(self.id, Standing::Busy);
                    }
                    filled += n;
                }
                Err(_) if self.shared.lock().closing => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        self.shared.received.fetch_add(filled as u64, Ordering::Relaxed);
        Ok(true)
    }

    fn target(&self) -> Result<&Arc<Target>> {
        let name = self.header.block()?;
        self.shared.targets.get(name).ok_or_else(|| {
            Error::new(libc::ENOENT, format!("there is no RAM block '{}' here", name.escape_default()))
        })
    }

    /// Runs of zero pages.
    fn zero_runs(&self, count: usize) -> Result<()> {
        if !self.shared.zero_runs {
            return Err(Error::invalid("a packet of zero runs, which nobody agreed on"));
        }
        let target = self.target()?;
        for (offset, pages) in (0..count).map(|index| self.header.zero_run(index)) {
            let first = checked(&target.block, offset)?;
            let left = target.block.pages() - first;
            let Some(pages) = usize::try_from(pages).ok().filter(|pages| (1..=left).contains(pages)) else {
                let text = format!("a run of zero pages that does not fit RAM block '{}'", target.block.name());
                return Err(Error::invalid(text).expected_got(format!("1 to {left} pages"), pages));
            };
            target.zero_run(first, pages)?;
            self.shared.zero.fetch_add(pages as u64, Ordering::Relaxed);
        }
        Ok(())
    }

    /// The pages of a packet, each run of contiguous ones in one piece, straight into guest memory.
    fn pages(&mut self, normal: usize, zero: usize) -> Result<()> {
        let target = self.target()?;
        let block = &target.block;
        let mut pages = [0; PAGES_MAX];
        for (index, page) in pages[..normal + zero].iter_mut().enumerate() {
            *page = checked(block, self.header.offset(index))?;
        }
        let (whole, zeros) = pages[..normal + zero].split_at(normal);
        let mut rooms = Vec::with_capacity(whole.len());
        for run in whole.chunk_by(|a, b| a + 1 == *b) {
            target.mark(run[0], run.len());
            rooms.push(block.room(run[0], run.len()));
        }
        if let Some(scout) = &self.scout {
            scout.saw(block, whole);
        }
        let filled = self.fill(&mut rooms);
        drop(rooms);
        // The data was waited for: what the VMM unmapped meanwhile is not touched, and named.
        let all = &pages[..normal + zero];
        if let (Some(first), Some(last)) = (all.iter().min(), all.iter().max()) {
            block.check_mapped(&(*first..last + 1))?;
        }
        filled?;
        if self.shared.checksum {
            self.check_pages(block, whole)?;
        }
        for page in zeros {
            target.zero(*page);
        }
        self.shared.normal.fetch_add(normal as u64, Ordering::Relaxed);
        self.shared.zero.fetch_add(zero as u64, Ordering::Relaxed);
        Ok(())
    }

    /// Compares pages, as they now lie in memory, with the packet's checksum.
    fn check_pages(&self, block: &Block, pages: &[usize]) -> Result<()> {
        let mut sum = Sum::default();
        let mut scratch = Vec::with_capacity(STEP);
        let runs = || pages.chunk_by(|a, b| a + 1 == *b).map(|run| (run[0], run.len()));
        for (first, count) in runs() {
            let mut piece = block.piece(first, count);
            while !piece.is_empty() {
                scratch.clear();
                piece.take_into(&mut scratch, STEP);
                sum.add(&scratch);
            }
        }
        if sum.value() == self.header.pages_sum() {
            return Ok(());
        }
        let range = |(first, count)| format!("{:#x}..{:#x}", first * PAGE_BYTES, (first + count) * PAGE_BYTES);
        let ranges: Vec<String> = runs().map(range).collect();
        let what = format!("RAM block '{}', bytes {}:", block.name(), ranges.join(", "));
        Err(altered(what, self.header.pages_sum(), sum.value()).in_section(NAME).in_field(block.name()))
    }

    fn fill(&self, rooms: &mut [Room<'_>]) -> Result<()> {
        let mut rest = rooms;
        loop {
            let full = rest.iter().take_while(|r| r.is_empty()).count();
            rest = &mut rest[full..];
            if rest.is_empty() {
                return Ok(());
            }
            let mut got = self.channel.read_room(rest, Some(self.shared.limit))?;
            if got == 0 {
                return Err(Error::ended("the channel ended within a packet's pages"));
            }
            self.shared.received.fetch_add(got as u64, Ordering::Relaxed);
            for room in rest.iter_mut() {
                let n = got.min(room.len());
                room.advance(n);
                got -= n;
                if got == 0 {
                    break;
                }
            }
        }
    }
}

/// Page number of an offset.
fn checked(block: &Block, offset: u64) -> Result<usize> {
    if offset >= block.len() || offset % PAGE != 0 {
        return Err(Error::invalid(format!("a page outside of RAM block '{}'", block.name()))
            .expected_got(format!("a multiple of {PAGE} below {:#x}", block.len()), format!("{offset:#x}")));
    }
    usize::try_from(offset / PAGE).map_err(|_| Error::invalid("a page out of reach"))
}
