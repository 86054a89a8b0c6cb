//! The load loop: reads element after element and gives each body to whom it belongs.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::ahead::Scout;
use super::lanes::Lanes;
use super::receiver::RamReceiver;
use super::target::Targets;
use super::verify::Arrived;
use super::{Job, Peer, resume};
use crate::error::{Error, Result};
use crate::section::builtin;
use crate::section::fds::Inbox;
use crate::section::list::{Bindings, Entry};
use crate::section::{Apply, Part};
use crate::status::Status;
use crate::status::watch::phase;
use crate::transport::stream::StreamInput;
use crate::wire::command::{self, Command};
use crate::wire::hello::Attempt;
use crate::wire::input::{Input, Slice};
use crate::wire::ram;
use crate::wire::reply::Reply;
use crate::wire::stream::{self, Element, SectionName};

/// How long a failing load waits for the source to say why.
const LAST_WORDS: Duration = Duration::from_millis(300);

/// What an id of the stream stands for, if it is one of the library's own sections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Own {
    Ram,
    Timer,
    GlobalState,
}

/// Loads one stream.
#[derive(Debug)]
pub(super) struct Loader<'a> {
    job: &'a Job,
    peer: &'a mut Peer,
    bindings: Bindings,
    ram: RamReceiver,
    ram_id: Option<u32>,
    lanes: Option<Lanes>,
    /// Ids of iterative sections that had their END.
    ended: HashSet<u32>,
    clock_ns: Option<u64>,
    /// As the source said; a stream that says nothing is of a running guest.
    running: bool,
    /// Which sections take part: asked once.
    takes_part: Vec<bool>,
    /// How many sections were told to prepare: those are told the end.
    set_up: usize,
    /// Descriptors of devices.
    fds: Arc<Inbox>,
    /// What came, as it was hashed; none: nobody compares.
    arrived: Option<Arrived>,
    /// What earlier connections carried: bytes, pages, zero pages.
    before: (u64, u64, u64),
    /// PREPARE came: the switchover's words follow.
    prepared: bool,
}

fn carried(status: &Status) -> (u64, u64, u64) {
    let counters = &status.counters;
    let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    (load(&counters.transferred), load(&counters.normal_pages), load(&counters.zero_pages))
}

impl<'a> Loader<'a> {
    pub(super) fn new(
        job: &'a Job,
        peer: &'a mut Peer,
        targets: &Targets,
        scout: Option<Scout>,
        lanes: Option<Lanes>,
        fds: Arc<Inbox>,
    ) -> Self {
        let arrived = peer.verify.then(Arrived::default);
        Self {
            job,
            peer,
            bindings: Bindings::new(job.sections.clone()),
            ram: RamReceiver::new(targets, scout),
            ram_id: None,
            lanes,
            ended: HashSet::new(),
            clock_ns: None,
            running: true,
            takes_part: vec![false; job.sections.len()],
            set_up: 0,
            fds,
            arrived,
            before: carried(&job.status),
            prepared: false,
        }
    }

    /// Whether PREPARE was read, also if something was missing then.
    pub(super) fn is_prepared(&self) -> bool {
        self.prepared
    }

    /// The attempt whose switchover goes by words.
    pub(super) fn attempt(&self) -> Option<Attempt> {
        self.peer.attempt
    }

    /// Whether all that is wrong is the connection, and the source may still go on over another.
    pub(super) fn is_link_lost(&self, error: &Error) -> bool {
        let lanes = self.lanes.as_ref().is_some_and(Lanes::are_lost);
        resume::is_lost(self.job, self.peer, error, lanes)
    }

    /// Loads everything, up to PREPARE or to the last byte of the description. True: the guest ran at the source.
    pub(super) fn load(&mut self, input: &mut StreamInput) -> Result<bool> {
        let result = phase(c"load", || self.prepare().and_then(|()| self.elements(input)));
        let result = result.map_err(|error| self.reason(error, input));
        let ok = result.is_ok();
        let cleaned = self.clean_up(ok);
        result?;
        cleaned?;
        Ok(self.running)
    }

