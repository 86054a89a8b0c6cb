use super::*;
use std::sync::atomic::AtomicU64;

const NO_KICK: Kick = Kick { signal: 0, install: false };

fn gate(vcpus: usize, timeout_ms: u64) -> Arc<Gate> {
    Gate::new(vcpus, NO_KICK, Duration::from_millis(timeout_ms)).unwrap()
}

fn enter(gate: &Gate, vcpu: usize, flag: &AtomicU8) -> Result<()> {
    // SAFETY: every flag of these tests lives longer than its gate is entered.
    unsafe { gate.enter(vcpu, flag.as_ptr()) }
}

#[test]
fn misuse_is_named() {
    let (gate, flag) = (gate(2, 1000), AtomicU8::new(0));
    gate.open();
    assert_eq!(gate.exit(0).unwrap_err().errno(), libc::EINVAL);
    assert_eq!(gate.exit(2).unwrap_err().errno(), libc::EINVAL);
    assert_eq!(enter(&gate, 2, &flag).unwrap_err().errno(), libc::EINVAL);
    enter(&gate, 1, &flag).unwrap();
    let twice = enter(&gate, 1, &flag).unwrap_err();
    assert!(
        twice.errno() == libc::EBUSY && twice.text().contains(&format!("thread {}", thread_sys::tid())),
        "{twice}"
    );
    assert_eq!(gate.close().unwrap_err().errno(), libc::EDEADLK);
    gate.exit(1).unwrap();
    gate.close().unwrap();
    gate.close().unwrap();
    assert_eq!(gate.throttle(100).unwrap_err().errno(), libc::EINVAL);
    for vcpus in [0, VCPUS_MAX + 1] {
        assert_eq!(Gate::new(vcpus, NO_KICK, SLICE).unwrap_err().errno(), libc::EINVAL);
    }
    let kick = |signal, install| Gate::new(1, Kick { signal, install }, SLICE).unwrap_err().errno();
    assert_eq!(kick(libc::SIGUSR2, false), libc::EINVAL, "no handler: it would kill us");
    assert_eq!((kick(0, true), kick(4711, true)), (libc::EINVAL, libc::EINVAL));
}

#[test]
fn a_handler_is_installed_when_asked_for_and_taken_away() {
    let signal = libc::SIGRTMIN() + 3;
    assert!(!has_handler(signal).unwrap());
    let kick = Kick { signal, install: true };
    let gate = Gate::new(1, kick, SLICE).unwrap();
    assert!(has_handler(signal).unwrap());
    assert_eq!(Gate::new(1, kick, SLICE).unwrap_err().errno(), libc::EBUSY);
    drop(gate);
    assert!(!has_handler(signal).unwrap());
}

#[test]
fn a_vcpu_that_stays_inside_is_named_and_the_gate_opens_again() {
    let (gate, flag) = (gate(3, 30), AtomicU8::new(0));
    gate.open();
    std::thread::scope(|scope| {
        scope.spawn(|| enter(&gate, 2, &flag).unwrap()).join().unwrap();
        let error = gate.close().unwrap_err();
        assert_eq!(error.errno(), libc::ETIMEDOUT);
        assert!(error.text().starts_with("1 of 3 vCPUs") && error.text().contains("vCPU 2"), "{error}");
        assert!(!gate.is_closed() && flag.load(Ordering::SeqCst) == 1);
        gate.exit(2).unwrap();
        gate.close().unwrap();
    });
}

#[test]
fn a_thread_that_ended_inside_is_named() {
    let signal = libc::SIGRTMIN() + 4;
    let gate = Gate::new(1, Kick { signal, install: true }, Duration::from_secs(60)).unwrap();
    let flag = AtomicU8::new(0);
    gate.open();
    let tid = std::thread::scope(|scope| {
        scope.spawn(|| enter(&gate, 0, &flag).map(|()| thread_sys::tid()).unwrap()).join().unwrap()
    });
    assert!(thread_sys::wait_gone(tid, Duration::from_secs(30)));
    let error = gate.close().unwrap_err();
    assert!(error.errno() == libc::ESRCH && error.text().contains("ended inside the gate"), "{error}");
    assert!(!gate.is_closed());
}

/// A thread may get the stack of one that is gone, and with it whatever the library kept there.
#[test]
fn a_thread_that_takes_the_place_of_another_is_told() {
    let signal = libc::SIGRTMIN() + 6;
    let gate = Gate::new(1, Kick { signal, install: true }, Duration::from_secs(60)).unwrap();
    gate.open();
    for _ in 0..5 {
        let (flag, inside) = (AtomicU8::new(0), AtomicU8::new(0));
        let tid = std::thread::scope(|scope| {
            let vcpu = scope.spawn(|| {
                enter(&gate, 0, &flag).unwrap();
                inside.store(1, Ordering::SeqCst);
                while flag.load(Ordering::SeqCst) == 0 {
                    std::thread::yield_now();
                }
                gate.exit(0).unwrap();
                thread_sys::tid()
            });
            while inside.load(Ordering::SeqCst) == 0 {
                std::thread::yield_now();
            }
            gate.close().unwrap();
            vcpu.join().unwrap()
        });
        assert!(thread_sys::wait_gone(tid, Duration::from_secs(30)));
        gate.open();
    }
}

