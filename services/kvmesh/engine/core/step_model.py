"""Predicted step times: t = a + b n + c sum(n context) + d B + e sum(context).

Source: SCHEDULING 3. All coefficients are milliseconds and not negative.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvmesh.v1 import worker_pb2 as wire

# The chunk at which the constant part of a step is this share of the whole.
_SATURATION = 1 / 16
_SMALLEST_SATURATING, _LARGEST_SATURATING = 128, 2048
LAYER_TARGET_MS = 15.0
"""Longest layer of the largest chunk, at an empty context: a prompt that is more
urgent waits for one. Deep in a long prompt a layer takes some times as long."""


@dataclass(slots=True)
class StepLoad:
    """What a step has to do: the regressors of the model."""

    prefill_tokens: int = 0
    prefill_context: int = 0
    """Sum over prefill tokens of their context lengths."""
    decode_batch: int = 0
    decode_context: int = 0
    """Sum of the context lengths of decoding requests."""

    def add_chunk(self, start: int, tokens: int) -> None:
        """Adds `tokens` prefill tokens from position `start` on."""
        self.prefill_tokens += tokens
        self.prefill_context += chunk_context(start, tokens)

    def row(self) -> tuple[float, float, float, float, float]:
        """The regressors, in the order of the coefficients."""
        return (
            1.0,
            float(self.prefill_tokens),
            float(self.prefill_context),
            float(self.decode_batch),
            float(self.decode_context),
        )


def gap_target_ms(itl_ms: float, step_ms: float) -> float:
    """Longest time between tokens that streams are held to, milliseconds: their strictest target
    (0: none has one), but never less than one and a half of their own steps."""
    return max(itl_ms or math.inf, 1.5 * step_ms)


def chunk_context(start: int, tokens: int) -> int:
    """Sum of the context lengths of `tokens` tokens from `start` on."""
    return tokens * start + tokens * (tokens + 1) // 2


def predict_ms(model: wire.StepModel, load: StepLoad) -> float:
    """Predicted time of a step, milliseconds."""
    return float(
        model.a_ms
        + model.b_ms * load.prefill_tokens
        + model.c_ms * load.prefill_context
        + model.d_ms * load.decode_batch
        + model.e_ms * load.decode_context
    )


class Pace:
    """By how much steps take longer now than the model, fitted at warm-up, says.

    Other work on the machine's cores makes every step longer; a step that is much
    older than was told looks stuck to routers.
    """

    __slots__ = ("_ratio",)

    WEIGHT = 0.25
    """Of the last step."""
    MOST = 8.0
    """One step counts at most as so many times longer."""

    def __init__(self) -> None:
        self._ratio = 1.0

    def told_ms(self, predicted_ms: float) -> float:
        """What to tell of a step that the model predicts so; never less."""
        return predicted_ms * max(1.0, self._ratio)

    def took(self, predicted_ms: float, took_ms: float) -> None:
        """A step that the model predicted so took so long, milliseconds."""
        if predicted_ms > 0.0:
            ratio = min(took_ms / predicted_ms, self.MOST)
            self._ratio += self.WEIGHT * (ratio - self._ratio)


def tokens_within(model: wire.StepModel, budget_ms: float, start: int, most: int) -> int:
    """Most prefill tokens from `start` on whose marginal time fits a budget.

    Solves b n + c (n start + n(n+1)/2) <= budget for n. 0 where none fits.
    """
    if budget_ms <= 0:
        return 0
    linear = model.b_ms + model.c_ms * (start + 0.5)
    root = math.sqrt(linear * linear + 2 * model.c_ms * budget_ms)
    # Written so that a c near zero loses no digits.
    return most if linear + root <= 0 else int(min(most, 2 * budget_ms / (linear + root)))


def fit(loads: Sequence[StepLoad], measured_ms: Sequence[float]) -> wire.StepModel:
    """Non-negative least squares, relative errors weighed equally.

    Five coefficients leave 32 sets of those that are not zero: all are tried.
    """
    design = np.array([load.row() for load in loads])
    times = np.array(measured_ms)
    weights = 1 / np.maximum(times, 1e-6)
    design, target = design * weights[:, None], times * weights
    best = _fit_some(design, target, range(5))
    for size in range(5):
        for kept in itertools.combinations(range(5), size):
            candidate = _fit_some(design, target, kept)
            if candidate[0] < best[0]:
                best = candidate
    a, b, c, d, e = (float(value) for value in best[1])
    saturating = a / b / _SATURATION if b > 0 else _LARGEST_SATURATING
    return wire.StepModel(
        a_ms=a,
        b_ms=b,
        c_ms=c,
        d_ms=d,
        e_ms=e,
        relative_error=float(math.sqrt(best[0] / max(1, len(loads)))),
        saturating_chunk=int(min(_LARGEST_SATURATING, max(_SMALLEST_SATURATING, saturating))),
    )


def bound_layers(model: wire.StepModel, layers: int) -> None:
    """Takes off the saturating chunk what would make its layers longer than the target.

    Larger ones are not quicker on a CPU, whose caches they outgrow: of 5,000 tokens on one core
    chunks of 256 take 20.5 s, of 688 21.7 s with layers of 186 ms, and a decode worker on the core
    beside it feels them (p95 of its steps 80 and 105 ms).
    """
    if model.b_ms > 0:
        fitting = int(LAYER_TARGET_MS * max(1, layers) / model.b_ms)
        model.saturating_chunk = max(_SMALLEST_SATURATING, min(model.saturating_chunk, fitting))


def _fit_some(
    design: npt.NDArray[np.float64], target: npt.NDArray[np.float64], kept: Sequence[int]
) -> tuple[float, npt.NDArray[np.float64]]:
    """Squared error and coefficients using only some columns; inf where one is negative."""
    coefficients = np.zeros(5)
    columns = list(kept)
    if columns:
        scale = np.maximum(np.abs(design[:, columns]).max(axis=0), 1e-300)
        solved, *_ = np.linalg.lstsq(design[:, columns] / scale, target, rcond=None)
        coefficients[columns] = solved / scale
    if (coefficients < 0).any():
        return math.inf, np.zeros(5)
    return float(((design @ coefficients - target) ** 2).sum()), coefficients
