//! What all sessions of one mock worker share.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering},
    },
    time::Instant,
};

use kvmesh_wire::v1::{
    CacheEvents, Capabilities, Continuation, KvCompatibility, KvRoom, Load, LoadShare, ModelRecord,
    Place, ProtocolVersion, Residue, Role, StepModel, WorkerPhase, WorkerRecord,
};
use tokio::sync::broadcast;
use tokio_util::sync::CancellationToken;

use super::{config::MockConfig, faults::Faults, hand_off::Offers};
use crate::tokens::TokenFunction;

/// Tokens in a block of the pretended pool.
pub(super) const BLOCK_TOKENS: u64 = 16;

/// Cache frames that may wait for a session; older ones are lost to it.
const CACHE_FRAMES: usize = 256;

/// Everything that the tasks of one worker share.
#[derive(Debug)]
pub(super) struct State {
    pub(super) config: MockConfig,
    pub(super) record: WorkerRecord,
    pub(super) tokens: TokenFunction,
    pub(super) faults: Faults,
    pub(super) counters: Counters,
    pub(super) offers: Offers,
    /// Frames of the cache lane, for every open session.
    pub(super) cache: broadcast::Sender<CacheEvents>,
    /// Cancelled when the worker is to end.
    pub(super) stop: CancellationToken,
    pub(super) died: AtomicBool,
    pub(super) draining: AtomicBool,
    role: AtomicI32,
    started: Instant,
    step_began_us: AtomicU64,
    sessions: Mutex<BTreeMap<String, Session>>,
    placed: Mutex<Option<Place>>,
    /// What every output is, in place of what the function names.
    said: Mutex<Option<Arc<[u32]>>>,
}

/// One open Attach stream.
#[derive(Debug)]
struct Session {
    number: u64,
    end: CancellationToken,
}

impl State {
    pub(super) fn new(config: MockConfig, address: String, transfer_address: String) -> Self {
        let record = record(&config, address, transfer_address);
        Self {
            tokens: TokenFunction::new(Arc::clone(&config.vocabulary)),
            role: AtomicI32::new(config.role as i32),
            config,
            record,
            faults: Faults::default(),
            counters: Counters::default(),
            offers: Offers::default(),
            cache: broadcast::Sender::new(CACHE_FRAMES),
            stop: CancellationToken::new(),
            died: AtomicBool::new(false),
            draining: AtomicBool::new(false),
            started: Instant::now(),
            step_began_us: AtomicU64::new(0),
            sessions: Mutex::default(),
            placed: Mutex::default(),
            said: Mutex::default(),
        }
    }

    pub(super) fn say(&self, ids: Option<Vec<u32>>) {
        *self.said.lock().unwrap_or_else(PoisonError::into_inner) = ids.map(Arc::from);
    }

