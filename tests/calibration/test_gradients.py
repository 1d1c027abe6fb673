"""What errors of keys and values cost, by gradients: beside float64, and beside KL itself."""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm import load

import mlx_kvq
from mlx_kvq.calibration import shards
from mlx_kvq.calibration.exact import attended
from mlx_kvq.calibration.gradients import _Nudged, attention_over, gradients
from mlx_kvq.format.format import make_format
from mlx_kvq.format.spec import Spec
from mlx_kvq.measure.quality import kl
from mlx_kvq.model import bits
from mlx_kvq.plugin.loading import Loaded
from mlx_kvq.stock import map_leaves, own_caches, packable

L, RECENT = 40, 7


def normal(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape)


def oracle(q, k, v, dk, dv, recent, scale, seen, sinks):
    """Query by query in float64."""
    out = np.empty((*q.shape[:3], v.shape[3]))
    for b, h, i in np.ndindex(q.shape[:3]):
        g = h * k.shape[1] // q.shape[1]
        far = (i - np.arange(L) >= recent)[:, None]
        keys, values = k[b, g] + far * dk[b, g], v[b, g] + far * dv[b, g]
        logits = np.where(seen[b, h, i], keys @ q[b, h, i] * scale, -np.inf)
        if sinks is not None:
            logits = np.append(logits, sinks[h])
        p = np.exp(logits - logits.max())
        out[b, h, i] = (p / p.sum())[:L] @ values
    return out


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("mask", ["causal", "window", "additive", "heads"])
def test_attention_with_errors_of_what_is_far(mask, sinks):
    B, Hq, Hkv, D, Dv = 2, 6, 2, 8, 4
    q, k, dk = normal(B, Hq, L, D), normal(B, Hkv, L, D), normal(B, Hkv, L, D) + 1
    v, dv = normal(B, Hkv, L, Dv), normal(B, Hkv, L, Dv) - 1
    ages = np.arange(L)[:, None] - np.arange(L)
    seen = np.broadcast_to((ages >= 0) & (ages < (20 if mask == "window" else L)), (B, Hq, L, L))
    if mask == "heads":  # each sequence and head its own, the diagonal always
        seen = seen & ((normal(B, Hq, L, L) > 0) | (ages == 0))
    given = {
        "causal": "causal",
        "window": mx.array(seen[0, 0]),
        "additive": mx.array(np.where(seen[:1, :1], 0.0, -1e9)).astype(mx.float32),
        "heads": mx.array(seen),
    }[mask]
    logits = normal(Hq) if sinks else None
    arrays = [mx.array(x).astype(mx.float32) for x in (q, k, v, dk, dv)]
    got = attention_over(
        *arrays, RECENT, 0.4, given, None if logits is None else mx.array(logits).astype(mx.float32)
    )
    want = oracle(q, k, v, dk, dv, RECENT, 0.4, seen, logits)
    assert np.abs(np.array(got) - want).max() < 1e-5
    assert np.abs(want - oracle(q, k, v, 0 * dk, 0 * dv, RECENT, 0.4, seen, logits)).max() > 0.1


@pytest.fixture(scope="module")
def tiny():
    model, tokenizer, *_ = load("examples/models/tiny-gemma3-8bit")
    model.set_dtype(mx.float32)
    text = Path("examples/text/novel.txt").read_text(encoding="utf-8")
    return model, mx.array(tokenizer.encode(text)[:96])


def test_the_cost_of_errors_is_their_kl(tiny):
    """Random errors in one layer's keys, or values, of what is further back than 16 tokens: half
    the mean square of error times gradient is the KL that they cause."""
    model, tokens = tiny
    make, shapes = packable(model)
    found = [gradients(model, make, shapes, tokens, 16, seed=i) for i in range(4)]

    def log_probabilities(errors):
        def tap(path, cache):
            given = errors.get(path, [mx.zeros((1, 1, tokens.size, 256))] * 2)
            return _Nudged(given, 16, getattr(cache, "max_size", None))

        with attended():
            return nn.log_softmax(model(tokens[None], cache=map_leaves(tap, own_caches(model)))[0])

    exact, ratios = log_probabilities({}), []
    for path in list(shapes)[1::2]:  # with a window and without
        for side in range(2):
            seen = found[0][path]
            x = (seen.keys, seen.values)[side]
            size = 0.2 * mx.sqrt(mx.square(x).mean(axis=2, keepdims=True))
            e = mx.random.normal(x.shape, key=mx.random.key(side)) * size
            pair = [e, mx.zeros_like(seen.values)] if side == 0 else [mx.zeros_like(seen.keys), e]
            real = kl(exact, log_probabilities({path: pair})).mean().item()
            by = [(g[path].of_keys, g[path].of_values)[side] for g in found]
            said = np.mean([mx.square((e * g).sum(-1)).sum().item() for g in by]) / 2 / tokens.size
            assert 0.4 < said / real < 2.5, (path, side, said, real)
            ratios.append(said / real)
    assert 0.65 < np.exp(np.mean(np.log(ratios))) < 1.45, ratios


