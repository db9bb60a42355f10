//! A worker's part in an attempt, and how far it is.

use crate::{Stage, Violation, WorkerIndex, parse::Answer};

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Part {
    pub(super) worker: WorkerIndex,
    pub(super) stage: Stage,
    pub(super) at: At,
    /// Output index at which it was placed.
    pub(super) border: u32,
    /// Next index that this worker will bring.
    pub(super) seen: u32,
    /// It may say once more that it has reserved: its session was broken, and
    /// it cannot know what came through.
    pub(super) again: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum At {
    Unsent,
    Placed,
    Reserved,
    Ended,
    Gone,
}

/// What a part was when its session ended.
pub(super) enum Was {
    Unsent,
    Placed(Stage),
    Reserved,
    Ended,
}

impl Part {
    pub(super) fn new(worker: WorkerIndex, stage: Stage, border: u32) -> Self {
        Self {
            worker,
            stage,
            at: At::Unsent,
            border,
            seen: border,
            again: false,
        }
    }

    /// One that is being placed.
    pub(super) fn placed(worker: WorkerIndex, stage: Stage, border: u32) -> Self {
        Self {
            at: At::Placed,
            ..Self::new(worker, stage, border)
        }
    }

    /// Its worker.
    pub(super) fn worker(&self) -> WorkerIndex {
        self.worker
    }

    /// Next index that it will bring.
    pub(super) fn next(&self) -> u32 {
        self.seen
    }

    /// Whether its worker still has it.
    pub(super) fn is_open(&self) -> bool {
        matches!(self.at, At::Placed | At::Reserved)
    }

    /// Whether it owes the answer to its Place.
    pub(super) fn is_unanswered(&self) -> bool {
        self.at == At::Placed
    }

    /// New tokens that it brought.
    pub(super) fn made(&self) -> u32 {
        self.seen - self.border
    }

    /// Its session is back: what was answered may be answered once more.
    pub(super) fn says_again(&mut self) {
        self.again = self.at == At::Reserved;
    }

    /// Takes an answer; false where it is known.
    pub(super) fn answered(
        &mut self,
        what: &'static str,
        answer: &Answer,
    ) -> Result<bool, Violation> {
        if self.again && self.at == At::Reserved && matches!(answer, Answer::Reserved { .. }) {
            self.again = false;
            return Ok(false);
        }
        if self.at != At::Placed {
            return Err(Violation::OutOfTurn {
                what,
                state: self.name(),
            });
        }
        self.at = match answer {
            Answer::Reserved { .. } => At::Reserved,
            Answer::Refused(_) => At::Ended,
        };
        Ok(true)
    }

    /// Takes tokens; gives the part's next index before and after them.
    pub(super) fn tokens(&mut self, first: u32, count: u32) -> Result<(u32, u32), Violation> {
        if self.at != At::Reserved {
            return Err(Violation::OutOfTurn {
                what: "tokens",
                state: self.name(),
            });
        }
        if first != self.seen {
            return Err(Violation::Hole {
                expected: self.seen,
                got: first,
            });
        }
        self.seen = first.saturating_add(count);
        Ok((first, self.seen))
    }

    /// Takes the stage's end.
    pub(super) fn ended(&mut self) -> Result<(), Violation> {
        if self.at != At::Reserved {
            return Err(Violation::OutOfTurn {
                what: "an end",
                state: self.name(),
            });
        }
        self.at = At::Ended;
        Ok(())
    }

    /// Stops waiting for an answer.
    pub(super) fn give_up(&mut self) {
        self.at = At::Ended;
    }

    /// Takes the end of the part's session.
    pub(super) fn lose(&mut self) -> Was {
        let was = match self.at {
            At::Unsent => Was::Unsent,
            At::Placed => Was::Placed(self.stage),
            At::Reserved => Was::Reserved,
            At::Ended | At::Gone => return Was::Ended,
        };
        self.at = At::Gone;
        was
    }

    /// Whether its session was given up: what still comes from there is stale.
    pub(super) fn is_gone(&self) -> bool {
        self.at == At::Gone
    }

    fn name(&self) -> &'static str {
        match self.at {
            At::Unsent => "not placed",
            At::Placed => "not answered",
            At::Reserved => "running",
            At::Ended => "ended",
            At::Gone => "gone",
        }
    }
}
