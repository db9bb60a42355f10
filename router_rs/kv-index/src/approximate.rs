//! What a worker without cache events is taken to hold: what was sent there.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasherDefault, DefaultHasher};

/// Units sent to one worker and when they are forgotten.
#[derive(Debug)]
pub(crate) struct Approximate {
    ttl_ms: u64,
    max_units: usize,
    expiry: HashMap<u64, u64, BuildHasherDefault<DefaultHasher>>,
    /// In order of expiry; an older date of a unit sent again stays here until
    /// its turn.
    order: VecDeque<(u64, u64)>,
}

impl Approximate {
    pub(crate) fn new(ttl_ms: u64, max_units: usize) -> Self {
        Self {
            ttl_ms,
            max_units,
            expiry: HashMap::default(),
            order: VecDeque::new(),
        }
    }

    /// Notes what was sent; appends what is forgotten for it.
    pub(crate) fn sent(&mut self, values: &[u64], now_ms: u64, forgotten: &mut Vec<u64>) {
        let expiry = now_ms.saturating_add(self.ttl_ms);
        // The end of a prompt first: it goes first where dates are equal.
        for &value in values.iter().rev() {
            self.expiry.insert(value, expiry);
            self.order.push_back((expiry, value));
        }
        while self.expiry.len() > self.max_units || self.order.len() > 4 * self.max_units.max(16) {
            self.pop(forgotten);
        }
    }

    /// Appends what is past its time.
    pub(crate) fn expire(&mut self, now_ms: u64, forgotten: &mut Vec<u64>) {
        while self
            .order
            .front()
            .is_some_and(|(expiry, _)| *expiry <= now_ms)
        {
            self.pop(forgotten);
        }
    }

    fn pop(&mut self, forgotten: &mut Vec<u64>) {
        if let Some((expiry, value)) = self.order.pop_front()
            && self.expiry.get(&value) == Some(&expiry)
        {
            self.expiry.remove(&value);
            forgotten.push(value);
        }
    }

    pub(crate) fn clear(&mut self) {
        self.expiry.clear();
        self.order.clear();
    }

    pub(crate) fn bytes(&self) -> usize {
        self.expiry.capacity() * 17 + self.order.capacity() * 16
    }
}
