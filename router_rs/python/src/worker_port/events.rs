//! What a port tells its process, as Python sees it.

use std::mem;

use kvmesh_worker_port::{AttemptEnd, AttemptId, Event};
use prost::Message;
use pyo3::{exceptions::PyRuntimeError, prelude::*, types::PyBytes};

/// Adds the classes of events.
pub(super) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Placed>()?;
    module.add_class::<Ended>()?;
    module.add_class::<HandOverAsked>()?;
    module.add_class::<SnapshotWanted>()?;
    module.add_class::<InfoWanted>()?;
    module.add_class::<StopAsked>()?;
    module.add_class::<RoleChanged>()?;
    module.add_class::<EndsTold>()?;
    module.add_class::<EngineEnded>()
}

macro_rules! event_class {
    ($(#[$doc:meta])* $name:ident { $($field:ident: $kind:ty),* $(,)? }) => {
        $(#[$doc])*
        #[pyclass(module = "kvmesh._router", frozen, get_all)]
        struct $name {
            $($field: $kind),*
        }
    };
}

event_class!(
    /// A placement that the engine answers.
    Placed { session: String, place: Py<PyBytes>, prompt_ids: Py<PyBytes>, age_s: f64 }
);
event_class!(
    /// Attempts to end, each (generation, owner, attempt).
    Ended { attempts: Vec<(Py<PyBytes>, u32, u32)> }
);
event_class!(
    /// A running attempt is to pass to another worker.
    HandOverAsked { command: Py<PyBytes> }
);
event_class!(
    /// A router needs the cache's content.
    SnapshotWanted { session: String }
);
event_class!(
    /// GetInfo waits for the engine's residue.
    InfoWanted { call: u64 }
);
event_class!(
    /// Drain with `stop`.
    StopAsked { grace_s: Option<f64> }
);
event_class!(
    /// SetRole was called.
    RoleChanged { role: i32 }
);
event_class!(
    /// Attempts have ended, each (session, generation, owner, attempt, stage, end, why).
    EndsTold { ends: Vec<ToldEnd> }
);
event_class!(
    /// The engine says nothing more.
    EngineEnded {}
);

type ToldEnd = (
    String,
    Py<PyBytes>,
    u32,
    u32,
    &'static str,
    &'static str,
    String,
);

/// An event as Python gets it.
pub(super) fn to_python(py: Python<'_>, event: Event) -> PyResult<Py<PyAny>> {
    let bytes = |bytes: &[u8]| PyBytes::new(py, bytes).unbind();
    let object = match event {
        Event::Placed {
            session,
            mut place,
            received,
        } => {
            let age_s = received.elapsed().as_secs_f64();
            // Python reads a column many times faster than a repeated field.
            let asked = place.continuation.as_mut();
            let prompt_ids = asked.map(|asked| mem::take(&mut asked.prompt_ids));
            let prompt_ids = packed(py, &prompt_ids.unwrap_or_default())?;
            let place = encoded(py, &*place)?;
            Py::new(
                py,
                Placed {
                    session,
                    place,
                    prompt_ids,
                    age_s,
                },
            )?
            .into_any()
        }
        Event::Cancelled(attempts) => {
            let named = |id: AttemptId| (bytes(&id.generation), id.owner, id.attempt);
            let attempts = attempts.into_iter().map(named).collect();
            Py::new(py, Ended { attempts })?.into_any()
        }
        Event::HandOver(command) => {
            let command = encoded(py, &command)?;
            Py::new(py, HandOverAsked { command })?.into_any()
        }
        Event::SnapshotWanted { session } => Py::new(py, SnapshotWanted { session })?.into_any(),
        Event::InfoWanted { call } => Py::new(py, InfoWanted { call })?.into_any(),
        Event::Stop { grace } => {
            let grace_s = grace.map(|grace| grace.as_secs_f64());
            Py::new(py, StopAsked { grace_s })?.into_any()
        }
        Event::RoleChanged(role) => Py::new(py, RoleChanged { role })?.into_any(),
        Event::Ends(ends) => {
            let told = |end: AttemptEnd| {
                let id = end.attempt;
                let generation = bytes(&id.generation);
                (
                    end.session,
                    generation,
                    id.owner,
                    id.attempt,
                    end.stage,
                    end.end,
                    end.why,
                )
            };
            let ends = ends.into_iter().map(told).collect();
            Py::new(py, EndsTold { ends })?.into_any()
        }
        Event::EngineEnded => Py::new(py, EngineEnded {})?.into_any(),
    };
    Ok(object)
}

/// A message as Python reads it: encoded where its bytes stay.
fn encoded(py: Python<'_>, message: &impl Message) -> PyResult<Py<PyBytes>> {
    let bytes = PyBytes::new_with(py, message.encoded_len(), |mut bytes| {
        let fits = message.encode(&mut bytes);
        fits.map_err(|error| PyRuntimeError::new_err(error.to_string()))
    })?;
    Ok(bytes.unbind())
}

/// Numbers as the bytes of a column, in the machine's order.
fn packed(py: Python<'_>, numbers: &[u32]) -> PyResult<Py<PyBytes>> {
    let bytes = PyBytes::new_with(py, 4 * numbers.len(), |bytes| {
        let (places, _) = bytes.as_chunks_mut();
        for (place, number) in places.iter_mut().zip(numbers) {
            *place = number.to_ne_bytes();
        }
        Ok(())
    })?;
    Ok(bytes.unbind())
}
