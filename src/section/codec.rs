//! Device tables to bytes and back: saving, and taking a body from a stream.
//!
//! A body is taken in two steps. [`parse`] checks every byte against the table without touching the device; what it
//! returns, a [`Staged`] body, is then applied to the device or described, and cannot fail for lack of bytes.
#![allow(unsafe_code, reason = "device state lives behind the pointers a VMM registered")]

use std::collections::VecDeque;
use std::os::fd::OwnedFd;

use super::fds::{Inbox, Outbox};
use super::memory::{copy_in, int_at, pointer_at};
use super::staged::Staged;
use super::table::{Checked, Count, Field, Kind, Table};
use crate::error::{Error, Result};
use crate::wire::input::{Input, Slice};
use crate::wire::output::Put;

/// Type byte in front of a part (subsection).
pub(super) const PART_MARK: u8 = 5;
/// Fields of a body that can be told by name in a test of the device.
const MARKS_MAX: usize = 65536;

/// Appends the body of the device at `base` to `out`; on failure `out` is as it was. \[bql\]
///
/// # Safety
/// The memory at `base` has the shape the table describes (pointers included: each is NULL or leads to as many
/// elements as the table says) and nobody else writes it during the call.
pub unsafe fn save(table: &Checked, base: *mut u8, out: &mut Vec<u8>) -> Result<()> {
    let (mut fds, start) = (Outbox::default(), out.len());
    // SAFETY: the caller vouches for the memory at `base`.
    unsafe { save_with_fds(table, base, out, &mut fds) }?;
    if !fds.is_empty() {
        out.truncate(start);
        return Err(Error::new(libc::EPROTO, "file descriptors cannot travel here").in_section(&table.name));
    }
    Ok(())
}

/// The same, with the descriptors it names into `fds`. \[bql\]
///
/// # Safety
/// As for [`save`].
pub unsafe fn save_with_fds(table: &Checked, base: *mut u8, out: &mut Vec<u8>, fds: &mut Outbox) -> Result<()> {
    let start = out.len();
    let mut saver = Saver { out, fds, path: Path::default(), seams: Vec::new() };
    // SAFETY: the caller vouches for the memory at `base`.
    let saved = unsafe { saver.table(table, base) }.and_then(|()| saver.seams_hold());
    if saved.is_err() {
        out.truncate(start);
    }
    saved.map_err(|e| e.in_section(&table.name))
}

/// Takes a body of `version` from `input` and checks it against the table, without touching the device.
pub fn parse<'t>(table: &'t Checked, version: u32, input: &mut dyn Input) -> Result<Staged<'t>> {
    parse_with_fds(table, version, input, None)
}

/// The same, with the descriptors it names from `fds`; without, they are only numbers.
pub fn parse_with_fds<'t>(
    table: &'t Checked,
    version: u32,
    input: &mut dyn Input,
    fds: Option<&Inbox>,
) -> Result<Staged<'t>> {
    let (path, bytes, script) = (Path::default(), Vec::new(), Vec::new());
    let mut parser = Parser { input, inbox: fds, path, bytes, script, fds: VecDeque::new(), marks: None };
    parser.table(table, version, false).map_err(|e| e.in_section(&table.name))?;
    Ok(Staged { table, version, bytes: parser.bytes, script: parser.script, fds: parser.fds })
}

/// Where a field begins in a body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mark {
    /// Bytes before it.
    pub at: u64,
    /// The field, or the part whose header this is.
    pub name: String,
    /// File descriptors.
    pub fd: bool,
    /// Bytes without a meaning.
    pub unused: bool,
}

/// Where the fields are in `body`, which was saved with the table; of very many the first.
pub fn marks(table: &Checked, body: &[u8]) -> Result<Vec<Mark>> {
    let (path, bytes, script) = (Path::default(), Vec::new(), Vec::new());
    let (input, marks) = (&mut Slice::new(body), Some(Vec::new()));
    let mut parser = Parser { input, inbox: None, path, bytes, script, fds: VecDeque::new(), marks };
    parser.table(table, table.version, false)?;
    Ok(parser.marks.unwrap_or_default())
}

/// Where the walk is, for errors: the structs around the current field.
#[derive(Default)]
pub(super) struct Path<'t>(Vec<(&'t Field, u32)>);

impl<'t> Path<'t> {
    pub(super) fn enter(&mut self, field: &'t Field, element: u32) {
        self.0.push((field, element));
    }

    pub(super) fn leave(&mut self) {
        self.0.pop();
    }

    /// Names `field` and the structs around it in `error`.
    pub(super) fn blame(&self, error: Error, field: &Field) -> Error {
        error.in_field(self.name(field))
    }

