//! The reception of a destination: whoever connects is asked who they are, by their first four bytes.
//!
//! A main connection begins with `QEVM` or `VMIG`, a channel with its magic; both go to the door of the migration that
//! listens there, if one does; a vmig that comes while another guest arrives, or after one came, is told so. A question
//! about an attempt that arrived here (`VASK`) is answered from the votes, as long as the handle lives, or goes to the
//! driver of the attempt at hand. One thread does this for all addresses; a connection that says nothing is held for a
//! moment, and as many as could be ours.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::awaited::{Awaited, UNKNOWN, refused};
use super::entrance;
use super::strangers::{LOOK_AGAIN, Strangers};
use crate::error::{Error, Result};
use crate::status::Status;
use crate::switchover::Message;
use crate::switchover::keeper::{Asked, Keeper};
use crate::sys::eventfd::{EventFd, Wake};
use crate::sys::io;
use crate::thread::{Threads, lock};
use crate::transport::Listening;
use crate::transport::custom::{Caller, Entrance};
use crate::transport::socket::Listener;
use crate::transport::uri::Uri;
use crate::wire::ask::{self, Ask, MigrationId};
use crate::wire::hello;
use crate::wire::input::Slice;
use crate::wire::knock::{self, Knock};
use crate::wire::{packet, reply};

/// Connections held at a time: all channels a source can have, its main one, and one more.
const HELD_MAX: usize = packet::CHANNELS_MAX as usize + 2;
/// Addresses that are kept for questions; the oldest is given up.
const LINES_MAX: usize = 8;
/// Questions that wait for the driver.
const VISITORS_MAX: usize = 4;
/// How long a closing door waits for its address to be free.
const CLOSE_WAIT: Duration = Duration::from_secs(1);

/// What a migration takes in.
#[derive(Debug)]
struct Intake {
    /// Main connections that came before anybody was taken.
    mains: VecDeque<Caller>,
    /// A guest arrives: whoever else wants to comes too late.
    taken: bool,
    channels: Vec<Caller>,
    /// Rings when something came.
    bell: Arc<EventFd>,
    /// Why the first connection was lost that had not said what it is, or was not even taken.
    broken: Option<Error>,
    /// Whose source may connect again.
    awaited: Option<Awaited>,
}

impl Intake {
    fn new() -> Result<Self> {
        let (mains, channels, bell) = (VecDeque::new(), Vec::new(), Arc::new(EventFd::new()?));
        Ok(Self { mains, taken: false, channels, bell, broken: None, awaited: None })
    }
}

/// What a line listens with.
#[derive(Debug)]
pub(super) enum Ear {
    /// The reception's thread polls it.
    Socket(Listener),
    /// An entrance of the VMM's own making has a thread of its own, which has not ended while this is set.
    Custom(AtomicBool),
}

/// An address somebody listens at.
#[derive(Debug)]
pub(super) struct Line {
    uri: Uri,
    address: String,
    ear: Ear,
    /// None: no migration is expected there.
    intake: Mutex<Option<Intake>>,
    unsorted: AtomicUsize,
    kept: AtomicBool,
}

impl Line {
    pub(super) fn address(&self) -> &str {
        &self.address
    }

    fn socket(&self) -> Option<&Listener> {
        match &self.ear {
            Ear::Socket(listener) => Some(listener),
            Ear::Custom(_) => None,
        }
    }

    /// Somebody is at work who does not know yet that the line is not wanted.
    fn is_open(&self) -> bool {
        matches!(&self.ear, Ear::Custom(open) if open.load(Ordering::Acquire))
    }

    /// One more who has not said what they are.
    pub(super) fn unsorted(&self) {
        self.unsorted.fetch_add(1, Ordering::AcqRel);
    }

    /// They have, or are gone.
    pub(super) fn sorted(&self) {
        self.unsorted.fetch_sub(1, Ordering::AcqRel);
        self.ring();
    }

    /// Whether one more can be held beside so many who have not said what they are.
    pub(super) fn has_room(&self, unsorted: usize) -> bool {
        unsorted + self.waiting() < HELD_MAX
    }

    pub(super) fn keep(&self) {
        self.kept.store(true, Ordering::Release);
    }