def test_what_a_query_reads_exactly_costs_nothing(tiny):
    """With as many exact tokens as there are, no error is read; without the last of them, that of
    one key alone is."""
    model, tokens = tiny
    make, shapes = packable(model)
    none = gradients(model, make, shapes, tokens[:24], 24)
    one = gradients(model, make, shapes, tokens[:24], 23)
    for path in shapes:
        assert not mx.any(none[path].of_values != 0)
        changed = mx.any(one[path].of_values != 0, axis=(0, 1, 3)).tolist()
        assert not any(changed[1:]) and (changed[0] or path != max(shapes))
    each = dict.fromkeys(shapes, 24) | {(path := max(shapes)): 23}
    mixed = gradients(model, make, shapes, tokens[:24], each)
    assert [p for p in shapes if mx.any(mixed[p].of_values != 0)] == [path]


def test_modules_are_in_training_only_meanwhile(tiny):
    model, tokens = tiny
    make, shapes = packable(model)
    model.eval()
    model.layers[0].train()
    before = [m.training for _, m in model.named_modules()]
    during = []
    original = type(model.layers[0]).__call__

    def call(self, *args, **kwargs):
        during.append(self.training)
        return original(self, *args, **kwargs)

    type(model.layers[0]).__call__ = call
    try:
        gradients(model, make, shapes, tokens[:8])
    finally:
        type(model.layers[0]).__call__ = original
    assert all(during) and during
    assert [m.training for _, m in model.named_modules()] == before
    model.eval()


def test_errors_in_one_line(monkeypatch, tiny):
    model, tokens = tiny
    make, shapes = packable(model)
    fmt = make_format(Spec.parse("int4-srft:calibrate=off"), 256)
    formats = {path: {"int4": fmt} for path in shapes}

    def costs():
        return bits.costs(model, make, shapes, formats, ())

    def broken(*_, **__):
        raise RuntimeError("[Primitive::vjp] Not implemented\nfor CustomKernel.")

    with monkeypatch.context() as m:
        m.setattr(mx, "value_and_grad", broken)
        with pytest.raises(
            ValueError, match="has no gradient: .* Not implemented for CustomKernel"
        ):
            costs()
    with monkeypatch.context() as m:
        m.setattr(shards, "is_sharded", lambda _: True)
        with pytest.raises(ValueError, match="A budget is for a whole model"):
            costs()
    monkeypatch.setattr(bits, "_losses", lambda *_: [float("nan")])
    monkeypatch.setattr(bits, "TOKENS", 64)
    with pytest.raises(ValueError, match="not finite in its dtype: give a policy"):
        costs()


def test_a_budget_spends_where_text_needs_it(monkeypatch):
    """On a model with one layer whose errors are made to matter: it gets the bits."""
    model, tokenizer, *_ = load("examples/models/tiny-qwen2-8bit")
    model.set_dtype(mx.float32)
    monkeypatch.setattr(bits, "TOKENS", 256)
    seen = {}
    original = bits.costs

    def costs(*args):
        found = original(*args)
        for path, step in found:
            found[path, step] *= 1000 if path == (2,) else 1
        return seen.update(found) or found

    monkeypatch.setattr("mlx_kvq.model.plan.costs", costs)
    spec = "int3-srft:group_size=64,calibrate=off,budget=3.6"
    report = mlx_kvq.enable(model, spec, tokenizer=tokenizer, verbose=False)
    assert report.packed[2].spec.bits == max(
        (f.spec.bits for f in report.packed.values()), key=bits.STEPS.index
    )
    assert report.bits_per_value <= 3.6
    for path in [(i,) for i in range(4)]:  # more bits cost less, of keys and of values
        order = [seen[path, step] for step in ("int3", "k4v3", "int4", "k5v4", "int5", "int8")]
        assert order == sorted(order, reverse=True)
        assert order[-1] < 0.02 * order[0]
    # The tokenizer that the model was loaded with does as well.
    model._mlx_kvq_loaded = Loaded("", tokenizer)
    monkeypatch.setattr(bits, "random_tokens", None)
    again = mlx_kvq.enable(model, spec, verbose=False)
    assert again.packed[2].spec.bits == report.packed[2].spec.bits