    fn name(&self, field: &Field) -> String {
        let mut path = String::new();
        for (outer, element) in &self.0 {
            path.push_str(&outer.name);
            if !matches!(outer.count, Count::One) {
                path.push_str(&format!("[{element}]"));
            }
            path.push('.');
        }
        path + &field.name
    }
}

/// How many elements `field` has, from bytes in wire order in which the table's fields so far begin at `starts`.
fn elements(table: &Table, field: &Field, starts: &[usize], bytes: &[u8]) -> Result<u32> {
    let Count::Field { index, max } = field.count else {
        return Ok(field.count.max());
    };
    let count = &table.fields[index];
    let (width, signed) = match count.kind {
        Kind::Signed(n) => (n, true),
        ref other => (other.memory_size(), false),
    };
    let mut wide = [0; 8];
    wide[8 - width..].copy_from_slice(&bytes[starts[index]..][..width]);
    let value = u64::from_be_bytes(wide);
    let negative = signed && bytes[starts[index]] & 0x80 != 0;
    match u32::try_from(value) {
        Ok(value) if value <= max && !negative => Ok(value),
        _ => {
            let sign = if negative { "a negative number".to_owned() } else { value.to_string() };
            Err(Error::invalid(format!("'{}' says how many elements there are, and is out of range", count.name))
                .expected_got(format!("0 to {max}"), sign))
        }
    }
}

fn bools_hold(kind: &Kind, bytes: &[u8]) -> Result<()> {
    match bytes.iter().find(|b| matches!(kind, Kind::Bool) && **b > 1) {
        Some(other) => Err(Error::invalid("a bool is neither false nor true").expected_got("0 or 1", other)),
        None => Ok(()),
    }
}

/// Turns integers from memory order into wire order, or back.
pub(super) fn swap(kind: &Kind, bytes: &mut [u8]) {
    let width = kind.swap_width();
    if cfg!(target_endian = "little") && width > 1 {
        bytes.chunks_exact_mut(width).for_each(<[u8]>::reverse);
    }
}

/// Where the elements of `field` are. NULL is fine only if there are none.
///
/// # Safety
/// `base` is as for [`save`].
pub(super) unsafe fn place(field: &Field, base: *mut u8, count: u32) -> Result<*mut u8> {
    let at = base.wrapping_add(field.offset);
    if !field.pointer {
        return Ok(at);
    }
    // SAFETY: a checked table's offsets lie within the memory the caller vouches for.
    let target = unsafe { pointer_at(at) };
    if target.is_null() && count > 0 {
        return Err(Error::new(libc::EFAULT, format!("the pointer is NULL where {count} elements should be")));
    }
    Ok(target)
}

struct Saver<'o, 't> {
    out: &'o mut Vec<u8>,
    fds: &'o mut Outbox,
    path: Path<'t>,
    /// Ends of nested structs that may have parts: a reader looks for a part there.
    seams: Vec<(usize, &'t Table)>,
}

impl<'t> Saver<'_, 't> {
    /// # Safety
    /// `base` is as for [`save`].
    unsafe fn table(&mut self, table: &'t Table, base: *mut u8) -> Result<()> {
        let Some(hooks) = table.hooks.as_deref() else {
            // SAFETY: the caller vouches for the memory at `base`.
            return unsafe { self.body(table, base) };
        };
        hooks.pre_save(base)?;
        // SAFETY: the caller vouches for the memory at `base`.
        let saved = unsafe { self.body(table, base) };
        let after = hooks.post_save(base);
        saved.and(after)
    }

    /// # Safety
    /// `base` is as for [`save`].
    unsafe fn body(&mut self, table: &'t Table, base: *mut u8) -> Result<()> {
        let mut starts = Vec::with_capacity(table.fields.len());
        for field in &table.fields {
            starts.push(self.out.len());
            let count = elements(table, field, &starts, self.out).map_err(|e| self.path.blame(e, field))?;
            // SAFETY: the caller vouches for the memory at `base`.
            unsafe { self.field(field, base, count) }?;
        }
        for part in &table.parts {
            // SAFETY: the caller vouches for the memory at `base`.
            unsafe { self.part(part, base) }.map_err(|e| e.in_section(&part.name))?;
        }
        Ok(())
    }

