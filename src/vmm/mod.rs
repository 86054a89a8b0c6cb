//! The VMM as we see it: its hooks, its run state, its log.

pub mod adapter;
pub mod channel;
pub mod channel_ops;
pub mod command;
pub mod dispatch;
pub mod gate;
pub mod handlers;
pub mod log;
pub mod ops;
pub mod run;

pub use dispatch::Dispatch;
pub use handlers::{Moment, Phase, RunHandler};
pub use log::{Level, Log};
pub use run::{Hooks, Reasons, RunReport, StopReason, Vmm};
