//! Option `total-timeout`: ends an attempt that has not come to stopping the guest in time, whatever it waits for.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::Job;
use crate::error::{Error, Result};
use crate::options::Opt;
use crate::status::{State, Status};
use crate::thread::{Handle, lock};

#[derive(Debug, Default)]
struct Shared {
    /// The guest is about to be stopped, or the attempt has ended.
    over: Mutex<bool>,
    changed: Condvar,
}

/// The thread `total_timeout`, where the option is set; ends with this.
#[derive(Debug)]
pub(super) struct TotalTime(Option<(Arc<Shared>, Handle<()>)>);

impl TotalTime {
    /// Of what is no attempt.
    pub(super) fn none() -> Self {
        Self(None)
    }

    /// From when the migration was asked for.
    pub(super) fn start(job: &Job) -> Result<Self> {
        let limit = job.options.time(Opt::TotalTimeout);
        if limit.is_zero() {
            return Ok(Self(None));
        }
        let shared = Arc::new(Shared::default());
        let (ours, status) = (Arc::clone(&shared), Arc::clone(&job.status));
        let until = status.began().unwrap_or_else(Instant::now) + limit;
        let thread = job.threads.spawn("total_timeout", move || {
            ours.watch(&status, until, limit);
            Ok(())
        })?;
        Ok(Self(Some((shared, thread))))
    }

    /// The guest is about to be stopped: time does not matter any more. Fails if it ran out before.
    pub(super) fn is_kept(&self, job: &Job) -> Result<()> {
        match &self.0 {
            None => Ok(()),
            Some((shared, _)) => {
                shared.end();
                job.status.check()
            }
        }
    }
}

impl Drop for TotalTime {
    fn drop(&mut self) {
        if let Some((shared, thread)) = self.0.take() {
            shared.end();
            // It returns nothing; a panic of it left the attempt without a limit, no more.
            let _ = thread.join(None);
        }
    }
}

impl Shared {
    fn end(&self) {
        *lock(&self.over) = true;
        self.changed.notify_all();
    }

    /// Fails the migration at `until`. The lock is held meanwhile: after `end` this cannot happen any more.
    fn watch(&self, status: &Status, until: Instant, limit: Duration) {
        let mut over = lock(&self.over);
        while !*over {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                status.fail(reason(status, limit));
                return;
            }
            over = self.changed.wait_timeout(over, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

fn reason(status: &Status, limit: Duration) -> Error {
    let what = match status.state() {
        State::Setup => {
            "the migration, which is still being set up, did not come to stopping the guest within".into()
        }
        _ => {
            let now = status.snapshot();
            format!(
                "in round {} {} bytes of guest memory are left, the guest dirties {} bytes a second and {} are sent: \
                 it could not be stopped within",
                now.iteration, now.remaining, now.dirty_rate, now.bandwidth
            )
        }
    };
    Error::timeout(Opt::TotalTimeout.name(), limit, what)
}
