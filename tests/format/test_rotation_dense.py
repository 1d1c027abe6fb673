"""The dense rotations: orthonormal, what they are named after, and usable as a cache."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import load

import mlx_kvq
from mlx_kvq.format import dense
from mlx_kvq.format.rotation import matrix, splitmix64, why_not
from mlx_kvq.format.spec import DENSE as NAMES
from mlx_kvq.format.spec import Spec, names

QWEN = Path(__file__).resolve().parents[2] / "examples" / "models" / "tiny-qwen2-8bit"


def householder(seed, stream, D):
    return dense.householder(splitmix64(seed, stream), D)


def quaternion(seed, stream, D):
    return dense.quaternion(splitmix64(seed, stream), D)


DENSE = {"householder": householder, "quaternion": quaternion}


def test_they_are_specs_that_no_list_shows():
    assert set(NAMES) == set(DENSE)
    for rotation in DENSE:
        assert str(Spec.parse(f"int4-{rotation}:seed=1")) == f"int4-{rotation}:seed=1"
        with pytest.raises(ValueError) as error:
            Spec.parse(f"int4-{rotation}s")
        assert not any(
            rotation in name for name in (*names(), str(error.value).partition("Known")[2])
        )


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("D", [8, 64, 80, 128, 256])
def test_orthonormal_and_seeded(name, D):
    R = DENSE[name](3, 1, D)
    np.testing.assert_allclose(R @ R.T, np.eye(D), atol=1e-12)
    np.testing.assert_array_equal(R, DENSE[name](3, 1, D))
    for other in ((3, 0), (4, 1)):
        assert np.abs(R - DENSE[name](*other, D)).max() > 0.1
    np.testing.assert_array_equal(matrix(name, 3, 1, D), R.astype(np.float32))


def test_householder_is_half_as_many_reflections_as_channels():
    R = householder(0, 0, 64)
    moved = np.linalg.svd(R - np.eye(64), compute_uv=False)
    assert (moved > 1e-9).sum() == 32
    assert np.linalg.det(R) == pytest.approx(1)  # an even number of them
    assert np.linalg.det(householder(0, 0, 10)) == pytest.approx(-1)


def test_householder_by_definition():
    # 4 channels, 2 reflections, from the random words themselves.
    state, words = 2 * 5 + 1, []
    for _ in range(8):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        words.append(z ^ (z >> 31))
    parts = np.array(words, dtype="<u8").view("<u2").reshape(2, 4, 4).astype(np.float64)
    v = parts.sum(axis=-1) - 2 * 65535
    first, second = (np.eye(4) - 2 * np.outer(x, x) / (x @ x) for x in v)
    np.testing.assert_allclose(householder(5, 1, 4), second @ first, atol=1e-12)


def test_quaternion_rotates_every_four_channels():
    R = quaternion(0, 0, 32)
    blocks = R.reshape(8, 4, 8, 4)
    for i in range(8):
        for j in range(8):
            if i == j:
                assert np.linalg.det(blocks[i, :, j]) == pytest.approx(1)
                # A product of a left and a right rotation, not of one kind alone.
                assert np.abs(blocks[i, :, j] - np.eye(4)).max() > 0.1
            else:
                assert not blocks[i, :, j].any()
    # All of SO(4) is of this form: the blocks' traces take both signs.
    traces = [np.trace(b) for b in np.moveaxis(blocks, 1, 2)[range(8), range(8)]]
    assert min(traces) < 0 < max(traces)


@pytest.mark.parametrize(
    "name, D, said",
    [("householder", 7, "needs an even head size"), ("quaternion", 6, "a multiple of 4")],
)
def test_sizes(name, D, said):
    assert said in str(why_not(name, D))
    with pytest.raises(ValueError, match=said):
        matrix(name, 0, 0, D)


@pytest.mark.parametrize("name", DENSE)
def test_as_a_cache(name):
    model, _ = load(str(QWEN))
    model.set_dtype(mx.float32)
    x = mx.array([list(range(40, 100))])
    want = model(x)
    errors = {}
    for spec in (f"int4-{name}", f"int8-{name}", "int4-srft"):
        caches = mlx_kvq.make_prompt_cache(model, f"{spec}:calibrate=off,recent=0,first=0")
        model(x[:, :40], cache=caches)
        y = model(x[:, 40:], cache=caches)
        errors[spec] = mx.sqrt(mx.square(y - want[:, 40:]).mean()).item()
    # A rotation that is not undone exactly would cost much more, and as much at 8 bits.
    assert errors[f"int4-{name}"] < 2 * errors["int4-srft"]
    assert errors[f"int8-{name}"] < errors[f"int4-{name}"] / 8
