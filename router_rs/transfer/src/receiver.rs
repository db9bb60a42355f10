//! The receiver's side of one transfer, as a pure state machine.
//!
//! ```text
//!   reserved ── first announcement ──▶ flowing ── commit ──▶ committed ── all verified ──▶ released
//!      │                                  │                      │
//!      └──── abort, mismatch, lost, silence, cancel ─────────────┘
//!                        ▼
//!                     closing ── no write can come any more ──▶ aborted
//! ```
//!
//! Destination blocks belong to the transfer until `released` or `aborted`:
//! never is the engine told that they are free while a copy into them runs.

use std::collections::BTreeSet;

use crate::{
    id::Reason,
    sender::{Announced, Tail},
    timer::Timer,
};

/// What happens to a receiver.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// The connection is there and the peer is the one that was named.
    Opened,
    /// The sender has told of full blocks.
    Announced {
        /// Index of the first in the sequence.
        first: u32,
        /// The blocks.
        blocks: Vec<Announced>,
    },
    /// Blocks that were copied.
    Taken(Vec<Copied>),
    /// The sender does not have them any more.
    Gone,
    /// The sender's last word.
    Commit {
        /// What it says.
        tail: Tail,
        /// Last block where it is not full, with its index.
        partial: Option<(u32, Announced)>,
    },
    /// The holder has no block of the prefix.
    NoPrefix,
    /// The sender is still there.
    Alive,
    /// The sender gave up.
    PeerAbort(Reason),
    /// The connection broke or could not be made.
    PeerLost,
    /// Give up, and tell the sender why.
    Cancel(Reason),
    /// No write can come any more (answer to `StopWrites`).
    Quiet,
    /// A timer.
    Fired(Timer),
}

/// A copy that ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Copied {
    /// Index in the sequence.
    pub block: u32,
    /// XXH3-64 of what was stored.
    pub checksum: u64,
    /// The slot's version after the copy; `None` where the sender checked it.
    pub version: Option<u64>,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Start a timer anew.
    Arm(Timer),
    /// Stop a timer.
    Disarm(Timer),
    /// Ask the sender.
    SendPull,
    /// Renew the lease.
    SendHeartbeat,
    /// Tell the sender that all before this block is here, which is all that was
    /// announced.
    SendProgress(u32),
    /// Tell the sender that all is here.
    SendReleased,
    /// Tell the sender that it is over.
    SendAbort(Reason),
    /// Copy these blocks, from `first` on.
    Take {
        /// Index of the first.
        first: u32,
        /// The blocks.
        blocks: Vec<Announced>,
    },
    /// Begin no more writes, and say `Quiet` when those under way have ended.
    StopWrites,
    /// Tell the engine: blocks before this one are right.
    Verified(u32),
    /// Tell the engine: all is here.
    Committed(Tail),
    /// Tell the engine: failed; blocks before this one are right, all are free.
    Failed {
        /// Why.
        reason: Reason,
        /// Verified blocks end here.
        verified: u32,
    },
}

/// Where a transfer stands.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum State {
    Reserved,
    Flowing,
    Committed { tail: Tail, end: u32 },
    Closing(Reason),
    Over,
}

/// One transfer, on the side that wants the blocks.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Receiver {
    state: State,
    block_tokens: u32,
    /// Blocks [from, limit) have a destination.
    from: u32,
    limit: u32,
    /// Announced blocks from `from` on.
    announced: Vec<Announced>,
    /// Blocks before it are right; those after it that are, apart.
    verified: u32,
    ahead: BTreeSet<u32>,
}

impl Receiver {
    /// A transfer into destinations for `slots` blocks from `from_block` on.
    /// `None` where the numbers do not fit.
    #[must_use]
    pub fn new(block_tokens: u32, from_block: u32, slots: u32) -> Option<Self> {
        Some(Self {
            state: State::Reserved,
            block_tokens: Some(block_tokens).filter(|n| *n > 0)?,
            from: from_block,
            limit: from_block.checked_add(slots)?,
            announced: Vec::new(),
            verified: from_block,
            ahead: BTreeSet::new(),
        })
    }

    /// Whether nothing more will come of it.
    #[must_use]
    pub fn over(&self) -> bool {
        self.state == State::Over
    }

