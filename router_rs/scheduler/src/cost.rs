//! The policy that counts added delay.

use crate::deadline::{ClassTargets, Weights};
use crate::facts::Table;
use crate::plan::{Considered, Decision, NoPlan, Plan, Policy};
use crate::request::RequestView;
use crate::sides::{Candidate, Question, Side};
use crate::survey::{LocalPrefill, Survey};
use crate::terms::{Asked, People, work};
use crate::worker::Cluster;

/// Settings of [`KvCost`].
#[derive(Debug, Clone, PartialEq)]
pub struct CostSettings {
    /// When decode workers compute prompts.
    pub local_prefill: LocalPrefill,
    /// Best workers of each side that are paired (K); as many workers that do
    /// all of it are weighed against them.
    pub best_of_side: usize,
    /// Plans this close to the best tie, in ms ...
    pub tie_ms: f64,
    /// ... or as a share of its cost, whichever is more.
    pub tie_share: f64,
    /// Fewest tokens for which a prefix is pulled from another worker.
    pub pull_from_tokens: u32,
    /// What a millisecond of stretched streaming counts against one of waiting
    /// for the first token (ε).
    pub stretch: f64,
    /// How many times more it counts beyond a stream's ITL target (κ).
    pub beyond_target: f64,
    /// Targets of the classes: their quotients are the weights of the rows.
    pub targets: ClassTargets,
    /// Plans of each decision that are kept for `explain`, the best first. 0:
    /// none.
    pub plans_kept: usize,
}

impl Default for CostSettings {
    fn default() -> Self {
        Self {
            local_prefill: LocalPrefill::default(),
            best_of_side: 8,
            tie_ms: 2.0,
            tie_share: 0.03,
            pull_from_tokens: 128,
            stretch: 0.1,
            beyond_target: 4.0,
            targets: ClassTargets::default(),
            plans_kept: 8,
        }
    }
}

impl CostSettings {
    pub(crate) fn people(&self) -> People {
        People {
            stretch: self.stretch,
            beyond_target: self.beyond_target,
            weights: Weights::of(&self.targets),
            targets: self.targets,
        }
    }
}

/// Chooses the plan that adds the least delay, over everyone, in
/// milliseconds. J = prefill term + decode term + pair term.
#[derive(Debug, Clone)]
pub struct KvCost {
    settings: CostSettings,
    people: People,
    survey: Survey,
    plans: Vec<Candidate>,
    order: Vec<(f64, u32)>,
}

impl Default for KvCost {
    fn default() -> Self {
        Self::new(CostSettings::default())
    }
}

impl KvCost {
    /// The policy with these settings.
    pub fn new(settings: CostSettings) -> Self {
        Self {
            people: settings.people(),
            settings,
            survey: Survey::default(),
            plans: Vec::new(),
            order: Vec::new(),
        }
    }

    /// Weighs the plans of a request into `self.plans`, and their order, the
    /// cheapest first, into `self.order`.
    fn weigh(&mut self, cluster: &Cluster<'_>, request: &RequestView<'_>) -> Result<(), NoPlan> {
        cluster.with_table(|table| self.weigh_by(table, cluster, request))
    }

    fn weigh_by(
        &mut self,
        table: &Table,
        cluster: &Cluster<'_>,
        request: &RequestView<'_>,
    ) -> Result<(), NoPlan> {
        self.plans.clear();
        self.survey
            .look(cluster, table, request, self.settings.local_prefill)?;
        let question = Question {
            cluster,
            table,
            request,
            asked: Asked::of(request, cluster.now_ms),
            people: &self.people,
            holder: self.survey.holder,
            pull_from_tokens: self.settings.pull_from_tokens,
        };
        let keep = self.settings.best_of_side.max(1);
        let mix = tie_break(cluster.router, request.id) as u32;
        whole(&question, &self.survey.whole, keep, mix, &mut self.plans);
        if !self.survey.prefill.is_empty() {
            pair(&question, &self.survey, keep, mix, &mut self.plans);
            if self.plans.is_empty() {
                // The best of each side may all be of kinds that do not pair.
                let all = usize::MAX;
                pair(&question, &self.survey, all, mix, &mut self.plans);
            }
        }
        if self.plans.is_empty() {
            // For these decode workers there is no prefill worker: they do all.
            whole(&question, &self.survey.decode, keep, mix, &mut self.plans);
        }
        self.order.clear();
        let totals = self.plans.iter().enumerate();
        self.order
            .extend(totals.map(|(at, plan)| (plan.considered.terms.total_ms(), at as u32)));
        let plans = &self.plans;
        let plan = |at: u32| plans[at as usize].considered.plan;
        self.order
            .sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then_with(|| plan(a.1).cmp(&plan(b.1))));
        Ok(())
    }

    fn plan(&self, at: usize) -> &Candidate {
        &self.plans[self.order[at].1 as usize]
    }
}

