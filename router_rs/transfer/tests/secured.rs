//! Nodes that speak TLS with each other, and what becomes of those that do not.
#![allow(clippy::unwrap_used, missing_docs)]

use std::{
    collections::HashMap,
    io::{Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use kvmesh_transfer::{
    Event, KvPool, PeerTls, Proof, PullRequest, Reason, Settings, TransferId, TransferNode,
    sender::Tail,
};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    crypto::{CryptoProvider, ring::default_provider},
    pki_types::{CertificateDer, PrivateKeyDer},
    server::WebPkiClientVerifier,
};

const BLOCKS: u64 = 8;
/// No multiple of a record, and more than one fits in.
const BLOCK_BYTES: usize = 90_001;
const LONG: Duration = Duration::from_secs(60);
const TOKEN: &[u8] = b"the-token-of-the-cluster";

/// One that only this test trusts.
struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    /// Workers by their certificates.
    issued: Arc<Mutex<HashMap<Vec<u8>, String>>>,
}

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        Self {
            issuer: CertifiedIssuer::self_signed(params, key).unwrap(),
            issued: Arc::default(),
        }
    }

    /// Certificates that name a worker; an empty name is nobody's.
    fn worker(&self, name: &str) -> Arc<dyn PeerTls> {
        let provider: Arc<CryptoProvider> = Arc::new(default_provider());
        let mut roots = RootCertStore::empty();
        roots.add(self.issuer.der().clone()).unwrap();
        let roots = Arc::new(roots);
        let key = KeyPair::generate().unwrap();
        // Where a node believes to be; other implementations do not look at it.
        let params = CertificateParams::new(vec!["0.0.0.0".to_owned()]).unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let chain = vec![certificate.der().clone()];
        let key = || PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        if !name.is_empty() {
            let mut issued = self.issued.lock().unwrap();
            issued.insert(certificate.der().to_vec(), name.to_owned());
        }
        let peers =
            WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider));
        let accepting = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_client_cert_verifier(peers.build().unwrap())
            .with_single_cert(chain.clone(), key())
            .unwrap();
        let connecting = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key())
            .unwrap();
        Arc::new(Certified {
            accepting: Arc::new(accepting),
            connecting: Arc::new(connecting),
            issued: Arc::clone(&self.issued),
        })
    }
}

#[derive(Debug)]
struct Certified {
    accepting: Arc<ServerConfig>,
    connecting: Arc<ClientConfig>,
    issued: Arc<Mutex<HashMap<Vec<u8>, String>>>,
}

impl PeerTls for Certified {
    fn accepting(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.accepting)
    }

    fn connecting(&self) -> Result<Arc<ClientConfig>, rustls::Error> {
        Ok(Arc::clone(&self.connecting))
    }

    fn worker(&self, certificate: &CertificateDer<'_>) -> Result<String, String> {
        let issued = self.issued.lock().unwrap();
        let named = issued.get(certificate.as_ref()).cloned();
        named.ok_or("it names nobody".to_owned())
    }
}

#[derive(Debug)]
struct OneToken;

impl Proof for OneToken {
    fn shown(&self) -> Bytes {
        Bytes::from_static(TOKEN)
    }

    fn accepts(&self, given: &[u8]) -> bool {
        given == TOKEN
    }
}

fn node(
    name: &str,
    shared_memory: bool,
    tls: Option<Arc<dyn PeerTls>>,
) -> (Arc<KvPool>, TransferNode) {
    let shipped = Settings::default();
    let bounds = (shipped.max_connections, shipped.max_greeting);
    bounded_node(name, shared_memory, tls, bounds)
}

