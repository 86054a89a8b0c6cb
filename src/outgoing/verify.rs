//! Option `verify`, source side: with everything sent, hash what the guest is, let the destination compare; and hash again
//! before it may run there.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use xxhash_rust::xxh3::Xxh3;

use super::replies::Replies;
use super::{Job, Migration, SLICE};
use crate::error::{Error, Result};
use crate::options::{Opt, Options};
use crate::ram::digest::{Differing, Digest};
use crate::wire::command::Command;
use crate::wire::digest::{self, Hashes};
use crate::wire::frame::Bodies;
use crate::wire::input::{Input, Slice};
use crate::wire::reply::Reply;
use crate::wire::stream::{self, Element};

/// Bytes of a section's footer.
const FOOTER: usize = 5;

/// What was sent, and what memory was then.
#[derive(Default)]
pub(super) struct Verify {
    sections: BTreeMap<u32, Xxh3>,
    memory: Option<Digest>,
    /// What hashing all memory took last.
    pub(super) took: Duration,
}

impl Verify {
    /// Takes note of bodies that are sent; not RAM's, which are not made of these.
    pub(super) fn sent(&mut self, bodies: &Bodies) -> Result<()> {
        for element in bodies.iter() {
            let mut input = Slice::new(element);
            let id = match stream::read_element(&mut input)? {
                Element::Start(id, _) | Element::Full(id, _) | Element::Part(id) | Element::End(id) => id,
                Element::Command(_) | Element::Eof => continue,
            };
            let start = usize::try_from(input.position()).unwrap_or(usize::MAX);
            let body = element.get(start..element.len().saturating_sub(FOOTER)).unwrap_or_default();
            self.sections.entry(id).or_default().update(body);
        }
        Ok(())
    }
}

/// None: the option is off. Refused where nobody could compare. Over another connection than `before` all is sent again.
pub(super) fn wanted(options: &Options, to_vmig: bool, before: Option<Verify>) -> Result<Option<Verify>> {
    match (options.on(Opt::Verify), to_vmig && options.on(Opt::ReturnPath)) {
        (false, _) => Ok(None),
        (true, true) => {
            let took = before.map_or(Duration::ZERO, |before| before.took);
            Ok(Some(Verify { took, ..Verify::default() }))
        }
        (true, false) => {
            let text = "option 'verify' needs a destination that uses this library and can answer (return-path): not a \
                        QEMU, a pipe or a file";
            Err(Error::new(libc::ENOTSUP, text).by_option(Opt::Verify.name()))
        }
    }
}

/// Whether the destination compares, as it was asked to.
pub(super) fn check_welcome(asked: bool, agreed: bool) -> Result<()> {
    if asked && !agreed {
        let text = "the destination's library is older and knows nothing of option 'verify': switch it off here";
        return Err(Error::new(libc::ENOTSUP, text).by_option(Opt::Verify.name()));
    }
    Ok(())
}

fn hash_memory(job: &Job) -> Result<Digest> {
    Digest::of(&job.threads, &job.ram, Options::threads(), &|| job.status.check())
}

/// `EBADMSG`: a page is not what it was.
fn changed(page: &Differing) -> Error {
    let text = format!(
        "RAM block '{}' changed at page {:#x} (bytes {:#x}..{:#x}) after the guest was stopped and its memory hashed: a \
         device or a thread still wrote to it when the stop hook and handlers had returned",
        page.block,
        page.offset / crate::ram::PAGE,
        page.offset,
        page.offset + crate::ram::PAGE
    );
    let [expected, got] = page.hashes.map(|hash| format!("{hash:#018x}"));
    Error::new(libc::EBADMSG, text).in_section("ram").in_field(&page.block).expected_got(expected, got)
}

impl Migration<'_> {
    /// With the guest running: how long will it stand still for this? No other time of a switchover is as long.
    pub(super) fn rehearse_verify(&mut self) -> Result<()> {
        let Some(verify) = &mut self.verify else { return Ok(()) };
        let begin = Instant::now();
        hash_memory(self.job)?;
        verify.took = begin.elapsed();
        Ok(())
    }

    /// Everything was sent: both sides hash at once, and the destination compares.
    pub(super) fn verify(&mut self) -> Result<()> {
        if self.verify.is_none() {
            return Ok(());
        }
        self.word(Command::Hash)?;
        // Up to PREPARE the destination knows what to do with our error.
        self.may_speak = true;
        let begin = Instant::now();
        let memory = hash_memory(self.job)?;
        let Some(verify) = &mut self.verify else { return Ok(()) };
        let blocks = memory.blocks().iter().map(|b| (b.name().to_owned(), b.granules().to_vec())).collect();
        let sections = verify.sections.iter().map(|(id, sum)| (*id, sum.digest())).collect();
        let mut bytes = Vec::new();
        stream::put_command(&mut bytes, Command::Hashes);
        digest::put(&mut bytes, &Hashes { blocks, sections })?;
        verify.memory = Some(memory);
        verify.took = begin.elapsed();
        self.out.write(&bytes)?;
        let limit = self.job.options.time(Opt::SwitchoverTimeout);
        let deadline = Instant::now() + limit;
        loop {
            self.job.status.check()?;
            match self.replies.as_ref().and_then(|replies: &Replies| replies.compared(SLICE)) {
                Some(Reply::Differs(block, granule)) => self.tell_pages(block, granule)?,
                Some(_) => {
                    self.may_speak = false;
                    return Ok(());
                }
                None if Instant::now() >= deadline => {
                    let what = "the destination did not compare the guest's memory with its hashes within";
                    return Err(Error::timeout(Opt::SwitchoverTimeout.name(), limit, what));
                }
                None => (),
            }
        }
    }

    /// The destination names the page, and says so.
    fn tell_pages(&mut self, block: u32, granule: u64) -> Result<()> {
        let memory = self.verify.as_ref().and_then(|verify| verify.memory.as_ref());
        let block = memory.and_then(|memory| memory.blocks().get(usize::try_from(block).ok()?));
        let asked = block.zip(usize::try_from(granule).ok());
        let Some((block, granule)) = asked.filter(|(block, granule)| *granule < block.granules().len()) else {
            return Err(Error::new(libc::EPROTO, "the destination asks for hashes of memory that does not exist"));
        };
        let mut bytes = Vec::new();
        stream::put_command(&mut bytes, Command::PageHashes);
        digest::put_granule(&mut bytes, &block.pages_of(granule))?;
        self.out.write(&bytes)
    }

    /// Before GO: whether memory is still what was hashed.
    pub(super) fn verify_again(&self) -> Result<()> {
        let Some(before) = self.verify.as_ref().and_then(|verify| verify.memory.as_ref()) else { return Ok(()) };
        match hash_memory(self.job)?.first_changed(before) {
            Some(page) => Err(changed(&page)),
            None => Ok(()),
        }
    }
}
