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

/// Rows of K or V that are computed together.
pub const ROWS: usize = 4;

/// Most heads that are computed together: their sums for `ROWS` rows fill the
/// registers.
const HEADS: usize = 4;

/// Working memory of `attend`, kept from call to call.
#[derive(Debug, Default)]
pub struct Scratch {
    /// Scores, then weights, of one block's tokens: `[group, tokens]`, tokens
    /// rounded up to `ROWS`.
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
    fn reset(&mut self, group: usize, tokens: usize) {
        self.scores.clear();
        self.scores.resize(group * tokens, 0.0);
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

    /// Tokens of a block as `Scratch` has them.
    fn padded_tokens(&self) -> usize {
        self.block_tokens.next_multiple_of(ROWS)
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
/// `ahead(block, piece)` is called before each `ROWS` rows of a block are
/// computed, K's and then V's (pieces count on): the caller may have the same
/// piece of a later block fetched meanwhile.
///
/// Panics if a slice is shorter than said, or sizes are 0.
pub fn attend<'a>(
    head: DecodeHead<'_>,
    blocks: impl Iterator<Item = (&'a [f32], &'a [f32])>,
    ahead: impl Fn(usize, usize),
    scratch: &mut Scratch,
    out: &mut [f32],
) {
    // Every 64-bit Arm has fused multiply-add; the x86-64 baseline has not.
    const FUSED: bool = cfg!(target_arch = "aarch64");
    let score = |part: &Part<'_>, ahead: &dyn Fn(usize), scores: &mut [f32]| {
        part.score::<FUSED>(ahead, scores);
    };
    let weigh = |part: &Part<'_>,
                 shrinks: &[f32],
                 weights: &[f32],
                 ahead: &dyn Fn(usize),
                 out: &mut [f32]| {
        part.weigh::<FUSED>(shrinks, weights, ahead, out);
    };
    attend_with::<FUSED>(head, blocks, ahead, score, weigh, scratch, out);
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
    ahead: impl Fn(usize, usize),
    scratch: &mut Scratch,
    out: &mut [f32],
) {
    use crate::avx2;

    // Closures have the features of the function that they stand in.
    let score = |part: &Part<'_>, ahead: &dyn Fn(usize), scores: &mut [f32]| match part.heads() {
        1 => avx2::score::<1>(part, ahead, scores),
        2 => avx2::score::<2>(part, ahead, scores),
        3 => avx2::score::<3>(part, ahead, scores),
        _ => avx2::score::<HEADS>(part, ahead, scores),
    };
    let weigh = |part: &Part<'_>,
                 shrinks: &[f32],
                 weights: &[f32],
                 ahead: &dyn Fn(usize),
                 out: &mut [f32]| match part.heads() {
        1 => avx2::weigh::<1>(part, shrinks, weights, ahead, out),
        2 => avx2::weigh::<2>(part, shrinks, weights, ahead, out),
        3 => avx2::weigh::<3>(part, shrinks, weights, ahead, out),
        _ => avx2::weigh::<HEADS>(part, shrinks, weights, ahead, out),
    };
    attend_with::<true>(head, blocks, ahead, score, weigh, scratch, out);
}

