//! The frame of the stream: header, configuration, section headers and footers, description.

use super::command::Command;
use super::input::Input;
use super::output::Put;
use crate::error::{Error, Result};

/// First word of a stream ("QEVM").
pub const MAGIC: u32 = 0x5145_564d;
/// The one version there is.
pub const VERSION: u32 = 3;
/// Longest description a peer may send.
pub const DESCRIPTION_MAX: u64 = 64 << 20;

/// Capability: blocks that both sides share are listed, with their addresses, and do not travel.
pub const IGNORE_SHARED: &str = "x-ignore-shared";
/// Capability: pages have fixed places in the file.
pub const MAPPED_RAM: &str = "mapped-ram";

const EOF: u8 = 0x00;
const START: u8 = 0x01;
const PART: u8 = 0x02;
const END: u8 = 0x03;
const FULL: u8 = 0x04;
pub(crate) const SUBSECTION: u8 = 0x05;
const DESCRIPTION: u8 = 0x06;
const CONFIGURATION: u8 = 0x07;
const COMMAND: u8 = 0x08;
const FOOTER: u8 = 0x7e;

/// Name and version of the section that START and FULL carry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SectionName {
    /// Name.
    pub name: String,
    /// Instance of the name.
    pub instance: u32,
    /// Version of the body.
    pub version: u32,
}

/// What comes next in a stream; a section's body follows its element.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Element<C = Command> {
    /// First body of an iterative section.
    Start(u32, SectionName),
    /// A body while the guest runs.
    Part(u32),
    /// Last body of an iterative section.
    End(u32),
    /// A whole device.
    Full(u32, SectionName),
    /// A command.
    Command(C),
    /// No more sections.
    Eof,
}

/// Writes magic, version and the configuration section.
pub fn put_header(out: &mut Vec<u8>, machine: &str) -> Result<()> {
    let len = u32::try_from(machine.len()).map_err(|_| Error::invalid("the machine name is too long"))?;
    out.u32(MAGIC);
    out.u32(VERSION);
    out.u8(CONFIGURATION);
    out.u32(len);
    out.bytes(machine.as_bytes());
    Ok(())
}

/// Reads magic and version.
pub fn read_header(input: &mut dyn Input) -> Result<()> {
    let magic = input.u32()?;
    if magic != MAGIC {
        return Err(Error::invalid("byte 0x0: this is not a migration stream")
            .at_byte(0)
            .expected_got(format!("magic {MAGIC:#010x}"), format!("{magic:#010x}")));
    }
    let version = input.u32()?;
    if version != VERSION {
        return Err(Error::new(libc::ENOTSUP, "byte 0x4: unsupported version of the migration stream")
            .at_byte(4)
            .expected_got(VERSION, version));
    }
    Ok(())
}

/// A part of the configuration section.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Setting {
    /// The source's pages have 2^n bytes.
    PageBits(u32),
    /// Capabilities that both sides must have alike.
    Capabilities(Vec<String>),
    /// The VM's uuid.
    Uuid([u8; 16]),
}

/// Reads the configuration section and compares it with what this side is.
///
/// As QEMU does, a sent name that is a prefix of ours is taken for ours.
pub fn read_configuration(input: &mut dyn Input, machine: &str) -> Result<()> {
    let name = read_machine(input)?;
    if !machine.starts_with(&name) {
        return Err(Error::invalid("the machine type differs; set option 'machine' to the same name on both sides")
            .expected_got(format!("'{machine}'"), format!("'{}'", name.escape_default())));
    }
    while let Some((at, name, setting)) = read_setting(input)? {
        check_setting(&setting).map_err(|text| wrong_setting(at, &name, text))?;
    }
    Ok(())
}

/// Reads the start of the configuration section: the machine's name. Settings follow, to be read one by one.
pub fn read_machine(input: &mut dyn Input) -> Result<String> {
    const NAME_MAX: u64 = 255;
    let at = input.position();
    let kind = input.u8()?;
    if kind != CONFIGURATION {
        return Err(Error::invalid(format!("byte {at:#x}: configuration section missing"))
            .at_byte(at)
            .expected_got(format!("{CONFIGURATION:#04x}"), format!("{kind:#04x}")));
    }
    let len = u64::from(input.u32()?);
    let name = input.blob("the machine name", len, NAME_MAX)?;
    Ok(String::from_utf8_lossy(&name).into_owned())
}

