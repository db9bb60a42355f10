//! The policy that counts added delay.

use crate::fit::{Duty, able, pairs, reason};
use crate::plan::{Considered, Decision, NoPlan, Plan, Policy, Terms};
use crate::request::RequestView;
use crate::terms;
use crate::worker::{Cluster, Role, WorkerView};
use kvmesh_kv_index::WorkerSlot;

/// When a worker that decodes computes a prompt too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LocalPrefill {
    /// `both` workers always; decode workers where no prefill worker is
    /// there.
    #[default]
    WithoutPrefillWorkers,
    /// Wherever it costs least.
    ByCost,
}

/// Settings of [`KvCost`].
#[derive(Debug, Clone, PartialEq)]
pub struct CostSettings {
    /// When decode workers compute prompts.
    pub local_prefill: LocalPrefill,
    /// Best workers of each side that are paired (K).
    pub best_of_side: usize,
    /// Plans this close to the best tie, in ms ...
    pub tie_ms: f64,
    /// ... or as a share of its cost, whichever is more.
    pub tie_share: f64,
    /// Fewest tokens for which a prefix is pulled from another worker.
    pub pull_from_tokens: u32,
}

impl Default for CostSettings {
    fn default() -> Self {
        Self {
            local_prefill: LocalPrefill::default(),
            best_of_side: 8,
            tie_ms: 2.0,
            tie_share: 0.03,
            pull_from_tokens: 128,
        }
    }
}

/// Chooses the plan that adds the least delay, over everyone, in
/// milliseconds. J = prefill term + decode term + pair term.
#[derive(Debug, Clone, Default)]
pub struct KvCost {
    settings: CostSettings,
}

/// One side of a plan: a worker and its terms.
struct Side<'a> {
    worker: &'a WorkerView,
    terms: Terms,
    cached: u64,
    pull: Option<(WorkerSlot, u64)>,
}

impl KvCost {
    /// The policy with these settings.
    pub fn new(settings: CostSettings) -> Self {
        Self { settings }
    }

    fn plans(
        &self,
        cluster: &Cluster<'_>,
        request: &RequestView<'_>,
    ) -> Result<Vec<Considered>, NoPlan> {
        let sides = Sides::of(cluster, request, self.settings.local_prefill)?;
        let holder = best_holder(cluster, request);
        let mut plans = Vec::new();
        for worker in &sides.whole {
            plans.push(self.whole(worker, request, holder));
        }
        let prefills = self.best(
            sides
                .prefill
                .iter()
                .map(|worker| self.prefill_side(worker, request, holder)),
        );
        let decodes = self.best(
            sides
                .decode
                .iter()
                .map(|worker| decode_side(worker, request)),
        );
        pair(&prefills, &decodes, request, &mut plans);
        if plans.is_empty() {
            // The best of each side may all be of kinds that do not pair.
            let prefills: Vec<_> = sides
                .prefill
                .iter()
                .map(|worker| self.prefill_side(worker, request, holder))
                .collect();
            let decodes: Vec<_> = sides
                .decode
                .iter()
                .map(|worker| decode_side(worker, request))
                .collect();
            pair(&prefills, &decodes, request, &mut plans);
        }
        if plans.is_empty() {
            // For these decode workers there is no prefill worker: they do all.
            let alone = able(cluster, request, Duty::Whole, &[Role::Decode, Role::Both]);
            for worker in alone.map_err(|_| NoPlan::NoPair)? {
                plans.push(self.whole(worker, request, holder));
            }
        }
        plans.sort_by(|a, b| {
            a.terms
                .total_ms()
                .total_cmp(&b.terms.total_ms())
                .then(a.plan.cmp(&b.plan))
        });
        Ok(plans)
    }

    /// All of it on one worker.
    fn whole(
        &self,
        worker: &WorkerView,
        request: &RequestView<'_>,
        holder: Option<(&WorkerView, u64)>,
    ) -> Considered {
        let side = self.prefill_side(worker, request, holder);
        let mut terms = side.terms;
        add_decode(&mut terms, worker, request);
        considered(whole_plan(&side), terms, &side)
    }

