//! `Router`: the router inside a Python process. No Python runs on its threads,
//! but for a scorer where one is given.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use kvmesh_gateway::{CancellationToken, Settings, init_logging, settings::Layers};
use pyo3::{
    create_exception,
    exceptions::{PyException, PyOSError, PyValueError},
    prelude::*,
};
use tokio::{
    runtime::{Builder, Runtime},
    sync::watch,
};

use crate::scoring::PyScorer;

create_exception!(
    kvmesh._router,
    InternalError,
    PyException,
    "A bug in kvmesh: Rust code panicked. Please report it with its text."
);

/// Longest time that a signal to Python waits for its handler.
const SIGNAL_CHECK: Duration = Duration::from_millis(100);

/// Adds what this module has.
pub(crate) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    let py = module.py();
    module.add_class::<PyRouter>()?;
    module.add_function(wrap_pyfunction!(start_logging, module)?)?;
    module.add("InternalError", py.get_type::<InternalError>())
}

/// Runs code of ours; a panic in it becomes [`InternalError`].
pub(crate) fn guarded<T>(work: impl FnOnce() -> PyResult<T>) -> PyResult<T> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let text = panic
            .downcast_ref::<String>()
            .cloned()
            .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
            .unwrap_or_else(|| "panic without a text".to_owned());
        Err(InternalError::new_err(text))
    })
}

/// A router that serves until it is closed.
#[pyclass(name = "Router", module = "kvmesh._router", frozen)]
struct PyRouter {
    address: String,
    admin_address: Option<String>,
    stop: CancellationToken,
    ended: watch::Receiver<bool>,
    runtime: Mutex<Option<Runtime>>,
}

impl PyRouter {
    fn runtime(&self) -> MutexGuard<'_, Option<Runtime>> {
        self.runtime.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits a little; whether the router has ended.
    fn wait_a_little(&self) -> bool {
        let mut ended = self.ended.clone();
        let handle = self
            .runtime()
            .as_ref()
            .map(|runtime| runtime.handle().clone());
        let Some(handle) = handle else { return true };
        handle.block_on(async move {
            // An error: the router's task is gone, which is an end too.
            tokio::time::timeout(SIGNAL_CHECK, ended.wait_for(|ended| *ended))
                .await
                .is_ok()
        })
    }

    fn wait_for_end(&self, py: Python<'_>) -> PyResult<()> {
        loop {
            let ended = py.detach(|| guarded(|| Ok(self.wait_a_little())))?;
            if ended {
                return Ok(());
            }
            py.check_signals()?;
        }
    }
}

#[pymethods]
impl PyRouter {
    /// Starts a router. `settings_json`: an object with the keys of
    /// `kvmesh-router --help`, `_` for `-`; stronger than `KVMESH_*` variables.
    /// `scorer`: scores the plans of each request instead of `policy`.
    #[new]
    #[pyo3(signature = (settings_json, scorer = None))]
    fn new(
        py: Python<'_>,
        settings_json: &str,
        scorer: Option<Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let scorer = scorer.map(PyScorer::new).transpose()?;
        py.detach(|| {
            guarded(|| {
                let wrong = |error: kvmesh_gateway::settings::SettingsError| {
                    PyValueError::new_err(error.to_string())
                };
                let mut layers = Layers::default();
                layers.add_environment(std::env::vars()).map_err(wrong)?;
                layers.add_json("settings", settings_json).map_err(wrong)?;
                let mut settings = Settings::resolve(&layers).map_err(wrong)?;
                settings.policy.scorer = scorer.map(|scorer| Arc::new(scorer) as _);
                start(&settings)
            })
        })
    }

    /// The bound address, "host:port".
    #[getter]
    fn address(&self) -> &str {
        &self.address
    }

    /// The bound address of the port for operators, where they have one.
    #[getter]
    fn admin_address(&self) -> Option<&str> {
        self.admin_address.as_deref()
    }

    /// Waits until the router has ended. Signals are seen within 100 ms.
    fn wait(&self, py: Python<'_>) -> PyResult<()> {
        self.wait_for_end(py)
    }

    /// Ends it: NOT_SERVING, GOAWAY, the grace for running generations.
    /// Returns when it has ended; again is allowed and does nothing.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        self.stop.cancel();
        self.wait_for_end(py)?;
        let runtime = self.runtime().take();
        if let Some(runtime) = runtime {
            py.detach(|| runtime.shutdown_timeout(Duration::from_secs(1)));
        }
        Ok(())
    }
}

impl Drop for PyRouter {
    fn drop(&mut self) {
        self.stop.cancel();
        // Python may be on its way out: nothing waits here.
        if let Some(runtime) = self.runtime().take() {
            runtime.shutdown_background();
        }
    }
}

/// Sends the log lines of Rust code to stderr, in the form of a router's. For
/// processes without a router: one that is started later changes nothing.
/// `level`: as the setting `log_level`.
#[pyfunction]
fn start_logging(level: &str) -> PyResult<()> {
    let wrong =
        |error: kvmesh_gateway::settings::SettingsError| PyValueError::new_err(error.to_string());
    let mut layers = Layers::default();
    layers
        .add("start_logging", [("log_level".to_owned(), level.into())])
        .map_err(wrong)?;
    init_logging(&Settings::resolve(&layers).map_err(wrong)?);
    Ok(())
}

fn start(settings: &Settings) -> PyResult<PyRouter> {
    init_logging(settings);
    let runtime = Builder::new_multi_thread()
        .worker_threads(settings.threads)
        .thread_name("kvmesh-router")
        .enable_all()
        .build()?;
    let inside = runtime.enter();
    let router = kvmesh_gateway::Router::start(settings)
        .map_err(|error| PyOSError::new_err(error.to_string()))?;
    drop(inside);
    let address = router.address().to_string();
    let admin_address = router.admin_address().map(|address| address.to_string());
    let stop = router.stop_token();
    let (tell, ended) = watch::channel(false);
    runtime.spawn(async move {
        router.ended().await;
        tell.send_replace(true);
    });
    Ok(PyRouter {
        address,
        admin_address,
        stop,
        ended,
        runtime: Mutex::new(Some(runtime)),
    })
}
