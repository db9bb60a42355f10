//! A router's part: the machines that serve, and what they ask for.

use std::collections::{BTreeMap, BTreeSet};

use kvmesh_session::{
    Fence, Generation, Taken, Takeover, WorkerIndex,
    generation::{Action, Actions, Event, Loss, Outcome, PlannedHandOff, Policy, Timer},
    parse::{Found, Holds},
    takeover::{self, Fit, Take},
};
use kvmesh_wire::output_digest;

use crate::worker::{Command, Frame, Token};

/// What a router has to do with the generation.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Router {
    pub(crate) takeover: Option<Takeover>,
    /// A takeover waits for answers.
    pub(crate) waits: bool,
    pub(crate) generation: Option<Generation>,
    pub(crate) planning: bool,
    pub(crate) timers: BTreeSet<Timer>,
    pub(crate) booked: bool,
    /// What its client has.
    pub(crate) output: Vec<Token>,
    /// What the client has that resumes.
    pub(crate) had: Vec<Token>,
    pub(crate) outcome: Option<Outcome>,
    /// Attempts that it claimed in vain: each is cancelled when nobody came for it.
    pub(crate) leaves: Vec<(usize, Fence)>,
    /// Attempts that workers gave to its claims, and that it did not leave or cancel yet.
    pub(crate) given: BTreeMap<usize, Fence>,
    /// It could not be had.
    pub(crate) refused: bool,
    /// The attempt that was found running was gone on with.
    pub(crate) went_on: bool,
    pub(crate) wrong: Option<&'static str>,
}

/// Commands by worker.
pub(crate) type Sends = Vec<(usize, Command)>;

pub(crate) fn policy() -> Policy {
    Policy {
        refusals: 1,
        failures: 3,
        ..Policy::default()
    }
}

impl Router {
    pub(crate) fn starts(&mut self, most: u32) -> Sends {
        let (generation, actions) = Generation::start(1, most, false, policy());
        self.generation = Some(generation);
        let mut sends = Sends::new();
        self.perform(actions, &mut sends);
        sends
    }

    pub(crate) fn resumes(&mut self, had: &[Token], workers: impl Iterator<Item = usize>) -> Sends {
        self.had = had.to_vec();
        let workers = workers.map(|w| WorkerIndex(w as u32));
        let (takeover, actions) = Takeover::start(had.len() as u32, workers);
        self.takeover = Some(takeover);
        let mut sends = Sends::new();
        self.takes(actions, 2, &mut sends);
        sends
    }

    pub(crate) fn takeover(&mut self, event: takeover::Event, most: u32) -> Sends {
        let mut sends = Sends::new();
        if let Some(takeover) = &mut self.takeover {
            let actions = takeover.apply(event);
            self.takes(actions, most, &mut sends);
        }
        sends
    }

    fn takes(&mut self, actions: takeover::Actions, most: u32, sends: &mut Sends) {
        use takeover::Action as Do;
        for action in actions {
            match action {
                Do::Find { to } => {
                    let had = self.had.len() as u32;
                    sends.push((to.0 as usize, Command::Find { had }));
                }
                Do::Claim { to, owner } => sends.push((to.0 as usize, Command::Claim { owner })),
                Do::Cancel { to, fence } => {
                    self.lets_have(to.0 as usize, fence);
                    sends.push((to.0 as usize, Command::Cancel { fence }));
                }
                Do::Leave { to, fence } => {
                    self.lets_have(to.0 as usize, fence);
                    self.leaves.push((to.0 as usize, fence));
                }
                Do::Arm => self.waits = true,
                Do::Disarm => self.waits = false,
                Do::Take(take) => self.goes_on(&take, most, sends),
                Do::End(_) if self.refused || self.generation.is_some() => {
                    self.wrong = Some("a takeover that ends twice");
                }
                Do::End(_) => self.refused = true,
            }
        }
    }

    /// What it was given there up to this is not its own any more.
    fn lets_have(&mut self, w: usize, fence: Fence) {
        self.given.retain(|on, given| *on != w || *given > fence);
    }

    fn goes_on(&mut self, take: &Take, most: u32, sends: &mut Sends) {
        if self.generation.is_some() || self.refused {
            self.wrong = Some("a takeover that ends twice");
        }
        let had = take.left.output_ids.get(..self.had.len());
        if had != Some(&self.had[..]) {
            self.wrong = Some("another output than the client's");
            return;
        }
        self.output.clone_from(&take.left.output_ids);
        self.went_on = take.runs.is_some();
        if let Some((worker, _)) = take.runs {
            self.lets_have(worker.0 as usize, take.fence);
        }
        self.booked = self.went_on;
        let (generation, actions) = Generation::claimed(take, most, false, policy());
        self.generation = Some(generation);
        self.perform(actions, sends);
    }

    /// Whether that is the output of the client that resumes.
    fn fits(&self, found: &Found) -> Fit {
        let fits = match &found.what {
            Holds::This(_, told) => told.output_digest == output_digest(&self.had),
            Holds::Claimed(_, left) => left.output_ids.starts_with(&self.had),
            Holds::Nothing | Holds::Refused { .. } => true,
        };
        match fits {
            true => Fit::Now,
            false => Fit::Never,
        }
    }

    /// Nobody came for what it left.
    pub(crate) fn lets_go(&mut self) -> Sends {
        let left = std::mem::take(&mut self.leaves).into_iter();
        left.map(|(w, fence)| (w, Command::Cancel { fence }))
            .collect()
    }