/// One with so many connections of peers, and of those that have yet to greet.
fn bounded_node(
    name: &str,
    shared_memory: bool,
    tls: Option<Arc<dyn PeerTls>>,
    (max_connections, max_greeting): (usize, usize),
) -> (Arc<KvPool>, TransferNode) {
    let pool = Arc::new(KvPool::new(BLOCKS, BLOCK_BYTES as u64, false).unwrap());
    let settings = Settings {
        worker_id: name.into(),
        incarnation: 1,
        shared_memory,
        lease: LONG,
        // Longer than anything takes here that does not hang.
        connect_timeout: LONG,
        copy_threads: 2,
        proof: Some(Arc::new(OneToken)),
        tls,
        max_connections,
        max_greeting,
        ..Settings::default()
    };
    let node = TransferNode::start(Arc::clone(&pool), settings).unwrap();
    (pool, node)
}

fn write(pool: &KvPool, slot: u32, byte: u8) {
    // SAFETY: a slot of the pool, which no transfer has now.
    unsafe { pool.block(slot).unwrap().write_bytes(byte, BLOCK_BYTES) };
}

fn is(pool: &KvPool, slot: u32, byte: u8) -> bool {
    let block = pool.block(slot).unwrap();
    // SAFETY: as above.
    (0..BLOCK_BYTES).all(|i| unsafe { block.add(i).read() } == byte)
}

fn pull(at: &TransferNode, id: TransferId, address: &str, worker: &str, slots: &[u32]) {
    at.pull(PullRequest {
        id,
        address: address.to_owned(),
        worker: worker.to_owned(),
        incarnation: 1,
        from_token: 0,
        slots: slots.to_vec(),
        prefix: None,
        traceparent: String::new(),
        request_id: String::new(),
    })
    .unwrap();
}

/// The next event that `pick` takes; others are passed over.
fn next<T>(node: &TransferNode, pick: impl Fn(Event) -> Option<T>) -> T {
    loop {
        assert!(node.wait(Some(LONG)), "no such event");
        if let Some(found) = node.poll().into_iter().find_map(&pick) {
            return found;
        }
    }
}

fn failure(node: &TransferNode) -> (Reason, String) {
    next(node, |event| match event {
        Event::ReceiveFailed {
            reason, message, ..
        } => Some((reason, message)),
        Event::Committed { .. } => panic!("it went well"),
        _ => None,
    })
}

/// Hands six blocks from one to the other, which reaches it at `address`; the way they
/// took.
fn hand_off(
    (from, a): &(Arc<KvPool>, TransferNode),
    (to, b): &(Arc<KvPool>, TransferNode),
    address: &str,
    id: TransferId,
) -> bool {
    for slot in 0..6 {
        write(from, slot, slot as u8 + 1);
    }
    a.offer(id, 6).unwrap();
    pull(b, id, address, "a", &[7, 6, 5, 4, 3, 2]);
    a.ready(id, 0, &[0, 1, 2]).unwrap();
    a.ready(id, 3, &[3, 4, 5]).unwrap();
    let tail = Tail {
        kv_tokens: 96,
        ..Tail::default()
    };
    a.commit(id, tail, None).unwrap();
    let way = next(b, |event| match event {
        Event::Committed { shared_memory, .. } => Some(shared_memory),
        Event::ReceiveFailed {
            reason, message, ..
        } => panic!("{reason:?}: {message}"),
        _ => None,
    });
    assert!((0..6).all(|i| is(to, 7 - i, i as u8 + 1)));
    next(a, |event| {
        matches!(event, Event::SenderReleased { .. }).then_some(())
    });
    way
}

/// Passes one connection on, and keeps what both sides said.
fn listen_in(to: &str) -> (String, std::thread::JoinHandle<Vec<u8>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (address, to) = (listener.local_addr().unwrap(), to.to_owned());
    let heard = std::thread::spawn(move || {
        let (near, _) = listener.accept().unwrap();
        let far = TcpStream::connect(to).unwrap();
        let pass = |mut from: &TcpStream, mut to: &TcpStream| {
            let (mut heard, mut bytes) = (Vec::new(), [0; 65_536]);
            // Odd pieces: a record may come in many.
            while let Ok(n @ 1..) = from.read(&mut bytes[..10_007]) {
                heard.extend_from_slice(&bytes[..n]);
                if to.write_all(&bytes[..n]).is_err() {
                    break;
                }
            }
            let _ = to.shutdown(Shutdown::Write);
            heard
        };
        std::thread::scope(|scope| {
            let back = scope.spawn(|| pass(&far, &near));
            let mut heard = pass(&near, &far);
            heard.extend(back.join().unwrap());
            heard
        })
    });
    (address.to_string(), heard)
}

