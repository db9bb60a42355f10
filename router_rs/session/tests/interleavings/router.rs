//! The router's part: the machine that serves, and what it asks for.

use kvmesh_session::{
    Fence, Stage, Taken, TransferId, Violation, WorkerIndex,
    generation::{Action, Actions, Event, Loss, Plan, PlannedHandOff},
    parse::Answer,
};

use crate::{
    WORKERS,
    sim::Sim,
    worker::{Command, Frame, Session},
};

impl Sim {
    pub(crate) fn greeted(&mut self, w: usize) {
        let worker = WORKERS[w];
        match std::mem::take(&mut self.workers[w].session) {
            Session::Greeting(Some((fence, true))) => {
                self.apply(Event::Reattached { worker, fence });
            }
            // It is another attempt's worker by now, or none's.
            Session::Greeting(Some((fence, false)))
                if self
                    .generation
                    .reattach(worker)
                    .is_some_and(|(of, _)| of == fence) =>
            {
                self.apply(Event::SessionLost {
                    worker,
                    loss: Loss::Broken,
                });
            }
            _ => {}
        }
    }

    pub(crate) fn plan(&mut self, n: u8) {
        self.planning = false;
        if self.plans == 0 {
            return self.apply(Event::NoPlan);
        }
        self.plans -= 1;
        self.booked = true;
        let on = WORKERS[usize::from(n % 2)];
        let prefill = WORKERS[usize::from(1 - n % 2)];
        let prefill_emits = self.plans.is_multiple_of(2);
        let plan = match n / 2 {
            0 => Plan::Whole { on },
            1 => Plan::Mesh {
                prefill,
                decode: on,
                transfer: TransferId([n; 16]),
            },
            _ => Plan::Engine {
                prefill,
                decode: on,
                prefill_emits,
            },
        };
        if n / 2 == 1 || prefill_emits {
            self.emits.insert(self.generation.next_attempt());
        }
        self.apply(Event::Planned(plan));
    }

    pub(crate) fn router_reads(&mut self, w: usize) {
        let from = WORKERS[w];
        match self.workers[w].outbox.remove(0) {
            Frame::Opening {
                fence,
                stage,
                answer,
            } => {
                if matches!(answer, Answer::Refused(_)) {
                    self.over.insert((from.0, fence.attempt));
                }
                self.apply(Event::Opening {
                    from,
                    fence,
                    stage,
                    answer,
                });
            }
            Frame::End { fence, stage, end } => {
                self.over.insert((from.0, fence.attempt));
                self.apply(Event::StageEnd {
                    from,
                    fence,
                    stage,
                    end,
                });
            }
            Frame::Tokens {
                fence,
                first,
                count,
            } => {
                let before = self.generation.fence();
                let taken = self.generation.tokens(from, fence, first, count);
                if self.generation.fence() != before {
                    self.moves_on();
                }
                self.took(taken, first, count);
            }
        }
    }

    /// The target's booking is the attempt's.
    fn moves_on(&mut self) {
        if !std::mem::take(&mut self.target) || !self.booked {
            self.wrong = Some("a stream that moved to where nothing is booked");
        }
        self.moved = true;
    }

    fn took(&mut self, taken: Result<Taken, Violation>, first: u32, count: u32) {
        match taken {
            Ok(Taken::New { skip }) => {
                if self.ends > 0 {
                    self.wrong = Some("a token after the end");
                }
                if first + skip != self.delivered || skip >= count {
                    self.wrong = Some("a hole or a repetition");
                }
                self.delivered = first + count;
            }
            Ok(Taken::Nothing | Taken::Stale) => {}
            Err(_) => self.wrong = Some("a violation that is none"),
        }
    }

    pub(crate) fn apply(&mut self, event: Event) {
        match self.generation.apply(event) {
            Ok(actions) => self.perform(actions),
            Err(_) => self.wrong = Some("a violation that is none"),
        }
    }

    pub(crate) fn perform(&mut self, actions: Actions) {
        for action in actions {
            // A worker that comes back with what was left is told so at any time.
            // So does a hand-off that nobody takes.
            let late = matches!(action, Action::Cancel { .. } | Action::DropHandOff { .. });
            if self.ends > 0 && !late {
                self.wrong = Some("an action after the end");
            }
            match action {
                Action::Place {
                    to,
                    fence,
                    stage,
                    hand_off,
                } => {
                    let border = self.generation.next_index();
                    if border != self.delivered {
                        self.wrong = Some("an attempt that does not start from the output");
                    }
                    let mesh = matches!(hand_off, PlannedHandOff::Mesh { .. });
                    self.send(
                        to,
                        fence,
                        Command::Place {
                            fence,
                            stage,
                            border,
                            mesh,
                        },
                    );
                }
                Action::Cancel { to, fence } => self.send(to, fence, Command::Cancel { fence }),
                Action::DropHandOff { on, fence, .. } => self.drop_hand_off(on, fence),
                Action::HandOver {
                    to,
                    fence,
                    next_attempt,
                    ..
                } => self.send(
                    to,
                    fence,
                    Command::HandOver {
                        fence,
                        next_attempt,
                    },
                ),
                Action::Moved { .. } => self.moves_on(),
                Action::ReleaseTarget if self.target => self.target = false,
                Action::ReleaseTarget => self.wrong = Some("a second release of a target"),
                Action::Plan(_) => self.planning = true,
                Action::Release if self.booked => self.booked = false,
                Action::Release => self.wrong = Some("a second release"),
                Action::Arm(timer) => {
                    self.timers.insert(timer);
                }
                Action::Disarm(timer) => {
                    self.timers.remove(&timer);
                }
                Action::End(_) => {
                    self.ends += 1;
                    self.planning = false;
                }
            }
        }
    }

    /// Decode takes it, if its session stands, and gives it up.
    fn drop_hand_off(&mut self, on: WorkerIndex, fence: Fence) {
        if self.ends == 0 || !self.dropped.insert(fence.attempt) {
            self.wrong = Some("a hand-off dropped before the end, or twice");
        }
        let worker = &self.workers[on.0 as usize];
        if !worker.broken && worker.session == Session::Up {
            let border = self.generation.next_index();
            let place = Command::Place {
                fence,
                stage: Stage::Decode,
                border,
                mesh: false,
            };
            self.send(on, fence, place);
            self.send(on, fence, Command::Cancel { fence });
        }
    }

    fn send(&mut self, to: WorkerIndex, fence: Fence, command: Command) {
        if self.over.contains(&(to.0, fence.attempt)) {
            self.wrong = Some("a command to a part that is over");
        }
        let worker = &mut self.workers[to.0 as usize];
        if worker.broken || worker.session != Session::Up {
            // The driver finds the session closed; it tells the machine.
            if matches!(command, Command::Place { .. }) {
                self.apply(Event::SessionLost {
                    worker: to,
                    loss: Loss::Broken,
                });
            }
        } else {
            worker.inbox.push(command);
        }
    }
}
