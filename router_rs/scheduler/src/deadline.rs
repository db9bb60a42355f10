//! Classes, their targets, and the one key that orders every queue.

use crate::request::{Class, PerClass};

/// What a class is held to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Targets {
    /// Head start that more urgent classes have over this one (A), ms.
    pub allowance_ms: f64,
    /// First token, ms.
    pub ttft_ms: f64,
    /// Between tokens, ms. None: no target.
    pub itl_ms: Option<f64>,
}

/// Targets of all classes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ClassTargets {
    /// Interactive.
    pub interactive: Targets,
    /// Standard.
    pub standard: Targets,
    /// Batch.
    pub batch: Targets,
    /// How much a millisecond of predicted work delays (s).
    pub work_weight: f64,
}

impl Default for ClassTargets {
    fn default() -> Self {
        Self {
            interactive: Targets {
                allowance_ms: 0.0,
                ttft_ms: 1_000.0,
                itl_ms: Some(50.0),
            },
            standard: Targets {
                allowance_ms: 2_000.0,
                ttft_ms: 5_000.0,
                itl_ms: Some(100.0),
            },
            batch: Targets {
                allowance_ms: 30_000.0,
                ttft_ms: 60_000.0,
                itl_ms: None,
            },
            work_weight: 5.0,
        }
    }
}

impl ClassTargets {
    /// The same, where nothing but the arrival orders what waits: first come, first served.
    pub fn by_arrival(self) -> Self {
        let plain = |targets: Targets| Targets {
            allowance_ms: 0.0,
            ..targets
        };
        Self {
            interactive: plain(self.interactive),
            standard: plain(self.standard),
            batch: plain(self.batch),
            work_weight: 0.0,
        }
    }

    /// Whether some class has a head start over another.
    pub fn by_class(&self) -> bool {
        let first_ms = self.interactive.allowance_ms;
        [self.standard, self.batch]
            .iter()
            .any(|of| of.allowance_ms > first_ms)
    }

    /// Longest wait predicted at entry with which a first token is still on time,
    /// ms: within its class's target, or within twice its own work where that is
    /// more.
    pub(crate) fn wait_on_time_ms(&self, class: Class, work_ms: f64) -> f64 {
        work_ms.max(self.of(class).ttft_ms - work_ms)
    }

    /// How long a request may wait that was on time when it came, ms: until its
    /// virtual deadline at least, since others may pass it as long.
    pub(crate) fn longest_wait_ms(&self, class: Class, work_ms: f64) -> f64 {
        let by_key_ms = virtual_deadline_ms(self, class, 0.0, work_ms);
        by_key_ms.max(self.wait_on_time_ms(class, work_ms))
    }

    /// Targets of a class.
    pub fn of(&self, class: Class) -> &Targets {
        match class {
            Class::Interactive => &self.interactive,
            Class::Standard => &self.standard,
            Class::Batch => &self.batch,
        }
    }
}

/// What a millisecond of each class counts, against one of an interactive
/// request: interactive target / class target (SCHEDULING 2).
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Weights {
    /// Of waiting for a first token.
    pub(crate) ttft: PerClass<f64>,
    /// Of a stretched step.
    pub(crate) itl: PerClass<f64>,
    /// ITL target, ms; infinite where a class has none.
    pub(crate) itl_target_ms: PerClass<f64>,
}

impl Weights {
    /// Strictest ITL target of the classes that are there, ms; infinite where none has one.
    pub(crate) fn strictest_itl_ms(&self, there: impl Fn(usize) -> bool) -> f64 {
        let targets = self.itl_target_ms.iter().enumerate();
        let there = targets.filter(|(class, _)| there(*class));
        there
            .map(|(_, target)| *target)
            .fold(f64::INFINITY, f64::min)
    }

    pub(crate) fn of(targets: &ClassTargets) -> Self {
        let interactive = targets.interactive;
        let ttft = Class::ALL.map(|class| interactive.ttft_ms / targets.of(class).ttft_ms);
        let itl = |class: Class| match (interactive.itl_ms, targets.of(class).itl_ms) {
            (Some(first), Some(target)) => first / target,
            // Whoever has no target between tokens is as patient there as at
            // the first one.
            _ => ttft[class.index()],
        };
        Self {
            ttft,
            itl: Class::ALL.map(itl),
            itl_target_ms: Class::ALL
                .map(|class| targets.of(class).itl_ms.unwrap_or(f64::INFINITY)),
        }
    }
}

/// The virtual deadline: arrival + A + work x s. Earliest first is
/// short-before-long and ageing in one: what arrives more than
/// `A_old - A_new + s (work_old - work_new)` after a request never passes it.
pub fn virtual_deadline_ms(
    targets: &ClassTargets,
    class: Class,
    arrival_ms: f64,
    work_ms: f64,
) -> f64 {
    arrival_ms + targets.of(class).allowance_ms + targets.work_weight * work_ms.max(0.0)
}
