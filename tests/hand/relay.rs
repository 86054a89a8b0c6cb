//! A unix socket between source and destination that passes bytes and descriptors on, message by message, up to one of
//! them.

use std::{
    io::{ErrorKind, Write},
    net::Shutdown,
    os::fd::{AsFd, BorrowedFd},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc::{Receiver, channel},
    },
    thread::JoinHandle,
    time::Duration,
};

use vmig::sys::fdpass;

/// A relay for one connection.
pub(crate) struct Relay {
    /// Where the source connects.
    pub(crate) uri: String,
    /// Says once that the message was reached; nothing passes from then on, until `cut`.
    pub(crate) reached: Receiver<()>,
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

struct Way {
    from: UnixStream,
    to: UnixStream,
    count: Arc<AtomicUsize>,
    over: Arc<AtomicBool>,
    stop_at: usize,
}

impl Relay {
    /// Stops before it passes message `stop_at` on, counted from 0 over both directions.
    pub(crate) fn new(dir: &Path, destination: &str, stop_at: usize) -> Relay {
        let path: PathBuf = dir.join(format!("relay-{stop_at}"));
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).unwrap();
        let there = destination.strip_prefix("unix:").unwrap().to_owned();
        let over = Arc::new(AtomicBool::new(false));
        let (tell, reached) = channel();
        let flag = Arc::clone(&over);
        let thread = std::thread::spawn(move || {
            let (source, _) = listener.accept().unwrap();
            let destination = UnixStream::connect(there).unwrap();
            let count = Arc::<AtomicUsize>::default();
            let way = |from: &UnixStream, to: &UnixStream| {
                let (count, over) = (Arc::clone(&count), Arc::clone(&flag));
                Way { from: from.try_clone().unwrap(), to: to.try_clone().unwrap(), count, over, stop_at }
            };
            let (there, back) = (way(&source, &destination), way(&destination, &source));
            let other = tell.clone();
            let helper = std::thread::spawn(move || back.carry(|| other.send(()).unwrap_or(())));
            there.carry(|| tell.send(()).unwrap_or(()));
            helper.join().unwrap();
        });
        Relay { uri: format!("unix:{}", path.display()), reached, over, thread: Some(thread) }
    }

    /// Closes both connections; what was not passed on is lost, with the descriptors in it.
    pub(crate) fn cut(&mut self) {
        self.over.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        // A relay nobody connected to waits in accept; it ends with the test.
        self.over.store(true, Ordering::Release);
    }
}

impl Way {
    fn carry(self, reached: impl Fn()) {
        let mut buf = vec![0; 256 << 10];
        while !self.over.load(Ordering::Acquire) {
            match fdpass::receive(self.from.as_fd(), &mut buf) {
                Ok(None) => std::thread::sleep(Duration::from_micros(100)),
                Ok(Some(got)) if got.bytes > 0 => {
                    assert!(!got.dropped);
                    if self.count.fetch_add(1, Ordering::SeqCst) >= self.stop_at {
                        reached();
                        while !self.over.load(Ordering::Acquire) {
                            std::thread::sleep(Duration::from_millis(1));
                        }
                        break;
                    }
                    let fds: Vec<BorrowedFd<'_>> = got.fds.iter().map(AsFd::as_fd).collect();
                    if !self.pass(&buf[..got.bytes], &fds) {
                        break;
                    }
                }
                Ok(Some(_)) | Err(_) => {
                    let _ = self.to.shutdown(Shutdown::Write);
                    return;
                }
            }
        }
        let _ = self.to.shutdown(Shutdown::Both);
        let _ = self.from.shutdown(Shutdown::Both);
    }

    fn pass(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> bool {
        let sent = loop {
            match fdpass::send(self.to.as_fd(), bytes, fds) {
                Ok(Some(sent)) => break sent,
                Ok(None) => std::thread::sleep(Duration::from_micros(100)),
                Err(_) => return false,
            }
        };
        match (&self.to).write_all(&bytes[sent..]) {
            Ok(()) => true,
            Err(e) => e.kind() == ErrorKind::WouldBlock,
        }
    }
}
