//! Who calls, and how much of the mesh is theirs: what the door asks before it
//! reads a byte (PROTOCOLS 5 and 6).
//!
//! A tenant is who a key belongs to. Where no keys are set it is the address that
//! a call comes from.

mod accounts;
mod jwt;
mod keys;

use std::{
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use http::{HeaderMap, header};
use kvmesh_trust::{FileError, Followed};
use sha2::{Digest as _, Sha256};

use crate::{error::RequestError, serve::Port, settings::Settings, telemetry::Telemetry};
use accounts::{Accounts, OverLimit};
use jwt::{Jwt, JwtKeys};
use keys::{Holder, Keys};

/// What one tenant may have at the same time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct TenantLimits {
    /// Requests a second on average, as many as a second's at once; 0: any.
    pub(crate) requests_per_second: f64,
    /// Requests at the same time; 0: any number.
    pub(crate) concurrency: u32,
}

impl TenantLimits {
    /// Whether there are any.
    fn any(&self) -> bool {
        self.concurrency > 0 || self.requests_per_second > 0.0
    }

    /// Requests that may come at the same moment, by the rate; `None`: any number.
    fn burst(&self) -> Option<f64> {
        let rate = self.requests_per_second;
        (rate > 0.0).then_some(rate.max(1.0))
    }

    /// The limit that this many requests at once exceed, however long they wait, in
    /// words.
    fn never(&self, requests: u32) -> Option<String> {
        let most = self.concurrency;
        if most > 0 && requests > most {
            return Some(format!(
                "at most {most}, as many requests as this tenant may have open at the same time \
                 (concurrency), and each answer is one; asked for are {requests}"
            ));
        }
        let most = self.burst()?;
        (f64::from(requests) > most).then(|| {
            format!(
                "at most {}, as many requests as this tenant may ask for at once \
                 (requests_per_second), and each answer is one; asked for are {requests}",
                most.floor()
            )
        })
    }
}

/// Whose a call is.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Caller {
    /// The tenant ([`tenant_of`]).
    pub(crate) tenant: u128,
    /// What keeps the tenant's prefixes from those of others; empty without keys.
    pub(crate) salt: Arc<str>,
    /// Whether it could as well ask the Admin service.
    pub(crate) operates: bool,
    limits: TenantLimits,
}

impl Caller {
    /// The salt of a request's prefixes: the tenant's, with what the client gave.
    pub(crate) fn salted(&self, given: String) -> String {
        match self.salt.is_empty() {
            true => given,
            // Neither a tenant's name nor its salt has such a character.
            false => format!("{}\u{1f}{given}", self.salt),
        }
    }
}

/// Knows keys, and counts what tenants have.
pub(crate) struct Access {
    keys: Option<Arc<Followed<Keys>>>,
    jwt: Option<Jwt>,
    /// Operators have a port of their own.
    apart: bool,
    limits: TenantLimits,
    accounts: Arc<Mutex<Accounts>>,
    telemetry: Arc<Telemetry>,
}

impl Access {
    /// # Errors
    /// [`FileError`] for a file of keys that cannot be used.
    pub(crate) fn new(settings: &Settings, telemetry: Arc<Telemetry>) -> Result<Self, FileError> {
        let limits = TenantLimits {
            requests_per_second: settings.tenant_requests_per_s,
            concurrency: settings.tenant_concurrency,
        };
        let keys = settings.api_keys.as_deref();
        let keys = keys.map(|file| Keys::open(file, limits)).transpose()?;
        let jwt = settings.jwt.keys.as_deref();
        let jwt = jwt.map(|keys| Jwt::open(keys, &settings.jwt)).transpose()?;
        let access = Self {
            keys: keys.map(Arc::new),
            jwt,
            apart: settings.admin_listen.is_some(),
            limits,
            accounts: Arc::default(),
            telemetry,
        };
        match settings.admin_listen {
            Some(reachable)
                if !reachable.ip().is_loopback()
                    && access.operators().is_none()
                    && !settings.insecure =>
            {
                Err(FileError {
                    setting: "api_keys",
                    file: settings.api_keys.clone().unwrap_or_default(),
                    reason: format!(
                        "admin_listen is {reachable}, which other machines can reach: operators \
                         need keys (`kvmesh key --operator`), or insecure says that the network \
                         is trusted"
                    ),
                })
            }
            _ => Ok(access),
        }
    }

