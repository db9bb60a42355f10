//! `DecodeLoop`: steps of decoding streams that need nothing of Python.
//!
//! An engine whose model takes no processor time of its own (the simulated one)
//! wakes up for each step. What it then runs lies in no cache any more, so that
//! some microseconds of interpreter cost a hundred. While the same streams decode
//! and nothing comes in, a step is always the same: time passes, each stream gets a
//! token, routers are told. That much is done here, without the GIL, step after
//! step, until somebody has to look.

use std::time::{Duration, Instant};

use kvmesh_wire::v1::StepSample;
use kvmesh_worker_port::Report;
use pyo3::{
    buffer::PyBuffer,
    exceptions::PyValueError,
    prelude::*,
    types::{PyBytes, PyList},
};

use crate::{
    router::guarded,
    sim::{PySimStreams, Tables},
    transfer::PyTransferNode,
    worker_port::{PyWorkerPort, refused, report},
};

/// Steps of one composition of streams.
#[pyclass(name = "DecodeLoop", module = "kvmesh._router", frozen)]
pub(crate) struct PyDecodeLoop {
    port: Py<PyWorkerPort>,
    node: Py<PyTransferNode>,
    streams: Py<PySimStreams>,
    /// Rows of each router, in the order of the report's parts.
    rows: Vec<Vec<usize>>,
    /// Drawn, they end a stream.
    stop_ids: Vec<u32>,
    /// Predicted length of a step, ms: of itself and a token of context.
    predicted_ms: (f64, f64),
    /// What a step takes, seconds: of itself and a token of context.
    takes_s: (f64, f64),
}

/// When each step began and ended, seconds since the call's begin.
type Times = Vec<(f64, f64)>;

/// What one call of `run` did.
struct Made {
    /// Tokens of all rows, a step after the other.
    tokens: Vec<Vec<u8>>,
    /// Whether the last step was told.
    told: bool,
    /// Of all its steps.
    times: Times,
}

#[pymethods]
impl PyDecodeLoop {
    #[new]
    #[pyo3(signature = (port, node, streams, *, rows, stop_ids, predicted_ms, takes_s))]
    fn new(
        port: Py<PyWorkerPort>,
        node: Py<PyTransferNode>,
        streams: Py<PySimStreams>,
        rows: Vec<Vec<usize>>,
        stop_ids: Vec<u32>,
        predicted_ms: (f64, f64),
        takes_s: (f64, f64),
    ) -> PyResult<Self> {
        if !(takes_s.0 > 0.0 && takes_s.1 >= 0.0) {
            return Err(PyValueError::new_err("steps must take time"));
        }
        Ok(Self {
            port,
            node,
            streams,
            rows,
            stop_ids,
            predicted_ms,
            takes_s,
        })
    }

    /// Makes up to `most` steps; the last of them is not told where it needs a `look`.
    #[allow(clippy::too_many_arguments)]
    fn run<'py>(
        &self,
        py: Python<'py>,
        output: &Bound<'py, PyAny>,
        ids: &[u8],
        tables: PyBuffer<u32>,
        context: u64,
        most: usize,
        look: bool,
    ) -> PyResult<(Bound<'py, PyList>, bool, Times)> {
        let told = report(output)?;
        let tables = Tables::of(&tables)?;
        let ids = unpacked(ids);
        let rows = self.rows.iter().flatten().count();
        if ids.len() != rows || self.rows.len() != told.parts.len() {
            return Err(PyValueError::new_err("rows are not those of the report"));
        }
        let steps = Steps {
            at: self,
            port: self.port.get(),
            node: self.node.get(),
            streams: self.streams.get(),
        };
        let made = py.detach(|| guarded(|| steps.run(told, ids, tables, context, (most, look))))?;
        let tokens = made.tokens.iter().map(|tokens| PyBytes::new(py, tokens));
        Ok((PyList::new(py, tokens)?, made.told, made.times))
    }
}

fn unpacked(ids: &[u8]) -> Vec<u32> {
    let (ids, _) = ids.as_chunks();
    ids.iter().map(|id| u32::from_ne_bytes(*id)).collect()
}

struct Steps<'a> {
    at: &'a PyDecodeLoop,
    port: &'a PyWorkerPort,
    node: &'a PyTransferNode,
    streams: &'a PySimStreams,
}

impl Steps<'_> {
    fn run(
        &self,
        mut told: Report,
        mut ids: Vec<u32>,
        tables: Tables<'_>,
        mut context: u64,
        (most, look): (usize, bool),
    ) -> PyResult<Made> {
        let called = Instant::now();
        let mut streams = self.streams.lock()?;
        let mut made = Made {
            tokens: Vec::with_capacity(most),
            told: true,
            times: Vec::with_capacity(most),
        };
        while made.tokens.len() < most {
            let of = |(once, each): (f64, f64)| once + each * context as f64;
            let begun = Instant::now();
            self.port.port.begin_step(of(self.at.predicted_ms));
            std::thread::sleep(Duration::from_secs_f64(of(self.at.takes_s)));
            ids = self.streams.advance(&mut streams, &ids, &tables)?;
            let took = begun.elapsed();
            let begun_s = begun.duration_since(called).as_secs_f64();
            made.times.push((begun_s, begun_s + took.as_secs_f64()));
            made.tokens
                .push(ids.iter().flat_map(|id| id.to_ne_bytes()).collect());
            let last = made.tokens.len() == most;
            if (last && look) || ids.iter().any(|id| self.at.stop_ids.contains(id)) {
                // Ends are told with the tokens: somebody else does both.
                made.told = false;
                break;
            }
            told.sample = Some(StepSample {
                decode_batch: u32::try_from(ids.len()).unwrap_or(u32::MAX),
                decode_context: context,
                duration_us: u64::try_from(took.as_micros()).unwrap_or(u64::MAX),
                ..StepSample::default()
            });
            self.tell(&mut told, &ids)?;
            context += ids.len() as u64;
            // Consumes a wake, whose cause the caller looks for next.
            if self.node.node.wait(Some(Duration::ZERO)) {
                break;
            }
        }
        Ok(made)
    }

    /// Says a step, and makes `told` ready for the next one.
    fn tell(&self, told: &mut Report, ids: &[u32]) -> PyResult<()> {
        told.step += 1;
        told.load.step += 1;
        for (_, share) in &mut told.load.shares {
            share.decode_context += u64::from(share.decoding);
        }
        for ((_, part), rows) in told.parts.iter_mut().zip(&self.at.rows) {
            if let Some(tokens) = &mut part.tokens {
                tokens.ids.clear();
                tokens
                    .ids
                    .extend(rows.iter().filter_map(|row| ids.get(*row)));
            }
        }
        self.port.port.step(told.clone()).map_err(refused)?;
        for tokens in told
            .parts
            .iter_mut()
            .filter_map(|(_, part)| part.tokens.as_mut())
        {
            for index in &mut tokens.first_indices {
                *index = index.saturating_add(1);
            }
        }
        Ok(())
    }
}
