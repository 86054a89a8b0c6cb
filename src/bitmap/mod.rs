//! Atomic bitmap: one bit per page, set by many threads, taken by one, scanned at the cost of what is set.

/// The atomics of [`levels`]; its model test compiles the same file with loom's.
mod atomic {
    pub(super) use std::sync::atomic::{AtomicU64, Ordering};
}
mod levels;

pub use levels::{Bitmap, Scan, WORD_BITS};

#[cfg(test)]
mod model_tests;
#[cfg(test)]
mod tests;
