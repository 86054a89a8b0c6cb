use super::*;

const HERE: Incarnation = Incarnation(7);
const ELSEWHERE: Incarnation = Incarnation(8);

fn after(side: Side, events: &[Event]) -> Side {
    events.iter().fold(side, |side, event| step(&side, *event).0)
}

fn prepare(epoch: Epoch) -> Event {
    Event::Heard(Message::Prepare { epoch })
}

fn go(epoch: Epoch, incarnation: Incarnation) -> Event {
    Event::Heard(Message::Go { epoch, incarnation })
}

fn votes(side: &Side, event: Event) -> Vec<Vote> {
    let said = |action: &Action| match action {
        Action::Send(Message::Vote { vote, .. }) => Some(*vote),
        _ => None,
    };
    step(side, event).1.iter().filter_map(said).collect()
}

#[test]
fn a_guest_moves_and_the_epoch_grows() {
    let ready = Event::Heard(Message::Ready { epoch: 40, incarnation: HERE });
    let source = after(Side::owner(ELSEWHERE, 40), &[Event::Begin { wait: false }, Event::Done, ready]);
    assert_eq!(source.phase, Phase::Deciding);
    let (source, sent) = step(&source, Event::Committed);
    assert_eq!(sent, [Action::Arm, Action::Send(Message::Go { epoch: 40, incarnation: HERE })]);
    let there = after(Side::empty(HERE), &[prepare(40), Event::Done, Event::Done, go(40, HERE), Event::Done]);
    assert_eq!((there.phase, there.epoch), (Phase::Owner, 41));
    let owned = Event::Heard(Message::Vote { epoch: 40, incarnation: HERE, vote: Vote::Owned });
    assert_eq!(after(source, &[owned]).phase, Phase::Empty);
}

#[test]
fn votes_are_kept_and_told_to_who_asks_the_right_one() {
    let refused = after(Side::empty(HERE), &[prepare(4), Event::Failed]);
    assert_eq!(votes(&refused, go(4, HERE)), [Vote::Never]);
    assert_eq!(votes(&refused, go(4, ELSEWHERE)), [Vote::Unknown]);
    assert_eq!(votes(&refused, go(6, HERE)), [Vote::Unknown]);
    let owner = after(refused, &[prepare(6), Event::Done, Event::Done, go(6, HERE), Event::Done]);
    assert_eq!(votes(&owner, go(4, HERE)), [Vote::Never]);
    // Also while it leads the guest on, and after it has left.
    let leaving = after(owner, &[Event::Begin { wait: false }, Event::Done]);
    assert_eq!((leaving.phase, votes(&leaving, go(6, HERE))), (Phase::Preparing, vec![Vote::Owned]));
}

#[test]
fn votes_have_a_limit_and_the_oldest_is_unknown_then() {
    let attempts = (0..=VOTES_MAX as u64).flat_map(|epoch| [prepare(epoch), Event::Failed]);
    let side = attempts.fold(Side::empty(HERE), |side, event| step(&side, event).0);
    assert_eq!(side.votes.len(), VOTES_MAX);
    assert_eq!((side.vote(0, HERE), side.vote(1, HERE)), (Vote::Unknown, Vote::Never));
}

#[test]
fn a_peer_that_breaks_the_rules_moves_nothing() {
    let empty = after(Side::empty(HERE), &[prepare(4), Event::Failed]);
    for epoch in [4, EPOCH_MAX + 1, u64::MAX] {
        let (side, answer) = step(&empty, prepare(epoch));
        let unknown = Message::Vote { epoch, incarnation: HERE, vote: Vote::Unknown };
        assert_eq!((side, answer), (empty.clone(), vec![Action::Send(unknown)]));
    }
    let highest = after(Side::empty(HERE), &[prepare(EPOCH_MAX), Event::Done, Event::Done]);
    for event in [go(EPOCH_MAX - 1, HERE), go(EPOCH_MAX, ELSEWHERE), prepare(1), Event::Committed, Event::Continue] {
        assert_eq!(step(&highest, event).0, highest, "{event:?}");
    }
    let owner = Side::owner(HERE, 4);
    let vote = |vote| Event::Heard(Message::Vote { epoch: 4, incarnation: ELSEWHERE, vote });
    let abort = Event::Heard(Message::Abort { epoch: 4 });
    for event in [prepare(6), go(4, HERE), vote(Vote::Owned), vote(Vote::Never), abort, Event::Deadline] {
        assert_eq!(step(&owner, event).0, owner, "{event:?}");
    }
}

#[test]
fn only_owners_may_cont() {
    let owners: Vec<_> = PHASES.into_iter().filter(|p| p.owns()).collect();
    assert_eq!(owners, [Phase::Owner, Phase::PreSwitchover]);
    assert!(PHASES.iter().all(|p| p.named().is_none() || !p.may_run()));
}

#[test]
fn no_row_hides_another() {
    for (n, row) in ROWS.iter().enumerate() {
        let hides = |r: &&Row| {
            r.on == row.on && (r.at == row.at || r.at.is_none()) && (r.when == row.when || r.when == If::Always)
        };
        assert!(ROWS[..n].iter().find(hides).is_none(), "{row:?} is never taken");
    }
    for (number, phase) in PHASES.iter().enumerate() {
        assert_eq!(*phase as usize, number);
        assert!(ROWS.iter().any(|row| row.at == Some(*phase)), "no way out of {phase:?}");
        assert!(ROWS.iter().any(|row| row.to == Some(*phase)), "no way into {phase:?}");
    }
}
