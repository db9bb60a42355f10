//! Settings of the choice and of the queue.

use kvmesh_kv_index::IndexSettings;
use kvmesh_scheduler::{CostSettings, LocalPrefill, QueueSettings};

use super::Layers;
use crate::mesh::PolicySettings;

/// How workers are chosen, and how what waits is served.
pub(super) fn of(layers: &Layers) -> PolicySettings {
    let shipped = PolicySettings::default();
    let size = |name| usize::try_from(layers.number(name)).unwrap_or(usize::MAX);
    let small = |name| u32::try_from(layers.number(name)).unwrap_or(u32::MAX);
    let kept = layers.number("decisions_kept") > 0;
    let targets = match layers.text("queue_order").as_str() {
        "arrival" => shipped.cost.targets.by_arrival(),
        _ => shipped.cost.targets,
    };
    PolicySettings {
        name: layers.text("policy"),
        overlap_weight: layers.real("overlap_weight"),
        temperature: layers.real("overlap_temperature"),
        cost: CostSettings {
            local_prefill: match layers.text("local_prefill").as_str() {
                "without-prefill-workers" => LocalPrefill::WithoutPrefillWorkers,
                _ => LocalPrefill::ByCost,
            },
            best_of_side: size("best_of_side"),
            pull_from_tokens: small("pull_from_tokens"),
            stretch: layers.real("stretch_weight"),
            beyond_target: layers.real("beyond_target_weight"),
            plans_kept: if kept { size("plans_kept") } else { 0 },
            targets,
            ..shipped.cost
        },
        queue: QueueSettings {
            quantum_ms: layers.number("fair_quantum") as f64,
            batch_strict: layers.flag("batch_strict"),
            ..shipped.queue
        },
        expected_output: small("expected_output_tokens"),
        index: IndexSettings {
            max_bytes: size("index_bytes"),
            max_workers: size("index_workers"),
        },
        approximate_ttl: layers.duration("approximate_ttl"),
        scorer: None,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// The figures of docs/benchmarks.md rest on the defaults of the types; what
    /// ships are the texts of the keys.
    #[test]
    fn what_ships_is_what_was_measured() {
        let shipped = format!("{:?}", of(&Layers::default()));
        assert_eq!(shipped, format!("{:?}", PolicySettings::default()));
    }

    #[test]
    fn first_come_first_served_knows_no_class_and_no_work() {
        let mut layers = Layers::default();
        layers
            .add_toml("test.toml", "queue_order = 'arrival'")
            .unwrap();
        let targets = of(&layers).cost.targets;
        for class in kvmesh_scheduler::Class::ALL {
            let key = kvmesh_scheduler::virtual_deadline_ms(&targets, class, 7.0, 900.0);
            assert_eq!(key, 7.0);
            let shipped = PolicySettings::default().cost.targets;
            assert_eq!(targets.of(class).ttft_ms, shipped.of(class).ttft_ms);
        }
    }
}
