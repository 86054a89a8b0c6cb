//! The hello: what two vmigs tell each other before the stream begins.
//!
//! A frame is the magic `VMIG`, a version, a length (all be32) and JSON. The source says what it has and offers
//! features; the destination compares it with what it has itself and answers with the features it takes, or with
//! every difference it found. Unknown keys are ignored, so that old and new may meet.

use serde_json::{Value, json};

use super::ask::{EPOCH_MAX, MigrationId};
use super::checksum;
use super::input::Input;
use super::output::Put;
use super::stream::SectionName;
use crate::error::{Error, Result};
use crate::ram::presence::Hint;

/// First word of a hello.
pub const MAGIC: u32 = 0x564d_4947;
const VERSION: u32 = 1;
const LEN_MAX: u64 = 1 << 20;
/// Differences listed at most.
const ERRORS_MAX: usize = 256;

/// What the source says.
#[derive(Clone, Debug, PartialEq, Eq)]
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
    /// It takes the switchover in four words.
    pub switchover: bool,
    /// Blocks whose files it takes, in the order of the offer: these follow, and no pages of them. None: it knows
    /// nothing of handing over.
    pub hand_over: Option<Vec<String>>,
}

const FEATURE_FDS: &str = "device-fds";
const FEATURE_ZERO_RUNS: &str = "zero-runs";
const FEATURE_SWITCHOVER: &str = "switchover";

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
        return Err(Error::new(libc::ENOTSUP, text).expected_got(VERSION, version));
    }
    let len = u64::from(input.u32()?);
    let bytes = input.blob("the hello", len, LEN_MAX)?;
    serde_json::from_slice(&bytes).map_err(|e| Error::invalid(format!("the hello of {who} is not JSON: {e}")))
}

/// Writes a hello.
pub fn put(out: &mut Vec<u8>, hello: &Hello) -> Result<()> {
    let blocks: Vec<Value> = hello.blocks.iter().map(|(name, len)| json!({"name": name, "length": len})).collect();
    let section = |d: &Device| {
        let mut json = json!({"name": d.name.name, "instance": d.name.instance, "version": d.name.version});
        if !d.fds.is_empty() {
            json["fds"] = d.fds.clone().into();
        }
        json
    };
    let sections: Vec<Value> = hello.sections.iter().map(section).collect();
    let mut json = json!({
        "library": env!("CARGO_PKG_VERSION"),
        "machine": hello.machine,
        "page-size": hello.page_size,
        "ram": blocks,
        "devices": sections,
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
    put_frame(out, &json)
}

/// Reads a hello.
pub fn read(input: &mut dyn Input) -> Result<Hello> {
    let json = read_frame(input, "the source")?;
    parse(&json).ok_or_else(|| Error::invalid("the source's hello lacks machine, page-size, ram or devices"))
}

fn parse(json: &Value) -> Option<Hello> {
    let text = |v: &Value, key: &str| Some(v.get(key)?.as_str()?.to_owned());
    let word = |v: &Value, key: &str| u32::try_from(v.get(key)?.as_u64()?).ok();
    let blocks = json.get("ram")?.as_array()?.iter();
    let sections = json.get("devices")?.as_array()?.iter();
    Some(Hello {
        machine: text(json, "machine")?,
        page_size: json.get("page-size")?.as_u64()?,
        blocks: blocks.map(|b| Some((text(b, "name")?, b.get("length")?.as_u64()?))).collect::<Option<_>>()?,
        sections: sections
            .map(|s| {
                let (name, instance, version) = (text(s, "name")?, word(s, "instance")?, word(s, "version")?);
                Some(Device { name: SectionName { name, instance, version }, fds: texts(s.get("fds"))? })
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
        attempt: match json.get("migration") {
            None => None,
            Some(id) => Some(Attempt {
                migration: MigrationId::parse(id.as_str()?)?,
                epoch: json.get("epoch")?.as_u64().filter(|epoch| *epoch <= EPOCH_MAX)?,
            }),
        },
    })
}

fn offer(json: &Value) -> Option<Offer> {
    let number = |key| json.get(key)?.as_u64();
    Some(Offer { name: json.get("name")?.as_str()?.to_owned(), len: number("length")?, offset: number("offset")? })
}

/// A list of strings; what is missing is empty.
fn texts(json: Option<&Value>) -> Option<Vec<String>> {
    let Some(json) = json else { return Some(Vec::new()) };
    json.as_array()?.iter().map(|v| Some(v.as_str()?.to_owned())).collect()
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
            ];
            let features: Vec<&str> = all.iter().filter(|(takes, _)| *takes).map(|(_, name)| *name).collect();
            let mut json = json!({"library": env!("CARGO_PKG_VERSION"), "features": features});
            if let Some(names) = &welcome.hand_over {
                json["hand-over"] = names.clone().into();
            }
            json
        }
        Answer::Refused(errors) => {
            let errors: Vec<Value> = errors.iter().take(ERRORS_MAX).map(Error::to_json).collect();
            json!({"library": env!("CARGO_PKG_VERSION"), "errors": errors})
        }
    };
    put_frame(out, &json)
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
            let (fds, zero_runs) = (has(FEATURE_FDS), has(FEATURE_ZERO_RUNS));
            let (checksum, switchover) = (has(checksum::NAME), has(FEATURE_SWITCHOVER));
            Ok(Answer::Welcome(Welcome { fds, zero_runs, checksum, switchover, hand_over }))
        }
        Some(errors) => Ok(Answer::Refused(
            errors.iter().take(ERRORS_MAX).filter_map(Error::from_json).map(|e| e.on_side("destination")).collect(),
        )),
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
    let mut list: Vec<String> = errors.iter().take(ERRORS_MAX).map(ToString::to_string).collect();
    if errors.len() > ERRORS_MAX {
        list.push(format!("and {} more", errors.len() - ERRORS_MAX));
    }
    let text = format!("{} differences: {}", errors.len(), list.join("; "));
    Error::new(first.errno(), text).on_side(first.place().side.as_deref().unwrap_or("destination"))
}

