//! What each tenant has open, and how fast it asks.
//!
//! The rate is held by a leaky bucket (the generic cell rate algorithm of ITU-T
//! I.371): what was asked for runs off at the allowed rate, and a second's worth
//! may stand in it.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use super::TenantLimits;
use crate::error::retry_after;

/// Accounts that are kept before those without use are looked for.
const FEW: usize = 1_024;
/// Share of a new one in the mean of times that requests were open.
const NEWEST: f64 = 0.2;

/// Why a tenant gets no more now.
#[derive(Debug, PartialEq)]
pub(super) struct OverLimit {
    /// Which limit, in words.
    pub(super) what: &'static str,
    /// When there should be room for one.
    pub(super) wait: Duration,
}

#[derive(Debug)]
struct Account {
    open: u32,
    /// Requests that have not run off, at `at`.
    owed: f64,
    at: Instant,
    /// At which they do, a second.
    rate: f64,
    /// Mean time that a request stays open, s; none has ended at 0.
    open_s: f64,
}

impl Account {
    fn owed_at(&self, now: Instant) -> f64 {
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        (self.owed - passed * self.rate).max(0.0)
    }
}

/// All tenants that have something open, or asked a moment ago.
#[derive(Debug, Default)]
pub(crate) struct Accounts {
    of: HashMap<u128, Account>,
    sweep_at: usize,
}

impl Accounts {
    /// So many requests come together, one at least and no more than ever may.
    /// Refused ones count for nothing.
    pub(super) fn enter(
        &mut self,
        tenant: u128,
        limits: &TenantLimits,
        count: u32,
        now: Instant,
    ) -> Result<(), OverLimit> {
        self.sweep(now);
        let account = self.of.entry(tenant).or_insert(Account {
            open: 0,
            owed: 0.0,
            at: now,
            rate: 0.0,
            open_s: 0.0,
        });
        let places = account.open.saturating_add(count);
        if limits.concurrency > 0 && places > limits.concurrency {
            // Those that are open end one by one, evenly as far as is known.
            let to_end = f64::from(places - limits.concurrency);
            let wait = account.open_s * to_end / f64::from(account.open.max(1));
            return Err(OverLimit {
                what: "too many requests at the same time",
                wait: retry_after(wait * 1e3),
            });
        }
        // At the rate that was in force; a file of keys may have another one now.
        let owed = account.owed_at(now);
        let rate = limits.requests_per_second;
        let most = limits.burst().unwrap_or(0.0);
        // No more than may ever be owed at the new one.
        (account.owed, account.at, account.rate) = (owed.min(most), now, rate);
        if rate > 0.0 {
            let owes = account.owed + f64::from(count);
            if let Some(over) = over_rate(owes, most, rate) {
                return Err(over);
            }
            account.owed = owes;
        }
        account.open += count;
        Ok(())
    }

    /// Whether the rate alone would refuse one more request. Nothing is counted.
    pub(super) fn over_rate(
        &self,
        tenant: u128,
        limits: &TenantLimits,
        now: Instant,
    ) -> Option<OverLimit> {
        let most = limits.burst()?;
        let owed = self.of.get(&tenant)?.owed_at(now).min(most);
        over_rate(owed + 1.0, most, limits.requests_per_second)
    }

    /// A request that came was none, as part of a call that was refused.
    pub(super) fn take_back(&mut self, tenant: u128, now: Instant) {
        let Some(account) = self.of.get_mut(&tenant) else {
            return;
        };
        account.open = account.open.saturating_sub(1);
        (account.owed, account.at) = ((account.owed_at(now) - 1.0).max(0.0), now);
    }

    /// A request that came at `since` is over.
    pub(super) fn leave(&mut self, tenant: u128, since: Instant, now: Instant) {
        let Some(account) = self.of.get_mut(&tenant) else {
            return;
        };
        account.open = account.open.saturating_sub(1);
        let took = now.saturating_duration_since(since).as_secs_f64();
        let newest = if account.open_s == 0.0 { 1.0 } else { NEWEST };
        account.open_s += newest * (took - account.open_s);
    }

