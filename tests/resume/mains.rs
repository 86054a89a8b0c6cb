//! Which connections of a source belong together: a main one and its channels, however late a relay gets to each.
#![allow(dead_code, reason = "each relay uses its own part of this")]

use std::collections::BTreeSet;
use vmig::wire::{hello, knock};

/// The main connections, by the number of connections made before.
#[derive(Debug, Default)]
pub(crate) struct Mains(BTreeSet<usize>);

impl Mains {
    /// A connection with this number begins like this: the number of its main one. A source opens channels when their main
    /// connection was answered, so that one is known by then.
    pub(crate) fn of(&mut self, number: usize, begin: &[u8]) -> usize {
        if [hello::MAGIC, knock::MAGIC].iter().any(|magic| begin.starts_with(&magic.to_be_bytes())) {
            self.0.insert(number);
        }
        self.0.range(..=number).next_back().copied().unwrap_or(number)
    }

    /// The newest.
    pub(crate) fn newest(&self) -> Option<usize> {
        self.0.last().copied()
    }

    /// How many there were.
    pub(crate) fn count(&self) -> usize {
        self.0.len()
    }
}
