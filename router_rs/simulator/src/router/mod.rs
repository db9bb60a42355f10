//! A router: what it believes of its workers, and what waits in it.
//!
//! Belief comes from reports alone, as in life. The decisions are those of
//! `kvmesh-scheduler`; what is here is what the gateway has around them.

mod belief;
mod refusals;

use crate::policies::policy;
use crate::seed::mix;
use crate::settings::{Order, QueueSettings, Settings};
use crate::trace::Trace;
use crate::weighted::Weighted;
use belief::{request_view, view};
use kvmesh_kv_index::{KvIndex, Matches, UNIT_TOKENS, WorkerSlot};
use kvmesh_scheduler::planner::{Demand, Pools};
use kvmesh_scheduler::{
    Booking, Bookings, Class, ClassTargets, Considered, Decision, Dispatch, DispatchSettings,
    Entry, Hold, Lane, Learner, Load, Look, Next, NoPlan, Outcome, OutputLengths, Pass, Path,
    Phase, Place, Policy, Rejected, Reported, RequestView, Role, Roster, ScoreError, StepModel,
    StepSample, TransferRates, Turn, Verdict,
};
use refusals::Refusals;
use std::collections::BTreeMap;
use std::sync::Arc;

/// A prior for the length of an output, tokens.
const EXPECTED_OUTPUT: u32 = 256;
const MODEL: &str = "model";
/// Outputs after which what streams have left is estimated anew.
const LEFT_EVERY: u64 = 32;

/// What a router knows of a request.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Asked {
    /// Its number in the trace.
    pub(crate) request: u32,
    /// Arrival, ms.
    pub(crate) arrival_ms: f64,
    /// Output tokens so far.
    pub(crate) made: u32,
    /// Most output tokens.
    pub(crate) max_tokens: u32,
}

/// Picks another plan among those that the policy weighs.
pub(crate) type Choice<'a> = &'a mut dyn FnMut(&[Considered]) -> usize;

/// What came of trying to place a request.
#[derive(Debug)]
pub(crate) enum Tried {
    /// It is placed and booked.
    Placed(Placed),
    /// There is no room.
    NoRoom,
    /// Its worker would not start it soon, and it is listed there; or nobody is
    /// ready for it.
    Waits(Option<Hold>),
    /// Nobody will ever run it.
    Never,
}

/// A plan that was chosen.
#[derive(Debug)]
pub(crate) struct Placed {
    pub(crate) chosen: Considered,
}

/// A worker's report as it comes in.
#[derive(Debug, Clone)]
pub(crate) struct Report {
    pub(crate) worker: usize,
    pub(crate) load: Load,
    pub(crate) last_command: u64,
    /// Predicted length of the step that it is of, ms.
    pub(crate) step_ms: f64,
    pub(crate) sample: Option<StepSample>,
}

/// A router.
pub(crate) struct Router {
    hash: u64,
    policy: Box<dyn Policy>,
    /// The scorer that the policy asks, if it asks one.
    scorer: Option<Arc<Weighted>>,
    model: Arc<str>,
    max_tokens: u32,
    lengths: OutputLengths,
    /// What came, for the pool controller.
    demand: Demand,
    bookings: Bookings,
    roster: Roster,
    rates: TransferRates,
    learners: Vec<Learner>,
    step_ms: Vec<f64>,
    commands: Vec<u64>,
    dispatch: Dispatch<Asked>,
    /// The last time for which a look is planned.
    look_at_ms: f64,
    booked: BTreeMap<u32, Vec<(usize, Booking)>>,
    /// Of requests that have not ended.
    keys: BTreeMap<u32, Keys>,
    refusals: Refusals,
    chain: Vec<u64>,
    cached: Matches,
    /// Outputs that have ended.
    ended: u64,
}

/// By what a request stands in queues.
#[derive(Debug, Clone, Copy)]
struct Keys {
    own_ms: f64,
    /// As which it went.
    sent_ms: f64,
    work_ms: f64,
}

