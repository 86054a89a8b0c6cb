//! From element to element.

use std::collections::HashMap;

use serde_json::Value;
use vmig::error::{Error, Result};
use vmig::ram::presence::GRANULE;
use vmig::section::builtin;
use vmig::wire::command::{self, Any, Command, Postcopy};
use vmig::wire::digest::{self, Part};
use vmig::wire::input::Input;
use vmig::wire::ram;
use vmig::wire::stream::{self, Element, SectionName};

use super::device::{self, Description};
use super::memory::Memory;
use super::{Out, opening, printed};
use crate::printer::{Fact, Facts, Node};
use crate::source::Source;

/// Ids of sections that are remembered: more than any guest has.
const SECTIONS_MAX: usize = 65_536;

/// How the elements end.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    /// With EOF, and perhaps a description.
    Eof,
    /// They stopped where they may: behind the words of a switchover.
    Words,
    /// They stopped at the end of a package.
    Package,
}

/// A stream that is walked.
pub(crate) struct Walk<'a> {
    pub(super) input: Source,
    pub(super) out: Out<'a>,
    pub(super) memory: Memory,
    /// What describes the devices' bodies, once it is known.
    description: Option<Description>,
    /// Nothing is known of them, for the stream's end was seen and has no description.
    undescribed: bool,
    /// Names by id.
    bound: HashMap<u32, SectionName>,
    /// A connection that goes on with an earlier stream: its sections were begun there.
    resumed: bool,
    /// PREPARE came: the words of a switchover follow.
    prepared: bool,
    /// Empty parts of one section that follow each other: the first one's place, id, how many.
    empty: Option<(u64, u32, u64)>,
}

impl<'a> Walk<'a> {
    pub(super) fn new(input: Source, out: Out<'a>, description: Option<Description>) -> Self {
        Self {
            input,
            out,
            memory: Memory::default(),
            description,
            undescribed: false,
            bound: HashMap::new(),
            resumed: false,
            prepared: false,
            empty: None,
        }
    }

    pub(super) fn position(&self) -> u64 {
        self.input.position()
    }

    pub(super) fn summary(&self) -> Value {
        self.memory.json()
    }

