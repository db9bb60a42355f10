//! Requests that wait in the router.
//!
//! Between classes the most urgent request's virtual deadline decides; within a
//! class tenants take turns ([`crate::fair`]), each with its most urgent one.
//! With one tenant that is: earliest virtual deadline first.

use crate::fair::{Fair, Order};
use crate::request::{Class, PerClass};
use std::cmp::Ordering;
use std::collections::BTreeMap;

/// How a queue serves.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct QueueSettings {
    /// Most requests.
    pub limit: usize,
    /// What a tenant's account grows by at each visit, in ms of predicted work.
    pub quantum_ms: f64,
    /// Batch requests go only where no others wait.
    pub batch_strict: bool,
}

impl Default for QueueSettings {
    fn default() -> Self {
        Self {
            limit: 4_096,
            quantum_ms: 100.0,
            batch_strict: false,
        }
    }
}

/// Whose a request is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Lane {
    /// Its class.
    pub class: Class,
    /// Its tenant, as a hash: of the key, or of the client's address.
    pub tenant: u64,
}

/// Requests that wait, bounded. See the module's beginning for the order.
#[derive(Debug, Clone)]
pub struct Queue<T> {
    items: BTreeMap<Key, Entry<T>>,
    classes: PerClass<Fair>,
    settings: QueueSettings,
    next: u64,
    /// Predicted work by class, ms.
    work_ms: PerClass<f64>,
}

#[derive(Debug, Clone)]
struct Entry<T> {
    lane: Lane,
    work_ms: f64,
    /// `None` while it is taken.
    item: Option<T>,
}

/// Virtual deadline, then arrival.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Key {
    deadline_ms: f64,
    number: u64,
}

impl Key {
    #[cfg(test)]
    pub(crate) fn new(deadline_ms: f64, number: u64) -> Self {
        Self {
            deadline_ms,
            number,
        }
    }

    pub(crate) fn deadline_ms(&self) -> f64 {
        self.deadline_ms
    }
}

impl Ord for Key {
    fn cmp(&self, other: &Self) -> Ordering {
        self.deadline_ms
            .total_cmp(&other.deadline_ms)
            .then(self.number.cmp(&other.number))
    }
}

impl PartialOrd for Key {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Key {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Key {}

/// A place in a [`Queue`]: what takes an item out again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ticket(Key);

impl Ticket {
    /// The item's virtual deadline, ms.
    pub fn virtual_deadline_ms(&self) -> f64 {
        self.0.deadline_ms
    }

    pub(crate) fn key(self) -> Key {
        self.0
    }
}

impl<T> Queue<T> {
    /// An empty queue of at most `limit` items.
    pub fn new(limit: usize) -> Self {
        Self::with_settings(QueueSettings {
            limit,
            ..QueueSettings::default()
        })
    }

    /// An empty queue.
    pub fn with_settings(settings: QueueSettings) -> Self {
        Self {
            items: BTreeMap::new(),
            classes: Default::default(),
            settings,
            next: 0,
            work_ms: [0.0; 3],
        }
    }

    /// Puts an item in, of one and the same class and tenant as all that come
    /// this way; `work_ms` is its predicted work.
    ///
    /// # Errors
    /// The item, where the queue is full.
    pub fn push(&mut self, deadline_ms: f64, work_ms: f64, item: T) -> Result<Ticket, T> {
        self.push_for(Lane::default(), deadline_ms, work_ms, item)
    }

    /// Puts an item of a class and tenant in; `work_ms` is its predicted work.
    ///
    /// # Errors
    /// The item, where the queue is full.
    pub fn push_for(
        &mut self,
        lane: Lane,
        deadline_ms: f64,
        work_ms: f64,
        item: T,
    ) -> Result<Ticket, T> {
        if self.items.len() >= self.settings.limit {
            return Err(item);
        }
        let key = Key {
            deadline_ms,
            number: self.next,
        };
        self.next += 1;
        self.work_ms[lane.class.index()] += work_ms;
        self.classes[lane.class.index()].insert(lane.tenant, key, work_ms);
        let item = Some(item);
        self.items.insert(
            key,
            Entry {
                lane,
                work_ms,
                item,
            },
        );
        Ok(Ticket(key))
    }

