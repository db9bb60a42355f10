//! The workers of a model as if they were one engine.

use kvmesh_wire::{
    v1::{self, Role, SessionState},
    vllm::grpc::engine::SchedulerLoad,
};

use super::engine::signed;
use crate::serve::Shared;

/// What the workers of a model have to do and what they hold, summed up: of all routers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Pool {
    /// Requests for the model that are open at this router.
    pub(super) open: u32,
    running: u64,
    waiting: u64,
    /// Prompt tokens that wait to be computed.
    waiting_tokens: u64,
    used_tokens: u64,
    /// Tokens that the pools hold.
    all_tokens: u64,
    /// KV blocks of the pools.
    pub(super) blocks: u64,
    /// Most requests that decode at once.
    pub(super) max_running: u64,
}

impl Pool {
    /// The workers that take a model's requests now.
    pub(super) fn of(shared: &Shared, model: &str) -> Self {
        let (open, waiting) = shared.mesh.open_of(model);
        let mut pool = Self {
            open: u32::try_from(open).unwrap_or(u32::MAX),
            // They wait here, and no worker knows of them.
            waiting: waiting as u64,
            ..Self::default()
        };
        for worker in shared.mesh.workers() {
            let live = matches!(
                worker.state(),
                SessionState::Live | SessionState::HalfOpen | SessionState::Suspect
            );
            if let Some(record) = worker.record.as_ref().filter(|_| live)
                && record.model.as_ref().is_some_and(|own| own.name == model)
            {
                pool.add(record, worker.load.as_ref());
            }
        }
        pool
    }

    fn add(&mut self, record: &v1::WorkerRecord, load: Option<&v1::Load>) {
        let can = record.capabilities.as_ref();
        let block = can.map_or(0, |can| u64::from(can.block_tokens));
        let blocks = can.map_or(0, |can| can.pool_blocks);
        self.blocks += blocks;
        self.all_tokens += blocks * block;
        let role = load.map_or(record.role(), v1::Load::role);
        if role != Role::Prefill {
            self.max_running += can.map_or(0, |can| u64::from(can.max_batch));
        }
        let Some(load) = load else {
            return;
        };
        for share in [load.own, load.others].into_iter().flatten() {
            self.running += u64::from(share.decoding) + u64::from(share.receiving);
            self.waiting += u64::from(share.queued);
            self.waiting_tokens += share.queued_prefill_tokens;
        }
        let kv = load.kv.unwrap_or_default();
        self.used_tokens += (kv.running + kv.pinned + kv.reserved) * block;
    }

    /// As the one rank of an engine.
    pub(super) fn scheduler_load(&self) -> SchedulerLoad {
        let share = |part: u64, whole: u64| match whole {
            0 => 0.0,
            whole => (part as f64 / whole as f64).min(1.0),
        };
        SchedulerLoad {
            num_running_reqs: signed(self.running),
            num_waiting_reqs: signed(self.waiting),
            num_total_reqs: signed(self.running + self.waiting),
            num_used_tokens: signed(self.used_tokens),
            max_total_num_tokens: signed(self.all_tokens),
            token_usage: share(self.used_tokens, self.all_tokens),
            utilization: share(self.running, self.max_running),
            max_running_requests: signed(self.max_running),
            num_waiting_uncached_tokens: signed(self.waiting_tokens),
            ..SchedulerLoad::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_add_up_and_prefill_alone_runs_no_answers() {
        let worker = |role: Role| v1::WorkerRecord {
            role: role.into(),
            capabilities: Some(v1::Capabilities {
                block_tokens: 16,
                pool_blocks: 10,
                max_batch: 4,
                ..v1::Capabilities::default()
            }),
            ..v1::WorkerRecord::default()
        };
        let share = |queued, decoding, receiving| v1::LoadShare {
            queued,
            queued_prefill_tokens: u64::from(queued) * 100,
            decoding,
            receiving,
            ..v1::LoadShare::default()
        };
        let load = |role: Role, own, others, running| v1::Load {
            role: role.into(),
            own: Some(own),
            others: Some(others),
            kv: Some(v1::KvRoom {
                running,
                pinned: 1,
                reserved: 1,
                free: 1,
                ..v1::KvRoom::default()
            }),
            ..v1::Load::default()
        };
        let mut pool = Pool::default();
        let prefill = load(Role::Prefill, share(2, 0, 0), share(1, 0, 0), 3);
        pool.add(&worker(Role::Prefill), Some(&prefill));
        let decode = load(Role::Decode, share(0, 2, 1), share(0, 0, 0), 1);
        pool.add(&worker(Role::Decode), Some(&decode));
        // One that has told nothing yet counts with what it has.
        pool.add(&worker(Role::Both), None);
        let told = pool.scheduler_load();
        assert_eq!(
            (
                told.num_running_reqs,
                told.num_waiting_reqs,
                told.num_total_reqs
            ),
            (3, 3, 6)
        );
        assert_eq!(
            (told.num_used_tokens, told.max_total_num_tokens),
            (128, 480)
        );
        assert_eq!(
            (told.max_running_requests, told.num_waiting_uncached_tokens),
            (8, 300)
        );
        assert!((told.token_usage - 128.0 / 480.0).abs() < 1e-9);
        assert!((told.utilization - 3.0 / 8.0).abs() < 1e-9);
        let nobody = Pool::default().scheduler_load();
        assert_eq!((nobody.token_usage, nobody.utilization), (0.0, 0.0));
    }
}
