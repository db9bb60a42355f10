//! The ports of a router, and what is answered where.

/// Which port something came over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Port {
    /// `listen`: what clients ask for, and where no other port is set what
    /// operators ask for.
    Clients,
    /// `admin_listen`: what operators ask for, and nothing else.
    Admin,
}
