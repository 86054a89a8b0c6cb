//! The hello: what two vmigs tell each other before the stream begins.
//!
//! A frame is the magic `VMIG`, a version, a length (all be32) and JSON. The source says what it has and offers
//! features; the destination compares it with what it has itself and answers with the features it takes, or with
//! every difference it found. Unknown keys are ignored, so that old and new may meet.

use std::collections::HashMap;
use std::sync::Arc;

use serde_json::{Value, json};

use super::ask::{EPOCH_MAX, MigrationId};
use super::checksum;
use super::cpu::{self, Cpu};
use super::input::Input;
use super::output::Put;
use super::shape::{self, Shape};
use super::stream::SectionName;
use crate::error::{Error, Result};
use crate::ram::presence::Hint;

/// First word of a hello.
pub const MAGIC: u32 = 0x564d_4947;
const VERSION: u32 = 1;
const LEN_MAX: u64 = 1 << 20;
/// Differences listed at most, and their bytes.
const ERRORS_MAX: usize = 256;
const ERRORS_LEN_MAX: usize = 768 << 10;
/// Longest name of a section, RAM block or feature.
const NAME_MAX: usize = 255;
/// Longest path of a field, or identity of a file.
const PATH_MAX: usize = 4096;
/// Longest configuration that may follow a hello.
pub const CONFIG_MAX: u64 = 1 << 20;

/// What the source says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hello {
    /// Machine name.
    pub machine: String,
    /// Page size.
    pub page_size: u64,
    /// RAM blocks whose bytes travel, as (name, length).
    pub blocks: Vec<(String, u64)>,
    /// Sections that will come.
    pub sections: Vec<Device>,
    /// Connections for pages that will follow; 0: pages come in the main stream.
    pub channels: u8,
    /// They meet at the end of every section, not at a mark.
    pub meet_each_section: bool,
    /// Files that guest RAM is a shared mapping of, by names that are the same on one host only.
    pub memory: Vec<String>,
    /// Behind the welcome come hints: where the blocks have content that are not offered below.
    pub hints: bool,
    /// The checksum that everything behind the welcome is to have, by its name.
    pub checksum: Option<String>,
    /// Blocks whose files the source would hand over; none: it has the option off.
    pub hand_over: Option<Vec<Offer>>,
    /// Offers the switchover in four words, for this attempt; none: the last byte is the handover.
    pub attempt: Option<Attempt>,
    /// The guest's CPUs, if the library knows them.
    pub cpu: Option<Cpu>,
    /// Features without which the source does not migrate, by name.
    pub needs: Vec<String>,
    /// Features the source has and the destination may take.
    pub offers: Vec<String>,
    /// Bytes of configuration that follow; none: the source has none.
    pub config: Option<u64>,
    /// Nobody migrates: the source only wants to know what differs.
    pub check: bool,
    /// How long both sides keep what they have when the connection breaks, in milliseconds; none: not at all.
    pub resume: Option<u64>,
}

/// Which attempt to move a guest this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attempt {
    /// The migration, drawn at random.
    pub migration: MigrationId,
    /// The epoch the source owns the guest with.
    pub epoch: u64,
}

/// A section that will come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Name, instance, version.
    pub name: SectionName,
    /// Its fields that are file descriptors.
    pub fds: Vec<String>,
    /// What its body looks like; empty if it does not say.
    pub shape: Arc<Shape>,
}

/// A block whose file the source would hand over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    /// Name.
    pub name: String,
    /// Length in bytes.
    pub len: u64,
    /// Where in its file it begins, in bytes.
    pub offset: u64,
}

/// What the destination answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Nothing differs: go on.
    Welcome(Welcome),
    /// Everything that differs.
    Refused(Vec<Error>),
    /// Everything that differs, for one who only asked; and how many nanoseconds the comparison took.
    Checked(Vec<Error>, u64),
}

/// What a destination takes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Welcome {
    /// It takes file descriptors of devices.
    pub fds: bool,
    /// It takes records of many zero pages.
    pub zero_runs: bool,
    /// From here on everything has the checksum that the source asked for.
    pub checksum: bool,
    /// It hashes and compares, as the source asked for.
    pub verify: bool,
    /// It takes the switchover in four words.
    pub switchover: bool,
    /// It keeps what came when the connection breaks, and acknowledges sync points.
    pub resume: bool,
    /// Blocks whose files it takes, in the order of the offer: these follow, and no pages of them. None: it knows
    /// nothing of handing over.
    pub hand_over: Option<Vec<String>>,
    /// It takes at most so many connections for pages.
    pub channels: Option<u8>,
    /// It takes at most so many bytes per second.
    pub max_bandwidth: Option<u64>,
}

