//! The last words of a source to a destination that may be waiting for it (`resume-timeout`): nobody comes any more.

use std::sync::Arc;
use std::time::Duration;

use super::Job;
use crate::error::Result;
use crate::sys::eventfd::Wake;
use crate::transport::stream::StreamOutput;

/// How long the user waits for it before the state says how the migration ended.
const BRIEF: Duration = Duration::from_millis(40);
/// How long it is tried afterwards.
const LONG: Duration = Duration::from_secs(2);

/// A knock that says so.
#[derive(Debug)]
pub(super) struct Farewell(pub(super) Vec<u8>);

impl Farewell {
    /// Says it at once, if the network lets us; else what is left to say.
    pub(super) fn say_at_once(self, job: &Job) -> Option<Self> {
        // Neither the cancel that ended the migration nor the end of the handle keeps it back.
        let said = Wake::new().and_then(|calm| self.say(job, &Arc::new(calm), BRIEF));
        said.is_err().then_some(self)
    }

    /// Says it as long as nobody waits for the thread. A destination that cannot be told waits until its time is over.
    pub(super) fn say_at_leisure(&self, job: &Job) {
        let _ = self.say(job, job.route.left(), LONG);
    }

    fn say(&self, job: &Job, wake: &Arc<Wake>, limit: Duration) -> Result<()> {
        let channel = job.route.target().connect(wake, limit)?;
        StreamOutput::new(channel, limit).write(&self.0)
    }
}
