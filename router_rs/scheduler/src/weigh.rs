//! The plans of a request that are weighed: the best of each side, and their pairs.

use crate::best::Best;
use crate::cost::CostSettings;
use crate::floor::Lows;
use crate::plan::Decision;
use crate::sides::{Candidate, Question, Side};
use crate::survey::Survey;

/// Room for the sides that a usual choice counts in full.
pub(crate) const COUNTED: usize = 16;

/// A plan that was weighed: what it costs, and its workers among those kept.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Weighed {
    pub(crate) total_ms: f64,
    /// Slots, to order equal ones.
    pub(crate) slots: (u32, u32),
    sides: Sides,
}

#[derive(Debug, Clone, Copy)]
enum Sides {
    /// Place among those that were counted.
    Whole(u32),
    /// The same of both sides.
    Split(u32, u32),
}

/// The plans of one request.
pub(crate) struct Plans<'a, 'r> {
    pub(crate) question: Question<'a, 'r>,
    /// What each worker costs at least.
    pub(crate) lows: &'a Lows,
    pub(crate) settings: &'a CostSettings,
    /// The best of each side that are paired.
    pub(crate) keep: usize,
    /// Tells equal ones apart.
    pub(crate) mix: u32,
    /// Whether those are ruled out whose floor is too high.
    pub(crate) prune: bool,
    /// Whether pairs are wanted that neither tie with the best nor are kept.
    pub(crate) all: bool,
    /// Pairs that neither tie with the best nor are kept.
    pub(crate) ruled_out: usize,
    /// Those that were counted in full.
    pub(crate) wholes: Vec<Candidate>,
    pub(crate) prefills: Vec<Side<'a>>,
    pub(crate) decodes: Vec<Side<'a>>,
    /// All of them, in the end the cheapest first.
    pub(crate) order: Vec<Weighed>,
}

impl Plans<'_, '_> {
    /// Adds the best of those that do all of it.
    pub(crate) fn whole(&mut self, of: &[u32]) {
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
            let place = weighed.iter().position(|one| one.decode == at);
            debug_assert!(
                place.is_some(),
                "{at} is among the best and was not counted"
            );
            self.order.extend(place.map(|place| Weighed {
                total_ms,
                slots: (slot, slot),
                sides: Sides::Whole(place as u32),
            }));
        }
        self.wholes = weighed;
    }

    /// Adds the pairs of the best of each side that can exchange KV: of each kind
    /// of KV by itself, since the best of one kind says nothing of another.
    pub(crate) fn pair(&mut self, survey: &Survey, keep: usize) {
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
            let total_ms = side.total_ms;
            prefills.push(side);
            total_ms
        };
        let best_prefills = self.best(prefill, keep, &self.lows.prefill, cost);
        let cost = |at| {
            let side = question.decode_side(at);
            let cost_ms = question.decode_cost(&side);
            decodes.push(side);
            cost_ms
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
