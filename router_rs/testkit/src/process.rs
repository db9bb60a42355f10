//! CPU time and memory of a process, read from `/proc`.

use std::{io, time::Duration};

use serde::Serialize;

/// What a process has used.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Usage {
    /// CPU time of all its threads that live.
    pub cpu: Duration,
    /// Resident memory, bytes.
    pub rss: u64,
}

impl Usage {
    /// Reads the usage of process `pid`.
    ///
    /// CPU time is the sum over `/proc/PID/task/*/schedstat`, in nanoseconds;
    /// `/proc/PID/stat` counts in ticks of 10 ms, which is too coarse for
    /// blocks of some seconds.
    ///
    /// # Errors
    /// Where the process does not exist or the kernel has no schedstat.
    pub fn of(pid: u32) -> io::Result<Self> {
        let mut nanos = 0;
        for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
            // A thread may end between the listing and the reading.
            if let Ok(text) = std::fs::read_to_string(task?.path().join("schedstat")) {
                nanos += first_number(&text)?;
            }
        }
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
        let kib = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:"))
            .map_or(Ok(0), first_number)?;
        Ok(Self {
            cpu: Duration::from_nanos(nanos),
            rss: kib * 1024,
        })
    }
}

/// What a watched process used in a window.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Watched {
    /// CPU time, microseconds.
    pub cpu_us: f64,
    /// CPU time for each token of the window, microseconds.
    pub cpu_us_per_token: f64,
    /// Resident memory at its end, MiB.
    pub rss_mib: f64,
}

impl Watched {
    /// The difference of two readings over `tokens` tokens.
    #[must_use]
    pub fn between(before: Usage, after: Usage, tokens: u64) -> Self {
        let cpu_us = after.cpu.saturating_sub(before.cpu).as_secs_f64() * 1e6;
        Self {
            cpu_us,
            cpu_us_per_token: cpu_us / tokens.max(1) as f64,
            rss_mib: after.rss as f64 / (1024.0 * 1024.0),
        }
    }
}

fn first_number(text: &str) -> io::Result<u64> {
    text.split_whitespace()
        .next()
        .and_then(|word| word.parse().ok())
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "no number"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn this_process_has_used_memory_and_its_clock_does_not_go_back() {
        let before = Usage::of(std::process::id()).unwrap();
        let after = Usage::of(std::process::id()).unwrap();
        assert!(before.rss > 0);
        assert!(after.cpu >= before.cpu);
    }
}
