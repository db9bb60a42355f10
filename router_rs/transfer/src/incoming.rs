//! What peers say: each frame becomes an event of a transfer.

use std::{io, sync::Arc};

use kvmesh_wire::v1::{BlockData, BlocksReady, Commit, FetchBlocks, Pull, transfer_frame::Frame};
use prost::Message;

use crate::{
    connection::{self, Connection, Fetched},
    drive::abort_frame,
    event::Event,
    id::{Reason, TransferId},
    node::Shared,
    peers::invalid,
    receiver::{self, Copied},
    sender::{self, Announced, Tail},
    socket::Socket,
};

impl Shared {
    /// A frame from a peer that receives from us.
    pub(crate) fn receiver_frame(
        &self,
        connection: &Arc<Connection>,
        frame: Frame,
    ) -> io::Result<()> {
        let peer = connection.number;
        match frame {
            Frame::Pull(pull) => self.on_pull(connection, pull),
            Frame::Fetch(fetch) => self.on_fetch(connection, &fetch),
            Frame::Released(released) => {
                self.on_sender(&released.transfer_id, sender::Event::Released(peer))
            }
            Frame::Progress(progress) => {
                let event = sender::Event::Progress(peer, progress.upto_block);
                self.on_sender(&progress.transfer_id, event)
            }
            Frame::Abort(abort) => {
                let id = transfer(&abort.transfer_id)?;
                let mut core = self.lock();
                let event = sender::Event::PeerAbort(peer, Reason::from_wire(abort.reason));
                core.say(id, &abort.message);
                // Too many ids to remember: then it is not remembered.
                let _ = self.sender_event(&mut core, id, event);
                Ok(())
            }
            Frame::Heartbeat(heartbeat) => {
                let mut core = self.lock();
                let mut known = Vec::new();
                for bytes in heartbeat.transfer_ids {
                    let id = transfer(&bytes)?;
                    if core.sends(id) {
                        let _ = self.sender_event(&mut core, id, sender::Event::Alive(peer));
                        known.push(bytes);
                    } else {
                        connection.send(abort_frame(id, Reason::Unknown, String::new()));
                    }
                }
                // The answer tells the receiver that we are still there.
                connection.send(Frame::Heartbeat(kvmesh_wire::v1::Heartbeat {
                    transfer_ids: known,
                }));
                Ok(())
            }
            _ => Err(invalid("a frame that receivers do not send")),
        }
    }

    fn on_sender(&self, id: &[u8], event: sender::Event) -> io::Result<()> {
        let id = transfer(id)?;
        let mut core = self.lock();
        if core.sending.contains_key(&id) {
            let _ = self.sender_event(&mut core, id, event);
        }
        Ok(())
    }

    fn on_pull(&self, connection: &Arc<Connection>, pull: Pull) -> io::Result<()> {
        let id = transfer(&pull.transfer_id)?;
        let mut core = self.lock();
        let kv = &self.settings.compatibility;
        let part = pull.first_layer > 0
            || pull.first_kv_head > 0
            || !(pull.layer_count == 0 || pull.layer_count == kv.layers)
            || !(pull.kv_head_count == 0 || pull.kv_head_count == kv.kv_heads)
            || !pull.from_token.is_multiple_of(self.settings.block_tokens);
        if part || connection.misfit.get().is_some() {
            let why = connection
                .misfit
                .get()
                .cloned()
                .unwrap_or("parts of a block".into());
            connection.send(abort_frame(id, Reason::Incompatible, why));
            let event = sender::Event::PeerAbort(connection.number, Reason::Incompatible);
            let _ = self.sender_event(&mut core, id, event);
            return Ok(());
        }
        let from_block = pull.from_token / self.settings.block_tokens;
        let event = sender::Event::Pull {
            peer: connection.number,
            from_block,
        };
        let known = core.sending.contains_key(&id);
        if let Some(sending) = core.sending.get_mut(&id)
            && sending.machine.peer().is_none()
        {
            sending.pull = Some(pull.clone());
        }
        if let Err(refused) = self.sender_event(&mut core, id, event) {
            connection.send(abort_frame(id, refused.reason, refused.message));
            return Ok(());
        }
        if known {
            return Ok(());
        }
        if let Some(sending) = core.sending.get_mut(&id) {
            sending.pull = Some(pull.clone());
        }
        if let Some(prefix) = pull.prefix {
            core.push(Event::PrefixWanted {
                id,
                worker_id: connection.peer_worker(),
                adapter: prefix.adapter,
                adapter_digest: prefix.adapter_digest,
                cache_salt: prefix.cache_salt,
                token_ids: prefix.token_ids,
                from_token: pull.from_token,
                traceparent: pull.traceparent,
                request_id: pull.request_id,
            });
            self.told.notify_all();
        }
        Ok(())
    }

    fn on_fetch(&self, connection: &Arc<Connection>, fetch: &FetchBlocks) -> io::Result<()> {
        let id = transfer(&fetch.transfer_id)?;
        if !(1..=64).contains(&fetch.count) {
            return Err(invalid("a fetch of 0 or more than 64 blocks"));
        }
        let mut core = self.lock();
        let blocks = core
            .sending
            .get(&id)
            .and_then(|s| {
                s.machine
                    .fetch(connection.number, fetch.first_block, fetch.count)
            })
            .unwrap_or_default();
        connection.send_blocks(Fetched {
            id,
            first: fetch.first_block,
            blocks,
        });
        if core.sending.contains_key(&id) {
            let _ = self.sender_event(&mut core, id, sender::Event::Alive(connection.number));
        }
        Ok(())
    }

