//! Settings of trust that go together, and those of tokens.

use std::{path::PathBuf, time::Duration};

use super::{Layers, Settings, SettingsError};

/// Tokens that somebody else signs.
#[derive(Clone, Debug, Default)]
pub struct JwtSettings {
    /// JWKS file. `None`: no tokens are taken.
    pub keys: Option<PathBuf>,
    /// What `iss` has to be.
    pub issuer: String,
    /// What `aud` has to be or to have.
    pub audience: String,
    /// The claim that names the tenant.
    pub tenant_claim: String,
    /// How far clocks may be apart.
    pub leeway: Duration,
}

impl JwtSettings {
    pub(super) fn of(layers: &Layers) -> Self {
        Self {
            keys: layers.path("jwt_keys"),
            issuer: layers.text("jwt_issuer"),
            audience: layers.text("jwt_audience"),
            tenant_claim: layers.text("jwt_tenant_claim"),
            leeway: layers.duration("jwt_leeway"),
        }
    }

    fn together(&self) -> Result<(), &'static str> {
        let asks = !self.issuer.is_empty() || !self.audience.is_empty();
        match &self.keys {
            Some(_) if self.issuer.is_empty() || self.audience.is_empty() => Err(
                "jwt_keys needs jwt_issuer and jwt_audience: without them a token that was made \
                 for somebody else would do",
            ),
            Some(_) if self.tenant_claim.is_empty() => {
                Err("jwt_tenant_claim is empty; allowed is the name of a claim, such as sub")
            }
            None if asks => Err("jwt_issuer and jwt_audience need jwt_keys"),
            _ => Ok(()),
        }
    }
}

impl Settings {
    pub(super) fn trust_together(&self) -> Result<(), SettingsError> {
        let wrong = |message: &str| Err(SettingsError::Together(message.to_owned()));
        if self.tls_cert.is_some() != self.tls_key.is_some() {
            return wrong("tls_cert and tls_key go together; one of them is not set");
        }
        if self.worker_cert.is_some() != self.worker_key.is_some() {
            return wrong("worker_cert and worker_key go together; one of them is not set");
        }
        if self.worker_ca.is_none() && self.worker_cert.is_some() {
            return wrong("worker_cert needs worker_ca: without it there is no TLS");
        }
        if let Err(message) = self.jwt.together() {
            return wrong(message);
        }
        if let Some(reachable) = self.admin_listen.filter(|at| !at.ip().is_loopback())
            && self.api_keys.is_none()
            && !self.insecure
        {
            return Err(SettingsError::Together(format!(
                "admin_listen is {reachable}, which other machines can reach; set api_keys, with \
                 keys of operators (`kvmesh key --operator`), or insecure to say that the network \
                 is trusted"
            )));
        }
        let checked = self.tls_cert.is_some() || self.api_keys.is_some() || self.jwt.keys.is_some();
        if !self.listen.ip().is_loopback() && !checked && !self.insecure {
            return Err(SettingsError::Together(format!(
                "listen is {}, which other machines can reach without any check; set tls_cert \
                 and tls_key, or api_keys, or jwt_keys, or insecure to say that the network is \
                 trusted",
                self.listen
            )));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn refused(file: &str) -> Option<String> {
        let mut layers = Layers::default();
        layers.add_toml("test.toml", file).unwrap();
        let settled = Settings::resolve(&layers);
        settled.err().map(|error| error.to_string())
    }

    #[test]
    fn what_needs_each_other_is_told() {
        for (file, named) in [
            ("tls_cert = 'c'", "tls_key"),
            ("worker_key = 'k'", "worker_cert"),
            ("worker_cert = 'c'\nworker_key = 'k'", "worker_ca"),
            ("jwt_keys = 'k'\njwt_issuer = 'i'", "jwt_audience"),
            ("jwt_keys = 'k'\njwt_audience = 'a'", "jwt_issuer"),
            ("jwt_issuer = 'i'", "jwt_keys"),
            ("listen = '0.0.0.0:1'", "jwt_keys"),
        ] {
            let told = refused(file).unwrap();
            assert!(told.contains(named), "{named} is not in: {told}");
        }
        let whole = "jwt_keys = 'k'\njwt_issuer = 'i'\njwt_audience = 'a'";
        assert_eq!(refused(whole), None);
        assert_eq!(refused(&format!("listen = '0.0.0.0:1'\n{whole}")), None);
        assert_eq!(refused("worker_ca = 'c'"), None);
    }
}
