//! The sender's side of one transfer, as a pure state machine.
//!
//! ```text
//!            offer                pull
//!   (none) ────────▶ reserved ────────▶ flowing ──── commit, all sent ───▶ committed
//!      │ pull             │               │                                    │ released
//!      ▼        offer     │ cancel, lease │ cancel, lease, abort, lost         ▼
//!   awaited ──────────────┼──▶ flowing    │                                released
//!      │ offer timeout    ▼               ▼
//!      └──▶ unknown    aborted ◀──────────┴── from committed too
//! ```
//!
//! A pin lasts from the offer to `released` or `aborted`; an aborted id is
//! remembered for a while and refuses a later offer. A wait is an action `Arm`
//! that comes back as an event `Fired`; nothing here knows a clock.

mod offered;

use bytes::Bytes;
use offered::Offered;

use crate::{error::Refused, id::Reason, timer::Timer};

/// Number of a connection.
pub type Peer = u64;

/// A block as it was announced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Announced {
    /// Slot in the sender's pool.
    pub slot: u32,
    /// Its version then.
    pub version: u64,
    /// XXH3-64 of its bytes.
    pub checksum: u64,
}

/// The last word of a sender, but for the last block.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Tail {
    /// Tokens that have KV.
    pub kv_tokens: u32,
    /// Output tokens after the border of the receiver's continuation.
    pub output_ids: Vec<u32>,
    /// Encoded `TokenLogprobs`, one an output id, or none.
    pub logprobs: Vec<Bytes>,
}

/// What happens to a sender.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// The engine opens the transfer.
    Offer,
    /// The receiver has come, and wants blocks from this one on.
    Pull {
        /// Its connection.
        peer: Peer,
        /// First block wanted.
        from_block: u32,
    },
    /// The engine has filled blocks: (slot, version) each.
    Ready {
        /// Index of the first in the sequence.
        first: u32,
        /// The blocks.
        blocks: Vec<(u32, u64)>,
    },
    /// Checksums that were computed.
    Hashed(Vec<(u32, u64)>),
    /// The engine's last word; (block, slot, version) of a last, partial block.
    Commit {
        /// What it says.
        tail: Tail,
        /// Last block where it is not full.
        partial: Option<(u32, u32, u64)>,
    },
    /// The receiver has everything.
    Released(Peer),
    /// The receiver is still there.
    Alive(Peer),
    /// The receiver has all blocks before this one.
    Progress(Peer, u32),
    /// The receiver gave up.
    PeerAbort(Peer, Reason),
    /// The connection broke.
    PeerLost(Peer),
    /// The engine gives up.
    Cancel(Reason),
    /// A timer.
    Fired(Timer),
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Start a timer anew.
    Arm(Timer),
    /// Stop a timer.
    Disarm(Timer),
    /// Compute the checksum of a block of the sequence, in this slot.
    Hash {
        /// Index in the sequence.
        block: u32,
        /// Slot.
        slot: u32,
    },
    /// Tell the receiver of full blocks.
    Announce {
        /// Index of the first.
        first: u32,
        /// The blocks.
        blocks: Vec<Announced>,
    },
    /// Tell the receiver the last word.
    SendCommit {
        /// What it says.
        tail: Tail,
        /// Last block where it is not full, with its index.
        partial: Option<(u32, Announced)>,
    },
    /// Tell this receiver that it is over.
    SendAbort(Peer, Reason),
    /// Tell the engine: the receiver has come.
    Pulled,
    /// Tell the engine: the receiver has all blocks before this one.
    Reached(u32),
    /// Tell the engine: done, unpin.
    Released,
    /// Tell the engine: failed, unpin.
    Aborted {
        /// Why.
        reason: Reason,
        /// The receiver may own the sequence.
        commit_sent: bool,
    },
    /// Nothing is left to remember.
    Forget,
}

/// Where a transfer stands.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum State {
    Awaited {
        peer: Peer,
        from_block: u32,
    },
    Reserved(Offered),
    Flowing(Peer, Offered),
    Committed(Peer, Offered),
    /// Remembered, so that a late offer or pull is refused.
    Aborted(Reason),
    Released,
}

/// One transfer, on the side that has the blocks.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Sender {
    state: State,
}

