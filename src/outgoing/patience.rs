//! How long an answer is waited for: as long as what was written before it still gets there, and then for a limit.

use std::time::{Duration, Instant};

/// A wait for an answer.
#[derive(Debug)]
pub(super) struct Patience {
    limit: Duration,
    deadline: Instant,
    /// Bytes that were on their way at the last look, if that can be known.
    on_its_way: Option<u64>,
}

impl Patience {
    pub(super) fn new(limit: Duration) -> Self {
        Self { limit, deadline: Instant::now() + limit, on_its_way: None }
    }

    /// Whether nothing was heard of the destination for the limit. `on_its_way`: what it has not got yet.
    pub(super) fn is_over(&mut self, on_its_way: Option<u64>) -> bool {
        let now = Instant::now();
        if on_its_way != self.on_its_way {
            (self.on_its_way, self.deadline) = (on_its_way, now + self.limit);
        }
        now >= self.deadline
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_lasts_as_long_as_something_gets_there() {
        let mut patience = Patience::new(Duration::ZERO);
        assert!(patience.is_over(None), "nothing is known");
        let mut patience = Patience { limit: Duration::from_secs(3600), ..patience };
        assert!(patience.is_over(None));
        assert!(!patience.is_over(Some(2)) && !patience.is_over(Some(2)) && !patience.is_over(Some(1)));
        patience.limit = Duration::ZERO;
        assert!(!patience.is_over(Some(1)), "the hour is not over");
        assert!(patience.is_over(Some(0)));
    }
}
