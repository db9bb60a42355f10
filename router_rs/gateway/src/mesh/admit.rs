//! Who may be opened: what would wait for too long is refused here, and what came is counted.

use std::time::Instant;

use kvmesh_kv_index::Matches;
use kvmesh_scheduler::{Admitted, Cluster, Rejected, RequestView};

use super::{Core, dispatch::request_view, figures::ms, placer::Turned, turned::turned};
use crate::{
    error::{RequestError, retry_after},
    request::AdmittedRequest,
};

/// What admission found out about a request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Urgency {
    /// From arrival to virtual deadline, ms.
    pub(super) urgency_ms: f64,
    /// Predicted work of its prompt, ms.
    pub(super) work_ms: f64,
    /// Predicted wait until its prompt starts, ms.
    pub(super) wait_ms: f64,
}

impl Core {
    /// Whether a request may be opened: what no worker will ever run, what
    /// would wait for too long, what would miss its deadline, is refused here.
    pub(super) fn admit(
        &self,
        request: &AdmittedRequest,
        chain: &[u64],
    ) -> Result<Urgency, RequestError> {
        self.check_quarantine(request)?;
        let now = Instant::now();
        let left_ms = match request.deadline {
            None => None,
            Some(deadline) if deadline <= now => {
                return Err(RequestError::DeadlineExceeded { next_index: 0 });
            }
            Some(deadline) => Some(ms(deadline - now)),
        };
        let waits = &self.dispatcher.waits;
        let arrival_ms = waits.arrival_ms(request);
        let had = u32::try_from(request.output_ids.len()).unwrap_or(u32::MAX);
        let expected = self.dispatcher.expected_output(request, had);
        let admitted = self.asked(request, chain, (had, expected), |cluster, view| {
            waits.admit(cluster, view, arrival_ms, left_ms)
        });
        // What is turned away came all the same.
        match &admitted {
            Ok(admitted) => self.pools.came(request, admitted.work_ms, expected),
            Err(Turned::Waits(why)) => self.pools.came(request, why.work_ms(), expected),
            Err(Turned::Never(_)) => {}
        }
        let Admitted {
            key_ms,
            work_ms,
            wait_ms,
        } = admitted.map_err(|why| turned(request, why))?;
        if waits.as_urgent(request) >= self.settings.queue_length {
            return Err(RequestError::Overloaded {
                reason: "the queue is full",
                retry_after: retry_after(wait_ms),
            });
        }
        Ok(Urgency {
            urgency_ms: key_ms - arrival_ms,
            work_ms,
            wait_ms,
        })
    }

    /// Whether a request that arrived then may wait, and for how long it would.
    /// It had so many tokens and is expected to have so many.
    pub(super) fn would_admit(
        &self,
        request: &AdmittedRequest,
        chain: &[u64],
        of: (u32, u32),
        arrival_ms: f64,
        left_ms: Option<f64>,
    ) -> Result<Admitted, Turned> {
        let waits = &self.dispatcher.waits;
        self.asked(request, chain, of, |cluster, view| {
            waits.would_admit(cluster, view, arrival_ms, left_ms)
        })
    }

    fn asked(
        &self,
        request: &AdmittedRequest,
        chain: &[u64],
        (had, expected): (u32, u32),
        may_wait: impl FnOnce(&Cluster<'_>, &RequestView<'_>) -> Result<Admitted, Rejected>,
    ) -> Result<Admitted, Turned> {
        let mut cached = Matches::default();
        self.dispatcher.index.lookup_into(chain, &mut cached);
        let view = request_view(request, 0, had, expected, &cached, &[]);
        let now_ms = self.dispatcher.waits.now_ms();
        let mut placer = self.dispatcher.placer();
        placer.admit(&view, now_ms, |cluster| may_wait(cluster, &view))
    }
}
