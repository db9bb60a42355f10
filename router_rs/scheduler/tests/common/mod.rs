//! Workers and requests to schedule.
#![allow(dead_code)]

use kvmesh_kv_index::{CacheChange, IndexSettings, Knowledge, KvIndex, Matches, Tier, WorkerSlot};
use kvmesh_scheduler::{
    Abilities, Class, KvRoom, Load, Needs, Phase, Reload, RequestView, Role, StepModel,
    UsualStreams, Work, WorkerView,
};
use std::sync::Arc;

pub(crate) fn worker(slot: u32, role: Role) -> WorkerView {
    WorkerView {
        slot: WorkerSlot(slot),
        role,
        phase: Phase::Serving,
        draining: false,
        suspect: false,
        model: "m".into(),
        digest: "d".into(),
        adapters: Arc::default(),
        abilities: Arc::new(Abilities {
            streamed_hand_off: true,
            prefill_emits_first_token: true,
            layer_preemption: true,
            host: "".into(),
            engine_connector: "".into(),
            pairing: "fp32".into(),
            prefix_pull: true,
            reload: Reload::default(),
            grammars: false,
            grammars_over_continuation: false,
            penalties_over_continuation: true,
            max_logprobs: 20,
            no_cache_salt: false,
            block_tokens: 16,
            pool_blocks: 1_000,
            block_bytes: 1_024,
            max_batch: 64,
            context_length: 8_192,
        }),
        step: StepModel {
            a_ms: 5.0,
            b_ms: 0.5,
            c_ms: 1e-5,
            d_ms: 1.0,
            e_ms: 0.001,
            relative_error: 0.1,
            saturating_chunk: 256,
        },
        load: Load {
            kv: KvRoom {
                free: 1_000,
                ..KvRoom::default()
            },
            ..Load::default()
        },
        booked: Work::default(),
        computed: Work::default(),
        prompts: Vec::new(),
        left: [128.0; 3],
        usual: UsualStreams::default(),
        relay_ms: 0.0,
    }
}

pub(crate) fn request<'a>(cached: &'a Matches, id: u128) -> RequestView<'a> {
    RequestView {
        id,
        model: "m",
        digest: "",
        adapter: "",
        prompt_tokens: 1_024,
        output_tokens: 0,
        max_tokens: 256,
        expected_output: 128,
        class: Class::Standard,
        itl_target_ms: None,
        virtual_deadline_ms: f64::INFINITY,
        affinity: id as u64,
        needs: Needs::default(),
        cached,
        excluded: &[],
    }
}

/// Matches in which these workers hold so many tokens of a prompt of 1,024.
pub(crate) fn cached(held: &[(u32, u32)]) -> Matches {
    let index = KvIndex::new(IndexSettings::default());
    let chain: Vec<u64> = (1..=64).collect();
    for slot in 0..40u32 {
        let added = index.add_worker(16, Knowledge::Events).unwrap();
        assert_eq!(added, WorkerSlot(slot));
    }
    for &(slot, tokens) in held {
        let part = [CacheChange::Stored {
            chain: &chain[..tokens as usize / 16],
            tier: Tier::Device,
        }];
        index.apply(WorkerSlot(slot), &part).unwrap();
    }
    index.lookup(&chain)
}
