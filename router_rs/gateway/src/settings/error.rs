//! Why a setting is refused.

/// A setting that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SettingsError {
    /// No such key.
    #[error("{from}: no setting {key:?}; there are: {known}")]
    Unknown {
        /// The layer.
        from: String,
        /// What was given.
        key: String,
        /// All keys.
        known: String,
    },
    /// A value that is not allowed.
    #[error("{from}: {key} is {value}; allowed is {allowed}")]
    Value {
        /// The layer.
        from: String,
        /// The key.
        key: &'static str,
        /// What was given.
        value: String,
        /// What is allowed.
        allowed: String,
    },
    /// A layer that cannot be read.
    #[error("{from}: {reason}")]
    Unreadable {
        /// The layer.
        from: String,
        /// Why.
        reason: String,
    },
    /// Settings that do not go together.
    #[error("{0}")]
    Together(String),
}
