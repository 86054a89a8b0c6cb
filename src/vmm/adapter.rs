//! The one place where the VMM's C hooks and run-state handlers are called.
#![allow(unsafe_code, reason = "calls function pointers that came through the C door")]

use std::ffi::{CString, c_int, c_void};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use crate::bql::{Bql, RawLock};
use crate::error::{Error, Result, strerror};
use crate::sys::clock::monotonic_ns;
use crate::sys::sized::{SizedStruct, sized_copy};
use crate::sys::thread_sys;
use crate::thread::lock;

use super::dispatch::Dispatch;
use super::gate::Gate;
use super::handlers::{Moment, Phase, RunHandler};
use super::log::{Level, Log};
use super::ops::{vmig_log_record, vmig_moment, vmig_ops, vmig_phase, vmig_run_fn};
use super::run::{Hooks, Reasons, ReplacedRam, Vmm};

/// What a callback's return value means: 0 or more is success, the rest a negative errno.
pub fn check_return(who: &str, value: c_int) -> Result<c_int> {
    if value >= 0 {
        return Ok(value);
    }
    match value.checked_neg().filter(|errno| *errno < 4096) {
        Some(errno) => Err(Error::new(errno, format!("{who} returned {value} ({})", strerror(errno)))),
        None => Err(Error::new(libc::EIO, format!("{who} returned {value}, which is not a negative errno"))),
    }
}

/// A pointer of the VMM that only travels: we hand it back to the VMM's own functions and never look inside.
#[derive(Clone, Copy, Debug)]
pub(super) struct Opaque(pub(super) *mut c_void);

impl Opaque {
    pub(super) const NULL: Self = Self(std::ptr::null_mut());
}

// SAFETY: never dereferenced here; the C contract of each callback says on which threads it is called.
unsafe impl Send for Opaque {}
// SAFETY: as above.
unsafe impl Sync for Opaque {}

/// The VMM's hooks with its pointer. Everything that may call them shares one, so `destroy` comes last of all.
#[derive(Debug)]
struct CVm {
    ops: vmig_ops,
    vm: Opaque,
    gate: Option<Arc<Gate>>,
    /// Set once the guest is made: before that the pointer is still the caller's.
    ours: AtomicBool,
}

impl CVm {
    /// Calls a hook that is told an epoch, if it was given.
    fn with_epoch(
        &self,
        name: &str,
        hook: Option<unsafe extern "C" fn(*mut c_void, u64) -> c_int>,
        epoch: u64,
    ) -> Result<()> {
        let Some(hook) = hook else { return Ok(()) };
        // SAFETY: the VMM's own function and pointer, called as the header promises.
        let value = unsafe { hook(self.vm.0, epoch) };
        check_return(&format!("the {name} hook (epoch {epoch})"), value).map(|_| ())
    }
}

impl CVm {
    /// Gives a line to the hook that knows most of it.
    fn log(&self, line: &Line) {
        if let Some(hook) = self.ops.log_record {
            let record = vmig_log_record {
                size: vmig_log_record::REQUIRED,
                level: line.level as u32,
                thread: line.thread,
                monotonic_ns: line.monotonic_ns,
                target: line.target.as_ptr(),
                text: line.text.as_ptr(),
            };
            // SAFETY: the VMM's own function and pointer; the record and its texts live until the call returns.
            unsafe { hook(self.vm.0, &raw const record) };
        } else if let Some(hook) = self.ops.log {
            // SAFETY: as above.
            unsafe { hook(self.vm.0, line.level as c_int, line.text.as_ptr()) };
        }
    }
}

impl Drop for CVm {
    fn drop(&mut self) {
        if let (true, Some(destroy)) = (*self.ours.get_mut(), self.ops.destroy) {
            // SAFETY: the VMM's own function and pointer; this is the last owner, so no call is under way or to come.
            unsafe { destroy(self.vm.0) };
        }
    }
}

struct CHooks(Arc<CVm>);

impl Hooks for CHooks {
    fn stop(&self) -> Result<()> {
        if let Some(gate) = &self.0.gate {
            gate.close()?;
        }
        let Some(hook) = self.0.ops.stop else { return Ok(()) };
        // SAFETY: the VMM's own function and pointer, called as the header promises.
        let value = unsafe { hook(self.0.vm.0) };
        let stopped = check_return("the stop hook", value).map(|_| ());
        // The guest must still run then.
        stopped.inspect_err(|_| self.0.gate.iter().for_each(|gate| gate.open()))
    }

    fn start(&self) -> Result<()> {
        if let Some(hook) = self.0.ops.start {
            // SAFETY: the VMM's own function and pointer, called as the header promises.
            let value = unsafe { hook(self.0.vm.0) };
            check_return("the start hook", value)?;
        }
        self.0.gate.iter().for_each(|gate| gate.open());
        Ok(())
    }

