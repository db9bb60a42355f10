//! A router: what it believes of its workers, and what waits in it.
//!
//! Belief comes from reports alone, as in life. The decisions are those of
//! `kvmesh-scheduler`; what is here is what the gateway has around them.

use crate::policies::policy;
use crate::seed::mix;
use crate::settings::{Order, Settings};
use crate::trace::Trace;
use kvmesh_kv_index::{KvIndex, Matches, UNIT_TOKENS, WorkerSlot};
use kvmesh_scheduler::{
    Abilities, AdmissionSettings, Booking, Bookings, ClassTargets, Cluster, Considered, Decision,
    Learner, Load, Needs, NoPlan, OutputLengths, Phase, Policy, Queue, Rejected, RequestView, Role,
    StepSample, Work, WorkerView, admit, virtual_deadline_ms,
};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Requests that are tried when a report comes: a bound on what it costs.
const TRIED_AT_ONCE: usize = 64;
/// A prior for the length of an output, tokens.
const EXPECTED_OUTPUT: u32 = 256;
const MODEL: &str = "model";

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
    Never(NoPlan),
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
    order: Order,
    dispatch_ahead_ms: f64,
    max_wait_ms: f64,
    lengths: OutputLengths,
    bookings: Bookings,
    views: Vec<WorkerView>,
    learners: Vec<Learner>,
    step_ms: Vec<f64>,
    commands: Vec<u64>,
    queue: Queue<Asked>,
    /// By worker: keys of prompts that were sent and have not begun.
    unstarted: Vec<BTreeMap<u32, f64>>,
    booked: BTreeMap<u32, Vec<(usize, Booking)>>,
    /// Keys and predicted work of requests that have not ended.
    keys: BTreeMap<u32, (f64, f64)>,
    excluded: BTreeMap<u32, Vec<WorkerSlot>>,
    chain: Vec<u64>,
    cached: Matches,
}

impl Router {
    pub(crate) fn new(number: usize, settings: &Settings) -> Self {
        let prior = settings.profile.step_model(1.0);
        let views: Vec<WorkerView> = settings
            .roles()
            .into_iter()
            .enumerate()
            .map(|(slot, role)| view(slot, role, settings))
            .collect();
        let workers = views.len();
        Self {
            hash: mix(settings.seed ^ (number as u64 + 1)),
            policy: policy(&settings.policy, settings.seed),
            order: settings.queue.order,
            dispatch_ahead_ms: settings.queue.dispatch_ahead_ms.unwrap_or(f64::INFINITY),
            max_wait_ms: settings.queue.max_wait_ms.unwrap_or(f64::INFINITY),
            lengths: OutputLengths::new(EXPECTED_OUTPUT),
            bookings: Bookings::new(),
            learners: vec![Learner::new(prior); workers],
            step_ms: vec![0.0; workers],
            commands: vec![0; workers],
            queue: Queue::new(usize::MAX),
            unstarted: vec![BTreeMap::new(); workers],
            booked: BTreeMap::new(),
            keys: BTreeMap::new(),
            excluded: BTreeMap::new(),
            chain: Vec::new(),
            cached: Matches::default(),
            views,
        }
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
        let request = request_view(&self.lengths, &self.cached, trace, &asked, &[]);
        let cluster = Cluster {
            router: self.hash,
            workers: &self.views,
        };
        let unbound = AdmissionSettings {
            max_wait_ms: f64::INFINITY,
        };
        let alone = admit(&cluster, &request, 0.0, None, &unbound)?;
        let class = trace.requests[asked.request as usize].class;
        let key = match self.order {
            Order::Deadline => virtual_deadline_ms(
                &ClassTargets::default(),
                class,
                asked.arrival_ms,
                alone.work_ms,
            ),
            Order::Arrival => asked.arrival_ms,
        };
        if self.max_wait_ms.is_finite() {
            let bound = AdmissionSettings {
                max_wait_ms: self.max_wait_ms,
            };
            let ahead_ms = self.queue.work_before_ms(key);
            admit(&cluster, &request, ahead_ms, None, &bound)?;
        }
        self.keys.insert(asked.request, (key, alone.work_ms));
        Ok(())
    }

    /// Places a request, or lets it wait. New work does not pass what goes
    /// before it.
    pub(crate) fn place(&mut self, asked: Asked, trace: &Trace, index: &KvIndex) -> Tried {
        let key = self.key(asked.request);
        let behind = self
            .queue
            .first()
            .is_some_and(|(_, first)| self.key(first.request) <= key);
        let tried = if behind {
            Tried::Waits { no_room: false }
        } else {
            self.try_plan(asked, trace, index, None)
        };
        if matches!(tried, Tried::Waits { .. }) {
            self.wait(asked);
        }
        tried
    }

