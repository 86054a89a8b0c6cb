//! The destination half: listen, compare what both sides have, load, take over.

mod ahead;
pub mod door;
mod hand;
mod handover;
mod lanes;
mod load;
mod receiver;
pub mod reception;
mod target;

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::options::{Opt, Options};
use crate::ram::presence::Hint;
use crate::ram::survey::Survey;
use crate::ram::{PAGE, RamList};
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
use crate::wire::checksum;
use crate::wire::hello::{self, Answer, Attempt, Hello};
use crate::wire::input::Input;
use crate::wire::packet;
use crate::wire::reply::{self, Reply};
use crate::wire::stream;
use ahead::Ahead;
use door::Door;
use hand::Hand;
use handover::Handover;
use lanes::Lanes;
use load::Loader;
use reception::Reception;
use target::Targets;

/// How long a failed destination keeps reading, so that its last words are not lost to a reset connection.
const LINGER: Duration = Duration::from_secs(2);

/// What an incoming migration needs; the pieces of a guest, never the whole.
#[derive(Debug)]
pub struct Job {
    /// Guest RAM.
    pub ram: RamList,
    /// Sections.
    pub sections: Arc<[Entry]>,
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
    let channel = door.main(&job.wake).map_err(|e| e.in_phase("listen"))?;
    job.status.advance(State::Active)?;
    let mut peer = Peer::new(job, channel);
    // Both end after the guest was started: waiting for a thread is not for the blackout.
    let mut memory = Memory::default();
    let mut hand = Hand::new(job);
    let mut input = StreamInput::new(Arc::clone(&peer.channel), job.options.time(Opt::StallTimeout));
    let received = receive(job, &door, &mut peer, &mut input, &mut memory, &mut hand, progress);
    match received {
        Ok((Some(attempt), loaded)) => {
            *progress = Progress::Settled;
            Handover::new(job, &mut peer, input, loaded, hand, memory).run(attempt, &door)
        }
        received => match received.and_then(|(_, loaded)| arrive(job, &mut peer, &mut hand, loaded)) {
            Ok(running) => {
                hand.keep();
                start_plain(job, &mut peer, running)
            }
            Err(error) => {
                let came = Arc::clone(hand.rest());
                drop(hand);
                let error = job.status.cause(error).on_side("destination");
                peer.say_why(&error);
                drop(memory);
                if *progress == Progress::Touched {
                    target::discard(job, &came, peer.is_vmig);
                }
                Err(error)
            }
        },
    }
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
    /// The attempt whose switchover goes by words, as the hello agreed.
    pub(crate) attempt: Option<Attempt>,
}

