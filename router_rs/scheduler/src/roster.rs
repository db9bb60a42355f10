//! The views of a cluster's workers, kept in place.

use crate::booking::Bookings;
use crate::deadline::ClassTargets;
use crate::facts::Table;
use crate::worker::{Cluster, WorkerView};
use kvmesh_kv_index::WorkerSlot;

/// Workers that can be chosen from, each slot once, and where each one is. A
/// choice reads them where they are; what changes is changed here, a report or
/// a booking at a time. What the cost asks of each is counted when it changes.
#[derive(Debug, Clone)]
pub struct Roster {
    views: Vec<WorkerView>,
    /// Place of each slot, plus one; 0: not here.
    places: Vec<u32>,
    table: Table,
    /// Places of views that changed since they were last counted.
    changed: Vec<u32>,
}

impl Default for Roster {
    fn default() -> Self {
        Self::new()
    }
}

impl Roster {
    /// An empty one, under the shipped targets.
    pub fn new() -> Self {
        Self::with_targets(&ClassTargets::default())
    }

    /// An empty one; the targets are those of the policy.
    pub fn with_targets(targets: &ClassTargets) -> Self {
        Self {
            views: Vec::new(),
            places: Vec::new(),
            table: Table::new(targets),
            changed: Vec::new(),
        }
    }

    /// Takes a worker in, or a new view of it.
    pub fn insert(&mut self, view: WorkerView) {
        let slot = view.slot.0 as usize;
        if self.places.len() <= slot {
            self.places.resize(slot + 1, 0);
        }
        let place = match self.places[slot] {
            0 => {
                self.table.count(self.views.len(), &view);
                self.views.push(view);
                self.places[slot] = self.views.len() as u32;
                return;
            }
            place => place as usize - 1,
        };
        self.table.count(place, &view);
        self.views[place] = view;
    }

    /// Takes a worker out.
    pub fn remove(&mut self, slot: WorkerSlot) -> Option<WorkerView> {
        let place = self.place(slot)?;
        self.places[slot.0 as usize] = 0;
        let view = self.views.swap_remove(place);
        self.table.swap_remove(place);
        self.changed.retain(|at| *at as usize != place);
        if let Some(moved) = self.views.get(place) {
            self.places[moved.slot.0 as usize] = place as u32 + 1;
            self.changed.retain(|at| *at as usize != self.views.len());
            self.changed.push(place as u32);
        }
        Some(view)
    }

    fn place(&self, slot: WorkerSlot) -> Option<usize> {
        let place = *self.places.get(slot.0 as usize)?;
        (place as usize).checked_sub(1)
    }

    /// A worker's view.
    pub fn get(&self, slot: WorkerSlot) -> Option<&WorkerView> {
        Some(&self.views[self.place(slot)?])
    }

    /// A worker's view, to be changed. Its slot stays.
    pub fn get_mut(&mut self, slot: WorkerSlot) -> Option<&mut WorkerView> {
        let place = self.place(slot)?;
        if self.changed.last() != Some(&(place as u32)) {
            self.changed.push(place as u32);
        }
        Some(&mut self.views[place])
    }

    /// Changes all views. Their slots stay.
    pub fn change_all(&mut self, mut change: impl FnMut(&mut WorkerView)) {
        self.views.iter_mut().for_each(&mut change);
        self.changed.clear();
        self.table.count_all(&self.views);
    }

    /// Brings in what was booked, sent, begun or released since the last call,
    /// and counts what changed. Before each choice.
    pub fn refresh(&mut self, bookings: &Bookings) {
        bookings.take_changes(|slot, booked, prompts| {
            if let Some(view) = self.get_mut(slot) {
                view.booked = booked.unseen;
                view.computed = booked.computed;
                view.prompts.clear();
                view.prompts.extend(prompts);
            }
        });
        self.changed.sort_unstable();
        self.changed.dedup();
        for place in self.changed.drain(..) {
            let place = place as usize;
            self.table.count(place, &self.views[place]);
        }
    }

    /// The views, in no order that means anything.
    pub fn views(&self) -> &[WorkerView] {
        &self.views
    }

    /// The cluster to choose from, as it was at the last
    /// [`Roster::refresh`], for a router.
    pub fn cluster(&self, router: u64) -> Cluster<'_> {
        Cluster {
            table: self.changed.is_empty().then_some(&self.table),
            ..Cluster::new(router, &self.views)
        }
    }
}
