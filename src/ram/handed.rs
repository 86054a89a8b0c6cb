//! Memory that changes hands: a block whose file goes to another process of this host, instead of its bytes.
//!
//! The VMM says which file is behind a block; here that is checked, not believed. At the destination the source's file
//! is mapped over the block, first for reading only, and the block's own file again if the guest does not arrive. What
//! was advised for the old mapping (huge pages, core dumps, locking) does not hold for the new one.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::survey::{Part, Survey};
use super::{Block, PAGE};
use crate::error::{Error, Result};
use crate::sys::fdpass;
use crate::thread::lock;

/// A file in memory, and where in it a block begins.
#[derive(Debug)]
pub struct MemoryFile {
    fd: OwnedFd,
    offset: u64,
}

impl MemoryFile {
    /// Takes a descriptor of our own.
    pub fn new(fd: OwnedFd, offset: u64) -> Self {
        Self { fd, offset }
    }

    /// The file.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Where the block begins, in bytes.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Whether `block` can be a mapping of this file at all: what the file is, its size, rights, seals and alignment.
    fn fits(&self, block: &Block) -> Result<fdpass::FileFacts> {
        let facts = fdpass::facts(self.fd())?;
        let bad = |text: &str, expected: String, got: String| {
            Err(block.cannot_be_handed(Error::invalid(text).expected_got(expected, got)))
        };
        if !facts.regular || facts.granule == 0 {
            let text = "the descriptor is not a file in memory (memfd, shm, tmpfs or hugetlb)";
            return Err(block.cannot_be_handed(Error::invalid(text)));
        }
        if facts.access != (true, true) {
            let text = "the descriptor must be open for reading and writing";
            return Err(block.cannot_be_handed(Error::new(libc::EACCES, text)));
        }
        if facts.sealed {
            let text = "the file is sealed against writing (F_SEAL_WRITE or F_SEAL_FUTURE_WRITE)";
            return Err(block.cannot_be_handed(Error::new(libc::EPERM, text)));
        }
        let end = self.offset.checked_add(block.len());
        if end.is_none_or(|end| end > facts.size) {
            let want = format!("at least {:#x} bytes", end.unwrap_or(u64::MAX));
            return bad("the file is smaller than the block", want, format!("{:#x}", facts.size));
        }
        let places = [("address", block.host_address(0)), ("length", block.len()), ("offset", self.offset)];
        if let Some((what, value)) = places.iter().find(|(_, value)| value % facts.granule != 0) {
            let want = format!("a multiple of {:#x}", facts.granule);
            return bad(&format!("the {what} does not fit the file's pages"), want, format!("{value:#x}"));
        }
        Ok(facts)
    }
}

impl Block {
    /// The file behind the block, as far as anybody said.
    pub fn file(&self) -> Option<Arc<MemoryFile>> {
        lock(&self.file).clone()
    }

    /// Whether its memory was handed over, and did not come back: nothing may be written to it.
    pub fn is_given(&self) -> bool {
        self.given.load(Ordering::Acquire)
    }

    /// Its memory was handed over, or is known to be ours.
    pub fn set_given(&self, given: bool) {
        self.given.store(given, Ordering::Release);
    }

    /// Fails unless the block is what the VMM said: a shared, writable mapping of `file` from its offset on, whole.
    pub fn check_file(&self, file: &MemoryFile, survey: &Survey) -> Result<()> {
        let facts = file.fits(self)?;
        for part in survey.parts(self, Some(file.fd())) {
            self.check_part(&part, file, &facts)?;
        }
        Ok(())
    }

