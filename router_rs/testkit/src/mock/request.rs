//! One stage that a mock worker runs.
//!
//! ```text
//! Place ─▶ Waiting ─▶ Decoding ─▶ end          (whole, decode by an engine)
//!      ╰─▶ Waiting ─▶ end                      (prefill)
//!      ╰─▶ Receiving ─▶ Decoding ─▶ end        (decode by the mesh)
//! ```

use std::{sync::Arc, time::Duration};

use bytes::{BufMut, Bytes, BytesMut};
use kvmesh_wire::v1::{
    FinishReason, MeshHandOff, Place, RefusalReason, RequestClass, Stage, StageEnd, StageFailed,
    StageFinished, StageTimings, TokenLogprobs, TokenRows, TraceSpan, hand_off, stage_end::End,
};
use tokio::time::Instant;

use super::{
    faults::FaultPlan,
    state::{BLOCK_TOKENS, State},
};
use crate::tokens::{PromptSeed, TokenFunction};

/// Tokens of room kept beyond the prompt (PROTOCOLS 2, step 2).
const ROOM_AHEAD: u64 = 64;

/// What a stage is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Its prompt is computed until then.
    Waiting(Instant),
    /// Waits for the sender's commit.
    Receiving,
    /// A token a step.
    Decoding,
}

/// A stage that was accepted. Dropping it gives back all that it holds.
#[derive(Debug)]
pub(super) struct Running {
    pub(super) generation: Bytes,
    pub(super) owner: u32,
    pub(super) attempt: u32,
    pub(super) stage: Stage,
    pub(super) mesh: Option<MeshHandOff>,
    phase: Phase,
    seed: PromptSeed,
    prompt_tokens: u32,
    /// Next output index.
    next: u32,
    max_tokens: u32,
    min_tokens: u32,
    stop_ids: Vec<u32>,
    logprobs: Option<u32>,
    /// Its output, where that was set.
    said: Option<Arc<[u32]>>,
    pub(super) class: RequestClass,
    pub(super) blocks: u64,
    placed: Instant,
    /// Whether spans are wanted.
    trace: bool,
    /// From the request's arrival to the placement, ms.
    waited_ms: f64,
    started: Option<Instant>,
    state: Arc<State>,
}

impl Running {
    /// Accepts a placement, or says why not.
    pub(super) fn accept(
        state: &Arc<State>,
        place: Place,
    ) -> Result<Self, (RefusalReason, String)> {
        let unsupported = |text: &str| (RefusalReason::Unsupported, text.to_owned());
        let stage = Stage::try_from(place.stage).unwrap_or_default();
        let continuation = place
            .continuation
            .ok_or_else(|| unsupported("continuation is missing"))?;
        if stage == Stage::Unspecified {
            return Err(unsupported("stage is missing"));
        }
        if continuation.model != state.config.model {
            return Err(unsupported("another model"));
        }
        if state.config.no_cache_salt && !continuation.cache_salt.is_empty() {
            return Err(unsupported("it has no cache salt"));
        }
        if state.draining.load(std::sync::atomic::Ordering::Relaxed) {
            return Err((RefusalReason::Draining, String::new()));
        }
        let mesh = match place.hand_off.and_then(|hand_off| hand_off.kind) {
            Some(hand_off::Kind::Mesh(mesh)) => Some(mesh),
            Some(hand_off::Kind::Engine(_)) => None,
            None if stage == Stage::Decode => return Err(unsupported("hand-off is missing")),
            None => None,
        };
        let prompt_tokens = continuation.prompt_ids.len() as u32;
        let next = continuation.output_ids.len() as u32;
        let room = u64::from(prompt_tokens) + u64::from(next) + ROOM_AHEAD;
        let blocks = room.div_ceil(BLOCK_TOKENS);
        if blocks > state.room().free {
            return Err((RefusalReason::NoRoom, String::new()));
        }
        let now = Instant::now();
        let delay = state.config.prefill + state.faults.plan().delay_first_token;
        let receives = stage == Stage::Decode && mesh.is_some();
        let phase = if receives {
            Phase::Receiving
        } else {
            Phase::Waiting(now + delay)
        };
        state.counters.placed.add(1);
        state.counters.running.add(1);
        state.counters.held_blocks.add(blocks);
        let running = Self {
            generation: place.generation,
            owner: place.owner,
            attempt: place.attempt,
            stage,
            mesh,
            phase,
            class: continuation.request_class(),
            seed: TokenFunction::seed(&continuation.prompt_ids),
            prompt_tokens,
            next,
            max_tokens: continuation.max_tokens,
            min_tokens: continuation.min_tokens,
            stop_ids: continuation.stop_token_ids,
            logprobs: continuation.logprobs,
            said: state.said(),
            blocks,
            placed: now,
            trace: place.trace,
            waited_ms: continuation.waited_ms,
            started: None,
            state: Arc::clone(state),
        };
        running.enter(1);
        if let (Stage::Prefill, Some(mesh)) = (stage, &running.mesh) {
            state.offers.begin(&mesh.transfer_id);
        }
        Ok(running)
    }

