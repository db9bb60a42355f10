//! From a worker's frames to types that cannot be invalid.
//!
//! Rows of tokens stay in the columns they came in: nothing is copied or
//! allocated for a token.

use kvmesh_wire::v1::{self, worker_frame::Frame};

use crate::{Fence, GenerationId, Stage, Violation};

/// A frame of a worker after its hello.
#[derive(Clone, Debug, PartialEq)]
pub enum Inbound {
    /// Step-output lane.
    Step(Box<StepFrame>),
    /// Load lane.
    Load(LoadReport),
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

/// Rows of tokens whose columns agree.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rows(v1::TokenRows);

/// One row of [`Rows`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Row<'a> {
    /// The generation.
    pub generation: GenerationId,
    /// The attempt.
    pub fence: Fence,
    /// Output index of the first id.
    pub first_index: u32,
    /// At least one id.
    pub ids: &'a [u32],
    /// One entry an id, or none at all.
    pub logprobs: &'a [v1::TokenLogprobs],
}

impl Rows {
    /// Checks that the columns agree.
    ///
    /// # Errors
    /// [`Violation::Malformed`] where they do not.
    pub fn parse(rows: v1::TokenRows) -> Result<Self, Violation> {
        let count = rows.counts.len();
        let columns = [
            rows.owners.len(),
            rows.attempts.len(),
            rows.first_indices.len(),
        ];
        if rows.generations.len() != 16 * count || columns != [count; 3] {
            return Err(Violation::Malformed("columns of tokens differ in length"));
        }
        let mut total = 0_usize;
        for (&ids, &first) in rows.counts.iter().zip(&rows.first_indices) {
            if ids == 0 || first.checked_add(ids).is_none() {
                return Err(Violation::Malformed(
                    "a row of tokens without a valid count",
                ));
            }
            total = total.saturating_add(ids as usize);
        }
        if total != rows.ids.len() {
            return Err(Violation::Malformed("counts of tokens do not add up"));
        }
        let mut next = 0;
        for entry in &rows.logprobs {
            let tokens = rows.counts.get(entry.row as usize).copied().unwrap_or(0);
            if tokens == 0 || entry.row < next || entry.tokens.len() != tokens as usize {
                return Err(Violation::Malformed(
                    "log-probabilities without their tokens",
                ));
            }
            next = entry.row + 1;
        }
        Ok(Self(rows))
    }

    /// The rows in order.
    pub fn iter(&self) -> impl Iterator<Item = Row<'_>> {
        let Self(rows) = self;
        let mut ids = rows.ids.as_slice();
        let mut logprobs = rows.logprobs.iter().peekable();
        let names = rows.generations.chunks_exact(16);
        names.enumerate().filter_map(move |(i, name)| {
            let (now, rest) = ids.split_at_checked(*rows.counts.get(i)? as usize)?;
            ids = rest;
            let own = logprobs.next_if(|entry| entry.row as usize == i);
            Some(Row {
                generation: GenerationId::from_wire(name)?,
                fence: Fence {
                    owner: *rows.owners.get(i)?,
                    attempt: *rows.attempts.get(i)?,
                },
                first_index: *rows.first_indices.get(i)?,
                ids: now,
                logprobs: own.map_or(&[], |entry| &entry.tokens),
            })
        })
    }

    /// Number of rows.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.counts.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.counts.is_empty()
    }
}

/// Parses a frame that came after hello.
///
/// # Errors
/// [`Violation::Malformed`], which closes the session.
pub fn worker_frame(frame: v1::WorkerFrame) -> Result<Inbound, Violation> {
    match frame.frame {
        Some(Frame::Hello(_)) => Err(Violation::Malformed("a second hello")),
        Some(Frame::Step(output)) => Ok(Inbound::Step(Box::new(step(output)?))),
        Some(Frame::Load(report)) => Ok(Inbound::Load(load(report)?)),
        Some(Frame::Cache(events)) => Ok(Inbound::Cache(events)),
        None => Ok(Inbound::Unknown),
    }
}

