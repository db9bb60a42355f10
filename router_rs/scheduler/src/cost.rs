//! The policy that counts added delay.

use crate::best::Best;
use crate::deadline::{ClassTargets, Weights};
use crate::facts::Table;
use crate::floor::Lows;
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
            stretch: 0.05,
            beyond_target: 4.0,
            targets: ClassTargets::default(),
            plans_kept: 8,
        }
    }
}

impl CostSettings {
    /// Up to which cost plans tie with one that costs so much.
    fn tie_limit_ms(&self, best_ms: f64) -> f64 {
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

/// Workers of a side that are seldom more than are counted in full.
const COUNTED: usize = 16;

/// A plan that was weighed: what it costs, and its workers among those kept.
#[derive(Debug, Clone, Copy)]
struct Weighed {
    total_ms: f64,
    /// Slots, to order equal ones.
    slots: (u32, u32),
    sides: Sides,
}

#[derive(Debug, Clone, Copy)]
enum Sides {
    /// Place among those that were counted.
    Whole(u32),
    /// The same of both sides.
    Split(u32, u32),
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
            question.floors(&mut self.lows);
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

/// The plans of one request.
pub(crate) struct Plans<'a, 'r> {
    question: Question<'a, 'r>,
    lows: &'a Lows,
    settings: &'a CostSettings,
    keep: usize,
    mix: u32,
    prune: bool,
    all: bool,
    /// Pairs that neither tie with the best nor are kept.
    ruled_out: usize,
    /// Those that were counted in full.
    wholes: Vec<Candidate>,
    prefills: Vec<Side<'a>>,
    decodes: Vec<Side<'a>>,
    order: Vec<Weighed>,
}

impl Plans<'_, '_> {
    /// Adds the best of those that do all of it.
    fn whole(&mut self, of: &[u32]) {
        let mut weighed = std::mem::take(&mut self.wholes);
        let question = &self.question;
        let cost = |at| {
            let candidate = question.whole(at);
            let total_ms = candidate.considered.terms.total_ms();
            weighed.push(candidate);
            total_ms
        };
        let best = self.best(of, self.keep, &self.lows.whole, cost);
        for (total_ms, at) in best {
            let slot = question.table.rows[at as usize].slot;
            if let Some(place) = weighed.iter().position(|one| one.decode == at) {
                self.order.push(Weighed {
                    total_ms,
                    slots: (slot, slot),
                    sides: Sides::Whole(place as u32),
                });
            }
        }
        self.wholes = weighed;
    }

    /// Adds the pairs of the best of each side that can exchange KV: of each kind
    /// of KV by itself, since the best of one kind says nothing of another.
    fn pair(&mut self, survey: &Survey, keep: usize) {
        self.prefills.clear();
        self.decodes.clear();
        let rows = &self.question.table.rows;
        let kind = |at: &u32| rows[*at as usize].kind;
        let mut all = survey.prefill.iter().chain(&survey.decode).map(kind);
        let first = all.next();
        if all.all(|other| Some(other) == first) {
            self.pair_kind(&survey.prefill, &survey.decode, keep);
            return;
        }
        let mut kinds: Vec<u32> = survey.prefill.iter().map(kind).collect();
        kinds.sort_unstable();
        kinds.dedup();
        for one in kinds {
            let of = |all: &[u32]| -> Vec<u32> {
                let of_kind = all.iter().copied().filter(|at| kind(at) == one);
                of_kind.collect()
            };
            self.pair_kind(&of(&survey.prefill), &of(&survey.decode), keep);
        }
    }

    /// The same of workers of one kind.
    fn pair_kind(&mut self, prefill: &[u32], decode: &[u32], keep: usize) {
        let question = &self.question;
        let (mut prefills, mut decodes) = (
            std::mem::take(&mut self.prefills),
            std::mem::take(&mut self.decodes),
        );
        let cost = |at| {
            let side = question.prefill_side(at);
            prefills.push(side);
            side.total_ms
        };
        let best_prefills = self.best(prefill, keep, &self.lows.prefill, cost);
        let cost = |at| {
            let side = question.decode_side(at);
            decodes.push(side);
            question.decode_cost(&side)
        };
        let best_decodes = self.best(decode, keep, &self.lows.decode, cost);
        let (best_prefills, best_decodes) = (
            places(&prefills, &best_prefills),
            places(&decodes, &best_decodes),
        );
        let mut bar = Bar::new(self.settings, &self.order);
        for i in &best_prefills {
            let p = &prefills[*i as usize];
            for j in &best_decodes {
                let d = &decodes[*j as usize];
                if !self.all && p.total_ms + d.total_ms > bar.height_ms {
                    self.ruled_out += usize::from(question.pairs(p, d));
                    continue;
                }
                if let Some(total_ms) = question.split_cost(p, d) {
                    bar.add(total_ms);
                    self.order.push(Weighed {
                        total_ms,
                        slots: (p.facts.slot, d.facts.slot),
                        sides: Sides::Split(*i, *j),
                    });
                }
            }
        }
        (self.prefills, self.decodes) = (prefills, decodes);
    }

    /// The best of these by their place in the cluster, cheapest first.
    fn best(
        &self,
        of: &[u32],
        keep: usize,
        floors: &[f64],
        mut cost: impl FnMut(u32) -> f64,
    ) -> Vec<(f64, u32)> {
        let mut best = Best::new(keep, self.mix, of.len());
        if self.prune {
            best.choose(of, |at| floors[at as usize], cost);
        } else {
            of.iter().for_each(|at| best.offer(cost(*at), *at));
        }
        best.kept
    }

    /// How many there are, with those that were ruled out.
    pub(crate) fn len(&self) -> usize {
        self.order.len() + self.ruled_out
    }

    /// Notes in a decision for one of them what it was chosen from.
    pub(crate) fn keep_considered(
        &self,
        settings: &CostSettings,
        mut decision: Decision,
        at: usize,
    ) -> Decision {
        decision.weighed = u32::try_from(self.len()).unwrap_or(u32::MAX);
        let kept = settings.plans_kept.min(self.order.len());
        let best = (0..kept).filter_map(|at| self.candidate(at));
        decision.considered = Vec::with_capacity(kept + 1);
        decision
            .considered
            .extend(best.map(|candidate| candidate.considered));
        if kept > 0 && at >= kept {
            decision.considered.push(decision.chosen);
        }
        decision
    }

    /// A plan in full, by its place in the order.
    pub(crate) fn candidate(&self, at: usize) -> Option<Candidate> {
        match self.order.get(at)?.sides {
            Sides::Whole(at) => Some(self.wholes[at as usize]),
            Sides::Split(p, d) => {
                let (p, d) = (&self.prefills[p as usize], &self.decodes[d as usize]);
                self.question.split(p, d)
            }
        }
    }
}

/// Where these workers are among the sides that were counted.
fn places(sides: &[Side<'_>], of: &[(f64, u32)]) -> Vec<u32> {
    let place = |(_, at): &(f64, u32)| sides.iter().position(|side| side.at == *at);
    of.iter()
        .filter_map(place)
        .map(|place| place as u32)
        .collect()
}

/// What a plan may cost at most to tie with the best or to be kept.
struct Bar<'a> {
    settings: &'a CostSettings,
    /// The cheapest so far, as many as are kept, cheapest first.
    cheapest: Vec<f64>,
    height_ms: f64,
}

impl<'a> Bar<'a> {
    fn new(settings: &'a CostSettings, weighed: &[Weighed]) -> Self {
        let mut bar = Self {
            settings,
            cheapest: Vec::with_capacity(settings.plans_kept.clamp(1, 64) + 1),
            height_ms: f64::INFINITY,
        };
        weighed.iter().for_each(|plan| bar.add(plan.total_ms));
        bar
    }

    fn add(&mut self, total_ms: f64) {
        let kept = self.settings.plans_kept.max(1);
        if total_ms > self.height_ms {
            return;
        }
        let place = self.cheapest.partition_point(|other| *other <= total_ms);
        self.cheapest.insert(place, total_ms);
        self.cheapest.truncate(kept);
        if self.cheapest.len() == kept {
            let limit = self.settings.tie_limit_ms(self.cheapest[0]);
            self.height_ms = limit.max(self.cheapest[kept - 1]);
        }
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

#[cfg(test)]
#[path = "cost_tests.rs"]
mod tests;
