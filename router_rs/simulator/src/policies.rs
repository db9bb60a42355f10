//! Policies by name.

use crate::settings::PolicySettings;
use kvmesh_scheduler::{FixedPolicy, KvCost, Policy, Rule};

/// The policy that settings name. Clairvoyance is not a policy's to have:
/// its plans are those of the cost, the choice among them is the simulation's.
pub(crate) fn policy(settings: &PolicySettings, seed: u64) -> Box<dyn Policy> {
    let rule = match settings {
        PolicySettings::Cost | PolicySettings::Clairvoyant => {
            return Box::new(KvCost::default());
        }
        PolicySettings::RoundRobin => Rule::RoundRobin,
        PolicySettings::Random => Rule::Random { seed },
        PolicySettings::LeastLoaded => Rule::LeastLoaded,
        PolicySettings::PowerOfTwo => Rule::PowerOfTwo { seed },
        PolicySettings::PrefixGreedy => Rule::PrefixGreedy,
    };
    Box::new(FixedPolicy::new(rule))
}
