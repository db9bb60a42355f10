//! What the workers of this model see, for the worker that serves to be held to.

use std::collections::BTreeMap;

use crate::{
    NEW, OLD,
    histories::{self, Histories, Seen, Step, Watched},
    sim::{Move, Sim, World},
    worker::{Command, Frame, RIVAL, Worker},
};

const ROUTERS: [&str; 2] = ["old", "new"];

impl Watched for Sim {
    type Move = Move;

    fn usual_and_rare(&self) -> [Vec<Move>; 2] {
        // What time does to a worker comes by itself there, and has histories of its own.
        let moves = self.moves().into_iter();
        let moves = moves.filter(|made| !matches!(made, Move::Expire(_)));
        let (rare, usual) = moves.partition(Move::is_rare);
        [usual, rare]
    }

    fn makes(&mut self, made: Move) {
        assert!(self.moves().contains(&made), "{made:?}");
        self.make(made);
        assert_eq!(self.wrong(), None);
    }

    fn watched(&self, made: Move, after: &Self) -> Vec<(usize, Step)> {
        match made {
            Move::ToWorker {
                worker,
                router,
                refuse,
            } => vec![(worker, self.reads(worker, router, refuse, after))],
            Move::Step(w, part) | Move::FailTransfer(w, part) => {
                vec![(w, self.hears_its_engine(w, part, made, after))]
            }
            Move::Rival(w) => self.is_claimed_by_rival(w, after),
            Move::KillRouter => {
                let up = |w: &usize| self.workers[*w].sessions[OLD].up;
                (0..2).filter(up).map(|w| (w, leaves(OLD))).collect()
            }
            Move::Break { worker, router } => vec![(worker, leaves(router))],
            Move::Expire(w) => {
                let asked = self.cancelled(w, after);
                let expire = step(Seen::Expire {});
                vec![(w, Step { asked, ..expire })]
            }
            // A dead one sees nothing, and the rest is the routers' own.
            Move::KillWorker(_)
            | Move::Plan(..)
            | Move::ToRouter { .. }
            | Move::Resume
            | Move::Fire(..)
            | Move::NoAnswer
            | Move::LetGo => Vec::new(),
        }
    }
}

impl Sim {
    fn reads(&self, w: usize, from: usize, refuse: bool, after: &Sim) -> Step {
        let (before, router) = (&self.workers[w], ROUTERS[from].to_owned());
        let mut asked = Vec::new();
        let seen = match before.sessions[from].inbox[0].clone() {
            Command::Place {
                fence,
                stage,
                output,
                ..
            } => {
                let of = histories::name(fence);
                if fence.owner >= before.owner() {
                    asked.push(format!("place {of}"));
                }
                Seen::Place {
                    router,
                    of,
                    stage: histories::stage(stage),
                    output,
                    room: !refuse,
                }
            }
            Command::Cancel { fence } => {
                asked = self.cancelled(w, after);
                let of = histories::name(fence);
                Seen::Cancel { router, of }
            }
            Command::Find { had } => Seen::Find { router, had },
            Command::Claim { owner } => Seen::Claim { router, owner },
        };
        let said = told(before, &after.workers[w]);
        Step { seen, asked, said }
    }

    /// What runs no more, in the order in which it was placed.
    fn cancelled(&self, w: usize, after: &Sim) -> Vec<String> {
        let runs = |placed| {
            let mut running = after.workers[w].running();
            running.any(|(_, held)| held.placed == placed)
        };
        let before = self.workers[w].running().map(|(_, held)| held.placed);
        let mut ended: Vec<_> = before.filter(|placed| !runs(*placed)).collect();
        ended.sort_unstable();
        let cancel = |(owner, attempt)| format!("cancel {owner}.{attempt}");
        ended.into_iter().map(cancel).collect()
    }

    /// What the engine says does not depend on who hears it.
    fn hears_its_engine(&self, w: usize, part: usize, made: Move, after: &Sim) -> Step {
        let mut alone = self.clone();
        let worker = &mut alone.workers[w];
        let held = worker.part(part);
        worker.sessions[held.router].up = true;
        let heard = worker.sessions[held.router].outbox.len();
        alone.make(made);
        let (mut ids, mut end) = (Vec::new(), None);
        for frame in &alone.workers[w].sessions[held.router].outbox[heard..] {
            match frame {
                Frame::Tokens { first, output, .. } => ids.extend(&output[*first as usize..]),
                Frame::End { end: of, .. } => end = Some(histories::end_alone(of)),
                other => panic!("an engine does not say {other:?}"),
            }
        }
        let (owner, attempt) = held.placed;
        let seen = Seen::Engine {
            of: format!("{owner}.{attempt}"),
            first: held.output.len() as u32,
            ids,
            end,
        };
        let said = told(&self.workers[w], &after.workers[w]);
        Step { said, ..step(seen) }
    }