#[cfg(test)]
mod tests {
    use super::super::input::Slice;
    use super::*;

    fn hello() -> Hello {
        Hello {
            machine: "none".into(),
            page_size: 4096,
            blocks: vec![("low".into(), 0x1000), ("high".into(), 0x4000)],
            sections: vec![Device {
                name: SectionName { name: "uart".into(), instance: 0, version: 2 },
                fds: vec!["tap".into()],
            }],
            channels: 3,
            meet_each_section: true,
            memory: vec!["host/0:1/77".into()],
            hints: true,
            checksum: Some("crc32c".into()),
            hand_over: Some(vec![Offer { name: "low".into(), len: 0x1000, offset: 0x2000 }]),
            attempt: Some(Attempt { migration: MigrationId([7; 16]), epoch: 1 << 40 }),
        }
    }

    #[test]
    fn round_trip() {
        let mut out = Vec::new();
        put(&mut out, &hello()).unwrap();
        assert_eq!(read(&mut Slice::new(&out)).unwrap(), hello());
        for len in 0..out.len() {
            assert_eq!(read(&mut Slice::new(&out[..len])).unwrap_err().errno(), libc::EIO, "cut at {len}");
        }
    }

    #[test]
    fn answers_carry_every_difference() {
        let errors = vec![
            Error::invalid("no RAM block 'x'").on_side("destination"),
            Error::invalid("missing").in_section("uart").on_side("destination"),
        ];
        let welcome = Answer::Welcome(Welcome {
            fds: true,
            zero_runs: true,
            checksum: true,
            switchover: true,
            hand_over: Some(vec!["low".into()]),
        });
        for answer in [Answer::Welcome(Welcome::default()), welcome, Answer::Refused(errors.clone())] {
            let mut out = Vec::new();
            put_answer(&mut out, &answer).unwrap();
            assert_eq!(read_answer(&mut Slice::new(&out)).unwrap(), answer);
        }
        assert_eq!(
            join(&errors).to_string(),
            "destination: 2 differences: destination: no RAM block 'x'; destination: section 'uart': missing"
        );
    }

    #[test]
    fn hints_are_as_long_as_the_block() {
        let mut hint = Hint::new(2 * 512 + 7).unwrap();
        hint.add(0..512);
        hint.add(600..601);
        hint.add(1024..1031);
        let mut out = Vec::new();
        put_hint(&mut out, &hint);
        assert_eq!(out, [255, 1, 4]);
        assert_eq!(read_hint(&mut Slice::new(&out), 1031).unwrap().counts(), [510, 2, 7]);
        assert!(read_hint(&mut Slice::new(&out), 2048).is_err());
    }

    #[test]
    fn hostile_hellos_are_refused() {
        let frame = |json: &str| {
            let mut out = Vec::new();
            out.u32(MAGIC);
            out.u32(VERSION);
            out.u32(u32::try_from(json.len()).unwrap());
            out.bytes(json.as_bytes());
            read(&mut Slice::new(&out)).unwrap_err()
        };
        let deep = format!("{}{}", "[".repeat(10_000), "]".repeat(10_000));
        for json in ["", "{", "[]", "{}", &deep, r#"{"machine":1,"page-size":1,"ram":[],"devices":[]}"#] {
            assert_eq!(frame(json).errno(), libc::EINVAL);
        }
        let long = [MAGIC.to_be_bytes(), VERSION.to_be_bytes(), [0xff; 4]].concat();
        assert_eq!(read(&mut Slice::new(&long)).unwrap_err().errno(), libc::EINVAL);
    }
}