    fn check_part(&self, part: &Part, file: &MemoryFile, facts: &fdpass::FileFacts) -> Result<()> {
        let at = part.pages.start as u64 * PAGE;
        let bad = |text: &str| Err(self.cannot_be_handed(Error::invalid(format!("at offset {at:#x} {text}"))));
        let Some(mapping) = &part.mapping else { return bad("nothing is mapped") };
        let words = |device: (u32, u32), inode: u64| format!("device {}:{} inode {inode}", device.0, device.1);
        if !mapping.shared {
            return bad("the mapping is private (MAP_PRIVATE): its writes do not reach the file");
        }
        if (mapping.device, mapping.inode) != (facts.device, facts.inode) {
            let error = Error::invalid(format!("at offset {at:#x} another file is mapped"));
            let (want, got) = (words(facts.device, facts.inode), words(mapping.device, mapping.inode));
            return Err(self.cannot_be_handed(error.expected_got(want, got)));
        }
        if part.offset != file.offset + at {
            let error = Error::invalid(format!("at offset {at:#x} another part of the file is mapped"));
            let (want, got) = (format!("{:#x}", file.offset + at), format!("{:#x}", part.offset));
            return Err(self.cannot_be_handed(error.expected_got(want, got)));
        }
        if !mapping.writable {
            return bad("the mapping is not writable");
        }
        if part.handled {
            return bad("a userfaultfd handler may supply pages, which the file then lacks");
        }
        Ok(())
    }

    fn cannot_be_handed(&self, error: Error) -> Error {
        error.context(format!("RAM block '{}' cannot be handed over by its file", self.name)).in_section("ram")
    }
}

/// How far a block has changed hands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// As it was.
    Own,
    /// The source's memory, which nobody may write.
    Readable,
    /// The source's memory, as it will be.
    Writable,
    /// The guest arrived.
    Kept,
}

/// A block of the destination that shows the source's memory, until the guest has arrived or does not. Dropped before
/// that it is what it was.
#[derive(Debug)]
pub struct Replaced {
    block: Arc<Block>,
    own: Arc<MemoryFile>,
    theirs: Arc<MemoryFile>,
    stage: Stage,
}

impl Replaced {
    /// Checks that the source's file can stand behind the block, whose own one is `own`. Changes nothing.
    pub fn new(block: &Arc<Block>, own: Arc<MemoryFile>, theirs: MemoryFile) -> Result<Self> {
        theirs.fits(block).map_err(|e| e.context("what the source passed"))?;
        Ok(Self { block: Arc::clone(block), own, theirs: Arc::new(theirs), stage: Stage::Own })
    }

    /// The block.
    pub fn block(&self) -> &Block {
        &self.block
    }

    /// What is behind the block just now.
    pub fn file(&self) -> &MemoryFile {
        if self.stage == Stage::Own { &self.own } else { &self.theirs }
    }

    fn map(&self, file: &MemoryFile, writable: bool) -> Result<()> {
        let (start, len) = (self.block.host_address(0), self.block.len());
        // SAFETY: the block's addresses, whose bytes never have a Rust reference; the VMM promised them to us while the
        // block is registered, and that a block with a file may be mapped anew when a guest arrives.
        unsafe { fdpass::map_over(start, len, file.fd(), file.offset, writable) }
            .map_err(|e| Error::from_io(format!("mapping RAM block '{}'", self.block.name), &e).in_section("ram"))
    }

    /// Shows the source's memory, for reading.
    pub fn show(&mut self) -> Result<()> {
        // Before the call: one that fails half-way may have unmapped what was there.
        self.stage = Stage::Readable;
        self.map(&self.theirs, false)
    }

    /// Lets it be written.
    pub fn open(&mut self) -> Result<()> {
        let (start, len) = (self.block.host_address(0), self.block.len());
        // SAFETY: `show` made this one mapping of ours.
        unsafe { fdpass::make_writable(start, len) }.map_err(|e| {
            Error::from_io(format!("making RAM block '{}' writable", self.block.name), &e).in_section("ram")
        })?;
        self.stage = Stage::Writable;
        Ok(())
    }

    /// The guest has arrived: this is the block's memory from now on.
    pub fn keep(&mut self) {
        *lock(&self.block.file) = Some(Arc::clone(&self.theirs));
        self.block.set_given(false);
        self.stage = Stage::Kept;
    }

    /// Maps the block's own memory again, unless the guest arrived.
    pub fn restore(&mut self) -> Result<()> {
        if matches!(self.stage, Stage::Own | Stage::Kept) {
            return Ok(());
        }
        self.stage = Stage::Own;
        self.map(&self.own, true)
    }
}

impl Drop for Replaced {
    fn drop(&mut self) {
        // Whoever wants to know whether it works calls it before.
        let _ = self.restore();
    }
}
