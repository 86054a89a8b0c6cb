//! For people and machines that watch many guests: numbers in a form that monitoring systems read. The log is a hook of
//! vmig_ops, a trace of each migration is written with option `trace-file`, and tracepoints (USDT, provider `vmig`) are
//! in the library for bpftrace, perf and SystemTap: docs/tool.md.

use std::ffi::c_char;

use super::guest::vmig;
use super::{enter_text, guest, string};
use crate::metrics::Labels;

/// All numbers of the guest and its migrations in Prometheus' text format, for the VMM to serve. `labels` stands in every
/// line, to tell guests apart: name="value" with commas between, values escaped as that format wants them; NULL for
/// none. Free it with vmig_string_free(). NULL on failure: labels that make no sense. \[any\]\[cb\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_metrics(m: *mut vmig, labels: *const c_char) -> *mut c_char {
    enter_text("vmig_metrics", || {
        // SAFETY: the C contract of handles.
        let machine = unsafe { guest(m) }?;
        let labels = match labels.is_null() {
            true => Labels::default(),
            // SAFETY: the C contract of strings.
            false => Labels::new(unsafe { string("labels", labels) }?)?,
        };
        Ok(Some(machine.metrics(&labels)))
    })
}
