//! One placement of a generation: who takes part, and how far each is.
//!
//! ```text
//!            placed          Reserved           end
//!  Unsent ──────────▶ Placed ────────▶ Reserved ───▶ Ended
//!                       │ Refused, no answer   │ session lost
//!                       └──────────▶ Ended     └──▶ Gone
//! ```
//!
//! Mesh: decode is placed first, prefill when decode has reserved. Engine:
//! prefill is placed first, decode when prefill has handed off.

use kvmesh_wire::v1;

use super::{
    Action, Actions, Loss, Plan, PlannedHandOff, Timer, TransferState,
    part::{At, Part},
};
use crate::{Fence, Stage, TransferId, Violation, WorkerIndex, parse::End};

/// How an attempt runs.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Route {
    /// On one worker.
    Whole,
    /// On the worker that it was found on, whatever it was part of there.
    Claimed,
    /// On two, KV by a mesh transfer.
    Mesh(TransferId),
    /// On two, KV by the engine's own connector.
    Engine {
        /// Whether prefill's tokens count.
        prefill_emits: bool,
        /// What prefill said at its end.
        payload: Option<v1::EngineHandOff>,
    },
}

/// Which of the (at most two) parts of an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Side {
    Prefill,
    /// Also the only one of a whole attempt.
    Decode,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Attempt {
    border: u32,
    route: Route,
    prefill: Option<Part>,
    decode: Part,
    /// Its worker was asked to hand the stream over, so that it may end so.
    may_hand_off: bool,
}

/// A prefill whose hand-off nobody is to take, should it come to one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Unclaimed {
    pub(super) prefill: WorkerIndex,
    /// The worker that was to take it.
    pub(super) decode: WorkerIndex,
}

impl Attempt {
    pub(super) fn new(plan: Plan, border: u32) -> Self {
        let part = |worker, stage| Part::new(worker, stage, border);
        // One worker has nothing to hand to itself.
        let plan = match plan {
            Plan::Mesh {
                prefill, decode, ..
            }
            | Plan::Engine {
                prefill, decode, ..
            } if prefill == decode => Plan::Whole { on: decode },
            other => other,
        };
        let (route, prefill, decode) = match plan {
            Plan::Whole { on } => (Route::Whole, None, part(on, Stage::Whole)),
            Plan::Mesh {
                prefill,
                decode,
                transfer,
            } => {
                let decode = part(decode, Stage::Decode);
                (
                    Route::Mesh(transfer),
                    Some(part(prefill, Stage::Prefill)),
                    decode,
                )
            }
            Plan::Engine {
                prefill,
                decode,
                prefill_emits,
            } => {
                let route = Route::Engine {
                    prefill_emits,
                    payload: None,
                };
                (
                    route,
                    Some(part(prefill, Stage::Prefill)),
                    part(decode, Stage::Decode),
                )
            }
        };
        Self {
            border,
            route,
            prefill,
            decode,
            may_hand_off: false,
        }
    }

    /// One that another router placed.
    pub(super) fn claimed(worker: WorkerIndex, stage: Stage, border: u32) -> Self {
        Self {
            border,
            route: Route::Claimed,
            prefill: None,
            decode: Part::placed(worker, stage, border),
            may_hand_off: false,
        }
    }

    /// One whose stream came from another worker, which stands here as the sender.
    pub(super) fn moved(
        border: u32,
        transfer: TransferId,
        (from, at): (WorkerIndex, At),
        receiver: Part,
    ) -> Self {
        let source = Part {
            at,
            ..Part::new(from, Stage::Prefill, border)
        };
        Self {
            border,
            route: Route::Mesh(transfer),
            prefill: Some(source),
            decode: receiver,
            may_hand_off: false,
        }
    }

    /// The worker that decodes, or will.
    pub(super) fn decodes_on(&self) -> WorkerIndex {
        self.decode.worker
    }

    /// Whether the stream runs on this worker, and nothing of prefill is to come.
    pub(super) fn streams_on(&self, worker: WorkerIndex) -> bool {
        let over = |prefill: &Part| matches!(prefill.at, At::Ended | At::Gone);
        self.decode.worker == worker
            && self.decode.at == At::Reserved
            && self.decodes()
            && self.prefill.as_ref().is_none_or(over)
    }

