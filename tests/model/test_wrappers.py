"""A language model inside a vision one, as Gemma 3 comes: text works as it does without."""

import json

import mlx.core as mx
import pytest
from mlx_lm import batch_generate, load, stream_generate
from mlx_lm.models.cache import make_prompt_cache

import mlx_kvq
from mlx_kvq.caches.prompt_file import check
from mlx_kvq.measure.baselines import candidate
from mlx_kvq.stock import factory_of
from tests.support.families import build
from tests.support.float32 import load_float32, prompts, write_float32


@pytest.fixture(scope="module")
def wrapped(tmp_path_factory):
    """tiny-gemma3 as ``language_model`` of a gemma3 repository, beside a vision tower."""
    folder = write_float32("tiny-gemma3-8bit", tmp_path_factory.mktemp("models"))
    text = json.loads((folder / "config.json").read_text())
    config = {
        "model_type": "gemma3",
        "vocab_size": text["vocab_size"],
        "text_config": text,
        "vision_config": {"hidden_size": 64},
    } | {k: text[k] for k in ("quantization", "quantization_config", "eos_token_id")}
    (folder / "config.json").write_text(json.dumps(config))
    weights = mx.load(str(folder / "model.safetensors"))
    weights = {f"language_model.{name}": w for name, w in weights.items()}
    weights["vision_tower.embeddings.weight"] = mx.zeros((4, 4))
    mx.eval(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    model, tokenizer = load(str(folder))
    assert type(model).__module__ == "mlx_lm.models.gemma3"
    return model, tokenizer


def test_the_text_is_that_of_the_inner_model(wrapped):
    inner, tokenizer = load_float32("tiny-gemma3-8bit")
    (prompt,) = prompts(tokenizer, [250])  # past the window of 256 within a few tokens
    found = []
    for model in (wrapped[0], inner):
        report = mlx_kvq.enable(model, "int4-srft:calibrate=off", verbose=False)
        assert len(report.packed) == 6
        assert {type(c).__name__ for c in make_prompt_cache(model)} == {
            "PackedRotatingKVCache",
            "PackedKVCache",
        }
        steps = stream_generate(model, tokenizer, prompt, max_tokens=16)
        found.append([s.token for s in steps])
    assert found[0] == found[1]


def test_in_a_batch(wrapped):
    model, tokenizer = wrapped
    mlx_kvq.enable(model, "int4-srft:calibrate=off", verbose=False)
    many = prompts(tokenizer, [5, 40])
    found = batch_generate(model, tokenizer, many, max_tokens=8, return_token_ids=True).token_ids
    for prompt, tokens in zip(many, found, strict=True):
        alone = stream_generate(model, tokenizer, prompt, max_tokens=8)
        assert [s.token for s in alone] == tokens


def test_a_candidate_leaves_both_halves_as_they_were(wrapped):
    model, _ = wrapped
    mlx_kvq.disable(model)
    candidate(model, "int4-srft:calibrate=off")
    assert factory_of(model) is None


def kinds(model, *size):
    return {type(c).__name__.removeprefix("Packed") for c in make_prompt_cache(model, *size)}


def packed(model):
    return all(type(c).__name__.startswith("Packed") for c in make_prompt_cache(model))


@pytest.mark.parametrize("name", ["gemma3", "mistral3", "pixtral", "qwen2_vl"])
def test_both_halves_are_enabled_by_either(name):
    """The wrapper, the language model in it, and the stack of layers in that."""
    model = build(name)
    inner = model.language_model
    halves = (model, inner, inner.model)
    own = [kinds(half) for half in halves[:2]]
    for enabled in halves[:2]:
        for disabled in halves:
            mlx_kvq.enable(enabled, "int4-srft:calibrate=off", verbose=False)
            assert all(packed(half) for half in halves)
            bounded = {c.max_size for half in halves for c in make_prompt_cache(half, 3)}
            assert 3 in bounded
            assert len({c.model for half in halves for c in make_prompt_cache(half)}) == 1
            for half in halves[:2]:
                check(make_prompt_cache(half), half)  # either takes the other's
            mlx_kvq.disable(disabled)
            assert not any(packed(half) for half in halves)
            assert [kinds(half) for half in halves[:2]] == own


def test_one_half_after_the_other():
    model = build("gemma3")
    mlx_kvq.enable(model.language_model, "int4-srft:calibrate=off", verbose=False)
    for half, spec in ((model, "int8-srft:calibrate=off"), (model.language_model, "int4-none")):
        mlx_kvq.enable(half, spec, verbose=False)
        for one in (model, model.language_model):
            assert {str(c.format.spec) for c in make_prompt_cache(one)} == {spec}
