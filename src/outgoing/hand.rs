//! Handing over instead of copying: RAM blocks by their files, and descriptors of devices.
//!
//! A block whose file the destination takes is not touched here at all: it is not tracked, not looked at, not sent.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use super::Job;
use crate::error::{Error, Result};
use crate::options::Opt;
use crate::ram::handed::MemoryFile;
use crate::ram::survey::Survey;
use crate::ram::{Block, RamList};
use crate::transport::stream::StreamOutput;
use crate::transport::{Channel, FDS_MAX};
use crate::wire::command::Command;
use crate::wire::hello::{Offer, Welcome};
use crate::wire::output::Put;
use crate::wire::stream;

/// What a migration hands over.
#[derive(Debug)]
pub(super) struct HandOver {
    on: bool,
    /// Every block is offered.
    all: bool,
    offers: Vec<(Arc<Block>, Arc<MemoryFile>)>,
    passed: Vec<Arc<Block>>,
    /// The blocks that travel page by page.
    rest: RamList,
}

impl HandOver {
    /// Nothing: every block travels.
    pub(super) fn nothing(job: &Job) -> Self {
        Self { on: false, all: false, offers: Vec::new(), passed: Vec::new(), rest: Arc::clone(&job.ram) }
    }

    /// What the option and the VMM say, checked. A block without a file travels page by page.
    pub(super) fn new(job: &Job, channel: &dyn Channel) -> Result<Self> {
        let mut hand = Self::nothing(job);
        if !job.options.on(Opt::HandOver) {
            return Ok(hand);
        }
        if job.options.get(Opt::Peer) == 1 || !channel.passes_fds() {
            let text = "option 'hand-over' needs a unix socket to another process of this host that uses this library: \
                        switch it off, or migrate to unix:PATH without peer=qemu";
            return Err(Error::invalid(text));
        }
        hand.on = true;
        let survey = Survey::new()?;
        for block in job.ram.iter().filter(|b| b.is_sent()) {
            if let Some(file) = block.file() {
                block.check_file(&file, &survey)?;
                hand.offers.push((Arc::clone(block), file));
            }
        }
        hand.all = hand.offers.len() == job.ram.iter().filter(|b| b.is_sent()).count();
        Ok(hand)
    }

    /// For the hello; none with the option off.
    pub(super) fn offers(&self) -> Option<Vec<Offer>> {
        let offer = |(block, file): &(Arc<Block>, Arc<MemoryFile>)| Offer {
            name: block.name().to_owned(),
            len: block.len(),
            offset: file.offset(),
        };
        self.on.then(|| self.offers.iter().map(offer).collect())
    }

    pub(super) fn is_offered(&self, block: &Block) -> bool {
        self.offers.iter().any(|(offered, _)| std::ptr::eq(&**offered, block))
    }

    /// Whether the file of every block is offered.
    pub(super) fn is_all(&self) -> bool {
        self.all
    }

    /// The blocks that travel page by page.
    pub(super) fn rest(&self) -> &RamList {
        &self.rest
    }

    /// Sends the files that the destination takes.
    pub(super) fn pass(&mut self, welcome: &Welcome, out: &mut StreamOutput) -> Result<()> {
        if !self.on {
            return Ok(());
        }
        let Some(names) = &welcome.hand_over else {
            let text =
                "the destination's library is older and knows nothing of option 'hand-over': switch it off here";
            return Err(Error::new(libc::ENOTSUP, text));
        };
        let mut taken = Vec::new();
        for name in names {
            let Some(at) = self.offers.iter().position(|(block, _)| block.name() == name) else {
                let shown = name.escape_default();
                let text = format!("the destination takes the file of RAM block '{shown}', which was not offered");
                return Err(Error::new(libc::EPROTO, text));
            };
            taken.push(self.offers.swap_remove(at));
        }
        let stays = |block: &&Arc<Block>| !taken.iter().any(|(handed, _)| Arc::ptr_eq(handed, block));
        self.rest = self.rest.iter().filter(stays).cloned().collect();
        let files: Vec<BorrowedFd<'_>> = taken.iter().map(|(_, file)| file.fd()).collect();
        self.passed = taken.iter().map(|(block, _)| Arc::clone(block)).collect();
        pass(out, &files, |bytes, count| bytes.u32(count))
    }

    /// The destination has the guest, or may have it: its memory is not ours to write any more.
    pub(super) fn gave_away(&self) {
        self.passed.iter().for_each(|block| block.set_given(true));
    }
}

/// Sends descriptors in messages of at most as many as the kernel takes, each with what `head` writes.
fn pass(out: &mut StreamOutput, fds: &[BorrowedFd<'_>], head: impl Fn(&mut Vec<u8>, u32)) -> Result<()> {
    for some in fds.chunks(FDS_MAX) {
        let mut bytes = Vec::new();
        head(&mut bytes, u32::try_from(some.len()).unwrap_or(u32::MAX));
        out.write_fds(&bytes, some)?;
    }
    Ok(())
}

/// Sends the descriptors that bodies name which are written next.
pub(super) fn pass_device_fds(out: &mut StreamOutput, fds: &[OwnedFd]) -> Result<()> {
    let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
    pass(out, &fds, |bytes, count| stream::put_command(bytes, Command::Fds(count)))
}

/// Whether the destination takes what the devices have.
pub(super) fn check_welcome(welcome: &Welcome, devices: &[(String, u32, String)]) -> Result<()> {
    match devices.first() {
        Some((device, _, field)) if !welcome.fds => {
            let text =
                format!("the destination's library is older and does not take file descriptors of device '{device}'");
            Err(Error::new(libc::ENOTSUP, text).in_section(device.clone()).in_field(field))
        }
        _ => Ok(()),
    }
}

/// Refuses devices with descriptors, by (device, instance, field), where these cannot travel.
pub(super) fn check_devices(job: &Job, channel: &dyn Channel, devices: &[(String, u32, String)]) -> Result<()> {
    let Some((device, instance, field)) = devices.first() else { return Ok(()) };
    if job.options.get(Opt::Peer) == 0 && channel.passes_fds() {
        return Ok(());
    }
    let text = format!(
        "device '{device}' (instance {instance}) has a file descriptor in field '{field}', which travels only over a \
         unix socket to another process of this host that uses this library (without peer=qemu); where it need not \
         travel, declare it in a part that is not needed then"
    );
    Err(Error::new(libc::ENOTSUP, text).in_section(device.clone()).in_field(field))
}
