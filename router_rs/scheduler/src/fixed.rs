//! Fixed policies: baselines, and choices for those who want them.

use crate::cost::{CostSettings, decision, tie_break};
use crate::facts::Table;
use crate::fit::pairs;
use crate::plan::{Considered, Decision, NoPlan, Policy};
use crate::request::RequestView;
use crate::sides::{Candidate, Question};
use crate::survey::{LocalPrefill, Survey};
use crate::terms::{Asked, People};
use crate::worker::{Cluster, WorkerView};

/// How a fixed policy chooses a worker.
#[derive(Debug, Clone, Copy, PartialEq)]
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
    /// What belongs together goes together, by rendezvous hashing of
    /// [`RequestView::affinity`] (D. Thaler and C. Ravishankar, 1998): a worker
    /// that goes takes its own part along and no other moves.
    ConsistentHash,
    /// Longest cached prefix; fewest requests where equal.
    PrefixGreedy,
    /// The usual formula of KV-aware routers, as NVIDIA's Dynamo documents it:
    /// `overlap_weight x prefill blocks + decode blocks`, in KV blocks, each
    /// with the request itself on that worker.
    OverlapLoad {
        /// Weight of prompt blocks that are not cached, against blocks that
        /// decoding streams hold. Shipped: 1.
        overlap_weight: f64,
        /// 0: the least cost. Else a draw with probabilities
        /// exp(-cost / temperature), costs scaled to 0..1 over the workers.
        temperature: f64,
        /// Seed of the draw.
        seed: u64,
    },
}

impl Rule {
    /// Names of all rules, as in settings.
    pub const NAMES: [&'static str; 7] = [
        "round-robin",
        "random",
        "least-loaded",
        "power-of-two",
        "consistent-hash",
        "prefix-greedy",
        "overlap-load",
    ];

    /// The rule of a name, with its shipped parameters.
    pub fn named(name: &str, seed: u64) -> Option<Self> {
        Some(match name {
            "round-robin" => Self::RoundRobin,
            "random" => Self::Random { seed },
            "least-loaded" => Self::LeastLoaded,
            "power-of-two" => Self::PowerOfTwo { seed },
            "consistent-hash" => Self::ConsistentHash,
            "prefix-greedy" => Self::PrefixGreedy,
            "overlap-load" => Self::OverlapLoad {
                overlap_weight: 1.0,
                temperature: 0.0,
                seed,
            },
            _ => return None,
        })
    }

    /// Its name.
    pub fn name(&self) -> &'static str {
        match self {
            Self::RoundRobin => "round-robin",
            Self::Random { .. } => "random",
            Self::LeastLoaded => "least-loaded",
            Self::PowerOfTwo { .. } => "power-of-two",
            Self::ConsistentHash => "consistent-hash",
            Self::PrefixGreedy => "prefix-greedy",
            Self::OverlapLoad { .. } => "overlap-load",
        }
    }
}

/// What a worker is chosen for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Prefill = 1,
    Decode = 2,
    Whole = 3,
}

/// A policy that goes by one rule. It uses pairs of prefill and decode
/// workers wherever there are such, else workers that do both.
#[derive(Debug, Clone)]
pub struct FixedPolicy {
    rule: Rule,
    turn: u64,
    people: People,
    survey: Survey,
}

impl FixedPolicy {
    /// The policy of a rule.
    pub fn new(rule: Rule) -> Self {
        Self {
            rule,
            turn: 0,
            people: CostSettings::default().people(),
            survey: Survey::default(),
        }
    }

    /// Picks one of these places.
    fn pick(
        &self,
        cluster: &Cluster<'_>,
        from: &[u32],
        request: &RequestView<'_>,
        part: Part,
    ) -> Option<u32> {
        let count = from.len() as u64;
        if count == 0 {
            return None;
        }
        let worker = |at: &u32| &cluster.workers[*at as usize];
        let random = |seed: u64| from[(tie_break(seed ^ part as u64, request.id) % count) as usize];
        match self.rule {
            Rule::RoundRobin => from.get((self.turn % count) as usize).copied(),
            Rule::Random { seed } => Some(random(seed)),
            Rule::LeastLoaded => from.iter().copied().min_by_key(|at| {
                let worker = worker(at);
                (worker.requests(), worker.slot)
            }),
            Rule::PowerOfTwo { seed } => {
                let (first, second) = (random(seed), random(!seed));
                let less = worker(&second).requests() < worker(&first).requests();
                Some(if less { second } else { first })
            }
            Rule::ConsistentHash => from.iter().copied().max_by_key(|at| {
                let slot = worker(at).slot;
                (tie_break(request.affinity, u128::from(slot.0)), slot)
            }),
            Rule::PrefixGreedy => from.iter().copied().min_by_key(|at| {
                let worker = worker(at);
                (
                    std::cmp::Reverse(request.cached_on(worker.slot)),
                    worker.requests(),
                    worker.slot,
                )
            }),
            Rule::OverlapLoad {
                overlap_weight,
                temperature,
                seed,
            } => {
                let costs: Vec<f64> = from
                    .iter()
                    .map(|at| overlap_cost(worker(at), request, overlap_weight, part))
                    .collect();
                let draw = tie_break(seed ^ part as u64, request.id);
                softmin(&costs, temperature, draw).map(|at| from[at])
            }
        }
    }