/// `score` and `weigh` are as those of `Part`.
#[inline(always)]
fn attend_with<'a, const FUSED: bool>(
    head: DecodeHead<'_>,
    blocks: impl Iterator<Item = (&'a [f32], &'a [f32])>,
    ahead: impl Fn(usize, usize),
    score: impl Fn(&Part<'_>, &dyn Fn(usize), &mut [f32]),
    weigh: impl Fn(&Part<'_>, &[f32], &[f32], &dyn Fn(usize), &mut [f32]),
    scratch: &mut Scratch,
    out: &mut [f32],
) {
    let (size, width) = (head.head_size, head.padded_tokens());
    scratch.reset(head.group(), width);
    out.fill(0.0);
    let mut left = head.length;
    for (index, (k, v)) in blocks.enumerate() {
        let tokens = left.min(head.block_tokens);
        let queries = head.queries.chunks(HEADS * size);
        let running = scratch.running.chunks_mut(HEADS);
        let scores = scratch.scores.chunks_mut(HEADS * width);
        let outs = out.chunks_mut(HEADS * size);
        let heads = queries.zip(running).zip(scores).zip(outs);
        for (first, (((q, running), scores), out)) in heads.enumerate() {
            // One set of heads brings the later block for all of them.
            let ahead = |piece| {
                if first == 0 {
                    ahead(index, piece);
                }
            };
            let part = Part {
                q,
                k: &k[..tokens * size],
                v: &v[..tokens * size],
                size,
                scale: head.scale,
            };
            score(&part, &ahead, scores);
            let mut shrinks = [0.0; HEADS];
            let states = running.iter_mut().zip(scores.chunks_exact_mut(width));
            for ((state, scores), shrink) in states.zip(&mut shrinks) {
                scores[tokens..].fill(f32::NEG_INFINITY);
                *shrink = state.take::<FUSED>(scores);
            }
            let ahead = |row: usize| {
                if row.is_multiple_of(ROWS) {
                    ahead((width + row) / ROWS);
                }
            };
            weigh(&part, &shrinks, scores, &ahead, out);
        }
        left -= tokens;
        if left == 0 {
            break;
        }
    }
    for (state, out) in scratch.running.iter().zip(out.chunks_exact_mut(size)) {
        let inverse = 1.0 / state.sum;
        for value in out {
            *value *= inverse;
        }
    }
}

/// A block and up to `HEADS` heads that are computed together over it.
pub(crate) struct Part<'a> {
    /// `[heads, size]`.
    pub(crate) q: &'a [f32],
    /// `[tokens, size]`.
    pub(crate) k: &'a [f32],
    /// `[tokens, size]`.
    pub(crate) v: &'a [f32],
    pub(crate) size: usize,
    pub(crate) scale: f32,
}

impl Part<'_> {
    fn heads(&self) -> usize {
        self.q.len() / self.size
    }

    /// Scores of the block's tokens into `[heads, padded tokens]`.
    #[inline(always)]
    fn score<const FUSED: bool>(&self, ahead: impl Fn(usize), scores: &mut [f32]) {
        let width = scores.len() / self.heads();
        for (piece, rows) in self.k.chunks(ROWS * self.size).enumerate() {
            ahead(piece);
            let rows = four_rows(rows, self.size);
            let heads = self.q.chunks_exact(self.size);
            for (query, scores) in heads.zip(scores.chunks_exact_mut(width)) {
                let sums = dot4::<FUSED>(query, rows);
                for (score, sum) in scores[piece * ROWS..].iter_mut().zip(sums) {
                    *score = sum * self.scale;
                }
            }
        }
    }

    /// `out[head] = out[head] * shrinks[head] + sum of weights[head][row] * v[row]`;
    /// `weights` is `[heads, padded tokens]`, 0 for absent ones.
    #[inline(always)]
    fn weigh<const FUSED: bool>(
        &self,
        shrinks: &[f32],
        weights: &[f32],
        ahead: impl Fn(usize),
        out: &mut [f32],
    ) {
        let width = weights.len() / self.heads();
        for (out, shrink) in out.chunks_exact_mut(self.size).zip(shrinks) {
            for value in out {
                *value *= shrink;
            }
        }
        for (piece, rows) in self.v.chunks(ROWS * self.size).enumerate() {
            ahead(piece * ROWS);
            let rows = four_rows(rows, self.size);
            let heads = out.chunks_exact_mut(self.size);
            for (out, weights) in heads.zip(weights.chunks_exact(width)) {
                let (of, _) = weights[piece * ROWS..].as_chunks();
                add_weighted4::<FUSED>(out, of[0], rows);
            }
        }
    }
}