#[test]
fn under_tls_neither_kv_nor_the_token_can_be_read_on_the_way() {
    for secured in [true, false] {
        let authority = Authority::new();
        let tls = |name| secured.then(|| authority.worker(name));
        let a = node("a", false, tls("a"));
        let b = node("b", false, tls("b"));
        let (address, heard) = listen_in(a.1.address());
        assert!(!hand_off(&a, &b, &address, TransferId([7; 16])));
        assert_eq!((a.1.residue().pins, b.1.residue().receiving), (0, 0));
        let sent = a.1.figures().sent_tcp_bytes;
        assert_eq!(sent, 6 * BLOCK_BYTES as u64);
        b.1.close();
        let heard = heard.join().unwrap();
        assert!(heard.len() > 6 * BLOCK_BYTES);
        let holds = |words: &[u8]| heard.windows(words.len()).any(|window| window == words);
        assert_eq!([holds(TOKEN), holds(&[3; 64])], [!secured; 2]);
    }
}

#[test]
fn on_one_host_blocks_are_copied_and_what_is_said_goes_under_tls() {
    let authority = Authority::new();
    let a = node("a", true, Some(authority.worker("a")));
    let b = node("b", true, Some(authority.worker("b")));
    let (address, heard) = listen_in(a.1.address());
    assert!(hand_off(&a, &b, &address, TransferId([8; 16])));
    // The same connection serves the next one.
    assert!(hand_off(&a, &b, &address, TransferId([9; 16])));
    b.1.close();
    // The name of the socket that gives the pool away is not for others to see.
    let heard = heard.join().unwrap();
    assert!(!heard.windows(7).any(|window| window == b"kvmesh-"));
}

#[test]
fn with_tls_at_one_of_two_nothing_moves_and_both_say_why() {
    let authority = Authority::new();
    for secured_sender in [true, false] {
        let tls = |of: bool, name| of.then(|| authority.worker(name));
        let (_, a) = node("a", true, tls(secured_sender, "a"));
        let (_, b) = node("b", true, tls(!secured_sender, "b"));
        let id = TransferId([1; 16]);
        a.offer(id, 1).unwrap();
        pull(&b, id, a.address(), "a", &[0]);
        let (reason, message) = failure(&b);
        assert_eq!(reason, Reason::Untrusted, "{message}");
        let says = match secured_sender {
            true => "the peer refuses: the peer speaks TLS",
            false => "the peer speaks no TLS",
        };
        assert!(message.contains(says), "{message}");
        assert!(
            message.contains("tls_cert, tls_key and tls_ca"),
            "{message}"
        );
        assert_eq!(b.figures().untrusted, 1);
        b.close();
        while a.residue().connections > 0 {
            std::thread::yield_now();
        }
        assert_eq!(a.figures().untrusted, 1);
        assert_eq!(a.residue().sending, 1, "the offer is for others still");
    }
}

