//! An etcd of its own for a test: the binary that `KVMESH_ETCD_BIN` names, or
//! `etcd` on the path.
//!
//! What goes wrong here is the end of the test: these panic.
#![allow(clippy::unwrap_used, clippy::missing_panics_doc)]

use std::{
    fs,
    io::{BufRead, BufReader},
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
};

use crate::certificates::{Authority, IssuedFiles};

/// A member on loopback with a data folder of its own. Killed when dropped.
pub struct Etcd {
    child: Child,
    client: u16,
    peer: u16,
    data: PathBuf,
    tls: Option<TlsFiles>,
}

/// What a member with TLS has, and what its clients need.
#[derive(Clone, Debug)]
pub struct TlsFiles {
    /// The authority that both sides trust, PEM.
    pub authority: PathBuf,
    /// For clients: etcd takes none without a certificate of the authority.
    pub client: IssuedFiles,
    server: IssuedFiles,
}

fn binary() -> PathBuf {
    std::env::var_os("KVMESH_ETCD_BIN").map_or_else(|| PathBuf::from("etcd"), PathBuf::from)
}

/// Two ports that nobody gets by chance: they lie below those that the system gives, so that
/// they are still free when etcd is down and to come back.
fn free_ports() -> (u16, u16) {
    // Both are held at once, so that they differ.
    let (a, b) = (listener(), listener());
    (
        a.local_addr().unwrap().port(),
        b.local_addr().unwrap().port(),
    )
}

fn listener() -> TcpListener {
    const LEAST: u16 = 10_000;
    let range = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    let given_from = range.split_whitespace().next();
    let given_from = given_from.and_then(|port| port.parse().ok());
    let below = given_from.unwrap_or(32_768);
    for _ in 0..1_000 {
        if below <= LEAST {
            break;
        }
        if let Ok(listener) = TcpListener::bind(("127.0.0.1", rand::random_range(LEAST..below))) {
            return listener;
        }
    }
    TcpListener::bind("127.0.0.1:0").unwrap()
}

/// A folder that no other test has.
fn folder() -> PathBuf {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let name = format!("kvmesh-etcd-{}-{number}", std::process::id());
    let folder = std::env::temp_dir().join(name);
    fs::create_dir_all(&folder).unwrap();
    folder
}

impl Etcd {
    /// Starts one without TLS; it serves on return.
    #[must_use]
    pub fn start() -> Self {
        Self::launch(folder(), None)
    }

    /// Starts one that speaks TLS only, and only to clients with a certificate.
    #[must_use]
    pub fn start_tls() -> Self {
        let folder = folder();
        let authority = Authority::new("etcd of a test").unwrap();
        let file = folder.join("authority.pem");
        fs::write(&file, authority.pem()).unwrap();
        let server = authority.issue(&["127.0.0.1", "localhost"]).unwrap();
        let client = authority.issue(&["client"]).unwrap();
        let tls = TlsFiles {
            authority: file,
            server: server.write(&folder, "server").unwrap(),
            client: client.write(&folder, "client").unwrap(),
        };
        Self::launch(folder, Some(tls))
    }

    fn launch(folder: PathBuf, tls: Option<TlsFiles>) -> Self {
        // A port that was free a moment ago may be somebody else's by now.
        for _ in 0..5 {
            let (client, peer) = free_ports();
            if let Some(child) = spawn(client, peer, &folder.join("data"), tls.as_ref()) {
                return Self {
                    child,
                    client,
                    peer,
                    data: folder,
                    tls,
                };
            }
        }
        panic!("etcd ended before it served, five times");
    }

    /// Address for clients, host:port.
    #[must_use]
    pub fn endpoint(&self) -> String {
        format!("127.0.0.1:{}", self.client)
    }

    /// The files of its TLS.
    #[must_use]
    pub fn tls(&self) -> Option<&TlsFiles> {
        self.tls.as_ref()
    }

    /// kill -9.
    pub fn kill(&mut self) {
        // Already dead is as good.
        let _ = self.child.kill();
        self.child.wait().unwrap();
    }

    /// Starts it again, at the same address, with the data it had.
    pub fn start_again(&mut self) {
        let data = self.data.join("data");
        self.child = spawn(self.client, self.peer, &data, self.tls.as_ref())
            .expect("its ports were its own");
    }

    /// Removes its data; it has to be dead.
    pub fn lose_data(&self) {
        fs::remove_dir_all(self.data.join("data")).unwrap();
    }

    /// Stops the process where it is (SIGSTOP).
    pub fn freeze(&self) {
        self.signal("-STOP");
    }

    /// Lets it go on.
    pub fn thaw(&self) {
        self.signal("-CONT");
    }

    fn signal(&self, signal: &str) {
        let pid = self.child.id().to_string();
        let done = Command::new("kill").args([signal, &pid]).status().unwrap();
        assert!(done.success());
    }

    /// Runs etcdctl, which lies beside etcd; gives what it prints.
    pub fn ctl(&self, arguments: &[&str]) -> String {
        let mut command = Command::new(binary().with_file_name("etcdctl"));
        command.env("ETCDCTL_API", "3");
        command.arg(format!("--endpoints={}", self.endpoint()));
        if let Some(tls) = &self.tls {
            command
                .arg(format!("--cacert={}", tls.authority.display()))
                .arg(format!("--cert={}", tls.client.certificate.display()))
                .arg(format!("--key={}", tls.client.key.display()));
        }
        let done = command.args(arguments).output().unwrap();
        assert!(done.status.success(), "etcdctl {arguments:?}: {done:?}");
        String::from_utf8(done.stdout).unwrap()
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.kill();
        // What is left in the temporary folder harms nobody.
        let _ = fs::remove_dir_all(&self.data);
    }
}

/// Starts etcd and waits until it says that it serves; `None` where it ended
/// before.
fn spawn(client: u16, peer: u16, data: &Path, tls: Option<&TlsFiles>) -> Option<Child> {
    let binary = binary();
    let scheme = if tls.is_some() { "https" } else { "http" };
    let mut command = Command::new(&binary);
    command
        .arg("--name=test")
        .arg(format!("--data-dir={}", data.display()))
        .arg(format!(
            "--listen-client-urls={scheme}://127.0.0.1:{client}"
        ))
        .arg(format!(
            "--advertise-client-urls={scheme}://127.0.0.1:{client}"
        ))
        .arg(format!("--listen-peer-urls=http://127.0.0.1:{peer}"))
        .arg(format!(
            "--initial-advertise-peer-urls=http://127.0.0.1:{peer}"
        ))
        .arg(format!("--initial-cluster=test=http://127.0.0.1:{peer}"))
        // The shortest lease follows from the election timeout.
        .args(["--heartbeat-interval=20", "--election-timeout=200"])
        .args(["--logger=zap", "--log-outputs=stderr"])
        .stderr(Stdio::piped());
    if let Some(tls) = tls {
        command
            .arg("--client-cert-auth")
            .arg(format!("--trusted-ca-file={}", tls.authority.display()))
            .arg(format!("--cert-file={}", tls.server.certificate.display()))
            .arg(format!("--key-file={}", tls.server.key.display()));
    }
    let mut child = command.spawn().unwrap_or_else(|error| {
        panic!(
            "{} does not start ({error}): set KVMESH_ETCD_BIN, as make test does",
            binary.display()
        )
    });
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let ready = lines.any(|line| line.unwrap().contains("ready to serve client requests"));
    if !ready {
        child.wait().unwrap();
        return None;
    }
    // Nobody may read on: a full pipe would stop etcd.
    std::thread::spawn(move || lines.for_each(drop));
    Some(child)
}