    pub(super) fn said(&self) -> Option<Arc<[u32]>> {
        self.said
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Keeps what a placement is called, whose it and its prefix are, where it came
    /// from, how urgent it is, and what it asks for but its prompt.
    pub(super) fn note_place(&self, place: &Place) {
        let continuation = place.continuation.as_ref().map(|from| Continuation {
            model: from.model.clone(),
            sampling: from.sampling.clone(),
            max_tokens: from.max_tokens,
            min_tokens: from.min_tokens,
            request_class: from.request_class,
            cache_salt: from.cache_salt.clone(),
            grammar: from.grammar.clone(),
            virtual_deadline_ms: from.virtual_deadline_ms,
            ..Continuation::default()
        });
        let named = Place {
            continuation,
            stage: place.stage,
            request_id: place.request_id.clone(),
            traceparent: place.traceparent.clone(),
            tracestate: place.tracestate.clone(),
            baggage: place.baggage.clone(),
            tenant: place.tenant.clone(),
            resume_state: place.resume_state.clone(),
            trace: place.trace,
            ..Place::default()
        };
        *self.placed.lock().unwrap_or_else(PoisonError::into_inner) = Some(named);
    }

    pub(super) fn last_place(&self) -> Option<Place> {
        let placed = self.placed.lock();
        placed.unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn set_role(&self, role: Role) {
        self.role.store(role as i32, Ordering::Relaxed);
    }

    pub(super) fn set_draining(&self, draining: bool) {
        self.draining.store(draining, Ordering::Relaxed);
    }

    /// Ends the process's part of this worker, as kill -9 would.
    pub(super) fn die(&self) {
        self.died.store(true, Ordering::Relaxed);
        self.stop.cancel();
    }

    /// Registers a session; an older one of the same router ends.
    pub(super) fn open_session(&self, router_id: &str) -> (u64, CancellationToken) {
        let end = self.stop.child_token();
        let number = self.counters.sessions_opened.add(1);
        let mut sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        let session = Session {
            number,
            end: end.clone(),
        };
        if let Some(old) = sessions.insert(router_id.to_owned(), session) {
            old.end.cancel();
        }
        (number, end)
    }

    pub(super) fn close_session(&self, router_id: &str, number: u64) {
        let mut sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        if sessions.get(router_id).is_some_and(|s| s.number == number) {
            sessions.remove(router_id);
        }
    }

    /// Ends all sessions; the worker stays.
    pub(super) fn break_sessions(&self) {
        let sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        for session in sessions.values() {
            session.end.cancel();
        }
    }

    pub(super) fn routers(&self) -> Vec<String> {
        let sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        sessions.keys().cloned().collect()
    }

    /// Notes the begin of a step and gives its number.
    pub(super) fn begin_step(&self) -> u64 {
        let now = self.started.elapsed().as_micros() as u64;
        self.step_began_us.store(now, Ordering::Relaxed);
        self.counters.steps.add(1)
    }

    /// Load as a router with `own` sees it.
    pub(super) fn load(&self, last_command: u64, own: LoadShare) -> Load {
        let all = self.counters.share();
        let stuck = self.faults.plan().stuck;
        let age_us = self.started.elapsed().as_micros() as u64;
        let age_us = age_us.saturating_sub(self.step_began_us.load(Ordering::Relaxed));
        Load {
            last_command,
            role: self.role.load(Ordering::Relaxed),
            phase: WorkerPhase::Serving as i32,
            draining: self.draining.load(Ordering::Relaxed),
            kv: Some(self.room()),
            others: Some(LoadShare {
                queued: all.queued.saturating_sub(own.queued),
                queued_prefill_tokens: all
                    .queued_prefill_tokens
                    .saturating_sub(own.queued_prefill_tokens),
                running_prefill_tokens: 0,
                decoding: all.decoding.saturating_sub(own.decoding),
                decode_context: all.decode_context.saturating_sub(own.decode_context),
                receiving: all.receiving.saturating_sub(own.receiving),
                ..LoadShare::default()
            }),
            own: Some(own),
            step: self.counters.steps.get(),
            step_age_ms: if stuck { age_us as f64 / 1e3 } else { 0.0 },
            step_predicted_ms: self.config.step.as_secs_f64() * 1e3,
            engine_silent: false,
        }
    }

    /// Load for people: `own` counts all routers together.
    pub(super) fn whole_load(&self) -> Load {
        self.load(0, self.counters.share())
    }

    pub(super) fn room(&self) -> KvRoom {
        let held = self.counters.held_blocks.get();
        KvRoom {
            free: self.config.pool_blocks.saturating_sub(held),
            evictable: 0,
            running: held,
            pinned: 0,
            reserved: 0,
        }
    }

    pub(super) fn residue(&self) -> Residue {
        Residue {
            requests: self.counters.running.get(),
            transfers: self.offers.open() + self.counters.receiving.get(),
            held_blocks: self.counters.held_blocks.get(),
            orphans: 0,
        }
    }
}

/// A counter that tasks share.
#[derive(Debug, Default)]
pub(super) struct Count(AtomicU64);

impl Count {
    /// Adds and gives the new value.
    pub(super) fn add(&self, n: u64) -> u64 {
        self.0.fetch_add(n, Ordering::Relaxed) + n
    }

    pub(super) fn sub(&self, n: u64) {
        self.0.fetch_sub(n, Ordering::Relaxed);
    }

    pub(super) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Counters of a worker.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) sessions_opened: Count,
    pub(super) sessions: Count,
    pub(super) steps: Count,
    pub(super) tokens: Count,
    pub(super) placed: Count,
    pub(super) refused: Count,
    pub(super) finished: Count,
    pub(super) handed_off: Count,
    pub(super) cancelled: Count,
    pub(super) claims: Count,
    pub(super) failed: Count,
    pub(super) returned: Count,
    pub(super) dropped: Count,
    /// Gauges: these return to zero.
    pub(super) running: Count,
    pub(super) decoding: Count,
    pub(super) receiving: Count,
    pub(super) queued: Count,
    pub(super) queued_tokens: Count,
    pub(super) decode_context: Count,
    pub(super) held_blocks: Count,
    pub(super) direct_streams: Count,
    pub(super) direct_requests: Count,
}

impl Counters {
    fn share(&self) -> LoadShare {
        LoadShare {
            queued: self.queued.get() as u32,
            queued_prefill_tokens: self.queued_tokens.get(),
            running_prefill_tokens: 0,
            decoding: self.decoding.get() as u32,
            decode_context: self.decode_context.get(),
            receiving: self.receiving.get() as u32,
            ..LoadShare::default()
        }
    }
}

/// What a mock worker has done and holds, at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct MockCounters {
    /// Attach streams open now.
    pub sessions: u64,
    /// Attach streams that were ever opened.
    pub sessions_opened: u64,
    /// Steps taken.
    pub steps: u64,
    /// Tokens produced.
    pub tokens: u64,
    /// Placements accepted.
    pub placed: u64,
    /// Placements refused.
    pub refused: u64,
    /// Stages that ended as `finished`.
    pub finished: u64,
    /// Stages that ended as `handed_off`.
    pub handed_off: u64,
    /// Stages that ended as `cancelled`.
    pub cancelled: u64,
    /// Claims that came in.
    pub claims: u64,
    /// Stages that ended as `failed` or `transfer_failed`.
    pub failed: u64,
    /// Stages that ended as `returned`.
    pub returned: u64,
    /// Stages dropped because their session ended.
    pub dropped: u64,
    /// Stages held now. Must return to zero.
    pub running: u64,
    /// Blocks of the pretended pool held now. Must return to zero.
    pub held_blocks: u64,
    /// Offers and pulls open now. Must return to zero.
    pub transfers: u64,
    /// Streams of `Inference.Generate` open now. Must return to zero.
    pub direct_streams: u64,
    /// Streams of `Inference.Generate` ever opened.
    pub direct_requests: u64,
}

