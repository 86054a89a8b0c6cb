//! A dirty source of the VMM's own that knows every write: a bitmap, handed over and forgotten at each sync.
#![allow(unsafe_code, reason = "a callback from C")]

use std::ffi::{c_int, c_void};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vmig::dirty::callback::{Source, VMIG_SOURCE_ALL_WRITES, vmig_dirty_bitmap, vmig_dirty_source};
use vmig::thread::home::Home;
use vmig::vmm::dispatch::Dispatch;

use crate::{GIB_PAGES, Tracked};

static WRITTEN: [AtomicU64; GIB_PAGES / 64] = [const { AtomicU64::new(0) }; GIB_PAGES / 64];

/// The VMM notes one page in so many.
pub(crate) fn write(step: usize) {
    (0..GIB_PAGES).step_by(step).for_each(|page| {
        WRITTEN[page / 64].fetch_or(1 << (page % 64), Ordering::Relaxed);
    });
}

unsafe extern "C" fn sync(_: *mut c_void, map: *const vmig_dirty_bitmap) -> c_int {
    // SAFETY: the library's for the time of the call.
    let map = unsafe { &*map };
    let words = usize::try_from(map.pages).unwrap_or(0).div_ceil(64);
    // SAFETY: as above, with as many words as its pages need.
    let bits = unsafe { std::slice::from_raw_parts_mut(map.bits, words) };
    bits.iter_mut().zip(&WRITTEN).for_each(|(bits, written)| *bits |= written.swap(0, Ordering::Relaxed));
    0
}

/// Makes it the only tracker.
pub(crate) fn add(tracked: &Tracked) {
    let ops = vmig_dirty_source {
        size: size_of::<vmig_dirty_source>(),
        name: c"bitmap".as_ptr(),
        flags: VMIG_SOURCE_ALL_WRITES,
        start: None,
        sync: Some(sync),
        clear: None,
        stop: None,
        destroy: None,
    };
    // SAFETY: the callback needs nothing that could go away.
    let source = unsafe { Source::new(&raw const ops, std::ptr::null_mut()) }.unwrap();
    source.adopt(Arc::new(Dispatch::new(&Arc::new(Home::new()))));
    tracked.hub().add_tracker(Arc::new(source)).unwrap();
}