impl Sender {
    /// A transfer that the engine opens, or that a pull names first.
    #[must_use]
    pub fn new(event: &Event) -> Option<(Self, Vec<Action>)> {
        match *event {
            Event::Offer => Some((
                Self {
                    state: State::Reserved(Offered::default()),
                },
                vec![Action::Arm(Timer::Lease)],
            )),
            Event::Pull { peer, from_block } => Some((
                Self {
                    state: State::Awaited { peer, from_block },
                },
                vec![Action::Arm(Timer::Offer)],
            )),
            // Aborted before it was offered: the offer is still to come.
            Event::PeerAbort(_, reason) => Some((
                Self {
                    state: State::Aborted(reason),
                },
                vec![Action::Arm(Timer::Memory)],
            )),
            _ => None,
        }
    }

    /// Whether blocks are pinned for it.
    #[must_use]
    pub fn pinned(&self) -> bool {
        matches!(
            self.state,
            State::Reserved(_) | State::Flowing(..) | State::Committed(..)
        )
    }

    /// Whether a pull waits for its offer.
    #[must_use]
    pub fn awaited(&self) -> bool {
        matches!(self.state, State::Awaited { .. })
    }

    /// The receiver's connection, where there is one.
    #[must_use]
    pub fn peer(&self) -> Option<Peer> {
        match self.state {
            State::Awaited { peer, .. } | State::Flowing(peer, _) | State::Committed(peer, _) => {
                Some(peer)
            }
            State::Reserved(_) | State::Aborted(_) | State::Released => None,
        }
    }

    /// (slot, version) of announced blocks, for a receiver that reads them by
    /// TCP. `None` where one of them was not announced to it.
    #[must_use]
    pub fn fetch(&self, from: Peer, first: u32, count: u32) -> Option<Vec<(u32, u64)>> {
        let (peer, offered, end) = match &self.state {
            State::Flowing(peer, offered) => (*peer, offered, offered.announce_next),
            State::Committed(peer, offered) => (*peer, offered, offered.end()),
            _ => return None,
        };
        let start = first.checked_sub(offered.first?)? as usize;
        if peer != from || first.checked_add(count)? > end {
            return None;
        }
        let blocks = offered.blocks.get(start..start + count as usize)?;
        Some(blocks.iter().map(|b| (b.slot, b.version)).collect())
    }

    /// The one place where a sender changes.
    ///
    /// # Errors
    ///
    /// Where the engine asks for what cannot be now. Peers' events that come
    /// at the wrong time are ignored, or end the transfer.
    pub fn step(&mut self, event: Event) -> Result<Vec<Action>, Refused> {
        let mut actions = Vec::new();
        match event {
            Event::Offer => self.offer(&mut actions)?,
            Event::Pull { peer, from_block } => self.pull(peer, from_block, &mut actions),
            Event::Ready { first, blocks } => {
                self.offered()?.add(first, &blocks)?;
                self.advance(&mut actions);
            }
            Event::Hashed(sums) => {
                if let State::Flowing(_, offered) = &mut self.state {
                    for (block, checksum) in sums {
                        if let Some(block) = offered.at(block) {
                            block.checksum = Some(checksum);
                        }
                    }
                    self.advance(&mut actions);
                }
            }
            Event::Commit { tail, partial } => {
                let offered = self.offered()?;
                if let Some((block, slot, version)) = partial {
                    offered.add(block, &[(slot, version)])?;
                    offered.has_partial = true;
                }
                offered.commit = Some(tail);
                self.advance(&mut actions);
            }
            Event::Released(peer) if self.peer() == Some(peer) => {
                if matches!(self.state, State::Committed(..)) {
                    self.state = State::Released;
                    actions.extend([
                        Action::Disarm(Timer::Lease),
                        Action::Released,
                        Action::Forget,
                    ]);
                } else {
                    self.end(Reason::Failed, Some(peer), true, &mut actions);
                }
            }
            Event::Alive(peer) if self.peer() == Some(peer) => {
                if self.pinned() {
                    actions.push(Action::Arm(Timer::Lease));
                }
            }
            Event::Progress(peer, upto) if self.peer() == Some(peer) => {
                if let State::Flowing(_, offered) = &self.state {
                    // It cannot have what it was not told of.
                    let upto = upto.min(offered.announce_next);
                    actions.extend([Action::Arm(Timer::Lease), Action::Reached(upto)]);
                }
            }
            Event::PeerAbort(peer, reason) => {
                // From a connection that never pulled it too: the id is known
                // to the pair alone, and the abort may overtake the pull.
                if self.peer().is_none_or(|own| own == peer) {
                    self.end(reason, None, true, &mut actions);
                }
            }
            Event::PeerLost(peer) if self.peer() == Some(peer) => {
                if self.awaited() {
                    self.state = State::Released;
                    actions.extend([Action::Disarm(Timer::Offer), Action::Forget]);
                } else {
                    self.end(Reason::Lost, None, true, &mut actions);
                }
            }
            Event::Released(_) | Event::Alive(_) | Event::Progress(..) | Event::PeerLost(_) => {}
            Event::Cancel(reason) => self.end(reason, self.peer(), false, &mut actions),
            Event::Fired(timer) => self.fired(timer, &mut actions),
        }
        Ok(actions)
    }

