//! A section whose format is the VMM's own, behind C callbacks.
//!
//! Each body is framed (be32 length, bytes), so a `load` that reads too little or too much is an error that names
//! section and offset, never a stream out of step.
#![allow(unsafe_code, reason = "calls the C callbacks of custom sections")]

use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use super::check::{self, BODY_MAX};
use super::list::{Content, Entry};
use super::ops::*;
use super::stream::{Reader, Writer};
use super::trial::Subject;
use super::trial::faults::Faults;
use super::{Apply, Part, Pending, Section};
use crate::error::{Error, Result, returned};
use crate::sys::sized::sized_copy;
use crate::thread::lock;
use crate::wire::input::Input;

/// Frees what `opaque` leads to; called exactly once, after every other callback.
pub type Destroy = unsafe extern "C" fn(opaque: *mut c_void);
type Call = unsafe extern "C" fn(*mut c_void) -> c_int;
type Amounts = unsafe extern "C" fn(*mut c_void, *mut u64, *mut u64) -> c_int;

/// A section made of C callbacks.
#[derive(Debug)]
pub struct Custom {
    name: String,
    owner: String,
    version: u32,
    ops: vmig_section_ops,
    opaque: Opaque,
    /// An error of a callback whose caller cannot take one; the next call that can fail returns it.
    owed: Mutex<Option<Error>>,
    /// `setup` or `load_setup` was called, so the cleanup after it is due.
    tried: AtomicBool,
    /// What makes callbacks fail in a test of the section.
    faults: Option<Arc<Faults>>,
}

/// The VMM's pointer; its `destroy` runs when the section is gone, if a list ever took it.
#[derive(Debug)]
struct Opaque {
    pointer: *mut c_void,
    destroy: Option<Destroy>,
    armed: AtomicBool,
}

// SAFETY: the pointer is only handed back to the VMM, which is told on which threads its callbacks run.
unsafe impl Send for Opaque {}
// SAFETY: as above.
unsafe impl Sync for Opaque {}

impl Drop for Opaque {
    fn drop(&mut self) {
        if let (true, Some(destroy)) = (self.armed.load(Ordering::Acquire), self.destroy) {
            // SAFETY: the section owns the pointer since it was registered, and nobody has the section any more.
            unsafe { destroy(self.pointer) }
        }
    }
}

impl Custom {
    /// A section from the callbacks of C. `destroy` is not called before a list takes the section: if anything fails
    /// until then, `opaque` stays the caller's.
    ///
    /// # Safety
    /// `ops` is NULL or leads to a `vmig_section_ops`, whose callbacks accept `opaque` on any thread until `destroy`.
    pub unsafe fn new(
        name: &str,
        version: u32,
        ops: *const vmig_section_ops,
        opaque: *mut c_void,
        destroy: Option<Destroy>,
    ) -> Result<Self> {
        check::name("the section", name)?;
        // SAFETY: the caller vouches for the pointer.
        let mut ops = unsafe { sized_copy(ops) }?;
        if ops.oldest == 0 {
            ops.oldest = version;
        }
        ops_fit(version, &ops).map_err(|e| e.in_section(name))?;
        let opaque = Opaque { pointer: opaque, destroy, armed: AtomicBool::new(false) };
        let owner = format!("section '{name}'");
        Ok(Self {
            name: name.to_owned(),
            owner,
            version,
            ops,
            opaque,
            owed: Mutex::default(),
            tried: AtomicBool::new(false),
            faults: None,
        })
    }

    /// Name of the section.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Version that is sent.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// The callbacks and numbers, `oldest` filled in.
    pub fn ops(&self) -> &vmig_section_ops {
        &self.ops
    }

    /// What identifies the section when it is removed.
    pub fn opaque(&self) -> *mut c_void {
        self.opaque.pointer
    }

    /// What to register.
    pub fn entry(self) -> Entry {
        let (name, version) = (self.name.clone(), self.version);
        let vmig_section_ops { instance, oldest, priority, .. } = self.ops;
        let key = self.opaque.pointer.addr();
        Entry { oldest, priority, key, ..Entry::new(name, instance, version, Content::State(Arc::new(self))) }
    }

    fn call(&self, callback: &str, f: Option<Call>, default: c_int) -> Result<c_int> {
        let Some(f) = f else { return Ok(default) };
        // SAFETY: the caller of `new` vouched that the callbacks accept the pointer.
        self.returned(callback, || unsafe { f(self.opaque.pointer) })
    }

    /// Makes a call, through the faults of a test if there is one.
    fn returned(&self, callback: &str, call: impl FnOnce() -> c_int) -> Result<c_int> {
        let call = || returned(&self.owner, callback, call());
        let value = match &self.faults {
            Some(faults) => faults.around(&self.owner, callback, call),
            None => call(),
        };
        value.map_err(|e| e.in_section(&self.name))
    }