/// Reads the next setting with its place and name, if there is one more.
pub fn read_setting(input: &mut dyn Input) -> Result<Option<(u64, String, Setting)>> {
    const CAPABILITIES_MAX: u32 = 64;
    if input.peek(1)?[0] != SUBSECTION {
        return Ok(None);
    }
    let at = input.position();
    input.u8()?;
    let name = input.counted_string()?;
    let version = input.u32()?;
    if version != 1 {
        return Err(wrong_setting(at, &name, format!("unsupported version {version} of the configuration")));
    }
    let setting = match name.as_str() {
        "configuration/target-page-bits" => Setting::PageBits(input.u32()?),
        "configuration/capabilities" => {
            let count = input.u32()?;
            if count > CAPABILITIES_MAX {
                let text = format!("{count} capabilities, more than the limit of {CAPABILITIES_MAX}");
                return Err(wrong_setting(at, &name, text));
            }
            Setting::Capabilities((0..count).map(|_| input.counted_string()).collect::<Result<_>>()?)
        }
        "configuration/uuid" => {
            let mut uuid = [0; 16];
            input.read(&mut uuid)?;
            Setting::Uuid(uuid)
        }
        _ => return Err(wrong_setting(at, &name, "unknown part of the configuration".to_owned())),
    };
    Ok(Some((at, name, setting)))
}

fn wrong_setting(at: u64, name: &str, text: String) -> Error {
    Error::invalid(format!("byte {at:#x}: {text}")).at_byte(at).in_section(name)
}

/// Whether a destination of ours can take it; if not, why.
fn check_setting(setting: &Setting) -> std::result::Result<(), String> {
    match setting {
        // This side has no uuid to compare with; QEMU only warns in that case.
        Setting::PageBits(12) | Setting::Uuid(_) => Ok(()),
        Setting::PageBits(bits) => Err(format!("the source's pages have 2^{bits} bytes, ours 2^12")),
        Setting::Capabilities(names) => {
            match names.iter().find(|name| [IGNORE_SHARED, MAPPED_RAM].contains(&name.as_str())) {
                None => Ok(()),
                Some(name) => Err(format!("capability {name} is on at the source, but not supported here")),
            }
        }
    }
}

/// Reads the next element.
pub fn read_element(input: &mut dyn Input) -> Result<Element> {
    read_element_with(input, super::command::read)
}

/// Reads the next element, with a reader of commands.
pub fn read_element_with<C>(input: &mut dyn Input, command: fn(&mut dyn Input) -> Result<C>) -> Result<Element<C>> {
    let at = input.position();
    Ok(match input.u8()? {
        EOF => Element::Eof,
        START => Element::Start(input.u32()?, read_name(input)?),
        PART => Element::Part(input.u32()?),
        END => Element::End(input.u32()?),
        FULL => Element::Full(input.u32()?, read_name(input)?),
        COMMAND => Element::Command(command(input)?),
        kind => return Err(Error::invalid(format!("byte {at:#x}: unknown section type {kind:#04x}")).at_byte(at)),
    })
}

fn read_name(input: &mut dyn Input) -> Result<SectionName> {
    Ok(SectionName { name: input.counted_string()?, instance: input.u32()?, version: input.u32()? })
}

/// Reads the head of a part of a device's body: its name and version.
pub fn read_subsection(input: &mut dyn Input) -> Result<(String, u32)> {
    let at = input.position();
    let kind = input.u8()?;
    if kind != SUBSECTION {
        return Err(Error::invalid(format!("byte {at:#x}: a part of the device is missing"))
            .at_byte(at)
            .expected_got(format!("{SUBSECTION:#04x}"), format!("{kind:#04x}")));
    }
    Ok((input.counted_string()?, input.u32()?))
}

/// Reads a section's footer: a body that was read too short or too long is noticed here.
pub fn read_footer(input: &mut dyn Input, id: u32, name: &str) -> Result<()> {
    let at = input.position();
    let kind = input.u8()?;
    if kind != FOOTER {
        let text =
            format!("byte {at:#x}: the section's footer is missing; the two sides disagree about its contents");
        return Err(Error::invalid(text)
            .at_byte(at)
            .in_section(name)
            .expected_got(format!("{FOOTER:#04x}"), format!("{kind:#04x}")));
    }
    let got = input.u32()?;
    if got != id {
        return Err(Error::invalid(format!("byte {at:#x}: the footer is another section's"))
            .at_byte(at)
            .in_section(name)
            .expected_got(format!("id {id}"), format!("id {got}")));
    }
    Ok(())
}

/// Reads the description that follows EOF.
pub fn read_description(input: &mut dyn Input) -> Result<Vec<u8>> {
    let at = input.position();
    let kind = input.u8()?;
    if kind != DESCRIPTION {
        return Err(Error::invalid(format!("byte {at:#x}: the stream's description is missing"))
            .at_byte(at)
            .expected_got(format!("{DESCRIPTION:#04x}"), format!("{kind:#04x}")));
    }
    let len = u64::from(input.u32()?);
    input.blob("the stream's description", len, DESCRIPTION_MAX)
}

/// Begins a START or FULL section.
fn put_named(out: &mut Vec<u8>, kind: u8, id: u32, section: &SectionName) -> Result<()> {
    out.u8(kind);
    out.u32(id);
    out.counted_string(&section.name)?;
    out.u32(section.instance);
    out.u32(section.version);
    Ok(())
}

