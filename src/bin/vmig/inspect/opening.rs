//! How a stream begins: QEMU's header, a vmig's hello before it, or neither on a connection that goes on.

use vmig::error::{Error, Result};
use vmig::ram::presence::GRANULE_BYTES;
use vmig::wire::hello::{self, Hello};
use vmig::wire::stream::{self, Setting};
use vmig::wire::{ask, knock, packet};

use super::walk::Walk;
use super::{printed, texts};
use crate::printer::{Fact, Node};

/// Where the header is looked for behind what a destination asked for, which this direction does not tell.
const SEARCH_MAX: usize = 1 << 20;
/// Type of a command, which is what a connection begins with that goes on with postcopy.
const COMMAND: u8 = 0x08;

/// What follows.
pub(super) enum Opening {
    /// Elements.
    Stream,
    /// The same, of a stream that was begun elsewhere.
    Resumed,
    /// Nothing: somebody only asked.
    Question,
}

/// Reads up to the first element.
pub(super) fn read(walk: &mut Walk<'_>) -> Result<Opening> {
    if word(walk)? == knock::MAGIC && is_farewell(walk)? {
        return Ok(Opening::Question);
    }
    let at = walk.position();
    let first = walk.input.ahead(4)?;
    let is_command = first.first() == Some(&COMMAND);
    match word(walk)? {
        hello::MAGIC if hello_and_hints(walk)? => return Ok(Opening::Question),
        packet::MAGIC => {
            let text = format!("byte {at:#x}: this is a parallel channel (multifd), not the main stream");
            return Err(Error::invalid(text).at_byte(at));
        }
        ask::MAGIC => {
            let question = ask::read(&mut walk.input)?;
            let facts = [
                ("migration", question.migration.to_string().as_str().into()),
                ("epoch", Fact::Number(question.epoch)),
                ("incarnation", Fact::Address(question.incarnation)),
            ];
            walk.leaf(at, "question", None, &facts)?;
            return Ok(Opening::Question);
        }
        _ if is_command => {
            walk.leaf(at, "resumed", None, &[])?;
            return Ok(Opening::Resumed);
        }
        _ => (),
    }
    header(walk)?;
    Ok(Opening::Stream)
}

fn word(walk: &mut Walk<'_>) -> Result<u32> {
    Ok(walk.input.ahead(4)?.first_chunk().map_or(0, |bytes| u32::from_be_bytes(*bytes)))
}

/// What a source says that comes again. True: that it will not, and nothing follows.
fn is_farewell(walk: &mut Walk<'_>) -> Result<bool> {
    let at = walk.position();
    let said = knock::read(&mut walk.input)?;
    let facts = [
        ("migration", said.migration.to_string().as_str().into()),
        ("number", Fact::Number(said.number.into())),
        ("over", Fact::Number(said.over.into())),
    ];
    walk.leaf(at, "knock", None, &facts)?;
    Ok(said.over)
}

fn header(walk: &mut Walk<'_>) -> Result<()> {
    let at = walk.position();
    stream::read_header(&mut walk.input)?;
    walk.leaf(at, "header", None, &[("version", Fact::Number(stream::VERSION.into()))])?;
    let at = walk.position();
    let machine = stream::read_machine(&mut walk.input)?;
    printed(walk.out.begin(&Node { at, kind: "configuration", name: Some(&machine), facts: &[] }))?;
    while !walk.input.is_at_end()?
        && let Some((at, name, setting)) = stream::read_setting(&mut walk.input)?
    {
        let fact = match &setting {
            Setting::PageBits(bits) => ("bits", Fact::Number((*bits).into())),
            Setting::Uuid(uuid) => ("uuid", format!("{:032x}", u128::from_be_bytes(*uuid)).as_str().into()),
            Setting::Capabilities(names) => {
                let has = |name: &str| names.iter().any(|n| n == name);
                walk.memory.ignore_shared = has(stream::IGNORE_SHARED);
                walk.memory.mapped = has(stream::MAPPED_RAM);
                ("names", texts(names.iter().map(String::as_str)))
            }
        };
        walk.leaf(at, "setting", Some(&name), &[fact])?;
    }
    printed(walk.out.close())
}

/// What two vmigs say before the header, as far as the source says it. True: nothing else follows.
fn hello_and_hints(walk: &mut Walk<'_>) -> Result<bool> {
    let at = walk.position();
    let said = hello::read(&mut walk.input)?;
    let blocks = said.blocks.iter().map(|(name, _)| name.as_str());
    let mut facts = vec![
        ("machine", said.machine.as_str().into()),
        ("blocks", texts(blocks)),
        ("devices", Fact::Number(said.sections.len() as u64)),
        ("channels", Fact::Number(said.channels.into())),
        ("needs", texts(said.needs.iter().map(String::as_str))),
        ("offers", texts(said.offers.iter().map(String::as_str))),
    ];
    if let Some(attempt) = &said.attempt {
        facts.push(("migration", attempt.migration.to_string().as_str().into()));
        facts.push(("epoch", Fact::Number(attempt.epoch)));
    }
    walk.leaf(at, "hello", None, &facts)?;
    let at = walk.position();
    if let Some(config) = hello::read_config(&mut walk.input, &said)? {
        walk.leaf(at, "config", None, &[("bytes", Fact::Number(config.len() as u64))])?;
    }
    if said.check {
        return Ok(true);
    }
    if said.checksum.is_some() {
        walk.input.unframe()?;
    }
    match said.hand_over.as_ref().is_some_and(|offers| !offers.is_empty()) {
        // Which of them the destination took is in its answer.
        true => find_header(walk)?,
        false => hints(walk, &said)?,
    }
    Ok(false)
}

fn hints(walk: &mut Walk<'_>, said: &Hello) -> Result<()> {
    if !said.hints {
        return Ok(());
    }
    let at = walk.position();
    let bytes = said.blocks.iter().fold(0u64, |sum, (_, len)| sum.saturating_add(len.div_ceil(GRANULE_BYTES)));
    walk.input.skip(bytes)?;
    walk.leaf(at, "hints", None, &[("bytes", Fact::Number(bytes))])
}

fn find_header(walk: &mut Walk<'_>) -> Result<()> {
    let at = walk.position();
    let magic = [stream::MAGIC.to_be_bytes(), stream::VERSION.to_be_bytes()].concat();
    let rest = walk.input.ahead(SEARCH_MAX)?;
    let Some(bytes) = rest.windows(magic.len()).position(|window| window == magic) else {
        return Err(Error::invalid(format!("byte {at:#x}: no header follows the hello")).at_byte(at));
    };
    walk.input.skip(bytes as u64)?;
    walk.leaf(at, "hand-over", None, &[("bytes", Fact::Number(bytes as u64))])
}
