//! Who a certificate is for: the URI `kvmesh://<cluster>/<role>/<id>` among its
//! alternative names (RFC 5280, 4.2.1.6).

use std::fmt;

use rustls::pki_types::CertificateDer;

/// What somebody is in a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Places requests on workers.
    Router,
    /// Computes.
    Worker,
    /// Operates the cluster.
    Admin,
}

impl Role {
    fn read(name: &str) -> Option<Self> {
        Some(match name {
            "router" => Self::Router,
            "worker" => Self::Worker,
            "admin" => Self::Admin,
            _ => return None,
        })
    }

    fn name(self) -> &'static str {
        match self {
            Self::Router => "router",
            Self::Worker => "worker",
            Self::Admin => "admin",
        }
    }
}

/// Whom a certificate is for, within a cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// What it is.
    pub role: Role,
    /// Its name: 1 to 128 characters of `[A-Za-z0-9._-]`.
    pub id: String,
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.role.name(), self.id)
    }
}

/// A certificate that is not for whom it has to be.
#[derive(Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// It cannot be read.
    #[error("it cannot be read as a certificate: {0}")]
    Unreadable(String),
    /// It says nothing of kvmesh.
    #[error("it names nobody; allowed is one URI kvmesh://{0}/<role>/<id> among its names")]
    Nobody(String),
    /// Its URI is not of the known form.
    #[error(
        "it names {0:?}; allowed is kvmesh://<cluster>/<role>/<id> with role router, worker or admin"
    )]
    Form(String),
    /// It has more than one such URI.
    #[error("it names several; allowed is one URI kvmesh://<cluster>/<role>/<id>")]
    Several,
    /// It is another cluster's.
    #[error("it is of cluster {found:?}, this one is {own:?}")]
    Cluster {
        /// What it says.
        found: String,
        /// What this cluster is called.
        own: String,
    },
    /// It is somebody else's.
    #[error("it is of {found}, {wanted} was to be there")]
    Other {
        /// Whose it is.
        found: Identity,
        /// Who was to be there.
        wanted: String,
    },
}

// rustls prints causes of its errors so.
impl fmt::Debug for IdentityError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Identity {
    /// Whom a certificate is for in this cluster. Its signature is no matter here.
    ///
    /// # Errors
    /// [`IdentityError`] for nobody, for somebody of another cluster, or for two.
    pub fn read(certificate: &CertificateDer<'_>, cluster: &str) -> Result<Self, IdentityError> {
        let parsed = webpki::EndEntityCert::try_from(certificate)
            .map_err(|error| IdentityError::Unreadable(error.to_string()))?;
        let mut names = parsed
            .valid_uri_names()
            .filter(|name| name.starts_with("kvmesh://"));
        let name = names
            .next()
            .ok_or_else(|| IdentityError::Nobody(cluster.to_owned()))?;
        if names.next().is_some() {
            return Err(IdentityError::Several);
        }
        let (found, identity) =
            Self::parse(name).ok_or_else(|| IdentityError::Form(name.to_owned()))?;
        if found != cluster {
            return Err(IdentityError::Cluster {
                found: found.to_owned(),
                own: cluster.to_owned(),
            });
        }
        Ok(identity)
    }

    /// Cluster and identity of a URI.
    fn parse(name: &str) -> Option<(&str, Self)> {
        let mut parts = name.strip_prefix("kvmesh://")?.split('/');
        let (cluster, role, id) = (parts.next()?, parts.next()?, parts.next()?);
        if parts.next().is_some() || !is_name(cluster) || !is_name(id) {
            return None;
        }
        let role = Role::read(role)?;
        let id = id.to_owned();
        Some((cluster, Self { role, id }))
    }

    /// Itself, where it is this worker; `None`: any worker.
    pub(crate) fn worker(self, wanted: Option<&str>) -> Result<Self, IdentityError> {
        let fits = self.role == Role::Worker && wanted.is_none_or(|id| id == self.id);
        match fits {
            true => Ok(self),
            false => Err(IdentityError::Other {
                found: self,
                wanted: format!("worker {}", wanted.unwrap_or("(any)")),
            }),
        }
    }
}

fn is_name(text: &str) -> bool {
    let allowed = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'.' | b'_' | b'-');
    (1..=128).contains(&text.len()) && text.bytes().all(allowed)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_name_is_cluster_role_and_id_and_nothing_else() {
        let parse = |name: &str| Identity::parse(name).map(|(c, i)| format!("{c}: {i}"));
        assert_eq!(
            parse("kvmesh://prod/worker/d-1").unwrap(),
            "prod: worker d-1"
        );
        assert_eq!(
            parse("kvmesh://prod/router/r.1").unwrap(),
            "prod: router r.1"
        );
        assert_eq!(parse("kvmesh://prod/admin/ann").unwrap(), "prod: admin ann");
        for wrong in [
            "spiffe://prod/worker/d",
            "kvmesh://prod/worker",
            "kvmesh://prod/worker/",
            "kvmesh:///worker/d",
            "kvmesh://prod/worker/d/",
            "kvmesh://prod/Worker/d",
            "kvmesh://prod/root/d",
            "kvmesh://prod/worker/a b",
            "kvmesh://prod/worker/d?x",
        ] {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
    }
}