    /// Why the load failed: what the source says itself, or else what broke first.
    fn reason(&self, error: Error, input: &mut StreamInput) -> Error {
        if error.place().side.as_deref() == Some("source") {
            self.job.status.blame(error.clone());
            return error;
        }
        // A source whose channel broke sends no more on its main stream than why.
        let error = self.lanes.as_ref().and_then(|l| l.check().err()).unwrap_or(error);
        let broken = error.place().ended || matches!(error.errno(), libc::ECONNRESET | libc::EPIPE);
        // Behind PREPARE come the words of the switchover, for others to read.
        if self.peer.is_vmig
            && broken
            && !self.prepared
            && let Some(words) = self.last_words(input)
        {
            self.job.status.blame(words.clone());
            return words;
        }
        error
    }

    /// What the source says at the end. One that would go on, and has only lost a channel, is to hear that this connection is
    /// of no more use: until then it sends.
    fn last_words(&self, input: &mut StreamInput) -> Option<Error> {
        self.peer.end_if_resumed();
        last_words(input)
    }

    fn prepare(&mut self) -> Result<()> {
        let job = self.job;
        job.vmm.with_bql("the sections' load_setup", || {
            for (index, entry) in job.sections.iter().enumerate() {
                if let Some(section) = entry.section() {
                    self.takes_part[index] = section.is_active();
                    self.set_up = index + 1;
                    section.load_setup().map_err(|e| e.in_section(&entry.name))?;
                }
            }
            Ok(())
        })
    }

    fn clean_up(&mut self, ok: bool) -> Result<()> {
        let (sections, set_up) = (Arc::clone(&self.job.sections), self.set_up);
        self.job.vmm.with_bql_or_later("the sections' load_cleanup", move || {
            sections[..set_up].iter().filter_map(Entry::section).for_each(|section| section.load_cleanup(ok));
        })
    }

    fn elements(&mut self, input: &mut StreamInput) -> Result<()> {
        loop {
            self.job.status.check()?;
            match self.next_element(input)? {
                Element::Start(id, name) => self.named(input, id, &name, Part::Start)?,
                Element::Full(id, name) => self.named(input, id, &name, Part::Full)?,
                Element::Part(id) => self.numbered(input, id, Part::Iterate)?,
                Element::End(id) => self.numbered(input, id, Part::End)?,
                Element::Command(Command::Hash) => self.verify(input)?,
                Element::Command(Command::Prepare(epoch)) => {
                    self.prepare_for(epoch)?;
                    break;
                }
                Element::Command(command) => self.command(command)?,
                Element::Eof if self.peer.attempt.is_some() => {
                    return Err(Error::new(
                        libc::EPROTO,
                        "the stream ends without PREPARE, which the hello promised",
                    ));
                }
                Element::Eof => break,
            }
            self.publish(input.position());
        }
        if !self.prepared {
            stream::read_description(input)?;
        }
        self.check_complete()?;
        self.lanes.as_mut().map_or(Ok(()), Lanes::finish)?;
        let extra = input.buffered();
        if extra > 0 {
            let text = format!("byte {:#x}: at least {extra} bytes follow the end of the stream", input.position());
            return Err(Error::invalid(text).at_byte(input.position()));
        }
        self.peer.check_no_fds()?;
        self.fds.check_empty()?;
        self.publish(input.position());
        if let Some(clock_ns) = self.clock_ns {
            self.job.vmm.set_clock_ns(clock_ns)?;
        }
        Ok(())
    }

    /// Everything came: compares it with what the source has.
    fn verify(&mut self, input: &mut StreamInput) -> Result<()> {
        self.check_complete()?;
        match &self.arrived {
            Some(arrived) => arrived.compare(self.job, self.peer, input).map_err(|e| e.in_phase("verify")),
            None => Err(Error::new(libc::EPROTO, "hashes came, on which the hello did not agree")),
        }
    }

    /// PREPARE is the end of the stream where the hello agreed on words, and nothing elsewhere.
    fn prepare_for(&mut self, epoch: u64) -> Result<()> {
        let agreed = self.peer.attempt.map(|attempt| attempt.epoch);
        if agreed != Some(epoch) {
            let text = "PREPARE for an attempt that the hello did not name";
            let agreed = agreed.map_or("none".to_owned(), |epoch| epoch.to_string());
            return Err(Error::new(libc::EPROTO, text).expected_got(agreed, epoch));
        }
        if self.arrived.as_ref().is_some_and(|arrived| !arrived.is_compared()) {
            return Err(Error::new(libc::EPROTO, "PREPARE came without the hashes that the hello promised"));
        }
        self.prepared = true;
        Ok(())
    }

