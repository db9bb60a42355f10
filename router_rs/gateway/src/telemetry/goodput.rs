//! Goodput: how many requests of a class ended within what it promises.

use kvmesh_wire::v1;
use prometheus_client::encoding::EncodeLabelSet;

use crate::request::class_name;

/// What one request is held to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct HeldTo {
    /// Its class; never unspecified.
    pub(crate) class: v1::RequestClass,
    /// First token, milliseconds after its arrival.
    pub(crate) ttft_ms: f64,
    /// Between two tokens in the mean, milliseconds. `None`: as it comes.
    pub(crate) itl_ms: Option<f64>,
}

/// How a request of a class ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ClassEnd {
    /// Well, and within what it was held to.
    Good,
    /// Well, with a first token that was late.
    LateFirstToken,
    /// Well, with tokens that came too slowly after a first one in time.
    SlowTokens,
    /// Turned away at admission.
    Refused,
    /// With an error.
    Failed,
    /// Its client left.
    Cancelled,
}

impl ClassEnd {
    fn name(self) -> &'static str {
        match self {
            Self::Good => "good",
            Self::LateFirstToken => "late_first_token",
            Self::SlowTokens => "slow_tokens",
            Self::Refused => "refused",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }
}

/// Labels: three classes, six ends.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub(super) struct ClassLabels {
    class: &'static str,
    outcome: &'static str,
}

impl ClassLabels {
    pub(super) fn new(class: v1::RequestClass, end: ClassEnd) -> Self {
        Self {
            class: class_name(class),
            outcome: end.name(),
        }
    }
}

/// What a request that ended well took, as far as it is held to it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Took {
    first_token_ms: f64,
    decode_ms: f64,
    output_tokens: u32,
}

impl Took {
    pub(crate) fn of(finished: &v1::Finished) -> Self {
        let timings = finished.timings.as_ref();
        Self {
            first_token_ms: timings.map_or(0.0, |timings| timings.first_token_ms),
            decode_ms: timings.map_or(0.0, |timings| timings.decode_ms),
            output_tokens: finished
                .usage
                .as_ref()
                .map_or(0, |usage| usage.output_tokens),
        }
    }

    /// Whether it kept what it was held to.
    pub(super) fn judged(&self, held: &HeldTo) -> ClassEnd {
        if self.first_token_ms > held.ttft_ms {
            return ClassEnd::LateFirstToken;
        }
        // The mean, as a reader feels it: a gap that the next tokens make up for
        // is no loss. Single gaps have a histogram of their own.
        let gaps = self.output_tokens.saturating_sub(1).max(1);
        match held.itl_ms {
            Some(most) if self.decode_ms / f64::from(gaps) > most => ClassEnd::SlowTokens,
            _ => ClassEnd::Good,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(first_token_ms: f64, decode_ms: f64, output_tokens: u32) -> v1::Finished {
        v1::Finished {
            timings: Some(v1::Timings {
                first_token_ms,
                decode_ms,
                ..v1::Timings::default()
            }),
            usage: Some(v1::Usage {
                output_tokens,
                ..v1::Usage::default()
            }),
            ..v1::Finished::default()
        }
    }

    fn judge(held: &HeldTo, finished: &v1::Finished) -> ClassEnd {
        Took::of(finished).judged(held)
    }

    #[test]
    fn goodput_counts_what_kept_both_targets() {
        let held = HeldTo {
            class: v1::RequestClass::Interactive,
            ttft_ms: 1_000.0,
            itl_ms: Some(50.0),
        };
        assert_eq!(judge(&held, &ended(999.0, 450.0, 10)), ClassEnd::Good);
        assert_eq!(
            judge(&held, &ended(1_001.0, 450.0, 10)),
            ClassEnd::LateFirstToken
        );
        assert_eq!(judge(&held, &ended(10.0, 460.0, 10)), ClassEnd::SlowTokens);
        assert_eq!(judge(&held, &ended(10.0, 0.0, 1)), ClassEnd::Good);
        let patient = HeldTo {
            itl_ms: None,
            ..held
        };
        assert_eq!(judge(&patient, &ended(10.0, 1e6, 10)), ClassEnd::Good);
    }
}
