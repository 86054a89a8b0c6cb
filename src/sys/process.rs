//! Child processes: posix_spawn(3), which does not copy our page tables, and pidfds, which never mean another process.
#![allow(unsafe_code, reason = "system calls live here")]

use std::ffi::{CString, c_char};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;
use std::time::{Duration, Instant};

use crate::error::{Error, Result, strerror};

/// How long a process that was killed may take to be gone.
const KILL_WAIT: Duration = Duration::from_secs(5);

/// How a child ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// By itself, with this status.
    Status(i32),
    /// By this signal.
    Signal(i32),
    /// Somebody else in the process took the news: it waits for children that are not its own, or ignores SIGCHLD.
    Unknown,
}

/// A child that was not reaped yet, the first of a process group of its own. It is killed and reaped when dropped.
#[derive(Debug)]
pub struct Child {
    pid: libc::pid_t,
    pidfd: OwnedFd,
    reaped: bool,
}

/// A child's ends of three pipes are ours.
#[derive(Debug)]
pub struct Spawned {
    /// The process.
    pub child: Child,
    /// Writes to its standard input.
    pub input: OwnedFd,
    /// Reads from its standard output.
    pub output: OwnedFd,
    /// Reads from its standard error.
    pub errors: OwnedFd,
}

/// Both ends of a pipe, close-on-exec: reading, writing.
fn pipe() -> Result<(OwnedFd, OwnedFd)> {
    let mut fds = [-1; 2];
    // SAFETY: fds is room for two descriptors.
    if unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC) } < 0 {
        return Err(Error::last_os("making a pipe to a command"));
    }
    // SAFETY: the kernel just gave us this descriptor and nobody else knows it.
    let reading = unsafe { OwnedFd::from_raw_fd(fds[0]) };
    // SAFETY: as above.
    Ok((reading, unsafe { OwnedFd::from_raw_fd(fds[1]) }))
}

/// What a spawn needs besides the command; frees itself.
struct Setup {
    actions: libc::posix_spawn_file_actions_t,
    attributes: libc::posix_spawnattr_t,
}

fn worked(what: &str, errno: i32) -> Result<()> {
    if errno == 0 { Ok(()) } else { Err(Error::new(errno, format!("{what}: {}", strerror(errno)))) }
}

impl Setup {
    fn new() -> Result<Self> {
        let mut actions = MaybeUninit::uninit();
        // SAFETY: room for one set of file actions, which the call initialises.
        worked("preparing a command", unsafe { libc::posix_spawn_file_actions_init(actions.as_mut_ptr()) })?;
        let mut attributes = MaybeUninit::uninit();
        // SAFETY: room for one set of attributes. It fails only for lack of memory, which Linux's C libraries do not need.
        worked("preparing a command", unsafe { libc::posix_spawnattr_init(attributes.as_mut_ptr()) })?;
        // SAFETY: initialised just above.
        let actions = unsafe { actions.assume_init() };
        // SAFETY: initialised just above.
        let attributes = unsafe { attributes.assume_init() };
        Ok(Self { actions, attributes })
    }

