//! The engine that is simulated: what really happens on a worker.
//!
//! A step computes chunks of prompts and one token of every stream; prompts
//! go by their virtual deadlines, get all their KV room or none, and lose it
//! again to what is more urgent (the rules of the engines that ship, DESIGN 4
//! and SCHEDULING 4). Its times come from coefficients that no scheduler
//! sees. It draws no noise itself: how long a step takes is its user's to say.

mod chunks;
mod load;
mod pool;
mod prompts;
mod room;
mod sequence;
mod streams;

pub(crate) use load::EngineLoad;
pub(crate) use pool::Pool;
pub(crate) use sequence::{EngineSettings, Outcome, Sequence, Stage};
pub(crate) use streams::class_number;

use crate::trace::Trace;
use chunks::Budget;
use kvmesh_scheduler::{Role, StepModel, StepSample};
use prompts::Prompts;
use std::collections::BTreeMap;
use streams::Streams;

/// Tokens that decoding reserves beyond the prompt.
pub(crate) const HEADROOM: u32 = 64;

#[derive(Debug, Clone, Default)]
struct Step {
    /// (request, tokens).
    chunks: Vec<(u32, u32)>,
}

/// One worker's engine.
#[derive(Debug, Clone)]
pub(crate) struct Engine {
    settings: EngineSettings,
    /// Role in force.
    pub role: Role,
    pool: Pool,
    prompts: Prompts,
    streams: Streams,
    /// Prompts whose KV is being handed on.
    outgoing: BTreeMap<u32, Sequence>,
    /// Requests whose KV is on its way here.
    incoming: BTreeMap<u32, Sequence>,
    step: Option<Step>,
}

impl Engine {
    /// An empty one.
    pub(crate) fn new(settings: EngineSettings, role: Role) -> Self {
        Self {
            pool: Pool::new(settings.pool_units, u64::from(settings.block_tokens / 16)),
            role,
            prompts: Prompts::default(),
            streams: Streams::new(settings.routers),
            outgoing: BTreeMap::new(),
            incoming: BTreeMap::new(),
            step: None,
            settings,
        }
    }

    /// Its KV pool.
    pub(crate) fn pool(&self) -> &Pool {
        &self.pool
    }

    /// Blocks that came into the cache and blocks that went since the last
    /// call, in order of their events.
    pub(crate) fn take_cache_events(&mut self) -> Vec<(bool, u64)> {
        self.pool.take_events()
    }

    /// Its true mean step times.
    pub(crate) fn truth(&self) -> StepModel {
        self.settings.truth
    }

    /// Output tokens that its streams have left, on average by class: those that
    /// decode here and those whose KV is on its way. 0 where there are none.
    pub(crate) fn mean_left(&self) -> [f64; 3] {
        let mut sums = [(0.0, 0.0); 3];
        let coming = self.incoming.values();
        let all = coming.map(|sequence| (sequence.class, sequence.left));
        for (class, left) in all.chain(self.streams.left_by_class()) {
            let (count, sum) = &mut sums[class_number(class)];
            *count += 1.0;
            *sum += f64::from(left);
        }
        sums.map(|(count, sum)| if count > 0.0 { sum / count } else { 0.0 })
    }

    /// Whether a step runs.
    pub(crate) fn running(&self) -> bool {
        self.step.is_some()
    }

    /// Takes a prompt in.
    pub(crate) fn submit(&mut self, sequence: Sequence) {
        self.prompts.add(sequence);
    }

    /// Takes a prompt in that waits for a prefix from another worker.
    pub(crate) fn submit_fetching(&mut self, mut sequence: Sequence) {
        sequence.fetching = true;
        self.prompts.add(sequence);
    }

    /// The prefix for a prompt is here: these blocks can be used, as far as
    /// there is room.
    pub(crate) fn fetched(&mut self, request: u32, blocks: &[u64]) {
        self.pool.adopt(blocks);
        if let Some(sequence) = self.prompts.get_mut(request) {
            sequence.fetching = false;
        }
    }

    /// Reserves room for a request whose KV will come. Tells what is here of
    /// it already, in tokens; `None`: no room.
    pub(crate) fn reserve(&mut self, mut sequence: Sequence, blocks: &[u64]) -> Option<u32> {
        let held = self.pool.find(blocks);
        let total = units(sequence.length + HEADROOM.min(sequence.left));
        self.pool.take(&blocks[..held]);
        let own = total.saturating_sub(held as u64 * self.pool.block_units());
        if !self.pool.allocate(own) {
            self.pool.release(&blocks[..held]);
            return None;
        }
        sequence.held = held as u32;
        sequence.own_units = own;
        sequence.computed = held as u32 * self.settings.block_tokens;
        let there = sequence.computed;
        self.incoming.insert(sequence.request, sequence);
        Some(there)
    }

