//! What std does not say about threads: signal masks and kernel ids.
#![allow(unsafe_code, reason = "signal masks, priorities and gettid have no safe wrapper in std")]

use std::mem::MaybeUninit;
use std::ptr;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};

/// Kernel id of the calling thread, as /proc and debuggers show it.
pub fn tid() -> i32 {
    // SAFETY: gettid takes no arguments and cannot fail.
    unsafe { libc::gettid() }
}

/// Waits, at most `limit`, until the kernel has forgotten a joined thread of this process; false: it still knows it.
///
/// A join returns when the thread's last instruction is done, moments before it leaves /proc and the thread count.
pub fn wait_gone(tid: i32, limit: Duration) -> bool {
    let deadline = Instant::now() + limit;
    loop {
        // SAFETY: getpid takes no arguments and cannot fail.
        let pid = unsafe { libc::getpid() };
        // SAFETY: signal 0 is never delivered, it only asks whether the thread exists.
        if unsafe { libc::syscall(libc::SYS_tgkill, pid, tid, 0) } != 0 {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(Duration::from_micros(20));
    }
}

/// Lets the calling thread, and no other, stand back by so much for whoever wants its processor. It cannot come forward
/// again without a privilege, so this is for threads that live as long as a migration.
pub fn stand_back(nice: i32) {
    // SAFETY: getpriority takes no pointers; for PRIO_PROCESS Linux takes 0 as the calling thread.
    let now = unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
    // SAFETY: setpriority takes no pointers, and 0 as above.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, now + nice) };
}

/// What a thread raises by its own doing. Blocking these would not keep them away: the kernel kills the process
/// instead of calling a handler, and a VMM's handler may well be what backs guest RAM.
const OWN_DOING: [i32; 5] = [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGTRAP];

/// Runs `f` with every signal blocked on this thread that comes from outside, then restores the mask.
///
/// A thread created inside inherits the mask from its first instruction on, so no signal meant for the VMM's threads
/// can ever land on it.
pub fn with_signals_blocked<T>(f: impl FnOnce() -> T) -> Result<T> {
    struct Restore(libc::sigset_t);
    impl Drop for Restore {
        fn drop(&mut self) {
            // SAFETY: the set was filled by pthread_sigmask below; a null third argument means "not interested".
            unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.0, ptr::null_mut()) };
        }
    }
    let mut all = MaybeUninit::uninit();
    // SAFETY: sigfillset initialises the set it is given and fails only for a null pointer.
    unsafe { libc::sigfillset(all.as_mut_ptr()) };
    for signal in OWN_DOING {
        // SAFETY: the set was initialised by sigfillset, and the number is a signal's.
        unsafe { libc::sigdelset(all.as_mut_ptr(), signal) };
    }
    let mut old = MaybeUninit::uninit();
    // SAFETY: `all` was initialised by sigfillset; `old` is room for one set.
    let err = unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), old.as_mut_ptr()) };
    if err != 0 {
        return Err(Error::new(err, "cannot block the signals of a thread"));
    }
    // SAFETY: pthread_sigmask succeeded, so it filled `old`.
    let _restore = Restore(unsafe { old.assume_init() });
    Ok(f())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blocked() -> String {
        let status = std::fs::read_to_string(format!("/proc/self/task/{}/status", tid())).unwrap();
        status.lines().find_map(|l| l.strip_prefix("SigBlk:")).unwrap().trim().to_owned()
    }

    #[test]
    fn gone_is_told_from_alive() {
        assert!(!wait_gone(tid(), Duration::from_millis(1)));
        let ended = std::thread::spawn(tid).join().unwrap();
        assert!(wait_gone(ended, Duration::from_secs(5)));
        assert!(!std::path::Path::new(&format!("/proc/self/task/{ended}")).exists());
    }

    #[test]
    fn the_mask_covers_what_comes_from_outside_and_is_restored() {
        let before = blocked();
        let (mine, childs) = with_signals_blocked(|| {
            let child = std::thread::spawn(blocked);
            (blocked(), child.join().unwrap())
        })
        .unwrap();
        // All 64 but a thread's own doing, SIGKILL (9), SIGSTOP (19) and the two libc keeps for itself (32, 33).
        let own = OWN_DOING.iter().fold(0, |set, signal| set | 1 << (signal - 1));
        assert_eq!(u64::from_str_radix(&mine, 16).unwrap(), !(own | 1 << 8 | 1 << 18 | 1 << 31 | 1 << 32));
        assert_eq!(mine, childs);
        assert_eq!(blocked(), before);
        assert_ne!(before, mine);
    }
}
