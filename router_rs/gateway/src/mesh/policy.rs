//! Which policy chooses, and its settings.

use std::{fmt, sync::Arc, time::Duration};

use kvmesh_kv_index::IndexSettings;
use kvmesh_scheduler::{
    CostSettings, FixedPolicy, KvCost, Policy, QueueSettings, Rule, ScoredPolicy, Scorer,
};

/// Name of the policy that counts added delay.
pub const COST: &str = "cost";
/// Name of the policy whose plans a function scores.
pub const SCORED: &str = "scored";
/// Names that the setting takes: the cost, and every fixed rule.
pub const POLICIES: [&str; 1 + Rule::NAMES.len()] = {
    let mut names = [COST; 1 + Rule::NAMES.len()];
    let mut at = 0;
    while at < Rule::NAMES.len() {
        names[at + 1] = Rule::NAMES[at];
        at += 1;
    }
    names
};

/// Which policy chooses, and how what waits is served.
#[derive(Clone)]
pub struct PolicySettings {
    /// `cost`, or a fixed rule's name.
    pub name: String,
    /// Weight of blocks to compute in the rule `overlap-load`.
    pub overlap_weight: f64,
    /// Temperature of the rule `overlap-load`; 0: the least cost.
    pub temperature: f64,
    /// Of the cost.
    pub cost: CostSettings,
    /// Of the queue.
    pub queue: QueueSettings,
    /// Output tokens expected where nothing is learnt.
    pub expected_output: u32,
    /// Bounds of the prefix index.
    pub index: IndexSettings,
    /// How long an engine without cache events is believed to hold what was
    /// sent to it.
    pub approximate_ttl: Duration,
    /// Scores the plans, where one is given.
    pub scorer: Option<Arc<dyn Scorer>>,
}

impl Default for PolicySettings {
    fn default() -> Self {
        Self {
            name: COST.to_owned(),
            overlap_weight: 1.0,
            temperature: 0.0,
            cost: CostSettings::default(),
            queue: QueueSettings {
                // Admission bounds what is new; what was admitted may come back.
                limit: usize::MAX,
                ..QueueSettings::default()
            },
            expected_output: 256,
            index: IndexSettings::default(),
            approximate_ttl: Duration::from_secs(120),
            scorer: None,
        }
    }
}

impl PolicySettings {
    /// The policy. `seed`: of those that draw.
    pub(super) fn build(&self, seed: u64) -> Box<dyn Policy> {
        if let Some(scorer) = &self.scorer {
            return Box::new(ScoredPolicy::new(self.cost.clone(), Arc::clone(scorer)));
        }
        match Rule::named(&self.name, seed) {
            None => Box::new(KvCost::new(self.cost.clone())),
            Some(Rule::OverlapLoad { seed, .. }) => Box::new(FixedPolicy::new(Rule::OverlapLoad {
                overlap_weight: self.overlap_weight,
                temperature: self.temperature,
                seed,
            })),
            Some(rule) => Box::new(FixedPolicy::new(rule)),
        }
    }
}

impl fmt::Debug for PolicySettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PolicySettings")
            .field("name", &self.name)
            .field("cost", &self.cost)
            .field("queue", &self.queue)
            .field("overlap_weight", &self.overlap_weight)
            .field("temperature", &self.temperature)
            .field("expected_output", &self.expected_output)
            .field("index", &self.index)
            .field("approximate_ttl", &self.approximate_ttl)
            .field("scored", &self.scorer.is_some())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_builds_its_policy() {
        for name in Rule::NAMES.into_iter().chain([COST]) {
            let settings = PolicySettings {
                name: name.to_owned(),
                ..PolicySettings::default()
            };
            assert_eq!(settings.build(1).name(), name);
        }
    }
}