    fn throttle(&self, percent: u32) -> Result<()> {
        match (self.0.ops.throttle, &self.0.gate) {
            (Some(hook), _) => {
                // SAFETY: the VMM's own function and pointer, called as the header promises.
                let value = unsafe { hook(self.0.vm.0, percent) };
                check_return(&format!("the throttle hook ({percent} percent)"), value).map(|_| ())
            }
            (None, Some(gate)) => gate.throttle(percent),
            (None, None) => Err(Error::new(libc::ENOTSUP, "the VMM has neither a throttle hook nor a gate")),
        }
    }

    fn has_throttle(&self) -> bool {
        self.0.ops.throttle.is_some() || self.0.gate.is_some()
    }

    fn announce(&self) {
        if let Some(hook) = self.0.ops.announce {
            // SAFETY: the VMM's own function and pointer, called as the header promises.
            unsafe { hook(self.0.vm.0) };
        }
    }

    fn release(&self, epoch: u64) -> Result<()> {
        self.0.with_epoch("release", self.0.ops.release, epoch)
    }

    fn reacquire(&self, epoch: u64) -> Result<()> {
        self.0.with_epoch("reacquire", self.0.ops.reacquire, epoch)
    }

    fn fence(&self, epoch: u64) -> Result<()> {
        if self.0.ops.fence.is_none() {
            return Err(Error::new(
                libc::ENOSYS,
                "vmig_ops.fence is NULL: nobody can tell whether the other side is dead",
            ));
        }
        self.0.with_epoch("fence", self.0.ops.fence, epoch)
    }

    fn log_dirty(&self, slot: u32, on: bool) -> Result<()> {
        let Some(hook) = self.0.ops.log_dirty else {
            let text = format!("cannot switch the dirty log of memory slot {slot}: vmig_ops.log_dirty is NULL");
            return Err(Error::new(libc::ENOTSUP, text));
        };
        // SAFETY: the VMM's own function and pointer, called as the header promises.
        let value = unsafe { hook(self.0.vm.0, slot, c_int::from(on)) };
        check_return(&format!("the log_dirty hook (slot {slot}, on {})", u8::from(on)), value).map(|_| ())
    }

    fn ram_replaced(&self, ram: &ReplacedRam<'_>) -> Result<()> {
        let Some(hook) = self.0.ops.ram_replaced else { return Ok(()) };
        let name = CString::new(ram.name).map_err(|_| Error::invalid("a RAM block's name has a NUL"))?;
        let host = std::ptr::with_exposed_provenance_mut(usize::try_from(ram.host).unwrap_or(0));
        let fd = ram.fd.as_raw_fd();
        // SAFETY: the VMM's own function and pointer, called as the header promises; name and fd live through the call.
        let value = unsafe { hook(self.0.vm.0, name.as_ptr(), host, ram.len, fd, ram.offset) };
        check_return(&format!("the ram_replaced hook (RAM block '{}')", ram.name), value).map(|_| ())
    }

    fn config(&self, blob: &[u8]) -> Result<()> {
        let Some(hook) = self.0.ops.config else { return Ok(()) };
        // SAFETY: the VMM's own function and pointer, called as the header promises; the bytes live through the call.
        let value = unsafe { hook(self.0.vm.0, blob.as_ptr().cast(), blob.len()) };
        check_return("the config hook", value).map(|_| ())
    }

    fn has_config(&self) -> bool {
        self.0.ops.config.is_some()
    }

    fn has_log_dirty(&self) -> bool {
        self.0.ops.log_dirty.is_some()
    }
}

struct CLock {
    vm: Arc<CVm>,
    lock: unsafe extern "C" fn(*mut c_void),
    unlock: unsafe extern "C" fn(*mut c_void),
}

impl RawLock for CLock {
    fn lock(&self) {
        // SAFETY: the VMM's own function and pointer, called as the header promises.
        unsafe { (self.lock)(self.vm.vm.0) };
    }

    fn unlock(&self) {
        // SAFETY: the VMM's own function and pointer, on the thread that locked.
        unsafe { (self.unlock)(self.vm.vm.0) };
    }

    fn held(&self) -> Option<bool> {
        let held = self.vm.ops.held?;
        // SAFETY: the VMM's own function and pointer, called as the header promises.
        Some(unsafe { held(self.vm.vm.0) } > 0)
    }
}

/// A line of log with what is known of it when it is written: the VMM may take it later, on its own thread.
struct Line {
    level: Level,
    thread: u32,
    monotonic_ns: u64,
    target: CString,
    text: CString,
}

impl Line {
    fn new(level: Level, target: &str, text: &str) -> Self {
        Self {
            level,
            thread: u32::try_from(thread_sys::tid()).unwrap_or(0),
            monotonic_ns: monotonic_ns(),
            // Lines have no control characters, so no NUL either.
            target: CString::new(target).unwrap_or_default(),
            text: CString::new(text).unwrap_or_default(),
        }
    }
}

fn missing(hook: &str) -> Error {
    Error::invalid(format!("vmig_ops.{hook} is NULL, but required"))
}

