"""mlx_lm.server with --kv-cache: it batches, and a text does not depend on other requests."""

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import batch_generate
from mlx_lm.models.cache import LRUPromptCache, make_prompt_cache

import mlx_kvq
from mlx_kvq.caches.attention import BLOCK
from tests.support.float32 import load_float32, prompts, write_float32
from tests.support.server import BIN, REQUESTS, Server, most_at_once, requests

LAYERS = {"tiny-qwen2-8bit": 4, "tiny-gemma3-8bit": 6}
FULL = os.environ.get("MLX_KVQ_FULL", "0") not in ("", "0")


@pytest.fixture(scope="module", params=list(LAYERS)[: 2 if FULL else 1])
def folder(request, tmp_path_factory):
    return write_float32(request.param, tmp_path_factory.mktemp("models"))


# How many of the 64 texts may part: the last bit of a hidden state depends on the batch, and where
# two scales of a group are as good it decides between them (docs/mlx_lm.md). With nothing exact one
# did, under one calibration.
@pytest.mark.parametrize(
    "spec, near_ties",
    [("int4-srft", 0), ("int4-srft:recent=0,first=0", 2)],
    ids=["default", "rows"],
)
def test_a_text_depends_on_its_request_alone(folder, spec, near_ties):
    """Among others and alone; cold, warm, after a prompt that shares a part, after eviction, in
    another process and in another order."""
    everyone = requests(folder)
    with (
        Server(folder, "--kv-cache", spec, "--prompt-cache-size", "64") as server,
        ThreadPoolExecutor(REQUESTS) as pool,
    ):
        together = list(pool.map(server.complete, everyone))
        again = [server.complete(r) for r in everyone]
        log = server.log.read_text()
    with Server(folder, "--kv-cache", spec, "--prompt-cache-size", "3") as server:
        alone = [server.complete(r) for r in reversed(everyone)][::-1]
    texts = [a["text"] for a in alone]
    for answers in (together, again):
        parted = [(a["text"], b) for a, b in zip(answers, texts, strict=True) if a["text"] != b]
        assert len(parted) <= near_ties, parted
    assert len(set(texts)) > REQUESTS // 2
    assert most_at_once(together) > 8 > most_at_once(alone) == 1
    # The second round found its prompts in the prompt cache; with an exact tail from a multiple of
    # BLOCK tokens.
    reused = [a["usage"]["prompt_tokens_details"]["cached_tokens"] for a in again]
    asked = [a["usage"]["prompt_tokens"] for a in again]
    if spec == "int4-srft" and folder.name == "tiny-gemma3-8bit":
        assert max(reused) > BLOCK  # of full windows nothing can be taken back
    elif spec == "int4-srft":
        assert set(reused) >= {0, BLOCK}
        assert all(r >= n - BLOCK - 16 for r, n in zip(reused, asked, strict=True))
    else:
        assert sum(reused) > 0.8 * sum(asked)
    n = LAYERS[folder.name]
    assert f"[mlx_kvq] {spec}: packed {n} of {n} layers" in log
    assert "Traceback" not in log


