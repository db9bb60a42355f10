//! Where the time of one generation went, and what was counted.

use std::time::{Duration, Instant};

use kvmesh_session::{Stage, WorkerIndex};
use kvmesh_wire::v1;
use smallvec::SmallVec;

use crate::request::AdmittedRequest;

/// Marks of one generation. Instants are for figures only: no decision is
/// taken by them.
#[derive(Default)]
pub(super) struct Figures {
    dispatched: Option<Instant>,
    handed_off: Option<Instant>,
    after_hand_off: Option<Instant>,
    /// Worker that the attempt in force decodes on.
    decode: Option<WorkerIndex>,
    first_arrival: Option<Instant>,
    first_taken: Option<Instant>,
    last_taken: Option<Instant>,
    longest_gap: Gap,
    last_arrival: Option<Instant>,
    /// Longest wait for tokens from workers since the client last took some.
    waited_for: Duration,
    /// Attempt that was in force when the client last took tokens.
    taken_attempt: u32,
    placed_attempt: u32,
    ended: Option<Instant>,
    decide: Duration,
    /// Sums over the parts of the attempt that the output came from.
    sums: Sums,
    recomputed: u32,
    attempt: u32,
    /// Attempts that went on with the KV of another, and that one's number.
    carried: SmallVec<[(u32, u32); 2]>,
    /// What was planned of the first attempt's prompt.
    expected: Expected,
    spans: Vec<v1::TraceSpan>,
    /// Of the attempt that brings the first token, or may.
    predicted: Option<Predicted>,
}

/// The longest time between two messages with tokens.
#[derive(Clone, Copy, Default)]
struct Gap {
    began: Option<Instant>,
    length: Duration,
    cause: Cause,
}

/// Why a gap was so long, as the router sees it.
#[derive(Clone, Copy, Default)]
enum Cause {
    /// A step took as long as it took.
    #[default]
    Step,
    /// KV went to the decode worker.
    HandOff,
    /// KV was at the decode worker, which ran a step without it.
    DecodeWait,
    /// The attempt before had failed.
    NewAttempt,
    /// The stream went to another worker with its KV.
    HandOver,
    /// Tokens were there; the client took none.
    Client,
}

impl Cause {
    fn text(self) -> &'static str {
        match self {
            Self::Step => "a step of the worker",
            Self::HandOff => "the hand-off to the decode worker",
            Self::DecodeWait => "the step that ran when its KV came",
            Self::NewAttempt => "a new attempt",
            Self::HandOver => "the hand-over to another worker",
            Self::Client => "the client took nothing",
        }
    }
}

/// What a decision said of a first token.
#[derive(Clone, Copy)]
struct Predicted {
    attempt: u32,
    /// When it was made.
    at: Instant,
    times: v1::PhaseTimes,
}

/// Prompt tokens, by the estimate.
#[derive(Clone, Copy, Default)]
struct Expected {
    cached: u32,
    pulled: u32,
    computed: u32,
}

#[derive(Default)]
struct Sums {
    worker_queue_ms: f64,
    prefill_ms: f64,
    transfer_ms: f64,
    /// Of the hand-off from prefill, as the decode worker measured them; `None` where it
    /// does not tell.
    tail_ms: Option<f64>,
    decode_wait_ms: Option<f64>,
    transferred_bytes: u64,
    cached: u32,
    pulled: u32,
    computed: u32,
}

impl Figures {
    /// An attempt was placed.
    pub(super) fn dispatched(
        &mut self,
        now: Instant,
        decide: Duration,
        attempt: u32,
        times: v1::PhaseTimes,
    ) {
        self.dispatched.get_or_insert(now);
        self.placed_attempt = attempt;
        if self.first_arrival.is_none() {
            let at = now.checked_sub(decide).unwrap_or(now);
            self.predicted = Some(Predicted { attempt, at, times });
        }
        self.decide += decide;
        self.handed_off = None;
        self.after_hand_off = None;
    }

    /// The attempt in force decodes there.
    pub(super) fn decodes_on(&mut self, worker: WorkerIndex) {
        self.decode = Some(worker);
    }

    /// The stream went on under another attempt with all that it had: nothing of it is
    /// computed again.
    pub(super) fn handed_over(&mut self, from: u32, to: u32) {
        let first = self.counted_as(from);
        self.carried.push((to, first));
        self.placed_attempt = to;
    }

    /// The attempt that computed what this one went on with.
    fn counted_as(&self, attempt: u32) -> u32 {
        let carried = self.carried.iter().find(|(to, _)| *to == attempt);
        carried.map_or(attempt, |(_, first)| *first)
    }

    /// Worker that the attempt in force decodes on.
    pub(super) fn decode(&self) -> Option<WorkerIndex> {
        self.decode
    }

    /// Prefill said that it handed off.
    pub(super) fn handed_off(&mut self, now: Instant) {
        self.handed_off = Some(now);
    }

