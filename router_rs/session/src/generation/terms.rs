//! What happens to a generation, what it asks for, how it ends.

use smallvec::SmallVec;

use crate::{
    Fence, Stage, TransferId, WorkerIndex,
    parse::{Answer, End, Failure, FinishReason, Refusal},
};

/// What a generation does in cases where more than one thing is right.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Policy {
    /// Refusals after which the request waits for a load frame that shows room.
    pub refusals: u8,
    /// Failed attempts that end the request. Refusals and `returned` are none.
    pub failures: u8,
    /// Whether a stream goes on elsewhere after its worker was lost; else it
    /// ends with UNAVAILABLE and the next index.
    pub survive_loss: bool,
    /// Deaths of workers that count against a request, from which on it runs
    /// with no other request in its steps.
    pub deaths: u8,
    /// Deaths while it ran so that end it.
    pub deaths_alone: u8,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            refusals: 3,
            failures: 8,
            survive_loss: true,
            deaths: 2,
            deaths_alone: 2,
        }
    }
}

/// A choice of workers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Plan {
    /// All on one worker.
    Whole {
        /// The worker.
        on: WorkerIndex,
    },
    /// Prefill streams its KV to decode: decode reserves first.
    Mesh {
        /// Computes the prompt.
        prefill: WorkerIndex,
        /// Produces the output.
        decode: WorkerIndex,
        /// Name of the transfer.
        transfer: TransferId,
    },
    /// Prefill first; decode then gets what the engine said at its end.
    Engine {
        /// Computes the prompt.
        prefill: WorkerIndex,
        /// Produces the output.
        decode: WorkerIndex,
        /// Whether prefill's tokens are part of the output.
        prefill_emits: bool,
    },
}

/// What happens to a generation.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// The scheduler chose; answers [`Action::Plan`].
    Planned(Plan),
    /// There is no plan and there will be none.
    NoPlan,
    /// A worker answered a Place.
    Opening {
        /// Who.
        from: WorkerIndex,
        /// Of which attempt.
        fence: Fence,
        /// Of which stage.
        stage: Stage,
        /// The answer.
        answer: Answer,
    },
    /// A stage ended.
    StageEnd {
        /// Who.
        from: WorkerIndex,
        /// Of which attempt.
        fence: Fence,
        /// Which stage.
        stage: Stage,
        /// How.
        end: End,
    },
    /// The stream is to go on at another worker, with its KV.
    HandOver {
        /// That worker.
        to: WorkerIndex,
        /// Name of the transfer.
        transfer: TransferId,
    },
    /// The session with a worker ended.
    SessionLost {
        /// Which.
        worker: WorkerIndex,
        /// How.
        loss: Loss,
    },
    /// A worker whose session broke is back and still has the attempt: it says
    /// again what it may have said in vain.
    Reattached {
        /// Who.
        worker: WorkerIndex,
        /// The attempt that it has.
        fence: Fence,
    },
    /// The output so far is complete: its last token is a stop token, though
    /// the word that it was the last is lost. The driver knows the tokens.
    Complete {
        /// The stop token.
        stop_token: u32,
    },
    /// The request is to end now.
    Stop(Stop),
    /// A wait is over.
    Fired(Timer),
}

/// How a session was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Loss {
    /// The transport broke: nothing can be sent; the worker may well live.
    Broken,
    /// Its process has ended: its address refuses, or another incarnation
    /// answers there.
    Died,
    /// The worker was given up while the transport is still open.
    Silent,
}

/// Why a request is to end before its stages do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stop {
    /// The client went away.
    ClientGone,
    /// The client read nothing for too long.
    SlowClient,
    /// A stop string was found in the text.
    StopString,
    /// The router is shutting down and the grace time is over.
    Shutdown,
    /// The queue is full, or the request waited in it for too long.
    Overloaded,
}

/// What a generation waits for with a bound in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Timer {
    /// The client's deadline.
    Deadline,
    /// Reserved or Refused to a Place.
    Answer {
        /// The attempt.
        attempt: u32,
        /// The stage that was placed.
        stage: Stage,
    },
    /// Decode's first token or end, after prefill's session broke.
    Orphaned {
        /// The attempt.
        attempt: u32,
    },
}

