//! Why generations went where they went: the last ones, for `explain`.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::{Mutex, MutexGuard, PoisonError},
};

use kvmesh_scheduler::{Considered, FirstToken, Plan};
use kvmesh_session::{GenerationId, WorkerIndex};
use kvmesh_wire::v1;

/// Spans that are kept of a generation, on average: some 150 bytes each. A prompt of
/// many chunks has some hundred, most have less than ten.
const SPANS_OF_ONE: usize = 16;
/// Spans that are kept however few generations are: those of the longest prompt.
const LEAST_SPANS: usize = 2_048;

/// One choice, as it was made: what people read of it is made when they ask.
#[derive(Clone)]
pub(super) struct Decided {
    /// The attempt that it made.
    pub(super) attempt: u32,
    /// When, in ms since the request's arrival.
    pub(super) at_ms: f64,
    /// Name of the policy.
    pub(super) policy: &'static str,
    /// What was chosen.
    pub(super) chosen: Plan,
    /// The best plans, each with its workers: prefill, decode, prefix.
    pub(super) plans: Vec<(Considered, [Option<WorkerIndex>; 3])>,
    /// Plans weighed.
    pub(super) weighed: u32,
    /// Plans that tied.
    pub(super) tied: u32,
    /// What admission predicted of the time until its prompt starts, ms.
    pub(super) predicted_wait_ms: f64,
    /// The wait in the router before it.
    pub(super) waited: v1::RouterWait,
    /// What was predicted ...
    pub(super) predicted: v1::PhaseTimes,
    /// ... and what came of it.
    pub(super) actual: Option<v1::PhaseTimes>,
}

impl Decided {
    /// What its first token took beside what was modelled of it. `None` where
    /// its plan was not kept.
    fn first_token(&self, actual: &v1::PhaseTimes) -> Option<(WorkerIndex, FirstToken)> {
        let mut plans = self.plans.iter();
        let (considered, workers) = plans.find(|(one, _)| one.plan == self.chosen)?;
        let [prefill, decode, _] = *workers;
        let seen = FirstToken {
            ttft_ms: actual.ttft_ms,
            wait_ms: actual.wait_ms,
            modelled_ms: considered.terms.modelled_ms(),
        };
        Some((prefill.or(decode)?, seen))
    }
}

/// What is known of one generation.
#[derive(Clone, Default)]
struct Known {
    decisions: Vec<Decided>,
    finished: Option<v1::Finished>,
    /// Its number among those that ended with spans; 0: it has none.
    traced: u64,
}

/// A bounded memory of decisions; the oldest generation goes first. Where there are too
/// many spans, those go first that have been here for longest.
pub(super) struct Decisions {
    most: usize,
    most_spans: usize,
    /// Share of generations whose spans are wanted here.
    traces: f64,
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    order: VecDeque<GenerationId>,
    by_id: HashMap<GenerationId, Known>,
    /// Those with spans, by their numbers.
    traced: BTreeMap<u64, GenerationId>,
    last_traced: u64,
    spans: usize,
}

impl Kept {
    fn drop_oldest(&mut self) {
        let oldest = self.order.pop_front();
        if let Some(mut known) = oldest.and_then(|id| self.by_id.remove(&id)) {
            self.drop_spans(&mut known);
        }
    }

    fn drop_spans(&mut self, known: &mut Known) {
        self.traced.remove(&std::mem::take(&mut known.traced));
        if let Some(finished) = &mut known.finished {
            self.spans -= std::mem::take(&mut finished.trace).len();
        }
    }

    /// Notes an end. False: that generation is not kept.
    fn finish(&mut self, id: GenerationId, finished: &v1::Finished, most_spans: usize) -> bool {
        let Some(mut known) = self.by_id.remove(&id) else {
            return false;
        };
        self.drop_spans(&mut known);
        known.finished = Some(finished.clone());
        if !finished.trace.is_empty() {
            self.last_traced += 1;
            known.traced = self.last_traced;
            self.traced.insert(known.traced, id);
            self.spans += finished.trace.len();
        }
        self.by_id.insert(id, known);
        while self.spans > most_spans
            && let Some((_, first)) = self.traced.pop_first()
        {
            if let Some(mut known) = self.by_id.remove(&first) {
                self.drop_spans(&mut known);
                self.by_id.insert(first, known);
            }
        }
        true
    }
}

impl Decisions {
    /// Keeps decisions of the last `most` generations, and of a share of all generations
    /// the spans, too.
    pub(super) fn new(most: usize, traces: f64) -> Self {
        Self {
            most,
            most_spans: most.saturating_mul(SPANS_OF_ONE).max(LEAST_SPANS),
            traces,
            kept: Mutex::default(),
        }
    }