    /// Rings when something came.
    pub(super) fn bell(&self) -> Result<Arc<EventFd>> {
        let bell = lock(&self.intake).as_ref().map(|intake| Arc::clone(&intake.bell));
        bell.ok_or_else(|| Error::new(libc::ESHUTDOWN, "nobody is expected here any more"))
    }

    /// What goes wrong first is told: what follows may come of it.
    pub(super) fn broke(&self, error: Error) {
        if let Some(intake) = &mut *lock(&self.intake) {
            intake.broken.get_or_insert(error);
        }
    }

    pub(super) fn broken(&self) -> Option<Error> {
        lock(&self.intake).as_ref()?.broken.clone()
    }

    fn ring(&self) {
        if let Some(intake) = &*lock(&self.intake) {
            intake.bell.set();
        }
    }

    pub(super) fn take_main(&self) -> Option<Caller> {
        lock(&self.intake).as_mut()?.mains.pop_front()
    }

    /// `count` channels, if there are as many.
    pub(super) fn take_channels(&self, count: usize) -> Option<Vec<Caller>> {
        let mut intake = lock(&self.intake);
        let channels = &mut intake.as_mut()?.channels;
        (channels.len() >= count).then(|| channels.drain(..count).collect())
    }

    /// See [`Awaited`].
    pub(super) fn let_rejoin(&self, migration: MigrationId, status: &Arc<Status>) {
        if let Some(intake) = &mut *lock(&self.intake) {
            intake.awaited = Some(Awaited::new(migration, status));
            intake.broken = None;
        }
    }

    /// The connection is not in use any more: a knock is waited for.
    pub(super) fn await_knock(&self) {
        if let Some(awaited) = lock(&self.intake).as_mut().and_then(|intake| intake.awaited.as_mut()) {
            awaited.in_use = false;
        }
    }

    /// The connection of the last knock, which is in use from here on. Fails if nobody comes any more.
    pub(super) fn take_knock(&self) -> Result<Option<Caller>> {
        match lock(&self.intake).as_mut().and_then(|intake| intake.awaited.as_mut()) {
            Some(awaited) => awaited.take(),
            None => Ok(None),
        }
    }

    /// A source knocks. Returns one who is not let in, and why.
    fn knock(&self, caller: Caller, knock: &Knock) -> Option<(Caller, Error)> {
        let mut guard = lock(&self.intake);
        let Some(intake) = &mut *guard else { return Some((caller, refused(UNKNOWN))) };
        let Some(awaited) = &mut intake.awaited else { return Some((caller, refused(UNKNOWN))) };
        let left = awaited.admit(caller, knock);
        if left.is_none() {
            // What came with an older connection is closed unread.
            intake.channels.clear();
            intake.broken = None;
        }
        drop(guard);
        self.ring();
        left
    }

    /// Connections that wait for the migration.
    fn waiting(&self) -> usize {
        lock(&self.intake).as_ref().map_or(0, |intake| intake.mains.len() + intake.channels.len())
    }

    pub(super) fn channels(&self) -> usize {
        lock(&self.intake).as_ref().map_or(0, |intake| intake.channels.len())
    }

    /// Nobody is at the door who has not said who they are.
    pub(super) fn is_quiet(&self) -> bool {
        // One that is being accepted is counted before it leaves the backlog.
        !self.socket().is_some_and(|socket| io::is_readable(socket.as_fd()))
            && self.unsorted.load(Ordering::Acquire) == 0
    }

    fn is_wanted(&self) -> bool {
        self.kept.load(Ordering::Acquire) || lock(&self.intake).is_some()
    }

    /// What is no channel is taken for a main connection while that is wanted: its first bytes are then named in the
    /// error. Returns what nobody wants.
    fn admit(&self, caller: Caller, is_channel: bool) -> Option<Caller> {
        let mut unwanted = None;
        match &mut *lock(&self.intake) {
            Some(intake) if is_channel && intake.channels.len() < HELD_MAX => intake.channels.push(caller),
            Some(intake) if !is_channel && !intake.taken => intake.mains.push_back(caller),
            _ => unwanted = Some(caller),
        }
        self.ring();
        unwanted
    }

    /// Main connections that came in vain.
    pub(super) fn latecomers(&self) -> Option<VecDeque<Caller>> {
        let mut intake = lock(&self.intake);
        let intake = intake.as_mut().filter(|intake| intake.taken)?;
        Some(std::mem::take(&mut intake.mains))
    }

