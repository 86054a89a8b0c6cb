//! What kind of memory a block lies in, as far as /proc/self/maps proves it.
//!
//! Asked once for each block and migration: the VMM does not map something else over a registered block meanwhile,
//! nor registers it with a userfaultfd.

use std::fs::File;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::OnceLock;

use super::{Block, PAGE, index};
use crate::error::Result;
use crate::sys::memory::{self, Mapping};
use crate::sys::userfaultfd::FaultProbe;

/// What lies behind a part of a block.
#[derive(Debug)]
pub enum Backing {
    /// Private anonymous memory: what is neither in our page tables nor swapped out is zero.
    Private,
    /// Private anonymous huge pages (hugetlb).
    PrivateHuge,
    /// A shared mapping of a file in memory (memfd, shm, tmpfs, shared anonymous): what the file lacks is zero.
    Memory(File),
    /// Anything else. Its pages mean what they read as.
    Unproven,
}

/// A part of a block that is one mapping.
#[derive(Debug)]
pub struct Part {
    /// Pages of the block.
    pub pages: Range<usize>,
    /// What is behind them.
    pub backing: Backing,
    /// Why it counts as that.
    pub reason: String,
    /// The mapping; None: nothing is mapped there.
    pub mapping: Option<Mapping>,
    /// The file's byte of the part's first page.
    pub offset: u64,
    /// A shared mapping of a file in memory for certain, even where the file cannot be opened.
    pub in_memory: bool,
    /// Missing pages are supplied by a userfaultfd handler, or might be.
    pub handled: bool,
}

impl Part {
    /// Whether the mapping may be written.
    pub fn is_writable(&self) -> bool {
        self.mapping.as_ref().is_some_and(|m| m.writable)
    }

    /// Whether the mapping is shared.
    pub fn is_shared(&self) -> bool {
        self.mapping.as_ref().is_some_and(|m| m.shared)
    }
}

/// The address space at one moment.
#[derive(Debug)]
pub struct Survey {
    mappings: Vec<Mapping>,
    probe: Option<FaultProbe>,
    hugetlb: Option<(u32, u32)>,
    shm: Option<(u32, u32)>,
    flags: OnceLock<Option<Flags>>,
}

/// `VmFlags` of each mapping.
type Flags = Vec<(Range<u64>, String)>;

impl Survey {
    /// Names of the files a block is a shared mapping of, the same in every process of this host and on no other.
    pub fn identities(&self, block: &Block) -> Vec<String> {
        let Ok(boot) = std::fs::read_to_string("/proc/sys/kernel/random/boot_id") else { return Vec::new() };
        let parts = self.parts(block, None);
        let files = parts.iter().filter_map(|part| part.mapping.as_ref()).filter(|m| m.shared && m.inode != 0);
        files.map(|m| format!("{}/{}:{}/{}", boot.trim(), m.device.0, m.device.1, m.inode)).collect()
    }

    /// Reads /proc/self/maps.
    pub fn new() -> Result<Self> {
        Ok(Self {
            mappings: memory::mappings()?,
            probe: FaultProbe::new().ok(),
            hugetlb: memory::own_device(true),
            shm: memory::own_device(false),
            flags: OnceLock::new(),
        })
    }

    /// The parts of a block, ascending and without gaps. `fd`: the file the VMM mapped there, if it says so; it is
    /// checked, and needed only where the process may not open /proc/self/map_files (`CAP_SYS_ADMIN`).
    pub fn parts(&self, block: &Block, fd: Option<BorrowedFd<'_>>) -> Vec<Part> {
        let (start, end) = (block.host_address(0), block.host_address(block.len()));
        let mut parts = Vec::new();
        let mut at = start;
        for mapping in self.mappings.iter().filter(|m| m.range.start < end && start < m.range.end) {
            if at < mapping.range.start {
                parts.push(hole(start, at..mapping.range.start));
            }
            let range = at.max(mapping.range.start)..end.min(mapping.range.end);
            at = range.end;
            parts.push(self.part(start, range, mapping, fd));
        }
        if at < end {
            parts.push(hole(start, at..end));
        }
        parts
    }

    fn part(&self, start: u64, range: Range<u64>, mapping: &Mapping, fd: Option<BorrowedFd<'_>>) -> Part {
        let handled = self.is_handled(mapping);
        let (backing, reason) = if handled {
            (Backing::Unproven, "a userfaultfd handler may supply its pages".to_owned())
        } else {
            self.backing(mapping, fd)
        };
        let offset = mapping.offset + (range.start - mapping.range.start);
        let shm = mapping.shared && self.shm == Some(mapping.device);
        let in_memory = shm || matches!(backing, Backing::Memory(_));
        let pages = pages(start, &range);
        Part { pages, backing, reason, mapping: Some(mapping.clone()), offset, in_memory, handled }
    }

    fn backing(&self, mapping: &Mapping, fd: Option<BorrowedFd<'_>>) -> (Backing, String) {
        let anonymous = mapping.inode == 0 && mapping.device == (0, 0);
        let plain_name = mapping.path.is_empty() || mapping.path == "[heap]" || mapping.path.starts_with("[anon:");
        if mapping.shared {
            return match memory::memory_file(mapping, fd) {
                Ok(file) => (Backing::Memory(file), "shared memory of a file in memory".to_owned()),
                Err(why) => (Backing::Unproven, format!("shared memory: {why}")),
            };
        }
        if anonymous && plain_name {
            return (Backing::Private, "private anonymous memory".to_owned());
        }
        if mapping.path == "/anon_hugepage (deleted)" && self.hugetlb == Some(mapping.device) {
            return (Backing::PrivateHuge, "private anonymous huge pages".to_owned());
        }
        let name = mapping.path.escape_debug();
        (Backing::Unproven, format!("a private mapping of '{name}': an absent page holds what the file has"))
    }

    /// Whether a userfaultfd handler supplies missing pages; when in doubt, it does.
    fn is_handled(&self, mapping: &Mapping) -> bool {
        if let Some(probe) = &self.probe {
            if !probe.is_registered(mapping.range.start) {
                return false;
            }
        }
        // Registered, perhaps only for write protection: now the flags are worth what they cost.
        self.flags_of(mapping).is_none_or(|flags| flags.split(' ').any(|flag| flag == "um"))
    }

    /// `VmFlags` of a mapping, read for all when first asked (see [`memory::vm_flags`] for what that costs).
    pub fn flags_of(&self, mapping: &Mapping) -> Option<&str> {
        let all = self.flags.get_or_init(|| memory::vm_flags().ok()).as_ref()?;
        let found =
            all.iter().find(|(range, _)| range.start <= mapping.range.start && mapping.range.end <= range.end)?;
        Some(&found.1)
    }
}

fn hole(start: u64, range: Range<u64>) -> Part {
    let (backing, reason) = (Backing::Unproven, "nothing is mapped there".to_owned());
    let pages = pages(start, &range);
    Part { pages, backing, reason, mapping: None, offset: 0, in_memory: false, handled: false }
}

fn pages(start: u64, range: &Range<u64>) -> Range<usize> {
    index((range.start - start) / PAGE)..index((range.end - start) / PAGE)
}
