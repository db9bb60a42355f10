//! What a worker costs at least, from few numbers: most of them are ruled out
//! without counting their terms.
//!
//! Each row is a term of the cost with what is dear or small left out: whole
//! steps, what passes an ITL target, a pool that runs full, waiting for a
//! place. A floor is never over the cost, so the choice stays the same; a
//! property test holds each to that.
//!
//! Eight workers are counted at a time, without a branch or a division, so that
//! the compiler makes vector instructions of it.

use crate::facts::Facts;
use crate::request::RequestView;
use crate::survey::Holder;
use crate::terms::{Asked, People};
use crate::transfer::{Path, TransferRate, TransferRates};
use kvmesh_kv_index::WorkerSlot;

/// Sums in another order differ by rounding: a floor keeps so far below, by
/// share and in ms.
const BELOW: f64 = 1e-9;

/// Milliseconds that nothing costs.
const NEVER: f64 = 1e300;

/// Workers side by side.
const LANES: usize = 8;
type Lane = [f64; LANES];

/// A row of numbers of one worker, and the same of several side by side.
macro_rules! side_by_side {
    ($(#[$of:meta])* $row:ident, $lanes:ident { $($(#[$what:meta])* $field:ident,)* }) => {
        $(#[$of])*
        #[derive(Debug, Clone, Copy)]
        struct $row {
            $($(#[$what])* $field: f64,)*
        }

        #[derive(Debug, Clone, Copy)]
        struct $lanes {
            $($field: Lane,)*
        }

        impl $lanes {
            /// As many of one worker.
            fn all(row: &$row) -> Self {
                Self { $($field: [row.$field; LANES],)* }
            }

            fn set(&mut self, lane: usize, row: &$row) {
                $(self.$field[lane] = row.$field;)*
            }

            fn copy(&mut self, lane: usize, from: &Self, other: usize) {
                $(self.$field[lane] = from.$field[other];)*
            }
        }
    };
}

side_by_side! {
    /// What a floor is made of: the worker's part.
    Floor, Floors8 {
        /// As in [`Facts`].
        kind,
        host,
        /// 1 where prefixes may be pulled from others, or 0.
        pulls,
        /// When the running step should end, and the most that is waited for it, ms.
        step_ends_ms,
        step_most_ms,
        /// Other routers' prompts of the three classes: from now to their virtual
        /// deadlines, computing them, and their weight.
        ahead_of_0_ms,
        work_0_ms,
        weight_0,
        ahead_of_1_ms,
        work_1_ms,
        weight_1,
        ahead_of_2_ms,
        work_2_ms,
        weight_2,
        /// Own ones, ...
        own_ms,
        own_weight,
        /// ... between which virtual deadlines.
        first_ms,
        last_ms,
        /// ms a prompt token, and a (token x context token).
        token_ms,
        context_ms,
        /// What a step takes beside its prompt: by the token, and by the ms of
        /// prompt where a budget bounds it.
        step_by_token,
        step_by_ms,
        /// Steps by the token, and by the ms of prompt.
        per_chunk,
        per_budget,
        /// Streams by the weight of a stretched step, and those times the steps for
        /// which another stream slows each.
        streams,
        streams_level,
        /// One over the least that any has left, and over a step of theirs.
        per_left,
        per_step,
        /// What another stream adds to a step, ms: constant, and by its context.
        joins_ms,
        joins_context_ms,
        /// What company adds to its own steps, ms.
        company_ms,
        /// A chunk beside it, ms: constant, by its context, at most; and 1 where
        /// chunks take any time, or 0.
        chunk_ms,
        chunk_context_ms,
        chunk_most_ms,
        /// KV that is sent after the last chunk: at most so many tokens; bytes each.
        late_tokens,
        token_bytes,
    }
}

impl Floor {
    fn of(facts: &Facts) -> Self {
        let (line, step) = (&facts.line, &facts.step);
        let besides = step.a_ms + facts.company_ms;
        let streaming = |streams: &&crate::facts::Streams| {
            facts.batch > 0.0 && streams.weight > 0.0 && streams.left > 0.0
        };
        let streams = || facts.streams.iter().filter(streaming);
        let least_left = streams().map(|one| one.left).fold(f64::INFINITY, f64::min);
        let [interactive, standard, batch] = &line.others;
        Self {
            kind: f64::from(facts.kind),
            host: f64::from(facts.host),
            pulls: f64::from(u8::from(facts.prefix_pull)),
            step_ends_ms: facts.step_ends_ms,
            step_most_ms: if facts.layers {
                facts.step_ms
            } else {
                f64::INFINITY
            },
            ahead_of_0_ms: interactive.ahead_of_ms,
            work_0_ms: interactive.work_ms,
            weight_0: interactive.weight,
            ahead_of_1_ms: standard.ahead_of_ms,
            work_1_ms: standard.work_ms,
            weight_1: standard.weight,
            ahead_of_2_ms: batch.ahead_of_ms,
            work_2_ms: batch.work_ms,
            weight_2: batch.weight,
            own_ms: line.own.work_ms,
            own_weight: line.own.weight,
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
}

/// The floors of all workers, in the order of their views.
#[derive(Debug, Clone, Default)]
pub(crate) struct Floors {
    lanes: Vec<Floors8>,
    len: usize,
}

impl Floors {
    /// Counts one worker anew: its place is there, or is the next one.
    pub(crate) fn count(&mut self, place: usize, facts: &Facts) {
        let row = Floor::of(facts);
        let (block, lane) = (place / LANES, place % LANES);
        match self.lanes.get_mut(block) {
            Some(lanes) => lanes.set(lane, &row),
            None => self.lanes.push(Floors8::all(&row)),
        }
        self.len = self.len.max(place + 1);
    }

    /// Takes one out; the last one takes its place.
    pub(crate) fn swap_remove(&mut self, place: usize) {
        let last = self.len - 1;
        let from = self.lanes[last / LANES];
        self.lanes[place / LANES].copy(place % LANES, &from, last % LANES);
        self.len = last;
        self.lanes.truncate(last.div_ceil(LANES));
    }

    pub(crate) fn clear(&mut self) {
        self.lanes.clear();
        self.len = 0;
    }
}

/// What is asked of all workers alike.
pub(crate) struct Asking<'a> {
    pub(crate) request: &'a RequestView<'a>,
    pub(crate) asked: &'a Asked,
    pub(crate) people: &'a People,
    pub(crate) transfers: &'a TransferRates,
    /// Workers that a prefix may be pulled from, each with the number of its host.
    pub(crate) holders: &'a [(Holder, u32)],
    /// Fewest tokens for which a prefix is pulled.
    pub(crate) pull_from_tokens: u32,
}

/// What each worker costs at least, by its place; used again from choice to
/// choice.
#[derive(Debug, Clone, Default)]
pub(crate) struct Lows {
    /// Never over what [`crate::sides::Question::prefill_side`] costs.
    pub(crate) prefill: Vec<f64>,
    /// Never over [`crate::sides::Question::decode_cost`].
    pub(crate) decode: Vec<f64>,
    /// Never over what [`crate::sides::Question::whole`] costs.
    pub(crate) whole: Vec<f64>,
}

impl Lows {
    /// Counts them for a request. `slots`: of the workers, in the order of their
    /// views.
    pub(crate) fn count(
        &mut self,
        floors: &Floors,
        slots: impl Iterator<Item = WorkerSlot>,
        asking: &Asking<'_>,
    ) {
        let lists = [&mut self.prefill, &mut self.decode, &mut self.whole];
        let room = floors.lanes.len() * LANES;
        lists.into_iter().for_each(|list| {
            list.clear();
            list.reserve(room);
        });
        let pulls: Vec<Pull> = asking
            .holders
            .iter()
            .map(|at| Pull::of(asking, at))
            .collect();
        let mut slots = slots.take(floors.len);
        for lanes in &floors.lanes {
            let mut cached = [0.0; LANES];
            for (there, slot) in cached.iter_mut().zip(&mut slots) {
                *there = asking.request.cached_on(slot) as f64;
            }
            let line = lanes.line(asking.asked);
            let prompt = lanes.prompt(asking, &line, &cached, &pulls);
            let (whole, decode) = lanes.output(asking, &line, &cached);
            self.prefill.extend(prompt.map(below));
            self.whole.extend(sums(&prompt, &whole).map(below));
            self.decode.extend(decode.map(below));
        }
    }
}

/// A holder of a prefix, seen from all that may pull it.
struct Pull {
    kind: f64,
    host: f64,
    /// Tokens of the prefix.
    tokens: f64,
    /// Tokens to compute after it, and their Σ(n·context).
    rest: f64,
    rest_context: f64,
    /// The quickest path to a worker on its host, and to any other: fixed ms, and
    /// ms a byte.
    near: (f64, f64),
    far: (f64, f64),
}

impl Pull {
    fn of(asking: &Asking<'_>, (holder, host): &(Holder, u32)) -> Self {
        let tokens = holder.tokens as f64;
        let path = |path| {
            let rate: TransferRate = asking.transfers.quickest(holder.slot, path);
            (rate.fixed_ms, rate.bytes_per_ms.recip())
        };
        let far = path(Path::Network);
        Self {
            kind: f64::from(holder.kind),
            host: f64::from(*host),
            tokens,
            rest: (asking.asked.sequence - tokens).max(1.0),
            rest_context: asking.asked.context_after(tokens),
            // A host that is not known is nobody's.
            near: if *host == 0 {
                far
            } else {
                path(Path::SharedMemory)
            },
            far,
        }
    }
}

/// Those that wait, as far as it is known at once who is first.
struct Lines {
    ahead_ms: Lane,
    behind_ms: Lane,
    behind: Lane,
    /// The most work that may be before it, ms.
    most_ahead_ms: Lane,
}

impl Floors8 {
    fn line(&self, asked: &Asked) -> Lines {
        let (deadline, now_ms) = (asked.virtual_deadline_ms, asked.now_ms);
        let mut line = Lines {
            ahead_ms: [0.0; LANES],
            behind_ms: [0.0; LANES],
            behind: [0.0; LANES],
            most_ahead_ms: [0.0; LANES],
        };
        let groups = [
            (&self.ahead_of_0_ms, &self.work_0_ms, &self.weight_0),
            (&self.ahead_of_1_ms, &self.work_1_ms, &self.weight_1),
            (&self.ahead_of_2_ms, &self.work_2_ms, &self.weight_2),
        ];
        for (ahead_of_ms, work_ms, weight) in groups {
            for at in 0..LANES {
                let first = one_if(now_ms + ahead_of_ms[at] <= deadline);
                line.ahead_ms[at] += first * work_ms[at];
                line.behind_ms[at] += (1.0 - first) * work_ms[at];
                line.behind[at] += (1.0 - first) * weight[at];
            }
        }
        for at in 0..LANES {
            let all_first = one_if(self.last_ms[at] <= deadline);
            let none_first = (1.0 - all_first) * one_if(deadline < self.first_ms[at]);
            line.ahead_ms[at] += all_first * self.own_ms[at];
            line.behind_ms[at] += none_first * self.own_ms[at];
            line.behind[at] += none_first * self.own_weight[at];
            let some_first = 1.0 - all_first - none_first;
            line.most_ahead_ms[at] = line.ahead_ms[at] + some_first * self.own_ms[at];
        }
        line
    }

    /// Computing the prompt, where part of it is there or pulled.
    fn prompt(&self, asking: &Asking<'_>, line: &Lines, cached: &Lane, pulls: &[Pull]) -> Lane {
        let (asked, people) = (asking.asked, asking.people);
        let weight = people.weights.ttft[asked.class];
        let mut least = [0.0; LANES];
        let mut waits = [0.0; LANES];
        for at in 0..LANES {
            let tokens = larger(asked.sequence - cached[at], 1.0);
            let context = tokens * cached[at] + tokens * (tokens + 1.0) / 2.0;
            let running_ms = larger(self.step_ends_ms[at] - asked.now_ms, 0.0);
            let running_ms = smaller(running_ms, self.step_most_ms[at]);
            waits[at] = weight * (running_ms + line.ahead_ms[at]);
            let prompt_ms = self.computing(at, tokens, context, line, (weight, people.stretch));
            least[at] = waits[at] + prompt_ms;
        }
        let from = f64::from(asking.pull_from_tokens);
        for pull in pulls {
            let people = (weight, people.stretch);
            for at in 0..LANES {
                let near = one_if(self.host[at] == pull.host);
                let fixed_ms = pull.far.0 + near * (pull.near.0 - pull.far.0);
                let byte_ms = pull.far.1 + near * (pull.near.1 - pull.far.1);
                let missing = pull.tokens - cached[at];
                let pull_ms = fixed_ms + missing * self.token_bytes[at] * byte_ms;
                let prompt_ms = self.computing(at, pull.rest, pull.rest_context, line, people);
                let cost = waits[at] + weight * pull_ms + prompt_ms;
                let alike = one_if(self.kind[at] == pull.kind) * one_if(missing >= from);
                let never = (1.0 - self.pulls[at] * alike) * NEVER;
                least[at] = smaller(least[at], cost + never);
            }
        }
        least
    }

    /// Computing so many tokens on one of them, for this request, those behind it
    /// and the streams there.
    #[inline(always)]
    fn computing(
        &self,
        at: usize,
        tokens: f64,
        context: f64,
        line: &Lines,
        (weight, stretch): (f64, f64),
    ) -> f64 {
        let tokens_ms = self.token_ms[at] * tokens + self.context_ms[at] * context;
        let besides_ms = larger(
            self.step_by_token[at] * tokens,
            self.step_by_ms[at] * tokens_ms,
        );
        let prefill_ms = tokens_ms + besides_ms;
        // exp(-x) >= 1 - x: those of its steps for which streams are there.
        let steps = larger(self.per_chunk[at] * tokens, self.per_budget[at] * tokens_ms) + 1.0;
        let gone = (line.most_ahead_ms[at] * self.per_step[at] + steps) * self.per_left[at];
        let held_up = self.streams[at] * tokens_ms * larger(1.0 - gone, 0.0);
        (weight + line.behind[at]) * prefill_ms + stretch * held_up
    }

    /// Producing the output where the prompt is computed, and where it is not, with
    /// the gap that a transfer by the quickest path leaves.
    fn output(&self, asking: &Asking<'_>, line: &Lines, cached: &Lane) -> (Lane, Lane) {
        const QUICKEST: TransferRate = Path::SharedMemory.prior();
        const BYTE_MS: f64 = 1.0 / QUICKEST.bytes_per_ms;
        let (asked, people) = (asking.asked, asking.people);
        let itl = people.weights.itl[asked.class];
        let (mut whole, mut decode) = ([0.0; LANES], [0.0; LANES]);
        for at in 0..LANES {
            let longer_ms = self.joins_ms[at] + self.joins_context_ms[at] * asked.sequence;
            let chunk_ms = self.chunk_ms[at] + self.chunk_context_ms[at] * asked.sequence;
            let chunk_ms = smaller(chunk_ms, self.chunk_most_ms[at]);
            let most_ms = one_if(chunk_ms > 1e-6) * asked.left * chunk_ms;
            let stretched_ms =
                itl * asked.left * self.company_ms[at] + self.streams_level[at] * longer_ms;
            let beside = |chunks_ms: f64| itl * smaller(chunks_ms, most_ms);
            let late = smaller(asked.sequence - cached[at], self.late_tokens[at]);
            let gap_ms = QUICKEST.fixed_ms + larger(late, 0.0) * self.token_bytes[at] * BYTE_MS;
            let all_ms = line.ahead_ms[at] + line.behind_ms[at];
            whole[at] = people.stretch * (stretched_ms + beside(line.behind_ms[at]));
            decode[at] = people.stretch * (stretched_ms + beside(all_ms) + itl * gap_ms);
        }
        (whole, decode)
    }
}

fn sums(one: &Lane, other: &Lane) -> Lane {
    let mut sums = *one;
    for (sum, more) in sums.iter_mut().zip(other) {
        *sum += more;
    }
    sums
}

/// A little less, for rounding.
fn below(floor: f64) -> f64 {
    floor * (1.0 - BELOW) - BELOW
}

// Those of the library look for what is no number, which takes several
// instructions a lane.

fn larger(one: f64, other: f64) -> f64 {
    if one > other { one } else { other }
}

fn smaller(one: f64, other: f64) -> f64 {
    if one < other { one } else { other }
}

fn one_if(is: bool) -> f64 {
    if is { 1.0 } else { 0.0 }
}
