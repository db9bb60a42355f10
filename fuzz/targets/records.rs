//! Values in etcd, and every message of every service: what is read is written
//! again as the same.
#![no_main]

use kvmesh_registry::{RouterRecord, worker_from_json, worker_to_json};
use kvmesh_wire::v1;
use libfuzzer_sys::fuzz_target;
use prost::Message;

/// What a message says, said again, is the same message.
fn round<M: Message + Default + PartialEq>(bytes: &[u8]) {
    let Ok(message) = M::decode(bytes) else {
        return;
    };
    let again = M::decode(message.encode_to_vec().as_slice()).expect("it was just written");
    // Numbers that are none differ from themselves: their bytes do not.
    assert!(again == message || again.encode_to_vec() == message.encode_to_vec());
}

fuzz_target!(|data: &[u8]| {
    let Some((kind, bytes)) = data.split_first() else {
        return;
    };
    match kind % 8 {
        0 => {
            if let Ok(record) = worker_from_json("worker", bytes) {
                let json = worker_to_json(&record).expect("it was accepted");
                assert_eq!(worker_from_json("worker", &json), Ok(record));
            }
        }
        1 => {
            if let Ok(record) = RouterRecord::from_json("router", bytes) {
                let json = record.to_json().expect("it was accepted");
                assert_eq!(RouterRecord::from_json("router", &json), Ok(record));
            }
        }
        2 => round::<v1::GenerateRequest>(bytes),
        3 => round::<v1::RouterFrame>(bytes),
        4 => round::<v1::WorkerFrame>(bytes),
        5 => round::<v1::TransferFrame>(bytes),
        6 => round::<v1::ResumeState>(bytes),
        _ => {
            round::<v1::TokenizeRequest>(bytes);
            round::<v1::ResumeRequest>(bytes);
            round::<v1::ExplainRequest>(bytes);
            round::<v1::ListWorkersResponse>(bytes);
            round::<v1::GetTokenizerResponse>(bytes);
        }
    }
});