    /// Brings the numbers others look at up to date.
    fn publish(&self, position: u64) {
        let (received, normal, zero) = self.lanes.as_ref().map_or((0, 0, 0), Lanes::counts);
        let counters = &self.job.status.counters;
        let (more_normal, more_zero) = self.ram.counts();
        let before = self.before;
        counters.transferred.store(before.0 + position + received, Ordering::Relaxed);
        counters.normal_pages.store(before.1 + normal + more_normal, Ordering::Relaxed);
        counters.zero_pages.store(before.2 + zero + more_zero, Ordering::Relaxed);
    }

    /// Everything that is registered here must have arrived.
    fn check_complete(&self) -> Result<()> {
        self.bindings.check_complete(&self.takes_part, |id| self.ended.contains(&id))?;
        if self.ram_id.is_none() && self.job.ram.iter().any(|b| b.is_sent()) {
            return Err(Error::new(libc::ENOENT, "the stream has no guest RAM").in_section(ram::NAME));
        }
        Ok(())
    }

    /// A QEMU that may not open the channels of its multifd hangs up, or waits, before it sends a section.
    fn next_element(&self, input: &mut StreamInput) -> Result<Element> {
        stream::read_element(input).map_err(|error| match (error.errno(), self.ram_id) {
            (libc::EBADMSG, _) => self.name_rejected(error, input),
            (libc::EIO | libc::ETIMEDOUT | libc::ECONNRESET, None) => {
                let hint = "nothing came of the first section; if the source is QEMU, switch multifd off there";
                error.hint(hint)
            }
            _ => error,
        })
    }

    /// Names the section that the rejected frame began with, if its name can be made out.
    fn name_rejected(&self, error: Error, input: &StreamInput) -> Error {
        match stream::read_element(&mut Slice::new(input.rejected().unwrap_or_default())) {
            Ok(Element::Start(_, name) | Element::Full(_, name)) => error.in_section(name.name),
            Ok(Element::Part(id) | Element::End(id)) if self.ram_id == Some(id) => error.in_section(ram::NAME),
            Ok(Element::Part(id) | Element::End(id)) => match self.bindings.find(id) {
                Ok((entry, ..)) => error.in_section(entry.name.clone()),
                Err(_) => error,
            },
            _ => error,
        }
    }

    /// START or FULL: binds the id and loads the body.
    fn named(&mut self, input: &mut StreamInput, id: u32, name: &SectionName, part: Part) -> Result<()> {
        let at = input.position();
        let own = self.own(id, name)?;
        let arrived = &mut self.arrived;
        let body = match own {
            Some(Own::Ram) => self.ram_body(input),
            Some(Own::Timer) => builtin::read_timer(&mut Arrived::body(arrived, id, &name.name, None, input))
                .map(|ns| self.clock_ns = Some(ns)),
            Some(Own::GlobalState) => {
                builtin::read_global_state(&mut Arrived::body(arrived, id, &name.name, None, input))
                    .map(|running| self.running = running)
            }
            None => self.device(input, id, name, part),
        };
        body.map_err(|e| e.in_section(&name.name).in_body_at(at))?;
        stream::read_footer(input, id, &name.name)
    }

    /// A body of the RAM section, and the meetings of the lanes in it.
    fn ram_body(&mut self, input: &mut StreamInput) -> Result<()> {
        self.ram.load(input, &self.job.status, self.lanes.as_ref())?;
        self.lanes.as_mut().map_or(Ok(()), Lanes::end_of_section)
    }