    /// The stream's worker may end with a hand-off from now on.
    pub(super) fn may_hand_off(&mut self) {
        self.may_hand_off = true;
    }

    /// The part that is placed first.
    pub(super) fn first_side(&self) -> Side {
        match self.route {
            Route::Whole | Route::Claimed | Route::Mesh(_) => Side::Decode,
            Route::Engine { .. } => Side::Prefill,
        }
    }

    /// The part to be placed once `side` has reserved.
    pub(super) fn after_reserved(&self, side: Side) -> Option<Side> {
        let next = matches!(self.route, Route::Mesh(_)) && side == Side::Decode;
        next.then_some(Side::Prefill)
    }

    /// The part to be placed once prefill has handed off.
    pub(super) fn after_handed_off(&mut self, engine: Option<v1::EngineHandOff>) -> Option<Side> {
        match &mut self.route {
            Route::Engine { payload, .. } => {
                *payload = engine;
                Some(Side::Decode)
            }
            Route::Whole | Route::Claimed | Route::Mesh(_) => None,
        }
    }

    pub(super) fn place(&mut self, side: Side, fence: Fence, border: u32, actions: &mut Actions) {
        let hand_off = match (&self.route, &self.prefill) {
            (Route::Mesh(transfer), Some(prefill)) => PlannedHandOff::Mesh {
                transfer: *transfer,
                sender: prefill.worker,
            },
            (
                Route::Engine {
                    payload: Some(payload),
                    ..
                },
                _,
            ) => PlannedHandOff::Engine(payload.clone()),
            _ => PlannedHandOff::None,
        };
        let part = self.part_mut(side);
        part.at = At::Placed;
        part.border = border;
        part.seen = border;
        part.again = false;
        let Part {
            worker: to, stage, ..
        } = *part;
        actions.push(Action::Place {
            to,
            fence,
            stage,
            hand_off,
        });
        actions.push(Action::Arm(Timer::Answer {
            attempt: fence.attempt,
            stage,
        }));
    }

    /// The part that a frame speaks of.
    pub(super) fn expect(
        &self,
        from: WorkerIndex,
        fence: Fence,
        stage: Stage,
    ) -> Result<Side, Violation> {
        let side = self.side_of(from).ok_or(Violation::UnknownAttempt(fence))?;
        if self.part(side).stage == stage {
            Ok(side)
        } else {
            Err(Violation::OutOfTurn {
                what: "a frame",
                state: "another stage",
            })
        }
    }

    /// Whether an end is one that this part can have.
    pub(super) fn check_end(&self, side: Side, end: &End) -> Result<(), Violation> {
        let wrong = |what| {
            Err(Violation::OutOfTurn {
                what,
                state: "not one to end so",
            })
        };
        match (end, side, &self.route) {
            // Of what it was asked for before this router knows nothing.
            (_, _, Route::Claimed) => Ok(()),
            (End::HandedOff { .. }, Side::Decode, _) if self.may_hand_off => Ok(()),
            (End::HandedOff { .. }, Side::Decode, _) => wrong("a hand-off"),
            (End::HandedOff { engine: None }, _, Route::Engine { .. }) => {
                wrong("a hand-off without its payload")
            }
            (End::TransferFailed, Side::Decode, Route::Whole) => wrong("a failed transfer"),
            _ => Ok(()),
        }
    }

    pub(super) fn side_of(&self, worker: WorkerIndex) -> Option<Side> {
        if self.decode.worker == worker {
            return Some(Side::Decode);
        }
        let prefill = self.prefill.as_ref()?;
        (prefill.worker == worker).then_some(Side::Prefill)
    }

    pub(super) fn side_mut(&mut self, worker: WorkerIndex) -> Option<(Side, &mut Part)> {
        let side = self.side_of(worker)?;
        Some((side, self.part_mut(side)))
    }

    fn part(&self, side: Side) -> &Part {
        match (side, &self.prefill) {
            (Side::Prefill, Some(prefill)) => prefill,
            _ => &self.decode,
        }
    }

    pub(super) fn part_mut(&mut self, side: Side) -> &mut Part {
        match (side, &mut self.prefill) {
            (Side::Prefill, Some(prefill)) => prefill,
            _ => &mut self.decode,
        }
    }