    /// Tokens came from a worker.
    pub(super) fn tokens_arrived(&mut self, now: Instant) {
        self.first_arrival.get_or_insert(now);
        if let Some(last) = self.last_arrival.replace(now) {
            let waited = now.saturating_duration_since(last);
            self.waited_for = self.waited_for.max(waited);
        }
        if self.handed_off.is_some() {
            self.after_hand_off.get_or_insert(now);
        }
    }

    /// When the last token came from a worker.
    pub(super) fn last_arrival(&self) -> Option<Instant> {
        self.last_arrival
    }

    /// What the first attempt has to do for its prompt: told where its worker could
    /// not tell, or did not in time.
    pub(super) fn expects(&mut self, prompt: u32, cached: u32, pulled: u32) {
        if self.dispatched.is_none() {
            self.expected = Expected {
                cached,
                pulled,
                computed: prompt.saturating_sub(cached.saturating_add(pulled)),
            };
        }
    }

    /// Tokens went to the client's stream.
    pub(super) fn tokens_taken(&mut self, now: Instant) {
        if let Some(last) = self.last_taken {
            let length = now.saturating_duration_since(last);
            if length > self.longest_gap.length {
                let cause = self.cause(last, length);
                self.longest_gap = Gap {
                    began: Some(last),
                    length,
                    cause,
                };
            }
        }
        self.waited_for = Duration::ZERO;
        self.taken_attempt = self.placed_attempt;
        self.first_taken.get_or_insert(now);
        self.last_taken = Some(now);
    }

    /// Why nothing was taken for so long since `last`.
    fn cause(&self, last: Instant, length: Duration) -> Cause {
        // Most of the gap has to be it.
        if self.waited_for * 2 < length {
            Cause::Client
        } else if self.taken_attempt != self.placed_attempt {
            match self.counted_as(self.placed_attempt) == self.placed_attempt {
                true => Cause::NewAttempt,
                false => Cause::HandOver,
            }
        } else if self.first_taken == Some(last) && self.hands_off_the_first() {
            Cause::HandOff
        } else {
            Cause::Step
        }
    }

    /// Whether the first token was there when prefill handed off: else it came after.
    fn hands_off_the_first(&self) -> bool {
        self.handed_off.is_some() && self.first_arrival <= self.handed_off
    }

    /// The machine ended.
    pub(super) fn ended(&mut self, now: Instant) {
        self.ended.get_or_insert(now);
    }

    /// A worker told what a stage took. What an earlier attempt computed and a
    /// later one computes again is counted apart.
    pub(super) fn stage_ended(&mut self, stage: Stage, attempt: u32, told: &v1::StageTimings) {
        let counted = self.counted_as(attempt);
        if counted != self.attempt {
            self.recomputed = self.recomputed.saturating_add(self.sums.computed);
            self.sums = Sums::default();
            self.attempt = counted;
        }
        let sums = &mut self.sums;
        sums.transfer_ms += told.transfer_ms;
        sums.transferred_bytes += told.transferred_bytes;
        sums.pulled = sums.pulled.saturating_add(told.pulled_tokens);
        // A hand-over from one decode worker to another is none from prefill.
        if stage == Stage::Decode && counted == attempt {
            sums.tail_ms = told.transfer_tail_ms;
            sums.decode_wait_ms = told.decode_wait_ms;
        }
        // Of two parts the one that ran the prompt says how it was run; what
        // decode held already is not computed less by prefill.
        if stage != Stage::Decode {
            sums.worker_queue_ms += told.queue_ms;
            sums.prefill_ms += told.prefill_ms;
            sums.cached = told.cached_tokens;
            sums.computed = told.computed_tokens;
        }
        self.spans
            .extend(told.trace.iter().map(|span| v1::TraceSpan {
                attempt,
                ..span.clone()
            }));
    }

    /// What the client is told of counts.
    pub(super) fn usage(&self, prompt: u32, output: u32, attempts: u32) -> v1::Usage {
        // A worker that died told nothing: what its successors computed is
        // computed again.
        let (sums, expected) = (&self.sums, &self.expected);
        let (mut cached, mut pulled) = (sums.cached, sums.pulled);
        let (computed, recomputed) = match self.attempt {
            // Nobody told: its prompt was run, or there would be no token.
            0 if attempts == 1 && self.first_arrival.is_some() => {
                (cached, pulled) = (expected.cached, expected.pulled);
                (expected.computed, 0)
            }
            0 | 1 => (sums.computed, self.recomputed),
            _ if self.recomputed > 0 => (sums.computed, self.recomputed),
            _ => (expected.computed, sums.computed),
        };
        v1::Usage {
            prompt_tokens: prompt,
            output_tokens: output,
            cached_tokens: cached,
            pulled_tokens: pulled,
            computed_tokens: computed,
            recomputed_tokens: recomputed,
            attempts,
        }
    }