    /// Why nobody else can come.
    pub(super) fn refusal(&self) -> Error {
        let address = self.address();
        let error = match lock(&self.intake).is_some() {
            true => {
                let text = format!("the destination {address} is busy: another guest is arriving there");
                Error::new(libc::EBUSY, text)
            }
            false => {
                let text = format!(
                    "nobody expects a guest at {address} now: the address is only kept for questions about one that \
                     was sent there"
                );
                Error::new(libc::ECONNREFUSED, text)
            }
        };
        error.on_side("destination").in_phase("hello")
    }
}

/// A question for the driver.
#[derive(Debug)]
pub(super) struct Visitor {
    /// Where to answer.
    pub(super) caller: Caller,
    /// The GO that is repeated.
    pub(super) go: Message,
    ask: Ask,
}

#[derive(Debug, Default)]
struct State {
    lines: Vec<Arc<Line>>,
    runs: bool,
    over: bool,
    visitors: VecDeque<Visitor>,
}

/// Everybody who listens for one guest.
#[derive(Debug)]
pub struct Reception {
    keeper: Arc<Keeper>,
    threads: Arc<Threads>,
    state: Mutex<State>,
    changed: Condvar,
    news: EventFd,
    /// Never raised: waits here end by `news`.
    calm: Arc<Wake>,
}

impl Reception {
    /// Nobody listens yet.
    pub fn new(keeper: &Arc<Keeper>, threads: &Arc<Threads>) -> Result<Self> {
        Ok(Self {
            keeper: Arc::clone(keeper),
            threads: Arc::clone(threads),
            state: Mutex::default(),
            changed: Condvar::new(),
            news: EventFd::new()?,
            calm: Arc::new(Wake::new()?),
        })
    }

    /// A line at this address that is kept, for another migration.
    pub(super) fn line(&self, uri: &Uri) -> Result<Option<Arc<Line>>> {
        if matches!(uri, Uri::Tcp { port: 0, .. } | Uri::Vsock { port: 0, .. }) {
            return Ok(None);
        }
        let state = lock(&self.state);
        let same = |line: &&Arc<Line>| line.uri == *uri || Uri::parse(line.address()).is_ok_and(|real| real == *uri);
        let Some(line) = state.lines.iter().find(same) else { return Ok(None) };
        let mut intake = lock(&line.intake);
        if intake.is_some() {
            let text = format!("a migration listens at {} already", line.address());
            return Err(Error::new(libc::EADDRINUSE, text));
        }
        *intake = Some(Intake::new()?);
        Ok(Some(Arc::clone(line)))
    }

    /// One more address, and the thread if it is the first.
    pub(super) fn add(self: &Arc<Self>, uri: &Uri, listening: Listening) -> Result<Arc<Line>> {
        let (address, ear, entrance) = match listening {
            Listening::Socket(listener) => (listener.address().to_owned(), Ear::Socket(listener), None),
            Listening::Custom(address, entrance) => (address, Ear::Custom(AtomicBool::new(true)), Some(entrance)),
        };
        let line = Arc::new(Line {
            uri: uri.clone(),
            address,
            ear,
            intake: Mutex::new(Some(Intake::new()?)),
            unsorted: AtomicUsize::new(0),
            kept: AtomicBool::new(false),
        });
        let mut state = lock(&self.state);
        if state.over {
            return Err(Error::new(libc::ESHUTDOWN, "the guest is being freed"));
        }
        if state.lines.len() >= LINES_MAX
            && let Some(oldest) = state.lines.iter().find(|line| lock(&line.intake).is_none())
        {
            oldest.kept.store(false, Ordering::Release);
        }
        if !state.runs {
            let (shared, on_panic) = (Arc::clone(self), Arc::clone(self));
            let body = move || {
                shared.work();
                Ok(())
            };
            self.threads.spawn_with("reception", body, move |_| on_panic.gave_up())?;
            state.runs = true;
        }
        if let Some(entrance) = entrance {
            self.watch(&line, entrance)?;
        }
        state.lines.push(Arc::clone(&line));
        drop(state);
        self.news.set();
        Ok(line)
    }

