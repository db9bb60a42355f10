//! The proxy does to bytes what it was told, and nothing else.
#![allow(clippy::unwrap_used)]

use std::{
    io::ErrorKind,
    time::{Duration, Instant},
};

use kvmesh_testkit::fault_proxy::FaultProxy;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::timeout,
};

const PATIENCE: Duration = Duration::from_secs(20);
/// Long against the time that a byte takes on loopback.
const SILENCE: Duration = Duration::from_millis(200);

async fn pair() -> (FaultProxy, TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let proxy = FaultProxy::start(listener.local_addr().unwrap())
        .await
        .unwrap();
    let client = TcpStream::connect(proxy.addr()).await.unwrap();
    let (server, _) = listener.accept().await.unwrap();
    (proxy, client, server)
}

async fn read(stream: &mut TcpStream, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    timeout(PATIENCE, stream.read_exact(&mut bytes))
        .await
        .unwrap()
        .unwrap();
    bytes
}

/// Passes a byte each way, so that plans set before are in force on both.
async fn settle(client: &mut TcpStream, server: &mut TcpStream) {
    client.write_all(b"?").await.unwrap();
    read(server, 1).await;
    server.write_all(b"!").await.unwrap();
    read(client, 1).await;
}

#[tokio::test]
async fn bytes_pass_unchanged_in_both_directions_and_half_closes_do_too() {
    let (_proxy, mut client, mut server) = pair().await;
    let sent: Vec<u8> = (0..300_000_u32).map(|n| n as u8).collect();
    let (mut client_in, mut client_out) = client.split();
    let write = async {
        client_out.write_all(&sent).await.unwrap();
        client_out.shutdown().await.unwrap();
    };
    let mut got = Vec::new();
    let (_, read) = tokio::join!(write, timeout(PATIENCE, server.read_to_end(&mut got)));
    read.unwrap().unwrap();
    assert_eq!(got, sent);
    server.write_all(b"late answer").await.unwrap();
    drop(server);
    let mut answer = Vec::new();
    client_in.read_to_end(&mut answer).await.unwrap();
    assert_eq!(answer, b"late answer");
}

#[tokio::test]
async fn cut_comes_after_exactly_so_many_bytes() {
    let (proxy, mut client, mut server) = pair().await;
    settle(&mut client, &mut server).await;
    proxy.set(|plan| plan.down.cut_after = Some(10));
    server.write_all(&[7; 25]).await.unwrap();
    let mut got = Vec::new();
    timeout(PATIENCE, client.read_to_end(&mut got))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(got, [7; 10]);
}

#[tokio::test]
async fn reset_is_an_error_and_not_an_end() {
    let (proxy, mut client, mut server) = pair().await;
    settle(&mut client, &mut server).await;
    proxy.reset();
    let error = timeout(PATIENCE, client.read(&mut [0])).await.unwrap();
    assert_eq!(error.unwrap_err().kind(), ErrorKind::ConnectionReset);
    let error = timeout(PATIENCE, server.read(&mut [0])).await.unwrap();
    assert_eq!(error.unwrap_err().kind(), ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn a_bit_is_flipped_where_it_was_ordered() {
    let (proxy, mut client, mut server) = pair().await;
    settle(&mut client, &mut server).await;
    proxy.set(|plan| plan.up.flip_at = Some(3));
    client.write_all(&[0; 6]).await.unwrap();
    assert_eq!(read(&mut server, 6).await, [0, 0, 0, 1, 0, 0]);
}

#[tokio::test]
async fn a_stalled_direction_is_silent_until_healed_and_loses_nothing() {
    let (proxy, mut client, mut server) = pair().await;
    settle(&mut client, &mut server).await;
    proxy.set(|plan| plan.down.stall = true);
    server.write_all(b"later").await.unwrap();
    let mut byte = [0];
    assert!(timeout(SILENCE, client.read(&mut byte)).await.is_err());
    // The other direction is not touched.
    client.write_all(b"x").await.unwrap();
    read(&mut server, 1).await;
    proxy.heal();
    assert_eq!(read(&mut client, 5).await, b"later");
}

#[tokio::test]
async fn dropped_bytes_never_come() {
    let (proxy, mut client, mut server) = pair().await;
    settle(&mut client, &mut server).await;
    proxy.set(|plan| plan.up.drop = true);
    client.write_all(b"lost").await.unwrap();
    assert!(timeout(SILENCE, server.read(&mut [0])).await.is_err());
    proxy.heal();
    client.write_all(b"kept").await.unwrap();
    assert_eq!(read(&mut server, 4).await, b"kept");
}

#[tokio::test]
async fn delay_and_bandwidth_are_lower_bounds_of_the_time_taken() {
    let (proxy, mut client, mut server) = pair().await;
    settle(&mut client, &mut server).await;
    proxy.set(|plan| plan.up.delay = Duration::from_millis(80));
    let began = Instant::now();
    client.write_all(b"slow").await.unwrap();
    read(&mut server, 4).await;
    assert!(began.elapsed() >= Duration::from_millis(80));
    proxy.heal();
    proxy.set(|plan| plan.up.bytes_per_s = Some(10_000));
    let began = Instant::now();
    client.write_all(&[0; 2_000]).await.unwrap();
    read(&mut server, 2_000).await;
    assert!(began.elapsed() >= Duration::from_millis(150));
}

#[tokio::test]
async fn refused_connections_are_reset_and_none_stays_open() {
    let (proxy, client, server) = pair().await;
    assert_eq!(proxy.connections(), 1);
    proxy.set(|plan| plan.refuse = true);
    let mut refused = TcpStream::connect(proxy.addr()).await.unwrap();
    let read = timeout(PATIENCE, refused.read(&mut [0])).await.unwrap();
    assert!(read.is_err());
    drop((client, server));
    let gone = async {
        while proxy.connections() > 0 {
            tokio::task::yield_now().await;
        }
    };
    timeout(PATIENCE, gone).await.unwrap();
}
