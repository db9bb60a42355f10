//! The side that has the blocks.

use std::time::Instant;

use kvmesh_wire::v1::{
    BlocksReady, Commit, PartialBlock, PrefixFound, TokenLogprobs, transfer_frame::Frame,
};
use prost::Message;

use super::abort_frame;
use crate::{
    error::Refused,
    event::Event,
    id::{Reason, TransferId},
    jobs::Job,
    node::Shared,
    sender::{self, Announced, Sender, Tail},
    state::{Core, Sending},
};

/// Blocks told of in one frame: 20 bytes each, far below the longest frame.
const ANNOUNCED_A_FRAME: usize = 8 * 1024;

impl Shared {
    /// Something happened to a transfer on the sender's side.
    pub(crate) fn sender_event(
        &self,
        core: &mut Core,
        id: TransferId,
        event: sender::Event,
    ) -> Result<(), Refused> {
        let actions = match core.sending.get_mut(&id) {
            Some(sending) => sending.machine.step(event)?,
            None => {
                // Remembered ids count too: a peer cannot fill the memory.
                if core.sending.len() >= 2 * self.settings.max_transfers {
                    return Err(Refused::new(Reason::Failed, "too many transfers"));
                }
                let Some((machine, actions)) = Sender::new(&event) else {
                    return Err(Refused::new(Reason::Unknown, "no such transfer"));
                };
                core.sending.insert(
                    id,
                    Sending {
                        machine,
                        followed: false,
                        pins: 0,
                        pull: None,
                        since: Instant::now(),
                        blocks: 0,
                        message: String::new(),
                    },
                );
                actions
            }
        };
        for action in actions {
            self.sender_action(core, id, action);
        }
        Ok(())
    }

    fn sender_action(&self, core: &mut Core, id: TransferId, action: sender::Action) {
        use sender::Action;
        match action {
            Action::Arm(timer) => self.arm(core, id, timer),
            Action::Disarm(timer) => core.timers.disarm(id, timer),
            Action::Hash { block, slot } => self.jobs.push([Job::Hash { id, block, slot }]),
            Action::Announce { first, blocks } => self.announce(core, id, first, &blocks),
            Action::SendCommit { tail, partial } => {
                core.figures.sent_blocks += u64::from(partial.is_some());
                if partial.is_some() {
                    core.figures.sent_bytes += self.pool.block_bytes() as u64;
                }
                if let Some(sending) = core.sending.get_mut(&id) {
                    sending.blocks += u64::from(partial.is_some());
                }
                send_to_receiver(core, id, Frame::Commit(commit_frame(id, tail, partial)));
            }
            Action::SendAbort(peer, reason) => {
                let message = core
                    .sending
                    .get(&id)
                    .map(|s| s.message.clone())
                    .unwrap_or_default();
                if let Some(connection) = core.connections.get(&peer) {
                    connection.send(abort_frame(id, reason, message));
                }
            }
            Action::Pulled => self.pulled(core, id),
            Action::Reached(upto_block) => {
                if core
                    .sending
                    .get(&id)
                    .is_some_and(|sending| sending.followed)
                {
                    self.tell(core, Event::Reached { id, upto_block });
                }
            }
            Action::Released => {
                core.figures.sends_released += 1;
                if let Some(sending) = core.sending.get(&id) {
                    let event = Event::SenderReleased {
                        id,
                        blocks: sending.blocks,
                        bytes: sending.blocks * self.pool.block_bytes() as u64,
                        seconds: sending.since.elapsed().as_secs_f64(),
                    };
                    self.tell(core, event);
                }
            }
            Action::Aborted {
                reason,
                commit_sent,
            } => {
                core.figures.sends_aborted += 1;
                let message = core
                    .sending
                    .get(&id)
                    .map(|s| s.message.clone())
                    .unwrap_or_default();
                self.tell(
                    core,
                    Event::SenderAborted {
                        id,
                        reason,
                        message,
                        commit_sent,
                    },
                );
            }
            Action::Forget => {
                core.sending.remove(&id);
            }
        }
    }

