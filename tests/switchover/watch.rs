//! Rules of conduct: what must hold of a step, where no state would show it.

use super::world::{World, bit, is_arriving, is_leaving};
use vmig::switchover::{Action, Epoch, Event, Message, Phase, Resolution, Side, Vote};

impl World {
    /// Rules of conduct that are about a step, not about a state.
    pub fn watch(&mut self, who: usize, before: &Side, event: Event, actions: &[Action]) {
        let (was, p) = (before.phase, &self.all[who]);
        let now = p.phase();
        if p.foreign {
            if now != was {
                self.say("another guest was moved");
            }
            return;
        }
        let undecided = p.cancel || !p.committed;
        self.watch_running(who, before, event);
        for action in actions {
            match *action {
                Action::Send(Message::Go { .. }) if undecided => self.say("GO without the decision for it"),
                Action::Send(Message::Vote { epoch, vote, .. }) => self.note_vote(who, epoch, vote),
                Action::Resume if now != Phase::Owner => self.say("a guest was resumed that is not owned"),
                Action::Start if !now.may_run() => self.say("a guest was started that is not owned"),
                _ => (),
            }
        }
        let wanted = if is_leaving(was) { Action::Resume } else { Action::Announce };
        if now == Phase::Owner && was != now && !actions.contains(&wanted) {
            self.say("an owner was not told to run the guest, or to announce it");
        }
        if is_arriving(was) && !is_arriving(now) {
            let vote = if now == Phase::Owner { Vote::Owned } else { Vote::Never };
            if self.all[who].side.vote(before.epoch, before.incarnation) != vote {
                self.say("an attempt ended without a vote");
            }
        }
        let link_was_up = was == Phase::Deciding || !matches!(event, Event::LinkLost | Event::Heard(_));
        let aborted = actions.iter().any(|a| matches!(a, Action::Send(Message::Abort { .. })));
        if matches!(was, Phase::Preparing | Phase::Deciding) && now == Phase::TakingBack && link_was_up && !aborted {
            self.say("a destination was not told that the attempt is off");
        }
        self.watch_certainty(was, now, event);
        self.watch_obedience(before, now, event);
    }

    /// Named states mean what they say.
    fn watch_certainty(&mut self, was: Phase, now: Phase, event: Event) {
        use Phase::*;
        let certain = |p| matches!(p, TakingBack | TakeBackLater | Held);
        let doubtful = |p| matches!(p, Committed | Asking | Fencing | Unknown);
        if certain(was) && doubtful(now) {
            self.say("what was certain is in doubt");
        }
        if now == Held && was != Held && event != Event::Deadline {
            self.say("held, though it was not tried to the last");
        }
        if now == Unknown && was != Unknown && was != Fencing {
            self.say("unknown, though nobody was asked");
        }
        let go = matches!(event, Event::Heard(Message::Go { .. }));
        if was != now && (now == Starting && !go || now == Rescuing && event != Event::Resolve(Resolution::Run)) {
            self.say("it is not known any more who said that the guest is to run");
        }
    }

    /// Who begins and ends to run the guest, and with which epoch.
    fn watch_running(&mut self, who: usize, before: &Side, event: Event) {
        let was = before.phase;
        let Some(epoch) = self.all[who].runs_with() else {
            match (was, event) {
                (Phase::Starting | Phase::Rescuing, Event::Failed) => {
                    self.highest = before.epoch; // it did not run a single instruction
                    self.owned[who] &= !bit(before.epoch + 1);
                    // The source would have it now. If that crashed meanwhile, the guest died there.
                    self.killed |= (0..3).any(|o| !self.all[o].alive && self.owned[o] & bit(before.epoch) != 0);
                }
                (Phase::Starting | Phase::Rescuing, _) => self.say("a guest that was started is not owned"),
                _ => (),
            }
            return;
        };
        if !was.may_run() {
            if before.epoch != self.highest {
                self.say("an old copy of the guest came back to life");
            }
            if epoch <= self.highest {
                self.say("an acquisition did not raise the epoch");
            }
            if !is_leaving(was) && self.refused[who] & bit(before.epoch) != 0 {
                self.say("what was refused was taken over");
            }
            self.highest = epoch;
            self.owned[who] |= bit(epoch);
        } else if epoch != self.highest {
            self.say("an owner's epoch is not that of its acquisition");
        }
    }

    fn note_vote(&mut self, who: usize, epoch: Epoch, vote: Vote) {
        let owned = self.owned[who] & bit(epoch + 1) != 0;
        match vote {
            Vote::Never if owned => self.say("voted NEVER for what it owned"),
            Vote::Owned if !owned => self.say("voted OWNED for what it never owned"),
            Vote::Never => self.refused[who] |= bit(epoch),
            _ => (),
        }
    }

    fn watch_obedience(&mut self, before: &Side, now: Phase, event: Event) {
        use Phase::*;
        let was = before.phase;
        match event {
            Event::Cancel if matches!(now, PreSwitchover | Preparing | Deciding | Committed | Ready | Stranded) => {
                self.say("a cancel was not obeyed");
            }
            Event::Heard(Message::Abort { epoch }) if matches!(was, Ready | Stranded) => {
                match (epoch == before.epoch, now == was) {
                    (true, true) => self.say("an ABORT was not obeyed"),
                    (false, false) => self.say("an ABORT of another attempt was obeyed"),
                    _ => (),
                }
            }
            Event::Failed if matches!(now, PreSwitchover | Preparing | Deciding) => self.say("a failure was ignored"),
            Event::Resolve(_) if now == was => self.say("the operator's word was not obeyed"),
            Event::Continue if now == was => self.say("the user's continue was not obeyed"),
            Event::Linked if now == Stranded => self.say("a source that came back was not heard"),
            _ => (),
        }
    }

    /// What a message must lead to. `answered`: whether something was sent back, if the connection is open.
    pub fn watch_hearing(&mut self, who: usize, before: &Side, message: Message, answered: Option<bool>) {
        let now = self.all[who].phase();
        match message {
            Message::Go { epoch, incarnation } if incarnation == before.incarnation => {
                let decided = self.refused[who] & bit(epoch) != 0 || self.owned[who] & bit(epoch + 1) != 0;
                if decided && now != Phase::Starting && answered == Some(false) {
                    self.say("a repeated GO got no answer");
                }
                if before.epoch == epoch && matches!(now, Phase::Ready | Phase::Stranded) {
                    self.say("a GO was not obeyed");
                }
            }
            Message::Vote { epoch, incarnation, vote } => {
                let meant = epoch == before.epoch && Some(incarnation) == before.peer;
                let told = match vote {
                    Vote::Owned => now == Phase::Empty,
                    Vote::Never => now == Phase::TakingBack,
                    Vote::Unknown => true,
                };
                if meant && matches!(before.phase, Phase::Committed | Phase::Asking) && !told {
                    self.say("a source that was told does not act on it");
                }
                if now == Phase::Preparing && answered.is_some() {
                    self.say("a source that was refused goes on");
                }
            }
            _ => (),
        }
    }
}