    fn offer(&mut self, actions: &mut Vec<Action>) -> Result<(), Refused> {
        match self.state {
            State::Awaited { peer, from_block } => {
                self.state = State::Reserved(Offered::default());
                actions.extend([Action::Disarm(Timer::Offer), Action::Arm(Timer::Lease)]);
                self.pull(peer, from_block, actions);
                Ok(())
            }
            State::Aborted(reason) => Err(Refused::new(reason, "the receiver has aborted it")),
            _ => Err(Refused::new(Reason::Failed, "it is offered already")),
        }
    }

    fn pull(&mut self, peer: Peer, from_block: u32, actions: &mut Vec<Action>) {
        match &mut self.state {
            State::Reserved(offered) => {
                if offered.first.is_some_and(|first| first > from_block) {
                    self.end(Reason::Failed, Some(peer), true, actions);
                    return;
                }
                offered.hash_next = from_block;
                offered.announce_next = from_block;
                self.state = State::Flowing(peer, std::mem::take(offered));
                actions.extend([Action::Arm(Timer::Lease), Action::Pulled]);
                self.advance(actions);
            }
            State::Aborted(reason) => actions.push(Action::SendAbort(peer, *reason)),
            // One receiver a transfer: the first.
            _ => {
                if self.peer() != Some(peer) {
                    actions.push(Action::SendAbort(peer, Reason::Failed));
                }
            }
        }
    }

    fn offered(&mut self) -> Result<&mut Offered, Refused> {
        let offered = match &mut self.state {
            State::Reserved(offered) | State::Flowing(_, offered) => offered,
            State::Aborted(reason) => return Err(Refused::new(*reason, "it was aborted")),
            _ => return Err(Refused::new(Reason::Failed, "it is committed already")),
        };
        if offered.commit.is_some() {
            return Err(Refused::new(Reason::Failed, "it is committed already"));
        }
        Ok(offered)
    }

    fn advance(&mut self, actions: &mut Vec<Action>) {
        let State::Flowing(peer, offered) = &mut self.state else {
            return;
        };
        if offered
            .first
            .is_some_and(|first| first > offered.announce_next)
        {
            let peer = *peer;
            self.end(Reason::Failed, Some(peer), true, actions);
        } else if offered.advance(actions) {
            self.state = State::Committed(*peer, std::mem::take(offered));
        }
    }

    fn end(&mut self, reason: Reason, tell: Option<Peer>, notify: bool, actions: &mut Vec<Action>) {
        if matches!(self.state, State::Aborted(_) | State::Released) {
            return;
        }
        actions.push(Action::Disarm(if self.awaited() {
            Timer::Offer
        } else {
            Timer::Lease
        }));
        if let Some(peer) = tell {
            actions.push(Action::SendAbort(peer, reason));
        }
        if notify && self.pinned() {
            let commit_sent = matches!(self.state, State::Committed(..));
            actions.push(Action::Aborted {
                reason,
                commit_sent,
            });
        }
        self.state = State::Aborted(reason);
        actions.push(Action::Arm(Timer::Memory));
    }

    fn fired(&mut self, timer: Timer, actions: &mut Vec<Action>) {
        match (timer, &self.state) {
            (Timer::Offer, State::Awaited { peer, .. }) => {
                actions.extend([Action::SendAbort(*peer, Reason::Unknown), Action::Forget]);
                self.state = State::Released;
            }
            (Timer::Lease, _) if self.pinned() => {
                self.end(Reason::LeaseExpired, self.peer(), true, actions);
            }
            (Timer::Memory, State::Aborted(_)) => {
                self.state = State::Released;
                actions.push(Action::Forget);
            }
            _ => {}
        }
    }
}
