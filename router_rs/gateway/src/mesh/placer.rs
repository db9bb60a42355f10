//! What this router knows of its workers, in the scheduler's terms.
//!
//! Translates hellos, loads and step samples into [`WorkerView`]s, keeps one
//! index slot a worker, and asks the policy. Pure but for the index, which is
//! shared with the sessions that feed it.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use kvmesh_kv_index::{CacheChange, Knowledge, KvIndex, Matches, Tier, WorkerSlot};
use kvmesh_scheduler::{
    Abilities, Admission, AdmissionSettings, Booking, Bookings, Class, Cluster, Considered, KvCost,
    KvRoom, Learner, Load, Needs, NoPlan, Phase, Plan, Policy, Rejected, RequestView, Role, Share,
    StepModel, StepSample, WorkerView, admit,
};
use kvmesh_session::{WorkerIndex, parse::LoadReport};
use kvmesh_wire::v1;

/// How long what was sent to a worker without cache events counts as cached.
const APPROXIMATE_TTL_MS: u64 = 120_000;

/// Whether a worker can be placed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// It can.
    Ready,
    /// Not now: whoever wants it waits.
    Suspect,
    /// It is not there.
    Absent,
}

/// A worker with what is learnt of it.
struct Known {
    standing: Standing,
    /// Digests agree with those of the other workers of its model.
    fits: bool,
    view: WorkerView,
    learner: Learner,
    capabilities: v1::Capabilities,
    /// Predicted length of the step that runs.
    step_ms: f64,
}

/// What a plan is for.
pub(super) struct Wanted<'a> {
    pub(super) request: RequestView<'a>,
    /// Whether the plans considered are wanted too.
    pub(super) explain: bool,
}

/// A plan with its bookings.
pub(super) struct Placed {
    pub(super) plan: Plan,
    pub(super) prefill: WorkerIndex,
    pub(super) decode: WorkerIndex,
    pub(super) source: Option<WorkerIndex>,
    /// For two workers: the connector's hand-off, and whether prefill's tokens
    /// count; else a mesh transfer.
    pub(super) engine: Option<bool>,
    pub(super) bookings: Vec<(WorkerIndex, Booking)>,
    pub(super) chosen: Considered,
    pub(super) considered: Vec<Considered>,
    pub(super) start_ms: f64,
    /// Predicted length of the step that runs where the prompt goes.
    pub(super) step_ms: f64,
}

/// Why a request is turned away.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Turned {
    /// Nobody will ever run it.
    Never(NoPlan),
    /// It would wait for too long.
    Waits(Rejected),
}

/// All workers.
pub(super) struct Placer {
    pub(super) index: Arc<KvIndex>,
    router: u64,
    policy: Box<dyn Policy>,
    bookings: Bookings,
    workers: BTreeMap<WorkerIndex, Known>,
}

impl Placer {
    pub(super) fn new(index: Arc<KvIndex>, router: u64) -> Self {
        Self {
            index,
            router,
            policy: Box::new(KvCost::default()),
            bookings: Bookings::new(),
            workers: BTreeMap::new(),
        }
    }

