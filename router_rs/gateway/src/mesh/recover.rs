//! What streams may do whose attempts failed: the budget for new attempts, and
//! the requests of which workers died.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use kvmesh_session::generation::{Cause, PlanRequest};
use sha2::{Digest as _, Sha256};

use super::{Core, backoff::Backoff, open::Open};
use crate::{error::RequestError, request::AdmittedRequest};

/// One in so many running requests may be at a second or later new attempt.
const RUNNING_A_RETRY: u64 = 5;
/// First pause before an attempt after failed ones, and the longest: eight of them take
/// one to three seconds, in which a path may heal.
const PAUSE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));
/// Requests kept in quarantine at most; the oldest go first.
const QUARANTINED: usize = 1_024;

/// New attempts under way, beyond the first one of each request (DESIGN 5: 20 %
/// of running requests). Without the bound a fault that hits every attempt would
/// multiply the load of a cluster that is short of workers already.
#[derive(Debug, Default)]
pub(super) struct Retries(Arc<AtomicU64>);

/// A place in the budget, held until the attempt brings a token or ends.
#[derive(Debug)]
pub(super) struct Retry(Arc<AtomicU64>);

impl Retries {
    /// A place for one of `running` requests; `None`: all are taken.
    pub(super) fn take(&self, running: u64) -> Option<Retry> {
        let most = (running / RUNNING_A_RETRY).max(1);
        let more = |held: u64| (held < most).then_some(held + 1);
        let taken = self
            .0
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, more);
        taken.ok().map(|_| Retry(Arc::clone(&self.0)))
    }
}

/// How long an attempt is put off, since those before it failed: the first new one goes at
/// once, each later one waits for longer. A lost worker is no reason to wait, for the next
/// attempt is on another one. `seed` says where between its bounds a pause is.
pub(super) fn pause(request: &PlanRequest, seed: u64) -> Option<Duration> {
    let before = match request.cause {
        Cause::Failed => request.failures.checked_sub(2)?,
        _ => return None,
    };
    let mut backoff = Backoff::new(PAUSE, seed);
    for _ in 0..before {
        backoff.next();
    }
    Some(backoff.next())
}

impl Drop for Retry {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Requests of which workers died, also where nothing else ran beside them.
#[derive(Debug, Default)]
pub(super) struct Quarantine(Mutex<HashMap<Name, Instant>>);

type Name = [u8; 32];

impl Quarantine {
    // An insert or a removal is whole.
    fn lock(&self) -> MutexGuard<'_, HashMap<Name, Instant>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, request: &AdmittedRequest, until: Instant) {
        let mut all = self.lock();
        if all.len() >= QUARANTINED
            && let Some(first) = all.iter().min_by_key(|(_, until)| **until)
        {
            let oldest = *first.0;
            all.remove(&oldest);
        }
        all.insert(name_of(request), until);
    }

    /// How much longer a request is in quarantine.
    fn left(&self, request: &AdmittedRequest, now: Instant) -> Option<Duration> {
        let mut all = self.lock();
        if all.is_empty() {
            return None;
        }
        all.retain(|_, until| *until > now);
        Some(*all.get(&name_of(request))? - now)
    }
}

/// A tenant's request: what makes an engine run it again as it did. Nobody finds one that
/// keeps another's out.
fn name_of(request: &AdmittedRequest) -> Name {
    let mut name = Sha256::new();
    name.update(request.tenant.to_le_bytes());
    name.update((request.model.len() as u64).to_le_bytes());
    name.update(request.model.as_bytes());
    for id in request.prompt_ids.iter() {
        name.update(id.to_le_bytes());
    }
    name.finalize().into()
}

impl Core {
    /// Refuses what is in quarantine.
    pub(super) fn check_quarantine(&self, request: &AdmittedRequest) -> Result<(), RequestError> {
        match self.quarantine.left(request, Instant::now()) {
            Some(left) => Err(quarantined(left)),
            None => Ok(()),
        }
    }

    /// Workers died of a request: it is not run again for a while.
    pub(super) fn quarantine(&self, open: &Open) {
        let time = self.settings.quarantine_time;
        tracing::warn!(generation = %open.id, ?time, "quarantined: workers died of it");
        self.counters.quarantined.add(1);
        self.quarantine.add(&open.request, Instant::now() + time);
    }
}

/// What the client of such a request is told.
pub(super) fn quarantined(left: Duration) -> RequestError {
    RequestError::Refused {
        reason: "QUARANTINED",
        message: format!(
            "workers died while they ran this request alone; it is not run for {} s",
            left.as_secs().max(1)
        ),
    }
}

#[cfg(test)]
mod tests {
    use kvmesh_session::generation::Loss;

    use super::*;
    use crate::mesh::tests::request;

    #[test]
    fn a_fifth_of_the_running_requests_may_be_at_a_later_attempt() {
        let retries = Retries::default();
        let held: Vec<_> = (0..4).map_while(|_| retries.take(15)).collect();
        assert_eq!(held.len(), 3);
        drop(held);
        let one = retries.take(0);
        assert!(one.is_some(), "one always may");
        assert!(retries.take(4).is_none());
    }

    #[test]
    fn attempts_after_failed_ones_wait_ever_longer_and_each_stream_for_its_own_time() {
        let asked = |cause, failures| PlanRequest {
            excluded: Default::default(),
            cause,
            wait_for_room: false,
            failures,
        };
        for seed in 0..100 {
            let pause = |failures| pause(&asked(Cause::Failed, failures), seed);
            assert_eq!((pause(0), pause(1)), (None, None), "the first goes at once");
            for (failures, bound_ms) in (2..).zip([50, 100, 200, 400, 800, 1_600, 2_000, 2_000]) {
                let bound = Duration::from_millis(bound_ms);
                let waits = pause(failures).expect("a later one waits");
                assert!(
                    bound / 4 <= waits && waits <= bound,
                    "{waits:?} of {bound:?}"
                );
            }
        }
        let third = |seed| pause(&asked(Cause::Failed, 3), seed);
        assert_eq!(third(1), third(1));
        assert_ne!(third(1), third(2));
        assert_eq!(pause(&asked(Cause::Lost(Loss::Died), 5), 1), None);
    }

    #[test]
    fn a_tenants_request_is_in_quarantine_and_nobody_elses() {
        let quarantine = Quarantine::default();
        let (now, time) = (Instant::now(), Duration::from_secs(5));
        let bad = request(&[1, 2], 3);
        quarantine.add(&bad, now + time);
        assert_eq!(quarantine.left(&bad, now), Some(time));
        assert_eq!(quarantine.left(&request(&[1, 3], 3), now), None);
        let other = AdmittedRequest {
            tenant: 9,
            ..bad.clone()
        };
        assert_eq!(quarantine.left(&other, now), None);
        assert_eq!(quarantine.left(&bad, now + time), None);
    }
}
