//! Which worker holds which prefix: an exact, bounded index.
//!
//! A prompt is named in units of 16 tokens by a chain of 64-bit values
//! ([`chain_values`]); workers report which values they hold, and
//! [`KvIndex::lookup`] gives, for every worker at once, the longest prefix of
//! a prompt that it holds without a hole. Values decide nothing but a guess
//! of time: a collision costs a recompute, never a token.
#![forbid(unsafe_code)]

mod absence;
mod approximate;
mod bits;
mod chain;
mod change;
mod core;
mod edit;
mod foreign;
mod holders;
mod index;
mod left_right;
mod lookup;
#[cfg(all(test, not(loom)))]
mod replica_tests;
mod run;
mod runs;
mod settings;
mod table;
mod worker;

pub use chain::{HASH_SCHEME, UNIT_TOKENS, chain_values, chain_values_into, namespace_root};
pub use foreign::{Dropped, Foreign, ForeignBlocks, ForeignStats, Heard, OwnBlocks};
pub use index::KvIndex;
pub use settings::{IndexSettings, IndexStats};
pub use worker::{CacheChange, Knowledge, Matches, SlotError, Tier, WorkerSlot};
