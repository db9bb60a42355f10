//! Whole nodes: two in one process, and one beside a sender that says only
//! what a test has it say.
#![allow(clippy::unwrap_used, missing_docs)]

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    sync::Arc,
    time::Duration,
};

use kvmesh_transfer::{
    Event, KvPool, PullRequest, Reason, Settings, TransferId, TransferNode, sender::Tail,
};
use kvmesh_wire::v1::{
    BlockData, BlocksReady, Commit, PrefixFound, ProtocolVersion, TransferFrame, TransferHello,
    transfer_frame::Frame,
};
use prost::Message;

const BLOCKS: u64 = 8;
/// No multiple of what a hash or a copy works in.
const BLOCK_BYTES: usize = 40_000;

fn node(name: &str, shared_memory: bool, lease: Duration) -> (Arc<KvPool>, TransferNode) {
    let pool = Arc::new(KvPool::new(BLOCKS, BLOCK_BYTES as u64, false).unwrap());
    let settings = Settings {
        worker_id: name.into(),
        incarnation: 1,
        shared_memory,
        lease,
        copy_threads: 2,
        ..Settings::default()
    };
    let node = TransferNode::start(Arc::clone(&pool), settings).unwrap();
    (pool, node)
}

const LONG: Duration = Duration::from_secs(60);

fn write(pool: &KvPool, slot: u32, byte: u8) {
    // SAFETY: a slot of the pool, which no transfer has now.
    unsafe { pool.block(slot).unwrap().write_bytes(byte, BLOCK_BYTES) };
}

