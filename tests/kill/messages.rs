//! Where one message ends and the next begins, in either direction and on every kind of connection (docs/stream.md).
//! What it does not understand is raw: then whatever was read at once counts as a message.

use std::collections::HashMap;

/// From source to destination, or back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Way {
    There,
    Back,
}

/// How far a migration is, as the stream tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Phase {
    /// The guest runs.
    Precopy,
    /// From SWITCHOVER_START on: the last pages.
    LastPages,
    /// From the first device on, to the end.
    Devices,
}

/// A whole message at the start of what was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Message {
    pub(crate) len: usize,
    /// It begins this phase.
    pub(crate) begins: Option<Phase>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Mode {
    First,
    Hints(usize),
    Elements,
    /// Inside a section of this name.
    Body(String),
    Footer,
    LastByte,
    Channel,
    Replies,
    Raw,
}

/// Cuts one direction of one connection into messages.
#[derive(Debug)]
pub(crate) struct Splitter {
    way: Way,
    mode: Mode,
    names: HashMap<u32, String>,
    /// Bytes of bodies without a length of their own.
    bodies: &'static [(&'static str, usize)],
}

/// Reads numbers off the front; none when there is not enough yet.
struct Front<'a>(&'a [u8], usize);

impl<'a> Front<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let found = self.0.get(self.1..self.1.checked_add(len)?)?;
        self.1 += len;
        Some(found)
    }

    fn number(&mut self, len: usize) -> Option<usize> {
        Some(self.take(len)?.iter().fold(0, |n, b| n << 8 | usize::from(*b)))
    }

    fn name(&mut self) -> Option<String> {
        let len = self.number(1)?;
        Some(String::from_utf8_lossy(self.take(len)?).into_owned())
    }
}

const CHANNEL_INIT: usize = 64;
const PACKET: usize = 1344;
const QUESTION: usize = 40;
const KNOCK: usize = 32;
const GRANULE: u64 = 2 << 20;

