//! The states of a migration, and the table of its legal moves.

/// States of a migration: QEMU's names, and one of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum State {
    /// No migration yet.
    None = 0,
    /// Connecting or listening, and preparing.
    Setup = 1,
    /// A cancel was asked for and is being carried out.
    Cancelling = 2,
    /// Ended by a cancel; the guest runs on at the source.
    Cancelled = 3,
    /// Data moves; at the source the guest runs.
    Active = 4,
    /// The guest is stopped; devices and the last pages move.
    Device = 5,
    /// Ended well.
    Completed = 6,
    /// Ended by an error; before the handover the guest runs on at the source.
    Failed = 7,
    /// The guest was handed over and the answer got lost: who runs it is decided by `resolve`.
    SwitchoverUnknown = 8,
    /// The guest is stopped and still ours, until the user says go on (`pause-before-switchover`).
    PreSwitchover = 9,
    /// The guest is stopped here and nowhere else, because it could not be taken back: `resolve` decides.
    Held = 10,
    /// The connection broke; both sides keep what they have, and the source tries to go on (`resume-timeout`).
    Reconnecting = 11,
}

/// Every state, in the order of their numbers.
pub const STATES: [State; 12] = [
    State::None,
    State::Setup,
    State::Cancelling,
    State::Cancelled,
    State::Active,
    State::Device,
    State::Completed,
    State::Failed,
    State::SwitchoverUnknown,
    State::PreSwitchover,
    State::Held,
    State::Reconnecting,
];

impl State {
    /// The name QEMU and its tools use.
    pub fn name(self) -> &'static str {
        match self {
            State::None => "none",
            State::Setup => "setup",
            State::Cancelling => "cancelling",
            State::Cancelled => "cancelled",
            State::Active => "active",
            State::Device => "device",
            State::Completed => "completed",
            State::Failed => "failed",
            State::SwitchoverUnknown => "switchover-unknown",
            State::PreSwitchover => "pre-switchover",
            State::Held => "held",
            State::Reconnecting => "reconnecting",
        }
    }

    /// Whether a migration in this state is over.
    pub fn is_final(self) -> bool {
        matches!(self, State::None | State::Cancelled | State::Completed | State::Failed)
    }

    /// Whether a migration in this state may have lost its connection and go on.
    pub fn may_reconnect(self) -> bool {
        self == State::Reconnecting || self.may_become(State::Reconnecting)
    }

    /// Whether `self -> to` is a move a migration may make.
    pub fn may_become(self, to: State) -> bool {
        use State::{
            Active, Cancelled, Cancelling, Completed, Device, Failed, Held, None, PreSwitchover, Reconnecting, Setup,
            SwitchoverUnknown,
        };
        match self {
            None | Cancelled | Completed | Failed => to == Setup,
            Setup => matches!(to, Active | Cancelling | Failed | Reconnecting),
            // A destination has no other state until it said READY, and its source may be lost then.
            Active => matches!(
                to,
                Device | PreSwitchover | Completed | Cancelling | Failed | SwitchoverUnknown | Reconnecting
            ),
            Reconnecting => matches!(to, Active | Cancelling | Failed),
            PreSwitchover => matches!(to, Device | Cancelling | Failed | Reconnecting),
            Device => matches!(to, Completed | Cancelling | Failed | SwitchoverUnknown | Held | Reconnecting),
            Cancelling => matches!(to, Cancelled | Failed | Held),
            SwitchoverUnknown => matches!(to, Completed | Cancelling | Failed | Held | Active),
            Held => matches!(to, Completed | Failed),
        }
    }
}

/// Which half this guest is in the present (or last) migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The guest leaves.
    Source,
    /// The guest arrives.
    Destination,
}

impl Side {
    /// `source` or `destination`.
    pub fn name(self) -> &'static str {
        match self {
            Side::Source => "source",
            Side::Destination => "destination",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn legal_moves_only() {
        let count = STATES.iter().flat_map(|a| STATES.iter().filter(|b| a.may_become(**b))).count();
        assert_eq!(count, 4 + 4 + 7 + 4 + 6 + 3 + 5 + 2 + 3);
        for (number, state) in STATES.iter().enumerate() {
            assert_eq!(*state as usize, number);
            assert!(!state.may_become(*state) && !state.may_become(State::None), "{state:?}");
        }
    }
}
