//! Bodies of devices: field by field where the stream's description is known, else only their lengths.

use serde_json::Value;
use vmig::error::{Error, Result};
use vmig::wire::command;
use vmig::wire::input::{Input, Slice};
use vmig::wire::stream::{self, Element};

use super::{Out, printed};
use crate::printer::{Fact, Facts, Node};
use crate::source::{AHEAD_MAX, Source};

/// Longest description that is made use of.
pub(super) const DESCRIPTION_MAX: usize = 8 << 20;
/// Fields of one device, elements of arrays of structs counted each: a description may claim any number.
const FIELDS_MAX: u32 = 1 << 18;
/// Structs in structs.
const DEPTH_MAX: u32 = 32;
/// Elements of an array, and bytes of a buffer, that are shown.
const ELEMENTS_SHOWN: u64 = 32;
const BYTES_SHOWN: u64 = 32;
/// Bytes of an unknown body that are looked through at first for its end.
const FIRST_LOOK: usize = 64 << 10;
/// An element's head, up to its name's end.
const ELEMENT_MAX: usize = 512;

/// The JSON at a stream's end.
pub(super) struct Description(Value);

impl Description {
    /// Finds it at the end of these bytes: its type, its length, and exactly so many bytes of JSON.
    pub(super) fn find(tail: &[u8]) -> Option<Self> {
        let first = tail.len().saturating_sub(DESCRIPTION_MAX + 5);
        (first..tail.len().saturating_sub(5)).rev().find_map(|at| {
            let mut input = Slice::new(&tail[at..]);
            let head = tail[at + 5] == b'{'
                && u32::from_be_bytes(*tail[at + 1..].first_chunk()?) as usize == tail.len() - at - 5;
            let json = head.then(|| stream::read_description(&mut input).ok())??;
            serde_json::from_slice(&json).ok().map(Self)
        })
    }

    pub(super) fn json(&self) -> &Value {
        &self.0
    }

    /// What it says of a device.
    pub(super) fn device(&self, name: &str, instance: u32) -> Option<&Value> {
        let mine = |device: &&Value| device["name"] == name && device["instance_id"] == instance;
        self.0["devices"].as_array()?.iter().find(mine)
    }
}

/// Reads and prints the fields of a body that `table` describes.
pub(super) fn fields(input: &mut Source, out: &mut Out<'_>, table: &Value) -> Result<()> {
    Fields { input, out, left: FIELDS_MAX }.table(table, 0)
}

struct Fields<'a, 'b> {
    input: &'a mut Source,
    out: &'a mut Out<'b>,
    left: u32,
}

impl Fields<'_, '_> {
    /// The fields, then the parts.
    fn table(&mut self, table: &Value, depth: u32) -> Result<()> {
        if depth > DEPTH_MAX {
            return Err(Error::invalid(format!("structs are nested deeper than {DEPTH_MAX} in the description")));
        }
        for field in table["fields"].as_array().into_iter().flatten() {
            let name = field["name"].as_str().unwrap_or("?");
            self.field(field, name, depth).map_err(|e| e.in_field(name))?;
        }
        for part in table["subsections"].as_array().into_iter().flatten() {
            self.part(part, depth)?;
        }
        Ok(())
    }

    fn field(&mut self, field: &Value, name: &str, depth: u32) -> Result<()> {
        let count = field.get("array_len").map_or(Some(1), Value::as_u64);
        let nested = field.get("struct").filter(|nested| nested.is_object());
        let (Some(count), Some(size)) = (count, field["size"].as_u64().or(nested.map(|_| 0))) else {
            return Err(Error::invalid("the description of it makes no sense"));
        };
        let label = match field["index"].as_u64() {
            Some(index) => format!("{name}[{index}]"),
            None => name.to_owned(),
        };
        let Some(nested) = nested else { return self.values(field, &label, size, count) };
        for index in 0..count {
            let label = if count == 1 { label.clone() } else { format!("{name}[{index}]") };
            self.spend()?;
            self.begin("struct", &label, &[])?;
            self.table(nested, depth + 1)?;
            printed(self.out.close())?;
        }
        Ok(())
    }

    /// A limit on work, for a description may claim any number of fields of no bytes.
    fn spend(&mut self) -> Result<()> {
        self.left =
            self.left.checked_sub(1).ok_or_else(|| Error::invalid(format!("more than {FIELDS_MAX} fields")))?;
        Ok(())
    }

    fn begin(&mut self, kind: &str, name: &str, facts: Facts<'_>) -> Result<()> {
        let at = self.input.position();
        printed(self.out.begin(&Node { at, kind, name: Some(name), facts }))
    }

    /// One value, or an array of them.
    fn values(&mut self, field: &Value, name: &str, size: u64, count: u64) -> Result<()> {
        self.spend()?;
        let at = self.input.position();
        let kind = field["type"].as_str().unwrap_or("?");
        let Some(bytes) = size.checked_mul(count) else {
            return Err(Error::invalid(format!("the description claims {count} elements of {size} bytes")));
        };
        let number = matches!(size, 1 | 2 | 4 | 8) && is_number(kind);
        let mut text = None;
        let value = match number {
            true => {
                let mut values = Vec::new();
                for _ in 0..count.min(ELEMENTS_SHOWN) {
                    values.push(self.number(kind, size)?);
                }
                self.input.skip(bytes - size * count.min(ELEMENTS_SHOWN))?;
                match field.get("array_len") {
                    None => values.pop().unwrap_or_default(),
                    Some(_) => values.into(),
                }
            }
            false => {
                let shown = bytes.min(BYTES_SHOWN);
                let start = self.input.blob("a field", shown, BYTES_SHOWN)?;
                self.input.skip(bytes - shown)?;
                text = readable(&start).map(str::to_owned);
                hex(&start).into()
            }
        };
        let all = if number { count <= ELEMENTS_SHOWN } else { bytes <= BYTES_SHOWN };
        let mut facts = vec![("type", kind.into())];
        if field.get("array_len").is_some() {
            facts.push(("count", Fact::Number(count)));
        }
        if !number {
            facts.push(("bytes", Fact::Number(bytes)));
        }
        facts.push((if all { "value" } else { "starts" }, Fact::Value(value)));
        facts.extend(text.map(|text| ("text", text.as_str().into())));
        printed(self.out.leaf(&Node { at, kind: "field", name: Some(name), facts: &facts }))
    }

