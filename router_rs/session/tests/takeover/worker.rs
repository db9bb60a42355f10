//! The reference worker: what it keeps of a generation, finds, gives to who claims it, and
//! refuses. Its engine makes a token a step.

use std::collections::BTreeMap;

use kvmesh_session::{
    Fence, GenerationId, Stage,
    parse::{Answer, End, FinishReason, Found, Held as Has, Holds, Left, Refusal, Told},
};
use kvmesh_wire::output_digest;

/// A token says which attempt made it, by the name under which that was placed.
pub(crate) type Token = u32;
/// An attempt as it was placed: what its transfer is called.
pub(crate) type Placed = (u32, u32);

/// What a router says.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Command {
    Place {
        fence: Fence,
        stage: Stage,
        /// KV comes from, or goes to, another worker.
        mesh: bool,
        output: Vec<Token>,
    },
    Cancel {
        fence: Fence,
    },
    Find {
        had: u32,
    },
    Claim {
        owner: u32,
    },
}

/// What a worker says.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Frame {
    Opening {
        fence: Fence,
        stage: Stage,
        answer: Answer,
    },
    Tokens {
        fence: Fence,
        first: u32,
        /// All that its output is with them.
        output: Vec<Token>,
    },
    End {
        fence: Fence,
        stage: Stage,
        end: End,
    },
    Found(Found),
}

/// A router that nobody looks at: what it claims it leaves.
pub(crate) const RIVAL: usize = 2;

/// What it has of the generation.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Held {
    pub(crate) fence: Fence,
    pub(crate) placed: Placed,
    /// The router that has it.
    pub(crate) router: usize,
    pub(crate) stage: Stage,
    pub(crate) mesh: bool,
    pub(crate) output: Vec<Token>,
    opened: bool,
    end: Option<End>,
}

impl Held {
    pub(crate) fn runs(&self) -> bool {
        self.end.is_none()
    }

    /// Whether the engine can make a step for it.
    pub(crate) fn can_step(&self, transfers: &Transfers) -> bool {
        !self.waits() || matches!(transfers.came(self.placed), Some(Some(_)))
    }

    /// Whether the KV that it waits for does not come.
    pub(crate) fn waits_in_vain(&self, transfers: &Transfers) -> bool {
        self.waits() && matches!(transfers.came(self.placed), Some(None))
    }

    fn waits(&self) -> bool {
        self.stage == Stage::Decode && self.mesh
    }
}

/// Transfers between the workers: what was committed, or that they are off.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Transfers(BTreeMap<Placed, Option<Vec<Token>>>);

impl Transfers {
    pub(crate) fn abort(&mut self, of: Placed) {
        self.0.entry(of).or_insert(None);
    }

    /// `None`: neither came.
    pub(crate) fn came(&self, of: Placed) -> Option<&Option<Vec<Token>>> {
        self.0.get(&of)
    }

    fn commit(&mut self, of: Placed, output: Vec<Token>) -> bool {
        self.0.entry(of).or_insert(Some(output)).is_some()
    }
}

/// A session of a worker with a router.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Session {
    pub(crate) up: bool,
    pub(crate) inbox: Vec<Command>,
    pub(crate) outbox: Vec<Frame>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Worker {
    pub(crate) lives: bool,
    /// With the two routers, and with the rival, which is gone already.
    pub(crate) sessions: [Session; 3],
    /// What was placed last: that is what is found and claimed.
    pub(crate) held: Option<Held>,
    /// What was placed before it and runs yet, until its router ends it.
    pub(crate) beside: Vec<Held>,
    /// The highest owner that claimed.
    claimed: u32,
}

impl Default for Worker {
    fn default() -> Self {
        let session = Session {
            up: true,
            inbox: Vec::new(),
            outbox: Vec::new(),
        };
        let down = Session {
            up: false,
            ..session.clone()
        };
        Self {
            lives: true,
            sessions: [session.clone(), session.clone(), down],
            held: None,
            beside: Vec::new(),
            claimed: 0,
        }
    }
}

