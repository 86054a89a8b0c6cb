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

pub(crate) struct Relay {
    /// Where the source connects.
    pub(crate) uri: String,
    /// Both ends of every connection, the main one first.
    links: Arc<Mutex<Vec<[TcpStream; 2]>>>,
    /// Connections of which the destination does not know that they broke.
    kept: Mutex<Vec<[TcpStream; 2]>>,
    shut: Arc<AtomicBool>,
    /// A connection that ends at one side goes on at the other, which hears nothing of it.
    half: Arc<AtomicBool>,
    /// How often everything that was there went deaf.
    deaf: Arc<AtomicU64>,
    /// What the source said first.
    first: Arc<Mutex<Vec<u8>>>,
    /// Bytes that may still go to the destination before everything breaks, wherever that is.
    left: Arc<AtomicU64>,
}

impl Relay {
    pub(crate) fn new(destination: &str) -> Relay {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let uri = format!("tcp:{}", listener.local_addr().unwrap());
        let there = destination.strip_prefix("tcp:").unwrap().to_owned();
        let relay = Relay {
            uri,
            links: Arc::default(),
            kept: Mutex::default(),
            shut: Arc::default(),
            half: Arc::default(),
            deaf: Arc::default(),
            first: Arc::default(),
            left: Arc::new(AtomicU64::new(u64::MAX)),
        };
        let (links, shut, left) = (Arc::clone(&relay.links), Arc::clone(&relay.shut), Arc::clone(&relay.left));
        let (half, first, deaf) = (Arc::clone(&relay.half), Arc::clone(&relay.first), Arc::clone(&relay.deaf));
        thread::spawn(move || {
            for source in listener.incoming() {
                if shut.load(Ordering::SeqCst) {
                    continue;
                }
                let (Ok(source), Ok(destination)) = (source, TcpStream::connect(&there)) else { continue };
                let clone = |stream: &TcpStream| stream.try_clone().unwrap();
                links.lock().unwrap().push([clone(&source), clone(&destination)]);
                let (from, to, left) = (clone(&source), clone(&destination), Arc::clone(&left));
                let (ours, theirs, first) = (Arc::clone(&half), Arc::clone(&half), Arc::clone(&first));
                let (deaf, since) = (Arc::clone(&deaf), deaf.load(Ordering::SeqCst));
                let hears = move || deaf.load(Ordering::SeqCst) == since;
                thread::spawn(move || carry(from, to, &ours, Some((&left, &first, &hears))));
                thread::spawn(move || carry(destination, source, &theirs, None));
            }
        });
        relay
    }

    /// How many connections there are.
    pub(crate) fn links(&self) -> usize {
        self.links.lock().unwrap().len()
    }

    /// Breaks one connection, counted from the newest main one.
    pub(crate) fn cut(&self, number: usize) {
        let links = self.links.lock().unwrap();
        if let Some(link) = links.get(number) {
            shut(link);
        }
    }

    /// Breaks all connections, and forgets them.
    pub(crate) fn cut_all(&self) {
        self.links.lock().unwrap().drain(..).for_each(|link| shut(&link));
    }

    /// The source's ends break, and the destination hears nothing of it: its own stay as they are.
    pub(crate) fn lose_sources(&self) {
        self.half.store(true, Ordering::SeqCst);
        let mut links = self.links.lock().unwrap();
        links.iter().for_each(|link| drop(link[0].shutdown(Shutdown::Both)));
        self.kept.lock().unwrap().extend(links.drain(..));
    }

    /// What the source says over the connections that there are goes nowhere, nor does the destination hear them end.
    pub(crate) fn swallow(&self) {
        self.half.store(true, Ordering::SeqCst);
        self.deaf.fetch_add(1, Ordering::SeqCst);
    }

    /// What ends at one side ends at the other again.
    pub(crate) fn whole(&self) {
        self.half.store(false, Ordering::SeqCst);
    }

    /// The id of the migration, from the hello.
    pub(crate) fn migration(&self) -> [u8; 16] {
        let first = self.first.lock().unwrap();
        let text = String::from_utf8_lossy(&first).into_owned();
        let digits = text.split("\"migration\":\"").nth(1).and_then(|rest| rest.get(..32)).expect("a hello");
        u128::from_str_radix(digits, 16).unwrap().to_be_bytes()
    }

    /// Everything breaks after so many more bytes of the source.
    pub(crate) fn cut_after(&self, bytes: u64) {
        self.left.store(bytes, Ordering::SeqCst);
    }

    /// Who connects from now on is hung up on, or is not.
    pub(crate) fn close(&self, close: bool) {
        self.shut.store(close, Ordering::SeqCst);
    }
}

fn shut(link: &[TcpStream; 2]) {
    link.iter().for_each(|end| drop(end.shutdown(Shutdown::Both)));
}

/// Of what the source says: after so many bytes it breaks, what it said first, whether it is passed on.
type There<'a> = (&'a AtomicU64, &'a Mutex<Vec<u8>>, &'a dyn Fn() -> bool);

fn carry(mut from: TcpStream, mut to: TcpStream, half: &AtomicBool, there: Option<There<'_>>) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(n) = from.read(&mut buffer)
        && n > 0
    {
        let mut pass = n;
        if let Some((left, first, hears)) = there {
            if !hears() {
                continue;
            }
            let mut first = first.lock().unwrap();
            if first.len() < 64 << 10 {
                first.extend_from_slice(&buffer[..n]);
            }
            drop(first);
            let take = |have: u64| (have != u64::MAX).then(|| have.saturating_sub(n as u64));
            if let Ok(have) = left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, take) {
                pass = n.min(usize::try_from(have).unwrap_or(n));
                if pass < n {
                    // This connection breaks in the middle of whatever it carries; the next ones go through.
                    left.store(u64::MAX, Ordering::SeqCst);
                }
            }
        }
        if to.write_all(&buffer[..pass]).is_err() || pass < n {
            break;
        }
    }
    if half.load(Ordering::SeqCst) {
        return; // the other ends are kept with the links
    }
    let _ = to.shutdown(Shutdown::Both);
    let _ = from.shutdown(Shutdown::Both);
}
