//! An etcd of its own for a test.

use std::{
    fs,
    io::{BufRead, BufReader},
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
};

/// A member on loopback with a data folder of its own. Killed when dropped.
pub(super) struct Etcd {
    child: Child,
    client: u16,
    peer: u16,
    data: PathBuf,
}

fn binary() -> PathBuf {
    std::env::var_os("KVMESH_ETCD_BIN").map_or_else(|| PathBuf::from("etcd"), PathBuf::from)
}

fn free_ports() -> (u16, u16) {
    // Both are held at once, so that they differ.
    let (a, b) = (
        TcpListener::bind("127.0.0.1:0").unwrap(),
        TcpListener::bind("127.0.0.1:0").unwrap(),
    );
    (
        a.local_addr().unwrap().port(),
        b.local_addr().unwrap().port(),
    )
}

impl Etcd {
    pub(super) fn start() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("kvmesh-etcd-{}-{number}", std::process::id());
        let data = std::env::temp_dir().join(name);
        let (client, peer) = free_ports();
        let child = spawn(client, peer, &data);
        Self {
            child,
            client,
            peer,
            data,
        }
    }

    pub(super) fn endpoint(&self) -> String {
        format!("127.0.0.1:{}", self.client)
    }

    pub(super) fn kill(&mut self) {
        // Already dead is as good.
        let _ = self.child.kill();
        self.child.wait().unwrap();
    }

    /// Starts it again, at the same address, with the data it had.
    pub(super) fn start_again(&mut self) {
        self.child = spawn(self.client, self.peer, &self.data);
    }

    pub(super) fn lose_data(&self) {
        fs::remove_dir_all(&self.data).unwrap();
    }

    pub(super) fn freeze(&self) {
        self.signal("-STOP");
    }

    pub(super) fn thaw(&self) {
        self.signal("-CONT");
    }

    fn signal(&self, signal: &str) {
        let pid = self.child.id().to_string();
        let done = Command::new("kill").args([signal, &pid]).status().unwrap();
        assert!(done.success());
    }

    /// Runs etcdctl, which lies beside etcd.
    pub(super) fn ctl(&self, arguments: &[&str]) {
        let done = Command::new(binary().with_file_name("etcdctl"))
            .env("ETCDCTL_API", "3")
            .arg(format!("--endpoints={}", self.endpoint()))
            .args(arguments)
            .output()
            .unwrap();
        assert!(done.status.success(), "etcdctl {arguments:?}: {done:?}");
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.kill();
        // What is left in the temporary folder harms nobody.
        let _ = fs::remove_dir_all(&self.data);
    }
}

/// Starts etcd and waits until it says that it serves.
fn spawn(client: u16, peer: u16, data: &Path) -> Child {
    let binary = binary();
    let mut child = Command::new(&binary)
        .arg("--name=test")
        .arg(format!("--data-dir={}", data.display()))
        .arg(format!("--listen-client-urls=http://127.0.0.1:{client}"))
        .arg(format!("--advertise-client-urls=http://127.0.0.1:{client}"))
        .arg(format!("--listen-peer-urls=http://127.0.0.1:{peer}"))
        .arg(format!(
            "--initial-advertise-peer-urls=http://127.0.0.1:{peer}"
        ))
        .arg(format!("--initial-cluster=test=http://127.0.0.1:{peer}"))
        // The shortest lease follows from the election timeout.
        .args(["--heartbeat-interval=20", "--election-timeout=200"])
        .args(["--logger=zap", "--log-outputs=stderr"])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| {
            panic!(
                "{} does not start ({error}): set KVMESH_ETCD_BIN, as make test does",
                binary.display()
            )
        });
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let ready = lines.any(|line| line.unwrap().contains("ready to serve client requests"));
    assert!(ready, "etcd ended before it served");
    // Nobody may read on: a full pipe would stop etcd.
    std::thread::spawn(move || lines.for_each(drop));
    child
}
