use super::*;
use crate::vmm::Phase;
use StopReason::{Migration, NotOwner, User};
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::sync::{Weak, mpsc};
use std::time::Duration;

/// A guest that notes every call, checks its lock, and fails those it is told to.
#[derive(Default)]
struct World {
    bql: Arc<Bql>,
    calls: Mutex<Vec<String>>,
    moments: Mutex<Vec<Moment>>,
    /// Numbers of the calls that fail, counted from 0.
    fail: Mutex<BTreeSet<usize>>,
    count: AtomicUsize,
    running: AtomicBool,
}

impl World {
    fn call(&self, name: &str, bql: bool) -> Result<()> {
        assert_eq!(self.bql.held(), bql, "big lock in {name}");
        let fails = lock(&self.fail).contains(&self.count.fetch_add(1, Ordering::SeqCst));
        lock(&self.calls).push(format!("{name}{}", if fails { "!" } else { "" }));
        if fails { Err(Error::new(libc::ENODEV, "planned")) } else { Ok(()) }
    }

    fn take(&self) -> Vec<String> {
        std::mem::take(&mut *lock(&self.calls))
    }

    fn fail_at(&self, calls: impl IntoIterator<Item = usize>) {
        *lock(&self.fail) = calls.into_iter().collect();
        self.count.store(0, Ordering::SeqCst);
    }
}

struct Guest(Arc<World>);

impl Hooks for Guest {
    fn stop(&self) -> Result<()> {
        self.0.call("stop", false)?;
        assert!(self.0.running.swap(false, Ordering::SeqCst), "stopped twice");
        Ok(())
    }
    fn start(&self) -> Result<()> {
        self.0.call("start", false)?;
        assert!(!self.0.running.swap(true, Ordering::SeqCst), "started twice");
        Ok(())
    }
}

fn short(phase: Phase) -> &'static str {
    match phase {
        Phase::PrepareStop => "ps",
        Phase::Stopped => "S",
        Phase::PrepareStart => "pr",
        Phase::Starting => "R",
    }
}

fn handler(world: &Arc<World>, name: &'static str) -> Arc<dyn RunHandler> {
    let world = Arc::clone(world);
    Arc::new(move |phase: Phase, at: &Moment| {
        lock(&world.moments).push(*at);
        world.call(&format!("{name}{}", short(phase)), true)
    })
}

/// Start order a, b, c: priorities 1, 1, 7, registered as c, a, b.
fn rig(reasons: Reasons) -> (Arc<World>, Arc<Vmm>) {
    let world = Arc::new(World { running: AtomicBool::new(reasons.is_empty()), ..World::default() });
    let hooks = Box::new(Guest(Arc::clone(&world)));
    // The tests provoke failures by the hundred; what is logged of them is not looked at.
    let log = Log::new(Some(Box::new(|_, _, _| ())));
    let vmm = Vmm::new(hooks, Arc::clone(&world.bql), Arc::new(log), reasons);
    for (name, priority) in [("c", 7), ("a", 1), ("b", 1)] {
        vmm.add_handler(name, priority, handler(&world, name)).unwrap();
    }
    (world, Arc::new(vmm))
}

const STOP: &str = "stop cps bps aps cS bS aS";
const START: &str = "apr bpr cpr aR bR cR start";

fn words(text: &str) -> Vec<&str> {
    text.split_whitespace().collect()
}

#[test]
fn the_order_is_exact() {
    let (world, vmm) = rig(Reasons::NONE);
    let report = vmm.stop(User).unwrap();
    assert_eq!(world.take(), words(STOP));
    let told = std::mem::take(&mut *lock(&world.moments));
    assert!(told.len() == 6 && told.iter().all(|at| *at == report.at), "one moment for all");
    assert!(report.changed && report.began.monotonic_ns <= report.at.monotonic_ns && report.at.wall_ns != 0);
    assert!(report.ended_ns >= report.at.monotonic_ns + report.handlers_ns);
    assert!(!vmm.is_running() && vmm.reasons() == User.into());
    let report = vmm.start(User).unwrap();
    assert_eq!(world.take(), words(START));
    assert!(report.changed && lock(&world.moments).iter().all(|at| *at == report.at));
    assert!(report.ended_ns >= report.began.monotonic_ns + report.hook_ns + report.handlers_ns);
    assert!(vmm.is_running());
}

