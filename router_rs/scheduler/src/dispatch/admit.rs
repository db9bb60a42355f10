//! Who may wait: by predicted wait, by class, by deadline.

use super::line::{Line, OVERLOAD_MS};
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
    fn keeps_targets(&self) -> bool {
        self.max_wait_ms.is_finite() && self.targets.by_class()
    }
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
    /// An interactive request that would miss its target by its key begins an
    /// overload, until a second after the last one: more urgent classes go first,
    /// nobody is admitted who would miss its class's target, and who is less urgent
    /// than somebody that is being refused is refused, too.
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
        let last = RequestView {
            virtual_deadline_ms: f64::INFINITY,
            ..*request
        };
        let last = Estimate::of(cluster, &last);
        let work_ms = if last.workers == 0 { 0.0 } else { last.work_ms };
        let key_ms =
            virtual_deadline_ms(&self.settings.targets, request.class, arrival_ms, work_ms);
        let class = request.class;
        let (_, as_urgent_ms) = self.unlisted_ms(request.model, class, key_ms);
        let admission = self.by_key(cluster, request, (key_ms, work_ms), left_ms);
        if let (Err(Rejected::WaitTooLong { .. }), Some(line)) =
            (&admission, self.lines.get_mut(request.model))
        {
            line.refused(class, cluster.now_ms);
        }
        let admission = admission?;
        let sent: f64 = last.own_ms[..=class.index()].iter().sum();
        let of_class = Estimate {
            least_ms: 0.0,
            ..last
        };
        let all = AdmissionSettings {
            max_wait_ms: self.settings.max_wait_ms,
        };
        of_class.admit(as_urgent_ms + sent, None, &all)?;
        Ok(Admitted {
            key_ms,
            work_ms,
            wait_ms: admission.wait_ms,
        })
    }

    /// By its own predicted wait, which begins an overload or is in one.
    fn by_key(
        &mut self,
        cluster: &Cluster<'_>,
        request: &RequestView<'_>,
        (key_ms, work_ms): (f64, f64),
        left_ms: Option<f64>,
    ) -> Result<Admission, Rejected> {
        let (class, now_ms) = (request.class, cluster.now_ms);
        let estimate = |virtual_deadline_ms| {
            let keyed = RequestView {
                virtual_deadline_ms,
                ..*request
            };
            Estimate::of(cluster, &keyed)
        };
        let (mut before_ms, _) = self.unlisted_ms(request.model, class, key_ms);
        let mut found = estimate(key_ms);
        let on_time_ms = self.settings.targets.wait_on_time_ms(class, work_ms);
        let late = found.wait_ms(before_ms) > on_time_ms;
        let begins = late && class == Class::Interactive && self.settings.keeps_targets();
        let mut hopeless = false;
        if let Some(line) = self.lines.get_mut(request.model) {
            line.settle(now_ms);
            if begins {
                line.overload(now_ms);
            }
            if line.is_overloaded() {
                let first_ms;
                (first_ms, before_ms) = line.before_in_overload(class, key_ms);
                found = estimate(first_ms);
            }
            hopeless = line.is_hopeless(class, now_ms);
        }
        let all_ms = self.settings.max_wait_ms;
        let held = class == Class::Interactive || self.is_overloaded(request.model);
        let max_wait_ms = match held && self.settings.keeps_targets() {
            true => all_ms.min(on_time_ms),
            false => all_ms,
        };
        let admission = found.admit(before_ms, left_ms, &AdmissionSettings { max_wait_ms })?;
        match hopeless {
            true => Err(Rejected::WaitTooLong {
                wait_ms: admission.wait_ms,
                retry_after_ms: OVERLOAD_MS,
                work_ms,
            }),
            false => Ok(admission),
        }
    }

    /// Whether a model's more urgent classes go first, whatever the keys.
    pub fn is_overloaded(&self, model: &str) -> bool {
        self.lines.get(model).is_some_and(Line::is_overloaded)
    }

    /// How long a request of so much work may wait now, ms: as long as all may,
    /// and no longer than its class's target allows, where it is interactive or a
    /// more urgent class is being refused.
    pub fn longest_wait_ms(&self, model: &str, class: Class, work_ms: f64, now_ms: f64) -> f64 {
        let line = self.lines.get(model);
        let hopeless = line.is_some_and(|line| line.is_hopeless(class, now_ms));
        let all_ms = self.settings.max_wait_ms;
        match self.settings.keeps_targets() && (class == Class::Interactive || hopeless) {
            true => all_ms.min(self.settings.targets.longest_wait_ms(class, work_ms)),
            false => all_ms,
        }
    }
}