#[test]
fn certificates_of_others_are_refused_on_either_side() {
    let (authority, other) = (Authority::new(), Authority::new());
    let ours = |name: &str| authority.worker(name);
    let shows = |said: &str| format!("worker {said:?} shows the certificate of worker \"c\"");
    for (sender, receiver, wanted, told) in [
        // Of another authority.
        (other.worker("a"), ours("b"), "TLS between".to_owned(), 1),
        (ours("a"), other.worker("b"), "TLS between".to_owned(), 1),
        // Of somebody who is no worker; where the receiver minds, it goes.
        (ours(""), ours("b"), "it names nobody".to_owned(), 0),
        (ours("a"), ours(""), "it names nobody".to_owned(), 1),
        // Of another worker.
        (ours("c"), ours("b"), shows("a"), 0),
        (ours("a"), ours("c"), shows("b"), 1),
    ] {
        let (_, a) = node("a", true, Some(sender));
        let (_, b) = node("b", true, Some(receiver));
        let id = TransferId([2; 16]);
        a.offer(id, 1).unwrap();
        pull(&b, id, a.address(), "a", &[0]);
        let (reason, message) = failure(&b);
        assert_eq!(reason, Reason::Untrusted, "{message}");
        assert!(message.contains(&wanted), "{message}, not {wanted}");
        b.close();
        while a.residue().connections > 0 {
            std::thread::yield_now();
        }
        assert_eq!((b.figures().untrusted, a.figures().untrusted), (1, told));
        assert_eq!(a.residue().mappings + b.residue().mappings, 0);
    }
}

#[test]
fn a_close_while_hands_are_shaken_ends_all_threads() {
    let authority = Authority::new();
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = silent.local_addr().unwrap().to_string();
    let (_, b) = node("b", true, Some(authority.worker("b")));
    let id = TransferId([3; 16]);
    pull(&b, id, &address, "a", &[0]);
    let (mut peer, _) = silent.accept().unwrap();
    let mut first = [0; 3];
    peer.read_exact(&mut first).unwrap();
    assert_eq!(first[..2], [0x16, 3], "it begins with TLS");
    // And one who came, said half of a greeting, and waits.
    let mut half = TcpStream::connect(b.address()).unwrap();
    half.write_all(&[0x16, 3, 1, 2, 0, 1]).unwrap();
    while b.residue().connections < 2 {
        std::thread::yield_now();
    }
    b.close();
    assert_eq!(b.residue().connections, 0);
}

#[test]
fn who_has_not_greeted_takes_no_place_of_those_who_have() {
    let authority = Authority::new();
    let tls = |name| Some(authority.worker(name));
    let a = bounded_node("a", false, tls("a"), (1, 2));
    let (b, c) = (node("b", false, tls("b")), node("c", false, tls("c")));
    let stranger = |_| TcpStream::connect(a.1.address()).unwrap();
    let mut strangers: Vec<TcpStream> = (0..4).map(stranger).collect();
    // Of four that say nothing those that came first make room.
    for gone in &mut strangers[..2] {
        assert_eq!(gone.read(&mut [0]).unwrap_or(0), 0);
    }
    assert!(!hand_off(&a, &b, a.1.address(), TransferId([4; 16])));
    // The place of those who have greeted is taken.
    pull(&c.1, TransferId([5; 16]), a.1.address(), "a", &[0]);
    failure(&c.1);
    assert!(!hand_off(&a, &b, a.1.address(), TransferId([6; 16])));
    assert!(a.1.residue().connections <= 3);
    a.1.close();
    for gone in &mut strangers[2..] {
        assert_eq!(gone.read(&mut [0]).unwrap_or(0), 0);
    }
}

#[test]
fn what_waits_for_a_connection_does_not_go_to_who_has_not_said_who_it_is() {
    let somebody = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = somebody.local_addr().unwrap().to_string();
    let (_, b) = node("b", false, None);
    let id = TransferId([7; 16]);
    pull(&b, id, &address, "a", &[0]);
    let (mut peer, _) = somebody.accept().unwrap();
    let mut len = [0; 4];
    peer.read_exact(&mut len).unwrap();
    let mut hello = vec![0; u32::from_le_bytes(len) as usize];
    peer.read_exact(&mut hello).unwrap();
    assert!(b.abort(id, Reason::Cancelled, "the name of somebody's request"));
    failure(&b);
    // It never says it.
    peer.shutdown(Shutdown::Write).unwrap();
    let mut heard = Vec::new();
    peer.read_to_end(&mut heard).unwrap();
    assert!(heard.is_empty(), "{heard:?}");
}
