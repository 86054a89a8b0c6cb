//! The model of tests/switchover_model.rs.
#![allow(unreachable_pub, reason = "modules of one test")]

pub mod checker;
pub mod explore;
pub mod moves;
pub mod mutants;
pub mod watch;
pub mod world;
