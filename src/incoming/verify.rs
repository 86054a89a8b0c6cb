//! Option `verify`, destination side: what arrived is compared with what the source has, before READY.
//!
//! Of every section the bytes that came are hashed. A device with a table is saved again when all are loaded, and must have
//! the bytes it was loaded from; one that has descriptors has other numbers here, and what has no table (custom sections,
//! state of KVM) may not be saved twice, or changes by itself.

use std::cell::Cell;
use std::collections::BTreeMap;

use xxhash_rust::xxh3::Xxh3;

use super::{Job, Peer};
use crate::error::{Error, Result};
use crate::options::{Opt, Options};
use crate::ram::PAGE;
use crate::ram::digest::{Differing, Digest};
use crate::section::list::Entry;
use crate::transport::stream::StreamInput;
use crate::wire::command::Command;
use crate::wire::digest;
use crate::wire::hello::{self, Hello};
use crate::wire::input::Input;
use crate::wire::reply::Reply;
use crate::wire::stream::{self, Element};

/// Whether the source wants everything compared.
pub(super) fn is_needed(theirs: &Hello) -> bool {
    theirs.needs.iter().any(|feature| feature == hello::FEATURE_VERIFY)
}

/// The source decides, but a destination may insist. A device that writes guest RAM when it is loaded makes it differ.
pub(super) fn compare(theirs: &Hello, job: &Job, found: &mut Vec<Error>) {
    if !is_needed(theirs) {
        if job.options.on(Opt::Verify) {
            let text = "option 'verify' is set at the destination: set it at the source, too";
            let error = Error::invalid(text).in_section("features").in_field(Opt::Verify.name());
            found.push(error.by_option(Opt::Verify.name()).differs("off", "on"));
        }
        return;
    }
    let writes = |entry: &&Entry| entry.section().is_some_and(|s| s.is_active() && s.writes_ram());
    for entry in job.sections.iter().filter(writes) {
        let text = format!(
            "device '{}' (instance {}) writes guest RAM when it is loaded, which then is not what the source has: switch \
             option 'verify' off",
            entry.name, entry.instance
        );
        let error = Error::new(libc::ENOTSUP, text).in_section(entry.name.clone());
        found.push(error.by_option(Opt::Verify.name()));
    }
}

/// Hashes of the sections that came, by their ids.
#[derive(Debug, Default)]
pub(super) struct Arrived {
    sections: BTreeMap<u32, Came>,
    compared: Cell<bool>,
}

/// What came of a section.
#[derive(Default)]
struct Came {
    name: String,
    sum: Xxh3,
    /// Instance, version and bytes of a device that is saved again.
    device: Option<(u32, u32, Vec<u8>)>,
}

impl std::fmt::Debug for Came {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Came({}, {:#018x})", self.name, self.sum.digest())
    }
}

/// Reads on behalf of a section, and takes note of what it gets.
pub(super) struct Tee<'a> {
    input: &'a mut dyn Input,
    came: Option<&'a mut Came>,
}

impl Input for Tee<'_> {
    fn read(&mut self, buf: &mut [u8]) -> Result<()> {
        self.input.read(buf)?;
        if let Some(came) = &mut self.came {
            came.sum.update(buf);
            if let Some((.., bytes)) = &mut came.device {
                bytes.try_reserve(buf.len()).map_err(|_| Error::no_memory("device state", buf.len() as u64))?;
                bytes.extend_from_slice(buf);
            }
        }
        Ok(())
    }

    fn peek(&mut self, n: usize) -> Result<&[u8]> {
        self.input.peek(n)
    }

    fn position(&self) -> u64 {
        self.input.position()
    }
}

