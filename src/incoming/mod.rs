//! The destination half: listen, compare what both sides have, load, take over.

mod ahead;
mod arrival;
mod awaited;
mod compare;
pub mod door;
mod entrance;
mod hand;
mod handover;
mod lanes;
mod load;
mod receiver;
pub mod reception;
mod resume;
mod strangers;
mod target;
mod verify;

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::kvm::Kvm;
use crate::options::{Opt, Options};
use crate::ram::RamList;
use crate::ram::presence::Hint;
use crate::section::list::Entry;
use crate::status::{State, Status};
use crate::switchover::keeper::Keeper;
use crate::switchover::{Epoch, Phase};
use crate::sys::eventfd::Wake;
use crate::thread::Threads;
use crate::transport::Channel;
use crate::transport::stream::{StreamInput, StreamOutput};
use crate::vmm::run::Before;
use crate::vmm::{RunReport, StopReason, Vmm};
use crate::wire::hello::{self, Answer, Attempt, Hello};
use crate::wire::input::Input;
use crate::wire::reply::{self, Reply};
use ahead::Ahead;
use arrival::Arrival;
use door::Door;
use hand::Hand;
use reception::Reception;
use resume::Agreed;
use target::Targets;

/// How long a failed destination keeps reading, so that its last words are not lost to a reset connection.
const LINGER: Duration = Duration::from_secs(2);

/// How long a guest that came from a command waits to hear whether the command failed.
const ENDED_WAIT: Duration = Duration::from_secs(1);

/// What is registered.
#[derive(Clone, Debug)]
pub struct Parts {
    /// Guest RAM.
    pub ram: RamList,
    /// Sections.
    pub sections: Arc<[Entry]>,
    /// vCPUs, if the library knows them.
    pub kvm: Option<Arc<Kvm>>,
}

/// Takes stock of what is registered, again after a config hook. Err: something blocks migration.
pub type TakeStock = dyn Fn() -> Result<Parts> + Send + Sync;

/// What an incoming migration needs; the pieces of a guest, never the whole.
pub struct Job {
    /// What is registered.
    pub parts: Parts,
    /// Takes stock again.
    pub take_stock: Arc<TakeStock>,
    /// Stop and start.
    pub vmm: Arc<Vmm>,
    /// Where it stands.
    pub status: Arc<Status>,
    /// Options.
    pub options: Options,
    /// Threads of the guest.
    pub threads: Arc<Threads>,
    /// The run state before: what it is again if nobody arrives.
    pub before: Before,
    /// Raised by cancel and by the first error.
    pub wake: Arc<Wake>,
    /// Who may run the guest.
    pub keeper: Arc<Keeper>,
    /// What it said before.
    pub was: (Phase, Epoch),
    /// Who else comes in.
    pub reception: Arc<Reception>,
}

/// How far an arrival got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    /// Nothing here was touched.
    Untouched,
    /// The guest's memory and devices were written to.
    Touched,
    /// What happens to a guest that did not come was done.
    Settled,
}

impl std::fmt::Debug for Job {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Job").field("parts", &self.parts).finish_non_exhaustive()
    }
}

impl std::ops::Deref for Job {
    type Target = Parts;

    fn deref(&self) -> &Parts {
        &self.parts
    }
}

impl Job {
    /// The same with what the VMM registered for the source's configuration; none: it has no hook for that.
    fn configured(&self, blob: Option<&[u8]>) -> Result<Option<Self>> {
        let Some(blob) = blob.filter(|_| self.vmm.has_config()) else { return Ok(None) };
        self.status.allow_registering(true);
        let built = self.vmm.config(blob);
        self.status.allow_registering(false);
        built?;
        Ok(Some(Self {
            parts: (self.take_stock)()?,
            take_stock: Arc::clone(&self.take_stock),
            vmm: Arc::clone(&self.vmm),
            status: Arc::clone(&self.status),
            options: self.options.snapshot(),
            threads: Arc::clone(&self.threads),
            before: self.before,
            wake: Arc::clone(&self.wake),
            keeper: Arc::clone(&self.keeper),
            was: self.was,
            reception: Arc::clone(&self.reception),
        }))
    }
}

/// Runs an incoming migration from start to end; the body of the thread `incoming`.
pub fn run(job: &Job, door: Door) {
    let mut progress = Progress::Untouched;
    let result = attempt(job, door, &mut progress).map_err(|e| job.status.cause(e));
    if result.is_err() && progress == Progress::Untouched {
        job.vmm.nobody_arrived(job.before);
        job.keeper.restore(job.was);
    }
    job.status.end(result);
    job.keeper.rest();
    job.reception.answer_visitors();
}

