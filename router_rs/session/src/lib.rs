//! Sessions, attempts and generations as state machines.
//!
//! Nothing here knows a socket, a clock or a random number: a driver feeds
//! events and carries out the actions that come back. A wait is an action
//! `Arm(timer)` that returns as an event `Fired(timer)`, so that a model
//! checker can fire timers in any order.
//!
//! * [`Generation`]: one request's way over its attempts (PROTOCOLS 2).
//! * [`Link`]: one router's session with one worker (PROTOCOLS 1, DESIGN 5).
//! * [`Takeover`]: another router's generation on its way to this one (PROTOCOLS 2).
//! * [`Command`]: what a router says to a worker, typed.
//! * [`parse`]: what a worker says, from wire messages to types that cannot be
//!   invalid. What does not parse closes the session.
#![forbid(unsafe_code)]

mod command;
pub mod generation;
mod id;
pub mod link;
pub mod parse;
pub mod takeover;

pub use command::{Command, HandOff, Placement};
pub use generation::{Generation, Outcome, Taken};
pub use id::{Fence, GenerationId, Stage, TransferId, WorkerIndex};
pub use link::Link;
pub use takeover::Takeover;

/// Protocol version that this router speaks: (major, minor).
pub const PROTOCOL_VERSION: (u32, u32) = (1, 0);

/// Hash scheme that this router's index understands.
pub const HASH_SCHEME: u32 = 1;

/// What a peer did that the protocol does not allow. It closes the session:
/// after it nothing that this worker says can be trusted to be in order.
#[derive(Clone, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Violation {
    /// A frame that does not parse.
    #[error("malformed frame: {0}")]
    Malformed(&'static str),
    /// A token that is not the next one of its source.
    #[error("hole in the output: expected index {expected}, got {got}")]
    Hole {
        /// Index that had to come.
        expected: u32,
        /// Index that came.
        got: u32,
    },
    /// An answer, tokens or an end from a stage that cannot send it now.
    #[error("{what} from a stage that is {state}")]
    OutOfTurn {
        /// What came.
        what: &'static str,
        /// State of the stage.
        state: &'static str,
    },
    /// An attempt that this router never made.
    #[error("attempt {0:?} was never made")]
    UnknownAttempt(Fence),
    /// More tokens than the request allows.
    #[error("more than {0} output tokens")]
    TooManyTokens(u32),
    /// An echo of a command that was never sent, or one lower than before.
    #[error("command {got} echoed, {sent} sent, {before} echoed before")]
    Echo {
        /// Number echoed.
        got: u64,
        /// Highest number sent.
        sent: u64,
        /// Highest number echoed so far.
        before: u64,
    },
}
