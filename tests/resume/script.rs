//! A schedule, and the relay that carries it out: what happens when the destination acknowledged so many points and the
//! source sent so many bytes since.

#[path = "mains.rs"]
mod mains;

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use super::common::Rng;
use super::{Guest, PAGES, cost};
use mains::Mains;
use vmig::machine::Machine;

#[derive(Clone, Debug)]
pub(crate) enum What {
    /// The guest writes these pages.
    Write(Vec<usize>, u8),
    /// A connection breaks, counted from the newest main one; none: all do.
    Cut(Option<usize>),
}

#[derive(Clone, Debug)]
struct Step {
    /// Points acknowledged, and bytes sent since, in one direction.
    points: usize,
    bytes: u64,
    what: What,
}

#[derive(Clone, Debug)]
pub(crate) struct Script(VecDeque<Step>);

impl Script {
    pub(crate) fn draw(rng: &mut Rng, channels: usize, pages: usize) -> Script {
        let mut steps = VecDeque::new();
        for points in 0..2 + rng.below(6) {
            let most = if points == 0 { pages } else { pages / 8 };
            let mut bytes = 0;
            for _ in 0..1 + rng.below(4) {
                let what = match rng.below(5) {
                    0 => What::Cut(None),
                    1 => What::Cut(Some(rng.below(channels + 1))),
                    _ => {
                        let written = (0..3 + rng.below(most / 4)).map(|_| rng.below(pages)).collect();
                        // A page may become zero, too.
                        What::Write(written, u8::try_from(rng.below(8) * 31).unwrap())
                    }
                };
                steps.push_back(Step { points, bytes, what });
                bytes += rng.below(most * 4096 / 2) as u64;
            }
            // The guest has written when the next round begins, so that there is one.
            steps.push_back(Step {
                points: points + 1,
                bytes: 0,
                what: What::Write((0..8).map(|_| rng.below(pages)).collect(), 5),
            });
        }
        Script(steps)
    }
}

/// How far the migration was when a point was acknowledged.
#[derive(Clone, Copy, Debug, Default)]
struct Mark {
    sent: u64,
    written: usize,
}

#[derive(Debug, Default)]
struct State {
    steps: VecDeque<Step>,
    links: Vec<[UnixStream; 2]>,
    /// Bytes the source sent, also those that went nowhere, and pages the guest wrote.
    sent: u64,
    written: usize,
    /// One for each acknowledged point, by number; the first is the beginning.
    marks: Vec<Mark>,
    cuts: u64,
    /// How many connections there were, also when the last cut came.
    made: usize,
    made_at_cut: usize,
    mains: Mains,
    /// Since the last cut, over connections of before it: nothing of it counts.
    stale: u64,
    /// At the last cut: what was sent, what of it may come again, and what was written.
    at_cut: (u64, u64, usize),
    /// The answer to the hello went through: before it nothing is agreed.
    greeted: bool,
    over: bool,
}

struct Shared {
    state: Mutex<State>,
    guest: Arc<Guest>,
    machine: Arc<Machine>,
    /// Replies can be read: no frames with checksums.
    plain: bool,
}

/// The network; it ends when it is dropped.
pub(crate) struct Relay {
    shared: Arc<Shared>,
    path: PathBuf,
    acceptor: Option<JoinHandle<()>>,
}

impl std::fmt::Debug for Relay {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let state = self.shared.state.lock().unwrap();
        write!(f, "{} bytes, marks {:?}, cuts {}, left {:?}", state.sent, state.marks, state.cuts, state.steps)
    }
}

impl Relay {
    pub(crate) fn new(
        path: &Path,
        there: &str,
        plain: bool,
        script: Script,
        guest: &Arc<Guest>,
        machine: &Arc<Machine>,
    ) -> Relay {
        let listener = UnixListener::bind(path).unwrap();
        // At the beginning all pages count as written.
        let state = State { steps: script.0, marks: vec![Mark::default()], written: PAGES, ..State::default() };
        let (guest, machine) = (Arc::clone(guest), Arc::clone(machine));
        let shared = Arc::new(Shared { state: Mutex::new(state), guest, machine, plain });
        let (ours, there) = (Arc::clone(&shared), there.to_owned());
        let acceptor = std::thread::spawn(move || accept(&ours, &listener, &there));
        Relay { shared, path: path.to_owned(), acceptor: Some(acceptor) }
    }

    /// What was sent after the last cut, what may have been, and how many there were.
    pub(crate) fn after_last_cut(&self) -> (u64, u64, u64) {
        let state = self.shared.state.lock().unwrap();
        let (sent, due, written) = state.at_cut;
        (state.sent - state.stale - sent, due + state.stale + cost(state.written - written, 0), state.cuts)
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        let mut state = self.shared.state.lock().unwrap();
        state.over = true;
        state.cut(None);
        drop(state);
        let _ = UnixStream::connect(&self.path);
        self.acceptor.take().unwrap().join().unwrap();
    }
}

impl State {
    /// Breaks a connection, or all.
    fn cut(&mut self, which: Option<usize>) {
        let count = self.links.len();
        if count == 0 || which.is_some_and(|number| number >= count) {
            return;
        }
        for (number, [source, destination]) in self.links.drain(..).enumerate() {
            if which.is_some_and(|which| which != number) {
                continue;
            }
            let _ = destination.shutdown(Shutdown::Both);
            // What the source wrote is still read, and counted.
            let _ = source.shutdown(Shutdown::Write);
        }
        (self.cuts, self.stale, self.made_at_cut) = (self.cuts + 1, 0, self.made);
        // The last point that passed may not have been heard of, and the source numbered the one before when it had heard of
        // the one before that: since then everything may be sent again. So may what was written since, or is yet to be.
        let mark = self.marks[self.marks.len().saturating_sub(3)];
        self.at_cut = (self.sent, self.sent - mark.sent + cost(self.written - mark.written, 2), self.written);
    }

