//! Guest memory in a stream: not the pages, but how many of which kind each block got.

use std::collections::{BTreeMap, HashMap};

use serde_json::{Value, json};
use vmig::error::{Error, Result};
use vmig::ram::PAGE;
use vmig::wire::input::Input;
use vmig::wire::ram::{self, BLOCKS_MAX, Record};

use super::{Out, printed};
use crate::printer::{Fact, Node};
use crate::source::Source;

/// Pages by kind.
#[derive(Clone, Copy, Default)]
struct Pages {
    whole: u64,
    zero: u64,
    delta: u64,
}

impl Pages {
    fn all(self) -> u64 {
        self.whole.saturating_add(self.zero).saturating_add(self.delta)
    }

    fn add(&mut self, more: Pages) {
        self.whole = self.whole.saturating_add(more.whole);
        self.zero = self.zero.saturating_add(more.zero);
        self.delta = self.delta.saturating_add(more.delta);
    }

    /// Zero pages among all.
    #[expect(clippy::cast_precision_loss, reason = "a share for people")]
    fn zero_share(self) -> f64 {
        match self.all() {
            0 => 0.0,
            all => self.zero as f64 / all as f64,
        }
    }

    fn facts(self) -> Vec<(&'static str, Fact)> {
        let mut facts = vec![("whole", Fact::Number(self.whole)), ("zero", Fact::Number(self.zero))];
        if self.delta > 0 {
            facts.push(("delta", Fact::Number(self.delta)));
        }
        facts.push(("zero-share", Fact::Share(self.zero_share())));
        facts
    }
}

struct Block {
    name: String,
    /// None: the stream goes on with one that announced it.
    len: Option<u64>,
    pages: Pages,
}

/// The blocks, and what came of them so far.
#[derive(Default)]
pub(super) struct Memory {
    /// The blocks of the list have addresses beside their lengths.
    pub(super) ignore_shared: bool,
    /// Pages have fixed places, behind each block of the list.
    pub(super) mapped: bool,
    blocks: Vec<Block>,
    by_name: HashMap<String, usize>,
    /// The list of blocks was there.
    listed: bool,
    /// Block of the last record.
    last: Option<usize>,
    /// Points at which parallel channels meet.
    meetings: u64,
}

impl Memory {
    /// Reads a body and prints what it amounts to, also if it ends in the middle.
    pub(super) fn body(&mut self, input: &mut Source, out: &mut Out<'_>) -> Result<()> {
        let begin = input.position();
        let (mut seen, met) = (BTreeMap::new(), self.meetings);
        let read = self.records(input, out, &mut seen);
        for (index, pages) in &seen {
            let block = &mut self.blocks[*index];
            block.pages.add(*pages);
            let node = Node { at: begin, kind: "pages", name: Some(&block.name), facts: &pages.facts() };
            printed(out.leaf(&node))?;
        }
        if self.meetings > met {
            let facts = [("count", Fact::Number(self.meetings - met))];
            printed(out.leaf(&Node { at: begin, kind: "multifd-flush", name: None, facts: &facts }))?;
        }
        read
    }

    fn records(&mut self, input: &mut Source, out: &mut Out<'_>, seen: &mut BTreeMap<usize, Pages>) -> Result<()> {
        loop {
            let at = input.position();
            let (name, offset, pages) = match ram::read(input)? {
                Record::End => return Ok(()),
                Record::Flush => {
                    self.meetings += 1;
                    continue;
                }
                Record::Setup { total } => {
                    self.list(input, out, total)?;
                    continue;
                }
                Record::Zero { name, offset } => (name, offset, Pages { zero: 1, ..Pages::default() }),
                Record::ZeroRun { name, offset, pages } => (name, offset, Pages { zero: pages, ..Pages::default() }),
                Record::Page { name, offset } => {
                    input.skip(PAGE)?;
                    (name, offset, Pages { whole: 1, ..Pages::default() })
                }
                Record::Delta { name, offset, len } => {
                    input.skip(len.into())?;
                    (name, offset, Pages { delta: 1, ..Pages::default() })
                }
            };
            let index = self.block(at, name, offset, pages.all())?;
            seen.entry(index).or_default().add(pages);
        }
    }

