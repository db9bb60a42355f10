//! Requests that wait in the router, in the order of their virtual deadlines.

use std::cmp::Ordering;
use std::collections::BTreeMap;

/// A queue ordered by virtual deadline, earliest first; equal ones in the
/// order in which they came. Bounded.
#[derive(Debug, Clone)]
pub struct Queue<T> {
    items: BTreeMap<Key, (f64, T)>,
    next: u64,
    limit: usize,
    work_ms: f64,
}

#[derive(Debug, Clone, Copy)]
struct Key {
    deadline_ms: f64,
    number: u64,
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
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ticket(Key);

impl<T> Queue<T> {
    /// An empty queue of at most `limit` items.
    pub fn new(limit: usize) -> Self {
        Self {
            items: BTreeMap::new(),
            next: 0,
            limit,
            work_ms: 0.0,
        }
    }

    /// Puts an item in; `work_ms` is its predicted work. Gives it back where
    /// the queue is full.
    ///
    /// # Errors
    /// The item, where the queue is full.
    pub fn push(&mut self, deadline_ms: f64, work_ms: f64, item: T) -> Result<Ticket, T> {
        if self.items.len() >= self.limit {
            return Err(item);
        }
        let key = Key {
            deadline_ms,
            number: self.next,
        };
        self.next += 1;
        self.work_ms += work_ms;
        self.items.insert(key, (work_ms, item));
        Ok(Ticket(key))
    }

    /// Takes an item out: its client is gone, or it is dispatched.
    pub fn remove(&mut self, ticket: Ticket) -> Option<T> {
        let (work_ms, item) = self.items.remove(&ticket.0)?;
        self.forget(work_ms);
        Some(item)
    }

    /// The first item.
    pub fn first(&self) -> Option<(Ticket, &T)> {
        self.items
            .first_key_value()
            .map(|(key, (_, item))| (Ticket(*key), item))
    }

    /// All items in order.
    pub fn iter(&self) -> impl Iterator<Item = (Ticket, &T)> {
        self.items
            .iter()
            .map(|(key, (_, item))| (Ticket(*key), item))
    }

    /// Takes the first item out.
    pub fn pop(&mut self) -> Option<T> {
        let (_, (work_ms, item)) = self.items.pop_first()?;
        self.forget(work_ms);
        Some(item)
    }

    /// Predicted work of all that would go before a request with this
    /// deadline, in ms.
    pub fn work_before_ms(&self, deadline_ms: f64) -> f64 {
        self.items
            .iter()
            .take_while(|(key, _)| key.deadline_ms <= deadline_ms)
            .map(|(_, (work, _))| work)
            .sum()
    }

    /// Predicted work of all, in ms.
    pub fn work_ms(&self) -> f64 {
        self.work_ms
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.items.len()
    }

    /// Whether nobody waits.
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    fn forget(&mut self, work_ms: f64) {
        // Sums of floats drift; an empty queue holds no work.
        self.work_ms = if self.items.is_empty() {
            0.0
        } else {
            self.work_ms - work_ms
        };
    }
}
