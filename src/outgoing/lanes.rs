//! Parallel channels: threads that look for zero pages and send packets, and the meeting points between them.
//!
//! The migration thread fills batches of dirty pages; whichever lane is free takes the next one. Nothing is allocated
//! and no lock is taken per page: batches go round between a free list and a queue.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::Job;
use super::stretch::TAKEN_MAX;
use super::toll::Toll;
use crate::error::{Error, Result};
use crate::options::Opt;
use crate::ram::{Block, PAGE_BYTES};
use crate::sys::io::Piece;
use crate::sys::thread_sys;
use crate::thread::Handle;
use crate::thread::lock;
use crate::transport::Channel;
use crate::transport::stream::StreamOutput;
use crate::wire::checksum::{STEP, Sum};
use crate::wire::packet::{self, Header, PAGES_MAX, Tag, ZERO_RUNS_MAX};

/// Batches waiting or under way. They hold as many pages as are taken at once (see [`TAKEN_MAX`]), twice: lanes that
/// find only zeros, or write to a fast network, have work while the next pages are taken.
const BATCHES: usize = 2 * TAKEN_MAX / PAGES_MAX;
/// The same for each lane where every batch has a copy of its pages: few enough that these stay in the cache.
const BATCHES_COPIED: usize = 4;

/// Dirty pages of one block that were taken and must be sent.
#[derive(Debug, Default)]
pub(super) struct Batch {
    pub(super) block: Option<Arc<Block>>,
    pub(super) pages: Vec<usize>,
    /// Pages known to be zero without a look.
    pub(super) zeros: Vec<usize>,
    /// It was looked at for zeros, and copied and summed if there are checksums.
    prepared: bool,
    /// With checksums: the pages as they are sent, and their sum.
    copy: Vec<u8>,
    sum: u32,
    /// Pages it had when it was given to the lanes.
    given: usize,
}

impl Batch {
    /// With room for pages, and for their copy if there are checksums.
    fn new(checksum: bool) -> Result<Self> {
        let mut copy = Vec::new();
        if checksum {
            let room = PAGES_MAX * PAGE_BYTES;
            copy.try_reserve_exact(room).map_err(|_| Error::no_memory("a packet of pages", room as u64))?;
        }
        let pages = || Vec::with_capacity(PAGES_MAX);
        Ok(Self { pages: pages(), zeros: pages(), copy, ..Self::default() })
    }

    fn is_empty(&self) -> bool {
        self.pages.is_empty() && self.zeros.is_empty()
    }

    fn clear(&mut self) {
        self.pages.clear();
        self.zeros.clear();
        self.copy.clear();
        self.prepared = false;
    }

    /// All that is done with pages before they are sent, once.
    fn prepare(&mut self, shared: &Shared) -> Result<()> {
        let Some(block) = self.block.as_ref().filter(|_| !self.prepared) else { return Ok(()) };
        self.prepared = true;
        if let (Some(first), Some(last)) = (self.pages.iter().min(), self.pages.iter().max()) {
            block.check_mapped(&(*first..last + 1))?;
        }
        if shared.find_zeros {
            let zeros = &mut self.zeros;
            self.pages.retain(|page| {
                let zero = block.is_zero(*page);
                if zero {
                    zeros.push(*page);
                }
                !zero
            });
        }
        if shared.checksum {
            let runs = self.pages.chunk_by(|a, b| a + 1 == *b).map(|run| block.piece(run[0], run.len()));
            self.sum = copy_and_sum(runs, &mut self.copy);
        }
        Ok(())
    }
}

#[derive(Debug, Default)]
struct State {
    queue: VecDeque<Batch>,
    free: Vec<Batch>,
    /// Batches taken from the queue and not back on the free list yet.
    under_way: usize,
    /// Number of the present meeting point, and how many lanes have sent their packet for it.
    meeting: u64,
    arrived: usize,
    closing: bool,
    error: Option<Error>,
    /// Lanes that wait for work, and whether the migration thread waits: a wake-up that nobody needs is a system call.
    idle: usize,
    awaited: bool,
    /// One could not be made.
    unconnected: bool,
    /// Connections made so far, to be shut down at the end.
    channels: Vec<Arc<dyn Channel>>,
}

