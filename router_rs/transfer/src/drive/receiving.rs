//! The side that wants the blocks.

use std::{sync::Arc, time::Instant};

use kvmesh_wire::v1::{FetchBlocks, Heartbeat, Progress, Pull, Released, transfer_frame::Frame};
use prost::Message;

use super::abort_frame;
use crate::{
    error::Refused,
    event::Event,
    gate::Gate,
    id::{Reason, TransferId},
    jobs::Job,
    node::{PullRequest, Shared},
    receiver::{self, Receiver},
    sender::Announced,
    state::{Core, Outbound, Receiving},
};

/// Bytes asked for in one fetch: progress is told in such steps.
const FETCH_BYTES: usize = 4 << 20;

impl Shared {
    /// Begins a receive, over the connection that there is or a new one.
    pub(crate) fn pull(self: &Arc<Self>, request: PullRequest) -> Result<(), Refused> {
        let block_tokens = self.settings.block_tokens;
        let refuse = |message: String| Err(Refused::new(Reason::Failed, message));
        if !request.from_token.is_multiple_of(block_tokens) {
            return refuse(format!(
                "from_token {} is inside a block",
                request.from_token
            ));
        }
        let blocks = self.pool.blocks();
        if let Some(slot) = request.slots.iter().find(|slot| **slot >= blocks) {
            return refuse(format!("slot {slot} of a pool of {blocks}"));
        }
        let from_block = request.from_token / block_tokens;
        let machine = u32::try_from(request.slots.len())
            .ok()
            .and_then(|slots| Receiver::new(block_tokens, from_block, slots));
        let Some(machine) = machine else {
            return refuse("too many slots".into());
        };
        let id = request.id;
        let pull = Pull {
            transfer_id: id.0.to_vec().into(),
            from_token: request.from_token,
            prefix: request.prefix,
            traceparent: request.traceparent,
            request_id: request.request_id,
            ..Pull::default()
        };
        if pull.encoded_len() > crate::frame::MAX_FRAME - 1024 {
            return refuse("a pull of more than 1 MiB".into());
        }
        let mut core = self.lock();
        if self.is_closed() || core.receiving.contains_key(&id) {
            return refuse("it is pulled already".into());
        }
        if core.receiving.len() >= self.settings.max_transfers {
            return refuse("too many transfers".into());
        }
        let (connection, open) = match core.outbound.get(&request.address) {
            Some(outbound) => (Arc::clone(&outbound.connection), outbound.open),
            None => (self.connect(&mut core, &request.address)?, false),
        };
        core.receiving.insert(
            id,
            Receiving {
                machine,
                connection,
                gate: Arc::default(),
                pull,
                worker: request.worker,
                incarnation: request.incarnation,
                from_block,
                slots: request.slots,
                since: Instant::now(),
                committed: None,
                message: String::new(),
            },
        );
        if open {
            self.opened(&mut core, id);
        }
        Ok(())
    }

    fn connect(
        self: &Arc<Self>,
        core: &mut Core,
        address: &str,
    ) -> Result<Arc<crate::connection::Connection>, Refused> {
        let connection = core.new_connection(false);
        let (made, to) = (Arc::clone(&connection), address.to_owned());
        self.spawn("pull", move |shared| shared.outbound_loop(&made, &to))
            .map_err(|error| {
                core.connections.remove(&connection.number);
                Refused::new(Reason::Failed, format!("no thread: {error}"))
            })?;
        core.outbound.insert(
            address.to_owned(),
            Outbound {
                connection: Arc::clone(&connection),
                open: false,
                idle_since: Instant::now(),
            },
        );
        // Idle connections are looked for by the timers' thread.
        self.rearmed.notify_all();
        Ok(connection)
    }

    /// The connection of a receive is there: is it to whom was named?
    pub(crate) fn opened(&self, core: &mut Core, id: TransferId) {
        let Some(receiving) = core.receiving.get(&id) else {
            return;
        };
        let connection = &receiving.connection;
        let found = connection
            .hello
            .get()
            .map(|hello| (hello.worker_id.as_str(), hello.incarnation));
        let event = if let Some(misfit) = connection.misfit.get() {
            let misfit = misfit.clone();
            core.say(id, &misfit);
            receiver::Event::Cancel(Reason::Incompatible)
        } else if found != Some((receiving.worker.as_str(), receiving.incarnation)) {
            core.say(id, "another worker or incarnation answers at this address");
            receiver::Event::Cancel(Reason::Unknown)
        } else {
            receiver::Event::Opened
        };
        self.receiver_event(core, id, event);
    }

