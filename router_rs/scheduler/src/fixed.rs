//! Fixed policies: baselines, and choices for those who want them.

use crate::cost::{LocalPrefill, Sides, decision, priced, tie_break};
use crate::fit::pairs;
use crate::plan::{Considered, Decision, NoPlan, Policy};
use crate::request::RequestView;
use crate::worker::{Cluster, WorkerView};

/// How a fixed policy chooses a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    /// One after the other.
    RoundRobin,
    /// Any, by a seeded hash of the request.
    Random {
        /// The seed.
        seed: u64,
    },
    /// Fewest requests, running, queued and booked.
    LeastLoaded,
    /// The less loaded of two random ones (M. Mitzenmacher, 2001).
    PowerOfTwo {
        /// The seed.
        seed: u64,
    },
    /// Longest cached prefix; fewest requests where equal.
    PrefixGreedy,
}

/// A policy that goes by one rule. It uses pairs of prefill and decode
/// workers wherever there are such, else workers that do both.
#[derive(Debug, Clone)]
pub struct FixedPolicy {
    rule: Rule,
    turn: u64,
}

impl FixedPolicy {
    /// The policy of a rule.
    pub fn new(rule: Rule) -> Self {
        Self { rule, turn: 0 }
    }

    fn pick<'a>(
        &self,
        from: &[&'a WorkerView],
        request: &RequestView<'_>,
        side: u64,
    ) -> Option<&'a WorkerView> {
        let count = from.len() as u64;
        if count == 0 {
            return None;
        }
        let random = |seed: u64| from[(tie_break(seed ^ side, request.id) % count) as usize];
        match self.rule {
            Rule::RoundRobin => from.get((self.turn % count) as usize).copied(),
            Rule::Random { seed } => Some(random(seed)),
            Rule::LeastLoaded => from
                .iter()
                .copied()
                .min_by_key(|worker| (worker.requests(), worker.slot)),
            Rule::PowerOfTwo { seed } => {
                let (first, second) = (random(seed), random(!seed));
                Some(if second.requests() < first.requests() {
                    second
                } else {
                    first
                })
            }
            Rule::PrefixGreedy => from.iter().copied().min_by_key(|worker| {
                (
                    std::cmp::Reverse(request.cached_on(worker.slot)),
                    worker.requests(),
                    worker.slot,
                )
            }),
        }
    }

    fn plan(&self, cluster: &Cluster<'_>, request: &RequestView<'_>) -> Result<Considered, NoPlan> {
        let sides = Sides::of(cluster, request, LocalPrefill::WithoutPrefillWorkers)?;
        if let Some(p) = self.pick(&sides.prefill, request, 1) {
            let partners: Vec<&WorkerView> = sides
                .decode
                .iter()
                .copied()
                .filter(|d| pairs(p, d))
                .collect();
            if let Some(d) = self.pick(&partners, request, 2) {
                return Ok(priced(request, p, d));
            }
        }
        let worker = self.pick(&sides.whole, request, 3).ok_or(NoPlan::NoPair)?;
        Ok(priced(request, worker, worker))
    }
}

impl Policy for FixedPolicy {
    fn name(&self) -> &'static str {
        match self.rule {
            Rule::RoundRobin => "round-robin",
            Rule::Random { .. } => "random",
            Rule::LeastLoaded => "least-loaded",
            Rule::PowerOfTwo { .. } => "power-of-two",
            Rule::PrefixGreedy => "prefix-greedy",
        }
    }

    fn choose(
        &mut self,
        cluster: &Cluster<'_>,
        request: &RequestView<'_>,
    ) -> Result<Decision, NoPlan> {
        let chosen = self.plan(cluster, request)?;
        self.turn = self.turn.wrapping_add(1);
        decision(cluster, request, chosen, 1)
    }

    fn explain(
        &self,
        cluster: &Cluster<'_>,
        request: &RequestView<'_>,
    ) -> Result<Vec<Considered>, NoPlan> {
        Ok(vec![self.plan(cluster, request)?])
    }
}
