//! When a request that has a plan goes, and what it does otherwise.

use super::{DispatchSettings, Turn};
use crate::booking::{Booking, Bookings, Work};
use crate::deadline::{ClassTargets, virtual_deadline_ms};
use crate::plan::{Decision, NoPlan};
use crate::request::{Class, PerClass, RequestView};
use crate::survey::{LocalPrefill, placeable};
use crate::worker::{Cluster, Role, WorkerView};
use kvmesh_kv_index::WorkerSlot;
use std::sync::Arc;

/// What becomes of a request that has a plan.
#[derive(Debug)]
pub enum Verdict {
    /// It goes, and its load is booked: by worker, in the order of
    /// [`Decision::work`].
    Goes(Vec<(WorkerSlot, Booking)>),
    /// Its worker would not start it soon: it waits, listed there.
    Waits(Hold),
}

/// A prompt that is listed where it would go now, while it waits: those that
/// choose after it see it there. It takes no room and no place in a batch:
/// whoever goes first must get these. Dropping it takes it off the lists.
#[derive(Debug)]
pub struct Hold {
    /// The worker that would compute it.
    prefill: WorkerSlot,
    _prompt: Vec<Booking>,
}

impl Hold {
    /// Whether this worker would compute it.
    pub(super) fn is_on(&self, worker: WorkerSlot) -> bool {
        self.prefill == worker
    }
}

/// Prompts of other routers on a worker.
#[derive(Debug, Clone, Copy, Default)]
pub struct Others {
    /// Computing an average one, ms.
    pub each_ms: f64,
    /// Computing all of them, ms.
    pub work_ms: f64,
}

/// What a load report says of whether somebody may go.
#[derive(Debug, Clone)]
pub struct Reported {
    /// The worker.
    pub worker: WorkerSlot,
    /// Its model.
    pub model: Arc<str>,
    /// Whether a prompt that means to go elsewhere may come to it.
    pub computes: bool,
    /// Least time until it would start a new prompt that goes before none there, ms.
    pub least_ms: f64,
    /// What of that is other routers', by class.
    pub others: PerClass<Others>,
    /// Earliest virtual deadline of the prompts that went there and have not
    /// begun, ms: one before it would be taken first.
    pub first_sent_ms: Option<f64>,
    /// Predicted length of the step that runs, ms.
    pub step_ms: f64,
}

impl Reported {
    /// Reads it off a worker's view, once its report or what a first token says of
    /// it is in there. `local` says whether decode workers compute prompts, too.
    pub fn of(view: &WorkerView, step_ms: f64, local: LocalPrefill, bookings: &Bookings) -> Self {
        let least_ms = view.reported_backlog_tokens() as f64 * view.step.b_ms;
        let others = view.others_by_class().map(|(count, tokens)| {
            let work_ms = tokens as f64 * view.step.b_ms;
            Others {
                each_ms: work_ms / f64::from(count.max(1)),
                work_ms,
            }
        });
        Self {
            worker: view.slot,
            model: Arc::clone(&view.model),
            computes: view.role != Role::Decode || local == LocalPrefill::ByCost,
            first_sent_ms: bookings.first_sent_ms(view.slot),
            least_ms,
            others,
            step_ms,
        }
    }

    /// Least time until it would start a prompt with this key, ms: as the cost has it, other
    /// routers' prompts are taken to have come just now, and go after it where that is later.
    pub(super) fn ahead_ms(&self, key_ms: f64, now_ms: f64, targets: &ClassTargets) -> f64 {
        let mut ahead_ms = self.least_ms;
        for (class, others) in Class::ALL.into_iter().zip(&self.others) {
            if virtual_deadline_ms(targets, class, now_ms, others.each_ms) > key_ms {
                ahead_ms -= others.work_ms;
            }
        }
        ahead_ms
    }
}

impl DispatchSettings {
    /// Whether a worker would start a prompt soon after the step that runs.
    pub(super) fn soon(&self, queued_ms: f64, step_ms: f64) -> bool {
        queued_ms <= self.dispatch_ahead_ms.max(step_ms)
    }

    /// Books a plan, or lists its prompt where it would go: a request goes when
    /// its worker is predicted to start it within
    /// [`DispatchSettings::dispatch_ahead_ms`] or one step of `step_ms` after
    /// the step that runs: sent at the end of that one, it would come when the next
    /// has begun. It goes too when its key is before those of all prompts that were sent there and
    /// have not begun, so that it would be taken first, unless it yields.
    pub fn judge(
        &self,
        decision: &Decision,
        turn: Turn,
        step_ms: f64,
        bookings: &Bookings,
    ) -> Verdict {
        let (plan, key_ms) = (decision.plan(), turn.key_ms);
        let soon = self.soon(decision.queued_ms, step_ms);
        let first = || bookings.first_sent_ms(plan.prefill());
        if soon || first().is_some_and(|first_ms| turn.chosen_by_ms() < first_ms) {
            let book = |(slot, work): &(WorkerSlot, Work)| {
                (*slot, bookings.book_prompt(*slot, *work, key_ms))
            };
            return Verdict::Goes(decision.work.iter().map(book).collect());
        }
        let prompts = decision.work.iter().filter(|(_, work)| work.prefills > 0);
        let list = |(slot, work): &(WorkerSlot, Work)| {
            bookings.list_prompt(*slot, work.prompt_alone(), key_ms)
        };
        Verdict::Waits(Hold {
            prefill: plan.prefill(),
            _prompt: prompts.map(list).collect(),
        })
    }
}

impl NoPlan {
    /// Whether a request without a plan waits. `lasting` are those of its
    /// excluded workers that will never run it: the others refused for now, and
    /// may be all that there are.
    pub fn waits(
        &self,
        cluster: &Cluster<'_>,
        request: &RequestView<'_>,
        lasting: &[WorkerSlot],
    ) -> bool {
        if lasting.is_empty() && (self.passes() || request.excluded.is_empty()) {
            return self.passes();
        }
        may_run(cluster, request, lasting).is_ok()
    }
}

/// Whether somebody may run a request once there is room, whoever refused it
/// for now: anybody but the workers in `lasting`.
///
/// # Errors
/// Why nobody ever will.
pub fn may_run(
    cluster: &Cluster<'_>,
    request: &RequestView<'_>,
    lasting: &[WorkerSlot],
) -> Result<(), NoPlan> {
    let request = RequestView {
        excluded: &[],
        ..*request
    };
    let answer = if lasting.is_empty() {
        placeable(cluster, &request)
    } else {
        let rest = cluster.workers.iter();
        let rest = rest.filter(|view| !lasting.contains(&view.slot)).cloned();
        let rest: Vec<WorkerView> = rest.collect();
        let left = Cluster {
            workers: &rest,
            table: None,
            ..*cluster
        };
        placeable(&left, &request)
    };
    match answer {
        Err(never) if !never.passes() => Err(never),
        _ => Ok(()),
    }
}
