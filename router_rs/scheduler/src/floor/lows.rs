//! The floors of one request, by worker.

use super::{LANES, Lanes, Rows};
use crate::sides::Question;
use crate::survey::{HOLDERS, Holder};
use crate::terms::Asked;
use crate::transfer::{Path, TransferRate};
use kvmesh_kv_index::WorkerSlot;

/// Sums in another order differ by rounding: a floor keeps so far below, by
/// share and in ms.
const BELOW: f64 = 1e-9;

/// Prefixes whose lengths differ by less than this share of the sequence are pulled for
/// about the same.
const ALIKE: f64 = 1.0 / 16.0;

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
        let pulls = Pull::all(question);
        // The same code for each width of vectors: the processor is asked once.
        pulp::Arch::new().dispatch(Counting {
            lows: self,
            question,
            listed,
            pulls: &pulls,
        });
    }

    /// None is known.
    pub(crate) fn clear(&mut self) {
        let lists = [&mut self.prefill, &mut self.decode, &mut self.whole];
        lists.into_iter().for_each(Vec::clear);
    }
}

/// The loop over all workers, to be compiled once for each width of vectors.
struct Counting<'a, 'q, 'r> {
    lows: &'a mut Lows,
    question: &'a Question<'q, 'r>,
    listed: &'a [bool],
    pulls: &'a [Pull],
}

impl pulp::NullaryFnOnce for Counting<'_, '_, '_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self {
            lows,
            question,
            listed,
            pulls,
        } = self;
        let (floors, gates) = (&question.table.floors, &question.table.gates);
        for (at, rows) in floors.blocks.iter().enumerate() {
            if listed.get(at) != Some(&true) {
                let lists = [&mut lows.prefill, &mut lows.decode, &mut lows.whole];
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
            let prompt = rows.prompt(question, &line, &cached, pulls);
            let (output, decode) = rows.output(question, &line, &cached);
            lows.prefill.extend(prompt.map(below));
            lows.whole.extend(sums(&prompt, &output).map(below));
            lows.decode.extend(decode.map(below));
        }
    }
}

/// Holders of one kind with about as long a prefix, seen from all that may pull it:
/// what the best of all of them would cost at most, counted once.
struct Pull {
    kind: f64,
    /// Hosts of the holders, and how many these are.
    hosts: [f64; HOLDERS],
    count: usize,
    /// Tokens of the shortest and of the longest prefix.
    least: f64,
    most: f64,
    /// Tokens to compute after the longest, and their Σ(n·context); tokens after the
    /// shortest, and theirs.
    rest: (f64, f64),
    rest_most: (f64, f64),
    /// The quickest path to a worker on one of their hosts, and to any other: fixed
    /// ms, and ms a byte.
    near: (f64, f64),
    far: (f64, f64),
}

impl Pull {
    fn of(question: &Question<'_, '_>, holder: &Holder) -> Self {
        let facts = question.facts(holder.at);
        let tokens = holder.tokens as f64;
        let path = |path| {
            let slot = WorkerSlot(facts.slot);
            let rate = question.cluster.transfers.quickest(slot, path);
            (rate.fixed_ms, rate.bytes_per_ms.recip())
        };
        let far = path(Path::Network);
        Self {
            kind: f64::from(holder.kind),
            hosts: [f64::from(facts.host); HOLDERS],
            count: 1,
            least: tokens,
            most: tokens,
            rest: rest(&question.asked, tokens),
            rest_most: rest(&question.asked, tokens),
            // A host that is not known is nobody's.
            near: if facts.host == 0 {
                far
            } else {
                path(Path::SharedMemory)
            },
            far,
        }
    }

    /// Those of a request, as few as tell them apart.
    fn all(question: &Question<'_, '_>) -> Vec<Self> {
        let mut all: Vec<Self> = Vec::with_capacity(HOLDERS);
        for holder in question.holders {
            let one = Self::of(question, holder);
            let close = question.asked.sequence * ALIKE;
            let alike = |other: &&mut Self| {
                let apart = other.most.max(one.most) - other.least.min(one.least);
                other.kind == one.kind && apart <= close && other.count < HOLDERS
            };
            match all.iter_mut().find(alike) {
                Some(other) => other.join(&one),
                None => all.push(one),
            }
        }
        all
    }

