//! One log line for each thing that happens to an attempt, with generation and
//! attempt in it: what goes wrong at level info, what comes with every request
//! at level debug. Prompts and outputs are in none.
//!
//! Values are made only where the level is on: a line that is off costs the
//! look at one atomic.

use kvmesh_session::{
    WorkerIndex,
    generation::{Cause, Outcome, Plan, Stop},
    parse::Refusal,
};

use super::{Chosen, Open, State};

impl Open {
    /// Number and owner of the attempt that a plan makes are those of the next.
    pub(super) fn log_placed(&self, state: &State, chosen: &Chosen) {
        let fence = state.machine.fence();
        let name = |worker: WorkerIndex| self.core.table.name(worker);
        tracing::debug!(
            generation = %self.id,
            owner = fence.owner,
            attempt = state.machine.next_attempt(),
            prefill = %name(prefill_of(&chosen.plan)),
            decode = %name(decode_of(&chosen.plan)),
            cached_tokens = chosen.cached_tokens,
            pulled_tokens = chosen.pulled_tokens,
            "placed"
        );
    }

    /// The stream is to go on at another worker.
    pub(super) fn log_hand_over(
        &self,
        state: &State,
        from: WorkerIndex,
        to: WorkerIndex,
        attempt: u32,
    ) {
        tracing::debug!(
            generation = %self.id,
            owner = state.machine.fence().owner,
            attempt,
            from = %self.core.table.name(from),
            to = %self.core.table.name(to),
            "handed over"
        );
    }

    /// A new plan is needed: why the attempt before it is over. What a worker
    /// refused in words is logged where the word comes in, with its name.
    pub(super) fn log_over(&self, state: &State, cause: Cause) {
        let fence = state.machine.fence();
        let (generation, owner, attempt) = (self.id, fence.owner, fence.attempt);
        match cause {
            Cause::Start => {}
            Cause::Refused(Refusal::Unanswered) => {
                tracing::info!(%generation, owner, attempt, reason = ?Refusal::Unanswered, "refused");
            }
            Cause::Refused(_) => {}
            Cause::Returned | Cause::Failed | Cause::Lost(_) | Cause::Claimed => {
                let next_index = state.machine.next_index();
                tracing::info!(%generation, owner, attempt, reason = ?cause, next_index, "attempt ended");
            }
        }
    }

    /// The generation ended, with its attempt where one ran.
    pub(super) fn log_end(&self, state: &State, outcome: &Outcome) {
        let fence = state.machine.fence();
        let (generation, owner, attempt) = (self.id, fence.owner, fence.attempt);
        let next_index = state.machine.next_index();
        let usual = matches!(
            outcome,
            Outcome::Finished { .. } | Outcome::Stopped(Stop::ClientGone | Stop::StopString)
        );
        let ran = attempt > state.over;
        match (usual, ran) {
            (true, true) => {
                tracing::debug!(%generation, owner, attempt, reason = ?outcome, next_index, "attempt ended");
            }
            (true, false) => {
                tracing::debug!(%generation, owner, attempt, reason = ?outcome, next_index, "ended while it waited");
            }
            (false, true) => {
                tracing::info!(%generation, owner, attempt, reason = ?outcome, next_index, "attempt ended");
            }
            (false, false) => {
                tracing::info!(%generation, owner, attempt, reason = ?outcome, next_index, "ended while it waited");
            }
        }
    }
}

fn prefill_of(plan: &Plan) -> WorkerIndex {
    match *plan {
        Plan::Whole { on } => on,
        Plan::Mesh { prefill, .. } | Plan::Engine { prefill, .. } => prefill,
    }
}

fn decode_of(plan: &Plan) -> WorkerIndex {
    match *plan {
        Plan::Whole { on } => on,
        Plan::Mesh { decode, .. } | Plan::Engine { decode, .. } => decode,
    }
}
