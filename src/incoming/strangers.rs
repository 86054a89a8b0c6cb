//! Those who connected and have not said what they are, and those who came too late.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::reception::Line;
use crate::error::Error;
use crate::transport::custom::Caller;
use crate::wire::hello::{self, Answer};

/// How long a connection may take to say what it is.
const SORT_TIME: Duration = Duration::from_secs(10);
/// How long one that came too late may take to hear so.
const LATE_TIME: Duration = Duration::from_secs(2);
/// Of these so many at a time; the oldest is given up.
const LATE_MAX: usize = 8;
/// Until one that said a part of it is looked at again.
pub(super) const LOOK_AGAIN: Duration = Duration::from_millis(1);

/// A connection that has not said what it is.
pub(super) struct Unsorted {
    /// None only while it is being sorted.
    pub(super) caller: Option<Caller>,
    pub(super) line: Arc<Line>,
    until: Instant,
    /// It said a part: to be looked at then, for poll(2) would come back at once.
    pub(super) again: Option<Instant>,
}

impl Drop for Unsorted {
    fn drop(&mut self) {
        self.line.sorted();
    }
}

/// A vmig that was told that it comes too late. What it says is read, and not believed, until it has heard: closing a
/// connection with unread bytes would take the answer away.
struct Late {
    caller: Caller,
    until: Instant,
}

/// Connections that nobody waits for at a door.
#[derive(Default)]
pub(super) struct Strangers {
    pub(super) unsorted: Vec<Unsorted>,
    late: VecDeque<Late>,
}

impl Strangers {
    /// One more, whom the line counts already.
    pub(super) fn came(&mut self, caller: Caller, line: &Arc<Line>) {
        let until = Instant::now() + SORT_TIME;
        self.unsorted.push(Unsorted { caller: Some(caller), line: Arc::clone(line), until, again: None });
    }

    pub(super) fn is_empty(&self) -> bool {
        self.unsorted.is_empty() && self.late.is_empty()
    }

    /// The next who is to be looked at now.
    pub(super) fn next_to_sort(&self) -> Option<usize> {
        self.unsorted.iter().position(|one| one.again.is_none())
    }

    /// Lets go of those whose time is over, and looks at those again whose time it is.
    pub(super) fn give_up_slow_ones(&mut self) {
        let now = Instant::now();
        self.late.retain(|late| late.until > now);
        self.unsorted.retain(|one| one.until > now);
        for one in self.unsorted.iter_mut().filter(|one| one.again.is_some_and(|at| at <= now)) {
            one.again = None;
        }
    }

    /// When somebody's time is over, or somebody is to be looked at again.
    pub(super) fn next_time(&self) -> Option<Instant> {
        let unsorted = self.unsorted.iter().map(|one| one.again.unwrap_or(one.until));
        unsorted.chain(self.late.iter().map(|late| late.until)).min()
    }

    /// The sockets of those who came too late.
    pub(super) fn late_fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.late.iter().filter_map(|late| late.caller.fd())
    }

    /// Tells a vmig why it cannot come.
    pub(super) fn turn_away(&mut self, caller: Caller, why: Error) {
        let mut bytes = Vec::new();
        if hello::put_answer(&mut bytes, &Answer::Refused(vec![why])).is_err() {
            return;
        }
        caller.say(&bytes);
        caller.close_write();
        if self.late.len() == LATE_MAX {
            self.late.pop_front();
        }
        self.late.push_back(Late { caller, until: Instant::now() + LATE_TIME });
    }

    /// Reads what one says in vain, until it hangs up.
    pub(super) fn listen_to(&mut self, index: usize) {
        let mut drain = [0; 16 << 10];
        if !self.late.get(index).is_some_and(|late| late.caller.drain(&mut drain)) {
            self.late.remove(index);
        }
    }

    /// The same for everybody.
    pub(super) fn listen_to_all(&mut self) {
        let mut drain = [0; 16 << 10];
        self.late.retain(|late| late.caller.drain(&mut drain));
    }
}
