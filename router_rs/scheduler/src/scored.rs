//! Plans that somebody else's function scores.

use crate::cost::{CostSettings, KvCost, decision};
use crate::plan::{Considered, Decision, NoPlan, Policy};
use crate::request::RequestView;
use crate::sides::Candidate;
use crate::survey::LocalPrefill;
use crate::weigh::Plans;
use crate::worker::Cluster;
use std::sync::Arc;
use thiserror::Error;

/// Why there are no scores.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ScoreError {
    /// The function failed.
    #[error("the scorer failed: {0}")]
    Failed(String),
    /// Another number of scores than of plans, or one that is no number.
    #[error("the scorer gave {given} usable scores for {plans} plans")]
    Unusable {
        /// Scores that are numbers.
        given: usize,
        /// Plans.
        plans: usize,
    },
}

/// A function that scores plans: the least score is chosen.
pub trait Scorer: Send + Sync {
    /// One score a plan, in their order.
    ///
    /// # Errors
    /// [`ScoreError`]; the choice is then by cost.
    fn score(&self, plans: &Columns) -> Result<Vec<f64>, ScoreError>;

    /// A decision was made by cost, for want of scores.
    fn failed(&self, error: &ScoreError);
}

/// Plans by columns: one number a plan in each.
#[derive(Debug, Clone, Default)]
pub struct Columns {
    plans: usize,
    values: [Vec<f64>; Self::NAMES.len()],
}

impl Columns {
    /// Names of the columns. Workers are numbers of this router; -1 is none.
    /// The rows of the cost are those of [`crate::Terms::rows`], in ms; counts
    /// are those of the prefill and of the decode worker as they are now.
    pub const NAMES: [&'static str; 24] = [
        "prefill_worker",
        "decode_worker",
        "prefix_worker",
        "total",
        "ttft",
        "wait",
        "pull",
        "reload",
        "prefill",
        "transfer",
        "decode_wait",
        "relay",
        "queued",
        "gap",
        "own_stretch",
        "others_stretch",
        "recompute",
        "cached_tokens",
        "pulled_tokens",
        "prefill_backlog_tokens",
        "prefill_requests",
        "decode_batch",
        "decode_context",
        "decode_free_blocks",
    ];

    /// Columns of these rows: to try a scorer on.
    pub fn of(rows: &[[f64; Self::NAMES.len()]]) -> Self {
        let mut columns = Self::default();
        for row in rows {
            for (column, value) in columns.values.iter_mut().zip(row) {
                column.push(*value);
            }
        }
        columns.plans = rows.len();
        columns
    }

    /// Number of plans.
    pub fn plans(&self) -> usize {
        self.plans
    }

    /// Each column with its name.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, &[f64])> {
        Self::NAMES
            .into_iter()
            .zip(self.values.iter().map(Vec::as_slice))
    }

    /// A column by name.
    pub fn column(&self, name: &str) -> Option<&[f64]> {
        self.iter()
            .find(|(other, _)| *other == name)
            .map(|(_, column)| column)
    }

    fn clear(&mut self) {
        self.plans = 0;
        self.values.iter_mut().for_each(Vec::clear);
    }

    fn push(&mut self, cluster: &Cluster<'_>, candidate: &Candidate) {
        let Considered {
            plan,
            terms,
            cached_tokens,
            pulled_tokens,
        } = candidate.considered;
        let prefill = &cluster.workers[candidate.prefill as usize];
        let decode = &cluster.workers[candidate.decode as usize];
        let head = [
            f64::from(plan.prefill().0),
            f64::from(plan.decode().0),
            plan.source().map_or(-1.0, |source| f64::from(source.0)),
            terms.total_ms(),
            terms.ttft_ms(),
        ];
        let tail = [
            f64::from(cached_tokens),
            f64::from(pulled_tokens),
            prefill.prefill_backlog_tokens() as f64,
            f64::from(prefill.requests()),
            f64::from(decode.decode_batch()),
            decode.decode_context() as f64,
            decode.available_blocks() as f64,
        ];
        let rows = terms.rows().map(|(_, ms)| ms);
        let all = head.into_iter().chain(rows).chain(tail);
        for (column, value) in self.values.iter_mut().zip(all) {
            column.push(value);
        }
        self.plans += 1;
    }
}

/// A policy that takes the plans which the cost would weigh, and lets a
/// function score them.
pub struct ScoredPolicy {
    cost: KvCost,
    scorer: Arc<dyn Scorer>,
    columns: Columns,
}

impl ScoredPolicy {
    /// The policy of a scorer. The settings say which plans are weighed, and
    /// what is chosen where the scorer fails.
    pub fn new(settings: CostSettings, scorer: Arc<dyn Scorer>) -> Self {
        Self {
            cost: KvCost::new(settings),
            scorer,
            columns: Columns::default(),
        }
    }
}

impl Policy for ScoredPolicy {
    fn name(&self) -> &'static str {
        "scored"
    }

    fn local_prefill(&self) -> LocalPrefill {
        self.cost.settings().local_prefill
    }

    fn choose(
        &mut self,
        cluster: &Cluster<'_>,
        request: &RequestView<'_>,
    ) -> Result<Decision, NoPlan> {
        let Self {
            cost,
            scorer,
            columns,
        } = self;
        let settings = cost.settings().clone();
        let decided = cluster.with_table(|table| {
            cost.weigh(table, cluster, request, true, |plans| {
                let best = score(scorer.as_ref(), columns, plans, cluster)
                    .inspect_err(|error| scorer.failed(error));
                match best {
                    Ok(at) => {
                        let chosen = decision(cluster, request, &plans.candidate(at)?);
                        Some(plans.keep_considered(&settings, chosen, at))
                    }
                    Err(_) => KvCost::decide(&settings, plans, cluster, request),
                }
            })
        })?;
        decided.ok_or(NoPlan::NoPair)
    }

    fn explain(
        &self,
        cluster: &Cluster<'_>,
        request: &RequestView<'_>,
    ) -> Result<Vec<Considered>, NoPlan> {
        self.cost.explain(cluster, request)
    }
}

/// The plan with the least score; of equal ones the one that costs least.
fn score(
    scorer: &dyn Scorer,
    columns: &mut Columns,
    plans: &Plans<'_, '_>,
    cluster: &Cluster<'_>,
) -> Result<usize, ScoreError> {
    columns.clear();
    for at in 0..plans.len() {
        if let Some(candidate) = plans.candidate(at) {
            columns.push(cluster, &candidate);
        }
    }
    let scores = scorer.score(columns)?;
    let usable = scores.iter().filter(|score| !score.is_nan()).count();
    let least = scores
        .iter()
        .enumerate()
        .min_by(|a, b| a.1.total_cmp(b.1).then(a.0.cmp(&b.0)));
    match least {
        Some((at, _)) if usable == columns.plans && scores.len() == usable => Ok(at),
        _ => Err(ScoreError::Unusable {
            given: usable,
            plans: columns.plans,
        }),
    }
}

impl std::fmt::Debug for ScoredPolicy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ScoredPolicy")
            .field("cost", &self.cost)
            .finish_non_exhaustive()
    }
}
