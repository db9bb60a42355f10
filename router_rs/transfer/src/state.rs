//! What a node knows: transfers, connections, timers and events that wait for
//! the engine. Only state; what to do with it is in `drive`.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use kvmesh_wire::v1::Pull;

use crate::{
    connection::Connection, event::Event, gate::Gate, id::TransferId, receiver::Receiver,
    sender::Sender, timer::Timer,
};

/// What a node holds now. All zero, but for `connections`, `mappings` and
/// `remembered`, when nothing runs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Residue {
    /// Transfers whose blocks are pinned here.
    pub sending: u64,
    /// Transfers that write into this pool.
    pub receiving: u64,
    /// Pulls that wait for their offer.
    pub awaited: u64,
    /// Pins of offers, as the engine counted them.
    pub pins: u64,
    /// Open connections.
    pub connections: u64,
    /// Peers' pools that are mapped.
    pub mappings: u64,
    /// Blocks that wait to be copied or hashed.
    pub jobs: u64,
    /// Aborted ids.
    pub remembered: u64,
}

/// Totals since a node started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Figures {
    /// Blocks announced to receivers, and their bytes.
    pub sent_blocks: u64,
    /// Their bytes.
    pub sent_bytes: u64,
    /// Bytes of them that went out by TCP.
    pub sent_tcp_bytes: u64,
    /// Blocks that arrived and were verified.
    pub received_blocks: u64,
    /// Their bytes.
    pub received_bytes: u64,
    /// Bytes copied out of peers' mappings.
    pub copied_bytes: u64,
    /// Transfers that a wrong version or checksum ended.
    pub mismatches: u64,
    /// Sends that ended well.
    pub sends_released: u64,
    /// Sends that did not.
    pub sends_aborted: u64,
    /// Receives that ended well.
    pub receives_committed: u64,
    /// Receives that did not.
    pub receives_failed: u64,
    /// Connections that ended since the two do not trust each other.
    pub untrusted: u64,
}

/// A transfer that this node sends.
pub(crate) struct Sending {
    pub(crate) machine: Sender,
    /// Whether the engine is told how far the receiver is.
    pub(crate) followed: bool,
    pub(crate) pins: u64,
    pub(crate) pull: Option<Pull>,
    pub(crate) since: Instant,
    pub(crate) blocks: u64,
    pub(crate) message: String,
}

/// A transfer that this node receives.
pub(crate) struct Receiving {
    pub(crate) machine: Receiver,
    pub(crate) connection: Arc<Connection>,
    pub(crate) gate: Arc<Gate>,
    pub(crate) pull: Pull,
    pub(crate) worker: String,
    pub(crate) incarnation: u64,
    pub(crate) from_block: u32,
    pub(crate) slots: Vec<u32>,
    pub(crate) since: Instant,
    pub(crate) committed: Option<Instant>,
    pub(crate) message: String,
}

/// A connection that this node made.
pub(crate) struct Outbound {
    pub(crate) connection: Arc<Connection>,
    pub(crate) open: bool,
    pub(crate) idle_since: Instant,
}

/// Timers that run, by transfer and by time.
#[derive(Default)]
pub(crate) struct Timers {
    at: BTreeMap<(TransferId, Timer), Instant>,
    due: BTreeSet<(Instant, TransferId, Timer)>,
}

impl Timers {
    /// True: it is the next one now.
    pub(crate) fn arm(&mut self, id: TransferId, timer: Timer, at: Instant) -> bool {
        self.disarm(id, timer);
        self.at.insert((id, timer), at);
        self.due.insert((at, id, timer));
        self.next() == Some(at)
    }

    pub(crate) fn disarm(&mut self, id: TransferId, timer: Timer) {
        if let Some(at) = self.at.remove(&(id, timer)) {
            self.due.remove(&(at, id, timer));
        }
    }

    pub(crate) fn next(&self) -> Option<Instant> {
        self.due.first().map(|(at, _, _)| *at)
    }

    pub(crate) fn fire(&mut self, now: Instant) -> Option<(TransferId, Timer)> {
        let (at, id, timer) = *self.due.first()?;
        if at > now {
            return None;
        }
        self.disarm(id, timer);
        Some((id, timer))
    }
}

/// Shortest time between two lines of the log about strangers.
const STRANGERS_TOLD: Duration = Duration::from_secs(10);

/// Those that came and never showed that they are of this cluster: whoever reaches the port
/// can be as many of them as it likes, so that not each is worth a line.
#[derive(Debug, Default)]
pub(crate) struct Strangers {
    told: Option<Instant>,
    since: u64,
}

impl Strangers {
    /// One more. Where it is time for a line: how many came since the last one, and were
    /// not told of.
    pub(crate) fn came(&mut self, now: Instant) -> Option<u64> {
        let early = |told: Instant| now.saturating_duration_since(told) < STRANGERS_TOLD;
        if self.told.is_some_and(early) {
            self.since += 1;
            return None;
        }
        self.told = Some(now);
        Some(std::mem::take(&mut self.since))
    }
}

/// All of it.
#[derive(Default)]
pub(crate) struct Core {
    pub(crate) sending: BTreeMap<TransferId, Sending>,
    pub(crate) receiving: BTreeMap<TransferId, Receiving>,
    pub(crate) connections: HashMap<u64, Arc<Connection>>,
    /// Those that we made, by address.
    pub(crate) outbound: HashMap<String, Outbound>,
    pub(crate) timers: Timers,
    pub(crate) figures: Figures,
    pub(crate) strangers: Strangers,
    events: VecDeque<Event>,
    woken: bool,
    next_connection: u64,
    closed: bool,
}