impl Router {
    pub(crate) fn new(number: usize, settings: &Settings) -> Self {
        let prior = settings.believed();
        let mut roster = Roster::new();
        let roles = settings.roles();
        for (slot, role) in roles.iter().enumerate() {
            roster.insert(view(slot, *role, settings));
        }
        let workers = roles.len();
        let (policy, scorer) = policy(settings);
        Self {
            hash: mix(settings.seed ^ (number as u64 + 1)),
            policy,
            scorer,
            model: MODEL.into(),
            max_tokens: settings.max_tokens,
            lengths: OutputLengths::new(EXPECTED_OUTPUT),
            demand: Demand::default(),
            bookings: Bookings::new(),
            learners: vec![Learner::new(prior); workers],
            step_ms: vec![0.0; workers],
            commands: vec![0; workers],
            dispatch: Dispatch::new(dispatch_settings(&settings.queue)),
            look_at_ms: f64::NEG_INFINITY,
            booked: BTreeMap::new(),
            keys: BTreeMap::new(),
            refusals: Refusals::default(),
            chain: Vec::new(),
            cached: Matches::default(),
            ended: 0,
            roster,
            rates: TransferRates::new(),
        }
    }

    /// Why the policy's scorer failed, if it did: choices were then by cost.
    pub(crate) fn scorer_failure(&self) -> Option<&ScoreError> {
        self.scorer.as_ref()?.failure()
    }

    /// Requests that wait here.
    pub(crate) fn queued(&self) -> usize {
        self.dispatch.len()
    }

    /// The key of a request in engines: smaller goes first.
    pub(crate) fn key(&self, request: u32) -> f64 {
        self.keys.get(&request).map_or(0.0, |keys| keys.sent_ms)
    }

    /// A request came. It is admitted or not, and gets its virtual deadline.
    ///
    /// # Errors
    /// Why it may not wait.
    pub(crate) fn arrive(
        &mut self,
        asked: Asked,
        trace: &Trace,
        index: &KvIndex,
    ) -> Result<(), Rejected> {
        self.look_up(trace, index, asked.request);
        self.roster.refresh(&self.bookings);
        let cluster = self
            .roster
            .cluster(self.hash)
            .at(asked.arrival_ms)
            .with_local_prefill(self.policy.local_prefill());
        let at = (asked, f64::INFINITY);
        let request = request_view(&self.lengths, &self.cached, trace, at, &[]);
        let (class, output) = (request.class, f64::from(request.expected_output));
        let prompt = f64::from(request.prompt_tokens);
        let admitted = self
            .dispatch
            .admit(&cluster, &request, asked.arrival_ms, None);
        // What is turned away came all the same.
        let work_ms = match &admitted {
            Ok(admitted) => admitted.work_ms,
            Err(rejected) => rejected.work_ms(),
        };
        if work_ms > 0.0 {
            self.demand.add(class, work_ms, prompt, output);
        }
        let admitted = admitted?;
        let keys = Keys {
            own_ms: admitted.key_ms,
            sent_ms: admitted.key_ms,
            work_ms: admitted.work_ms,
        };
        self.keys.insert(asked.request, keys);
        Ok(())
    }

    /// A request is there, new or once more: what is to be tried now.
    pub(crate) fn arrives(&mut self, asked: Asked, now_ms: f64, trace: &Trace) -> Option<Pass> {
        let keys = self.keys.get(&asked.request)?;
        let entry = Entry {
            model: Arc::clone(&self.model),
            lane: Lane {
                class: trace.requests[asked.request as usize].class,
                tenant: 0,
            },
            key_ms: keys.own_ms,
            work_ms: keys.work_ms,
            goes_on: asked.made > 0,
        };
        // Its queue has no bound.
        self.dispatch.arrives(&entry, now_ms, asked).ok()
    }

    /// What waits is to be tried now.
    pub(crate) fn pass(&mut self, now_ms: f64) -> Pass {
        self.dispatch.pass(&self.model, now_ms)
    }

    pub(crate) fn next(&mut self, pass: &mut Pass, now_ms: f64) -> Option<Next<Asked>> {
        self.dispatch.next(pass, now_ms)
    }

    pub(crate) fn came_of(
        &mut self,
        pass: &mut Pass,
        place: &Place,
        outcome: Outcome<Asked>,
        now_ms: f64,
    ) {
        self.dispatch.came_of(pass, place, outcome, now_ms);
    }

    /// Whether a report of a worker may let somebody go.
    pub(crate) fn look(&self, worker: usize, now_ms: f64) -> Look {
        let view = self.roster.get(WorkerSlot(worker as u32));
        view.map_or(Look::No, |view| {
            let local = self.policy.local_prefill();
            let report = Reported::of(view, self.step_ms[worker], local, &self.bookings);
            self.dispatch.look(&report, now_ms)
        })
    }

