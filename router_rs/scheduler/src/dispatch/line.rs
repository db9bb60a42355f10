//! Those that wait for workers of one model.

use super::ahead::Ahead;
use super::overload::Overload;
use super::rules::{Hold, Reported};
use super::{DispatchSettings, Entry, Look, Turn};
use crate::queue::{Lane, Queue, Ticket};
use crate::request::{Class, PerClass};
use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// By how much a request that goes before another is before it, ms.
const BEFORE_MS: f64 = 1e-3;
/// How many times as many as are tried are looked through for those that may find
/// room.
const LOOKED_THROUGH: usize = 8;

#[derive(Debug)]
pub(super) struct Line<T> {
    pub(super) queue: Queue<T>,
    facts: BTreeMap<Ticket, Facts>,
    /// How many of each class.
    lengths: PerClass<usize>,
    /// Those that are listed at a worker.
    holds: BTreeMap<Ticket, Hold>,
    /// Work of those that are listed nowhere.
    unlisted: PerClass<Ahead>,
    /// Those that go on.
    going_on: PerClass<BTreeSet<Ticket>>,
    /// Found no room, and its virtual deadline has passed.
    blocker: Option<Ticket>,
    /// Those that found no room when they were last tried.
    roomless: BTreeSet<Ticket>,
    /// Somebody was tried and is listed at no worker.
    unplaced: bool,
    next_pass_ms: f64,
    /// A pass is being made.
    passing: bool,
    /// When it ends there is to be another one.
    again: bool,
    /// Came while a pass is being made, and is tried in it.
    joined: VecDeque<Ticket>,
    /// Whether more urgent classes go first, whatever the keys.
    pub(super) overload: Overload,
}

#[derive(Debug, Clone, Copy)]
struct Facts {
    lane: Lane,
    work_ms: f64,
    since_ms: f64,
}

impl<T> Line<T> {
    pub(super) fn new(settings: &DispatchSettings) -> Self {
        Self {
            queue: Queue::with_settings(settings.queue),
            facts: BTreeMap::new(),
            lengths: [0; 3],
            holds: BTreeMap::new(),
            unlisted: PerClass::default(),
            going_on: PerClass::default(),
            blocker: None,
            roomless: BTreeSet::new(),
            unplaced: false,
            next_pass_ms: f64::NEG_INFINITY,
            passing: false,
            again: false,
            joined: VecDeque::new(),
            overload: Overload::none(),
        }
    }

    /// Whether more urgent classes go before all others, at this time.
    pub(super) fn is_overloaded(&self, now_ms: f64) -> bool {
        self.overload.is_on_at(now_ms, self.lengths[0])
    }

    /// An interactive request would be late if all went by their keys.
    pub(super) fn late(&mut self, now_ms: f64) {
        self.overload.late(now_ms);
        self.makes_way(Class::Interactive);
    }

    /// In an overload what is less urgent by class is listed nowhere while others
    /// are tried: their keys may be later, and they go first.
    pub(super) fn makes_way(&mut self, class: Class) {
        if self.overload.is_on() {
            let facts = &self.facts;
            let less_urgent =
                |held: &Ticket| facts.get(held).is_some_and(|of| of.lane.class > class);
            let gone: Vec<Ticket> = self.holds.keys().copied().filter(less_urgent).collect();
            // Whoever reports next leads to a look at them.
            self.unplaced |= !gone.is_empty();
            gone.into_iter().for_each(|ticket| self.let_go(ticket));
        }
    }

    /// By how much less or more goes before a request of a class with this key in
    /// an overload than its worker and its key tell, ms. Of those that are listed
    /// nowhere all that are more urgent, and its own class by key; of those that
    /// are listed the more urgent ones with later keys too, and no less urgent
    /// ones.
    pub(super) fn before_in_overload_ms(&self, class: Class, key_ms: f64) -> f64 {
        let more_urgent = self.unlisted[..class.index()].iter().map(Ahead::work_ms);
        let own_ms = self.unlisted[class.index()].before_ms(key_ms);
        let listed = self.holds.keys().filter_map(|ticket| {
            let facts = self.facts.get(ticket)?;
            let seen = ticket.virtual_deadline_ms() <= key_ms;
            match facts.lane.class.cmp(&class) {
                Ordering::Less if !seen => Some(facts.work_ms),
                Ordering::Greater if seen => Some(-facts.work_ms),
                _ => None,
            }
        });
        more_urgent.sum::<f64>() + own_ms + listed.sum::<f64>()
    }

