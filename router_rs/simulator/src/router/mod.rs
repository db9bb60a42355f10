//! A router: what it believes of its workers, and what waits in it.
//!
//! Belief comes from reports alone, as in life. The decisions are those of
//! `kvmesh-scheduler`; what is here is what the gateway has around them.

mod belief;
mod waiting;

use crate::policies::policy;
use crate::seed::mix;
use crate::settings::{Order, Settings};
use crate::trace::Trace;
use crate::weighted::Weighted;
use belief::{prompt_alone, request_view, view};
use kvmesh_kv_index::{KvIndex, Matches, UNIT_TOKENS, WorkerSlot};
use kvmesh_scheduler::planner::{Demand, Pools};
use kvmesh_scheduler::{
    AdmissionSettings, Booking, Bookings, Class, ClassTargets, Considered, Decision, Estimate,
    Lane, Learner, Load, NoPlan, OutputLengths, Path, Phase, Policy, Queue, Rejected, RequestView,
    Role, Roster, ScoreError, StepModel, StepSample, TransferRates, Work, virtual_deadline_ms,
};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Requests that are tried when a report comes: a bound on what it costs.
const TRIED_AT_ONCE: usize = 32;
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
    /// It waits.
    Waits {
        /// There was no room.
        no_room: bool,
    },
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
    order: Order,
    dispatch_ahead_ms: f64,
    max_wait_ms: f64,
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
    queue: Queue<Asked>,
    /// By worker: keys of prompts that were sent and have not begun.
    unstarted: Vec<BTreeMap<u32, f64>>,
    booked: BTreeMap<u32, Vec<(usize, Booking)>>,
    /// Bookings of those that wait, where they would go now: who chooses after
    /// them sees them there. Each is chosen anew whenever it is tried.
    intended: BTreeMap<u32, Vec<(usize, Booking)>>,
    /// Keys and predicted work of requests that have not ended.
    keys: BTreeMap<u32, (f64, f64)>,
    excluded: BTreeMap<u32, Vec<WorkerSlot>>,
    chain: Vec<u64>,
    cached: Matches,
    /// Outputs that have ended.
    ended: u64,
    lacks_room: bool,
    next_pass_ms: f64,
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
            order: settings.queue.order,
            dispatch_ahead_ms: settings.queue.dispatch_ahead_ms.unwrap_or(f64::INFINITY),
            max_wait_ms: settings.queue.max_wait_ms.unwrap_or(f64::INFINITY),
            max_tokens: settings.max_tokens,
            lengths: OutputLengths::new(EXPECTED_OUTPUT),
            demand: Demand::default(),
            bookings: Bookings::new(),
            learners: vec![Learner::new(prior); workers],
            step_ms: vec![0.0; workers],
            commands: vec![0; workers],
            queue: Queue::new(usize::MAX),
            unstarted: vec![BTreeMap::new(); workers],
            booked: BTreeMap::new(),
            intended: BTreeMap::new(),
            keys: BTreeMap::new(),
            excluded: BTreeMap::new(),
            chain: Vec::new(),
            cached: Matches::default(),
            ended: 0,
            lacks_room: false,
            next_pass_ms: 0.0,
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
        self.queue.len()
    }

    /// The key of a request: smaller goes first.
    pub(crate) fn key(&self, request: u32) -> f64 {
        self.keys.get(&request).map_or(0.0, |(key, _)| *key)
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
        let work_ms = Estimate::of(&cluster, &request).work_ms;
        let class = request.class;
        let key = match self.order {
            Order::Deadline => {
                virtual_deadline_ms(&ClassTargets::default(), class, asked.arrival_ms, work_ms)
            }
            Order::Arrival => asked.arrival_ms,
        };
        if self.max_wait_ms.is_finite() {
            let bound = AdmissionSettings {
                max_wait_ms: self.max_wait_ms,
            };
            let at = (asked, key);
            let request = request_view(&self.lengths, &self.cached, trace, at, &[]);
            let estimate = Estimate::of(&cluster, &request);
            estimate.admit(self.queue.admission_ms(class, key), None, &bound)?;
        }
        self.keys.insert(asked.request, (key, work_ms));
        if work_ms.is_finite() {
            self.demand
                .add(class, work_ms, f64::from(request.expected_output));
        }
        Ok(())
    }

    /// Places a request, or lets it wait. Those that go before it are counted
    /// where they would go, so that it passes nobody by going elsewhere.
    pub(crate) fn place(
        &mut self,
        asked: Asked,
        now_ms: f64,
        trace: &Trace,
        index: &KvIndex,
    ) -> Tried {
        let key = self.key(asked.request);
        let last = self.queue.iter().nth(TRIED_AT_ONCE - 1);
        let far = last.is_some_and(|(_, other)| self.key(other.request) <= key);
        let tried = if far {
            Tried::Waits { no_room: false }
        } else {
            self.try_plan(asked, now_ms, trace, index, None)
        };
        if let Tried::Waits { no_room } = tried {
            self.lacks_room |= no_room;
            self.wait(asked, trace);
        }
        tried
    }

    /// Lets a request wait.
    pub(crate) fn wait(&mut self, asked: Asked, trace: &Trace) {
        let (key, work_ms) = self.keys.get(&asked.request).copied().unwrap_or_default();
        let lane = Lane {
            class: trace.requests[asked.request as usize].class,
            tenant: 0,
        };
        // It has no bound of its own.
        let _ = self.queue.push_for(lane, key, work_ms, asked);
    }

    /// Chooses and books, if a worker would start the request soon. `choose`
    /// picks another plan among those that the policy weighs.
    pub(crate) fn try_plan(
        &mut self,
        asked: Asked,
        now_ms: f64,
        trace: &Trace,
        index: &KvIndex,
        choose: Option<Choice<'_>>,
    ) -> Tried {
        self.intended.remove(&asked.request);
        self.look_up(trace, index, asked.request);
        let excluded = self.excluded.get(&asked.request).cloned();
        let unwanted = excluded.as_deref().unwrap_or(&[]);
        let key = self.key(asked.request);
        let view = request_view(&self.lengths, &self.cached, trace, (asked, key), unwanted);
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
                    considered: Vec::new(),
                    work: Vec::new(),
                }
            }),
        };
        let decision = match decided {
            Ok(decision) => decision,
            Err(NoPlan::NoRoom { .. } | NoPlan::NotReady { .. }) => {
                return Tried::Waits { no_room: true };
            }
            // Those who refused for now may be all that there are.
            Err(_) if excluded.is_some() => return Tried::Waits { no_room: true },
            Err(_) => return Tried::Never,
        };
        let on = decision.plan().prefill().0 as usize;
        let ahead_ms = self.dispatch_ahead_ms.max(self.step_ms[on]);
        let waits = decision.start_ms > ahead_ms && !self.preempts(on, key);
        let book = |(slot, work): &(WorkerSlot, Work)| {
            let work = if waits { prompt_alone(work) } else { *work };
            let booking = self.bookings.book_prompt(*slot, work, key);
            (slot.0 as usize, booking)
        };
        let booked = decision.work.iter().map(book).collect();
        if waits {
            self.intended.insert(asked.request, booked);
            return Tried::Waits { no_room: false };
        }
        self.unstarted[on].insert(asked.request, key);
        self.booked.insert(asked.request, booked);
        self.excluded.remove(&asked.request);
        Tried::Placed(Placed {
            chosen: decision.chosen,
        })
    }

    /// Whether a request would go before all prompts that were sent to a
    /// worker: it would preempt what runs there.
    fn preempts(&self, worker: usize, key: f64) -> bool {
        let there = &self.unstarted[worker];
        !there.is_empty() && there.values().all(|other| key < *other)
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
    pub(crate) fn started(&mut self, worker: usize, request: u32) {
        self.unstarted[worker].remove(&request);
        for (_, booking) in self.booked.get(&request).into_iter().flatten() {
            booking.started();
        }
    }

    /// An attempt has ended, in whatever way.
    pub(crate) fn released(&mut self, request: u32) {
        for (worker, booking) in self.booked.remove(&request).into_iter().flatten() {
            drop(booking);
            self.unstarted[worker].remove(&request);
        }
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

    /// A worker has no room for a request: not again before its next report.
    pub(crate) fn refused(&mut self, request: u32, worker: usize) {
        let slot = WorkerSlot(worker as u32);
        self.excluded.entry(request).or_default().push(slot);
    }

    /// A report came.
    pub(crate) fn reported(&mut self, report: &Report) {
        let slot = WorkerSlot(report.worker as u32);
        self.bookings.echoed(slot, report.last_command);
        for excluded in self.excluded.values_mut() {
            excluded.retain(|other| *other != slot);
        }
        let learner = &mut self.learners[report.worker];
        if let Some(sample) = &report.sample {
            learner.observe(sample);
        }
        self.step_ms[report.worker] = report.step_ms;
        if let Some(view) = self.roster.get_mut(slot) {
            view.load = report.load;
            view.step = *learner.model();
        }
    }

    /// A worker as it is, for who is told at once and knows: its load, step times,
    /// and what its streams have left.
    pub(crate) fn sees(&mut self, worker: usize, load: Load, truth: (StepModel, [f64; 3])) {
        if let Some(view) = self.roster.get_mut(WorkerSlot(worker as u32)) {
            view.load = load;
            (view.step, view.left) = truth;
        }
    }

    /// What came here, and what of it waits and is seen at no worker.
    pub(crate) fn demand(&self, trace: &Trace) -> Demand {
        let mut demand = self.demand;
        for (_, asked) in self.queue.iter() {
            if !self.intended.contains_key(&asked.request) {
                let class = trace.requests[asked.request as usize].class;
                let work_ms = self.keys.get(&asked.request).map_or(0.0, |(_, work)| *work);
                demand.queued_ms[class.index()] += work_ms;
            }
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
        self.unstarted[worker].clear();
        let Some(view) = self.roster.get_mut(slot) else {
            return;
        };
        view.phase = if serving {
            Phase::Serving
        } else {
            Phase::Stopping
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