    pub(super) fn phase(&self) -> Phase {
        self.phase
    }

    pub(super) fn context(&self) -> u64 {
        u64::from(self.prompt_tokens) + u64::from(self.next)
    }

    pub(super) fn prompt_tokens(&self) -> u32 {
        self.prompt_tokens
    }

    /// Whether it is not to go on for now.
    pub(super) fn held(&self, plan: &FaultPlan) -> bool {
        plan.hold_at.is_some_and(|at| self.next >= at)
    }

    /// From waiting or receiving to decoding.
    pub(super) fn start(&mut self, now: Instant) {
        self.leave();
        self.phase = Phase::Decoding;
        self.started = Some(now);
        self.enter(self.context());
    }

    /// Produces the next token into `rows`; says whether that ends the stage.
    pub(super) fn advance(&mut self, rows: &mut Rows, plan: &mut FaultPlan) -> Option<End> {
        let index = self.next;
        if plan.fail_at == Some(index) && plan.fail_next > 0 {
            plan.fail_next -= 1;
            self.state.counters.failed.add(1);
            return Some(End::Failed(StageFailed {
                code: plan.fail_code,
                reason: "MOCK_FAILURE".to_owned(),
                message: "asked to fail".to_owned(),
                retryable: plan.fail_code == tonic::Code::Unavailable as u32,
            }));
        }
        if plan.return_at == Some(index) && plan.return_next > 0 {
            plan.return_next -= 1;
            self.state.counters.returned.add(1);
            return Some(End::Returned(kvmesh_wire::v1::Returned {
                reason: RefusalReason::NoRoom as i32,
                message: "asked to give it back".to_owned(),
            }));
        }
        let token = self.token(index);
        self.next += 1;
        self.state.counters.tokens.add(1);
        if self.phase == Phase::Decoding {
            self.state.counters.decode_context.add(1);
        }
        if plan.hole_at != Some(index) {
            rows.push(self, self.attempt, index, token);
        }
        if plan.stale_rows {
            let wrong = self.token(index.wrapping_add(1));
            rows.push(self, self.attempt.saturating_sub(1), index, wrong);
        }
        let stopped = self.next >= self.min_tokens && self.stop_ids.contains(&token);
        let reason = if stopped {
            FinishReason::Stop
        } else if self.next >= self.max_tokens {
            FinishReason::Length
        } else {
            return None;
        };
        self.state.counters.finished.add(1);
        Some(End::Finished(StageFinished {
            reason: reason as i32,
            stop_token_id: stopped.then_some(token),
        }))
    }

    fn token(&self, index: u32) -> u32 {
        if let Some(id) = self.said.as_ref().and_then(|said| said.get(index as usize)) {
            return *id;
        }
        let ends = self.said.is_some() || self.state.config.end_of_text_at == Some(index);
        let end = self.state.tokens.vocabulary().end_of_text_ids().first();
        match end {
            Some(end) if ends => *end,
            _ => self.state.tokens.at(self.seed, index),
        }
    }

