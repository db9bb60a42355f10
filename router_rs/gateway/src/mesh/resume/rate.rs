//! How often a tenant may have this router ask all workers for a generation.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use crate::error::{RequestError, retry_after};

/// Tenants that are kept before those that owe nothing are looked for.
const FEW: usize = 1_024;

/// What each tenant asked for that has not run off yet, and when that was.
#[derive(Debug, Default)]
pub(super) struct Rate(Mutex<HashMap<u128, (f64, Instant)>>);

impl Rate {
    /// One more call of a tenant that may make so many a second on average, as many as a
    /// second's at once; 0: any.
    ///
    /// # Errors
    /// Too many, and when there is room for one.
    pub(super) fn take(
        &self,
        tenant: u128,
        a_second: f64,
        now: Instant,
    ) -> Result<(), RequestError> {
        if a_second <= 0.0 {
            return Ok(());
        }
        let most = a_second.max(1.0);
        let left = |(owed, at): (f64, Instant)| {
            let passed = now.saturating_duration_since(at).as_secs_f64();
            (owed - passed * a_second).max(0.0)
        };
        // A number and an instant are whole.
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if all.len() >= FEW {
            all.retain(|_, owes| left(*owes) > 0.0);
        }
        let owed = all.get(&tenant).map_or(0.0, |owes| left(*owes)) + 1.0;
        // Sums of such parts are not exact.
        if owed > most + 1e-9 {
            let wait_ms = (owed - most) / a_second * 1e3;
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
        for (a_second, at_once, one_ms) in [(1_000.0, 1_000, 1), (0.5, 1, 2_000)] {
            let (rate, now) = (Rate::default(), Instant::now());
            let take = |tenant, now| rate.take(tenant, a_second, now);
            for _ in 0..at_once {
                assert!(take(1, now).is_ok());
            }
            let refused = take(1, now);
            assert!(matches!(refused, Err(RequestError::TenantLimit { .. })));
            assert!(take(2, now).is_ok());
            let later = now + Duration::from_millis(one_ms);
            assert!(take(1, later).is_ok());
            assert!(take(1, later).is_err());
            assert!((0..9_000).all(|_| rate.take(1, 0.0, now).is_ok()));
        }
    }
}
