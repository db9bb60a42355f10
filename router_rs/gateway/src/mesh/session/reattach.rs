//! A session that broke a moment ago: what runs on its worker waits for it.

use std::{sync::Arc, time::Instant};

use bytes::Bytes;
use kvmesh_session::link::{Event, Timer};
use kvmesh_wire::v1;

use super::{Session, SessionHandle};

/// Sleeps until an instant; without one for ever.
pub(super) async fn at(instant: Option<Instant>) {
    match instant {
        Some(instant) => tokio::time::sleep_until(instant.into()).await,
        None => std::future::pending().await,
    }
}

impl Session {
    /// The worker did not come back in time.
    pub(super) fn grace_is_over(&mut self) {
        self.reattach_at = None;
        self.feed(Event::Fired(Timer::Reattach));
    }

    /// What the hello asks the worker for; the worker drops all else.
    pub(super) fn name_what_runs(&mut self) -> Vec<v1::Reattach> {
        self.named.clear();
        self.kept.clear();
        let worker = self.worker.index;
        let mut wanted = Vec::new();
        self.open.retain(|id, held| {
            let Some((fence, next_index)) = held.open.reattach(worker) else {
                return false;
            };
            // Of this connection no command placed it.
            held.command = 0;
            self.named.push((*id, fence));
            wanted.push(v1::Reattach {
                generation: Bytes::copy_from_slice(&id.0),
                owner: fence.owner,
                attempt: fence.attempt,
                next_index,
            });
            true
        });
        wanted
    }

    /// Goes on with what the worker still has, and lets the rest be planned anew.
    pub(super) fn take_back(&mut self, handle: &Arc<SessionHandle>) {
        let worker = self.worker.index;
        for (generation, fence) in std::mem::take(&mut self.named) {
            let known = self.kept.contains(&(generation, fence));
            match (self.open.get(&generation), known) {
                (Some(held), true) => held.open.reattached(worker, handle, fence),
                (Some(held), false) => {
                    let open = Arc::clone(&held.open);
                    self.open.remove(&generation);
                    open.forgotten(worker, fence);
                }
                // It was lost, or left, while the hellos were on their way.
                (None, true) => handle.cancel(generation, fence),
                (None, false) => {}
            }
        }
        self.kept.clear();
    }
}
