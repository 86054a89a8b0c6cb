//! A relay whose connections break when they are told to, each by itself or all at once.
#![allow(dead_code, reason = "each test file uses its own part of this")]
#![allow(clippy::unwrap_used, reason = "a test")]

use std::{
    io::{Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
};
use vmig::wire::knock;

/// How a source begins that comes again.
const KNOCK: [u8; 4] = knock::MAGIC.to_be_bytes();

pub(crate) struct Relay {
    /// Where the source connects.
    pub(crate) uri: String,
    /// Connections of which the destination does not know that they broke.
    kept: Mutex<Vec<Link>>,
    shared: Arc<Shared>,
}

/// Both ends of a connection: the source's, the destination's.
type Link = [TcpStream; 2];

struct Shared {
    /// The connections since the source came last, the main one first.
    links: Mutex<Vec<Link>>,
    shut: AtomicBool,
    /// A connection that ends at one side goes on at the other, which hears nothing of it.
    half: AtomicBool,
    /// How often everything that was there went deaf.
    deaf: AtomicU64,
    /// How often the source came again.
    again: AtomicU64,
    /// What the source said first.
    first: Mutex<Vec<u8>>,
    /// Bytes that may still go to the destination before everything breaks, wherever that is.
    left: AtomicU64,
}

impl Relay {
    pub(crate) fn new(destination: &str) -> Relay {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let uri = format!("tcp:{}", listener.local_addr().unwrap());
        let there = destination.strip_prefix("tcp:").unwrap().to_owned();
        let shared = Arc::new(Shared {
            links: Mutex::default(),
            shut: AtomicBool::default(),
            half: AtomicBool::default(),
            deaf: AtomicU64::default(),
            again: AtomicU64::default(),
            first: Mutex::default(),
            left: AtomicU64::new(u64::MAX),
        });
        let relay = Relay { uri, kept: Mutex::default(), shared: Arc::clone(&shared) };
        thread::spawn(move || {
            for source in listener.incoming() {
                if shared.shut.load(Ordering::SeqCst) {
                    continue;
                }
                let (Ok(source), Ok(destination)) = (source, TcpStream::connect(&there)) else { continue };
                let clone = |stream: &TcpStream| stream.try_clone().unwrap();
                shared.links.lock().unwrap().push([clone(&source), clone(&destination)]);
                let (from, to) = (clone(&source), clone(&destination));
                let (there, back) = (Arc::clone(&shared), Arc::clone(&shared));
                let deaf = shared.deaf.load(Ordering::SeqCst);
                thread::spawn(move || carry(from, to, &there, &mut There { shared: &there, deaf, came: None }));
                thread::spawn(move || carry(destination, source, &back, &mut Back));
            }
        });
        relay
    }

    /// How many connections there are, since the source came last.
    pub(crate) fn links(&self) -> usize {
        self.shared.links.lock().unwrap().len()
    }

    /// How often the source came again.
    pub(crate) fn again(&self) -> u64 {
        self.shared.again.load(Ordering::SeqCst)
    }

    /// Breaks one connection, counted from the newest main one.
    pub(crate) fn cut(&self, number: usize) {
        let links = self.shared.links.lock().unwrap();
        if let Some(link) = links.get(number) {
            shut(link);
        }
    }

    /// Breaks all connections, and forgets them.
    pub(crate) fn cut_all(&self) {
        self.shared.links.lock().unwrap().drain(..).for_each(|link| shut(&link));
    }

    /// The source's ends break, and the destination hears nothing of it: its own stay as they are.
    pub(crate) fn lose_sources(&self) {
        self.shared.half.store(true, Ordering::SeqCst);
        let mut links = self.shared.links.lock().unwrap();
        links.iter().for_each(|link| drop(link[0].shutdown(Shutdown::Both)));
        self.kept.lock().unwrap().extend(links.drain(..));
    }

    /// What the source says over the connections that there are goes nowhere, nor does the destination hear them end.
    pub(crate) fn swallow(&self) {
        self.shared.half.store(true, Ordering::SeqCst);
        self.shared.deaf.fetch_add(1, Ordering::SeqCst);
    }

    /// What ends at one side ends at the other again.
    pub(crate) fn whole(&self) {
        self.shared.half.store(false, Ordering::SeqCst);
    }

    /// The id of the migration, from the hello.
    pub(crate) fn migration(&self) -> [u8; 16] {
        let first = self.shared.first.lock().unwrap();
        let text = String::from_utf8_lossy(&first).into_owned();
        let digits = text.split("\"migration\":\"").nth(1).and_then(|rest| rest.get(..32)).expect("a hello");
        u128::from_str_radix(digits, 16).unwrap().to_be_bytes()
    }

    /// Everything breaks after so many more bytes of the source; `u64::MAX`: nothing does.
    pub(crate) fn cut_after(&self, bytes: u64) {
        self.shared.left.store(bytes, Ordering::SeqCst);
    }

    /// Who connects from now on is hung up on, or is not.
    pub(crate) fn close(&self, close: bool) {
        self.shared.shut.store(close, Ordering::SeqCst);
    }
}

fn shut(link: &Link) {
    link.iter().for_each(|end| drop(end.shutdown(Shutdown::Both)));
}

/// What happens to bytes on their way.
trait Way {
    /// How many of them are passed on; with fewer than all the connection breaks.
    fn pass(&mut self, from: &TcpStream, bytes: &[u8]) -> usize;
    /// Whether they get lost unnoticed.
    fn is_deaf(&self) -> bool;
}

/// From the source to the destination.
struct There<'a> {
    shared: &'a Shared,
    /// What went deaf before this connection was there.
    deaf: u64,
    /// How often the source had come again when it said the first thing here.
    came: Option<u64>,
}

