//! A relay that knows the switchover's words: it holds one back, tells, and does with it what it is told.
#![allow(dead_code, reason = "each test file uses its own part of this")]

use std::{
    io::{Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU8, Ordering},
        mpsc::{Receiver, Sender, channel},
    },
    thread,
    time::Duration,
};

/// What the relay holds back, by how it begins on the wire, and whether the source says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Word(&'static [u8], bool);

pub(crate) const PREPARE: Word = Word(&[8, 0x56, 0x10, 0, 8], true);
pub(crate) const GO: Word = Word(&[8, 0x56, 0x11, 0, 16], true);
/// With option `verify`: all hashes are the same.
pub(crate) const SAME: Word = Word(&[0x56, 0x20, 0, 0], false);
pub(crate) const READY: Word = Word(&[0x56, 0x10, 0, 16], false);
/// Before its first answer to a ping the source does not stop the guest.
pub(crate) const PONG: Word = Word(&[0, 2, 0, 4], false);
pub(crate) const VOTE: Word = Word(&[0x56, 0x11, 0, 20], false);

const HOLD: u8 = 0;
const PASS: u8 = 1;
const CUT: u8 = 2;

pub(crate) struct Relay {
    /// Where the source connects.
    pub(crate) uri: String,
    held: Receiver<()>,
    verdict: Arc<AtomicU8>,
    /// Whether connections after the first get through.
    open: Arc<AtomicBool>,
    /// What the source said on the first connection.
    said: Arc<Mutex<Vec<u8>>>,
}

impl Relay {
    /// Carries connections to `destination`; the first one up to `word`.
    pub(crate) fn new(destination: &str, word: Word) -> Relay {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let uri = format!("tcp:{}", listener.local_addr().unwrap());
        let there = destination.strip_prefix("tcp:").unwrap().to_owned();
        let (tell, held) = channel();
        let relay = Relay { uri, held, verdict: Arc::default(), open: Arc::default(), said: Arc::default() };
        let (verdict, open, said) = (Arc::clone(&relay.verdict), Arc::clone(&relay.open), Arc::clone(&relay.said));
        thread::spawn(move || {
            for (number, source) in listener.incoming().enumerate() {
                let (Ok(source), Ok(destination)) = (source, TcpStream::connect(&there)) else { continue };
                source.set_nodelay(true).unwrap();
                destination.set_nodelay(true).unwrap();
                if number > 0 && !open.load(Ordering::SeqCst) {
                    continue;
                }
                let way = |from: &TcpStream, to: &TcpStream, forth| Way {
                    from: from.try_clone().unwrap(),
                    to: to.try_clone().unwrap(),
                    word: (number == 0 && word.1 == forth).then_some(word.0),
                    tell: tell.clone(),
                    verdict: Arc::clone(&verdict),
                    said: (number == 0 && forth).then(|| Arc::clone(&said)),
                };
                let (forth, back) = (way(&source, &destination, true), way(&destination, &source, false));
                thread::spawn(move || forth.carry());
                thread::spawn(move || back.carry());
            }
        });
        relay
    }

    /// Waits until the word came, which is held from then on.
    pub(crate) fn held(&self) {
        self.held.recv_timeout(Duration::from_secs(60)).expect("the word comes");
    }

    /// Lets the word go on.
    pub(crate) fn pass(&self) {
        self.verdict.store(PASS, Ordering::SeqCst);
    }

    /// Drops the word, and the connection.
    pub(crate) fn cut(&self) {
        self.verdict.store(CUT, Ordering::SeqCst);
    }

    /// Connections after the first get through from now on.
    pub(crate) fn open(&self) {
        self.open.store(true, Ordering::SeqCst);
    }

    /// Everything the source said so far.
    pub(crate) fn said(&self) -> Vec<u8> {
        self.said.lock().unwrap().clone()
    }
}

struct Way {
    from: TcpStream,
    to: TcpStream,
    word: Option<&'static [u8]>,
    tell: Sender<()>,
    verdict: Arc<AtomicU8>,
    said: Option<Arc<Mutex<Vec<u8>>>>,
}

impl Way {
    fn carry(mut self) {
        let mut buffer = vec![0; 256 << 10];
        while let Ok(n) = self.from.read(&mut buffer)
            && n > 0
        {
            if let Some(said) = &self.said {
                said.lock().unwrap().extend_from_slice(&buffer[..n]);
            }
            let found = |word: &[u8]| buffer[..n].windows(word.len()).any(|bytes| bytes == word);
            if self.word.is_some_and(found) {
                self.word = None;
                self.tell.send(()).unwrap_or(());
                while self.verdict.load(Ordering::SeqCst) == HOLD {
                    thread::sleep(Duration::from_millis(1));
                }
                if self.verdict.load(Ordering::SeqCst) == CUT {
                    break;
                }
            }
            if self.to.write_all(&buffer[..n]).is_err() {
                break;
            }
        }
        let _ = self.to.shutdown(Shutdown::Both);
        let _ = self.from.shutdown(Shutdown::Both);
    }
}
