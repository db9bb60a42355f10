//! Bindings: thin, no logic.