    /// A question whose asker takes no error: the section then stays in, so that the next step reports it.
    fn ask(&self, callback: &str, f: Option<Call>, default: bool) -> bool {
        match self.call(callback, f, c_int::from(default)) {
            Ok(value) => value > 0,
            Err(error) => {
                lock(&self.owed).get_or_insert(error);
                true
            }
        }
    }

    fn settle(&self) -> Result<()> {
        lock(&self.owed).take().map_or(Ok(()), Err)
    }

    fn amounts(&self, callback: &str, f: Amounts) -> Result<Pending> {
        self.settle()?;
        let mut left = Pending::default();
        // SAFETY: the caller of `new` vouched for the callbacks; both numbers live through the call.
        let call = || unsafe { f(self.opaque.pointer, &raw mut left.must_precopy, &raw mut left.can_postcopy) };
        self.returned(callback, call)?;
        Ok(left)
    }

    fn write(
        &self,
        out: &mut Vec<u8>,
        callback: &str,
        f: impl FnOnce(*mut c_void, &mut Writer) -> c_int,
    ) -> Result<c_int> {
        self.settle()?;
        let room = self.faults.as_ref().map_or(BODY_MAX, |faults| faults.room());
        Writer::frame_within(out, room, |writer| self.returned(callback, || f(self.opaque.pointer, writer)))
            .map_err(|e| e.in_section(&self.name))
    }

    fn load(&self, part: u32, version: u32, body: Vec<u8>) -> Result<()> {
        let Some(load) = self.ops.load else {
            return Err(Error::invalid("load is missing"));
        };
        let mut reader = Reader::new(body);
        // SAFETY: the caller of `new` vouched for the callbacks; the reader lives through the call.
        let loaded = self.returned("load", || unsafe { load(self.opaque.pointer, part, version, reader.handle()) });
        // A read beyond the end explains a failure better than the errno `load` made of it.
        match reader.error() {
            Some(error) => Err(error.clone()),
            None => loaded.and_then(|_| reader.finish()),
        }
    }
}

fn ops_fit(version: u32, ops: &vmig_section_ops) -> Result<()> {
    if version == 0 || ops.oldest > version {
        return Err(
            Error::invalid("1 <= oldest <= version must hold").expected_got(format!("1 to {version}"), ops.oldest)
        );
    }
    let missing = [("complete", ops.complete.is_none()), ("load", ops.load.is_none())];
    if let Some((what, _)) = missing.iter().find(|(_, missing)| *missing) {
        return Err(Error::invalid(format!("{what} is NULL, but required")));
    }
    if ops.flags & !(VMIG_SECTION_EARLY | VMIG_SECTION_WRITES_RAM) != 0 {
        return Err(Error::invalid(format!("unknown flags {:#x}", ops.flags)));
    }
    if ops.iterate.is_some() {
        if ops.pending_estimate.is_none() {
            return Err(Error::invalid("pending_estimate is NULL, but required where iterate is given"));
        }
        if ops.flags & VMIG_SECTION_EARLY != 0 {
            return Err(Error::invalid("an iterative section cannot have VMIG_SECTION_EARLY"));
        }
    } else {
        let alone = [
            ("setup", ops.setup.is_some()),
            ("pending_estimate", ops.pending_estimate.is_some()),
            ("pending_exact", ops.pending_exact.is_some()),
            ("is_active_iterate", ops.is_active_iterate.is_some()),
        ];
        if let Some((what, _)) = alone.iter().find(|(_, given)| *given) {
            return Err(Error::invalid(format!("{what} is given, but iterate is not: it would never be called")));
        }
    }
    Ok(())
}

impl Section for Custom {
    fn registered(&self) {
        self.opaque.armed.store(true, Ordering::Release);
    }

    fn is_active(&self) -> bool {
        self.ask("is_active", self.ops.is_active, true)
    }

    fn is_active_iterate(&self) -> bool {
        self.ask("is_active_iterate", self.ops.is_active_iterate, true)
    }

    fn prepare(&self) -> Result<()> {
        self.settle()?;
        self.call("prepare", self.ops.prepare, 0).map(drop)
    }

    fn is_iterative(&self) -> bool {
        self.ops.iterate.is_some()
    }

    fn is_early(&self) -> bool {
        self.ops.flags & VMIG_SECTION_EARLY != 0
    }

    fn writes_ram(&self) -> bool {
        self.ops.flags & VMIG_SECTION_WRITES_RAM != 0
    }

