//! A channel of each kind, and its other end in the hands of the test.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use vmig::sys::eventfd::Wake;
use vmig::thread::Threads;
use vmig::transport::custom::Schemes;
use vmig::transport::file::{FdSets, KeepsFdSets};
use vmig::transport::uri::Uri;
use vmig::transport::{self, Channel, Listener, Means, Target};
use vmig::vmm::channel::{CChannels, CScheme};

use super::scheme::{self, Counts};
use crate::common::scratch;

/// How long anything here may take on a busy machine.
pub(crate) const LONG: Duration = Duration::from_secs(60);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Tcp,
    Unix,
    Fd,
    Custom,
    /// A command that passes everything on, both ways.
    Exec,
    /// Only written to, or only read from.
    PipeOut,
    PipeIn,
    FileOut,
    FileIn,
    /// `fd:` of a plain file.
    FdFileOut,
    FdFileIn,
    /// `file:` of a numbered set.
    SetOut,
    SetIn,
}
use Kind::*;

impl Kind {
    /// Neither waits nor has anybody at the other end.
    pub(crate) fn is_file(self) -> bool {
        matches!(self, FileOut | FileIn | FdFileOut | FdFileIn | SetOut | SetIn)
    }
}

pub(crate) const TWO_WAY: [Kind; 5] = [Tcp, Unix, Fd, Custom, Exec];
/// Those we write to, and those we read from.
pub(crate) const OUT: [Kind; 9] = [Tcp, Unix, Fd, Custom, Exec, PipeOut, FileOut, FdFileOut, SetOut];
pub(crate) const IN: [Kind; 9] = [Tcp, Unix, Fd, Custom, Exec, PipeIn, FileIn, FdFileIn, SetIn];

/// The other end.
pub(crate) enum Peer {
    Tcp(TcpStream),
    Unix(UnixStream),
    Pipe(Option<File>),
    /// Pipes to and from the command.
    Exec {
        from: File,
        to: Option<File>,
    },
    /// What we write is read when all of it is there; what we read was written before.
    File(PathBuf),
}

pub(crate) struct World {
    pub(crate) kind: Kind,
    pub(crate) ours: Arc<dyn Channel>,
    pub(crate) peer: Peer,
    pub(crate) wake: Arc<Wake>,
    pub(crate) threads: Arc<Threads>,
    pub(crate) counts: &'static Counts,
}

/// The set of number 7, of which each descriptor is open one way.
#[derive(Debug)]
struct Set([OwnedFd; 2]);

impl KeepsFdSets for Set {
    fn open(&self, set: u64, writing: bool) -> vmig::error::Result<OwnedFd> {
        assert_eq!(set, 7);
        Ok(self.0[usize::from(writing)].try_clone().unwrap())
    }
}

pub(crate) fn means(threads: &Arc<Threads>, counts: &'static Counts) -> Means {
    let schemes = Schemes::default();
    let opaque = std::ptr::from_ref(counts).cast_mut().cast();
    let ops = scheme::ops();
    // SAFETY: the callbacks take a Counts that is never freed.
    let custom = unsafe { CScheme::new("pair", &raw const ops, opaque, Some(scheme::destroy)) }.unwrap();
    custom.take();
    schemes.add(Arc::new(CChannels(Arc::new(custom)))).unwrap();
    let fd_sets = FdSets::default();
    Means { threads: Arc::clone(threads), schemes: Arc::new(schemes), fd_sets }
}

/// A connection to what needs no peer of ours.
pub(crate) fn connected(uri: &str) -> (Arc<dyn Channel>, Arc<Threads>) {
    let (wake, threads) = (Arc::new(Wake::new().unwrap()), Arc::new(Threads::new()));
    let means = Means { threads: Arc::clone(&threads), schemes: Arc::default(), fd_sets: FdSets::default() };
    let target = Target::new(Uri::parse(uri).unwrap(), true, &means, &wake).unwrap();
    (target.connect(&wake, LONG).unwrap(), threads)
}

fn pipe() -> (OwnedFd, OwnedFd) {
    let mut fds = [0; 2];
    // SAFETY: room for two descriptors.
    assert_eq!(unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC) }, 0);
    // SAFETY: the kernel just gave us these, and nobody else knows them.
    fds.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }).into()
}

fn fifo(path: &Path) {
    let name = CString::new(path.to_str().unwrap()).unwrap();
    // SAFETY: a string that lives here.
    assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
}