#[test]
fn times_say_who_took_them() {
    struct Slow;
    impl Hooks for Slow {
        fn stop(&self) -> Result<()> {
            std::thread::sleep(Duration::from_millis(20));
            Ok(())
        }
        fn start(&self) -> Result<()> {
            self.stop()
        }
    }
    let vmm = Vmm::new(Box::new(Slow), Arc::default(), Arc::default(), Reasons::NONE);
    let nap = |phase: Phase, _: &Moment| {
        let long = matches!(phase, Phase::Stopped | Phase::Starting);
        std::thread::sleep(Duration::from_millis(if long { 50 } else { 0 }));
        Ok(())
    };
    vmm.add_handler("nap", 0, Arc::new(nap)).unwrap();
    for report in [vmm.stop(User).unwrap(), vmm.start(User).unwrap()] {
        assert!(report.hook_ns >= 20_000_000 && report.handlers_ns >= 50_000_000, "{report:?}");
        assert!(report.ended_ns - report.began.monotonic_ns >= 70_000_000, "{report:?}");
    }
}

#[test]
fn a_stop_that_fails_anywhere_leaves_the_guest_running() {
    let undone = [
        "stop!",
        "stop cps! start",
        "stop cps bps! cpr start",
        "stop cps bps aps! bpr cpr start",
        "stop cps bps aps cS! apr bpr cpr start",
        "stop cps bps aps cS bS! apr bpr cpr cR start",
        "stop cps bps aps cS bS aS! apr bpr cpr bR cR start",
    ];
    for (n, expected) in undone.iter().enumerate() {
        let (world, vmm) = rig(Reasons::NONE);
        world.fail_at([n]);
        let error = vmm.stop(Migration).unwrap_err();
        assert_eq!(world.take(), words(expected));
        assert_eq!(error.errno(), libc::ENODEV);
        assert!(n == 0 || error.text().contains("run-state handler"), "{error}");
        assert!(vmm.is_running() && world.running.load(Ordering::SeqCst), "{expected}");
        // Nothing is left of the failure.
        vmm.stop(Migration).unwrap();
        assert_eq!(world.take(), words(STOP));
    }
}

#[test]
fn a_start_that_fails_anywhere_leaves_the_guest_stopped() {
    let undone = [
        "apr!",
        "apr bpr! aps",
        "apr bpr cpr! bps aps",
        "apr bpr cpr aR! cps bps aps",
        "apr bpr cpr aR bR! cps bps aps aS",
        "apr bpr cpr aR bR cR! cps bps aps bS aS",
        "apr bpr cpr aR bR cR start! cps bps aps cS bS aS",
    ];
    for (n, expected) in undone.iter().enumerate() {
        let (world, vmm) = rig(User.into());
        world.fail_at([n]);
        vmm.start(User).unwrap_err();
        assert_eq!(world.take(), words(expected));
        assert!(vmm.reasons() == User.into() && !world.running.load(Ordering::SeqCst), "{expected}");
        vmm.start(User).unwrap();
        assert_eq!(world.take(), words(START));
    }
}

#[test]
fn whatever_two_calls_fail_the_set_tells_the_truth() {
    for first in 0..7 {
        for second in first + 1..16 {
            let (world, vmm) = rig(Reasons::NONE);
            world.fail_at([first, second]);
            let error = vmm.stop(Migration).unwrap_err();
            let running = world.running.load(Ordering::SeqCst);
            assert_eq!(vmm.is_running(), running, "{first} {second}: {:?}", world.take());
            if !running {
                assert_eq!(vmm.reasons(), StopReason::Error.into());
                assert!(error.text().contains("the guest stays stopped (reason: error), because"), "{error}");
            }
            let before = vmm.clock_ns();
            std::thread::sleep(Duration::from_micros(100));
            assert_eq!(vmm.clock_ns() > before, running, "the clock runs with the guest");
            world.fail_at([]);
            vmm.start(StopReason::Error).unwrap();
            assert!(vmm.is_running() && world.running.load(Ordering::SeqCst));
        }
    }
}

