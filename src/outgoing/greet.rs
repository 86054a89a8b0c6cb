//! The hello of a source: what it says of itself, and what it makes of the answer.

use std::sync::Arc;
use std::time::Instant;

use super::lanes::Lanes;
use super::replies::Replies;
use super::{HandOver, Migration, hand, verify};
use crate::error::{Error, Result};
use crate::options::Opt;
use crate::ram::presence::{GRANULE, Hint, Presence};
use crate::ram::survey::Survey;
use crate::ram::{Block, PAGE};
use crate::transport::stream::StreamInput;
use crate::wire::checksum;
use crate::wire::command::Command;
use crate::wire::cpu::Cpu;
use crate::wire::hello::{self, Answer, Welcome};
use crate::wire::stream;

impl Migration<'_> {
    /// Between two vmigs: both sides compare what they have. Then the header, and the return path.
    pub(super) fn greet(&mut self) -> Result<()> {
        let two_way = self.channel.is_two_way();
        if !two_way && self.job.options.on(Opt::SwitchoverAck) {
            let text = "switchover-ack needs a destination that can answer; a pipe or a file cannot";
            return Err(Error::invalid(text));
        }
        let checksum = self.job.options.on(Opt::Checksum);
        if checksum && !self.to_vmig {
            return Err(needs_vmig());
        }
        self.verify = verify::wanted(&self.job.options, self.to_vmig, self.verify.take())?;
        self.check_resume()?;
        hand::check_devices(self.job, &*self.channel, self.sections.fd_fields())?;
        self.hand = HandOver::new(self.job, &*self.channel)?;
        let mut answers = StreamInput::of_replies(Arc::clone(&self.channel));
        if self.to_vmig {
            // A destination that goes on has prepared its memory.
            let survey = if self.resuming.goes_on() { None } else { Survey::new().ok() };
            self.introduce(survey.as_ref(), false)?;
            self.resuming.ask(true);
            // Looked for while the destination compares; what that takes is not the destination's fault.
            let begun = Instant::now();
            if let Some(survey) = &survey {
                self.existing = self.existing(survey)?;
            }
            let answer_by = self.answer_by + begun.elapsed();
            answers.set_deadline(Some((answer_by, self.job.options.time(Opt::ConnectTimeout))));
            let answer = hello::read_answer(&mut answers)?;
            self.resuming.ask(false);
            match answer {
                Answer::Welcome(welcome) => {
                    answers.set_deadline(None);
                    self.take(&welcome, &mut answers)?;
                }
                Answer::Refused(errors) | Answer::Checked(errors, _) => return Err(hello::join(&errors)),
            }
            let mut bytes = Vec::new();
            let hinted = self.existing.iter().filter(|_| survey.is_some());
            for (block, hint) in hinted {
                hello::put_hint(&mut bytes, &without_zeros(block, hint)?);
            }
            self.out.write(&bytes)?;
        }
        let channels = self.channels();
        if channels > 0 {
            let find_zeros = self.job.options.get(Opt::ZeroPageDetection) == 2;
            self.sender.use_lanes(Lanes::connect(
                self.job,
                channels,
                (find_zeros, self.sender.has_zero_runs(), checksum),
                &self.toll,
                &self.tag(),
            )?);
        }
        let mut bytes = Vec::new();
        stream::put_header(&mut bytes, &self.job.options.machine())?;
        if two_way && self.job.options.on(Opt::ReturnPath) {
            stream::put_command(&mut bytes, Command::OpenReturnPath);
            self.pings += 1;
            stream::put_command(&mut bytes, Command::Ping(self.pings));
            self.replies = Some(Replies::start(self.job, answers, self.resuming.is_agreed())?);
        }
        self.write(&bytes)?;
        self.may_speak = self.to_vmig;
        Ok(())
    }

    /// Goes by what the destination takes.
    fn take(&mut self, welcome: &Welcome, answers: &mut StreamInput) -> Result<()> {
        hand::check_welcome(welcome, self.sections.fd_fields())?;
        let checksum = self.job.options.on(Opt::Checksum);
        if checksum != welcome.checksum {
            return Err(no_checksum(checksum));
        }
        verify::check_welcome(self.verify.is_some(), welcome.verify && welcome.switchover)?;
        if checksum {
            self.out.use_frames()?;
            answers.expect_frames()?;
        }
        self.hand.pass(welcome, &mut self.out)?;
        self.votes = welcome.switchover && self.job.options.on(Opt::ReturnPath);
        self.agree_to_resume(welcome.resume && self.votes)?;
        if welcome.zero_runs {
            self.sender.use_zero_runs();
        }
        self.channels_most = welcome.channels.unwrap_or(u8::MAX);
        self.toll.limit_to(welcome.max_bandwidth.unwrap_or(0));
        Ok(())
    }

    /// Says hello. `check`: only to ask what differs.
    pub(super) fn introduce(&mut self, survey: Option<&Survey>, check: bool) -> Result<()> {
        let mut bytes = self.knock();
        hello::put(&mut bytes, &hello::Hello { check, ..self.hello(survey) })?;
        bytes.extend_from_slice(self.job.config.as_deref().unwrap_or_default());
        self.out.write(&bytes)
    }

    /// Connections for pages; pipes, files and a lone descriptor have only the plain stream.
    fn channels(&self) -> u8 {
        let options = &self.job.options;
        if options.get(Opt::Peer) == 1 && !options.is_set(Opt::Multifd) {
            // A QEMU has no channels unless it was told, and so must we be.
            return 0;
        }
        if self.hand.is_all() {
            // Connections for nothing; should the destination not take every file, one stream does.
            return 0;
        }
        match self.job.route.target().has_channels() {
            true => options.channels().min(self.channels_most),
            false => 0,
        }
    }

    /// Where the blocks that certainly travel have pages.
    fn existing(&self, survey: &Survey) -> Result<Vec<(Arc<Block>, Hint)>> {
        let blocks = self.job.ram.iter().filter(|b| b.is_sent() && !self.hand.is_offered(b));
        blocks.map(|block| Ok((Arc::clone(block), Presence::new(block, survey, None).hint()?))).collect()
    }

    fn identities(&self, survey: &Survey) -> Vec<String> {
        self.job.ram.iter().filter(|b| b.is_sent()).flat_map(|block| survey.identities(block)).collect()
    }

    /// What the library knows of the CPUs. A guest that runs is not disturbed for it.
    fn cpu(&self) -> Option<Cpu> {
        let kvm = self.job.kvm.as_ref()?;
        let stopped = !self.job.vmm.reasons().is_empty();
        let facts = kvm.facts(stopped).or_else(|_| kvm.facts(false));
        facts
            .inspect_err(|error| {
                self.job.vmm.log().to("outgoing").warning(format_args!("CPUs are not compared: {error}"))
            })
            .ok()
    }

    /// Features the destination must have.
    fn needs(&self, devices: &[hello::Device]) -> Vec<String> {
        let wants = [
            (self.channels() > 0, hello::FEATURE_MULTIFD),
            (self.hand.offers().is_some(), hello::FEATURE_HAND_OVER),
            (devices.iter().any(|device| !device.fds.is_empty()), hello::FEATURE_FDS),
            (self.job.options.on(Opt::Checksum), checksum::NAME),
            // It is the vote that the hashes come before.
            (self.job.options.on(Opt::Verify), hello::FEATURE_VERIFY),
            (self.job.options.on(Opt::Verify), hello::FEATURE_SWITCHOVER),
            (self.resuming.is_on(), hello::FEATURE_RESUME),
        ];
        wants.iter().filter(|(wanted, _)| *wanted).map(|(_, name)| (*name).to_owned()).collect()
    }

    fn hello(&self, survey: Option<&Survey>) -> hello::Hello {
        let sections = self.sections.devices();
        // Without a return path nobody could answer.
        let votes = self.job.options.on(Opt::ReturnPath);
        let offers = [(true, hello::FEATURE_ZERO_RUNS), (votes, hello::FEATURE_SWITCHOVER)];
        hello::Hello {
            cpu: self.cpu(),
            needs: self.needs(&sections),
            offers: offers.iter().filter(|(offered, _)| *offered).map(|(_, name)| (*name).to_owned()).collect(),
            config: self.job.config.as_ref().map(|blob| blob.len() as u64),
            check: false,
            machine: self.job.options.machine(),
            page_size: PAGE,
            blocks: self.job.ram.iter().filter(|b| b.is_sent()).map(|b| (b.name().to_owned(), b.len())).collect(),
            sections,
            channels: self.channels(),
            meet_each_section: self.job.options.on(Opt::MultifdFlushAfterEachSection),
            memory: survey.map_or_else(Vec::new, |survey| self.identities(survey)),
            hints: survey.is_some(),
            checksum: self.job.options.on(Opt::Checksum).then(|| checksum::NAME.to_owned()),
            hand_over: self.hand.offers(),
            resume: self.resuming.is_on().then(|| self.job.options.get(Opt::ResumeTimeout)),
            attempt: votes.then(|| hello::Attempt { migration: self.job.migration, epoch: self.job.keeper.epoch() }),
        }
    }
}