    /// # Safety
    /// `base` is as for [`save`], and `count` is what the table says there.
    unsafe fn field(&mut self, field: &'t Field, base: *mut u8, count: u32) -> Result<()> {
        // SAFETY: the caller vouches for the memory at `base`.
        let at = unsafe { place(field, base, count) }.map_err(|e| self.path.blame(e, field))?;
        match &field.kind {
            Kind::Struct(inner, stride) => {
                for element in 0..count {
                    self.path.enter(field, element);
                    // SAFETY: elements lie back to back within the memory the caller vouches for.
                    unsafe { self.table(inner, at.wrapping_add(element as usize * stride)) }?;
                    self.path.leave();
                    if !inner.parts.is_empty() {
                        self.seams.push((self.out.len(), inner));
                    }
                }
                Ok(())
            }
            Kind::Unused(len) => {
                self.out.try_reserve(*len).map_err(|_| Error::no_memory(&field.name, *len as u64))?;
                self.out.resize(self.out.len() + len, 0);
                Ok(())
            }
            Kind::Fd => {
                self.out.try_reserve(count as usize * 4).map_err(|_| Error::no_memory(&field.name, 4))?;
                for element in 0..count as usize {
                    // SAFETY: elements lie back to back within the memory the caller vouches for.
                    let fd = unsafe { int_at(at.wrapping_add(element * field.kind.memory_size())) };
                    let number = self.fds.add(fd).map_err(|e| self.path.blame(e, field))?;
                    self.out.u32(number);
                }
                Ok(())
            }
            kind => {
                let start = self.out.len();
                // SAFETY: the table says that this many elements are there, and the caller vouches for it.
                unsafe { copy_in(at, count as usize * kind.memory_size(), self.out) }?;
                swap(kind, &mut self.out[start..]);
                bools_hold(kind, &self.out[start..]).map_err(|e| self.path.blame(e, field))
            }
        }
    }

    /// # Safety
    /// `base` is as for [`save`].
    unsafe fn part(&mut self, part: &'t Table, base: *mut u8) -> Result<()> {
        if let Some(hooks) = &part.hooks
            && !hooks.needed(base)?
        {
            return Ok(());
        }
        self.out.u8(PART_MARK);
        self.out.counted_string(&part.name)?;
        self.out.u32(part.version);
        // SAFETY: the caller vouches for the memory at `base`.
        unsafe { self.table(part, base) }
    }

    /// Bytes after a nested struct must not look like a part of it: no reader could tell them apart.
    fn seams_hold(&self) -> Result<()> {
        for (at, inner) in &self.seams {
            let prefix = format!("{}/", inner.name);
            let looks = match &self.out[*at..] {
                [PART_MARK, len, rest @ ..] => {
                    usize::from(*len) >= prefix.len() && rest.starts_with(prefix.as_bytes())
                }
                _ => false,
            };
            if looks {
                return Err(Error::invalid(format!(
                    "the bytes after struct '{}' look like a part of it; put a struct that has parts last",
                    inner.name
                )));
            }
        }
        Ok(())
    }
}

struct Parser<'i, 't> {
    input: &'i mut dyn Input,
    inbox: Option<&'i Inbox>,
    fds: VecDeque<Option<OwnedFd>>,
    path: Path<'t>,
    bytes: Vec<u8>,
    script: Vec<u32>,
    /// Where fields begin, if that is wanted.
    marks: Option<Vec<Mark>>,
}