    /// Whether tokens of this worker are part of the output.
    pub(super) fn emits(&self, worker: WorkerIndex) -> bool {
        !matches!(
            self.route,
            Route::Engine {
                prefill_emits: false,
                ..
            }
        ) || self.decode.worker == worker
    }

    /// First index wanted of a worker whose part is open.
    pub(super) fn open_from(&self, worker: WorkerIndex) -> Option<u32> {
        let part = self.part(self.side_of(worker)?);
        matches!(part.at, At::Placed | At::Reserved).then_some(part.seen)
    }

    /// Whether a worker's steps may have held this part: a decode part that
    /// waits for its KV is in none.
    pub(super) fn computed_on(&self, side: Side) -> bool {
        let handed_off = |prefill: &Part| prefill.at == At::Ended;
        side == Side::Prefill
            || !matches!(self.route, Route::Mesh(_))
            || self.decodes()
            || self.prefill.as_ref().is_some_and(handed_off)
    }

    /// Whether decode has brought a token, and so holds the attempt.
    pub(super) fn decodes(&self) -> bool {
        self.decode.seen > self.border
    }

    /// The state of its mesh transfer, while it has one that is not over.
    pub(super) fn transfer(&self) -> Option<TransferState> {
        let (Route::Mesh(_), Some(prefill)) = (&self.route, &self.prefill) else {
            return None;
        };
        if self.decodes() {
            return None;
        }
        match (self.decode.at, prefill.at) {
            (At::Unsent | At::Placed, _) => Some(TransferState::Placed),
            (At::Reserved, At::Unsent | At::Placed) => Some(TransferState::Reserved),
            // Where prefill's session is gone decode knows more than we do.
            (At::Reserved, At::Reserved | At::Gone) => Some(TransferState::Flowing),
            (At::Reserved, At::Ended) => Some(TransferState::Committed),
            (At::Ended | At::Gone, _) => None,
        }
    }

    /// Whether the attempt can go on after a running part's session ended. Only
    /// a mesh prefill can be spared: by a broken session alone, where decode
    /// will tell whether the KV came, or by any once decode has brought a token.
    pub(super) fn goes_on_without(&self, side: Side, loss: Loss) -> bool {
        side == Side::Prefill
            && matches!(self.route, Route::Mesh(_))
            && (loss == Loss::Broken || self.decodes())
    }

    /// The worker of a part whose session broke while it ran.
    pub(super) fn gone(&self) -> Option<WorkerIndex> {
        let prefill = self.prefill.as_ref()?;
        (prefill.at == At::Gone).then_some(prefill.worker)
    }

    /// The part of a stage that still owes its answer.
    pub(super) fn unanswered(&mut self, stage: Stage) -> Option<(WorkerIndex, &mut Part)> {
        let mut parts = self.prefill.iter_mut().chain([&mut self.decode]);
        let part = parts.find(|part| part.stage == stage && part.at == At::Placed)?;
        Some((part.worker, part))
    }

    /// What is left where it is closed now: an engine holds the blocks of its hand-off
    /// until they are taken, and prefill may end with one before it hears of the cancel.
    pub(super) fn unclaimed(&self) -> Option<Unclaimed> {
        let prefill = self.prefill.as_ref()?;
        let may_hand_off = matches!(self.route, Route::Engine { .. }) && prefill.is_open();
        may_hand_off.then_some(Unclaimed {
            prefill: prefill.worker,
            decode: self.decode.worker,
        })
    }

    /// Cancels what is open.
    pub(super) fn close(self, fence: Fence, actions: &mut Actions) {
        if self.gone().is_some() {
            actions.push(Action::Disarm(Timer::Orphaned {
                attempt: fence.attempt,
            }));
        }
        for part in self.prefill.into_iter().chain([self.decode]) {
            if part.at == At::Placed {
                let timer = Timer::Answer {
                    attempt: fence.attempt,
                    stage: part.stage,
                };
                actions.push(Action::Disarm(timer));
            }
            if matches!(part.at, At::Placed | At::Reserved) {
                actions.push(Action::Cancel {
                    to: part.worker,
                    fence,
                });
            }
        }
    }
}
