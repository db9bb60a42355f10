//! Advice about the sizes of pools: what came, what is there, and the pure
//! controller that looks at both, about once a second, so that whoever asks
//! hears at once. Nothing follows from it unless somebody changes a role.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use kvmesh_scheduler::{
    ClassTargets, Role,
    planner::{Advice, Demand, Flip, Hold, Outlook, Planner, PlannerSettings},
};
use kvmesh_wire::v1;

use tokio::time::MissedTickBehavior;

use super::{Core, dispatch::class_of, queue::lock, table::WorkerEntry, views::role_of};
use crate::request::AdmittedRequest;

/// How often the pools are looked at.
const LOOK: Duration = Duration::from_secs(1);

/// What came by model, and the controller.
pub(super) struct PoolWatch {
    came: Mutex<BTreeMap<Arc<str>, Demand>>,
    planner: Mutex<Planner>,
}

impl PoolWatch {
    pub(super) fn new(targets: &ClassTargets) -> Self {
        let settings = PlannerSettings {
            targets: *targets,
            ..PlannerSettings::default()
        };
        Self {
            came: Mutex::default(),
            planner: Mutex::new(Planner::new(settings)),
        }
    }

    /// What came so far, by model.
    pub(super) fn demands(&self) -> BTreeMap<Arc<str>, Demand> {
        lock(&self.came).clone()
    }

    /// A request came, of so much predicted work: also one that is turned away for want
    /// of room, which workers would have had to do.
    pub(super) fn came(&self, request: &AdmittedRequest, work_ms: f64, output: u32) {
        let mut came = lock(&self.came);
        if !came.contains_key(request.model.as_str()) {
            came.insert(Arc::from(request.model.as_str()), Demand::default());
        }
        if let Some(demand) = came.get_mut(request.model.as_str()) {
            let prompt = u32::try_from(request.prompt_ids.len()).unwrap_or(u32::MAX);
            let (class, output) = (class_of(request.class), f64::from(output));
            demand.add(class, work_ms, f64::from(prompt), output);
        }
    }
}

impl Core {
    /// Looks at the pools for as long as the router runs.
    pub(super) async fn watch_pools(self: Arc<Self>) {
        let mut every = tokio::time::interval(LOOK);
        every.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = self.stop.cancelled() => return,
                _ = every.tick() => drop(self.look_at_pools()),
            }
        }
    }

    /// What the controller makes of all pools now.
    pub(super) fn advise_pools(&self) -> Vec<v1::PoolAdvice> {
        let advice = self.look_at_pools();
        advice.iter().map(|advice| self.advice(advice)).collect()
    }

    fn look_at_pools(&self) -> Vec<Advice> {
        let watch = &self.pools;
        let waits = &self.dispatcher.waits;
        let mut came = watch.demands();
        for (model, demand) in &mut came {
            demand.queued_ms = waits.queued_ms(model);
        }
        // The clock of a look does not go back: it is read under the lock.
        let mut planner = lock(&watch.planner);
        let now_ms = waits.now_ms();
        let pools = {
            let targets = planner.settings().targets;
            let mut placer = self.dispatcher.placer();
            placer.pools(&came, &targets, now_ms)
        };
        planner.look(&pools, now_ms)
    }

    /// A worker is told to take a role.
    pub(super) fn role_begins(&self, worker: &WorkerEntry, role: v1::Role) {
        let slot = self.dispatcher.placer().slot(worker.index);
        if let Some(slot) = slot {
            let now_ms = self.dispatcher.waits.now_ms();
            lock(&self.pools.planner).began(slot, role_of(role), now_ms);
        }
    }

    /// It was not done.
    pub(super) fn role_refused(&self, worker: &WorkerEntry) {
        let slot = self.dispatcher.placer().slot(worker.index);
        if let Some(slot) = slot {
            let now_ms = self.dispatcher.waits.now_ms();
            lock(&self.pools.planner).failed(slot, now_ms);
        }
    }

    fn advice(&self, advice: &Advice) -> v1::PoolAdvice {
        let (flip, hold) = match &advice.flip {
            Ok(flip) => (Some(self.flip(flip)), String::new()),
            Err(hold) => (None, reason(*hold).to_owned()),
        };
        v1::PoolAdvice {
            model: advice.model.to_string(),
            now: Some(outlook(&advice.now)),
            flip,
            hold,
        }
    }

    fn flip(&self, flip: &Flip) -> v1::RoleFlip {
        let worker = self.dispatcher.placer().worker_at(flip.worker);
        v1::RoleFlip {
            worker_id: worker.map_or_else(String::new, |worker| self.table.name(worker)),
            from_role: role(flip.from).into(),
            to_role: role(flip.to).into(),
            after: Some(outlook(&flip.after)),
        }
    }
}

fn role(role: Role) -> v1::Role {
    match role {
        Role::Prefill => v1::Role::Prefill,
        Role::Decode => v1::Role::Decode,
        Role::Both => v1::Role::Both,
    }
}

fn reason(hold: Hold) -> &'static str {
    match hold {
        Hold::Enough => "each pool is within its targets",
        Hold::Learning => "too little was seen yet",
        Hold::Confirming => "a pool is short, but not for long enough yet",
        Hold::Flipping => "a flip is under way",
        Hold::Dwelling => "the last flip was a short while ago",
        Hold::NobodyToSpare => "the other pool has nobody to spare",
        Hold::NoGain => "a flip would help too little",
        Hold::StillAsked => "it would undo the last flip, and what asked for that one still comes",
    }
}

fn outlook(outlook: &Outlook) -> v1::PoolOutlook {
    let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    let [interactive, standard, batch] = outlook.ttft_ms;
    v1::PoolOutlook {
        prefill: count(outlook.prefill),
        decode: count(outlook.decode),
        both: count(outlook.both),
        interactive_ttft_ms: interactive,
        standard_ttft_ms: standard,
        batch_ttft_ms: batch,
        itl_ms: outlook.itl_ms,
        prefill_pressure: outlook.prefill_pressure,
        decode_pressure: outlook.decode_pressure,
    }
}
