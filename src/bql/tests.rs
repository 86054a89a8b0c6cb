use super::*;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Barrier, mpsc};
use std::thread;

const SHORT: Duration = Duration::from_millis(10);

fn own(bql: &Bql) -> &TicketLock {
    match &bql.kind {
        Kind::Own(own) => own,
        Kind::External { .. } => panic!("not ours"),
    }
}

/// Threads that drew a ticket and are not served yet, plus the one that is.
fn in_line(bql: &Bql) -> u64 {
    own(bql).in_line()
}

fn until(what: &str, ready: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !ready() {
        assert!(Instant::now() < deadline, "{what} did not happen");
        thread::sleep(Duration::from_micros(200));
    }
}

#[test]
fn eight_threads_are_served_in_the_order_they_came() {
    let bql = Bql::new();
    let order = Mutex::new(Vec::new());
    for _ in 0..20 {
        let first = bql.guard().unwrap();
        thread::scope(|scope| {
            for n in 0..8u64 {
                let (bql, order) = (&bql, &order);
                scope.spawn(move || {
                    let _guard = bql.guard().unwrap();
                    order.lock().unwrap().push(n);
                });
                until("drawing a ticket", || in_line(bql) == n + 2);
            }
            drop(first);
            // The one that had it comes back at once: a lock that lets it barge in would serve it before the others.
            let _again = bql.guard().unwrap();
            order.lock().unwrap().push(8);
        });
        assert_eq!(std::mem::take(&mut *order.lock().unwrap()), [0, 1, 2, 3, 4, 5, 6, 7, 8]);
    }
}

