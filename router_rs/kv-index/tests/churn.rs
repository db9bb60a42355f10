//! Memory stays flat while all that comes goes again. A day of it takes minutes
//! (churn_day.rs); this is a hundredth, 14 minutes of 64 workers.
#![cfg(target_os = "linux")]

mod churning;

#[test]
fn a_hundredth_of_a_day_leaves_memory_flat() {
    churning::leave_memory_flat(churning::DAY / 100);
}
