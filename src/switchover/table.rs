//! The rules of the switchover, a row for each transition. The first row that fits is taken.

use super::{Action, Event, Message, Phase, Resolution, Vote};

/// The kind of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "as the events")]
pub enum On {
    Begin,
    BeginWaiting,
    Continue,
    Cancel,
    Committed,
    Prepare,
    Ready,
    Go,
    Abort,
    Owned,
    Never,
    NotKnown,
    Linked,
    LinkLost,
    Done,
    Failed,
    Deadline,
    RetryDue,
    Run,
    Discard,
}

impl On {
    /// The kind of this event.
    pub fn of(event: &Event) -> Self {
        match event {
            Event::Begin { wait: false } => On::Begin,
            Event::Begin { wait: true } => On::BeginWaiting,
            Event::Continue => On::Continue,
            Event::Cancel => On::Cancel,
            Event::Committed => On::Committed,
            Event::Heard(Message::Prepare { .. }) => On::Prepare,
            Event::Heard(Message::Ready { .. }) => On::Ready,
            Event::Heard(Message::Go { .. }) => On::Go,
            Event::Heard(Message::Abort { .. }) => On::Abort,
            Event::Heard(Message::Vote { vote: Vote::Owned, .. }) => On::Owned,
            Event::Heard(Message::Vote { vote: Vote::Never, .. }) => On::Never,
            Event::Heard(Message::Vote { vote: Vote::Unknown, .. }) => On::NotKnown,
            Event::Linked => On::Linked,
            Event::LinkLost => On::LinkLost,
            Event::Done => On::Done,
            Event::Failed => On::Failed,
            Event::Deadline => On::Deadline,
            Event::RetryDue => On::RetryDue,
            Event::Resolve(Resolution::Run) => On::Run,
            Event::Resolve(Resolution::Discard) => On::Discard,
        }
    }
}

/// What an event must be for a row to fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum If {
    /// Anything.
    Always,
    /// About the present attempt.
    Epoch,
    /// About the present attempt, and to the incarnation that said READY, or from it.
    Exact,
    /// About an attempt this side has not voted on.
    New,
}

/// What a row does. Numbers are added to the attempt's epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "as the actions")]
pub enum Do {
    Release(u64),
    Reacquire(u64),
    Fence(u64),
    SendPrepare,
    SendReady,
    SendGo,
    SendAbort,
    /// Decides this vote, keeps it, and sends it.
    Vote(Vote),
    /// Sends the vote that was kept about what was asked; UNKNOWN of what never can be.
    Answer,
    /// Owns from here on, with this much higher an epoch.
    Own(u64),
    /// An action that needs nothing filled in.
    Plain(Action),
}

/// One transition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// In which phase; none: in all.
    pub at: Option<Phase>,
    /// At which event.
    pub on: On,
    /// Under which condition.
    pub when: If,
    /// To which phase; none: it stays.
    pub to: Option<Phase>,
    /// What is done.
    pub then: &'static [Do],
}

const fn row(at: Phase, on: On, to: Phase, then: &'static [Do]) -> Row {
    Row { at: Some(at), on, when: If::Always, to: Some(to), then }
}

impl Row {
    const fn when(self, when: If) -> Self {
        Self { when, ..self }
    }
}

// The epochs of an attempt, from the source's: as the source owns, as the destination will, as the source takes back.
const HERE: u64 = 0;
const THERE: u64 = 1;
const BACK: u64 = 2;

const ARM: Do = Do::Plain(Action::Arm);
const CLOSE: Do = Do::Plain(Action::Close);
const RESUME: Do = Do::Plain(Action::Resume);
const FORGET: Do = Do::Plain(Action::Forget);
const RETRY_LATER: Do = Do::Plain(Action::RetryLater);
const RECONNECT: Do = Do::Plain(Action::Reconnect);
const START: Do = Do::Plain(Action::Start);

/// The attempt is over before GO: says so where anybody listens, and takes the guest back.
const ABORT: &[Do] = &[Do::SendAbort, CLOSE, ARM, Do::Reacquire(BACK)];
/// The destination will certainly not run the guest.
const TAKE_BACK: &[Do] = &[CLOSE, ARM, Do::Reacquire(BACK)];
/// The same, when there is no connection any more.
const TAKE_BACK_ALONE: &[Do] = &[ARM, Do::Reacquire(BACK)];
/// The guest is at the destination.
const LEAVE: &[Do] = &[CLOSE, FORGET];
/// The vote comes first: from then on GO is refused, whatever the release hook says.
const REFUSE: &[Do] = &[Do::Vote(Vote::Never), ARM, Do::Release(THERE)];
/// The vote is about the attempt, so it comes before the new epoch.
const TAKE_OVER: &[Do] = &[Do::Vote(Vote::Owned), Do::Own(THERE), Do::Plain(Action::Announce)];

