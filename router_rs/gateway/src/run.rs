//! A router from its settings to its end.

use std::{
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use kvmesh_registry::{Registration, Registry, RouterRecord};
use kvmesh_trust::{ClusterToken, Dialer, Followed, Role, ServerTls, WorkerTls};
use rustls::ServerConfig;
use tokio::{net::TcpListener, task::JoinHandle};
use tokio_util::{
    sync::CancellationToken,
    task::{AbortOnDropHandle, TaskTracker},
};

use crate::{
    access::Access,
    door::Door,
    mesh::{Mesh, MeshSettings},
    serve::{Acceptor, Health, Port, Reflection, RouterFacts, Shared, bind},
    settings::Settings,
    telemetry::{Exporter, Exposition, Spans, Telemetry},
    vllm::Vllm,
};

/// Time that connections have to carry out what their calls ended with.
const FLUSH: Duration = Duration::from_secs(2);

/// A router cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The address cannot be bound.
    #[error("{setting}: {address}: {error}")]
    Bind {
        /// The setting.
        setting: &'static str,
        /// What was asked for.
        address: SocketAddr,
        /// What the system says.
        error: io::Error,
    },
    /// TLS to a server, such as etcd, that cannot be had.
    #[error(transparent)]
    ServerTls(#[from] kvmesh_trust::ServerTlsError),
    /// A file that says who is trusted cannot be used.
    #[error(transparent)]
    File(#[from] kvmesh_trust::FileError),
    /// The registry's settings are not usable.
    #[error("etcd: {0}")]
    Registry(#[from] kvmesh_registry::SettingsError),
    /// This router cannot be registered.
    #[error("etcd: {0}")]
    Register(#[from] kvmesh_registry::RegistryError),
    /// Its own descriptors cannot be read.
    #[error("reflection: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
}

/// A router that serves.
pub struct Router {
    address: SocketAddr,
    admin_address: Option<SocketAddr>,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Router {
    /// Binds and serves. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// [`StartError`]; etcd and workers may come later.
    pub fn start(settings: &Settings) -> Result<Self, StartError> {
        let (listener, address) = listen("listen", settings.listen)?;
        let admin = settings.admin_listen.map(|at| listen("admin_listen", at));
        let admin = admin.transpose()?;
        let admin_address = admin.as_ref().map(|(_, address)| *address);
        let tls = tls_of(settings)?;
        let parts = Parts::assemble(settings, address)?;
        let mut ports = vec![(listener, Port::Clients)];
        ports.extend(admin.map(|(listener, _)| (listener, Port::Admin)));
        let acceptors: Vec<_> = ports
            .into_iter()
            .map(|port| Acceptor::new(port, settings, Arc::clone(&parts.shared), tls.clone()))
            .collect();
        let stop = CancellationToken::new();
        let times = (settings.drain_delay, settings.grace);
        tracing::info!(
            event = "serving",
            %address,
            router = %parts.shared.facts.router_id,
            cluster = %settings.cluster,
        );
        if let Some(address) = admin_address {
            tracing::info!(event = "serving_operators", %address);
        }
        let task = tokio::spawn(parts.run(acceptors, tls, stop.clone(), times));
        Ok(Self {
            address,
            admin_address,
            stop,
            task,
        })
    }

    /// The bound address.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The bound address of the port for operators, where they have one.
    #[must_use]
    pub fn admin_address(&self) -> Option<SocketAddr> {
        self.admin_address
    }

    /// Stops it when cancelled: NOT_SERVING first, then GOAWAY, then the grace
    /// for running generations.
    #[must_use]
    pub fn stop_token(&self) -> CancellationToken {
        self.stop.clone()
    }

    /// Waits until it has ended.
    pub async fn ended(self) {
        if let Err(error) = self.task.await {
            tracing::error!(event = "router_failed", %error);
        }
    }
}

/// Runs a router until `shutdown` is cancelled and all has ended.
///
/// # Errors
/// [`StartError`] where it cannot start.
pub async fn run(settings: &Settings, shutdown: CancellationToken) -> Result<(), StartError> {
    let router = Router::start(settings)?;
    let stop = router.stop_token();
    let relay = async {
        shutdown.cancelled().await;
        stop.cancel();
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = relay => {}
        () = router.ended() => {}
    }
    Ok(())
}

fn listen(
    setting: &'static str,
    address: SocketAddr,
) -> Result<(TcpListener, SocketAddr), StartError> {
    let failed = |error| StartError::Bind {
        setting,
        address,
        error,
    };
    let listener = bind(address).map_err(failed)?;
    let bound = listener.local_addr().map_err(failed)?;
    Ok((listener, bound))
}

/// The TLS of both ports.
fn tls_of(settings: &Settings) -> Result<Option<Arc<Followed<ServerConfig>>>, StartError> {
    Ok(match (&settings.tls_cert, &settings.tls_key) {
        (Some(certificate), Some(key)) => {
            let certificate = ("tls_cert", certificate.clone());
            let tls = kvmesh_trust::public_port(certificate, ("tls_key", key.clone()))?;
            Some(Arc::new(tls))
        }
        _ => None,
    })
}

/// How etcd is reached.
fn etcd_of(settings: &Settings) -> Result<kvmesh_registry::Settings, StartError> {
    let mut to = kvmesh_registry::Settings::new(settings.etcd.clone(), settings.cluster.clone());
    to.ttl = settings.etcd_ttl;
    if let Some(authorities) = &settings.etcd_ca {
        let identity = match (&settings.etcd_cert, &settings.etcd_key) {
            (Some(certificate), Some(key)) => Some((
                ("etcd_cert", certificate.clone()),
                ("etcd_key", key.clone()),
            )),
            _ => None,
        };
        let name = settings.etcd_server_name.as_str();
        let name = (!name.is_empty()).then_some(("etcd_server_name", name));
        let authorities = ("etcd_ca", authorities.clone());
        to.tls = Some(ServerTls::open(authorities, identity, name)?);
    }
    if !settings.etcd_user.is_empty() {
        to.credentials = Some(kvmesh_registry::Credentials {
            user: settings.etcd_user.clone(),
            password: settings.etcd_password.0.clone(),
        });
    }
    Ok(to)
}

/// What workers are shown, and what they have to show.
fn dialer(settings: &Settings) -> Result<Dialer, StartError> {
    let token = settings.cluster_token_file.as_deref();
    let token = token.map(ClusterToken::open).transpose()?;
    let tls = match &settings.worker_ca {
        None => None,
        Some(ca) => {
            let identity = match (&settings.worker_cert, &settings.worker_key) {
                (Some(certificate), Some(key)) => Some((
                    ("worker_cert", certificate.clone()),
                    ("worker_key", key.clone()),
                )),
                _ => None,
            };
            let ca = ("worker_ca", ca.clone());
            Some(WorkerTls::open(
                ca,
                identity,
                &settings.cluster,
                Role::Router,
            )?)
        }
    };
    Ok(Dialer {
        token: token.map(Arc::new),
        tls,
    })
}

/// What a router is made of, before it accepts connections.
pub(crate) struct Parts {
    pub(crate) shared: Arc<Shared>,
    dialer: Dialer,
    exporter: Option<Exporter>,
    registration: Option<Registration>,
}

impl Parts {
    pub(crate) fn assemble(settings: &Settings, address: SocketAddr) -> Result<Self, StartError> {
        let incarnation: u64 = rand::random();
        let router_id = match settings.router_id.as_str() {
            "" => format!("router-{incarnation:016x}"),
            id => id.to_owned(),
        };
        let telemetry = Arc::new(Telemetry::default());
        let access = Arc::new(Access::new(settings, Arc::clone(&telemetry))?);
        let registry = match settings.etcd.is_empty() {
            true => None,
            false => Some(Registry::new(etcd_of(settings)?)?),
        };
        let advertised = match settings.advertise.as_str() {
            "" => address.to_string(),
            given => given.to_owned(),
        };
        let record = RouterRecord {
            router_id: router_id.clone(),
            address: advertised,
        };
        let registration = match &registry {
            Some(registry) => Some(registry.register_router(record)?),
            None => None,
        };
        let etcd = registry.as_ref().map(Registry::status);
        let reflection = Reflection::new()?;
        let dialer = dialer(settings)?;
        let mesh = MeshSettings {
            dialer: dialer.clone(),
            ..settings.mesh(router_id.clone(), incarnation)
        };
        let mesh = Mesh::start(mesh, registry.as_ref());
        let (spans, exporter) = Spans::start(settings, &router_id, &telemetry)?.unzip();
        let shared = Arc::new(Shared {
            door: Door::new(settings, Arc::clone(&mesh), Arc::clone(&telemetry)),
            access,
            health: Health::default(),
            reflection,
            exposition: Exposition::new(Arc::clone(&mesh), Arc::clone(&telemetry), etcd.clone()),
            telemetry,
            spans,
            facts: RouterFacts {
                router_id,
                incarnation,
                cluster: settings.cluster.clone(),
                started: Instant::now(),
                etcd,
            },
            sse_keep_alive: settings.sse_keep_alive,
            parsers: settings.parsers.clone(),
            vllm: Vllm::default(),
            mesh,
        });
        Ok(Self {
            shared,
            dialer,
            exporter,
            registration,
        })
    }

    /// Serves, then ends in order: clients are told, running generations get
    /// their grace, connections carry out what is left.
    async fn run(
        self,
        acceptors: Vec<Acceptor>,
        tls: Option<Arc<Followed<ServerConfig>>>,
        stop: CancellationToken,
        (delay, grace): (Duration, Duration),
    ) {
        let connections = TaskTracker::new();
        let goaway = CancellationToken::new();
        let accepting: Vec<_> = acceptors
            .into_iter()
            .map(|acceptor| tokio::spawn(acceptor.run(goaway.clone(), connections.clone())))
            .collect();
        let access = Arc::clone(&self.shared.access);
        // Ends with this future, however that ends.
        let _keys = AbortOnDropHandle::new(tokio::spawn(access.follow()));
        let telemetry = Arc::clone(&self.shared.telemetry);
        let _tls = tls.map(|tls| {
            let following = tls.follow_and_log(move |taken| telemetry.tls_reloaded(taken));
            AbortOnDropHandle::new(tokio::spawn(following))
        });
        let _dialer = AbortOnDropHandle::new(tokio::spawn(self.dialer.follow()));
        stop.cancelled().await;
        tracing::info!(
            event = "stopping",
            open = self.shared.mesh.counters().open_streams.get()
        );
        self.shared.health.stop_serving();
        if let Some(registration) = &self.registration {
            // Clients that look into etcd no longer find it; etcd may be away.
            let _ = tokio::time::timeout(FLUSH, registration.close()).await;
        }
        connections.close();
        if !connections.is_empty() {
            tokio::time::sleep(delay).await;
        }
        goaway.cancel();
        for accepting in accepting {
            if let Err(error) = accepting.await {
                tracing::error!(event = "accept_loop_failed", %error);
            }
        }
        self.shared.mesh.shutdown(grace).await;
        let flushed = tokio::time::timeout(FLUSH, connections.wait()).await;
        if let Some(exporter) = self.exporter {
            exporter.close().await;
        }
        tracing::info!(event = "stopped", clean = flushed.is_ok());
    }
}
