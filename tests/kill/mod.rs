//! Migrations that go wrong on purpose, and what must hold afterwards.
#![allow(dead_code, reason = "each test file uses its own part of this")]

pub(crate) mod messages;
pub(crate) mod over;
pub(crate) mod relay;
pub(crate) mod world;