/// What the lanes share with the migration thread.
#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// For lanes: there is work, or a meeting, or the end.
    work: Condvar,
    /// For the migration thread: a batch came back, or a lane came to the meeting.
    back: Condvar,
    written: AtomicU64,
    normal: AtomicU64,
    zero: AtomicU64,
    packets: AtomicU64,
    /// Pages that wait in batches.
    waiting: AtomicUsize,
    find_zeros: bool,
    /// The destination takes runs of zero pages.
    zero_runs: bool,
    /// Packets carry checksums.
    checksum: bool,
    /// Whose channels they are.
    tag: Tag,
    toll: Arc<Toll>,
    limit: Duration,
    #[cfg(feature = "fault-injection")]
    fault: std::sync::OnceLock<Arc<super::fault::LostPage>>,
}

/// The lanes of one migration.
#[derive(Debug)]
pub(super) struct Lanes {
    shared: Arc<Shared>,
    lanes: Vec<Handle<()>>,
}

/// What a lane does next.
enum Next {
    Send(Batch),
    Meet,
    End,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// The migration thread waits for the lanes.
    fn wait<'a>(&self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        state.awaited = true;
        let mut state = self.back.wait(state).unwrap_or_else(PoisonError::into_inner);
        state.awaited = false;
        state
    }

    /// Wakes the migration thread, if it waits.
    fn tell_back(&self, state: MutexGuard<'_, State>) {
        let awaited = state.awaited;
        drop(state);
        if awaited {
            self.back.notify_one();
        }
    }

    fn wake_all(&self) {
        self.work.notify_all();
        self.back.notify_all();
    }

    /// Waits for work. A lane meets the others only when no batch is left to take.
    fn next(&self, met: u64) -> Next {
        let mut state = self.lock();
        loop {
            if state.closing {
                return Next::End;
            }
            if let Some(batch) = state.queue.pop_front() {
                state.under_way += 1;
                return Next::Send(batch);
            }
            if met < state.meeting {
                return Next::Meet;
            }
            state.idle += 1;
            state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.idle -= 1;
        }
    }

    fn give_back(&self, mut batch: Batch) {
        self.waiting.fetch_sub(batch.given, Ordering::Relaxed);
        batch.clear();
        let mut state = self.lock();
        state.under_way -= 1;
        state.free.push(batch);
        self.tell_back(state);
    }

    fn fail(&self, error: Error) {
        let mut state = self.lock();
        state.error.get_or_insert(error);
        state.closing = true;
        self.wake_all();
    }
}

impl Lanes {
    /// Starts the threads of `count` channels, each of which connects to the destination; the first meeting waits for
    /// all of them.
    pub(super) fn connect(
        job: &Job,
        count: u8,
        (find_zeros, zero_runs, checksum): (bool, bool, bool),
        toll: &Arc<Toll>,
        tag: &Tag,
    ) -> Result<Self> {
        let limit = job.options.time(Opt::StallTimeout);
        let batches = if checksum { BATCHES_COPIED * usize::from(count) } else { BATCHES };
        let free = (0..batches).map(|_| Batch::new(checksum)).collect::<Result<_>>()?;
        let shared = Arc::new(Shared {
            state: Mutex::new(State { free, ..State::default() }),
            work: Condvar::new(),
            back: Condvar::new(),
            written: AtomicU64::new(0),
            normal: AtomicU64::new(0),
            zero: AtomicU64::new(0),
            packets: AtomicU64::new(0),
            waiting: AtomicUsize::new(0),
            find_zeros,
            zero_runs,
            checksum,
            tag: *tag,
            toll: Arc::clone(toll),
            limit,
            #[cfg(feature = "fault-injection")]
            fault: std::sync::OnceLock::new(),
        });
        let mut lanes = Self { shared, lanes: Vec::new() };
        for id in 0..count {
            if let Err(error) = lanes.add(job, id) {
                lanes.close();
                return Err(error.context(format_args!("channel {id}")));
            }
        }
        Ok(lanes)
    }

    fn add(&mut self, job: &Job, id: u8) -> Result<()> {
        let (shared, on_panic) = (Arc::clone(&self.shared), Arc::clone(&self.shared));
        let (target, wake, limit) =
            (job.route.target(), Arc::clone(&job.wake), job.options.time(Opt::ConnectTimeout));
        let nice = job.options.nice();
        let body = move || {
            thread_sys::stand_back(nice);
            let channel = target.connect(&wake, limit).inspect_err(|_| shared.lock().unconnected = true);
            if let Err(error) = channel.and_then(|channel| run(&shared, channel, id)) {
                shared.fail(error.context(format_args!("channel {id}")));
            }
            Ok(())
        };
        let handle = job.threads.spawn_with(&format!("channel-{id}"), body, move |e| on_panic.fail(e.clone()))?;
        self.lanes.push(handle);
        Ok(())
    }

    /// Test builds only: tells `fault` of every page sent.
    #[cfg(feature = "fault-injection")]
    pub(super) fn watch(&self, fault: &Arc<super::fault::LostPage>) {
        let _ = self.shared.fault.set(Arc::clone(fault));
    }

