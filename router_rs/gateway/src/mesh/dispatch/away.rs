//! A running stream's next worker.

use std::{fmt, sync::Arc, time::Instant};

use kvmesh_kv_index::Matches;
use kvmesh_scheduler::{NoPlan, RequestView};
use kvmesh_wire::v1;

use super::{Booking, affinity, request_view};
use crate::mesh::{
    Core,
    open::{Leaves, Open, Party},
    placer::Target,
    table::WorkerEntry,
};

/// Streams that a drain's answer names.
const MOST_TOLD: usize = 100;

/// Why a stream stays where it is for now.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(in crate::mesh) enum Stays {
    /// Nobody can take it.
    NoTarget(NoPlan),
    /// The one that could has no session that takes placements.
    NoSession,
    /// It has ended, or changed meanwhile.
    Gone,
    /// Workers died of it: it runs with no other request in its steps.
    Alone,
    /// So many tries have failed.
    Failed(u32),
}

impl fmt::Display for Stays {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoTarget(why) => write!(f, "nobody can take it over: {why}"),
            Self::NoSession => f.write_str("the target's session takes nothing now"),
            Self::Gone => f.write_str("it does not run there any more"),
            Self::Alone => f.write_str("it runs alone, since workers died of it"),
            Self::Failed(0) => f.write_str("hand_over_tries is 0"),
            Self::Failed(tries) => {
                write!(
                    f,
                    "{tries} tries to hand it over have failed, as many as hand_over_tries allows"
                )
            }
        }
    }
}

impl Core {
    /// Hands a stream over to the worker where it costs the least.
    ///
    /// # Errors
    /// Why it stays.
    pub(in crate::mesh) fn move_away(
        self: &Arc<Self>,
        open: &Arc<Open>,
        from: &WorkerEntry,
    ) -> Result<(), Stays> {
        let Target { worker, booking } = self.target_for(open, from)?;
        let session = self
            .table
            .get(worker)
            .and_then(|entry| entry.session())
            .filter(|session| session.takes_placements())
            .ok_or(Stays::NoSession)?;
        let party = Party { worker, session };
        let booking = Booking {
            loads: vec![(worker, booking)],
        };
        match open.hand_over(from.index, party, booking) {
            true => Ok(()),
            false => Err(Stays::Gone),
        }
    }

    /// The streams that stay on a worker as it is now: those that nobody could take over,
    /// all of them at once, and those that are not tried (any more).
    pub(in crate::mesh) fn staying(&self, from: &WorkerEntry) -> Vec<v1::StayingStream> {
        let now = Instant::now();
        // Room that one has found is not there for the next one.
        let mut found = Vec::new();
        let mut staying = Vec::new();
        for open in self.all_open() {
            let why = match open.leaves(from.index, now) {
                Leaves::Can(..) | Leaves::Later => match self.target_for(&open, from) {
                    Ok(target) => {
                        found.push(target);
                        continue;
                    }
                    Err(why) => why,
                },
                Leaves::Stays(why) => why,
                Leaves::UnderWay | Leaves::Waits => continue,
            };
            staying.push(v1::StayingStream {
                generation_id: open.id.to_string(),
                reason: why.to_string(),
            });
            if staying.len() == MOST_TOLD {
                break;
            }
        }
        staying
    }

    fn target_for(&self, open: &Open, from: &WorkerEntry) -> Result<Target, Stays> {
        let mut cached = Matches::default();
        let chain = self.chain_so_far(open);
        let chain = chain.as_deref().unwrap_or(open.chain());
        self.dispatcher.index.lookup_into(chain, &mut cached);
        let made = open.next_index();
        let expected = self.dispatcher.expected_output(&open.request, made);
        let id = u128::from_le_bytes(open.id.0);
        let view = RequestView {
            virtual_deadline_ms: self.dispatcher.waits.deadline_ms(open),
            affinity: affinity(open.chain(), id),
            ..request_view(&open.request, id, made, expected, &cached, &[])
        };
        let now_ms = self.dispatcher.waits.now_ms();
        let failed = open.failed_targets();
        let mut placer = self.dispatcher.placer();
        let target = match placer.target(from.index, &failed, &view, now_ms) {
            // What they lacked may be there by now.
            Err(_) if !failed.is_empty() => placer.target(from.index, &[], &view, now_ms),
            target => target,
        };
        target.map_err(Stays::NoTarget)
    }
}
