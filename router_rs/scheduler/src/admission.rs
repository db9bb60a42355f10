//! Who may wait: admission by predicted wait.

use crate::cost::CostSettings;
use crate::facts::Table;
use crate::fit::could_compute;
use crate::request::{PerClass, RequestView};
use crate::survey::LocalPrefill;
use crate::terms::queued::{line, own_prompt_ms};
use crate::terms::{Asked, first};
use crate::worker::{Cluster, Role};
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
        /// Predicted work of its prompt, ms.
        work_ms: f64,
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
        /// Predicted work of its prompt, ms.
        work_ms: f64,
    },
}

impl Rejected {
    /// Predicted work of its prompt, ms: it came, though it is not taken.
    pub fn work_ms(&self) -> f64 {
        match self {
            Self::WaitTooLong { work_ms, .. } | Self::DeadlineCannotBeMet { work_ms, .. } => {
                *work_ms
            }
        }
    }
}

/// Decides whether a request may wait. `ahead_ms` is the predicted work of
/// what is queued before it ([`crate::Dispatch::unlisted_ms`]), `deadline_ms`
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
    let estimate = Estimate::of(cluster, request);
    estimate.admit(ahead_ms, deadline_ms, settings)
}

/// What a request would wait for and compute, without a queue before it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Estimate {
    /// Wait at the least busy worker, ms.
    pub least_ms: f64,
    /// Least work of its prompt on any worker, ms.
    pub work_ms: f64,
    /// Workers that compute prompts.
    pub workers: usize,
    /// Own prompts there, or listed there, that are not computed yet, ms.
    pub own_ms: PerClass<f64>,
}

impl Estimate {
    /// Looks at every worker that serves the model.
    pub fn of(cluster: &Cluster<'_>, request: &RequestView<'_>) -> Self {
        cluster.with_table(|table| Self::by(table, cluster, request))
    }

    fn by(table: &Table, cluster: &Cluster<'_>, request: &RequestView<'_>) -> Self {
        let people = CostSettings::default().people();
        let asked = Asked::of(request, cluster.now_ms);
        let model = table.names.find_model(request.model);
        let plain = request.is_plain();
        let sum = |role: fn(Role) -> bool| {
            let mut all = Self {
                least_ms: f64::INFINITY,
                work_ms: f64::INFINITY,
                workers: 0,
                own_ms: [0.0; 3],
            };
            let rows = table.gates.iter().zip(&table.rows);
            for (worker, (gate, facts)) in cluster.workers.iter().zip(rows) {
                // One that is silent for a moment will do its share.
                let ready = gate.ready || worker.suspect && worker.takes_work();
                if !ready || Some(gate.model) != model || !role(gate.role) {
                    continue;
                }
                // Idle workers that cannot run it make nobody's wait shorter.
                let able = if plain {
                    asked.held <= gate.limit
                } else {
                    could_compute(worker, request)
                };
                if !able {
                    continue;
                }
                let line = line(facts, &worker.prompts, &asked, &people.weights.ttft);
                let cached = request.cached_on(worker.slot);
                let work = first::prefill(facts, &asked, cached as f64).ms();
                all.least_ms = all.least_ms.min(first::wait_ms(facts, &line, asked.now_ms));
                all.work_ms = all.work_ms.min(work);
                all.workers += 1;
                for prompt in &worker.prompts {
                    all.own_ms[prompt.class.index()] += own_prompt_ms(facts, prompt);
                }
            }
            all
        };
        // Decode workers take prompts over where others are busy.
        if cluster.local_prefill != LocalPrefill::ByCost {
            let computing = sum(|role| role != Role::Decode);
            if computing.workers > 0 {
                return computing;
            }
        }
        sum(|_| true)
    }

    /// Predicted wait, with this much work queued before the request, ms. No
    /// worker is the policy's answer, not a matter of waiting.
    pub fn wait_ms(&self, ahead_ms: f64) -> f64 {
        match self.workers {
            0 => 0.0,
            workers => (self.least_ms + ahead_ms / workers as f64).max(0.0),
        }
    }

    /// Decides, with this much work queued before the request; as [`admit`].
    ///
    /// # Errors
    /// [`Rejected`], with an honest delay.
    pub fn admit(
        &self,
        ahead_ms: f64,
        deadline_ms: Option<f64>,
        settings: &AdmissionSettings,
    ) -> Result<Admission, Rejected> {
        if self.workers == 0 {
            return Ok(Admission {
                wait_ms: 0.0,
                work_ms: 0.0,
            });
        }
        let wait_ms = self.wait_ms(ahead_ms);
        if wait_ms > settings.max_wait_ms {
            return Err(Rejected::WaitTooLong {
                wait_ms,
                retry_after_ms: wait_ms - settings.max_wait_ms,
                work_ms: self.work_ms,
            });
        }
        match deadline_ms {
            Some(left_ms) if wait_ms + self.work_ms > left_ms => {
                Err(Rejected::DeadlineCannotBeMet {
                    ttft_ms: wait_ms + self.work_ms,
                    left_ms,
                    work_ms: self.work_ms,
                })
            }
            _ => Ok(Admission {
                wait_ms,
                work_ms: self.work_ms,
            }),
        }
    }
}