    fn setup(&self, out: &mut Vec<u8>) -> Result<()> {
        // Without a callback the body is empty, but it is framed all the same.
        let setup = self.ops.setup;
        self.write(out, "setup", |opaque, writer| {
            self.tried.store(true, Ordering::Relaxed);
            match setup {
                // SAFETY: the caller of `new` vouched for the callbacks; the writer lives through the call.
                Some(setup) => unsafe { setup(opaque, writer.handle()) },
                None => 0,
            }
        })
        .map(drop)
    }

    fn pending_estimate(&self) -> Result<Pending> {
        match self.ops.pending_estimate {
            Some(f) => self.amounts("pending_estimate", f),
            None => Ok(Pending::default()),
        }
    }

    fn pending_exact(&self) -> Result<Pending> {
        match self.ops.pending_exact {
            Some(f) => self.amounts("pending_exact", f),
            None => self.pending_estimate(),
        }
    }

    fn iterate(&self, out: &mut Vec<u8>, budget: u64) -> Result<bool> {
        let Some(iterate) = self.ops.iterate else { return Ok(true) };
        // SAFETY: the caller of `new` vouched for the callbacks; the writer lives through the call.
        let call = |opaque, writer: &mut Writer| unsafe { iterate(opaque, writer.handle(), budget) };
        let before = out.len();
        let value = self.write(out, "iterate", call)?;
        if out.len() == before + size_of::<u32>() {
            // Nothing written is no body, rather than one without bytes.
            out.truncate(before);
        }
        Ok(value > 0)
    }

    fn complete(&self, out: &mut Vec<u8>) -> Result<()> {
        let Some(complete) = self.ops.complete else { return Err(Error::invalid("complete is missing")) };
        // SAFETY: the caller of `new` vouched for the callbacks; the writer lives through the call.
        let call = |opaque, writer: &mut Writer| unsafe { complete(opaque, writer.handle()) };
        self.write(out, "complete", call).map(drop)
    }

    fn cleanup(&self) {
        if let (true, Some(cleanup)) = (self.tried.swap(false, Ordering::Relaxed), self.ops.cleanup) {
            // SAFETY: the caller of `new` vouched that the callbacks accept the pointer.
            unsafe { cleanup(self.opaque.pointer) }
        }
        // The attempt is over, and with it an error nobody asked for.
        let _ = self.settle();
    }

    fn load_setup(&self) -> Result<()> {
        self.settle()?;
        self.tried.store(true, Ordering::Relaxed);
        self.call("load_setup", self.ops.load_setup, 0).map(drop)
    }

    fn parse<'a>(&'a self, part: Part, version: u32, input: &mut dyn Input) -> Result<Apply<'a>> {
        let wanted = if self.is_iterative() { part != Part::Full } else { part == Part::Full };
        let code = match part {
            Part::Start => VMIG_PART_START,
            Part::Iterate => VMIG_PART_ITERATE,
            Part::End => VMIG_PART_END,
            Part::Full => VMIG_PART_FULL,
        };
        let in_section = |e: Error| e.in_section(&self.name);
        if !wanted {
            let rule = if self.is_iterative() { "an iterative section" } else { "a section of one body" };
            return Err(in_section(Error::invalid(format!("{rule} cannot have a {part:?} body"))));
        }
        super::codec::version_fits(&self.name, version, self.version, self.ops.oldest).map_err(in_section)?;
        let body = input.u32().and_then(|len| input.blob("a section's body", u64::from(len), BODY_MAX));
        let (body, end) = (body.map_err(in_section)?, input.position());
        Ok(Box::new(move || {
            let start = end - body.len() as u64;
            self.load(code, version, body).map_err(|e| e.in_body_at(start).in_section(&self.name))
        }))
    }

    fn subject(&self, faults: &Arc<Faults>) -> Option<Subject<'_>> {
        let opaque = Opaque { pointer: self.opaque.pointer, destroy: None, armed: AtomicBool::new(false) };
        let copy = Self {
            name: self.name.clone(),
            owner: self.owner.clone(),
            version: self.version,
            ops: self.ops,
            opaque,
            owed: Mutex::default(),
            tried: AtomicBool::new(false),
            faults: Some(Arc::clone(faults)),
        };
        Some(Subject { section: Box::new(copy), device: None, at: self.opaque.pointer.cast() })
    }

    fn load_cleanup(&self, ok: bool) {
        if let (true, Some(cleanup)) = (self.tried.swap(false, Ordering::Relaxed), self.ops.load_cleanup) {
            // SAFETY: the caller of `new` vouched that the callbacks accept the pointer.
            unsafe { cleanup(self.opaque.pointer, c_int::from(ok)) }
        }
        let _ = self.settle();
    }
}