impl Vmm {
    /// Takes over the VMM's hooks; big lock and log come from them, too.
    ///
    /// On failure `destroy` is not called: `vm` is still the caller's. On success it is called once, after the `Vmm`,
    /// its big lock and its log are all dropped.
    ///
    /// # Safety
    /// `ops` is null or points to a sized `vmig_ops`; its functions may be called with `vm` as the header promises.
    pub unsafe fn from_c(ops: *const vmig_ops, vm: *mut c_void, reasons: Reasons) -> Result<Self> {
        // SAFETY: this function's contract covers the callee's.
        let ops = unsafe { sized_copy(ops)? };
        // SAFETY: the C contract: the gate is null or came from vmig_gate_new, which made it from this.
        let gate = unsafe { ops.gate.cast::<Arc<Gate>>().as_ref() }.map(Arc::clone);
        for (name, given) in [("stop", ops.stop.is_some()), ("start", ops.start.is_some())] {
            if !given && gate.is_none() {
                return Err(missing(name));
            }
        }
        let shared = Arc::new(CVm { ops, vm: Opaque(vm), gate, ours: AtomicBool::new(false) });
        let bql = match (ops.lock, ops.unlock) {
            (Some(lock), Some(unlock)) => Bql::external(Box::new(CLock { vm: Arc::clone(&shared), lock, unlock })),
            (None, None) if ops.held.is_none() => Bql::new(),
            (None, None) => return Err(Error::invalid("vmig_ops.held is given, but lock and unlock are NULL")),
            _ => return Err(Error::invalid("vmig_ops.lock and vmig_ops.unlock are given together or not at all")),
        };
        let dispatch = Arc::new(Dispatch::new(bql.home()));
        let log = Arc::new(Log::new(c_sink(&shared, &dispatch)));
        shared.ours.store(true, Ordering::Relaxed);
        Ok(Self::with_dispatch(Box::new(CHooks(shared)), Arc::new(bql), log, reasons, dispatch))
    }

    /// Adds a C run-state handler and returns its id. \[bql\]
    ///
    /// On failure `destroy` is not called: `opaque` is still the caller's. On success it is called once, by
    /// [`remove_handler`](Self::remove_handler) or when the guest is freed, and the handler never after it.
    ///
    /// # Safety
    /// `run` and `destroy` may be called with `opaque` as the header promises.
    pub unsafe fn add_c_handler(
        &self,
        priority: i32,
        run: vmig_run_fn,
        opaque: *mut c_void,
        destroy: Option<unsafe extern "C" fn(*mut c_void)>,
    ) -> Result<u32> {
        let run = run.ok_or_else(|| Error::invalid("the run-state handler is NULL"))?;
        let handler = Arc::new(CHandler { run, opaque: Opaque(opaque), destroy: Mutex::new(None) });
        let same: Arc<dyn RunHandler> = Arc::<CHandler>::clone(&handler);
        // Armed before anybody can remove it, disarmed if it was not taken.
        *lock(&handler.destroy) = destroy;
        self.add_handler(&format!("callback {run:p}"), priority, same).inspect_err(|_| *lock(&handler.destroy) = None)
    }
}

fn c_sink(shared: &Arc<CVm>, dispatch: &Arc<Dispatch>) -> Option<super::log::Sink> {
    if shared.ops.log.is_none() && shared.ops.log_record.is_none() {
        return None;
    }
    let (vm, dispatch) = (Arc::clone(shared), Arc::clone(dispatch));
    Some(Box::new(move |level: Level, target: &'static str, line: &str| {
        let line = Line::new(level, target, line);
        let vm = Arc::clone(&vm);
        dispatch.line(move |lost| {
            if lost > 0 {
                let text = format!("{lost} lines of log were lost here: vmig_dispatch() was not called");
                vm.log(&Line::new(Level::Warning, "dispatch", &text));
            }
            vm.log(&line);
        });
    }))
}

struct CHandler {
    run: unsafe extern "C" fn(*mut c_void, vmig_phase, *const vmig_moment) -> c_int,
    opaque: Opaque,
    destroy: Mutex<Option<unsafe extern "C" fn(*mut c_void)>>,
}

impl RunHandler for CHandler {
    fn run(&self, phase: Phase, at: &Moment) -> Result<()> {
        let at = vmig_moment { size: vmig_moment::REQUIRED, wall_ns: at.wall_ns, monotonic_ns: at.monotonic_ns };
        // SAFETY: the VMM's own function and pointer, big lock held; the moment lives until the call returns.
        let value = unsafe { (self.run)(self.opaque.0, phase as vmig_phase, &raw const at) };
        check_return("it", value).map(|_| ())
    }
}

impl Drop for CHandler {
    fn drop(&mut self) {
        if let Some(destroy) = lock(&self.destroy).take() {
            // SAFETY: the VMM's own function and pointer; this is the last owner, so no call is under way or to come.
            unsafe { destroy(self.opaque.0) };
        }
    }
}

#[cfg(test)]
mod tests;