    /// Whether a look that is put off to this time is not planned yet.
    pub(crate) fn puts_off(&mut self, at_ms: f64) -> bool {
        let new = self.look_at_ms < at_ms;
        self.look_at_ms = self.look_at_ms.max(at_ms);
        new
    }

    /// Whether a look that was put off is still due.
    pub(crate) fn due(&self, now_ms: f64) -> bool {
        self.dispatch.due(&self.model, now_ms)
    }

    /// Chooses as one whose turn it is and books, if a worker would start the
    /// request soon. `choose` picks another plan among those that the policy
    /// weighs.
    pub(crate) fn try_plan(
        &mut self,
        (asked, turn): (Asked, Turn),
        now_ms: f64,
        trace: &Trace,
        index: &KvIndex,
        choose: Option<Choice<'_>>,
    ) -> Tried {
        self.look_up(trace, index, asked.request);
        let unwanted = self.refusals.workers(asked.request);
        let at = (asked, turn.chosen_by_ms());
        let view = request_view(&self.lengths, &self.cached, trace, at, &unwanted);
        let request = match choose {
            // Who picks another plan knows how long the output is.
            Some(_) => RequestView {
                expected_output: trace.requests[asked.request as usize].output,
                ..view
            },
            None => view,
        };
        self.roster.refresh(&self.bookings);
        let cluster = self.roster.cluster(self.hash).at(now_ms);
        let cluster = cluster.with_transfers(&self.rates);
        let decided = match choose {
            None => self.policy.choose(&cluster, &request),
            Some(choose) => self.policy.explain(&cluster, &request).map(|plans| {
                let chosen = plans[choose(&plans)];
                Decision {
                    chosen,
                    tied: 1,
                    weighed: 0,
                    start_ms: 0.0,
                    queued_ms: 0.0,
                    considered: Vec::new(),
                    work: Vec::new(),
                }
            }),
        };
        let decision = match decided {
            Ok(decision) => decision,
            Err(why) if !why.waits(&cluster, &request, &[]) => return Tried::Never,
            Err(NoPlan::NoRoom { .. }) => return Tried::NoRoom,
            Err(_) => return Tried::Waits(None),
        };
        let step_ms = self.step_ms[decision.plan().prefill().0 as usize];
        let rules = self.dispatch.settings();
        match rules.judge(&decision, turn, step_ms, &self.bookings) {
            Verdict::Waits(hold) => Tried::Waits(Some(hold)),
            Verdict::Goes(booked) => {
                let booked = booked.into_iter().map(|(slot, of)| (slot.0 as usize, of));
                self.booked.insert(asked.request, booked.collect());
                self.refusals.placed(asked.request);
                if let Some(keys) = self.keys.get_mut(&asked.request) {
                    keys.sent_ms = turn.key_ms;
                }
                Tried::Placed(Placed {
                    chosen: decision.chosen,
                })
            }
        }
    }

    /// A command about a request goes to a worker; its number.
    pub(crate) fn send(&mut self, worker: usize, request: u32) -> u64 {
        self.commands[worker] += 1;
        for (on, booking) in self.booked.get(&request).into_iter().flatten() {
            if *on == worker {
                booking.sent(self.commands[worker]);
            }
        }
        self.commands[worker]
    }

    /// A request made its first token, or is not there any more.
    pub(crate) fn started(&mut self, request: u32) {
        for (_, booking) in self.booked.get(&request).into_iter().flatten() {
            booking.started();
        }
    }

    /// An attempt has ended, in whatever way.
    pub(crate) fn released(&mut self, request: u32) {
        self.booked.remove(&request);
    }

    /// Whether a request is placed.
    pub(crate) fn has(&self, request: u32) -> bool {
        self.booked.contains_key(&request)
    }

    /// A request has its last token.
    pub(crate) fn finished(&mut self, request: u32, class: Class, tokens: u32) {
        self.lengths.observe(MODEL, class, tokens);
        self.keys.remove(&request);
        self.ended += 1;
        if self.ended.is_multiple_of(LEFT_EVERY) {
            let left =
                Class::ALL.map(|class| self.lengths.left_of_running(MODEL, class, self.max_tokens));
            self.roster.change_all(|view| view.left = left);
        }
    }

