//! Attention of one new token over the blocks of its sequence.

use crate::math::{add_weighted4, dot4, exp_of_non_positive};

/// The query heads of one token that share a KV head.
#[derive(Debug, Clone, Copy)]
pub struct DecodeHead<'a> {
    /// `[group, head_size]`, rotated.
    pub queries: &'a [f32],
    /// Size of a head.
    pub head_size: usize,
    /// Tokens of a block.
    pub block_tokens: usize,
    /// Tokens of the sequence, the new one included. At least 1.
    pub length: usize,
    /// Factor of the scores: 1 / sqrt(head_size).
    pub scale: f32,
}

/// Working memory of `attend`, kept from call to call.
#[derive(Debug, Default)]
pub struct Scratch {
    /// Scores, then weights, of one block's tokens for one head.
    scores: Vec<f32>,
    /// One a head of the group.
    running: Vec<RunningSoftmax>,
}

/// The softmax over the tokens seen so far.
#[derive(Debug, Clone)]
struct RunningSoftmax {
    largest: f32,
    sum: f32,
}

impl Scratch {
    fn reset(&mut self, group: usize, block_tokens: usize) {
        self.scores.clear();
        self.scores.resize(block_tokens.next_multiple_of(4), 0.0);
        self.running.clear();
        self.running.resize(
            group,
            RunningSoftmax {
                largest: f32::NEG_INFINITY,
                sum: 0.0,
            },
        );
    }
}

impl DecodeHead<'_> {
    fn group(&self) -> usize {
        self.queries.len() / self.head_size
    }
}

/// Softmax(q K^T) V for the heads of one group, block by block.
///
/// `blocks` yields K and V of each block in order, `[block_tokens, head_size]`
/// each. `out` is `[group, head_size]`. The softmax runs along (Milakov and
/// Gimelshein, arXiv:1805.02867): the largest score so far is subtracted, and
/// what was summed before is scaled when a larger one comes. Blocks beyond
/// `length` are not asked for; if there are too few, their tokens are absent.
///
/// Panics if a slice is shorter than said, or sizes are 0.
pub fn attend<'a>(
    head: DecodeHead<'_>,
    blocks: impl Iterator<Item = (&'a [f32], &'a [f32])>,
    scratch: &mut Scratch,
    out: &mut [f32],
) {
    // Every 64-bit Arm has fused multiply-add; the x86-64 baseline has not.
    attend_with::<{ cfg!(target_arch = "aarch64") }>(head, blocks, scratch, out);
}

/// `attend` for processors with AVX2 and FMA.
///
/// # Safety
///
/// No concern where the caller is compiled for both features too; elsewhere it
/// must have found them at run time.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
pub fn attend_avx2<'a>(
    head: DecodeHead<'_>,
    blocks: impl Iterator<Item = (&'a [f32], &'a [f32])>,
    scratch: &mut Scratch,
    out: &mut [f32],
) {
    attend_with::<true>(head, blocks, scratch, out);
}

#[inline(always)]
fn attend_with<'a, const FUSED: bool>(
    head: DecodeHead<'_>,
    blocks: impl Iterator<Item = (&'a [f32], &'a [f32])>,
    scratch: &mut Scratch,
    out: &mut [f32],
) {
    scratch.reset(head.group(), head.block_tokens);
    out.fill(0.0);
    let mut left = head.length;
    for (k, v) in blocks {
        let tokens = left.min(head.block_tokens);
        let size = tokens * head.head_size;
        add_block::<FUSED>(&head, &k[..size], &v[..size], scratch, out);
        left -= tokens;
        if left == 0 {
            break;
        }
    }
    for (state, out) in scratch
        .running
        .iter()
        .zip(out.chunks_exact_mut(head.head_size))
    {
        let inverse = 1.0 / state.sum;
        for value in out {
            *value *= inverse;
        }
    }
}

/// Takes one block into the running softmax of each head of the group.
#[inline(always)]
fn add_block<const FUSED: bool>(
    head: &DecodeHead<'_>,
    k: &[f32],
    v: &[f32],
    scratch: &mut Scratch,
    out: &mut [f32],
) {
    let size = head.head_size;
    let queries = head.queries.chunks_exact(size);
    let Scratch { scores, running } = scratch;
    for ((query, state), out) in queries.zip(running).zip(out.chunks_exact_mut(size)) {
        let largest = score_block::<FUSED>(query, k, head.scale, scores);
        let new_largest = state.largest.max(largest);
        let shrink = exp_of_non_positive::<FUSED>(state.largest - new_largest);
        state.largest = new_largest;
        let mut sum = 0.0;
        for score in scores.iter_mut() {
            *score = exp_of_non_positive::<FUSED>(*score - new_largest);
        }
        for weight in scores.iter() {
            sum += *weight;
        }
        state.sum = state.sum * shrink + sum;
        if shrink != 1.0 {
            for value in out.iter_mut() {
                *value *= shrink;
            }
        }
        for (rows, weights) in v.chunks(4 * size).zip(scores.chunks_exact(4)) {
            let weights = [weights[0], weights[1], weights[2], weights[3]];
            add_weighted4::<FUSED>(out, weights, four_rows(rows, size));
        }
    }
}

