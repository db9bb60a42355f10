//! Small pieces of arithmetic written so that the compiler vectorises them.
//!
//! All are `inline(always)`: they take the instruction set of the function that
//! they land in (see `attend_avx2`).

/// `a * b + c`; rounded once where the processor has an instruction for that.
///
/// Without one, `mul_add` is a call into a library, many times slower.
#[inline(always)]
fn multiply_add<const FUSED: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FUSED { a.mul_add(b, c) } else { a * b + c }
}

/// Lanes of one accumulator: a 256-bit register of float32.
const LANES: usize = 8;

/// Dot products of `q` with four rows of equal length.
///
/// Four at a time keep four independent chains of additions in flight, which
/// hides their latency, and load each part of `q` once.
#[inline(always)]
pub(crate) fn dot4<const FUSED: bool>(q: &[f32], rows: [&[f32]; 4]) -> [f32; 4] {
    let mut lanes = [[0.0f32; LANES]; 4];
    let whole = q.len() / LANES * LANES;
    let (q_body, q_tail) = q.split_at(whole);
    let [r0, r1, r2, r3] = rows.map(|row| &row[..q.len()]);
    for ((((q, a), b), c), d) in q_body
        .chunks_exact(LANES)
        .zip(r0.chunks_exact(LANES))
        .zip(r1.chunks_exact(LANES))
        .zip(r2.chunks_exact(LANES))
        .zip(r3.chunks_exact(LANES))
    {
        for lane in 0..LANES {
            lanes[0][lane] = multiply_add::<FUSED>(q[lane], a[lane], lanes[0][lane]);
            lanes[1][lane] = multiply_add::<FUSED>(q[lane], b[lane], lanes[1][lane]);
            lanes[2][lane] = multiply_add::<FUSED>(q[lane], c[lane], lanes[2][lane]);
            lanes[3][lane] = multiply_add::<FUSED>(q[lane], d[lane], lanes[3][lane]);
        }
    }
    let mut sums = lanes.map(sum);
    for (sum, row) in sums.iter_mut().zip([r0, r1, r2, r3]) {
        for (q, k) in q_tail.iter().zip(&row[whole..]) {
            *sum = multiply_add::<FUSED>(*q, *k, *sum);
        }
    }
    sums
}

/// Sum of a register, by halves.
#[inline(always)]
fn sum(lanes: [f32; LANES]) -> f32 {
    let [a, b, c, d, e, f, g, h] = lanes;
    ((a + e) + (c + g)) + ((b + f) + (d + h))
}

/// `out += weights[0] * rows[0] + … + weights[3] * rows[3]`.
#[inline(always)]
pub(crate) fn add_weighted4<const FUSED: bool>(
    out: &mut [f32],
    weights: [f32; 4],
    rows: [&[f32]; 4],
) {
    let [w0, w1, w2, w3] = weights;
    let [r0, r1, r2, r3] = rows.map(|row| &row[..out.len()]);
    for ((((out, a), b), c), d) in out.iter_mut().zip(r0).zip(r1).zip(r2).zip(r3) {
        let mut value = multiply_add::<FUSED>(w0, *a, *out);
        value = multiply_add::<FUSED>(w1, *b, value);
        value = multiply_add::<FUSED>(w2, *c, value);
        *out = multiply_add::<FUSED>(w3, *d, value);
    }
}

/// e^x for x <= 0, to about 2 units in the last place; 0 below -87.
///
/// Cephes' `expf` (S. Moshier): x = n ln 2 + r, a polynomial in r, and n added
/// to the exponent. No table, no branch: it runs in all lanes at once.
#[inline(always)]
pub(crate) fn exp_of_non_positive<const FUSED: bool>(x: f32) -> f32 {
    // Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
    const ROUND: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let kept = x.max(-87.0);
    let shifted = multiply_add::<FUSED>(kept, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let high = multiply_add::<FUSED>(n, -LN2_HIGH, kept);
    let r = multiply_add::<FUSED>(n, -LN2_LOW, high);
    let mut p = 1.987_569_1e-4f32;
    p = multiply_add::<FUSED>(p, r, 1.398_199_9e-3);
    p = multiply_add::<FUSED>(p, r, 8.333_452e-3);
    p = multiply_add::<FUSED>(p, r, 4.166_579_6e-2);
    p = multiply_add::<FUSED>(p, r, 1.666_666_5e-1);
    p = multiply_add::<FUSED>(p, r, 0.5);
    let fraction = multiply_add::<FUSED>(p, r * r, r) + 1.0;
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23));
    if x < -87.0 { 0.0 } else { fraction * power }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_right_to_the_last_bits() {
        let mut x = 0.0f32;
        while x > -87.0 {
            let want = f64::from(x).exp();
            let error = (f64::from(exp_of_non_positive::<false>(x)) - want).abs() / want;
            assert!(error < 3e-7, "{x}: {error}");
            x -= 0.003_7;
        }
        assert_eq!(exp_of_non_positive::<true>(0.0), 1.0);
        assert_eq!(exp_of_non_positive::<false>(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp_of_non_positive::<false>(-1e30), 0.0);
    }
}
