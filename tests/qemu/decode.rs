//! An independent reader of the stream, written from the format's description and not from the library: walks frame,
//! RAM records and device sections, the latter by nothing but the JSON at the end. Panics at whatever is not right.

use std::collections::BTreeMap;

use serde_json::Value;

const PAGE: usize = 4096;
const MEM_SIZE: u64 = 4;

/// A device section: its fields by name ("outer.inner[2]"), as they are in the stream.
#[derive(Debug)]
pub struct Device {
    pub name: String,
    pub instance: u32,
    pub version: u32,
    pub fields: Vec<(String, Vec<u8>)>,
    /// Bytes of the body, walked to the last.
    pub bytes: usize,
}

impl Device {
    /// The bytes of a field.
    pub fn field(&self, name: &str) -> &[u8] {
        let found = self.fields.iter().find(|(n, _)| n == name);
        &found.unwrap_or_else(|| panic!("no field {name} in {:?}", self.fields)).1
    }

    /// A field of eight bytes.
    pub fn u64(&self, name: &str) -> u64 {
        u64::from_be_bytes(self.field(name).try_into().unwrap())
    }
}

/// All of a stream.
#[derive(Debug, Default)]
pub struct Decoded {
    pub machine: String,
    pub blocks: BTreeMap<String, Vec<u8>>,
    pub devices: Vec<Device>,
    /// Numbers of the commands, in order.
    pub commands: Vec<u16>,
    /// Types of the sections of RAM, in order.
    pub ram_sections: Vec<u8>,
    /// Pages sent whole, and as zero.
    pub pages: (usize, usize),
    pub description: Value,
}

impl Decoded {
    pub fn device(&self, name: &str) -> &Device {
        self.devices.iter().find(|d| d.name == name).unwrap_or_else(|| panic!("no section {name}"))
    }
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> &'a [u8] {
        let got = self.bytes.get(self.at..self.at + n);
        self.at += n;
        got.unwrap_or_else(|| panic!("the stream ends before byte {:#x}", self.at))
    }

    fn u8(&mut self) -> u8 {
        self.take(1)[0]
    }

    fn u16(&mut self) -> u16 {
        u16::from_be_bytes(self.take(2).try_into().unwrap())
    }

    fn u32(&mut self) -> u32 {
        u32::from_be_bytes(self.take(4).try_into().unwrap())
    }

    fn u64(&mut self) -> u64 {
        u64::from_be_bytes(self.take(8).try_into().unwrap())
    }

    fn text(&mut self, n: usize) -> String {
        String::from_utf8(self.take(n).to_vec()).unwrap()
    }

    fn counted(&mut self) -> String {
        let n = self.u8();
        self.text(n.into())
    }
}

/// Reads a whole stream.
pub fn decode(bytes: &[u8]) -> Decoded {
    let mut input = Reader { bytes, at: 0 };
    let mut out = Decoded { description: description(bytes), ..Decoded::default() };
    assert_eq!((input.take(4), input.u32()), (&b"QEVM"[..], 3), "magic and version");
    assert_eq!(input.u8(), 7, "configuration");
    let len = input.u32();
    out.machine = input.text(usize::try_from(len).unwrap());
    let mut ids = BTreeMap::new();
    let mut last = None;
    loop {
        let at = input.at;
        match input.u8() {
            0 => break,
            8 => {
                out.commands.push(input.u16());
                let len = input.u16();
                input.take(len.into());
            }
            kind @ 1..=4 => {
                let id = input.u32();
                if matches!(kind, 1 | 4) {
                    ids.insert(id, (input.counted(), input.u32(), input.u32()));
                }
                let section = ids.get(&id).unwrap_or_else(|| panic!("byte {at:#x}: section {id} was not begun"));
                if section.0 == "ram" {
                    assert_eq!((section.1, section.2), (0, 4), "instance and version of ram");
                    out.ram_sections.push(kind);
                    ram(&mut input, &mut out, &mut last);
                } else {
                    assert_eq!(kind, 4, "byte {at:#x}: an iterative section '{}'", section.0);
                    let device = device(&mut input, &out.description, section);
                    out.devices.push(device);
                }
                assert_eq!((input.u8(), input.u32()), (0x7e, id), "footer of {section:?}");
            }
            kind => panic!("byte {at:#x}: type {kind:#x}"),
        }
    }
    assert_eq!(input.u8(), 6, "description");
    let len = input.u32();
    input.take(usize::try_from(len).unwrap());
    assert_eq!(input.at, bytes.len(), "bytes behind the description");
    out
}

