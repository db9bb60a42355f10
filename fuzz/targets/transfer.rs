//! What partners send to a worker's transfer port: frames, and bytes that are
//! none. The connection may end at any of them; then nothing of it is left.
#![no_main]

use kvmesh_fuzz::messages;
use kvmesh_transfer::{KvPool, Settings, TransferId, TransferNode};
use kvmesh_wire::v1::{
    KvCompatibility, ProtocolVersion, TransferFrame, TransferHello, transfer_frame::Frame,
};
use libfuzzer_sys::fuzz_target;
use prost::Message;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

const BLOCK_BYTES: u64 = 256;
/// Longer than anything takes that does not hang.
const PATIENCE: Duration = Duration::from_secs(60);

static NODE: LazyLock<TransferNode> = LazyLock::new(|| {
    let pool = Arc::new(KvPool::new(8, BLOCK_BYTES, false).expect("a pool of 2 KiB"));
    let settings = Settings {
        worker_id: "a".to_owned(),
        incarnation: 1,
        compatibility: KvCompatibility::default(),
        shared_memory: false,
        copy_threads: 1,
        offer_timeout: Duration::from_millis(2),
        lease: Duration::from_millis(20),
        aborted_memory: Duration::from_millis(2),
        ..Settings::default()
    };
    TransferNode::start(pool, settings).expect("a free port on loopback")
});

fn framed(frame: &[u8]) -> Vec<u8> {
    let mut bytes = (frame.len() as u32).to_le_bytes().to_vec();
    bytes.extend_from_slice(frame);
    bytes
}

fn hello() -> Vec<u8> {
    let hello = TransferHello {
        version: Some(ProtocolVersion { major: 1, minor: 0 }),
        worker_id: "b".to_owned(),
        incarnation: 2,
        kv: Some(KvCompatibility::default()),
        block_bytes: BLOCK_BYTES,
        block_tokens: 16,
        ..TransferHello::default()
    };
    let frame = TransferFrame {
        frame: Some(Frame::Hello(hello)),
    };
    framed(&frame.encode_to_vec())
}

/// Without an answer the socket's own bound ends the test.
fn talk(data: &[u8]) -> std::io::Result<()> {
    let mut stream = TcpStream::connect(NODE.address())?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let Some((how, rest)) = data.split_first() else {
        return Ok(());
    };
    match how % 4 {
        0 => stream.write_all(rest)?,
        kind => {
            // Most come with a greeting that fits.
            if kind != 1 {
                stream.write_all(&hello())?;
            }
            for message in messages(rest) {
                stream.write_all(&framed(message))?;
            }
        }
    }
    stream.shutdown(Shutdown::Write)?;
    std::io::copy(&mut stream.take(1 << 20), &mut std::io::sink())?;
    Ok(())
}

fuzz_target!(|data: &[u8]| {
    let id = TransferId([1; 16]);
    // Something that a partner may ask for.
    let offered = NODE.offer(id, 2).and_then(|()| NODE.ready(id, 0, &[0, 1]));
    // The node may close at any byte: that is an error here, and right.
    let _ = talk(data);
    if offered.is_ok() {
        NODE.abort(
            id,
            kvmesh_transfer::Reason::Cancelled,
            "the input has ended",
        );
    }
    let until = Instant::now() + PATIENCE;
    loop {
        let _ = NODE.poll();
        if NODE.residue() == kvmesh_transfer::Residue::default() {
            break;
        }
        assert!(Instant::now() < until, "left behind: {:?}", NODE.residue());
        let _ = NODE.wait(Some(Duration::from_millis(1)));
    }
});