/// A vCPU that goes in while all are sent to nap is told, or is not inside before its nap is over.
#[test]
fn no_vcpu_runs_through_a_nap_that_begins_as_it_goes_in() {
    let (gate, flag, over) = (gate(1, 60_000), AtomicU8::new(0), AtomicU8::new(0));
    let (arrived, missed) = (AtomicU64::new(0), AtomicU64::new(0));
    // Both go on at the same moment, which a barrier that sleeps would not do.
    let meet = |times: u64| {
        arrived.fetch_add(1, Ordering::SeqCst);
        while arrived.load(Ordering::SeqCst) < 2 * times {
            std::hint::spin_loop();
        }
    };
    gate.open();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for number in 0..5000 {
                meet(2 * number + 1);
                enter(&gate, 0, &flag).unwrap();
                if over.load(Ordering::SeqCst) == 0 {
                    while over.load(Ordering::SeqCst) == 0 && flag.load(Ordering::SeqCst) == 0 {
                        std::hint::spin_loop();
                    }
                    missed.fetch_add(u64::from(flag.load(Ordering::SeqCst) == 0), Ordering::SeqCst);
                }
                gate.exit(0).unwrap();
                meet(2 * number + 2);
            }
        });
        for number in 0..5000 {
            meet(2 * number + 1);
            (0..number % 50).for_each(|_| std::hint::spin_loop());
            gate.send_to_nap(Duration::from_secs(3600));
            // Time for it to come in where it must not.
            (0..1000).for_each(|_| std::hint::spin_loop());
            over.store(1, Ordering::SeqCst);
            gate.seats[0].nap_until_ns.store(0, Ordering::SeqCst);
            gate.core.shake();
            meet(2 * number + 2);
            over.store(0, Ordering::SeqCst);
        }
    });
    assert_eq!(missed.into_inner(), 0, "it ran through its nap");
}

/// vCPUs that compute and look at their flag, and vCPUs that sleep in a system call until a signal comes.
#[test]
fn many_vcpus_are_stopped_again_and_again() {
    const VCPUS: usize = 16;
    let signal = libc::SIGRTMIN() + 5;
    let gate = Gate::new(VCPUS, Kick { signal, install: true }, Duration::from_secs(60)).unwrap();
    let (flags, steps): (Vec<_>, Vec<_>) = (0..VCPUS).map(|_| (AtomicU8::new(0), AtomicU64::new(0))).unzip();
    std::thread::scope(|scope| {
        for vcpu in 0..VCPUS {
            let (gate, flag, steps) = (&gate, &flags[vcpu], &steps[vcpu]);
            scope.spawn(move || {
                while enter(gate, vcpu, flag).is_ok() {
                    if vcpu % 2 == 0 {
                        while flag.load(Ordering::SeqCst) == 0 {
                            steps.fetch_add(1, Ordering::SeqCst);
                        }
                    } else {
                        steps.fetch_add(1, Ordering::SeqCst);
                        // A signal that came just before is lost on it.
                        crate::sys::signal::pause();
                    }
                    gate.exit(vcpu).unwrap();
                }
            });
        }
        let all = || steps.iter().map(|n| n.load(Ordering::SeqCst)).collect::<Vec<_>>();
        for _ in 0..20 {
            let before = all();
            gate.open();
            while all().iter().zip(&before).any(|(now, before)| now == before) {
                std::thread::yield_now();
            }
            gate.close().unwrap();
            let stopped = all();
            std::thread::sleep(Duration::from_millis(1));
            assert_eq!(stopped, all(), "somebody ran behind a closed gate");
        }
        gate.open();
        gate.end();
        // The end tells once, which those that sleep may miss.
        gate.close().unwrap();
    });
    assert_eq!(enter(&gate, 0, &flags[0]).unwrap_err().errno(), libc::ECANCELED);
}

#[test]
fn those_who_wait_at_a_closed_gate_hear_of_its_end() {
    let (gate, flag) = (gate(1, 1000), AtomicU8::new(0));
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| enter(&gate, 0, &flag).unwrap_err().errno());
        std::thread::sleep(Duration::from_millis(5));
        gate.end();
        assert_eq!(waits.join().unwrap(), libc::ECANCELED);
    });
}

#[test]
fn a_throttled_vcpu_is_sent_to_nap_and_a_stop_does_not_wait_for_it() {
    let (gate, flag, naps) = (gate(1, 60_000), AtomicU8::new(0), AtomicU64::new(0));
    gate.throttle(50).unwrap();
    gate.throttle(99).unwrap();
    gate.open();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while enter(&gate, 0, &flag).is_ok() {
                while flag.load(Ordering::SeqCst) == 0 {
                    std::hint::spin_loop();
                }
                naps.fetch_add(1, Ordering::SeqCst);
                gate.exit(0).unwrap();
            }
        });
        while naps.load(Ordering::SeqCst) == 0 {
            std::thread::yield_now();
        }
        // It naps for a second now, outside.
        gate.close().unwrap();
        gate.open();
        gate.throttle(0).unwrap();
        gate.throttle(0).unwrap();
        gate.end();
    });
}