    fn number(&mut self, kind: &str, size: u64) -> Result<Value> {
        let word = match size {
            1 => u64::from(self.input.u8()?),
            2 => self.input.u16()?.into(),
            4 => self.input.u32()?.into(),
            _ => self.input.u64()?,
        };
        Ok(match kind {
            "bool" if word <= 1 => (word == 1).into(),
            _ if kind.starts_with("int") => {
                let unused = 64 - 8 * u32::try_from(size).unwrap_or(8);
                (i64::from_be_bytes(word.to_be_bytes()) << unused >> unused).into()
            }
            _ => word.into(),
        })
    }

    /// A part: its type, its name, its version, and its fields.
    fn part(&mut self, part: &Value, depth: u32) -> Result<()> {
        self.spend()?;
        let at = self.input.position();
        let name = part["vmsd_name"].as_str().unwrap_or("?");
        let (found, version) = stream::read_subsection(self.input)?;
        if found != name {
            let text = format!("byte {at:#x}: the description has another part of the device here");
            return Err(Error::invalid(text).at_byte(at).expected_got(format!("'{name}'"), format!("'{found}'")));
        }
        let facts = [("version", Fact::Number(version.into()))];
        printed(self.out.begin(&Node { at, kind: "part", name: Some(name), facts: &facts }))?;
        self.table(part, depth + 1)?;
        printed(self.out.close())
    }
}

/// Types whose bytes are one big-endian number.
fn is_number(kind: &str) -> bool {
    kind == "bool" || ["int", "uint", "timer", "fd"].iter().any(|start| kind.starts_with(start))
}

/// A name in a buffer: a few printable characters, then zeros only.
fn readable(bytes: &[u8]) -> Option<&str> {
    const TEXT_MIN: usize = 3;
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    let (text, rest) = bytes.split_at(end);
    let name = text.len() >= TEXT_MIN && text.iter().all(|b| b.is_ascii_graphic()) && rest.iter().all(|b| *b == 0);
    std::str::from_utf8(text).ok().filter(|_| name)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Reads a body of which nothing is known: framed as this library does it, or else up to what looks like its footer.
pub(super) fn undescribed(input: &mut Source, out: &mut Out<'_>, id: u32) -> Result<()> {
    let at = input.position();
    let mut footer = Vec::new();
    stream::put_footer(&mut footer, id);
    let (len, framed) = match framed(input, &footer)? {
        Some(len) => (len, true),
        None => (up_to_footer(input, &footer)?, false),
    };
    let start = hex(input.ahead(len.min(16))?);
    input.skip(len as u64)?;
    let mut facts = vec![("bytes", Fact::Number(len as u64)), ("starts", start.as_str().into())];
    if !framed {
        facts.push(("ends", "by what looks like its footer".into()));
    }
    printed(out.leaf(&Node { at, kind: "body", name: None, facts: &facts }))
}

/// A body's length, if it is a length, so many bytes, and the footer.
fn framed(input: &mut Source, footer: &[u8]) -> Result<Option<usize>> {
    let Some(len) = input.ahead(4)?.first_chunk().map(|len| u32::from_be_bytes(*len) as usize) else {
        return Ok(None);
    };
    let whole = 4 + len + footer.len();
    if whole > AHEAD_MAX {
        return Ok(None);
    }
    let rest = input.ahead(whole)?;
    Ok((rest.len() == whole && rest.ends_with(footer)).then_some(4 + len))
}

/// Bytes up to a footer behind which the stream makes sense.
fn up_to_footer(input: &mut Source, footer: &[u8]) -> Result<usize> {
    let at = input.position();
    let (mut from, mut look) = (0, FIRST_LOOK);
    loop {
        let rest = input.ahead(look)?;
        let ended = rest.len() < look;
        // What stands too near to the end to be judged is judged when more is there.
        let until = if ended { rest.len() } else { rest.len() - footer.len() - ELEMENT_MAX };
        let found = (from..until).find(|at| {
            rest[*at..].starts_with(footer)
                && makes_sense(&rest[at + footer.len()..][..ELEMENT_MAX.min(rest.len() - at - footer.len())])
        });
        if let Some(len) = found {
            return Ok(len);
        }
        if ended || look == AHEAD_MAX {
            let text = format!("byte {at:#x}: no end of the section is found, and nothing describes its contents");
            return Err(Error::invalid(text).at_byte(at));
        }
        (from, look) = (until, (look * 2).min(AHEAD_MAX));
    }
}

/// Whether an element can begin like this.
fn makes_sense(bytes: &[u8]) -> bool {
    match stream::read_element_with(&mut Slice::new(bytes), command::read_any) {
        Ok(Element::Start(_, name) | Element::Full(_, name)) => {
            !name.name.is_empty() && name.name.bytes().all(|b| b.is_ascii_graphic() || b == b' ')
        }
        Ok(_) => true,
        // The stream is cut there.
        Err(error) => error.place().ended,
    }
}
