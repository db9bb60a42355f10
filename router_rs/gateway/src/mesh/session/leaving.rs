//! A worker that is left: it drains, is about to stop, or does not decode any more. Its
//! streams go on elsewhere with their KV (PROTOCOLS 2, Drain).

use std::{
    collections::BTreeSet,
    sync::Arc,
    time::{Duration, Instant},
};

use kvmesh_session::{GenerationId, parse::LoadReport};
use kvmesh_wire::v1;

use super::{
    super::{
        dispatch::Stays,
        open::{Leaves, Open},
    },
    Session,
};

/// Streams without a target that a look tries before it gives up: one that finds no room
/// may be a long one.
const WITHOUT_TARGET: usize = 8;
/// Shortest time between two looks; loads come more often where much happens.
const LOOK: Duration = Duration::from_millis(10);

/// A worker that is being left.
#[derive(Debug, Default)]
pub(super) struct Leaving {
    looked: Option<Instant>,
    /// Streams of which it was said that they stay: for now, or for good.
    stay: BTreeSet<(GenerationId, bool)>,
}

impl Session {
    /// Moves streams away from a worker that is left, a few at once, the most urgent
    /// first. Called with each load, of which there are at least four a second.
    pub(super) fn leave(&mut self, report: &LoadReport) {
        let stops = report.phase == v1::WorkerPhase::Stopping;
        let decodes = report.role != v1::Role::Prefill;
        if decodes && !report.load.draining && !stops {
            self.leaving = None;
            return;
        }
        let now = Instant::now();
        let leaving = self.leaving.get_or_insert_default();
        let early = leaving.looked.is_some_and(|looked| now < looked + LOOK);
        if early || self.open.is_empty() {
            return;
        }
        leaving.looked = Some(now);
        let source = self.worker.index;
        let mut room = self.core.settings.streams.hand_overs_at_once;
        let mut can = Vec::new();
        let worker = self.worker.name();
        let mut stays = |open: &Open, for_good: bool, why: Stays| {
            if leaving.stay.insert((open.id, for_good)) {
                tracing::info!(
                    generation = %open.id, %worker, for_good, %why,
                    "the stream stays on a worker that is left"
                );
            }
        };
        for held in self.open.values() {
            match held.open.leaves(source, now) {
                Leaves::UnderWay => room = room.saturating_sub(1),
                Leaves::Can(class, arrived) => {
                    can.push(((class, arrived), Arc::clone(&held.open)));
                }
                Leaves::Stays(why) => stays(&held.open, true, why),
                Leaves::Later | Leaves::Waits => {}
            }
        }
        can.sort_by_key(|(urgency, _)| *urgency);
        let mut without = 0;
        for (_, open) in can {
            if room == 0 || without == WITHOUT_TARGET {
                break;
            }
            match self.core.move_away(&open, &self.worker) {
                Ok(()) => room -= 1,
                Err(why) => {
                    without += 1;
                    // The next looks try others: room for those may be there.
                    open.looks_again(now);
                    stays(&open, false, why);
                }
            }
        }
    }
}