impl Arrived {
    /// A body of section `id` is about to be read. `device`: instance and version, if it is to be saved again.
    pub(super) fn body<'a>(
        arrived: &'a mut Option<Self>,
        id: u32,
        name: &str,
        device: Option<(u32, u32)>,
        input: &'a mut dyn Input,
    ) -> Tee<'a> {
        let came = arrived.as_mut().map(|arrived| {
            let came = arrived.sections.entry(id).or_default();
            name.clone_into(&mut came.name);
            came.device = device.map(|(instance, version)| (instance, version, Vec::new()));
            came
        });
        Tee { input, came }
    }

    /// Whether the hashes came.
    pub(super) fn is_compared(&self) -> bool {
        self.compared.get()
    }

    /// Everything was loaded: hashes it, and compares.
    pub(super) fn compare(&self, job: &Job, peer: &mut Peer, input: &mut StreamInput) -> Result<()> {
        let own = Digest::of(&job.threads, &job.ram, Options::threads(), &|| job.status.check())?;
        let blocks = own.blocks();
        let granules = |name: &str| Some(blocks.iter().find(|b| b.name() == name)?.granules().len());
        expect(input, Command::Hashes)?;
        let theirs = digest::read(input, blocks.len(), &granules, self.sections.len())?;
        for (number, (name, hashes)) in theirs.blocks.iter().enumerate() {
            let Some(block) = blocks.iter().find(|b| b.name() == name) else { continue };
            let Some(granule) = block.first_differing(hashes) else { continue };
            let number = u32::try_from(number).unwrap_or(u32::MAX);
            peer.reply(&Reply::Differs(number, granule as u64))?;
            expect(input, Command::PageHashes)?;
            let pages = digest::read_granule(input, block.granule_pages(granule))?;
            let odd = || Error::new(libc::EPROTO, "the source's hashes of a granule and of its pages do not fit");
            return Err(block.first_page(granule, &pages).map_or_else(odd, |page| differs(&page)));
        }
        self.compare_sections(&theirs.sections)?;
        self.save_again(job)?;
        self.compared.set(true);
        peer.reply(&Reply::Same)
    }

    fn compare_sections(&self, theirs: &[(u32, u64)]) -> Result<()> {
        if theirs.len() != self.sections.len() {
            let text = "hashes of another number of sections than came";
            return Err(Error::new(libc::EPROTO, text).expected_got(self.sections.len(), theirs.len()));
        }
        for (id, expected) in theirs {
            let Some(came) = self.sections.get(id) else {
                return Err(Error::new(libc::EPROTO, format!("the hash of section id {id}, which did not come")));
            };
            let got = came.sum.digest();
            if got != *expected {
                let text =
                    format!("what arrived of section '{}' is not what the source sent: the hashes differ", came.name);
                return Err(Error::new(libc::EBADMSG, text)
                    .in_section(&came.name)
                    .expected_got(format!("{expected:#018x}"), format!("{got:#018x}")));
            }
        }
        Ok(())
    }

    /// Saves the devices again that can be.
    fn save_again(&self, job: &Job) -> Result<()> {
        for came in self.sections.values() {
            let (name, Some((instance, version, loaded))) = (&came.name, &came.device) else { continue };
            let Some(entry) = job.sections.iter().find(|e| e.name == *name && e.instance == *instance) else {
                continue;
            };
            // An older source's body is shorter than ours would be.
            let Some(section) = entry.section().filter(|_| entry.version == *version) else { continue };
            let mut saved = Vec::new();
            job.vmm
                .with_bql("saving a device again", || section.complete(&mut saved).map_err(|e| e.in_section(name)))?;
            if saved != *loaded {
                let at = saved.iter().zip(loaded).take_while(|(a, b)| a == b).count();
                let byte = |of: &[u8]| of.get(at).map_or("the end".to_owned(), |byte| format!("{byte:#04x}"));
                let text = format!(
                    "device '{name}' (instance {instance}) was not loaded as it was sent: saved again it differs from \
                     byte {at:#x} of its body on"
                );
                return Err(Error::new(libc::EBADMSG, text)
                    .in_section(name)
                    .expected_got(byte(loaded), byte(&saved)));
            }
        }
        Ok(())
    }
}

/// The command that the source owes us; unless it gives up, and says why.
fn expect(input: &mut StreamInput, wanted: Command) -> Result<()> {
    match stream::read_element(input)? {
        Element::Command(command) if command == wanted => Ok(()),
        Element::Command(Command::Error(error)) => Err(error),
        _ => Err(Error::new(libc::EPROTO, "something else came where hashes were announced")),
    }
}

/// `EBADMSG`: a page is not what the source has.
fn differs(page: &Differing) -> Error {
    let text = format!(
        "RAM block '{}' differs from the source's at page {:#x} (bytes {:#x}..{:#x}): it arrived other than it was sent, \
         or somebody wrote to it at the source after it was sent, or here",
        page.block,
        page.offset / PAGE,
        page.offset,
        page.offset + PAGE
    );
    let [expected, got] = page.hashes.map(|hash| format!("{hash:#018x}"));
    Error::new(libc::EBADMSG, text).in_section("ram").in_field(&page.block).expected_got(expected, got)
}
