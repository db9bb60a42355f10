//! Which worker holds which prefix: an exact, bounded index.
#![forbid(unsafe_code)]
