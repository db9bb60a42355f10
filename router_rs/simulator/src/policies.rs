//! Policies by name.

use crate::settings::PolicySettings;
use crate::weighted::Weighted;
use kvmesh_scheduler::{CostSettings, FixedPolicy, KvCost, Policy, Rule, ScoredPolicy};
use std::sync::Arc;

/// The policy that settings name. Clairvoyance is not a policy's to have:
/// its plans are those of the cost, the choice among them is the simulation's.
pub(crate) fn policy(settings: &PolicySettings, seed: u64) -> Box<dyn Policy> {
    let cost = CostSettings {
        plans_kept: 0,
        ..CostSettings::default()
    };
    let rule = match *settings {
        PolicySettings::Clairvoyant => return Box::new(KvCost::new(cost)),
        PolicySettings::Cost {
            stretch,
            beyond_target,
            tie_share,
        } => {
            return Box::new(KvCost::new(CostSettings {
                stretch: stretch.unwrap_or(cost.stretch),
                beyond_target: beyond_target.unwrap_or(cost.beyond_target),
                tie_share: tie_share.unwrap_or(cost.tie_share),
                ..cost
            }));
        }
        PolicySettings::Weighted { overlap, decode } => {
            // Every plan is scored, not only those that cost least.
            let all = CostSettings {
                best_of_side: usize::MAX,
                ..cost
            };
            let scorer = Arc::new(Weighted { overlap, decode });
            return Box::new(ScoredPolicy::new(all, scorer));
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
    Box::new(FixedPolicy::new(rule))
}
