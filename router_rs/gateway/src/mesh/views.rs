//! What workers say, in the scheduler's terms.

use std::{collections::BTreeSet, sync::Arc};

use kvmesh_kv_index::{CacheChange, KvIndex, Tier, WorkerSlot};
use kvmesh_scheduler::{
    Abilities, ByClass, Class, KvRoom, Load, PerClass, Phase, Reload, Role, Share, StepModel,
    UsualStreams, Work, WorkerView,
};
use kvmesh_wire::v1;

/// Labels of a worker's record: bytes a second at which cached blocks come back
/// to the device from the host's memory, and from disk.
const HOST_RELOAD: &str = "reload_host_bytes_per_s";
const DISK_RELOAD: &str = "reload_disk_bytes_per_s";

/// A worker that has just greeted: it takes nothing until its first load.
pub(super) fn view_of(
    slot: WorkerSlot,
    record: &v1::WorkerRecord,
    model: &v1::ModelRecord,
    capabilities: &v1::Capabilities,
    step: StepModel,
    left: PerClass<f64>,
) -> WorkerView {
    WorkerView {
        slot,
        role: role_of(v1::Role::try_from(record.role).unwrap_or_default()),
        phase: Phase::Loading,
        draining: false,
        suspect: false,
        model: model.name.as_str().into(),
        digest: model.digest.as_str().into(),
        adapters: Arc::new(model.adapters.keys().cloned().collect::<BTreeSet<_>>()),
        abilities: Arc::new(abilities_of(record, model, capabilities)),
        step,
        load: Load::default(),
        booked: Work::default(),
        computed: Work::default(),
        prompts: Vec::new(),
        left,
        usual: UsualStreams::default(),
        relay_ms: 0.0,
    }
}

/// A load report that came at this time on the clock of the choices.
pub(super) fn load_of(load: &v1::Load, now_ms: f64) -> Load {
    let kv = load.kv.unwrap_or_default();
    Load {
        own: share_of(load.own),
        others: share_of(load.others),
        kv: KvRoom {
            free: kv.free,
            evictable: kv.evictable,
            running: kv.running,
            pinned: kv.pinned,
            reserved: kv.reserved,
        },
        step_ends_ms: now_ms + (load.step_predicted_ms - load.step_age_ms).max(0.0),
    }
}

pub(super) fn phase_of(phase: v1::WorkerPhase) -> Phase {
    match phase {
        v1::WorkerPhase::Serving => Phase::Serving,
        v1::WorkerPhase::WarmingUp => Phase::WarmingUp,
        v1::WorkerPhase::Stopping => Phase::Stopping,
        v1::WorkerPhase::Loading | v1::WorkerPhase::Unspecified => Phase::Loading,
    }
}

/// A step model as it is told.
pub(super) fn told(model: &StepModel) -> v1::StepModel {
    v1::StepModel {
        a_ms: model.a_ms,
        b_ms: model.b_ms,
        c_ms: model.c_ms,
        d_ms: model.d_ms,
        e_ms: model.e_ms,
        relative_error: model.relative_error,
        saturating_chunk: model.saturating_chunk,
    }
}

/// What a frame of the cache lane came to.
pub(super) struct Fed {
    /// Number of the last event that is applied; `None` while a snapshot is not
    /// whole.
    pub(super) last: Option<u64>,
    /// Events of a kind that this version does not know.
    pub(super) dropped: u64,
}

/// Feeds a frame of the cache lane to the index.
pub(super) fn apply_cache(index: &KvIndex, slot: WorkerSlot, events: &v1::CacheEvents) -> Fed {
    let changes: Vec<CacheChange<'_>> = events
        .events
        .iter()
        .filter_map(|event| match event.kind.as_ref()? {
            v1::cache_event::Kind::Stored(stored) => Some(CacheChange::StoredAfter {
                parent: stored.parent,
                chain: &stored.chain,
                tier: tier_of(stored.tier),
            }),
            v1::cache_event::Kind::Removed(removed) => Some(CacheChange::Removed {
                chain: &removed.chain,
                tier: tier_of(removed.tier),
            }),
            v1::cache_event::Kind::Cleared(_) => Some(CacheChange::Cleared),
        })
        .collect();
    let count = events.events.len() as u64;
    let dropped = count - changes.len() as u64;
    if let Some(part) = &events.snapshot {
        // The slot is this session's own: it is there.
        let _ = index.snapshot(slot, &changes, part.first, part.last);
        let last = part.last.then_some(part.as_of_event);
        return Fed { last, dropped };
    }
    let _ = index.apply(slot, &changes);
    let last = (count > 0).then(|| events.first_event.saturating_add(count - 1));
    Fed { last, dropped }
}