impl RunningSoftmax {
    /// Takes the scores of a block in, which become weights; returns what all
    /// weights before are to be multiplied by.
    #[inline(always)]
    fn take<const FUSED: bool>(&mut self, scores: &mut [f32]) -> f32 {
        let mut lanes = [f32::NEG_INFINITY; ROWS];
        for scores in scores.chunks_exact(ROWS) {
            for (lane, score) in lanes.iter_mut().zip(scores) {
                *lane = if *score > *lane { *score } else { *lane };
            }
        }
        let largest = lanes.iter().fold(self.largest, |a, b| a.max(*b));
        let shrink = exp_of_non_positive::<FUSED>(self.largest - largest);
        self.largest = largest;
        // A loop of its own: the compiler takes it eight at a time.
        for score in scores.iter_mut() {
            *score = exp_of_non_positive::<FUSED>(*score - largest);
        }
        let mut sums = [0.0; ROWS];
        for weights in scores.chunks_exact(ROWS) {
            for (sum, weight) in sums.iter_mut().zip(weights) {
                *sum += *weight;
            }
        }
        let [a, b, c, d] = sums;
        self.sum = self.sum * shrink + ((a + c) + (b + d));
        shrink
    }
}

/// Four rows, the last one repeated where there are fewer: what comes of a
/// repeated row is not used, or has the weight 0.
#[inline(always)]
pub(crate) fn four_rows(rows: &[f32], size: usize) -> [&[f32]; ROWS] {
    let last = rows.len() / size - 1;
    [0, 1, 2, 3].map(|row: usize| {
        let begin = row.min(last) * size;
        &rows[begin..begin + size]
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::cell::RefCell;

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

    type Blocks<'a> = dyn Iterator<Item = (&'a [f32], &'a [f32])> + 'a;
    type Kernel = fn(DecodeHead<'_>, &mut Blocks<'_>, &dyn Fn(usize, usize), &mut [f32]);

    /// Those that this processor has.
    fn kernels() -> Vec<Kernel> {
        let mut kernels: Vec<Kernel> = vec![|head, blocks, ahead, out| {
            attend(head, blocks, ahead, &mut Scratch::default(), out);
        }];
        #[cfg(target_arch = "x86_64")]
        if std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma") {
            kernels.push(|head, blocks, ahead, out| {
                // SAFETY: both features have just been found.
                unsafe { attend_avx2(head, blocks, ahead, &mut Scratch::default(), out) };
            });
        }
        kernels
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
            group in 1usize..10,
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
            let block = block_tokens * head_size;
            let pieces = || k.chunks_exact(block).zip(v.chunks_exact(block));
            let want = reference(&head, &k, &v);
            for kernel in kernels() {
                let mut out = vec![0.0; group * head_size];
                let met = RefCell::new(Vec::new());
                let ahead = |block: usize, piece: usize| met.borrow_mut().push((block, piece));
                kernel(head, &mut pieces(), &ahead, &mut out);
                for (got, want) in out.iter().zip(&want) {
                    prop_assert!((f64::from(*got) - want).abs() < 2e-5, "{got} {want}");
                }
                // Each piece once, K's and then V's; those of the last block
                // only as far as there are tokens.
                let met = met.into_inner();
                let pieces = block_tokens / ROWS;
                let whole = (0..blocks - 1).flat_map(|b| (0..2 * pieces).map(move |p| (b, p)));
                let last = (length - (blocks - 1) * block_tokens).div_ceil(ROWS);
                let last = (0..last).chain(pieces..pieces + last).map(|p| (blocks - 1, p));
                prop_assert_eq!(met, whole.chain(last).collect::<Vec<_>>());
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
        let run = |kernel: Kernel, junk: f32| {
            let mut k = numbers(3, 16 * 8, 1.0);
            let mut v = numbers(4, 16 * 8, 1.0);
            k[5 * 8..].fill(junk);
            v[5 * 8..].fill(junk);
            let mut out = [0.0; 8];
            let mut pieces = std::iter::once((k.as_slice(), v.as_slice()));
            kernel(head, &mut pieces, &|_, _| (), &mut out);
            out
        };
        for kernel in kernels() {
            assert_eq!(run(kernel, 0.0), run(kernel, f32::NAN));
        }
    }
}