/// What the driver has to do.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Place a stage, with the continuation as it is now.
    Place {
        /// On which worker.
        to: WorkerIndex,
        /// Under which attempt.
        fence: Fence,
        /// Which stage.
        stage: Stage,
        /// How KV passes.
        hand_off: PlannedHandOff,
    },
    /// Cancel an attempt.
    Cancel {
        /// On which worker.
        to: WorkerIndex,
        /// Which attempt.
        fence: Fence,
    },
    /// Have a worker take a hand-off that nobody wants any more, and give it up once its
    /// engine has it: only so does the engine that made it hear that its blocks can go.
    /// Comes after the end, at most once. Where that worker is away the hand-off's own
    /// lease ends it.
    DropHandOff {
        /// The worker that was to decode.
        on: WorkerIndex,
        /// The attempt, which is over.
        fence: Fence,
        /// What prefill said.
        hand_off: kvmesh_wire::v1::EngineHandOff,
    },
    /// Have a worker pass its stream to one that has reserved for it.
    HandOver {
        /// The worker that has the stream.
        to: WorkerIndex,
        /// Its attempt.
        fence: Fence,
        /// The attempt under which the other goes on.
        next_attempt: u32,
        /// Name of the transfer.
        transfer: TransferId,
        /// Border of the other's continuation.
        next_index: u32,
    },
    /// The stream is at the other worker, and no longer under this attempt: the target's
    /// booking is the attempt's. Where the receiver's tokens say so first,
    /// [`Generation::fence`](super::Generation::fence) does.
    Moved {
        /// The attempt before.
        from: Fence,
    },
    /// Release the booking of a hand-over's target, which is over.
    ReleaseTarget,
    /// Ask the scheduler for a plan; answered by `Planned`, `NoPlan` or `Stop`.
    Plan(PlanRequest),
    /// Release the booking of the attempt that is over.
    Release,
    /// Start a wait.
    Arm(Timer),
    /// Give a wait up.
    Disarm(Timer),
    /// Tell the client. The last action of a generation, but for what is left of it
    /// elsewhere.
    End(Outcome),
}

/// How KV passes, as planned; the driver knows the addresses.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum PlannedHandOff {
    /// It does not.
    None,
    /// By a mesh transfer.
    Mesh {
        /// Its name.
        transfer: TransferId,
        /// The worker that sends.
        sender: WorkerIndex,
    },
    /// By the engine's own connector.
    Engine(kvmesh_wire::v1::EngineHandOff),
}

/// What a plan has to heed.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PlanRequest {
    /// Workers not to take, and why: `Unsupported` is for good, all else for
    /// now.
    pub excluded: SmallVec<[(WorkerIndex, Refusal); 2]>,
    /// Why there is a need of a plan.
    pub cause: Cause,
    /// Whether to wait for a load frame that shows room, instead of trusting
    /// what is known now.
    pub wait_for_room: bool,
    /// Attempts that failed so far. The first new one is always allowed, later
    /// ones draw on the router's budget.
    pub failures: u8,
}

/// Why a plan is needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Cause {
    /// The first one.
    Start,
    /// A worker refused.
    Refused(Refusal),
    /// A worker gave it back.
    Returned,
    /// It was claimed from another router, and no attempt of it can be gone on with.
    Claimed,
    /// An attempt failed.
    Failed,
    /// Its worker was lost.
    Lost(Loss),
}

/// How a generation ended.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// The output is complete.
    Finished {
        /// Why.
        reason: FinishReason,
        /// The stop token that ended it.
        stop_token: Option<u32>,
    },
    /// Stopped by this router.
    Stopped(Stop),
    /// The client's deadline passed.
    DeadlineExceeded,
    /// No worker can run it.
    NoPlan,
    /// A worker was lost.
    WorkerLost(WorkerIndex),
    /// Another router took it over.
    TakenOver,
    /// Every worker said that its engine cannot do this.
    Unsupported,
    /// The worker's last word.
    Failed(Failure),
    /// As many attempts failed as are allowed.
    Exhausted,
    /// Workers died of it, also where nothing else ran beside it.
    Poisoned,
}

/// What to do with a row of tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Taken {
    /// The row's ids from `skip` on are new: append them to the output.
    New {
        /// Ids at the row's begin that came before, from the other worker.
        skip: u32,
    },
    /// Nothing new: the other worker brought them, or they do not count.
    Nothing,
    /// From an attempt that is over.
    Stale,
}

/// How far a mesh transfer is, as its router sees it (PROTOCOLS 3: the workers'
/// own states are finer). `released` is not among them: then it is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TransferState {
    /// Decode has not answered.
    Placed,
    /// Decode holds room; prefill has not answered.
    Reserved,
    /// Prefill computes, and its blocks pass.
    Flowing,
    /// Prefill has handed off; decode has not brought a token of its own.
    Committed,
}

/// A list of actions, in the order in which they are to be done.
pub type Actions = SmallVec<[Action; 4]>;
