//! A relay whose connections break when they are told to, each by itself or all at once.
#![allow(dead_code, reason = "each test file uses its own part of this")]
#![allow(clippy::unwrap_used, reason = "a test")]

#[path = "mains.rs"]
mod mains;

use mains::Mains;
use std::{
    io::{Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
};

pub(crate) struct Relay {
    /// Where the source connects.
    pub(crate) uri: String,
    /// Connections of which the destination does not know that they broke.
    kept: Mutex<Vec<(usize, Link)>>,
    shared: Arc<Shared>,
}

/// Both ends of a connection: the source's, the destination's.
type Link = [TcpStream; 2];

#[derive(Default)]
struct Links {
    /// How many there ever were.
    made: usize,
    mains: Mains,
    /// Those since the source came last, by number.
    open: Vec<(usize, Link)>,
}

struct Shared {
    links: Mutex<Links>,
    shut: AtomicBool,
    /// A connection that ends at one side goes on at the other, which hears nothing of it.
    half: AtomicBool,
    /// How often everything that was there went deaf.
    deaf: AtomicU64,
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
                let mut links = shared.links.lock().unwrap();
                let number = links.made;
                links.made += 1;
                links.open.push((number, [clone(&source), clone(&destination)]));
                drop(links);
                let (from, to) = (clone(&source), clone(&destination));
                let (ours, theirs) = (Arc::clone(&shared), Arc::clone(&shared));
                let there = There { number, deaf: shared.deaf.load(Ordering::SeqCst), main: None };
                thread::spawn(move || carry(from, to, &ours, Some(there)));
                thread::spawn(move || carry(destination, source, &theirs, None));
            }
        });
        relay
    }

    /// How many connections there are, since the source came last.
    pub(crate) fn links(&self) -> usize {
        self.shared.links.lock().unwrap().open.len()
    }

    /// How often the source came.
    pub(crate) fn came(&self) -> usize {
        self.shared.links.lock().unwrap().mains.count()
    }

    /// Breaks one connection, counted from the newest main one.
    pub(crate) fn cut(&self, number: usize) {
        let links = self.shared.links.lock().unwrap();
        if let Some((_, link)) = links.open.get(number) {
            shut(link);
        }
    }

    /// Breaks all connections, and forgets them.
    pub(crate) fn cut_all(&self) {
        self.shared.links.lock().unwrap().open.drain(..).for_each(|(_, link)| shut(&link));
    }

    /// The source's ends break, and the destination hears nothing of it: its own stay as they are.
    pub(crate) fn lose_sources(&self) {
        self.shared.half.store(true, Ordering::SeqCst);
        let open = &mut self.shared.links.lock().unwrap().open;
        open.iter().for_each(|(_, link)| drop(link[0].shutdown(Shutdown::Both)));
        self.kept.lock().unwrap().extend(open.drain(..));
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

/// A connection's way from the source to the destination.
struct There {
    number: usize,
    /// What went deaf before it was there.
    deaf: u64,
    /// The connection it belongs to, known when it begins.
    main: Option<usize>,
}

impl There {
    fn is_deaf(&self, shared: &Shared) -> bool {
        shared.deaf.load(Ordering::SeqCst) != self.deaf
    }

    /// How many of these bytes are passed on; with fewer than all the connection breaks.
    fn pass(&mut self, shared: &Shared, bytes: &[u8]) -> usize {
        let mut first = shared.first.lock().unwrap();
        if first.len() < 64 << 10 {
            first.extend_from_slice(bytes);
        }
        drop(first);
        // What is left of an older connection breaks nothing, or the one that is meant would not break.
        let is_current = self.is_current(&mut shared.links.lock().unwrap(), bytes);
        let take = |have: u64| (is_current && have != u64::MAX).then(|| have.saturating_sub(bytes.len() as u64));
        let Ok(have) = shared.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, take) else { return bytes.len() };
        let pass = bytes.len().min(usize::try_from(have).unwrap_or(usize::MAX));
        if pass < bytes.len() {
            // This connection breaks in the middle of whatever it carries; the next ones go through.
            shared.left.store(u64::MAX, Ordering::SeqCst);
        }
        pass
    }

    /// Whether the source did not come again since it opened this one.
    fn is_current(&mut self, links: &mut Links, bytes: &[u8]) -> bool {
        let main = *self.main.get_or_insert_with(|| links.mains.of(self.number, bytes));
        let newest = links.mains.newest().unwrap_or(main);
        links.open.retain(|(number, _)| *number >= newest);
        main >= newest
    }
}

fn carry(mut from: TcpStream, mut to: TcpStream, shared: &Shared, mut there: Option<There>) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(n) = from.read(&mut buffer)
        && n > 0
    {
        if there.as_ref().is_some_and(|there| there.is_deaf(shared)) {
            continue;
        }
        let pass = there.as_mut().map_or(n, |there| there.pass(shared, &buffer[..n]));
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
