"""What errors of keys and values cost, by gradients: beside float64, and beside KL itself."""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm import load

import mlx_kvq
from mlx_kvq.calibration import shards
from mlx_kvq.calibration.exact import ExactCache, attended
from mlx_kvq.calibration.gradients import attention_over, gradients
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


class Wrong(ExactCache):
    """Attention over errors of keys and values of what is further back than 16 tokens."""

    def __init__(self, errors, window):
        super().__init__(window)
        self.errors = errors

    def attention(self, queries, keys, values, **options):
        return attention_over(queries, keys, values, *self.errors, 16, **options)


def kl_of_errors(model, tokens, path, errors):
    """Mean KL with these errors in one layer, measured."""

    def log_probabilities(factor):
        def tap(at, cache):
            window = getattr(cache, "max_size", None)
            return Wrong([factor * e for e in errors], window) if at == path else ExactCache(window)

        with attended():
            return nn.log_softmax(model(tokens[None], cache=map_leaves(tap, own_caches(model)))[0])

    return kl(log_probabilities(0), log_probabilities(1)).mean().item()


@pytest.mark.parametrize("alike", [False, True])
def test_the_cost_of_errors_is_their_kl(tiny, alike):
    """Errors in one layer's keys, or values, of what is further back than 16 tokens: random ones,
    and one that all tokens have in common. Of values that adds up, of keys it nearly cancels."""
    model, tokens = tiny
    make, shapes = packable(model)
    found = [gradients(model, make, shapes, tokens, 16, seed=i) for i in range(8 if alike else 4)]
    ratios = []
    for path in list(shapes)[1::2]:  # with a window and without
        for side in range(2):
            seen = found[0][path]
            pair = [mx.zeros_like(x) for x in (seen.keys, seen.values)]
            x = (seen.keys, seen.values)[side]
            size = (0.05 if alike else 0.2) * mx.sqrt(mx.square(x).mean(axis=2, keepdims=True))
            shape = (1, 1, 1, x.shape[3]) if alike else x.shape
            pair[side] = mx.broadcast_to(
                mx.random.normal(shape, key=mx.random.key(side)) * size, x.shape
            )
            real = kl_of_errors(model, tokens, path, pair)
            said = np.mean([g[path].cost(side, pair[side]).item() for g in found]) / tokens.size
            assert 0.4 < said / real < 2.5, (path, side, said, real)
            ratios.append(said / real)
            if alike and side:  # errors of tokens that had nothing to do with one another
                other = mx.random.normal(x.shape, key=mx.random.key(2)) * size
                apart = np.mean([g[path].cost(side, other).item() for g in found]) / tokens.size
                assert said > 3 * apart
    assert 0.65 < np.exp(np.mean(np.log(ratios))) < 1.45, ratios


def test_what_a_query_reads_exactly_costs_nothing(tiny):
    """With as many exact tokens as there are, no error is read; without the last of them, that of
    one key alone is, by the last query."""
    model, tokens = tiny
    make, shapes = packable(model)
    none = gradients(model, make, shapes, tokens[:24], 24)
    one = gradients(model, make, shapes, tokens[:24], 23)
    each = dict.fromkeys(shapes, 24) | {(last := max(shapes)): 23}
    mixed = gradients(model, make, shapes, tokens[:24], each)
    for path in shapes:
        for side, x in enumerate((none[path].keys, none[path].values)):
            first = mx.where((mx.arange(24) == 0)[:, None], mx.ones_like(x), 0.0)
            assert none[path].cost(side, mx.ones_like(x)) == 0
            assert one[path].cost(side, 1 - first) == 0
            assert one[path].cost(side, first) > 0 or path != last
            assert (mixed[path].cost(side, first) > 0).item() == (path == last)


def test_attention_that_is_not_shared_counts_token_by_token(tiny):
    model, tokens = tiny
    make, shapes = packable(model)
    path = max(shapes)
    found = gradients(model, make, shapes, tokens[:24], 24, apart={path})
    for side, x in enumerate((found[path].keys, found[path].values)):
        e = mx.random.normal(x.shape)
        parts = [
            found[path].cost(side, mx.where((mx.arange(24) == i)[:, None], e, 0)) for i in range(24)
        ]
        assert all(part > 0 for part in parts)
        assert abs(sum(parts) / found[path].cost(side, e) - 1).item() < 1e-4
    assert all(found[p].cost(1, mx.ones_like(found[p].values)) == 0 for p in shapes if p != path)


def test_first_tokens_have_no_error(tiny):
    """Caches keep the first four exactly."""
    model, tokens = tiny
    make, shapes = packable(model)
    path = max(shapes)
    fmt = make_format(Spec.parse("int3-srft:calibrate=off"), 256)
    for error in bits._errors(gradients(model, make, shapes, tokens[:24])[path], fmt):
        wrong = mx.any(error != 0, axis=(0, 1, 3)).tolist()
        assert wrong == [False] * 4 + [True] * 20


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
