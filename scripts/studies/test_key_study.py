"""``key_study``: its transforms are what it says, and what it prints."""

import json
import sys
from pathlib import Path

import key_study
import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import load

from mlx_kvq.calibration.fit import layer_calibration, sample_text
from mlx_kvq.calibration.moments import collect
from mlx_kvq.calibration.positions import contexts
from mlx_kvq.format import feedback
from mlx_kvq.format.format import make_format
from mlx_kvq.format.spec import Spec
from mlx_kvq.stock import packable

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "models" / "tiny-qwen2-8bit"
TEXT = ROOT / "examples" / "text" / "novel.txt"


@pytest.fixture(scope="module")
def moments():
    model, tokenizer = load(str(MODEL))[:2]
    caches, shapes = packable(model)
    ids = mx.array(tokenizer.encode(sample_text())[:200])
    return collect(model, caches, shapes, [ids])[(1,)]


def like(m, n):
    """Keys and values [1, H, n, D] with these moments' spread."""
    rng = np.random.default_rng()
    mu, K = m.key_moments(contexts(1024))
    k = np.einsum("hde,hne->hnd", np.linalg.cholesky(K + 1e-9 * np.eye(K.shape[1])),
                  rng.standard_normal((K.shape[0], n, K.shape[1]))) + mu[:, None]  # fmt: skip
    return [key_study.fp32(a)[None] for a in (k, rng.standard_normal(k.shape))]


def test_the_full_transform_balances_and_comes_back(moments):
    of = layer_calibration(moments, 1024)
    way = key_study.Full(moments, 1024, of.values, Spec("int8", "srft"))
    T = np.array(way.turn, dtype=np.float64)
    inverse = np.linalg.inv(T)
    K = feedback.damped(moments.key_moments(contexts(1024))[1])
    Q = feedback.damped(moments.query_square(contexts(1024)))
    here, there = T @ K @ T.swapaxes(1, 2), inverse.swapaxes(1, 2) @ Q @ inverse
    np.testing.assert_allclose(here, there, atol=1e-3 * np.abs(there).max())
    sides = like(moments, 40)
    for x, y in zip(sides, way(sides), strict=True):
        assert mx.abs(x - y).max() < 0.05 * mx.abs(x).max()


@pytest.mark.parametrize("before", [False, True])
def test_a_block_that_is_its_own_centre_costs_nothing(moments, before):
    of = layer_calibration(moments, 1024)
    mu, (k, v) = of.keys.mu, like(moments, 1)
    assert mu is not None
    fmt = make_format(Spec("int4", "srft"), mu.shape[1], keys=of.keys)
    k = mx.repeat(k, 100, axis=2)
    got, _ = key_study.centred([k, mx.repeat(v, 100, axis=2)], fmt=fmt, mu=mu, before=before)
    assert mx.abs(got - k).max() < 2e-3 * mx.abs(k).max()  # means are kept in fp16
    other, _ = key_study.centred(like(moments, 100), fmt=fmt, mu=mu, before=before)
    assert other.shape == k.shape


def test_keys_that_are_their_mean_turned_cost_nothing(moments):
    """Of a range of one position the centre is the key itself, wherever the first one is."""
    of = layer_calibration(moments, 1024)
    way = key_study.Turned(moments, 1024, of.values, Spec("int4", "srft"), None, range(1024))
    places = [key_study.turned(moments, p, 1) for p in range(300, 340)]
    k = key_study.fp32(np.stack(places, axis=1)[None])
    got, _ = way([k, mx.ones_like(k)], at=300)
    assert mx.abs(got - k).max() < 1e-4 * mx.abs(k).max()
    elsewhere, _ = way([k, mx.ones_like(k)], at=0)
    assert mx.abs(elsewhere - k).max() > 1e-3 * mx.abs(k).max()
    # Turned by nothing, and over a whole range, as the calibration has it.
    mean = np.asarray(moments.keys.mean)
    np.testing.assert_allclose(key_study.turned(moments, 0, 1), mean, atol=1e-12)
    np.testing.assert_allclose(key_study.turned(moments, 0, 1024), moments.key_moments([1024])[0])


def test_ranges_grow_with_the_position():
    assert key_study.octaves(4096, 1) == [0, 512, 1024, 2048]
    assert key_study.octaves(1024, 2) == [0, 512, 724]


def test_the_command(tmp_path, monkeypatch, capsys):
    out = tmp_path / "study.json"
    given = (
        *("--model", MODEL, "--text", TEXT, "--lengths", 100, 200, "--decoded", 8),
        *("--documents", 2, "--json", out),
    )
    monkeypatch.setattr(sys, "argv", ["key_study.py", *map(str, given)])
    monkeypatch.setattr(key_study, "TOKENS", 200)
    key_study.main()
    rows = json.loads(out.read_text())
    assert len(rows) == 28 and all(len(r["kl"]) == 2 and r["geometric"] > 0 for r in rows)
    printed = capsys.readouterr().out
    assert "| tiny-qwen2-8bit, 200 tokens | KL | × |" in printed
    assert printed.count("| feedback | ") == 2 and "| feedback, full |" in printed