/// Takes the first frame of a session.
///
/// # Errors
/// [`Violation::Malformed`] where it is not a hello, or lacks what a hello
/// must have.
pub fn hello(frame: v1::WorkerFrame) -> Result<Hello, Violation> {
    let Some(Frame::Hello(hello)) = frame.frame else {
        return Err(Violation::Malformed("the first frame is not a hello"));
    };
    let version = hello
        .version
        .ok_or(Violation::Malformed("hello without a version"))?;
    let record = hello
        .record
        .ok_or(Violation::Malformed("hello without a record"))?;
    if !valid_name(&record.worker_id) {
        return Err(Violation::Malformed("hello without a valid worker id"));
    }
    let model = record
        .model
        .as_ref()
        .ok_or(Violation::Malformed("hello without a model"))?;
    if model.name.is_empty() || model.context_length == 0 {
        return Err(Violation::Malformed("hello with an empty model"));
    }
    let Some(capabilities) = record.capabilities.as_ref() else {
        return Err(Violation::Malformed("hello without capabilities"));
    };
    if capabilities.block_tokens == 0 || !capabilities.block_tokens.is_multiple_of(16) {
        return Err(Violation::Malformed(
            "hello with a block size that is no multiple of 16",
        ));
    }
    Ok(Hello {
        version: (version.major, version.minor),
        hash_scheme: capabilities.hash_scheme,
        last_event: hello.last_event,
        resume_event: hello.resume_event,
        step_model: hello.step_model,
        record,
    })
}

/// A worker's hello with everything a session needs.
#[derive(Clone, Debug, PartialEq)]
pub struct Hello {
    /// Protocol version: (major, minor).
    pub version: (u32, u32),
    /// Who this is; model and capabilities are set and valid.
    pub record: v1::WorkerRecord,
    /// Hash scheme of its cache lane.
    pub hash_scheme: u32,
    /// Last cache event so far.
    pub last_event: u64,
    /// First cache event that follows, where no snapshot comes.
    pub resume_event: u64,
    /// Step-time model fitted at start.
    pub step_model: Option<v1::StepModel>,
}

/// Whether a text can be a worker's or a router's id: 1 to 128 characters of
/// `[A-Za-z0-9._-]`.
#[must_use]
pub fn valid_name(name: &str) -> bool {
    let allowed = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'.' | b'_' | b'-');
    (1..=128).contains(&name.len()) && name.bytes().all(allowed)
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
    let answer = match opening.answer {
        Some(v1::opening::Answer::Reserved(room)) => Answer::Reserved {
            held: room.tokens_held,
            reserved: room.tokens_reserved,
        },
        Some(v1::opening::Answer::Refused(refused)) => {
            Answer::Refused(Refusal::from_wire(refused.reason))
        }
        None => return Err(Violation::Malformed("an opening without an answer")),
    };
    Ok(Opening {
        generation,
        fence,
        stage,
        answer,
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

    fn rows(counts: &[u32], ids: usize) -> v1::TokenRows {
        let rows = counts.len();
        v1::TokenRows {
            generations: vec![1; 16 * rows].into(),
            owners: vec![1; rows],
            attempts: vec![1; rows],
            first_indices: vec![0; rows],
            counts: counts.to_vec(),
            ids: (0..ids as u32).collect(),
            logprobs: Vec::new(),
        }
    }

    #[test]
    fn rows_take_their_ids_in_order() {
        let parsed = Rows::parse(rows(&[2, 1, 3], 6)).expect("valid");
        let ids: Vec<&[u32]> = parsed.iter().map(|row| row.ids).collect();
        assert_eq!(ids, [&[0, 1][..], &[2], &[3, 4, 5]]);
    }

    #[test]
    fn rows_take_their_own_logprobs() {
        let mut wire = rows(&[1, 2], 3);
        let tokens = vec![v1::TokenLogprobs::default(); 2];
        wire.logprobs = vec![v1::RowLogprobs { row: 1, tokens }];
        let parsed = Rows::parse(wire).expect("valid");
        let lengths: Vec<usize> = parsed.iter().map(|row| row.logprobs.len()).collect();
        assert_eq!(lengths, [0, 2]);
    }

    #[test]
    fn columns_that_disagree_are_malformed() {
        let mut short = rows(&[1, 1], 2);
        short.owners.pop();
        let mut overflow = rows(&[2], 2);
        overflow.first_indices[0] = u32::MAX;
        let mut stray = rows(&[1], 1);
        stray.logprobs = vec![v1::RowLogprobs {
            row: 7,
            tokens: Vec::new(),
        }];
        for bad in [
            short,
            overflow,
            stray,
            rows(&[0], 0),
            rows(&[2], 1),
            rows(&[1], 2),
        ] {
            assert!(matches!(Rows::parse(bad), Err(Violation::Malformed(_))));
        }
    }

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
    fn an_unknown_frame_of_a_later_minor_is_ignored() {
        assert_eq!(
            worker_frame(v1::WorkerFrame { frame: None }),
            Ok(Inbound::Unknown)
        );
    }

    #[test]
    fn names_are_short_and_plain() {
        for (name, valid) in [("w-1.a_B", true), ("", false), ("a b", false), ("ä", false)] {
            assert_eq!(valid_name(name), valid, "{name}");
        }
        assert!(!valid_name(&"x".repeat(129)));
    }
}