    fn prefill_side<'a>(
        &self,
        worker: &'a WorkerView,
        request: &RequestView<'_>,
        holder: Option<(&WorkerView, u64)>,
    ) -> Side<'a> {
        let cached = request.cached_on(worker.slot);
        let mut terms = Terms {
            wait_ms: terms::wait_ms(worker),
            prefill_ms: terms::prefill_ms(worker, request, cached),
            others_stretch_ms: terms::chunks_stretch_ms(worker, request, cached),
            ..Terms::default()
        };
        let mut pull = None;
        if let Some((source, held)) = holder
            && worker.abilities.prefix_pull
            && source.abilities.pairing == worker.abilities.pairing
            && source.digest == worker.digest
            && held >= cached + u64::from(self.settings.pull_from_tokens)
        {
            let with = Terms {
                pull_ms: terms::pull_ms(worker, held - cached),
                prefill_ms: terms::prefill_ms(worker, request, held),
                others_stretch_ms: terms::chunks_stretch_ms(worker, request, held),
                ..terms
            };
            if with.total_ms() < terms.total_ms() {
                terms = with;
                pull = Some((source.slot, held - cached));
            }
        }
        Side {
            worker,
            terms,
            cached,
            pull,
        }
    }

    fn best<'a>(&self, sides: impl Iterator<Item = Side<'a>>) -> Vec<Side<'a>> {
        let mut sides: Vec<Side<'a>> = sides.collect();
        let keep = self.settings.best_of_side.max(1);
        let order = |a: &Side<'_>, b: &Side<'_>| {
            a.terms
                .total_ms()
                .total_cmp(&b.terms.total_ms())
                .then(a.worker.slot.cmp(&b.worker.slot))
        };
        if sides.len() > keep {
            sides.select_nth_unstable_by(keep - 1, order);
            sides.truncate(keep);
        }
        sides
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
        let plans = self.plans(cluster, request)?;
        let best = plans.first().ok_or(NoPlan::NoPair)?.terms.total_ms();
        let limit = best + self.settings.tie_ms.max(best * self.settings.tie_share);
        let tied = plans
            .partition_point(|plan| plan.terms.total_ms() <= limit)
            .max(1);
        let at = (tie_break(cluster.router, request.id) % tied as u64) as usize;
        decision(cluster, request, plans[at], tied)
    }

    fn explain(
        &self,
        cluster: &Cluster<'_>,
        request: &RequestView<'_>,
    ) -> Result<Vec<Considered>, NoPlan> {
        self.plans(cluster, request)
    }
}

/// Appends every pair that can exchange KV.
fn pair(
    prefills: &[Side<'_>],
    decodes: &[Side<'_>],
    request: &RequestView<'_>,
    plans: &mut Vec<Considered>,
) {
    for p in prefills {
        for d in decodes.iter().filter(|d| pairs(p.worker, d.worker)) {
            let mut terms = p.terms;
            terms.transfer_ms = terms::transfer_ms(p.worker, d.worker, request);
            add_decode(&mut terms, d.worker, request);
            let source = p.pull.map(|(source, _)| source);
            let plan = Plan::Split {
                prefill: p.worker.slot,
                decode: d.worker.slot,
                source,
            };
            plans.push(considered(plan, terms, p));
        }
    }
}

/// Workers by what they may do for a request.
pub(crate) struct Sides<'a> {
    pub(crate) prefill: Vec<&'a WorkerView>,
    pub(crate) decode: Vec<&'a WorkerView>,
    pub(crate) whole: Vec<&'a WorkerView>,
}

impl<'a> Sides<'a> {
    pub(crate) fn of(
        cluster: &Cluster<'a>,
        request: &RequestView<'_>,
        local: LocalPrefill,
    ) -> Result<Self, NoPlan> {
        let (both, any) = ([Role::Both], [Role::Decode, Role::Both]);
        let pure_decode = able(cluster, request, Duty::Decode, &[Role::Decode]);
        // A `both` worker computes prompts for others only where others exist.
        let helpers = if pure_decode.is_ok() || local == LocalPrefill::ByCost {
            vec![Role::Prefill, Role::Both]
        } else {
            vec![Role::Prefill]
        };
        let prefill = able(cluster, request, Duty::Prefill, &helpers);
        let decode = able(cluster, request, Duty::Decode, &any);
        // A prefill worker that is only full will have room again: wait.
        let nobody = matches!(prefill, Err(miss) if miss != crate::fit::Miss::NoRoom);
        let here: &[Role] = if nobody || local == LocalPrefill::ByCost {
            &any
        } else {
            &both
        };
        let whole = able(cluster, request, Duty::Whole, here);
        match (prefill, decode, whole) {
            (Ok(prefill), Ok(decode), whole) => Ok(Self {
                prefill,
                decode,
                whole: whole.unwrap_or_default(),
            }),
            (_, _, Ok(whole)) => Ok(Self {
                prefill: Vec::new(),
                decode: Vec::new(),
                whole,
            }),
            (_, Err(miss), Err(_)) => Err(reason(miss, Duty::Decode, request)),
            (Err(miss), Ok(_), Err(_)) => Err(reason(miss, Duty::Prefill, request)),
        }
    }
}

/// The worker that holds most of the sequence and may give it.
fn best_holder<'a>(
    cluster: &Cluster<'a>,
    request: &RequestView<'_>,
) -> Option<(&'a WorkerView, u64)> {
    cluster
        .workers
        .iter()
        .filter(|worker| {
            worker.abilities.prefix_pull && !worker.suspect && *worker.model == *request.model
        })
        .map(|worker| (worker, request.cached_on(worker.slot)))
        .max_by_key(|(worker, held)| (*held, std::cmp::Reverse(worker.slot)))
}

