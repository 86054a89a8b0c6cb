//! Taking over instead of receiving: RAM blocks by the source's files, and descriptors of devices.
//!
//! Until the source has let go, its memory is mapped for reading only, so that nothing here can change it. What happens
//! here is undone on every path that does not end with the guest here.

use std::sync::Arc;

use super::{Job, verify};
use crate::error::{Error, Result};
use crate::options::Opt;
use crate::ram::handed::{MemoryFile, Replaced};
use crate::ram::survey::Survey;
use crate::ram::{Block, RamList};
use crate::section::fds::Inbox;
use crate::section::list::Entry;
use crate::transport::{Channel, FDS_MAX};
use crate::vmm::run::ReplacedRam;
use crate::wire::hello::{self, Hello, Offer, Welcome};
use crate::wire::input::Input;

/// A block whose file is taken.
#[derive(Debug)]
struct Wanted {
    block: Arc<Block>,
    own: Arc<MemoryFile>,
    offset: u64,
}

/// What arrives by descriptors. Dropped before [`keep`](Self::keep), everything is as it was.
#[derive(Debug)]
pub(super) struct Hand<'a> {
    job: &'a Job,
    on: bool,
    wanted: Vec<Wanted>,
    replaced: Vec<Replaced>,
    /// For how many of them the VMM was told.
    told: usize,
    /// The blocks whose pages arrive.
    rest: RamList,
    inbox: Arc<Inbox>,
    kept: bool,
}

impl<'a> Hand<'a> {
    pub(super) fn new(job: &'a Job) -> Self {
        let on = job.options.on(Opt::HandOver);
        let (wanted, replaced, rest) = (Vec::new(), Vec::new(), Arc::clone(&job.ram));
        Self { job, on, wanted, replaced, told: 0, rest, inbox: Arc::default(), kept: false }
    }

    /// Decides, block by block, and names what forbids it.
    pub(super) fn compare(&mut self, theirs: &Hello, channel: &dyn Channel, found: &mut Vec<Error>) {
        let one_sided = |here: &str, there: &str| {
            let text = format!("option 'hand-over' is {there} at the source: set it to the same on both sides");
            Error::invalid(text).in_section("features").in_field("hand-over").differs(there, here)
        };
        match (&theirs.hand_over, self.on) {
            (None, false) => (),
            (Some(_), false) => found.push(one_sided("off", "on")),
            (None, true) => found.push(one_sided("on", "off")),
            (Some(_), true) if !channel.passes_fds() => {
                found.push(Error::invalid("option 'hand-over' needs a unix socket"));
            }
            (Some(offers), true) => {
                if let Err(error) = self.want(offers) {
                    found.push(error);
                }
                self.writers(found);
            }
        }
        found.extend(self.given());
    }

    /// Blocks whose memory left with a guest: pages of another one would destroy it.
    fn given(&self) -> Option<Error> {
        let block = self.job.ram.iter().find(|b| b.is_sent() && b.is_given() && !self.takes(b))?;
        let text = format!(
            "the memory of RAM block '{}' here was handed over and is another process's: it can come back the same way, \
             or map other memory, remove the block and add it again",
            block.name()
        );
        Some(Error::new(libc::EBUSY, text).in_section("ram"))
    }

    fn want(&mut self, offers: &[Offer]) -> Result<()> {
        let survey = Survey::new()?;
        for offer in offers {
            // Another length is one of the differences of the hello already.
            let same = |b: &&Arc<Block>| b.is_sent() && b.name() == offer.name && b.len() == offer.len;
            let Some(block) = self.job.ram.iter().find(same) else { continue };
            if self.takes(block) {
                let text = format!("the source offers the file of RAM block '{}' twice", block.name());
                return Err(Error::new(libc::EPROTO, text));
            }
            if let Some(own) = block.file() {
                block.check_file(&own, &survey)?;
                self.wanted.push(Wanted { block: Arc::clone(block), own, offset: offer.offset });
            }
        }
        Ok(())
    }

    /// Devices whose load would write memory that nobody may write yet.
    fn writers(&self, found: &mut Vec<Error>) {
        let Some(wanted) = self.wanted.first() else { return };
        let writes = |entry: &&Entry| entry.section().is_some_and(|s| s.is_active() && s.writes_ram());
        for entry in self.job.sections.iter().filter(writes) {
            let text = format!(
                "device '{}' (instance {}) writes guest RAM when it is loaded, but RAM block '{}' is read-only until the \
                 guest has arrived: switch option 'hand-over' off",
                entry.name,
                entry.instance,
                wanted.block.name()
            );
            found.push(Error::new(libc::ENOTSUP, text).in_section(entry.name.clone()));
        }
    }

