//! Fair share of one class's tenants: deficit round-robin (M. Shreedhar and
//! G. Varghese, 1995), counted in predicted milliseconds.
//!
//! Tenants stand in a ring. At each visit a tenant's account grows by a
//! quantum, and its requests go, most urgent first, as long as the account pays
//! for them. Of two tenants that always have requests waiting, neither gets
//! more than `quantum + 2 x longest request` ahead of the other.

use crate::queue::Key;
use std::collections::{BTreeMap, BTreeSet, btree_map};
use std::iter::{Chain, Peekable};

/// The requests of one class that wait.
#[derive(Debug, Clone, Default)]
pub(crate) struct Fair {
    /// All of them, most urgent first.
    keys: BTreeSet<Key>,
    tenants: BTreeMap<u64, Tenant>,
    /// Tenant whose turn it is, or the first one after it.
    turn: u64,
    /// Whether its account has grown in this visit.
    paid: bool,
}

#[derive(Debug, Clone, Default)]
struct Tenant {
    /// Predicted work by key, ms.
    keys: BTreeMap<Key, f64>,
    /// What it may spend, ms.
    account: f64,
}

impl Tenant {
    /// Whoever could not be served for want of room does not save up for ever.
    fn grow(&mut self, by: f64) {
        let next = self.keys.first_key_value().map_or(0.0, |(_, work)| *work);
        self.account = (self.account + by).min(by.max(next));
    }
}

impl Fair {
    pub(crate) fn insert(&mut self, tenant: u64, key: Key, work_ms: f64) {
        self.keys.insert(key);
        let tenant = self.tenants.entry(tenant).or_default();
        tenant.keys.insert(key, work_ms);
    }

    pub(crate) fn remove(&mut self, tenant: u64, key: Key) {
        self.keys.remove(&key);
        if let Some(of) = self.tenants.get_mut(&tenant) {
            of.keys.remove(&key);
            if of.keys.is_empty() {
                self.tenants.remove(&tenant);
                if self.turn == tenant {
                    self.turn = tenant.wrapping_add(1);
                    self.paid = false;
                }
            }
        }
    }

    /// A request of this tenant goes, and is paid for: the turn comes to it.
    pub(crate) fn charge(&mut self, tenant: u64, work_ms: f64, quantum_ms: f64) {
        if self.tenants.len() < 2 || !self.tenants.contains_key(&tenant) {
            return;
        }
        let (turn, paid) = (self.turn, self.paid);
        // Those between the turn and the tenant are passed.
        let distance = |id: u64| id.wrapping_sub(turn);
        let goal = distance(tenant);
        for (id, of) in &mut self.tenants {
            let had = paid && *id == turn;
            if distance(*id) < goal && !had {
                of.grow(quantum_ms);
            }
        }
        let had = paid && tenant == turn;
        let account = &mut self.tenants.entry(tenant).or_default().account;
        *account += if had { 0.0 } else { quantum_ms };
        let rounds = ((work_ms - *account) / quantum_ms).ceil().max(0.0);
        *account += rounds * quantum_ms - work_ms;
        if rounds > 0.0 {
            for (id, of) in &mut self.tenants {
                if *id != tenant {
                    of.grow(rounds * quantum_ms);
                }
            }
        }
        (self.turn, self.paid) = (tenant, true);
    }

    /// The order in which they would go from now on. Costs what is read of it:
    /// tenants are looked at when their turn comes.
    pub(crate) fn order(&self, quantum_ms: f64) -> Order<'_> {
        let ring = self.tenants.range(self.turn..);
        Order {
            urgent: self.keys.iter().peekable(),
            gone: BTreeSet::new(),
            ring: ring.chain(self.tenants.range(..self.turn)),
            coming: self.tenants.len(),
            had: self.paid.then_some(self.turn),
            visits: Vec::new(),
            at: 0,
            in_vain: 0,
            quantum_ms,
        }
    }
}

type Tenants<'a> = btree_map::Range<'a, u64, Tenant>;

/// Requests of a class in the order of their service.
pub(crate) struct Order<'a> {
    urgent: Peekable<std::collections::btree_set::Iter<'a, Key>>,
    /// Those that went before more urgent ones.
    gone: BTreeSet<Key>,
    /// Tenants whose first turn is still to come, and how many.
    ring: Chain<Tenants<'a>, Tenants<'a>>,
    coming: usize,
    /// The tenant whose account has grown in this visit.
    had: Option<u64>,
    /// Tenants that had a turn and have requests left.
    visits: Vec<Visit<'a>>,
    at: usize,
    /// Visits in a row at which nobody went.
    in_vain: usize,
    quantum_ms: f64,
}

struct Visit<'a> {
    keys: Peekable<btree_map::Iter<'a, Key, f64>>,
    account: f64,
    paid: bool,
}

impl Order<'_> {
    /// The most urgent one that has not gone.
    pub(crate) fn most_urgent(&mut self) -> Option<Key> {
        while let Some(key) = self.urgent.peek() {
            if !self.gone.remove(*key) {
                return Some(**key);
            }
            self.urgent.next();
        }
        None
    }
}

impl Iterator for Order<'_> {
    type Item = Key;

    fn next(&mut self) -> Option<Key> {
        let alone = self.visits.len() + self.coming == 1;
        loop {
            if self.at >= self.visits.len() {
                self.turn();
            }
            let visit = self.visits.get_mut(self.at)?;
            let Some((_, work)) = visit.keys.peek() else {
                self.visits.remove(self.at);
                continue;
            };
            if !visit.paid {
                visit.account += self.quantum_ms;
                visit.paid = true;
            }
            if alone || **work <= visit.account {
                visit.account -= **work;
                self.in_vain = 0;
                let (key, _) = visit.keys.next()?;
                self.gone.insert(*key);
                return Some(*key);
            }
            visit.paid = false;
            self.at += 1;
            self.in_vain += 1;
            if self.coming == 0 && self.in_vain >= self.visits.len() {
                self.skip_rounds();
            }
        }
    }
}

impl Order<'_> {
    /// The turn comes to the next tenant, or to the first one again.
    fn turn(&mut self) {
        let Some((id, tenant)) = self.ring.next() else {
            self.at = 0;
            return;
        };
        self.coming -= 1;
        self.at = self.visits.len();
        self.visits.push(Visit {
            keys: tenant.keys.iter().peekable(),
            account: tenant.account,
            paid: self.had == Some(*id),
        });
    }

    /// Nobody can pay: as many rounds at once as it takes until one can.
    fn skip_rounds(&mut self) {
        let quantum = self.quantum_ms;
        let rounds = self.visits.iter_mut().filter_map(|visit| {
            let (_, work) = visit.keys.peek()?;
            Some(((**work - visit.account) / quantum).ceil() - 1.0)
        });
        let fewest = rounds.fold(f64::INFINITY, f64::min).max(0.0);
        if fewest.is_finite() {
            for visit in &mut self.visits {
                visit.account += fewest * quantum;
            }
        }
        self.in_vain = 0;
    }
}