    /// A frame from a peer that sends to us.
    pub(crate) fn sender_frame(
        &self,
        connection: &Arc<Connection>,
        socket: &Socket,
        frame: Frame,
    ) -> io::Result<()> {
        match frame {
            Frame::Ready(ready) => {
                let id = transfer(&ready.transfer_id)?;
                let event = announced(ready)?;
                self.on_receiver(connection, id, event);
            }
            Frame::Data(data) => self.on_data(connection, socket, &data)?,
            Frame::Commit(commit) => {
                let id = transfer(&commit.transfer_id)?;
                self.on_receiver(connection, id, committed(commit));
            }
            Frame::Abort(abort) => {
                let id = transfer(&abort.transfer_id)?;
                self.lock().say(id, &abort.message);
                let reason = Reason::from_wire(abort.reason);
                self.on_receiver(connection, id, receiver::Event::PeerAbort(reason));
            }
            Frame::Heartbeat(heartbeat) => {
                for id in heartbeat.transfer_ids {
                    self.on_receiver(connection, transfer(&id)?, receiver::Event::Alive);
                }
            }
            Frame::PrefixFound(found) => {
                let id = transfer(&found.transfer_id)?;
                let mut core = self.lock();
                if core
                    .receiving
                    .get(&id)
                    .is_some_and(|r| r.connection.number == connection.number)
                {
                    core.push(Event::PrefixFound {
                        id,
                        tokens: found.tokens,
                    });
                    self.told.notify_all();
                }
                drop(core);
                if found.tokens == 0 {
                    self.on_receiver(connection, id, receiver::Event::NoPrefix);
                }
            }
            _ => return Err(invalid("a frame that senders do not send")),
        }
        Ok(())
    }

    /// Only for a receive that goes over this connection: another peer has no say.
    fn on_receiver(&self, connection: &Connection, id: TransferId, event: receiver::Event) {
        let mut core = self.lock();
        if core
            .receiving
            .get(&id)
            .is_some_and(|r| r.connection.number == connection.number)
        {
            self.receiver_event(&mut core, id, event);
        }
    }

    /// Block bytes follow on the socket.
    fn on_data(
        &self,
        connection: &Connection,
        socket: &Socket,
        data: &BlockData,
    ) -> io::Result<()> {
        let id = transfer(&data.transfer_id)?;
        if data.count == 0 {
            self.on_receiver(connection, id, receiver::Event::Gone);
            return Ok(());
        }
        if data.count > 64 {
            return Err(invalid("more than 64 blocks in one piece"));
        }
        let core = self.lock();
        let wanted = core
            .receiving
            .get(&id)
            .filter(|r| r.connection.number == connection.number)
            .and_then(|r| {
                let start = data.first_block.checked_sub(r.from_block)? as usize;
                let slots = r.slots.get(start..start + data.count as usize)?;
                let targets: Result<Vec<_>, _> =
                    slots.iter().map(|s| self.pool.block(*s)).collect();
                Some((targets.ok()?, Arc::clone(&r.gate)))
            });
        drop(core);
        let block_bytes = self.pool.block_bytes();
        let Some((targets, gate)) = wanted else {
            return connection::discard(socket, data.count as usize * block_bytes);
        };
        let quiet = || self.quiet(&mut self.lock(), id, &gate);
        let checksums = connection::receive_blocks(socket, &targets, block_bytes, &gate, quiet)?;
        let copied = (data.first_block..)
            .zip(checksums)
            .map(|(block, checksum)| Copied {
                block,
                checksum,
                version: None,
            })
            .collect();
        self.copied(&mut self.lock(), id, &gate, copied);
        Ok(())
    }
}

fn transfer(bytes: &[u8]) -> io::Result<TransferId> {
    TransferId::parse(bytes).ok_or_else(|| invalid("a transfer id that is not 16 bytes"))
}

fn announced(ready: BlocksReady) -> io::Result<receiver::Event> {
    let count = ready.slots.len();
    if ready.slot_versions.len() != count || ready.checksums.len() != count {
        return Err(invalid("columns of unequal length"));
    }
    let sums = ready.slot_versions.into_iter().zip(ready.checksums);
    let blocks = ready
        .slots
        .into_iter()
        .zip(sums)
        .map(|(slot, (version, checksum))| Announced {
            slot,
            version,
            checksum,
        })
        .collect();
    Ok(receiver::Event::Announced {
        first: ready.first_block,
        blocks,
    })
}

fn committed(commit: Commit) -> receiver::Event {
    let partial = commit.partial.map(|last| {
        let announced = Announced {
            slot: last.slot,
            version: last.slot_version,
            checksum: last.checksum,
        };
        (last.block, announced)
    });
    let tail = Tail {
        kv_tokens: commit.kv_tokens,
        output_ids: commit.output_ids,
        logprobs: commit
            .logprobs
            .iter()
            .map(|l| l.encode_to_vec().into())
            .collect(),
    };
    receiver::Event::Commit { tail, partial }
}
