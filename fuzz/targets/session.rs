//! What workers say to a router: any frames, in any order, from two workers.
//!
//! A frame closes its session or changes the stream by the rules: no index is
//! given twice or passed over, and what is refused changes nothing.
#![no_main]

use kvmesh_fuzz::messages;
use kvmesh_session::{
    Fence, Generation, Link, Stage, Taken, TransferId, WorkerIndex,
    generation::{Event, Loss, Plan, Policy, Stop},
    link,
    parse::{self, Inbound},
};
use kvmesh_wire::v1;
use libfuzzer_sys::fuzz_target;
use prost::Message;

const TOKENS: u32 = 8;

/// A router's side of one generation and of two sessions.
struct Router {
    generation: Generation,
    links: [Link; 2],
}

impl Router {
    fn new() -> Self {
        let (generation, _) = Generation::start(1, TOKENS, true, Policy::default());
        Self {
            generation,
            links: [Link::new(None), Link::new(None)],
        }
    }

    /// An event of the router's own, which can break no rule.
    fn own(&mut self, event: Event) {
        let before = self.generation.next_index();
        let _ = self.generation.apply(event);
        assert_eq!(self.generation.next_index(), before);
    }

    fn event(&mut self, event: Event) {
        let before = self.generation.clone();
        match self.generation.apply(event) {
            Ok(_) => assert_eq!(self.generation.next_index(), before.next_index()),
            Err(_) => assert_eq!(self.generation, before),
        }
    }

    fn link(&mut self, worker: usize, event: link::Event<'_>) {
        let before = self.links[worker].clone();
        if self.links[worker].apply(event).is_err() {
            assert_eq!(self.links[worker].state(), before.state());
        }
    }

    fn rows(&mut self, from: WorkerIndex, fence: Fence, first: u32, count: u32) {
        let before = self.generation.next_index();
        let taken = self.generation.tokens(from, fence, first, count);
        let after = self.generation.next_index();
        match taken {
            Ok(Taken::New { skip }) => {
                assert!(skip < count && first + skip == before);
                assert_eq!(after, first + count);
                assert!(after <= TOKENS);
            }
            _ => assert_eq!(after, before),
        }
    }

    /// A frame as the driver takes it. Names of attempts that are not there are
    /// turned into those that are where `aim` says so: else few would be met.
    fn frame(&mut self, worker: usize, bytes: &[u8], aim: bool) {
        let Ok(frame) = v1::WorkerFrame::decode(bytes) else {
            return;
        };
        if matches!(frame.frame, Some(v1::worker_frame::Frame::Hello(_))) {
            if let Ok(hello) = parse::hello(frame) {
                self.link(worker, link::Event::Hello(&hello));
            }
            return;
        }
        let from = WorkerIndex(worker as u32);
        let mine = self.generation.fence();
        let aimed = |fence: Fence| if aim { mine } else { fence };
        match parse::worker_frame(frame) {
            Ok(Inbound::Step(step)) => {
                self.link(worker, link::Event::Frame(step.load.as_ref()));
                for opening in step.openings {
                    self.event(Event::Opening {
                        from,
                        fence: aimed(opening.fence),
                        stage: opening.stage,
                        answer: opening.answer,
                    });
                }
                for row in step.rows.iter() {
                    let count = row.ids.len() as u32;
                    self.rows(from, aimed(row.fence), row.first_index, count);
                }
                for end in step.ends {
                    self.event(Event::StageEnd {
                        from,
                        fence: aimed(end.fence),
                        stage: end.stage,
                        end: end.end,
                    });
                }
            }
            Ok(Inbound::Load(load)) => self.link(worker, link::Event::Frame(Some(&load))),
            Ok(Inbound::Cache(_) | Inbound::Unknown) => {
                self.link(worker, link::Event::Frame(None));
            }
            Err(_) => self.link(worker, link::Event::Violated),
        }
    }

    /// What happens beside frames.
    fn beside(&mut self, worker: usize, what: u8) {
        let from = WorkerIndex(worker as u32);
        let other = WorkerIndex(1 - worker as u32);
        let transfer = TransferId([what; 16]);
        match what % 14 {
            0 => self.own(Event::Planned(Plan::Whole { on: from })),
            1 => self.own(Event::Planned(Plan::Mesh {
                prefill: from,
                decode: other,
                transfer,
            })),
            2 => self.own(Event::Planned(Plan::Engine {
                prefill: from,
                decode: other,
                prefill_emits: what & 64 != 0,
            })),
            3 => self.own(Event::NoPlan),
            4 if self.generation.can_move(from) => self.own(Event::HandOver {
                to: other,
                transfer,
            }),
            5 => self.own(Event::SessionLost {
                worker: from,
                loss: Loss::Broken,
            }),
            6 => self.own(Event::SessionLost {
                worker: from,
                loss: Loss::Died,
            }),
            7 => self.own(Event::Stop(Stop::ClientGone)),
            8 => self.link(worker, link::Event::Dial),
            9 => self.link(worker, link::Event::Opened),
            10 => self.link(worker, link::Event::Broken),
            11 => self.link(worker, link::Event::Placed(u64::from(what >> 4))),
            12 => self.link(worker, link::Event::Faulted(u64::from(what >> 4))),
            _ => {
                let attempt = self.generation.fence().attempt;
                let stage = if what & 64 != 0 {
                    Stage::Prefill
                } else {
                    Stage::Decode
                };
                let timer = kvmesh_session::generation::Timer::Answer { attempt, stage };
                self.own(Event::Fired(timer));
            }
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let mut router = Router::new();
    for message in messages(data) {
        let Some((head, bytes)) = message.split_first() else {
            continue;
        };
        let worker = usize::from(head & 1);
        match head & 2 {
            0 => router.frame(worker, bytes, head & 4 == 0),
            _ => router.beside(worker, head >> 2),
        }
    }
});