    /// Something happened to a transfer on the receiver's side.
    pub(crate) fn receiver_event(&self, core: &mut Core, id: TransferId, event: receiver::Event) {
        let Some(receiving) = core.receiving.get_mut(&id) else {
            return;
        };
        if matches!(event, receiver::Event::Commit { .. }) {
            receiving.committed = Some(Instant::now());
        }
        let mut actions = std::collections::VecDeque::from(receiving.machine.step(event));
        while let Some(action) = actions.pop_front() {
            let Some(receiving) = core.receiving.get_mut(&id) else {
                break;
            };
            // `Quiet` at once where no write is under way.
            if action == receiver::Action::StopWrites {
                if receiving.gate.close() {
                    actions.extend(receiving.machine.step(receiver::Event::Quiet));
                }
            } else {
                self.receiver_action(core, id, action);
            }
        }
        if core
            .receiving
            .get(&id)
            .is_some_and(|receiving| receiving.machine.over())
        {
            let number = core
                .receiving
                .remove(&id)
                .map(|receiving| receiving.connection.number);
            let mut outbound = core.outbound.values_mut();
            if let Some(idle) = outbound.find(|o| Some(o.connection.number) == number) {
                idle.idle_since = Instant::now();
            }
        }
    }

    fn receiver_action(&self, core: &mut Core, id: TransferId, action: receiver::Action) {
        use receiver::Action;
        let Some(receiving) = core.receiving.get(&id) else {
            return;
        };
        let connection = &receiving.connection;
        match action {
            Action::Arm(timer) => self.arm(core, id, timer),
            Action::Disarm(timer) => core.timers.disarm(id, timer),
            Action::SendPull => connection.send(Frame::Pull(receiving.pull.clone())),
            Action::SendHeartbeat => connection.send(Frame::Heartbeat(Heartbeat {
                transfer_ids: vec![id.0.to_vec().into()],
            })),
            Action::SendProgress(upto_block) => connection.send(Frame::Progress(Progress {
                transfer_id: id.0.to_vec().into(),
                upto_block,
            })),
            Action::SendReleased => {
                connection.send(Frame::Released(Released {
                    transfer_id: id.0.to_vec().into(),
                }));
            }
            Action::SendAbort(reason) => {
                connection.send(abort_frame(id, reason, receiving.message.clone()));
            }
            Action::Take { first, blocks } => self.take(receiving, id, first, &blocks),
            Action::StopWrites => {}
            Action::Verified(upto_block) => self.tell(core, Event::Verified { id, upto_block }),
            Action::Committed(tail) => {
                let blocks = tail.kv_tokens.div_ceil(self.settings.block_tokens);
                let blocks = u64::from(blocks.saturating_sub(receiving.from_block));
                let bytes = blocks * self.pool.block_bytes() as u64;
                let event = Event::Committed {
                    id,
                    kv_tokens: tail.kv_tokens,
                    output_ids: tail.output_ids,
                    logprobs: tail.logprobs,
                    blocks,
                    bytes,
                    seconds: receiving.since.elapsed().as_secs_f64(),
                    tail_seconds: receiving
                        .committed
                        .map_or(0.0, |at| at.elapsed().as_secs_f64()),
                    shared_memory: connection.pool.get().is_some(),
                    at: Instant::now(),
                };
                core.figures.receives_committed += 1;
                core.figures.received_blocks += blocks;
                core.figures.received_bytes += bytes;
                self.tell(core, event);
            }
            Action::Failed { reason, verified } => {
                let event = Event::ReceiveFailed {
                    id,
                    reason,
                    message: receiving.message.clone(),
                    verified_blocks: verified,
                    seconds: receiving.since.elapsed().as_secs_f64(),
                    at: Instant::now(),
                };
                core.figures.receives_failed += 1;
                core.figures.mismatches += u64::from(reason == Reason::Mismatch);
                self.tell(core, event);
            }
        }
    }

    /// Starts the copy of blocks, by whichever way there is.
    fn take(&self, receiving: &Receiving, id: TransferId, first: u32, blocks: &[Announced]) {
        let connection = &receiving.connection;
        if connection.pool.get().is_some() {
            let start = (first - receiving.from_block) as usize;
            let targets = receiving.slots[start..].iter();
            self.jobs.push(
                (first..)
                    .zip(blocks)
                    .zip(targets)
                    .map(|((block, from), target)| Job::Copy {
                        id,
                        block,
                        slot: from.slot,
                        target: *target,
                        connection: Arc::clone(connection),
                        gate: Arc::clone(&receiving.gate),
                    }),
            );
            return;
        }
        let at_once = (FETCH_BYTES / self.pool.block_bytes()).clamp(1, 64);
        let mut first = first;
        for part in blocks.chunks(at_once) {
            connection.send(Frame::Fetch(FetchBlocks {
                transfer_id: id.0.to_vec().into(),
                first_block: first,
                count: part.len() as u32,
            }));
            first += part.len() as u32;
        }
    }

    /// A write ended that was the last behind a closed gate.
    pub(crate) fn quiet(&self, core: &mut Core, id: TransferId, gate: &Arc<Gate>) {
        // A later transfer may have the same id, but never the same gate.
        if core
            .receiving
            .get(&id)
            .is_some_and(|receiving| Arc::ptr_eq(&receiving.gate, gate))
        {
            self.receiver_event(core, id, receiver::Event::Quiet);
        }
    }
}
