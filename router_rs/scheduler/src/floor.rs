//! What a worker costs at least, from few numbers: most of them are ruled out
//! without counting their terms.
//!
//! Each row is a term of the cost with what is dear or small left out: whole
//! steps, what passes an ITL target, a pool that runs full, waiting for a
//! place. There is no division per worker but for a pull. A floor is never
//! over the cost, so the choice stays the same; a property test holds each to
//! that.

use crate::facts::Facts;
use crate::terms::queued::{Group, Line};
use crate::terms::{Asked, People};
use crate::transfer::{Path, TransferRate};

/// Sums in another order differ by rounding: a floor keeps so far below, by
/// share and in ms.
const BELOW: f64 = 1e-9;

/// What a floor is made of: the worker's part.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Floor {
    pub(crate) slot: u32,
    /// As in [`Facts`].
    pub(crate) kind: u32,
    pub(crate) host: u32,
    pub(crate) prefix_pull: bool,
    /// When the running step should end, and the most that is waited for it, ms.
    step_ends_ms: f64,
    step_most_ms: f64,
    /// Other routers' prompts by class, and own ones ...
    others: [Group; 3],
    own: Group,
    /// ... between which virtual deadlines.
    first_ms: f64,
    last_ms: f64,
    /// ms a prompt token, and a (token x context token).
    token_ms: f64,
    context_ms: f64,
    /// What a step takes beside its prompt: by the token, and by the ms of
    /// prompt where a budget bounds it.
    step_by_token: f64,
    step_by_ms: f64,
    /// Steps by the token, and by the ms of prompt.
    per_chunk: f64,
    per_budget: f64,
    /// Streams by the weight of a stretched step, and those times the steps for
    /// which another stream slows each.
    streams: f64,
    streams_level: f64,
    /// One over the least that any has left, and over a step of theirs.
    per_left: f64,
    per_step: f64,
    /// What another stream adds to a step, ms: constant, and by its context.
    joins_ms: f64,
    joins_context_ms: f64,
    /// What company adds to its own steps, ms.
    company_ms: f64,
    /// A chunk beside it, ms: constant, by its context, at most.
    chunk_ms: f64,
    chunk_context_ms: f64,
    chunk_most_ms: f64,
    /// KV that is sent after the last chunk: at most so many tokens; bytes
    /// each.
    pub(crate) late_tokens: f64,
    pub(crate) token_bytes: f64,
}

impl Floor {
    pub(crate) fn of(facts: &Facts) -> Self {
        let (line, step) = (&facts.line, &facts.step);
        let besides = step.a_ms + facts.company_ms;
        let streaming = |streams: &&crate::facts::Streams| {
            facts.batch > 0.0 && streams.weight > 0.0 && streams.left > 0.0
        };
        let streams = || facts.streams.iter().filter(streaming);
        let least_left = streams().map(|one| one.left).fold(f64::INFINITY, f64::min);
        Self {
            slot: facts.slot,
            kind: facts.kind,
            host: facts.host,
            prefix_pull: facts.prefix_pull,
            step_ends_ms: facts.step_ends_ms,
            step_most_ms: if facts.layers {
                facts.step_ms
            } else {
                f64::INFINITY
            },
            others: line.others,
            own: line.own,
            first_ms: line.first_ms,
            last_ms: line.last_ms,
            token_ms: step.b_ms,
            context_ms: step.c_ms,
            step_by_token: facts.per_chunk * besides,
            step_by_ms: facts.per_budget * besides,
            per_chunk: facts.per_chunk,
            per_budget: facts.per_budget,
            streams: streams().map(|one| one.weight).sum(),
            streams_level: streams().map(|one| one.weight * one.left).sum::<f64>()
                / (1.0 + facts.batch),
            per_left: least_left.recip(),
            per_step: facts.step_ms.max(1e-6).recip(),
            joins_ms: step.d_ms,
            joins_context_ms: step.e_ms,
            company_ms: facts.company_ms.max(0.0),
            chunk_ms: step.b_ms * facts.chunk,
            chunk_context_ms: step.c_ms * facts.chunk / 2.0,
            chunk_most_ms: facts.per_budget.recip(),
            late_tokens: if facts.streamed {
                facts.chunk
            } else {
                f64::INFINITY
            },
            token_bytes: facts.token_bytes,
        }
    }

    /// Those that wait there, as far as it is known at once who is first; and
    /// the most ms of work that may be before it.
    pub(crate) fn line(&self, asked: &Asked) -> (Line, f64) {
        let mut line = Line::default();
        let deadline = asked.virtual_deadline_ms;
        for group in &self.others {
            let first = asked.now_ms + group.ahead_of_ms <= deadline;
            line.add_or(first, group);
        }
        let all_first = self.last_ms <= deadline;
        if all_first || deadline < self.first_ms {
            line.add_or(all_first, &self.own);
            return (line, line.ahead_ms);
        }
        (line, line.ahead_ms + self.own.work_ms)
    }

    /// Computing the prompt where so many tokens of it are there or pulled.
    pub(crate) fn prompt(
        &self,
        asked: &Asked,
        people: &People,
        (line, most_ahead_ms): &(Line, f64),
        there: f64,
        pull_ms: f64,
    ) -> f64 {
        let tokens = (asked.sequence - there).max(1.0);
        let tokens_ms = self.token_ms * tokens + self.context_ms * asked.context_after(there);
        let besides_ms = (self.step_by_token * tokens).max(self.step_by_ms * tokens_ms);
        let prefill_ms = tokens_ms + besides_ms;
        // exp(-x) >= 1 - x: those of its steps for which streams are there.
        let steps = (self.per_chunk * tokens).max(self.per_budget * tokens_ms) + 1.0;
        let gone = (most_ahead_ms * self.per_step + steps) * self.per_left;
        let held_up = self.streams * tokens_ms * (1.0 - gone).max(0.0);
        let weight = people.weights.ttft[asked.class];
        let running_ms = (self.step_ends_ms - asked.now_ms).max(0.0);
        let running_ms = running_ms.min(self.step_most_ms);
        weight * (running_ms + line.ahead_ms + pull_ms + prefill_ms)
            + line.behind * prefill_ms
            + people.stretch * held_up
    }

    /// Producing the output; `chunks_ms`: prompts computed there beside it.
    pub(crate) fn output(&self, asked: &Asked, people: &People, chunks_ms: f64) -> f64 {
        let longer_ms = self.joins_ms + self.joins_context_ms * asked.sequence;
        let chunk_ms = self.chunk_ms + self.chunk_context_ms * asked.sequence;
        let chunk_ms = chunk_ms.min(self.chunk_most_ms);
        let beside_ms = if chunk_ms > 1e-6 {
            chunks_ms.min(asked.left * chunk_ms)
        } else {
            0.0
        };
        let own_ms = asked.left * self.company_ms + beside_ms;
        people.stretch * (people.weights.itl[asked.class] * own_ms + self.streams_level * longer_ms)
    }

    /// The gap that a transfer leaves, by the quickest path.
    pub(crate) fn gap(&self, asked: &Asked, people: &People, missing: f64) -> f64 {
        const QUICKEST: TransferRate = Path::SharedMemory.prior();
        let bytes = missing.min(self.late_tokens).max(0.0) * self.token_bytes;
        let gap_ms = QUICKEST.fixed_ms + bytes * (1.0 / QUICKEST.bytes_per_ms);
        people.stretch * people.weights.itl[asked.class] * gap_ms
    }
}

/// A little less, for rounding.
pub(crate) fn below(floor: f64) -> f64 {
    floor * (1.0 - BELOW) - BELOW
}
