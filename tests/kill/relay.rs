//! A network between source and destination that knows messages, and fails at one of them.

use std::{
    io::{ErrorKind, Read, Write},
    net::{Shutdown, SocketAddr},
    path::Path,
    sync::{
        Arc, Condvar, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc::{Receiver, Sender, channel},
    },
    thread::JoinHandle,
    time::Duration,
};

use socket2::{Domain, SockAddr, Socket, Type};

use super::messages::{Message, Phase, Splitter, Way};

/// What happens at the message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Fault {
    /// Nothing ever.
    None,
    /// All connections end, the message is lost; new connections go through.
    Cut,
    /// The same with half of the message delivered.
    CutInside,
    /// All connections end, and no new one comes about.
    CutForGood,
    /// The sender's direction of this connection ends, the other one goes on.
    HalfClose,
    /// Nothing moves any more, until the harness says so; then all that waited arrives late.
    Freeze,
    /// The message and what follows in its direction is held for so many milliseconds.
    Delay(u64),
    /// The harness kills the process, then the network goes on.
    KillSource,
    KillDestination,
    /// The harness asks the source to cancel, then the network goes on.
    Cancel,
}

/// At which message: the `index`-th in this direction since the migration came to this phase.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Point {
    pub(crate) way: Way,
    pub(crate) phase: Phase,
    pub(crate) index: usize,
    pub(crate) fault: Fault,
}

/// Messages seen in each direction and phase.
pub(crate) type Counts = std::collections::BTreeMap<(Way, Phase), usize>;

#[derive(Debug)]
struct State {
    counts: Counts,
    phase: Phase,
    fired: bool,
    frozen: bool,
    /// Connections of an earlier epoch are dead.
    epoch: usize,
    /// No new connection goes through.
    down: bool,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    over: AtomicBool,
    /// Times a splitter lost its way.
    raw: AtomicUsize,
    point: Point,
    bodies: &'static [(&'static str, usize)],
    tell: Mutex<Sender<()>>,
}

/// The network; it ends when it is dropped.
pub(crate) struct Relay {
    /// Where the source connects.
    pub(crate) uri: String,
    /// Says once that the message was reached.
    pub(crate) reached: Receiver<()>,
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
}

/// Between two looks whether the relay is over.
const LOOK: Duration = Duration::from_millis(20);

/// A peer that takes nothing for so long is dead to us.
const STUCK: Duration = Duration::from_secs(10);

/// A socket address as a URI of the library says it.
fn address(uri: &str) -> SockAddr {
    match uri.strip_prefix("unix:").or_else(|| uri.strip_prefix("own:")) {
        Some(path) => SockAddr::unix(path).unwrap(),
        None => uri.strip_prefix("tcp:").unwrap().parse::<SocketAddr>().unwrap().into(),
    }
}

impl Relay {
    /// Stands before `destination`; of the same kind as that is.
    pub(crate) fn new(
        dir: &Path,
        destination: &str,
        point: Point,
        bodies: &'static [(&'static str, usize)],
    ) -> Relay {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let there = address(destination);
        let own = match there.domain() {
            Domain::UNIX => {
                let scheme = destination.split(':').next().unwrap();
                format!("{scheme}:{}", dir.join(format!("r{}", COUNT.fetch_add(1, Ordering::Relaxed))).display())
            }
            _ => "tcp:127.0.0.1:0".to_owned(),
        };
        let listener = Socket::new(there.domain(), Type::STREAM, None).unwrap();
        listener.bind(&address(&own)).unwrap();
        listener.listen(64).unwrap();
        listener.set_read_timeout(Some(LOOK)).unwrap(); // holds for accept, too
        let uri = listener.local_addr().unwrap().as_socket().map_or(own, |at| format!("tcp:{at}"));
        let (tell, reached) = channel();
        let counts = Counts::default();
        let state = State { counts, phase: Phase::Precopy, fired: false, frozen: false, epoch: 0, down: false };
        let (over, raw) = (AtomicBool::new(false), AtomicUsize::new(0));
        let (state, tell) = (Mutex::new(state), Mutex::new(tell));
        let shared = Arc::new(Shared { state, changed: Condvar::new(), over, raw, point, bodies, tell });
        let acceptor = std::thread::spawn({
            let shared = Arc::clone(&shared);
            move || accept(&shared, listener, &there)
        });
        Relay { uri, reached, shared, acceptor: Some(acceptor) }
    }

    /// Lets everything that waits move again.
    pub(crate) fn thaw(&self) {
        self.shared.lock().frozen = false;
        self.shared.changed.notify_all();
    }

    /// Whether the message was reached, what was counted, and how often a splitter lost its way.
    pub(crate) fn seen(&self) -> (bool, Counts, usize) {
        let state = self.shared.lock();
        (state.fired, state.counts.clone(), self.shared.raw.load(Ordering::Relaxed))
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::Release);
        self.thaw();
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
    }
}

