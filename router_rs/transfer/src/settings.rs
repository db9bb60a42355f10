//! Settings of a node.

use std::{fmt, sync::Arc, time::Duration};

use bytes::Bytes;
use kvmesh_wire::v1::KvCompatibility;
use rustls::{ClientConfig, ServerConfig, pki_types::CertificateDer};

use crate::timer::Timer;

/// What peers show each other to prove that they are of one cluster. Asked for
/// anew with each connection.
pub trait Proof: fmt::Debug + Send + Sync {
    /// What is shown to peers.
    fn shown(&self) -> Bytes;
    /// Whether what a peer has shown is enough. May take no longer for what is
    /// nearly right.
    fn accepts(&self, given: &[u8]) -> bool;
}

/// TLS between peers, with certificates on both sides. Asked for anew with each
/// connection, so that changed ones are for the next.
pub trait PeerTls: fmt::Debug + Send + Sync {
    /// For a connection that a peer makes. It must ask for a certificate.
    fn accepting(&self) -> Arc<ServerConfig>;
    /// For a connection to a peer. What it is called there does not count.
    ///
    /// # Errors
    ///
    /// Where keys cannot be used.
    fn connecting(&self) -> Result<Arc<ClientConfig>, rustls::Error>;
    /// The worker whose certificate this is; who signed it was looked at.
    ///
    /// # Errors
    ///
    /// Why it is no worker's of this cluster, for people.
    fn worker(&self, certificate: &CertificateDer<'_>) -> Result<String, String>;
}

/// What a node is told when it starts.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Name of this worker.
    pub worker_id: String,
    /// Its incarnation.
    pub incarnation: u64,
    /// What partners must agree on.
    pub compatibility: KvCompatibility,
    /// Tokens a block.
    pub block_tokens: u32,
    /// Address to listen on, "host:port"; port 0: any.
    pub listen: String,
    /// Host told to peers where `listen` is a wildcard. Empty: the bound one.
    pub advertise: String,
    /// Whether to offer and to use shared memory on one host.
    pub shared_memory: bool,
    /// Right of a receiver to pinned blocks, renewed by each word from it; and
    /// as long a receiver waits for a silent sender.
    pub lease: Duration,
    /// Wait of a pull for its offer.
    pub offer_timeout: Duration,
    /// How long an aborted id is remembered.
    pub aborted_memory: Duration,
    /// Limit on connecting and on the first frames.
    pub connect_timeout: Duration,
    /// A connection without transfers is closed after this.
    pub idle_timeout: Duration,
    /// Transfers at a time, each direction.
    pub max_transfers: usize,
    /// Connections from peers at a time that have said who they are.
    pub max_connections: usize,
    /// Connections at a time that have yet to say so, for which they have
    /// `connect_timeout`: the one that has taken the longest makes room for a new one.
    pub max_greeting: usize,
    /// Threads that copy and hash. 0: half of the cores, 1 to 4.
    pub copy_threads: usize,
    /// Proof of belonging to the cluster. `None`: none is asked for.
    pub proof: Option<Arc<dyn Proof>>,
    /// TLS with all peers. `None`: with none.
    pub tls: Option<Arc<dyn PeerTls>>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            worker_id: String::new(),
            incarnation: 0,
            compatibility: KvCompatibility::default(),
            block_tokens: 16,
            listen: "127.0.0.1:0".into(),
            advertise: String::new(),
            shared_memory: true,
            lease: Duration::from_secs(10),
            offer_timeout: Duration::from_secs(2),
            aborted_memory: Duration::from_secs(10),
            connect_timeout: Duration::from_secs(2),
            idle_timeout: Duration::from_secs(30),
            max_transfers: 4096,
            max_connections: 1024,
            max_greeting: 128,
            copy_threads: 0,
            proof: None,
            tls: None,
        }
    }
}

impl Settings {
    /// How long a timer runs. A lease is renewed four times in its length.
    pub(crate) fn length(&self, timer: Timer) -> Duration {
        match timer {
            Timer::Offer => self.offer_timeout,
            Timer::Lease | Timer::Silence => self.lease,
            Timer::Memory => self.aborted_memory,
            Timer::Heartbeat => self.lease / 4,
        }
    }

    pub(crate) fn copy_threads(&self) -> usize {
        if self.copy_threads > 0 {
            return self.copy_threads;
        }
        std::thread::available_parallelism().map_or(1, |n| (n.get() / 2).clamp(1, 4))
    }
}