    pub(super) fn join(&mut self, entry: &Entry, now_ms: f64, item: T) -> Result<Ticket, T> {
        let Entry { lane, work_ms, .. } = *entry;
        let ticket = self.queue.push_for(lane, entry.key_ms, work_ms, item)?;
        let facts = Facts {
            lane,
            work_ms,
            since_ms: now_ms,
        };
        self.facts.insert(ticket, facts);
        self.lengths[lane.class.index()] += 1;
        self.unlisted[lane.class.index()].insert(ticket.key(), work_ms);
        if entry.goes_on {
            self.going_on[lane.class.index()].insert(ticket);
        }
        Ok(ticket)
    }

    /// Whether one that came may be tried by itself: nobody goes before it but
    /// those that found no room, and none of them is late.
    pub(super) fn may_try(&self, ticket: Ticket, most: usize) -> bool {
        if self.blocks(ticket) {
            return false;
        }
        let order = self.order(most);
        let mut before = order.iter().take_while(|other| **other != ticket);
        before.all(|other| self.roomless.contains(other))
    }

    /// Whether one that lacks room and is late goes before this one.
    pub(super) fn blocks(&self, ticket: Ticket) -> bool {
        self.blocker
            .is_some_and(|blocker| self.goes_before(blocker, ticket))
    }

    /// By key; in an overload by class first.
    fn goes_before(&self, one: Ticket, other: Ticket) -> bool {
        match self.overload.is_on() {
            true => (self.class(one), one) < (self.class(other), other),
            false => one < other,
        }
    }

    /// What one goes as with this key. More urgent ones may have come since its
    /// pass began.
    pub(super) fn turn(&self, ticket: Ticket, key_ms: f64) -> Turn {
        let yields = self.yields(ticket);
        Turn { key_ms, yields }
    }

    /// Whether more urgent ones wait, which go first. What goes on does not: its
    /// client waits in the middle of an answer.
    fn yields(&self, ticket: Ticket) -> bool {
        let facts = self.facts.get(&ticket).filter(|_| self.overload.is_on());
        facts.is_some_and(|facts| {
            let class = facts.lane.class.index();
            let before = &self.lengths[..class];
            before.iter().any(|length| *length > 0) && !self.going_on[class].contains(&ticket)
        })
    }

    pub(super) fn class(&self, ticket: Ticket) -> Option<Class> {
        Some(self.facts.get(&ticket)?.lane.class)
    }

    pub(super) fn next_pass_ms(&self) -> f64 {
        self.next_pass_ms
    }

    /// Begins a pass, unless one is being made: then there is another one after
    /// it. One at a time, so that nobody who is being tried is passed.
    pub(super) fn enter(&mut self) -> bool {
        let free = !std::mem::replace(&mut self.passing, true);
        self.again |= !free;
        free
    }

    /// Whether a pass is being made; then this one is tried in it.
    pub(super) fn join_pass(&mut self, ticket: Ticket) -> bool {
        if self.passing {
            self.joined.push_back(ticket);
        }
        self.passing
    }

    /// One that came while the pass was being made, and in an overload goes before
    /// this one.
    pub(super) fn next_joined(&mut self, before: Option<Ticket>) -> Option<Ticket> {
        let joined = *self.joined.front()?;
        let first = |ticket| self.overload.is_on() && self.class(joined) < self.class(ticket);
        if !before.is_none_or(first) {
            return None;
        }
        if let Some(class) = self.class(joined) {
            self.makes_way(class);
        }
        self.joined.pop_front()
    }

    /// The pass is over; whether another one is due at once, and begins.
    pub(super) fn goes_again(&mut self) -> bool {
        let again = std::mem::replace(&mut self.again, false);
        self.passing = again;
        again
    }

