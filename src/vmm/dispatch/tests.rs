use super::*;
use crate::bql::Bql;
use crate::vmm::{Hooks, Reasons, StopReason, Vmm};
use std::sync::atomic::AtomicU32;

fn queue(limit_ms: u64) -> Dispatch {
    let dispatch = Dispatch::new(&Arc::new(Home::new()));
    dispatch.set_timeout(limit_ms);
    dispatch.set_manual(true).unwrap();
    dispatch
}

fn is_readable(dispatch: &Dispatch) -> bool {
    let fd = std::os::fd::AsFd::as_fd(dispatch.fd().unwrap());
    let never = EventFd::new().unwrap();
    let soon = Instant::now() + Duration::from_millis(1);
    crate::sys::io::wait_any(&[fd], std::os::fd::AsFd::as_fd(&never), Some(soon)).is_ok()
}

#[test]
fn a_callback_runs_on_the_vmms_thread_and_its_caller_gets_the_result() {
    let dispatch = queue(60_000);
    let here = crate::thread::current_token();
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| {
            let mut local = 0;
            let ran_on = dispatch.run("it", || {
                local = 7;
                Ok(crate::thread::current_token())
            });
            (ran_on, local)
        });
        while dispatch.run_queued() == 0 {
            assert!(dispatch.await_more(Duration::from_secs(30)) && is_readable(&dispatch));
        }
        assert_eq!(asked.join().unwrap(), (Ok(here), 7));
    });
    assert!(!is_readable(&dispatch));
}

#[test]
fn a_callback_that_nobody_dispatches_never_runs() {
    let (dispatch, ran) = (queue(5), AtomicU32::new(0));
    let add = || Ok(ran.fetch_add(1, Ordering::SeqCst));
    let error =
        std::thread::scope(|scope| scope.spawn(|| dispatch.run("the stop hook", add).unwrap_err()).join().unwrap());
    assert_eq!(error.errno(), libc::ETIMEDOUT);
    assert!(error.text().contains("the stop hook") && error.place().option.as_deref() == Some(TIMEOUT), "{error}");
    assert_eq!((dispatch.run_queued(), ran.load(Ordering::SeqCst)), (0, 0));
}

#[test]
fn what_must_happen_runs_when_somebody_dispatches() {
    let (dispatch, ran) = (queue(5), Arc::new(AtomicU32::new(0)));
    let add = |ran: &Arc<AtomicU32>| {
        let ran = Arc::clone(ran);
        move || Ok(ran.fetch_add(1, Ordering::SeqCst))
    };
    let left = || dispatch.run_or_leave("cleanup", add(&ran)).unwrap_err().errno();
    std::thread::scope(|scope| {
        assert_eq!(scope.spawn(left).join().unwrap(), libc::ETIMEDOUT);
        assert_eq!(ran.load(Ordering::SeqCst), 0);
        // Nobody is there: the next one is not waited for, however long it might be.
        dispatch.set_timeout(3_600_000);
        assert_eq!(scope.spawn(left).join().unwrap(), libc::ETIMEDOUT);
    });
    assert_eq!((dispatch.run_queued(), ran.load(Ordering::SeqCst)), (2, 2));
}

#[test]
fn one_that_was_begun_is_waited_for_beyond_the_limit() {
    let dispatch = queue(20);
    let slow = || {
        std::thread::sleep(Duration::from_millis(100));
        Ok(1)
    };
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| dispatch.run("it", slow));
        assert!(dispatch.await_more(Duration::from_secs(30)));
        dispatch.run_queued();
        assert_eq!(asked.join().unwrap(), Ok(1));
    });
}

#[test]
fn a_panic_is_its_callers_error() {
    let dispatch = queue(60_000);
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| dispatch.run("the stop hook", || -> Result<()> { panic!("boom") }));
        assert!(dispatch.await_more(Duration::from_secs(30)));
        assert_eq!(dispatch.run_queued(), 1);
        assert_eq!(asked.join().unwrap().unwrap_err().text(), "the stop hook panicked: boom");
        assert!(dispatch.home().require_outside("go on").is_ok(), "the thread left the callback");
    });
}

#[test]
fn a_wait_runs_the_queue_and_has_a_deadline() {
    let dispatch = queue(60_000);
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| dispatch.run("it", || Ok(3)));
        assert!(dispatch.pump(None, || asked.is_finished().then_some(())).is_some());
        assert_eq!(asked.join().unwrap(), Ok(3));
    });
    let never = || -> Option<()> { None };
    assert!(dispatch.pump(Some(Instant::now()), never).is_none());
}

#[test]
fn lines_of_log_have_a_limit_and_those_lost_are_counted() {
    let (dispatch, seen) = (queue(5), Arc::new(Mutex::new(Vec::new())));
    let write = |n: usize| {
        let seen = Arc::clone(&seen);
        dispatch.line(move |lost| lock(&seen).push((n, lost)));
    };
    std::thread::scope(|scope| {
        scope.spawn(|| (0..LINES_MAX + 3).for_each(write));
    });
    assert_eq!(dispatch.run_queued(), LINES_MAX);
    std::thread::scope(|scope| {
        scope.spawn(|| write(999));
    });
    dispatch.run_queued();
    write(1000);
    let seen = lock(&seen);
    assert_eq!((seen.len(), seen[LINES_MAX], seen[LINES_MAX + 1]), (LINES_MAX + 2, (999, 3), (1000, 0)));
}

