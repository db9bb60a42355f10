//! From a worker's frames to types that cannot be invalid.
//!
//! Rows of tokens stay in the columns they came in: nothing is copied or
//! allocated for a token.

mod found;
mod hello;
mod rows;

use kvmesh_wire::v1::{self, worker_frame::Frame};

use crate::{Fence, GenerationId, Stage, Violation};
pub use found::{Found, Held, Holds, Left, Told};
pub use hello::{Hello, Unread, hello, reads_cache, valid_name};
pub use rows::{Row, Rows};

/// A frame of a worker after its hello.
#[derive(Clone, Debug, PartialEq)]
pub enum Inbound {
    /// Step-output lane.
    Step(Box<StepFrame>),
    /// Load lane.
    Load(Box<LoadReport>),
    /// Cache lane.
    Cache(v1::CacheEvents),
    /// A frame that this version does not know: ignored.
    Unknown,
}

/// What one step brought; within it the order is openings, rows, ends.
#[derive(Clone, Debug, PartialEq)]
pub struct StepFrame {
    /// Number of the step; 0 between steps.
    pub step: u64,
    /// Placements answered.
    pub openings: Vec<Opening>,
    /// Tokens.
    pub rows: Rows,
    /// Stages ended.
    pub ends: Vec<StageEnd>,
    /// Answers to Find and Claim.
    pub found: Vec<Found>,
    /// Service time, in the last frame of a step.
    pub sample: Option<v1::StepSample>,
    /// Load after the step, where one was due.
    pub load: Option<LoadReport>,
}

/// A load whose role and phase are known.
#[derive(Clone, Debug, PartialEq)]
pub struct LoadReport {
    /// Role in force.
    pub role: v1::Role,
    /// Whether it can run anything.
    pub phase: v1::WorkerPhase,
    /// All of it.
    pub load: v1::Load,
}

/// Answer to a Place.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Opening {
    /// The generation.
    pub generation: GenerationId,
    /// The attempt.
    pub fence: Fence,
    /// The stage.
    pub stage: Stage,
    /// The answer.
    pub answer: Answer,
    /// What the engine lacks, where it is refused for that.
    pub lacks: Option<Box<Lacks>>,
}

/// What an engine lacks, as its worker says.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Lacks {
    /// Path of the field in the client's request; empty where it does not say.
    pub field: String,
    /// More, for people.
    pub message: String,
}

/// Whether a worker takes a stage.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Answer {
    /// Room is held.
    Reserved {
        /// Tokens whose KV is there already.
        held: u32,
        /// Tokens that room is held for.
        reserved: u32,
    },
    /// It will not run there.
    Refused(Refusal),
}

/// Why a placement was refused or given back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Refusal {
    /// The pool cannot hold it now.
    NoRoom,
    /// No new work there.
    Draining,
    /// The transfer is gone.
    UnknownTransfer,
    /// Another router owns the generation.
    TakenOver,
    /// The engine cannot do it.
    Unsupported,
    /// No answer came in time, or the session ended before one.
    Unanswered,
}

impl Refusal {
    fn from_wire(reason: i32) -> Self {
        match v1::RefusalReason::try_from(reason) {
            Ok(v1::RefusalReason::Draining) => Self::Draining,
            Ok(v1::RefusalReason::UnknownTransfer) => Self::UnknownTransfer,
            Ok(v1::RefusalReason::TakenOver) => Self::TakenOver,
            Ok(v1::RefusalReason::Unsupported) => Self::Unsupported,
            // A reason of a later version: some kind of "not here, not now".
            Ok(v1::RefusalReason::NoRoom | v1::RefusalReason::Unspecified) | Err(_) => Self::NoRoom,
        }
    }
}

/// The end of a stage.
#[derive(Clone, Debug, PartialEq)]
pub struct StageEnd {
    /// The generation.
    pub generation: GenerationId,
    /// The attempt.
    pub fence: Fence,
    /// The stage.
    pub stage: Stage,
    /// What it took.
    pub timings: v1::StageTimings,
    /// How it ended.
    pub end: End,
}

