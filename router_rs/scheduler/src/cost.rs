//! The policy that counts added delay.

use crate::deadline::{ClassTargets, Weights};
use crate::facts::Table;
use crate::floor::Lows;
use crate::plan::{Considered, Decision, NoPlan, Plan, Policy};
use crate::request::RequestView;
use crate::sides::{Candidate, Question};
use crate::survey::{LocalPrefill, Survey};
use crate::terms::{Asked, People, work};
use crate::weigh::{COUNTED, Plans, Weighed};
use crate::worker::Cluster;

/// Settings of [`KvCost`].
#[derive(Debug, Clone, PartialEq)]
pub struct CostSettings {
    /// When decode workers compute prompts.
    pub local_prefill: LocalPrefill,
    /// Best workers of each side, of each kind of KV, that are paired (K); as many
    /// workers that do all of it are weighed against them.
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
            pull_from_tokens: 32,
            stretch: 0.07,
            beyond_target: 4.0,
            targets: ClassTargets::default(),
            plans_kept: 8,
        }
    }
}

impl CostSettings {
    /// Up to which cost plans tie with one that costs so much.
    pub(crate) fn tie_limit_ms(&self, best_ms: f64) -> f64 {
        best_ms + self.tie_ms.max(best_ms * self.tie_share)
    }

    pub(crate) fn people(&self) -> People {
        People {
            stretch: self.stretch,
            beyond_target: self.beyond_target,
            weights: Weights::of(&self.targets),
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
    lows: Lows,
    order: Vec<Weighed>,
    /// Whether those are ruled out that cost too much in any case. The choice
    /// is the same; only a test goes without.
    prune: bool,
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
            lows: Lows::default(),
            order: Vec::new(),
            prune: true,
        }
    }

    /// Its settings.
    pub fn settings(&self) -> &CostSettings {
        &self.settings
    }

    /// Weighs the plans of a request, and works with them: the cheapest first.
    /// `all`: also those that neither tie with the best nor are kept.
    pub(crate) fn weigh<T>(
        &mut self,
        table: &Table,
        cluster: &Cluster<'_>,
        request: &RequestView<'_>,
        all: bool,
        work: impl FnOnce(&Plans<'_, '_>) -> T,
    ) -> Result<T, NoPlan> {
        self.survey
            .look(cluster, table, request, self.settings.local_prefill)?;
        let keep = self.settings.best_of_side.max(1);
        let question = Question {
            cluster,
            table,
            request,
            asked: Asked::of(request, cluster.now_ms),
            people: &self.people,
            holders: &self.survey.holders,
            relay_least_ms: self.survey.relay_least_ms,
            tiered: request.is_tiered(),
            pull_from_tokens: self.settings.pull_from_tokens,
        };
        if self.prune && self.survey.longest() > keep {
            let listed = self.survey.blocks(cluster.workers.len());
            self.lows.count(&question, &listed);
        } else {
            // As many as are kept anyway: nobody asks for floors.
            self.lows.clear();
        }
        let mut plans = Plans {
            question,
            lows: &self.lows,
            keep,
            settings: &self.settings,
            mix: tie_break(cluster.router, request.id) as u32,
            prune: self.prune,
            all: all || !self.prune,
            ruled_out: 0,
            wholes: Vec::with_capacity(COUNTED),
            prefills: Vec::with_capacity(COUNTED),
            decodes: Vec::with_capacity(COUNTED),
            order: std::mem::take(&mut self.order),
        };
        plans.order.clear();
        plans.whole(&self.survey.whole);
        if !self.survey.prefill.is_empty() {
            plans.pair(&self.survey, plans.keep);
            if plans.len() == 0 {
                // The best of each side may all be of kinds that do not pair.
                plans.pair(&self.survey, usize::MAX);
            }
        }
        if plans.order.is_empty() {
            // For these decode workers there is no prefill worker: they do all.
            plans.whole(&self.survey.decode);
        }
        plans.order.sort_unstable_by(|a, b| {
            let total = a.total_ms.total_cmp(&b.total_ms);
            total.then_with(|| a.slots.cmp(&b.slots))
        });
        let result = work(&plans);
        self.order = plans.order;
        Ok(result)
    }

    /// The decision among plans in their order.
    pub(crate) fn decide(
        settings: &CostSettings,
        plans: &Plans<'_, '_>,
        cluster: &Cluster<'_>,
        request: &RequestView<'_>,
    ) -> Option<Decision> {
        let limit = settings.tie_limit_ms(plans.order.first()?.total_ms);
        let tied = plans
            .order
            .partition_point(|plan| plan.total_ms <= limit)
            .max(1);
        let at = (tie_break(cluster.router, request.id) % tied as u64) as usize;
        let mut decision = decision(cluster, request, &plans.candidate(at)?);
        decision.tied = u32::try_from(tied).unwrap_or(u32::MAX);
        Some(plans.keep_considered(settings, decision, at))
    }
}

impl Policy for KvCost {
    fn name(&self) -> &'static str {
        "cost"
    }

    fn local_prefill(&self) -> LocalPrefill {
        self.settings.local_prefill
    }

    fn choose(
        &mut self,
        cluster: &Cluster<'_>,
        request: &RequestView<'_>,
    ) -> Result<Decision, NoPlan> {
        let settings = self.settings.clone();
        let decision = cluster.with_table(|table| {
            self.weigh(table, cluster, request, false, |plans| {
                Self::decide(&settings, plans, cluster, request)
            })
        })?;
        decision.ok_or(NoPlan::NoPair)
    }

    fn explain(
        &self,
        cluster: &Cluster<'_>,
        request: &RequestView<'_>,
    ) -> Result<Vec<Considered>, NoPlan> {
        let mut fresh = Self::new(self.settings.clone());
        cluster.with_table(|table| {
            fresh.weigh(table, cluster, request, true, |plans| {
                let all = 0..plans.order.len();
                all.filter_map(|at| Some(plans.candidate(at)?.considered))
                    .collect()
            })
        })
    }
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
    let running_ms = (prefill.load.step_ends_ms - cluster.now_ms).max(0.0);
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
        queued_ms: (chosen.terms.wait_ms - running_ms).max(0.0),
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

#[cfg(test)]
#[path = "cost_tests.rs"]
mod tests;