/// The JSON at the end, found from the end: the walk needs it before it gets there.
fn description(bytes: &[u8]) -> Value {
    let fits = |at: &usize| {
        let (head, json) = bytes[*at..].split_at(5);
        let len = usize::try_from(u32::from_be_bytes(head[1..].try_into().unwrap())).unwrap();
        head[0] == 6 && len == json.len() && json[0] == b'{'
    };
    let at = (0..bytes.len().saturating_sub(6)).rev().find(fits).expect("no description");
    serde_json::from_slice(&bytes[at + 5..]).unwrap()
}

fn ram(input: &mut Reader<'_>, out: &mut Decoded, last: &mut Option<String>) {
    loop {
        let at = input.at;
        let word = input.u64();
        let (offset, flags) = (word & !0xfff, word & 0xfff);
        match flags & !0x20 {
            MEM_SIZE => {
                let mut left = offset;
                while left > 0 {
                    let (name, len) = (input.counted(), input.u64());
                    left -= len;
                    out.blocks.insert(name, vec![0xee; usize::try_from(len).unwrap()]);
                }
            }
            0x10 => return,
            kind @ (2 | 8) => {
                if flags & 0x20 == 0 {
                    *last = Some(input.counted());
                }
                let block = out.blocks.get_mut(last.as_ref().expect("a block")).expect("a known block");
                let start = usize::try_from(offset).unwrap();
                let page = &mut block[start..start + PAGE];
                if kind == 2 {
                    assert_eq!(input.u8(), 0, "byte {at:#x}: fill");
                    page.fill(0);
                    out.pages.1 += 1;
                } else {
                    page.copy_from_slice(input.take(PAGE));
                    out.pages.0 += 1;
                }
            }
            _ => panic!("byte {at:#x}: flags {flags:#x}"),
        }
    }
}

fn device(input: &mut Reader<'_>, json: &Value, section: &(String, u32, u32)) -> Device {
    let (name, instance, version) = section.clone();
    let mine = |d: &&Value| d["name"] == *name && d["instance_id"] == instance;
    let described = json["devices"].as_array().unwrap().iter().find(mine);
    let described = described.unwrap_or_else(|| panic!("'{name}' is not described"));
    assert_eq!(described["version"], version, "version of '{name}'");
    let mut device = Device { name, instance, version, fields: Vec::new(), bytes: 0 };
    let start = input.at;
    walk(input, described, "", &mut device.fields);
    device.bytes = input.at - start;
    device
}

/// Fields of one struct, then its subsections.
fn walk(input: &mut Reader<'_>, described: &Value, prefix: &str, out: &mut Vec<(String, Vec<u8>)>) {
    for field in described["fields"].as_array().into_iter().flatten() {
        let name = format!("{prefix}{}", field["name"].as_str().unwrap());
        let count = field["array_len"].as_u64().unwrap_or(1);
        for n in 0..count {
            let name = if count == 1 { name.clone() } else { format!("{name}[{n}]") };
            if field["struct"].is_object() {
                walk(input, &field["struct"], &format!("{name}."), out);
            } else {
                let size = usize::try_from(field["size"].as_u64().unwrap()).unwrap();
                out.push((name, input.take(size).to_vec()));
            }
        }
    }
    for part in described["subsections"].as_array().into_iter().flatten() {
        let name = part["vmsd_name"].as_str().unwrap();
        assert_eq!((input.u8(), input.counted().as_str()), (5, name), "subsection");
        assert_eq!(part["version"], input.u32(), "version of {name}");
        walk(input, part, &format!("{prefix}{name}."), out);
    }
}
