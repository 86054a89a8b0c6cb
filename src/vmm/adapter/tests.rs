use super::*;
use crate::vmm::StopReason::{Migration, User};
use std::ffi::{CStr, c_char};
use std::ptr;

/// What `vm` points to: notes each call, and what the next stop returns.
#[derive(Default)]
struct Machine {
    calls: Mutex<Vec<String>>,
    stop_returns: c_int,
    held: AtomicBool,
}

impl Machine {
    /// # Safety
    /// `vm` is the pointer a test gave out, to a machine that lives until the test's end.
    unsafe fn at<'a>(vm: *mut c_void) -> &'a Self {
        // SAFETY: by this function's contract; only shared references are ever made.
        unsafe { &*vm.cast::<Self>() }
    }

    fn note(&self, call: impl Into<String>) {
        lock(&self.calls).push(call.into());
    }

    fn take(&self) -> Vec<String> {
        std::mem::take(&mut *lock(&self.calls))
    }
}

macro_rules! machine {
    ($vm:expr) => {
        // SAFETY: called back with the pointer the test gave out.
        unsafe { Machine::at($vm) }
    };
}

unsafe extern "C" fn stop(vm: *mut c_void) -> c_int {
    machine!(vm).note("stop");
    machine!(vm).stop_returns
}
unsafe extern "C" fn start(vm: *mut c_void) -> c_int {
    machine!(vm).note("start");
    1
}
unsafe extern "C" fn take_lock(vm: *mut c_void) {
    machine!(vm).held.store(true, Ordering::SeqCst);
}
unsafe extern "C" fn give_lock(vm: *mut c_void) {
    machine!(vm).held.store(false, Ordering::SeqCst);
}
unsafe extern "C" fn held(vm: *mut c_void) -> c_int {
    c_int::from(machine!(vm).held.load(Ordering::SeqCst))
}
unsafe extern "C" fn log_dirty(vm: *mut c_void, slot: u32, on: c_int) -> c_int {
    machine!(vm).note(format!("log_dirty {slot} {on}"));
    if slot == 9 { -libc::EINVAL } else { 0 }
}
unsafe extern "C" fn announce(vm: *mut c_void) {
    machine!(vm).note("announce");
}
unsafe extern "C" fn log_line(vm: *mut c_void, level: c_int, line: *const c_char) {
    // SAFETY: the library promises a string that lives during the call.
    let line = unsafe { CStr::from_ptr(line) };
    machine!(vm).note(format!("log {level} {}", line.to_str().unwrap()));
}
unsafe extern "C" fn destroy(vm: *mut c_void) {
    machine!(vm).note("destroy");
}
unsafe extern "C" fn handler(vm: *mut c_void, phase: vmig_phase, at: *const vmig_moment) -> c_int {
    // SAFETY: the library promises a moment that lives during the call.
    let at = unsafe { *at };
    assert!(at.size == size_of::<vmig_moment>() && at.wall_ns > 0 && at.monotonic_ns > 0);
    let held = machine!(vm).held.load(Ordering::SeqCst);
    machine!(vm).note(format!("phase {phase}{}", if held { " held" } else { "" }));
    if machine!(vm).stop_returns == 7 { -libc::EBUSY } else { 0 }
}
unsafe extern "C" fn destroy_handler(vm: *mut c_void) {
    machine!(vm).note("destroy handler");
}

fn full() -> vmig_ops {
    vmig_ops {
        size: size_of::<vmig_ops>(),
        stop: Some(stop),
        start: Some(start),
        lock: Some(take_lock),
        unlock: Some(give_lock),
        held: Some(held),
        log_dirty: Some(log_dirty),
        announce: Some(announce),
        log: Some(log_line),
        destroy: Some(destroy),
        ram_replaced: None,
        release: None,
        reacquire: None,
        fence: None,
        config: None,
        gate: std::ptr::null_mut(),
        throttle: None,
        log_record: None,
    }
}

fn minimal() -> vmig_ops {
    let none = vmig_ops { lock: None, unlock: None, held: None, log_dirty: None, ..full() };
    vmig_ops { announce: None, log: None, destroy: None, ..none }
}

fn make(ops: &vmig_ops, machine: &Machine) -> Result<Vmm> {
    let vm = ptr::from_ref(machine).cast_mut().cast::<c_void>();
    // SAFETY: the ops are whole, and the hooks only make shared references to the machine, which outlives the guest.
    unsafe { Vmm::from_c(ops, vm, Reasons::NONE) }
}

fn add(vmm: &Vmm, machine: &Machine, run: vmig_run_fn) -> Result<u32> {
    let vm = ptr::from_ref(machine).cast_mut().cast::<c_void>();
    // SAFETY: as for `make`.
    unsafe { vmm.add_c_handler(0, run, vm, Some(destroy_handler)) }
}