    /// What the client is told of times.
    pub(super) fn timings(&self, request: &AdmittedRequest) -> v1::Timings {
        let since = |mark: Option<Instant>, from: Instant| {
            mark.map_or(0.0, |mark| ms(mark.saturating_duration_since(from)))
        };
        let decide_ms = ms(self.decide);
        // One that no worker took up waited until its end.
        let waited = since(self.dispatched.or(self.ended), request.arrived);
        let gap = &self.longest_gap;
        v1::Timings {
            queue_ms: (waited - request.tokenize_ms - decide_ms).max(0.0),
            tokenize_ms: request.tokenize_ms,
            decide_ms,
            worker_queue_ms: self.sums.worker_queue_ms,
            prefill_ms: self.sums.prefill_ms,
            transfer_ms: self.sums.transfer_ms,
            transfer_tail_ms: self.tail_ms().min(self.sums.transfer_ms),
            first_token_ms: since(self.first_taken, request.arrived),
            decode_ms: match self.first_taken {
                Some(first) => since(self.last_taken, first),
                None => 0.0,
            },
            total_ms: since(Some(Instant::now()), request.arrived),
            longest_gap_ms: ms(gap.length),
            transferred_bytes: self.sums.transferred_bytes,
            longest_gap_start_ms: since(gap.began, request.arrived),
            longest_gap_cause: self.gap_cause(request),
        }
    }

    /// From the end of prefill to the first token that came after it.
    pub(super) fn tail(&self) -> Option<Duration> {
        let from = self.handed_off?;
        Some(self.after_hand_off?.saturating_duration_since(from))
    }

    /// What of the hand-off's transfer came after the end of prefill, ms. Where its worker
    /// does not tell: until the next token, a step and what that waited for included.
    fn tail_ms(&self) -> f64 {
        let seen = || self.tail().map_or(0.0, ms);
        self.sums.tail_ms.unwrap_or_else(seen).max(0.0)
    }

    /// Of the attempt that brought the first token: its number, what was
    /// predicted and what was measured. `None` where its end was not seen.
    pub(super) fn prediction(&self) -> Option<(u32, v1::PhaseTimes, v1::PhaseTimes)> {
        let predicted = self.predicted.filter(|one| one.attempt == self.attempt)?;
        let actual = v1::PhaseTimes {
            wait_ms: self.sums.worker_queue_ms,
            prefill_ms: self.sums.prefill_ms,
            transfer_ms: self.tail_ms(),
            ttft_ms: ms(self.first_taken?.saturating_duration_since(predicted.at)),
        };
        Some((predicted.attempt, predicted.times, actual))
    }

    /// The cause of the longest gap; empty where there is none: the worker's own word, where it told of a
    /// gap that this one was.
    fn gap_cause(&self, request: &AdmittedRequest) -> String {
        let gap = &self.longest_gap;
        let Some(began) = gap.began else {
            return String::new();
        };
        let length_ms = ms(gap.length);
        let cause = match gap.cause {
            // Less than half of it.
            Cause::HandOff if self.sums.tail_ms.is_some() && self.tail_ms() * 2.0 < length_ms => {
                match self.sums.decode_wait_ms {
                    Some(wait_ms) if wait_ms * 2.0 >= length_ms => Cause::DecodeWait,
                    _ => Cause::Step,
                }
            }
            cause => cause,
        };
        if !matches!(cause, Cause::Step | Cause::DecodeWait) {
            return cause.text().to_owned();
        }
        let start_ms = ms(began.saturating_duration_since(request.arrived));
        let end_ms = start_ms + length_ms;
        let told = self.spans.iter().find(|span| {
            let end = span.start_ms + span.duration_ms;
            let common = end.min(end_ms) - span.start_ms.max(start_ms);
            matches!(&*span.name, "gap" | "decode_wait") && common * 2.0 > length_ms
        });
        match told {
            Some(span) if span.tokens > 0 => format!("{} ({} tokens)", span.cause, span.tokens),
            Some(span) => span.cause.clone(),
            None => cause.text().to_owned(),
        }
    }

    /// Whether its workers told any.
    pub(super) fn has_spans(&self) -> bool {
        !self.spans.is_empty()
    }

    /// What the generation waited for: here, and as its workers told.
    pub(super) fn trace(&self, request: &AdmittedRequest) -> Vec<v1::TraceSpan> {
        let timings = self.timings(request);
        let span = |name: &str, start_ms: f64, duration_ms: f64| v1::TraceSpan {
            name: name.to_owned(),
            start_ms,
            duration_ms,
            ..v1::TraceSpan::default()
        };
        let queued = timings.tokenize_ms + timings.queue_ms;
        let mut all = vec![
            span("tokenize", 0.0, timings.tokenize_ms),
            span("queue", timings.tokenize_ms, timings.queue_ms),
            span("decide", queued, timings.decide_ms),
        ];
        all.extend(self.spans.iter().cloned());
        all.sort_by(|one, other| one.start_ms.total_cmp(&other.start_ms));
        all
    }
}

/// A duration in milliseconds.
pub(super) fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

#[cfg(test)]
#[path = "figures_tests.rs"]
mod tests;