impl Worker {
    fn say(&mut self, router: usize, frame: Frame) {
        let session = &mut self.sessions[router];
        if session.up {
            session.outbox.push(frame);
        }
    }

    /// The owner in force: lower ones are over.
    pub(crate) fn owner(&self) -> u32 {
        let held = self.held.as_ref().map_or(0, |held| held.fence.owner);
        held.max(self.claimed)
    }

    /// Reads the next command of a router.
    pub(crate) fn reads(&mut self, router: usize, refuse: bool, transfers: &mut Transfers) {
        match self.sessions[router].inbox.remove(0) {
            Command::Place {
                fence,
                stage,
                mesh,
                output,
            } => {
                let placed = (fence.owner, fence.attempt);
                let over = fence.owner < self.owner();
                let answer = match (over, refuse) {
                    (true, _) => Answer::Refused(Refusal::TakenOver),
                    (_, true) => Answer::Refused(Refusal::NoRoom),
                    _ => Answer::Reserved {
                        held: 0,
                        reserved: 64,
                    },
                };
                if over || refuse {
                    transfers.abort(placed);
                } else {
                    let before = self.held.replace(Held {
                        fence,
                        placed,
                        router,
                        stage,
                        mesh,
                        output,
                        opened: true,
                        end: None,
                    });
                    self.beside.extend(before.filter(Held::runs));
                }
                self.say(
                    router,
                    Frame::Opening {
                        fence,
                        stage,
                        answer,
                    },
                );
            }
            Command::Cancel { fence } => {
                let its =
                    |held: &mut Held| held.router == router && held.fence <= fence && held.runs();
                for held in self.take(its) {
                    transfers.abort(held.placed);
                    self.say_end(&held, End::Cancelled);
                }
            }
            Command::Find { had } => {
                let what = self.held.as_ref().map_or(Holds::Nothing, |held| {
                    Holds::This(has(held), told(held, had))
                });
                self.say(router, found(what));
            }
            Command::Claim { owner } => self.claim(router, owner),
        }
    }

    /// A rival claims, under the number that it takes by what there is here.
    pub(crate) fn is_claimed_by_rival(&mut self) {
        self.claim(RIVAL, (self.owner() | 1) + 1);
    }

    fn claim(&mut self, router: usize, owner: u32) {
        if owner <= self.owner() {
            let what = Holds::Refused {
                owner: self.owner(),
            };
            return self.say(router, found(what));
        }
        self.claimed = owner;
        let Some(mut held) = self.held.take() else {
            return;
        };
        if held.runs() {
            self.say_end(&held, End::Returned(Refusal::TakenOver));
        }
        held.router = router;
        held.fence.owner = owner;
        let left = Left {
            output_ids: held.output.clone(),
            resume_state: b"state".as_slice().into(),
        };
        self.say(router, found(Holds::Claimed(has(&held), Box::new(left))));
        if held.opened {
            let answer = Answer::Reserved {
                held: 0,
                reserved: 64,
            };
            let (fence, stage) = (held.fence, held.stage);
            self.say(
                router,
                Frame::Opening {
                    fence,
                    stage,
                    answer,
                },
            );
        }
        if let Some(end) = held.end.clone() {
            self.say_end(&held, end);
        }
        self.held = Some(held);
    }

    fn say_end(&mut self, held: &Held, end: End) {
        let (fence, stage) = (held.fence, held.stage);
        self.say(held.router, Frame::End { fence, stage, end });
    }

    /// What runs: 0 is what was placed last, the others follow.
    pub(crate) fn running(&self) -> impl Iterator<Item = (usize, &Held)> {
        let parts = self.held.iter().map(|held| (0, held));
        let parts = parts.chain((1..).zip(&self.beside));
        parts.filter(|(_, held)| held.runs())
    }

