//! The sides of a plan: J = prefill term + decode term + pair term.

use crate::fit::pairs;
use crate::plan::{Considered, Plan, Terms};
use crate::request::RequestView;
use crate::terms::queued::{Line, line, queued_ms};
use crate::terms::{Facts, People, first, room, stretch};
use crate::transfer::Path;
use crate::worker::{Cluster, WorkerView};
use kvmesh_kv_index::WorkerSlot;

/// All that a term is computed from.
pub(crate) struct Question<'a, 'r> {
    pub(crate) cluster: &'a Cluster<'a>,
    pub(crate) request: &'a RequestView<'r>,
    pub(crate) people: &'a People,
    /// Worker that a prefix may be pulled from, and tokens that it holds.
    pub(crate) holder: Option<(&'a WorkerView, u64)>,
    /// Fewest tokens for which a prefix is pulled.
    pub(crate) pull_from_tokens: u32,
}

/// One side of a plan: a worker and its terms.
pub(crate) struct Side<'a> {
    pub(crate) at: u32,
    pub(crate) worker: &'a WorkerView,
    pub(crate) facts: Facts,
    pub(crate) line: Line,
    pub(crate) terms: Terms,
    pub(crate) cached: u64,
    pub(crate) pull: Option<(WorkerSlot, u64)>,
}

/// A plan, and where its workers are in the cluster.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Candidate {
    pub(crate) considered: Considered,
    pub(crate) prefill: u32,
    pub(crate) decode: u32,
}

