//! The terms of a plan's cost: one small function each, all in milliseconds.
//!
//! Those of the request's first token are in [`first`], what it does to those
//! that wait in [`queued`], to streams in [`stretch`] and [`newcomers`], to the
//! pool in [`room`].
//! What to book is in [`work`].

pub(crate) mod first;
pub(crate) mod newcomers;
pub(crate) mod queued;
pub(crate) mod room;
pub(crate) mod stretch;
pub(crate) mod work;

use crate::deadline::Weights;
use crate::fit::tokens_held;
use crate::request::RequestView;

/// Statements about people, not about hardware (SCHEDULING 2).
#[derive(Debug, Clone, Copy)]
pub(crate) struct People {
    /// A millisecond of stretched streaming against one of waiting (ε).
    pub(crate) stretch: f64,
    /// How much more it counts beyond a stream's ITL target (κ).
    pub(crate) beyond_target: f64,
    /// Milliseconds of one class against another's.
    pub(crate) weights: Weights,
}

/// What the terms ask of a request, counted once a choice.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Asked {
    /// Tokens whose KV must be there.
    pub(crate) sequence: f64,
    /// Tokens that must be held for it to start.
    pub(crate) held: f64,
    /// Output tokens expected.
    pub(crate) left: f64,
    /// Place of its class.
    pub(crate) class: usize,
    /// ITL target of its own, ms.
    pub(crate) itl_target_ms: Option<f64>,
    pub(crate) virtual_deadline_ms: f64,
    pub(crate) now_ms: f64,
}

impl Asked {
    pub(crate) fn of(request: &RequestView<'_>, now_ms: f64) -> Self {
        Self {
            sequence: request.sequence() as f64,
            held: tokens_held(request) as f64,
            left: request.expected_left(),
            class: request.class.index(),
            itl_target_ms: request.itl_target_ms,
            virtual_deadline_ms: request.virtual_deadline_ms,
            now_ms,
        }
    }

    /// Σ(n·context) of the tokens after the first `there`.
    pub(crate) fn context_after(&self, there: f64) -> f64 {
        let tokens = (self.sequence - there).max(1.0);
        tokens * there + tokens * (tokens + 1.0) / 2.0
    }
}
