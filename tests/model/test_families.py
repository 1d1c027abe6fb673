"""Every family of mlx-lm runs on packed caches, or says why not."""

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache

import mlx_kvq
from mlx_kvq.calibration import automatic
from mlx_kvq.model import bits as budgets
from tests.support import coverage
from tests.support.families import _module, build, error, examine, families, logits
from tests.support.family_settings import INEXACT, NO_BATCH, NOT_TRIED, REFUSED

PACKED = [name for name in families() if name not in {*NOT_TRIED, *REFUSED}]


def test_there_are_many():
    assert len(PACKED) >= 90
    named = (
        "llama mixtral qwen2 qwen3 qwen3_moe gemma2 gemma3 gemma4 phi3 olmo2 granite glm4 cohere"
    )
    assert {*named.split(), "gpt_oss", "mistral3", "ministral3", "cohere2"} <= set(PACKED)


@pytest.mark.parametrize("name", PACKED)
def test_runs_packed(name):
    """int8 is close to the model's own cache, int4 close too, and not the same; a sequence in a
    batch gets the logits it gets alone; all as docs/coverage.md says."""
    found = examine(name)
    bound = {"int8": 0.015, "int4": 0.2} | INEXACT.get(name, {})
    assert 0 < found.errors["int8"] < bound["int8"]
    assert found.errors["int8"] < found.errors["int4"] < bound["int4"]
    assert bool(found.batch) == (name in NO_BATCH)
    documents(name, found)


@pytest.mark.parametrize("name", REFUSED)
def test_says_why_not(name):
    found = examine(name)
    assert REFUSED[name] in found.refusal
    documents(name, found)


def documents(name, found):
    """The row in docs/coverage.md, but for the two errors, which depend on the machine."""
    row, made = coverage.documented()[name], coverage.cells(name, found)
    assert row[:3] + row[5:] == made[:3] + made[5:], "run python -m tests.support.coverage"


def test_the_table_names_every_family():
    rows = coverage.documented()
    assert set(rows) == {*families(), *NOT_TRIED}
    for name, reason in NOT_TRIED.items():
        assert rows[name][1:] == ["not tried", "–", "–", "–", "–", reason]


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


@pytest.mark.parametrize("name", ["gpt_oss", "gpt2", "qwen3_next", "gemma3n", "iquestloopcoder"])
def test_a_budget(name, monkeypatch):
    """Sinks, hybrid layers, keys that several layers read, and a cache that is named where another
    one's keys are read."""
    for where, least in ((budgets, "TOKENS"), (budgets, "WINDOW"), (automatic, "RANDOM_TOKENS")):
        monkeypatch.setattr(where, least, 64)
    report = mlx_kvq.enable(build(name), "int4:budget=8,calibrate=off", verbose=False)
    assert max(fmt.layout.k_bits for fmt in report.packed.values()) == 8
    assert report.bits_per_value <= 8


@pytest.mark.parametrize("name", ["gpt2", "gpt_bigcode", "gpt_oss"])
def test_random_tokens_have_an_embedding(name):
    """Not those of 512 positions, where there are 160 tokens: MLX reads past the end."""
    assert automatic.vocabulary(build(name)) == 160


def test_sinks_are_attended_to():
    """They move the logits, and as far as they do with the model's own cache."""
    model = build("gpt_oss")
    found = {}
    for spec in ("fp16", "int8-srft:calibrate=off"):
        mlx_kvq.enable(model, spec, verbose=False)
        for sink in (2.0, -100.0):
            for layer in model.layers:
                layer.self_attn.sinks = mx.full(layer.self_attn.sinks.shape, sink)
            found[spec, sink] = logits(model, make_prompt_cache(model))
    own, packed = (
        error(found[spec, -100.0], found[spec, 2.0]) for spec in ("fp16", "int8-srft:calibrate=off")
    )
    assert packed > 0.1
    assert abs(packed / own - 1) < 0.03


@pytest.mark.parametrize(
    "name, batches", [("gemma2", False), ("gpt_bigcode", False), ("qwen2", True)]
)
def test_a_model_that_fails_in_a_batch_answers_one_at_a_time(name, batches, capsys):
    """mlx-lm's server batches if every cache has ``merge``."""
    model = build(name)
    mlx_kvq.enable(model, "int4-srft:calibrate=off")
    assert all(hasattr(c, "merge") == batches for c in make_prompt_cache(model))
    line = "not in batches, where the model itself raises ValueError"
    assert (line in capsys.readouterr().err) != batches