fn accept(shared: &Arc<Shared>, listener: Socket, there: &SockAddr) {
    let mut ways = Vec::new();
    let mut listener = Some(listener);
    while !shared.over() {
        if shared.lock().down {
            listener = None;
        }
        let Some(door) = &listener else {
            std::thread::sleep(LOOK);
            continue;
        };
        let Ok((source, _)) = door.accept() else { continue };
        let epoch = shared.await_thaw();
        if shared.lock().down {
            continue; // it came while the network went
        }
        let destination = Socket::new(there.domain(), Type::STREAM, None).unwrap();
        if destination.connect(there).is_err() {
            continue; // nobody listens any more: the source sees its connection end
        }
        for socket in [&source, &destination] {
            socket.set_read_timeout(Some(LOOK)).unwrap();
            socket.set_write_timeout(Some(STUCK)).unwrap();
            let _ = socket.set_tcp_nodelay(true);
        }
        for (way, from, to) in [(Way::There, &source, &destination), (Way::Back, &destination, &source)] {
            let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
            let carrier = Carrier { way, from, to, epoch, shared: Arc::clone(shared), deaf: false };
            ways.push(std::thread::spawn(move || carrier.carry()));
        }
    }
    ways.into_iter().for_each(|way| way.join().unwrap());
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }

    /// Waits while nothing moves; the epoch then.
    fn await_thaw(&self) -> usize {
        let mut state = self.lock();
        while state.frozen && !self.over() {
            state = self.changed.wait_timeout(state, LOOK).unwrap().0;
        }
        state.epoch
    }

    /// Counts a message; true: it is the one.
    fn count(&self, way: Way, message: Message) -> bool {
        let mut state = self.lock();
        if let Some(phase) = message.begins {
            state.phase = state.phase.max(phase);
        }
        let at = (way, state.phase);
        let index = state.counts.entry(at).or_default();
        *index += 1;
        let index = *index - 1;
        let point = &self.point;
        if state.fired || at != (point.way, point.phase) || index != point.index || point.fault == Fault::None {
            return false;
        }
        state.fired = true;
        match point.fault {
            Fault::Freeze | Fault::KillSource | Fault::KillDestination | Fault::Cancel => state.frozen = true,
            Fault::Cut | Fault::CutInside => state.epoch += 1,
            Fault::CutForGood => (state.epoch, state.down) = (state.epoch + 1, true),
            Fault::None | Fault::HalfClose | Fault::Delay(_) => (),
        }
        let _ = self.tell.lock().unwrap().send(());
        true
    }
}

/// One direction of one connection.
struct Carrier {
    way: Way,
    from: Socket,
    to: Socket,
    epoch: usize,
    shared: Arc<Shared>,
    /// What comes is read and lost.
    deaf: bool,
}

impl Carrier {
    fn carry(mut self) {
        let mut splitter = Splitter::new(self.way, self.shared.bodies);
        let (mut pending, mut buf) = (Vec::new(), vec![0; 64 << 10]);
        loop {
            if self.shared.over() || self.shared.lock().epoch != self.epoch {
                self.end(Shutdown::Both);
                return;
            }
            match self.from.read(&mut buf) {
                Ok(0) => break,
                Ok(_) if self.deaf => (),
                Ok(n) => {
                    pending.extend_from_slice(&buf[..n]);
                    if !self.pass_all(&mut splitter, &mut pending) {
                        self.end(Shutdown::Both);
                        return;
                    }
                }
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => (),
                Err(_) => break,
            }
        }
        self.shared.await_thaw();
        let _ = self.to.write_all(&pending);
        let _ = self.to.shutdown(Shutdown::Write);
    }

    fn end(&self, how: Shutdown) {
        let _ = self.to.shutdown(how);
        let _ = self.from.shutdown(how);
    }

    /// Passes on all whole messages; false: the connection is dead.
    fn pass_all(&mut self, splitter: &mut Splitter, pending: &mut Vec<u8>) -> bool {
        let mut done = 0;
        while done < pending.len() && !self.deaf {
            let raw = splitter.is_raw();
            let Some(message) = splitter.next(&pending[done..]) else { break };
            if splitter.is_raw() && !raw {
                self.shared.raw.fetch_add(1, Ordering::Relaxed);
            }
            if !self.pass(&pending[done..done + message.len], message) {
                return false;
            }
            done += message.len;
        }
        pending.drain(..if self.deaf { pending.len() } else { done });
        true
    }

    fn pass(&mut self, bytes: &[u8], message: Message) -> bool {
        if self.shared.count(self.way, message) {
            match self.shared.point.fault {
                Fault::CutInside => drop(self.to.write_all(&bytes[..bytes.len() / 2])),
                Fault::HalfClose => {
                    let _ = self.to.shutdown(Shutdown::Write);
                    self.deaf = true;
                    return true;
                }
                Fault::Delay(ms) => std::thread::sleep(Duration::from_millis(ms)),
                _ => (),
            }
        }
        self.shared.await_thaw() == self.epoch && self.to.write_all(bytes).is_ok()
    }
}