    fn announce(&self, core: &mut Core, id: TransferId, first: u32, blocks: &[Announced]) {
        core.figures.sent_blocks += blocks.len() as u64;
        core.figures.sent_bytes += (blocks.len() * self.pool.block_bytes()) as u64;
        if let Some(sending) = core.sending.get_mut(&id) {
            sending.blocks += blocks.len() as u64;
        }
        let mut first = first;
        for part in blocks.chunks(ANNOUNCED_A_FRAME) {
            let frame = BlocksReady {
                transfer_id: id.0.to_vec().into(),
                first_block: first,
                slots: part.iter().map(|block| block.slot).collect(),
                slot_versions: part.iter().map(|block| block.version).collect(),
                checksums: part.iter().map(|block| block.checksum).collect(),
            };
            send_to_receiver(core, id, Frame::Ready(frame));
            first += part.len() as u32;
        }
    }

    fn pulled(&self, core: &mut Core, id: TransferId) {
        let Some(sending) = core.sending.get_mut(&id) else {
            return;
        };
        sending.since = Instant::now();
        let Some(pull) = sending.pull.clone() else {
            return;
        };
        let peer = sending.machine.peer();
        if pull.prefix.is_none() {
            let worker_id = peer
                .and_then(|peer| core.connections.get(&peer))
                .map(|connection| connection.peer_worker())
                .unwrap_or_default();
            let event = Event::Pulled {
                id,
                worker_id,
                from_token: pull.from_token,
                traceparent: pull.traceparent,
                request_id: pull.request_id,
            };
            self.tell(core, event);
        }
    }

    pub(crate) fn offer_prefix(
        &self,
        core: &mut Core,
        id: TransferId,
        kv_tokens: u32,
        blocks: Vec<(u32, u64)>,
    ) -> Result<(), Refused> {
        let gone = || Refused::new(Reason::Unknown, "the peer has gone");
        let awaited = core
            .sending
            .get(&id)
            .filter(|sending| sending.machine.awaited());
        let peer = awaited
            .and_then(|sending| sending.machine.peer())
            .ok_or_else(gone)?;
        let connection = core.connections.get(&peer).ok_or_else(gone)?;
        connection.send(Frame::PrefixFound(PrefixFound {
            transfer_id: id.0.to_vec().into(),
            tokens: kv_tokens,
        }));
        if kv_tokens == 0 {
            return self.sender_event(core, id, sender::Event::Cancel(Reason::Unknown));
        }
        let pins = blocks.len() as u64;
        self.sender_event(core, id, sender::Event::Offer)?;
        core.set_pins(id, pins);
        self.sender_event(core, id, sender::Event::Ready { first: 0, blocks })?;
        let tail = Tail {
            kv_tokens,
            ..Tail::default()
        };
        self.sender_event(
            core,
            id,
            sender::Event::Commit {
                tail,
                partial: None,
            },
        )
    }
}

fn send_to_receiver(core: &Core, id: TransferId, frame: Frame) {
    let peer = core
        .sending
        .get(&id)
        .and_then(|sending| sending.machine.peer());
    if let Some(connection) = peer.and_then(|peer| core.connections.get(&peer)) {
        connection.send(frame);
    }
}

fn commit_frame(id: TransferId, tail: Tail, partial: Option<(u32, Announced)>) -> Commit {
    Commit {
        transfer_id: id.0.to_vec().into(),
        kv_tokens: tail.kv_tokens,
        partial: partial.map(|(block, announced)| PartialBlock {
            block,
            slot: announced.slot,
            slot_version: announced.version,
            checksum: announced.checksum,
        }),
        output_ids: tail.output_ids,
        // Checked where they came in; what does not decode is left out.
        logprobs: tail
            .logprobs
            .into_iter()
            .filter_map(|bytes| TokenLogprobs::decode(bytes).ok())
            .collect(),
    }
}