impl<'a> Question<'a, '_> {
    fn worker(&self, at: u32) -> &'a WorkerView {
        &self.cluster.workers[at as usize]
    }

    fn facts(&self, worker: &WorkerView) -> (Facts, Line) {
        let facts = Facts::of(worker, self.people);
        let line = line(
            worker,
            &facts,
            self.request,
            self.cluster.now_ms,
            self.people,
        );
        (facts, line)
    }

    /// The worker that computes the prompt.
    pub(crate) fn prefill_side(&self, at: u32) -> Side<'a> {
        let worker = self.worker(at);
        let (facts, line) = self.facts(worker);
        self.prefill_side_of(at, worker, facts, line)
    }

    fn prefill_side_of(
        &self,
        at: u32,
        worker: &'a WorkerView,
        facts: Facts,
        line: Line,
    ) -> Side<'a> {
        let cached = self.request.cached_on(worker.slot);
        let with = |there: u64, pull_ms: f64| {
            let prefill_ms = first::prefill_ms(worker, &facts, self.request, there);
            Terms {
                weight: self.people.weights.ttft[self.request.class.index()],
                wait_ms: first::wait_ms(worker, line.ahead_ms),
                pull_ms,
                prefill_ms,
                queued_ms: queued_ms(&line, prefill_ms),
                others_stretch_ms: stretch::chunks_stretch_ms(
                    worker,
                    &facts,
                    self.request,
                    there,
                    self.people,
                ),
                ..Terms::default()
            }
        };
        let mut terms = with(cached, 0.0);
        let mut pull = None;
        if let Some((source, held)) = self.holder
            && held >= cached + u64::from(self.pull_from_tokens)
            && worker.abilities.prefix_pull
            && source.digest == worker.digest
            && source.abilities.pairing == worker.abilities.pairing
        {
            let path = Path::between(&source.abilities, &worker.abilities);
            let rate = self.cluster.transfers.rate(source.slot, worker.slot, path);
            let pulled = with(held, first::pull_ms(worker, rate, held - cached));
            if pulled.total_ms() < terms.total_ms() {
                terms = pulled;
                pull = Some((source.slot, held - cached));
            }
        }
        Side {
            at,
            worker,
            facts,
            line,
            terms,
            cached,
            pull,
        }
    }

    /// What the output costs on a worker. `chunks_ms`: prompts computed there
    /// beside it.
    fn add_decode(&self, terms: &mut Terms, worker: &WorkerView, facts: &Facts, chunks_ms: f64) {
        let (request, people) = (self.request, self.people);
        terms.decode_wait_ms = first::decode_wait_ms(worker, facts, request);
        terms.own_stretch_ms += stretch::own_stretch_ms(worker, facts, request, people, chunks_ms);
        terms.others_stretch_ms += stretch::joining_stretch_ms(worker, facts, request, people);
        terms.recompute_ms += room::recompute_ms(worker, facts, request, people);
    }

    /// The worker that produces the output, for another's prefill.
    pub(crate) fn decode_side(&self, at: u32) -> Side<'a> {
        let worker = self.worker(at);
        let (facts, line) = self.facts(worker);
        let mut terms = Terms::default();
        self.add_decode(&mut terms, worker, &facts, line.ahead_ms + line.behind_ms);
        Side {
            at,
            worker,
            facts,
            line,
            terms,
            cached: 0,
            pull: None,
        }
    }

    /// What a decode side costs for the choice of the best: its terms, and of
    /// the pair term what does not depend on the partner.
    pub(crate) fn decode_cost(&self, side: &Side<'_>) -> f64 {
        let worker = side.worker;
        let missing = self
            .request
            .sequence()
            .saturating_sub(self.request.cached_on(worker.slot));
        let late = if worker.abilities.streamed_hand_off {
            missing.min(u64::from(worker.step.saturating_chunk))
        } else {
            missing
        };
        let gap =
            side.terms.decode_wait_ms + first::pull_ms(worker, Path::SharedMemory.prior(), late);
        let gap = stretch::gap_ms(worker, &side.facts, self.request, self.people, gap);
        side.terms.total_ms() + gap
    }

    /// All of it on one worker.
    pub(crate) fn whole(&self, at: u32) -> Candidate {
        let side = self.prefill_side(at);
        let mut terms = side.terms;
        self.add_decode(&mut terms, side.worker, &side.facts, side.line.behind_ms);
        if terms.decode_wait_ms > 0.0 {
            let gap = terms.decode_wait_ms;
            terms.gap_ms =
                stretch::gap_ms(side.worker, &side.facts, self.request, self.people, gap);
        }
        let plan = Plan::Whole {
            worker: side.worker.slot,
            source: side.pull.map(|(source, _)| source),
        };
        candidate(plan, terms, &side, at)
    }

    /// Prompt on one worker, output on another; `None` where they cannot
    /// exchange KV.
    pub(crate) fn split(&self, p: &Side<'_>, d: &Side<'_>) -> Option<Candidate> {
        if !pairs(p.worker, d.worker) {
            return None;
        }
        let path = Path::between(&p.worker.abilities, &d.worker.abilities);
        let rate = self
            .cluster
            .transfers
            .rate(p.worker.slot, d.worker.slot, path);
        let (request, people) = (self.request, self.people);
        let prefill_ms = p.terms.prefill_ms;
        let mut terms = p.terms;
        terms.transfer_ms =
            first::transfer_ms(p.worker, &p.facts, d.worker, request, rate, prefill_ms);
        terms.decode_wait_ms = d.terms.decode_wait_ms;
        terms.own_stretch_ms = d.terms.own_stretch_ms;
        terms.others_stretch_ms += d.terms.others_stretch_ms;
        terms.recompute_ms = d.terms.recompute_ms;
        if p.worker.abilities.prefill_emits_first_token {
            let gap = terms.transfer_ms + terms.decode_wait_ms;
            terms.gap_ms = stretch::gap_ms(d.worker, &d.facts, request, people, gap);
        } else {
            // The first token is a decode step after the KV is there.
            terms.first_from_decode = true;
            terms.decode_wait_ms += d.facts.step_ms;
        }
        let plan = Plan::Split {
            prefill: p.worker.slot,
            decode: d.worker.slot,
            source: p.pull.map(|(source, _)| source),
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
