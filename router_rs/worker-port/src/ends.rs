//! How attempts ended, for the log of the worker's process.

use kvmesh_wire::v1::{FinishReason, Stage, StageEnd, stage_end::End};

use crate::attempt::{AttemptId, NamesAttempt};

/// An attempt that has ended on this worker. Holds no prompt and no output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttemptEnd {
    /// The session of the router that placed it.
    pub session: String,
    /// The attempt.
    pub attempt: AttemptId,
    /// The stage, as the protocol names it (`WHOLE`); empty where its session ended before it did.
    pub stage: &'static str,
    /// The end, in one word: `finished`, `handed_off`, `returned`,
    /// `transfer_failed`, `cancelled`, `failed` or `session_ended`.
    pub end: &'static str,
    /// Why, for people. May be empty.
    pub why: String,
}

impl AttemptEnd {
    /// From what its router is told; `None` where that names no attempt.
    pub(crate) fn of(session: &str, told: &StageEnd) -> Option<Self> {
        let (end, why) = match told.end.as_ref()? {
            End::Finished(finished) => ("finished", reason(finished.reason()).to_owned()),
            End::HandedOff(_) => ("handed_off", String::new()),
            End::Returned(returned) => ("returned", returned.message.clone()),
            End::TransferFailed(failed) => ("transfer_failed", failed.message.clone()),
            End::Cancelled(_) => ("cancelled", String::new()),
            End::Failed(failed) => ("failed", format!("{}: {}", failed.reason, failed.message)),
        };
        Some(Self {
            session: session.to_owned(),
            attempt: told.attempt_id()?,
            stage: stage(told.stage()),
            end,
            why,
        })
    }

    /// One whose router is gone.
    pub(crate) fn session_ended(session: &str, attempt: AttemptId) -> Self {
        Self {
            session: session.to_owned(),
            attempt,
            stage: "",
            end: "session_ended",
            why: "its router is gone, or its session was closed".to_owned(),
        }
    }

    /// Whether it is one of those that every day has.
    pub(crate) fn is_ordinary(&self) -> bool {
        matches!(self.end, "finished" | "handed_off" | "cancelled")
    }
}

fn stage(stage: Stage) -> &'static str {
    let named = Some(stage).filter(|stage| *stage != Stage::Unspecified);
    let name = named.and_then(|stage| stage.as_str_name().strip_prefix("STAGE_"));
    name.unwrap_or_default()
}

fn reason(reason: FinishReason) -> &'static str {
    reason
        .as_str_name()
        .strip_prefix("FINISH_REASON_")
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use kvmesh_wire::v1::{StageFailed, StageFinished};

    use super::*;

    fn told(end: End) -> StageEnd {
        StageEnd {
            generation: vec![7; 16].into(),
            owner: 1,
            attempt: 2,
            stage: Stage::Decode.into(),
            end: Some(end),
            ..StageEnd::default()
        }
    }

    #[test]
    fn an_end_is_named_with_its_attempt_and_reason() {
        let finished = StageFinished {
            reason: FinishReason::Length.into(),
            ..StageFinished::default()
        };
        let end = AttemptEnd::of("r/1", &told(End::Finished(finished))).unwrap();
        assert_eq!(
            (end.stage, end.end, end.why.as_str()),
            ("DECODE", "finished", "LENGTH")
        );
        assert_eq!((end.attempt.owner, end.attempt.attempt), (1, 2));
        assert!(end.is_ordinary());

        let failed = StageFailed {
            reason: "KERNEL".to_owned(),
            message: "it broke".to_owned(),
            ..StageFailed::default()
        };
        let end = AttemptEnd::of("r/1", &told(End::Failed(failed))).unwrap();
        assert_eq!((end.end, end.why.as_str()), ("failed", "KERNEL: it broke"));
        assert!(!end.is_ordinary());
    }

    #[test]
    fn what_names_no_attempt_is_not_told() {
        let nameless = StageEnd {
            generation: vec![7; 3].into(),
            ..told(End::Cancelled(kvmesh_wire::v1::Cancelled {}))
        };
        assert_eq!(AttemptEnd::of("r/1", &nameless), None);
        assert_eq!(AttemptEnd::of("r/1", &StageEnd::default()), None);
    }
}