    /// The KV of a request is all here, and its first token was made
    /// elsewhere: it decodes from the next step on.
    pub(crate) fn arrived(&mut self, request: u32, left: u32, last_ms: f64, trace: &Trace) {
        let Some(mut sequence) = self.incoming.remove(&request) else {
            return;
        };
        sequence.left = left;
        sequence.last_ms = last_ms;
        sequence.computed = sequence.length;
        self.store(&mut sequence, trace);
        self.join(sequence);
    }

    /// The KV of a request has left: its blocks stay as cache.
    pub(crate) fn handed_over(&mut self, request: u32, trace: &Trace) {
        if let Some(sequence) = self.outgoing.remove(&request) {
            self.drop_room(&sequence, trace);
        }
    }

    /// A request that is not wanted here any more.
    pub(crate) fn cancel(&mut self, request: u32, trace: &Trace) {
        if let Some(step) = &mut self.step {
            // It may come again before the step has ended.
            step.chunks.retain(|(other, _)| *other != request);
        }
        let gone = [
            self.prompts.remove(request),
            self.outgoing.remove(&request),
            self.incoming.remove(&request),
        ];
        for sequence in gone.into_iter().flatten() {
            self.drop_room(&sequence, trace);
        }
    }

    /// Everything here is lost; gives the requests with the tokens that are
    /// still to come of each.
    pub(crate) fn lose_all(&mut self) -> Vec<(u32, u32)> {
        let waiting = self.prompts.iter();
        let held = waiting
            .chain(self.incoming.values())
            .chain(self.outgoing.values());
        let mut lost: Vec<(u32, u32)> = held
            .map(|sequence| (sequence.request, sequence.left))
            .collect();
        lost.extend(self.streams.all());
        lost.sort_unstable();
        *self = Self::new(self.settings.clone(), self.role);
        lost
    }

    /// Prompts that have no first token yet.
    pub(crate) fn waiting(&self) -> usize {
        self.prompts.len()
    }

    /// Begins a step, if there is something to do; gives what it holds, with
    /// its mean duration.
    pub(crate) fn begin_step(
        &mut self,
        trace: &Trace,
        out: &mut Vec<Outcome>,
    ) -> Option<StepSample> {
        debug_assert!(self.step.is_none(), "one step at a time");
        let truth = self.settings.truth;
        let (batch, context) = (self.streams.batch(), self.streams.context());
        let decode_ms = truth.decode_ms(batch, context);
        let mut budget = Budget::new(
            &self.settings,
            batch,
            decode_ms,
            self.streams.strictest_itl(&self.settings.itl_ms),
        );
        let chunks = self.chunks(&mut budget, trace, out);
        if chunks.is_empty() && batch == 0 {
            return None;
        }
        let mut sample = StepSample {
            decode_batch: batch,
            decode_context: context,
            ..StepSample::default()
        };
        for (request, tokens) in &chunks {
            if let Some(sequence) = self.prompts.get_mut(*request) {
                let (start, tokens) = (u64::from(sequence.computed), u64::from(*tokens));
                sample.prefill_tokens += tokens;
                sample.prefill_context += tokens * start + tokens * (tokens + 1) / 2;
            }
        }
        sample.duration_ms = truth.step_ms(
            sample.prefill_tokens,
            sample.prefill_context,
            batch,
            context,
        );
        self.step = Some(Step { chunks });
        Some(sample)
    }

    /// Prompts in order: who may start gets its room, who has room a chunk.
    fn chunks(
        &mut self,
        budget: &mut Budget,
        trace: &Trace,
        out: &mut Vec<Outcome>,
    ) -> Vec<(u32, u32)> {
        let mut chunks: Vec<(u32, u32)> = Vec::new();
        let mut may_start = true;
        let mut at = 0;
        while at < self.prompts.len() {
            if !chunks.is_empty() && budget.spent() {
                break;
            }
            let sequence = self.prompts.at(at);
            let (request, ready) = (sequence.request, !sequence.fetching);
            if ready && !sequence.started && may_start {
                // One that cannot have its room yet is not overtaken by one
                // that takes the room away.
                may_start = self.start(at, trace, out);
            }
            let sequence = self.prompts.at(at);
            if ready && sequence.started {
                let tokens = budget.take(sequence, chunks.is_empty());
                if tokens > 0 {
                    chunks.push((request, tokens));
                }
            } else if !may_start && self.prompts.started() == chunks.len() {
                break;
            }
            if chunks.len() as u32 + self.streams.batch() >= self.settings.max_batch {
                break;
            }
            at += 1;
        }
        chunks
    }