    /// The one place where a receiver changes. What a peer must not say, or
    /// not now, ends the transfer.
    #[must_use]
    pub fn step(&mut self, event: Event) -> Vec<Action> {
        let mut actions = Vec::new();
        match (event, &self.state) {
            (_, State::Over) => {}
            (Event::Quiet, State::Closing(reason)) => {
                actions.push(Action::Failed {
                    reason: *reason,
                    verified: self.verified,
                });
                self.state = State::Over;
            }
            // A copy that ended well while closing is still a verified prefix.
            (Event::Taken(copied), State::Closing(_)) => {
                for copy in copied {
                    self.verify(copy);
                }
            }
            (_, State::Closing(_)) | (Event::Quiet, _) => {}
            (Event::Opened, _) => {
                actions.extend([
                    Action::SendPull,
                    Action::Arm(Timer::Heartbeat),
                    Action::Arm(Timer::Silence),
                ]);
            }
            (Event::Announced { first, blocks }, State::Reserved | State::Flowing) => {
                self.state = State::Flowing;
                actions.push(Action::Arm(Timer::Silence));
                self.announce(first, blocks, &mut actions);
            }
            (Event::Commit { tail, partial }, State::Reserved | State::Flowing) => {
                actions.push(Action::Arm(Timer::Silence));
                self.commit(tail, partial, &mut actions);
            }
            (Event::Announced { .. } | Event::Commit { .. }, State::Committed { .. }) => {
                self.close(Reason::Failed, true, &mut actions);
            }
            (Event::Taken(copied), _) => self.taken(copied, &mut actions),
            (Event::Alive, _) => actions.push(Action::Arm(Timer::Silence)),
            (Event::Gone, _) => self.close(Reason::Mismatch, true, &mut actions),
            (Event::NoPrefix, _) => self.close(Reason::Unknown, false, &mut actions),
            (Event::PeerAbort(reason), _) => self.close(reason, false, &mut actions),
            (Event::PeerLost, _) => self.close(Reason::Lost, false, &mut actions),
            (Event::Cancel(reason), _) => self.close(reason, true, &mut actions),
            (Event::Fired(Timer::Heartbeat), _) => {
                actions.extend([Action::SendHeartbeat, Action::Arm(Timer::Heartbeat)]);
            }
            (Event::Fired(Timer::Silence), _) => {
                self.close(Reason::LeaseExpired, true, &mut actions);
            }
            (Event::Fired(_), _) => {}
        }
        actions
    }

    fn announce(&mut self, first: u32, blocks: Vec<Announced>, actions: &mut Vec<Action>) {
        let expected = self.from + self.announced.len() as u32;
        let room = (self.limit - expected) as usize;
        if first != expected || blocks.len() > room {
            self.close(Reason::Failed, true, actions);
            return;
        }
        if blocks.is_empty() {
            return;
        }
        self.announced.extend(&blocks);
        actions.push(Action::Take { first, blocks });
    }

    fn commit(&mut self, tail: Tail, partial: Option<(u32, Announced)>, actions: &mut Vec<Action>) {
        let full = tail.kv_tokens / self.block_tokens;
        let rest = !tail.kv_tokens.is_multiple_of(self.block_tokens);
        let announced = self.from + self.announced.len() as u32;
        let fits = match partial {
            Some((block, _)) => rest && block == full && block >= self.from,
            // Without a partial block: none is needed, or the receiver has it.
            None => !rest,
        };
        if !fits || (full != announced && full >= self.from) || announced > full.max(self.from) {
            self.close(Reason::Failed, true, actions);
            return;
        }
        if let Some((block, last)) = partial {
            self.announce(block, vec![last], actions);
            if matches!(self.state, State::Closing(_)) {
                return;
            }
        }
        let end = self.from + self.announced.len() as u32;
        self.state = State::Committed { tail, end };
        self.settle(actions);
    }

    /// Whether a copy is what was announced; if so it counts.
    fn verify(&mut self, copy: Copied) -> bool {
        let Some(wanted) = copy
            .block
            .checked_sub(self.from)
            .and_then(|index| self.announced.get(index as usize))
        else {
            return false;
        };
        let right = copy.checksum == wanted.checksum
            && copy.version.is_none_or(|version| version == wanted.version);
        if right {
            self.ahead.insert(copy.block);
            while self.ahead.remove(&self.verified) {
                self.verified += 1;
            }
        }
        right
    }

    fn taken(&mut self, copied: Vec<Copied>, actions: &mut Vec<Action>) {
        let before = self.verified;
        let mut right = true;
        for copy in copied {
            right &= self.verify(copy);
        }
        if self.verified > before {
            actions.push(Action::Verified(self.verified));
            let told_of = self.from + self.announced.len() as u32;
            if right && self.verified == told_of && self.state == State::Flowing {
                actions.push(Action::SendProgress(self.verified));
            }
        }
        if right {
            self.settle(actions);
        } else {
            self.close(Reason::Mismatch, true, actions);
        }
    }

    /// Ends well once the last block is verified.
    fn settle(&mut self, actions: &mut Vec<Action>) {
        let State::Committed { tail, end } = &mut self.state else {
            return;
        };
        if self.verified == *end {
            let tail = std::mem::take(tail);
            actions.extend([
                Action::Disarm(Timer::Heartbeat),
                Action::Disarm(Timer::Silence),
                Action::SendReleased,
                Action::Committed(tail),
            ]);
            self.state = State::Over;
        }
    }

    fn close(&mut self, reason: Reason, tell: bool, actions: &mut Vec<Action>) {
        actions.extend([
            Action::Disarm(Timer::Heartbeat),
            Action::Disarm(Timer::Silence),
        ]);
        if tell {
            actions.push(Action::SendAbort(reason));
        }
        self.state = State::Closing(reason);
        actions.push(Action::StopWrites);
    }
}