impl Way for There<'_> {
    fn pass(&mut self, from: &TcpStream, bytes: &[u8]) -> usize {
        let shared = self.shared;
        if self.came.is_none() && bytes.starts_with(&KNOCK) {
            let mut links = shared.links.lock().unwrap();
            let newest = links.iter().position(|link| link[0].peer_addr().ok() == from.peer_addr().ok());
            links.drain(..newest.unwrap_or(0));
            shared.again.fetch_add(1, Ordering::SeqCst);
        }
        let now = shared.again.load(Ordering::SeqCst);
        // What is left of an older connection breaks nothing, or the one that is meant would not break.
        let is_current = *self.came.get_or_insert(now) == now;
        let mut first = shared.first.lock().unwrap();
        if first.len() < 64 << 10 {
            first.extend_from_slice(bytes);
        }
        drop(first);
        let take = |have: u64| (is_current && have != u64::MAX).then(|| have.saturating_sub(bytes.len() as u64));
        let Ok(have) = shared.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, take) else { return bytes.len() };
        let pass = bytes.len().min(usize::try_from(have).unwrap_or(usize::MAX));
        if pass < bytes.len() {
            // This connection breaks in the middle of whatever it carries; the next ones go through.
            shared.left.store(u64::MAX, Ordering::SeqCst);
        }
        pass
    }

    fn is_deaf(&self) -> bool {
        self.shared.deaf.load(Ordering::SeqCst) != self.deaf
    }
}

/// From the destination to the source.
struct Back;

impl Way for Back {
    fn pass(&mut self, _: &TcpStream, bytes: &[u8]) -> usize {
        bytes.len()
    }

    fn is_deaf(&self) -> bool {
        false
    }
}

fn carry(mut from: TcpStream, mut to: TcpStream, shared: &Shared, way: &mut dyn Way) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(n) = from.read(&mut buffer)
        && n > 0
    {
        if way.is_deaf() {
            continue;
        }
        let pass = way.pass(&from, &buffer[..n]);
        if to.write_all(&buffer[..pass]).is_err() || pass < n {
            break;
        }
    }
    if shared.half.load(Ordering::SeqCst) {
        return; // the other ends are kept with the links
    }
    let _ = to.shutdown(Shutdown::Both);
    let _ = from.shutdown(Shutdown::Both);
}