/// The rules.
pub const ROWS: &[Row] = {
    use On::{
        Abort, Begin, BeginWaiting, Cancel, Committed as Won, Continue, Deadline, Discard, Done, Failed, Go,
        LinkLost, Linked, Never, NotKnown, Owned, Prepare, Ready as SaidReady, RetryDue, Run,
    };
    use Phase::{
        Acquiring, Asking, Committed, Deciding, Empty, Fencing, Held, Loading, Owner, PreSwitchover, Preparing,
        Ready, RefuseLater, Refusing, Releasing, Rescuing, Starting, Stranded, TakeBackLater, TakingBack, Unknown,
    };
    &[
        // Leaving, before GO: whatever goes wrong, the guest is taken back.
        row(Owner, Begin, Releasing, &[Do::Release(HERE)]),
        row(Owner, BeginWaiting, PreSwitchover, &[]),
        row(PreSwitchover, Continue, Releasing, &[Do::Release(HERE)]),
        row(PreSwitchover, Cancel, Owner, &[CLOSE, RESUME]), // nothing was released yet
        row(PreSwitchover, Failed, Owner, &[CLOSE, RESUME]),
        row(PreSwitchover, LinkLost, Owner, &[RESUME]),
        row(Releasing, Done, Preparing, &[ARM, Do::SendPrepare]),
        row(Releasing, Failed, TakingBack, TAKE_BACK), // half of it may have been released
        row(Preparing, SaidReady, Deciding, &[Do::Plain(Action::Decide)]).when(If::Epoch),
        row(Preparing, Never, TakingBack, TAKE_BACK),
        row(Preparing, NotKnown, TakingBack, TAKE_BACK),
        row(Preparing, Cancel, TakingBack, ABORT),
        row(Preparing, Failed, TakingBack, ABORT),
        row(Preparing, LinkLost, TakingBack, TAKE_BACK_ALONE),
        row(Preparing, Deadline, TakingBack, ABORT),
        row(Deciding, Cancel, TakingBack, ABORT),
        row(Deciding, Won, Committed, &[ARM, Do::SendGo]),
        // Leaving, after GO: only the destination's word, a fence or an operator says where the guest is.
        row(Committed, Owned, Empty, LEAVE).when(If::Exact),
        row(Committed, Never, TakingBack, TAKE_BACK).when(If::Exact),
        row(Committed, LinkLost, Asking, &[ARM, RECONNECT]),
        row(Committed, Deadline, Asking, &[CLOSE, ARM, RECONNECT]),
        row(Asking, Linked, Asking, &[Do::SendGo]),
        row(Asking, LinkLost, Asking, &[RECONNECT]),
        row(Asking, Owned, Empty, LEAVE).when(If::Exact),
        row(Asking, Never, TakingBack, TAKE_BACK).when(If::Exact),
        // A stranger at the old address, whatever it says; the one we know may come back.
        row(Asking, Owned, Asking, &[CLOSE, RECONNECT]),
        row(Asking, Never, Asking, &[CLOSE, RECONNECT]),
        row(Asking, NotKnown, Asking, &[CLOSE, RECONNECT]),
        row(Asking, Deadline, Fencing, &[CLOSE, Do::Fence(THERE)]),
        row(Asking, Run, TakingBack, TAKE_BACK),
        row(Asking, Discard, Empty, LEAVE),
        row(Fencing, Done, TakingBack, TAKE_BACK_ALONE),
        row(Fencing, Failed, Unknown, &[]),
        row(Unknown, Run, TakingBack, TAKE_BACK_ALONE),
        row(Unknown, Discard, Empty, &[FORGET]),
        // Taking back: no guest runs before its resources are here.
        row(TakingBack, Done, Owner, &[Do::Own(BACK), RESUME]),
        row(TakingBack, Failed, TakeBackLater, &[RETRY_LATER]),
        row(TakeBackLater, RetryDue, TakingBack, &[Do::Reacquire(BACK)]),
        row(TakeBackLater, Deadline, Held, &[]),
        row(Held, Run, TakingBack, TAKE_BACK_ALONE),
        row(Held, Discard, Empty, &[FORGET]),
        // Arriving, before READY: any failure is a NEVER.
        row(Empty, Prepare, Loading, &[Do::Plain(Action::Load)]).when(If::New),
        row(Empty, Prepare, Empty, &[Do::Answer]), // another guest's attempt had this number: that vote stands
        row(Loading, Done, Acquiring, &[Do::Reacquire(THERE)]),
        row(Loading, Failed, Empty, &[Do::Vote(Vote::Never), FORGET]),
        row(Acquiring, Done, Ready, &[ARM, Do::SendReady]),
        row(Acquiring, Failed, Empty, &[Do::Vote(Vote::Never), FORGET]),
        // Arriving, after READY: GO and nothing else makes an owner, but for an operator.
        row(Ready, Go, Starting, &[START]).when(If::Exact),
        row(Ready, Abort, Refusing, REFUSE).when(If::Epoch),
        row(Ready, Cancel, Refusing, REFUSE),
        row(Ready, Deadline, Refusing, REFUSE),
        row(Ready, LinkLost, Stranded, &[]),
        row(Stranded, Linked, Ready, &[]),
        row(Stranded, Go, Starting, &[START]).when(If::Exact), // it came before the connection broke
        row(Stranded, Abort, Refusing, REFUSE).when(If::Epoch),
        row(Stranded, Deadline, Refusing, REFUSE),
        row(Stranded, Cancel, Refusing, REFUSE),
        row(Stranded, Discard, Refusing, REFUSE),
        row(Stranded, Run, Rescuing, &[START]),
        row(Starting, Done, Owner, TAKE_OVER),
        row(Starting, Failed, Refusing, REFUSE), // it did not run an instruction: the source may have it back
        row(Rescuing, Done, Owner, TAKE_OVER),
        row(Rescuing, Failed, Stranded, &[]), // a failed call changes nothing
        row(Refusing, Done, Empty, &[FORGET]),
        row(Refusing, Failed, RefuseLater, &[RETRY_LATER]),
        row(RefuseLater, RetryDue, Refusing, &[Do::Release(THERE)]),
        row(RefuseLater, Deadline, Empty, &[FORGET]), // what is left goes with the process
        // Whoever is asked answers, in any phase and for as long as it lives.
        Row { at: None, on: Go, when: If::Always, to: None, then: &[Do::Answer] },
    ]
};