fn decode_side<'a>(worker: &'a WorkerView, request: &RequestView<'_>) -> Side<'a> {
    let mut terms = Terms::default();
    add_decode(&mut terms, worker, request);
    // Its part of the pair term: what it has need not be moved.
    terms.transfer_ms = terms::pull_ms(worker, request.sequence() - request.cached_on(worker.slot));
    Side {
        worker,
        terms,
        cached: 0,
        pull: None,
    }
}

fn add_decode(terms: &mut Terms, worker: &WorkerView, request: &RequestView<'_>) {
    terms.decode_wait_ms += terms::decode_wait_ms(worker, request);
    terms.own_stretch_ms += terms::own_stretch_ms(worker, request);
    terms.others_stretch_ms += terms::joining_stretch_ms(worker, request);
}

fn whole_plan(side: &Side<'_>) -> Plan {
    Plan::Whole {
        worker: side.worker.slot,
        source: side.pull.map(|(source, _)| source),
    }
}

fn considered(plan: Plan, terms: Terms, side: &Side<'_>) -> Considered {
    let tokens = |count: u64| u32::try_from(count).unwrap_or(u32::MAX);
    Considered {
        plan,
        terms,
        cached_tokens: tokens(side.cached),
        pulled_tokens: tokens(side.pull.map_or(0, |(_, pulled)| pulled)),
    }
}

/// A plan with its terms, for policies that do not weigh them.
pub(crate) fn priced(
    request: &RequestView<'_>,
    prefill: &WorkerView,
    decode: &WorkerView,
) -> Considered {
    let whole = prefill.slot == decode.slot;
    let side = KvCost::default().prefill_side(prefill, request, None);
    let mut terms = side.terms;
    add_decode(&mut terms, decode, request);
    let plan = if whole {
        whole_plan(&side)
    } else {
        terms.transfer_ms = terms::transfer_ms(prefill, decode, request);
        Plan::Split {
            prefill: prefill.slot,
            decode: decode.slot,
            source: None,
        }
    };
    considered(plan, terms, &side)
}

/// The decision for a plan, with what it books.
pub(crate) fn decision(
    cluster: &Cluster<'_>,
    request: &RequestView<'_>,
    chosen: Considered,
    tied: usize,
) -> Result<Decision, NoPlan> {
    let worker = |slot: WorkerSlot| {
        cluster
            .workers
            .iter()
            .find(|worker| worker.slot == slot)
            .ok_or(NoPlan::NoPair)
    };
    let work = match chosen.plan {
        Plan::Whole { worker: slot, .. } => vec![(slot, terms::whole_work(worker(slot)?, request))],
        Plan::Split {
            prefill, decode, ..
        } => vec![
            (prefill, terms::prefill_work(worker(prefill)?, request)),
            (decode, terms::decode_work(worker(decode)?, request)),
        ],
    };
    let tied = u32::try_from(tied).unwrap_or(u32::MAX);
    Ok(Decision {
        start_ms: chosen.terms.wait_ms,
        chosen,
        tied,
        work,
    })
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