fn is(pool: &KvPool, slot: u32, byte: u8) -> bool {
    let block = pool.block(slot).unwrap();
    // SAFETY: as above.
    (0..BLOCK_BYTES).all(|i| unsafe { block.add(i).read() } == byte)
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

fn request(id: TransferId, address: &str, slots: &[u32]) -> PullRequest {
    PullRequest {
        id,
        address: address.into(),
        worker: "a".into(),
        incarnation: 1,
        from_token: 0,
        slots: slots.to_vec(),
        prefix: None,
        traceparent: String::new(),
        request_id: String::new(),
    }
}

fn failed(event: Event) -> Option<Reason> {
    match event {
        Event::ReceiveFailed { reason, .. } => Some(reason),
        _ => None,
    }
}

#[test]
fn blocks_pass_by_either_way_and_the_last_one_partly() {
    for shared_memory in [true, false] {
        let (from, a) = node("a", shared_memory, LONG);
        let (to, b) = node("b", true, LONG);
        for slot in 0..8 {
            write(&from, slot, slot as u8 + 1);
        }
        let id = TransferId([7; 16]);
        a.offer(id, 5).unwrap();
        b.pull(request(id, a.address(), &[7, 6, 5, 4, 3])).unwrap();
        a.ready(id, 0, &[0, 1, 2]).unwrap();
        a.ready(id, 3, &[3]).unwrap();
        let tail = Tail {
            kv_tokens: 70,
            output_ids: vec![9],
            ..Tail::default()
        };
        a.commit(id, tail, Some((4, 4))).unwrap();
        let way = next(&b, |event| match event {
            Event::Committed { shared_memory, .. } => Some(shared_memory),
            Event::ReceiveFailed { reason, .. } => panic!("{reason:?}"),
            _ => None,
        });
        assert_eq!(way, shared_memory);
        assert!((0..5).all(|i| is(&to, 7 - i, i as u8 + 1)));
        next(&a, |event| {
            matches!(event, Event::SenderReleased { .. }).then_some(())
        });
        assert_eq!((a.residue().pins, b.residue().receiving), (0, 0));
    }
}

/// A sender of which the test says every word.
struct Spoken {
    stream: TcpStream,
}

impl Spoken {
    /// Waits for a receiver's hello and its pull.
    fn accept(listener: &TcpListener) -> Self {
        let (stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        let mut spoken = Self { stream };
        assert!(matches!(spoken.read(), Frame::Hello(_)));
        spoken.say(Frame::Hello(TransferHello {
            version: Some(ProtocolVersion { major: 1, minor: 0 }),
            worker_id: "a".into(),
            incarnation: 1,
            kv: Some(Default::default()),
            block_tokens: 16,
            block_bytes: BLOCK_BYTES as u64,
            pool_blocks: 8,
            ..TransferHello::default()
        }));
        spoken
    }

    fn read(&mut self) -> Frame {
        let mut len = [0; 4];
        self.stream.read_exact(&mut len).unwrap();
        let mut bytes = vec![0; u32::from_le_bytes(len) as usize];
        self.stream.read_exact(&mut bytes).unwrap();
        TransferFrame::decode(&bytes[..]).unwrap().frame.unwrap()
    }

    fn until(&mut self, wanted: impl Fn(&Frame) -> bool) {
        while !wanted(&self.read()) {}
    }

    fn say(&mut self, frame: Frame) {
        let bytes = TransferFrame { frame: Some(frame) }.encode_to_vec();
        self.stream
            .write_all(&(bytes.len() as u32).to_le_bytes())
            .unwrap();
        self.stream.write_all(&bytes).unwrap();
    }

    /// One block and the last word, but none of the block's bytes. Returns once
    /// the receiver has read both: frames are read in order.
    fn commit(&mut self, id: TransferId, receiver: &TransferNode) {
        self.until(|frame| matches!(frame, Frame::Pull(_)));
        self.say(Frame::Ready(BlocksReady {
            transfer_id: id.0.to_vec().into(),
            first_block: 0,
            slots: vec![0],
            slot_versions: vec![0],
            checksums: vec![0],
        }));
        self.say(Frame::Commit(Commit {
            transfer_id: id.0.to_vec().into(),
            kv_tokens: 16,
            ..Commit::default()
        }));
        self.mark(id, receiver);
    }

    /// Returns once the receiver has read all that was said.
    fn mark(&mut self, id: TransferId, receiver: &TransferNode) {
        self.say(Frame::PrefixFound(PrefixFound {
            transfer_id: id.0.to_vec().into(),
            tokens: 16,
        }));
        next(receiver, |event| {
            matches!(event, Event::PrefixFound { .. }).then_some(())
        });
    }

    /// The block's bytes, long after anybody wants them.
    fn late_block(&mut self, id: TransferId) {
        self.say(Frame::Data(BlockData {
            transfer_id: id.0.to_vec().into(),
            first_block: 0,
            count: 1,
        }));
        self.stream.write_all(&[1; BLOCK_BYTES]).unwrap();
    }
}

/// Ends a receive that has its commit and not its blocks; then another request
/// takes the blocks, and the bytes come after all.
fn ended_after_its_commit(
    lease: Duration,
    end: impl Fn(&TransferNode, TransferId),
    wanted: Reason,
) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (pool, b) = node("b", false, lease);
    let (id, other) = (TransferId([1; 16]), TransferId([2; 16]));
    b.pull(request(id, &address, &[3])).unwrap();
    let mut sender = Spoken::accept(&listener);
    sender.commit(id, &b);
    end(&b, id);
    assert_eq!(next(&b, failed), wanted);
    sender.until(|frame| matches!(frame, Frame::Abort(_)));
    // The blocks are free: another request has them now.
    pool.raise(&[3]).unwrap();
    write(&pool, 3, 99);
    b.pull(request(other, &address, &[4])).unwrap();
    sender.until(|frame| matches!(frame, Frame::Pull(_)));
    sender.late_block(id);
    sender.mark(other, &b);
    assert!(is(&pool, 3, 99));
    assert!(b.abort(other, Reason::Cancelled, ""));
    assert_eq!(next(&b, failed), Reason::Cancelled);
    assert_eq!(b.residue().receiving, 0);
}

#[test]
fn a_receive_that_is_cancelled_after_its_commit_frees_its_blocks() {
    let cancel = |node: &TransferNode, id| assert!(node.abort(id, Reason::Cancelled, ""));
    ended_after_its_commit(LONG, cancel, Reason::Cancelled);
}

#[test]
fn a_receive_whose_sender_falls_silent_after_its_commit_frees_its_blocks() {
    // Long enough for all that comes before, on a busy machine.
    let lease = Duration::from_secs(2);
    ended_after_its_commit(lease, |_, _| (), Reason::LeaseExpired);
}

#[test]
fn a_close_in_the_middle_ends_all_threads() {
    let (from, a) = node("a", false, LONG);
    let (_, b) = node("b", false, LONG);
    write(&from, 0, 5);
    let id = TransferId([3; 16]);
    a.offer(id, 1).unwrap();
    b.pull(request(id, a.address(), &[0, 1])).unwrap();
    a.ready(id, 0, &[0]).unwrap();
    next(&b, |event| {
        matches!(event, Event::Verified { .. }).then_some(())
    });
    b.close();
    let reason = next(&a, |event| match event {
        Event::SenderAborted { reason, .. } => Some(reason),
        _ => None,
    });
    assert_eq!(reason, Reason::Lost);
    a.close();
    a.close();
}

#[test]
fn who_says_its_greeting_byte_by_byte_is_cut_off_before_its_end() {
    const HELLO: u32 = 4_000;
    let pool = Arc::new(KvPool::new(BLOCKS, BLOCK_BYTES as u64, false).unwrap());
    let settings = Settings {
        worker_id: "a".into(),
        incarnation: 1,
        connect_timeout: Duration::from_millis(500),
        ..Settings::default()
    };
    let node = TransferNode::start(pool, settings).unwrap();
    let mut peer = TcpStream::connect(node.address()).unwrap();
    // No wait for the next byte is a long one.
    peer.set_read_timeout(Some(Duration::from_millis(5)))
        .unwrap();
    let hello = HELLO.to_le_bytes().into_iter();
    let said = hello
        .chain(std::iter::repeat_n(0, HELLO as usize - 1))
        .take_while(|byte| {
            let waits = match peer.read(&mut [0]) {
                Ok(n) => n > 0,
                Err(error) => error.kind() == std::io::ErrorKind::WouldBlock,
            };
            waits && peer.write_all(&[*byte]).is_ok()
        })
        .count();
    assert!(said < HELLO as usize + 3, "it was heard to its end");
    node.close();
}