    /// Another router each time comes, claims and is gone. What it is told shows where its
    /// session is one.
    fn is_claimed_by_rival(&self, w: usize, after: &Sim) -> Vec<(usize, Step)> {
        let mut present = self.workers[w].clone();
        present.sessions[RIVAL].up = true;
        present.is_claimed_by_rival();
        let said = present.sessions[RIVAL].outbox.iter();
        // The rival before it would be told that it has it no more.
        let said = said.skip_while(|frame| !matches!(frame, Frame::Found(_)));
        let said: Vec<String> = said.map(words).collect();
        let owner = after.workers[w].owner();
        let router = format!("rival-{owner}");
        let attach = Seen::Attach {
            router: router.clone(),
            wants: None,
        };
        let mut claim = step(Seen::Claim {
            router: router.clone(),
            owner,
        });
        claim.said = told(&self.workers[w], &after.workers[w]);
        if !said.is_empty() {
            claim.said.insert(router.clone(), said);
        }
        let leave = step(Seen::Leave { router });
        vec![(w, step(attach)), (w, claim), (w, leave)]
    }
}

fn step(seen: Seen) -> Step {
    Step {
        seen,
        asked: Vec::new(),
        said: BTreeMap::new(),
    }
}

fn leaves(router: usize) -> Step {
    step(Seen::Leave {
        router: ROUTERS[router].to_owned(),
    })
}

/// What routers are told that are there.
fn told(before: &Worker, after: &Worker) -> BTreeMap<String, Vec<String>> {
    let mut said = BTreeMap::new();
    for (router, of) in ROUTERS.into_iter().enumerate() {
        let heard = before.sessions[router].outbox.len();
        let frames = &after.sessions[router].outbox[heard..];
        if !frames.is_empty() {
            said.insert(of.to_owned(), frames.iter().map(words).collect());
        }
    }
    said
}

fn words(frame: &Frame) -> String {
    match frame {
        Frame::Opening {
            fence,
            stage,
            answer,
        } => histories::opening(*fence, *stage, answer),
        Frame::Tokens {
            fence,
            first,
            output,
        } => histories::tokens(*fence, *first, &output[*first as usize..]),
        Frame::End { fence, stage, end } => histories::end(*fence, *stage, end),
        Frame::Found(found) => histories::found(found),
    }
}

/// What walks seldom come by.
fn choose(histories: &mut Histories, small: World) {
    let to_worker = |worker, router| Move::ToWorker {
        worker,
        router,
        refuse: false,
    };
    let to_router = |worker, router| Move::ToRouter { worker, router };
    let sim = || Sim::new(&World { faults: 2, ..small });
    let refused = Move::ToWorker {
        worker: 1,
        router: OLD,
        refuse: true,
    };
    let ended_before = [
        Move::Plan(OLD, 2),
        to_worker(1, OLD),
        to_router(1, OLD),
        Move::FailTransfer(1, 0),
        to_router(1, OLD),
        Move::Plan(OLD, 1),
        refused,
        Move::Resume,
        to_worker(1, NEW),
    ];
    histories.choose("a refusal leaves what ended before", sim(), &ended_before);
    let beside = [
        Move::Plan(OLD, 2),
        Move::Resume,
        to_worker(1, NEW),
        to_worker(1, OLD),
        to_router(1, OLD),
        to_worker(0, OLD),
        to_worker(0, NEW),
        to_router(0, NEW),
        to_router(1, NEW),
        to_worker(0, NEW),
        to_router(0, NEW),
        Move::Plan(NEW, 1),
        // Claimed, and placed anew before the router knows what it was given.
        to_worker(1, NEW),
        to_worker(1, NEW),
    ];
    histories.choose("a part runs beside another one", sim(), &beside);
    let left = [
        Move::Plan(OLD, 0),
        to_worker(0, OLD),
        Move::Step(0, 0),
        Move::KillRouter,
        Move::Expire(0),
        Move::Resume,
    ];
    histories.choose("nobody comes for it", sim(), &left);
}

#[test]
fn the_histories_are_those_that_the_worker_is_held_to() {
    let mut histories = Histories::of(&ROUTERS);
    let small = World {
        tokens: 2,
        plans: 2,
        faults: 0,
        rivals: 0,
    };
    histories.every("takeover", &Sim::new(&small), 4);
    choose(&mut histories, small);
    histories.walk("takeover", || {
        Sim::new(&World {
            tokens: 3,
            plans: 6,
            faults: 3,
            rivals: 2,
        })
    });
    histories.are_those_of("takeover.json");
}