    pub(super) fn into_printer(self) -> Out<'a> {
        self.out
    }

    /// All of it.
    pub(super) fn stream(&mut self) -> Result<()> {
        match opening::read(self)? {
            opening::Opening::Stream => (),
            opening::Opening::Resumed => self.resumed = true,
            opening::Opening::Question => return Ok(()),
        }
        let end = self.elements(None);
        let flushed = self.flush_empty();
        let end = end?;
        flushed?;
        self.print_memory()?;
        if end == End::Eof && !self.input.is_at_end()? {
            self.description()?;
        }
        let at = self.position();
        match self.input.is_at_end()? {
            true => Ok(()),
            false => Err(Error::invalid(format!("byte {at:#x}: bytes follow the end of the stream")).at_byte(at)),
        }
    }

    /// Elements up to EOF, or to the end of the package that reaches up to `end`.
    fn elements(&mut self, end: Option<u64>) -> Result<End> {
        loop {
            let at = self.position();
            match end {
                Some(end) if at == end => return Ok(End::Package),
                Some(end) if at > end => {
                    let text =
                        format!("byte {at:#x}: a section goes on beyond the end of its package, byte {end:#x}");
                    return Err(Error::invalid(text).at_byte(end));
                }
                None if self.prepared && self.input.is_at_end()? => return Ok(End::Words),
                _ => (),
            }
            let element = stream::read_element_with(&mut self.input, command::read_any)?;
            if !matches!(element, Element::Part(_)) {
                self.flush_empty()?;
            }
            match element {
                Element::Start(id, name) => self.named(at, "start", id, name)?,
                Element::Full(id, name) => self.named(at, "full", id, name)?,
                Element::Part(id) => self.numbered(at, "part", id)?,
                Element::End(id) => self.numbered(at, "end", id)?,
                Element::Command(Any::Taken(command)) => self.command(at, &command)?,
                Element::Command(Any::Postcopy(Postcopy::Package(len))) if end.is_none() => self.package(at, len)?,
                Element::Command(Any::Postcopy(command)) => self.postcopy(at, &command)?,
                Element::Eof => {
                    self.leaf(at, "eof", None, &[])?;
                    return Ok(End::Eof);
                }
            }
        }
    }

    pub(super) fn leaf(&mut self, at: u64, kind: &str, name: Option<&str>, facts: Facts<'_>) -> Result<()> {
        printed(self.out.leaf(&Node { at, kind, name, facts }))
    }

    /// START or FULL.
    fn named(&mut self, at: u64, kind: &str, id: u32, name: SectionName) -> Result<()> {
        let facts = [
            ("id", Fact::Number(id.into())),
            ("instance", Fact::Number(name.instance.into())),
            ("version", Fact::Number(name.version.into())),
        ];
        printed(self.out.begin(&Node { at, kind, name: Some(&name.name), facts: &facts }))?;
        if self.bound.len() >= SECTIONS_MAX && !self.bound.contains_key(&id) {
            return Err(Error::invalid(format!("byte {at:#x}: more than {SECTIONS_MAX} sections")).at_byte(at));
        }
        self.bound.insert(id, name.clone());
        self.body(kind == "full", id, &name)?;
        printed(self.out.close())
    }

    /// PART or END.
    fn numbered(&mut self, at: u64, kind: &str, id: u32) -> Result<()> {
        let name = match self.bound.get(&id) {
            Some(name) => name.clone(),
            // Only guest memory is resumed.
            None if self.resumed => SectionName { name: ram::NAME.to_owned(), instance: 0, version: ram::VERSION },
            None => {
                let text = format!("byte {at:#x}: section id {id} was not introduced by a START section before");
                return Err(Error::invalid(text).at_byte(at));
            }
        };
        if kind == "part" && name.name == ram::NAME && self.is_empty_part()? {
            return self.empty_part(at, id, &name.name);
        }
        self.flush_empty()?;
        let facts = [("id", Fact::Number(id.into()))];
        printed(self.out.begin(&Node { at, kind, name: Some(&name.name), facts: &facts }))?;
        self.body(false, id, &name)?;
        printed(self.out.close())
    }

    /// The body and the footer.
    fn body(&mut self, whole: bool, id: u32, name: &SectionName) -> Result<()> {
        let begin = self.position();
        let read = match name.name.as_str() {
            ram::NAME => self.memory.body(&mut self.input, &mut self.out),
            _ => self.device(whole, id, name),
        };
        read.map_err(|e| e.in_section(&name.name).in_body_at(begin))?;
        stream::read_footer(&mut self.input, id, &name.name)
    }

    fn device(&mut self, whole: bool, id: u32, name: &SectionName) -> Result<()> {
        let described = match whole {
            true => self.description_of(name)?,
            false => None,
        };
        match described {
            Some(table) => device::fields(&mut self.input, &mut self.out, &table),
            None => device::undescribed(&mut self.input, &mut self.out, id),
        }
    }

    /// What describes this device.
    fn description_of(&mut self, name: &SectionName) -> Result<Option<Value>> {
        if self.description.is_none() && !self.undescribed {
            // Its end tells, if that is near enough; a device early in a stream that is read from a pipe is too early.
            let most = crate::source::AHEAD_MAX;
            let rest = self.input.ahead(most)?;
            if rest.len() < most {
                self.description = Description::find(rest);
                self.undescribed = self.description.is_none();
            }
        }
        let known = self.description.as_ref().and_then(|d| d.device(&name.name, name.instance)).cloned();
        Ok(known.or_else(|| match name.name.as_str() {
            n if n == builtin::TIMER.0 => Some(builtin::describe_timer()),
            n if n == builtin::GLOBAL_STATE.0 => Some(builtin::describe_global_state()),
            _ => None,
        }))
    }

    /// Whether the body that comes next is nothing but its end. QEMU writes thousands of those.
    fn is_empty_part(&mut self) -> Result<bool> {
        let mut end = Vec::new();
        ram::put_end(&mut end);
        Ok(self.input.ahead(end.len())? == end)
    }

    fn empty_part(&mut self, at: u64, id: u32, name: &str) -> Result<()> {
        ram::read(&mut self.input)?;
        stream::read_footer(&mut self.input, id, name)?;
        match &mut self.empty {
            Some((_, same, count)) if *same == id => *count += 1,
            _ => {
                self.flush_empty()?;
                self.empty = Some((at, id, 1));
            }
        }
        Ok(())
    }

    fn flush_empty(&mut self) -> Result<()> {
        let Some((at, id, count)) = self.empty.take() else { return Ok(()) };
        let facts = [("id", Fact::Number(id.into())), ("empty", Fact::Number(count))];
        self.leaf(at, "part", Some(ram::NAME), &facts)
    }

    fn command(&mut self, at: u64, command: &Command) -> Result<()> {
        let number = |name, n: u64| vec![(name, Fact::Number(n))];
        let (name, facts) = match command {
            Command::OpenReturnPath => ("OPEN_RETURN_PATH", vec![]),
            Command::Ping(value) => ("PING", number("value", (*value).into())),
            Command::SwitchoverStart => ("SWITCHOVER_START", vec![]),
            Command::Fds(count) => ("FDS", number("count", (*count).into())),
            Command::Prepare(epoch) => {
                self.prepared = true;
                ("PREPARE", number("epoch", *epoch))
            }
            Command::Go(epoch, incarnation) => {
                ("GO", vec![("epoch", Fact::Number(*epoch)), ("incarnation", Fact::Address(*incarnation))])
            }
            Command::Hash => ("HASH", vec![]),
            Command::Hashes => return self.hashes(at),
            Command::PageHashes => {
                let pages = digest::read_granule(&mut self.input, GRANULE)?;
                ("PAGE_HASHES", number("pages", pages.len() as u64))
            }
            Command::SyncPoint(point) => ("SYNC_POINT", number("point", *point)),
            Command::Abort(epoch) => ("ABORT", number("epoch", *epoch)),
            Command::Error(error) => ("ERROR", vec![("text", error.to_string().as_str().into())]),
        };
        self.leaf(at, "command", Some(name), &facts)
    }

    /// What the source hashed, with option `verify`.
    fn hashes(&mut self, at: u64) -> Result<()> {
        printed(self.out.begin(&Node { at, kind: "command", name: Some("HASHES"), facts: &[] }))?;
        let Self { input, out, bound, .. } = self;
        digest::skim(input, &mut |at, part| {
            let (kind, name, facts) = match &part {
                Part::Block(name, granules) => {
                    ("block", Some(name.as_str()), vec![("granules", Fact::Number((*granules).into()))])
                }
                Part::Section(id, hash) => {
                    let facts = vec![("id", Fact::Number((*id).into())), ("hash", Fact::Address(*hash))];
                    ("section", bound.get(id).map(|name| name.name.as_str()), facts)
                }
            };
            printed(out.leaf(&Node { at, kind, name, facts: &facts }))
        })?;
        printed(self.out.close())
    }

    fn postcopy(&mut self, at: u64, command: &Postcopy) -> Result<()> {
        let (name, facts) = match command {
            Postcopy::Advise(None) => ("POSTCOPY_ADVISE", vec![]),
            Postcopy::Advise(Some((host, target))) => (
                "POSTCOPY_ADVISE",
                vec![("host-pages", Fact::Address(*host)), ("target-page", Fact::Number(*target))],
            ),
            Postcopy::Listen => ("POSTCOPY_LISTEN", vec![]),
            Postcopy::Run => ("POSTCOPY_RUN", vec![]),
            Postcopy::Discard(block, ranges) => {
                let bytes = ranges.iter().fold(0u64, |sum, (_, len)| sum.saturating_add(*len));
                let facts = vec![
                    ("block", block.as_str().into()),
                    ("ranges", Fact::Number(ranges.len() as u64)),
                    ("bytes", Fact::Number(bytes)),
                ];
                ("POSTCOPY_RAM_DISCARD", facts)
            }
            Postcopy::Resume => ("POSTCOPY_RESUME", vec![]),
            Postcopy::AskBitmap(block) => ("RECV_BITMAP", vec![("block", block.as_str().into())]),
            Postcopy::Colo => ("ENABLE_COLO", vec![]),
            Postcopy::Package(_) => {
                return Err(Error::invalid(format!("byte {at:#x}: a package in a package")).at_byte(at));
            }
        };
        self.leaf(at, "command", Some(name), &facts)
    }

    /// PACKAGED: a piece of stream of its own.
    fn package(&mut self, at: u64, len: u32) -> Result<()> {
        let facts = [("bytes", Fact::Number(len.into()))];
        printed(self.out.begin(&Node { at, kind: "command", name: Some("PACKAGED"), facts: &facts }))?;
        let end = self.position() + u64::from(len);
        if self.elements(Some(end))? != End::Package {
            return Err(Error::invalid(format!("byte {at:#x}: the package has an end of stream in it")).at_byte(at));
        }
        self.flush_empty()?;
        printed(self.out.close())
    }

    fn print_memory(&mut self) -> Result<()> {
        let at = self.position();
        self.memory.print(at, &mut self.out)
    }

    /// The description, which must be JSON.
    fn description(&mut self) -> Result<()> {
        let at = self.position();
        let bytes = stream::read_description(&mut self.input)?;
        let mut facts = vec![("bytes", Fact::Number(bytes.len() as u64))];
        let json = match &self.description {
            Some(description) => description.json().clone(),
            None if bytes.len() > device::DESCRIPTION_MAX => Value::Null,
            None => serde_json::from_slice(&bytes).map_err(|e| {
                Error::invalid(format!("byte {at:#x}: the stream's description is not JSON: {e}")).at_byte(at)
            })?,
        };
        facts.extend(json["devices"].as_array().map(|all| ("devices", Fact::Number(all.len() as u64))));
        facts.extend(
            json["vmig"]["library"].as_str().map(|version| ("written-by", format!("vmig {version}").as_str().into())),
        );
        self.leaf(at, "description", None, &facts)
    }
}
