//! Bounds of the mesh; each is a named setting of the router.

use std::{path::PathBuf, time::Duration};

use kvmesh_scheduler::DispatchSettings;
use kvmesh_trust::Dialer;

use super::{figures::ms, policy::PolicySettings};

/// Settings of the mesh.
#[derive(Clone, Debug)]
pub struct MeshSettings {
    /// Name of this router, stable over restarts.
    pub router_id: String,
    /// Random number of this process start.
    pub incarnation: u64,
    /// Workers at fixed addresses, "host:port" each.
    pub workers: Vec<String>,
    /// What workers are shown, and what they have to show.
    pub dialer: Dialer,
    /// Where tokenisers are kept. `None`: in memory only.
    pub cache_dir: Option<PathBuf>,
    /// Pings on worker connections, also idle ones.
    pub keep_alive: Duration,
    /// A client that takes nothing for so long is given up.
    pub slow_client_timeout: Duration,
    /// Token ids kept for all clients together (4 bytes each). Above it the
    /// streams that hold more than their even share are given up.
    pub undelivered_ids: u64,
    /// Requests of a model that may wait for room and are as urgent by class.
    pub queue_length: usize,
    /// Longest wait for room; a longer one that is predicted is not begun.
    pub queue_timeout: Duration,
    /// A request leaves for a worker that is predicted to start it within this
    /// or within one step, whichever is longer.
    pub dispatch_ahead: Duration,
    /// Waiting requests of a model that are tried in one go.
    pub dispatch_tries: usize,
    /// Pause between two looks at what waits for the sake of workers that none of
    /// it means to go to.
    pub dispatch_interval: Duration,
    /// A worker has to answer a placement within this.
    pub answer_timeout: Duration,
    /// Decode has to bring a token within this after prefill's session broke, and
    /// a resumable generation whose client's connection is gone is kept for so long.
    pub orphan_timeout: Duration,
    /// A worker whose session broke has so long to come back before what runs
    /// there gets a new attempt.
    pub reattach_grace: Duration,
    /// How long a request of which workers died is not run again.
    pub quarantine_time: Duration,
    /// First and longest pause before a tokeniser's download is tried again.
    pub tokenizer_retry: (Duration, Duration),
    /// Generations whose decisions are kept.
    pub decisions_kept: usize,
    /// Share of them whose workers are asked for spans, whoever wants a trace.
    pub explain_traces: f64,
    /// Which policy chooses, and how what waits is served.
    pub policy: PolicySettings,
    /// How streams go on elsewhere.
    pub streams: StreamSettings,
}

/// Bounds of streams that go on at another worker or router.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StreamSettings {
    /// Streams of a worker that is left that are on their way at once. Each then has
    /// little left to move soon, so that few tokens are made meanwhile.
    pub hand_overs_at_once: usize,
    /// Hand-overs of one stream that may fail in a row before it stays where it is.
    pub hand_over_tries: u32,
    /// Calls of Resume that a tenant may make a second, as many as a second's at once: a
    /// frame to each worker for each. 0: any.
    pub tenant_resumes_per_s: f64,
    /// Longest wait for what workers answer to Find, and again to Claim.
    pub resume_timeout: Duration,
}

impl Default for StreamSettings {
    fn default() -> Self {
        Self {
            hand_overs_at_once: 4,
            hand_over_tries: 6,
            // A router that is lost with a thousand streams of one tenant has them all
            // resumed at once.
            tenant_resumes_per_s: 1_000.0,
            resume_timeout: Duration::from_secs(1),
        }
    }
}

impl Default for MeshSettings {
    fn default() -> Self {
        Self {
            router_id: "router".to_owned(),
            incarnation: 1,
            workers: Vec::new(),
            dialer: Dialer::default(),
            cache_dir: None,
            keep_alive: Duration::from_secs(10),
            slow_client_timeout: Duration::from_secs(60),
            // 64 MiB.
            undelivered_ids: 16 << 20,
            queue_length: 4_096,
            queue_timeout: Duration::from_secs(60),
            dispatch_ahead: Duration::from_millis(50),
            dispatch_tries: 32,
            dispatch_interval: Duration::from_millis(5),
            answer_timeout: Duration::from_secs(10),
            orphan_timeout: Duration::from_secs(10),
            reattach_grace: Duration::from_millis(250),
            quarantine_time: Duration::from_secs(300),
            tokenizer_retry: (Duration::from_millis(250), Duration::from_secs(30)),
            decisions_kept: 4_096,
            explain_traces: 0.1,
            policy: PolicySettings::default(),
            streams: StreamSettings::default(),
        }
    }
}

impl MeshSettings {
    /// How requests leave the queue.
    pub(super) fn dispatch(&self) -> DispatchSettings {
        DispatchSettings {
            queue: self.policy.queue,
            targets: self.policy.cost.targets,
            dispatch_ahead_ms: ms(self.dispatch_ahead),
            max_wait_ms: ms(self.queue_timeout),
            tried_at_once: self.dispatch_tries,
            pass_ms: ms(self.dispatch_interval),
        }
    }
}