/// How a stage ended.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum End {
    /// The output is complete.
    Finished {
        /// Why.
        reason: FinishReason,
        /// The stop token that ended it.
        stop_token: Option<u32>,
    },
    /// The other worker goes on.
    HandedOff {
        /// What decode needs, for an engine's own hand-off.
        engine: Option<v1::EngineHandOff>,
    },
    /// Given back; no failure.
    Returned(Refusal),
    /// KV could not be moved.
    TransferFailed,
    /// Ended by Cancel.
    Cancelled,
    /// Something went wrong.
    Failed(Failure),
}

/// Why an output is complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FinishReason {
    /// End of text, stop token or stop string.
    Stop,
    /// The limit of tokens.
    Length,
}

/// What a worker said about a failed stage.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Failure {
    /// Canonical status code.
    pub code: u32,
    /// Reason, as in ErrorInfo.
    pub reason: String,
    /// For people.
    pub message: String,
    /// Whether another worker may succeed.
    pub retryable: bool,
}

/// Parses a frame that came after hello.
///
/// # Errors
/// [`Violation::Malformed`], which closes the session.
pub fn worker_frame(frame: v1::WorkerFrame) -> Result<Inbound, Violation> {
    match frame.frame {
        Some(Frame::Hello(_)) => Err(Violation::Malformed("a second hello")),
        Some(Frame::Step(output)) => Ok(Inbound::Step(Box::new(step(output)?))),
        Some(Frame::Load(report)) => Ok(Inbound::Load(Box::new(load(report)?))),
        Some(Frame::Cache(events)) => Ok(Inbound::Cache(events)),
        None => Ok(Inbound::Unknown),
    }
}

fn step(output: v1::StepOutput) -> Result<StepFrame, Violation> {
    Ok(StepFrame {
        step: output.step,
        openings: output
            .openings
            .into_iter()
            .map(opening)
            .collect::<Result<_, _>>()?,
        rows: output
            .tokens
            .map(Rows::parse)
            .transpose()?
            .unwrap_or_default(),
        ends: output
            .ends
            .into_iter()
            .map(stage_end)
            .collect::<Result<_, _>>()?,
        found: output
            .found
            .into_iter()
            .map(found::found)
            .collect::<Result<_, _>>()?,
        sample: output.sample,
        load: output.load.map(load).transpose()?,
    })
}

fn load(load: v1::Load) -> Result<LoadReport, Violation> {
    let role = v1::Role::try_from(load.role).unwrap_or_default();
    if role == v1::Role::Unspecified {
        return Err(Violation::Malformed("load without a role"));
    }
    let phase = v1::WorkerPhase::try_from(load.phase).unwrap_or_default();
    if phase == v1::WorkerPhase::Unspecified {
        return Err(Violation::Malformed("load without a phase"));
    }
    let times = [load.step_age_ms, load.step_predicted_ms];
    if times.iter().any(|ms| !ms.is_finite() || *ms < 0.0) {
        return Err(Violation::Malformed("load with an impossible time"));
    }
    Ok(LoadReport { role, phase, load })
}

fn name(
    generation: &[u8],
    owner: u32,
    attempt: u32,
    stage: i32,
) -> Result<(GenerationId, Fence, Stage), Violation> {
    let id = GenerationId::from_wire(generation)
        .ok_or(Violation::Malformed("a generation that is not 16 bytes"))?;
    let stage = Stage::from_wire(stage).ok_or(Violation::Malformed("no such stage"))?;
    Ok((id, Fence { owner, attempt }, stage))
}

