//! What this router knows of its workers, and the choice among them (`choose`).
//!
//! Hellos, loads and step samples become views (`views`), which are kept in
//! place: a choice reads them where they are. One index slot a worker. Pure but
//! for the index, which is shared with the sessions that feed it.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Instant,
};

use kvmesh_kv_index::{Knowledge, KvIndex, UNIT_TOKENS, WorkerSlot};
use kvmesh_scheduler::{
    Bookings, ClassTargets, Cluster, FirstToken, Learner, Path, PerClass, Policy, Relay, Reported,
    Roster, StepModel, StepSample, TransferRate, TransferRates, WorkerView,
    planner::{Demand, Pools},
};
use kvmesh_session::{
    WorkerIndex,
    parse::{LoadReport, reads_cache},
};
use kvmesh_wire::v1;
use smallvec::SmallVec;

use super::{
    figures::ms,
    policy::PolicySettings,
    views::{load_of, phase_of, role_of, step_model_of, told, view_of},
};

mod choose;
mod target;

pub(super) use choose::{Lacks, Placed, Tail, Turned};
pub(super) use target::Target;

/// Whether a worker can be placed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// It can.
    Ready,
    /// It was lost or ejected: one request may go there, and decides.
    Probation,
    /// Not now: whoever wants it waits.
    Suspect,
    /// It is not there.
    Absent,
}

/// A worker with what is learnt of it.
struct Known {
    slot: WorkerSlot,
    standing: Standing,
    /// Digests agree with those of the other workers of its model.
    fits: bool,
    /// Its view while it is not in the roster.
    aside: Option<WorkerView>,
    /// Its step model as it said it.
    told: StepModel,
    learner: Learner,
    relay: Relay,
    capabilities: v1::Capabilities,
    /// Predicted length of the step that runs.
    step_ms: f64,
    /// When its last step was told of, or its hello came.
    stepped: Instant,
    /// When a first token taught something of it, or its hello came.
    reached: Instant,
}

/// Whether a worker's cache is known by what it tells, or by what is sent there.
fn tells_of_cache(capabilities: &v1::Capabilities) -> bool {
    capabilities.cache_events && reads_cache(capabilities).is_ok()
}

/// All workers.
pub(super) struct Placer {
    pub(super) index: Arc<KvIndex>,
    router: u64,
    policy: Box<dyn Policy>,
    bookings: Bookings,
    workers: BTreeMap<WorkerIndex, Known>,
    /// Worker of each slot.
    by_slot: Vec<Option<WorkerIndex>>,
    /// Workers that can be chosen from.
    roster: Roster,
    transfers: TransferRates,
    approximate_ttl_ms: u64,
}

impl Placer {
    pub(super) fn new(index: Arc<KvIndex>, router: u64, policy: &PolicySettings) -> Self {
        Self {
            index,
            router,
            policy: policy.build(router),
            bookings: Bookings::new(),
            workers: BTreeMap::new(),
            by_slot: Vec::new(),
            roster: Roster::with_targets(&policy.cost.targets),
            transfers: TransferRates::new(),
            approximate_ttl_ms: u64::try_from(policy.approximate_ttl.as_millis())
                .unwrap_or(u64::MAX),
        }
    }

