//! The accept loop over real sockets: TLS, age, silence, and clients that do
//! not read.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::{path::PathBuf, sync::Arc, time::Duration};

use bytes::Bytes;
use common::{Mesh, call, framed, h2_connection, read, request};
use kvmesh_rpc::v1::inference_client::InferenceClient;
use kvmesh_testkit::{certificates::Authority, mock::MockConfig};
use kvmesh_wire::v1;
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, ServerName, pem::PemObject},
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tonic::{Code, transport::Endpoint};

fn steps_of(step_ms: u64) -> MockConfig {
    MockConfig {
        step: Duration::from_millis(step_ms),
        ..MockConfig::default()
    }
}

/// A router's certificate in files, with what its clients trust.
struct Certified {
    authority: Authority,
    folder: PathBuf,
    settings: Value,
}

impl Certified {
    fn new(name: &str) -> Self {
        let folder = std::env::temp_dir().join(format!("kvmesh-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let authority = Authority::new("a router's").unwrap();
        let issued = authority.issue(&["localhost", "127.0.0.1"]).unwrap();
        let files = issued.write(&folder, "router").unwrap();
        let settings = json!({"tls_cert": files.certificate, "tls_key": files.key});
        Self {
            authority,
            folder,
            settings,
        }
    }
}

impl Drop for Certified {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.folder).unwrap();
    }
}

/// Opens TLS to a router, offering these protocols.
async fn tls(
    mesh: &Mesh,
    trusted: &Authority,
    offer: &[&[u8]],
) -> std::io::Result<TlsStream<TcpStream>> {
    let mut roots = RootCertStore::empty();
    let pem = trusted.pem();
    roots
        .add(CertificateDer::from_pem_slice(pem.as_bytes()).unwrap())
        .unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = offer.iter().map(|name| name.to_vec()).collect();
    let socket = TcpStream::connect(mesh.address()).await?;
    let name = ServerName::try_from("localhost").unwrap();
    TlsConnector::from(Arc::new(config))
        .connect(name, socket)
        .await
}

