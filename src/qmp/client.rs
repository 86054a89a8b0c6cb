//! One connected client: what it sent and was not looked at, what it asked and was not answered, what it is to be told.
//! Each of these has a limit; a client that does not read its answers is not read either.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use serde_json::json;

use super::Face;
use super::about;
use super::fds::wants_fd;
use super::frame::{Frame, Framer};
use super::request::{self, Refusal, Request, answer, complaint};
use super::table;
use crate::sys::fdpass;
use crate::sys::io::{self, FdKind, Piece};

/// Requests of one client that wait for their answer.
const REQUESTS_MAX: usize = 8;
/// Bytes of such requests, and of answers that were not read, beyond which no more are taken.
const BYTES_MAX: usize = 256 << 10;
/// Bytes that a client may leave unread: one that does is told no events, but disconnected.
const UNREAD_MAX: usize = 1 << 20;
/// Descriptors kept of those that came along at once; the last are closed.
const FDS_MAX: usize = 16;
/// Bytes read at once.
const READ_BYTES: usize = 8 << 10;

/// What is to be done for a client, in order.
#[derive(Debug)]
pub struct Job {
    /// Which client.
    pub client: u64,
    /// Bytes it takes until it is done.
    pub bytes: usize,
    /// What.
    pub task: Task,
}

/// See [`Job`].
#[derive(Debug)]
pub enum Task {
    /// Carry a request out, with the descriptor that came with it.
    Run(Vec<u8>, Option<OwnedFd>),
    /// Give an answer that is known already, in its turn.
    Say(String),
}

/// A client.
#[derive(Debug)]
pub struct Client {
    /// Its number, never used again.
    pub id: u64,
    fd: OwnedFd,
    framer: Framer,
    unseen: VecDeque<u8>,
    fds: VecDeque<OwnedFd>,
    /// They came with what is unseen: with its last message, and the kernel hands over those before it together with it.
    fresh: bool,
    out: VecDeque<u8>,
    negotiated: bool,
    oob: bool,
    requests: usize,
    request_bytes: usize,
    /// It sends no more.
    ended: bool,
    /// It hears no more, but what it asked for is still done.
    deaf: bool,
    /// It is let go.
    gone: bool,
    /// It came over a network.
    remote: bool,
}

impl Client {
    /// One that has just come, and is greeted.
    pub fn new(id: u64, fd: OwnedFd, remote: bool) -> Self {
        let mut client = Self {
            id,
            fd,
            framer: Framer::default(),
            unseen: VecDeque::new(),
            fds: VecDeque::new(),
            fresh: false,
            out: VecDeque::new(),
            negotiated: false,
            oob: false,
            requests: 0,
            request_bytes: 0,
            ended: false,
            deaf: false,
            gone: false,
            remote,
        };
        client.say(&request::greeting());
        client
    }

    /// Its socket.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Whether it is to be read.
    pub fn wants_read(&self) -> bool {
        !self.ended && !self.is_full()
    }

    /// Whether there is something to tell it.
    pub fn wants_write(&self) -> bool {
        !self.out.is_empty()
    }

    /// Whether it can be forgotten.
    pub fn is_over(&self) -> bool {
        self.gone || self.ended && self.requests == 0 && self.unseen.is_empty() && self.out.is_empty()
    }

    /// Whether there is something to look at, and room for it.
    pub fn wants_look(&self) -> bool {
        !self.unseen.is_empty() && !self.is_full()
    }

    fn is_full(&self) -> bool {
        self.requests >= REQUESTS_MAX || self.request_bytes + self.out.len() > BYTES_MAX
    }

    /// Reads once; false: descriptors that came along were lost.
    pub fn read(&mut self) -> bool {
        let mut buf = [0; READ_BYTES];
        match fdpass::receive(self.fd.as_fd(), &mut buf) {
            Ok(None) => (),
            Ok(Some(got)) => {
                self.ended |= got.bytes == 0;
                self.unseen.extend(&buf[..got.bytes]);
                return self.came_along(got.fds, got.dropped);
            }
            Err(_) => self.ended = true,
        }
        true
    }

    /// Descriptors came with what was read; false: not all of them.
    fn came_along(&mut self, fds: Vec<OwnedFd>, dropped: bool) -> bool {
        self.fresh = !fds.is_empty();
        let all = !dropped && fds.len() <= FDS_MAX;
        if self.fresh || dropped {
            // Those of an earlier message that no command took are not for the commands to come.
            self.fds = fds.into();
            self.fds.truncate(FDS_MAX);
        }
        all
    }

