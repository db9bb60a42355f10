//! What the worker's process is told.

use std::time::{Duration, Instant};

use kvmesh_wire::v1::{HandOver, Place};

use crate::{attempt::AttemptId, ends::AttemptEnd};

/// What routers and operators want of the worker's process, in order.
#[derive(Clone, Debug)]
pub enum Event {
    /// A placement that passed the door; the engine answers it.
    Placed {
        /// The session that gets the answers.
        session: String,
        /// The placement, as it was read.
        place: Box<Place>,
        /// When it was read.
        received: Instant,
    },
    /// Attempts to end: a router said so, or its session is gone.
    Cancelled(Vec<AttemptId>),
    /// A running attempt is to pass to another worker.
    HandOver(HandOver),
    /// A router needs the cache's content.
    SnapshotWanted {
        /// Its session.
        session: String,
    },
    /// `GetInfo` waits for what the engine holds.
    InfoWanted {
        /// Names the call in [`crate::Port::answer_info`].
        call: u64,
    },
    /// `Drain` with `stop`: the process ends when nothing runs.
    Stop {
        /// Time for running work; `None`: the worker's own setting.
        grace: Option<Duration>,
    },
    /// `SetRole`: the role in force, as on the wire.
    RoleChanged(i32),
    /// Attempts have ended: for the log. Nothing is to be done.
    Ends(Vec<AttemptEnd>),
    /// The engine says nothing more.
    EngineEnded,
}
