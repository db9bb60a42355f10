//! The two products of attention for processors with AVX2 and FMA, several heads
//! at a time.
//!
//! The heads of a group share K and V: each row is loaded once and multiplied into
//! the sums of up to four heads, which are held in registers. A compiler that is
//! given the same as loops over arrays keeps them in memory.

use std::arch::x86_64::{
    __m128, __m256, _mm_add_ps, _mm_cvtss_f32, _mm_movehl_ps, _mm_movelh_ps, _mm_shuffle_ps,
    _mm_unpackhi_ps, _mm_unpacklo_ps, _mm256_castps256_ps128, _mm256_extractf128_ps,
    _mm256_fmadd_ps, _mm256_mul_ps, _mm256_set1_ps, _mm256_setr_ps, _mm256_setzero_ps,
};

use crate::decode::{Part, ROWS, four_rows};

/// Lanes of a register.
const LANES: usize = 8;

/// Registers of a row that `weigh` sums at a time, for up to four heads.
const WIDE: usize = 2;

#[inline]
#[target_feature(enable = "avx2,fma")]
fn load(from: &[f32; LANES]) -> __m256 {
    let [a, b, c, d, e, f, g, h] = *from;
    _mm256_setr_ps(a, b, c, d, e, f, g, h)
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn lanes_of(four: __m128) -> [f32; ROWS] {
    [
        _mm_cvtss_f32(four),
        _mm_cvtss_f32(_mm_shuffle_ps::<1>(four, four)),
        _mm_cvtss_f32(_mm_shuffle_ps::<2>(four, four)),
        _mm_cvtss_f32(_mm_shuffle_ps::<3>(four, four)),
    ]
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn store(four: __m256, to: &mut [f32; LANES]) {
    let (low, high) = to.split_at_mut(ROWS);
    low.copy_from_slice(&lanes_of(_mm256_castps256_ps128(four)));
    high.copy_from_slice(&lanes_of(_mm256_extractf128_ps::<1>(four)));
}

/// Sums of four registers.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn sum4(lanes: [__m256; ROWS]) -> [f32; ROWS] {
    let [a, b, c, d] = lanes.map(
        #[inline(always)]
        |all| _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps::<1>(all)),
    );
    // Transposed, so that three additions make four sums.
    let (ab, cd) = (_mm_unpacklo_ps(a, b), _mm_unpacklo_ps(c, d));
    let (ab_high, cd_high) = (_mm_unpackhi_ps(a, b), _mm_unpackhi_ps(c, d));
    let first = _mm_add_ps(_mm_movelh_ps(ab, cd), _mm_movelh_ps(ab_high, cd_high));
    let second = _mm_add_ps(_mm_movehl_ps(cd, ab), _mm_movehl_ps(cd_high, ab_high));
    lanes_of(_mm_add_ps(first, second))
}

/// `Part::score` for `N` heads.
#[inline]
#[target_feature(enable = "avx2,fma")]
pub(crate) fn score<const N: usize>(part: &Part<'_>, ahead: impl Fn(usize), scores: &mut [f32]) {
    let width = scores.len() / N;
    let mut queries = [part.q; N];
    for (query, q) in queries.iter_mut().zip(part.q.chunks_exact(part.size)) {
        *query = q;
    }
    for (piece, rows) in part.k.chunks(ROWS * part.size).enumerate() {
        ahead(piece);
        let dots = dot4::<N>(queries, four_rows(rows, part.size));
        for (scores, dots) in scores.chunks_exact_mut(width).zip(dots) {
            for (score, dot) in scores[piece * ROWS..].iter_mut().zip(dots) {
                *score = dot * part.scale;
            }
        }
    }
}

