//! The sides of a plan: J = prefill term + decode term + pair term.

use crate::facts::{Facts, Table};
use crate::fit::pairs;
use crate::plan::{Considered, Plan, Terms};
use crate::request::RequestView;
use crate::survey::Holder;
use crate::terms::queued::{Line, line, queued_ms};
use crate::terms::{Asked, People, first, newcomers, room, stretch};
use crate::transfer::{Path, TransferRate};
use crate::worker::{Cluster, WorkerView};
use kvmesh_kv_index::WorkerSlot;

/// All that a term is computed from.
pub(crate) struct Question<'a, 'r> {
    pub(crate) cluster: &'a Cluster<'a>,
    pub(crate) table: &'a Table,
    pub(crate) request: &'a RequestView<'r>,
    pub(crate) asked: Asked,
    pub(crate) people: &'a People,
    /// Workers that a prefix may be pulled from.
    pub(crate) holders: &'a [Holder],
    /// Whether anything lies below a device.
    pub(crate) tiered: bool,
    /// Of the way between workers and the client, what all plans have, ms.
    pub(crate) relay_least_ms: f64,
    /// Fewest tokens for which a prefix is pulled.
    pub(crate) pull_from_tokens: u32,
}

/// One side of a plan: a worker and its terms.
pub(crate) struct Side<'a> {
    pub(crate) at: u32,
    pub(crate) facts: &'a Facts,
    pub(crate) line: Line,
    pub(crate) terms: Terms,
    /// Their sum.
    pub(crate) total_ms: f64,
    pub(crate) cached: u64,
    pub(crate) pull: Option<(u32, u64)>,
    /// Tokens that it lacks of the sequence, and their KV in bytes.
    missing: (f64, f64),
}

/// A plan, and where its workers are in the cluster.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Candidate {
    pub(crate) considered: Considered,
    pub(crate) prefill: u32,
    pub(crate) decode: u32,
}