    /// The policy's name.
    pub(super) fn policy(&self) -> &'static str {
        self.policy.name()
    }

    /// A worker said who it is; streams of its model have so much left. Its index
    /// slot is kept within an incarnation.
    pub(super) fn greeted(
        &mut self,
        worker: WorkerIndex,
        record: &v1::WorkerRecord,
        step_model: Option<v1::StepModel>,
        left: PerClass<f64>,
        fits: bool,
    ) {
        let (Some(model), Some(capabilities)) = (&record.model, &record.capabilities) else {
            return;
        };
        let Some(slot) = self.slot_for(worker, capabilities) else {
            return;
        };
        self.bookings.session_ended(slot);
        self.roster.remove(slot);
        let told = step_model.map_or_else(StepModel::default, step_model_of);
        let before = self.workers.remove(&worker);
        // One that was away for a moment is as fast as it was.
        let same = |known: &Known| known.told == told && known.capabilities == *capabilities;
        let (learner, relay) = match before.filter(same) {
            Some(known) => (known.learner, known.relay),
            None => (Learner::new(told), Relay::new()),
        };
        let step = *learner.model();
        let known = Known {
            slot,
            standing: Standing::Absent,
            fits,
            aside: Some(view_of(slot, record, model, capabilities, step, left)),
            told,
            learner,
            relay,
            capabilities: capabilities.clone(),
            step_ms: 0.0,
            stepped: Instant::now(),
            reached: Instant::now(),
        };
        self.workers.insert(worker, known);
        let at = slot.0 as usize;
        if self.by_slot.len() <= at {
            self.by_slot.resize(at + 1, None);
        }
        self.by_slot[at] = Some(worker);
    }

    fn slot_for(
        &mut self,
        worker: WorkerIndex,
        capabilities: &v1::Capabilities,
    ) -> Option<WorkerSlot> {
        if let Some(known) = self.workers.get(&worker) {
            let before = &known.capabilities;
            if before.block_tokens == capabilities.block_tokens
                && tells_of_cache(before) == tells_of_cache(capabilities)
            {
                return Some(known.slot);
            }
            self.remove(worker);
        }
        // What is sent counts by the unit where blocks end elsewhere.
        let mut block_tokens = UNIT_TOKENS as u32;
        let knowledge = if tells_of_cache(capabilities) {
            block_tokens = capabilities.block_tokens;
            Knowledge::Events
        } else {
            if capabilities.block_tokens.is_multiple_of(block_tokens) {
                block_tokens = capabilities.block_tokens;
            }
            let pool = u64::from(capabilities.block_tokens);
            let units = capabilities.pool_blocks.saturating_mul(pool) / UNIT_TOKENS as u64;
            let max_units = usize::try_from(units).unwrap_or(usize::MAX);
            Knowledge::Approximate {
                ttl_ms: self.approximate_ttl_ms,
                max_units,
            }
        };
        match self.index.add_worker(block_tokens, knowledge) {
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
            self.bookings.session_ended(known.slot);
            self.roster.remove(known.slot);
            self.transfers.forget(known.slot);
            self.by_slot[known.slot.0 as usize] = None;
            // It was there: nothing else takes slots out.
            let _ = self.index.remove_worker(known.slot);
        }
    }

    /// Whether a worker can be placed on has changed.
    pub(super) fn stands(&mut self, worker: WorkerIndex, standing: Standing) {
        let Some(known) = self.workers.get_mut(&worker) else {
            return;
        };
        let before = std::mem::replace(&mut known.standing, standing);
        if standing == Standing::Absent {
            self.bookings.session_ended(known.slot);
        }
        if known.fits && standing != Standing::Absent {
            if let Some(view) = known.aside.take() {
                self.bookings.touch(known.slot);
                self.roster.insert(view);
            }
        } else if let Some(view) = self.roster.remove(known.slot) {
            known.aside = Some(view);
        }
        self.change(worker, |view| view.suspect = standing == Standing::Suspect);
        if standing == Standing::Probation && before != Standing::Probation {
            self.measure_anew(worker);
        }
    }

    /// What was learnt of a worker before it failed is no measure of what it is now. One that
    /// was slow until then would look slow, get nothing, and never be measured again.
    fn measure_anew(&mut self, worker: WorkerIndex) {
        let Some(known) = self.workers.get_mut(&worker) else {
            return;
        };
        known.learner = Learner::new(known.told);
        known.relay = Relay::new();
        let step = *known.learner.model();
        self.transfers.forget(known.slot);
        self.change(worker, |view| {
            view.step = step;
            view.relay_ms = 0.0;
        });
    }

    /// A request goes to a worker: if it is on probation, no other does until it is decided.
    /// The worker's session says when.
    fn probes(&mut self, worker: WorkerIndex) {
        let known = self.workers.get(&worker);
        if known.is_some_and(|known| known.standing == Standing::Probation) {
            self.change(worker, |view| view.suspect = true);
        }
    }

    /// Changes a worker's view, wherever it is.
    fn change(&mut self, worker: WorkerIndex, change: impl FnOnce(&mut WorkerView)) {
        let Some(known) = self.workers.get_mut(&worker) else {
            return;
        };
        match &mut known.aside {
            Some(view) => change(view),
            None => {
                if let Some(view) = self.roster.get_mut(known.slot) {
                    change(view);
                }
            }
        }
    }

    /// A worker's load came: what it says to those that wait, if it can be
    /// chosen.
    pub(super) fn loaded(
        &mut self,
        worker: WorkerIndex,
        report: &LoadReport,
        now_ms: f64,
    ) -> Option<Reported> {
        let known = self.workers.get_mut(&worker)?;
        let load = &report.load;
        known.step_ms = load.step_predicted_ms;
        let slot = known.slot;
        let relay_ms = known.relay.ms_after_idle(ms(known.reached.elapsed()));
        self.bookings.echoed(slot, load.last_command);
        // While a step runs, what it brings is not in the report.
        let runs = load.step_age_ms > 0.0 || load.step_predicted_ms > 0.0;
        let ended = load.step.saturating_sub(u64::from(runs));
        self.bookings.reported(slot, ended);
        self.change(worker, |view| {
            view.role = role_of(report.role);
            view.draining = load.draining;
            view.phase = phase_of(report.phase);
            view.report(load_of(load, now_ms), now_ms);
            view.relay_ms = relay_ms;
        });
        self.reported(worker)
    }

    /// What its last report and first tokens since then say of a worker.
    pub(super) fn reported(&mut self, worker: WorkerIndex) -> Option<Reported> {
        let known = self.workers.get(&worker)?;
        self.roster.refresh(&self.bookings);
        let view = self.roster.get(known.slot)?;
        let local = self.policy.local_prefill();
        Some(Reported::of(view, known.step_ms, local, &self.bookings))
    }

    /// A step's service time came.
    pub(super) fn stepped(&mut self, worker: WorkerIndex, sample: &v1::StepSample) {
        let Some(known) = self.workers.get_mut(&worker) else {
            return;
        };
        known.stepped = Instant::now();
        let learnt = known.learner.observe(&StepSample {
            prefill_tokens: u64::from(sample.prefill_tokens),
            prefill_context: sample.prefill_context,
            decode_batch: sample.decode_batch,
            decode_context: sample.decode_context,
            duration_ms: sample.duration_us as f64 / 1e3,
        });
        if learnt {
            let step = *known.learner.model();
            self.change(worker, |view| view.step = step);
        }
    }

    /// A first token came of a prompt that a worker computed.
    pub(super) fn first_token(&mut self, worker: WorkerIndex, seen: &FirstToken) {
        let Some(known) = self.workers.get_mut(&worker) else {
            return;
        };
        if known.relay.observe(seen) {
            known.reached = Instant::now();
            let relay_ms = known.relay.ms();
            self.change(worker, |view| view.relay_ms = relay_ms);
        }
    }

    /// KV of so many bytes moved between two workers in this time, waiting for
    /// its computing not included.
    pub(super) fn transferred(
        &mut self,
        source: WorkerIndex,
        target: WorkerIndex,
        bytes: u64,
        ms: f64,
    ) {
        let view = |worker| {
            let known = self.workers.get(&worker)?;
            known.aside.as_ref().or_else(|| self.roster.get(known.slot))
        };
        let (Some(from), Some(to)) = (view(source), view(target)) else {
            return;
        };
        let path = Path::between(&from.abilities, &to.abilities);
        let (from, to) = (from.slot, to.slot);
        self.transfers.observe(from, to, path, bytes, ms);
    }

    /// What a stream of this model has left on average has changed.
    pub(super) fn left(&mut self, model: &str, left: PerClass<f64>) {
        let of_model: Vec<WorkerIndex> = self.workers.keys().copied().collect();
        for worker in of_model {
            self.change(worker, |view| {
                if *view.model == *model {
                    view.left = left;
                }
            });
        }
    }

    /// What a stream of each class has left, as the views of all workers have it.
    #[cfg(test)]
    pub(super) fn left_by_views(&self) -> Vec<PerClass<f64>> {
        let known = self.workers.values();
        let view = |one: &Known| match &one.aside {
            Some(view) => Some(view.left),
            None => Some(self.roster.get(one.slot)?.left),
        };
        known.filter_map(view).collect()
    }

    /// The step model in force of a worker: its error bar widens while it is idle.
    pub(super) fn step_model(&self, worker: WorkerIndex) -> Option<v1::StepModel> {
        let known = self.workers.get(&worker)?;
        let idle_ms = known.stepped.elapsed().as_secs_f64() * 1e3;
        Some(told(&known.learner.model_after_idle(idle_ms)))
    }

    /// What moving KV to a worker takes, for each source of which something was
    /// learnt.
    pub(super) fn paths_to(&self, worker: WorkerIndex) -> Vec<(WorkerIndex, TransferRate)> {
        let Some(target) = self.slot(worker) else {
            return Vec::new();
        };
        let known = |(source, known): (&WorkerIndex, &Known)| {
            Some((*source, self.transfers.known(known.slot, target)?))
        };
        self.workers.iter().filter_map(known).collect()
    }

    /// Bookings that no load shows yet, over all workers.
    pub(super) fn booked(&self) -> usize {
        self.bookings
            .all()
            .values()
            .map(|work| (work.prefills + work.decodes) as usize)
            .sum()
    }

    /// Those that were lost or left out, of which the next request decides.
    pub(super) fn on_probation(&self) -> SmallVec<[WorkerSlot; 4]> {
        let known = self.workers.values();
        let tried = known.filter(|known| known.standing == Standing::Probation);
        tried.map(|known| known.slot).collect()
    }

    /// The slots of workers, for a request's list of the excluded.
    pub(super) fn slot(&self, worker: WorkerIndex) -> Option<WorkerSlot> {
        self.workers.get(&worker).map(|known| known.slot)
    }

    /// The pools of all models that workers serve, with what came for them.
    pub(super) fn pools(
        &mut self,
        came: &BTreeMap<Arc<str>, Demand>,
        targets: &ClassTargets,
        now_ms: f64,
    ) -> Vec<Pools> {
        self.roster.refresh(&self.bookings);
        let cluster = self.cluster(now_ms);
        let models: BTreeSet<Arc<str>> = cluster
            .workers
            .iter()
            .map(|worker| Arc::clone(&worker.model))
            .collect();
        models
            .iter()
            .map(|model| {
                let demand = came.get(model).copied().unwrap_or_default();
                Pools::of(model, &cluster, demand, targets)
            })
            .collect()
    }

    /// Whether what a worker has cached is guessed from what was sent to it.
    pub(super) fn guesses(&self, slot: WorkerSlot) -> bool {
        let known = self.worker_at(slot).and_then(|at| self.workers.get(&at));
        known.is_some_and(|known| !tells_of_cache(&known.capabilities))
    }

    /// The worker of a slot.
    pub(super) fn worker_at(&self, slot: WorkerSlot) -> Option<WorkerIndex> {
        self.by_slot.get(slot.0 as usize).copied().flatten()
    }

    fn cluster(&self, now_ms: f64) -> Cluster<'_> {
        self.roster
            .cluster(self.router)
            .at(now_ms)
            .with_transfers(&self.transfers)
            .with_local_prefill(self.policy.local_prefill())
    }
}
