//! Rotary position embedding of one head.

/// Rotates `head` by the angles whose cosines and sines are given.
///
/// Element i is paired with element i + size / 2, as Hugging Face checkpoints
/// have it (RoFormer, arXiv:2104.09864). `head` and `out` are of size `2 n`, `cos`
/// and `sin` of size `n`; what is longer is ignored.
pub fn rotate(head: &[f32], cos: &[f32], sin: &[f32], out: &mut [f32]) {
    let half = cos.len();
    let (first, second) = head.split_at(half);
    let (out_first, out_second) = out.split_at_mut(half);
    for (((((a, b), cos), sin), out_a), out_b) in first
        .iter()
        .zip(second)
        .zip(cos)
        .zip(sin)
        .zip(out_first)
        .zip(out_second)
    {
        *out_a = a * cos - b * sin;
        *out_b = b * cos + a * sin;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quarter_turn_swaps_the_halves() {
        let mut out = [0.0; 4];
        rotate(&[1.0, 2.0, 3.0, 4.0], &[0.0, 0.0], &[1.0, 1.0], &mut out);
        assert_eq!(out, [-3.0, -4.0, 1.0, 2.0]);
    }
}