    /// KV went from one worker to another: how long it took.
    pub(crate) fn transferred(&mut self, from: usize, to: usize, bytes: u64, ms: f64) {
        let (from, to) = (WorkerSlot(from as u32), WorkerSlot(to as u32));
        self.rates.observe(from, to, Path::Network, bytes, ms);
    }

    /// A worker has no room for a request.
    pub(crate) fn refused(&mut self, request: u32, worker: usize) {
        let worker = WorkerSlot(worker as u32);
        if let Some(view) = self.roster.get(worker) {
            self.refusals.add(request, worker, &view.load);
        }
    }

    /// A worker has taken a request.
    pub(crate) fn reserved(&mut self, request: u32) {
        self.refusals.taken(request);
    }

    /// A report came.
    pub(crate) fn reported(&mut self, report: &Report, now_ms: f64) {
        let slot = WorkerSlot(report.worker as u32);
        self.bookings.echoed(slot, report.last_command);
        self.refusals.reported(slot, &report.load);
        let learner = &mut self.learners[report.worker];
        if let Some(sample) = &report.sample {
            learner.observe(sample);
        }
        self.step_ms[report.worker] = report.step_ms;
        if let Some(view) = self.roster.get_mut(slot) {
            view.report(report.load, now_ms);
            view.step = *learner.model();
        }
    }

    /// A worker as it is, for who is told at once and knows: its load, step times,
    /// and what its streams have left.
    pub(crate) fn sees(
        &mut self,
        worker: usize,
        (load, now_ms): (Load, f64),
        truth: (StepModel, [f64; 3]),
    ) {
        if let Some(view) = self.roster.get_mut(WorkerSlot(worker as u32)) {
            view.report(load, now_ms);
            (view.step, view.left) = truth;
        }
    }

    /// What came here, and what of it waits and is seen at no worker.
    pub(crate) fn demand(&self) -> Demand {
        let mut demand = self.demand;
        let waiting = self.dispatch.unlisted_by_class_ms(&self.model);
        for (queued, waits) in demand.queued_ms.iter_mut().zip(waiting) {
            *queued += waits;
        }
        demand
    }

    /// The pools as they look from here.
    pub(crate) fn pools(&mut self, demand: Demand) -> Pools {
        self.roster.refresh(&self.bookings);
        let cluster = self.roster.cluster(self.hash);
        Pools::of(&MODEL.into(), &cluster, demand, &ClassTargets::default())
    }

    /// A worker has another role: what it has it ends, new work is of the new
    /// role.
    pub(crate) fn flipped(&mut self, worker: WorkerSlot, role: Role) {
        if let Some(view) = self.roster.get_mut(worker) {
            view.role = role;
        }
    }

    /// A worker is gone, or back with nothing.
    pub(crate) fn stands(&mut self, worker: usize, serving: bool) {
        let slot = WorkerSlot(worker as u32);
        self.bookings.session_ended(slot);
        self.commands[worker] = 0;
        let Some(view) = self.roster.get_mut(slot) else {
            return;
        };
        view.phase = if serving {
            Phase::Serving
        } else {
            // It may come back: who needs it waits.
            Phase::Loading
        };
        view.load = Load::default();
        view.load.kv.free = view.abilities.pool_blocks;
    }

    fn look_up(&mut self, trace: &Trace, index: &KvIndex, request: u32) {
        let units = (trace.block_tokens as usize / UNIT_TOKENS).max(1);
        let blocks = trace.blocks(request as usize);
        // Only the values at the ends of blocks are read: all workers have
        // the block size of the trace.
        self.chain.resize(blocks.len() * units, 0);
        for (at, block) in blocks.iter().enumerate() {
            self.chain[(at + 1) * units - 1] = mix(*block);
        }
        index.lookup_into(&self.chain, &mut self.cached);
    }
}

fn dispatch_settings(queue: &QueueSettings) -> DispatchSettings {
    let shipped = DispatchSettings::default();
    let targets = match queue.order {
        Order::Deadline => shipped.targets,
        Order::Arrival => shipped.targets.by_arrival(),
    };
    DispatchSettings {
        queue: kvmesh_scheduler::QueueSettings {
            limit: usize::MAX,
            ..shipped.queue
        },
        targets,
        dispatch_ahead_ms: queue.dispatch_ahead_ms.unwrap_or(f64::INFINITY),
        max_wait_ms: queue.max_wait_ms.unwrap_or(f64::INFINITY),
        ..shipped
    }
}
