//! What a worker costs at least, from few numbers: most of them are ruled out
//! without counting their terms.
//!
//! Each row is a term of the cost with what is dear or small left out: whole
//! steps, what passes an ITL target, a pool that runs full, waiting for a
//! place. A floor is never over the cost (of settings with ε >= 0 and κ >= 1), so
//! the choice stays the same; a property test holds each to that.
//!
//! Eight workers are counted at a time, without a branch or a division, so that
//! the compiler makes vector instructions of it.

mod lows;

use crate::facts::Facts;
use crate::terms::stretch;
pub(crate) use lows::Lows;

/// Workers side by side.
pub(crate) const LANES: usize = 8;
/// A number of each of them.
pub(super) type Lanes = [f64; LANES];

/// A row of numbers of one worker, and the same rows of several side by side.
macro_rules! side_by_side {
    ($(#[$of:meta])* $row:ident, $lanes:ident { $($(#[$what:meta])* $field:ident,)* }) => {
        $(#[$of])*
        #[derive(Debug, Clone, Copy)]
        struct $row {
            $($(#[$what])* $field: f64,)*
        }

        /// The rows of several workers side by side.
        #[derive(Debug, Clone, Copy)]
        pub(super) struct $lanes {
            $(pub(super) $field: Lanes,)*
        }

        impl $lanes {
            /// The same worker everywhere.
            fn of(row: &$row) -> Self {
                Self { $($field: [row.$field; LANES],)* }
            }

            fn set(&mut self, lane: usize, row: &$row) {
                $(self.$field[lane] = row.$field;)*
            }

            fn row(&self, lane: usize) -> $row {
                $row { $($field: self.$field[lane],)* }
            }
        }
    };
}

side_by_side! {
    /// What a floor is made of: the worker's part.
    Row, Rows {
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
        slowed_steps,
        /// One over the least that any has left, and over a step of theirs.
        per_left,
        per_step,
        /// What another stream adds to a step, ms: constant, and by its context.
        joins_ms,
        joins_context_ms,
        /// What company adds to its own steps, ms.
        company_ms,
        /// A chunk beside it, ms: constant, by its context, at most.
        chunk_ms,
        chunk_context_ms,
        chunk_most_ms,
        /// KV that is sent after the last chunk: at most so many tokens; bytes each.
        late_tokens,
        token_bytes,
    }
}

impl Row {
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
            pulls: f64::from(facts.prefix_pull),
            step_ends_ms: facts.step_ends_ms,
            step_most_ms: if facts.stops {
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
            slowed_steps: streams()
                .map(|one| one.weight * stretch::steps_until_level(facts, one.left))
                .sum(),
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

/// What the floors of all workers are made of, in the order of their views.
#[derive(Debug, Clone, Default)]
pub(crate) struct Floors {
    pub(super) blocks: Vec<Rows>,
    len: usize,
}

impl Floors {
    /// Counts one worker anew: its place is there, or is the next one.
    pub(crate) fn count(&mut self, place: usize, facts: &Facts) {
        let row = Row::of(facts);
        let (block, lane) = (place / LANES, place % LANES);
        match self.blocks.get_mut(block) {
            Some(rows) => rows.set(lane, &row),
            None => self.blocks.push(Rows::of(&row)),
        }
        self.len = self.len.max(place + 1);
    }

    /// Takes one out; the last one takes its place.
    pub(crate) fn swap_remove(&mut self, place: usize) {
        let last = self.len - 1;
        let row = self.blocks[last / LANES].row(last % LANES);
        self.blocks[place / LANES].set(place % LANES, &row);
        self.len = last;
        self.blocks.truncate(last.div_ceil(LANES));
    }

    pub(crate) fn clear(&mut self) {
        self.blocks.clear();
        self.len = 0;
    }
}