fn attempt(job: &Job, door: Door, progress: &mut Progress) -> Result<()> {
    let door = Arc::new(door);
    loop {
        let channel = door.main(&job.wake).map_err(|e| e.in_phase("listen"))?;
        let mut peer = Peer::new(job, channel, &door);
        let mut input = StreamInput::new(Arc::clone(&peer.channel), job.options.time(Opt::StallTimeout));
        let theirs = match meet(job, &door, &mut peer, &mut input) {
            // Only a question: it is no business of this migration's whether the answer arrived.
            Ok(Some(theirs)) if theirs.check => {
                let _ = answer_check(job, &mut peer, &theirs);
                continue;
            }
            Ok(theirs) => theirs,
            Err(error) => return Err(give_up(job, &mut peer, error.in_phase("hello"))),
        };
        let configured = match &theirs {
            Some(theirs) => configure(job, &mut peer, &mut input, theirs),
            None => Ok(None),
        };
        let configured = configured.map_err(|error| give_up(job, &mut peer, error))?;
        let job = configured.as_ref().unwrap_or(job);
        return Arrival::new(job, &door, peer, input).run(theirs, progress);
    }
}

/// Tells the source why nothing comes of it; why, as everybody else hears it.
fn give_up(job: &Job, peer: &mut Peer, error: Error) -> Error {
    let error = job.status.cause(error).on_side("destination");
    peer.say_why(&error);
    error
}

/// Who is there? A vmig's hello; none: a QEMU.
fn meet(job: &Job, door: &Door, peer: &mut Peer, input: &mut StreamInput) -> Result<Option<Hello>> {
    let theirs = match input.peek(4)? == hello::MAGIC.to_be_bytes() {
        false => None,
        true => match hello::read(input) {
            Ok(theirs) => Some(theirs),
            Err(error) => {
                // Whatever else it is, it waits for an answer to its hello.
                let refusal = Answer::Refused(vec![error.clone().on_side("destination").in_phase("hello")]);
                let _ = peer.answer(&refusal);
                return Err(error);
            }
        },
    };
    peer.is_vmig = theirs.is_some();
    if !theirs.as_ref().is_some_and(|t| t.check) {
        door.shut_out_others();
        job.status.advance(State::Active)?;
    }
    Ok(theirs)
}

/// Tells a source that only asks what differs. Nothing here is touched.
fn answer_check(job: &Job, peer: &mut Peer, theirs: &Hello) -> Result<()> {
    let begun = Instant::now();
    let differences = compare::everything(theirs, job, &*peer.channel, &mut Hand::new(job));
    let took = u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX);
    let result = peer.answer(&Answer::Checked(differences, took));
    peer.let_words_arrive();
    result
}

/// The guest of a source that does not vote is ours, since the source was told so.
fn start_plain(job: &Job, peer: &mut Peer, running: bool) -> Result<()> {
    job.keeper.moved_without_votes(true);
    let started = take_over(job, running);
    // Only a report: the source has let go of the guest.
    if let (Ok(took), true) = (&started, peer.is_vmig && peer.listens) {
        let _ = peer.reply(&Reply::Started(took.hook_ns + took.handlers_ns));
    }
    if started.as_ref().is_ok_and(|report| report.changed) {
        job.vmm.announce();
    }
    peer.hang_up();
    started.map(drop)
}

/// The connection to the source, and how it may be answered.
#[derive(Debug)]
pub(crate) struct Peer {
    channel: Arc<dyn Channel>,
    out: StreamOutput,
    /// The source is a vmig: it understands errors with words.
    pub(crate) is_vmig: bool,
    /// The source asked for replies.
    pub(crate) listens: bool,
    /// Everything is hashed and compared, as the hello agreed.
    pub(crate) verify: bool,
    /// The attempt whose switchover goes by words, as the hello agreed.
    pub(crate) attempt: Option<Attempt>,
    /// The source connects again if this breaks: how.
    agreed: Option<Agreed>,
    /// Where it came in.
    door: Arc<Door>,
}

impl Peer {
    fn new(job: &Job, channel: Arc<dyn Channel>, door: &Arc<Door>) -> Self {
        let out = StreamOutput::new(Arc::clone(&channel), job.options.time(Opt::StallTimeout));
        let door = Arc::clone(door);
        Self { channel, out, is_vmig: false, listens: false, verify: false, attempt: None, agreed: None, door }
    }

