//! Who may wait: by predicted wait, by class, by deadline.

use super::Dispatch;
use crate::admission::{AdmissionSettings, Estimate, Rejected};
use crate::deadline::virtual_deadline_ms;
use crate::request::RequestView;
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

impl<T> Dispatch<T> {
    /// Whether a request that arrived then may wait, and its key; the one of
    /// `request` does not count. `left_ms` is the time to its client's deadline.
    ///
    /// Two bounds: its own predicted wait, by its key; and the work of all
    /// requests of this router that are as urgent by class, waiting or sent and
    /// not computed, shared by the workers. The second keeps the router bounded
    /// whatever arrives: ever shorter requests could pass all others, and each
    /// be admitted.
    ///
    /// # Errors
    /// [`Rejected`], with an honest delay.
    pub fn admit(
        &self,
        cluster: &Cluster<'_>,
        request: &RequestView<'_>,
        arrival_ms: f64,
        left_ms: Option<f64>,
    ) -> Result<Admitted, Rejected> {
        let bound = AdmissionSettings {
            max_wait_ms: self.settings.max_wait_ms,
        };
        let last = RequestView {
            virtual_deadline_ms: f64::INFINITY,
            ..*request
        };
        let last = Estimate::of(cluster, &last);
        let work_ms = if last.workers == 0 { 0.0 } else { last.work_ms };
        let key_ms =
            virtual_deadline_ms(&self.settings.targets, request.class, arrival_ms, work_ms);
        let keyed = RequestView {
            virtual_deadline_ms: key_ms,
            ..*request
        };
        let (before_ms, as_urgent_ms) = self.unlisted_ms(request.model, request.class, key_ms);
        let estimate = Estimate::of(cluster, &keyed);
        let admission = estimate.admit(before_ms, left_ms, &bound)?;
        let sent: f64 = last.own_ms[..=request.class.index()].iter().sum();
        let of_class = Estimate {
            least_ms: 0.0,
            ..last
        };
        of_class.admit(as_urgent_ms + sent, None, &bound)?;
        Ok(Admitted {
            key_ms,
            work_ms,
            wait_ms: admission.wait_ms,
        })
    }
}