    /// Lets a request wait.
    pub(crate) fn wait(&mut self, asked: Asked) {
        let (key, work_ms) = self.keys.get(&asked.request).copied().unwrap_or_default();
        // It has no bound of its own.
        let _ = self.queue.push(key, work_ms, asked);
    }

    /// Chooses and books, if a worker would start the request soon. `choose`
    /// picks another plan among those that the policy weighs.
    pub(crate) fn try_plan(
        &mut self,
        asked: Asked,
        trace: &Trace,
        index: &KvIndex,
        choose: Option<&mut dyn FnMut(&[Considered]) -> usize>,
    ) -> Tried {
        self.look_up(trace, index, asked.request);
        let excluded = self.excluded.get(&asked.request).cloned();
        let unwanted = excluded.as_deref().unwrap_or(&[]);
        let request = request_view(&self.lengths, &self.cached, trace, &asked, unwanted);
        let cluster = Cluster {
            router: self.hash,
            workers: &self.views,
        };
        let decided = match choose {
            None => self.policy.choose(&cluster, &request),
            Some(choose) => self.policy.explain(&cluster, &request).map(|plans| {
                let chosen = plans[choose(&plans)];
                Decision {
                    chosen,
                    tied: 1,
                    start_ms: 0.0,
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
            Err(never) => return Tried::Never(never),
        };
        let on = decision.plan().prefill().0 as usize;
        let key = self.key(asked.request);
        let ahead_ms = self.dispatch_ahead_ms.max(self.step_ms[on]);
        if decision.start_ms > ahead_ms && !self.preempts(on, key) {
            return Tried::Waits { no_room: false };
        }
        self.unstarted[on].insert(asked.request, key);
        let mut booked = Vec::new();
        for (slot, work) in &decision.work {
            let worker = slot.0 as usize;
            booked.push((worker, self.bookings.book(*slot, *work)));
            self.views[worker].booked = self.bookings.booked(*slot);
        }
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
    }

    /// An attempt has ended, in whatever way.
    pub(crate) fn released(&mut self, request: u32) {
        for (worker, booking) in self.booked.remove(&request).into_iter().flatten() {
            drop(booking);
            self.unstarted[worker].remove(&request);
            self.views[worker].booked = self.bookings.booked(WorkerSlot(worker as u32));
        }
    }

    /// Whether a request is placed.
    pub(crate) fn has(&self, request: u32) -> bool {
        self.booked.contains_key(&request)
    }

    /// A request has its last token.
    pub(crate) fn finished(&mut self, request: u32, class: kvmesh_scheduler::Class, tokens: u32) {
        self.lengths.observe(MODEL, class, tokens);
        self.keys.remove(&request);
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
        let view = &mut self.views[report.worker];
        view.load = report.load;
        view.booked = self.bookings.booked(slot);
        self.step_ms[report.worker] = report.step_ms;
        if let Some(sample) = &report.sample {
            self.learners[report.worker].observe(sample);
            view.step = *self.learners[report.worker].model();
        }
    }

    /// A worker is gone, or back with nothing.
    pub(crate) fn stands(&mut self, worker: usize, serving: bool) {
        self.bookings.session_ended(WorkerSlot(worker as u32));
        self.commands[worker] = 0;
        self.unstarted[worker].clear();
        let view = &mut self.views[worker];
        view.phase = if serving {
            Phase::Serving
        } else {
            Phase::Stopping
        };
        view.booked = Work::default();
        view.load = Load::default();
        view.load.kv.free = view.abilities.pool_blocks;
    }

    /// What waits and is to be tried now, most urgent first.
    pub(crate) fn to_try(&mut self) -> Vec<Asked> {
        let first: Vec<_> = self
            .queue
            .iter()
            .take(TRIED_AT_ONCE)
            .map(|(ticket, _)| ticket)
            .collect();
        first
            .into_iter()
            .filter_map(|ticket| self.queue.remove(ticket))
            .collect()
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

fn request_view<'a>(
    lengths: &OutputLengths,
    cached: &'a Matches,
    trace: &Trace,
    asked: &Asked,
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
        needs: Needs::default(),
        cached,
        excluded,
    }
}

fn view(slot: usize, role: Role, settings: &Settings) -> WorkerView {
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
            engine_connector: "".into(),
            pairing: "".into(),
            prefix_pull: settings.prefix_pull,
            grammars: false,
            grammars_over_continuation: false,
            penalties_over_continuation: false,
            max_logprobs: 0,
            block_tokens: UNIT_TOKENS as u32,
            pool_blocks,
            block_bytes: profile.kv_bytes_per_token * UNIT_TOKENS as u64,
            max_batch: profile.max_batch,
            context_length: profile.context_length,
        }),
        step: profile.step_model(1.0),
        load,
        booked: Work::default(),
    }
}