/// Feature: file descriptors of devices.
pub const FEATURE_FDS: &str = "device-fds";
/// Feature: records of many zero pages.
pub const FEATURE_ZERO_RUNS: &str = "zero-runs";
/// Feature: connections for pages.
pub const FEATURE_MULTIFD: &str = "multifd";
/// Feature: RAM by its files.
pub const FEATURE_HAND_OVER: &str = "hand-over";
/// Feature: the switchover in four words.
pub const FEATURE_SWITCHOVER: &str = "switchover";
/// Feature: hashes of memory and devices are compared before the guest leaves.
pub const FEATURE_VERIFY: &str = "verify";
/// Feature: going on after the connection broke.
pub const FEATURE_RESUME: &str = "resume";

fn put_frame(out: &mut Vec<u8>, json: &Value) -> Result<()> {
    let text = json.to_string();
    if text.len() as u64 > LEN_MAX {
        return Err(Error::new(libc::E2BIG, "the hello is too long: too many devices or RAM blocks"));
    }
    let len = u32::try_from(text.len()).unwrap_or(u32::MAX);
    out.u32(MAGIC);
    out.u32(VERSION);
    out.u32(len);
    out.bytes(text.as_bytes());
    Ok(())
}

fn read_frame(input: &mut dyn Input, who: &str) -> Result<Value> {
    let magic = input.u32()?;
    if magic != MAGIC {
        let text = format!("{who} did not answer as a vmig does; for a QEMU set option 'peer' to qemu");
        return Err(Error::new(libc::EPROTO, text).expected_got(format!("{MAGIC:#010x}"), format!("{magic:#010x}")));
    }
    let version = input.u32()?;
    if version != VERSION {
        let text = format!("{who} speaks another version of the hello");
        return Err(Error::new(libc::ENOTSUP, text).in_field("version").expected_got(VERSION, version));
    }
    let len = u64::from(input.u32()?);
    let bytes = input.blob("the hello", len, LEN_MAX)?;
    serde_json::from_slice(&bytes).map_err(|e| Error::invalid(format!("the hello of {who} is not JSON: {e}")))
}

/// Writes a hello.
pub fn put(out: &mut Vec<u8>, hello: &Hello) -> Result<()> {
    let blocks: Vec<Value> = hello.blocks.iter().map(|(name, len)| json!({"name": name, "length": len})).collect();
    let mut tables = Tables::default();
    let mut section = |d: &Device| {
        let mut json = json!({"name": d.name.name, "instance": d.name.instance, "version": d.name.version});
        if !d.fds.is_empty() {
            json["fds"] = d.fds.clone().into();
        }
        if !d.shape.is_empty() {
            json["table"] = tables.number(&d.shape).into();
        }
        json
    };
    let sections: Vec<Value> = hello.sections.iter().map(&mut section).collect();
    let mut json = json!({
        "library": env!("CARGO_PKG_VERSION"),
        "machine": hello.machine,
        "page-size": hello.page_size,
        "ram": blocks,
        "devices": sections,
        "tables": tables.shapes,
        "needs": hello.needs,
        "offers": hello.offers,
        "channels": hello.channels,
        "meet-each-section": hello.meet_each_section,
        "memory": hello.memory,
        "hints": hello.hints,
    });
    if let Some(name) = &hello.checksum {
        json["checksum"] = name.clone().into();
    }
    if let Some(offers) = &hello.hand_over {
        let offer = |o: &Offer| json!({"name": o.name, "length": o.len, "offset": o.offset});
        json["hand-over"] = offers.iter().map(offer).collect();
    }
    if let Some(attempt) = &hello.attempt {
        json["migration"] = attempt.migration.to_string().into();
        json["epoch"] = attempt.epoch.into();
    }
    if let Some(cpu) = &hello.cpu {
        json["cpu"] = cpu::to_json(cpu);
    }
    if let Some(len) = hello.config {
        json["config"] = len.into();
    }
    if hello.check {
        json["check"] = true.into();
    }
    if let Some(millis) = hello.resume {
        json["resume"] = millis.into();
    }
    put_frame(out, &json)
}

/// Shapes by number: the devices of one kind share theirs.
#[derive(Default)]
struct Tables {
    numbers: HashMap<String, usize>,
    shapes: Vec<Value>,
}

impl Tables {
    fn number(&mut self, shape: &Shape) -> usize {
        let json = shape::to_json(shape);
        let shapes = &mut self.shapes;
        *self.numbers.entry(json.to_string()).or_insert_with(|| {
            shapes.push(json);
            shapes.len() - 1
        })
    }
}

