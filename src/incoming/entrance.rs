//! The thread at an entrance of the VMM's own making: it takes connections there and sorts them, as the reception does
//! for sockets, but by asking, because nobody can poll(2) for them.

use std::sync::Arc;
use std::time::Duration;

use super::reception::{Line, Reception};
use super::strangers::Strangers;
use crate::transport::custom::{Caller, Connection, Entrance};

/// How long an accept may wait when nothing else is to be looked at.
const QUIET: Duration = Duration::from_millis(50);
/// The same while somebody has not said what they are, or has to be told that they come too late.
const BUSY: Duration = Duration::from_millis(1);

/// Works until the line is not wanted any more.
pub(super) fn work(reception: &Reception, line: &Arc<Line>, entrance: &dyn Entrance) {
    let mut strangers = Strangers::default();
    while reception.wants(line) {
        line.latecomers().into_iter().flatten().for_each(|one| strangers.turn_away(one, line.refusal()));
        strangers.give_up_slow_ones();
        while let Some(index) = strangers.next_to_sort() {
            reception.sort(index, &mut strangers);
        }
        strangers.listen_to_all();
        let patience = if strangers.is_empty() { QUIET } else { BUSY };
        if !line.has_room(strangers.unsorted.len()) {
            std::thread::sleep(patience);
            continue;
        }
        match entrance.accept(patience) {
            Ok(Some(link)) => {
                line.unsorted();
                strangers.came(Caller::Custom(Connection::new(link)), line);
            }
            Ok(None) => (),
            Err(error) => {
                line.broke(error);
                std::thread::sleep(QUIET);
            }
        }
    }
}
