//! The door in: what C calls. One file for each chapter of the header, in its order (build.rs has the list).
#![allow(unsafe_code, reason = "exporting a symbol to C is unsafe")]

pub mod version;