#[test]
fn a_failing_handler_is_named() {
    let (world, vmm) = rig(Reasons::NONE);
    world.fail_at([5]);
    let error = vmm.stop(User).unwrap_err();
    assert_eq!(error.text(), "run-state handler 3 'b' (priority 1) in stopped failed: planned");
    world.fail_at([3, 6]);
    let error = vmm.stop(User).unwrap_err();
    let first = "run-state handler 2 'a' (priority 1) in prepare-stop failed: planned";
    let expected = format!("the guest stays stopped (reason: error), because planned; at first: {first}");
    assert_eq!(error.text(), expected);
    // The guest is stopped after all, so every handler is told, the one that failed at first included.
    let calls = world.take();
    assert_eq!(calls[calls.len() - 13..], words("stop cps bps aps! bpr cpr start! cps bps aps cS bS aS"));
}

#[test]
fn panics_are_failures() {
    let (world, vmm) = rig(Reasons::NONE);
    let boom = |phase: Phase, _: &Moment| -> Result<()> {
        assert_ne!(phase, Phase::Stopped, "boom");
        Ok(())
    };
    let id = vmm.add_handler("boom", 0, Arc::new(boom)).unwrap();
    let error = vmm.stop(User).unwrap_err();
    assert!(error.text().starts_with("run-state handler 4 'boom' (priority 0) in stopped panicked: "), "{error}");
    assert!(vmm.is_running() && world.running.load(Ordering::SeqCst) && !world.bql.held());
    vmm.remove_handler(id).unwrap();
    vmm.stop(User).unwrap();
}

#[test]
fn a_handler_that_loses_the_lock_fails_and_the_others_have_it() {
    let loser = |world: &Arc<World>, vmm: &Vmm| {
        let bql = Arc::clone(&world.bql);
        let loses = move |phase: Phase, _: &Moment| if phase == Phase::Stopped { bql.unlock() } else { Ok(()) };
        vmm.add_handler("loser", 9, Arc::new(loses)).unwrap();
    };
    let (world, vmm) = rig(Reasons::NONE);
    loser(&world, &vmm);
    let error = vmm.stop(User).unwrap_err();
    let name = "run-state handler 4 'loser' (priority 9)";
    let expected = format!("{name} in stopped returned without the big lock it was called with");
    assert_eq!((error.errno(), error.text()), (libc::EPERM, expected.as_str()));
    // Each call of the rig asserts that the lock is held.
    assert_eq!(world.take(), words("stop cps bps aps apr bpr cpr start"));
    assert!(vmm.is_running() && !world.bql.held());

    let (world, vmm) = rig(User.into());
    loser(&world, &vmm);
    world.fail_at([6]);
    vmm.start(User).unwrap_err();
    assert_eq!(world.take(), words("apr bpr cpr aR bR cR start! cps bps aps cS bS aS"));
    assert!(!world.bql.held());
}

#[test]
fn stopping_and_starting_twice_is_harmless() {
    let (world, vmm) = rig(Reasons::NONE);
    assert!(vmm.stop(User).unwrap().changed);
    assert_eq!(vmm.stop(User).unwrap(), RunReport::default());
    assert_eq!(world.take(), words(STOP));
    assert!(vmm.start(User).unwrap().changed);
    assert_eq!(vmm.start(User).unwrap(), RunReport::default());
    assert_eq!(world.take(), words(START));
}

#[test]
fn a_fresh_guest_is_started_by_the_first_start_and_only_by_it() {
    let (world, vmm) = rig(Reasons::NONE);
    // The rig's guest runs already, as that of a VMM does which starts it by itself.
    world.running.store(false, Ordering::SeqCst);
    assert!(vmm.start(User).unwrap().changed);
    assert_eq!(world.take(), words(START));
    assert!(!vmm.start(User).unwrap().changed);
    assert!(world.take().is_empty());
}

#[test]
fn a_guest_arrives_where_none_runs() {
    let (world, vmm) = rig(Reasons::NONE);
    let before = vmm.expect_arrival().unwrap();
    assert_eq!((vmm.reasons(), world.take().len()), (NotOwner.into(), 0));
    assert_eq!(vmm.start(User).unwrap_err().errno(), libc::EPERM);
    vmm.nobody_arrived(before);
    assert_eq!(vmm.reasons(), User.into());
    let (_world, vmm) = rig(Reasons::NONE);
    vmm.stop(User).unwrap();
    vmm.start(User).unwrap();
    assert_eq!(vmm.expect_arrival().unwrap_err().errno(), libc::EBUSY);
    vmm.stop(User).unwrap();
    let before = vmm.expect_arrival().unwrap();
    assert_eq!(vmm.reasons(), Reasons::from(User).with(NotOwner));
    vmm.nobody_arrived(before);
    vmm.start(User).unwrap();
}