def test_a_spec_that_the_model_cannot_have_ends_the_server(folder):
    process = subprocess.run(
        [BIN / "mlx_lm.server", "--model", folder, "--port", "0", "--kv-cache",
         "int4-srft:group_size=48"],
        env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert process.returncode == 1
    (line,) = [line for line in process.stderr.splitlines() if "group_size" in line]
    assert line.startswith("[mlx_kvq] error: int4-srft:group_size=48 cannot pack any layer")
    assert "Traceback" not in process.stderr


def test_bytes_of_the_prompt_cache():
    """Bytes per cached token as the server accounts for them: 3.76 times fewer than fp16."""
    model, tokenizer = load_float32("tiny-qwen2-8bit")
    many = prompts(tokenizer, [5, 30])
    sizes = {}
    for spec in ("fp16", "int4-srft:recent=0,first=0", "int4-srft:recent=2,first=1"):
        mlx_kvq.enable(model, spec, verbose=False)
        assert all(hasattr(c, "merge") for c in make_prompt_cache(model))  # or no batching
        caches = batch_generate(
            model, tokenizer, many, max_tokens=2, return_prompt_caches=True
        ).caches
        lru = LRUPromptCache()
        held = 0
        for prompt, cache in zip(many, caches, strict=True):
            lru.insert_cache("model", prompt, cache)
            held += cache[0].offset
        sizes[spec] = lru.nbytes / held / len(model.layers)
    # The model's own cache is fp32 here, and so is what is kept exactly, three tokens for each
    # sequence.
    tail = 2 * 3 * 2 * 512 / held
    assert sizes == {
        "fp16": 2 * 512,
        "int4-srft:recent=0,first=0": 136,
        "int4-srft:recent=2,first=1": pytest.approx(136 + tail),
    }


@pytest.mark.parametrize("spec", ["int4-srft", "k8v4-srft:recent=0,first=0"])
def test_prefix_reuse(spec):
    """LRUPromptCache: a copy of the nearest cache goes on from where the rest of the prompt is read
    as if it were read at once: with an exact tail from a multiple of BLOCK tokens."""
    model, tokenizer = load_float32("tiny-qwen2-8bit")
    mlx_kvq.enable(model, spec, verbose=False)
    (words,) = prompts(tokenizer, [600])
    prompt = words * 2
    other = [*prompt[:700], prompt[700] + 1, *prompt[:20]]
    cache = make_prompt_cache(model)
    logits = model(mx.array([prompt]), cache=cache)
    mx.eval(logits)
    lru = LRUPromptCache()
    lru.insert_cache("model", prompt, cache)
    assert lru.nbytes == sum(c.nbytes for c in cache) > 0

    found, rest = lru.fetch_nearest_cache("model", other)
    at = 700 if "recent=0" in spec else BLOCK
    assert rest == other[at:]
    assert [c.offset for c in found] == [at] * len(cache)
    assert [c.offset for c in cache] == [1200] * len(cache)
    cold = make_prompt_cache(model)
    expected = model(mx.array([other]), cache=cold)[:, at:]
    warm = model(mx.array([rest]), cache=found)
    np.testing.assert_allclose(np.array(warm), np.array(expected), atol=1e-3)

    exact, rest = lru.fetch_nearest_cache("model", prompt)
    assert rest == ([] if "recent=0" in spec else prompt[2 * BLOCK :])
    n = exact[0].offset
    for a, b in zip(exact, cache, strict=True):
        assert a.rows is not b.rows
        # Untouched by what was done to the other copy.
        assert mx.array_equal(a.rows[:, :, :n], b.rows[:, :, :n])
    # What a prompt shares with another one in its first block is read again.
    assert lru.fetch_nearest_cache("model", prompt[:200])[1] == (
        prompt[199:200] if "recent=0" in spec else prompt[:200]
    )
    lru.trim_to(n_bytes=0)
    assert lru.nbytes == len(lru) == 0


def test_prompts_that_outlive_the_server(tmp_path_factory):
    """--prompt-cache-dir: a later server goes on from the files of an earlier one, one with another
    cache leaves them alone."""
    folder = write_float32("tiny-qwen2-8bit", tmp_path_factory.mktemp("models"))
    kept = tmp_path_factory.mktemp("prompts")
    (kept / "notes.txt").write_text("mine")
    long = max((r[0] for r in requests(folder)), key=len)
    options = "--prompt-cache-dir", str(kept), "--kv-cache"
    found = []
    for spec in ("int4-srft", "int4-srft", "int4-srft:recent=0"):
        with Server(folder, *options, spec) as server:
            answer = server.complete((long, 6))
            reused = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
            found.append((answer["text"], reused, server.log.read_text()))
    (first, none, _), (again, some, log), (_, nothing, other) = found
    assert again == first and some >= BLOCK and none == nothing == 0
    assert "are of another model or cache: not used" in other and "not used" not in log
    assert (kept / "notes.txt").read_text() == "mine"
    assert len(list(kept.glob("mlx_kvq-*.safetensors"))) == 2


def test_a_folder_that_cannot_be_made_ends_the_server(folder, tmp_path):
    (tmp_path / "file").write_text("")
    process = subprocess.run(
        [BIN / "mlx_lm.server", "--model", folder, "--port", "0", "--prompt-cache-dir",
         tmp_path / "file"],
        env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert process.returncode == 1
    assert "[mlx_kvq] error: --prompt-cache-dir" in process.stderr
    assert "Traceback" not in process.stderr