impl<'a> Question<'a, '_> {
    fn view(&self, at: u32) -> &'a WorkerView {
        &self.cluster.workers[at as usize]
    }

    pub(crate) fn facts(&self, at: u32) -> &'a Facts {
        &self.table.rows[at as usize]
    }

    fn line(&self, at: u32, facts: &Facts) -> Line {
        if facts.waits {
            let prompts = &self.view(at).prompts;
            line(facts, prompts, &self.asked, &self.people.weights.ttft)
        } else {
            Line::default()
        }
    }

    fn cached(&self, facts: &Facts) -> u64 {
        self.request.cached_on(WorkerSlot(facts.slot))
    }

    /// The worker that computes the prompt.
    pub(crate) fn prefill_side(&self, at: u32) -> Side<'a> {
        let facts = self.facts(at);
        let line = self.line(at, facts);
        let cached = self.cached(facts);
        let reload_ms = self.reload_ms(facts, cached as f64);
        let mut terms = self.prompt_terms(facts, &line, cached, (0.0, reload_ms));
        let mut pull = None;
        if let Some((holder, pull_ms)) = self.best_holder(at, facts, cached) {
            let tokens = holder.tokens - cached;
            let source = self.facts(holder.at);
            let reload_ms = reload_ms + self.reload_ms(source, tokens as f64);
            let pulled = self.prompt_terms(facts, &line, holder.tokens, (pull_ms, reload_ms));
            if pulled.total_ms() < terms.total_ms() {
                terms = pulled;
                pull = Some((holder.at, tokens));
            }
        }
        Side {
            at,
            facts,
            line,
            total_ms: terms.total_ms(),
            terms,
            cached,
            pull,
            missing: (0.0, 0.0),
        }
    }

    /// The holder of its kind whose prefix is there, and the rest computed, the
    /// soonest: a near one may beat one that holds more. With what the pull
    /// takes, ms, over the path between the two as it is learnt: what waits
    /// there is part of that.
    fn best_holder(&self, at: u32, facts: &Facts, cached: u64) -> Option<(Holder, f64)> {
        if !facts.prefix_pull {
            return None;
        }
        let least = cached + u64::from(self.pull_from_tokens);
        let mut best: Option<(Holder, f64, f64)> = None;
        for holder in self.holders {
            if holder.kind != facts.kind || holder.tokens < least || holder.at == at {
                continue;
            }
            let tokens = (holder.tokens - cached) as f64;
            let pull_ms = first::pull_ms(facts, self.rate(holder.at, at), tokens);
            let rest = first::prefill(facts, &self.asked, holder.tokens as f64);
            let reload_ms = self.reload_ms(self.facts(holder.at), tokens);
            let all_ms = pull_ms + reload_ms + rest.ms();
            if best.is_none_or(|(.., other_ms)| all_ms < other_ms) {
                best = Some((*holder, pull_ms, all_ms));
            }
        }
        best.map(|(holder, pull_ms, _)| (holder, pull_ms))
    }

    /// Bringing what of so many tokens lies below a worker's device back to it.
    fn reload_ms(&self, facts: &Facts, tokens: f64) -> f64 {
        if !self.tiered || tokens == 0.0 {
            return 0.0;
        }
        let below = self.request.below_device(WorkerSlot(facts.slot));
        first::reload_ms(facts, below.map(|on| on.min(tokens)))
    }

    /// Computing the prompt where so many tokens of it are there, or are pulled
    /// and brought back first.
    fn prompt_terms(
        &self,
        facts: &Facts,
        line: &Line,
        there: u64,
        (pull_ms, reload_ms): (f64, f64),
    ) -> Terms {
        let (asked, people) = (&self.asked, self.people);
        let there = there as f64;
        let chunks = first::prefill(facts, asked, there);
        let held_up = newcomers::held_up(facts, &chunks, people);
        let prefill_ms = chunks.ms() + held_up.prompt_ms;
        let held_ms = stretch::chunks_stretch_ms(facts, &chunks, line.ahead_ms, people);
        Terms {
            weight: people.weights.ttft[asked.class],
            wait_ms: first::wait_ms(facts, line, asked.now_ms),
            pull_ms,
            reload_ms,
            prefill_ms,
            relay_ms: facts.relay_ms,
            relay_least_ms: self.relay_least_ms,
            queued_ms: queued_ms(line, prefill_ms),
            others_stretch_ms: held_ms + held_up.stretch_ms,
            ..Terms::default()
        }
    }

    fn rate(&self, source: u32, target: u32) -> TransferRate {
        let (from, to) = (self.facts(source), self.facts(target));
        let path = Path::between_hosts(from.host, to.host);
        let (from, to) = (WorkerSlot(from.slot), WorkerSlot(to.slot));
        self.cluster.transfers.rate(from, to, path)
    }

    /// What the output costs on a worker. `chunks_ms`: prompts computed there
    /// beside it.
    fn add_decode(&self, terms: &mut Terms, facts: &Facts, chunks_ms: f64) {
        let (asked, people) = (&self.asked, self.people);
        let cached = self.cached(facts) as f64;
        terms.decode_wait_ms = first::decode_wait_ms(facts, asked);
        terms.own_stretch_ms += stretch::own_stretch_ms(facts, asked, people, chunks_ms);
        terms.others_stretch_ms += stretch::joining_stretch_ms(facts, asked, people);
        terms.recompute_ms += room::recompute_ms(facts, asked, people, cached);
    }

    /// The worker that produces the output, for another's prefill.
    pub(crate) fn decode_side(&self, at: u32) -> Side<'a> {
        let facts = self.facts(at);
        let line = self.line(at, facts);
        let mut terms = Terms::default();
        self.add_decode(&mut terms, facts, line.ahead_ms + line.behind_ms);
        let missing = self.missing(facts);
        Side {
            at,
            facts,
            line,
            total_ms: terms.total_ms(),
            terms,
            cached: 0,
            pull: None,
            missing: (missing, facts.kv_bytes(missing)),
        }
    }

    fn missing(&self, decode: &Facts) -> f64 {
        self.asked.sequence - self.cached(decode) as f64
    }

    /// What a decode side costs for the choice of the best: its terms, and of
    /// the pair term what does not depend on the partner.
    pub(crate) fn decode_cost(&self, side: &Side<'_>) -> f64 {
        let facts = side.facts;
        let (missing, _) = side.missing;
        let late = if facts.streamed {
            missing.min(facts.chunk)
        } else {
            missing
        };
        let rate = const { Path::SharedMemory.prior() };
        let gap = side.terms.decode_wait_ms + first::pull_ms(facts, rate, late);
        side.total_ms + stretch::gap_ms(facts, &self.asked, self.people, gap)
    }

    /// All of it on one worker.
    pub(crate) fn whole(&self, at: u32) -> Candidate {
        let side = self.prefill_side(at);
        let mut terms = side.terms;
        self.add_decode(&mut terms, side.facts, side.line.behind_ms);
        if terms.decode_wait_ms > 0.0 {
            let gap = terms.decode_wait_ms;
            terms.gap_ms = stretch::gap_ms(side.facts, &self.asked, self.people, gap);
        }
        let plan = Plan::Whole {
            worker: WorkerSlot(side.facts.slot),
            source: self.source(&side),
        };
        candidate(plan, terms, &side, at)
    }

    fn source(&self, side: &Side<'_>) -> Option<WorkerSlot> {
        side.pull
            .map(|(source, _)| WorkerSlot(self.facts(source).slot))
    }

    /// Whether two workers can exchange KV.
    pub(crate) fn pairs(&self, p: &Side<'_>, d: &Side<'_>) -> bool {
        let streamed = p.facts.streamed && d.facts.streamed;
        let alike = p.facts.kind == d.facts.kind && p.at != d.at;
        alike && (streamed || pairs(self.view(p.at), self.view(d.at)))
    }

    /// The pair term: transfer, and the gap that it leaves. `None` where the two
    /// cannot exchange KV.
    fn pair_terms(&self, p: &Side<'_>, d: &Side<'_>) -> Option<(f64, f64)> {
        if !self.pairs(p, d) {
            return None;
        }
        let rate = self.rate(p.at, d.at);
        let prefill_ms = p.terms.prefill_ms;
        let transfer_ms = first::transfer_ms(p.facts, d.facts, rate, d.missing, prefill_ms);
        if !p.facts.emits_first {
            return Some((transfer_ms, 0.0));
        }
        let gap = transfer_ms + d.terms.decode_wait_ms;
        let gap_ms = stretch::gap_ms(d.facts, &self.asked, self.people, gap);
        Some((transfer_ms, gap_ms))
    }

    /// Cost of prompt on one worker and output on another, never under the sum
    /// of both sides; `None` where they cannot exchange KV.
    pub(crate) fn split_cost(&self, p: &Side<'_>, d: &Side<'_>) -> Option<f64> {
        let (transfer_ms, gap_ms) = self.pair_terms(p, d)?;
        let late = if p.facts.emits_first {
            0.0
        } else {
            transfer_ms + d.terms.decode_wait_ms + d.facts.step_ms
        };
        Some(p.total_ms + d.total_ms + gap_ms + p.terms.weight * late)
    }

    /// That plan with its terms.
    pub(crate) fn split(&self, p: &Side<'_>, d: &Side<'_>) -> Option<Candidate> {
        let mut terms = p.terms;
        (terms.transfer_ms, terms.gap_ms) = self.pair_terms(p, d)?;
        terms.decode_wait_ms = d.terms.decode_wait_ms;
        terms.own_stretch_ms = d.terms.own_stretch_ms;
        terms.others_stretch_ms += d.terms.others_stretch_ms;
        terms.recompute_ms = d.terms.recompute_ms;
        if !p.facts.emits_first {
            // The first token is a decode step after the KV is there.
            terms.first_from_decode = true;
            terms.decode_wait_ms += d.facts.step_ms;
        }
        let plan = Plan::Split {
            prefill: WorkerSlot(p.facts.slot),
            decode: WorkerSlot(d.facts.slot),
            source: self.source(p),
        };
        Some(candidate(plan, terms, p, d.at))
    }
}

fn candidate(plan: Plan, terms: Terms, side: &Side<'_>, decode: u32) -> Candidate {
    let tokens = |count: u64| u32::try_from(count).unwrap_or(u32::MAX);
    Candidate {
        considered: Considered {
            plan,
            terms,
            cached_tokens: tokens(side.cached),
            pulled_tokens: tokens(side.pull.map_or(0, |(_, pulled)| pulled)),
        },
        prefill: side.at,
        decode,
    }
}
