"""The oracle itself: against published vectors, hand-worked numbers and plain attention."""

import numpy as np
import pytest

from tests.support import oracle

RNG = np.random.default_rng(7)


def test_signs_are_splitmix64s():
    """The generator's published output for the state 1234567."""
    words = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    words += [4593380528125082431, 16408922859458223821]
    signs = oracle.signs(1234567 // 2, 1, 5)
    assert signs.tolist() == [-1.0 if word >= 2**63 else 1.0 for word in words]


@pytest.mark.parametrize("D", [2, 6, 8, 80, 128])
def test_srft_by_definition(D):
    """Sums of cosines and sines, term by term."""
    x, n = RNG.standard_normal(D), np.arange(D)
    z = x * oracle.signs(3, 0, D)
    waves = [np.ones(D) / np.sqrt(D), (-1.0) ** n / np.sqrt(D)]
    for k in range(1, D // 2):
        waves += [np.sqrt(2 / D) * np.cos(2 * np.pi * k * n / D)]
        waves += [-np.sqrt(2 / D) * np.sin(2 * np.pi * k * n / D)]
    np.testing.assert_allclose(oracle.rotate(x, "srft", 3, 0), np.array(waves) @ z, atol=1e-12)


def test_srht_by_definition():
    x = np.array([1.0, 2.0, 3.0, 4.0])
    a, b, c, d = x * oracle.signs(0, 0, 4)
    want = [(a + b + c + d) / 2, (a - b + c - d) / 2, (a + b - c - d) / 2, (a - b - c + d) / 2]
    np.testing.assert_allclose(oracle.rotate(x, "srht", 0, 0), want, atol=1e-12)


@pytest.mark.parametrize("rotation, D", [("srft", 80), ("srft", 2), ("srht", 64), ("none", 7)])
def test_unrotate_is_the_inverse(rotation, D):
    x = RNG.standard_normal((2, 3, D))
    y = oracle.rotate(x, rotation, 5, 1)
    np.testing.assert_allclose(oracle.unrotate(y, rotation, 5, 1), x, atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(y, axis=-1), np.linalg.norm(x, axis=-1))


def test_quantize_by_hand():
    y = np.array([7.5, -7.5, 0.0, 0.5, -0.25, 3.0, 2.999, -100.0])
    codes, scales, values = oracle.quantize(np.minimum(np.maximum(y, -7.5), 7.5), 4, 8, "absmax")
    assert scales.tolist() == [1.0]
    assert codes.tolist() == [15, 0, 8, 8, 7, 11, 10, 0]
    assert values.tolist() == [7.5, -7.5, 0.5, 0.5, -0.5, 3.5, 2.5, -7.5]
    y = np.array([7.0, -7.0, 0.0, 0.49, -0.51, 3.6, 0, 0])
    codes, scales, values = oracle.quantize(y, 4, 8, "paper")
    assert (scales.tolist(), codes.tolist()) == ([1.0], [15, 1, 8, 8, 7, 12, 8, 8])
    assert values.tolist() == [7, -7, 0, 0, -1, 4, 0, 0]
    codes, scales, _ = oracle.quantize(np.array([127.5, -127.5, 0, 1] * 2), 8, 8, "search")
    assert (scales.tolist(), codes.tolist()) == ([1.0], [255, 0, 128, 129] * 2)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_the_search_is_the_smaller_angle(group):
    """Codes are those of the scale with the smaller one; the scale that is stored keeps the length,
    so the angle is all of the error."""
    y = RNG.standard_normal((1000, group))
    _, _, values = oracle.quantize(y, 4, group, "search")
    tried = []
    for c in oracle.tried(group):
        grid = c * np.abs(y).max(axis=-1)[:, None, None] / 7.5 * (np.arange(16) - 7.5)
        nearest = np.abs(y[..., None] - grid).argmin(axis=-1) - 7.5  # of all levels
        longer = np.linalg.norm(y, axis=-1) / np.linalg.norm(nearest, axis=-1)
        tried.append(np.linalg.norm(longer[:, None] * nearest - y, axis=-1))
    found, expected = (np.linalg.norm(x, axis=-1) for x in (values, y))
    np.testing.assert_allclose(found, expected, rtol=2.0**-11)
    scaled = values * (expected / found)[:, None]
    np.testing.assert_allclose(np.linalg.norm(scaled - y, axis=-1), np.min(tried, axis=0))
    assert len(np.unique(np.argmin(tried, axis=0))) == 2  # each wins somewhere


def test_pack_row_by_hand():
    """Every field in its place, found with Python's integers."""
    k_codes, v_codes = np.arange(8)[None], np.arange(15, 7, -1)[None]
    rows = oracle.pack_row(k_codes, [[1.0]], v_codes, [[-2.0]], 4, 4)
    assert [f"{word:08x}" for word in rows[0]] == ["76543210", "89abcdef", "c0003c00"]
    rows = oracle.pack_row(k_codes, [[1.0]], v_codes, [[-2.0]], 8, 4)
    assert [f"{word:08x}" for word in rows[0][:2]] == ["03020100", "07060504"]
    odd = oracle.pack_row(np.zeros((1, 16), int), [[1.0, 0.5]], v_codes, [[2.0]], 4, 4)
    assert [f"{word:08x}" for word in odd[0][-2:]] == ["38003c00", "00004000"]
    k, v = oracle.unpack_row(rows, 8, 8, 8, 4, 8, 8, "absmax")
    assert (k[0].tolist(), v[0, 0].item()) == ((np.arange(8) - 127.5).tolist(), -2 * 7.5)


@pytest.mark.parametrize("mask", [None, "causal", "bool", "float"])
@pytest.mark.parametrize("sinks", [None, np.array([0.5, -1.0, 2.0, 0.0])])
@pytest.mark.parametrize("rotation", ["srft", "srht", "none"])
def test_attend_is_plain_attention_on_what_is_remembered(rotation, sinks, mask):
    """All that `attend` folds away (rotation, σ, λ, both centres) gives plain attention."""
    B, Hq, Hkv, L, T, Dk, Dv = 2, 4, 2, 3, 9, 64, 32
    q, k, v = (RNG.standard_normal(s) for s in [(B, Hq, L, Dk), (B, Hkv, T, Dk), (B, Hkv, T, Dv)])
    if mask in ("bool", "float"):
        seen = RNG.random((B, 1, L, T)) < 0.7
        seen[..., 0] = True
        mask = seen if mask == "bool" else np.where(seen, RNG.standard_normal(seen.shape), -np.inf)
    stored, remembered, parameters = [], [], []
    for x, stream in (k, oracle.KEYS), (v, oracle.VALUES):
        D = x.shape[-1]
        mu, sigma, lam = RNG.standard_normal((3, Hkv, D))
        params = (mu, np.exp(sigma), np.exp(lam))
        y = oracle.forward(x, rotation, 11, stream, *params)
        stored.append(oracle.quantize(y, 4, 16, "absmax")[2])
        remembered.append(oracle.fake_quantize(x, 4, 16, "absmax", rotation, 11, stream, *params))
        parameters.append(params)
    got = oracle.attend(
        q,
        *stored,
        0.3,
        rotation=rotation,
        seed=11,
        mask=mask,
        sinks=sinks,
        k_params=parameters[0],
        v_params=parameters[1],
    )
    want = oracle.attend_exact(q, *remembered, 0.3, mask, sinks)
    np.testing.assert_allclose(got, want, atol=1e-11)


def test_attend_exact_by_loops():
    q, k, v = (RNG.standard_normal(s) for s in [(1, 4, 2, 8), (1, 2, 5, 8), (1, 2, 5, 6)])
    got = oracle.attend_exact(q, k, v, 0.5, "causal", np.array([0.1, 0.2, 0.3, 0.4]))
    for h in range(4):
        for i in range(2):
            seen = range(5 - 2 + i + 1)
            weights = [np.exp(0.5 * q[0, h, i] @ k[0, h // 2, t]) for t in seen]
            total = sum(weights) + np.exp(0.1 * (h + 1))
            want = sum(w * v[0, h // 2, t] for w, t in zip(weights, seen, strict=True)) / total
            np.testing.assert_allclose(got[0, h, i], want)