    /// Whether operators have a port of their own.
    pub(crate) fn admin_is_apart(&self) -> bool {
        self.apart
    }

    /// Whose a call for inference is.
    ///
    /// # Errors
    /// [`RequestError::Unauthenticated`] without a key that is known, and
    /// [`RequestError::PermissionDenied`] with one that is no tenant's.
    pub(crate) fn caller(&self, headers: &HeaderMap, from: IpAddr) -> Result<Caller, RequestError> {
        let operates =
            !self.apart && from.to_canonical().is_loopback() && self.operators().is_none();
        if self.keys.is_none() && self.jwt.is_none() {
            return Ok(Caller {
                tenant: tenant_of(&household(from).to_string()),
                salt: Arc::default(),
                operates,
                limits: self.limits,
            });
        }
        match self.holder(bearer(headers)?) {
            None => Err(RequestError::Unauthenticated),
            Some(Holder::Operator) => Err(RequestError::PermissionDenied),
            Some(Holder::Tenant(caller)) => Ok(Caller { operates, ..caller }),
        }
    }

    /// Whose a key or a token is.
    fn holder(&self, shown: &str) -> Option<Holder> {
        let keys = self.keys.as_ref().map(|keys| keys.now());
        if let Some(holder) = keys.as_ref().and_then(|keys| keys.holder(shown)) {
            return Some(holder.clone());
        }
        let name = self.jwt.as_ref()?.tenant(shown)?;
        // The file may say more of a tenant than its keys.
        let known = keys.as_ref().and_then(|keys| keys.tenant(&name)).cloned();
        Some(Holder::Tenant(known.unwrap_or_else(|| Caller {
            tenant: tenant_of(&name),
            // No salt that an operator wrote down: those have no such character.
            salt: Arc::from(format!("\u{1e}{name}")),
            operates: false,
            limits: self.limits,
        })))
    }

    /// Whether a call may operate the cluster: it comes over the operators' port
    /// or, where they have none, from this machine, and where operators have keys
    /// with one of theirs.
    ///
    /// # Errors
    /// As [`Self::caller`], with the parts of tenants and operators changed.
    pub(crate) fn operator(
        &self,
        headers: &HeaderMap,
        from: IpAddr,
        port: Port,
    ) -> Result<(), RequestError> {
        let there = match port {
            Port::Admin => true,
            Port::Clients => !self.apart && from.to_canonical().is_loopback(),
        };
        if !there {
            return Err(RequestError::PermissionDenied);
        }
        if self.operators().is_none() {
            return Ok(());
        }
        match self.holder(bearer(headers)?) {
            None => Err(RequestError::Unauthenticated),
            Some(Holder::Tenant(_)) => Err(RequestError::PermissionDenied),
            Some(Holder::Operator) => Ok(()),
        }
    }

    /// The keys, where operators have some.
    fn operators(&self) -> Option<Arc<Keys>> {
        let keys = self.keys.as_ref()?.now();
        keys.has_operators().then_some(keys)
    }

    /// Counts a request, from now until what is returned is dropped.
    ///
    /// # Errors
    /// [`RequestError::TenantLimit`].
    pub(crate) fn enter(&self, caller: &Caller, now: Instant) -> Result<Visit, RequestError> {
        self.count(caller, &caller.limits, 1, now)?;
        Ok(self.visit(caller, now))
    }

    /// Counts a request that takes the place of one which is counted: its rate alone is
    /// looked at.
    ///
    /// # Errors
    /// [`RequestError::TenantLimit`].
    pub(crate) fn enter_in_place(
        &self,
        caller: &Caller,
        now: Instant,
    ) -> Result<Visit, RequestError> {
        let limits = TenantLimits {
            concurrency: 0,
            ..caller.limits
        };
        self.count(caller, &limits, 1, now)?;
        Ok(self.visit(caller, now))
    }