    /// The pass is given up half way: what it has not tried is looked at again
    /// as soon as somebody looks.
    pub(super) fn give_up_pass(&mut self) {
        (self.passing, self.again) = (false, false);
        self.joined.clear();
        self.next_pass_ms = f64::NEG_INFINITY;
    }

    /// Those to be tried in one go, each with the key that it goes as. Turns of
    /// tenants may let a request go before others with earlier keys: for as long
    /// as they all wait here it is before them, and of equal ones the first is.
    pub(super) fn begin_pass(
        &mut self,
        now_ms: f64,
        settings: &DispatchSettings,
    ) -> Vec<(Ticket, f64)> {
        let most = settings.tried_at_once;
        self.overload.settle(now_ms, self.lengths[0]);
        self.next_pass_ms = now_ms + settings.pass_ms;
        let tickets = self.to_try(most);
        (self.unplaced, self.blocker) = (false, None);
        if let Some(class) = tickets.first().and_then(|first| self.class(*first)) {
            self.makes_way(class);
        }
        if self.holds.len() > most {
            // Those that were overtaken by many will choose again.
            let gone: Vec<Ticket> = {
                let held = self.holds.keys().copied();
                held.filter(|held| !tickets.contains(held)).collect()
            };
            gone.into_iter().for_each(|ticket| self.let_go(ticket));
        }
        let (mut next_ms, mut next_class) = (f64::INFINITY, None);
        let mut tried: Vec<(Ticket, f64)> = Vec::with_capacity(tickets.len());
        for ticket in tickets.into_iter().rev() {
            let class = self.class(ticket);
            // Who goes first for the class alone keeps its key: it says when it came.
            if self.overload.is_on() && class != std::mem::replace(&mut next_class, class) {
                next_ms = f64::INFINITY;
            }
            next_ms = ticket.virtual_deadline_ms().min(next_ms - BEFORE_MS);
            tried.push((ticket, next_ms));
        }
        // The next one is at the end.
        tried
    }

    /// Those that a pass tries. Half of them may have found no room before: more
    /// of these would hide the rest, whose place is elsewhere or smaller.
    fn to_try(&self, most: usize) -> Vec<Ticket> {
        let mut tickets = self.order(most);
        if self.roomless.len() > most / 2 {
            tickets = self.order(most * LOOKED_THROUGH);
            let mut lacking = 0;
            tickets.retain(|ticket| {
                lacking += usize::from(self.roomless.contains(ticket));
                lacking <= most / 2 || !self.roomless.contains(ticket)
            });
            tickets.truncate(most);
        }
        tickets
    }

    /// The order of service, with what goes on before new work of its class.
    /// Between classes all stays as it is.
    fn order(&self, most: usize) -> Vec<Ticket> {
        let order = match self.overload.is_on() {
            true => self.queue.order_by_class(most),
            false => self.queue.order(most),
        };
        if self.going_on.iter().all(BTreeSet::is_empty) {
            return order;
        }
        let mut all = Vec::with_capacity(order.len());
        let mut seen = [false; 3];
        for ticket in order {
            let Some(facts) = self.facts.get(&ticket) else {
                continue;
            };
            let class = facts.lane.class.index();
            if !std::mem::replace(&mut seen[class], true) {
                all.extend(self.going_on[class].iter().take(most));
            }
            if !self.going_on[class].contains(&ticket) {
                all.push(ticket);
            }
        }
        for class in (0..seen.len()).filter(|class| !seen[*class]) {
            all.extend(self.going_on[class].iter().take(most));
        }
        all
    }

    /// Takes one to be tried. What it held is let go of, so that nobody waits
    /// for who waits for them.
    pub(super) fn take(&mut self, ticket: Ticket) -> Option<T> {
        let item = self.queue.take(ticket)?;
        self.let_go(ticket);
        Some(item)
    }

    pub(super) fn put_back(&mut self, ticket: Ticket, item: T, hold: Option<Hold>) {
        self.queue.put_back(ticket, item);
        self.roomless.remove(&ticket);
        // One that yields is listed nowhere: it would be seen before those that go first.
        let hold = hold.filter(|_| !self.yields(ticket));
        self.unplaced |= hold.is_none();
        if let (Some(hold), Some(facts)) = (hold, self.facts.get(&ticket)) {
            self.unlisted[facts.lane.class.index()].remove(ticket.key());
            self.holds.insert(ticket, hold);
        }
    }

