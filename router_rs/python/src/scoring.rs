//! A Python callable that scores plans, behind the scheduler's [`Scorer`].

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Instant,
};

use kvmesh_scheduler::{Columns, ScoreError, Scorer};
use pyo3::{
    exceptions::PyValueError,
    prelude::*,
    types::{PyBytes, PyDict},
};

/// Failures between two of which nothing is logged.
const LOG_EVERY: u64 = 1_000;

/// Calls `scores = score(columns)`: a dict of NumPy arrays in, one number a
/// plan out. The least is chosen.
pub(crate) struct PyScorer {
    score: Py<PyAny>,
    /// `numpy.frombuffer`.
    from_buffer: Py<PyAny>,
    failures: AtomicU64,
}

impl PyScorer {
    /// A callable; NumPy has to be there.
    pub(crate) fn new(score: Bound<'_, PyAny>) -> PyResult<Self> {
        let numpy = score.py().import("numpy")?;
        Ok(Self {
            from_buffer: numpy.getattr("frombuffer")?.unbind(),
            score: score.unbind(),
            failures: AtomicU64::new(0),
        })
    }

    fn call(&self, py: Python<'_>, plans: &Columns) -> PyResult<Vec<f64>> {
        let mut bytes = Vec::with_capacity(8 * plans.plans() * Columns::NAMES.len());
        for (_, column) in plans.iter() {
            for value in column {
                bytes.extend_from_slice(&value.to_ne_bytes());
            }
        }
        // One buffer for all columns: an array a column is then a view of it.
        let all = self
            .from_buffer
            .bind(py)
            .call1((PyBytes::new(py, &bytes),))?
            .call_method1("reshape", (Columns::NAMES.len(), plans.plans()))?;
        let columns = PyDict::new(py);
        for (name, column) in Columns::NAMES.into_iter().zip(all.try_iter()?) {
            columns.set_item(name, column?)?;
        }
        let scores = self.score.bind(py).call1((columns,))?;
        if scores.hasattr("tolist")? {
            return scores.call_method0("tolist")?.extract();
        }
        scores.extract()
    }
}

impl Scorer for PyScorer {
    fn score(&self, plans: &Columns) -> Result<Vec<f64>, ScoreError> {
        let called = Python::try_attach(|py| {
            let scores = self.call(py, plans);
            scores.map_err(|error| ScoreError::Failed(error.to_string()))
        });
        called.unwrap_or_else(|| Err(ScoreError::Failed("Python is ending".to_owned())))
    }

    fn failed(&self, error: &ScoreError) {
        if !self
            .failures
            .fetch_add(1, Ordering::Relaxed)
            .is_multiple_of(LOG_EVERY)
        {
            return;
        }
        Python::try_attach(|py| {
            if let Err(unlogged) = log(py, error) {
                unlogged.write_unraisable(py, None);
            }
        });
    }
}

/// What a scorer costs a decision, in seconds a call: it is called as a router
/// calls it, with so many plans of made-up figures.
#[pyfunction]
fn measure_scorer(
    py: Python<'_>,
    scorer: Bound<'_, PyAny>,
    plans: usize,
    calls: usize,
) -> PyResult<Vec<f64>> {
    let scorer = PyScorer::new(scorer)?;
    let rows: Vec<_> = (0..plans)
        .map(|plan| std::array::from_fn(|column| ((plan * 31 + column * 7) % 97) as f64))
        .collect();
    let columns = Columns::of(&rows);
    let call = || {
        let began = Instant::now();
        let scores = scorer.score(&columns);
        let took = began.elapsed().as_secs_f64();
        scores.map(|_| took)
    };
    // From a thread that does not hold the GIL, as the router's do not.
    py.detach(|| (0..calls).map(|_| call()).collect::<Result<_, _>>())
        .map_err(|error| PyValueError::new_err(error.to_string()))
}

/// Adds what this module has.
pub(crate) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(measure_scorer, module)?)
}

fn log(py: Python<'_>, error: &ScoreError) -> PyResult<()> {
    let logger = py
        .import("logging")?
        .call_method1("getLogger", ("kvmesh.scorer",))?;
    let text = format!("plans are chosen by cost instead: {error}");
    logger.call_method1("warning", ("%s", text))?;
    Ok(())
}
