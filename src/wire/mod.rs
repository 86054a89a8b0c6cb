//! Bytes <-> values of the migration stream: QEMU's stream, version 3, as QEMU 10.0 speaks it, and what two vmigs add.
//!
//! Pure: no I/O, no threads. Every limit on what a peer may send is in here.

pub mod ask;
pub mod checksum;
pub mod command;
pub mod cpu;
pub mod digest;
pub mod frame;
pub mod hello;
pub mod input;
pub mod knock;
pub mod output;
pub mod packet;
pub mod ram;
pub mod reply;
pub mod shape;
pub mod stream;