    fn own(&mut self, id: u32, section: &SectionName) -> Result<Option<Own>> {
        let own = match section.name.as_str() {
            ram::NAME => (Own::Ram, ram::VERSION),
            name if name == builtin::TIMER.0 => (Own::Timer, builtin::TIMER.1),
            name if name == builtin::GLOBAL_STATE.0 => (Own::GlobalState, builtin::GLOBAL_STATE.1),
            _ => return Ok(None),
        };
        if section.instance != 0 || section.version != own.1 {
            let text = format!("unsupported version or instance of section '{}'", section.name);
            return Err(Error::invalid(text).in_section(&section.name).expected_got(
                format!("version {}, instance 0", own.1),
                format!("version {}, instance {}", section.version, section.instance),
            ));
        }
        if own.0 == Own::Ram {
            self.ram_id = Some(id);
        }
        Ok(Some(own.0))
    }

    fn device(&mut self, input: &mut StreamInput, id: u32, name: &SectionName, part: Part) -> Result<()> {
        let (_, section) = self.bindings.bind(id, &name.name, name.instance, name.version)?;
        let again = section.saves_again().then_some((name.instance, name.version));
        let mut input = Arrived::body(&mut self.arrived, id, &name.name, again, input);
        let apply = section.parse_with_fds(part, name.version, &mut input, &self.fds)?;
        apply_locked(self.job, apply)
    }

    /// PART or END.
    fn numbered(&mut self, input: &mut StreamInput, id: u32, part: Part) -> Result<()> {
        let at = input.position();
        if self.ram_id == Some(id) {
            self.ram_body(input).map_err(|e| e.in_section(ram::NAME).in_body_at(at))?;
            return stream::read_footer(input, id, ram::NAME);
        }
        let (entry, section, version) = self.bindings.find(id)?;
        let mut tee = Arrived::body(&mut self.arrived, id, &entry.name, None, input);
        let parsed = section.parse_with_fds(part, version, &mut tee, &self.fds);
        let loaded = parsed.and_then(|apply| apply_locked(self.job, apply));
        loaded.map_err(|e| e.in_section(&entry.name).in_body_at(at))?;
        if part == Part::End {
            self.ended.insert(id);
        }
        stream::read_footer(input, id, &entry.name)
    }

    fn command(&mut self, command: Command) -> Result<()> {
        match command {
            Command::OpenReturnPath => {
                self.peer.listens = true;
                // A vmig may get one unasked, so that setting the option at the source is enough.
                if self.peer.is_vmig || self.job.options.on(crate::options::Opt::SwitchoverAck) {
                    self.peer.reply(&Reply::SwitchoverAck)?;
                }
                Ok(())
            }
            Command::Ping(value) if self.peer.listens => self.peer.reply(&Reply::Pong(value)),
            Command::Ping(_) => Err(Error::invalid("a PING before the return path was opened")),
            Command::SyncPoint(number) if self.peer.agreed.is_some() => self.peer.reply(&Reply::Ack(number)),
            Command::SyncPoint(_) => Err(Error::new(libc::EPROTO, "a sync point, which nobody agreed on")),
            Command::SwitchoverStart => {
                let active = self.job.sections.iter().zip(&self.takes_part).filter(|(_, takes_part)| **takes_part);
                active.filter_map(|(entry, _)| entry.section()).for_each(|section| section.about_to_switch());
                Ok(())
            }
            Command::Error(error) => Err(error),
            Command::Fds(count) => self.fds.add(self.peer.take_fds(count)?),
            Command::Hash
            | Command::PageHashes
            | Command::Hashes
            | Command::Prepare(_)
            | Command::Go(..)
            | Command::Abort(_) => {
                Err(Error::new(libc::EPROTO, "a word of the switchover in the middle of the stream"))
            }
        }
    }
}

/// What the source says at the very end of a stream that makes no more sense.
fn last_words(input: &mut StreamInput) -> Option<Error> {
    /// The longest error, its command and something to spare.
    const LEN_MAX: usize = 65 << 10;
    const _: () = assert!(LEN_MAX as u64 > command::ERROR_MAX + 16);
    let mut end = std::collections::VecDeque::new();
    let until = Instant::now() + LAST_WORDS;
    input.set_limit(LAST_WORDS);
    while Instant::now() < until
        && let Ok(byte) = input.u8()
    {
        if end.len() == LEN_MAX {
            end.pop_front();
        }
        end.push_back(byte);
    }
    command::last_words(end.make_contiguous())
}

fn apply_locked(job: &Job, apply: Apply<'_>) -> Result<()> {
    job.vmm.with_bql("the loading of a device", apply)
}