/// Scores of the block's tokens into `scores` (absent tokens: -inf); the largest.
#[inline(always)]
fn score_block<const FUSED: bool>(query: &[f32], k: &[f32], scale: f32, scores: &mut [f32]) -> f32 {
    let size = query.len();
    let tokens = k.len() / size;
    for (rows, scores) in k.chunks(4 * size).zip(scores.chunks_exact_mut(4)) {
        let sums = dot4::<FUSED>(query, four_rows(rows, size));
        for (score, sum) in scores.iter_mut().zip(sums) {
            *score = sum * scale;
        }
    }
    for absent in &mut scores[tokens..] {
        *absent = f32::NEG_INFINITY;
    }
    scores.iter().fold(f32::NEG_INFINITY, |a, b| a.max(*b))
}

/// Four rows, the last one repeated where there are fewer: what comes of a
/// repeated row is not used, or has the weight 0.
#[inline(always)]
fn four_rows(rows: &[f32], size: usize) -> [&[f32]; 4] {
    let last = rows.len() / size - 1;
    [0, 1, 2, 3].map(|row: usize| {
        let begin = row.min(last) * size;
        &rows[begin..begin + size]
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;

    /// The definition, in float64.
    fn reference(head: &DecodeHead<'_>, k: &[f32], v: &[f32]) -> Vec<f64> {
        let size = head.head_size;
        let mut out = Vec::new();
        for query in head.queries.chunks_exact(size) {
            let scores: Vec<f64> = k
                .chunks_exact(size)
                .take(head.length)
                .map(|row| {
                    let dot: f64 = row
                        .iter()
                        .zip(query)
                        .map(|(a, b)| f64::from(*a) * f64::from(*b))
                        .sum();
                    dot * f64::from(head.scale)
                })
                .collect();
            let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
            let sum: f64 = weights.iter().sum();
            for i in 0..size {
                let value: f64 = weights
                    .iter()
                    .enumerate()
                    .map(|(t, w)| w * f64::from(v[t * size + i]))
                    .sum();
                out.push(value / sum);
            }
        }
        out
    }

    fn numbers(seed: u64, count: usize, spread: f32) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        (0..count)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                ((state >> 40) as f32 / (1u64 << 24) as f32 - 0.5) * spread
            })
            .collect()
    }

    proptest! {
        #[test]
        fn equals_the_definition(
            seed in 1u64..1 << 40,
            group in 1usize..5,
            head_size in prop::sample::select(vec![4usize, 12, 16, 64, 80, 128]),
            block_tokens in prop::sample::select(vec![16usize, 32]),
            length in 1usize..100,
            spread in prop::sample::select(vec![0.1f32, 4.0, 40.0]),
        ) {
            let blocks = length.div_ceil(block_tokens);
            let k = numbers(seed, blocks * block_tokens * head_size, spread);
            let v = numbers(seed + 1, blocks * block_tokens * head_size, 2.0);
            let queries = numbers(seed + 2, group * head_size, 2.0);
            let scale = 1.0 / (head_size as f32).sqrt();
            let head = DecodeHead { queries: &queries, head_size, block_tokens, length, scale };
            let mut out = vec![0.0; group * head_size];
            let block = block_tokens * head_size;
            let pieces = k.chunks_exact(block).zip(v.chunks_exact(block));
            attend(head, pieces, &mut Scratch::default(), &mut out);
            for (got, want) in out.iter().zip(reference(&head, &k, &v)) {
                prop_assert!((f64::from(*got) - want).abs() < 2e-5, "{got} {want}");
            }
        }
    }

    #[test]
    fn tokens_beyond_the_length_are_not_seen() {
        let queries = [1.0; 8];
        let head = DecodeHead {
            queries: &queries,
            head_size: 8,
            block_tokens: 16,
            length: 5,
            scale: 1.0,
        };
        let run = |junk: f32| {
            let mut k = numbers(3, 16 * 8, 1.0);
            let mut v = numbers(4, 16 * 8, 1.0);
            k[5 * 8..].fill(junk);
            v[5 * 8..].fill(junk);
            let mut out = [0.0; 8];
            let pieces = std::iter::once((k.as_slice(), v.as_slice()));
            attend(head, pieces, &mut Scratch::default(), &mut out);
            out
        };
        assert_eq!(run(0.0), run(f32::NAN));
    }
}
