//! The floors of one request, by worker.

use super::{LANES, Lanes, Rows};
use crate::sides::Question;
use crate::survey::Holder;
use crate::terms::Asked;
use crate::transfer::{Path, TransferRate};
use kvmesh_kv_index::WorkerSlot;

/// Sums in another order differ by rounding: a floor keeps so far below, by
/// share and in ms.
const BELOW: f64 = 1e-9;

/// Milliseconds that nothing costs.
const NEVER: f64 = 1e300;

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
    /// Counts them for a request. `listed`: whether any of the eight workers of a
    /// block is asked for; the floors of others are not counted.
    pub(crate) fn count(&mut self, question: &Question<'_, '_>, listed: &[bool]) {
        self.clear();
        let (floors, gates) = (&question.table.floors, &question.table.gates);
        let pulls: Vec<Pull> = question
            .holders
            .iter()
            .map(|holder| Pull::of(question, holder))
            .collect();
        for (at, rows) in floors.blocks.iter().enumerate() {
            if listed.get(at) != Some(&true) {
                let lists = [&mut self.prefill, &mut self.decode, &mut self.whole];
                lists
                    .into_iter()
                    .for_each(|list| list.extend([NEVER; LANES]));
                continue;
            }
            let mut cached = [0.0; LANES];
            for (there, gate) in cached.iter_mut().zip(&gates[at * LANES..]) {
                *there = question.request.cached_on(WorkerSlot(gate.slot)) as f64;
            }
            let line = rows.line(&question.asked);
            let prompt = rows.prompt(question, &line, &cached, &pulls);
            let (output, decode) = rows.output(question, &line, &cached);
            self.prefill.extend(prompt.map(below));
            self.whole.extend(sums(&prompt, &output).map(below));
            self.decode.extend(decode.map(below));
        }
    }

    /// None is known.
    pub(crate) fn clear(&mut self) {
        let lists = [&mut self.prefill, &mut self.decode, &mut self.whole];
        lists.into_iter().for_each(Vec::clear);
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
    fn of(question: &Question<'_, '_>, holder: &Holder) -> Self {
        let (asked, facts) = (&question.asked, question.facts(holder.at));
        let tokens = holder.tokens as f64;
        let path = |path| {
            let slot = WorkerSlot(facts.slot);
            let rate = question.cluster.transfers.quickest(slot, path);
            (rate.fixed_ms, rate.bytes_per_ms.recip())
        };
        let far = path(Path::Network);
        Self {
            kind: f64::from(holder.kind),
            host: f64::from(facts.host),
            tokens,
            rest: (asked.sequence - tokens).max(1.0),
            rest_context: asked.context_after(tokens),
            // A host that is not known is nobody's.
            near: if facts.host == 0 {
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
    ahead_ms: Lanes,
    behind_ms: Lanes,
    behind: Lanes,
    /// The most work that may be before it, ms.
    most_ahead_ms: Lanes,
}

impl Rows {
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
                let first = f64::from(now_ms + ahead_of_ms[at] <= deadline);
                line.ahead_ms[at] += first * work_ms[at];
                line.behind_ms[at] += (1.0 - first) * work_ms[at];
                line.behind[at] += (1.0 - first) * weight[at];
            }
        }
        for at in 0..LANES {
            let all_first = f64::from(self.last_ms[at] <= deadline);
            let none_first = (1.0 - all_first) * f64::from(deadline < self.first_ms[at]);
            line.ahead_ms[at] += all_first * self.own_ms[at];
            line.behind_ms[at] += none_first * self.own_ms[at];
            line.behind[at] += none_first * self.own_weight[at];
            let some_first = 1.0 - all_first - none_first;
            line.most_ahead_ms[at] = line.ahead_ms[at] + some_first * self.own_ms[at];
        }
        line
    }

    /// Computing the prompt, where part of it is there or pulled.
    fn prompt(
        &self,
        question: &Question<'_, '_>,
        line: &Lines,
        cached: &Lanes,
        pulls: &[Pull],
    ) -> Lanes {
        let (asked, people) = (&question.asked, question.people);
        let weight = people.weights.ttft[asked.class];
        let counts = (weight, people.stretch);
        let (mut waits, mut least) = ([0.0; LANES], [0.0; LANES]);
        for at in 0..LANES {
            let tokens = larger(asked.sequence - cached[at], 1.0);
            let context = tokens * cached[at] + tokens * (tokens + 1.0) / 2.0;
            let running_ms = larger(self.step_ends_ms[at] - asked.now_ms, 0.0);
            let running_ms = smaller(running_ms, self.step_most_ms[at]);
            waits[at] = weight * (running_ms + line.ahead_ms[at]);
            least[at] = waits[at] + self.computing(at, tokens, context, line, counts);
        }
        let from = f64::from(question.pull_from_tokens);
        for pull in pulls {
            for at in 0..LANES {
                let near = f64::from(self.host[at] == pull.host);
                let fixed_ms = pull.far.0 + near * (pull.near.0 - pull.far.0);
                let byte_ms = pull.far.1 + near * (pull.near.1 - pull.far.1);
                let missing = pull.tokens - cached[at];
                let pull_ms = fixed_ms + missing * self.token_bytes[at] * byte_ms;
                let prompt_ms = self.computing(at, pull.rest, pull.rest_context, line, counts);
                let alike = f64::from(self.kind[at] == pull.kind) * f64::from(missing >= from);
                let never = (1.0 - self.pulls[at] * alike) * NEVER;
                let cost = waits[at] + weight * pull_ms + prompt_ms;
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
        // Those of its steps for which streams are there: `surviving` never falls
        // more slowly than 1 - x.
        let steps = larger(self.per_chunk[at] * tokens, self.per_budget[at] * tokens_ms) + 1.0;
        let gone = (line.most_ahead_ms[at] * self.per_step[at] + steps) * self.per_left[at];
        let held_up = self.streams[at] * tokens_ms * larger(1.0 - gone, 0.0);
        (weight + line.behind[at]) * prefill_ms + stretch * held_up
    }

    /// Producing the output where the prompt is computed, and where it is not, with
    /// the gap that a transfer by the quickest path leaves.
    fn output(&self, question: &Question<'_, '_>, line: &Lines, cached: &Lanes) -> (Lanes, Lanes) {
        const QUICKEST: TransferRate = Path::SharedMemory.prior();
        const BYTE_MS: f64 = 1.0 / QUICKEST.bytes_per_ms;
        let (asked, people) = (&question.asked, question.people);
        let itl = people.weights.itl[asked.class];
        let (mut whole, mut decode) = ([0.0; LANES], [0.0; LANES]);
        for at in 0..LANES {
            let longer_ms = self.joins_ms[at] + self.joins_context_ms[at] * asked.sequence;
            let chunk_ms = self.chunk_ms[at] + self.chunk_context_ms[at] * asked.sequence;
            let chunk_ms = smaller(chunk_ms, self.chunk_most_ms[at]);
            let most_ms = f64::from(chunk_ms > 1e-6) * asked.left * chunk_ms;
            let stretched_ms =
                itl * asked.left * self.company_ms[at] + self.slowed_steps[at] * longer_ms;
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

fn sums(one: &Lanes, other: &Lanes) -> Lanes {
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
