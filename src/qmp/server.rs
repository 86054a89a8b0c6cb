//! The server: one thread speaks with all clients and never waits for one; another carries their commands out, one
//! after the other, as a main loop would.

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use super::client::{Client, Job, Task};
use super::request::complaint;
use super::{Face, THREADS, event};
use crate::error::{Error, Result};
use crate::sys::eventfd::EventFd;
use crate::sys::io::{self, FdKind, Piece, Watch};
use crate::thread::{Handle, current_token, lock};
use crate::transport::socket::Listener;

/// Clients connected at a time.
const CLIENTS_MAX: usize = 32;
/// Addresses served at a time.
const LISTENERS_MAX: usize = 8;
/// How long nobody is let in after it failed: for want of descriptors it would fail again at once.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What the two threads share.
#[derive(Debug)]
struct Shared {
    face: Arc<Face>,
    jobs: Mutex<VecDeque<Job>>,
    came: Condvar,
    done: Mutex<Vec<Done>>,
    listeners: Mutex<Vec<Arc<Listener>>>,
    /// Wakes the thread that speaks.
    bell: EventFd,
    /// No more commands are carried out.
    stopping: AtomicBool,
    /// Nobody is spoken with any more.
    quit: AtomicBool,
    /// Token of the thread that carries out.
    runner: AtomicUsize,
}

#[derive(Debug)]
struct Done {
    client: u64,
    bytes: usize,
    line: String,
}

/// A server that runs.
#[derive(Debug)]
pub struct Server {
    shared: Arc<Shared>,
    speaker: Handle<()>,
    runner: Handle<()>,
}

impl Server {
    /// Starts to serve.
    pub fn start(face: &Arc<Face>, listener: Listener) -> Result<Self> {
        let feed = Arc::clone(face.machine.vmm().feed());
        let news = feed.watch()?;
        let shared = Arc::new(Shared {
            face: Arc::clone(face),
            jobs: Mutex::default(),
            came: Condvar::new(),
            done: Mutex::default(),
            listeners: Mutex::new(vec![Arc::new(listener)]),
            bell: EventFd::new().inspect_err(|_| feed.unwatch())?,
            stopping: AtomicBool::new(false),
            quit: AtomicBool::new(false),
            runner: AtomicUsize::new(0),
        });
        let threads = Arc::clone(face.machine.threads());
        let (speaking, running) = (Arc::clone(&shared), Arc::clone(&shared));
        let log = Arc::clone(face.machine.vmm().log());
        let runner = threads.spawn(THREADS[1], move || running.run()).inspect_err(|_| feed.unwatch())?;
        let speaker = threads.spawn_with(
            THREADS[0],
            move || Speaker { shared: speaking, news, clients: Vec::new(), last: 0, paused: false }.speak(),
            move |panic| log.to("qmp").error(panic),
        );
        match speaker {
            Ok(speaker) => Ok(Self { shared, speaker, runner }),
            Err(error) => {
                feed.unwatch();
                shared.stop_running();
                // Nobody asked it anything, so it does not wait for the VMM either.
                if let Err(panic) = runner.join(None) {
                    face.machine.vmm().log().to("qmp").error(panic);
                }
                Err(error)
            }
        }
    }

    /// Serves one more address.
    pub fn add(&self, listener: Listener) -> Result<()> {
        let mut listeners = lock(&self.shared.listeners);
        if listeners.len() == LISTENERS_MAX {
            let text = format!("QMP is served at {LISTENERS_MAX} addresses already, which is the most");
            return Err(Error::new(libc::ENOSPC, text));
        }
        listeners.push(Arc::new(listener));
        self.shared.bell.set();
        Ok(())
    }

    /// The address that was added last.
    pub fn address(&self) -> Option<String> {
        lock(&self.shared.listeners).last().map(|listener| listener.address().to_owned())
    }

    /// `EDEADLK` on the thread that carries commands out.
    pub fn check_not_inside(&self) -> Result<()> {
        match self.shared.runner.load(Ordering::Acquire) == current_token() {
            true => Err(Error::new(libc::EDEADLK, "a QMP command cannot free the guest that it belongs to")),
            false => Ok(()),
        }
    }