#[derive(Default)]
struct Calls(AtomicU32);

impl Hooks for Arc<Calls> {
    fn stop(&self) -> Result<()> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
    fn start(&self) -> Result<()> {
        self.stop()
    }
}

#[test]
fn without_a_dispatch_nothing_runs_and_what_needs_none_is_done() {
    let calls = Arc::<Calls>::default();
    let vmm = Vmm::new(Box::new(Arc::clone(&calls)), Arc::new(Bql::new()), Arc::default(), Reasons::NONE);
    vmm.dispatch().set_timeout(5);
    vmm.dispatch().set_manual(true).unwrap();
    let elsewhere = |f: &(dyn Fn() -> Result<()> + Sync)| std::thread::scope(|s| s.spawn(f).join().unwrap());
    let stop = |reason| vmm.stop(reason).map(drop);
    assert_eq!(elsewhere(&|| stop(StopReason::Migration)).unwrap_err().errno(), libc::ETIMEDOUT);
    assert!(vmm.is_running());
    stop(StopReason::Migration).unwrap();
    // The guest is given away, and taken back, whether or not anybody dispatches.
    elsewhere(&|| stop(StopReason::NotOwner)).unwrap();
    elsewhere(&|| vmm.start(StopReason::Migration).map(drop)).unwrap();
    assert_eq!(vmm.reasons(), StopReason::NotOwner.into());
    // One that arrives and is not started did not run an instruction.
    assert_eq!(elsewhere(&|| vmm.take_over(true).map(drop)).unwrap_err().errno(), libc::ETIMEDOUT);
    vmm.dispatch().run_queued();
    assert_eq!((vmm.reasons(), calls.0.load(Ordering::SeqCst)), (StopReason::NotOwner.into(), 1));
    elsewhere(&|| vmm.take_over(false).map(drop)).unwrap();
    assert_eq!(vmm.reasons(), StopReason::User.into());
}

#[test]
fn an_errand_is_done_outside_of_callbacks_and_may_wait_for_some() {
    let dispatch = queue(60_000);
    let here = crate::thread::current_token();
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| {
            dispatch.errand("it", || {
                dispatch.home().require_outside("go on")?;
                let callback = scope.spawn(|| dispatch.run("a callback", || Ok(crate::thread::current_token())));
                let ran_on = dispatch.pump(None, || callback.is_finished().then_some(()));
                // Another errand waits until this one is done.
                assert_eq!((ran_on, dispatch.run_errands()), (Some(()), 0));
                Ok((crate::thread::current_token(), callback.join().unwrap()?))
            })
        });
        while !is_readable(&dispatch) {}
        assert_eq!((dispatch.run_queued(), is_readable(&dispatch), dispatch.run_errands()), (0, true, 1));
        assert_eq!(asked.join().unwrap(), Ok((here, here)));
    });
    assert!(!is_readable(&dispatch));
    assert_eq!(dispatch.errand("it", || Ok(1)), Ok(1), "on the VMM's thread there is nobody to ask");
}

#[test]
fn an_errand_that_is_not_begun_is_not_done_and_callbacks_wait_as_ever() {
    let (dispatch, ran) = (queue(5), AtomicU32::new(0));
    let errand = || dispatch.errand("command 'x'", || Ok(ran.fetch_add(1, Ordering::SeqCst)));
    std::thread::scope(|scope| {
        let error = scope.spawn(errand).join().unwrap().unwrap_err();
        assert!(error.errno() == libc::ETIMEDOUT && error.text().contains("command 'x'"), "{error}");
        dispatch.set_timeout(3_600_000);
        let callback = scope.spawn(|| dispatch.run("it", || Ok(7)));
        assert!(dispatch.await_more(Duration::from_secs(30)));
        assert_eq!((dispatch.run_queued(), callback.join().unwrap()), (1, Ok(7)));
        let last = scope.spawn(errand);
        while !is_readable(&dispatch) {}
        dispatch.close_errands();
        assert!(last.join().unwrap().is_err() && scope.spawn(errand).join().unwrap().is_err());
    });
    assert_eq!((dispatch.run_errands(), ran.load(Ordering::SeqCst)), (0, 0));
}

#[test]
fn nothing_is_left_waiting_when_dispatch_is_auto_again() {
    let dispatch = queue(60_000);
    let here = crate::thread::current_token();
    std::thread::scope(|scope| {
        let errand = scope.spawn(|| dispatch.errand("it", || Ok(crate::thread::current_token())));
        while !is_readable(&dispatch) {}
        dispatch.set_manual(false).unwrap();
        assert_eq!((dispatch.run_errands(), errand.join().unwrap()), (0, Ok(here)));
    });
    // One who found it manual just before does himself what nobody dispatches.
    let nobody = || dispatch.ask("it", || Ok(crate::thread::current_token()), |queue, task| queue.push(task, false));
    let ran_on = std::thread::scope(|scope| scope.spawn(nobody).join().unwrap());
    assert!(ran_on.is_ok_and(|thread| thread != here));
}
