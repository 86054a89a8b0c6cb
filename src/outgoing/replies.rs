//! The return path: what the destination answers while we send.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::Job;
use crate::error::{Error, Result};
use crate::status::Status;
use crate::thread::Handle;
use crate::thread::lock;
use crate::transport::STALL;
use crate::transport::stream::StreamInput;
use crate::wire::reply::{self, Reply};

/// How the destination's last word came out.
#[derive(Clone, Debug)]
pub(super) enum Verdict {
    /// It has the guest.
    Loaded,
    /// It failed, and says so: the guest is ours.
    Failed(Error),
    /// It is silent or gone: nobody knows.
    Lost(Error),
}

/// What came next of the switchover's words.
#[derive(Debug)]
pub(super) enum Said {
    /// READY or a vote.
    Word(Reply),
    /// The destination failed, and said so in other words.
    Failed,
    /// The connection is over, or was given up here.
    Ended,
    /// Nothing in time.
    Nothing,
}

#[derive(Debug, Default)]
struct Heard {
    /// READY, until it was taken.
    ready: Option<Reply>,
    /// What came of comparing hashes, until it was taken.
    compared: Option<Reply>,
    /// A vote, until it was taken.
    vote: Option<Reply>,
    acknowledged: bool,
    /// The last sync point that was acknowledged.
    point: u64,
    /// The last ping that was answered.
    pong: u32,
    shut: Option<u32>,
    started: Option<Duration>,
    error: Option<Error>,
    ended: Option<Error>,
}

#[derive(Debug, Default)]
struct Shared {
    heard: Mutex<Heard>,
    changed: Condvar,
}

/// The thread `return_path` and what it heard.
#[derive(Debug)]
pub(super) struct Replies {
    shared: Arc<Shared>,
    thread: Handle<()>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Heard> {
        lock(&self.heard)
    }

    /// Waits until `done`, at most for `limit`.
    fn wait(&self, limit: Duration, done: impl Fn(&Heard) -> bool) -> MutexGuard<'_, Heard> {
        let deadline = Instant::now() + limit;
        let mut heard = self.lock();
        while !done(&heard) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            heard = self.changed.wait_timeout(heard, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        heard
    }

    fn listen(&self, input: &mut StreamInput, status: &Status, resumes: bool) {
        loop {
            let reply = reply::read(input);
            let mut heard = self.lock();
            match reply {
                Ok(Reply::Pong(number)) => heard.pong = number,
                Ok(Reply::Ack(number)) => heard.point = number,
                Ok(Reply::SwitchoverAck) => heard.acknowledged = true,
                Ok(Reply::Error(error)) => heard.error = Some(error),
                Ok(Reply::Shut(code)) => heard.shut = Some(code),
                Ok(Reply::Started(ns)) => heard.started = Some(Duration::from_nanos(ns)),
                Ok(compared @ (Reply::Same | Reply::Differs(..))) => heard.compared = Some(compared),
                Ok(ready @ Reply::Ready(..)) => heard.ready = Some(ready),
                Ok(vote @ Reply::Vote(..)) => {
                    heard.vote = Some(vote);
                    heard.ended = Some(Error::new(libc::ECONNRESET, "the destination said its last word"));
                }
                Err(error) => heard.ended = Some(error),
            }
            self.changed.notify_all();
            let failed = heard.failure();
            // A destination that has the guest says one more thing: how its start went.
            let loaded = heard.shut == Some(0);
            let started = loaded && heard.started.is_some();
            let over = heard.ended.is_some() || started || heard.shut.is_some_and(|code| code != 0);
            let only_lost = resumes && heard.error.is_none() && heard.shut.is_none() && heard.vote.is_none();
            drop(heard);
            // After the handover it is the waiting main thread that decides what an answer means.
            let early = (over || loaded) && !status.is_committed();
            if early && let Some(error) = failed {
                match only_lost {
                    true => status.fail_link(error),
                    false => status.fail(error),
                }
            }
            if over || early {
                return;
            }
        }
    }
}

impl Heard {
    /// Why the destination cannot go on, if it said so or is gone.
    fn failure(&self) -> Option<Error> {
        match (&self.error, self.shut, &self.ended) {
            (Some(error), _, _) => Some(error.clone()),
            _ if self.vote.is_some() => Some(self.refusal()),
            (None, Some(0), _) => {
                Some(Error::new(libc::EPROTO, "the destination said it was done before it had everything"))
            }
            (None, Some(code), _) => {
                let text = format!("the destination failed and gave no reason (status {code})");
                Some(Error::new(libc::EIO, text).on_side("destination"))
            }
            (None, None, Some(ended)) if ended.errno() == libc::ECANCELED => None,
            (None, None, Some(ended)) => {
                let text = format!("the destination closed the connection without a reason ({})", ended.text());
                let errno = if ended.errno() == libc::EIO { libc::ECONNRESET } else { ended.errno() };
                match ended.errno() {
                    libc::EIO | libc::ECONNRESET => Some(Error::new(errno, text)),
                    _ => Some(ended.clone()),
                }
            }
            (None, None, None) => None,
        }
    }