    /// An empty batch; waits for one to come back.
    pub(super) fn empty_batch(&self) -> Result<Batch> {
        let mut state = self.shared.lock();
        loop {
            if let Some(error) = &state.error {
                return Err(error.clone());
            }
            if let Some(batch) = state.free.pop() {
                return Ok(batch);
            }
            state = self.shared.wait(state);
        }
    }

    /// Gives a filled (or unused) batch to the lanes.
    pub(super) fn send(&self, mut batch: Batch) -> Result<()> {
        // Copying and summing is done here where the lanes have enough to do, so that they only write.
        if self.shared.checksum && !self.shared.lock().queue.is_empty() {
            batch.prepare(&self.shared)?;
        }
        let mut state = self.shared.lock();
        match batch.is_empty() {
            true => state.free.push(batch),
            false => {
                batch.given = batch.pages.len();
                self.shared.waiting.fetch_add(batch.given, Ordering::Relaxed);
                state.queue.push_back(batch);
            }
        }
        let idle = state.idle > 0;
        drop(state);
        if idle {
            self.shared.work.notify_one();
        }
        Ok(())
    }

    /// Every channel sends a sync packet behind the pages given so far.
    pub(super) fn call_meeting(&self) {
        let mut state = self.shared.lock();
        state.meeting += 1;
        state.arrived = 0;
        self.shared.work.notify_all();
    }

    /// Waits until these are written.
    pub(super) fn await_meeting(&self) -> Result<()> {
        let mut state = self.shared.lock();
        while state.error.is_none() && state.arrived < self.lanes.len() {
            state = self.shared.wait(state);
        }
        match &state.error {
            Some(error) => Err(error.clone()),
            None => Ok(()),
        }
    }

    /// Bytes written, whole pages sent, zero pages sent.
    pub(super) fn counts(&self) -> (u64, u64, u64) {
        let get = |n: &AtomicU64| n.load(Ordering::Relaxed);
        (get(&self.shared.written), get(&self.shared.normal), get(&self.shared.zero))
    }

    /// Pages that were given and are not written yet.
    pub(super) fn waiting(&self) -> usize {
        self.shared.waiting.load(Ordering::Relaxed)
    }

    /// Bytes that the destination's system does not have yet; none where that cannot be known, or not all is written.
    pub(super) fn on_its_way(&self) -> Option<u64> {
        let state = self.shared.lock();
        let written = state.queue.is_empty() && state.under_way == 0;
        let all = || state.channels.iter().map(|channel| channel.on_its_way()).sum();
        if written { all() } else { None }
    }

    /// Whether a channel broke: the destination may know why.
    pub(super) fn are_broken(&self) -> bool {
        self.shared.lock().error.is_some()
    }

    /// Whether the connection of one is gone.
    pub(super) fn are_lost(&self) -> bool {
        let state = self.shared.lock();
        state.unconnected || state.channels.iter().any(|channel| channel.is_lost())
    }

    /// Ends the threads: at once after a failure, else when they have nothing left.
    pub(super) fn close(&mut self) {
        let channels = {
            let mut state = self.shared.lock();
            state.closing = true;
            std::mem::take(&mut state.channels)
        };
        self.shared.wake_all();
        channels.iter().for_each(|channel| channel.shutdown());
        for handle in self.lanes.drain(..) {
            // What went wrong is in the shared state already.
            let _ = handle.join(None);
        }
    }
}

impl Drop for Lanes {
    fn drop(&mut self) {
        self.close();
    }
}

/// The body of a lane that is connected.
fn run(shared: &Shared, channel: Arc<dyn Channel>, id: u8) -> Result<()> {
    {
        let mut state = shared.lock();
        if state.closing {
            return Ok(());
        }
        state.channels.push(Arc::clone(&channel));
    }
    let out = StreamOutput::new(channel, shared.limit);
    Lane { shared, out, header: Header::default(), zeros: Zeros::default() }.work(id)
}

/// Zero pages a lane found and has not told yet: a packet that carries nothing else is worth its while only full.
#[derive(Default)]
struct Zeros {
    block: Option<Arc<Block>>,
    runs: Vec<(usize, usize)>,
}

impl Zeros {
    fn add(&mut self, page: usize) {
        match self.runs.last_mut() {
            Some((first, pages)) if *first + *pages == page => *pages += 1,
            _ => self.runs.push((page, 1)),
        }
    }
}

struct Lane<'a> {
    shared: &'a Shared,
    out: StreamOutput,
    header: Header,
    zeros: Zeros,
}

