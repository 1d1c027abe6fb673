"""Every family of mlx-lm runs on packed caches, or says why not."""

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache

import mlx_kvq
from tests.families import LAYERS, _module, build, error, families, logits
from tests.family_settings import NOT_TRIED, REFUSED

PACKED = [name for name in families() if name not in {*NOT_TRIED, *REFUSED}]
HYBRIDS = {
    "bailing_moe_linear", "granitemoehybrid", "jamba", "lfm2", "lfm2-vl", "lfm2_moe", "llama4",
    "nemotron_h", "olmo_hybrid", "plamo2", "qwen3_5", "qwen3_5_moe", "qwen3_next",
    "recurrent_gemma",
}  # fmt: skip


def test_there_are_many():
    assert len(PACKED) >= 90
    named = (
        "llama mixtral qwen2 qwen3 qwen3_moe gemma2 gemma3 gemma4 phi3 olmo2 granite glm4 cohere"
    )
    assert {*named.split(), "gpt_oss", "mistral3", "ministral3", "cohere2"} <= set(PACKED)


@pytest.mark.parametrize("name", PACKED)
def test_runs_packed(name):
    """int8 is close to the model's own cache, int4 close too, and not the same."""
    model = build(name)
    own = make_prompt_cache(model)
    expected = logits(model, own)
    errors = {}
    for bits in ("int8", "int4"):
        report = mlx_kvq.enable(model, f"{bits}-srft:calibrate=off", verbose=False)
        caches = make_prompt_cache(model)
        errors[bits] = error(logits(model, caches), expected)
    assert 0 < errors["int8"] < 0.03
    assert errors["int8"] < errors["int4"] < 0.4
    assert report.packed
    if name not in HYBRIDS:
        assert not report.left
    for layer, cache in enumerate(caches):
        kind = type(cache).__name__
        if layer in report.left:
            assert kind == type(own[layer]).__name__ in report.left[layer]
        elif kind != "CacheList":
            assert kind == "Packed" + type(own[layer]).__name__


@pytest.mark.parametrize("name", REFUSED)
def test_says_why_not(name):
    model = build(name)
    with pytest.raises(ValueError, match=f"cannot pack any layer of this model: .*{REFUSED[name]}"):
        mlx_kvq.enable(model, "int4-srft:calibrate=off")
    assert len(make_prompt_cache(model)) >= LAYERS  # still its own
    assert not any("Packed" in type(c).__name__ for c in make_prompt_cache(model))


def test_all_others_are_named():
    unknown = {n for n in NOT_TRIED if _module(n) is None} - {"olmo"}
    assert not unknown


@pytest.mark.parametrize("name", ["gpt_oss", "gemma2", "qwen3_next", "mimo_v2_flash", "gemma3n"])
@pytest.mark.parametrize("spec", ["int8-srft"])
def test_calibrated(name, spec, tmp_path, monkeypatch):
    """Sinks, own attention functions, hybrid layers and shared keys under a calibration."""
    monkeypatch.setenv("MLX_KVQ_CACHE", str(tmp_path))
    model = build(name)
    expected = logits(model, make_prompt_cache(model))
    mlx_kvq.enable(model, spec, verbose=False)
    assert error(logits(model, make_prompt_cache(model)), expected) < 0.02


def test_sinks_are_attended_to():
    """Without them the logits are others, so they do reach the packed attention."""
    model = build("gpt_oss")
    mlx_kvq.enable(model, "int8-srft:calibrate=off", verbose=False)
    with_sinks = logits(model, make_prompt_cache(model))
    for layer in model.layers:
        layer.self_attn.sinks = mx.full(layer.self_attn.sinks.shape, -100.0)
    without = logits(model, make_prompt_cache(model))
    assert error(without, with_sinks) > 0.02


@pytest.mark.parametrize("name", ["gemma3", "gpt_oss", "gemma4", "qwen3_next"])
def test_in_a_batch(name):
    """Two sequences of different lengths, merged: each as it is alone."""
    model = build(name)
    mlx_kvq.enable(model, "int4-srft:calibrate=off", verbose=False)
    ids = mx.random.randint(0, 160, (2, 30), key=mx.random.key(1))
    singles = []
    for row, n in ((0, 30), (1, 11)):
        caches = make_prompt_cache(model)
        model(ids[row : row + 1, :n], cache=caches)
        singles.append(caches)
    batch = [a.merge([a, b]) for a, b in zip(*singles, strict=True)]
    for step in range(3):
        token = mx.array([[step + 1], [step + 50]])
        together = model(token, cache=batch)
        alone = [model(token[i : i + 1], cache=c) for i, c in enumerate(singles)]
        assert mx.allclose(together, mx.concatenate(alone), atol=2e-2)