    /// Writes once.
    pub fn write(&mut self) {
        let (first, second) = self.out.as_slices();
        match io::write(self.fd.as_fd(), FdKind::Socket, &[Piece::of(first), Piece::of(second)]) {
            Ok(written) => drop(self.out.drain(..written.unwrap_or(0))),
            Err(_) => {
                self.deaf = true;
                self.out.clear();
            }
        }
        if self.out.is_empty() {
            self.out.shrink_to(READ_BYTES);
        }
    }

    /// What it is told next, a line.
    pub fn say(&mut self, line: &str) {
        if !self.deaf {
            self.out.extend(line.as_bytes());
            self.out.extend(b"\r\n");
        }
    }

    /// Tells an event, if it is a client that hears events. False: it does not listen and is let go.
    pub fn tell(&mut self, line: &str) -> bool {
        if !self.negotiated || self.gone {
            return true;
        }
        if self.out.len() + line.len() > UNREAD_MAX {
            self.gone = true;
            return false;
        }
        self.say(line);
        true
    }

    /// A job is done.
    pub fn answered(&mut self, bytes: usize, line: &str) {
        self.requests -= 1;
        self.request_bytes -= bytes;
        self.say(line);
    }

    /// Looks at what it sent; what is to be done in turn.
    pub fn look(&mut self, face: &Face) -> Vec<Job> {
        let mut jobs = Vec::new();
        while !self.is_full() {
            let Some(byte) = self.unseen.pop_front() else { break };
            let Some(frame) = self.framer.push(byte) else { continue };
            if let Some(task) = self.take(face, frame) {
                let bytes = match &task {
                    Task::Run(text, _) => text.len(),
                    Task::Say(line) => line.len(),
                };
                self.requests += 1;
                self.request_bytes += bytes;
                jobs.push(Job { client: self.id, bytes, task });
            }
        }
        jobs
    }

    /// What a frame leads to, if it is not answered at once.
    fn take(&mut self, face: &Face, frame: Frame) -> Option<Task> {
        let text = match frame {
            Frame::Wrong(why) => return self.nonsense(complaint(why)),
            Frame::Text(text) => text,
        };
        let request = match request::read(&text) {
            Ok(request) => request,
            Err((refusal, id)) => return self.nonsense(answer(Err(refusal), id)),
        };
        let wants_fd = wants_fd(&request.name) && !request.oob;
        if !wants_fd {
            self.pass_over();
        }
        if !self.negotiated {
            let line = self.negotiate(request);
            self.say(&line);
            return None;
        }
        if self.deaf && request.name.starts_with("query-") && table::find(&request.name).is_some() {
            // Ours do nothing but answer: thousands of them would keep others waiting for nobody.
            return None;
        }
        match (request.oob, self.oob) {
            (false, _) => {
                let fd = if wants_fd { self.fds.pop_front() } else { None };
                Some(Task::Run(text, fd))
            }
            (true, false) => {
                let refusal = Refusal::new("QMP input member 'exec-oob' is unexpected");
                self.in_turn(answer(Err(refusal), request.id))
            }
            (true, true) => {
                let line = face.answer(&text, None);
                self.say(&line);
                None
            }
        }
    }

    /// What was just taken needs no descriptor: one that came with it or before it is for no command, but one that came
    /// with a later message may be for that.
    fn pass_over(&mut self) {
        let is_last = self.unseen.iter().all(|byte| matches!(byte, b'\r' | b'\n'));
        if is_last || !self.fresh {
            self.fds.clear();
        }
    }

    /// What is no request. Who begins with that over a network is no client: a browser can be made to send commands by a
    /// page, behind the lines of a request of its own.
    fn nonsense(&mut self, line: String) -> Option<Task> {
        self.pass_over();
        if self.remote && !self.negotiated {
            self.say(&line);
            self.ended = true;
            self.unseen.clear();
            return None;
        }
        self.in_turn(line)
    }

    /// An answer that is known at once, and waits for those before it.
    fn in_turn(&mut self, line: String) -> Option<Task> {
        match self.requests {
            0 => {
                self.say(&line);
                None
            }
            _ => Some(Task::Say(line)),
        }
    }

