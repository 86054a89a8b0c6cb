//! A guest arrives: the answer to its hello, what comes over its connections, and how that ends.

use std::sync::Arc;
use std::time::Instant;

use super::ahead::Ahead;
use super::door::Door;
use super::hand::Hand;
use super::handover::Handover;
use super::lanes::{self, Lanes};
use super::load::Loader;
use super::resume::{self, Agreed};
use super::target::{self, Targets};
use super::{Job, Memory, Parallel, Peer, Progress, arrive, give_up, greet, start_plain};
use crate::error::{Error, Result};
use crate::options::Opt;
use crate::transport::Channel;
use crate::transport::stream::StreamInput;
use crate::wire::hello::{Attempt, Hello};
use crate::wire::packet::Tag;
use crate::wire::stream;

/// What a guest arrives in.
pub(super) struct Arrival<'a> {
    job: &'a Job,
    door: &'a Arc<Door>,
    peer: Peer,
    input: StreamInput,
    hand: Hand<'a>,
    /// Ends after the guest was started: waiting for a thread is not for the blackout.
    memory: Memory,
}

/// Where pages go, and what they come over.
struct Stage {
    targets: Targets,
    parallel: Parallel,
}

/// Why nothing more came, and whether the source may go on over another connection.
struct Broken {
    error: Error,
    lost: bool,
}

impl<'a> Arrival<'a> {
    pub(super) fn new(job: &'a Job, door: &'a Arc<Door>, peer: Peer, input: StreamInput) -> Self {
        Self { job, door, peer, input, hand: Hand::new(job), memory: Memory::default() }
    }

    /// Until the guest is here, or will not come.
    pub(super) fn run(mut self, theirs: Option<Hello>, progress: &mut Progress) -> Result<()> {
        let mut stage = match self.begin(theirs, progress) {
            Ok(stage) => stage,
            Err(error) => return Err(self.fail(error, progress)),
        };
        loop {
            let why = match self.load(&stage) {
                Ok((Some(attempt), loaded)) => {
                    *progress = Progress::Settled;
                    let hand = std::mem::replace(&mut self.hand, Hand::new(self.job));
                    let memory = std::mem::take(&mut self.memory);
                    let handover = Handover::new(self.job, &mut self.peer, &mut self.input, loaded, hand, memory);
                    let Some((why, memory)) = handover.run(attempt, self.door)? else { return Ok(()) };
                    (self.memory, *progress) = (memory, Progress::Touched);
                    why
                }
                Ok((None, loaded)) => match arrive(self.job, &mut self.peer, &mut self.hand, loaded) {
                    Ok(running) => {
                        self.hand.keep();
                        return start_plain(self.job, &mut self.peer, running);
                    }
                    Err(error) => return Err(self.fail(error, progress)),
                },
                Err(Broken { error, lost: true }) => error,
                Err(Broken { error, lost: false }) => return Err(self.fail(error, progress)),
            };
            match self.rejoin(why) {
                Ok(parallel) => stage.parallel = parallel,
                Err(error) => return Err(self.fail(error, progress)),
            }
        }
    }

    /// The guest does not come: says why, and leaves nothing of it here.
    fn fail(mut self, error: Error, progress: &Progress) -> Error {
        let came = Arc::clone(self.hand.rest());
        drop(self.hand);
        let error = give_up(self.job, &mut self.peer, error);
        drop(self.memory);
        if *progress == Progress::Touched {
            target::discard(self.job, &came, self.peer.is_vmig);
        }
        error
    }

    /// What comes before the stream. From here on our memory is touched.
    fn begin(&mut self, theirs: Option<Hello>, progress: &mut Progress) -> Result<Stage> {
        let (job, peer) = (self.job, &mut self.peer);
        let (parallel, hints) = match theirs {
            Some(theirs) => {
                greet(job, peer, &mut self.input, &theirs, &mut self.hand).map_err(|e| e.in_phase("hello"))?
            }
            // A QEMU says nothing of its channels: both sides must have been told the same.
            None => {
                self.hand.check_plain()?;
                if let Some(option) = [Opt::Checksum, Opt::Verify].into_iter().find(|option| job.options.on(*option))
                {
                    let name = option.name();
                    let text = format!(
                        "option '{name}' is set, but the source does not use this library, or is a pipe or a file"
                    );
                    return Err(Error::invalid(text).by_option(name).in_phase("hello"));
                }
                (Parallel::configured(&job.options), Ok(Vec::new()))
            }
        };
        if let Some(agreed) = &peer.agreed {
            self.door.let_rejoin(agreed.migration, &job.status);
        }
        let (hints, broken) = match hints {
            Ok(hints) => (hints, None),
            Err(error) => (Vec::new(), Some(error.in_phase("hello"))),
        };
        if let Some(error) = &broken
            && !resume::is_lost(job, peer, error, false)
        {
            return Err(error.clone());
        }
        *progress = Progress::Touched;
        let targets = target::prepare(job, self.hand.rest(), peer.is_vmig)?;
        self.memory.prepare(job, &targets, hints, usize::from(parallel.channels));
        let parallel = broken.map_or(Ok(parallel), |why| self.rejoin(why))?;
        Ok(Stage { targets, parallel })
    }