    /// Whether the tenant's rate leaves room for one more request, whatever it has open.
    /// Counts nothing.
    ///
    /// # Errors
    /// [`RequestError::TenantLimit`].
    pub(crate) fn has_rate(&self, caller: &Caller, now: Instant) -> Result<(), RequestError> {
        let over = lock(&self.accounts).over_rate(caller.tenant, &caller.limits, now);
        over.map_or(Ok(()), |over| Err(over.into()))
    }

    /// Counts all answers of a call that has entered with the first, so many in
    /// all. They enter together: where they cannot, the first has cost nothing
    /// either. `field` is what to blame where there are too many for any time.
    ///
    /// # Errors
    /// [`RequestError::TenantLimit`], and [`RequestError::Invalid`] where waiting
    /// would not help.
    pub(crate) fn enter_all(
        &self,
        caller: &Caller,
        first: Visit,
        answers: u32,
        field: &str,
        now: Instant,
    ) -> Result<Vec<Visit>, RequestError> {
        let others = answers.saturating_sub(1);
        let entered = match caller.limits.never(answers) {
            _ if others == 0 => Ok(()),
            Some(allowed) => Err(RequestError::invalid(field, allowed)),
            None => self.count(caller, &caller.limits, others, now),
        };
        if let Err(error) = entered {
            first.take_back(Instant::now());
            return Err(error);
        }
        let others = (0..others).map(|_| self.visit(caller, now));
        Ok(std::iter::once(first).chain(others).collect())
    }

    /// `limits`: those of them that are looked at.
    fn count(
        &self,
        caller: &Caller,
        limits: &TenantLimits,
        requests: u32,
        now: Instant,
    ) -> Result<(), RequestError> {
        if !caller.limits.any() {
            return Ok(());
        }
        let entered = lock(&self.accounts).enter(caller.tenant, limits, requests, now);
        entered.map_err(RequestError::from)
    }

    /// What ends a request that was counted.
    fn visit(&self, caller: &Caller, now: Instant) -> Visit {
        let account = || (Arc::clone(&self.accounts), caller.tenant, now);
        Visit {
            account: caller.limits.any().then(account),
        }
    }

    /// Takes changed files, for as long as it is polled and there are some.
    pub(crate) async fn follow(self: Arc<Self>) {
        let keys = async {
            if let Some(keys) = &self.keys {
                let tell = |outcome: Result<&Keys, &FileError>| {
                    self.telemetry.keys_reloaded(outcome.is_ok());
                    match outcome {
                        Ok(keys) => {
                            tracing::info!(event = "keys_changed", tenants = keys.tenants())
                        }
                        Err(error) => tracing::error!(event = "keys_not_changed", %error),
                    }
                };
                Arc::clone(keys).follow(tell).await;
            }
        };
        let signers = async {
            if let Some(jwt) = &self.jwt {
                let tell = |outcome: Result<&JwtKeys, &FileError>| {
                    self.telemetry.jwt_keys_reloaded(outcome.is_ok());
                    match outcome {
                        Ok(keys) => tracing::info!(event = "jwt_keys_changed", keys = keys.len()),
                        Err(error) => tracing::error!(event = "jwt_keys_not_changed", %error),
                    }
                };
                Arc::clone(&jwt.keys).follow(tell).await;
            }
        };
        tokio::join!(keys, signers);
    }
}

impl From<OverLimit> for RequestError {
    fn from(OverLimit { what, wait }: OverLimit) -> Self {
        Self::TenantLimit {
            what,
            retry_after: wait,
        }
    }
}

/// A request in its tenant's account.
#[derive(Debug)]
pub(crate) struct Visit {
    account: Option<(Arc<Mutex<Accounts>>, u128, Instant)>,
}

impl Visit {
    /// It was none: its call was refused as a whole.
    fn take_back(mut self, now: Instant) {
        if let Some((accounts, tenant, _)) = self.account.take() {
            lock(&accounts).take_back(tenant, now);
        }
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        if let Some((accounts, tenant, since)) = self.account.take() {
            lock(&accounts).leave(tenant, since, Instant::now());
        }
    }
}

