"""Every option of a spec comes back from a file: a saved cache goes on as if never saved."""

import copy

import mlx.core as mx
import pytest
from mlx_lm.models import cache as stock

import mlx_kvq
from mlx_kvq import ops
from mlx_kvq.caches import prompt_file
from mlx_kvq.format import spec
from tests.support.float32 import load_float32, prompts

# Each option at a value that is not its default.
OPTIONS = {
    "group_size": "int4-srft:group_size=32,calibrate=off",
    "seed": "int4-srft:seed=3,calibrate=off",
    "scale": "int4-srft:scale=absmax,calibrate=off",
    "calibrate": "int4-srft",  # which is the default, and `off` is in every other row
    "skip": "int4-srft:skip=first,calibrate=off",
    "high": "int4-srft:high=last,calibrate=off",
    "budget": "int4-srft:budget=6,calibrate=off",
    "rounding": "int4-srft:rounding=feedback",
    "recent": "int4-srft:recent=3,calibrate=off",
    "first": "int4-srft:first=9,calibrate=off",
}
BASE = {False: "int4-srft:calibrate=off", True: "int4-srft"}


@pytest.fixture(scope="module")
def qwen():
    return load_float32("tiny-qwen2-8bit")


def go_on(model, caches):
    """Logits of a chunk and of tokens one by one, as many as it takes to write rows."""
    steps = [list(range(40, 60)), *([i] for i in range(20))]
    return mx.concatenate([model(mx.array([t]), cache=caches)[0] for t in steps])


def bytes_of(caches):
    return [c.rows if hasattr(c, "rows") else c.keys for c in caches]


def test_every_option_is_here():
    assert set(OPTIONS) == set(spec.OPTIONS)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("enabled", [True, False], ids=["enabled", "not enabled"])
def test_a_saved_cache_goes_on_as_if_never_saved(qwen, tmp_path, option, enabled):
    model, tokenizer = qwen
    mlx_kvq.enable(model, OPTIONS[option], verbose=False)
    try:
        caches = stock.make_prompt_cache(model)
        model(mx.array(prompts(tokenizer, [30])), cache=caches)
        mx.eval([c.state for c in caches])
        never = copy.deepcopy(caches)
        stock.save_prompt_cache(str(tmp_path / "a.safetensors"), caches)
        if not enabled:
            mlx_kvq.disable(model)
        again = stock.load_prompt_cache(str(tmp_path / "a.safetensors"))
        prompt_file.check(again, model)
        assert mx.array_equal(go_on(model, never), go_on(model, again))
        for a, b in zip(bytes_of(never), bytes_of(again), strict=True):
            assert mx.array_equal(a, b)
    finally:
        mlx_kvq.disable(model)


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_changes_something(qwen, option):
    """Else the test above would show nothing of it."""
    model, tokenizer = qwen
    tokens = mx.array(prompts(tokenizer, [150]))  # more than are kept exactly
    logits = []
    uncalibrated = "calibrate=off" in OPTIONS[option]
    base = BASE[not uncalibrated] if option != "calibrate" else BASE[False]
    for text in (base, OPTIONS[option]):
        caches = mlx_kvq.make_prompt_cache(model, text)  # as the test above, without a tokenizer
        model(tokens, cache=caches)
        logits.append(go_on(model, caches))
    assert not mx.array_equal(*logits)


def test_the_metric_comes_back(qwen, tmp_path):
    """With the rounding; version 0.1.0 wrote neither and goes on with the nearest level."""
    model, _ = qwen
    caches: list = mlx_kvq.make_prompt_cache(model, "int4-srft:rounding=feedback")
    signature, arrays = caches[0].format.signature, caches[0].format.arrays
    assert ";rounding=feedback;" in signature
    metric = arrays[6]
    assert metric.shape == (1, 128, 128)
    with pytest.raises(ValueError, match="calibration does not belong to its signature"):
        mlx_kvq.format.format.parse_signature(signature, arrays[:6])
    again = mlx_kvq.format.format.parse_signature(signature, arrays)
    assert mx.array_equal(again.feedback, caches[0].format.feedback)
    assert mx.array_equal(again.arrays[1], arrays[1])  # σ, which feedback changes, once
    k, v = mx.random.normal((2, 1, 1, 5, 128))
    rows = [ops.quantize_pack(k, v, f)[0] for f in (again, caches[0].format)]
    assert mx.array_equal(*rows)