impl Peer {
    fn new(job: &Job, channel: Arc<dyn Channel>) -> Self {
        let out = StreamOutput::new(Arc::clone(&channel), job.options.time(Opt::StallTimeout));
        Self { channel, out, is_vmig: false, listens: false, attempt: None }
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

    /// The descriptor, to wait for it beside others.
    fn descriptor(&self) -> Result<Arc<OwnedFd>> {
        self.channel.descriptor()
    }

    /// Another connection to the same source.
    fn replace(&mut self, channel: Arc<dyn Channel>, out: StreamOutput) {
        (self.channel, self.out) = (channel, out);
    }

    /// Tells the source why we failed, as well as it can understand, and lets the words arrive.
    fn say_why(&mut self, error: &Error) {
        // The source may be gone; then there is nobody to tell.
        let _ = self.last_words(error);
        self.linger();
    }

    /// Lets the last words arrive.
    fn linger(&self) {
        self.channel.close_write();
        if self.hears() {
            let mut drain = vec![0; 64 << 10];
            let deadline = Instant::now() + LINGER;
            while let Some(left) = deadline.checked_duration_since(Instant::now()) {
                if !matches!(self.channel.read(&mut drain, Some(left)), Ok(n) if n > 0) {
                    break;
                }
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
}

/// Receives everything up to the handover. With an attempt the switchover's words follow, and the result of loading is
/// for them; else it is true if the guest ran at the source.
fn receive(
    job: &Job,
    door: &Arc<Door>,
    peer: &mut Peer,
    input: &mut StreamInput,
    memory: &mut Memory,
    hand: &mut Hand<'_>,
    progress: &mut Progress,
) -> Result<(Option<Attempt>, Result<bool>)> {
    let first = input.peek(4).map_err(|e| e.in_phase("hello"))?;
    let (parallel, hints) = match first == hello::MAGIC.to_be_bytes() {
        true => greet(job, peer, input, hand).map_err(|e| e.in_phase("hello"))?,
        // A QEMU says nothing of its channels: both sides must have been told the same.
        false => {
            hand.check_plain()?;
            if job.options.on(Opt::Checksum) {
                let text =
                    "option 'checksum' is set, but the source does not use this library, or is a pipe or a file";
                return Err(Error::invalid(text).by_option(Opt::Checksum.name()).in_phase("hello"));
            }
            (Parallel::configured(&job.options), Vec::new())
        }
    };
    *progress = Progress::Touched;
    let targets = target::prepare(job, hand.rest(), peer.is_vmig)?;
    memory.prepare(job, &targets, hints, usize::from(parallel.channels));
    let lanes = open_lanes(job, door, peer, &targets, memory, parallel).map_err(|e| e.in_phase("connect"))?;
    let configuration = |input: &mut StreamInput| {
        stream::read_header(input)?;
        stream::read_configuration(input, &job.options.machine())
    };
    configuration(input).map_err(|e| e.in_phase("load"))?;
    let scout = memory.ahead.as_ref().map(Ahead::scout);
    let mut loader = Loader::new(job, peer, &targets, scout, lanes, hand.inbox());
    let loaded = loader.load(input).map_err(|e| e.in_phase("load"));
    match loader.is_prepared() {
        true => Ok((peer.attempt, loaded)),
        false => Ok((None, Ok(loaded?))),
    }
}

/// The connections for pages, if there are any.
fn open_lanes(
    job: &Job,
    door: &Arc<Door>,
    peer: &Peer,
    targets: &Targets,
    memory: &Memory,
    parallel: Parallel,
) -> Result<Option<Lanes>> {
    if parallel.channels == 0 {
        return Ok(None);
    }
    let channels = door.channels(parallel.channels, &job.wake, job.options.time(Opt::ConnectTimeout))?;
    let mut lanes = Lanes::start(job, channels, targets, memory.ahead.as_ref(), (peer.is_vmig, parallel.checksum))?;
    if parallel.meet_each_section {
        lanes.meet_each_section();
    }
    // A QEMU does not say how many channels it has: pages on one more would be lost without a word.
    if !peer.is_vmig {
        lanes.watch(door);
    }
    Ok(Some(lanes))
}

/// Everything came from a source that does not vote: tells it so, after which there is no way back.
fn arrive(job: &Job, peer: &mut Peer, hand: &mut Hand<'_>, loaded: Result<bool>) -> Result<bool> {
    let running = loaded?;
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

/// Compares the source's hello with what is here and answers it.
fn greet(
    job: &Job,
    peer: &mut Peer,
    input: &mut StreamInput,
    hand: &mut Hand<'_>,
) -> Result<(Parallel, Vec<(String, Hint)>)> {
    let theirs = hello::read(input)?;
    peer.is_vmig = true;
    peer.attempt = theirs.attempt;
    let differences = compare(&theirs, job, peer, hand);
    let answer = match differences.is_empty() {
        true => Answer::Welcome(hand.welcome(&theirs, &*peer.channel)),
        false => Answer::Refused(differences),
    };
    let mut bytes = Vec::new();
    hello::put_answer(&mut bytes, &answer)?;
    peer.out.write(&bytes)?;
    match answer {
        Answer::Welcome(welcome) => {
            if welcome.checksum {
                peer.out.use_frames()?;
                input.expect_frames()?;
            }
            hand.receive(input, &*peer.channel)?;
            let hints = if theirs.hints { read_hints(job, &theirs, input)? } else { Vec::new() };
            let checksum = theirs.checksum.is_some();
            Ok((Parallel { channels: theirs.channels, meet_each_section: theirs.meet_each_section, checksum }, hints))
        }
        Answer::Refused(errors) => Err(hello::join(&errors)),
    }
}

/// The hints behind a welcome, one for each block of the hello that was not offered by its file; their lengths follow from our own blocks, which were
/// found to be the same.
fn read_hints(job: &Job, theirs: &Hello, input: &mut StreamInput) -> Result<Vec<(String, Hint)>> {
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
    fn prepare(&mut self, job: &Job, targets: &Targets, hints: Vec<(String, Hint)>, channels: usize) {
        /// Populating is faster than one connection, and not much faster with more threads than this.
        const THREADS_MAX: usize = 2;
        if targets.is_empty() {
            return;
        }
        if hints.is_empty() {
            match Ahead::start(job, targets.values().map(|target| &target.block)) {
                Ok(ahead) => self.ahead = Some(ahead),
                Err(error) => {
                    job.vmm.log().warning(format_args!("memory is not prepared ahead of the data: {error}"))
                }
            }
            return;
        }
        self.targets = Some(Arc::clone(targets));
        if let Err(error) = target::populate(job, targets, hints, channels.clamp(1, THREADS_MAX)) {
            job.vmm.log().warning(format_args!("memory is not prepared ahead of the data: {error}"));
        }
    }
}

/// Everything that differs between the two sides.
fn compare(theirs: &Hello, job: &Job, peer: &Peer, hand: &mut Hand<'_>) -> Vec<Error> {
    let mut found = Vec::new();
    hand.compare(theirs, &*peer.channel, &mut found);
    let machine = job.options.machine();
    if theirs.machine != machine {
        let text = "option 'machine' differs between source and destination";
        found.push(Error::invalid(text).expected_got(machine, &theirs.machine));
    }
    compare_checksum(theirs, job, &mut found);
    if theirs.page_size != PAGE {
        found.push(Error::invalid("the page size differs").expected_got(PAGE, theirs.page_size));
    }
    if theirs.channels > packet::CHANNELS_MAX {
        let text = "the source wants more channels than the destination allows";
        found.push(Error::invalid(text).expected_got(format!("at most {}", packet::CHANNELS_MAX), theirs.channels));
    }
    compare_ram(theirs, &job.ram, hand, &mut found);
    compare_sections(theirs, &job.sections, &mut found);
    found.into_iter().map(|e| e.on_side("destination").in_phase("hello")).collect()
}

fn compare_ram(theirs: &Hello, ram: &RamList, hand: &Hand<'_>, found: &mut Vec<Error>) {
    for (name, len) in &theirs.blocks {
        match ram.iter().find(|b| b.is_sent() && b.name() == name) {
            None => found.push(
                Error::new(libc::ENOENT, format!("the source has a RAM block '{name}', the destination does not"))
                    .in_section("ram"),
            ),
            Some(block) if block.len() != *len => found.push(
                Error::invalid(format!("RAM block '{name}' has different lengths on the two sides"))
                    .in_section("ram")
                    .expected_got(format!("{:#x}", block.len()), format!("{len:#x}")),
            ),
            Some(_) => (),
        }
    }
    let survey = Survey::new();
    for block in ram.iter().filter(|b| b.is_sent()) {
        let shared = |survey: &Survey| survey.identities(block).iter().any(|name| theirs.memory.contains(name));
        // Memory that changes hands may well have been here before.
        if !hand.takes(block) && survey.as_ref().is_ok_and(shared) {
            let text = format!(
                "RAM block '{}' is the same memory on both sides: map another file at the destination, or set \
                 VMIG_RAM_SHARED_STORAGE on both",
                block.name()
            );
            found.push(Error::new(libc::EEXIST, text).in_section("ram"));
        }
        if !theirs.blocks.iter().any(|(name, _)| name == block.name()) {
            let text = format!("the destination has a RAM block '{}', the source does not", block.name());
            found.push(Error::new(libc::ENOENT, text).in_section("ram"));
        }
    }
}

/// The source decides whether there are checksums, but a destination may insist.
fn compare_checksum(theirs: &Hello, job: &Job, found: &mut Vec<Error>) {
    let got = theirs.checksum.as_deref().unwrap_or("none");
    let text = match got {
        checksum::NAME => return,
        "none" if !job.options.on(Opt::Checksum) => return,
        "none" => "option 'checksum' is set at the destination: set it at the source, too",
        _ => "the destination does not know the checksum that the source wants",
    };
    found.push(Error::invalid(text).by_option(Opt::Checksum.name()).expected_got(checksum::NAME, got));
}

fn compare_sections(theirs: &Hello, entries: &[Entry], found: &mut Vec<Error>) {
    let ours = || entries.iter().filter(|e| e.section().is_some_and(|s| s.is_active()));
    for section in &theirs.sections {
        let (section, fds) = (&section.name, &section.fds);
        let (name, instance) = (&section.name, section.instance);
        match ours().find(|e| e.name == *name && e.instance == instance) {
            None => found.push(
                Error::new(
                    libc::ENOENT,
                    format!("the source has a device '{name}' (instance {instance}), the destination does not"),
                )
                .in_section(name.clone()),
            ),
            Some(entry) if section.version > entry.version || section.version < entry.oldest => found.push(
                Error::invalid(format!("the version of device '{name}' (instance {instance}) cannot be read here"))
                    .in_section(name.clone())
                    .expected_got(format!("{} to {}", entry.oldest, entry.version), section.version),
            ),
            Some(entry) => compare_fds(entry, section.version, fds, found),
        }
    }
    for entry in ours() {
        if !theirs.sections.iter().any(|s| s.name.name == entry.name && s.name.instance == entry.instance) {
            let text = format!(
                "the destination has a device '{}' (instance {}), the source does not",
                entry.name, entry.instance
            );
            found.push(Error::new(libc::ENOENT, text).in_section(entry.name.clone()));
        }
    }
}

/// A descriptor on one side and a number on the other have the same size on the wire, and nothing else in common.
fn compare_fds(entry: &Entry, version: u32, theirs: &[String], found: &mut Vec<Error>) {
    let ours = entry.section().map_or_else(Vec::new, |section| section.fd_fields(version));
    if ours != theirs {
        let field = ours.iter().find(|f| !theirs.contains(f)).or(theirs.iter().find(|f| !ours.contains(f)));
        let list = |fields: &[String]| if fields.is_empty() { "none".to_owned() } else { fields.join(", ") };
        let text = format!(
            "device '{}' (instance {}) has other fields that are file descriptors at the source",
            entry.name, entry.instance
        );
        let error = Error::invalid(text).in_section(entry.name.clone()).expected_got(list(&ours), list(theirs));
        found.push(match field {
            Some(field) => error.in_field(field),
            None => error,
        });
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
