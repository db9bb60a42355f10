"""A connector that tells the router nothing: KV by files in a folder that both workers see."""

import json

from seeded_prompts import seeded_prompts
from streams import MARGIN, ask_all, first_difference
from workers import two_workers

TOKENS = 8


async def test_prompts_are_handed_over_by_files(tmp_path, folder, reference) -> None:
    shared = tmp_path / "kv"
    shared.mkdir()
    config = {
        "kv_connector": "ExampleConnector",
        "kv_connector_extra_config": {"shared_storage_path": str(shared)},
    }
    prompts = seeded_prompts(folder, 4, 40, 120)
    # It writes what one step computed of a prompt, and dies of less than all of it.
    whole = {"max_num_batched_tokens": "512", "max_num_seqs": "1"}
    with two_workers(
        tmp_path / "cluster", kv_transfer_config=json.dumps(config), **whole
    ) as cluster:
        # The files' names go by tokens alone, not by salts.
        results = await ask_all(cluster.endpoints[0], prompts, TOKENS, "files", sampled=False)
        cluster.wait_empty("p", "d")
    assert any(shared.rglob("*.safetensors"))
    for prompt, result in zip(prompts, results, strict=True):
        expected, _ = reference.expected(prompt, TOKENS)
        index = first_difference(expected.ids, result.token_ids)
        assert index is None or expected.margins[index] < MARGIN
        assert result.usage.attempts == 1
