//! The threads of a node: accepting, connecting, reading, copying, timers.

use std::{
    io::{self, Write},
    net::{TcpListener, TcpStream, ToSocketAddrs},
    os::unix::net::UnixListener,
    sync::{Arc, PoisonError, atomic::Ordering},
    time::{Duration, Instant},
};

use kvmesh_wire::v1::TransferHello;

use crate::{
    attach,
    connection::Connection,
    error::Untrusted,
    frame,
    gate::Gate,
    id::{Reason, TransferId},
    jobs::Job,
    node::Shared,
    receiver::{self, Copied},
    sender,
    state::Core,
};

pub(crate) fn invalid(message: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message.to_owned())
}

impl Shared {
    pub(crate) fn accept_loop(self: Arc<Self>, listener: &TcpListener) {
        while !self.is_closed() {
            let stream = match listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) => {
                    if self.is_closed() {
                        return;
                    }
                    // Out of descriptors, say: the next try must not spin.
                    tracing::warn!(%error, "transfer: accept failed");
                    self.pause(Duration::from_millis(50));
                    continue;
                }
            };
            let mut core = self.lock();
            if core.inbound() >= self.settings.max_connections {
                continue;
            }
            core.make_room(self.settings.max_greeting);
            let connection = core.new_connection(true);
            drop(core);
            let made = Arc::clone(&connection);
            let started = self.spawn("serve", move |shared| shared.inbound_loop(&made, stream));
            if started.is_err() {
                self.lock().connections.remove(&connection.number);
            }
        }
    }

    /// Waits, or less where the node closes.
    fn pause(&self, time: Duration) {
        let core = self.lock();
        drop(self.rearmed.wait_timeout(core, time));
    }

    pub(crate) fn attach_loop(self: Arc<Self>, listener: &UnixListener) {
        while !self.is_closed() {
            match listener.accept() {
                Ok((stream, _)) => {
                    if let Err(error) = attach::give(&stream, &self.pool) {
                        tracing::warn!(%error, "transfer: pool not given");
                    }
                }
                Err(_) if self.is_closed() => return,
                Err(error) => {
                    tracing::warn!(%error, "transfer: accept failed");
                    self.pause(Duration::from_millis(50));
                }
            }
        }
    }

    pub(crate) fn timer_loop(self: Arc<Self>) {
        let mut core = self.lock();
        while !self.is_closed() {
            let now = Instant::now();
            while let Some((id, timer)) = core.timers.fire(now) {
                if core.sending.contains_key(&id) {
                    // A timer's event is never refused.
                    let _ = self.sender_event(&mut core, id, sender::Event::Fired(timer));
                }
                self.receiver_event(&mut core, id, receiver::Event::Fired(timer));
            }
            let idle = core.close_idle(now, self.settings.idle_timeout);
            let next = match (core.timers.next(), idle) {
                (Some(a), Some(b)) => Some(a.min(b)),
                (a, b) => a.or(b),
            };
            core = match next {
                Some(next) => {
                    let left = next.saturating_duration_since(now);
                    let waited = self.rearmed.wait_timeout(core, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
                None => self
                    .rearmed
                    .wait(core)
                    .unwrap_or_else(PoisonError::into_inner),
            };
        }
    }

    pub(crate) fn job_loop(self: Arc<Self>) {
        while let Some(batch) = self.jobs.take(self.pool.block_bytes()) {
            let mut hashed = Vec::new();
            let mut copied = Vec::new();
            let mut owner = None;
            let mut last = None;
            for job in batch {
                match job {
                    Job::Hash { id, block, slot } => {
                        owner = Some(id);
                        // The slot was checked when it was announced.
                        if let Ok(checksum) = self.pool.checksum(slot) {
                            hashed.push((block, checksum));
                        }
                    }
                    Job::Copy {
                        id,
                        block,
                        slot,
                        target,
                        connection,
                        gate,
                    } => {
                        owner = Some(id);
                        copied.extend(self.copy_block(id, block, slot, target, &connection, &gate));
                        last = Some(gate);
                    }
                }
            }
            let Some(id) = owner else { continue };
            let mut core = self.lock();
            if !hashed.is_empty() && core.sending.contains_key(&id) {
                // Checksums are never refused.
                let _ = self.sender_event(&mut core, id, sender::Event::Hashed(hashed));
            }
            if let Some(gate) = last {
                self.copied(&mut core, id, &gate, copied);
            }
        }
    }

    fn copy_block(
        &self,
        id: TransferId,
        block: u32,
        slot: u32,
        target: u32,
        connection: &Connection,
        gate: &Arc<Gate>,
    ) -> Option<Copied> {
        let peer = connection.pool.get()?;
        if !gate.enter() {
            return None;
        }
        let result = peer.copy(slot, &self.pool, target);
        if gate.leave() {
            self.quiet(&mut self.lock(), id, gate);
        }
        let bytes = self.pool.block_bytes() as u64;
        self.copied_bytes.fetch_add(bytes, Ordering::Relaxed);
        Some(match result {
            Ok((checksum, version)) => Copied {
                block,
                checksum,
                version: Some(version),
            },
            // A slot that the peer does not have: no version is like it.
            Err(_) => Copied {
                block,
                checksum: 0,
                version: Some(u64::MAX),
            },
        })
    }

    pub(crate) fn copied(
        &self,
        core: &mut Core,
        id: TransferId,
        gate: &Arc<Gate>,
        copied: Vec<Copied>,
    ) {
        let same = |gate| {
            core.receiving
                .get(&id)
                .is_some_and(|r| Arc::ptr_eq(&r.gate, gate))
        };
        if !copied.is_empty() && same(gate) {
            self.receiver_event(core, id, receiver::Event::Taken(copied));
        }
    }

    pub(crate) fn inbound_loop(self: Arc<Self>, connection: &Arc<Connection>, stream: TcpStream) {
        let result = self.serve(connection, stream);
        self.lost(connection, result);
    }

    fn serve(self: &Arc<Self>, connection: &Arc<Connection>, stream: TcpStream) -> io::Result<()> {
        self.prepare(&stream)?;
        let Some(mut socket) = connection.attach(stream) else {
            return Ok(());
        };
        if let Err(error) = self.admit(connection, socket) {
            if let Some(untrusted) = Untrusted::of(&error) {
                self.turn_away(socket, untrusted);
            }
            return Err(error);
        }
        // Those that greet do not count before.
        if self.lock().inbound() > self.settings.max_connections {
            return Err(invalid("too many connections"));
        }
        // Ahead of whatever is queued.
        socket.write_all(&frame::encode(self.hello()))?;
        self.start_writer(connection)?;
        socket.unlimited()?;
        loop {
            if let Some(frame) = frame::read(socket)? {
                self.receiver_frame(connection, frame)?;
            }
        }
    }

    fn start_writer(self: &Arc<Self>, connection: &Arc<Connection>) -> io::Result<()> {
        let connection = Arc::clone(connection);
        self.spawn("write", move |shared| {
            connection.write_loop(&shared.pool, &shared.sent_bytes)
        })
    }

    pub(crate) fn outbound_loop(self: Arc<Self>, connection: &Arc<Connection>, address: &str) {
        let result = self.reach(connection, address);
        self.lost(connection, result);
    }

    fn reach(self: &Arc<Self>, connection: &Arc<Connection>, address: &str) -> io::Result<()> {
        let mut last = invalid("the address names no host");
        let mut reached = None;
        for to in address.to_socket_addrs()? {
            match TcpStream::connect_timeout(&to, self.settings.connect_timeout) {
                Ok(stream) => {
                    reached = Some(stream);
                    break;
                }
                Err(error) => last = error,
            }
        }
        let stream = reached.ok_or(last)?;
        self.prepare(&stream)?;
        let Some(mut socket) = connection.attach(stream) else {
            return Ok(());
        };
        self.secure(socket)?;
        socket.write_all(&frame::encode(self.hello()))?;
        // What is queued waits until the peer has said who it is: an abort may be there.
        self.meet(connection, socket, &[])?;
        self.start_writer(connection)?;
        if let Some(hello) = connection.hello.get() {
            self.map_peer(connection, hello);
        }
        socket.unlimited()?;
        let mut core = self.lock();
        if let Some(outbound) = core.outbound.get_mut(address) {
            outbound.open = true;
        }
        for id in received_over(&core, connection) {
            self.opened(&mut core, id);
        }
        drop(core);
        loop {
            if let Some(frame) = frame::read(socket)? {
                self.sender_frame(connection, socket, frame)?;
            }
        }
    }

    /// Opens the sender's pool. That it can be opened is the proof of one host.
    fn map_peer(&self, connection: &Connection, hello: &TransferHello) {
        let fits = connection.misfit.get().is_none();
        if !self.settings.shared_memory || hello.shared_memory_name.is_empty() || !fits {
            return;
        }
        match attach::take(
            &hello.shared_memory_name,
            hello.pool_blocks,
            hello.block_bytes,
        ) {
            Ok(pool) => drop(connection.pool.set(pool)),
            Err(error) => tracing::info!(
                %error, peer = hello.worker_id, "transfer: no shared memory, blocks go by TCP"
            ),
        }
    }

    /// The connection is over: so is what went over it.
    fn lost(&self, connection: &Arc<Connection>, result: io::Result<()>) {
        connection.close();
        let error = result.err();
        let untrusted = error.as_ref().and_then(Untrusted::of);
        let stranger = connection.inbound && untrusted.is_some_and(Untrusted::is_of_a_stranger);
        let untrusted = untrusted.is_some();
        let why = error.map(|error| error.to_string()).unwrap_or_default();
        let untold = stranger.then(|| self.lock().strangers.came(Instant::now()));
        match (untrusted, untold) {
            (_, Some(Some(untold))) => {
                tracing::warn!(event = "transfer_stranger", untold, error = why);
            }
            (true, None) => {
                let inbound = connection.inbound;
                tracing::warn!(event = "transfer_untrusted", inbound, error = why);
            }
            (_, Some(None)) | (false, None) => {}
        }
        let mut core = self.lock();
        core.figures.untrusted += u64::from(untrusted);
        core.connections.remove(&connection.number);
        core.outbound
            .retain(|_, outbound| outbound.connection.number != connection.number);
        for id in received_over(&core, connection) {
            core.say(id, &why);
            let event = match untrusted {
                true => receiver::Event::Cancel(Reason::Untrusted),
                false => receiver::Event::PeerLost,
            };
            self.receiver_event(&mut core, id, event);
        }
        let sent: Vec<TransferId> = core.sending.keys().copied().collect();
        for id in sent {
            let ours =
                core.sending.get(&id).and_then(|s| s.machine.peer()) == Some(connection.number);
            if ours {
                core.say(id, &why);
                // A loss is never refused.
                let _ =
                    self.sender_event(&mut core, id, sender::Event::PeerLost(connection.number));
            }
        }
        // Whoever waits for a free descriptor or for the end may look again.
        self.rearmed.notify_all();
    }
}

/// Receives that go over a connection.
fn received_over(core: &Core, connection: &Connection) -> Vec<TransferId> {
    let over = core
        .receiving
        .iter()
        .filter(|(_, r)| r.connection.number == connection.number);
    over.map(|(id, _)| *id).collect()
}