impl Splitter {
    pub(crate) fn new(way: Way, bodies: &'static [(&'static str, usize)]) -> Splitter {
        Splitter { way, mode: Mode::First, names: HashMap::new(), bodies }
    }

    /// Whether it has lost its way.
    pub(crate) fn is_raw(&self) -> bool {
        self.mode == Mode::Raw
    }

    /// The next whole message at the front of `bytes`, which are not empty.
    pub(crate) fn next(&mut self, bytes: &[u8]) -> Option<Message> {
        let mut front = Front(bytes, 0);
        let begins = self.step(&mut front)?;
        if self.is_raw() {
            return Some(Message { len: bytes.len(), begins: None });
        }
        Some(Message { len: front.1, begins })
    }

    /// Moves behind one message; none: it is not whole yet.
    fn step(&mut self, front: &mut Front<'_>) -> Option<Option<Phase>> {
        match self.mode.clone() {
            Mode::First => self.first(front).map(|()| None),
            Mode::Hints(len) => {
                front.take(len)?;
                self.mode = Mode::Elements;
                Some(None)
            }
            Mode::Elements => self.element(front),
            Mode::Body(name) => self.body(&name, front).map(|()| None),
            Mode::Footer => {
                front.take(5)?;
                self.mode = Mode::Elements;
                Some(None)
            }
            Mode::LastByte => {
                front.take(1)?;
                self.mode = Mode::Elements;
                Some(None)
            }
            Mode::Channel => {
                let header = front.take(PACKET)?;
                let mut size = Front(header, 20);
                let len = size.number(4)?;
                if header[..4] != MAGIC_CHANNEL {
                    self.mode = Mode::Raw;
                    return Some(None);
                }
                front.take(len)?;
                Some(None)
            }
            Mode::Replies => {
                let number = front.number(2)?;
                let len = front.number(2)?;
                front.take(len)?;
                if number == 0x5600 && len == 0 {
                    let len = front.number(8)?;
                    front.take(len)?;
                }
                Some(None)
            }
            Mode::Raw => Some(None),
        }
    }

    fn first(&mut self, front: &mut Front<'_>) -> Option<()> {
        let magic = Front(front.0, 0).take(4)?;
        if magic == b"VMIG" {
            front.take(8)?;
            let len = front.number(4)?;
            let json: serde_json::Value = serde_json::from_slice(front.take(len)?).unwrap_or_default();
            self.mode = match (self.way, hints(&json)) {
                (Way::Back, _) => Mode::Replies,
                (Way::There, 0) => Mode::Elements,
                (Way::There, len) => Mode::Hints(len),
            };
        } else if self.way == Way::Back {
            self.mode = Mode::Replies;
            self.step(front)?;
        } else if magic == MAGIC_CHANNEL {
            front.take(CHANNEL_INIT)?;
            self.mode = Mode::Channel;
        } else if magic == b"VRES" {
            front.take(KNOCK)?; // the hello comes next
        } else if magic == b"VASK" {
            front.take(QUESTION)?; // all there is on a connection of its own
        } else if magic == b"QEVM" {
            self.mode = Mode::Elements;
            self.element(front)?;
        } else {
            self.mode = Mode::Raw;
        }
        Some(())
    }

    fn element(&mut self, front: &mut Front<'_>) -> Option<Option<Phase>> {
        let kind = front.number(1)?;
        match kind {
            0x51 => front.take(7).map(|_| None), // the rest of QEVM and its version
            0 => Some(None),
            1 | 4 => {
                let id = u32::try_from(front.number(4)?).unwrap();
                let name = front.name()?;
                front.take(8)?;
                self.names.insert(id, name.clone());
                self.mode = Mode::Body(name);
                Some((kind == 4).then_some(Phase::Devices))
            }
            2 | 3 => {
                let id = u32::try_from(front.number(4)?).unwrap();
                self.mode = self.names.get(&id).map_or(Mode::Raw, |name| Mode::Body(name.clone()));
                Some(None)
            }
            6 => {
                let len = front.number(4)?;
                // The last byte is the handover and goes alone.
                front.take(len.checked_sub(1)?)?;
                self.mode = Mode::LastByte;
                Some(None)
            }
            7 => {
                let len = front.number(4)?;
                front.take(len).map(|_| None)
            }
            8 => {
                let number = front.number(2)?;
                let len = front.number(2)?;
                front.take(len)?;
                match number {
                    ERROR => drop(front.number(8).and_then(|len| front.take(len))?),
                    HASHES => hashes(front)?,
                    _ => (),
                }
                Some((number == 11).then_some(Phase::LastPages))
            }
            _ => {
                self.mode = Mode::Raw;
                Some(None)
            }
        }
    }

    fn body(&mut self, name: &str, front: &mut Front<'_>) -> Option<()> {
        if name == "ram" {
            return self.record(front);
        }
        match self.bodies.iter().find(|(known, _)| *known == name) {
            // 0: the body says itself how long it is.
            Some((_, 0)) => {
                let len = front.number(4)?;
                front.take(len)?;
            }
            Some((_, len)) => drop(front.take(*len)?),
            None => {
                self.mode = Mode::Raw;
                return Some(());
            }
        }
        self.mode = Mode::Footer;
        Some(())
    }

    fn record(&mut self, front: &mut Front<'_>) -> Option<()> {
        let word = front.number(8)?;
        let flags = word & 0xfff;
        match flags & !0x20 {
            0x10 => self.mode = Mode::Footer,
            0x200 => (),
            0x04 => {
                let mut left = word & !0xfff;
                while left > 0 {
                    front.name()?;
                    left = left.checked_sub(front.number(8)?)?;
                }
            }
            kind @ (0x02 | 0x08 | 0x400) => {
                if flags & 0x20 == 0 {
                    front.name()?;
                }
                front.take(match kind {
                    0x02 => 1,
                    0x08 => 4096,
                    _ => 8,
                })?;
            }
            _ => self.mode = Mode::Raw,
        }
        Some(())
    }
}

const MAGIC_CHANNEL: [u8; 4] = [0x11, 0x22, 0x33, 0x44];

/// Commands of ours with more behind them than their length says.
const ERROR: usize = 0x5600;
const HASHES: usize = 0x5621;

/// Of each block's granules, and of the sections.
fn hashes(front: &mut Front<'_>) -> Option<()> {
    for _ in 0..front.number(4)? {
        front.name()?;
        let granules = front.number(4)?;
        front.take(granules * 8)?;
    }
    let sections = front.number(4)?;
    front.take(sections * 12).map(drop)
}

/// Bytes of the hints that follow a welcome.
fn hints(hello: &serde_json::Value) -> usize {
    if hello["hints"] != true {
        return 0;
    }
    let lengths = hello["ram"].as_array().into_iter().flatten().filter_map(|block| block["length"].as_u64());
    lengths.map(|len| usize::try_from(len.div_ceil(GRANULE)).unwrap()).sum()
}
