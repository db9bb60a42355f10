//! Policies by name.

use crate::settings::{self, PolicySettings, Settings};
use crate::weighted::Weighted;
use kvmesh_scheduler::{
    CostSettings, FixedPolicy, KvCost, LocalPrefill, Policy, Rule, ScoredPolicy,
};
use std::sync::Arc;

/// A policy, and its scorer where it has one.
pub(crate) type Built = (Box<dyn Policy>, Option<Arc<Weighted>>);

/// The policy that settings name. Clairvoyance is not a policy's to have:
/// its plans are those of the cost, the choice among them is the simulation's.
pub(crate) fn policy(settings: &Settings) -> Built {
    let seed = settings.seed;
    let shipped = CostSettings::default();
    let cost = CostSettings {
        plans_kept: 0,
        local_prefill: match settings.local_prefill {
            None => shipped.local_prefill,
            Some(settings::LocalPrefill::ByCost) => LocalPrefill::ByCost,
            Some(settings::LocalPrefill::WithoutPrefillWorkers) => {
                LocalPrefill::WithoutPrefillWorkers
            }
        },
        ..shipped
    };
    let rule = match settings.policy {
        PolicySettings::Clairvoyant => {
            // It chooses among all, not among those that cost least.
            let all = CostSettings {
                best_of_side: usize::MAX,
                ..cost
            };
            return (Box::new(KvCost::new(all)), None);
        }
        PolicySettings::Cost {
            stretch,
            beyond_target,
            tie_share,
        } => {
            let policy = KvCost::new(CostSettings {
                stretch: stretch.unwrap_or(cost.stretch),
                beyond_target: beyond_target.unwrap_or(cost.beyond_target),
                tie_share: tie_share.unwrap_or(cost.tie_share),
                ..cost
            });
            return (Box::new(policy), None);
        }
        PolicySettings::Weighted { overlap, decode } => {
            // Every plan is scored, not only those that cost least.
            // Its formula is one of pairs, where there are any.
            let all = CostSettings {
                best_of_side: usize::MAX,
                local_prefill: LocalPrefill::WithoutPrefillWorkers,
                ..cost
            };
            let scorer = Arc::new(Weighted::new(overlap, decode));
            let policy = ScoredPolicy::new(all, Arc::clone(&scorer) as _);
            return (Box::new(policy), Some(scorer));
        }
        PolicySettings::RoundRobin => Rule::RoundRobin,
        PolicySettings::Random => Rule::Random { seed },
        PolicySettings::LeastLoaded => Rule::LeastLoaded,
        PolicySettings::PowerOfTwo => Rule::PowerOfTwo { seed },
        PolicySettings::ConsistentHash => Rule::ConsistentHash,
        PolicySettings::PrefixGreedy => Rule::PrefixGreedy,
        PolicySettings::OverlapLoad {
            overlap_weight,
            temperature,
        } => Rule::OverlapLoad {
            overlap_weight: overlap_weight.unwrap_or(1.0),
            temperature: temperature.unwrap_or(0.0),
            seed,
        },
    };
    (Box::new(FixedPolicy::new(rule)), None)
}
