"""Predicted times and the chunks that follow from them."""

from hypothesis import given
from hypothesis import strategies as st

from kvmesh.engine.core.step_model import (
    LAYER_TARGET_MS,
    StepLoad,
    bound_layers,
    chunk_context,
    fit,
    predict_ms,
    tokens_within,
)
from kvmesh.v1 import worker_pb2 as wire

coefficients = st.floats(0, 10)
models = st.builds(
    wire.StepModel, a_ms=coefficients, b_ms=coefficients, c_ms=st.floats(0, 0.01),
    d_ms=coefficients, e_ms=st.floats(0, 0.1),
)  # fmt: skip


@given(models, st.floats(0, 1e4), st.integers(0, 10_000), st.integers(0, 5000))
def test_chunks_fit_their_budget_and_are_not_smaller_than_they_could_be(
    model, budget, start, most
) -> None:
    def marginal(tokens):
        return model.b_ms * tokens + model.c_ms * chunk_context(start, tokens)

    tokens = tokens_within(model, budget, start, most)
    assert 0 <= tokens <= most
    assert tokens == 0 or marginal(tokens) <= budget * (1 + 1e-6) + 1e-6
    assert tokens == most or marginal(tokens + 1) >= budget * (1 - 1e-6) - 1e-6


@given(models)
def test_the_fit_finds_a_model_again(model) -> None:
    loads = []
    for start in (0, 512):
        for tokens in (32, 128):
            load = StepLoad()
            load.add_chunk(start, tokens)
            loads.append(load)
        for rows in (1, 8):
            loads.append(StepLoad(decode_batch=rows, decode_context=rows * (start + 1)))
    times = [predict_ms(model, load) + 1e-3 for load in loads]
    fitted = fit(loads, times)
    for load, time in zip(loads, times, strict=True):
        assert abs(predict_ms(fitted, load) - time) <= 0.02 * time
    assert min(fitted.a_ms, fitted.b_ms, fitted.c_ms, fitted.d_ms, fitted.e_ms) >= 0


def test_noise_gives_no_negative_coefficient() -> None:
    loads = [StepLoad(decode_batch=1, decode_context=1), StepLoad(decode_batch=8, decode_context=8)]
    fitted = fit(loads, [10.0, 5.0])
    assert min(fitted.a_ms, fitted.d_ms, fitted.e_ms) >= 0


@given(st.floats(0, 10), st.integers(1, 200), st.integers(128, 2048))
def test_a_chunk_is_bounded_by_the_time_of_its_layers(b_ms, layers, saturating) -> None:
    model = wire.StepModel(b_ms=b_ms, saturating_chunk=saturating)
    bound_layers(model, layers)
    chunk = model.saturating_chunk
    assert 128 <= chunk <= saturating
    # The least chunk stands whatever its layers take: smaller ones waste the device.
    assert chunk == 128 or chunk * b_ms / layers <= LAYER_TARGET_MS * (1 + 1e-6)
    assert chunk == saturating or (chunk + 1) * b_ms / layers >= LAYER_TARGET_MS * (1 - 1e-6)