impl Core {
    pub(crate) fn new_connection(&mut self, inbound: bool) -> Arc<Connection> {
        self.next_connection += 1;
        let connection = Arc::new(Connection::new(self.next_connection, inbound));
        self.connections
            .insert(connection.number, Arc::clone(&connection));
        if self.closed {
            connection.close();
        }
        connection
    }

    /// Connections of peers that have said who they are.
    pub(crate) fn inbound(&self) -> usize {
        let all = self.connections.values();
        all.filter(|connection| connection.inbound && connection.greeted())
            .count()
    }

    /// Makes room for a peer that has yet to say who it is: beside as many as may be, that
    /// one is closed which has taken the longest. Its thread ends by itself.
    pub(crate) fn make_room(&mut self, most: usize) {
        let all = self.connections.values();
        let greeting = all.filter(|connection| connection.inbound && !connection.greeted());
        let numbers: Vec<u64> = greeting.map(|connection| connection.number).collect();
        if numbers.len() < most {
            return;
        }
        let oldest = numbers.into_iter().min();
        if let Some(oldest) = oldest.and_then(|oldest| self.connections.remove(&oldest)) {
            oldest.close();
        }
    }

    /// Queues an event. One that tells of progress replaces the one before it
    /// of the same transfer, so the queue is bounded by the transfers.
    pub(crate) fn push(&mut self, event: Event) {
        if let (
            Event::Verified { id, upto_block },
            Some(Event::Verified {
                id: last,
                upto_block: upto,
            }),
        ) = (&event, self.events.back_mut())
            && id == last
        {
            *upto = *upto_block;
            return;
        }
        self.events.push_back(event);
    }

    pub(crate) fn take_events(&mut self) -> Vec<Event> {
        self.events.drain(..).collect()
    }

    /// Whether a `wait` ends; uses up a `wake`.
    pub(crate) fn told(&mut self) -> bool {
        std::mem::take(&mut self.woken) || !self.events.is_empty()
    }

    pub(crate) fn wake(&mut self) {
        self.woken = true;
    }

    pub(crate) fn set_pins(&mut self, id: TransferId, pins: u64) {
        if let Some(sending) = self.sending.get_mut(&id) {
            sending.pins = pins;
        }
    }

    pub(crate) fn follow(&mut self, id: TransferId) {
        if let Some(sending) = self.sending.get_mut(&id) {
            sending.followed = true;
        }
    }

    pub(crate) fn sends(&self, id: TransferId) -> bool {
        self.sending
            .get(&id)
            .is_some_and(|s| s.machine.pinned() || s.machine.awaited())
    }

    pub(crate) fn receives(&self, id: TransferId) -> bool {
        self.receiving.contains_key(&id)
    }

    /// Keeps what is to be told with the end of a transfer.
    pub(crate) fn say(&mut self, id: TransferId, message: &str) {
        let message: String = message.chars().take(512).collect();
        if let Some(sending) = self.sending.get_mut(&id) {
            sending.message.clone_from(&message);
        }
        if let Some(receiving) = self.receiving.get_mut(&id) {
            receiving.message = message;
        }
    }

    /// Closes connections that we made and that serve nobody. Returns when
    /// the next one may be due.
    pub(crate) fn close_idle(&mut self, now: Instant, timeout: Duration) -> Option<Instant> {
        let mut busy = BTreeSet::new();
        busy.extend(self.receiving.values().map(|r| r.connection.number));
        let mut next: Option<Instant> = None;
        self.outbound.retain(|_, outbound| {
            if busy.contains(&outbound.connection.number) {
                outbound.idle_since = now;
            }
            let due = outbound.idle_since + timeout;
            if due <= now {
                outbound.connection.close();
                return false;
            }
            next = Some(next.map_or(due, |next| next.min(due)));
            true
        });
        next
    }

    pub(crate) fn close(&mut self) {
        self.closed = true;
        for connection in self.connections.values() {
            connection.close();
        }
    }

    pub(crate) fn residue(&self, jobs: usize) -> Residue {
        let mut residue = Residue {
            receiving: self.receiving.len() as u64,
            connections: self.connections.len() as u64,
            jobs: jobs as u64,
            ..Residue::default()
        };
        residue.mappings = self
            .connections
            .values()
            .filter(|c| c.pool.get().is_some())
            .count() as u64;
        for sending in self.sending.values() {
            if sending.machine.pinned() {
                residue.sending += 1;
                residue.pins += sending.pins;
            } else if sending.machine.awaited() {
                residue.awaited += 1;
            } else {
                residue.remembered += 1;
            }
        }
        residue
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strangers_have_one_line_in_a_while() {
        let (mut strangers, now) = (Strangers::default(), Instant::now());
        let after = |s| now + Duration::from_secs(s);
        assert_eq!(strangers.came(now), Some(0), "the first one at once");
        assert_eq!(strangers.came(after(1)), None);
        assert_eq!(strangers.came(after(9)), None);
        assert_eq!(strangers.came(after(10)), Some(2));
        assert_eq!(strangers.came(after(19)), None);
        assert_eq!(strangers.came(after(60)), Some(1));
    }
}
