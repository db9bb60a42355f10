//! What happens to a session, what it asks for, and how it stands.

use smallvec::SmallVec;

use crate::{
    PROTOCOL_VERSION,
    generation::Loss,
    parse::{Hello, LoadReport, Unread},
};

/// State of a session.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// Until the next try.
    Waiting,
    /// A connection is being opened.
    Dialling,
    /// Hello is sent; the worker's is awaited.
    Greeting,
    /// Works.
    Live,
    /// No new placements.
    Suspect(Suspicion),
    /// Given up while the transport is open.
    Lost(Suspicion),
    /// Its answers fail: nothing is placed there for a while.
    Ejected,
    /// Back after being lost: one probe at a time.
    HalfOpen {
        /// Number of the command that placed the probe that is under way.
        probe: Option<u64>,
    },
    /// The worker's hello does not fit.
    Refused(Mismatch),
}

/// Why a worker is suspect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Suspicion {
    /// No frame.
    Silent,
    /// Its step takes far longer than predicted.
    Stuck,
}

/// Why a hello is refused.
#[derive(Clone, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Mismatch {
    /// Another protocol.
    #[error("speaks protocol {0}.{1}, this router {major}.{minor} and one minor less",
        major = PROTOCOL_VERSION.0, minor = PROTOCOL_VERSION.1)]
    Version(u32, u32),
    /// Another worker than the one that the address was told for.
    #[error("is worker {0}, not the one registered under this address")]
    Identity(String),
}

/// What happens to a session.
#[derive(Clone, Debug, PartialEq)]
pub enum Event<'a> {
    /// The address became known, or the time to dial has come.
    Dial,
    /// The stream is open.
    Opened,
    /// The worker's hello.
    Hello(&'a Hello),
    /// Any frame; with its load where it carries one.
    Frame(Option<&'a LoadReport>),
    /// The transport broke.
    Broken,
    /// The transport was closed since the worker broke the protocol: nothing
    /// that it holds is wanted.
    Violated,
    /// The worker's address refuses connections: nobody listens there.
    Refused,
    /// A request was placed, by the command of this number.
    Placed(u64),
    /// A worker refused a placement, brought tokens or ended a stage: it works.
    Answered,
    /// A stage failed there, and the request is not to blame. With the number of the
    /// command that placed it; 0 where it is not held any more.
    Faulted(u64),
    /// A stage ended, and says neither that the worker works nor that it does not; or
    /// this router gave the request up, after which a worker need not say anything of
    /// it. With the number of the command that placed it.
    Undecided(u64),
    /// A wait is over.
    Fired(Timer),
}

/// What a session waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Timer {
    /// The next try; how long is the driver's (jittered, growing).
    Redial,
    /// The worker's hello.
    Greeting,
    /// The end of an ejection.
    Probe,
    /// The worker's return, before what runs there is lost.
    Reattach,
    /// The next frame, before the worker is suspect.
    Suspect,
    /// The next frame, before the worker is lost.
    Lost,
}

/// What the driver has to do.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Open a connection and the stream.
    Dial,
    /// Send hello.
    SendHello {
        /// Worker incarnation whose cache is known; 0 for none.
        known_incarnation: u64,
        /// Last cache event of it; 0 for none.
        known_event: u64,
    },
    /// Start a wait of so many milliseconds, anew if it runs.
    Arm(Timer, u64),
    /// Start the wait for the next try: the n-th in a row.
    ArmRedial(u32),
    /// Give a wait up.
    Disarm(Timer),
    /// The worker's streams end or move.
    Lose(Loss),
    /// The worker is back: those of its streams that its hello names go on, the
    /// others are lost.
    Reattach,
    /// Drop the transport.
    Close,
    /// Start with an empty view of the worker's cache.
    ForgetCache,
    /// What the worker says of its cache is not read.
    IndexOff(Unread),
    /// Whether the worker can be placed on may have changed.
    StateChanged,
}

/// A list of actions, in order.
pub type Actions = SmallVec<[Action; 4]>;
