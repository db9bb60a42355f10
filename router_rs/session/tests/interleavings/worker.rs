//! A worker's part, as PROTOCOLS 1 has it: what it reads, what its engine makes, what it says.

use kvmesh_session::{
    Fence, Stage,
    parse::{Answer, End, FinishReason, Refusal},
};
use kvmesh_wire::v1;

use crate::{WORKERS, sim::Sim};

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Command {
    Place {
        fence: Fence,
        stage: Stage,
        border: u32,
        mesh: bool,
    },
    Cancel {
        fence: Fence,
    },
    HandOver {
        fence: Fence,
        next_attempt: u32,
    },
}

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
        count: u32,
    },
    End {
        fence: Fence,
        stage: Stage,
        end: End,
    },
}

/// A stage that a worker runs.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Job {
    pub(crate) fence: Fence,
    pub(crate) stage: Stage,
    pub(crate) mesh: bool,
    pub(crate) border: u32,
    pub(crate) next: u32,
    /// The attempt to which the stream is being handed over.
    pub(crate) passes_to: Option<u32>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Worker {
    pub(crate) broken: bool,
    pub(crate) session: Session,
    pub(crate) inbox: Vec<Command>,
    pub(crate) outbox: Vec<Frame>,
    pub(crate) job: Option<Job>,
    /// All that it said, where its session may break.
    pub(crate) said: Vec<Frame>,
}

/// A session as it breaks and comes back.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) enum Session {
    #[default]
    Up,
    /// What was on its way is lost.
    Down,
    /// The worker has read the router's hello; its own is on its way, with the
    /// attempt that was named and whether it is known.
    Greeting(Option<(Fence, bool)>),
}

impl Sim {
    /// A worker reads what the router wants to go on with: it drops the rest, and
    /// says again what it said of it.
    pub(crate) fn returns(&mut self, w: usize) {
        let named = self.generation.reattach(WORKERS[w]);
        let worker = &mut self.workers[w];
        let wanted = |job: &mut Job| named.is_some_and(|(fence, _)| fence == job.fence);
        let dropped = worker.job.take_if(|job| !wanted(job));
        let mut known = worker.job.is_some();
        if let Some((fence, next)) = named {
            for frame in &worker.said {
                let again = match frame {
                    Frame::Opening { fence: of, .. } if *of == fence => Some(frame.clone()),
                    Frame::End { fence: of, .. } if *of == fence => {
                        known = true;
                        Some(frame.clone())
                    }
                    Frame::Tokens {
                        fence: of,
                        first,
                        count,
                    } if *of == fence && first + count > next => Some(Frame::Tokens {
                        fence,
                        first: next.max(*first),
                        count: first + count - next.max(*first),
                    }),
                    _ => None,
                };
                known |= matches!(
                    again,
                    Some(Frame::Opening {
                        answer: Answer::Refused(_),
                        ..
                    })
                );
                worker.outbox.extend(again);
            }
            if !known {
                worker.outbox.clear();
            }
        }
        worker.session = Session::Greeting(named.map(|(fence, _)| (fence, known)));
        if let Some(job) = dropped {
            self.aborts(&job);
            // Its engine ends it, and says so.
            self.say_end(w, &job, End::Cancelled);
        }
    }

    /// A worker lets go of a job: whoever gets or sends its KV hears of it.
    pub(crate) fn aborts(&mut self, job: &Job) {
        self.aborted.insert(job.fence.attempt);
        self.aborted.extend(job.passes_to);
    }

    pub(crate) fn worker_reads(&mut self, w: usize, refuse: bool) {
        let worker = &mut self.workers[w];
        match worker.inbox.remove(0) {
            Command::Place {
                fence,
                stage,
                border,
                mesh,
            } => {
                let answer = if refuse {
                    self.faults.spend(|of| &mut of.refusals);
                    Answer::Refused(Refusal::NoRoom)
                } else {
                    worker.job = Some(Job {
                        fence,
                        stage,
                        mesh,
                        border,
                        next: border,
                        passes_to: None,
                    });
                    Answer::Reserved {
                        held: 0,
                        reserved: 1,
                    }
                };
                self.say(
                    w,
                    Frame::Opening {
                        fence,
                        stage,
                        answer,
                    },
                );
            }
            Command::Cancel { fence } => {
                if let Some(job) = worker.job.take_if(|job| job.fence <= fence) {
                    self.aborts(&job);
                    self.say_end(w, &job, End::Cancelled);
                }
            }
            Command::HandOver {
                fence,
                next_attempt,
            } => {
                let stream = worker.job.as_mut().filter(|job| job.fence == fence);
                let before = match stream {
                    Some(job) if job.passes_to == Some(next_attempt) => None,
                    Some(job) => job.passes_to.replace(next_attempt),
                    // It has committed, or ended. In the first case nothing is to abort.
                    None => Some(next_attempt),
                };
                let committed = |attempt: &u32| self.committed.iter().any(|(of, _)| of == attempt);
                let before = before.filter(|attempt| !committed(attempt));
                self.aborted.extend(before);
            }
        }
    }

    pub(crate) fn say_end(&mut self, w: usize, job: &Job, end: End) {
        let (fence, stage) = (job.fence, job.stage);
        self.say(w, Frame::End { fence, stage, end });
    }

    pub(crate) fn say(&mut self, w: usize, frame: Frame) {
        let worker = &mut self.workers[w];
        if self.replays {
            worker.said.push(frame.clone());
        }
        if worker.session != Session::Down {
            worker.outbox.push(frame);
        }
    }

    /// One engine step of a worker.
    pub(crate) fn step(&mut self, w: usize) {
        let Some(mut job) = self.workers[w].job.take() else {
            return;
        };
        let max = self.max_tokens();
        let first = job.next;
        // Decode's first frame repeats what prefill committed.
        let count = match self.committed.iter().find(|(a, _)| *a == job.fence.attempt) {
            Some((_, after)) if job.stage == Stage::Decode && job.mesh && first < *after => {
                after - first
            }
            _ => 1,
        };
        let fence = job.fence;
        self.say(
            w,
            Frame::Tokens {
                fence,
                first,
                count,
            },
        );
        job.next += count;
        if job.stage == Stage::Prefill {
            if job.next >= max && self.emits.contains(&fence.attempt) {
                // The first token ends the request: the transfer is aborted.
                self.aborted.insert(fence.attempt);
                self.say_end(w, &job, finished());
            } else if job.mesh {
                self.committed.insert((fence.attempt, job.next));
                self.say_end(w, &job, End::HandedOff { engine: None });
            } else {
                let engine = Some(v1::EngineHandOff::default());
                self.say_end(w, &job, End::HandedOff { engine });
            }
        } else if job.next >= max {
            self.aborts(&job);
            self.say_end(w, &job, finished());
        } else {
            self.workers[w].job = Some(job);
        }
    }

    pub(crate) fn max_tokens(&self) -> u32 {
        self.generation.max_tokens()
    }
}

fn finished() -> End {
    End::Finished {
        reason: FinishReason::Length,
        stop_token: None,
    }
}
