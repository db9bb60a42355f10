"""Gumbel noise as a pure function of (seed, position, token id).

argmax(logit / T + g) with independent standard Gumbel g is a draw from the
softmax (Gumbel, 1954; Maddison et al., arXiv:1411.0030). Because g is a hash
and not a generator's next number, a draw needs no state: any worker, batch or
restart draws the same token from the same logits.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def gumbel(seed: int, position: int, token_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Noise of each token, float64. `seed` is taken as an unsigned 64-bit number.

    The bits are SplitMix64 (Steele, Lea and Flood, 2014) started at a hash of
    seed and position, with the token id as the number of the step. The highest
    53 make a uniform number strictly between 0 and 1.
    """
    start = _mix_int((seed + (position + 1) * _GOLDEN) & _MASK)
    steps = token_ids.astype(np.uint64) + np.uint64(1)
    bits = _mix(steps * np.uint64(_GOLDEN) + np.uint64(start))
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    noise: npt.NDArray[np.float64] = -np.log(-np.log(uniform))
    return noise


def _mix(bits: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    bits ^= bits >> np.uint64(30)
    bits *= np.uint64(0xBF58476D1CE4E5B9)
    bits ^= bits >> np.uint64(27)
    bits *= np.uint64(0x94D049BB133111EB)
    bits ^= bits >> np.uint64(31)
    return bits


def _mix_int(bits: int) -> int:
    bits ^= bits >> 30
    bits = bits * 0xBF58476D1CE4E5B9 & _MASK
    bits ^= bits >> 27
    bits = bits * 0x94D049BB133111EB & _MASK
    return bits ^ bits >> 31
