//! Command line of the testkit.
fn main() {}
