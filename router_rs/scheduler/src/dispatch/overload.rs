//! When more urgent classes go first, and for how long one is refused.

use crate::request::{Class, PerClass};

/// For so long one request stands for those of its class that may follow, ms: one
/// that would have been late for an overload, one that was refused for its class
/// being refused.
pub(super) const OVERLOAD_MS: f64 = 1_000.0;

/// Of one model.
#[derive(Debug, Clone)]
pub(super) struct Overload {
    on: bool,
    /// When an interactive request last would have been late by its key, ms.
    late_ms: f64,
    refusals: PerClass<Refusals>,
}

/// Of a class, without a break of [`OVERLOAD_MS`].
#[derive(Debug, Clone, Copy)]
struct Refusals {
    first_ms: f64,
    last_ms: f64,
}

impl Overload {
    pub(super) fn none() -> Self {
        let never = Refusals {
            first_ms: f64::NEG_INFINITY,
            last_ms: f64::NEG_INFINITY,
        };
        Self {
            on: false,
            late_ms: f64::NEG_INFINITY,
            refusals: [never; 3],
        }
    }

    /// Whether more urgent classes go before all others.
    pub(super) fn is_on(&self) -> bool {
        self.on
    }

    /// The same at this time, while so many interactive requests wait: who was
    /// admitted to go first still does.
    pub(super) fn is_on_at(&self, now_ms: f64, interactive: usize) -> bool {
        self.on && (interactive > 0 || now_ms - self.late_ms < OVERLOAD_MS)
    }

    /// Whether it is over by now.
    pub(super) fn settle(&mut self, now_ms: f64, interactive: usize) {
        self.on = self.is_on_at(now_ms, interactive);
    }

    /// An interactive request would be late by its key.
    pub(super) fn late(&mut self, now_ms: f64) {
        (self.on, self.late_ms) = (true, now_ms);
    }

    /// One was refused, since it would have been late.
    pub(super) fn refused(&mut self, class: Class, now_ms: f64) {
        let of = &mut self.refusals[class.index()];
        if now_ms - of.last_ms >= OVERLOAD_MS {
            of.first_ms = now_ms;
        }
        of.last_ms = now_ms;
    }

    /// For how long a more urgent class has been refused, ms. `None`: none is now,
    /// or it is no overload.
    pub(super) fn starved_ms(&self, class: Class, now_ms: f64) -> Option<f64> {
        let more_urgent = self.refusals[..class.index()].iter().filter(|_| self.on);
        let now = more_urgent.filter(|of| now_ms - of.last_ms < OVERLOAD_MS);
        now.map(|of| now_ms - of.first_ms).reduce(f64::max)
    }
}