    /// Gives a prompt all the room that it needs, what is cached first.
    fn start(&mut self, at: usize, trace: &Trace, out: &mut Vec<Outcome>) -> bool {
        let sequence = self.prompts.at(at);
        let blocks = trace.blocks(sequence.request as usize);
        // The last token is always computed: its logits are wanted.
        let most = (sequence.length.saturating_sub(1) / self.settings.block_tokens) as usize;
        let blocks = &blocks[..most.min(blocks.len())];
        let held = self.pool.find(blocks);
        let margin = match sequence.stage {
            Stage::Whole => HEADROOM.min(sequence.left),
            Stage::Prefill => 0,
        };
        let own = units(sequence.length + margin) - held as u64 * self.pool.block_units();
        self.pool.take(&blocks[..held]);
        if !(self.make_room(own, at, trace) && self.pool.allocate(own)) {
            self.pool.release(&blocks[..held]);
            return false;
        }
        let block_tokens = self.settings.block_tokens;
        let sequence = self.prompts.start(at);
        sequence.held = held as u32;
        sequence.own_units = own;
        sequence.computed = held as u32 * block_tokens;
        sequence.cached = sequence.computed;
        out.push(Outcome::Started {
            request: sequence.request,
            cached: sequence.cached,
        });
        true
    }

    /// Ends the step that runs.
    pub(crate) fn end_step(&mut self, now_ms: f64, trace: &Trace, out: &mut Vec<Outcome>) {
        let Some(step) = self.step.take() else {
            return;
        };
        self.decode(now_ms, trace, out);
        for (request, tokens) in step.chunks {
            // Cancelled meanwhile, or without room.
            let Some(sequence) = self.prompts.get_mut(request) else {
                continue;
            };
            if !sequence.started {
                continue;
            }
            sequence.computed += tokens;
            let (stage, whole) = (sequence.stage, sequence.computed >= sequence.length);
            let mut sequence = match self.prompts.remove(request) {
                Some(sequence) => sequence,
                None => continue,
            };
            self.store(&mut sequence, trace);
            if stage == Stage::Prefill {
                out.push(Outcome::Chunk { request, tokens });
            }
            if whole {
                self.first_token(sequence, now_ms, trace, out);
            } else {
                self.prompts.add(sequence);
            }
        }
    }

    fn first_token(
        &mut self,
        mut sequence: Sequence,
        now_ms: f64,
        trace: &Trace,
        out: &mut Vec<Outcome>,
    ) {
        let request = sequence.request;
        sequence.left -= 1;
        out.push(Outcome::Token {
            request,
            left: sequence.left,
        });
        // A continuation's gap since its last token is a gap like others.
        self.streams.note_gap(sequence.last_ms, now_ms);
        sequence.last_ms = now_ms;
        if sequence.left == 0 {
            self.drop_room(&sequence, trace);
            out.push(Outcome::Finished { request });
        } else if sequence.stage == Stage::Prefill {
            self.outgoing.insert(request, sequence);
        } else {
            self.join(sequence);
        }
    }

    fn join(&mut self, sequence: Sequence) {
        self.streams.join(sequence);
    }

    /// One token of every stream.
    fn decode(&mut self, now_ms: f64, trace: &Trace, out: &mut Vec<Outcome>) {
        if self.streams.batch() == 0 {
            return;
        }
        self.streams.step(now_ms);
        while let Some(stream) = self.streams.take_finished() {
            out.push(Outcome::Finished {
                request: stream.sequence.request,
            });
            self.drop_stream(&stream, trace);
        }
        self.grow(trace, out);
    }

    /// Times between tokens since the last call: (gap in ms, how many).
    pub(crate) fn take_gaps(&mut self) -> Vec<(f64, u32)> {
        self.streams.take_gaps()
    }
}

/// Units of 16 tokens for so many tokens.
pub(crate) fn units(tokens: u32) -> u64 {
    u64::from(tokens.div_ceil(16))
}