    /// The child's standard descriptors; it has no others, whatever the VMM forgot to mark close-on-exec.
    fn wire(&mut self, fds: [BorrowedFd<'_>; 3]) -> Result<()> {
        for (fd, number) in fds.iter().zip(0..) {
            // SAFETY: the actions were initialised by new().
            let errno =
                unsafe { libc::posix_spawn_file_actions_adddup2(&raw mut self.actions, fd.as_raw_fd(), number) };
            worked("preparing a command's descriptors", errno)?;
        }
        #[cfg(target_env = "gnu")]
        {
            // SAFETY: as above.
            let errno = unsafe { libc::posix_spawn_file_actions_addclosefrom_np(&raw mut self.actions, 3) };
            worked("preparing a command's descriptors", errno)?;
        }
        Ok(())
    }

    /// No signal blocked or ignored, whatever our thread and the VMM do; a group of its own, so that all of a pipeline
    /// can be killed.
    fn manners(&mut self) -> Result<()> {
        let mut set = MaybeUninit::uninit();
        // SAFETY: sigemptyset initialises the set it is given.
        unsafe { libc::sigemptyset(set.as_mut_ptr()) };
        // SAFETY: the attributes and the set are initialised.
        let errno = unsafe { libc::posix_spawnattr_setsigmask(&raw mut self.attributes, set.as_ptr()) };
        worked("preparing a command's signals", errno)?;
        // SAFETY: as above; a full set is an initialised one.
        unsafe { libc::sigfillset(set.as_mut_ptr()) };
        for fixed in [libc::SIGKILL, libc::SIGSTOP] {
            // SAFETY: the set is initialised, and the number is a signal's.
            unsafe { libc::sigdelset(set.as_mut_ptr(), fixed) };
        }
        // SAFETY: the attributes and the set are initialised.
        let errno = unsafe { libc::posix_spawnattr_setsigdefault(&raw mut self.attributes, set.as_ptr()) };
        worked("preparing a command's signals", errno)?;
        // SAFETY: the attributes are initialised; 0 is a new group.
        let errno = unsafe { libc::posix_spawnattr_setpgroup(&raw mut self.attributes, 0) };
        worked("preparing a command's group", errno)?;
        let flags = libc::POSIX_SPAWN_SETSIGMASK | libc::POSIX_SPAWN_SETSIGDEF | libc::POSIX_SPAWN_SETPGROUP;
        let flags = i16::try_from(flags).unwrap_or_default();
        // SAFETY: the attributes are initialised.
        let errno = unsafe { libc::posix_spawnattr_setflags(&raw mut self.attributes, flags) };
        worked("preparing a command", errno)
    }

    fn spawn(&self, arguments: &[&CString]) -> Result<libc::pid_t> {
        let mut argv: Vec<*mut c_char> = arguments.iter().map(|a| a.as_ptr().cast_mut()).collect();
        argv.push(ptr::null_mut());
        let mut pid = 0;
        // SAFETY: path and arguments are strings that live here, the list ends with null; actions and attributes are
        // initialised; environ is what a C program hands on, which posix_spawn only reads.
        let errno = unsafe {
            libc::posix_spawn(
                &raw mut pid,
                argv[0],
                &raw const self.actions,
                &raw const self.attributes,
                argv.as_ptr(),
                environ.cast_const(),
            )
        };
        worked("starting /bin/sh", errno).map(|()| pid)
    }
}

unsafe extern "C" {
    static environ: *mut *mut c_char;
}

impl Drop for Setup {
    fn drop(&mut self) {
        // SAFETY: initialised by new(), destroyed once.
        unsafe { libc::posix_spawn_file_actions_destroy(&raw mut self.actions) };
        // SAFETY: as above.
        unsafe { libc::posix_spawnattr_destroy(&raw mut self.attributes) };
    }
}

/// Starts `/bin/sh -c command` with pipes as its standard descriptors.
pub fn spawn_shell(command: &str) -> Result<Spawned> {
    let text = |text: &str| CString::new(text).map_err(|_| Error::invalid("a command contains a NUL"));
    let (shell, dash_c, command) = (text("/bin/sh")?, text("-c")?, text(command)?);
    let (their_input, input) = pipe()?;
    let (output, their_output) = pipe()?;
    let (errors, their_errors) = pipe()?;
    let mut setup = Setup::new()?;
    setup.wire([their_input.as_fd(), their_output.as_fd(), their_errors.as_fd()])?;
    setup.manners()?;
    let pid = setup.spawn(&[&shell, &dash_c, &command])?;
    let child = Child::new(pid)?;
    Ok(Spawned { child, input, output, errors })
}

impl Child {
    /// Of a process that was just started.
    fn new(pid: libc::pid_t) -> Result<Self> {
        // SAFETY: pidfd_open takes no pointers. Close-on-exec is how pidfds are made.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        let Some(fd) = i32::try_from(fd).ok().filter(|fd| *fd >= 0) else {
            let error = Error::last_os("pidfd_open");
            // SAFETY: kill takes no pointers; the process is our child, which nobody reaped, so the number is still its.
            unsafe { libc::kill(-pid, libc::SIGKILL) };
            // SAFETY: no status is asked for.
            unsafe { libc::waitpid(pid, ptr::null_mut(), 0) };
            return Err(error);
        };
        // SAFETY: the kernel just gave us this descriptor and nobody else knows it.
        Ok(Self { pid, pidfd: unsafe { OwnedFd::from_raw_fd(fd) }, reaped: false })
    }

    /// Readable when it has ended.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Sends a signal to it and to all of its group.
    pub fn signal(&self, signal: i32) {
        // While the child is not reaped its number, and so the group's, belongs to nobody else.
        if !self.reaped {
            // SAFETY: kill takes no pointers.
            unsafe { libc::kill(-self.pid, signal) };
        }
    }

    /// How it ended, after which it is gone; none: it still runs.
    pub fn reap(&mut self) -> Option<Exit> {
        match self.wait(libc::WNOHANG) {
            Ok(info) => self.exit(&info),
            Err(_) => {
                self.reaped = true;
                Some(Exit::Unknown)
            }
        }
    }

    fn wait(&self, flags: i32) -> io::Result<libc::siginfo_t> {
        // SAFETY: an all-zero siginfo_t is valid.
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        let id = libc::id_t::try_from(self.pidfd.as_raw_fd()).unwrap_or_default();
        loop {
            // SAFETY: info is room for one siginfo_t.
            if unsafe { libc::waitid(libc::P_PIDFD, id, &raw mut info, libc::WEXITED | flags) } == 0 {
                return Ok(info);
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }

    fn exit(&mut self, info: &libc::siginfo_t) -> Option<Exit> {
        // SAFETY: waitid fills these members, with zeros if nobody ended.
        if unsafe { info.si_pid() } == 0 {
            return None;
        }
        self.reaped = true;
        // SAFETY: as above.
        let status = unsafe { info.si_status() };
        Some(if info.si_code == libc::CLD_EXITED { Exit::Status(status) } else { Exit::Signal(status) })
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if !self.reaped {
            self.signal(libc::SIGKILL);
            // A killed process ends at once unless the kernel holds it; then it stays our zombie.
            let deadline = Some(Instant::now() + KILL_WAIT);
            let _ = super::io::wait(None, false, self.pidfd.as_fd(), deadline);
            let _ = self.wait(libc::WNOHANG);
        }
    }
}
