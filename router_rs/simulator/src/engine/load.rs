//! What an engine says of itself.

use super::{Engine, class_number};
use kvmesh_scheduler::{KvRoom, Load, Share};

/// A load report before it is told who asks.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct EngineLoad {
    /// By router.
    pub shares: Vec<Share>,
    /// The pool, in units of 16 tokens.
    pub kv: KvRoom,
}

impl EngineLoad {
    /// As a router sees it, where the running step has so long to go.
    pub(crate) fn of(&self, router: usize, now_ms: f64, step_left_ms: f64) -> Load {
        let mut others = Share::default();
        for (number, share) in self.shares.iter().enumerate() {
            if number != router {
                add(&mut others, share);
            }
        }
        Load {
            own: self.shares[router],
            others,
            kv: self.kv,
            step_ends_ms: now_ms + step_left_ms,
        }
    }
}

fn add(sum: &mut Share, share: &Share) {
    sum.queued += share.queued;
    sum.queued_prefill_tokens += share.queued_prefill_tokens;
    sum.running_prefill_tokens += share.running_prefill_tokens;
    sum.decoding += share.decoding;
    sum.decode_context += share.decode_context;
    sum.receiving += share.receiving;
    for class in 0..3 {
        sum.classes.waiting[class] += share.classes.waiting[class];
        sum.classes.waiting_tokens[class] += share.classes.waiting_tokens[class];
        sum.classes.decoding[class] += share.classes.decoding[class];
    }
}

impl Engine {
    /// Its load now.
    pub(crate) fn load(&self) -> EngineLoad {
        let mut shares = vec![Share::default(); self.settings.routers];
        for sequence in self.prompts.iter() {
            let share = &mut shares[sequence.router];
            let left = u64::from(sequence.left_to_compute());
            let class = class_number(sequence.class);
            share.classes.waiting[class] += 1;
            share.classes.waiting_tokens[class] += left;
            if sequence.started {
                share.running_prefill_tokens += left;
            } else {
                share.queued += 1;
                share.queued_prefill_tokens += left;
            }
        }
        for sequence in self.incoming.values() {
            let share = &mut shares[sequence.router];
            share.receiving += 1;
            share.classes.decoding[class_number(sequence.class)] += 1;
        }
        for (router, share) in shares.iter_mut().enumerate() {
            let (decoding, context) = self.streams.of_router(router);
            share.decoding = decoding.iter().sum();
            for (sum, decoding) in share.classes.decoding.iter_mut().zip(decoding) {
                *sum += decoding;
            }
            share.decode_context = context;
        }
        let reserved: u64 = self
            .incoming
            .values()
            .map(|sequence| sequence.own_units)
            .sum();
        EngineLoad {
            shares,
            kv: KvRoom {
                free: self.pool.free_units(),
                evictable: self.pool.evictable(),
                running: self.pool.running() - reserved,
                pinned: 0,
                reserved,
            },
        }
    }
}
