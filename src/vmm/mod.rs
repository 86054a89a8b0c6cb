//! The VMM as we see it: its hooks, its run state, its log.
