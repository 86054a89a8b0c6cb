//! What models of threads that loom tries in every order have in common.

use std::sync::atomic::Ordering;

/// loom lets a sequentially consistent load return an old value. Where every access to a location is sequentially
/// consistent such a load reads the latest one, as a read-modify-write does.
#[derive(Debug)]
pub(crate) struct AtomicU64(loom::sync::atomic::AtomicU64);

impl AtomicU64 {
    pub(crate) fn new(value: u64) -> Self {
        Self(loom::sync::atomic::AtomicU64::new(value))
    }

    pub(crate) fn load(&self, order: Ordering) -> u64 {
        match order {
            Ordering::SeqCst => self.0.fetch_or(0, Ordering::AcqRel),
            _ => self.0.load(order),
        }
    }

    pub(crate) fn store(&self, value: u64, order: Ordering) {
        match order {
            Ordering::SeqCst => drop(self.0.swap(value, Ordering::AcqRel)),
            _ => self.0.store(value, order),
        }
    }

    pub(crate) fn swap(&self, value: u64, _: Ordering) -> u64 {
        self.0.swap(value, Ordering::AcqRel)
    }

    pub(crate) fn fetch_add(&self, value: u64, _: Ordering) -> u64 {
        self.0.fetch_add(value, Ordering::AcqRel)
    }

    pub(crate) fn fetch_or(&self, value: u64, _: Ordering) -> u64 {
        self.0.fetch_or(value, Ordering::AcqRel)
    }

    pub(crate) fn fetch_and(&self, value: u64, _: Ordering) -> u64 {
        self.0.fetch_and(value, Ordering::AcqRel)
    }
}