    /// Drops accounts without use, once there are twice as many as there were
    /// after the last time.
    fn sweep(&mut self, now: Instant) {
        if self.of.len() < self.sweep_at.max(FEW) {
            return;
        }
        self.of
            .retain(|_, account| account.open > 0 || account.owed_at(now) > 0.0);
        self.sweep_at = 2 * self.of.len();
    }
}

/// That so many requests are more than may stand there at this rate.
fn over_rate(owed: f64, most: f64, rate: f64) -> Option<OverLimit> {
    let over = owed - most;
    // Sums of such parts are not exact.
    (over > 1e-9).then(|| OverLimit {
        what: "too many requests a second",
        wait: retry_after(over / rate * 1e3),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::RETRY_AFTER;

    fn limits(requests_per_second: f64, concurrency: u32) -> TenantLimits {
        TenantLimits {
            requests_per_second,
            concurrency,
        }
    }

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn a_second_of_requests_passes_at_once_and_then_one_for_each_that_is_paid_off() {
        let mut accounts = Accounts::default();
        let (start, limits) = (Instant::now(), limits(4.0, 0));
        for _ in 0..4 {
            assert_eq!(accounts.enter(1, &limits, 1, start), Ok(()));
        }
        let refused = accounts
            .enter(1, &limits, 1, start)
            .map_err(|over| over.wait);
        assert_eq!(refused, Err(ms(250)));
        // Another tenant's account is its own.
        assert_eq!(accounts.enter(2, &limits, 1, start), Ok(()));
        // What was told is the truth, and what was refused has cost nothing.
        assert!(accounts.enter(1, &limits, 1, start + ms(249)).is_err());
        assert_eq!(accounts.enter(1, &limits, 1, start + ms(250)), Ok(()));
        assert!(accounts.enter(1, &limits, 1, start + ms(251)).is_err());
    }

    #[test]
    fn less_than_one_a_second_passes_one_at_a_time() {
        let mut accounts = Accounts::default();
        let (start, limits) = (Instant::now(), limits(0.1, 0));
        assert_eq!(accounts.enter(1, &limits, 1, start), Ok(()));
        let wait = accounts.enter(1, &limits, 1, start + ms(4_000)).err();
        assert_eq!(wait.map(|over| over.wait), Some(ms(6_000)));
        assert_eq!(accounts.enter(1, &limits, 1, start + ms(10_000)), Ok(()));
    }

    #[test]
    fn another_rate_holds_from_the_next_request_on() {
        let mut accounts = Accounts::default();
        let start = Instant::now();
        assert_eq!(accounts.enter(1, &limits(0.01, 0), 1, start), Ok(()));
        assert!(accounts.enter(1, &limits(0.01, 0), 1, start).is_err());
        // One is owed, of the twenty that may be.
        for _ in 0..19 {
            assert_eq!(accounts.enter(1, &limits(20.0, 0), 1, start), Ok(()));
        }
        assert!(accounts.enter(1, &limits(20.0, 0), 1, start).is_err());
        // A slower one forgives what is above its own bound.
        let wait = accounts.enter(1, &limits(0.5, 0), 1, start).err();
        assert_eq!(wait.map(|over| over.wait), Some(ms(2_000)));
        // The slowest rate that can be written is no more than slow.
        let wait = accounts.enter(1, &limits(1e-300, 0), 1, start).err();
        assert_eq!(wait.map(|over| over.wait), Some(RETRY_AFTER.1));
    }

    #[test]
    fn those_that_have_half_a_name_in_common_have_an_account_each() {
        let mut accounts = Accounts::default();
        let (start, limits) = (Instant::now(), limits(0.0, 1));
        assert_eq!(accounts.enter(1, &limits, 1, start), Ok(()));
        assert_eq!(accounts.enter(1 | 1 << 64, &limits, 1, start), Ok(()));
        assert!(accounts.enter(1, &limits, 1, start).is_err());
    }

    #[test]
    fn what_has_ended_makes_room_and_says_how_long_the_next_takes() {
        let mut accounts = Accounts::default();
        let (start, limits) = (Instant::now(), limits(0.0, 2));
        for _ in 0..2 {
            assert_eq!(accounts.enter(1, &limits, 1, start), Ok(()));
        }
        // Nothing is known yet: soon.
        let wait = accounts.enter(1, &limits, 1, start).err();
        assert_eq!(wait.map(|over| over.wait), Some(RETRY_AFTER.0));
        accounts.leave(1, start, start + ms(3_000));
        assert_eq!(accounts.enter(1, &limits, 1, start + ms(3_000)), Ok(()));
        let wait = accounts.enter(1, &limits, 1, start + ms(3_000)).err();
        assert_eq!(wait.map(|over| over.wait), Some(ms(1_500)));
    }

    #[test]
    fn several_enter_together_or_not_at_all_and_can_be_taken_back() {
        let mut accounts = Accounts::default();
        let (start, both) = (Instant::now(), limits(4.0, 3));
        assert_eq!(accounts.enter(1, &both, 1, start), Ok(()));
        assert_eq!(accounts.enter(1, &both, 2, start), Ok(()));
        // Three are open: two of them have to end, which take some time each.
        accounts.leave(1, start, start + ms(3_000));
        let later = start + ms(3_000);
        assert_eq!(accounts.enter(1, &both, 1, later), Ok(()));
        let refused = accounts.enter(1, &both, 2, later).map_err(|over| over.wait);
        assert_eq!(refused, Err(ms(2_000)));
        // Of four a second one was asked for since; a place alone is not enough.
        accounts.leave(1, later, later);
        accounts.leave(1, later, later);
        accounts.leave(1, later, later);
        assert_eq!(accounts.enter(1, &both, 3, later), Ok(()));
        for _ in 0..3 {
            accounts.leave(1, later, later);
        }
        let refused = accounts.enter(1, &both, 2, later).map_err(|over| over.wait);
        assert_eq!(refused, Err(ms(500)));
        // What was refused as a whole has cost nothing, its first part neither.
        accounts.take_back(1, later);
        accounts.take_back(1, later);
        assert_eq!(accounts.enter(1, &both, 2, later), Ok(()));
        // Never below nothing.
        let much = later + ms(60_000);
        accounts.take_back(1, much);
        accounts.take_back(1, much);
        assert_eq!(accounts.enter(1, &both, 3, much), Ok(()));
        assert_eq!(accounts.enter(1, &limits(4.0, 0), 1, much), Ok(()));
        assert!(accounts.enter(1, &limits(4.0, 0), 1, much).is_err());
    }

    #[test]
    fn accounts_without_use_are_dropped() {
        let mut accounts = Accounts::default();
        let (mut now, limits) = (Instant::now(), limits(1_000.0, 1));
        assert_eq!(accounts.enter(0, &limits, 1, now), Ok(()));
        for tenant in 1..10_000 {
            assert_eq!(accounts.enter(tenant, &limits, 1, now), Ok(()));
            accounts.leave(tenant, now, now + ms(1));
            now += ms(2);
        }
        assert!(accounts.of.len() <= FEW, "{}", accounts.of.len());
        assert_eq!(accounts.of[&0].open, 1);
    }

    #[test]
    fn a_rate_can_be_looked_at_and_costs_nothing() {
        let (mut accounts, now) = (Accounts::default(), Instant::now());
        let both = limits(2.0, 1);
        let over = |accounts: &Accounts, now| accounts.over_rate(1, &both, now);
        assert_eq!(over(&accounts, now), None);
        accounts.enter(1, &both, 1, now).expect("there is room");
        for _ in 0..9 {
            assert_eq!(over(&accounts, now), None, "places do not count");
        }
        let in_place = limits(2.0, 0);
        accounts.enter(1, &in_place, 1, now).expect("there is room");
        let told = over(&accounts, now).expect("two are a second's");
        assert_eq!(told.what, "too many requests a second");
        assert_eq!(over(&accounts, now + ms(500)), None);
        assert_eq!(accounts.over_rate(1, &limits(0.0, 1), now), None);
    }
}