impl Policy for KvCost {
    fn name(&self) -> &'static str {
        "cost"
    }

    fn choose(
        &mut self,
        cluster: &Cluster<'_>,
        request: &RequestView<'_>,
    ) -> Result<Decision, NoPlan> {
        self.weigh(cluster, request)?;
        let best = self.order.first().ok_or(NoPlan::NoPair)?.0;
        let limit = best + self.settings.tie_ms.max(best * self.settings.tie_share);
        let tied = self
            .order
            .partition_point(|(total, _)| *total <= limit)
            .max(1);
        let at = (tie_break(cluster.router, request.id) % tied as u64) as usize;
        let mut decision = decision(cluster, request, self.plan(at));
        decision.tied = u32::try_from(tied).unwrap_or(u32::MAX);
        decision.weighed = u32::try_from(self.order.len()).unwrap_or(u32::MAX);
        let kept = self.settings.plans_kept.min(self.order.len());
        let best = (0..kept).map(|at| self.plan(at).considered);
        decision.considered.extend(best);
        if kept > 0 && at >= kept {
            decision.considered.push(decision.chosen);
        }
        Ok(decision)
    }

    fn explain(
        &self,
        cluster: &Cluster<'_>,
        request: &RequestView<'_>,
    ) -> Result<Vec<Considered>, NoPlan> {
        let mut fresh = Self::new(self.settings.clone());
        fresh.weigh(cluster, request)?;
        let all = 0..fresh.order.len();
        Ok(all.map(|at| fresh.plan(at).considered).collect())
    }
}

/// Appends the best of those that do all of it.
fn whole(
    question: &Question<'_, '_>,
    of: &[u32],
    keep: usize,
    mix: u32,
    plans: &mut Vec<Candidate>,
) {
    let kept = best(of, keep, mix, |at| {
        question.whole(at).considered.terms.total_ms()
    });
    plans.extend(kept.iter().map(|at| question.whole(*at)));
}

/// Appends the pairs of the best of each side that can exchange KV.
fn pair(
    question: &Question<'_, '_>,
    survey: &Survey,
    keep: usize,
    mix: u32,
    plans: &mut Vec<Candidate>,
) {
    let prefills = best(&survey.prefill, keep, mix, |at| {
        question.prefill_side(at).terms.total_ms()
    });
    let decodes = best(&survey.decode, keep, mix, |at| {
        question.decode_cost(&question.decode_side(at))
    });
    let prefills: Vec<Side<'_>> = prefills
        .iter()
        .map(|at| question.prefill_side(*at))
        .collect();
    let decodes: Vec<Side<'_>> = decodes.iter().map(|at| question.decode_side(*at)).collect();
    for p in &prefills {
        plans.extend(decodes.iter().filter_map(|d| question.split(p, d)));
    }
}

/// The cheapest `keep` of these, cheapest first. Of those that cost the same,
/// which ones are kept differs from request to request: a crowd of idle workers
/// is not always met at its first eight.
fn best(of: &[u32], keep: usize, mix: u32, cost: impl Fn(u32) -> f64) -> Vec<u32> {
    let order = |a: &(f64, u32), b: &(f64, u32)| {
        a.0.total_cmp(&b.0)
            .then_with(|| (a.1 ^ mix).cmp(&(b.1 ^ mix)))
    };
    let mut kept: Vec<(f64, u32)> = Vec::with_capacity(keep.min(of.len()));
    for &at in of {
        let one = (cost(at), at);
        let full = kept.len() == keep;
        if full && kept.last().is_some_and(|last| order(&one, last).is_ge()) {
            continue;
        }
        if full {
            kept.pop();
        }
        let place = kept.partition_point(|other| order(other, &one).is_lt());
        kept.insert(place, one);
    }
    kept.into_iter().map(|(_, at)| at).collect()
}

/// The decision for a plan, with what it books.
pub(crate) fn decision(
    cluster: &Cluster<'_>,
    request: &RequestView<'_>,
    candidate: &Candidate,
) -> Decision {
    let chosen = candidate.considered;
    let prefill = &cluster.workers[candidate.prefill as usize];
    let decode = &cluster.workers[candidate.decode as usize];
    let work = match chosen.plan {
        Plan::Whole { worker, .. } => vec![(worker, work::whole(decode, request))],
        Plan::Split {
            prefill: p,
            decode: d,
            ..
        } => vec![
            (p, work::prefill(prefill, request)),
            (d, work::decode(decode, request)),
        ],
    };
    Decision {
        start_ms: chosen.terms.wait_ms,
        chosen,
        tied: 1,
        weighed: 1,
        considered: Vec::new(),
        work,
    }
}

/// Hash of (router, request): stated, replayable, and two routers differ.
pub(crate) fn tie_break(router: u64, request: u128) -> u64 {
    let mut value = router;
    for part in [request as u64, (request >> 64) as u64] {
        // splitmix64's finaliser.
        value = (value ^ part).wrapping_add(0x9E37_79B9_7F4A_7C15);
        value = (value ^ (value >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        value ^= value >> 31;
    }
    value
}