/// Reads a hello.
pub fn read(input: &mut dyn Input) -> Result<Hello> {
    let json = read_frame(input, "the source")?;
    parse(&json).ok_or_else(|| {
        Error::invalid("the source's hello lacks machine, page-size, ram or devices, or something in it is not what it should be")
    })
}

/// A name of a peer.
fn name(json: &Value) -> Option<String> {
    json.as_str().filter(|text| text.len() <= NAME_MAX).map(str::to_owned)
}

fn parse(json: &Value) -> Option<Hello> {
    let text = |v: &Value, key: &str| name(v.get(key)?);
    let word = |v: &Value, key: &str| u32::try_from(v.get(key)?.as_u64()?).ok();
    let blocks = json.get("ram")?.as_array()?.iter();
    let sections = json.get("devices")?.as_array()?.iter();
    let tables: Vec<Arc<Shape>> = match json.get("tables") {
        Some(all) => all.as_array()?.iter().map(|t| shape::from_json(t).map(Arc::new)).collect::<Option<_>>()?,
        None => Vec::new(),
    };
    let shape = |number: Option<&Value>| match number {
        Some(number) => tables.get(usize::try_from(number.as_u64()?).ok()?).cloned(),
        None => Some(Arc::default()),
    };
    Some(Hello {
        machine: text(json, "machine")?,
        page_size: json.get("page-size")?.as_u64()?,
        blocks: blocks.map(|b| Some((text(b, "name")?, b.get("length")?.as_u64()?))).collect::<Option<_>>()?,
        sections: sections
            .map(|s| {
                let (name, instance, version) = (text(s, "name")?, word(s, "instance")?, word(s, "version")?);
                Some(Device {
                    name: SectionName { name, instance, version },
                    fds: texts(s.get("fds"))?,
                    shape: shape(s.get("table"))?,
                })
            })
            .collect::<Option<_>>()?,
        channels: json.get("channels").map_or(Some(0), |n| u8::try_from(n.as_u64()?).ok())?,
        meet_each_section: json.get("meet-each-section").is_some_and(|v| v == true),
        memory: texts(json.get("memory"))?,
        hints: json.get("hints").is_some_and(|v| v == true),
        checksum: json.get("checksum").map_or(Some(None), |name| Some(Some(name.as_str()?.to_owned())))?,
        hand_over: match json.get("hand-over") {
            None => None,
            Some(list) => Some(list.as_array()?.iter().map(offer).collect::<Option<_>>()?),
        },
        resume: match json.get("resume") {
            None => None,
            Some(millis) => Some(millis.as_u64()?),
        },
        attempt: match json.get("migration") {
            None => None,
            Some(id) => Some(Attempt {
                migration: MigrationId::parse(id.as_str()?)?,
                epoch: json.get("epoch")?.as_u64().filter(|epoch| *epoch <= EPOCH_MAX)?,
            }),
        },
        cpu: match json.get("cpu") {
            None => None,
            Some(cpu) => Some(cpu::from_json(cpu)?),
        },
        needs: texts(json.get("needs"))?,
        offers: texts(json.get("offers"))?,
        config: match json.get("config") {
            None => None,
            Some(len) => Some(len.as_u64()?),
        },
        check: json.get("check").is_some_and(|v| v == true),
    })
}

/// Reads the configuration behind a hello that announces one.
pub fn read_config(input: &mut dyn Input, hello: &Hello) -> Result<Option<Vec<u8>>> {
    hello.config.map(|len| input.blob("the source's configuration", len, CONFIG_MAX)).transpose()
}

fn offer(json: &Value) -> Option<Offer> {
    let number = |key| json.get(key)?.as_u64();
    Some(Offer { name: name(json.get("name")?)?, len: number("length")?, offset: number("offset")? })
}

/// A list of strings, which may be paths of fields or of files; what is missing is empty.
fn texts(json: Option<&Value>) -> Option<Vec<String>> {
    let Some(json) = json else { return Some(Vec::new()) };
    json.as_array()?.iter().map(|v| v.as_str().filter(|t| t.len() <= PATH_MAX).map(str::to_owned)).collect()
}

