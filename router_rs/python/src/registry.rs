//! `WorkerRegistration` and the lists: the registry as Python sees it.

use std::{
    path::PathBuf,
    sync::{Arc, OnceLock},
    time::Duration,
};

use kvmesh_registry::{
    Credentials, GetInfoProbe, Registration, RegistrationState, Registry, RegistryError, Settings,
};
use kvmesh_trust::ServerTls;
use kvmesh_wire::v1::WorkerRecord;
use prost::Message;
use pyo3::{
    create_exception,
    exceptions::{PyException, PyRuntimeError, PyValueError},
    prelude::*,
    types::PyBytes,
};
use tokio::runtime::{Builder, Runtime};

use crate::trust::{PyClusterToken, PyPeerTls, dialer};

create_exception!(
    kvmesh._router,
    RegistryUnreachableError,
    PyException,
    "etcd cannot be reached, or refuses what was asked."
);
create_exception!(
    kvmesh._router,
    WorkerIdTakenError,
    PyException,
    "Another live worker is registered under this id."
);

/// Adds what this module has.
pub(crate) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    let py = module.py();
    module.add_class::<PyWorkerRegistration>()?;
    module.add_function(wrap_pyfunction!(list_workers, module)?)?;
    module.add_function(wrap_pyfunction!(list_routers, module)?)?;
    module.add(
        "RegistryUnreachableError",
        py.get_type::<RegistryUnreachableError>(),
    )?;
    module.add("WorkerIdTakenError", py.get_type::<WorkerIdTakenError>())
}

/// One thread for all registrations of a process: they only wait.
fn runtime() -> PyResult<&'static Runtime> {
    static RUNTIME: OnceLock<Result<Runtime, String>> = OnceLock::new();
    RUNTIME
        .get_or_init(|| {
            Builder::new_multi_thread()
                .worker_threads(1)
                .thread_name("kvmesh-registry")
                .enable_all()
                .build()
                .map_err(|error| error.to_string())
        })
        .as_ref()
        .map_err(|error| PyRuntimeError::new_err(error.clone()))
}

fn to_python(error: RegistryError) -> PyErr {
    match error {
        RegistryError::Taken { .. } => WorkerIdTakenError::new_err(error.to_string()),
        RegistryError::Record(_) => PyValueError::new_err(error.to_string()),
        _ => RegistryUnreachableError::new_err(error.to_string()),
    }
}

fn decode(record: &[u8]) -> PyResult<WorkerRecord> {
    WorkerRecord::decode(record)
        .map_err(|error| PyValueError::new_err(format!("not a serialised WorkerRecord: {error}")))
}

/// How etcd is reached; shared by all that is here.
struct Reach<'a> {
    ca_file: Option<PathBuf>,
    certificate_file: Option<PathBuf>,
    key_file: Option<PathBuf>,
    server_name: &'a str,
    user: &'a str,
    password: &'a str,
}

impl Reach<'_> {
    fn settings(self, endpoints: Vec<String>, cluster: String) -> PyResult<Settings> {
        let mut settings = Settings::new(endpoints, cluster);
        if let Some(ca) = self.ca_file {
            let identity = self.certificate_file.zip(self.key_file);
            let identity = identity.map(|(chain, key)| (("etcd_cert", chain), ("etcd_key", key)));
            let name = Some(self.server_name).filter(|name| !name.is_empty());
            let name = name.map(|name| ("etcd_server_name", name));
            let tls = ServerTls::open(("etcd_ca", ca), identity, name);
            let tls = tls.map_err(|error| PyValueError::new_err(error.to_string()))?;
            settings.tls = Some(tls);
        }
        if !self.user.is_empty() {
            settings.credentials = Some(Credentials {
                user: self.user.to_owned(),
                password: self.password.to_owned(),
            });
        }
        Ok(settings)
    }
}

fn open(settings: Settings) -> PyResult<(Registry, &'static Runtime)> {
    let runtime = runtime()?;
    let _inside = runtime.enter();
    let registry =
        Registry::new(settings).map_err(|error| PyValueError::new_err(error.to_string()))?;
    Ok((registry, runtime))
}

/// A worker's registration: kept alive in Rust until it is closed.
#[pyclass(name = "WorkerRegistration", module = "kvmesh._router", frozen)]
struct PyWorkerRegistration {
    registration: Registration,
    runtime: &'static Runtime,
}