    pub(crate) fn apply(&mut self, event: Event) -> Sends {
        let mut sends = Sends::new();
        if let Event::Planned(_) | Event::NoPlan = event {
            self.planning = false;
            self.booked = matches!(event, Event::Planned(_));
        }
        if let Some(generation) = &mut self.generation {
            match generation.apply(event) {
                Ok(actions) => self.perform(actions, &mut sends),
                Err(_) => self.wrong = Some("a violation that is none"),
            }
        }
        sends
    }

    pub(crate) fn fires(&mut self, timer: Timer) -> Sends {
        self.timers.remove(&timer);
        self.apply(Event::Fired(timer))
    }

    /// A worker's session is over.
    pub(crate) fn loses(&mut self, w: usize, loss: Loss, most: u32) -> Sends {
        let worker = WorkerIndex(w as u32);
        self.given.remove(&w);
        let mut sends = self.takeover(takeover::Event::SessionLost(worker), most);
        sends.extend(self.apply(Event::SessionLost { worker, loss }));
        sends
    }

    pub(crate) fn reads(&mut self, w: usize, frame: Frame, most: u32) -> Sends {
        let from = WorkerIndex(w as u32);
        // One that has ended is nobody's to leave.
        if let Frame::End { fence, .. } = &frame {
            self.lets_have(w, *fence);
        }
        match frame {
            Frame::Found(found) => {
                match &found.what {
                    Holds::Claimed(held, _) => {
                        self.given.insert(w, held.fence);
                    }
                    // Another router's by now.
                    Holds::Refused { .. } => {
                        self.given.remove(&w);
                    }
                    Holds::Nothing | Holds::This(..) => {}
                }
                let fit = self.fits(&found);
                self.takeover(takeover::Event::Found { from, found, fit }, most)
            }
            Frame::Opening {
                fence,
                stage,
                answer,
            } if self.knows(from, fence) => self.apply(Event::Opening {
                from,
                fence,
                stage,
                answer,
            }),
            Frame::End { fence, stage, end } if self.knows(from, fence) => {
                self.apply(Event::StageEnd {
                    from,
                    fence,
                    stage,
                    end,
                })
            }
            Frame::Tokens {
                fence,
                first,
                output,
            } if self.knows(from, fence) => {
                self.tokens(from, fence, first, &output);
                Sends::new()
            }
            _ => Sends::new(),
        }
    }

    /// What a session holds nothing of reaches no generation: a driver's part.
    fn knows(&self, from: WorkerIndex, fence: Fence) -> bool {
        let generation = self.generation.as_ref();
        generation.is_some_and(|generation| {
            fence <= generation.fence()
                && (fence < generation.fence() || generation.involves(from) || generation.ended())
        })
    }

    fn tokens(&mut self, from: WorkerIndex, fence: Fence, first: u32, output: &[Token]) {
        let Some(generation) = &mut self.generation else {
            return;
        };
        let count = output.len() as u32 - first;
        match generation.tokens(from, fence, first, count) {
            Ok(Taken::New { skip }) => {
                if self.outcome.is_some() {
                    self.wrong = Some("a token after the end");
                }
                let at = (first + skip) as usize;
                if output[..at] != self.output[..] {
                    self.wrong = Some("a token that does not follow what was delivered");
                }
                self.output.extend_from_slice(&output[at..]);
            }
            Ok(Taken::Nothing | Taken::Stale) => {}
            Err(_) => self.wrong = Some("a violation that is none"),
        }
    }

    fn perform(&mut self, actions: Actions, sends: &mut Sends) {
        for action in actions {
            if self.outcome.is_some() && !matches!(action, Action::Cancel { .. }) {
                self.wrong = Some("an action after the end");
            }
            match action {
                Action::Place {
                    to,
                    fence,
                    stage,
                    hand_off,
                } => sends.push((
                    to.0 as usize,
                    Command::Place {
                        fence,
                        stage,
                        mesh: matches!(hand_off, PlannedHandOff::Mesh { .. }),
                        output: self.output.clone(),
                    },
                )),
                Action::Cancel { to, fence } => {
                    sends.push((to.0 as usize, Command::Cancel { fence }));
                }
                Action::Plan(_) => self.planning = true,
                Action::Release if self.booked => self.booked = false,
                Action::Release => self.wrong = Some("a second release"),
                Action::Arm(timer) => {
                    self.timers.insert(timer);
                }
                Action::Disarm(timer) => {
                    self.timers.remove(&timer);
                }
                Action::End(outcome) => {
                    self.planning = false;
                    self.outcome = Some(outcome);
                }
                Action::DropHandOff { .. } => {
                    self.wrong = Some("a hand-off where nothing is handed off");
                }
                Action::HandOver { .. } | Action::Moved { .. } | Action::ReleaseTarget => {
                    self.wrong = Some("a hand-over that nobody asked for");
                }
            }
        }
    }

    /// What is left that should not be, where nothing more happens.
    pub(crate) fn left(&self) -> Option<&'static str> {
        if self.waits {
            return Some("a takeover waits");
        }
        if !self.timers.is_empty() {
            return Some("a timer is left");
        }
        if self.booked {
            return Some("a booking is left");
        }
        if !self.leaves.is_empty() {
            return Some("an attempt is left that nobody ends");
        }
        if !self.given.is_empty() {
            return Some("what was claimed is neither gone on with nor left");
        }
        let ended = self.outcome.is_some() || self.refused;
        let began = self.generation.is_some() || self.takeover.is_some();
        (began && !ended).then_some("a client that hears no end")
    }
}