/// Writes an answer.
pub fn put_answer(out: &mut Vec<u8>, answer: &Answer) -> Result<()> {
    let json = match answer {
        Answer::Welcome(welcome) => {
            let all = [
                (welcome.fds, FEATURE_FDS),
                (welcome.zero_runs, FEATURE_ZERO_RUNS),
                (welcome.checksum, checksum::NAME),
                (welcome.switchover, FEATURE_SWITCHOVER),
                (welcome.verify, FEATURE_VERIFY),
                (welcome.resume, FEATURE_RESUME),
            ];
            let features: Vec<&str> = all.iter().filter(|(takes, _)| *takes).map(|(_, name)| *name).collect();
            let mut json = json!({"library": env!("CARGO_PKG_VERSION"), "features": features});
            if let Some(names) = &welcome.hand_over {
                json["hand-over"] = names.clone().into();
            }
            if let Some(channels) = welcome.channels {
                json["channels"] = channels.into();
            }
            if let Some(most) = welcome.max_bandwidth {
                json["max-bandwidth"] = most.into();
            }
            json
        }
        Answer::Refused(errors) => json!({"library": env!("CARGO_PKG_VERSION"), "errors": listed(errors)}),
        Answer::Checked(errors, took) => {
            json!({"library": env!("CARGO_PKG_VERSION"), "errors": listed(errors), "checked-ns": took})
        }
    };
    put_frame(out, &json)
}

/// As many errors as an answer may have; the last says how many more there are.
fn listed(errors: &[Error]) -> Vec<Value> {
    let (mut list, mut len) = (Vec::new(), 0);
    for error in errors.iter().take(ERRORS_MAX) {
        let json = error.to_json_for_peer();
        len += json.to_string().len();
        if len > ERRORS_LEN_MAX {
            break;
        }
        list.push(json);
    }
    if list.len() < errors.len() {
        let text = format!("and {} more differences", errors.len() - list.len());
        list.push(Error::invalid(text).on_side("destination").to_json());
    }
    list
}

/// Reads an answer.
pub fn read_answer(input: &mut dyn Input) -> Result<Answer> {
    let json = read_frame(input, "the destination")?;
    match json.get("errors").and_then(Value::as_array) {
        None => {
            let odd = || Error::invalid("the destination's welcome has lists that are none");
            let features = texts(json.get("features")).ok_or_else(odd)?;
            let hand_over = json.get("hand-over").map(|list| texts(Some(list)).ok_or_else(odd)).transpose()?;
            let has = |name: &str| features.iter().any(|f| f == name);
            let channels = json.get("channels").and_then(Value::as_u64).map(|n| u8::try_from(n).unwrap_or(u8::MAX));
            let max_bandwidth = json.get("max-bandwidth").and_then(Value::as_u64);
            Ok(Answer::Welcome(Welcome {
                fds: has(FEATURE_FDS),
                zero_runs: has(FEATURE_ZERO_RUNS),
                checksum: has(checksum::NAME),
                verify: has(FEATURE_VERIFY),
                switchover: has(FEATURE_SWITCHOVER),
                resume: has(FEATURE_RESUME),
                hand_over,
                channels,
                max_bandwidth,
            }))
        }
        Some(errors) => {
            let errors = errors.iter().take(ERRORS_MAX + 1).filter_map(Error::from_json);
            let errors = errors.map(|e| e.on_side("destination")).collect();
            Ok(match json.get("checked-ns").and_then(Value::as_u64) {
                Some(took) => Answer::Checked(errors, took),
                None => Answer::Refused(errors),
            })
        }
    }
}

/// Writes a block's hint: a byte for each 2 MiB, half the number of its pages with content.
pub fn put_hint(out: &mut Vec<u8>, hint: &Hint) {
    out.extend(hint.counts().iter().map(|count| u8::try_from(count.div_ceil(2)).unwrap_or(u8::MAX)));
}

/// Reads the hint of a block of `pages` pages.
pub fn read_hint(input: &mut dyn Input, pages: usize) -> Result<Hint> {
    let mut hint = Hint::new(pages)?;
    let len = hint.counts().len() as u64;
    let bytes = input.blob("a hint about memory", len, len)?;
    for (granule, half) in bytes.into_iter().enumerate() {
        hint.set(granule, 2 * u16::from(half));
    }
    Ok(hint)
}

/// All differences in one error: the first one's place and errno, everybody's words.
pub fn join(errors: &[Error]) -> Error {
    let Some(first) = errors.first() else {
        return Error::new(libc::EPROTO, "the destination refused without giving a reason");
    };
    if errors.len() == 1 {
        return first.clone();
    }
    let mut list: Vec<String> = errors.iter().take(ERRORS_MAX).map(Error::item).collect();
    if errors.len() > ERRORS_MAX {
        list.push(format!("and {} more", errors.len() - ERRORS_MAX));
    }
    let text = format!("{} differences: {}", errors.len(), list.join("; "));
    let side = first.place().side.as_deref().unwrap_or("destination");
    Error::new(first.errno(), text).on_side(side).in_phase("hello")
}

#[cfg(test)]
#[path = "hello_tests.rs"]
mod tests;