    /// The policy's name.
    pub(super) fn policy(&self) -> &'static str {
        self.policy.name()
    }

    /// A worker said who it is. Its index slot is kept within an incarnation.
    pub(super) fn greeted(
        &mut self,
        worker: WorkerIndex,
        record: &v1::WorkerRecord,
        step_model: Option<v1::StepModel>,
        fits: bool,
    ) {
        let (Some(model), Some(capabilities)) = (&record.model, &record.capabilities) else {
            return;
        };
        let Some(slot) = self.slot_for(worker, capabilities) else {
            return;
        };
        self.bookings.session_ended(slot);
        let step = step_model.map_or_else(StepModel::default, step_model_of);
        let view = WorkerView {
            slot,
            role: role_of(v1::Role::try_from(record.role).unwrap_or_default()),
            // Until its first load it takes nothing.
            phase: Phase::Loading,
            draining: false,
            suspect: false,
            model: model.name.as_str().into(),
            digest: model.digest.as_str().into(),
            adapters: Arc::new(model.adapters.keys().cloned().collect::<BTreeSet<_>>()),
            abilities: Arc::new(abilities_of(record, model, capabilities)),
            step,
            load: Load::default(),
            booked: kvmesh_scheduler::Work::default(),
            prompts: Vec::new(),
            left: [256.0; 3],
        };
        let known = Known {
            standing: Standing::Absent,
            fits,
            view,
            learner: Learner::new(step),
            capabilities: capabilities.clone(),
            step_ms: 0.0,
        };
        self.workers.insert(worker, known);
    }

    fn slot_for(
        &mut self,
        worker: WorkerIndex,
        capabilities: &v1::Capabilities,
    ) -> Option<WorkerSlot> {
        if let Some(known) = self.workers.get(&worker) {
            let before = &known.capabilities;
            if before.block_tokens == capabilities.block_tokens
                && before.cache_events == capabilities.cache_events
            {
                return Some(known.view.slot);
            }
            self.remove(worker);
        }
        let knowledge = if capabilities.cache_events {
            Knowledge::Events
        } else {
            let units = capabilities.pool_blocks * u64::from(capabilities.block_tokens / 16);
            let max_units = usize::try_from(units).unwrap_or(usize::MAX);
            Knowledge::Approximate {
                ttl_ms: APPROXIMATE_TTL_MS,
                max_units,
            }
        };
        match self.index.add_worker(capabilities.block_tokens, knowledge) {
            Ok(slot) => Some(slot),
            Err(error) => {
                tracing::warn!(%error, "worker cannot be indexed");
                None
            }
        }
    }

    /// A worker is off the table.
    pub(super) fn remove(&mut self, worker: WorkerIndex) {
        if let Some(known) = self.workers.remove(&worker) {
            self.bookings.session_ended(known.view.slot);
            // It was there: nothing else takes slots out.
            let _ = self.index.remove_worker(known.view.slot);
        }
    }

    /// Whether a worker can be placed on has changed.
    pub(super) fn stands(&mut self, worker: WorkerIndex, standing: Standing) {
        if let Some(known) = self.workers.get_mut(&worker) {
            known.standing = standing;
            known.view.suspect = standing == Standing::Suspect;
            if standing == Standing::Absent {
                self.bookings.session_ended(known.view.slot);
            }
        }
    }

    /// A worker's load came.
    pub(super) fn loaded(&mut self, worker: WorkerIndex, report: &LoadReport) {
        let Some(known) = self.workers.get_mut(&worker) else {
            return;
        };
        let load = &report.load;
        known.step_ms = load.step_predicted_ms;
        let view = &mut known.view;
        view.role = role_of(report.role);
        view.draining = load.draining;
        view.phase = match report.phase {
            v1::WorkerPhase::Serving => Phase::Serving,
            v1::WorkerPhase::WarmingUp => Phase::WarmingUp,
            v1::WorkerPhase::Stopping => Phase::Stopping,
            v1::WorkerPhase::Loading | v1::WorkerPhase::Unspecified => Phase::Loading,
        };
        let kv = load.kv.unwrap_or_default();
        view.load = Load {
            own: share_of(load.own),
            others: share_of(load.others),
            kv: KvRoom {
                free: kv.free,
                evictable: kv.evictable,
                running: kv.running,
                pinned: kv.pinned,
                reserved: kv.reserved,
            },
            step_left_ms: (load.step_predicted_ms - load.step_age_ms).max(0.0),
        };
        self.bookings.echoed(view.slot, load.last_command);
    }

    /// A step's service time came.
    pub(super) fn stepped(&mut self, worker: WorkerIndex, sample: &v1::StepSample) {
        let Some(known) = self.workers.get_mut(&worker) else {
            return;
        };
        let learnt = known.learner.observe(&StepSample {
            prefill_tokens: u64::from(sample.prefill_tokens),
            prefill_context: sample.prefill_context,
            decode_batch: sample.decode_batch,
            decode_context: sample.decode_context,
            duration_ms: sample.duration_us as f64 / 1e3,
        });
        if learnt {
            known.view.step = *known.learner.model();
        }
    }

    /// The step model in force of a worker.
    pub(super) fn step_model(&self, worker: WorkerIndex) -> Option<v1::StepModel> {
        let model = &self.workers.get(&worker)?.view.step;
        Some(v1::StepModel {
            a_ms: model.a_ms,
            b_ms: model.b_ms,
            c_ms: model.c_ms,
            d_ms: model.d_ms,
            e_ms: model.e_ms,
            relative_error: model.relative_error,
            saturating_chunk: model.saturating_chunk,
        })
    }

    /// Bookings that no load shows yet, over all workers.
    pub(super) fn booked(&self) -> usize {
        self.bookings
            .all()
            .values()
            .map(|work| (work.prefills + work.decodes) as usize)
            .sum()
    }

    /// The slots of workers, for a request's list of the excluded.
    pub(super) fn slot(&self, worker: WorkerIndex) -> Option<WorkerSlot> {
        self.workers.get(&worker).map(|known| known.view.slot)
    }

    /// The worker of a slot.
    pub(super) fn worker_at(&self, slot: WorkerSlot) -> Option<WorkerIndex> {
        self.workers
            .iter()
            .find(|(_, known)| known.view.slot == slot)
            .map(|(index, _)| *index)
    }

    fn views(&self) -> Vec<WorkerView> {
        let booked = self.bookings.all();
        let there = self
            .workers
            .values()
            .filter(|known| known.fits && known.standing != Standing::Absent);
        there
            .map(|known| {
                let mut view = known.view.clone();
                view.booked = booked.get(&view.slot).copied().unwrap_or_default();
                view
            })
            .collect()
    }

    /// Whether a request may wait to be placed. `ahead_ms` gives the work that
    /// is queued before one of so much work; `left_ms` is the time to its
    /// deadline.
    ///
    /// # Errors
    /// Why it may not.
    pub(super) fn admit(
        &self,
        request: &RequestView<'_>,
        bound: &AdmissionSettings,
        left_ms: Option<f64>,
        ahead_ms: impl Fn(f64) -> f64,
    ) -> Result<Admission, Turned> {
        let workers = self.views();
        let cluster = Cluster::new(self.router, &workers);
        match self.policy.explain(&cluster, request) {
            Ok(_)
            | Err(
                NoPlan::NoRoom { .. }
                | NoPlan::NotReady {
                    draining: false, ..
                },
            ) => {}
            Err(never) => return Err(Turned::Never(never)),
        }
        // Its work says what goes before it, and that what it waits for.
        let unbound = AdmissionSettings {
            max_wait_ms: f64::INFINITY,
        };
        let alone = admit(&cluster, request, 0.0, None, &unbound).map_err(Turned::Waits)?;
        let ahead = ahead_ms(alone.work_ms);
        admit(&cluster, request, ahead, left_ms, bound).map_err(Turned::Waits)
    }

    /// Chooses and books.
    ///
    /// # Errors
    /// Why there is no plan now.
    pub(super) fn choose(&mut self, wanted: &Wanted<'_>) -> Result<Placed, NoPlan> {
        let workers = self.views();
        let cluster = Cluster::new(self.router, &workers);
        let considered = match wanted.explain {
            true => self.policy.explain(&cluster, &wanted.request)?,
            false => Vec::new(),
        };
        let decision = self.policy.choose(&cluster, &wanted.request)?;
        let plan = decision.plan();
        let at = |slot| self.worker_at(slot).ok_or(NoPlan::NoPair);
        let (prefill, decode) = (at(plan.prefill())?, at(plan.decode())?);
        let book = |(slot, work)| Ok((at(slot)?, self.bookings.book(slot, work)));
        let bookings = decision
            .work
            .into_iter()
            .map(book)
            .collect::<Result<_, NoPlan>>()?;
        Ok(Placed {
            plan,
            prefill,
            decode,
            source: plan.source().and_then(|slot| self.worker_at(slot)),
            engine: self.engine(prefill, decode),
            bookings,
            chosen: decision.chosen,
            considered,
            start_ms: decision.start_ms,
            step_ms: self
                .workers
                .get(&prefill)
                .map_or(0.0, |known| known.step_ms),
        })
    }

    /// Whether two workers hand over by their engine's connector, and then
    /// whether prefill's tokens count. Mesh goes first where both have it.
    fn engine(&self, prefill: WorkerIndex, decode: WorkerIndex) -> Option<bool> {
        let sender = &self.workers.get(&prefill)?.capabilities;
        let receiver = &self.workers.get(&decode)?.capabilities;
        let mesh = sender.streamed_hand_off && receiver.streamed_hand_off;
        (!mesh).then_some(sender.prefill_emits_first_token)
    }

    /// Which roles serve a model now.
    pub(super) fn ready(&self, model: &str) -> bool {
        let mut found = Matches::default();
        self.index.lookup_into(&[], &mut found);
        let request = RequestView {
            id: 0,
            model,
            digest: "",
            adapter: "",
            prompt_tokens: 1,
            output_tokens: 0,
            max_tokens: 2,
            expected_output: 2,
            class: Class::Standard,
            virtual_deadline_ms: f64::INFINITY,
            affinity: 0,
            needs: Needs::default(),
            cached: &found,
            excluded: &[],
        };
        let workers = self.views();
        let cluster = Cluster::new(self.router, &workers);
        let answer = self.policy.explain(&cluster, &request);
        matches!(answer, Ok(_) | Err(NoPlan::NoRoom { .. }))
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
            v1::cache_event::Kind::Stored(stored) => Some(CacheChange::Stored {
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

fn role_of(role: v1::Role) -> Role {
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
        classes: kvmesh_scheduler::ByClass::default(),
    }
}

fn step_model_of(model: v1::StepModel) -> StepModel {
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
        host: "".into(),
        engine_connector: capabilities.engine_connector.as_str().into(),
        pairing: pairing.into(),
        prefix_pull: capabilities.prefix_pull && transfer,
        grammars: capabilities.grammars,
        grammars_over_continuation: capabilities.grammars_over_continuation,
        penalties_over_continuation: capabilities.penalties_over_continuation,
        max_logprobs: capabilities.max_logprobs,
        block_tokens: capabilities.block_tokens,
        pool_blocks: capabilities.pool_blocks,
        block_bytes: capabilities.block_bytes,
        max_batch: capabilities.max_batch,
        context_length: model.context_length,
    }
}