    /// Takes in another one.
    fn join(&mut self, other: &Self) {
        let quicker = |one: (f64, f64), other: (f64, f64)| (one.0.min(other.0), one.1.min(other.1));
        self.hosts[self.count] = other.hosts[0];
        self.count += 1;
        if other.least < self.least {
            (self.least, self.rest_most) = (other.least, other.rest_most);
        }
        if other.most > self.most {
            (self.most, self.rest) = (other.most, other.rest);
        }
        self.far = quicker(self.far, other.far);
        // From the host of one of them it may be another, far one that is the quickest.
        self.near = quicker(quicker(self.near, other.near), self.far);
    }
}

/// Tokens to compute after so many, and their Σ(n·context).
fn rest(asked: &Asked, there: f64) -> (f64, f64) {
    (
        (asked.sequence - there).max(1.0),
        asked.context_after(there),
    )
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
    #[inline(always)]
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
    #[inline(always)]
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
            let rest = (tokens, context);
            let running_ms = larger(self.step_ends_ms[at] - asked.now_ms, 0.0);
            let running_ms = smaller(running_ms, self.step_most_ms[at]);
            waits[at] = weight * (running_ms + line.ahead_ms[at]);
            least[at] = waits[at] + self.computing(at, rest, rest, line, counts);
        }
        let from = f64::from(question.pull_from_tokens);
        for pull in pulls {
            for at in 0..LANES {
                let host = self.host[at];
                let near = f64::from(pull.hosts.contains(&host));
                let fixed_ms = pull.far.0 + near * (pull.near.0 - pull.far.0);
                let byte_ms = pull.far.1 + near * (pull.near.1 - pull.far.1);
                // Of those that hold enough more each sends at least so much.
                let missing = larger(pull.least - cached[at], from);
                let pull_ms = fixed_ms + missing * self.token_bytes[at] * byte_ms;
                let prompt_ms = self.computing(at, pull.rest, pull.rest_most, line, counts);
                let enough = f64::from(pull.most - cached[at] >= from);
                let alike = f64::from(self.kind[at] == pull.kind) * enough;
                let never = (1.0 - self.pulls[at] * alike) * NEVER;
                let cost = waits[at] + weight * pull_ms + prompt_ms;
                least[at] = smaller(least[at], cost + never);
            }
        }
        least
    }

    /// Computing tokens on one of them, for this request, those behind it and the
    /// streams there. `least`, `most`: how many, and their Σ(n·context), where that is
    /// known from and to: more of them take longer, and fewer streams are left to be
    /// held up.
    #[inline(always)]
    fn computing(
        &self,
        at: usize,
        least: (f64, f64),
        most: (f64, f64),
        line: &Lines,
        (weight, stretch): (f64, f64),
    ) -> f64 {
        let tokens_ms = self.token_ms[at] * least.0 + self.context_ms[at] * least.1;
        let besides_ms = larger(
            self.step_by_token[at] * least.0,
            self.step_by_ms[at] * tokens_ms,
        );
        let prefill_ms = tokens_ms + besides_ms;
        // Those of its steps for which streams are there: `surviving` never falls
        // more slowly than 1 - x.
        let most_ms = self.token_ms[at] * most.0 + self.context_ms[at] * most.1;
        let steps = larger(self.per_chunk[at] * most.0, self.per_budget[at] * most_ms) + 1.0;
        let gone = (line.most_ahead_ms[at] * self.per_step[at] + steps) * self.per_left[at];
        let held_up = self.streams[at] * tokens_ms * larger(1.0 - gone, 0.0);
        (weight + line.behind[at]) * prefill_ms + stretch * held_up
    }

    /// Producing the output where the prompt is computed, and where it is not, with
    /// the gap that a transfer by the quickest path leaves.
    #[inline(always)]
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

#[inline(always)]
fn sums(one: &Lanes, other: &Lanes) -> Lanes {
    let mut sums = *one;
    for (sum, more) in sums.iter_mut().zip(other) {
        *sum += more;
    }
    sums
}

/// A little less, for rounding.
#[inline(always)]
fn below(floor: f64) -> f64 {
    floor * (1.0 - BELOW) - BELOW
}

// Those of the library look for what is no number, which takes several
// instructions a lane.

#[inline(always)]
fn larger(one: f64, other: f64) -> f64 {
    if one > other { one } else { other }
}

#[inline(always)]
fn smaller(one: f64, other: f64) -> f64 {
    if one < other { one } else { other }
}