    /// The block of a record.
    fn block(&mut self, at: u64, name: Option<String>, offset: u64, pages: u64) -> Result<usize> {
        let wrong = |text: String| Err(Error::invalid(format!("byte {at:#x}: {text}")).at_byte(at));
        if self.mapped {
            return wrong("a page outside of its place in the file (mapped-ram)".to_owned());
        }
        if let Some(name) = name {
            self.last = Some(match self.by_name.get(&name) {
                Some(index) => *index,
                None if !self.listed => self.add(at, name, None)?,
                None => return wrong(format!("RAM block '{name}' is not in the list of blocks")),
            });
        }
        let Some(index) = self.last else { return wrong("the first page names no RAM block".to_owned()) };
        let block = &self.blocks[index];
        let end = pages.checked_mul(PAGE).and_then(|bytes| offset.checked_add(bytes));
        match (end, block.len) {
            (Some(end), Some(len)) if end <= len => Ok(index),
            (Some(_), None) => Ok(index),
            _ => wrong(format!("page {offset:#x} is outside of RAM block '{}'", block.name)),
        }
    }

    fn add(&mut self, at: u64, name: String, len: Option<u64>) -> Result<usize> {
        if let Some(index) = self.by_name.get(&name) {
            self.blocks[*index].len = len;
            return Ok(*index);
        }
        if self.blocks.len() >= BLOCKS_MAX {
            return Err(Error::invalid(format!("byte {at:#x}: more than {BLOCKS_MAX} RAM blocks")).at_byte(at));
        }
        self.by_name.insert(name.clone(), self.blocks.len());
        self.blocks.push(Block { name, len, pages: Pages::default() });
        Ok(self.blocks.len() - 1)
    }

    /// The list of blocks, and with `mapped-ram` their pages.
    fn list(&mut self, input: &mut Source, out: &mut Out<'_>, total: u64) -> Result<()> {
        self.listed = true;
        let mut left = total;
        while left > 0 {
            let at = input.position();
            let (name, len) = ram::read_block(input, left)?;
            left -= len;
            let index = self.add(at, name, Some(len))?;
            let mut facts = vec![("bytes", Fact::Number(len))];
            if self.ignore_shared {
                facts.push(("gpa", Fact::Address(input.u64()?)));
            }
            if self.mapped {
                let pages = mapped_pages(input, len)?;
                facts.extend(pages.facts());
                self.blocks[index].pages.add(pages);
            }
            printed(out.leaf(&Node { at, kind: "block", name: Some(&self.blocks[index].name), facts: &facts }))?;
        }
        Ok(())
    }

    /// All of it, at the end.
    pub(super) fn print(&self, at: u64, out: &mut Out<'_>) -> Result<()> {
        if self.blocks.is_empty() {
            return Ok(());
        }
        printed(out.begin(&Node { at, kind: "memory", name: None, facts: &self.sum().facts() }))?;
        for block in &self.blocks {
            let mut facts: Vec<_> = block.len.map(|len| ("bytes", Fact::Number(len))).into_iter().collect();
            facts.extend(block.pages.facts());
            printed(out.leaf(&Node { at, kind: "block", name: Some(&block.name), facts: &facts }))?;
        }
        printed(out.close())
    }

    fn sum(&self) -> Pages {
        let mut sum = Pages::default();
        self.blocks.iter().for_each(|block| sum.add(block.pages));
        sum
    }

    /// The same as JSON.
    pub(super) fn json(&self) -> Value {
        let of = |pages: Pages| {
            json!({"whole": pages.whole, "zero": pages.zero, "delta": pages.delta,
                   "zero-share": pages.zero_share()})
        };
        let block = |block: &Block| {
            let mut json = of(block.pages);
            json["name"] = block.name.as_str().into();
            json["bytes"] = block.len.into();
            json
        };
        let mut json = of(self.sum());
        json["multifd-flushes"] = self.meetings.into();
        json["blocks"] = self.blocks.iter().map(block).collect();
        json
    }
}

/// Counts the pages of a block of `len` bytes that have a place in the file, and goes behind the block.
fn mapped_pages(input: &mut Source, len: u64) -> Result<Pages> {
    let place = ram::read_mapped(input, len)?;
    input.skip(place.bitmap_at - input.position())?;
    let (mut left, mut whole) = (place.bitmap_len, 0);
    let mut room = [0; 4096];
    while left > 0 {
        let step = usize::try_from(left).unwrap_or(usize::MAX).min(room.len());
        input.read(&mut room[..step])?;
        whole += room[..step].iter().map(|byte| u64::from(byte.count_ones())).sum::<u64>();
        left -= step as u64;
    }
    if whole > len / PAGE {
        let at = place.bitmap_at;
        return Err(Error::invalid(format!("byte {at:#x}: the bitmap has pages beyond the block's end")).at_byte(at));
    }
    input.skip(place.pages_at + len - input.position())?;
    Ok(Pages { whole, zero: len / PAGE - whole, delta: 0 })
}