/// Sends a call over HTTP/2 and gives its status.
async fn status_over(socket: TlsStream<TcpStream>) -> String {
    let (sender, connection) = h2::client::handshake(socket).await.unwrap();
    tokio::spawn(connection);
    let mut sender: h2::client::SendRequest<Bytes> = sender.ready().await.unwrap();
    let (response, mut body) = sender.send_request(call(), false).unwrap();
    body.send_data(framed(&request(3)), true).unwrap();
    let mut body = response.await.unwrap().into_body();
    while let Some(data) = body.data().await {
        let length = data.unwrap().len();
        body.flow_control().release_capacity(length).unwrap();
    }
    let trailers = body.trailers().await.unwrap().unwrap();
    trailers["grpc-status"].to_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tls_serves_both_protocols_whether_alpn_names_them_or_not() {
    let certified = Certified::new("alpn");
    let worker = kvmesh_testkit::mock::MockWorker::start(MockConfig::default()).unwrap();
    let mut settings = certified.settings.clone();
    settings["workers"] = json!([worker.addr().to_string()]);
    let mesh = Mesh::start(vec![], settings).await;
    let trusted = &certified.authority;
    // Ready over TLS, as HTTP/1.1 by its ALPN name.
    let ready = async || {
        let mut socket = tls(&mesh, trusted, &[b"http/1.1"]).await.unwrap();
        assert_eq!(socket.get_ref().1.alpn_protocol(), Some(&b"http/1.1"[..]));
        let ask = b"GET /ready HTTP/1.1\r\nhost: router\r\nconnection: close\r\n\r\n";
        socket.write_all(ask).await.unwrap();
        let mut answer = Vec::new();
        socket.read_to_end(&mut answer).await.unwrap();
        answer.starts_with(b"HTTP/1.1 200")
    };
    while !ready().await {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let named = tls(&mesh, trusted, &[b"h2", b"http/1.1"]).await.unwrap();
    assert_eq!(named.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    assert_eq!(status_over(named).await, "0");
    let unnamed = tls(&mesh, trusted, &[]).await.unwrap();
    assert_eq!(status_over(unnamed).await, "0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_tls_a_stranger_and_plain_text_get_nothing() {
    let certified = Certified::new("stranger");
    let mesh = Mesh::start(vec![], certified.settings.clone()).await;
    let other = Authority::new("another").unwrap();
    assert!(tls(&mesh, &other, &[b"h2"]).await.is_err());
    let mut plain = TcpStream::connect(mesh.address()).await.unwrap();
    plain
        .write_all(b"GET /health HTTP/1.1\r\nhost: router\r\n\r\n")
        .await
        .unwrap();
    let mut answer = Vec::new();
    // A reset after the alert is as good an end.
    let _ = plain.read_to_end(&mut answer).await;
    assert!(!answer.starts_with(b"HTTP"), "{answer:?}");
    // And neither harmed those who speak TLS.
    assert!(tls(&mesh, &certified.authority, &[b"h2"]).await.is_ok());
}

/// Asks over a connection that is open already.
async fn healthy(socket: &mut TlsStream<TcpStream>) {
    let ask = b"GET /health HTTP/1.1\r\nhost: router\r\n\r\n";
    socket.write_all(ask).await.unwrap();
    let mut answer = [0; 15];
    socket.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"HTTP/1.1 200 OK");
    while !socket.read_u8().await.unwrap().eq(&b'k') {}
    socket.read_u8().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_changed_certificate_is_for_new_connections_and_a_broken_one_for_none() {
    let certified = Certified::new("changed");
    let mesh = Mesh::start(vec![], certified.settings.clone()).await;
    let old = &certified.authority;
    let new = Authority::new("a new one").unwrap();
    let mut open = tls(&mesh, old, &[b"http/1.1"]).await.unwrap();
    healthy(&mut open).await;

    // The new certificate with the old key: what is there while files are written
    // one after the other, and what stays where somebody took the wrong ones.
    let issued = new.issue(&["localhost"]).unwrap();
    let file = |key: &str| PathBuf::from(certified.settings[key].as_str().unwrap());
    let reloads = async |trusted: &Authority, outcome: &str| loop {
        let mut socket = tls(&mesh, trusted, &[b"http/1.1"]).await.unwrap();
        let ask = b"GET /metrics HTTP/1.1\r\nhost: router\r\nconnection: close\r\n\r\n";
        socket.write_all(ask).await.unwrap();
        let mut answer = String::new();
        socket.read_to_string(&mut answer).await.unwrap();
        let series = format!("kvmesh_tls_reloads_total{{outcome=\"{outcome}\"}} 1");
        if answer.contains(&series) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    std::fs::write(file("tls_cert"), &issued.certificate).unwrap();
    reloads(old, "refused").await;
    healthy(&mut open).await;

    std::fs::write(file("tls_key"), &issued.key).unwrap();
    while tls(&mesh, &new, &[b"h2"]).await.is_err() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    reloads(&new, "taken").await;
    assert!(tls(&mesh, old, &[b"h2"]).await.is_err());
    // Who was there before is there still.
    healthy(&mut open).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_aged_connection_takes_no_call_and_finishes_what_runs() {
    let aging = json!({"max_connection_age": "2s", "max_connection_age_grace": "1m"});
    let mesh = Mesh::start(vec![steps_of(10)], aging).await;
    let mut sender = h2_connection(&mesh).await.ready().await.unwrap();
    let (response, mut body) = sender.send_request(call(), false).unwrap();
    // Twice as long as the connection may live.
    body.send_data(framed(&request(400)), true).unwrap();
    let mut body = response.await.unwrap().into_body();
    while let Some(data) = body.data().await {
        let length = data.unwrap().len();
        body.flow_control().release_capacity(length).unwrap();
    }
    let trailers = body.trailers().await.unwrap().unwrap();
    assert_eq!(trailers["grpc-status"], "0");
    let refused = match sender.ready().await {
        Err(error) => error,
        Ok(mut sender) => {
            let (response, _) = sender.send_request(call(), true).unwrap();
            response.await.unwrap_err()
        }
    };
    assert_eq!(refused.reason(), Some(h2::Reason::NO_ERROR), "{refused}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_that_outlive_an_aged_connections_grace_end_with_it() {
    let aging = json!({"max_connection_age": "2s", "max_connection_age_grace": "50ms"});
    let mesh = Mesh::start(vec![steps_of(5)], aging).await;
    let mut sender = h2_connection(&mesh).await.ready().await.unwrap();
    let (response, mut body) = sender.send_request(call(), false).unwrap();
    body.send_data(framed(&request(100_000)), true).unwrap();
    let mut body = response.await.unwrap().into_body();
    let mut ended = false;
    while let Some(data) = body.data().await {
        match data {
            Ok(data) => body.flow_control().release_capacity(data.len()).unwrap(),
            Err(_) => {
                ended = true;
                break;
            }
        }
    }
    assert!(ended, "it was cut, not finished");
    mesh.wait_figure("kvmesh_open_streams", 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_waits_for_running_streams_and_takes_no_others() {
    let mut mesh = Mesh::start(vec![steps_of(10)], json!({"grace": "1h"})).await;
    let mut client = mesh.client().await;
    let mut stream = client.generate(request(60)).await.unwrap().into_inner();
    // It runs before the stop comes.
    let first = stream.message().await.unwrap().unwrap();
    assert!(matches!(
        first.event,
        Some(v1::generate_response::Event::Accepted(_))
    ));
    let rest = tokio::spawn(async move {
        let mut finished = false;
        while let Some(message) = stream.message().await.unwrap() {
            let event = message.event.unwrap();
            finished = matches!(event, v1::generate_response::Event::Finished(_));
        }
        finished
    });
    // Returns with the last stream, an hour before the grace is over.
    mesh.stop().await;
    assert!(rest.await.unwrap(), "the stream came to its end");
    let refused = client.generate(request(1)).await.map(|_| ()).unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable);
}

/// A prefill that says nothing for `silent`, with pings both ways and at the
/// worker's connection.
async fn survives_a_silent_prefill(silent: Duration, ping: Duration, settings: Value) {
    let config = MockConfig {
        prefill: silent,
        ..MockConfig::default()
    };
    let mesh = Mesh::start(vec![config], settings).await;
    let channel = Endpoint::from_shared(format!("http://{}", mesh.address()))
        .unwrap()
        .http2_keep_alive_interval(ping)
        // Shorter than the silence: a ping without an answer would end it.
        .keep_alive_timeout(silent / 2)
        .keep_alive_while_idle(true)
        .connect()
        .await
        .unwrap();
    let stream = InferenceClient::new(channel)
        .generate(request(5))
        .await
        .unwrap();
    let (ids, end) = read(stream.into_inner()).await;
    end.unwrap();
    assert_eq!(ids.len(), 5);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_prefill_of_many_pings_is_waited_for() {
    let every = json!({
        "keep_alive_interval": "1s", "keep_alive_timeout": "4s", "worker_keep_alive": "1s",
    });
    let second = Duration::from_secs(1);
    survives_a_silent_prefill(8 * second, second / 5, every).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes two minutes"]
async fn a_silent_prefill_of_two_minutes_is_waited_for() {
    let ping = Duration::from_secs(10);
    survives_a_silent_prefill(Duration::from_secs(120), ping, json!({})).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_that_answers_no_ping_is_closed() {
    let every = json!({"keep_alive_interval": "1s", "keep_alive_timeout": "1s"});
    let mesh = Mesh::start(vec![], every).await;
    let mut socket = TcpStream::connect(mesh.address()).await.unwrap();
    socket
        .write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0")
        .await
        .unwrap();
    // Frames are read, pings among them, and none is answered.
    let mut frames = Vec::new();
    let ended = tokio::time::timeout(Duration::from_secs(60), socket.read_to_end(&mut frames));
    assert!(ended.await.is_ok(), "the router let go of it");
    assert!(!frames.is_empty());
    mesh.wait_figure("kvmesh_connections", 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_never_reads_is_reset_and_the_others_of_its_connection_go_on() {
    // Long enough for who reads on a busy machine.
    let slow = json!({"slow_client_timeout": "3s"});
    let mesh = Mesh::start(vec![steps_of(1)], slow).await;
    let socket = TcpStream::connect(mesh.address()).await.unwrap();
    let (sender, connection) = h2::client::Builder::new()
        // Room for a few messages a stream; it is given back for one of them.
        .initial_window_size(1_000)
        .handshake::<_, Bytes>(socket)
        .await
        .unwrap();
    tokio::spawn(connection);
    let mut sender = sender.ready().await.unwrap();
    let (stuck, mut body) = sender.send_request(call(), false).unwrap();
    body.send_data(framed(&request(100_000)), true).unwrap();
    let mut stuck = stuck.await.unwrap().into_body();
    mesh.wait_figure("kvmesh_slow_clients_total", 1).await;
    // Nothing of it is left, though its window never opened.
    for series in [
        "kvmesh_open_streams",
        "kvmesh_open_attempts",
        "kvmesh_undelivered_ids",
        "kvmesh_bookings",
    ] {
        mesh.wait_figure(series, 0).await;
    }
    let mut read_before = 0;
    let end = loop {
        match stuck.data().await {
            Some(Ok(data)) => read_before += data.len(),
            Some(Err(error)) => break error,
            None => panic!("it ended without a word"),
        }
    };
    assert!(read_before <= 1_000);
    assert!(end.is_reset() && end.is_remote(), "{end}");
    // The connection is as good as before.
    let mut sender = sender.ready().await.unwrap();
    let (response, mut body) = sender.send_request(call(), false).unwrap();
    body.send_data(framed(&request(200)), true).unwrap();
    let mut body = response.await.unwrap().into_body();
    while let Some(data) = body.data().await {
        let length = data.unwrap().len();
        body.flow_control().release_capacity(length).unwrap();
    }
    let trailers = body.trailers().await.unwrap().unwrap();
    assert_eq!(trailers["grpc-status"], "0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_leaves_its_last_message_unread_is_given_up_too() {
    let slow = json!({"slow_client_timeout": "300ms"});
    let mesh = Mesh::start(vec![steps_of(1)], slow).await;
    let socket = TcpStream::connect(mesh.address()).await.unwrap();
    let (sender, connection) = h2::client::Builder::new()
        // Less than any message: its first one is stuck.
        .initial_window_size(1)
        .handshake::<_, Bytes>(socket)
        .await
        .unwrap();
    tokio::spawn(connection);
    let mut sender = sender.ready().await.unwrap();
    let (stuck, mut body) = sender.send_request(call(), false).unwrap();
    body.send_data(framed(&request(3)), true).unwrap();
    let _stuck = stuck.await.unwrap();
    mesh.wait_figure("kvmesh_slow_clients_total", 1).await;
    mesh.wait_figure("kvmesh_open_streams", 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_streams_of_one_connection_are_each_whole() {
    let mesh = Mesh::start(vec![steps_of(5)], json!({})).await;
    let mut sender = h2_connection(&mesh).await;
    let mut running = Vec::new();
    for _ in 0..1_000 {
        sender = sender.ready().await.unwrap();
        let (response, mut body) = sender.send_request(call(), false).unwrap();
        body.send_data(framed(&request(20)), true).unwrap();
        running.push(tokio::spawn(async move {
            let mut body = response.await.unwrap().into_body();
            while let Some(data) = body.data().await {
                let length = data.unwrap().len();
                body.flow_control().release_capacity(length).unwrap();
            }
            let trailers = body.trailers().await.unwrap().unwrap();
            trailers["grpc-status"].to_str().unwrap().to_owned()
        }));
    }
    for status in running {
        assert_eq!(status.await.unwrap(), "0");
    }
    mesh.wait_figure("kvmesh_tokens_total", 20_000).await;
    mesh.wait_figure("kvmesh_open_streams", 0).await;
}
