//! KV on its way: each worker has one link, each way, and sends and receives
//! one thing after the other.

use crate::profile::Transfer;

/// The links of all workers.
#[derive(Debug, Clone)]
pub(crate) struct Links {
    transfer: Transfer,
    bytes_per_token: f64,
    /// When the link out of a worker is free, ms.
    out: Vec<f64>,
    /// When the link into a worker is free, ms.
    into: Vec<f64>,
}

impl Links {
    pub(crate) fn new(transfer: Transfer, bytes_per_token: u64, workers: usize) -> Self {
        Self {
            transfer,
            bytes_per_token: bytes_per_token as f64,
            out: vec![0.0; workers],
            into: vec![0.0; workers],
        }
    }

    /// KV of so many tokens leaves; when it is there, ms.
    pub(crate) fn send(&mut self, from: usize, to: usize, tokens: u32, now_ms: f64) -> f64 {
        let starts = now_ms.max(self.out[from]).max(self.into[to]);
        let takes = f64::from(tokens) * self.bytes_per_token / self.transfer.bytes_per_ms;
        let ends = starts + takes;
        self.out[from] = ends;
        self.into[to] = ends;
        ends
    }

    /// Bytes of so many tokens, and what they take alone, ms.
    pub(crate) fn alone(&self, tokens: u32) -> (u64, f64) {
        let bytes = f64::from(tokens) * self.bytes_per_token;
        let ms = bytes / self.transfer.bytes_per_ms + self.transfer.fixed_ms;
        (bytes as u64, ms)
    }

    /// The fixed part of a hand-off, ms.
    pub(crate) fn fixed_ms(&self) -> f64 {
        self.transfer.fixed_ms
    }
}