#[test]
fn every_hook_arrives_and_destroy_comes_once_and_last() {
    let machine = Machine::default();
    let vmm = make(&full(), &machine).unwrap();
    let (bql, log) = (Arc::clone(vmm.bql()), Arc::clone(vmm.log()));
    add(&vmm, &machine, Some(handler)).unwrap();
    vmm.stop(User).unwrap();
    assert_eq!(machine.take(), ["stop", "phase 0 held", "phase 1 held"]);
    vmm.start(User).unwrap();
    assert_eq!(machine.take(), ["phase 2 held", "phase 3 held", "start"]);
    vmm.announce();
    vmm.log_dirty(3, true).unwrap();
    vmm.log_dirty(3, false).unwrap();
    assert_eq!(machine.take(), ["announce", "log_dirty 3 1", "log_dirty 3 0"]);
    let error = vmm.log_dirty(9, true).unwrap_err();
    let expected = "the log_dirty hook (slot 9, on 1) returned -22 (Invalid argument)";
    assert_eq!((error.errno(), error.text()), (libc::EINVAL, expected));
    machine.take();
    drop(vmm);
    bql.lock().unwrap();
    assert!(bql.held() && machine.held.load(Ordering::SeqCst));
    bql.unlock().unwrap();
    log.to("test").error("tail\nof it");
    drop(bql);
    assert_eq!(machine.take(), ["destroy handler", "log 1 tail\\nof it"]);
    drop(log);
    assert_eq!(machine.take(), ["destroy"]);
}

#[test]
fn two_hooks_are_enough() {
    let machine = Machine::default();
    let mut ops = minimal();
    ops.size = vmig_ops::REQUIRED;
    let vmm = make(&ops, &machine).unwrap();
    add(&vmm, &machine, Some(handler)).unwrap();
    vmm.stop(User).unwrap();
    assert_eq!(machine.take(), ["stop", "phase 0", "phase 1"]);
    vmm.announce();
    assert_eq!(vmm.log_dirty(1, true).unwrap_err().errno(), libc::ENOTSUP);
    assert!(!vmm.has_log_dirty());
}

#[test]
fn hooks_that_do_not_fit_are_refused_and_the_pointer_stays_the_callers() {
    let machine = Machine::default();
    let cases = [
        (vmig_ops { size: 0, ..full() }, libc::EINVAL, "VMIG_SIZED"),
        (vmig_ops { size: 16, ..full() }, libc::EINVAL, "size"),
        (vmig_ops { stop: None, ..full() }, libc::EINVAL, "vmig_ops.stop is NULL"),
        (vmig_ops { start: None, ..full() }, libc::EINVAL, "vmig_ops.start is NULL"),
        (vmig_ops { lock: None, ..full() }, libc::EINVAL, "together"),
        (vmig_ops { unlock: None, ..full() }, libc::EINVAL, "together"),
        (vmig_ops { lock: None, unlock: None, ..full() }, libc::EINVAL, "vmig_ops.held is given"),
        (vmig_ops { size: 1 << 20, ..full() }, libc::E2BIG, "beyond"),
    ];
    for (ops, errno, text) in cases {
        let error = make(&ops, &machine).unwrap_err();
        assert!(error.errno() == errno && error.text().contains(text), "{error}");
    }
    // SAFETY: null is part of the contract.
    let error = unsafe { Vmm::from_c(ptr::null(), ptr::null_mut(), Reasons::NONE) }.unwrap_err();
    assert_eq!(error.errno(), libc::EINVAL);
    assert!(machine.take().is_empty(), "nothing of a guest that was never made is called");
}

#[test]
fn failures_name_the_hook() {
    let machine = Machine { stop_returns: -libc::EBUSY, ..Machine::default() };
    let vmm = make(&full(), &machine).unwrap();
    let error = vmm.stop(Migration).unwrap_err();
    assert_eq!((error.errno(), error.text()), (libc::EBUSY, "the stop hook returned -16 (Device or resource busy)"));
    assert!(vmm.is_running());
    for odd in [c_int::MIN, -4096, -100_000] {
        assert_eq!(check_return("it", odd).unwrap_err().errno(), libc::EIO);
    }
    let machine = Machine { stop_returns: 7, ..Machine::default() };
    let vmm = make(&full(), &machine).unwrap();
    add(&vmm, &machine, Some(handler)).unwrap();
    let error = vmm.stop(Migration).unwrap_err();
    assert!(error.text().starts_with("run-state handler 1 'callback 0x"), "{error}");
    assert!(error.text().ends_with("(priority 0) in prepare-stop failed: it returned -16 (Device or resource busy)"));
    assert_eq!(machine.take(), ["stop", "phase 0 held", "start"]);
}

#[test]
fn a_handlers_pointer_is_destroyed_once_if_it_was_taken() {
    let machine = Machine::default();
    let vmm = make(&minimal(), &machine).unwrap();
    assert_eq!(add(&vmm, &machine, None).unwrap_err().errno(), libc::EINVAL);
    let ids: Vec<u32> = std::iter::from_fn(|| add(&vmm, &machine, Some(handler)).ok()).collect();
    assert_eq!(add(&vmm, &machine, Some(handler)).unwrap_err().errno(), libc::ENOSPC);
    assert!(machine.take().is_empty(), "a refused handler's pointer stays the caller's");
    vmm.remove_handler(ids[5]).unwrap();
    assert_eq!(machine.take(), ["destroy handler"]);
    assert_eq!(vmm.remove_handler(ids[5]).unwrap_err().errno(), libc::ENOENT);
    drop(vmm);
    assert_eq!(machine.take(), vec!["destroy handler"; ids.len() - 1]);
}