    /// Takes an item out that is not to be served: its client is gone.
    pub fn remove(&mut self, ticket: Ticket) -> Option<T> {
        let entry = self.items.remove(&ticket.0)?;
        self.classes[entry.lane.class.index()].remove(entry.lane.tenant, ticket.0);
        self.forget(&entry);
        entry.item
    }

    /// Takes an item to see whether it can be served. Its place is kept:
    /// [`Queue::put_back`], [`Queue::serve`] or [`Queue::remove`] follows.
    pub fn take(&mut self, ticket: Ticket) -> Option<T> {
        self.items.get_mut(&ticket.0)?.item.take()
    }

    /// An item that is not taken.
    pub fn get(&self, ticket: Ticket) -> Option<&T> {
        self.items.get(&ticket.0)?.item.as_ref()
    }

    /// Puts a taken item back to its place.
    pub fn put_back(&mut self, ticket: Ticket, item: T) {
        if let Some(entry) = self.items.get_mut(&ticket.0) {
            entry.item = Some(item);
        }
    }

    /// Serves an item, taken or not: its tenant pays for it.
    pub fn serve(&mut self, ticket: Ticket) -> Option<T> {
        let entry = self.items.get(&ticket.0)?;
        let quantum = self.settings.quantum_ms;
        let class = &mut self.classes[entry.lane.class.index()];
        class.charge(entry.lane.tenant, entry.work_ms, quantum);
        self.remove(ticket)
    }

    /// The first item in the order of service.
    pub fn first(&self) -> Option<(Ticket, &T)> {
        let ticket = self.order(1).pop()?;
        let item = self.items.get(&ticket.0)?.item.as_ref()?;
        Some((ticket, item))
    }

    /// Serves the first item.
    pub fn pop(&mut self) -> Option<T> {
        let ticket = self.order(1).pop()?;
        self.serve(ticket)
    }

    /// The first `most` items in the order of service; those that are taken
    /// are left out.
    pub fn order(&self, most: usize) -> Vec<Ticket> {
        let last = |class| usize::from(self.settings.batch_strict && class == Class::Batch);
        self.order_by(most, last)
    }

    /// The same where a more urgent class goes before all others, whatever the
    /// keys.
    pub(crate) fn order_by_class(&self, most: usize) -> Vec<Ticket> {
        self.order_by(most, Class::index)
    }

    /// The first `most`: of the lowest rank that waits, the most urgent.
    fn order_by(&self, most: usize, rank: impl Fn(Class) -> usize) -> Vec<Ticket> {
        let quantum = self.settings.quantum_ms;
        let mut classes: Vec<(Class, Order<'_>)> = Class::ALL
            .into_iter()
            .map(|class| (class, self.classes[class.index()].order(quantum)))
            .collect();
        let mut order = Vec::with_capacity(most.min(self.items.len()));
        while order.len() < most {
            let urgent = classes
                .iter_mut()
                .enumerate()
                .filter_map(|(at, (class, of))| Some((rank(*class), of.most_urgent()?, at)));
            let Some((_, _, at)) = urgent.min() else {
                break;
            };
            let Some(key) = classes[at].1.next() else {
                break;
            };
            if self
                .items
                .get(&key)
                .is_some_and(|entry| entry.item.is_some())
            {
                order.push(Ticket(key));
            }
        }
        order
    }

    /// All items that are not taken, earliest virtual deadline first.
    pub fn iter(&self) -> impl Iterator<Item = (Ticket, &T)> {
        self.items
            .iter()
            .filter_map(|(key, entry)| Some((Ticket(*key), entry.item.as_ref()?)))
    }

    /// Predicted work of all, in ms.
    pub fn work_ms(&self) -> f64 {
        self.work_ms.iter().sum()
    }

    /// How many wait, those that are taken included.
    pub fn len(&self) -> usize {
        self.items.len()
    }

    /// Whether nobody waits.
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    fn forget(&mut self, entry: &Entry<T>) {
        // Sums of floats drift; an empty queue holds no work.
        if self.items.is_empty() {
            self.work_ms = [0.0; 3];
        } else {
            let class = &mut self.work_ms[entry.lane.class.index()];
            *class = (*class - entry.work_ms).max(0.0);
        }
    }
}
