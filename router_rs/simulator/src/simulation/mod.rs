//! The event loop: truth and belief, and the messages between them.

mod fail;
mod place;
mod plan;
mod step;

use crate::engine::{Engine, EngineLoad, EngineSettings, Outcome};
use crate::events::{Event, Events};
use crate::links::Links;
use crate::outcome::{Recorder, Run, Unloaded};
use crate::router::Router;
use crate::seed::Seeded;
use crate::settings::Settings;
use crate::trace::Trace;
use kvmesh_kv_index::{IndexSettings, Knowledge, KvIndex, SlotError};
use kvmesh_scheduler::planner::Planner;
use kvmesh_scheduler::{ClassTargets, ScoreError, StepSample};
use std::collections::VecDeque;
use thiserror::Error;

/// A run that cannot begin.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum SimulationError {
    /// No worker can compute prompts, or none can decode.
    #[error("workers are needed: `both` ones, or prefill and decode ones")]
    NoWorkers,
    /// The trace's blocks are no multiple of 16 tokens, or there are too many
    /// workers.
    #[error(transparent)]
    Index(#[from] SlotError),
    /// A failure names a worker that is not there.
    #[error("worker {worker} cannot fail: there are {workers}")]
    NoSuchWorker {
        /// The worker named.
        worker: usize,
        /// Workers.
        workers: usize,
    },
    /// The policy's scorer failed: choices would be another policy's.
    #[error("policy: {0}")]
    Scorer(#[from] ScoreError),
    /// A setting is out of its range.
    #[error("{0}")]
    Setting(&'static str),
}

/// Where a request is.
#[derive(Debug, Clone, Copy, Default)]
struct Flight {
    router: u32,
    /// Attempts so far: events of earlier ones are stale.
    attempt: u32,
    /// Output tokens that its client has.
    made: u32,
    last_ms: f64,
    prefill: u32,
    decode: u32,
    /// Tokens that the decode worker need not be sent.
    there: u32,
    /// Tokens computed by prefill that were passed over or sent.
    passed: u32,
    /// Tokens whose KV was sent.
    sent: u32,
    /// When the last KV sent is there, ms.
    sent_ms: f64,
    /// Tokens pulled from another worker, and from which.
    pull: Option<(u32, u32)>,
}

/// A worker as it is.
struct Worker {
    engine: Engine,
    noise: Seeded,
    life: u32,
    alive: bool,
    /// Last command of each router that has come.
    commands: Vec<u64>,
    /// The step that runs: when it ends, ms, what it will have been, and what
    /// its report says of its start.
    step: Option<(f64, StepSample, Said)>,
    on_the_way: VecDeque<(Said, Option<StepSample>)>,
}

/// A report before it is told who asks.
struct Said {
    load: EngineLoad,
    commands: Vec<u64>,
    cache: Vec<(bool, u64)>,
    step_ms: f64,
    step_left_ms: f64,
}

/// A run.
pub(crate) struct Simulation<'a> {
    settings: &'a Settings,
    trace: &'a Trace,
    index: KvIndex,
    routers: Vec<Router>,
    workers: Vec<Worker>,
    links: Links,
    events: Events,
    flights: Vec<Flight>,
    next: usize,
    now_ms: f64,
    recorder: Recorder,
    outcomes: Vec<Outcome>,
    planner: Option<Planner>,
}

/// Replays a trace.
///
/// # Errors
/// [`SimulationError`].
pub fn simulate(settings: &Settings, trace: &Trace) -> Result<Run, SimulationError> {
    let mut simulation = Simulation::new(settings, trace)?;
    simulation.run()?;
    Ok(simulation.recorder.finish(settings, trace))
}

impl<'a> Simulation<'a> {
    fn new(settings: &'a Settings, trace: &'a Trace) -> Result<Self, SimulationError> {
        check(settings)?;
        let roles = settings.roles();
        let index = KvIndex::new(IndexSettings {
            max_workers: roles.len(),
            ..IndexSettings::default()
        });
        let mut workers = Vec::new();
        for (number, role) in roles.iter().enumerate() {
            index.add_worker(trace.block_tokens, Knowledge::Events)?;
            let mut noise = Seeded::new(settings.seed, number as u64);
            let slowness = 1.0 + settings.noise.speed * (2.0 * noise.uniform() - 1.0);
            let engine = EngineSettings {
                truth: settings.profile.step_model(slowness),
                pool_units: settings.profile.pool_tokens / 16,
                block_tokens: trace.block_tokens,
                max_batch: settings.profile.max_batch,
                layer_preemption: settings.profile.layer_preemption,
                chunk_tokens: settings.profile.chunk_tokens,
                itl_ms: itl_targets(),
                routers: settings.routers,
            };
            workers.push(Worker {
                engine: Engine::new(engine, *role),
                noise,
                life: 0,
                alive: true,
                commands: vec![0; settings.routers],
                step: None,
                on_the_way: VecDeque::new(),
            });
        }
        let routers = (0..settings.routers)
            .map(|number| Router::new(number, settings))
            .collect();
        Ok(Self {
            links: Links::new(
                settings.profile.transfer,
                settings.profile.kv_bytes_per_token,
                roles.len(),
            ),
            settings,
            trace,
            index,
            routers,
            recorder: Recorder::new(settings, trace, Unloaded::new(&settings.profile)),
            workers,
            events: Events::default(),
            flights: vec![Flight::default(); trace.requests.len()],
            next: 0,
            now_ms: 0.0,
            outcomes: Vec::new(),
            planner: settings
                .planner
                .as_ref()
                .map(|numbers| Planner::new(numbers.settings())),
        })
    }

    fn run(&mut self) -> Result<(), SimulationError> {
        self.plan_arrival();
        for (number, failure) in self.settings.failures.iter().enumerate() {
            let number = number as u32;
            self.events.at(failure.at_ms, Event::Fails { number });
        }
        self.look_later();
        while let Some((at_ms, event)) = self.events.pop() {
            self.now_ms = at_ms;
            self.happens(event);
        }
        let failure = self.routers.iter().find_map(Router::scorer_failure);
        failure.map_or(Ok(()), |error| Err(error.clone().into()))
    }

    fn happens(&mut self, event: Event) {
        match event {
            Event::Arrival => self.arrival(),
            Event::StepEnds { worker, life } => {
                if self.workers[worker as usize].life == life {
                    self.step_ends(worker as usize);
                }
            }
            Event::Report { worker, life } => {
                if self.workers[worker as usize].life == life {
                    self.report(worker as usize);
                }
            }
            Event::Reserve { request, attempt } if self.current(request, attempt) => {
                self.reserve(request);
            }
            Event::Refused { request, attempt } if self.current(request, attempt) => {
                self.refused(request);
            }
            Event::Submit { request, attempt } if self.current(request, attempt) => {
                self.submit(request);
            }
            Event::Fetched { request, attempt } if self.current(request, attempt) => {
                self.fetched(request);
            }
            Event::HandedOver { request, attempt } if self.current(request, attempt) => {
                self.handed_over(request);
            }
            // An attempt that is over.
            Event::Reserve { .. }
            | Event::Refused { .. }
            | Event::Submit { .. }
            | Event::Fetched { .. }
            | Event::HandedOver { .. } => {}
            Event::Fails { number } => self.fails(number as usize),
            Event::Noticed { number } => self.noticed(number as usize),
            Event::Back { number } => self.back(number as usize),
            Event::Look => self.look(),
            Event::Pass { router } => self.pass_again(router as usize),
        }
    }

    fn current(&self, request: u32, attempt: u32) -> bool {
        self.flights[request as usize].attempt == attempt
    }

    fn later(&mut self, after_ms: f64, event: Event) {
        self.events.at(self.now_ms + after_ms, event);
    }
}

fn itl_targets() -> [f64; 3] {
    let targets = ClassTargets::default();
    [targets.interactive, targets.standard, targets.batch]
        .map(|target| target.itl_ms.unwrap_or(f64::INFINITY))
}

fn check(settings: &Settings) -> Result<(), SimulationError> {
    let split = settings.prefill > 0 && settings.decode > 0;
    if settings.both == 0 && !split {
        return Err(SimulationError::NoWorkers);
    }
    let positive = |value: f64| value.is_finite() && value > 0.0;
    if settings.routers == 0 {
        return Err(SimulationError::Setting("routers: at least one"));
    }
    if !positive(settings.speed) {
        return Err(SimulationError::Setting("speed: a number above 0"));
    }
    let looks = settings.planner.as_ref().is_none_or(|numbers| {
        let positive = |number: Option<f64>| number.is_none_or(|ms| ms.is_finite() && ms > 0.0);
        positive(numbers.look_ms) && positive(numbers.memory_ms)
    });
    if !looks {
        return Err(SimulationError::Setting(
            "planner.look_ms and planner.memory_ms: numbers above 0",
        ));
    }
    if !(0.0..1.0).contains(&settings.warm_up) {
        return Err(SimulationError::Setting("warm_up: from 0 to below 1"));
    }
    if !(0.0..1.0).contains(&settings.noise.speed) {
        return Err(SimulationError::Setting("noise.speed: from 0 to below 1"));
    }
    if !settings.prior.into_iter().all(positive) {
        return Err(SimulationError::Setting("prior: five numbers above 0"));
    }
    let workers = settings.prefill + settings.decode + settings.both;
    for failure in &settings.failures {
        if failure.worker >= workers {
            return Err(SimulationError::NoSuchWorker {
                worker: failure.worker,
                workers,
            });
        }
    }
    Ok(())
}