/// Dot products of `N` queries with four rows, all of equal length: `[query][row]`.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn dot4<const N: usize>(queries: [&[f32]; N], rows: [&[f32]; ROWS]) -> [[f32; ROWS]; N] {
    let size = rows[0].len();
    let mut sums = [[_mm256_setzero_ps(); ROWS]; N];
    let [r0, r1, r2, r3] = rows.map(|row| row[..size].as_chunks::<LANES>());
    let q = queries.map(|q| q[..size].as_chunks::<LANES>());
    for at in 0..size / LANES {
        let rows = [
            load(&r0.0[at]),
            load(&r1.0[at]),
            load(&r2.0[at]),
            load(&r3.0[at]),
        ];
        for n in 0..N {
            let q = load(&q[n].0[at]);
            for r in 0..ROWS {
                sums[n][r] = _mm256_fmadd_ps(q, rows[r], sums[n][r]);
            }
        }
    }
    let mut dots = [[0.0; ROWS]; N];
    for n in 0..N {
        dots[n] = sum4(sums[n]);
        for (dot, row) in dots[n].iter_mut().zip([r0, r1, r2, r3]) {
            for (q, k) in q[n].1.iter().zip(row.1) {
                *dot = q.mul_add(*k, *dot);
            }
        }
    }
    dots
}

/// `Part::weigh` for `N` heads.
#[inline]
#[target_feature(enable = "avx2,fma")]
pub(crate) fn weigh<const N: usize>(
    part: &Part<'_>,
    shrinks: &[f32],
    weights: &[f32],
    ahead: impl Fn(usize),
    out: &mut [f32],
) {
    let registers = part.size / LANES;
    let mut at = 0;
    // The first pass meets all rows first, and brings the later ones.
    let bring = |first: bool, row: usize| {
        if first {
            ahead(row);
        }
    };
    while registers - at >= WIDE {
        let ahead = |row| bring(at == 0, row);
        columns::<N, WIDE>(part, shrinks, weights, at, ahead, out);
        at += WIDE;
    }
    while at < registers {
        let ahead = |row| bring(at == 0, row);
        columns::<N, 1>(part, shrinks, weights, at, ahead, out);
        at += 1;
    }
    if registers == 0 {
        (0..part.v.len() / part.size).for_each(&ahead);
    }
    let from = registers * LANES;
    let width = weights.len() / N;
    let heads = out.chunks_exact_mut(part.size).zip(shrinks);
    for ((out, shrink), weights) in heads.zip(weights.chunks_exact(width)) {
        for (column, out) in out.iter_mut().enumerate().skip(from) {
            *out *= shrink;
            for (row, weight) in part.v.chunks_exact(part.size).zip(weights) {
                *out = weight.mul_add(row[column], *out);
            }
        }
    }
}

/// `W` registers of each row from register `at` on.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn columns<const N: usize, const W: usize>(
    part: &Part<'_>,
    shrinks: &[f32],
    weights: &[f32],
    at: usize,
    ahead: impl Fn(usize),
    out: &mut [f32],
) {
    let (from, to) = (at * LANES, (at + W) * LANES);
    let mut sums = [[_mm256_setzero_ps(); W]; N];
    for n in 0..N {
        let (out, _) = out[n * part.size..][from..to].as_chunks();
        for w in 0..W {
            sums[n][w] = _mm256_mul_ps(load(&out[w]), _mm256_set1_ps(shrinks[n]));
        }
    }
    let width = weights.len() / N;
    let mut of = [weights; N];
    for (of, weights) in of.iter_mut().zip(weights.chunks_exact(width)) {
        *of = weights;
    }
    for (row, values) in part.v.chunks_exact(part.size).enumerate() {
        ahead(row);
        let (values, _) = values[from..to].as_chunks();
        for n in 0..N {
            let weight = _mm256_set1_ps(of[n][row]);
            for w in 0..W {
                sums[n][w] = _mm256_fmadd_ps(weight, load(&values[w]), sums[n][w]);
            }
        }
    }
    for n in 0..N {
        let (out, _) = out[n * part.size..][from..to].as_chunks_mut();
        for w in 0..W {
            store(sums[n][w], &mut out[w]);
        }
    }
}