impl World {
    /// `content` is what an input file has.
    pub(crate) fn new(kind: Kind, content: &[u8]) -> World {
        let dir = scratch("transports");
        let wake = Arc::new(Wake::new().unwrap());
        let threads = Arc::new(Threads::new());
        let counts: &'static Counts = Box::leak(Box::default());
        let means = means(&threads, counts);
        let connect = |uri: &str| {
            let uri = Uri::parse(uri).unwrap();
            means.check(&uri).unwrap();
            Target::new(uri, true, &means, &wake).unwrap().connect(&wake, LONG).unwrap()
        };
        let accept = |uri: &str| match transport::listen(&Uri::parse(uri).unwrap(), &means, &wake).unwrap() {
            Listener::Once(target) => target.connect(&wake, LONG).unwrap(),
            Listener::Many(_) => panic!("not a single connection"),
        };
        let fill_set = |path: &Path| {
            let open = [File::open(path), OpenOptions::new().write(true).open(path)];
            assert!(means.fd_sets.keep(Arc::new(Set(open.map(|file| file.unwrap().into())))));
        };
        let (ours, peer) = match kind {
            Tcp => {
                let listener = TcpListener::bind("127.0.0.1:0").unwrap();
                let ours = connect(&format!("tcp:{}", listener.local_addr().unwrap()));
                (ours, Peer::Tcp(listener.accept().unwrap().0))
            }
            Unix => {
                let listener = UnixListener::bind(dir.join("s")).unwrap();
                let ours = connect(&format!("unix:{}", dir.join("s").display()));
                (ours, Peer::Unix(listener.accept().unwrap().0))
            }
            Fd | Custom => {
                let (a, b) = UnixStream::pair().unwrap();
                let scheme = if kind == Fd { "fd" } else { "pair" };
                (connect(&format!("{scheme}:{}", a.as_raw_fd())), Peer::Unix(b))
            }
            Exec => {
                let (there, back) = (dir.join("there"), dir.join("back"));
                fifo(&there);
                fifo(&back);
                let ours = connect(&format!("exec:cat <{} & exec cat >{}", back.display(), there.display()));
                let to = Some(OpenOptions::new().write(true).open(back).unwrap());
                (ours, Peer::Exec { from: File::open(there).unwrap(), to })
            }
            PipeOut | PipeIn => {
                let (reader, writer) = pipe();
                if kind == PipeOut {
                    (connect(&format!("fd:{}", writer.as_raw_fd())), Peer::Pipe(Some(reader.into())))
                } else {
                    (accept(&format!("fd:{}", reader.as_raw_fd())), Peer::Pipe(Some(writer.into())))
                }
            }
            FileOut | FdFileOut | SetOut => {
                let path = dir.join("f");
                std::fs::write(&path, b"before, and behind").unwrap();
                if kind == SetOut {
                    fill_set(&path);
                    (connect("file:/dev/fdset/7,offset=6"), Peer::File(path))
                } else if kind == FileOut {
                    (connect(&format!("file:{},offset=6", path.display())), Peer::File(path))
                } else {
                    let mut file = OpenOptions::new().write(true).open(&path).unwrap();
                    file.seek(SeekFrom::Start(6)).unwrap();
                    file.set_len(6).unwrap();
                    (connect(&format!("fd:{}", file.as_raw_fd())), Peer::File(path))
                }
            }
            FileIn | FdFileIn | SetIn => {
                let path = dir.join("f");
                std::fs::write(&path, [b"before", content].concat()).unwrap();
                if kind == SetIn {
                    fill_set(&path);
                    (accept("file:/dev/fdset/7,offset=6"), Peer::File(path))
                } else if kind == FileIn {
                    (accept(&format!("file:{},offset=6", path.display())), Peer::File(path))
                } else {
                    let mut file = File::open(&path).unwrap();
                    file.seek(SeekFrom::Start(6)).unwrap();
                    (accept(&format!("fd:{}", file.as_raw_fd())), Peer::File(path))
                }
            }
        };
        World { kind, ours, peer, wake, threads, counts }
    }

    /// Nothing is left of it.
    pub(crate) fn end(self) {
        let World { ours, peer, threads, counts, kind, .. } = self;
        drop(peer);
        ours.shutdown();
        drop(ours);
        threads.join_all(Some(LONG)).unwrap();
        let get = |n: &std::sync::atomic::AtomicUsize| n.load(std::sync::atomic::Ordering::Relaxed);
        assert_eq!(get(&counts.opened), usize::from(kind == Custom));
        assert_eq!(get(&counts.closed), get(&counts.opened), "every connection is closed once");
        assert_eq!(get(&counts.destroyed), 1, "destroy comes once");
    }
}

impl Peer {
    pub(crate) fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        match self {
            Peer::Tcp(stream) => stream.read(buf),
            Peer::Unix(stream) => stream.read(buf),
            Peer::Pipe(file) => file.as_mut().unwrap().read(buf),
            Peer::Exec { from, .. } => from.read(buf),
            Peer::File(_) => panic!("a file is read when it is done"),
        }
    }

    pub(crate) fn write_all(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        match self {
            Peer::Tcp(stream) => stream.write_all(bytes),
            Peer::Unix(stream) => stream.write_all(bytes),
            Peer::Pipe(file) => file.as_mut().unwrap().write_all(bytes),
            Peer::Exec { to, .. } => to.as_mut().unwrap().write_all(bytes),
            Peer::File(_) => Ok(()),
        }
    }

    /// Sends no more.
    pub(crate) fn close_write(&mut self) {
        match self {
            Peer::Tcp(stream) => stream.shutdown(Shutdown::Write).unwrap(),
            Peer::Unix(stream) => stream.shutdown(Shutdown::Write).unwrap(),
            Peer::Pipe(file) => *file = None,
            Peer::Exec { to, .. } => *to = None,
            Peer::File(_) => (),
        }
    }
}
