"""Calibration: the moments, the formulas, the file, the automatic way and the command."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm import load
from mlx_lm.models import base
from mlx_lm.models import cache as stock

import mlx_kvq
from mlx_kvq import files
from mlx_kvq.calibration import automatic, sensitivity
from mlx_kvq.calibration.fit import balanced_scale, calibrate_tokens, sample_text
from mlx_kvq.calibration.moments import CHUNK, FIRST, USUAL, Moments, collect
from mlx_kvq.calibration.set import CalibrationSet, LayerCalibration
from mlx_kvq.format import feedback, levels
from mlx_kvq.format.format import make_format
from mlx_kvq.format.spec import Spec
from mlx_kvq.format.transform import Calibration
from mlx_kvq.ops import plain as reference
from mlx_kvq.stock import identity
from tests.support import calls
from tests.support.families import build

MODELS = Path(__file__).resolve().parents[2] / "examples" / "models"
B, Hkv, G, D = 1, 2, 3, 16


class Attention(nn.Module):
    """Queries, keys and values with known moments; position enters through ``cache.offset``."""

    def __init__(self, scale=1.0, shift=0.0):
        super().__init__()
        keys = mx.random.split(mx.random.key(1), 3)
        heads = (Hkv * G, Hkv, Hkv)
        self.wq, self.wk, self.wv = (
            mx.random.normal((H, 4, D), key=k) for H, k in zip(heads, keys, strict=True)
        )
        self.scale, self.shift = scale, shift

    def vectors(self, h, offset):
        """h [B, L, 4] -> q, k, v."""
        turn = mx.cos(0.01 * mx.arange(offset, offset + h.shape[1]))[:, None]
        q, k, v = (mx.einsum("blc,hcd->bhld", h, w) for w in (self.wq, self.wk, self.wv))
        big = mx.where(mx.arange(D) == 3, self.scale, 1.0)
        return q * turn / big, k * turn * big + self.shift, v

    def __call__(self, h, cache):
        q, k, v = self.vectors(h, cache.offset)
        mask = base.create_attention_mask(h, cache)
        k, v = cache.update_and_fetch(k, v)
        o = base.scaled_dot_product_attention(q, k, v, cache=cache, scale=0.1, mask=mask)
        return o.swapaxes(1, 2).flatten(-2)[..., :4]


class Model(nn.Module):
    def __init__(self, *layers, caches=None):
        super().__init__()
        self.embed = nn.Embedding(50, 4)
        self.embed.weight = mx.random.normal((50, 4), key=mx.random.key(0))
        self.layers = list(layers)
        self._caches = caches

    def embedded(self, tokens):
        return self.embed(tokens)

    def __call__(self, tokens, cache):
        h = self.embedded(tokens)
        for layer, c in zip(self.layers, cache, strict=True):
            h = h + layer(h, c)
        return h @ self.embed.weight.T

    def make_cache(self):
        return self._caches() if self._caches else [stock.KVCache() for _ in self.layers]


class Words:
    """A tokenizer: one token a word."""

    def encode(self, text):
        return [sum(map(ord, word)) % 50 for word in text.split()]


def some_tokens(n, seed=0):
    return mx.array(np.random.RandomState(seed).randint(0, 50, n))


def test_moments_merge_to_those_of_all_at_once():
    x = np.random.RandomState(0).randn(2, 3, 50, 5).astype(np.float32) + 1000
    for covariance in (False, True):
        m = Moments(covariance)
        for part in (slice(0, 1), slice(1, 30), slice(30, 50)):
            m.add(mx.array(x[:, :, part]))
        flat = x.astype(np.float64).transpose(1, 0, 2, 3).reshape(3, -1, 5)
        centred = flat - flat.mean(axis=1, keepdims=True)
        square = np.einsum("hnd,hne->hde", centred, centred) / flat.shape[1]
        assert m.n == 100
        np.testing.assert_allclose(m.mean, flat.mean(axis=1), rtol=1e-6)
        expected = square if covariance else np.einsum("hdd->hd", square)
        np.testing.assert_allclose(m.variance, expected, rtol=1e-3, atol=1e-3)


def moved(q, k, v, scale, near, mask=None, sinks=None):
    """Σ_t |∂out/∂s_t|² over the keys that are rounded, float64 [Hq, L], by central differences of
    attention; q [Hq, L, D], k and v [Hkv, T, D], mask [Hq, L, T]: added."""
    G, (L, T) = len(q) // len(k), (q.shape[1], k.shape[1])
    k, v = (np.repeat(x, G, axis=0) for x in (k, v))
    at, of_query = np.arange(T), np.arange(T - L, T)[:, None]
    s = np.where(at <= of_query, scale * q @ k.swapaxes(-1, -2), -np.inf)
    s = s if mask is None else s + mask

    def output(s):
        more = [] if sinks is None else [np.broadcast_to(sinks[:, None, None], (*s.shape[:2], 1))]
        whole = np.concatenate([s, *more], axis=-1)
        p = np.exp(whole - whole.max(axis=-1, keepdims=True))
        return (p / p.sum(axis=-1, keepdims=True))[..., :T] @ v

    total, step = np.zeros((len(q), L)), 1e-4
    for t in range(FIRST, T):
        one = step * (at == t)
        change = np.square((output(s + one) - output(s - one)) / (2 * step)).sum(axis=-1)
        total += np.where(of_query[:, 0] - t >= near, change, 0)
    return total


@pytest.mark.parametrize("case", ["plain", "added", "allowed", "heads", "sinks"])
def test_sensitivity_is_how_far_errors_of_logits_move_an_output(case):
    rng = np.random.RandomState(len(case))
    L, T, near = 5, 23, 6
    q, k, v = (rng.randn(H, n, D) for H, n in ((Hkv * G, L), (Hkv, T), (Hkv, T)))
    sinks = rng.randn(Hkv * G) if case == "sinks" else None
    mask = np.zeros((Hkv * G, L, T))
    if case == "heads":
        mask = rng.randn(Hkv * G, L, T)
    elif case in ("added", "allowed"):
        mask = np.broadcast_to(np.where(rng.rand(L, T) < 0.3, -1e9, 0.0), mask.shape)
        mask = mask * (np.arange(T) != T - L)  # each query may attend to one
    q32, k32, v32 = (mx.array(x.astype(np.float32))[None] for x in (q, k, v))
    given: Any = "causal"
    if case != "plain":
        below = np.arange(T) <= np.arange(T - L, T)[:, None]
        whole = np.where(below, mask, -np.inf).astype(np.float32)
        given = mx.array(whole[0] > -1e8) if case == "allowed" else mx.array(whole[None])
        given = given[0, 0] if case == "added" else given
    options = {"scale": 0.7, "mask": given, "sinks": None if sinks is None else mx.array(sinks)}
    out, got = sensitivity.attend(q32, k32, v32, rounded=slice(FIRST, None), near=near, **options)
    expected = mx.fast.scaled_dot_product_attention(q32, k32, v32, **options)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got[0], moved(q, k, v, 0.7, near, mask, sinks), rtol=1e-3, atol=1e-5)


def test_a_query_that_reads_nothing_rounded_has_no_sensitivity():
    x = mx.random.normal((1, 2, 9, D))
    for near, some in ((9, False), (4, True)):
        options: dict = {"scale": 1.0, "rounded": slice(FIRST, None), "near": near}
        _, found = sensitivity.attend(x, x, x, mask="causal", **options)
        assert found[0, :, -1].all() == some and not found[0, :, : FIRST + near].any()
    for n in (1, FIRST, FIRST + 1):
        few = x[:, :, :n]
        out, found = sensitivity.attend(few, few, few, mask=None, **options)
        assert out.shape == few.shape and not found.any()


def query_square(parts) -> np.ndarray:
    """E[q²] [Hkv, D] of windows of (q, k, v) [heads, L, D]: the mean of that of all alike, and that
    by sensitivity."""
    alike, read = np.zeros((Hkv, D)), np.zeros((Hkv, D))
    for q, k, v in parts:
        weight = moved(q, k, v, 0.1, USUAL.recent)[:, FIRST:, None]
        square = np.square(q[:, FIRST:])
        alike += square.reshape(Hkv, -1, D).sum(axis=1)
        read += (weight * square).reshape(Hkv, -1, D).sum(axis=1)
    size, of_read = (x.sum(axis=-1, keepdims=True) for x in (alike, read))
    return np.where(of_read > 0, alike / size + read / np.where(of_read > 0, of_read, 1), alike)


@pytest.mark.parametrize("windows", [[40], [CHUNK + 7, 3]])
def test_mu_and_sigma_are_those_of_the_keys_and_queries(windows):
    """Chunks and windows do not show: all but a window's first tokens count."""
    model = Model(Attention(shift=5.0))
    parts = [some_tokens(n, seed) for seed, n in enumerate(windows)]
    found = calibrate_tokens(model, parts, progress=False)
    read = [
        [
            np.array(x, dtype=np.float64)[0]
            for x in model.layers[0].vectors(model.embedded(p[None]), 0)
        ]
        for p in parts
    ]
    k, v = (np.concatenate([x[i][:, FIRST:] for x in read], axis=1) for i in (1, 2))
    layer = found.layers[(0,)]
    np.testing.assert_allclose(layer.keys.mu, k.mean(axis=1), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(layer.values.mu, v.mean(axis=1), rtol=1e-4, atol=1e-4)
    sigma = (k.var(axis=1) / query_square(read)) ** 0.25
    sigma /= np.exp(np.log(sigma).mean(axis=-1, keepdims=True))
    np.testing.assert_allclose(layer.keys.sigma, sigma, rtol=1e-3)
    assert found.metadata["tokens"] == sum(windows)


@pytest.mark.parametrize("spec", ["int4-srft:seed=3", "int4-srht", "int4-none"])
def test_lambda_is_that_of_the_rotated_keys_and_queries(spec):
    # As many tokens as are read exactly: all queries count alike.
    model, ids = Model(Attention(scale=3.0, shift=5.0)), some_tokens(USUAL.recent)
    spec = Spec.parse(spec)
    plain = calibrate_tokens(model, [ids], progress=False).layers[(0,)].keys
    found = calibrate_tokens(model, [ids], spec=spec, progress=False)
    keys = found.layers[(0,)].keys
    np.testing.assert_allclose(keys.mu, plain.mu, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(keys.sigma, plain.sigma, rtol=1e-5)
    assert plain.lam is None and found.layers[(0,)].values.lam is None
    q, k, _ = (x[:, :, FIRST:] for x in model.layers[0].vectors(model.embedded(ids[None]), 0))
    fmt = make_format(spec, D, keys=Calibration(keys.mu, keys.sigma))
    y = np.array(fmt.keys.forward(k), dtype=np.float64)[0]
    turned = np.array(fmt.keys.query(q), dtype=np.float64).reshape(Hkv, -1, D)
    lam = ((turned**2).mean(axis=1) / (y**2).mean(axis=1)) ** 0.25
    lam /= np.exp(np.log(lam).mean(axis=-1, keepdims=True))
    np.testing.assert_allclose(keys.lam, lam, rtol=2e-3)


def test_lambda_serves_one_rotation_and_seed(tmp_path):
    model = Model(Attention())
    calibrate_tokens(
        model, [some_tokens(40)], spec=Spec.parse("int4-srft:seed=3"), progress=False
    ).save(tmp_path / "c.safetensors")
    for spec in ("int4-srft:seed=3,group_size=16", "int8-srft:seed=3"):
        cache: Any
        (cache,) = mlx_kvq.make_prompt_cache(model, spec, calibration=tmp_path / "c.safetensors")
        assert cache.format.keys.calibration.lam is not None
    with pytest.raises(ValueError, match="holds λ for srft, seed 3, but int4-srft is srft, seed 0"):
        mlx_kvq.make_prompt_cache(model, "int4-srft", calibration=tmp_path / "c.safetensors")


def test_the_balanced_scale_is_the_best_one():
    rng = np.random.RandomState(0)
    x2, q2 = rng.gamma(0.5, size=(2, 1, D)) + 1e-3

    def error(sigma):
        return (x2 / sigma**2).sum() * (q2 * sigma**2).sum()

    sigma = balanced_scale(x2, q2)
    least = error(sigma)
    np.testing.assert_allclose(least, np.sqrt(x2 * q2).sum() ** 2)
    for _ in range(50):
        assert error(sigma * np.exp(0.1 * rng.randn(D))) > least


@pytest.mark.parametrize("dead", ["x", "q", "both", "all"])
def test_dead_channels_get_a_sane_scale(dead):
    x2, q2 = np.ones((1, D)), np.ones((1, D))
    if dead in ("x", "both"):
        x2[0, 3] = 0
    if dead in ("q", "both"):
        q2[0, 5] = 0
    if dead == "all":
        x2[:] = 0
    sigma = balanced_scale(x2, q2)
    assert np.isfinite(sigma).all()
    assert (sigma > 1e-3).all() and (sigma < 1e3).all()


def test_a_sliding_window_is_seen_through(monkeypatch):
    """The recorder holds more tokens than the layer may attend to; its mask hides them."""
    tokens = some_tokens(3 * 16 + 5)
    model = Model(
        Attention(), Attention(), caches=lambda: [stock.RotatingKVCache(8), stock.KVCache()]
    )
    seen = []
    plain = model.make_cache()
    expected = [model(tokens[None, i : i + 16], plain) for i in range(0, tokens.size, 16)]
    monkeypatch.setattr("mlx_kvq.calibration.moments.CHUNK", 16)
    monkeypatch.setattr(
        Model,
        "__call__",
        lambda self, *a, call=Model.__call__, **k: seen.append(call(self, *a, **k)) or seen[-1],
    )
    collect(model, model.make_cache, [(0,), (1,)], [tokens])
    for a, b in zip(seen, expected, strict=True):
        assert mx.allclose(a, b, atol=1e-4)


def test_the_pass_leaves_everything_as_it_was():
    model = Model(Attention())
    model.set_dtype(mx.bfloat16)
    attention = base.quantized_scaled_dot_product_attention
    state: list = mx.random.state
    random = [a.tolist() for a in state]
    calibrate_tokens(model, [some_tokens(20)], progress=False)
    assert base.quantized_scaled_dot_product_attention is attention
    assert model.embed.weight.dtype == mx.bfloat16
    assert [a.tolist() for a in state] == random
    with pytest.raises(AttributeError):
        calibrate_tokens(model, [None], progress=False)
    assert base.quantized_scaled_dot_product_attention is attention


def test_texts_are_cut_into_windows():
    model, word = Model(Attention()), "a b c d e f g h i j "
    found = mlx_kvq.calibrate(model, Words(), [word, word], tokens=15, length=6, progress=False)
    assert (found.metadata["tokens"], found.metadata["length"]) == (15, 6)
    for texts, error in [("", "empty"), ([], "empty"), ([b"bytes"], "are strings, got bytes")]:
        with pytest.raises(ValueError, match=error):
            mlx_kvq.calibrate(model, Words(), texts, progress=False)


def kl(model, tokens, spec, **options):
    """KL of a packed cache from the model's own over chunks of 16."""

    def run(caches):
        out = [model(tokens[None, i : i + 16], cache=caches) for i in range(0, tokens.size, 16)]
        out = mx.concatenate(out, axis=1)
        return out - mx.logsumexp(out, axis=-1, keepdims=True)

    exact = run(model.make_cache())
    got = run(mlx_kvq.make_prompt_cache(model, spec, **options))
    return (mx.exp(exact) * (exact - got)).sum(axis=-1).mean().item()


@pytest.mark.parametrize("outlier, helps", [({"shift": 200.0}, "mu"), ({"scale": 50.0}, "sigma")])
def test_outliers_do_no_harm(outlier, helps):
    """μ removes a constant, σ balances a channel; the other alone does not help."""
    tokens, spec = some_tokens(96, 5), "int4-srft:group_size=16,recent=0,first=0"
    clean, model = Model(Attention()), Model(Attention(**outlier))
    found = calibrate_tokens(model, [some_tokens(96, 6)], progress=False)
    of_clean = calibrate_tokens(clean, [some_tokens(96, 6)], progress=False)
    best = kl(clean, tokens, spec, calibration=of_clean)
    assert kl(model, tokens, spec + ",calibrate=off") > 10 * best
    assert kl(model, tokens, spec, calibration=found) < 1.1 * best
    layers = {
        p: LayerCalibration(replace(c.keys, **{helps: None})) for p, c in found.layers.items()
    }
    assert kl(model, tokens, spec, calibration=CalibrationSet(layers)) > 10 * best


def a_set(**metadata):
    rng = np.random.RandomState(0)
    layers = {}
    for path in [(0,), (2, 1)]:
        mu, sigma = mx.array(rng.randn(2, D)), mx.array(rng.rand(2, D) + 0.1)
        layers[path] = LayerCalibration(Calibration(mu, sigma), Calibration(mu, None, sigma))
    return CalibrationSet(layers, metadata)


def test_save_and_load(tmp_path):
    made = a_set(text="a", tokens=5)
    path = tmp_path / "new" / "c.safetensors"
    made.save(path)
    again = CalibrationSet.load(path)
    assert dict(again.metadata) == {"text": "a", "tokens": 5}
    assert again.arrays().keys() == made.arrays().keys()
    for name, a in made.arrays().items():
        assert mx.array_equal(a, again.arrays()[name])
    assert again.digest == made.digest
    assert CalibrationSet({(0,): made.layers[(0,)]}).digest != made.digest
    assert [p.name for p in path.parent.iterdir()] == ["c.safetensors"]
    with pytest.raises(ValueError, match=".safetensors file"):
        made.save(tmp_path / "c.npz")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "c.safetensors"
    a_set().save(path)
    before = path.read_bytes()

    def fail(*args):
        Path(args[0]).write_bytes(b"half")
        raise RuntimeError("disk full")

    monkeypatch.setattr(mx, "save_safetensors", fail)
    with pytest.raises(OSError, match="disk full"):
        a_set(other=1).save(path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


GOOD = {"format": "mlx_kvq calibration", "version": "1", "metadata": "{}"}
ONE = mx.ones((2, D))
# fmt: off
BAD = {
    "no mark": ({"layers.0.keys.mu": ONE}, {}, "not marked"),
    "other version": ({"layers.0.keys.mu": ONE}, {**GOOD, "version": "2"}, "version '2'; this"),
    "bad json": ({"layers.0.keys.mu": ONE}, {**GOOD, "metadata": "{"}, "not JSON"),
    "json list": ({"layers.0.keys.mu": ONE}, {**GOOD, "metadata": "[]"}, "not a JSON object"),
    "empty": ({}, GOOD, "no tensors"),
    "unknown tensor": ({"layers.0.keys.nu": ONE}, GOOD, "unknown tensor 'layers.0.keys.nu'"),
    "nan": ({"layers.0.keys.mu": ONE * mx.nan}, GOOD, "NaN or an infinity"),
    "infinite": ({"layers.0.values.sigma": ONE * mx.inf}, GOOD, "NaN or an infinity"),
    "zero scale": ({"layers.0.keys.sigma": ONE * 0}, GOOD, "not positive everywhere"),
    "negative scale": ({"layers.0.keys.lam": -ONE}, GOOD, "not positive everywhere"),
    "huge scale": ({"layers.0.keys.sigma": 1e9 * ONE}, GOOD, "scales lie within"),
    "tiny scale": ({"layers.0.keys.sigma": 1e-9 * ONE}, GOOD, "scales lie within"),
    "huge centre": ({"layers.0.keys.mu": 1e9 * ONE}, GOOD, "more than any key"),
    "half precision": ({"layers.0.keys.mu": ONE.astype(mx.float16)}, GOOD, "not float32"),
    "metric of two axes": ({"layers.0.keys.metric": ONE}, GOOD, "channels, channels"),
    "metric not square": ({"layers.0.keys.metric": mx.ones((2, D, 3))}, GOOD, "not a matrix of"),
    "metric uneven": ({"layers.0.keys.metric": mx.triu(mx.ones((2, D, D)))}, GOOD, "moments"),
    "metric negative": ({"layers.0.keys.metric": -mx.eye(D)[None]}, GOOD, "second moments"),
    "metric of values": ({"layers.0.values.metric": mx.ones((2, D, D))}, GOOD, "unknown tensor"),
    "one axis": ({"layers.0.keys.mu": ONE[0]}, GOOD, "not float32 .heads, channels."),
}
# fmt: on


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_told(case, tmp_path):
    arrays, header, error = BAD[case]
    path = str(tmp_path / "c.safetensors")
    mx.save_safetensors(path, arrays, header)
    with pytest.raises(ValueError, match=f"Calibration '{path}': .*{error}"):
        CalibrationSet.load(path)


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no calibration"):
        CalibrationSet.load(tmp_path / "none.safetensors")
    path = tmp_path / "c.safetensors"
    a_set().save(path)
    whole = path.read_bytes()
    for part in (b"", b"text", whole[:20], whole[:-10]):
        path.write_bytes(part)
        with pytest.raises(ValueError, match="not a readable safetensors file"):
            CalibrationSet.load(path)


def test_enable_takes_an_object_or_a_path(tmp_path, capsys):
    model = Model(Attention(), Attention())
    found = calibrate_tokens(model, [some_tokens(40)], text="mine", progress=False)
    found.save(tmp_path / "c.safetensors")
    for given in (found, tmp_path / "c.safetensors", str(tmp_path / "c.safetensors")):
        report = mlx_kvq.enable(model, "int4-srft:group_size=16", calibration=given)
        assert "calibrated (mine)" in capsys.readouterr().err
        assert report.calibration.digest == found.digest
        for i, cache in enumerate(model.make_cache()):
            assert mx.array_equal(cache.format.keys.calibration.mu, found.layers[(i,)].keys.mu)
            assert mx.array_equal(cache.format.values.calibration.mu, found.layers[(i,)].values.mu)
    mlx_kvq.disable(model)


@pytest.mark.parametrize(
    "change, error",
    [
        (lambda s: CalibrationSet({(0,): s.layers[(0,)]}), "nothing for layer 1"),
        (
            lambda s: CalibrationSet({(0,): a_set().layers[(0,)], (1,): s.layers[(1,)]}),
            None,
        ),
        (
            lambda s: CalibrationSet(
                {(0,): s.layers[(0,)], (1,): LayerCalibration(Calibration(mx.ones((1, D))))}
            ),
            "mu of the keys of layer 1 is .1, 16., the model has 2 KV heads of 16",
        ),
    ],
)
def test_a_calibration_of_another_model_is_an_error(change, error):
    model = Model(Attention(), Attention())
    found = calibrate_tokens(model, [some_tokens(40)], progress=False)
    call = lambda: mlx_kvq.make_prompt_cache(model, "int4-srft", calibration=change(found))  # noqa: E731
    if error is None:
        call()
    else:
        with pytest.raises(ValueError, match=error):
            call()
    with pytest.raises(ValueError, match="calibrate=off, but a calibration is given"):
        mlx_kvq.make_prompt_cache(model, "int4-srft:calibrate=off", calibration=found)


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """An empty folder for automatic calibrations."""
    monkeypatch.setenv("MLX_KVQ_CACHE", str(tmp_path / "kept"))
    return tmp_path / "kept"


def test_automatic_calibration_is_made_once_and_kept(kept, capsys):
    model = Model(Attention())
    first = mlx_kvq.enable(model, "int4-srft", tokenizer=Words())
    lines = capsys.readouterr().err
    assert "calibrating on the built-in sample text, once" in lines
    assert "calibrated (built-in sample)" in lines
    (file,) = kept.iterdir()
    assert file.name == f"{identity(model)}-{automatic.VERSION}-sample.safetensors"
    mlx_kvq.enable(model, "int8-srht", tokenizer=Words())
    again = mlx_kvq.enable(model, "int4-srft")  # text serves a call without a tokenizer
    lines = capsys.readouterr().err
    assert "calibrating" not in lines and lines.count("calibrated (built-in sample)") == 2
    assert again.calibration.digest == first.calibration.digest
    tokens = automatic.SAMPLE_TOKENS
    expected = mlx_kvq.calibrate(model, Words(), sample_text(), tokens=tokens, progress=False)
    assert first.calibration.digest == expected.digest


def test_without_a_tokenizer_random_tokens_serve(kept, capsys):
    model = Model(Attention())
    report = mlx_kvq.enable(model, "int4-srft")
    assert "no calibration and no tokenizer" in capsys.readouterr().err
    assert report.calibration.metadata["text"] == "random tokens"
    mlx_kvq.enable(model, "int4-srft", tokenizer=Words())  # text is better: not taken for it
    assert "built-in sample text, once" in capsys.readouterr().err
    assert len(list(kept.iterdir())) == 2


def test_calibrate_off_is_the_plain_path(kept, capsys):
    model = Model(Attention())
    report = mlx_kvq.enable(model, "int4-srft:calibrate=off", tokenizer=Words())
    assert "not calibrated" in capsys.readouterr().err
    assert report.calibration is None
    assert model.make_cache()[0].format.arrays is None
    assert not kept.exists()


def test_a_damaged_kept_file_is_made_again(kept, capsys):
    model = Model(Attention())
    mlx_kvq.enable(model, "int4-srft", tokenizer=Words())
    (file,) = kept.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    capsys.readouterr()
    mlx_kvq.enable(model, "int4-srft", tokenizer=Words())
    assert "calibrating again, the kept calibration cannot be used" in capsys.readouterr().err
    assert file.read_bytes() == whole


def test_a_folder_that_cannot_be_written_is_no_failure(tmp_path, monkeypatch, capsys):
    blocker = tmp_path / "file"
    blocker.write_text("in the way")
    monkeypatch.setenv("MLX_KVQ_CACHE", str(blocker / "kept"))
    report = mlx_kvq.enable(Model(Attention()), "int4-srft", tokenizer=Words())
    assert report.calibration is not None
    assert "could not be kept" in capsys.readouterr().err


def test_quiet_says_nothing(kept, capsys):
    mlx_kvq.enable(Model(Attention()), "int4-srft", tokenizer=Words(), verbose=False)
    assert capsys.readouterr() == ("", "")


def test_the_folder_follows_the_conventions(monkeypatch):
    monkeypatch.setenv("MLX_KVQ_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert files.kept_folder() == Path("/a")
    monkeypatch.delenv("MLX_KVQ_CACHE")
    assert files.kept_folder() == Path("/b/mlx_kvq")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert files.kept_folder() == Path.home() / ".cache" / "mlx_kvq"


def test_identity_follows_the_weights():
    model = Model(Attention())
    name = identity(model)
    model.set_dtype(mx.float16)
    halved = identity(model)
    model.set_dtype(mx.float32)
    assert identity(model) == halved  # same values, another dtype
    assert halved != name  # rounded
    model.embed.weight = model.embed.weight + 1
    assert identity(model) != halved


def test_the_sample_text_is_english_code_and_more():
    text = sample_text()
    assert 5000 < len(text) < 9000
    for part in ("def merge", "#include", "The ferry", "Le marché", "Поезд", "昨日", "春天"):
        assert part in text


def test_the_command(tmp_path, kept):
    text, out = tmp_path / "text.txt", tmp_path / "c.safetensors"
    text.write_text("It was a dark night. " * 20, encoding="utf-8")
    command = [sys.executable, "-m", "mlx_kvq.cli", "calibrate", "--length", "32"]
    command = [sys.executable, "-c", "from mlx_kvq.cli import main; main()", *command[3:]]
    model = str(MODELS / "tiny-qwen2-8bit")
    done = subprocess.run(
        [
            *command,
            "--model",
            model,
            "--text",
            str(text),
            "--tokens",
            "48",
            "--output",
            str(out),
            "--lambda",
            "int4-srft",
            "--positions",
            "2K",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert f"{out}: 4 layers from 48 tokens, for contexts of up to 2048" in done.stderr
    found = CalibrationSet.load(out)
    assert (found.metadata["length"], found.metadata["positions"]) == (32, 2048)
    assert found.metadata["lambda"] == "srft, seed 0"
    found.check({(i,): (1, 128, 128) for i in range(4)})
    assert mlx_kvq.enable(load(model)[0], "int4-srft", calibration=out).calibration is not None
    json.dumps(dict(found.metadata))


def test_the_command_takes_models_with_attention_sinks(tmp_path):
    """In a process of its own, where nothing else has led mlx-lm to our functions."""
    out = tmp_path / "c.safetensors"
    code = f"""
import argparse
from mlx_kvq.commands import calibrate
from tests.calibration.test_calibrate import Words
from tests.support.families import build
parser = argparse.ArgumentParser()
calibrate.add_arguments(parser)
calibrate.load = lambda name, trust: (build(name), Words())
calibrate.run(parser.parse_args(["--model", "gpt_oss", "--output", {str(out)!r}, "--tokens", "40"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=MODELS.parents[1], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(CalibrationSet.load(out).layers) == 4


def test_a_model_that_reads_caches_before_it_fills_them_cannot_be_calibrated():
    with pytest.raises(ValueError, match="cannot be calibrated: use a spec with calibrate=off"):
        mlx_kvq.enable(build("iquestloopcoder"), "int4-srft", tokenizer=Words(), verbose=False)


def test_a_model_with_sinks_from_python_before_anything_is_enabled():
    code = """
import mlx_kvq
from tests.calibration.test_calibrate import Words
from tests.support.families import build
print(len(mlx_kvq.calibrate(build("gpt_oss"), Words(), ["a b c " * 20], tokens=40).layers))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=MODELS.parents[1], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "4\n"), done.stderr


def test_the_command_tells_mistakes(tmp_path):
    from mlx_kvq.cli import main
    from mlx_kvq.commands.calibrate import run

    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"\xff\xfe\x00")
    start = ["calibrate", "--model", str(MODELS / "tiny-qwen2-8bit")]
    for more, error in [
        (["--output", "c.npz"], "--output is a .safetensors file"),
        (["--output", "c.safetensors", "--text", str(tmp_path / "no")], "cannot be read"),
        (["--output", "c.safetensors", "--text", str(bad)], "not UTF-8"),
    ]:
        with pytest.raises(SystemExit, match=error):
            main([*start, *more])
    assert callable(run)


@pytest.mark.parametrize("damping, part", [(0.01, 0.85), (feedback.DAMPING, 0.92)])
def test_feedback_lowers_the_cost_it_is_weighted_by(damping, part, monkeypatch):
    """eᵀ M e of the keys falls against nearest rounding, and every code is one of sixteen."""
    monkeypatch.setattr(feedback, "DAMPING", damping)
    model = Model(Attention(scale=10.0, shift=3.0))
    found = calibrate_tokens(model, [some_tokens(200)], progress=False)
    keys = found.layers[(0,)].keys
    k = model.layers[0].vectors(model.embedded(some_tokens(100, 9)[None]), 0)[1]
    cost = {}
    for rounding in ("nearest", "feedback"):
        spec = mlx_kvq.Spec.parse(f"int4-srft:group_size=8,rounding={rounding}")
        fmt = make_format(spec, D, keys=keys)
        assert (fmt.feedback is None) == (rounding == "nearest")
        rows = calls.quantize_pack(reference, k, k, fmt)
        got = fmt.keys.output(calls.dequantize(reference, rows, k.shape[2], fmt)[0])
        e = np.array(got - k, dtype=np.float64)[0]
        cost[rounding] = np.einsum("hnd,hde,hne->", e, np.array(keys.metric), e)
    assert cost["feedback"] < part * cost["nearest"]


def test_feedback_without_errors_to_feed_is_nearest_rounding():
    y = mx.random.normal((1, 2, 40, 32), key=mx.random.key(3))
    nothing = mx.zeros((2, 32, 32))
    for rule in ("search", "absmax", "paper"):
        for group in (8, 16, 32):
            codes, scales = levels.quantize_with_feedback(y, 4, group, rule, nothing)
            expected = levels.quantize(y, 4, group, rule)
            assert mx.array_equal(codes, expected[0]) and mx.array_equal(scales, expected[1])


def test_feedback_keeps_zeros_and_damage_where_they_are():
    model = Model(Attention())
    keys = calibrate_tokens(model, [some_tokens(100)], progress=False).layers[(0,)].keys
    fmt = make_format(mlx_kvq.Spec.parse("int4-srft:group_size=8,rounding=feedback"), D, keys=keys)
    y = mx.random.normal((1, 2, 3, D), key=mx.random.key(3))
    y[0, 0, 0], y[0, 0, 1, 0], y[0, 0, 2, -1] = 0.0, mx.nan, mx.inf
    codes, scales = levels.quantize_with_feedback(y, 4, 8, "search", fmt.feedback)
    assert (scales[0, 0, 0] == 0).all() and (codes[0, 0, 0] == 8).all()
    assert mx.isnan(scales[0, 0, 1]).tolist() == [True, False]
    assert mx.isnan(scales[0, 0, 2]).tolist() == [False, True]
    assert not mx.isnan(scales[0, 1]).any()


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize(
    "spec, metric, changed",
    [("int4-srft", True, True), ("int3-srft", True, True), ("int4-srft", False, False)]
    + [(f"{spec}-srft", True, False) for spec in ("int8", "k8v4")]
    + [("int4-srft:rounding=nearest", True, False)],
)
def test_automatic_rounding_takes_feedback_where_kernels_do_it(
    spec, metric, changed, kernels, monkeypatch
):
    model = Model(Attention())
    given = calibrate_tokens(model, [some_tokens(100)], progress=False)
    if not metric:
        both = given.layers[(0,)]
        bare = LayerCalibration(replace(both.keys, metric=None), both.values)
        given = CalibrationSet({(0,): bare}, given.metadata)
    monkeypatch.setattr(mlx_kvq.ops, "feeds_back", lambda fmt: kernels)
    cache: Any = mlx_kvq.make_prompt_cache(model, spec, calibration=given)[0]
    assert cache.format.kind.feedback == (changed and kernels)
    assert ("rounding" in cache.format.signature) == (changed and kernels)


def test_feedback_needs_the_metric():
    model = Model(Attention())
    bare = CalibrationSet({(0,): LayerCalibration(Calibration(mx.zeros((Hkv, D))))})
    for spec, given in [("rounding=feedback", bare), ("calibrate=off,rounding=feedback", None)]:
        with pytest.raises(ValueError, match="needs a calibration that holds 'metric'"):
            mlx_kvq.make_prompt_cache(model, f"int4-srft:{spec}", calibration=given)