/// Begins a START section.
pub fn put_start(out: &mut Vec<u8>, id: u32, section: &SectionName) -> Result<()> {
    put_named(out, START, id, section)
}

/// Begins a FULL section.
pub fn put_full(out: &mut Vec<u8>, id: u32, section: &SectionName) -> Result<()> {
    put_named(out, FULL, id, section)
}

/// Begins a PART section.
pub fn put_part(out: &mut Vec<u8>, id: u32) {
    out.u8(PART);
    out.u32(id);
}

/// Begins an END section.
pub fn put_end(out: &mut Vec<u8>, id: u32) {
    out.u8(END);
    out.u32(id);
}

/// Ends a section's body.
pub fn put_footer(out: &mut Vec<u8>, id: u32) {
    out.u8(FOOTER);
    out.u32(id);
}

/// Writes a command.
pub fn put_command(out: &mut Vec<u8>, command: Command) {
    out.u8(COMMAND);
    super::command::put(out, command);
}

/// Writes EOF and the description.
pub fn put_end_of_stream(out: &mut Vec<u8>, description: &[u8]) -> Result<()> {
    let len = u32::try_from(description.len()).map_err(|_| Error::invalid("the description is too long"))?;
    out.u8(EOF);
    out.u8(DESCRIPTION);
    out.u32(len);
    out.bytes(description);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::input::Slice;
    use super::*;

    #[test]
    fn header_and_configuration() {
        let mut out = Vec::new();
        put_header(&mut out, "none").unwrap();
        assert_eq!(out, b"QEVM\0\0\0\x03\x07\0\0\0\x04none");
        out.push(EOF);
        let mut input = Slice::new(&out);
        read_header(&mut input).unwrap();
        read_configuration(&mut input, "none").unwrap();
        assert_eq!(read_element(&mut input).unwrap(), Element::Eof);
    }

    #[test]
    fn wrong_words_are_named() {
        let error = read_header(&mut Slice::new(b"HTTP/1.1")).unwrap_err();
        assert_eq!(
            error.to_string(),
            "byte 0x0: this is not a migration stream (expected magic 0x5145564d, got 0x48545450)"
        );
        let error = read_header(&mut Slice::new(b"QEVM\0\0\0\x02")).unwrap_err();
        assert_eq!(error.errno(), libc::ENOTSUP);
        let error = read_configuration(&mut Slice::new(b"\x07\0\0\0\x02pc\0"), "none").unwrap_err();
        assert!(error.to_string().ends_with("(expected 'none', got 'pc')"), "{error}");
        let error = read_configuration(&mut Slice::new(b"\x07\xff\xff\xff\xff"), "none").unwrap_err();
        assert!(error.to_string().contains("longer than its limit"), "{error}");
        let error = read_element(&mut Slice::new(b"\x42")).unwrap_err();
        assert_eq!(error.to_string(), "byte 0x0: unknown section type 0x42");
    }

    #[test]
    fn capabilities_we_lack_are_refused() {
        let part = |name: &str| {
            let mut out = b"\x07\0\0\0\x04none".to_vec();
            out.u8(SUBSECTION);
            out.counted_string("configuration/capabilities").unwrap();
            out.u32(1);
            out.u32(1);
            out.counted_string(name).unwrap();
            out.u8(EOF);
            read_configuration(&mut Slice::new(&out), "none")
        };
        part("events").unwrap();
        let error = part("mapped-ram").unwrap_err();
        assert!(error.to_string().contains("capability mapped-ram is on"), "{error}");
    }

    #[test]
    fn sections_and_footers_round_trip() {
        let name = SectionName { name: "uart".into(), instance: 7, version: 3 };
        let mut out = Vec::new();
        put_start(&mut out, 9, &name).unwrap();
        put_footer(&mut out, 9);
        put_part(&mut out, 9);
        put_footer(&mut out, 8);
        let mut input = Slice::new(&out);
        assert_eq!(read_element(&mut input).unwrap(), Element::Start(9, name));
        read_footer(&mut input, 9, "uart").unwrap();
        assert_eq!(read_element(&mut input).unwrap(), Element::Part(9));
        let error = read_footer(&mut input, 9, "uart").unwrap_err();
        assert!(error.to_string().contains("section 'uart'") && error.to_string().contains("got id 8"), "{error}");
    }

    #[test]
    fn truncation_is_an_error_at_every_byte() {
        let mut out = Vec::new();
        put_full(&mut out, 9, &SectionName { name: "uart".into(), instance: 7, version: 3 }).unwrap();
        for len in 0..out.len() {
            let error = read_element(&mut Slice::new(&out[..len])).unwrap_err();
            assert_eq!(error.errno(), libc::EIO, "{len}: {error}");
        }
    }
}