    /// Whether the block's file is taken.
    pub(super) fn takes(&self, block: &Block) -> bool {
        self.wanted.iter().any(|wanted| std::ptr::eq(&*wanted.block, block))
    }

    /// What to answer; from here on descriptors may come.
    pub(super) fn welcome(&self, theirs: &Hello, channel: &dyn Channel) -> Welcome {
        if !self.wanted.is_empty() || theirs.sections.iter().any(|s| !s.fds.is_empty()) {
            channel.expect_fds();
        }
        let names = || self.wanted.iter().map(|wanted| wanted.block.name().to_owned()).collect();
        let options = &self.job.options;
        let takes = |feature: &str| theirs.offers.iter().any(|f| f == feature) && options.allows(feature);
        let most = options.channels_allowed();
        Welcome {
            fds: options.allows(hello::FEATURE_FDS),
            zero_runs: takes(hello::FEATURE_ZERO_RUNS),
            checksum: theirs.checksum.is_some(),
            verify: verify::is_needed(theirs),
            switchover: theirs.attempt.is_some() && takes(hello::FEATURE_SWITCHOVER),
            resume: theirs.needs.iter().any(|name| name == hello::FEATURE_RESUME),
            hand_over: self.on.then(names),
            channels: (theirs.channels > most).then_some(most),
            max_bandwidth: Some(options.get(Opt::MaxBandwidth)).filter(|most| *most > 0),
        }
    }

    /// A source that says no hello cannot hand anything over.
    pub(super) fn check_plain(&self) -> Result<()> {
        match self.on {
            true => Err(Error::invalid("option 'hand-over' is on, but the source does not use this library")),
            false => self.given().map_or(Ok(()), Err),
        }
    }

    /// Takes the files, all of them before the first is mapped, and shows them.
    pub(super) fn receive(&mut self, input: &mut dyn Input, channel: &dyn Channel) -> Result<()> {
        let mut fds = Vec::new();
        while fds.len() < self.wanted.len() {
            let want = (self.wanted.len() - fds.len()).min(FDS_MAX);
            let count = input.u32()?;
            if usize::try_from(count) != Ok(want) {
                let text = "another number of RAM blocks is handed over than was agreed";
                return Err(Error::new(libc::EPROTO, text).expected_got(want, count));
            }
            fds.extend(channel.take_fds(want)?);
        }
        for (wanted, fd) in self.wanted.iter().zip(fds) {
            let theirs = MemoryFile::new(fd, wanted.offset);
            self.replaced.push(Replaced::new(&wanted.block, Arc::clone(&wanted.own), theirs)?);
        }
        self.rest = self.job.ram.iter().filter(|block| !self.takes(block)).cloned().collect();
        self.replaced.iter_mut().try_for_each(Replaced::show)
    }

    /// The blocks whose pages arrive.
    pub(super) fn rest(&self) -> &RamList {
        &self.rest
    }

    /// Where descriptors of devices come from.
    pub(super) fn inbox(&self) -> Arc<Inbox> {
        Arc::clone(&self.inbox)
    }

    /// The source has let go: lets the memory be written, and tells the VMM whose memory it is.
    pub(super) fn open(&mut self) -> Result<()> {
        self.replaced.iter_mut().try_for_each(Replaced::open)?;
        // After a start that failed it may be called again.
        for replaced in &self.replaced[self.told..] {
            self.told += 1;
            self.tell(replaced)?;
        }
        Ok(())
    }

    fn tell(&self, replaced: &Replaced) -> Result<()> {
        let (block, file) = (replaced.block(), replaced.file());
        self.job.vmm.ram_replaced(&ReplacedRam {
            name: block.name(),
            host: block.host_address(0),
            len: block.len(),
            fd: file.fd(),
            offset: file.offset(),
        })
    }

    /// The guest is here: so are its memory and its descriptors.
    pub(super) fn keep(mut self) {
        self.replaced.iter_mut().for_each(Replaced::keep);
        self.inbox.give();
        self.kept = true;
    }

    fn undo(&mut self) -> Result<()> {
        let mut result = Ok(());
        for replaced in &mut self.replaced {
            result = result.and(replaced.restore());
        }
        for replaced in &self.replaced[..self.told] {
            result = result.and(self.tell(replaced));
        }
        if self.inbox.has_placed() {
            let inbox = Arc::clone(&self.inbox);
            result =
                result.and(self.job.vmm.with_bql_or_later("what takes descriptors back", move || inbox.take_back()));
        }
        result
    }
}

impl Drop for Hand<'_> {
    fn drop(&mut self) {
        if !self.kept
            && let Err(error) = self.undo()
        {
            self.job.vmm.log().to("incoming").error(format_args!("after the guest did not arrive: {error}"));
        }
    }
}
