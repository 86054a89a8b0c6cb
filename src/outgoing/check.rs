//! Asking a destination what differs, and measuring what a migration would wait for. Nothing is stopped or changed.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::sections::Rehearsal;
use super::total::TotalTime;
use super::{HandOver, Job, Migration, hand};
use crate::dirty::choice::Choice;
use crate::error::{Error, Result};
use crate::options::Opt;
use crate::ram::survey::Survey;
use crate::transport::stream::StreamInput;
use crate::wire::hello::{self, Answer};

/// What was found.
#[derive(Debug)]
pub struct Report {
    /// Everything that differs between the two sides, and a dirty tracker that would be refused here.
    pub differences: Vec<Error>,
    /// Time to connect.
    pub connect: Duration,
    /// From the hello to the answer, the comparison included.
    pub hello: Duration,
    /// The comparison at the destination.
    pub compare: Duration,
    /// What saving the devices takes.
    pub devices: Rehearsal,
    /// What the last stop and the last start here took, hooks and handlers; 0: there was none.
    pub stop: Duration,
    /// See `stop`.
    pub start: Duration,
}

/// Asks.
pub fn check(job: &Job) -> Result<Report> {
    if job.options.get(Opt::Peer) == 1 || !job.route.target().can_be_asked() {
        let text = "only a destination that uses this library and listens at an address can be asked";
        return Err(Error::new(libc::ENOTSUP, text));
    }
    let mut lap = Instant::now();
    let mut took = || std::mem::replace(&mut lap, Instant::now()).elapsed();
    let limit = job.options.time(Opt::ConnectTimeout);
    let answer_by = Instant::now() + limit;
    let channel = job.route.target().connect(&job.wake, limit).map_err(|e| e.in_phase("connect"))?;
    let connect = took();
    let mut migration = Migration::new(job, Arc::clone(&channel), TotalTime::none(), answer_by);
    let asked = migration.ask();
    channel.shutdown();
    let tracked = job.dirty.rehearse(migration.hand.rest(), Choice::of(&job.options));
    let (answer, hello) = asked.map_err(|e| e.in_phase("hello").on_side("source"))?;
    let devices = job.vmm.with_bql("a rehearsal", || migration.sections.rehearse())?;
    let [stop, start] = job.vmm.took();
    match answer {
        Answer::Checked(mut differences, compare) => {
            differences.extend(tracked.err().map(|why| why.in_phase("setup").on_side("source")));
            let compare = Duration::from_nanos(compare);
            Ok(Report { differences, connect, hello, compare, devices, stop, start })
        }
        Answer::Refused(errors) => Err(hello::join(&errors)),
        Answer::Welcome(_) => Err(Error::new(libc::EPROTO, "the destination took a question for a guest")),
    }
}

impl Migration<'_> {
    /// The answer, and how long it took.
    fn ask(&mut self) -> Result<(Answer, Duration)> {
        self.prepare()?;
        hand::check_devices(self.job, &*self.channel, self.sections.fd_fields())?;
        self.hand = HandOver::new(self.job, &*self.channel)?;
        let mut answers = StreamInput::of_replies(Arc::clone(&self.channel));
        let begin = Instant::now();
        self.introduce(Survey::new().ok().as_ref(), true)?;
        answers.set_deadline(Some((self.answer_by, self.job.options.time(Opt::ConnectTimeout))));
        let answer = hello::read_answer(&mut answers)?;
        Ok((answer, begin.elapsed()))
    }
}
