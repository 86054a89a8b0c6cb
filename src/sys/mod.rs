//! System calls, one file per kernel interface: safe signatures outside, `unsafe` only inside.

pub mod eventfd;
pub mod io;
