//! What a router says to a worker.

use kvmesh_wire::v1::{self, router_frame::Frame};

use crate::{Fence, GenerationId, Stage, TransferId};

/// How KV passes within one attempt.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum HandOff {
    /// kvmesh's own transfer, minted by the router.
    Mesh {
        /// Name of the transfer.
        transfer: TransferId,
        /// Sender's worker id.
        sender: String,
        /// Sender's incarnation.
        incarnation: u64,
        /// Sender's transfer address, "host:port".
        address: String,
    },
    /// The engine's own connector; opaque.
    Engine(v1::EngineHandOff),
}

impl From<HandOff> for v1::HandOff {
    fn from(hand_off: HandOff) -> Self {
        let kind = match hand_off {
            HandOff::Mesh {
                transfer,
                sender,
                incarnation,
                address,
            } => v1::hand_off::Kind::Mesh(v1::MeshHandOff {
                transfer_id: transfer.0.to_vec().into(),
                sender_worker: sender,
                sender_incarnation: incarnation,
                sender_address: address,
            }),
            HandOff::Engine(engine) => v1::hand_off::Kind::Engine(engine),
        };
        Self { kind: Some(kind) }
    }
}

/// A stage to be run, with all that it starts from.
#[derive(Clone, Debug, PartialEq)]
pub struct Placement {
    /// What to start from: the only thing that moves between attempts.
    pub continuation: v1::Continuation,
    /// Which part to run.
    pub stage: Stage,
    /// How KV passes; unset for `whole` and for prefill under an engine's own.
    pub hand_off: Option<HandOff>,
    /// Where the prompt's prefix can be pulled from.
    pub prefix_from: Option<v1::PrefixSource>,
    /// W3C trace context; may be empty.
    pub traceparent: String,
    /// W3C trace state; may be empty.
    pub tracestate: String,
    /// W3C baggage; may be empty.
    pub baggage: String,
    /// The client's request id, or the router's.
    pub request_id: String,
    /// Predicted start there, in milliseconds from now.
    pub predicted_start_ms: f64,
    /// Whether the worker is to tell its spans at the stage's end.
    pub trace: bool,
    /// Whether no other request may be in its steps: it is suspected of ending
    /// workers.
    pub alone: bool,
    /// Whose it is, as routers name it.
    pub tenant: String,
    /// What another router needs to take it over; empty: it is not resumable.
    pub resume_state: bytes::Bytes,
}

/// A command of a session. Its number is given when it is sent.
#[derive(Clone, Debug, PartialEq)]
pub enum Command {
    /// Runs a stage of an attempt.
    Place {
        /// The generation.
        generation: GenerationId,
        /// The attempt.
        fence: Fence,
        /// What to run.
        placement: Box<Placement>,
    },
    /// Ends an attempt and lower ones.
    Cancel {
        /// The generation.
        generation: GenerationId,
        /// The attempt.
        fence: Fence,
    },
    /// Passes a running attempt to a worker that has reserved for it.
    HandOver {
        /// The generation.
        generation: GenerationId,
        /// The running attempt.
        fence: Fence,
        /// The attempt under which the receiver goes on.
        next_attempt: u32,
        /// The transfer by which it goes.
        hand_off: HandOff,
        /// Border of the receiver's continuation.
        next_index: u32,
    },
    /// Asks whether a generation is known.
    Find {
        /// The generation.
        generation: GenerationId,
        /// Tenant that asks.
        tenant: String,
        /// How many output ids the client has.
        next_index: u32,
    },
    /// Takes a generation over.
    Claim {
        /// The generation.
        generation: GenerationId,
        /// The new owner number.
        owner: u32,
        /// Tenant that asks.
        tenant: String,
        /// First output index wanted.
        next_index: u32,
    },
}

impl Command {
    /// The frame for the wire, under the number that [`crate::Link`] gave.
    #[must_use]
    pub fn into_frame(self, number: u64) -> v1::RouterFrame {
        let frame = match self {
            Self::Place {
                generation,
                fence,
                placement,
            } => Frame::Place(place(generation, fence, *placement)),
            Self::Cancel { generation, fence } => Frame::Cancel(v1::Cancel {
                generation: wire_id(generation),
                owner: fence.owner,
                attempt: fence.attempt,
            }),
            Self::HandOver {
                generation,
                fence,
                next_attempt,
                hand_off,
                next_index,
            } => Frame::HandOver(v1::HandOver {
                generation: wire_id(generation),
                owner: fence.owner,
                attempt: fence.attempt,
                next_attempt,
                hand_off: Some(hand_off.into()),
                next_index,
            }),
            Self::Find {
                generation,
                tenant,
                next_index,
            } => Frame::Find(v1::Find {
                generation: wire_id(generation),
                tenant,
                next_index,
            }),
            Self::Claim {
                generation,
                owner,
                tenant,
                next_index,
            } => Frame::Claim(v1::Claim {
                generation: wire_id(generation),
                owner,
                tenant,
                next_index,
            }),
        };
        v1::RouterFrame {
            number,
            frame: Some(frame),
        }
    }
}

fn wire_id(generation: GenerationId) -> bytes::Bytes {
    bytes::Bytes::copy_from_slice(&generation.0)
}

fn place(generation: GenerationId, fence: Fence, placement: Placement) -> v1::Place {
    v1::Place {
        generation: wire_id(generation),
        owner: fence.owner,
        attempt: fence.attempt,
        continuation: Some(placement.continuation),
        stage: placement.stage.to_wire(),
        hand_off: placement.hand_off.map(Into::into),
        prefix_from: placement.prefix_from,
        traceparent: placement.traceparent,
        tracestate: placement.tracestate,
        baggage: placement.baggage,
        request_id: placement.request_id,
        predicted_start_ms: placement.predicted_start_ms,
        trace: placement.trace,
        alone: placement.alone,
        tenant: placement.tenant,
        resume_state: placement.resume_state,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cancel_keeps_its_fence_on_the_wire() {
        let generation = GenerationId([7; 16]);
        let fence = Fence {
            owner: 2,
            attempt: 3,
        };
        let frame = Command::Cancel { generation, fence }.into_frame(9);
        assert_eq!(frame.number, 9);
        let Some(Frame::Cancel(cancel)) = frame.frame else {
            panic!("not a cancel")
        };
        assert_eq!((cancel.owner, cancel.attempt), (2, 3));
        assert_eq!(cancel.generation.as_ref(), [7; 16]);
    }
}
