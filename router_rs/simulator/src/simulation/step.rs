//! Steps, what they bring, and the reports about them.

use super::{Said, Simulation, Worker};
use crate::engine::Outcome;
use crate::events::Event;
use crate::router::Report;
use crate::seed::mix;
use kvmesh_kv_index::{CacheChange, KvIndex, Tier, WorkerSlot};
use kvmesh_scheduler::{Look, StepSample};

impl Simulation<'_> {
    /// Begins a step where none runs.
    pub(super) fn work(&mut self, number: usize) {
        let mut outcomes = std::mem::take(&mut self.outcomes);
        let worker = &mut self.workers[number];
        if worker.alive
            && !worker.engine.running()
            && let Some(mean) = worker.engine.begin_step(self.trace, &mut outcomes)
        {
            let noise = &self.settings.noise;
            let jitter = worker.noise.log_normal(noise.jitter);
            let stalls = worker.noise.uniform() < noise.stall;
            let factor = if stalls { noise.stall_factor } else { 1.0 };
            let takes_ms = mean.duration_ms * jitter * factor;
            let said = Said::now(worker, mean.duration_ms, mean.duration_ms);
            let sample = StepSample {
                duration_ms: takes_ms,
                ..mean
            };
            worker.step = Some((self.now_ms + mean.duration_ms, sample, said));
            self.recorder.step(self.now_ms, &sample, &worker.engine);
            let (worker, life) = (number as u32, worker.life);
            self.later(takes_ms, Event::StepEnds { worker, life });
        }
        self.take_outcomes(number, &mut outcomes);
        self.outcomes = outcomes;
        self.report_now(number, None);
    }

    pub(super) fn step_ends(&mut self, number: usize) {
        let mut outcomes = std::mem::take(&mut self.outcomes);
        let worker = &mut self.workers[number];
        worker
            .engine
            .end_step(self.now_ms, self.trace, &mut outcomes);
        for (ms, count) in worker.engine.take_gaps() {
            self.recorder.gap(self.now_ms, ms, count);
        }
        if let Some((_, sample, said)) = worker.step.take() {
            if self.settings.noise.reports_a_step_late {
                self.send_report(number, said, Some(sample));
            } else {
                // What it found at its start is known already, but for the cache.
                self.feed_cache(number, &said.cache);
                self.report_now(number, Some(sample));
            }
        }
        self.take_outcomes(number, &mut outcomes);
        self.outcomes = outcomes;
        self.work(number);
        if self.settings.noise.reports_a_step_late {
            self.report_if_idle(number);
        }
    }

    /// A worker without a step says at once how it is.
    pub(super) fn report_if_idle(&mut self, number: usize) {
        let worker = &mut self.workers[number];
        if worker.alive && !worker.engine.running() {
            let said = Said::now(worker, 0.0, 0.0);
            self.send_report(number, said, None);
        }
    }

    /// Where reports are not late, every change is one.
    fn report_now(&mut self, number: usize, sample: Option<StepSample>) {
        let worker = &mut self.workers[number];
        if self.settings.noise.reports_a_step_late || !worker.alive {
            return;
        }
        let (mean_ms, left_ms) = worker
            .step
            .as_ref()
            .map_or((0.0, 0.0), |(ends, sample, _)| {
                (sample.duration_ms, (ends - self.now_ms).max(0.0))
            });
        let said = Said::now(worker, mean_ms, left_ms);
        self.send_report(number, said, sample);
    }

    fn send_report(&mut self, number: usize, said: Said, sample: Option<StepSample>) {
        let worker = &mut self.workers[number];
        worker.on_the_way.push_back((said, sample));
        let (worker, life) = (number as u32, worker.life);
        let after_ms = self.settings.noise.report_ms;
        self.later(after_ms, Event::Report { worker, life });
    }

    fn feed_cache(&self, number: usize, events: &[(bool, u64)]) {
        feed_cache(&self.index, WorkerSlot(number as u32), events);
    }

    /// A report is here: every router takes it in and looks whether somebody
    /// who waits can go.
    pub(super) fn report(&mut self, number: usize) {
        let Some((said, sample)) = self.workers[number].on_the_way.pop_front() else {
            return;
        };
        self.feed_cache(number, &said.cache);
        for router in 0..self.routers.len() {
            let report = Report {
                worker: number,
                load: said.load.of(router, self.now_ms, said.step_left_ms),
                last_command: said.commands[router],
                step_ms: said.step_ms,
                sample,
            };
            self.routers[router].reported(&report, self.now_ms);
            match self.routers[router].look(number, self.now_ms) {
                Look::Now => self.serve_queue(router),
                Look::At(at_ms) => self.pass_later(router, at_ms),
                Look::No => {}
            }
        }
    }

    /// Plans a look, unless one is planned.
    pub(super) fn pass_later(&mut self, router: usize, at_ms: f64) {
        if self.routers[router].puts_off(at_ms) {
            let router = router as u32;
            self.events.at(at_ms, Event::Pass { router });
        }
    }

    /// The time of a look that was put off.
    pub(super) fn pass_again(&mut self, router: usize) {
        if self.routers[router].due(self.now_ms) {
            self.serve_queue(router);
        }
    }

    /// Tries what waits in a router, most urgent first.
    pub(super) fn serve_queue(&mut self, router: usize) {
        let pass = self.routers[router].pass(self.now_ms);
        self.try_all(router, pass);
        self.recorder.queued(self.now_ms, self.waiting());
    }

    /// What engines bring goes to clients, routers and other workers.
    fn take_outcomes(&mut self, number: usize, outcomes: &mut Vec<Outcome>) {
        for outcome in outcomes.drain(..) {
            match outcome {
                Outcome::Started { request, cached } => self.started(request, cached),
                Outcome::Chunk { request, tokens } => self.chunk(request, tokens),
                Outcome::Token { request, left } => self.token(request, left),
                Outcome::Finished { request } => self.finished(number, request),
                Outcome::Returned { request, left } => {
                    let flight = &mut self.flights[request as usize];
                    flight.made = self.trace.requests[request as usize].output - left;
                    flight.last_ms = self.now_ms;
                    self.recorder.returned();
                    let router = flight.router as usize;
                    self.routers[router].released(request);
                    self.place_again(request);
                }
            }
        }
    }

    /// A prompt begins: what is cached can go to its decode worker at once.
    fn started(&mut self, request: u32, cached: u32) {
        self.recorder.started(request, cached);
        let flight = &mut self.flights[request as usize];
        if flight.prefill != flight.decode {
            // One that begins again sends nothing twice.
            flight.there = flight.there.max(flight.passed);
            flight.passed = 0;
            self.chunk(request, cached);
        }
    }

    /// KV of so many more tokens goes to its decode worker, but for what is
    /// there.
    fn chunk(&mut self, request: u32, tokens: u32) {
        let now_ms = self.now_ms;
        let flight = &mut self.flights[request as usize];
        let begin = flight.passed.max(flight.there);
        flight.passed += tokens;
        let missing = flight.passed.saturating_sub(begin);
        if missing > 0 {
            let (from, to) = (flight.prefill as usize, flight.decode as usize);
            flight.sent_ms = self.links.send(from, to, missing, now_ms);
            flight.sent += missing;
        }
    }

    fn token(&mut self, request: u32, left: u32) {
        let row = &self.trace.requests[request as usize];
        let flight = &mut self.flights[request as usize];
        flight.made = row.output - left;
        flight.last_ms = self.now_ms;
        let router = flight.router as usize;
        let (attempt, split) = (flight.attempt, flight.prefill != flight.decode);
        self.routers[router].started(request);
        self.recorder.token(request, self.now_ms);
        if split && left > 0 {
            let noise = &self.settings.noise;
            let at_ms = flight.sent_ms.max(self.now_ms + noise.network_ms);
            let at_ms = at_ms + self.links.fixed_ms();
            self.events
                .at(at_ms, Event::HandedOver { request, attempt });
        }
    }

    pub(super) fn handed_over(&mut self, request: u32) {
        let flight = self.flights[request as usize];
        let (prefill, decode) = (flight.prefill as usize, flight.decode as usize);
        self.workers[prefill]
            .engine
            .handed_over(request, self.trace);
        // What a worker tells of a transfer is its wire time, without waiting
        // for computing.
        let (bytes, ms) = self.links.alone(flight.sent);
        self.routers[flight.router as usize].transferred(prefill, decode, bytes, ms);
        // From here on only its decode worker's fate is its own.
        self.flights[request as usize].prefill = flight.decode;
        let left = self.trace.requests[request as usize].output - flight.made;
        self.workers[decode]
            .engine
            .arrived(request, left, flight.last_ms, self.trace);
        // Room that was given back may let a prompt start.
        self.work(prefill);
        self.work(decode);
    }

    fn finished(&mut self, number: usize, request: u32) {
        let row = &self.trace.requests[request as usize];
        let flight = &mut self.flights[request as usize];
        flight.attempt += 1;
        let (router, decode) = (flight.router as usize, flight.decode as usize);
        flight.made = row.output;
        self.recorder.finished(request, self.now_ms);
        self.routers[router].released(request);
        self.routers[router].finished(request, row.class, row.output);
        if decode != number {
            // One token only: its room on the decode worker is not needed.
            self.workers[decode].engine.cancel(request, self.trace);
        }
    }
}

impl Said {
    /// What a worker says now.
    fn now(worker: &mut Worker, step_ms: f64, step_left_ms: f64) -> Self {
        Self {
            load: worker.engine.load(),
            commands: worker.commands.clone(),
            cache: worker.engine.take_cache_events(),
            step_ms,
            step_left_ms,
        }
    }
}

fn feed_cache(index: &KvIndex, slot: WorkerSlot, events: &[(bool, u64)]) {
    let names: Vec<u64> = events.iter().map(|(_, name)| mix(*name)).collect();
    let mut changes = Vec::new();
    let mut begin = 0;
    let tier = Tier::Device;
    while begin < events.len() {
        let stored = events[begin].0;
        let run = events[begin..].iter().take_while(|e| e.0 == stored).count();
        let chain = &names[begin..begin + run];
        changes.push(if stored {
            CacheChange::Stored { chain, tier }
        } else {
            CacheChange::Removed { chain, tier }
        });
        begin += run;
    }
    if !changes.is_empty() {
        // Slots are as many as workers, from the start to the end.
        let _ = index.apply(slot, &changes);
    }
}
