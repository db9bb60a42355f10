//! Attention over paged KV on a CPU, in float32.
//!
//! A sequence's K and V lie in blocks of some tokens each, scattered over a
//! pool. Copying them together for a matrix library costs as much as the
//! attention itself, at every step. These kernels read them where they lie: each
//! byte is fetched from memory once, for all query heads that share it.
//!
//! A block's part for one layer and one KV head is `[tokens, head_size]` for K
//! and the same for V. Everything here is a pure function of slices; who holds
//! the memory is the caller's matter. Results do not depend on what else is in
//! a batch: a (sequence, KV head) is one sequential computation.

// Tests call what needs AVX2 once they have found it.
#![cfg_attr(not(test), forbid(unsafe_code))]

#[cfg(target_arch = "x86_64")]
mod avx2;
mod decode;
mod math;
mod rope;

#[cfg(target_arch = "x86_64")]
pub use decode::attend_avx2;
pub use decode::{DecodeHead, ROWS, Scratch, attend};
pub use rope::rotate;