impl<'t> Parser<'_, 't> {
    fn table(&mut self, table: &'t Table, version: u32, nested: bool) -> Result<()> {
        version_fits(&table.name, version, table.version, table.oldest)?;
        let mut starts = Vec::with_capacity(table.fields.len());
        for field in &table.fields {
            starts.push(self.bytes.len());
            if field.since > version {
                continue;
            }
            let count = elements(table, field, &starts, &self.bytes).map_err(|e| self.path.blame(e, field))?;
            if matches!(field.count, Count::Field { .. }) {
                self.push(count)?;
            }
            self.field(field, count)?;
        }
        // Nothing marks the end of a nested struct, so what follows it is looked at only if it can have parts.
        if nested && table.parts.is_empty() { Ok(()) } else { self.parts(table) }
    }

    fn field(&mut self, field: &'t Field, count: u32) -> Result<()> {
        let start = self.bytes.len();
        if self.marks.is_some() && !matches!(field.kind, Kind::Struct(..)) {
            let (fd, unused) = (matches!(field.kind, Kind::Fd), matches!(field.kind, Kind::Unused(_)));
            self.mark(self.path.name(field), fd, unused);
        }
        let taken = match &field.kind {
            Kind::Struct(inner, _) => {
                for element in 0..count {
                    self.path.enter(field, element);
                    self.table(inner, inner.version, true)?;
                    self.path.leave();
                }
                return Ok(());
            }
            Kind::Unused(len) => self.take(*len, false),
            Kind::Fd => self.take(count as usize * 4, true).and_then(|()| self.claim(start)),
            kind => self.take(count as usize * kind.memory_size(), true),
        };
        taken.and_then(|()| bools_hold(&field.kind, &self.bytes[start..])).map_err(|e| self.path.blame(e, field))
    }

    /// Takes the descriptors that the bytes from `start` on name.
    fn claim(&mut self, start: usize) -> Result<()> {
        let Some(inbox) = self.inbox else { return Ok(()) };
        for bytes in self.bytes[start..].chunks_exact(4) {
            let number = bytes.iter().fold(0, |number, byte| number << 8 | u32::from(*byte));
            self.fds.push_back(inbox.claim(number)?);
        }
        Ok(())
    }

    /// Takes `left` bytes, growing with what really arrives.
    fn take(&mut self, mut left: usize, keep: bool) -> Result<()> {
        const STEP: usize = 64 << 10;
        let end = self.bytes.len();
        while left > 0 {
            let (start, step) = (self.bytes.len(), left.min(STEP));
            self.bytes.try_reserve(step).map_err(|_| Error::no_memory("device state", left as u64))?;
            self.bytes.resize(start + step, 0);
            self.input.read(&mut self.bytes[start..])?;
            left -= step;
            if !keep {
                self.bytes.truncate(end);
            }
        }
        Ok(())
    }

    fn mark(&mut self, name: String, fd: bool, unused: bool) {
        let at = self.input.position();
        if let Some(marks) = self.marks.as_mut().filter(|marks| marks.len() < MARKS_MAX) {
            marks.push(Mark { at, name, fd, unused });
        }
    }

    fn push(&mut self, value: u32) -> Result<()> {
        self.script.try_reserve(1).map_err(|_| Error::no_memory("device state", 4))?;
        self.script.push(value);
        Ok(())
    }

    fn parts(&mut self, table: &'t Table) -> Result<()> {
        let at = self.script.len();
        if !table.parts.is_empty() {
            self.push(0)?;
        }
        let mut seen = vec![false; table.parts.len()];
        while let Some(len) = self.part_ahead(table)? {
            if self.marks.is_some() {
                self.mark(format!("the header of a part of '{}'", table.name), false, false);
            }
            let mut bytes = [0; 257];
            self.input.read(&mut bytes[..2 + len])?;
            let name = String::from_utf8_lossy(&bytes[2..2 + len]);
            let Some(index) = table.parts.iter().position(|part| *part.name == *name) else {
                return Err(Error::new(
                    libc::ENOENT,
                    format!("the part {name:?} is not known here; the other side may be newer"),
                ));
            };
            if std::mem::replace(&mut seen[index], true) {
                return Err(Error::invalid(format!("the part '{name}' comes a second time")));
            }
            let part = &table.parts[index];
            self.part(index, part).map_err(|e| e.in_section(&part.name))?;
            self.script[at] += 1;
        }
        Ok(())
    }

    fn part(&mut self, index: usize, part: &'t Table) -> Result<()> {
        let version = self.input.u32()?;
        self.push(u32::try_from(index).unwrap_or(u32::MAX))?;
        self.push(version)?;
        self.table(part, version, false)
    }

    /// Length of the part's name if a part of `table` comes next.
    ///
    /// Looks ahead byte by byte: an ordinary 05 may come next too, and to wait for a whole name that was never sent
    /// would be to wait for ever.
    fn part_ahead(&mut self, table: &Table) -> Result<Option<usize>> {
        if self.ahead(0)? != Some(PART_MARK) {
            return Ok(None);
        }
        let Some(len) = self.ahead(1)?.map(usize::from).filter(|len| *len > table.name.len()) else {
            return Ok(None);
        };
        for (at, byte) in table.name.bytes().chain([b'/']).enumerate() {
            if self.ahead(2 + at)? != Some(byte) {
                return Ok(None);
            }
        }
        Ok(Some(len))
    }

    /// The byte `at` bytes ahead; none where the input ends, which whoever reads on will report.
    fn ahead(&mut self, at: usize) -> Result<Option<u8>> {
        match self.input.peek(at + 1) {
            Ok(bytes) => Ok(bytes.get(at).copied()),
            Err(e) if e.errno() == libc::EIO => Ok(None),
            Err(e) => Err(e),
        }
    }
}

/// Whether `got` is a version this side reads.
pub(super) fn version_fits(name: &str, got: u32, newest: u32, oldest: u32) -> Result<()> {
    let error = if got > newest {
        format!("version {got} of '{name}' is newer than version {newest}, the newest this side reads")
    } else if got < oldest {
        format!("version {got} of '{name}' is older than version {oldest}, the oldest this side reads")
    } else {
        return Ok(());
    };
    Err(Error::invalid(error).expected_got(format!("{oldest} to {newest}"), got))
}
