//! What the workers of this model see, for the worker that serves to be held to.

use std::collections::BTreeMap;

use kvmesh_session::generation::Loss;

use crate::{
    WORKERS,
    histories::{self, Histories, Seen, Step, Watched},
    sim::{Faults, Move, Sim, World},
    worker::{Command, Frame, Session},
};

const ROUTER: &str = "router";
/// The model counts tokens: each is the one of its index.
const FIRST_ID: u32 = 100;

impl Watched for Sim {
    type Move = Move;

    fn usual_and_rare(&self) -> [Vec<Move>; 2] {
        let usually = |made: &Move| {
            matches!(
                made,
                Move::Plan(_)
                    | Move::ToWorker { refuse: false, .. }
                    | Move::ToRouter(_)
                    | Move::Step(_)
                    | Move::Return(_)
                    | Move::Greeted(_)
            )
        };
        let (usual, rare) = self.moves().into_iter().partition(usually);
        [usual, rare]
    }

    fn makes(&mut self, made: Move) {
        assert!(self.moves().contains(&made), "{made:?}");
        self.make(made);
        assert_eq!(self.wrong, None);
    }

    fn watched(&self, made: Move, after: &Self) -> Vec<(usize, Step)> {
        match made {
            Move::ToWorker { worker, refuse } => vec![(worker, self.reads(worker, refuse, after))],
            Move::Step(w) | Move::FailTransfer(w) | Move::Commit(w) | Move::GiveBack(w) => {
                vec![(w, self.hears_its_engine(w, made, after))]
            }
            Move::Blip(w) => vec![(w, step(Seen::Leave { router: ROUTER.to_owned() }, None))],
            Move::Return(w) => vec![(w, self.is_attached_again(w, after))],
            // Its engine goes on, and nobody is told.
            Move::Keep(_)
            // What dies sees nothing more, and the rest is the router's own.
            | Move::Lose(_, Loss::Died | Loss::Broken)
            | Move::Lose(..)
            | Move::Plan(_)
            | Move::ToRouter(_)
            | Move::HandOver(_)
            | Move::GraceOver(_)
            | Move::Greeted(_)
            | Move::Stop
            | Move::Fire(_) => Vec::new(),
        }
    }
}

impl Sim {
    fn reads(&self, w: usize, refuse: bool, after: &Sim) -> Step {
        let (router, job) = (ROUTER.to_owned(), self.workers[w].job.as_ref());
        let (seen, asked) = match self.workers[w].inbox[0].clone() {
            Command::Place {
                fence,
                stage,
                border,
                ..
            } => {
                let of = histories::name(fence);
                let asked = format!("place {of}");
                let place = Seen::Place {
                    router,
                    of,
                    stage: histories::stage(stage),
                    output: ids(0, border),
                    room: !refuse,
                };
                (place, Some(asked))
            }
            Command::Cancel { fence } => {
                let ended = job.filter(|_| after.workers[w].job.is_none());
                let asked = ended.map(|job| format!("cancel {}", histories::name(job.fence)));
                let of = histories::name(fence);
                (Seen::Cancel { router, of }, asked)
            }
            Command::HandOver {
                fence,
                next_attempt,
            } => {
                let of = histories::name(fence);
                let asked = format!("hand over {of} to {next_attempt}");
                let hand_over = Seen::HandOver {
                    router,
                    of,
                    next_attempt,
                };
                (hand_over, Some(asked))
            }
        };
        self.says(w, seen, asked, after)
    }

    /// What the engine says does not depend on who hears it.
    fn hears_its_engine(&self, w: usize, made: Move, after: &Sim) -> Step {
        let mut alone = self.clone();
        let job = alone.workers[w].job.clone().unwrap();
        alone.workers[w].session = Session::Up;
        alone.workers[w].outbox.clear();
        alone.make(made);
        let (mut made, mut end) = (Vec::new(), None);
        for frame in &alone.workers[w].outbox {
            match frame {
                Frame::Tokens { first, count, .. } => made = ids(*first, *count),
                Frame::End { end: of, .. } => end = Some(histories::end_alone(of)),
                Frame::Opening { .. } => panic!("an engine answers nothing that was not placed"),
            }
        }
        let seen = Seen::Engine {
            of: histories::name(job.fence),
            first: job.next,
            ids: made,
            end,
        };
        self.says(w, seen, None, after)
    }

    fn is_attached_again(&self, w: usize, after: &Sim) -> Step {
        let named = self.generation.reattach(WORKERS[w]);
        let (before, now) = (&self.workers[w].job, &after.workers[w].job);
        let dropped = before.as_ref().filter(|_| now.is_none());
        let asked = dropped.map(|job| format!("cancel {}", histories::name(job.fence)));
        let attach = Seen::Attach {
            router: ROUTER.to_owned(),
            wants: named.map(|(fence, next)| (histories::name(fence), next)),
        };
        let mut step = self.says(w, attach, asked, after);
        if let (Session::Greeting(Some((fence, true))), Some((_, next))) =
            (&after.workers[w].session, named)
        {
            let hello = format!("goes on with {} from {next}", histories::name(*fence));
            step.said
                .entry(ROUTER.to_owned())
                .or_default()
                .insert(0, hello);
        }
        step
    }

    /// With what the router is told, if it is there.
    fn says(&self, w: usize, seen: Seen, asked: Option<String>, after: &Sim) -> Step {
        let mut step = step(seen, asked);
        let frames = &after.workers[w].outbox[self.workers[w].outbox.len()..];
        if !frames.is_empty() {
            step.said
                .insert(ROUTER.to_owned(), frames.iter().map(words).collect());
        }
        step
    }
}

fn step(seen: Seen, asked: Option<String>) -> Step {
    Step {
        seen,
        asked: asked.into_iter().collect(),
        said: BTreeMap::new(),
    }
}

fn ids(first: u32, count: u32) -> Vec<u32> {
    (FIRST_ID + first..).take(count as usize).collect()
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
            count,
        } => histories::tokens(*fence, *first, &ids(*first, *count)),
        Frame::End { fence, stage, end } => histories::end(*fence, *stage, end),
    }
}

#[test]
fn the_histories_are_those_that_the_worker_is_held_to() {
    let mut histories = Histories::of(&[ROUTER]);
    let one_fault = |faults| World {
        max_tokens: 2,
        plans: 1,
        faults,
        hand_overs: 1,
        survive_loss: true,
    };
    let blip = Faults {
        blips: 1,
        ..Faults::NONE
    };
    histories.every("one router", &Sim::new(&one_fault(blip)), 4);
    histories.walk("one router", || {
        Sim::new(&World {
            max_tokens: 3,
            plans: 4,
            faults: Faults {
                refusals: 1,
                failures: 1,
                returns: 1,
                losses: 1,
                blips: 3,
                stops: 1,
                timeouts: 1,
            },
            hand_overs: 2,
            survive_loss: true,
        })
    });
    histories.are_those_of("one_router.json");
}