#[test]
fn the_user_has_no_say_between_the_saved_run_state_and_the_handover() {
    let (_world, vmm) = rig(Reasons::NONE);
    vmm.stop(Migration).unwrap();
    vmm.stop(User).unwrap();
    assert_eq!(vmm.seal().unwrap(), Reasons::from(User).with(Migration));
    assert_eq!(vmm.start(User).unwrap_err().errno(), libc::EBUSY);
    assert_eq!(vmm.stop(User).unwrap_err().errno(), libc::EBUSY);
    vmm.stop(NotOwner).unwrap();
    vmm.unseal();
    vmm.stop(User).unwrap();
}

#[test]
fn a_pause_during_a_migration_is_kept() {
    let (world, vmm) = rig(Reasons::NONE);
    vmm.stop(Migration).unwrap();
    assert!(!vmm.stop(User).unwrap().changed);
    assert!(!vmm.start(Migration).unwrap().changed);
    assert_eq!(vmm.reasons(), User.into());
    assert_eq!(world.take(), words(STOP));
    assert!(vmm.start(User).unwrap().changed);
    assert_eq!(world.take(), words(START));
}

#[test]
fn who_does_not_own_the_guest_does_not_start_it() {
    let (world, vmm) = rig(NotOwner.into());
    for reason in [User, Migration, StopReason::Error] {
        vmm.stop(reason).unwrap();
    }
    assert_eq!(vmm.start(User).unwrap_err().errno(), libc::EPERM);
    vmm.start(Migration).unwrap();
    assert!(!vmm.is_running());
    vmm.stop(Migration).unwrap();
    assert_eq!(vmm.reasons().to_string(), "user, migration, error, not-owner");
    vmm.start(NotOwner).unwrap();
    assert_eq!(vmm.reasons().to_string(), "user, migration, error");
    for reason in [User, Migration, StopReason::Error] {
        assert!(world.take().is_empty());
        vmm.start(reason).unwrap();
    }
    assert_eq!(world.take(), words(START));
}

#[test]
fn two_threads_stop_once_and_both_reasons_count() {
    for _ in 0..200 {
        let (world, vmm) = rig(Reasons::NONE);
        let reports: Vec<bool> = std::thread::scope(|scope| {
            let vmm = &vmm;
            let threads = [User, Migration].map(|reason| scope.spawn(move || vmm.stop(reason).unwrap().changed));
            threads.map(|thread| thread.join().unwrap()).into()
        });
        assert_eq!(reports.iter().filter(|changed| **changed).count(), 1);
        assert_eq!(world.take(), words(STOP));
        assert_eq!(vmm.reasons(), Reasons::from(User).with(Migration));
    }
}

#[test]
fn threads_stopping_and_starting_at_random_keep_hook_and_set_together() {
    let (world, vmm) = rig(Reasons::NONE);
    std::thread::scope(|scope| {
        for reason in [User, Migration, StopReason::Error] {
            let vmm = &vmm;
            scope.spawn(move || {
                for _ in 0..500 {
                    vmm.stop(reason).unwrap();
                    assert!(!vmm.is_running() && vmm.reasons().contains(reason));
                    vmm.start(reason).unwrap();
                    assert!(!vmm.reasons().contains(reason));
                }
            });
        }
    });
    assert!(vmm.is_running() && world.running.load(Ordering::SeqCst));
}

/// Hooks that call back into the run state.
struct Recursive(Mutex<Weak<Vmm>>, mpsc::Sender<i32>);

impl Recursive {
    fn again(&self) {
        let vmm = lock(&self.0).upgrade().unwrap();
        for error in [vmm.stop(User).unwrap_err(), vmm.start(User).unwrap_err()] {
            self.1.send(error.errno()).unwrap();
        }
    }
}

impl Hooks for Arc<Recursive> {
    fn stop(&self) -> Result<()> {
        self.again();
        Ok(())
    }
    fn start(&self) -> Result<()> {
        self.again();
        Ok(())
    }
}

