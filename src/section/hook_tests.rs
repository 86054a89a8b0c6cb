//! Hooks that fail, at every position there is.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::codec_tests::{loaded, saved, with_count};
use super::table::{Checked, Count, Hooks, Kind, Table};
use crate::error::{Error, Result};

/// Fails the n-th call over all tables that share it, and counts what must be balanced.
#[derive(Default)]
struct Faulty {
    calls: AtomicUsize,
    fail_at: usize,
    open: AtomicUsize,
}

struct FaultyHooks(Arc<Faulty>);

impl FaultyHooks {
    fn call(&self) -> Result<()> {
        match self.0.calls.fetch_add(1, Ordering::Relaxed) == self.0.fail_at {
            true => Err(Error::new(libc::ENXIO, "told to fail")),
            false => Ok(()),
        }
    }
}

impl Hooks for FaultyHooks {
    fn needed(&self, _: *mut u8) -> Result<bool> {
        self.call().map(|()| true)
    }
    fn pre_save(&self, _: *mut u8) -> Result<()> {
        self.call()?;
        self.0.open.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
    fn post_save(&self, _: *mut u8) -> Result<()> {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
        self.call()
    }
    fn pre_load(&self, _: *mut u8) -> Result<()> {
        self.call()
    }
    fn post_load(&self, _: *mut u8, _: u32) -> Result<()> {
        self.call()
    }
}

fn faulty_table(faulty: &Arc<Faulty>) -> Checked {
    let hooks = || Some(Arc::new(FaultyHooks(faulty.clone())) as Arc<dyn Hooks>);
    let inner = Table { hooks: hooks(), ..Table::new("inner", 1).with("x", Kind::Unsigned(1), 0) };
    let deep = Table { hooks: hooks(), ..Table::new("dev/part/deep", 1) };
    let part = Table { hooks: hooks(), ..Table::new("dev/part", 1).with("y", Kind::Unsigned(1), 2) };
    let mut table = Table { hooks: hooks(), ..Table::new("dev", 1) };
    table.fields.push(with_count("in", Kind::Struct(Arc::new(inner), 1), Count::Fixed(2), 0));
    table.parts.push(Arc::new(Table { parts: vec![Arc::new(deep)], ..part }));
    table.checked().unwrap()
}

#[test]
fn a_hook_failing_at_any_position_fails_the_whole_and_stays_balanced() {
    let count = |fail_at| Arc::new(Faulty { fail_at, ..Faulty::default() });
    let fine = count(usize::MAX);
    let body = saved(&faulty_table(&fine), &mut [1u8, 2, 3]).unwrap();
    let saves = fine.calls.swap(0, Ordering::Relaxed);
    assert_eq!(saves, 12, "pre and post of dev, two inner, part, deep; needed of part and deep");
    loaded(&faulty_table(&fine), 1, &body, &mut [0u8; 3]).unwrap();
    let loads = fine.calls.load(Ordering::Relaxed);
    assert_eq!(loads, 10);
    for fail_at in 0..saves {
        let faulty = count(fail_at);
        let error = saved(&faulty_table(&faulty), &mut [1u8, 2, 3]).unwrap_err();
        assert_eq!(error.errno(), libc::ENXIO);
        assert_eq!(faulty.open.load(Ordering::Relaxed), 0, "post_save follows each pre_save, failing at {fail_at}");
    }
    for fail_at in 0..loads {
        let faulty = count(fail_at);
        let error = loaded(&faulty_table(&faulty), 1, &body, &mut [0u8; 3]).unwrap_err();
        assert_eq!(error.errno(), libc::ENXIO);
        assert_eq!(faulty.calls.load(Ordering::Relaxed), fail_at + 1, "nothing is called after the failure");
    }
}