    /// What a vote without other words says before GO.
    fn refusal(&self) -> Error {
        let text = match &self.vote {
            Some(Reply::Vote(_, _, reply::OWNED)) => {
                "the destination says it took the guest, which it was not told to"
            }
            _ => "the destination did not take the guest, and gave no reason",
        };
        Error::new(libc::EPROTO, text).on_side("destination")
    }
}

impl Replies {
    /// Starts listening on `input`.
    pub(super) fn start(job: &Job, mut input: StreamInput, resumes: bool) -> Result<Self> {
        let shared = Arc::new(Shared::default());
        let (ours, status) = (Arc::clone(&shared), Arc::clone(&job.status));
        let on_panic = Arc::clone(&job.status);
        let thread = job.threads.spawn_with(
            "return_path",
            move || {
                ours.listen(&mut input, &status, resumes);
                Ok(())
            },
            move |error| on_panic.fail(error.clone()),
        )?;
        Ok(Self { shared, thread })
    }

    /// Whether the destination answered the PING: it accepts us, and from here on says so when it fails.
    pub(super) fn answered(&self) -> bool {
        self.shared.lock().pong != 0
    }

    /// Whether the destination agreed to the switchover.
    pub(super) fn acknowledged(&self) -> bool {
        self.shared.lock().acknowledged
    }

    /// Waits until ping `number` was answered, at most for `limit`. False: not yet.
    pub(super) fn has_caught_up(&self, number: u32, limit: Duration) -> bool {
        self.shared.wait(limit, |h| h.pong == number || h.shut.is_some() || h.ended.is_some()).pong == number
    }

    /// What comparing hashes came to, if the destination says so within `limit`.
    pub(super) fn compared(&self, limit: Duration) -> Option<Reply> {
        let mut heard = self.shared.wait(limit, |h| h.compared.is_some() || h.shut.is_some() || h.ended.is_some());
        heard.compared.take()
    }

    /// Waits for something to be acknowledged beyond `seen`, at most for `limit`; the last point that was.
    pub(super) fn point(&self, seen: u64, limit: Duration) -> u64 {
        self.shared.wait(limit, |h| h.point > seen || h.shut.is_some() || h.ended.is_some()).point
    }

    /// The next of the switchover's words, and why it came to that; waits at most `limit` for it.
    pub(super) fn next_word(&self, limit: Duration) -> (Said, Option<Error>) {
        let any = |h: &Heard| h.ready.is_some() || h.vote.is_some() || h.shut.is_some() || h.ended.is_some();
        let mut heard = self.shared.wait(limit, any);
        let why = heard.failure();
        if let Some(ready) = heard.ready.take() {
            return (Said::Word(ready), None);
        }
        if let Some(vote) = heard.vote.take() {
            return (Said::Word(vote), why);
        }
        let said = match (heard.shut, &heard.ended) {
            (Some(_), _) => Said::Failed,
            (None, Some(_)) => Said::Ended,
            (None, None) => Said::Nothing,
        };
        (said, why)
    }

    /// The last word after the handover was sent; waits at most `limit` for it.
    pub(super) fn verdict(&self, limit: Duration) -> Verdict {
        let heard = self.shared.wait(limit, |h| h.shut.is_some() || h.ended.is_some());
        match heard.shut {
            Some(0) => Verdict::Loaded,
            Some(_) => Verdict::Failed(heard.failure().unwrap_or_else(|| Error::new(libc::EIO, "failed"))),
            None => {
                Verdict::Lost(heard.ended.clone().unwrap_or_else(|| Error::timeout(STALL, limit, "no answer within")))
            }
        }
    }

    /// How long the guest's start took, if the destination says so within `limit`.
    pub(super) fn started(&self, limit: Duration) -> Option<Duration> {
        self.shared.wait(limit, |h| h.started.is_some() || h.ended.is_some()).started
    }

    /// Why the destination failed, if it says so within `limit`.
    pub(super) fn reason(&self, limit: Duration) -> Option<Error> {
        let heard = self.shared.wait(limit, |h| h.shut.is_some() || h.ended.is_some());
        match (&heard.error, heard.shut) {
            (None, None | Some(0)) => None,
            _ => heard.failure(),
        }
    }

    /// Ends the thread; the channel was shut down before.
    pub(super) fn join(self) {
        // Its result is what it heard; a panic was reported by on_panic.
        let _ = self.thread.join(None);
    }
}
