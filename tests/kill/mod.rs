//! Migrations that go wrong on purpose, and what must hold afterwards.

pub(crate) mod messages;
pub(crate) mod relay;
pub(crate) mod world;
