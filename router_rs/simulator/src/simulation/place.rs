//! From arrival to a worker.

use super::{Flight, Simulation, Worker};
use crate::clairvoyant;
use crate::engine::{Sequence, Stage};
use crate::events::Event;
use crate::router::{Asked, Placed, Router, Tried};
use crate::seed::mix;
use crate::settings::PolicySettings;
use kvmesh_kv_index::WorkerSlot;
use kvmesh_scheduler::{Considered, Next, Outcome, Pass, Plan, Turn};

impl Simulation<'_> {
    pub(super) fn plan_arrival(&mut self) {
        if let Some(request) = self.trace.requests.get(self.next) {
            self.events
                .at(request.arrival_ms / self.settings.speed, Event::Arrival);
        }
    }

    pub(super) fn asked(&self, request: u32) -> Asked {
        let (flight, row) = (
            &self.flights[request as usize],
            &self.trace.requests[request as usize],
        );
        Asked {
            request,
            arrival_ms: row.arrival_ms / self.settings.speed,
            made: flight.made,
            max_tokens: row.output.max(self.settings.max_tokens),
        }
    }

    pub(super) fn arrival(&mut self) {
        let request = self.next as u32;
        self.next += 1;
        self.plan_arrival();
        let router =
            (mix(u64::from(request) ^ self.settings.seed) % self.settings.routers as u64) as usize;
        let flight = &mut self.flights[request as usize];
        flight.router = router as u32;
        flight.last_ms = f64::NAN;
        let asked = self.asked(request);
        if self.routers[router]
            .arrive(asked, self.trace, &self.index)
            .is_err()
        {
            self.recorder.rejected(request);
            return;
        }
        self.place(router, asked);
        self.recorder.queued(self.now_ms, self.waiting());
    }

    /// Places a request, or lets it wait.
    fn place(&mut self, router: usize, asked: Asked) {
        if let Some(pass) = self.routers[router].arrives(asked, self.now_ms, self.trace) {
            if let Some(at_ms) = pass.again_ms() {
                self.pass_later(router, at_ms);
            }
            self.try_all(router, pass);
        }
    }

    /// Tries the requests of a pass, one after the other.
    pub(super) fn try_all(&mut self, router: usize, mut pass: Pass) {
        while let Some(next) = self.routers[router].next(&mut pass, self.now_ms) {
            let Next {
                place,
                item: asked,
                turn,
            } = next;
            let outcome = match self.try_plan(router, (asked, turn)) {
                Tried::Placed(placed) => {
                    self.dispatch(router, asked, &placed);
                    Outcome::Went
                }
                Tried::NoRoom => Outcome::NoRoom(asked),
                Tried::Waits(hold) => Outcome::Waits(asked, hold),
                Tried::Never => {
                    self.recorder.rejected(asked.request);
                    Outcome::Ended
                }
            };
            self.routers[router].came_of(&mut pass, &place, outcome, self.now_ms);
        }
    }

    pub(super) fn waiting(&self) -> usize {
        self.routers.iter().map(Router::queued).sum()
    }

    /// Chooses by what the policy may know.
    fn try_plan(&mut self, router: usize, (asked, turn): (Asked, Turn)) -> Tried {
        if self.settings.policy == PolicySettings::Clairvoyant {
            return self.try_clairvoyant(router, (asked, turn));
        }
        let (now_ms, trace) = (self.now_ms, self.trace);
        self.routers[router].try_plan((asked, turn), now_ms, trace, &self.index, None)
    }

    /// Chooses with every worker and every length as it is, and nothing late.
    fn try_clairvoyant(&mut self, router: usize, (asked, turn): (Asked, Turn)) -> Tried {
        let (workers, trace, now_ms) = (&self.workers, self.trace, self.now_ms);
        let step_left_ms = |worker: &Worker| {
            let ends = worker.step.as_ref().map(|(ends_ms, ..)| ends_ms - now_ms);
            ends.unwrap_or(0.0).max(0.0)
        };
        for (number, worker) in workers.iter().enumerate() {
            let left_ms = step_left_ms(worker);
            let load = worker.engine.load().of(router, now_ms, left_ms);
            let truth = (worker.engine.truth(), worker.engine.mean_left());
            self.routers[router].sees(number, (load, now_ms), truth);
        }
        let row = &trace.requests[asked.request as usize];
        let sequence = |stage| {
            Sequence::new(
                asked.request,
                router,
                row.class,
                turn.key_ms,
                stage,
                row.prompt + asked.made,
                row.output - asked.made,
                f64::NAN,
            )
        };
        let engine = |slot: WorkerSlot| {
            let worker = &workers[slot.0 as usize];
            (&worker.engine, step_left_ms(worker))
        };
        let mut choose =
            |plans: &[Considered]| clairvoyant::choose(plans, sequence, trace, now_ms, engine);
        let asked = (asked, turn);
        self.routers[router].try_plan(asked, now_ms, trace, &self.index, Some(&mut choose))
    }

    fn dispatch(&mut self, router: usize, asked: Asked, placed: &Placed) {
        let request = asked.request;
        let chosen = &placed.chosen;
        self.recorder.placed(
            request,
            self.now_ms,
            chosen.terms.ttft_ms(),
            chosen.plan.prefill().0,
            chosen.plan.decode().0,
        );
        let flight = &mut self.flights[request as usize];
        flight.attempt += 1;
        flight.prefill = chosen.plan.prefill().0;
        flight.decode = chosen.plan.decode().0;
        (flight.there, flight.passed, flight.sent) = (0, 0, 0);
        flight.sent_ms = 0.0;
        flight.pull = chosen
            .plan
            .source()
            .map(|source| (source.0, chosen.pulled_tokens));
        let attempt = flight.attempt;
        let event = match chosen.plan {
            Plan::Whole { worker, .. } => {
                self.routers[router].send(worker.0 as usize, request);
                Event::Submit { request, attempt }
            }
            Plan::Split { decode, .. } => {
                self.routers[router].send(decode.0 as usize, request);
                Event::Reserve { request, attempt }
            }
        };
        self.later(self.settings.noise.network_ms, event);
    }

    fn sequence(&self, request: u32, stage: Stage) -> Sequence {
        let flight = &self.flights[request as usize];
        let row = &self.trace.requests[request as usize];
        let router = flight.router as usize;
        Sequence::new(
            request,
            router,
            row.class,
            self.routers[router].key(request),
            stage,
            row.prompt + flight.made,
            row.output - flight.made,
            flight.last_ms,
        )
    }

    pub(super) fn reserve(&mut self, request: u32) {
        let Flight {
            router,
            decode,
            prefill,
            attempt,
            ..
        } = self.flights[request as usize];
        let sequence = self.sequence(request, Stage::Whole);
        let worker = &mut self.workers[decode as usize];
        if !worker.alive {
            return;
        }
        worker.commands[router as usize] += 1;
        let blocks = self.trace.blocks(request as usize);
        let most = (sequence.length.saturating_sub(1) / self.trace.block_tokens) as usize;
        let reserved = worker
            .engine
            .reserve(sequence, &blocks[..most.min(blocks.len())]);
        let network_ms = self.settings.noise.network_ms;
        match reserved {
            Some(there) => {
                self.flights[request as usize].there = there;
                self.routers[router as usize].reserved(request);
                self.routers[router as usize].send(prefill as usize, request);
                self.later(2.0 * network_ms, Event::Submit { request, attempt });
            }
            None => self.later(network_ms, Event::Refused { request, attempt }),
        }
        self.report_if_idle(decode as usize);
    }

    pub(super) fn refused(&mut self, request: u32) {
        let flight = self.flights[request as usize];
        self.recorder.refused();
        let router = flight.router as usize;
        self.routers[router].released(request);
        self.routers[router].refused(request, flight.decode as usize);
        self.place_again(request);
    }

    pub(super) fn place_again(&mut self, request: u32) {
        self.flights[request as usize].attempt += 1;
        let router = self.flights[request as usize].router as usize;
        let asked = self.asked(request);
        self.place(router, asked);
    }

    pub(super) fn submit(&mut self, request: u32) {
        let Flight {
            router,
            prefill,
            decode,
            pull,
            attempt,
            ..
        } = self.flights[request as usize];
        let stage = if prefill == decode {
            Stage::Whole
        } else {
            Stage::Prefill
        };
        let sequence = self.sequence(request, stage);
        let worker = &mut self.workers[prefill as usize];
        if !worker.alive {
            return;
        }
        worker.commands[router as usize] += 1;
        match pull {
            Some((source, tokens)) if self.workers[source as usize].alive => {
                self.workers[prefill as usize]
                    .engine
                    .submit_fetching(sequence);
                let (from, to) = (source as usize, prefill as usize);
                let there_ms = self.links.send(from, to, tokens, self.now_ms);
                let at_ms = there_ms + self.links.fixed_ms();
                self.events.at(at_ms, Event::Fetched { request, attempt });
            }
            _ => self.workers[prefill as usize].engine.submit(sequence),
        }
        self.work(prefill as usize);
    }

    pub(super) fn fetched(&mut self, request: u32) {
        let Flight { prefill, pull, .. } = self.flights[request as usize];
        let blocks = self.trace.blocks(request as usize);
        let engine = &mut self.workers[prefill as usize].engine;
        // What it had and what came; the source may have dropped some of it
        // meanwhile, which only time tells.
        let (had, pulled) = (engine.pool().find(blocks), pull.map_or(0, |(_, t)| t));
        let all = had + (pulled / self.trace.block_tokens) as usize;
        engine.fetched(request, &blocks[..all.min(blocks.len())]);
        self.work(prefill as usize);
    }
}
