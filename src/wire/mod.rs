//! Bytes <-> values of the migration stream. Pure: no I/O, no threads; every limit on what a peer may send is here.

pub mod input;
pub mod output;