    /// Sends a reply.
    pub(crate) fn reply(&mut self, reply: &Reply) -> Result<()> {
        let mut bytes = Vec::new();
        reply::put(&mut bytes, reply);
        self.out.write(&bytes)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.out.write(bytes)
    }

    /// The connection, to wait for it beside others.
    fn channel(&self) -> &dyn Channel {
        &*self.channel
    }

    /// Another connection to the same source.
    fn replace(&mut self, channel: Arc<dyn Channel>, out: StreamOutput) {
        (self.channel, self.out) = (channel, out);
    }

    /// Tells the source why we failed, as well as it can understand, and lets the words arrive.
    fn say_why(&mut self, error: &Error) {
        // The source may be gone; then there is nobody to tell.
        let _ = self.last_words(error);
        if self.hears() {
            self.let_words_arrive();
        }
        self.channel.shutdown();
    }

    /// Answers a hello.
    fn answer(&mut self, answer: &Answer) -> Result<()> {
        let mut bytes = Vec::new();
        hello::put_answer(&mut bytes, answer)?;
        self.out.write(&bytes)
    }

    /// Reads on until the source hangs up, so that our last words are not lost to a reset connection.
    fn let_words_arrive(&self) {
        self.channel.close_write();
        let mut drain = vec![0; 64 << 10];
        let deadline = Instant::now() + LINGER;
        while let Some(left) = deadline.checked_duration_since(Instant::now()) {
            if !matches!(self.channel.read(&mut drain, Some(left)), Ok(n) if n > 0) {
                break;
            }
        }
        self.channel.shutdown();
    }

    /// A vmig listens from its hello on, before its stream says so.
    fn hears(&self) -> bool {
        self.listens || self.is_vmig
    }

    fn last_words(&mut self, error: &Error) -> Result<()> {
        if !self.hears() {
            return Ok(());
        }
        if self.is_vmig {
            self.reply(&Reply::Error(error.clone()))?;
        }
        self.reply(&Reply::Shut(1))
    }

    /// Descriptors that came with bytes of the stream.
    pub(crate) fn take_fds(&self, count: u32) -> Result<Vec<OwnedFd>> {
        self.channel.take_fds(usize::try_from(count).unwrap_or(usize::MAX))
    }

    /// Fails if descriptors came that the stream says nothing of.
    pub(crate) fn check_no_fds(&self) -> Result<()> {
        match self.channel.fds_left() {
            0 => Ok(()),
            n => Err(Error::new(libc::EPROTO, format!("{n} file descriptors came that were not announced"))),
        }
    }

    fn hang_up(&self) {
        self.channel.shutdown();
    }

    /// Says nothing more to a source that goes on over another connection.
    pub(crate) fn end_if_resumed(&self) {
        if self.agreed.is_some() {
            self.channel.close_write();
        }
    }
}

/// Everything came from a source that does not vote: tells it so, after which there is no way back.
fn arrive(job: &Job, peer: &mut Peer, hand: &mut Hand<'_>, loaded: Result<bool>) -> Result<bool> {
    let running = loaded?;
    if !peer.listens {
        peer.channel.ended_well(ENDED_WAIT).map_err(|e| e.in_phase("load").on_side("source"))?;
    }
    hand.open().map_err(|e| e.in_phase("hand over"))?;
    // From here on the source may learn that we have the guest.
    job.status.commit()?;
    if peer.listens {
        peer.reply(&Reply::Shut(0)).map_err(|e| e.context("telling the source that the guest arrived"))?;
    }
    Ok(running)
}

/// The source's connections for pages.
#[derive(Clone, Copy, Debug)]
struct Parallel {
    channels: u8,
    meet_each_section: bool,
    /// Their packets carry checksums.
    checksum: bool,
}

impl Parallel {
    /// What the options say: on only if multifd was switched on by name, because a plain QEMU source has no channels.
    fn configured(options: &Options) -> Self {
        let channels = if options.is_set(Opt::Multifd) { options.channels() } else { 0 };
        Self { channels, meet_each_section: options.on(Opt::MultifdFlushAfterEachSection), checksum: false }
    }
}