/// A tenant by its name, the same at every router: 128 bits of SHA-256. Whoever may choose
/// names finds none by which he is somebody else.
fn tenant_of(name: &str) -> u128 {
    let digest: [u8; 32] = Sha256::digest(name.as_bytes()).into();
    let mut half = [0; 16];
    half.copy_from_slice(&digest[..16]);
    u128::from_be_bytes(half)
}

/// Whom an address stands for: of IPv6 a host has a /64 to draw addresses from
/// (RFC 4291, 2.5.4; RFC 8981).
fn household(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => {
            let network = u128::from(address) & !u128::from(u64::MAX);
            IpAddr::V6(network.into())
        }
        address => address,
    }
}

/// The key of `authorization: Bearer KEY` (RFC 6750, 2.1).
fn bearer(headers: &HeaderMap) -> Result<&str, RequestError> {
    let value = headers.get(header::AUTHORIZATION);
    let text = value.and_then(|value| value.to_str().ok());
    text.and_then(|text| text.split_once(' '))
        .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
        .map(|(_, key)| key.trim())
        .ok_or(RequestError::Unauthenticated)
}

/// A panic under such a lock leaves nothing half done.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn access(requests_per_second: f64, concurrency: u32) -> Access {
        Access {
            keys: None,
            jwt: None,
            apart: false,
            limits: TenantLimits {
                requests_per_second,
                concurrency,
            },
            accounts: Arc::default(),
            telemetry: Arc::default(),
        }
    }

    fn entered(access: &Access, answers: u32, now: Instant) -> Result<Vec<Visit>, RequestError> {
        let caller = access.caller(&HeaderMap::new(), IpAddr::from([127, 0, 0, 1]))?;
        let first = access.enter(&caller, now)?;
        access.enter_all(&caller, first, answers, "n", now)
    }

    #[test]
    fn answers_of_one_call_enter_together_or_cost_nothing() {
        let (access, now) = (access(4.0, 3), Instant::now());
        let two = entered(&access, 2, now).unwrap();
        assert_eq!(two.len(), 2);
        // There is one place, and a rate of two is left.
        let refused = entered(&access, 2, now).unwrap_err();
        assert!(matches!(refused, RequestError::TenantLimit { .. }));
        drop(two);
        drop(entered(&access, 2, now).unwrap());
        let refused = entered(&access, 1, now).unwrap_err();
        assert!(matches!(refused, RequestError::TenantLimit { .. }));
    }

    #[test]
    fn more_answers_than_may_ever_be_are_no_matter_of_waiting() {
        let now = Instant::now();
        for (limits, answers, named) in [
            ((4.0, 3), 4, "concurrency"),
            ((2.5, 0), 3, "requests_per_second"),
            ((0.1, 0), 2, "requests_per_second"),
        ] {
            let access = access(limits.0, limits.1);
            let refused = entered(&access, answers, now).unwrap_err();
            let told = refused.to_string();
            let most = answers - 1;
            assert!(matches!(refused, RequestError::Invalid(_)), "{told}");
            assert!(told.starts_with(&format!("n: at most {most}, ")), "{told}");
            assert!(told.contains(named), "{told}");
            // It has cost nothing.
            assert_eq!(entered(&access, most, now).unwrap().len() as u32, most);
        }
        assert_eq!(entered(&access(0.0, 0), 128, now).unwrap().len(), 128);
    }

    #[test]
    fn a_tenant_is_the_first_half_of_the_sha_256_of_its_name() {
        // FIPS 180-4, its example of one block.
        assert_eq!(tenant_of("abc"), 0xba78_16bf_8f01_cfea_4141_40de_5dae_2223);
        assert_ne!(tenant_of("shop"), tenant_of("Shop"));
    }

    #[test]
    fn an_address_stands_for_all_that_its_host_may_draw() {
        let of = |text: &str| household(text.parse().unwrap()).to_string();
        assert_eq!(of("192.0.2.7"), "192.0.2.7");
        assert_eq!(of("::ffff:192.0.2.7"), "192.0.2.7");
        assert_eq!(of("2001:db8:1:2:3:4:5:6"), of("2001:db8:1:2:ffff::1"));
        assert_ne!(of("2001:db8:1:2::1"), of("2001:db8:1:3::1"));
    }
}
