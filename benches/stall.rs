//! The longest time a running KVM guest stands still while its dirty log is switched on, read, cleared and switched off.
//!
//! The guest writes pages at random, all over a slot of 1, 8 and 16 GiB of which it uses 1 GiB, and takes the time between
//! two writes itself. The library's own tracker works as fast as it can meanwhile: nothing is sent, so this is the worst
//! case. `cargo bench --bench stall`; needs /dev/kvm, about 2 GiB of memory and two idle cores.
#![allow(missing_docs, clippy::unwrap_used, clippy::cast_precision_loss, reason = "a measurement, not a library")]
#![allow(unsafe_code, reason = "guest memory is mapped and shared with the guest")]

#[cfg(target_arch = "x86_64")]
#[path = "../src/sys/kvm_guest.rs"]
mod kvm_guest;

#[cfg(target_arch = "x86_64")]
#[path = "stall/x86.rs"]
mod x86;

fn main() {
    // `cargo test --benches` builds this, too, and runs it with no patience for a minute of measuring.
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    #[cfg(target_arch = "x86_64")]
    x86::measure();
}