/// Takes the source's configuration, if it has one, and lets the VMM build what it asks for.
fn configure(job: &Job, peer: &mut Peer, input: &mut StreamInput, theirs: &Hello) -> Result<Option<Job>> {
    let built = hello::read_config(input, theirs).and_then(|blob| job.configured(blob.as_deref()));
    built.map_err(|error| {
        let error = error.in_field("config").in_phase("hello").on_side("destination");
        // The source waits for an answer to its hello.
        let _ = peer.answer(&Answer::Refused(vec![error.clone()]));
        error
    })
}

/// Compares the source's hello with what is here and answers it. Behind the answer hints may come, or the connection break.
fn greet(
    job: &Job,
    peer: &mut Peer,
    input: &mut StreamInput,
    theirs: &Hello,
    hand: &mut Hand<'_>,
) -> Result<(Parallel, Result<Hints>)> {
    let differences = compare::everything(theirs, job, &*peer.channel, hand);
    if !differences.is_empty() {
        let error = hello::join(&differences);
        peer.answer(&Answer::Refused(differences))?;
        return Err(error);
    }
    let mut welcome = hand.welcome(theirs, &*peer.channel);
    // A lone descriptor cannot be connected to again.
    welcome.resume &= peer.door.is_line();
    let (channels, checksum) = (welcome.channels.unwrap_or(theirs.channels), welcome.checksum);
    peer.attempt = theirs.attempt.filter(|_| welcome.switchover);
    peer.verify = welcome.verify;
    peer.agreed = Agreed::new(theirs).filter(|_| welcome.resume);
    peer.answer(&Answer::Welcome(welcome))?;
    if checksum {
        peer.out.use_frames()?;
        input.expect_frames()?;
    }
    hand.receive(input, &*peer.channel)?;
    let hints = if theirs.hints { read_hints(job, theirs, input) } else { Ok(Vec::new()) };
    Ok((Parallel { channels, meet_each_section: theirs.meet_each_section, checksum }, hints))
}

/// Where the blocks with these names have content.
type Hints = Vec<(String, Hint)>;

/// The hints behind a welcome, one for each block of the hello that was not offered by its file; their lengths follow
/// from our own blocks, which were found to be the same.
fn read_hints(job: &Job, theirs: &Hello, input: &mut StreamInput) -> Result<Hints> {
    let mut hints = Vec::new();
    let offered = |name: &str| theirs.hand_over.iter().flatten().any(|offer| offer.name == name);
    for (name, _) in theirs.blocks.iter().filter(|(name, _)| !offered(name)) {
        if let Some(block) = job.ram.iter().find(|b| b.is_sent() && b.name() == name) {
            hints.push((name.clone(), hello::read_hint(input, block.pages())?));
        }
    }
    Ok(hints)
}

/// What makes memory present before its data comes.
#[derive(Debug, Default)]
struct Memory {
    /// Without hints: a thread that looks at what arrives.
    ahead: Option<Ahead>,
    /// With hints: these hold the threads that follow them.
    targets: Option<Targets>,
}

impl Memory {
    fn prepare(&mut self, job: &Job, targets: &Targets, hints: Hints, channels: usize) {
        /// Populating is faster than one connection, and not much faster with more threads than this.
        const THREADS_MAX: usize = 2;
        if targets.is_empty() {
            return;
        }
        if hints.is_empty() {
            match Ahead::start(job, targets.values().map(|target| &target.block)) {
                Ok(ahead) => self.ahead = Some(ahead),
                Err(error) => job
                    .vmm
                    .log()
                    .to("incoming")
                    .warning(format_args!("memory is not prepared ahead of the data: {error}")),
            }
            return;
        }
        self.targets = Some(Arc::clone(targets));
        if let Err(error) = target::populate(job, targets, hints, channels.clamp(1, THREADS_MAX)) {
            job.vmm.log().to("incoming").warning(format_args!("memory is not prepared ahead of the data: {error}"));
        }
    }
}

/// The guest is ours: runs it, unless it was paused or is to wait.
fn take_over(job: &Job, running: bool) -> Result<RunReport> {
    let vmm = &job.vmm;
    let started = (|| {
        // Ours first, and paused: should the start fail, it can be tried again with vmig_start.
        vmm.stop(StopReason::User)?;
        vmm.start(StopReason::Migration)?;
        vmm.start(StopReason::NotOwner)?;
        match running && job.options.on(Opt::Autostart) {
            true => vmm.start(StopReason::User),
            false => Ok(RunReport::default()),
        }
    })();
    started.map_err(|e: Error| {
        e.context("the guest arrived, but could not be started; it is here, paused, for vmig_start to try again")
            .in_phase("start")
    })
}