#[pymethods]
impl PyWorkerRegistration {
    #[new]
    #[pyo3(signature = (
        endpoints, cluster, record, ttl_s=10.0, *, wait_s=5.0,
        ca_file=None, certificate_file=None, key_file=None,
        server_name="", user="", password="", token=None, tls=None,
    ))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        py: Python<'_>,
        endpoints: Vec<String>,
        cluster: String,
        record: &[u8],
        ttl_s: f64,
        wait_s: f64,
        ca_file: Option<PathBuf>,
        certificate_file: Option<PathBuf>,
        key_file: Option<PathBuf>,
        server_name: &str,
        user: &str,
        password: &str,
        token: Option<&PyClusterToken>,
        tls: Option<&PyPeerTls>,
    ) -> PyResult<Self> {
        let record = decode(record)?;
        let reach = Reach {
            ca_file,
            certificate_file,
            key_file,
            server_name,
            user,
            password,
        };
        let mut settings = reach.settings(endpoints, cluster)?;
        settings.ttl = seconds("ttl_s", ttl_s)?;
        let wait = seconds("wait_s", wait_s)?;
        let (registry, runtime) = open(settings)?;
        let probe = GetInfoProbe {
            dialer: dialer(token, tls),
            ..GetInfoProbe::default()
        };
        py.detach(|| {
            runtime.block_on(async {
                let registration = registry
                    .register_worker(record, Arc::new(probe))
                    .map_err(to_python)?;
                // etcd away is no reason not to serve: it registers later.
                let decided = registration.wait_for(|state| {
                    matches!(
                        state,
                        RegistrationState::Registered | RegistrationState::Refused(_)
                    )
                });
                let settled = tokio::time::timeout(wait, decided).await;
                if let Ok(RegistrationState::Refused(reason)) = settled {
                    registration.close().await;
                    return Err(WorkerIdTakenError::new_err(reason));
                }
                Ok(Self {
                    registration,
                    runtime,
                })
            })
        })
    }

    /// Where it stands, as one word.
    fn state(&self) -> &'static str {
        self.registration.state().name()
    }

    /// Why it is refused or away; else empty.
    fn reason(&self) -> String {
        reason(&self.registration.state())
    }

    /// Waits until state or reason are others than these, or it is closed; both.
    fn wait_change(
        &self,
        py: Python<'_>,
        known_state: &str,
        known_reason: &str,
    ) -> (&'static str, String) {
        let other = |state: &RegistrationState| {
            state.name() != known_state || reason(state) != known_reason
        };
        let state = py.detach(|| self.runtime.block_on(self.registration.wait_for(other)));
        (state.name(), reason(&state))
    }

    /// Writes another record of the same worker and incarnation.
    fn update(&self, record: &[u8]) -> PyResult<()> {
        self.registration
            .update_worker(&decode(record)?)
            .map_err(to_python)
    }

    /// Waits until it is registered; false where that did not come in time.
    fn wait_registered(&self, py: Python<'_>, timeout_s: f64) -> PyResult<bool> {
        let limit = seconds("timeout_s", timeout_s)?;
        let wanted = |state: &RegistrationState| *state == RegistrationState::Registered;
        let reached = py.detach(|| {
            self.runtime.block_on(async {
                tokio::time::timeout(limit, self.registration.wait_for(wanted)).await
            })
        });
        Ok(reached.is_ok_and(|state| wanted(&state)))
    }

    /// Revokes the lease and waits for that.
    fn close(&self, py: Python<'_>) {
        py.detach(|| self.runtime.block_on(self.registration.close()));
    }
}

fn reason(state: &RegistrationState) -> String {
    match state {
        RegistrationState::Refused(reason) | RegistrationState::Away(reason) => reason.clone(),
        _ => String::new(),
    }
}

fn seconds(name: &str, value: f64) -> PyResult<Duration> {
    Duration::try_from_secs_f64(value).map_err(|_| {
        PyValueError::new_err(format!("{name} is {value}; allowed are seconds, 0 or more"))
    })
}

/// The workers of a cluster, each a serialised WorkerRecord.
#[pyfunction]
#[pyo3(signature = (
    endpoints, cluster, *, ca_file=None, certificate_file=None, key_file=None,
    server_name="", user="", password="",
))]
#[allow(clippy::too_many_arguments)]
fn list_workers<'py>(
    py: Python<'py>,
    endpoints: Vec<String>,
    cluster: String,
    ca_file: Option<PathBuf>,
    certificate_file: Option<PathBuf>,
    key_file: Option<PathBuf>,
    server_name: &str,
    user: &str,
    password: &str,
) -> PyResult<Vec<Bound<'py, PyBytes>>> {
    let reach = Reach {
        ca_file,
        certificate_file,
        key_file,
        server_name,
        user,
        password,
    };
    let (registry, runtime) = open(reach.settings(endpoints, cluster)?)?;
    let table = py
        .detach(|| runtime.block_on(registry.list_workers()))
        .map_err(to_python)?;
    let records = table.workers.values();
    Ok(records
        .map(|worker| PyBytes::new(py, &worker.record.encode_to_vec()))
        .collect())
}

/// The routers of a cluster, as (id, address).
#[pyfunction]
#[pyo3(signature = (
    endpoints, cluster, *, ca_file=None, certificate_file=None, key_file=None,
    server_name="", user="", password="",
))]
#[allow(clippy::too_many_arguments)]
fn list_routers(
    py: Python<'_>,
    endpoints: Vec<String>,
    cluster: String,
    ca_file: Option<PathBuf>,
    certificate_file: Option<PathBuf>,
    key_file: Option<PathBuf>,
    server_name: &str,
    user: &str,
    password: &str,
) -> PyResult<Vec<(String, String)>> {
    let reach = Reach {
        ca_file,
        certificate_file,
        key_file,
        server_name,
        user,
        password,
    };
    let (registry, runtime) = open(reach.settings(endpoints, cluster)?)?;
    let routers = py
        .detach(|| runtime.block_on(registry.list_routers()))
        .map_err(to_python)?;
    Ok(routers
        .into_iter()
        .map(|router| (router.router_id, router.address))
        .collect())
}
