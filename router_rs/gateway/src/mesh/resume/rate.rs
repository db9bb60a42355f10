//! How often a tenant may have this router ask all workers for a generation.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use crate::error::{RequestError, retry_after};

/// Calls a second on average, as many as a second's at once: a frame to each worker for
/// each. A router that is lost with a thousand streams of one tenant has them all resumed
/// at once.
const A_SECOND: f64 = 1_000.0;
/// Tenants that are kept before those that owe nothing are looked for.
const FEW: usize = 1_024;

/// What each tenant asked for that has not run off yet, and when that was.
#[derive(Debug, Default)]
pub(super) struct Rate(Mutex<HashMap<u128, (f64, Instant)>>);

impl Rate {
    /// One more call of a tenant.
    ///
    /// # Errors
    /// Too many, and when there is room for one.
    pub(super) fn take(&self, tenant: u128, now: Instant) -> Result<(), RequestError> {
        let left = |(owed, at): (f64, Instant)| {
            let passed = now.saturating_duration_since(at).as_secs_f64();
            (owed - passed * A_SECOND).max(0.0)
        };
        // A number and an instant are whole.
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if all.len() >= FEW {
            all.retain(|_, owes| left(*owes) > 0.0);
        }
        let owed = all.get(&tenant).map_or(0.0, |owes| left(*owes)) + 1.0;
        if owed > A_SECOND {
            let wait_ms = (owed - A_SECOND) / A_SECOND * 1e3;
            return Err(RequestError::TenantLimit {
                what: "too many calls of Resume a second",
                retry_after: retry_after(wait_ms).max(Duration::from_millis(100)),
            });
        }
        all.insert(tenant, (owed, now));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_of_calls_passes_at_once_and_each_tenant_has_its_own() {
        let (rate, now) = (Rate::default(), Instant::now());
        for _ in 0..1_000 {
            assert!(rate.take(1, now).is_ok());
        }
        let refused = rate.take(1, now);
        assert!(matches!(refused, Err(RequestError::TenantLimit { .. })));
        assert!(rate.take(2, now).is_ok());
        assert!(rate.take(1, now + Duration::from_millis(2)).is_ok());
    }
}