    /// Ends: the command that runs is waited for, those behind it are not begun, clients are told what there is to tell.
    pub fn stop(self) {
        let machine = &self.shared.face.machine;
        let log = machine.vmm().log();
        machine.vmm().dispatch().close_errands();
        self.shared.stop_running();
        // The command that runs may have to call the VMM back.
        if let Err(error) = machine.join(|limit| self.runner.join(limit)) {
            log.to("qmp").error(error);
        }
        self.shared.quit.store(true, Ordering::Release);
        self.shared.bell.set();
        if let Err(error) = self.speaker.join(None) {
            log.to("qmp").error(error);
        }
        machine.vmm().feed().unwatch();
    }
}

impl Shared {
    /// Carries commands out until it is told to stop.
    fn run(&self) -> Result<()> {
        self.runner.store(current_token(), Ordering::Release);
        while let Some(job) = self.next() {
            let line = match job.task {
                Task::Run(text, fd) => self.face.answer(&text, fd),
                Task::Say(line) => line,
            };
            lock(&self.done).push(Done { client: job.client, bytes: job.bytes, line });
            self.bell.set();
        }
        Ok(())
    }

    fn next(&self) -> Option<Job> {
        let mut jobs = lock(&self.jobs);
        loop {
            if self.stopping.load(Ordering::Acquire) {
                return None;
            }
            if let Some(job) = jobs.pop_front() {
                return Some(job);
            }
            jobs = self.came.wait(jobs).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Has the thread that carries out end after what it is at.
    fn stop_running(&self) {
        {
            // Under the lock: the runner either sees the flag or is woken.
            let mut jobs = lock(&self.jobs);
            self.stopping.store(true, Ordering::Release);
            jobs.clear();
        }
        self.came.notify_all();
    }
}

/// The thread that speaks with clients.
struct Speaker {
    shared: Arc<Shared>,
    news: Arc<EventFd>,
    clients: Vec<Client>,
    last: u64,
    /// Nobody is let in for a while.
    paused: bool,
}

impl Speaker {
    fn speak(&mut self) -> Result<()> {
        loop {
            let quit = self.shared.quit.load(Ordering::Acquire);
            self.tell();
            for client in &mut self.clients {
                loop {
                    let jobs = client.look(&self.shared.face);
                    if !jobs.is_empty() && !quit {
                        lock(&self.shared.jobs).extend(jobs);
                        self.shared.came.notify_one();
                    }
                    // Most often there is room, and no wait is needed.
                    if client.wants_write() {
                        client.write();
                    }
                    // What was written may have made room; nobody would wake us for that.
                    if !client.wants_look() {
                        break;
                    }
                }
            }
            if quit {
                return Ok(());
            }
            self.clients.retain(|client| !client.is_over());
            self.wait()?;
        }
    }

    /// Tells what happened, and then the answers of commands that were carried out: what a command did comes before its
    /// answer, so answers are taken first.
    fn tell(&mut self) {
        let answers = std::mem::take(&mut *lock(&self.shared.done));
        self.tell_news();
        for done in answers {
            if let Some(client) = self.clients.iter_mut().find(|client| client.id == done.client) {
                client.answered(done.bytes, &done.line);
            }
        }
    }

    fn tell_news(&mut self) {
        let vmm = self.shared.face.machine.vmm();
        for told in vmm.feed().take() {
            let line = event::line(&told);
            for client in &mut self.clients {
                if !client.tell(&line) {
                    vmm.log().to("qmp").warning("a QMP client does not read what it is told: it is disconnected");
                }
            }
        }
    }

    /// Waits until there is something to do, and reads, writes and lets in.
    fn wait(&mut self) -> Result<()> {
        let listeners: Vec<Arc<Listener>> = lock(&self.shared.listeners).clone();
        let mut watches = vec![Watch::reading(self.shared.bell.as_fd()), Watch::reading(self.news.as_fd())];
        let open = !self.paused;
        watches.extend(listeners.iter().map(|l| Watch { fd: l.as_fd(), read: open, write: false }));
        let client = |c: &Client| (c.wants_read(), c.wants_write());
        watches.extend(self.clients.iter().map(|c| Watch { fd: c.fd(), read: client(c).0, write: client(c).1 }));
        let ready = io::wait_each(&watches, self.paused.then_some(ACCEPT_PAUSE))?;
        drop(watches);
        self.paused = false;
        if ready[0].0 {
            self.shared.bell.clear();
        }
        let (of_listeners, of_clients) = ready[2..].split_at(listeners.len());
        for (client, (read, write)) in self.clients.iter_mut().zip(of_clients) {
            if *read && !client.read() {
                let text =
                    "descriptors that a QMP client sent were lost: too many came at once, or too many are open here";
                self.shared.face.machine.vmm().log().to("qmp").warning(text);
            }
            if *write {
                client.write();
            }
        }
        for (listener, _) in listeners.iter().zip(of_listeners).filter(|(_, ready)| ready.0) {
            self.let_in(listener);
        }
        Ok(())
    }

    fn let_in(&mut self, listener: &Listener) {
        match listener.accept() {
            Ok(None) => (),
            Ok(Some(fd)) if self.clients.len() >= CLIENTS_MAX => {
                let line = complaint(format_args!("{CLIENTS_MAX} clients are connected already, which is the most"));
                // Its buffer is empty; if this fails it is gone, which is as well.
                let _ = io::write(fd.as_fd(), FdKind::Socket, &[Piece::of(line.as_bytes()), Piece::of(b"\r\n")]);
            }
            Ok(Some(fd)) => {
                self.last += 1;
                self.clients.push(Client::new(self.last, fd, listener.is_network()));
            }
            Err(error) => {
                self.shared.face.machine.vmm().log().to("qmp").warning(format_args!("QMP: {error}"));
                self.paused = true;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::qmp::Qmp;
    use crate::status::feed::News;
    use crate::thread::THREADS_MAX;

    fn shared(guest: &Qmp) -> Arc<Shared> {
        Arc::new(Shared {
            face: Arc::clone(&guest.face),
            jobs: Mutex::default(),
            came: Condvar::new(),
            done: Mutex::default(),
            listeners: Mutex::default(),
            bell: EventFd::new().unwrap(),
            stopping: AtomicBool::new(false),
            quit: AtomicBool::new(true),
            runner: AtomicUsize::new(0),
        })
    }

    #[test]
    fn what_a_command_did_is_told_before_its_answer() {
        let guest = Qmp::of_nothing();
        let feed = guest.machine().vmm().feed();
        let (shared, news) = (shared(&guest), feed.watch().unwrap());
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        std::io::Write::write_all(&mut theirs, b"{\"execute\":\"qmp_capabilities\"}{\"execute\":\"stop\"}").unwrap();
        let mut client = Client::new(1, ours.into(), false);
        client.read();
        let bytes = client.look(&guest.face)[0].bytes;
        feed.push(News::Stop);
        lock(&shared.done).push(Done { client: 1, bytes, line: "the answer".to_owned() });
        Speaker { shared, news, clients: vec![client], last: 1, paused: false }.speak().unwrap();
        let mut said = String::new();
        theirs.read_to_string(&mut said).unwrap();
        let (event, answer) = (said.find("STOP").unwrap(), said.find("the answer").unwrap());
        assert!(event < answer, "{said}");
        feed.unwatch();
    }

    #[test]
    fn a_server_that_did_not_start_leaves_nothing_closed() {
        let guest = Qmp::of_nothing();
        let (threads, dispatch) = (guest.machine().threads(), guest.machine().vmm().dispatch());
        dispatch.set_timeout(60_000);
        dispatch.set_manual(true).unwrap();
        // There is room for one of its threads.
        let end = Arc::new(Mutex::new(()));
        let held = lock(&end);
        for _ in 1..THREADS_MAX {
            let end = Arc::clone(&end);
            threads
                .spawn("one of many", move || {
                    drop(lock(&end));
                    Ok(())
                })
                .unwrap();
        }
        let elsewhere = || {
            dispatch.post("a callback", || ());
            guest.listen("tcp:127.0.0.1:0").unwrap_err()
        };
        let error = std::thread::scope(|scope| scope.spawn(elsewhere).join().unwrap());
        assert!(error.errno() == libc::EAGAIN && error.text().contains(THREADS[0]), "{error}");
        assert_eq!(dispatch.run_queued(), 1, "not on a thread that is not the VMM's");
        drop(held);
        std::thread::scope(|scope| {
            let errand = scope.spawn(|| dispatch.errand("it", || Ok(1)));
            let done = dispatch.pump(None, || {
                dispatch.run_errands();
                errand.is_finished().then_some(())
            });
            assert_eq!((done, errand.join().unwrap()), (Some(()), Ok(1)));
        });
    }
}
