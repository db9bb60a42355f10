"""What the simulated model "computes": block contents and tokens.

All is arithmetic modulo 2**64. With a(t) a number for token id t:

* state:    h[p] = K h[p-1] + a(t[p])          a function of the tokens up to p
* content:  w[p, j] = C[j] h[p]                words of a block, at position p
* reading:  S[p] = S[p-1] + (2p + 1) sum_j D[j] w[p, j]
* next token: a mix of (S[p], h[p]), taken modulo the vocabulary

All of C, D and 2p + 1 are odd, so a change of any one word changes S and the
tokens after it; and two blocks that changed places do too.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]

MASK = (1 << 64) - 1
K = 0x9E3779B97F4A7C15 | 1
SEED = 0x2545F4914F6CDD1D
FIRST_STATE = 0x6A09E667F3BCC909
TOKEN = 0xD6E8FEB86659FD93
_TOKEN_U64 = np.uint64(TOKEN)


def token_number(token: int) -> int:
    """a(t) of a token id."""
    return (token + 1) * TOKEN & MASK


def token_numbers(ids: npt.NDArray[np.uint32]) -> U64:
    """a(t) of token ids."""
    numbers: U64 = (ids.astype(np.uint64) + np.uint64(1)) * _TOKEN_U64
    return numbers


def odd_numbers(count: int, seed: int) -> U64:
    """Fixed odd multipliers."""
    numbers = [mix(mix((seed + i) * K & MASK)) | 1 for i in range(count)]
    return np.array(numbers, dtype=np.uint64)


def mix(value: int) -> int:
    """Spreads 64 bits over 64 bits: xor-shift, multiply, xor-shift."""
    value = (value ^ value >> 32) * TOKEN & MASK
    return value ^ value >> 32


class Content:
    """Contents for one number of words a token."""

    def __init__(self, words: int) -> None:
        self.words = words
        self.spread = odd_numbers(words, 1)
        """C, with C[0] = 1: the first word is the state itself."""
        self.spread[0] = 1
        self.reading = odd_numbers(words, 1 << 32)
        """D."""
        self.gain = np.uint64(
            sum(int(c) * int(d) for c, d in zip(self.spread, self.reading, strict=True)) & MASK
        )
        """sum_j C[j] D[j]: what reading a right content gives, a unit of h."""
        self._powers = np.ones(1, np.uint64)
        self._inverse = np.ones(1, np.uint64)

    def states(self, before: int, ids: npt.NDArray[np.uint32]) -> U64:
        """h of consecutive tokens after a state, all at once.

        h[i] = K**(i+1) (before + sum_{j<=i} K**-(j+1) a(t[j])).
        """
        count = len(ids)
        if count > len(self._powers):
            size = max(count, 2 * len(self._powers))
            self._powers = np.cumprod(np.full(size, K, np.uint64), dtype=np.uint64)
            inverse = pow(K, -1, 1 << 64)
            self._inverse = np.cumprod(np.full(size, inverse, np.uint64), dtype=np.uint64)
        if count == 1 and len(self._powers) == 1:
            self._powers[0], self._inverse[0] = K, pow(K, -1, 1 << 64)
        sums = np.cumsum(token_numbers(ids) * self._inverse[:count], dtype=np.uint64)
        states: U64 = self._powers[:count] * (np.uint64(before) + sums)
        return states

    def read(self, words: U64, first: int = 0) -> int:
        """Sum over words [tokens, words] that lie from position `first` on."""
        weights = 2 * np.arange(first, first + len(words), dtype=np.uint64) + np.uint64(1)
        return int(
            ((words * self.reading).sum(axis=1, dtype=np.uint64) * weights).sum(dtype=np.uint64)
        )


def reference_tokens(
    prefix: list[int], count: int, vocabulary: range, words: int = 8, tag: int = 0
) -> list[int]:
    """The tokens that a run without disturbance gives. Straight from the definition."""
    content = Content(words)
    state, reading, tokens = FIRST_STATE, 0, []
    for position, token in enumerate(prefix):
        state = (K * state + token_number(token)) & MASK
        reading = (reading + (2 * position + 1) * int(content.gain) * state) & MASK
    for position in range(len(prefix), len(prefix) + count):
        token = draw(state, reading, tag, vocabulary)
        tokens.append(token)
        state = (K * state + token_number(token)) & MASK
        reading = (reading + (2 * position + 1) * int(content.gain) * state) & MASK
    return tokens


def draw(state: int, reading: int, tag: int, vocabulary: range) -> int:
    """The token after a state; ids of `vocabulary` only."""
    return vocabulary.start + mix(state ^ reading ^ tag) % len(vocabulary)