    /// Takes all of its parts that are so, in the order in which they were placed.
    fn take(&mut self, are: impl Fn(&mut Held) -> bool) -> Vec<Held> {
        let mut taken: Vec<Held> = self.beside.extract_if(.., |held| are(held)).collect();
        taken.extend(self.held.take_if(are));
        taken
    }

    /// One step of its engine, for one of its parts.
    pub(crate) fn steps(&mut self, part: usize, most: usize, transfers: &mut Transfers) {
        let mut held = self.part(part);
        let first = held.output.len();
        let came = transfers.came(held.placed).cloned().flatten();
        match came.filter(|_| held.stage == Stage::Decode && held.mesh) {
            // The first frame repeats what was committed.
            Some(came) if came.len() > first => held.output = came,
            _ => held.output.push(10 * held.placed.0 + held.placed.1),
        }
        self.say(
            held.router,
            Frame::Tokens {
                fence: held.fence,
                first: first as u32,
                output: held.output.clone(),
            },
        );
        let end = if held.output.len() >= most {
            transfers.abort(held.placed);
            Some(End::Finished {
                reason: FinishReason::Length,
                stop_token: None,
            })
        } else if held.stage == Stage::Prefill {
            Some(match transfers.commit(held.placed, held.output.clone()) {
                true => End::HandedOff { engine: None },
                false => End::TransferFailed,
            })
        } else {
            None
        };
        self.goes_on(part, held, end);
    }

    /// The KV did not come.
    pub(crate) fn fails(&mut self, part: usize, transfers: &mut Transfers) {
        let held = self.part(part);
        transfers.abort(held.placed);
        self.goes_on(part, held, Some(End::TransferFailed));
    }

    pub(crate) fn part(&self, part: usize) -> Held {
        let held = match part.checked_sub(1) {
            None => self.held.as_ref(),
            Some(beside) => self.beside.get(beside),
        };
        held.unwrap().clone()
    }

    /// A part as it is now, perhaps with its end.
    fn goes_on(&mut self, part: usize, held: Held, end: Option<End>) {
        if let Some(end) = &end {
            self.say_end(&held, end.clone());
        }
        // Where it was handed on another one has it.
        let gone = matches!(end, Some(End::HandedOff { .. }));
        let held = Held { end, ..held };
        match part.checked_sub(1) {
            None => self.held = Some(held).filter(|_| !gone),
            Some(beside) if held.runs() => self.beside[beside] = held,
            Some(beside) => drop(self.beside.remove(beside)),
        }
    }

    /// Whether what could be claimed runs for an owner below the one that claimed.
    pub(crate) fn runs_for_one_that_is_over(&self) -> bool {
        let runs = self.held.as_ref().filter(|held| held.runs());
        runs.is_some_and(|held| held.fence.owner < self.claimed)
    }

    /// Nobody came for what its router left.
    pub(crate) fn orphaned(&self) -> bool {
        let mut parts = self.held.iter().chain(&self.beside);
        parts.any(|held| !self.sessions[held.router].up)
    }

    /// The time of what its routers left is over.
    pub(crate) fn expires(&mut self, transfers: &mut Transfers) {
        let up = self.sessions.clone().map(|session| session.up);
        for held in self.take(|held| !up[held.router]) {
            transfers.abort(held.placed);
        }
        // A claim is remembered for no longer than what it gave.
        if self.held.is_none() {
            self.claimed = 0;
        }
    }

    pub(crate) fn dies(&mut self, transfers: &mut Transfers) {
        self.lives = false;
        for held in self.take(|_| true) {
            transfers.abort(held.placed);
        }
    }
}

fn has(held: &Held) -> Has {
    Has {
        fence: held.fence,
        next_index: held.output.len() as u32,
        stage: held.stage,
    }
}

fn told(held: &Held, had: u32) -> Told {
    let known = held.output.get(..had as usize);
    Told {
        model: String::new(),
        output_digest: known.map_or(0, output_digest),
    }
}

fn found(what: Holds) -> Frame {
    Frame::Found(Found {
        generation: GenerationId([7; 16]),
        what,
    })
}
