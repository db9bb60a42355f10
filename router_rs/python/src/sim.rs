//! `SimStreams`: streams of the simulated engine that decode together.

use std::sync::Mutex;

use kvmesh_sim_content::{Content, Stream};
use pyo3::{
    buffer::PyBuffer,
    exceptions::{PyIndexError, PyRuntimeError, PyValueError},
    prelude::*,
    types::PyBytes,
};

/// Streams of one composition, from step to step.
#[pyclass(name = "SimStreams", module = "kvmesh._router", frozen)]
pub(crate) struct PySimStreams {
    content: Content,
    /// Keeps the memory mapped and where it is.
    pool: PyBuffer<u8>,
    streams: Mutex<Vec<Stream>>,
}

#[pymethods]
impl PySimStreams {
    #[new]
    #[pyo3(signature = (
        pool, *, state_factor, token_factor, spread, gain, first_token, tokens, end_of_text,
        end_id, block_tokens,
    ))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        pool: PyBuffer<u8>,
        state_factor: u64,
        token_factor: u64,
        spread: Vec<u64>,
        gain: u64,
        first_token: u32,
        tokens: u32,
        end_of_text: u64,
        end_id: u32,
        block_tokens: usize,
    ) -> PyResult<Self> {
        let fits = !spread.is_empty() && block_tokens > 0 && tokens > 0;
        if !fits || first_token.checked_add(tokens).is_none() {
            return Err(PyValueError::new_err("sizes do not make a content"));
        }
        let aligned = pool.buf_ptr().cast::<u64>().is_aligned();
        if !pool.is_c_contiguous() || pool.readonly() || !aligned {
            return Err(PyValueError::new_err(
                "pool must be contiguous, writable and aligned",
            ));
        }
        Ok(Self {
            content: Content {
                state_factor,
                token_factor,
                spread,
                gain,
                first_token,
                tokens,
                end_of_text,
                end_id,
                block_tokens,
            },
            pool,
            streams: Mutex::default(),
        })
    }

    /// Takes other streams: (position, state, reading, tag) each.
    fn join(&self, streams: Vec<(u64, u64, u64, u64)>) -> PyResult<()> {
        let streams = streams
            .into_iter()
            .map(|(position, state, reading, tag)| Stream {
                position,
                state,
                reading,
                tag,
            });
        *self.lock()? = streams.collect();
        Ok(())
    }

    /// (position, state, reading) of each stream now.
    fn states(&self) -> PyResult<Vec<(u64, u64, u64)>> {
        let streams = self.lock()?;
        let told = streams.iter().map(|s| (s.position, s.state, s.reading));
        Ok(told.collect())
    }

    /// Computes a token a stream; returns the tokens drawn, packed as u32.
    fn step<'py>(
        &self,
        py: Python<'py>,
        ids: &[u8],
        tables: PyBuffer<u32>,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let (ids, _) = ids.as_chunks();
        let ids: Vec<u32> = ids.iter().map(|id| u32::from_ne_bytes(*id)).collect();
        let drawn = self.advance(&mut self.lock()?, &ids, &Tables::of(&tables)?)?;
        let drawn: Vec<u8> = drawn.iter().flat_map(|id| id.to_ne_bytes()).collect();
        Ok(PyBytes::new(py, &drawn))
    }
}

/// Block tables, `[rows, width]`.
pub(crate) struct Tables<'a> {
    /// Keeps the memory where it is.
    buffer: &'a PyBuffer<u32>,
    rows: usize,
    width: usize,
}

impl<'a> Tables<'a> {
    pub(crate) fn of(buffer: &'a PyBuffer<u32>) -> PyResult<Self> {
        match buffer.shape() {
            [rows, width] if buffer.is_c_contiguous() => Ok(Self {
                buffer,
                rows: *rows,
                width: *width,
            }),
            _ => Err(PyValueError::new_err(
                "tables must be contiguous, a row a stream",
            )),
        }
    }

    fn slot(&self, row: usize, block: usize) -> Option<u32> {
        (row < self.rows && block < self.width).then(|| {
            let at = self.buffer.buf_ptr().cast::<u32>();
            // SAFETY: the buffer is alive, contiguous and has `rows * width`
            // entries. The engine's thread alone writes them, and it is here.
            unsafe { at.add(row * self.width + block).read() }
        })
    }
}

impl PySimStreams {
    /// Streams, for the one thread that uses them.
    pub(crate) fn lock(&self) -> PyResult<std::sync::MutexGuard<'_, Vec<Stream>>> {
        self.streams
            .try_lock()
            .map_err(|_| PyRuntimeError::new_err("one thread at a time"))
    }

    /// Computes a token a stream; returns the tokens drawn. Needs no GIL.
    pub(crate) fn advance(
        &self,
        streams: &mut [Stream],
        ids: &[u32],
        tables: &Tables<'_>,
    ) -> PyResult<Vec<u32>> {
        if ids.len() != streams.len() || tables.rows != streams.len() {
            return Err(PyValueError::new_err("columns are one entry a stream"));
        }
        let words = self.content.words();
        let limit = self.pool.item_count() / size_of::<u64>();
        let mut drawn = Vec::with_capacity(ids.len());
        for (row, (stream, id)) in streams.iter_mut().zip(ids).enumerate() {
            let position = usize::try_from(stream.position)
                .map_err(|_| PyIndexError::new_err("a position is out of range"))?;
            let begin = tables
                .slot(row, position / self.content.block_tokens)
                .map(|slot| self.content.place(slot, position))
                .filter(|begin| begin + words <= limit)
                .ok_or_else(|| PyIndexError::new_err("a slot is out of range"))?;
            // SAFETY: the buffer is alive, aligned for u64 (checked in `new`) and
            // `begin + words` lies in it. Blocks of streams are written by the
            // engine's thread alone, which is in this call and holds the lock;
            // peers in other processes only read, and discard what was written
            // meanwhile by the slot's version.
            let block = unsafe {
                let data = self.pool.buf_ptr().cast::<u64>().add(begin);
                std::slice::from_raw_parts_mut(data, words)
            };
            drawn.push(self.content.step(stream, *id, block));
        }
        Ok(drawn)
    }
}