    /// The end of this stage, as it is told to the router.
    pub(super) fn end(&self, end: End) -> StageEnd {
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        let receives = self.stage == Stage::Decode;
        let computed = if receives { 0 } else { self.prompt_tokens };
        let prefilled = self.started.map_or(Duration::ZERO, |at| at - self.placed);
        StageEnd {
            generation: self.generation.clone(),
            owner: self.owner,
            attempt: self.attempt,
            stage: self.stage as i32,
            timings: Some(StageTimings {
                prefill_ms: if receives { 0.0 } else { ms(prefilled) },
                transfer_ms: if receives { ms(prefilled) } else { 0.0 },
                computed_tokens: computed,
                trace: if self.trace { self.spans() } else { Vec::new() },
                ..Default::default()
            }),
            end: Some(end),
        }
    }

    /// What it did, as an engine would tell it.
    fn spans(&self) -> Vec<TraceSpan> {
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        let now = Instant::now();
        let span = |name: &str, from: Instant, to: Instant, tokens| TraceSpan {
            name: name.to_owned(),
            start_ms: self.waited_ms + ms(from - self.placed),
            duration_ms: ms(to - from),
            tokens,
            ..TraceSpan::default()
        };
        let first = match self.stage {
            Stage::Decode => "transfer",
            Stage::Unspecified | Stage::Whole | Stage::Prefill => "prefill_chunk",
        };
        let started = self.started.unwrap_or(now);
        let first = span(first, self.placed, started, self.prompt_tokens);
        let decodes = self.started.filter(|_| self.stage != Stage::Prefill);
        let decode = decodes.map(|from| span("decode", from, now, self.next));
        [first].into_iter().chain(decode).collect()
    }

    fn enter(&self, context: u64) {
        let counters = &self.state.counters;
        match self.phase {
            Phase::Waiting(_) => {
                counters.queued.add(1);
                counters.queued_tokens.add(u64::from(self.prompt_tokens));
            }
            Phase::Receiving => {
                counters.receiving.add(1);
            }
            Phase::Decoding => {
                counters.decoding.add(1);
                counters.decode_context.add(context);
            }
        }
    }

    fn leave(&self) {
        let counters = &self.state.counters;
        match self.phase {
            Phase::Waiting(_) => {
                counters.queued.sub(1);
                counters.queued_tokens.sub(u64::from(self.prompt_tokens));
            }
            Phase::Receiving => counters.receiving.sub(1),
            Phase::Decoding => {
                counters.decoding.sub(1);
                counters.decode_context.sub(self.context());
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.leave();
        self.state.counters.running.sub(1);
        self.state.counters.held_blocks.sub(self.blocks);
        if let (Stage::Prefill, Some(mesh)) = (self.stage, &self.mesh) {
            // Nothing happens to a transfer that was committed before.
            self.state.offers.abort_if_open(&mesh.transfer_id);
        }
    }
}

/// Columns of a step under construction.
#[derive(Debug, Default)]
pub(super) struct Rows {
    generations: BytesMut,
    columns: TokenRows,
}

impl Rows {
    pub(super) fn len(&self) -> usize {
        self.columns.counts.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.columns.counts.is_empty()
    }

    fn push(&mut self, request: &Running, attempt: u32, index: u32, token: u32) {
        let row = self.len() as u32;
        self.generations.put_slice(&request.generation);
        self.columns.owners.push(request.owner);
        self.columns.attempts.push(attempt);
        self.columns.first_indices.push(index);
        self.columns.counts.push(1);
        self.columns.ids.push(token);
        if let Some(alternatives) = request.logprobs {
            self.columns.logprobs.push(kvmesh_wire::v1::RowLogprobs {
                row,
                tokens: vec![TokenLogprobs {
                    logprob: -0.5,
                    top_ids: (0..alternatives).map(|n| token.wrapping_add(n)).collect(),
                    top_logprobs: (0..alternatives).map(|n| -0.5 - n as f32).collect(),
                }],
            });
        }
    }

    /// Takes the columns out; the next step begins empty, with their sizes as
    /// a guess.
    pub(super) fn take(&mut self) -> TokenRows {
        let rows = self.len();
        let mut columns = std::mem::replace(
            &mut self.columns,
            TokenRows {
                owners: Vec::with_capacity(rows),
                attempts: Vec::with_capacity(rows),
                first_indices: Vec::with_capacity(rows),
                counts: Vec::with_capacity(rows),
                ids: Vec::with_capacity(rows),
                ..Default::default()
            },
        );
        columns.generations = self.generations.split().freeze();
        columns
    }
}