#[test]
fn hooks_and_handlers_cannot_stop_or_start() {
    let (tell, told) = mpsc::channel();
    let inner = Arc::new(Recursive(Mutex::new(Weak::new()), tell));
    let vmm = Arc::new(Vmm::new(Box::new(Arc::clone(&inner)), Arc::default(), Arc::default(), Reasons::NONE));
    *lock(&inner.0) = Arc::downgrade(&vmm);
    let call = Arc::clone(&inner);
    let handler = move |_: Phase, _: &Moment| {
        call.again();
        Ok(())
    };
    vmm.add_handler("recursive", 0, Arc::new(handler)).unwrap();
    vmm.stop(Migration).unwrap();
    vmm.start(Migration).unwrap();
    assert_eq!(told.try_iter().collect::<Vec<_>>(), [libc::EDEADLK; 12]);
    let _guard = vmm.bql().guard().unwrap();
    let error = vmm.stop(User).unwrap_err();
    assert_eq!((error.errno(), error.text()), (libc::EDEADLK, "stop must be called without the big lock"));
    assert_eq!(vmm.start(User).unwrap_err().errno(), libc::EDEADLK);
    assert!(vmm.is_running());
}

#[test]
fn handlers_stay_as_they_are_while_they_are_walked() {
    let (world, vmm) = rig(Reasons::NONE);
    let (tell, told) = mpsc::channel();
    let (inner, again) = (Arc::downgrade(&vmm), handler(&world, "x"));
    let busy = move |_: Phase, _: &Moment| {
        let vmm = inner.upgrade().unwrap();
        tell.send(vmm.add_handler("x", 0, Arc::clone(&again)).unwrap_err().errno()).unwrap();
        tell.send(vmm.remove_handler(1).unwrap_err().errno()).unwrap();
        Ok(())
    };
    let id = vmm.add_handler("busy", 0, Arc::new(busy)).unwrap();
    vmm.stop(User).unwrap();
    assert_eq!(told.try_iter().collect::<Vec<_>>(), [libc::EBUSY; 4]);
    vmm.remove_handler(id).unwrap();
    assert_eq!(vmm.remove_handler(id).unwrap_err().errno(), libc::ENOENT);
    // One that joins while the guest is stopped is told of the start, as every handler of a destination is.
    let late = vmm.add_handler("d", 9, handler(&world, "d")).unwrap();
    assert!(late > id);
    world.take();
    vmm.start(User).unwrap();
    assert_eq!(world.take(), words("apr bpr cpr dpr aR bR cR dR start"));
}

#[test]
fn handlers_have_a_limit() {
    let (world, vmm) = rig(User.into());
    let one = handler(&world, "x");
    let added = (0..).take_while(|_| vmm.add_handler("x", 0, Arc::clone(&one)).is_ok()).count();
    assert_eq!(added, crate::vmm::handlers::HANDLERS_MAX - 3);
    assert_eq!(vmm.add_handler("x", 0, one).unwrap_err().errno(), libc::ENOSPC);
}

#[test]
fn the_clock_counts_only_while_the_guest_runs() {
    const NAP: Duration = Duration::from_millis(5);
    let (world, vmm) = rig(User.into());
    assert_eq!(vmm.clock_ns(), 0);
    vmm.set_clock_ns(1 << 40).unwrap();
    std::thread::sleep(NAP);
    assert_eq!(vmm.clock_ns(), 1 << 40);
    world.fail_at([6]);
    vmm.start(User).unwrap_err();
    std::thread::sleep(NAP);
    assert_eq!(vmm.clock_ns(), 1 << 40, "a guest that never ran has not aged");
    vmm.start(User).unwrap();
    std::thread::sleep(NAP);
    let running = vmm.clock_ns();
    assert!(running >= (1 << 40) + 5_000_000);
    assert_eq!(vmm.set_clock_ns(1).unwrap_err().errno(), libc::EBUSY);
    vmm.stop(User).unwrap();
    let stopped = vmm.clock_ns();
    assert!(stopped >= running);
    std::thread::sleep(NAP);
    assert_eq!(vmm.clock_ns(), stopped);
    vmm.set_clock_ns(u64::MAX).unwrap();
    vmm.start(User).unwrap();
    assert_eq!(vmm.clock_ns(), u64::MAX, "a hostile clock does not wrap");
}

#[test]
fn a_failed_stop_does_not_stop_the_clock() {
    let (world, vmm) = rig(Reasons::NONE);
    for n in 0..7 {
        world.fail_at([n]);
        vmm.stop(Migration).unwrap_err();
        let before = vmm.clock_ns();
        std::thread::sleep(Duration::from_millis(1));
        assert!(vmm.clock_ns() >= before + 1_000_000);
    }
}
