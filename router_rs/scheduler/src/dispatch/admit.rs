//! Who may wait: by predicted wait, by class, by deadline.

use super::overload::OVERLOAD_MS;
use super::{Dispatch, DispatchSettings};
use crate::admission::{Admission, AdmissionSettings, Estimate, Rejected};
use crate::deadline::virtual_deadline_ms;
use crate::request::{Class, RequestView};
use crate::worker::Cluster;

/// A request may wait.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Admitted {
    /// Its virtual deadline, ms.
    pub key_ms: f64,
    /// Predicted work of its prompt, ms.
    pub work_ms: f64,
    /// Predicted wait until its prompt starts, ms.
    pub wait_ms: f64,
}

impl DispatchSettings {
    /// Whether targets of the classes bound waiting: not where classes have no
    /// head start over one another, nor where anybody may wait for ever.
    pub(super) fn keeps_targets(&self) -> bool {
        self.max_wait_ms.is_finite() && self.targets.by_class()
    }
}

/// What is found out of a request that wants to wait.
#[derive(Debug, Clone, Copy)]
struct Found {
    /// Or why it may not.
    admitted: Result<Admitted, Rejected>,
    /// It is interactive, could be on time, and would not be if all went by their
    /// keys.
    late: bool,
    /// It is refused for its own wait, though it could be on time.
    refused: bool,
}

impl<T> Dispatch<T> {
    /// Whether a request that arrived then may wait, and its key; the one of
    /// `request` does not count. `left_ms` is the time to its client's deadline.
    ///
    /// Two bounds: its own predicted wait, by its key, within
    /// [`DispatchSettings::max_wait_ms`], or with which its first token is on time
    /// where it is interactive; and the work of all requests of this router
    /// that are as urgent by class, waiting or sent and not computed, shared by
    /// the workers, within [`DispatchSettings::max_wait_ms`]. The second keeps the
    /// router bounded whatever arrives: ever shorter requests could pass all
    /// others, and each be admitted.
    ///
    /// An interactive request that could be on time, and would not be by its key,
    /// begins an overload, until a second after the last one and until none waits:
    /// more urgent classes go first, nobody is admitted who would miss its class's
    /// target, and while a class is refused nobody less urgent is let in who would
    /// have to wait.
    ///
    /// # Errors
    /// [`Rejected`], with an honest delay.
    pub fn admit(
        &mut self,
        cluster: &Cluster<'_>,
        request: &RequestView<'_>,
        arrival_ms: f64,
        left_ms: Option<f64>,
    ) -> Result<Admitted, Rejected> {
        let found = self.find_out(cluster, request, arrival_ms, left_ms);
        if let Some(line) = self.lines.get_mut(request.model) {
            if found.late {
                line.late(cluster.now_ms);
            }
            if found.refused {
                line.overload.refused(request.class, cluster.now_ms);
            }
        }
        found.admitted
    }

    /// The same for one that only wants to know.
    ///
    /// # Errors
    /// [`Rejected`], with an honest delay.
    pub fn would_admit(
        &self,
        cluster: &Cluster<'_>,
        request: &RequestView<'_>,
        arrival_ms: f64,
        left_ms: Option<f64>,
    ) -> Result<Admitted, Rejected> {
        let found = self.find_out(cluster, request, arrival_ms, left_ms);
        found.admitted
    }

    fn find_out(
        &self,
        cluster: &Cluster<'_>,
        request: &RequestView<'_>,
        arrival_ms: f64,
        left_ms: Option<f64>,
    ) -> Found {
        let (settings, class) = (&self.settings, request.class);
        let estimate = |virtual_deadline_ms| {
            let keyed = RequestView {
                virtual_deadline_ms,
                ..*request
            };
            Estimate::of(cluster, &keyed)
        };
        let last = estimate(f64::INFINITY);
        let work_ms = if last.workers == 0 { 0.0 } else { last.work_ms };
        let key_ms = virtual_deadline_ms(&settings.targets, class, arrival_ms, work_ms);
        let by_key = estimate(key_ms);
        let (mut before_ms, as_urgent_ms) = self.unlisted_ms(request.model, class, key_ms);

        let on_time_ms = settings.targets.wait_on_time_ms(class, work_ms);
        // Who takes as long as all of its target is no sign of anything.
        let could_be =
            settings.keeps_targets() && 2.0 * work_ms <= settings.targets.of(class).ttft_ms;
        let late =
            class == Class::Interactive && could_be && by_key.wait_ms(before_ms) > on_time_ms;
        let (line, now_ms) = (self.lines.get(request.model), cluster.now_ms);
        let overloaded = line.filter(|line| late || line.is_overloaded(now_ms));
        if let Some(line) = overloaded {
            before_ms = line.before_in_overload_ms(class, key_ms);
        }

        let bound = |max_wait_ms| AdmissionSettings { max_wait_ms };
        let to_target =
            settings.keeps_targets() && (class == Class::Interactive || overloaded.is_some());
        let own_ms = match to_target {
            true => settings.max_wait_ms.min(on_time_ms),
            false => settings.max_wait_ms,
        };
        let own = by_key.admit(before_ms, left_ms, &bound(own_ms));
        let refused = could_be && matches!(own, Err(Rejected::WaitTooLong { .. }));

        let sent: f64 = last.own_ms[..=class.index()].iter().sum();
        let of_class = Estimate {
            least_ms: 0.0,
            ..last
        };
        let all = || of_class.admit(as_urgent_ms + sent, None, &bound(settings.max_wait_ms));
        let starved = overloaded.and_then(|line| line.overload.starved_ms(class, now_ms));
        let admitted = own.and_then(|Admission { wait_ms, .. }| {
            all()?;
            if starved.is_some() && wait_ms > settings.dispatch_ahead_ms {
                return Err(Rejected::WaitTooLong {
                    wait_ms,
                    retry_after_ms: OVERLOAD_MS,
                    work_ms,
                });
            }
            Ok(Admitted {
                key_ms,
                work_ms,
                wait_ms,
            })
        });
        Found {
            admitted,
            late,
            refused,
        }
    }

    /// Whether a model's more urgent classes go first, whatever the keys.
    pub fn is_overloaded(&self, model: &str, now_ms: f64) -> bool {
        let line = self.lines.get(model);
        line.is_some_and(|line| line.is_overloaded(now_ms))
    }

    /// How long a request of so much work may wait now, ms: as long as all may.
    /// No longer than until its virtual deadline, or for its class's target, where
    /// it is interactive, or a more urgent class has been refused for as long: its
    /// turn would not come. Where nobody could say what its work is, since no
    /// worker was there, as long as all may.
    pub fn longest_wait_ms(&self, model: &str, class: Class, work_ms: f64, now_ms: f64) -> f64 {
        let all_ms = self.settings.max_wait_ms;
        if !self.settings.keeps_targets() || work_ms <= 0.0 {
            return all_ms;
        }
        let target_ms = self.settings.targets.longest_wait_ms(class, work_ms);
        let line = self.lines.get(model);
        let starved_ms = line.and_then(|line| line.overload.starved_ms(class, now_ms));
        match class == Class::Interactive || starved_ms.is_some_and(|for_ms| for_ms >= target_ms) {
            true => all_ms.min(target_ms),
            false => all_ms,
        }
    }
}