    /// The first command of a connection.
    fn negotiate(&mut self, request: Request) -> String {
        let outcome = if request.name != "qmp_capabilities" || request.oob {
            Err(Refusal::not_found("Expecting capabilities negotiation with 'qmp_capabilities'"))
        } else {
            about::takes_enable().check_arguments(&request.arguments).map_err(Refusal::from)
        };
        if outcome.is_ok() {
            self.negotiated = true;
            // Only one word has the shape.
            self.oob =
                request.arguments.get("enable").and_then(|list| list.as_array()).is_some_and(|l| !l.is_empty());
        }
        answer(outcome.map(|()| json!({})), request.id)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::qmp::Qmp;

    #[test]
    fn one_who_does_not_read_events_is_let_go() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let mut client = Client::new(1, ours.into(), false);
        let line = "x".repeat(1000);
        (0..2 * UNREAD_MAX / 1000).for_each(|_| assert!(client.tell(&line), "no events before the negotiation"));
        assert!(client.out.len() < 1000);
        client.negotiated = true;
        let told = (0..2 * UNREAD_MAX / 1000).take_while(|_| client.tell(&line)).count();
        assert!((UNREAD_MAX / 1100..=UNREAD_MAX / 1000).contains(&told), "{told}");
        assert!(client.is_over() && client.out.len() <= UNREAD_MAX);
    }

    #[test]
    fn a_descriptor_is_for_the_message_that_it_came_with_or_the_next() {
        let guest = Qmp::of_nothing();
        let left = |messages: &[(&str, bool)]| {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let mut client = Client::new(1, ours.into(), false);
            client.negotiated = true;
            for (text, with) in messages {
                let fds = [theirs.as_fd()];
                fdpass::send(theirs.as_fd(), text.as_bytes(), &fds[..usize::from(*with)]).unwrap();
            }
            let mut taken = 0;
            while io::is_readable(client.fd()) {
                client.read();
                let jobs = client.look(&guest.face);
                taken += jobs.iter().filter(|job| matches!(&job.task, Task::Run(_, Some(_)))).count();
            }
            (taken, client.fds.len())
        };
        let (status, take) = ("{\"execute\":\"query-status\"}\r\n", "{\"execute\":\"add-fd\"}\n");
        assert_eq!(left(&[(status, false), (take, true)]), (1, 0), "both in one read");
        assert_eq!(left(&[(status, false), (status, false), ("\n", false), (take, true), (take, true)]), (2, 0));
        assert_eq!(left(&[(status, false), (" ", true), (take, false)]), (1, 0), "ahead of its command");
        assert_eq!(left(&[("x\n", false), (" ", true), (take, false)]), (1, 0));
        assert_eq!(left(&[(status, true), (take, false)]), (0, 0), "with another command");
        assert_eq!(left(&[("x\n", true), (take, false)]), (0, 0));
        assert_eq!(left(&[(" ", true), (status, false), (take, false)]), (0, 0), "another command comes next");
        assert_eq!(left(&[(status, false), (status, true), (take, false)]), (0, 0));
        let out_of_band = take.replace("execute", "exec-oob");
        assert_eq!(left(&[(&out_of_band, true), (take, false)]), (0, 0), "one that was refused");
        assert_eq!(left(&[(&out_of_band, false), (take, true)]), (1, 0));
    }

    #[test]
    fn what_one_who_vanished_asked_for_is_done() {
        let guest = Qmp::of_nothing();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut client = Client::new(1, ours.into(), false);
        for command in ["qmp_capabilities", "query-status", "query-of-the-vmm", "stop"] {
            write!(theirs, "{{\"execute\":\"{command}\"}}").unwrap();
        }
        // Something unread is with it, so that reading fails, too.
        io::write(client.fd(), FdKind::Socket, &[Piece::of(b"x")]).unwrap();
        drop(theirs);
        client.write();
        assert!(!client.wants_write() && client.wants_read() && !client.is_over());
        client.read();
        let jobs = client.look(&guest.face);
        let is =
            |job: &Job, name: &str| matches!(&job.task, Task::Run(text, None) if text.ends_with(name.as_bytes()));
        assert!(is(&jobs[0], "vmm\"}") && is(&jobs[1], "stop\"}") && jobs.len() == 2, "an answer is for nobody");
        (0..2).for_each(|_| assert!(client.read()));
        assert!(!client.wants_read() && !client.is_over(), "the command runs");
        jobs.iter().for_each(|job| client.answered(job.bytes, "done"));
        assert!(!client.wants_write() && client.is_over());
    }

    #[test]
    fn descriptors_nobody_asked_for_are_few() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut client = Client::new(1, ours.into(), false);
        let many: Vec<_> = (0..FDS_MAX + 5).map(|_| theirs.as_fd()).collect();
        fdpass::send(theirs.as_fd(), b" ", &many).unwrap();
        assert!(!client.read(), "some were lost");
        assert_eq!(client.fds.len(), FDS_MAX);
        theirs.write_all(b" ").unwrap();
        assert!(client.read());
        assert_eq!((client.fds.len(), client.unseen.len()), (FDS_MAX, 2));
        // The kernel had no room for the next one: those before it are not for its command.
        assert!(!client.came_along(Vec::new(), true));
        assert!(client.fds.is_empty());
    }
}