    fn rejoin(&mut self, why: Error) -> Result<Parallel> {
        resume::rejoin(self.job, self.door, &mut self.peer, &mut self.input, &mut self.hand, why)
    }

    /// Receives what comes over one connection and its channels, up to the handover. With an attempt the switchover's words
    /// follow, and the result of loading is for them; else it is true if the guest ran at the source.
    fn load(&mut self, stage: &Stage) -> std::result::Result<(Option<Attempt>, Result<bool>), Broken> {
        let lanes = self.open_lanes(stage).map_err(|error| {
            // One that broke, or did not come, is missed by its source, too.
            let gone = matches!(error.errno(), libc::ETIMEDOUT | libc::ECONNRESET | libc::EIO);
            let lost = self.peer.agreed.is_some() && (gone || self.job.status.is_link_lost());
            Broken { lost, error: error.in_phase("connect") }
        })?;
        self.configuration().map_err(|error| Broken {
            lost: resume::is_lost(self.job, &self.peer, &error, false),
            error: error.in_phase("load"),
        })?;
        let scout = self.memory.ahead.as_ref().map(Ahead::scout);
        let mut loader = Loader::new(self.job, &mut self.peer, &stage.targets, scout, lanes, self.hand.inbox());
        let loaded = loader.load(&mut self.input).map_err(|e| e.in_phase("load"));
        match (loader.is_prepared(), loaded) {
            (_, Err(error)) if loader.is_link_lost(&error) => Err(Broken { lost: true, error }),
            (true, loaded) => Ok((loader.attempt(), loaded)),
            (false, Ok(running)) => Ok((None, Ok(running))),
            (false, Err(error)) => Err(Broken { lost: false, error }),
        }
    }

    fn configuration(&mut self) -> Result<()> {
        stream::read_header(&mut self.input)?;
        stream::read_configuration(&mut self.input, &self.job.options.machine())
    }

    /// The connections for pages, if there are any.
    fn open_lanes(&self, stage: &Stage) -> Result<Option<Lanes>> {
        let (job, parallel) = (self.job, stage.parallel);
        if parallel.channels == 0 {
            return Ok(None);
        }
        let channels = match &self.peer.agreed {
            Some(agreed) => self.tagged_channels(parallel, agreed)?,
            None => {
                let limit = job.options.time(Opt::ConnectTimeout);
                let channels = self.door.channels(parallel.channels, &job.wake, limit)?;
                let with_id = |channel: Arc<dyn Channel>| Ok((self.first_packet(&*channel, parallel)?.0, channel));
                channels.into_iter().map(with_id).collect::<Result<_>>()?
            }
        };
        let ahead = self.memory.ahead.as_ref();
        let how = (self.peer.is_vmig, parallel.checksum);
        let mut lanes = Lanes::start(job, channels, &stage.targets, ahead, how, self.peer.agreed.is_some())?;
        if parallel.meet_each_section {
            lanes.meet_each_section();
        }
        // A QEMU does not say how many channels it has: pages on one more would be lost without a word.
        if !self.peer.is_vmig {
            lanes.watch(self.door);
        }
        Ok(Some(lanes))
    }

    /// The first packet of a channel: its id, and whose it is.
    fn first_packet(&self, channel: &dyn Channel, parallel: Parallel) -> Result<(u8, Tag)> {
        let limit = self.job.options.time(Opt::StallTimeout);
        let first = lanes::read_init(channel, parallel.channels, limit, parallel.checksum);
        first.map_err(|e| e.context("the first packet of a channel"))
    }

    /// The channels of the present connection. Those of an older one may still come in: they are closed unread.
    fn tagged_channels(&self, parallel: Parallel, agreed: &Agreed) -> Result<Vec<(u8, Arc<dyn Channel>)>> {
        let deadline = Instant::now() + self.job.options.time(Opt::ConnectTimeout);
        let mut channels = Vec::new();
        while channels.len() < usize::from(parallel.channels) {
            let channel = self.door.channel(parallel.channels, &self.job.wake, deadline)?;
            match self.first_packet(&*channel, parallel) {
                Ok((id, tag)) if tag == agreed.tag() => channels.push((id, channel)),
                Ok(_) => channel.shutdown(),
                // One of an older connection, or of this.
                Err(error) if channel.is_lost() && !self.job.status.is_link_lost() => {
                    self.door.channel_broke(error);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(channels)
    }
}