/// Touched memory may be all zeros, which the destination need not have: a few pages of each full granule tell. Others
/// are not looked at, because looking at a page that does not exist may make it.
fn without_zeros(block: &Block, hint: &Hint) -> Result<Hint> {
    const SAMPLES: usize = 4;
    let mut without = hint.clone();
    for (granule, _) in hint.full().enumerate().filter(|(_, full)| *full) {
        let (first, pages) = (granule * GRANULE, hint.granule_pages(granule));
        block.check_mapped(&(first..first + pages))?;
        if (0..SAMPLES).all(|n| block.is_zero(first + n * pages / SAMPLES)) {
            without.set(granule, 0);
        }
    }
    Ok(without)
}

fn needs_vmig() -> Error {
    let text =
        "option 'checksum' needs a destination that uses this library and can answer: not a QEMU, a pipe or a file";
    Error::new(libc::ENOTSUP, text).by_option(Opt::Checksum.name())
}

/// The destination answered `checksum` with its contrary.
fn no_checksum(asked: bool) -> Error {
    let (errno, text) = match asked {
        true => (
            libc::ENOTSUP,
            "the destination's library is older and knows nothing of option 'checksum': set it to none",
        ),
        false => (libc::EPROTO, "the destination would send checksums, which nobody asked for"),
    };
    Error::new(errno, text).by_option(Opt::Checksum.name())
}