fn tier_of(tier: i32) -> Tier {
    match v1::CacheTier::try_from(tier) {
        Ok(v1::CacheTier::Host) => Tier::Host,
        Ok(v1::CacheTier::Disk) => Tier::Disk,
        Ok(v1::CacheTier::Device) | Err(_) => Tier::Device,
    }
}

pub(super) fn role_of(role: v1::Role) -> Role {
    match role {
        v1::Role::Prefill => Role::Prefill,
        v1::Role::Decode => Role::Decode,
        v1::Role::Both | v1::Role::Unspecified => Role::Both,
    }
}

fn share_of(share: Option<v1::LoadShare>) -> Share {
    let share = share.unwrap_or_default();
    Share {
        queued: share.queued,
        queued_prefill_tokens: share.queued_prefill_tokens,
        running_prefill_tokens: share.running_prefill_tokens,
        decoding: share.decoding,
        decode_context: share.decode_context,
        receiving: share.receiving,
        classes: classes_of(&share),
    }
}

/// Counts that a worker does not tell stay zero, and those of the sums count as
/// standard.
fn classes_of(share: &v1::LoadShare) -> ByClass {
    let mut all = ByClass::default();
    let told = [
        (Class::Interactive, share.interactive),
        (Class::Standard, share.standard),
        (Class::Batch, share.batch),
    ];
    for (class, of_class) in told {
        let of_class = of_class.unwrap_or_default();
        all.waiting[class.index()] = of_class.waiting;
        all.waiting_tokens[class.index()] = of_class.waiting_tokens;
        all.decoding[class.index()] = of_class.decoding;
    }
    all
}

pub(super) fn step_model_of(model: v1::StepModel) -> StepModel {
    StepModel {
        a_ms: model.a_ms,
        b_ms: model.b_ms,
        c_ms: model.c_ms,
        d_ms: model.d_ms,
        e_ms: model.e_ms,
        relative_error: model.relative_error,
        saturating_chunk: model.saturating_chunk,
    }
}

fn abilities_of(
    record: &v1::WorkerRecord,
    model: &v1::ModelRecord,
    capabilities: &v1::Capabilities,
) -> Abilities {
    // All of it as one text: only equal ones exchange KV. Unequal block sizes
    // are unequal geometry, which the first release refuses.
    let pairing = format!("{:?} {}", capabilities.kv, capabilities.block_tokens);
    let transfer = !record.transfer_address.is_empty();
    Abilities {
        streamed_hand_off: capabilities.streamed_hand_off && transfer,
        prefill_emits_first_token: capabilities.prefill_emits_first_token,
        layer_preemption: capabilities.layer_preemption,
        host: host_of(&record.transfer_address).into(),
        engine_connector: capabilities.engine_connector.as_str().into(),
        pairing: pairing.into(),
        prefix_pull: capabilities.prefix_pull && transfer,
        reload: reload_of(record),
        grammars: capabilities.grammars,
        grammars_over_continuation: capabilities.grammars_over_continuation,
        penalties_over_continuation: capabilities.penalties_over_continuation,
        max_logprobs: capabilities.max_logprobs,
        no_cache_salt: capabilities.no_cache_salt,
        block_tokens: capabilities.block_tokens,
        pool_blocks: capabilities.pool_blocks,
        block_bytes: capabilities.block_bytes,
        max_batch: capabilities.max_batch,
        context_length: model.context_length,
    }
}

/// What a worker's labels say of bringing cached blocks back, or the prior.
fn reload_of(record: &v1::WorkerRecord) -> Reload {
    let prior = Reload::default();
    let said = |label: &str, prior: u64| {
        let rate = record.labels.get(label).and_then(|text| text.parse().ok());
        // Bytes a second as people write it; the scheduler counts in ms.
        rate.map_or(prior, |bytes_per_s: u64| (bytes_per_s / 1_000).max(1))
    };
    Reload {
        host: said(HOST_RELOAD, prior.host),
        disk: said(DISK_RELOAD, prior.disk),
    }
}

/// The host of an address: workers with the same one are taken to share memory.
fn host_of(address: &str) -> &str {
    address.rsplit_once(':').map_or("", |(host, _)| host)
}
