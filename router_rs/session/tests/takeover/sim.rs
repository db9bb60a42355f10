//! One generation, two routers, two workers and what may happen to them.

use kvmesh_session::{
    TransferId, WorkerIndex,
    generation::{Event, Loss, Outcome, Plan, Timer},
    takeover,
};

use crate::{
    NEW, OLD,
    router::{Router, Sends},
    worker::{self, Command, Held, Transfers, Worker},
};

/// What may happen how often, and how long the output is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct World {
    pub(crate) tokens: u32,
    pub(crate) plans: u8,
    pub(crate) faults: u8,
    /// Claims of a third router, which comes between those of the new one.
    pub(crate) rivals: u8,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Sim {
    pub(crate) routers: [Router; 2],
    /// The old router's process.
    pub(crate) lives: bool,
    pub(crate) workers: [Worker; 2],
    pub(crate) transfers: Transfers,
    /// The client has gone to the new router.
    pub(crate) moved: bool,
    pub(crate) plans: u8,
    pub(crate) faults: u8,
    pub(crate) rivals: u8,
    pub(crate) tokens: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Move {
    Plan(usize, u8),
    ToWorker {
        worker: usize,
        router: usize,
        refuse: bool,
    },
    ToRouter {
        worker: usize,
        router: usize,
    },
    /// The engine of a worker makes a step for one of its parts.
    Step(usize, usize),
    FailTransfer(usize, usize),
    /// The client asks the new router.
    Resume,
    KillRouter,
    KillWorker(usize),
    /// A third router claims it at a worker while the new one does, and is gone.
    Rival(usize),
    /// A session ends for good; the worker keeps what its router has there for a while.
    Break {
        worker: usize,
        router: usize,
    },
    /// That while is over.
    Expire(usize),
    Fire(usize, Timer),
    /// The new router waits no longer for answers.
    NoAnswer,
    /// It waits no longer for somebody who wants what it claimed in vain.
    LetGo,
}

impl Move {
    pub(crate) fn is_rare(&self) -> bool {
        !matches!(
            self,
            Self::Plan(..)
                | Self::ToWorker { refuse: false, .. }
                | Self::ToRouter { .. }
                | Self::Step(..)
        )
    }
}

impl Sim {
    pub(crate) fn new(world: &World) -> Self {
        let mut sim = Self {
            routers: Default::default(),
            lives: true,
            workers: Default::default(),
            transfers: Transfers::default(),
            moved: false,
            plans: world.plans,
            faults: world.faults,
            rivals: world.rivals,
            tokens: world.tokens,
        };
        let sends = sim.routers[OLD].starts(world.tokens);
        sim.send(OLD, sends);
        sim
    }

    pub(crate) fn runs(&self, router: usize) -> bool {
        router == NEW || self.lives
    }

    pub(crate) fn moves(&self) -> Vec<Move> {
        let mut moves = Vec::new();
        for router in [OLD, NEW] {
            if self.runs(router) && self.routers[router].planning {
                moves.extend((0..3).map(|plan| Move::Plan(router, plan)));
            }
        }
        for (w, worker) in self.workers.iter().enumerate() {
            for router in [OLD, NEW] {
                let session = &worker.sessions[router];
                if let Some(command) = session.inbox.first() {
                    let places = matches!(command, Command::Place { .. });
                    moves.push(Move::ToWorker {
                        worker: w,
                        router,
                        refuse: false,
                    });
                    if places && self.faults > 0 {
                        moves.push(Move::ToWorker {
                            worker: w,
                            router,
                            refuse: true,
                        });
                    }
                }
                if !session.outbox.is_empty() && self.runs(router) {
                    moves.push(Move::ToRouter { worker: w, router });
                }
                if session.up && self.faults > 0 && self.runs(router) {
                    moves.push(Move::Break { worker: w, router });
                }
            }
            for (part, held) in worker.running() {
                if held.can_step(&self.transfers) {
                    moves.push(Move::Step(w, part));
                }
                if held.waits_in_vain(&self.transfers) {
                    moves.push(Move::FailTransfer(w, part));
                }
            }
            if worker.lives && self.faults > 0 {
                moves.push(Move::KillWorker(w));
            }
            if worker.lives && self.rivals > 0 && self.routers[NEW].waits {
                moves.push(Move::Rival(w));
            }
        }
        if !self.moved {
            moves.push(Move::Resume);
        }
        if self.lives && self.faults > 0 {
            moves.push(Move::KillRouter);
        }
        // Time passes only where someone has a reason to wait: a bound that ends is a fault
        // of its own, except where all else is still.
        if self.faults > 0 || moves.is_empty() {
            for router in [OLD, NEW] {
                let timers = self.routers[router].timers.iter();
                moves.extend(
                    timers
                        .filter(|_| self.runs(router))
                        .map(|t| Move::Fire(router, *t)),
                );
            }
            if self.routers[NEW].waits {
                moves.push(Move::NoAnswer);
            }
            if !self.routers[NEW].leaves.is_empty() {
                moves.push(Move::LetGo);
            }
            let orphaned = (0..2).filter(|w| self.workers[*w].orphaned());
            moves.extend(orphaned.map(Move::Expire));
            // An offer that does not come is not waited for for ever.
            for (w, worker) in self.workers.iter().enumerate() {
                let waits = |(_, held): &(usize, &Held)| !held.can_step(&self.transfers);
                let waits = worker.running().filter(waits);
                moves.extend(waits.map(|(part, _)| Move::FailTransfer(w, part)));
            }
        }
        moves
    }

    pub(crate) fn make(&mut self, made: Move) {
        let most = self.tokens;
        let still = self.faults == 0;
        let spend = |of: &mut u8| *of = of.saturating_sub(1);
        match made {
            Move::Plan(router, plan) => self.plan(router, plan),
            Move::ToWorker {
                worker,
                router,
                refuse,
            } => {
                if refuse {
                    spend(&mut self.faults);
                }
                self.workers[worker].reads(router, refuse, &mut self.transfers);
            }
            Move::ToRouter { worker, router } => {
                let frame = self.workers[worker].sessions[router].outbox.remove(0);
                let sends = self.routers[router].reads(worker, frame, most);
                self.send(router, sends);
            }
            Move::Step(w, part) => {
                self.workers[w].steps(part, most as usize, &mut self.transfers);
            }
            Move::FailTransfer(w, part) => {
                let held = self.workers[w].part(part);
                if !still && !held.waits_in_vain(&self.transfers) {
                    spend(&mut self.faults);
                }
                self.workers[w].fails(part, &mut self.transfers);
            }
            Move::Resume => {
                self.moved = true;
                let had = self.routers[OLD].output.clone();
                let up = |w: &usize| self.workers[*w].sessions[NEW].up;
                let workers: Vec<_> = (0..2).filter(up).collect();
                let sends = self.routers[NEW].resumes(&had, workers.into_iter());
                self.send(NEW, sends);
            }
            Move::KillRouter => {
                spend(&mut self.faults);
                self.lives = false;
                let old = &mut self.routers[OLD];
                // Its client keeps what it has.
                *old = Router {
                    output: std::mem::take(&mut old.output),
                    ..Router::default()
                };
                for worker in &mut self.workers {
                    worker.sessions[OLD] = down();
                }
            }
            Move::KillWorker(w) => {
                spend(&mut self.faults);
                self.workers[w].dies(&mut self.transfers);
                for router in [OLD, NEW] {
                    if std::mem::replace(&mut self.workers[w].sessions[router], down()).up {
                        self.lose(router, w, Loss::Died);
                    }
                }
            }
            Move::Rival(w) => {
                spend(&mut self.rivals);
                self.workers[w].is_claimed_by_rival();
            }
            Move::Break { worker, router } => {
                spend(&mut self.faults);
                self.workers[worker].sessions[router] = down();
                self.lose(router, worker, Loss::Broken);
            }
            Move::Expire(w) => {
                spend(&mut self.faults);
                self.workers[w].expires(&mut self.transfers);
            }
            Move::Fire(router, timer) => {
                spend(&mut self.faults);
                let sends = self.routers[router].fires(timer);
                self.send(router, sends);
            }
            Move::NoAnswer => {
                spend(&mut self.faults);
                self.routers[NEW].waits = false;
                let sends = self.routers[NEW].takeover(takeover::Event::Fired, most);
                self.send(NEW, sends);
            }
            Move::LetGo => {
                spend(&mut self.faults);
                let sends = self.routers[NEW].lets_go();
                self.send(NEW, sends);
            }
        }
    }

    pub(crate) fn plan(&mut self, router: usize, plan: u8) {
        if self.plans == 0 {
            let sends = self.routers[router].apply(Event::NoPlan);
            return self.send(router, sends);
        }
        self.plans -= 1;
        let [first, second] = [WorkerIndex(0), WorkerIndex(1)];
        let plan = match plan {
            0 => Plan::Whole { on: first },
            1 => Plan::Whole { on: second },
            _ => Plan::Mesh {
                prefill: first,
                decode: second,
                transfer: TransferId([9; 16]),
            },
        };
        let sends = self.routers[router].apply(Event::Planned(plan));
        self.send(router, sends);
    }

    pub(crate) fn lose(&mut self, router: usize, worker: usize, loss: Loss) {
        if self.runs(router) {
            let sends = self.routers[router].loses(worker, loss, self.tokens);
            self.send(router, sends);
        }
    }

    pub(crate) fn send(&mut self, router: usize, sends: Sends) {
        for (w, command) in sends {
            let session = &mut self.workers[w].sessions[router];
            if session.up {
                session.inbox.push(command);
            } else if !matches!(command, Command::Cancel { .. }) {
                // The driver finds the session closed; it tells the machines.
                self.lose(router, w, Loss::Broken);
            }
        }
    }

    pub(crate) fn wrong(&self) -> Option<&'static str> {
        self.routers.iter().find_map(|router| router.wrong)
    }

    /// What has to hold when nothing more can happen.
    pub(crate) fn settled(&self) -> Result<(), &'static str> {
        for router in [OLD, NEW].into_iter().filter(|router| self.runs(*router)) {
            if let Some(left) = self.routers[router].left() {
                return Err(left);
            }
        }
        if self.workers.iter().any(|w| w.running().next().is_some()) {
            return Err("a worker still runs it");
        }
        Ok(())
    }

    /// Goes the rest of the way from wherever it is, without new trouble.
    pub(crate) fn rests(&mut self) -> Result<(), &'static str> {
        (self.faults, self.rivals) = (0, 0);
        for _ in 0..1_000 {
            let Some(next) = self.moves().into_iter().next() else {
                break;
            };
            self.make(next);
            if let Some(wrong) = self.wrong() {
                return Err(wrong);
            }
        }
        self.settled()
    }

    pub(crate) fn resumed(&self) -> bool {
        let new = &self.routers[NEW];
        let finished = matches!(new.outcome, Some(Outcome::Finished { .. }));
        finished && new.output.len() == self.tokens as usize
    }
}

fn down() -> worker::Session {
    worker::Session {
        up: false,
        inbox: Vec::new(),
        outbox: Vec::new(),
    }
}
