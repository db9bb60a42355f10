//! What a mock worker does wrong, changeable while it runs.

use std::{
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use kvmesh_wire::v1::RefusalReason;

/// Faults in force. `Default` is none.
#[derive(Clone, Debug, PartialEq)]
pub struct FaultPlan {
    /// So many placements from now on are refused.
    pub refuse_next: u32,
    /// Reason given for them.
    pub refuse_reason: RefusalReason,
    /// Field that they name as what is lacking.
    pub refuse_field: String,
    /// So many calls of Drain and SetRole from now on are refused
    /// (FAILED_PRECONDITION).
    pub refuse_calls_next: u32,
    /// So many downloads of the tokeniser from now on fail.
    pub fail_tokenizer_next: u32,
    /// Downloads of the tokeniser are not answered until this is unset, while all else goes on.
    pub hold_tokenizer: bool,
    /// So many placements from now on get neither `reserved` nor `refused`;
    /// they run all the same.
    pub skip_openings: u32,
    /// Added before the first token of each placement from now on.
    pub delay_first_token: Duration,
    /// After so many tokens, over all requests, the worker dies as by kill -9.
    pub die_after_tokens: Option<u64>,
    /// Each row is followed by one of the attempt before, with other tokens.
    pub stale_rows: bool,
    /// No request goes on from this output index until this is unset, 0: no prompt ends.
    /// Others are in steps as before, and no step is longer for it: what a test does to
    /// streams finds them running, however long it takes.
    pub hold_at: Option<u32>,
    /// Output index that is left out.
    pub hole_at: Option<u32>,
    /// Requests fail when they reach this output index.
    pub fail_at: Option<u32>,
    /// So many more requests fail so. Does not count where `fail_at` is unset.
    pub fail_next: u32,
    /// Status code (google.rpc.Code) of those failures.
    pub fail_code: u32,
    /// Requests are given back (`returned`, NO_ROOM) when they reach this
    /// output index; once each.
    pub return_at: Option<u32>,
    /// So many more requests are given back so.
    pub return_next: u32,
    /// Streams are not handed over: the receiver's transfer fails.
    pub keep_streams: bool,
    /// Transfers that it pulls fail.
    pub fail_pulls: bool,
    /// Finds are not answered until this is unset, while other frames go on.
    pub hold_finds: bool,
    /// Claims are not answered until this is unset.
    pub hold_claims: bool,
    /// A prefill hears of no cancel before it has handed off, as where the two cross.
    pub late_cancels: bool,
    /// Stages that a cancel ends are not told of.
    pub untold_cancels: bool,
    /// Loads say again what the last one said before this was set.
    pub old_loads: bool,
    /// What it says that each of its steps took. `None`: the truth.
    pub say_step: Option<Duration>,
    /// No step ends any more, while load frames go on: a stuck engine thread
    /// under a beating event loop.
    pub stuck: bool,
}

impl Default for FaultPlan {
    fn default() -> Self {
        Self {
            refuse_next: 0,
            refuse_reason: RefusalReason::NoRoom,
            refuse_field: String::new(),
            refuse_calls_next: 0,
            fail_tokenizer_next: 0,
            hold_tokenizer: false,
            skip_openings: 0,
            delay_first_token: Duration::ZERO,
            die_after_tokens: None,
            stale_rows: false,
            hold_at: None,
            hole_at: None,
            fail_at: None,
            fail_next: 0,
            fail_code: 13,
            return_at: None,
            return_next: 0,
            keep_streams: false,
            fail_pulls: false,
            hold_finds: false,
            hold_claims: false,
            late_cancels: false,
            untold_cancels: false,
            old_loads: false,
            say_step: None,
            stuck: false,
        }
    }
}

/// The faults of one worker.
#[derive(Debug, Default)]
pub struct Faults {
    plan: Mutex<FaultPlan>,
    frozen: Mutex<bool>,
    thawed: Condvar,
}

impl Faults {
    /// Changes the plan in place.
    pub fn set(&self, change: impl FnOnce(&mut FaultPlan)) {
        change(&mut self.plan());
    }

    /// What a call of Drain or SetRole comes to.
    pub(super) fn call(&self) -> Result<(), tonic::Status> {
        let mut plan = self.plan();
        if plan.refuse_calls_next == 0 {
            return Ok(());
        }
        plan.refuse_calls_next -= 1;
        Err(tonic::Status::failed_precondition("asked to refuse"))
    }

    /// The plan in force.
    #[must_use]
    pub fn get(&self) -> FaultPlan {
        self.plan().clone()
    }

    pub(super) fn plan(&self) -> MutexGuard<'_, FaultPlan> {
        self.plan.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set_frozen(&self, frozen: bool) {
        *self.frozen.lock().unwrap_or_else(PoisonError::into_inner) = frozen;
        self.thawed.notify_all();
    }

    /// Blocks the calling thread while frozen: its sockets stay open and
    /// nothing is read or written, as in a stopped process.
    pub(super) fn block_while_frozen(&self) {
        let mut frozen = self.frozen.lock().unwrap_or_else(PoisonError::into_inner);
        while *frozen {
            frozen = self
                .thawed
                .wait(frozen)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}