    /// Starts the thread at an entrance.
    fn watch(self: &Arc<Self>, line: &Arc<Line>, entrance: Box<dyn Entrance>) -> Result<()> {
        let (shared, ours) = (Arc::clone(self), Arc::clone(line));
        let (after_panic, broken) = (Arc::clone(self), Arc::clone(line));
        let body = move || {
            entrance::work(&shared, &ours, &*entrance);
            drop(entrance);
            shared.left(&ours);
            Ok(())
        };
        self.threads.spawn_with("accept", body, move |_| after_panic.left(&broken)).map(drop)
    }

    /// The thread at an entrance is gone.
    fn left(&self, line: &Line) {
        if let Ear::Custom(open) = &line.ear {
            open.store(false, Ordering::Release);
        }
        line.ring();
        self.news.set();
    }

    /// Whether somebody waits at this line, or may ask there.
    pub(super) fn wants(&self, line: &Line) -> bool {
        line.is_wanted() && !lock(&self.state).over
    }

    /// The migration of this line takes nothing in any more. Unless it is kept its address is free when this returns.
    pub(super) fn close(&self, line: &Arc<Line>) {
        *lock(&line.intake) = None;
        self.news.set();
        let deadline = Instant::now() + CLOSE_WAIT;
        let mut state = lock(&self.state);
        while !line.kept.load(Ordering::Acquire) && state.runs && state.lines.iter().any(|l| Arc::ptr_eq(l, line)) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// A guest arrives at this line, and no other can.
    pub(super) fn shut_out_others(&self, line: &Line) {
        if let Some(intake) = &mut *lock(&line.intake) {
            intake.taken = true;
        }
        self.news.set();
    }

    /// Fails if nobody is at the reception, or at this line's entrance.
    pub(super) fn check(&self, line: &Line) -> Result<()> {
        let runs = lock(&self.state).runs && (line.socket().is_some() || line.is_open());
        match runs {
            true => Ok(()),
            false => Err(Error::new(libc::ESHUTDOWN, "nobody listens any more")),
        }
    }

    /// Ends the thread and closes every address: the handle is being freed.
    pub fn shut(&self) {
        lock(&self.state).over = true;
        self.news.set();
    }

    /// The thread is gone: whoever waits at a door hears it.
    fn gave_up(&self) {
        let mut state = lock(&self.state);
        state.runs = false;
        state.lines.drain(..).for_each(|line| line.ring());
        self.changed.notify_all();
    }

    /// The oldest question for the driver.
    pub(super) fn visitor(&self) -> Option<Visitor> {
        lock(&self.state).visitors.pop_front()
    }

    /// Answers the questions that waited for a driver who is gone now.
    pub(super) fn answer_visitors(&self) {
        while let Some(visitor) = self.visitor() {
            if let Asked::Vote(vote) = self.keeper.asked(&visitor.ask) {
                answer(&visitor.caller, &vote);
            }
        }
    }

    /// The body of the thread.
    fn work(&self) {
        let mut strangers = Strangers::default();
        loop {
            let lines = self.lines(&mut strangers);
            if lines.is_empty() {
                return;
            }
            for line in lines.iter().filter(|line| line.socket().is_some()) {
                line.latecomers().into_iter().flatten().for_each(|one| strangers.turn_away(one, line.refusal()));
            }
            self.turn(&lines, &mut strangers);
        }
    }

    /// The lines that are wanted; the others are closed. None: the thread is to end.
    fn lines(&self, strangers: &mut Strangers) -> Vec<Arc<Line>> {
        let mut state = lock(&self.state);
        if state.over {
            state.lines.clear();
            state.visitors.clear();
        }
        let over = state.over;
        strangers.unsorted.retain(|one| !over && one.line.is_wanted());
        state.lines.retain(|line| line.is_wanted() || line.is_open());
        if state.lines.is_empty() {
            state.runs = false;
        }
        self.changed.notify_all();
        state.lines.clone()
    }

    /// Waits for one thing to happen, and sorts.
    fn turn(&self, lines: &[Arc<Line>], strangers: &mut Strangers) {
        strangers.give_up_slow_ones();
        let unsorted = &strangers.unsorted;
        let lines: Vec<_> = lines.iter().filter_map(|line| Some((line, line.socket()?))).collect();
        let held = unsorted.len() + lines.iter().map(|(line, _)| line.waiting()).sum::<usize>();
        let looked_at: Vec<usize> = (0..unsorted.len()).filter(|i| unsorted[*i].again.is_none()).collect();
        let mut fds: Vec<BorrowedFd<'_>> =
            looked_at.iter().filter_map(|i| unsorted[*i].caller.as_ref()?.fd()).collect();
        fds.push(self.news.as_fd());
        let first_line = fds.len();
        if held < HELD_MAX {
            fds.extend(lines.iter().map(|(_, listener)| listener.as_fd()));
        }
        // Last, so that one who never stops talking holds nobody up.
        let first_late = fds.len();
        fds.extend(strangers.late_fds());
        // A failing poll is not lasting: it lacks memory.
        let woken = io::wait_any(&fds, self.calm.as_fd(), strangers.next_time()).unwrap_or(None);
        drop(fds);
        match woken {
            Some(index) if index >= first_late => strangers.listen_to(index - first_late),
            Some(index) if index >= first_line => accept(lines[index - first_line], strangers),
            Some(index) if index == looked_at.len() => self.news.clear(),
            Some(index) => self.sort(looked_at[index], strangers),
            None => (),
        }
    }

    /// Finds out what a connection is.
    pub(super) fn sort(&self, index: usize, strangers: &mut Strangers) {
        let one = &mut strangers.unsorted[index];
        let mut first = [0; ask::LEN];
        let looked = one.caller.as_ref().map_or(Ok((0, true)), |caller| caller.look(&mut first));
        let (there, over) = match looked {
            Ok(looked) => looked,
            Err(error) => {
                // Most likely it closed before it said anything.
                one.line.broke(error);
                strangers.unsorted.swap_remove(index);
                return;
            }
        };
        let (asks, knocks) = (first[..4] == ask::MAGIC.to_be_bytes(), first[..4] == knock::MAGIC.to_be_bytes());
        let want = match () {
            () if asks => ask::LEN,
            () if knocks => knock::LEN,
            () => 4,
        };
        if there < want && !over {
            one.again = Some(Instant::now() + LOOK_AGAIN);
            return;
        }
        let mut one = strangers.unsorted.swap_remove(index);
        let Some(caller) = one.caller.take() else { return };
        if there == 0 {
            one.line.broke(Error::new(libc::ECONNRESET, "a connection ended before it said what it is"));
        }
        if asks {
            if there == ask::LEN && caller.drain(&mut first) {
                self.question(caller, &first);
            }
        } else if knocks {
            // A frame that is cut short, or of another form, has nobody to hear why.
            if let Ok(knock) = knock::read(&mut Slice::new(&first[..there]))
                && let Some((caller, why)) = one.line.knock(caller, &knock)
            {
                strangers.turn_away(caller, why);
            }
        } else if let Some(caller) = one.line.admit(caller, first[..4] == packet::MAGIC.to_be_bytes())
            && first[..4] == hello::MAGIC.to_be_bytes()
        {
            strangers.turn_away(caller, one.line.refusal());
        }
    }

    /// Answers a question, or has the driver answer it.
    fn question(&self, caller: Caller, bytes: &[u8]) {
        let Ok(ask) = ask::read(&mut Slice::new(bytes)) else { return };
        match self.keeper.asked(&ask) {
            Asked::Vote(vote) => answer(&caller, &vote),
            Asked::Driver(go) => {
                let mut state = lock(&self.state);
                if state.visitors.len() < VISITORS_MAX {
                    state.visitors.push_back(Visitor { caller, go, ask });
                }
                drop(state);
                self.keeper.bell().set();
                // A driver that rested meanwhile has looked for the last time.
                if let Asked::Vote(_) = self.keeper.asked(&ask) {
                    self.answer_visitors();
                }
            }
        }
    }
}

fn accept((line, listener): (&Arc<Line>, &Listener), strangers: &mut Strangers) {
    line.unsorted();
    match listener.accept() {
        Ok(Some(fd)) => strangers.came(Caller::Socket(fd), line),
        // Too many descriptors, or a connection that was taken back: the next turn sees.
        refused => {
            line.sorted();
            if let Err(error) = refused {
                line.broke(error);
            }
            std::thread::sleep(LOOK_AGAIN);
        }
    }
}

fn answer(caller: &Caller, vote: &Message) {
    let Some(reply) = super::handover::reply_of(vote) else { return };
    let mut bytes = Vec::new();
    reply::put(&mut bytes, &reply);
    caller.say(&bytes);
}
