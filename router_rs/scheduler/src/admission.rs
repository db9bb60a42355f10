//! Who may wait: admission by predicted wait.

use crate::request::RequestView;
use crate::terms::{prefill_ms, wait_ms};
use crate::worker::{Cluster, Phase, Role};
use thiserror::Error;

/// Bounds of waiting.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdmissionSettings {
    /// Longest predicted wait for which a request is admitted, ms.
    pub max_wait_ms: f64,
}

impl Default for AdmissionSettings {
    fn default() -> Self {
        Self {
            max_wait_ms: 60_000.0,
        }
    }
}

/// A request may wait.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Admission {
    /// Predicted wait until its prompt starts, ms.
    pub wait_ms: f64,
    /// Predicted work of its prompt, ms: for its virtual deadline.
    pub work_ms: f64,
}

/// A request may not wait.
#[derive(Debug, Clone, Copy, PartialEq, Error)]
pub enum Rejected {
    /// It would wait longer than is allowed.
    #[error("predicted wait is {wait_ms:.0} ms; try again in {retry_after_ms:.0} ms")]
    WaitTooLong {
        /// Predicted wait, ms.
        wait_ms: f64,
        /// When the wait should be within the bound, ms.
        retry_after_ms: f64,
    },
    /// Its deadline would pass before its first token.
    #[error(
        "the deadline cannot be met: first token is predicted in {ttft_ms:.0} ms, {left_ms:.0} ms are left"
    )]
    DeadlineCannotBeMet {
        /// Predicted time to the first token, ms.
        ttft_ms: f64,
        /// Time left, ms.
        left_ms: f64,
    },
}

/// Decides whether a request may wait. `ahead_ms` is the predicted work of
/// what is queued before it ([`crate::Queue::work_before_ms`]), `deadline_ms`
/// the time left to its deadline.
///
/// The wait is what the least busy worker has, plus the queue's work shared by
/// all workers that compute prompts.
///
/// # Errors
/// [`Rejected`], with an honest delay.
pub fn admit(
    cluster: &Cluster<'_>,
    request: &RequestView<'_>,
    ahead_ms: f64,
    deadline_ms: Option<f64>,
    settings: &AdmissionSettings,
) -> Result<Admission, Rejected> {
    let serving = |role: fn(Role) -> bool| {
        cluster.workers.iter().filter(move |worker| {
            let ready = matches!(worker.phase, Phase::Serving | Phase::WarmingUp);
            ready && !worker.draining && *worker.model == *request.model && role(worker.role)
        })
    };
    let mut workers: Vec<_> = serving(|role| role != Role::Decode).collect();
    if workers.is_empty() {
        workers = serving(|_| true).collect();
    }
    let least = workers
        .iter()
        .map(|worker| wait_ms(worker))
        .fold(f64::INFINITY, f64::min);
    let work = workers
        .iter()
        .map(|worker| prefill_ms(worker, request, request.cached_on(worker.slot)))
        .fold(f64::INFINITY, f64::min);
    if workers.is_empty() {
        // No worker is the policy's answer, not a matter of waiting.
        return Ok(Admission {
            wait_ms: 0.0,
            work_ms: 0.0,
        });
    }
    let wait_ms = least + ahead_ms / workers.len() as f64;
    if wait_ms > settings.max_wait_ms {
        return Err(Rejected::WaitTooLong {
            wait_ms,
            retry_after_ms: wait_ms - settings.max_wait_ms,
        });
    }
    match deadline_ms {
        Some(left_ms) if wait_ms + work > left_ms => Err(Rejected::DeadlineCannotBeMet {
            ttft_ms: wait_ms + work,
            left_ms,
        }),
        _ => Ok(Admission {
            wait_ms,
            work_ms: work,
        }),
    }
}