#[test]
fn under_stress_nobody_overtakes_and_nobody_shares() {
    const THREADS: u64 = 8;
    const ROUNDS: u64 = 5_000;
    let bql = Bql::new();
    let (last, overtaken) = (AtomicU64::new(0), AtomicU64::new(0));
    let inside = AtomicBool::new(false);
    let start = Barrier::new(8);
    let newest: Vec<u64> = thread::scope(|scope| {
        let run = || {
            start.wait();
            let mut newest = 0;
            for round in 0..ROUNDS {
                let ticket = own(&bql).acquire().0;
                assert!(!inside.swap(true, Ordering::Relaxed), "two threads inside");
                if last.load(Ordering::Relaxed) != ticket {
                    overtaken.fetch_add(1, Ordering::Relaxed);
                }
                last.store(ticket + 1, Ordering::Relaxed);
                assert!(bql.held());
                if round % 64 == 0 {
                    thread::yield_now();
                }
                newest = ticket;
                inside.store(false, Ordering::Relaxed);
                own(&bql).release();
                assert!(!bql.held());
            }
            newest
        };
        let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(run)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(overtaken.into_inner(), 0);
    assert_eq!(newest.into_iter().max(), Some(THREADS * ROUNDS - 1));
    assert!(own(&bql).nobody_sleeps());
}

#[test]
fn owner_is_known_and_misuse_is_an_error() {
    let bql = Bql::new();
    assert!(!bql.held());
    assert_eq!(bql.unlock().unwrap_err().errno(), libc::EPERM);
    assert_eq!(bql.wait(None).unwrap_err().errno(), libc::EPERM);
    assert_eq!(bql.require_held("vmig_add_ram").unwrap_err().errno(), libc::EPERM);
    bql.lock().unwrap();
    assert!(bql.held() && bql.require_held("x").is_ok());
    assert_eq!(bql.lock().unwrap_err().errno(), libc::EDEADLK);
    assert_eq!(bql.require_free("vmig_stop").unwrap_err().text(), "vmig_stop must be called without the big lock");
    thread::scope(|scope| {
        scope.spawn(|| {
            assert!(!bql.held());
            assert_eq!(bql.unlock().unwrap_err().errno(), libc::EPERM);
        });
    });
    bql.unlock().unwrap();
    assert!(!bql.held());
}

#[test]
fn no_wake_up_is_lost() {
    let bql = Bql::new();
    // A baton goes round; one lost wake-up stops it, and the timeout then fails the test.
    let (baton, laps) = (AtomicU64::new(0), 3_000);
    thread::scope(|scope| {
        for me in 0..3u64 {
            let (bql, baton) = (&bql, &baton);
            scope.spawn(move || {
                let guard = bql.guard().unwrap();
                loop {
                    let at = baton.load(Ordering::Relaxed);
                    if at >= laps {
                        break;
                    }
                    if at % 3 == me {
                        baton.store(at + 1, Ordering::Relaxed);
                        bql.wake_all();
                    } else {
                        assert!(guard.wait(Some(Duration::from_secs(20))).unwrap(), "lost at {at}");
                        assert!(bql.held());
                    }
                }
            });
        }
    });
    assert_eq!(baton.into_inner(), laps);
}

#[test]
fn a_wait_times_out_with_the_lock_in_hand_and_free_meanwhile() {
    let bql = Bql::new();
    let guard = bql.guard().unwrap();
    thread::scope(|scope| {
        let other = scope.spawn(|| drop(bql.guard().unwrap()));
        until("in line", || in_line(&bql) == 2);
        let began = Instant::now();
        assert!(!guard.wait(Some(SHORT)).unwrap());
        assert!(began.elapsed() >= SHORT && bql.held());
        other.join().unwrap();
    });
}

#[test]
fn statistics_count_waits_and_holds() {
    let bql = Bql::new();
    let guard = bql.guard().unwrap();
    thread::scope(|scope| {
        scope.spawn(|| drop(bql.guard().unwrap()));
        until("waiting", || in_line(&bql) == 2);
        thread::sleep(SHORT);
        drop(guard);
    });
    let stats = bql.stats();
    let short = u64::try_from(SHORT.as_nanos()).unwrap();
    assert_eq!((stats.acquisitions, stats.contended), (2, 1));
    assert!(stats.wait_max_ns >= short && stats.wait_total_ns == stats.wait_max_ns, "{stats:?}");
    assert!(stats.hold_max_ns >= short && stats.hold_total_ns > stats.hold_max_ns, "{stats:?}");
}

#[test]
fn a_panic_gives_the_lock_up() {
    let bql = Bql::new();
    let error = crate::thread::fence("callback", || -> Result<()> {
        let _guard = bql.guard()?;
        panic!("boom")
    });
    assert!(error.is_err() && !bql.held());
    bql.lock().unwrap();
    bql.unlock().unwrap();
}

/// A VMM's lock: a ticket lock of its own, with or without `held`.
struct Theirs {
    lock: TicketLock,
    tells: bool,
}

impl RawLock for Arc<Theirs> {
    fn lock(&self) {
        self.lock.acquire();
    }
    fn unlock(&self) {
        self.lock.release();
    }
    fn held(&self) -> Option<bool> {
        self.tells.then(|| self.lock.owner() == current_token())
    }
}

fn theirs(tells: bool) -> (Arc<Theirs>, Bql) {
    let raw = Arc::new(Theirs { lock: TicketLock::new(), tells });
    let bql = Bql::external(Box::new(Arc::clone(&raw)));
    (raw, bql)
}

#[test]
fn the_vmms_lock_is_asked_who_holds_it() {
    let (raw, bql) = theirs(true);
    raw.lock();
    assert!(bql.held() && bql.knows_owner());
    assert_eq!(bql.lock().unwrap_err().errno(), libc::EDEADLK);
    bql.unlock().unwrap();
    assert!(!bql.held());
    assert_eq!(bql.unlock().unwrap_err().errno(), libc::EPERM);
    assert_eq!(bql.stats(), BqlStats::default());
}

#[test]
fn without_held_our_own_record_answers() {
    let (raw, bql) = theirs(false);
    raw.lock();
    assert!(!bql.held() && !bql.knows_owner());
    bql.require_held("vmig_add_ram").unwrap();
    raw.unlock();
    bql.lock().unwrap();
    assert!(bql.held());
    assert_eq!(bql.lock().unwrap_err().errno(), libc::EDEADLK);
    // The VMM drops its lock in a wait of its own; another thread locks through us meanwhile.
    raw.unlock();
    thread::scope(|scope| {
        scope.spawn(|| {
            assert!(!bql.held());
            drop(bql.guard().unwrap());
        });
    });
    raw.lock();
    assert!(bql.held());
    bql.unlock().unwrap();
    // The other thread came while we were listed, which is all that can be known of a lock that is not ours.
    assert_eq!((bql.stats().acquisitions, bql.stats().contended), (2, 1));
}

#[test]
fn the_vmms_lock_can_be_waited_with() {
    let (raw, bql) = theirs(false);
    let (ready, go) = mpsc::channel();
    thread::scope(|scope| {
        let (bql, raw) = (&bql, &raw);
        scope.spawn(move || {
            let guard = bql.guard().unwrap();
            ready.send(()).unwrap();
            assert!(guard.wait(Some(Duration::from_secs(20))).unwrap());
        });
        go.recv().unwrap();
        raw.lock();
        bql.wake_all();
        raw.unlock();
    });
    let stats = bql.stats();
    assert_eq!((stats.acquisitions, stats.contended), (2, 0));
    assert!(stats.hold_total_ns > 0);
}

#[test]
fn a_mixed_load_of_waits_and_locks_loses_nothing() {
    // Producers and consumers over one condition: every item is taken once, whoever is woken.
    const ITEMS: u64 = 4_000;
    let bql = Bql::new();
    let (made, taken) = (AtomicU64::new(0), AtomicU64::new(0));
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..ITEMS / 4 {
                    let _guard = bql.guard().unwrap();
                    made.store(made.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
                    bql.wake_all();
                }
            });
            scope.spawn(|| {
                for _ in 0..ITEMS / 4 {
                    let guard = bql.guard().unwrap();
                    while made.load(Ordering::Relaxed) == taken.load(Ordering::Relaxed) {
                        assert!(guard.wait(Some(Duration::from_secs(20))).unwrap(), "a wake-up was lost");
                    }
                    taken.store(taken.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
                }
            });
        }
    });
    assert_eq!((made.into_inner(), taken.into_inner()), (ITEMS, ITEMS));
    let stats = bql.stats();
    assert!(stats.acquisitions >= 2 * ITEMS && stats.contended <= stats.acquisitions, "{stats:?}");
    assert!(stats.wait_max_ns <= stats.wait_total_ns && stats.hold_max_ns <= stats.hold_total_ns);
}
