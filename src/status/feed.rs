//! What happens to a guest, in the order it happens, for one who watches all of it: states, rounds, stops and starts.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use super::State;
use crate::error::{Error, Result};
use crate::sys::eventfd::EventFd;
use crate::thread::lock;

/// News kept for a watcher who does not come; the oldest are dropped.
const FEED_MAX: usize = 1024;

/// Something that happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum News {
    /// A migration is in another state.
    State(State),
    /// A round over the dirty pages begins; 1 is the first, over all pages.
    Pass(u64),
    /// The guest stopped.
    Stop,
    /// The guest runs.
    Resume,
}

/// News with the time they were told.
#[derive(Clone, Copy, Debug)]
pub struct Told {
    /// When.
    pub at: SystemTime,
    /// What.
    pub news: News,
}

/// The news of one guest. Nothing is kept while nobody watches.
#[derive(Debug, Default)]
pub struct Feed {
    watched: Mutex<Option<Watched>>,
}

#[derive(Debug)]
struct Watched {
    queue: VecDeque<Told>,
    readable: Arc<EventFd>,
}

impl Feed {
    /// Tells; never waits for the watcher.
    pub fn push(&self, news: News) {
        if let Some(watched) = &mut *lock(&self.watched) {
            if watched.queue.len() == FEED_MAX {
                watched.queue.pop_front();
            }
            watched.queue.push_back(Told { at: SystemTime::now(), news });
            watched.readable.set();
        }
    }

    /// From here on news are kept; what is returned is readable while there are some. There is one watcher.
    pub fn watch(&self) -> Result<Arc<EventFd>> {
        let mut watched = lock(&self.watched);
        if watched.is_some() {
            return Err(Error::new(libc::EBUSY, "the guest is watched already"));
        }
        let readable = Arc::new(EventFd::new()?);
        *watched = Some(Watched { queue: VecDeque::with_capacity(FEED_MAX), readable: Arc::clone(&readable) });
        Ok(readable)
    }

    /// Nobody watches any more.
    pub fn unwatch(&self) {
        *lock(&self.watched) = None;
    }

    /// What was told since the last call, oldest first.
    pub fn take(&self) -> Vec<Told> {
        match &mut *lock(&self.watched) {
            Some(watched) => {
                watched.readable.clear();
                watched.queue.drain(..).collect()
            }
            None => Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn news_are_kept_for_a_watcher_and_bounded() {
        let feed = Feed::default();
        feed.push(News::Stop);
        assert!(feed.take().is_empty());
        let readable = feed.watch().unwrap();
        assert_eq!(feed.watch().unwrap_err().errno(), libc::EBUSY);
        let seen = || crate::sys::io::is_readable(std::os::fd::AsFd::as_fd(&*readable));
        assert!(!seen());
        for pass in 0..2 * FEED_MAX as u64 {
            feed.push(News::Pass(pass));
        }
        assert!(seen());
        let told = feed.take();
        assert_eq!((told.len(), told[0].news), (FEED_MAX, News::Pass(FEED_MAX as u64)));
        assert!(!seen() && feed.take().is_empty());
        feed.unwatch();
        feed.push(News::Resume);
        assert!(feed.take().is_empty() && feed.watch().is_ok());
    }
}
