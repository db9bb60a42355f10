//! What a node tells the engine.

use std::time::Instant;

use bytes::Bytes;

use crate::id::{Reason, TransferId};

/// One thing that happened to a transfer.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// Sender: the receiver has come.
    Pulled {
        /// The transfer.
        id: TransferId,
        /// The receiver.
        worker_id: String,
        /// First token wanted.
        from_token: u32,
        /// W3C trace context.
        traceparent: String,
        /// The request's x-request-id.
        request_id: String,
    },
    /// Sender: blocks before this one are at the receiver, which is all that it
    /// was told of. Only where the offer asked for it.
    Reached {
        /// The transfer.
        id: TransferId,
        /// Index in the sequence.
        upto_block: u32,
    },
    /// Sender: a peer asks for a prefix.
    PrefixWanted {
        /// The transfer.
        id: TransferId,
        /// The receiver.
        worker_id: String,
        /// Adapter by name.
        adapter: String,
        /// Its digest there; empty: not said.
        adapter_digest: String,
        /// Cache salt.
        cache_salt: String,
        /// The whole prefix.
        token_ids: Vec<u32>,
        /// First token wanted.
        from_token: u32,
        /// W3C trace context.
        traceparent: String,
        /// The request's x-request-id.
        request_id: String,
    },
    /// Sender: the receiver has everything.
    SenderReleased {
        /// The transfer.
        id: TransferId,
        /// Blocks announced.
        blocks: u64,
        /// Their bytes.
        bytes: u64,
        /// From the pull to the release.
        seconds: f64,
    },
    /// Sender: over without success.
    SenderAborted {
        /// The transfer.
        id: TransferId,
        /// Why.
        reason: Reason,
        /// For people.
        message: String,
        /// The receiver may own the sequence.
        commit_sent: bool,
    },
    /// Receiver: what the holder of a prefix has.
    PrefixFound {
        /// The transfer.
        id: TransferId,
        /// Tokens held.
        tokens: u32,
    },
    /// Receiver: blocks before this one are in the pool.
    Verified {
        /// The transfer.
        id: TransferId,
        /// Index in the sequence.
        upto_block: u32,
    },
    /// Receiver: all is here.
    Committed {
        /// The transfer.
        id: TransferId,
        /// Tokens that have KV.
        kv_tokens: u32,
        /// Output tokens after the border of the receiver's continuation.
        output_ids: Vec<u32>,
        /// Encoded `TokenLogprobs`, one an output id, or none.
        logprobs: Vec<Bytes>,
        /// Blocks moved.
        blocks: u64,
        /// Their bytes.
        bytes: u64,
        /// From the pull to here.
        seconds: f64,
        /// From the commit's arrival to here.
        tail_seconds: f64,
        /// Whether they were copied from the sender's mapping.
        shared_memory: bool,
        /// When.
        at: Instant,
    },
    /// Receiver: over without success; its blocks are free.
    ReceiveFailed {
        /// The transfer.
        id: TransferId,
        /// Why.
        reason: Reason,
        /// For people.
        message: String,
        /// Verified blocks end here.
        verified_blocks: u32,
        /// From the pull to here.
        seconds: f64,
        /// When.
        at: Instant,
    },
}