fn opening(opening: v1::Opening) -> Result<Opening, Violation> {
    let (generation, fence, stage) = name(
        &opening.generation,
        opening.owner,
        opening.attempt,
        opening.stage,
    )?;
    let mut lacks = None;
    let answer = match opening.answer {
        Some(v1::opening::Answer::Reserved(room)) => Answer::Reserved {
            held: room.tokens_held,
            reserved: room.tokens_reserved,
        },
        Some(v1::opening::Answer::Refused(refused)) => {
            let why = Refusal::from_wire(refused.reason);
            let v1::Refused { message, field, .. } = refused;
            lacks = (why == Refusal::Unsupported).then(|| Box::new(Lacks { field, message }));
            Answer::Refused(why)
        }
        None => return Err(Violation::Malformed("an opening without an answer")),
    };
    Ok(Opening {
        generation,
        fence,
        stage,
        answer,
        lacks,
    })
}

fn stage_end(end: v1::StageEnd) -> Result<StageEnd, Violation> {
    use v1::stage_end::End as Wire;
    let (generation, fence, stage) = name(&end.generation, end.owner, end.attempt, end.stage)?;
    let kind = match end.end {
        Some(Wire::Finished(finished)) => End::Finished {
            reason: match v1::FinishReason::try_from(finished.reason) {
                Ok(v1::FinishReason::Stop) => FinishReason::Stop,
                Ok(v1::FinishReason::Length) => FinishReason::Length,
                _ => return Err(Violation::Malformed("finished without a reason")),
            },
            stop_token: finished.stop_token_id,
        },
        Some(Wire::HandedOff(handed)) => End::HandedOff {
            engine: handed.engine,
        },
        Some(Wire::Returned(returned)) => End::Returned(Refusal::from_wire(returned.reason)),
        Some(Wire::TransferFailed(_)) => End::TransferFailed,
        Some(Wire::Cancelled(_)) => End::Cancelled,
        Some(Wire::Failed(failed)) => End::Failed(Failure {
            code: failed.code,
            reason: failed.reason,
            message: failed.message,
            retryable: failed.retryable,
        }),
        None => return Err(Violation::Malformed("a stage end without an end")),
    };
    let timings = end.timings.unwrap_or_default();
    Ok(StageEnd {
        generation,
        fence,
        stage,
        timings,
        end: kind,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_opening_needs_all_its_parts() {
        let whole = v1::Opening {
            generation: vec![0; 16].into(),
            owner: 1,
            attempt: 1,
            stage: v1::Stage::Whole.into(),
            answer: Some(v1::opening::Answer::Reserved(v1::Reserved::default())),
        };
        assert!(opening(whole.clone()).is_ok());
        assert!(
            opening(v1::Opening {
                answer: None,
                ..whole.clone()
            })
            .is_err()
        );
        assert!(
            opening(v1::Opening {
                stage: 0,
                ..whole.clone()
            })
            .is_err()
        );
        assert!(
            opening(v1::Opening {
                generation: vec![0; 15].into(),
                ..whole
            })
            .is_err()
        );
    }

    #[test]
    fn what_an_engine_lacks_is_kept_with_its_refusal_alone() {
        let refused = |reason: v1::RefusalReason| v1::Opening {
            generation: vec![0; 16].into(),
            owner: 1,
            attempt: 1,
            stage: v1::Stage::Whole.into(),
            answer: Some(v1::opening::Answer::Refused(v1::Refused {
                reason: reason.into(),
                message: "no such thing".to_owned(),
                field: "sampling.min_p".to_owned(),
            })),
        };
        let lacks = |reason| opening(refused(reason)).expect("it is whole").lacks;
        let told = lacks(v1::RefusalReason::Unsupported).expect("it is told");
        assert_eq!(told.field, "sampling.min_p");
        assert_eq!(told.message, "no such thing");
        assert_eq!(lacks(v1::RefusalReason::NoRoom), None);
    }

    #[test]
    fn an_unknown_frame_of_a_later_minor_is_ignored() {
        assert_eq!(
            worker_frame(v1::WorkerFrame { frame: None }),
            Ok(Inbound::Unknown)
        );
    }
}
