"""Plain gRPC clients of vLLM's two APIs, made from what reflection tells."""

import hashlib
import io
import json
import zipfile

import grpc
import pytest
from figures import wait_figures
from front import ENGINE, MODEL, Stubs
from google.protobuf.message_factory import GetMessageClass

import kvmesh

PROMPT = "The capital of France is"


def generate(engine, **more):
    params = more.pop("sampling_params", {})
    return engine.call(
        "Generate",
        engine.message(
            "GenerateRequest",
            request_id="mine",
            text=PROMPT,
            sampling_params=engine.message(
                "SamplingParams", temperature=0, **{"max_tokens": 8, **params}
            ),
            **more,
        ),
    )


def test_the_engine_brings_the_token_ids_of_our_own_api(engine, behind):
    with kvmesh.Client(behind[1]) as client:
        result = client.complete(prompt=PROMPT, max_tokens=8, temperature=0)
    (whole,) = generate(engine)
    assert list(whole.complete.output_ids) == list(result.token_ids)
    parts = list(generate(engine, stream=True))
    ids = [id for part in parts if part.HasField("chunk") for id in part.chunk.token_ids]
    assert ids == list(result.token_ids)
    assert parts[-1].complete.finish_reason == "length"


def test_an_aborted_request_ends_and_leaves_nothing(engine, behind):
    cluster, target = behind
    answer = generate(
        engine, stream=True, sampling_params={"max_tokens": 2_000, "ignore_eos": True}
    )
    assert next(answer).HasField("chunk")
    engine.call("Abort", engine.message("AbortRequest", request_ids=["mine"]))
    *_, last = answer
    assert last.complete.finish_reason == "abort"
    assert 0 < last.complete.completion_tokens < 2_000
    wait_figures(cluster, target, {"open_streams": 0, "open_attempts": 0})


def test_the_tokeniser_is_the_models(engine):
    from tokenizers import Tokenizer

    empty = engine.service.methods_by_name["GetTokenizer"].input_type
    parts = list(engine.call("GetTokenizer", GetMessageClass(empty)()))
    data = b"".join(part.data for part in parts)
    assert hashlib.sha256(data).hexdigest() == parts[-1].sha256
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
        tokenizer = Tokenizer.from_str(archive.read("tokenizer.json").decode())
        json.loads(archive.read("tokenizer_config.json"))
    (whole,) = generate(engine)
    assert whole.complete.prompt_tokens == len(tokenizer.encode(PROMPT).ids)


def test_what_is_told_of_the_model_is_what_the_workers_say(engine):
    info = engine.call("GetModelInfo", engine.message("GetModelInfoRequest"))
    assert info.served_model_name == MODEL
    assert (info.max_context_length, info.vocab_size) == (8_192, 49_152)
    assert engine.call("HealthCheck", engine.message("HealthCheckRequest")).healthy
    (load,) = engine.call("GetLoads", engine.message("GetLoadsRequest")).loads
    assert load.max_total_num_tokens > 0


def test_vllms_own_api_says_the_same(behind):
    inference = Stubs(behind[1], "vllm.Inference")
    control = Stubs(behind[1], "vllm.Control")
    try:
        request = inference.message("GenerateRequest", text=PROMPT)
        request.stopping.max_new_tokens = 8
        request.response.output_token_ids = True
        whole = inference.call("Generate", request)
        assert "Paris" in whole.outputs.text
        assert whole.outputs.finish_info.num_output_tokens == 8
        first, *others = inference.call("GenerateStream", request)
        assert first.prompt_info.num_prompt_tokens == whole.prompt_info.num_prompt_tokens
        assert "".join(part.outputs.text for part in others) == whole.outputs.text
        info = control.call("GetModelInfo", control.message("GetModelInfoRequest"))
        assert info.served_model_name == MODEL
        request.model = "unknown"
        with pytest.raises(grpc.RpcError) as told:
            inference.call("Generate", request)
        assert told.value.code() == grpc.StatusCode.NOT_FOUND
    finally:
        inference.close()
        control.close()


def test_other_services_of_this_name_are_not_there(engine):
    assert engine.service.full_name == ENGINE
    with pytest.raises(grpc.RpcError) as told:
        engine.call("Embed", engine.message("EmbedRequest"))
    assert told.value.code() == grpc.StatusCode.UNIMPLEMENTED
    assert "Embed" in told.value.details()
