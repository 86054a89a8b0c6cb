//! A relay whose connections break when they are told to, each by itself or all at once.

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
    shut: Arc<AtomicBool>,
    /// Bytes that may still go to the destination before everything breaks, wherever that is.
    left: Arc<AtomicU64>,
}

impl Relay {
    pub(crate) fn new(destination: &str) -> Relay {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let uri = format!("tcp:{}", listener.local_addr().unwrap());
        let there = destination.strip_prefix("tcp:").unwrap().to_owned();
        let relay =
            Relay { uri, links: Arc::default(), shut: Arc::default(), left: Arc::new(AtomicU64::new(u64::MAX)) };
        let (links, shut, left) = (Arc::clone(&relay.links), Arc::clone(&relay.shut), Arc::clone(&relay.left));
        thread::spawn(move || {
            for source in listener.incoming() {
                if shut.load(Ordering::SeqCst) {
                    continue;
                }
                let (Ok(source), Ok(destination)) = (source, TcpStream::connect(&there)) else { continue };
                let clone = |stream: &TcpStream| stream.try_clone().unwrap();
                links.lock().unwrap().push([clone(&source), clone(&destination)]);
                let (from, to, left) = (clone(&source), clone(&destination), Arc::clone(&left));
                thread::spawn(move || carry(from, to, Some(&left)));
                thread::spawn(move || carry(destination, source, None));
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

fn carry(mut from: TcpStream, mut to: TcpStream, left: Option<&AtomicU64>) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(n) = from.read(&mut buffer)
        && n > 0
    {
        let mut pass = n;
        if let Some(left) = left {
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
    let _ = to.shutdown(Shutdown::Both);
    let _ = from.shutdown(Shutdown::Both);
}
