//! Tests against a real etcd, each with its own. They wait on the watch, never
//! on a clock.
#![allow(clippy::unwrap_used)]

mod changes;
mod register;
mod survive;

use std::{
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use kvmesh_testkit::etcd::Etcd;
use kvmesh_wire::v1::{Role, WorkerRecord};

use crate::{Probe, Registration, RegistrationState, Registry, Settings};

const CLUSTER: &str = "test";

/// A probe that says what it is told.
#[derive(Debug, Default)]
struct Told(AtomicBool);

impl Told {
    fn alive() -> Arc<Self> {
        Arc::new(Self(AtomicBool::new(true)))
    }

    fn dead() -> Arc<Self> {
        Arc::new(Self::default())
    }
}

impl Probe for Told {
    fn is_alive<'a>(
        &'a self,
        _: &'a WorkerRecord,
    ) -> Pin<Box<dyn Future<Output = bool> + Send + 'a>> {
        Box::pin(async { self.0.load(Ordering::SeqCst) })
    }
}

/// Bounds that a busy machine keeps: a lease outlives whatever is done under it.
fn settings(etcd: &Etcd) -> Settings {
    let mut settings = Settings::new([etcd.endpoint()], CLUSTER);
    settings.ttl = Duration::from_secs(60);
    settings.call_timeout = Duration::from_secs(20);
    settings.backoff = (Duration::from_millis(20), Duration::from_millis(200));
    settings
}

fn registry(etcd: &Etcd) -> Registry {
    Registry::new(settings(etcd)).unwrap()
}

/// For what is to be noticed: the shortest TTL that etcd gives keeps those tests short.
fn hasty(etcd: &Etcd) -> Settings {
    let mut hasty = settings(etcd);
    hasty.ttl = Duration::from_secs(2);
    hasty
}

fn worker(id: &str, incarnation: u64) -> WorkerRecord {
    WorkerRecord {
        worker_id: id.to_owned(),
        incarnation,
        address: format!("127.0.0.1:{}", 1000 + incarnation),
        role: Role::Both.into(),
        version: "0.1.0".to_owned(),
        ..WorkerRecord::default()
    }
}

async fn register(registry: &Registry, record: WorkerRecord) -> Registration {
    let registration = registry.register_worker(record, Told::dead()).unwrap();
    assert_eq!(registration.settled().await, RegistrationState::Registered);
    registration
}
