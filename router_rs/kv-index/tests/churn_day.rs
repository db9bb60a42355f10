//! A whole day of what 64 workers store and lose: 11,059,200 events, 354 million
//! blocks, and nearly as many of them removed.
#![cfg(target_os = "linux")]

mod churning;

#[test]
#[ignore = "minutes"]
fn a_day_leaves_memory_flat() {
    churning::leave_memory_flat(churning::DAY);
}
