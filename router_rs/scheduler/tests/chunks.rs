//! Sizes of chunks, by the vectors that the engines' Python is held to, too
//! (`tests/engine/test_chunk_vectors.py`), and what plans expect of them.
#![allow(clippy::unwrap_used)]

mod common;

use common::{request, worker};
use kvmesh_kv_index::Matches;
use kvmesh_scheduler::{
    ChunkBounds, Cluster, KvCost, Policy, Role, StepModel, UsualStreams, WorkerView, chunk_tokens,
};
use proptest::prelude::*;
use serde::Deserialize;
use std::sync::Arc;

#[derive(Deserialize)]
struct Vectors {
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    /// a, b, c, d, e.
    coefficients: [f64; 5],
    saturating_chunk: u32,
    block_tokens: u32,
    /// 0: none.
    itl_target_ms: f64,
    layer_preemption: bool,
    start: u64,
    length: u64,
    decode_batch: u32,
    decode_context: u64,
    tokens: u64,
}

impl Case {
    fn model(&self) -> StepModel {
        let [a_ms, b_ms, c_ms, d_ms, e_ms] = self.coefficients;
        StepModel {
            a_ms,
            b_ms,
            c_ms,
            d_ms,
            e_ms,
            relative_error: 0.0,
            saturating_chunk: self.saturating_chunk,
        }
    }

    fn bounds(&self) -> ChunkBounds {
        ChunkBounds {
            itl_target_ms: match self.itl_target_ms {
                0.0 => f64::INFINITY,
                target => target,
            },
            layer_preemption: self.layer_preemption,
            block_tokens: self.block_tokens,
        }
    }
}

#[test]
fn chunks_are_those_of_the_vectors() {
    let vectors: Vectors = serde_json::from_str(include_str!("data/chunks.json")).unwrap();
    assert!(vectors.cases.len() >= 40);
    for (n, case) in vectors.cases.iter().enumerate() {
        let got = chunk_tokens(
            &case.model(),
            &case.bounds(),
            case.start,
            case.length,
            case.decode_batch,
            case.decode_context,
        );
        assert_eq!(got, case.tokens, "case {n}");
    }
}

/// What a prompt of 1,024 tokens is predicted to take on a worker that does all of it, ms.
fn prefill_ms(worker: &WorkerView) -> f64 {
    let none = Matches::default();
    let cluster = Cluster::new(7, std::slice::from_ref(worker));
    let plans = KvCost::default().explain(&cluster, &request(&none, 1));
    plans.unwrap()[0].terms.prefill_ms
}

#[test]
fn beside_streams_without_a_target_a_prompt_is_expected_in_chunks_of_the_preemption_target() {
    let mut beside = worker(0, Role::Both);
    beside.load.own.decoding = 1;
    beside.load.own.decode_context = 500;
    beside.load.own.classes.decoding[2] = 1;
    let expected_ms = prefill_ms(&beside);
    // The 517.248 ms of its tokens in six steps of 5 + 1 + 0.5 ms, where chunks of
    // 256 tokens would be four.
    assert!((expected_ms - (6.0 * 6.5 + 517.248)).abs() < 1e-9);
    // An engine that stops only between chunks computes no others.
    Arc::make_mut(&mut beside.abilities).layer_preemption = false;
    assert_eq!(prefill_ms(&beside), expected_ms);
    // Where they are likely to come, some chunks wait for a step of theirs.
    let mut decode = worker(0, Role::Decode);
    let alone_ms = prefill_ms(&decode);
    decode.usual = UsualStreams::of([0.0, 0.0, 1.0]);
    assert!(prefill_ms(&decode) > alone_ms + 1.0);
}

proptest! {
    /// A chunk goes on, ends with a block or the prompt, and is over its budget
    /// only where it is a single block.
    #[test]
    fn a_chunk_keeps_its_budget(
        (b_ms, c_ms) in (0.001f64..2.0, 0.0f64..1e-3),
        (start, left) in (0u64..500, 1u64..20_000),
        batch in 0u32..64,
        itl_target_ms in prop_oneof![1.0f64..200.0, Just(1e6), Just(f64::INFINITY)],
        layer_preemption in any::<bool>(),
        block in prop_oneof![Just(16u64), Just(32), Just(512)],
    ) {
        let model = StepModel { a_ms: 5.0, b_ms, c_ms, d_ms: 0.5, e_ms: 0.0, relative_error: 0.0, saturating_chunk: 1_024 };
        let bounds = ChunkBounds { itl_target_ms, layer_preemption, block_tokens: block as u32 };
        let (start, length) = (start * block, start * block + left);
        let tokens = chunk_tokens(&model, &bounds, start, length, batch, 0);
        prop_assert!(tokens >= 1 && tokens <= left);
        prop_assert!(tokens == left || (start + tokens).is_multiple_of(block));
        let decode_ms = model.decode_ms(batch, 0);
        let budget = bounds.budget_ms(batch > 0, decode_ms);
        // What nothing can stop is short, whatever the streams ask for.
        prop_assert_eq!(budget <= 100.0, batch > 0 || !layer_preemption);
        let takes = b_ms * tokens as f64 + c_ms * (tokens * start + tokens * (tokens + 1) / 2) as f64;
        prop_assert!(takes <= budget * (1.0 + 1e-9) || tokens <= block, "{} of {}", takes, budget);
    }
}
