//! Requests and workers as the scheduler sees them.

use super::{Asked, EXPECTED_OUTPUT, MODEL};
use crate::seed::mix;
use crate::settings::Settings;
use crate::trace::Trace;
use kvmesh_kv_index::{Matches, UNIT_TOKENS, WorkerSlot};
use kvmesh_scheduler::{
    Abilities, Load, Needs, OutputLengths, Phase, Reload, RequestView, Role, UsualStreams, Work,
    WorkerView,
};
use std::collections::BTreeSet;
use std::sync::Arc;

pub(super) fn request_view<'a>(
    lengths: &OutputLengths,
    cached: &'a Matches,
    trace: &Trace,
    (asked, virtual_deadline_ms): (Asked, f64),
    excluded: &'a [WorkerSlot],
) -> RequestView<'a> {
    let request = &trace.requests[asked.request as usize];
    let (made, most) = (asked.made, asked.max_tokens);
    RequestView {
        id: u128::from(mix(u64::from(asked.request))),
        model: MODEL,
        digest: "",
        adapter: "",
        prompt_tokens: request.prompt,
        output_tokens: made,
        max_tokens: most,
        expected_output: lengths.expected(MODEL, request.class, made, most),
        class: request.class,
        itl_target_ms: None,
        virtual_deadline_ms,
        affinity: trace
            .blocks(asked.request as usize)
            .first()
            .map_or(mix(u64::from(asked.request)), |block| mix(*block)),
        needs: Needs::default(),
        cached,
        excluded,
    }
}

/// A worker before its first report.
pub(super) fn view(slot: usize, role: Role, settings: &Settings) -> WorkerView {
    let profile = &settings.profile;
    let pool_blocks = profile.pool_tokens / UNIT_TOKENS as u64;
    let mut load = Load::default();
    load.kv.free = pool_blocks;
    WorkerView {
        slot: WorkerSlot(slot as u32),
        role,
        phase: Phase::Serving,
        draining: false,
        suspect: false,
        model: MODEL.into(),
        digest: "".into(),
        adapters: Arc::new(BTreeSet::new()),
        abilities: Arc::new(Abilities {
            streamed_hand_off: true,
            prefill_emits_first_token: true,
            layer_preemption: profile.layer_preemption,
            host: "".into(),
            engine_connector: "".into(),
            pairing: "".into(),
            prefix_pull: settings.prefix_pull,
            reload: Reload::default(),
            grammars: false,
            grammars_over_continuation: false,
            penalties_over_continuation: false,
            max_logprobs: 0,
            no_cache_salt: false,
            block_tokens: UNIT_TOKENS as u32,
            pool_blocks,
            block_bytes: profile.kv_bytes_per_token * UNIT_TOKENS as u64,
            max_batch: profile.max_batch,
            context_length: profile.context_length,
        }),
        step: settings.believed(),
        load,
        booked: Work::default(),
        computed: Work::default(),
        prompts: Vec::new(),
        left: [f64::from(EXPECTED_OUTPUT); 3],
        usual: UsualStreams::default(),
        relay_ms: 0.0,
    }
}