    fn plan(
        &self,
        survey: &mut Survey,
        table: &Table,
        cluster: &Cluster<'_>,
        request: &RequestView<'_>,
    ) -> Result<Candidate, NoPlan> {
        survey.look(cluster, table, request, LocalPrefill::WithoutPrefillWorkers)?;
        let question = Question {
            cluster,
            table,
            request,
            asked: Asked::of(request, cluster.now_ms),
            people: &self.people,
            holders: &[],
            tiered: request.is_tiered(),
            // One is taken whatever it costs: nothing is told apart.
            relay_least_ms: 0.0,
            pull_from_tokens: u32::MAX,
        };
        if let Some(p) = self.pick(cluster, &survey.prefill, request, Part::Prefill) {
            let sender = &cluster.workers[p as usize];
            let partners: Vec<u32> = survey
                .decode
                .iter()
                .copied()
                .filter(|d| pairs(sender, &cluster.workers[*d as usize]))
                .collect();
            if let Some(d) = self.pick(cluster, &partners, request, Part::Decode) {
                let (p, d) = (question.prefill_side(p), question.decode_side(d));
                return question.split(&p, &d).ok_or(NoPlan::NoPair);
            }
        }
        let alone = if survey.whole.is_empty() {
            &survey.decode
        } else {
            &survey.whole
        };
        let worker = self
            .pick(cluster, alone, request, Part::Whole)
            .ok_or(NoPlan::NoPair)?;
        Ok(question.whole(worker))
    }
}

/// Blocks that a worker would have to compute and to hold with this request.
fn overlap_cost(
    worker: &WorkerView,
    request: &RequestView<'_>,
    overlap_weight: f64,
    part: Part,
) -> f64 {
    let block = f64::from(worker.abilities.block_tokens.max(1));
    let own = if part == Part::Decode {
        0
    } else {
        request.sequence() - request.cached_on(worker.slot)
    };
    let prefill = (worker.prefill_backlog_tokens() + own) as f64 / block;
    let streams = if part == Part::Prefill {
        0
    } else {
        request.sequence()
    };
    let decode = (worker.decode_context() + streams) as f64 / block;
    overlap_weight * prefill + decode
}

/// The least of these, or one drawn by exp(-cost / temperature) over costs
/// scaled to 0..1; equal ones by the draw.
fn softmin(costs: &[f64], temperature: f64, draw: u64) -> Option<usize> {
    let least = costs.iter().copied().fold(f64::INFINITY, f64::min);
    let most = costs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weight = |cost: f64| {
        if temperature <= 0.0 {
            f64::from(u8::from(cost <= least))
        } else {
            let scaled = (cost - least) / (most - least).max(f64::MIN_POSITIVE);
            (-scaled / temperature).exp()
        }
    };
    let sum: f64 = costs.iter().map(|cost| weight(*cost)).sum();
    let mut left = sum * (draw >> 11) as f64 / (1u64 << 53) as f64;
    for (at, cost) in costs.iter().enumerate() {
        left -= weight(*cost);
        if left < 0.0 {
            return Some(at);
        }
    }
    costs.iter().rposition(|cost| weight(*cost) > 0.0)
}

impl Policy for FixedPolicy {
    fn name(&self) -> &'static str {
        self.rule.name()
    }

    fn choose(
        &mut self,
        cluster: &Cluster<'_>,
        request: &RequestView<'_>,
    ) -> Result<Decision, NoPlan> {
        let mut survey = std::mem::take(&mut self.survey);
        let chosen = cluster.with_table(|table| self.plan(&mut survey, table, cluster, request));
        self.survey = survey;
        let chosen = chosen?;
        self.turn = self.turn.wrapping_add(1);
        let mut decision = decision(cluster, request, &chosen);
        decision.considered.push(chosen.considered);
        Ok(decision)
    }

    fn explain(
        &self,
        cluster: &Cluster<'_>,
        request: &RequestView<'_>,
    ) -> Result<Vec<Considered>, NoPlan> {
        let mut survey = Survey::default();
        let chosen = cluster.with_table(|table| self.plan(&mut survey, table, cluster, request))?;
        Ok(vec![chosen.considered])
    }
}
