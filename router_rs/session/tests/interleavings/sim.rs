//! One generation, two workers and what may happen to them.

use std::collections::BTreeSet;

use kvmesh_session::{
    Generation, Stage, TransferId,
    generation::{Event, Loss, Policy, Stop, Timer},
    parse::{End, Refusal},
};

use crate::{
    WORKERS,
    worker::{Command, Session, Worker},
};

/// What may happen how often, and how long the output is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct World {
    pub(crate) max_tokens: u32,
    pub(crate) plans: u8,
    pub(crate) faults: Faults,
    pub(crate) hand_overs: u8,
    pub(crate) survive_loss: bool,
}

/// What may go wrong, and how often.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Faults {
    pub(crate) refusals: u8,
    pub(crate) failures: u8,
    pub(crate) returns: u8,
    pub(crate) losses: u8,
    pub(crate) blips: u8,
    pub(crate) stops: u8,
    pub(crate) timeouts: u8,
}

impl Faults {
    pub(crate) const NONE: Self = Self {
        refusals: 0,
        failures: 0,
        returns: 0,
        losses: 0,
        blips: 0,
        stops: 0,
        timeouts: 0,
    };

    /// One happens, of which none may be left: what ends a wait that nothing else can end is none.
    pub(crate) fn spend(&mut self, kind: fn(&mut Self) -> &mut u8) {
        let left = kind(self);
        *left = left.saturating_sub(1);
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Sim {
    pub(crate) generation: Generation,
    pub(crate) workers: [Worker; 2],
    pub(crate) planning: bool,
    pub(crate) timers: BTreeSet<Timer>,
    /// Attempts whose KV prefill has committed, and the index after it.
    pub(crate) committed: BTreeSet<(u32, u32)>,
    pub(crate) aborted: BTreeSet<u32>,
    /// Attempts in which prefill's tokens count.
    pub(crate) emits: BTreeSet<u32>,
    /// (worker, attempt) pairs whose part the router knows to be over.
    pub(crate) over: BTreeSet<(u32, u32)>,
    /// Attempts whose hand-off decode was told to drop.
    pub(crate) dropped: BTreeSet<u32>,
    pub(crate) delivered: u32,
    pub(crate) ends: u8,
    pub(crate) booked: bool,
    /// The target of a hand-over is booked.
    pub(crate) target: bool,
    /// A stream went on at the worker that it was handed to.
    pub(crate) moved: bool,
    pub(crate) wrong: Option<&'static str>,
    pub(crate) plans: u8,
    pub(crate) faults: Faults,
    pub(crate) replays: bool,
    pub(crate) hand_overs: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Move {
    Plan(u8),
    ToWorker {
        worker: usize,
        refuse: bool,
    },
    ToRouter(usize),
    Step(usize),
    FailTransfer(usize),
    /// The stream of a worker is to go to the other one.
    HandOver(usize),
    /// The worker that hands over says its last word.
    Commit(usize),
    /// It goes on after all.
    Keep(usize),
    GiveBack(usize),
    Lose(usize, Loss),
    /// The session breaks with all that is on its way.
    Blip(usize),
    /// The router waits no longer for it.
    GraceOver(usize),
    /// The router's hello reaches the worker.
    Return(usize),
    /// The worker's hello reaches the router.
    Greeted(usize),
    Stop,
    Fire(Timer),
}

impl Sim {
    pub(crate) fn new(world: &World) -> Self {
        let policy = Policy {
            refusals: 1,
            failures: 3,
            survive_loss: world.survive_loss,
            ..Policy::default()
        };
        let (generation, actions) = Generation::start(1, world.max_tokens, true, policy);
        let mut sim = Self {
            generation,
            workers: Default::default(),
            planning: false,
            timers: BTreeSet::new(),
            committed: BTreeSet::new(),
            aborted: BTreeSet::new(),
            emits: BTreeSet::new(),
            over: BTreeSet::new(),
            dropped: BTreeSet::new(),
            delivered: 0,
            ends: 0,
            booked: false,
            target: false,
            moved: false,
            wrong: None,
            plans: world.plans,
            faults: world.faults,
            replays: world.faults.blips > 0,
            hand_overs: world.hand_overs,
        };
        sim.perform(actions);
        sim
    }

    pub(crate) fn moves(&self) -> Vec<Move> {
        let mut moves = Vec::new();
        if self.planning {
            moves.extend((0..6).map(Move::Plan));
        }
        for (w, worker) in self.workers.iter().enumerate() {
            if !worker.inbox.is_empty() {
                moves.push(Move::ToWorker {
                    worker: w,
                    refuse: false,
                });
                if self.faults.refusals > 0 && matches!(worker.inbox[0], Command::Place { .. }) {
                    moves.push(Move::ToWorker {
                        worker: w,
                        refuse: true,
                    });
                }
            }
            if !worker.outbox.is_empty() && worker.session == Session::Up {
                moves.push(Move::ToRouter(w));
            }
            if let Some(job) = &worker.job {
                let waits = job.stage == Stage::Decode
                    && job.mesh
                    && !self
                        .committed
                        .iter()
                        .any(|(attempt, _)| *attempt == job.fence.attempt);
                if let Some(to) = job.passes_to {
                    moves.push(Move::Commit(w));
                    if self.faults.failures > 0 || self.aborted.contains(&to) {
                        moves.push(Move::Keep(w));
                    }
                }
                if !waits {
                    moves.push(Move::Step(w));
                    // What came may be wrong.
                    let whole = job.stage == Stage::Decode && job.mesh && job.next == job.border;
                    if whole && self.faults.failures > 0 {
                        moves.push(Move::FailTransfer(w));
                    }
                    if self.faults.returns > 0 && job.stage != Stage::Prefill {
                        moves.push(Move::GiveBack(w));
                    }
                } else if self.aborted.contains(&job.fence.attempt) || self.faults.failures > 0 {
                    moves.push(Move::FailTransfer(w));
                }
            }
            if self.faults.losses > 0 && !worker.broken && worker.session == Session::Up {
                moves.push(Move::Lose(w, Loss::Broken));
                moves.push(Move::Lose(w, Loss::Died));
                moves.push(Move::Lose(w, Loss::Silent));
            }
            match worker.session {
                Session::Up if self.faults.blips > 0 && !worker.broken => moves.push(Move::Blip(w)),
                Session::Up => {}
                Session::Down => moves.push(Move::Return(w)),
                Session::Greeting(_) => moves.push(Move::Greeted(w)),
            }
            if worker.session != Session::Up && self.generation.reattach(WORKERS[w]).is_some() {
                moves.push(Move::GraceOver(w));
            }
        }
        if self.faults.stops > 0 {
            moves.push(Move::Stop);
        }
        if self.hand_overs > 0 {
            let movable = |w: &usize| self.generation.can_move(WORKERS[*w]);
            moves.extend((0..2).filter(movable).map(Move::HandOver));
        }
        if moves.is_empty() {
            // An offer that does not come is not waited for for ever.
            let waiting = self.workers.iter().enumerate();
            let waiting = waiting.filter(|(_, worker)| worker.job.is_some());
            moves.extend(waiting.map(|(w, _)| Move::FailTransfer(w)));
        }
        for timer in &self.timers {
            // Time passes only where someone has a reason to wait: a bound
            // that fires is a fault of its own, except where all else is still.
            if self.faults.timeouts > 0 || moves.is_empty() {
                moves.push(Move::Fire(*timer));
            }
        }
        moves
    }

    pub(crate) fn make(&mut self, made: Move) {
        match made {
            Move::Plan(n) => self.plan(n),
            Move::ToWorker { worker, refuse } => self.worker_reads(worker, refuse),
            Move::ToRouter(worker) => self.router_reads(worker),
            Move::Step(worker) => self.step(worker),
            Move::FailTransfer(worker) => {
                if let Some(job) = self.workers[worker].job.take() {
                    if !self.aborted.contains(&job.fence.attempt) {
                        self.faults.spend(|of| &mut of.failures);
                    }
                    self.aborted.insert(job.fence.attempt);
                    self.say_end(worker, &job, End::TransferFailed);
                }
            }
            Move::HandOver(from) => {
                self.hand_overs -= 1;
                self.target = true;
                self.apply(Event::HandOver {
                    to: WORKERS[1 - from],
                    transfer: TransferId([9; 16]),
                });
            }
            Move::Commit(worker) => {
                if let Some(job) = self.workers[worker].job.take()
                    && let Some(to) = job.passes_to
                {
                    self.committed.insert((to, job.next));
                    self.say_end(worker, &job, End::HandedOff { engine: None });
                }
            }
            Move::Keep(worker) => {
                if let Some(job) = &mut self.workers[worker].job
                    && let Some(to) = job.passes_to.take()
                {
                    if !self.aborted.insert(to) {
                        return;
                    }
                    self.faults.spend(|of| &mut of.failures);
                }
            }
            Move::GiveBack(worker) => {
                self.faults.spend(|of| &mut of.returns);
                if let Some(job) = self.workers[worker].job.take() {
                    self.aborts(&job);
                    self.say_end(worker, &job, End::Returned(Refusal::NoRoom));
                }
            }
            Move::Lose(worker, loss) => {
                self.faults.spend(|of| &mut of.losses);
                let index = WORKERS[worker];
                if loss != Loss::Silent {
                    // The worker ends what a broken session left.
                    if let Some(job) = self.workers[worker].job.take() {
                        self.aborts(&job);
                    }
                    self.workers[worker] = Worker {
                        broken: true,
                        ..Worker::default()
                    };
                }
                self.apply(Event::SessionLost {
                    worker: index,
                    loss,
                });
            }
            Move::Blip(worker) => {
                self.faults.spend(|of| &mut of.blips);
                let worker = &mut self.workers[worker];
                worker.session = Session::Down;
                worker.inbox.clear();
                worker.outbox.clear();
            }
            Move::GraceOver(worker) => self.apply(Event::SessionLost {
                worker: WORKERS[worker],
                loss: Loss::Broken,
            }),
            Move::Return(worker) => self.returns(worker),
            Move::Greeted(worker) => self.greeted(worker),
            Move::Stop => {
                self.faults.spend(|of| &mut of.stops);
                self.apply(Event::Stop(Stop::ClientGone));
            }
            Move::Fire(timer) => {
                self.faults.spend(|of| &mut of.timeouts);
                self.timers.remove(&timer);
                self.apply(Event::Fired(timer));
            }
        }
    }

    /// What has to hold when nothing more can happen.
    pub(crate) fn settled(&self) -> Result<(), &'static str> {
        if self.ends != 1 {
            return Err("not exactly one end");
        }
        if self.booked || self.target {
            return Err("a booking is left");
        }
        if !self.timers.is_empty() {
            return Err("a timer is left");
        }
        if self.workers.iter().any(|worker| worker.job.is_some()) {
            return Err("a worker still runs it");
        }
        Ok(())
    }
}
