//! Sizes of chunks, by the vectors that the engines' Python is held to, too
//! (`tests/engine/test_chunk_vectors.py`).
#![allow(clippy::unwrap_used)]

use kvmesh_scheduler::{ChunkBounds, StepModel, chunk_tokens};
use proptest::prelude::*;
use serde::Deserialize;

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
            preemption_ms: if self.layer_preemption {
                f64::INFINITY
            } else {
                100.0
            },
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

proptest! {
    /// A chunk goes on, ends with a block or the prompt, and is over its budget
    /// only where it is a single block.
    #[test]
    fn a_chunk_keeps_its_budget(
        (b_ms, c_ms) in (0.001f64..2.0, 0.0f64..1e-3),
        (start, left) in (0u64..500, 1u64..20_000),
        batch in 0u32..64,
        itl_target_ms in 1.0f64..200.0,
        layers in any::<bool>(),
        block in prop_oneof![Just(16u64), Just(32), Just(512)],
    ) {
        let model = StepModel { a_ms: 5.0, b_ms, c_ms, d_ms: 0.5, e_ms: 0.0, relative_error: 0.0, saturating_chunk: 1_024 };
        let preemption_ms = if layers { f64::INFINITY } else { 100.0 };
        let bounds = ChunkBounds { itl_target_ms, preemption_ms, block_tokens: block as u32 };
        let (start, length) = (start * block, start * block + left);
        let tokens = chunk_tokens(&model, &bounds, start, length, batch, 0);
        prop_assert!(tokens >= 1 && tokens <= left);
        prop_assert!(tokens == left || (start + tokens).is_multiple_of(block));
        let decode_ms = model.decode_ms(batch, 0);
        let budget = bounds.budget_ms(batch > 0, decode_ms);
        let takes = b_ms * tokens as f64 + c_ms * (tokens * start + tokens * (tokens + 1) / 2) as f64;
        prop_assert!(takes <= budget * (1.0 + 1e-9) || tokens <= block, "{} of {}", takes, budget);
    }
}
