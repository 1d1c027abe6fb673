"""Moments of keys and queries at positions that were not read."""

import math
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm import load
from mlx_lm.models import rope_utils

import mlx_kvq
from mlx_kvq.calibration.fit import balanced_scale, calibrate_tokens, default_positions
from mlx_kvq.calibration.moments import FIRST, collect
from mlx_kvq.calibration.positions import LEAST, RopeWatch, contexts, mean_turn, spread
from mlx_kvq.calibration.set import CalibrationSet
from mlx_kvq.stock import packable
from tests.calibration.test_calibrate import Attention, D, Hkv, Model, Words, some_tokens
from tests.support.float32 import MODELS

LLAMA3 = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
ROPES = {
    "plain": nn.RoPE(D, base=100.0),
    "traditional": nn.RoPE(D, traditional=True, base=100.0),
    "partial": nn.RoPE(D // 2, base=100.0),
    "partial, traditional": nn.RoPE(D // 2, traditional=True, base=100.0),
    "linear": nn.RoPE(D, base=100.0, scale=0.25),
    "llama3": rope_utils.Llama3RoPE(D, base=100.0, scaling_config=LLAMA3),
    "yarn": rope_utils.YarnRoPE(
        D, base=100.0, scaling_factor=4.0, original_max_position_embeddings=64
    ),
    "longrope": rope_utils.SuScaledRoPE(
        D, base=100.0, original_max_position_embeddings=64, long_factor=[3.0] * (D // 2)
    ),
    "proportional": rope_utils.ProportionalRoPE(D, D // 2, base=100.0),
    "dynamic": rope_utils.DynamicNTKScalingRoPE(D, 4096, False, 100.0, 2.0),
}


class Turned(Attention):
    """Attention with RoPE; without it where ``rope`` is None."""

    def __init__(self, rope, after=lambda k: k, **options):
        super().__init__(**options)
        self.rope, self._after = rope, after

    def flat(self, h):
        """h [B, L, 4] -> q, k, v before RoPE."""
        q, k, v = (mx.einsum("blc,hcd->bhld", h, w) for w in (self.wq, self.wk, self.wv))
        return q, k + self.shift, v

    def vectors(self, h, offset):
        q, k, v = self.flat(h)
        if self.rope is not None:
            q, k = self.rope(q, offset=offset), self.rope(k, offset=offset)
        return q, self._after(k), v


def everywhere(rope, x, n):
    """Each of the vectors x [H, N, D] at each of the positions 0 to n - 1, [H, N * n, D]."""
    many = mx.broadcast_to(x[:, :, None], (*x.shape[:2], n, x.shape[-1]))
    return np.array(rope(many.reshape(1, -1, n, x.shape[-1])), dtype=np.float64).reshape(
        x.shape[0], -1, x.shape[-1]
    )


def moments(x):
    """E[x] and E[x xᵀ] of [H, N, D]."""
    return x.mean(axis=1), np.einsum("hnd,hne->hde", x, x) / x.shape[1]


@pytest.mark.parametrize("name", ROPES)
def test_the_closed_form_is_the_mean_over_all_positions(name):
    rope, watch = ROPES[name], RopeWatch()
    x = mx.random.normal((2, 6, D), key=mx.random.key(0)) + 1.0
    with watch.watching():
        turned = rope(x[None], offset=300)
        call = watch.call_that_made(turned)
    flat = np.array(call.undo(turned), dtype=np.float64)[0]
    lengths = [40, 7]
    parts = [moments(everywhere(rope, x, n)) for n in lengths]
    expected = [np.mean(both, axis=0) for both in zip(*parts, strict=True)]
    found = spread(*moments(flat), call, lengths)
    np.testing.assert_allclose(found[0], expected[0], atol=1e-4)
    np.testing.assert_allclose(found[1], expected[1], atol=1e-3)
    stay = moments(everywhere(rope, x, 1))
    assert np.abs(stay[0] - expected[0]).max() > 0.1  # the positions matter


def test_the_mean_turn():
    angles = np.array([0.0, 1e-9, 1e-4, 0.3, 2.0, math.pi, 2 * math.pi, -0.7])
    each = [np.exp(1j * angles[:, None] * np.arange(n)).mean(axis=1) for n in (5, 2000)]
    np.testing.assert_allclose(mean_turn(angles, [5, 2000]), np.mean(each, axis=0), atol=1e-9)


def test_contexts_are_halved_down_to_the_least():
    assert contexts(8 * LEAST) == [8 * LEAST, 4 * LEAST, 2 * LEAST, LEAST]
    assert contexts(3 * LEAST) == [3 * LEAST, 3 * LEAST // 2]
    assert contexts(5) == [5]


def expected_keys(layer, model, tokens, rope, positions):
    """μ and σ by turning every vector to every position."""
    q, k, _ = (x[0, :, FIRST:] for x in layer.flat(model.embedded(tokens[None])))
    k, q = everywhere(rope, k, positions), everywhere(rope, q, positions)
    q = q.reshape(Hkv, -1, D)
    return k.mean(axis=1), balanced_scale(k.var(axis=1), (q**2).mean(axis=1))


@pytest.mark.parametrize("name", ["plain", "partial, traditional", "yarn"])
def test_short_windows_serve_long_contexts(name):
    rope = ROPES[name]
    model, tokens = Model(Turned(rope, shift=5.0)), some_tokens(60)
    mu, sigma = expected_keys(model.layers[0], model, tokens, rope, 700)
    found = calibrate_tokens(model, [tokens], positions=700, progress=False)
    keys = found.layers[(0,)].keys
    np.testing.assert_allclose(keys.mu, mu, atol=2e-3)
    np.testing.assert_allclose(keys.sigma, sigma, rtol=2e-3)
    assert found.metadata["positions"] == 700
    short = calibrate_tokens(model, [tokens], positions=20, progress=False)
    assert np.abs(np.array(short.layers[(0,)].keys.mu) - mu).max() > 0.5


def test_each_layer_has_its_own_rope():
    """As in Gemma 3, with a layer that has none, and one that changes the keys after RoPE."""
    ropes = [nn.RoPE(D, base=10.0), nn.RoPE(D, base=1000.0), None, nn.RoPE(D, base=10.0)]
    model = Model(*(Turned(r) for r in ropes[:3]), Turned(ropes[3], after=lambda k: 2 * k))
    caches, shapes = packable(model)
    found = collect(model, caches, shapes, [some_tokens(30)])
    bases = [m.rope and m.rope.options["base"] for m in found.values()]
    assert bases == [10.0, 1000.0, None, None]
    near, far = (
        calibrate_tokens(model, [some_tokens(30)], positions=n, progress=False) for n in (40, 700)
    )
    for path, rope in zip(found, bases, strict=True):
        same = mx.array_equal(near.layers[path].keys.mu, far.layers[path].keys.mu)
        assert same == (rope is None)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("behind", [True, False])
def test_a_part_of_the_keys_is_turned_and_joined_to_the_rest(behind, heads):
    """As in GPT-J, and with one turned head for all as in MiniCPM 3."""
    rope, watch = nn.RoPE(8, traditional=True, base=100.0), RopeWatch()
    rest, x = (mx.random.normal((2, 6, 8), key=mx.random.key(i)) + 1.0 for i in (0, 1))
    x = x[:heads]

    def join(turned, rest):
        turned = mx.broadcast_to(turned, rest.shape)
        return mx.concatenate([rest, turned] if behind else [turned, rest], axis=-1)

    with watch.watching():
        keys = join(rope(x[None], offset=300), rest[None])
        call = watch.call_that_made(keys)
        assert watch.call_that_made(keys + 1) is None
    flat = join(x, rest)
    np.testing.assert_allclose(call.undo(keys)[0], flat, atol=1e-4)
    found = spread(*moments(np.array(flat, dtype=np.float64)), call, [9])
    joined = join(mx.array(everywhere(rope, x, 9), mx.float32), mx.repeat(rest, 9, axis=1))
    for a, b in zip(found, moments(np.array(joined, dtype=np.float64)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3)


def test_the_ropes_of_a_real_family_are_found():
    model = load(str(MODELS / "tiny-gemma3-8bit"))[0]
    caches, shapes = packable(model)
    found = collect(model, caches, shapes, [some_tokens(20)])
    for (layer, *_), m in found.items():
        assert m.rope.options["base"] == model.layers[layer].self_attn.rope.base


def test_mx_is_left_as_it_was():
    rope = mx.fast.rope
    with pytest.raises(ZeroDivisionError), RopeWatch().watching():
        assert mx.fast.rope is not rope
        _ = 1 / 0
    assert mx.fast.rope is rope


def test_the_first_tokens_of_a_window_do_not_count():
    """Their keys are outliers: here 1000 times as large as all others."""
    model = Model(Turned(nn.RoPE(D, base=100.0), shift=1.0))
    model.embed.weight[49] = 1000.0
    tokens = some_tokens(64) % 49
    windows = [mx.concatenate([mx.full((FIRST,), 49), tokens[FIRST:]])]
    plain = calibrate_tokens(model, [tokens], progress=False)
    found = calibrate_tokens(model, windows, progress=False)
    assert all(mx.array_equal(a, plain.arrays()[name]) for name, a in found.arrays().items())
    inside = calibrate_tokens(model, [tokens, *windows, mx.full((FIRST + 1,), 49)], progress=False)
    assert not mx.allclose(inside.layers[(0,)].keys.mu, plain.layers[(0,)].keys.mu, rtol=1)


def test_windows_that_are_all_first_tokens_are_an_error():
    model = Model(Attention())
    with pytest.raises(ValueError, match=r"of more than 4, got \[4, 2\]"):
        calibrate_tokens(model, [some_tokens(4), some_tokens(2)])
    with pytest.raises(ValueError, match="too short: it has no more than 4 tokens"):
        mlx_kvq.calibrate(model, Words(), "a b c d")


@pytest.mark.parametrize("given", [0, -1, 2.5, "8K", True])
def test_positions_are_a_number(given):
    with pytest.raises(ValueError, match="^positions is an integer, at least 1, got"):
        mlx_kvq.calibrate(Model(Attention()), Words(), "text", positions=given)


@pytest.mark.parametrize(
    "takes, made_for",
    [
        (None, 8192), (2048, 8192), (8192, 8192), (20000, 20000), (32768, 32768), (131072, 32768),
        (0, 8192), ("many", 8192),
    ],
)  # fmt: skip
def test_by_default_for_as_many_as_the_model_takes(takes, made_for):
    model = Model(Turned(nn.RoPE(D)))
    assert default_positions(model) == 8192  # which has no config
    model.args = SimpleNamespace(max_position_embeddings=takes)
    assert default_positions(model) == made_for
    made = calibrate_tokens(model, [some_tokens(40)], progress=False)
    assert made.metadata["positions"] == made_for


def test_a_file_without_positions_still_loads(tmp_path):
    """As they were before: what it was made for is not said."""
    model = Model(Turned(nn.RoPE(D)))
    made = calibrate_tokens(model, [some_tokens(40)], progress=False)
    assert made.metadata["positions"] == 8192
    notes = {k: v for k, v in made.metadata.items() if k != "positions"}
    CalibrationSet(made.layers, notes).save(tmp_path / "old.safetensors")
    report = mlx_kvq.enable(model, "int4-srft", calibration=tmp_path / "old.safetensors")
    assert report.calibration.digest == made.digest
    mlx_kvq.disable(model)