    /// One that was put back found no room; once it `blocks`, nobody passes it.
    pub(super) fn found_no_room(&mut self, ticket: Ticket, blocks: bool) {
        self.roomless.insert(ticket);
        let first = |blocker| self.goes_before(ticket, blocker);
        if blocks && self.blocker.is_none_or(first) {
            self.blocker = Some(ticket);
        }
    }

    /// One that is taken leaves, if it is there; with `served` its tenant pays
    /// for it.
    pub(super) fn leave(&mut self, ticket: Ticket, served: bool) -> bool {
        let Some(facts) = self.facts.remove(&ticket) else {
            return false;
        };
        self.lengths[facts.lane.class.index()] -= 1;
        self.holds.remove(&ticket);
        self.roomless.remove(&ticket);
        self.going_on[facts.lane.class.index()].remove(&ticket);
        if self.blocker == Some(ticket) {
            self.blocker = None;
        }
        self.unlisted[facts.lane.class.index()].remove(ticket.key());
        if served {
            self.queue.serve(ticket);
        } else {
            self.queue.remove(ticket);
        }
        true
    }

    fn let_go(&mut self, ticket: Ticket) {
        if self.holds.remove(&ticket).is_some()
            && let Some(facts) = self.facts.get(&ticket)
        {
            self.unlisted[facts.lane.class.index()].insert(ticket.key(), facts.work_ms);
        }
    }

    pub(super) fn look(&self, report: &Reported, now_ms: f64, settings: &DispatchSettings) -> Look {
        if self.queue.is_empty() {
            return Look::No;
        }
        let soon = settings.soon(report.least_ms, report.step_ms);
        let first = |ticket: &Ticket| {
            let first_ms = report.first_sent_ms;
            first_ms.is_some_and(|first_ms| ticket.virtual_deadline_ms() < first_ms)
        };
        // It goes before what is less urgent there, however much that is.
        let by_key = |ticket: &Ticket| {
            let key_ms = ticket.virtual_deadline_ms();
            let ahead_ms = report.ahead_ms(key_ms, now_ms, &settings.targets);
            settings.soon(ahead_ms, report.step_ms)
        };
        let mut held = self.holds.iter();
        if held.any(|(ticket, hold)| {
            hold.is_on(report.worker) && (soon || first(ticket) || by_key(ticket))
        }) {
            return Look::Now;
        }
        // Who is listed nowhere waits for anybody: room is what workers say it is.
        match self.unplaced || soon && report.computes {
            true if self.due(now_ms) => Look::Now,
            true => Look::At(self.next_pass_ms),
            false => Look::No,
        }
    }

    pub(super) fn due(&self, now_ms: f64) -> bool {
        !self.queue.is_empty() && now_ms >= self.next_pass_ms
    }

    /// Work of those with this key or an earlier one, and of all that are as
    /// urgent by class, ms: each without those that are listed at a worker.
    pub(super) fn unlisted_ms(&self, class: Class, key_ms: f64) -> (f64, f64) {
        let before = self.unlisted.iter().map(|of| of.before_ms(key_ms)).sum();
        let as_urgent = self.unlisted[..=class.index()].iter();
        (before, as_urgent.map(Ahead::work_ms).sum())
    }

    /// How many wait that are as urgent by class, those that are tried included.
    pub(super) fn as_urgent(&self, class: Class) -> usize {
        self.lengths[..=class.index()].iter().sum()
    }

    pub(super) fn unlisted_by_class_ms(&self) -> PerClass<f64> {
        Class::ALL.map(|class| self.unlisted[class.index()].work_ms())
    }

    pub(super) fn waiting(&self) -> impl Iterator<Item = (Ticket, f64, &T)> {
        self.queue.iter().filter_map(|(ticket, item)| {
            let since_ms = self.facts.get(&ticket)?.since_ms;
            Some((ticket, since_ms, item))
        })
    }
}
