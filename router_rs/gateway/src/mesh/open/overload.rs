//! When the client of a request that was ended by overload should come back.

use std::time::{Duration, Instant};

use kvmesh_scheduler::Rejected;

use super::Open;
use crate::{
    error::retry_after,
    mesh::{figures::ms, placer::Turned},
};

/// Where there is no estimate, and the least for those that waited for as long
/// as they may: whatever was predicted for them did not come true.
const IN_VAIN: Duration = Duration::from_secs(1);

impl Open {
    /// What the same request would wait for if it came now; with a deadline,
    /// what is lacking to meet that.
    pub(super) fn retry_after(&self) -> Duration {
        let told = self.wait_now_ms().map_or(IN_VAIN, retry_after);
        let longest_ms = self.core.dispatcher.waits.longest_wait_ms(self);
        match ms(self.request.arrived.elapsed()) >= longest_ms {
            true => told.max(IN_VAIN),
            false => told,
        }
    }

    fn wait_now_ms(&self) -> Option<f64> {
        let (request, dispatcher) = (&self.request, &self.core.dispatcher);
        let had = u32::try_from(request.output_ids.len()).unwrap_or(u32::MAX);
        let expected = dispatcher.expected_output(request, had);
        let left = |at: Instant| ms(at.saturating_duration_since(Instant::now()));
        let left_ms = request.deadline.map(left);
        let now_ms = dispatcher.waits.now_ms();
        let of = (had, expected);
        match self
            .core
            .would_admit(request, self.chain(), of, now_ms, left_ms)
        {
            // Without work nobody was there to be asked.
            Ok(admitted) => (admitted.work_ms > 0.0).then_some(admitted.wait_ms),
            Err(Turned::Waits(Rejected::DeadlineCannotBeMet {
                ttft_ms, left_ms, ..
            })) => Some(ttft_ms - left_ms),
            Err(Turned::Waits(Rejected::WaitTooLong { wait_ms, .. })) => Some(wait_ms),
            Err(Turned::Never(_)) => None,
        }
    }
}