    /// Whether workers are asked for this one's spans for the sake of `explain`: every
    /// router says the same of it.
    pub(super) fn wants_spans(&self, id: GenerationId) -> bool {
        let [.., a, b, c, d] = id.0;
        let drawn = f64::from(u32::from_le_bytes([a, b, c, d])) / (f64::from(u32::MAX) + 1.0);
        self.most > 0 && drawn < self.traces
    }

    // Order and map may differ by one entry after a panic; both stay bounded.
    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a decision.
    pub(super) fn decided(&self, id: GenerationId, decision: Decided) {
        if self.most == 0 {
            return;
        }
        let mut kept = self.lock();
        if !kept.by_id.contains_key(&id) {
            if kept.order.len() >= self.most {
                kept.drop_oldest();
            }
            kept.order.push_back(id);
        }
        kept.by_id.entry(id).or_default().decisions.push(decision);
    }

    /// Adds what came of it: the end, and what the attempt took whose first
    /// token was the first. Returns what that teaches of the worker that
    /// computed its prompt.
    pub(super) fn finished(
        &self,
        id: GenerationId,
        finished: &v1::Finished,
        measured: Option<(u32, v1::PhaseTimes)>,
    ) -> Option<(WorkerIndex, FirstToken)> {
        let mut kept = self.lock();
        if !kept.finish(id, finished, self.most_spans) {
            return None;
        }
        let (attempt, actual) = measured?;
        let known = kept.by_id.get_mut(&id)?;
        let decisions = known.decisions.iter_mut();
        let decision = decisions.into_iter().find(|one| one.attempt == attempt)?;
        decision.actual = Some(actual);
        decision.first_token(&actual)
    }

    /// What is known of a generation; `name` gives a worker's id.
    pub(super) fn explain(
        &self,
        id: GenerationId,
        name: impl Fn(WorkerIndex) -> String,
    ) -> Option<v1::ExplainResponse> {
        let known = self.lock().by_id.get(&id).cloned()?;
        let decisions = known.decisions.iter();
        let first = known.decisions.first();
        Some(v1::ExplainResponse {
            predicted_wait_ms: first.map_or(0.0, |one| one.predicted_wait_ms),
            decisions: decisions.map(|one| told(one, &name)).collect(),
            finished: known.finished,
            waiting: None,
        })
    }
}

fn told(decision: &Decided, name: &impl Fn(WorkerIndex) -> String) -> v1::Decision {
    let plans = decision.plans.iter().map(|(considered, workers)| {
        let [prefill, decode, prefix] = workers.map(|worker| worker.map(name).unwrap_or_default());
        let terms = considered.terms.rows().into_iter();
        v1::PlanCost {
            prefill_worker: prefill,
            decode_worker: decode,
            prefix_worker: prefix,
            total_ms: considered.terms.total_ms(),
            terms: terms
                .map(|(name, ms)| v1::CostTerm {
                    name: name.to_owned(),
                    ms,
                })
                .collect(),
            ttft_ms: considered.terms.ttft_ms(),
            cached_tokens: considered.cached_tokens,
            pulled_tokens: considered.pulled_tokens,
        }
    });
    let chosen = decision
        .plans
        .iter()
        .position(|(considered, _)| considered.plan == decision.chosen);
    v1::Decision {
        attempt: decision.attempt,
        at_ms: decision.at_ms,
        policy: decision.policy.to_owned(),
        plans: plans.collect(),
        chosen: chosen.and_then(|at| u32::try_from(at).ok()).unwrap_or(0),
        predicted_ttft_ms: decision.predicted.ttft_ms,
        actual_ttft_ms: decision.actual.map_or(0.0, |actual| actual.ttft_ms),
        predicted: Some(decision.predicted),
        actual: decision.actual,
        weighed: decision.weighed,
        tied: decision.tied,
        waited: Some(decision.waited.clone()),
    }
}

#[cfg(test)]
mod tests {
    use kvmesh_kv_index::WorkerSlot;
    use kvmesh_scheduler::Terms;

    use super::*;

    fn decided(attempt: u32) -> Decided {
        Decided {
            attempt,
            at_ms: 1.0,
            policy: "cost",
            chosen: Plan::Whole {
                worker: WorkerSlot(0),
                source: None,
            },
            plans: Vec::new(),
            weighed: 1,
            tied: 1,
            predicted_wait_ms: 0.0,
            waited: v1::RouterWait::default(),
            predicted: v1::PhaseTimes::default(),
            actual: None,
        }
    }

