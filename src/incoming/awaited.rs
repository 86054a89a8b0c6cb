//! The migration whose source may connect again, as the reception knows it.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::status::Status;
use crate::transport::custom::Caller;
use crate::wire::ask::MigrationId;
use crate::wire::knock::Knock;

/// Why one who would go on is not let in where nobody knows of it.
pub(super) const UNKNOWN: &str =
    "this destination knows nothing of the migration that is to go on: it is another one, or it gave up";

/// Whose source may connect again. The connection that is in use is ended by a newer one: its source knows better than we
/// whether it broke.
#[derive(Debug)]
pub(super) struct Awaited {
    migration: MigrationId,
    status: Arc<Status>,
    /// Of the last connection that was let in.
    number: u32,
    /// A connection is in use.
    pub(super) in_use: bool,
    newer: Option<Caller>,
    /// Nobody comes any more.
    over: bool,
}

impl Awaited {
    /// Its first connection is in use.
    pub(super) fn new(migration: MigrationId, status: &Arc<Status>) -> Self {
        Self { migration, status: Arc::clone(status), number: 0, in_use: true, newer: None, over: false }
    }

    /// Lets a source in. Returns one who is not, and why.
    pub(super) fn admit(&mut self, caller: Caller, knock: &Knock) -> Option<(Caller, Error)> {
        if knock.migration != self.migration {
            let text = "another migration has begun to arrive here, and only its source may connect again";
            return Some((caller, refused(text)));
        }
        if knock.number <= self.number {
            return Some((caller, refused("an older connection of the migration than the last one")));
        }
        self.number = knock.number;
        self.over |= knock.over;
        self.newer = (!knock.over).then_some(caller);
        if self.in_use {
            let text = "the source broke the connection off and made another";
            self.status.fail_link(Error::new(libc::ECONNRESET, text));
        }
        None
    }

    /// The newest connection, which is in use from here on.
    pub(super) fn take(&mut self) -> Result<Option<Caller>> {
        if self.over {
            return Err(Error::new(libc::ECONNABORTED, "the source gave the attempt up"));
        }
        let newer = self.newer.take();
        self.in_use |= newer.is_some();
        Ok(newer)
    }
}

/// What one hears who is not let in.
pub(super) fn refused(text: &str) -> Error {
    Error::new(libc::ESTALE, text).on_side("destination").in_phase("hello")
}
