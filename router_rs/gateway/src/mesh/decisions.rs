//! Why generations went where they went: the last ones, for `explain`.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Mutex, MutexGuard, PoisonError},
};

use kvmesh_session::GenerationId;
use kvmesh_wire::v1;

/// A bounded memory of decisions; the oldest generation goes first.
pub(super) struct Decisions {
    most: usize,
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    order: VecDeque<GenerationId>,
    by_id: HashMap<GenerationId, v1::ExplainResponse>,
}

impl Decisions {
    /// Keeps decisions of the last `most` generations.
    pub(super) fn new(most: usize) -> Self {
        Self {
            most,
            kept: Mutex::default(),
        }
    }

    // Order and map may differ by one entry after a panic; both stay bounded.
    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a decision.
    pub(super) fn decided(&self, id: GenerationId, decision: v1::Decision) {
        if self.most == 0 {
            return;
        }
        let mut kept = self.lock();
        if !kept.by_id.contains_key(&id) {
            if kept.order.len() >= self.most
                && let Some(oldest) = kept.order.pop_front()
            {
                kept.by_id.remove(&oldest);
            }
            kept.order.push_back(id);
        }
        kept.by_id.entry(id).or_default().decisions.push(decision);
    }

    /// Adds what came of it: the end, and when the first token came after the
    /// last decision.
    pub(super) fn finished(&self, id: GenerationId, finished: &v1::Finished, first_token_ms: f64) {
        let mut kept = self.lock();
        if let Some(response) = kept.by_id.get_mut(&id) {
            response.finished = Some(finished.clone());
            if let Some(last) = response.decisions.last_mut() {
                last.actual_ttft_ms = (first_token_ms - last.at_ms).max(0.0);
            }
        }
    }

    /// What is known of a generation.
    pub(super) fn explain(&self, id: GenerationId) -> Option<v1::ExplainResponse> {
        self.lock().by_id.get(&id).cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_generation_goes_first() {
        let decisions = Decisions::new(2);
        let ids: Vec<_> = (0..3).map(|n| GenerationId([n; 16])).collect();
        for id in &ids {
            decisions.decided(*id, v1::Decision::default());
            decisions.decided(
                *id,
                v1::Decision {
                    attempt: 2,
                    ..v1::Decision::default()
                },
            );
        }
        assert!(decisions.explain(ids[0]).is_none());
        assert_eq!(
            decisions.explain(ids[2]).map(|known| known.decisions.len()),
            Some(2)
        );
    }
}
