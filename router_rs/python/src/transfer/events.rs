//! What a transfer node tells, as Python sees it.

use kvmesh_transfer::{Event, TransferId};
use pyo3::{prelude::*, types::PyBytes};

/// Adds the classes of events, and their union, `TransferEvent`.
pub(super) fn add(module: &Bound<'_, PyModule>) -> PyResult<()> {
    let py = module.py();
    module.add_class::<Pulled>()?;
    module.add_class::<Reached>()?;
    module.add_class::<PrefixWanted>()?;
    module.add_class::<SenderReleased>()?;
    module.add_class::<SenderAborted>()?;
    module.add_class::<PrefixFound>()?;
    module.add_class::<Verified>()?;
    module.add_class::<Committed>()?;
    module.add_class::<ReceiveFailed>()?;
    let mut union = py.get_type::<Pulled>().into_any();
    for other in [
        py.get_type::<Reached>(),
        py.get_type::<PrefixWanted>(),
        py.get_type::<SenderReleased>(),
        py.get_type::<SenderAborted>(),
        py.get_type::<PrefixFound>(),
        py.get_type::<Verified>(),
        py.get_type::<Committed>(),
        py.get_type::<ReceiveFailed>(),
    ] {
        union = union.bitor(other)?;
    }
    module.add("TransferEvent", union)
}

/// A class of events: its name, its fields, and how an `Event` fills them.
macro_rules! event_class {
    ($(#[$doc:meta])* $name:ident { $($field:ident: $kind:ty),* $(,)? }) => {
        $(#[$doc])*
        #[pyclass(module = "kvmesh._router", frozen, get_all)]
        struct $name {
            transfer_id: Py<PyBytes>,
            $($field: $kind),*
        }
    };
}

event_class!(
    /// Sender: the receiver has come.
    Pulled { worker_id: String, from_token: u32, traceparent: String, request_id: String }
);
event_class!(
    /// Sender: blocks before `upto_block` are at the receiver: all it was told of.
    Reached { upto_block: u32 }
);
event_class!(
    /// Sender: a peer asks for a prefix.
    PrefixWanted {
        worker_id: String,
        adapter: String,
        adapter_digest: String,
        cache_salt: String,
        token_ids: Vec<u32>,
        from_token: u32,
        traceparent: String,
        request_id: String,
    }
);
event_class!(
    /// Sender: the receiver has everything.
    SenderReleased { blocks: u64, bytes: u64, seconds: f64 }
);
event_class!(
    /// Sender: over without success.
    SenderAborted { reason: &'static str, message: String, commit_sent: bool }
);
event_class!(
    /// Receiver: what the holder of a prefix has.
    PrefixFound { tokens: u32 }
);
event_class!(
    /// Receiver: blocks before `upto_block` of the sequence are in the pool.
    Verified { upto_block: u32 }
);
event_class!(
    /// Receiver: all is copied and verified.
    Committed {
        kv_tokens: u32,
        output_ids: Vec<u32>,
        logprobs: Vec<Py<PyBytes>>,
        blocks: u64,
        bytes: u64,
        seconds: f64,
        tail_seconds: f64,
        shared_memory: bool,
        waited_seconds: f64,
    }
);
event_class!(
    /// Receiver: over without success, and no write to the blocks can come now.
    ReceiveFailed {
        reason: &'static str,
        message: String,
        verified_blocks: u32,
        seconds: f64,
        waited_seconds: f64,
    }
);

/// An event as Python gets it.
pub(super) fn to_python(py: Python<'_>, event: Event) -> PyResult<Py<PyAny>> {
    let name = |id: TransferId| PyBytes::new(py, &id.0).unbind();
    Ok(match event {
        Event::Pulled {
            id,
            worker_id,
            from_token,
            traceparent,
            request_id,
        } => {
            let transfer_id = name(id);
            Py::new(
                py,
                Pulled {
                    transfer_id,
                    worker_id,
                    from_token,
                    traceparent,
                    request_id,
                },
            )?
            .into_any()
        }
        Event::Reached { id, upto_block } => Py::new(
            py,
            Reached {
                transfer_id: name(id),
                upto_block,
            },
        )?
        .into_any(),
        Event::PrefixWanted {
            id,
            worker_id,
            adapter,
            adapter_digest,
            cache_salt,
            token_ids,
            from_token,
            traceparent,
            request_id,
        } => Py::new(
            py,
            PrefixWanted {
                transfer_id: name(id),
                worker_id,
                adapter,
                adapter_digest,
                cache_salt,
                token_ids,
                from_token,
                traceparent,
                request_id,
            },
        )?
        .into_any(),
        Event::SenderReleased {
            id,
            blocks,
            bytes,
            seconds,
        } => Py::new(
            py,
            SenderReleased {
                transfer_id: name(id),
                blocks,
                bytes,
                seconds,
            },
        )?
        .into_any(),
        Event::SenderAborted {
            id,
            reason,
            message,
            commit_sent,
        } => {
            let (transfer_id, reason) = (name(id), reason.name());
            Py::new(
                py,
                SenderAborted {
                    transfer_id,
                    reason,
                    message,
                    commit_sent,
                },
            )?
            .into_any()
        }
        Event::PrefixFound { id, tokens } => Py::new(
            py,
            PrefixFound {
                transfer_id: name(id),
                tokens,
            },
        )?
        .into_any(),
        Event::Verified { id, upto_block } => Py::new(
            py,
            Verified {
                transfer_id: name(id),
                upto_block,
            },
        )?
        .into_any(),
        Event::Committed {
            id,
            kv_tokens,
            output_ids,
            logprobs,
            blocks,
            bytes,
            seconds,
            tail_seconds,
            shared_memory,
            at,
        } => Py::new(
            py,
            Committed {
                transfer_id: name(id),
                kv_tokens,
                output_ids,
                logprobs: logprobs
                    .iter()
                    .map(|l| PyBytes::new(py, l).unbind())
                    .collect(),
                blocks,
                bytes,
                seconds,
                tail_seconds,
                shared_memory,
                waited_seconds: at.elapsed().as_secs_f64(),
            },
        )?
        .into_any(),
        Event::ReceiveFailed {
            id,
            reason,
            message,
            verified_blocks,
            seconds,
            at,
        } => {
            let (transfer_id, reason) = (name(id), reason.name());
            Py::new(
                py,
                ReceiveFailed {
                    transfer_id,
                    reason,
                    message,
                    verified_blocks,
                    seconds,
                    waited_seconds: at.elapsed().as_secs_f64(),
                },
            )?
            .into_any()
        }
    })
}
