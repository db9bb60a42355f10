//! Both sides of one transfer under a model checker: every order of frames,
//! copies, timers, cancels, losses and re-uses of slots, for a sequence of one
//! full and one partial block.
//!
//! Both enums are those that serve. Frames keep their order and may take as long as they like.
//! The connection may break at any moment, with all that is on its way: from then on it carries
//! nothing, and each side hears of that at a time of its own, or never.
#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::{BTreeSet, VecDeque};

use kvmesh_transfer::{
    Reason, Timer,
    receiver::{self, Copied, Receiver},
    sender::{self, Announced, Sender, Tail},
};
use stateright::{Checker, Model, Property};

const PEER: u64 = 1;
const BLOCKS: usize = 2;
/// What the sequence has in a block; a slot that is used anew has another.
const RIGHT: u64 = 0;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum ToReceiver {
    Ready(u32, Vec<Announced>),
    Commit(Tail, Option<(u32, Announced)>),
    Abort(Reason),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum ToSender {
    Pull,
    Alive,
    Progress(u32),
    Released,
    Abort(Reason),
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Pin {
    #[default]
    Never,
    Held,
    Gone,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct World {
    sender: Option<Sender>,
    receiver: Option<Receiver>,
    to_receiver: VecDeque<ToReceiver>,
    to_sender: VecDeque<ToSender>,
    timers: BTreeSet<Timer>,
    hashes: VecDeque<(u32, u32)>,
    /// Copies that were asked for, and the one under way with what it read.
    takes: VecDeque<(u32, Announced)>,
    copying: Option<(u32, u64)>,
    stopping: bool,
    pin: Pin,
    ready: u32,
    committed_by_engine: bool,
    cancelled: (bool, bool),
    /// The connection carries nothing more.
    lost: bool,
    /// Whether the sender and the receiver have heard of it.
    heard: (bool, bool),
    beats: u8,
    /// Version of each of the sender's slots; also stands for its content.
    slots: [u64; BLOCKS],
    /// Content of each destination block.
    targets: [Option<u64>; BLOCKS],
    verified: u32,
    /// The engine was told: done, or failed (and the blocks are free).
    done: bool,
    freed: bool,
    commit_sent: bool,
    reached: bool,
    wrong: Option<&'static str>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Step {
    Offer,
    Ready,
    Commit,
    CancelSender,
    Reuse(u32),
    Open,
    CancelReceiver,
    Lose,
    SenderHears,
    ReceiverHears,
    DeliverToReceiver,
    DeliverToSender,
    Hash,
    BeginCopy,
    EndCopy,
    Quiet,
    Fire(Timer),
}

struct Transfer;

impl World {
    fn sender_actions(&mut self, actions: Vec<sender::Action>) {
        use sender::Action;
        for action in actions {
            match action {
                Action::Arm(timer) => drop(self.timers.insert(timer)),
                Action::Disarm(timer) => drop(self.timers.remove(&timer)),
                Action::Hash { block, slot } => self.hashes.push_back((block, slot)),
                Action::Announce { first, blocks } => {
                    self.to_receiver.push_back(ToReceiver::Ready(first, blocks));
                }
                Action::SendCommit { tail, partial } => {
                    self.commit_sent = true;
                    self.to_receiver
                        .push_back(ToReceiver::Commit(tail, partial));
                }
                Action::SendAbort(_, reason) => {
                    self.to_receiver.push_back(ToReceiver::Abort(reason))
                }
                Action::Pulled => {}
                Action::Reached(upto) => {
                    // What is told of is there still, whatever happens to the slots.
                    if upto > self.verified || self.commit_sent {
                        self.wrong = Some("the engine was told of blocks that are not there");
                    }
                    self.reached = true;
                }
                Action::Released => {
                    if !self.done {
                        self.wrong = Some("released before the receiver was done");
                    }
                    self.pin = Pin::Gone;
                }
                Action::Aborted { commit_sent, .. } => {
                    if commit_sent != self.commit_sent {
                        self.wrong = Some("the engine was told wrongly of its commit");
                    }
                    self.pin = Pin::Gone;
                }
                Action::Forget => self.sender = None,
            }
        }
        if self.lost {
            self.to_receiver.clear();
        }
    }

    fn sender(&mut self, event: sender::Event) {
        let actions = match &mut self.sender {
            Some(sender) => sender.step(event).unwrap_or_default(),
            None => match Sender::new(&event) {
                Some((sender, actions)) => {
                    self.sender = Some(sender);
                    actions
                }
                None => Vec::new(),
            },
        };
        self.sender_actions(actions);
    }

    fn receiver(&mut self, event: receiver::Event) {
        use receiver::Action;
        let Some(receiver) = &mut self.receiver else {
            return;
        };
        let actions = receiver.step(event);
        for action in actions {
            match action {
                Action::Arm(timer) => drop(self.timers.insert(timer)),
                Action::Disarm(timer) => drop(self.timers.remove(&timer)),
                Action::SendPull => self.to_sender.push_back(ToSender::Pull),
                Action::SendHeartbeat => self.to_sender.push_back(ToSender::Alive),
                Action::SendProgress(upto) => {
                    self.to_sender.push_back(ToSender::Progress(upto));
                }
                Action::SendReleased => self.to_sender.push_back(ToSender::Released),
                Action::SendAbort(reason) => self.to_sender.push_back(ToSender::Abort(reason)),
                Action::Take { first, blocks } => {
                    self.takes.extend((first..).zip(blocks));
                }
                Action::StopWrites => {
                    self.takes.clear();
                    self.stopping = true;
                }
                Action::Verified(upto) => self.verified = upto,
                Action::Committed(_) => {
                    if self.targets.contains(&None) || self.copying.is_some() {
                        self.wrong = Some("committed before all was here");
                    }
                    self.verified = BLOCKS as u32;
                    self.done = true;
                }
                Action::Failed { verified, .. } => {
                    if self.copying.is_some() {
                        self.wrong = Some("blocks freed under a write");
                    }
                    self.verified = verified;
                    self.freed = true;
                }
            }
        }
        if self.receiver.as_ref().is_some_and(Receiver::over) {
            self.receiver = None;
        }
        if self.lost {
            self.to_sender.clear();
        }
    }
}

impl Model for Transfer {
    type State = World;
    type Action = Step;

    fn init_states(&self) -> Vec<World> {
        vec![World {
            receiver: Receiver::new(16, 0, BLOCKS as u32),
            ..World::default()
        }]
    }

    fn actions(&self, world: &World, steps: &mut Vec<Step>) {
        if world.pin == Pin::Never && !world.cancelled.0 {
            steps.push(Step::Offer);
        }
        if world.pin == Pin::Held {
            if world.ready == 0 {
                steps.push(Step::Ready);
            } else if !world.committed_by_engine {
                steps.push(Step::Commit);
            }
            if !world.cancelled.0 {
                steps.push(Step::CancelSender);
            }
        }
        if world.pin == Pin::Gone {
            // Somebody else gets the blocks, once.
            let fresh = (0..BLOCKS as u32).filter(|i| world.slots[*i as usize] == RIGHT);
            steps.extend(fresh.map(Step::Reuse));
        }
        let opened = world.timers.contains(&Timer::Heartbeat) || world.done || world.freed;
        if world.receiver.is_some() && !opened && !world.stopping && !world.lost {
            steps.push(Step::Open);
        }
        if world.receiver.is_some() && !world.cancelled.1 {
            steps.push(Step::CancelReceiver);
        }
        if !world.lost {
            steps.push(Step::Lose);
        } else {
            if !world.heard.0 {
                steps.push(Step::SenderHears);
            }
            if !world.heard.1 {
                steps.push(Step::ReceiverHears);
            }
        }
        if !world.to_receiver.is_empty() {
            steps.push(Step::DeliverToReceiver);
        }
        if !world.to_sender.is_empty() {
            steps.push(Step::DeliverToSender);
        }
        if !world.hashes.is_empty() {
            steps.push(Step::Hash);
        }
        if world.copying.is_some() {
            steps.push(Step::EndCopy);
        } else if !world.takes.is_empty() {
            steps.push(Step::BeginCopy);
        } else if world.stopping {
            steps.push(Step::Quiet);
        }
        let beating = |timer: &&Timer| **timer != Timer::Heartbeat || world.beats < 1;
        steps.extend(
            world
                .timers
                .iter()
                .filter(beating)
                .map(|timer| Step::Fire(*timer)),
        );
    }

    fn next_state(&self, last: &World, step: Step) -> Option<World> {
        let mut world = last.clone();
        match step {
            Step::Offer => {
                let refused = match &mut world.sender {
                    Some(sender) => match sender.step(sender::Event::Offer) {
                        Ok(actions) => {
                            world.pin = Pin::Held;
                            world.sender_actions(actions);
                            false
                        }
                        Err(_) => true,
                    },
                    None => {
                        world.pin = Pin::Held;
                        world.sender(sender::Event::Offer);
                        false
                    }
                };
                if refused {
                    world.pin = Pin::Gone;
                }
            }
            Step::Ready => {
                world.ready = 1;
                let blocks = vec![(0, world.slots[0])];
                world.sender(sender::Event::Ready { first: 0, blocks });
            }
            Step::Commit => {
                world.committed_by_engine = true;
                let tail = Tail {
                    kv_tokens: 20,
                    output_ids: vec![7],
                    logprobs: vec![],
                };
                let partial = Some((1, 1, world.slots[1]));
                world.sender(sender::Event::Commit { tail, partial });
            }
            Step::CancelSender => {
                world.cancelled.0 = true;
                world.sender(sender::Event::Cancel(Reason::Cancelled));
                world.pin = Pin::Gone;
            }
            Step::Reuse(slot) => world.slots[slot as usize] += 1,
            Step::Open => world.receiver(receiver::Event::Opened),
            Step::CancelReceiver => {
                world.cancelled.1 = true;
                world.receiver(receiver::Event::Cancel(Reason::Cancelled));
            }
            Step::Lose => {
                world.lost = true;
                world.to_receiver.clear();
                world.to_sender.clear();
            }
            Step::SenderHears => {
                world.heard.0 = true;
                world.sender(sender::Event::PeerLost(PEER));
            }
            Step::ReceiverHears => {
                world.heard.1 = true;
                world.receiver(receiver::Event::PeerLost);
            }
            Step::DeliverToReceiver => match world.to_receiver.pop_front()? {
                ToReceiver::Ready(first, blocks) => {
                    world.receiver(receiver::Event::Announced { first, blocks });
                }
                ToReceiver::Commit(tail, partial) => {
                    world.receiver(receiver::Event::Commit { tail, partial });
                }
                ToReceiver::Abort(reason) => world.receiver(receiver::Event::PeerAbort(reason)),
            },
            Step::DeliverToSender => {
                let event = match world.to_sender.pop_front()? {
                    ToSender::Pull => sender::Event::Pull {
                        peer: PEER,
                        from_block: 0,
                    },
                    ToSender::Alive => sender::Event::Alive(PEER),
                    ToSender::Progress(upto) => sender::Event::Progress(PEER, upto),
                    ToSender::Released => sender::Event::Released(PEER),
                    ToSender::Abort(reason) => sender::Event::PeerAbort(PEER, reason),
                };
                world.sender(event);
            }
            Step::Hash => {
                let (block, slot) = world.hashes.pop_front()?;
                // The checksum of what lies there now, right or not.
                let checksum = world.slots[slot as usize];
                world.sender(sender::Event::Hashed(vec![(block, checksum)]));
            }
            Step::BeginCopy => {
                let (block, from) = *world.takes.front()?;
                world.copying = Some((block, world.slots[from.slot as usize]));
            }
            Step::EndCopy => {
                let (block, read) = world.copying.take()?;
                world.targets[block as usize] = Some(read);
                // Without the rest of the queue the copy was the last one.
                let from = world.takes.pop_front().map(|(_, from)| from);
                let slot = from.map_or(block, |from| from.slot);
                let version = Some(world.slots[slot as usize]);
                world.receiver(receiver::Event::Taken(vec![Copied {
                    block,
                    checksum: read,
                    version,
                }]));
            }
            Step::Quiet => {
                world.stopping = false;
                world.receiver(receiver::Event::Quiet);
            }
            Step::Fire(timer) => {
                world.timers.remove(&timer);
                match timer {
                    Timer::Offer | Timer::Lease | Timer::Memory => {
                        world.sender(sender::Event::Fired(timer));
                    }
                    Timer::Heartbeat | Timer::Silence => {
                        world.beats += u8::from(timer == Timer::Heartbeat);
                        world.receiver(receiver::Event::Fired(timer));
                    }
                }
            }
        }
        Some(world)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("nobody is told what is not so", |_, world: &World| {
                world.wrong.is_none()
            }),
            Property::always("verified blocks hold the sequence", |_, world: &World| {
                world.targets[..world.verified as usize]
                    .iter()
                    .all(|t| *t == Some(RIGHT))
            }),
            Property::always("no write after blocks are free", |_, world: &World| {
                !(world.freed && world.copying.is_some())
            }),
            Property::always("one end", |_, world: &World| !(world.done && world.freed)),
            Property::always("an end leaves nothing", |_, world: &World| {
                let ended = world.receiver.is_none();
                ended == (world.done || world.freed)
            }),
            Property::sometimes("a transfer is done", |_, world: &World| {
                world.done && world.pin == Pin::Gone && !world.lost
            }),
            Property::sometimes("the sender hears how far it is", |_, world: &World| {
                world.reached && world.done
            }),
            Property::sometimes("a prefix is kept", |_, world: &World| {
                world.freed && world.verified == 1
            }),
            Property::sometimes("a late copy is discarded", |_, world: &World| {
                world.freed && world.targets[0].is_some_and(|t| t != RIGHT)
            }),
            Property::sometimes(
                "the receiver is done, which its sender never hears",
                |_, world: &World| {
                    world.done && world.lost && !world.heard.0 && world.pin == Pin::Gone
                },
            ),
            Property::always("what cannot go on holds nothing", |model, world: &World| {
                let mut steps = Vec::new();
                model.actions(world, &mut steps);
                let engine = |s: &Step| {
                    matches!(
                        s,
                        Step::Reuse(_)
                            | Step::Lose
                            | Step::SenderHears
                            | Step::ReceiverHears
                            | Step::Offer
                            | Step::Ready
                            | Step::Commit
                    )
                };
                // Without cancels, and though nobody hears of a loss, timers alone must end all.
                !steps.iter().all(engine) || world.pin != Pin::Held
            }),
        ]
    }
}

#[test]
fn every_order_of_events_keeps_the_promises() {
    let checker = Transfer.checker().threads(2).spawn_bfs().join();
    let (states, depth) = (checker.unique_state_count(), checker.max_depth());
    println!("{states} states, depth {depth}");
    checker.assert_properties();
    assert!(states > 10_000, "{states}");
}