    /// Does what is due.
    fn act(&mut self, shared: &Shared) {
        while let Some(step) = self.steps.front().filter(|_| self.greeted) {
            let points = self.marks.len() - 1;
            let since = self.sent - self.marks[points].sent;
            if points < step.points || points == step.points && since < step.bytes {
                return;
            }
            let Some(step) = self.steps.pop_front() else { return };
            self.written += step.what.write(&shared.guest, &shared.machine);
            if let What::Cut(which) = step.what {
                self.cut(which);
            }
        }
    }

    /// Bytes that may be passed before something happens.
    fn room(&self) -> u64 {
        let points = self.marks.len() - 1;
        let next = self.steps.front().filter(|step| self.greeted && step.points == points);
        next.map_or(u64::MAX, |step| (self.marks[points].sent + step.bytes).saturating_sub(self.sent).max(1))
    }
}

fn accept(shared: &Arc<Shared>, listener: &UnixListener, there: &str) {
    let mut carriers = Vec::new();
    for source in listener.incoming() {
        let mut state = shared.state.lock().unwrap();
        if state.over {
            break;
        }
        let (Ok(source), Ok(destination)) = (source, UnixStream::connect(there)) else { continue };
        let clone = |stream: &UnixStream| stream.try_clone().unwrap();
        state.links.push([clone(&source), clone(&destination)]);
        let number = state.made;
        state.made += 1;
        drop(state);
        let (to_source, from_destination) = (clone(&source), clone(&destination));
        let (ours, theirs) = (Arc::clone(shared), Arc::clone(shared));
        carriers.push(std::thread::spawn(move || carry_there(&ours, source, destination, number)));
        carriers.push(std::thread::spawn(move || carry_back(&theirs, from_destination, to_source)));
    }
    carriers.into_iter().for_each(|carrier| carrier.join().unwrap());
}

fn carry_there(shared: &Shared, mut from: UnixStream, mut to: UnixStream, number: usize) {
    let (mut buffer, mut alive, mut main) = (vec![0; 16 << 10], true, None);
    while let Ok(n) = from.read(&mut buffer)
        && n > 0
    {
        let mut bytes = &buffer[..n];
        let main = *main.get_or_insert_with(|| shared.state.lock().unwrap().mains.of(number, bytes));
        while !bytes.is_empty() {
            let mut state = shared.state.lock().unwrap();
            let pass = usize::try_from(state.room()).unwrap_or(usize::MAX).min(bytes.len());
            state.sent += pass as u64;
            state.stale += if main < state.made_at_cut { pass as u64 } else { 0 };
            drop(state);
            alive = alive && to.write_all(&bytes[..pass]).is_ok();
            bytes = &bytes[pass..];
            shared.state.lock().unwrap().act(shared);
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}

fn carry_back(shared: &Shared, mut from: UnixStream, mut to: UnixStream) {
    let (mut replies, mut buffer) = (Replies { plain: shared.plain, ..Replies::default() }, vec![0; 4 << 10]);
    while let Ok(n) = from.read(&mut buffer)
        && n > 0
    {
        replies.take(&buffer[..n]);
        while let Some(point) = replies.next_ack() {
            let mut state = shared.state.lock().unwrap();
            if point >= state.marks.len() {
                let mark = Mark { sent: state.sent, written: state.written };
                state.marks.push(mark);
                state.act(shared);
            }
        }
        if to.write_all(&buffer[..n]).is_err() {
            break;
        }
        if replies.greeted {
            let mut state = shared.state.lock().unwrap();
            state.greeted = true;
            state.act(shared);
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}

/// Finds acknowledgements in what a destination says.
#[derive(Debug, Default)]
struct Replies {
    plain: bool,
    bytes: Vec<u8>,
    greeted: bool,
}

impl Replies {
    fn take(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    fn number(&self, at: usize, len: usize) -> Option<usize> {
        Some(self.bytes.get(at..at + len)?.iter().fold(0, |n, b| n << 8 | usize::from(*b)))
    }

    fn next_ack(&mut self) -> Option<usize> {
        loop {
            if !self.greeted {
                if self.bytes.get(..4)? != b"VMIG" {
                    return None;
                }
                let len = self.number(8, 4)?;
                self.bytes.get(..12 + len)?;
                self.bytes.drain(..12 + len);
                self.greeted = true;
            }
            if !self.plain {
                return self.framed();
            }
            let (kind, mut len) = (self.number(0, 2)?, 4 + self.number(2, 2)?);
            if kind == 0x5600 {
                len = 12 + self.number(4, 8)?;
            }
            self.bytes.get(..len)?;
            let message: Vec<u8> = self.bytes.drain(..len).collect();
            if kind == 0x5630 {
                return Some(message[4..].iter().fold(0, |n, b| n << 8 | usize::from(*b)));
            }
        }
    }

    /// A frame holds whole replies here, for each is written by itself: an acknowledgement is looked for at its start.
    fn framed(&mut self) -> Option<usize> {
        let at = self.bytes.windows(4).position(|w| w == [0x56, 0x30, 0, 8])?;
        let point = self.number(at + 4, 8)?;
        self.bytes.drain(..at + 12);
        Some(point)
    }
}