    #[test]
    fn the_oldest_generation_goes_first() {
        let decisions = Decisions::new(2, 0.0);
        let ids: Vec<_> = (0..3).map(|n| GenerationId([n; 16])).collect();
        for id in &ids {
            decisions.decided(*id, decided(1));
            decisions.decided(*id, decided(2));
        }
        let explain = |id| decisions.explain(id, |_| String::new());
        assert!(explain(ids[0]).is_none());
        assert_eq!(explain(ids[2]).map(|known| known.decisions.len()), Some(2));
    }

    #[test]
    fn spans_are_bounded_by_their_number_and_those_of_the_last_ends_stay() {
        let decisions = Decisions::new(4, 0.0);
        let ids: Vec<_> = (0..6).map(|n| GenerationId([n; 16])).collect();
        let ended = v1::Finished {
            trace: vec![v1::TraceSpan::default(); LEAST_SPANS / 2],
            ..v1::Finished::default()
        };
        let spans = |id: &GenerationId| {
            let known = decisions.explain(*id, |_| String::new())?;
            known.finished.map(|finished| finished.trace.len())
        };
        for id in &ids[..4] {
            decisions.decided(*id, decided(1));
        }
        // The newest ends first, and one of them twice.
        for at in [3, 2, 2, 0] {
            decisions.finished(ids[at], &ended, None);
        }
        let known: Vec<_> = ids[..4].iter().map(spans).collect();
        let all = Some(LEAST_SPANS / 2);
        assert_eq!(known, [all, None, all, Some(0)]);
        // What goes with its generation makes room.
        decisions.decided(ids[4], decided(1));
        decisions.finished(ids[4], &ended, None);
        assert_eq!(
            (spans(&ids[0]), spans(&ids[2]), spans(&ids[4])),
            (None, all, all)
        );
        decisions.finished(ids[5], &ended, None);
        assert_eq!(spans(&ids[5]), None, "nothing was decided of it");
    }

    #[test]
    fn a_share_of_generations_is_traced_and_the_same_ones_by_everyone() {
        let id = |n: u32| {
            let mut id = [7; 16];
            id[12..].copy_from_slice(&n.to_le_bytes());
            GenerationId(id)
        };
        let taken = |share| {
            let decisions = Decisions::new(1, share);
            let all = (0..1_000).map(|n| (u32::MAX / 1_000 + 1) * n);
            all.filter(|n| decisions.wants_spans(id(*n))).count()
        };
        assert_eq!([0.0, 0.25, 1.0].map(taken), [0, 250, 1_000]);
        assert!(Decisions::new(1, 1.0).wants_spans(id(u32::MAX)));
        assert!(
            !Decisions::new(0, 1.0).wants_spans(id(0)),
            "nothing is kept"
        );
    }

    #[test]
    fn a_first_token_teaches_of_the_worker_that_computed_its_prompt() {
        let decisions = Decisions::new(1, 0.0);
        let id = GenerationId([1; 16]);
        let terms = Terms {
            wait_ms: 3.0,
            prefill_ms: 40.0,
            relay_ms: 9.0,
            ..Terms::default()
        };
        let chosen = Plan::Split {
            prefill: WorkerSlot(4),
            decode: WorkerSlot(5),
            source: None,
        };
        let considered = Considered {
            plan: chosen,
            terms,
            cached_tokens: 0,
            pulled_tokens: 0,
        };
        let workers = [Some(WorkerIndex(7)), Some(WorkerIndex(8)), None];
        decisions.decided(
            id,
            Decided {
                chosen,
                plans: vec![(considered, workers)],
                ..decided(1)
            },
        );
        let took = v1::PhaseTimes {
            ttft_ms: 55.0,
            wait_ms: 1.0,
            ..v1::PhaseTimes::default()
        };
        let taught = decisions.finished(id, &v1::Finished::default(), Some((1, took)));
        let seen = FirstToken {
            ttft_ms: 55.0,
            wait_ms: 1.0,
            modelled_ms: 40.0,
        };
        assert_eq!(taught, Some((WorkerIndex(7), seen)));
    }

    #[test]
    fn what_happened_is_told_of_the_attempt_that_it_happened_to() {
        let decisions = Decisions::new(2, 0.0);
        let id = GenerationId([1; 16]);
        decisions.decided(id, decided(1));
        decisions.decided(id, decided(2));
        let took = v1::PhaseTimes {
            ttft_ms: 7.0,
            ..v1::PhaseTimes::default()
        };
        decisions.finished(id, &v1::Finished::default(), Some((2, took)));
        let known = decisions.explain(id, |_| String::new());
        let actual: Vec<f64> = known
            .iter()
            .flat_map(|known| &known.decisions)
            .map(|decision| decision.actual_ttft_ms)
            .collect();
        assert_eq!(actual, [0.0, 7.0]);
    }
}