impl MockCounters {
    pub(super) fn read(state: &State) -> Self {
        let c = &state.counters;
        Self {
            sessions: c.sessions.get(),
            sessions_opened: c.sessions_opened.get(),
            steps: c.steps.get(),
            tokens: c.tokens.get(),
            placed: c.placed.get(),
            refused: c.refused.get(),
            finished: c.finished.get(),
            handed_off: c.handed_off.get(),
            cancelled: c.cancelled.get(),
            claims: c.claims.get(),
            failed: c.failed.get(),
            returned: c.returned.get(),
            dropped: c.dropped.get(),
            running: c.running.get(),
            held_blocks: c.held_blocks.get(),
            transfers: state.offers.open() + c.receiving.get(),
            direct_streams: c.direct_streams.get(),
            direct_requests: c.direct_requests.get(),
        }
    }
}

fn record(config: &MockConfig, address: String, transfer_address: String) -> WorkerRecord {
    let port = address.rsplit(':').next().unwrap_or_default();
    WorkerRecord {
        worker_id: config
            .worker_id
            .clone()
            .unwrap_or_else(|| format!("mock-{port}")),
        incarnation: config
            .incarnation
            .unwrap_or_else(|| rand::random::<u64>() | 1),
        address,
        transfer_address,
        role: config.role as i32,
        model: Some(ModelRecord {
            name: config.model.clone(),
            digest: config.model_digest.clone(),
            tokenizer_digest: config.vocabulary.digest().to_owned(),
            context_length: config.context_length,
            vocabulary_size: config.vocabulary.size(),
            end_of_text_ids: config.vocabulary.end_of_text_ids().to_vec(),
            ..Default::default()
        }),
        capabilities: Some(Capabilities {
            engine: "mock".to_owned(),
            streamed_hand_off: config.engine_connector.is_empty(),
            engine_connector: config.engine_connector.clone(),
            prefill_emits_first_token: config.prefill_emits_first_token,
            reproducible: true,
            penalties_over_continuation: config.penalties_over_continuation,
            max_logprobs: config.max_logprobs,
            no_cache_salt: config.no_cache_salt,
            grammars: config.grammars,
            grammars_over_continuation: config.grammars_over_continuation,
            block_tokens: config.block_tokens,
            pool_blocks: config.pool_blocks,
            block_bytes: 1024,
            hash_scheme: config.hash_scheme,
            cache_events: config.cache_events,
            kv: Some(KvCompatibility {
                model_digest: config.model_digest.clone(),
                dtype: "float32".to_owned(),
                format: 1,
                layers: 1,
                kv_heads: 1,
                head_size: 8,
                ..Default::default()
            }),
            max_batch: config.max_batch,
            ..Default::default()
        }),
        step_model: Some(step_model(config)),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        ..Default::default()
    }
}

pub(super) fn step_model(config: &MockConfig) -> StepModel {
    StepModel {
        a_ms: config.step.as_secs_f64() * 1e3,
        relative_error: 0.1,
        saturating_chunk: 512,
        ..Default::default()
    }
}

pub(super) fn protocol_version(config: &MockConfig) -> ProtocolVersion {
    ProtocolVersion {
        major: config.version.0,
        minor: config.version.1,
    }
}