impl Lane<'_> {
    fn work(&mut self, id: u8) -> Result<()> {
        self.out.write(&packet::init(id, self.shared.checksum, &self.shared.tag))?;
        let mut met = 0;
        loop {
            match self.shared.next(met) {
                Next::Send(mut batch) => {
                    let sent = self.send(&mut batch);
                    self.shared.give_back(batch);
                    sent?;
                }
                Next::Meet => {
                    self.tell_zeros()?;
                    self.header.set_sync(self.shared.packets.fetch_add(1, Ordering::Relaxed));
                    self.write_header()?;
                    self.account();
                    met += 1;
                    let mut state = self.shared.lock();
                    state.arrived += 1;
                    self.shared.tell_back(state);
                }
                Next::End => return Ok(()),
            }
        }
    }

    /// One packet: the header, and runs of contiguous pages as they lie in guest memory.
    fn send(&mut self, batch: &mut Batch) -> Result<()> {
        batch.prepare(self.shared)?;
        let Some(block) = &batch.block else { return Err(Error::invalid("a batch without a block")) };
        self.shared.zero.fetch_add(batch.zeros.len() as u64, Ordering::Relaxed);
        // Beside pages they cost nothing.
        if self.shared.zero_runs && batch.pages.is_empty() {
            return self.keep_zeros(block, &mut batch.zeros);
        }
        let number = self.shared.packets.fetch_add(1, Ordering::Relaxed);
        self.header.set_pages(number, block.name(), &batch.pages, &batch.zeros);
        let mut pieces = Vec::with_capacity(1 + batch.pages.len());
        if self.shared.checksum {
            self.header.seal(batch.sum);
            pieces.extend([Piece::of(self.header.bytes()), Piece::of(&batch.copy)]);
        } else {
            pieces.push(Piece::of(self.header.bytes()));
            let runs = batch.pages.chunk_by(|a, b| a + 1 == *b);
            pieces.extend(runs.map(|run| block.piece(run[0], run.len())));
        }
        let _turn = self.shared.toll.pay(pieces.iter().map(|p| p.len() as u64).sum())?;
        self.out.write_pieces(&mut pieces)?;
        #[cfg(feature = "fault-injection")]
        if let Some(fault) = self.shared.fault.get() {
            fault.sent(block, &batch.pages);
        }
        self.shared.normal.fetch_add(batch.pages.len() as u64, Ordering::Relaxed);
        self.account();
        Ok(())
    }

    /// Keeps zero pages for a packet of runs; tells them when it is full.
    fn keep_zeros(&mut self, block: &Arc<Block>, zeros: &mut Vec<usize>) -> Result<()> {
        if !self.zeros.block.as_ref().is_some_and(|kept| Arc::ptr_eq(kept, block)) {
            self.tell_zeros()?;
            self.zeros.block = Some(Arc::clone(block));
        }
        zeros.sort_unstable();
        for page in zeros.drain(..) {
            self.zeros.add(page);
            // A run that may grow is told with the next ones.
            if self.zeros.runs.len() > ZERO_RUNS_MAX {
                let growing = self.zeros.runs.pop();
                self.tell_zeros()?;
                self.zeros.runs.extend(growing);
            }
        }
        Ok(())
    }

    fn tell_zeros(&mut self) -> Result<()> {
        if let Some(block) = self.zeros.block.as_ref().filter(|_| !self.zeros.runs.is_empty()) {
            let number = self.shared.packets.fetch_add(1, Ordering::Relaxed);
            self.header.set_zero_runs(number, block.name(), &self.zeros.runs);
            self.zeros.runs.clear();
            let _turn = self.shared.toll.pay(self.header.bytes().len() as u64)?;
            self.write_header()?;
            self.account();
        }
        Ok(())
    }

    /// A packet without pages.
    fn write_header(&mut self) -> Result<()> {
        if self.shared.checksum {
            self.header.seal(0);
        }
        self.out.write(self.header.bytes())
    }

    fn account(&mut self) {
        self.shared.written.fetch_add(self.out.take_written(), Ordering::Relaxed);
    }
}

/// Copies pages, which the guest may be writing, so that the very bytes that were summed are sent.
fn copy_and_sum<'p>(pieces: impl Iterator<Item = Piece<'p>>, copy: &mut Vec<u8>) -> u32 {
    copy.clear();
    let mut sum = Sum::default();
    for mut piece in pieces {
        while !piece.is_empty() {
            let start = copy.len();
            piece.take_into(copy, STEP);
            sum.add(&copy[start..]);
        }
    }
    sum.value()
}
