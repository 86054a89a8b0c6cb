//! A connection that breaks before GO (option `resume-timeout` of the source): what came is kept, and the source goes on
//! over another connection.
//!
//! The source knocks (`wire::knock`) before its hello. The reception lets it in only if it is the source of the migration
//! that was here, with a higher number than before; it then ends the old connection, in case nobody noticed here that it is
//! gone. What follows is answered when every thread of the old connection was joined: nothing of it is written any more.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::door::Door;
use super::hand::Hand;
use super::{Job, Parallel, Peer, greet};
use crate::error::{Error, Result};
use crate::options::Opt;
use crate::status::State;
use crate::transport::stream::StreamInput;
use crate::wire::ask::MigrationId;
use crate::wire::hello::{self, Hello};
use crate::wire::knock;
use crate::wire::packet::{self, Tag};

/// Longest that a source may have us wait.
const TIME_MAX: Duration = Duration::from_secs(3600);
/// How long one who was let in may take to say the hello. A newer knock ends it earlier.
const HELLO: Duration = Duration::from_secs(10);

/// What both sides agreed on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Agreed {
    pub(super) migration: MigrationId,
    /// Of the present connection.
    number: u32,
    time: Duration,
}

impl Agreed {
    /// From the first hello, which was taken.
    pub(super) fn new(theirs: &Hello) -> Option<Self> {
        let time = Duration::from_millis(theirs.resume?).min(TIME_MAX);
        Some(Self { migration: theirs.attempt?.migration, number: 0, time })
    }

    /// How the channels of the present connection begin.
    pub(super) fn tag(&self) -> Tag {
        packet::tag(&self.migration.0, self.number)
    }
}

/// Waits for the source to come again, and has it go on. On failure it will not.
pub(super) fn rejoin<'a>(
    job: &'a Job,
    door: &Arc<Door>,
    peer: &mut Peer,
    input: &mut StreamInput,
    hand: &mut Hand<'a>,
    why: Error,
) -> Result<Parallel> {
    let Some(agreed) = peer.agreed else { return Err(why) };
    peer.hang_up();
    let deadline = Instant::now() + agreed.time;
    let mut trouble = why.clone();
    loop {
        // From here on a knock is no news to those who wait.
        door.await_knock();
        job.status.lose_link(trouble)?;
        let channel = door.knocked(&job.wake, deadline).map_err(|e| match e.errno() {
            libc::ETIMEDOUT => {
                let what = format!("{}; the source did not connect again within", why.text());
                Error::timeout(Opt::ResumeTimeout.name(), agreed.time, what).in_phase("reconnect")
            }
            _ => e.in_phase("reconnect"),
        })?;
        let mut next = Peer::new(job, channel, door);
        let mut from = StreamInput::new(Arc::clone(&next.channel), HELLO);
        *hand = Hand::new(job);
        match go_on(job, &mut next, &mut from, hand, &agreed) {
            Ok(parallel) => {
                from.set_limit(job.options.time(Opt::StallTimeout));
                (*peer, *input) = (next, from);
                job.status.advance(State::Active)?;
                return Ok(parallel);
            }
            Err(error) => {
                next.hang_up();
                trouble = error.in_phase("reconnect");
                job.vmm.log().to("incoming").warning(format_args!("while the source is waited for: {trouble}"));
            }
        }
    }
}

/// What the source says before its stream.
fn go_on(
    job: &Job,
    peer: &mut Peer,
    input: &mut StreamInput,
    hand: &mut Hand<'_>,
    before: &Agreed,
) -> Result<Parallel> {
    let knock = knock::read(input)?;
    let theirs = hello::read(input)?;
    peer.is_vmig = true;
    // What it would have us build is here.
    drop(hello::read_config(input, &theirs)?);
    if theirs.attempt.map(|attempt| attempt.migration) != Some(before.migration) || theirs.check {
        return Err(Error::new(libc::EPROTO, "the hello is about another migration than the knock before it"));
    }
    let (parallel, _) = greet(job, peer, input, &theirs, hand)?;
    match &mut peer.agreed {
        Some(agreed) => agreed.number = knock.number,
        None => return Err(Error::new(libc::EPROTO, "a source that goes on must be ready to do so again")),
    }
    Ok(parallel)
}

/// Whether only the connection is to blame.
pub(super) fn is_lost(job: &Job, peer: &Peer, error: &Error, lanes: bool) -> bool {
    let silent = error.errno() == libc::ETIMEDOUT && error.place().option.is_some();
    peer.agreed.is_some() && (job.status.is_link_lost() || peer.channel.is_lost() || lanes || silent)
}
