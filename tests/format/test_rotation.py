"""The rotations: orthonormal, the oracle's, and the same signs in every version."""

import itertools

import numpy as np
import pytest

from mlx_kvq.format import rotation
from mlx_kvq.format.rotation import KEYS, VALUES, matrix, signs, why_not
from tests.support import oracle

EVEN = range(8, 257, 2)
POWERS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]

# The first 16 signs: caches on disk depend on them, so they never change.
GOLDEN = {
    (0, KEYS): "-++-+++-+-+-----",
    (0, VALUES): "---++---+-+-+-++",
    (1, KEYS): "----++--+-++-+-+",
    (1, VALUES): "+--++-+-+---++--",
    (7, KEYS): "+++--++---+-++--",
    (7, VALUES): "---++---+-+-+++-",
    (2**32 - 1, KEYS): "+++--++-++----++",
    (2**32 - 1, VALUES): "-+++-++-+++-+-+-",
}


def as_signs(text: str) -> list[float]:
    return [{"+": 1.0, "-": -1.0}[c] for c in text]


@pytest.mark.parametrize("seed, stream", GOLDEN)
def test_golden_signs(seed, stream):
    assert signs(seed, stream, 16).tolist() == as_signs(GOLDEN[seed, stream])


@pytest.mark.parametrize("seed", [0, 1, 123456789, 2**32 - 1])
@pytest.mark.parametrize("stream", [KEYS, VALUES])
def test_signs_are_the_oracles_and_fair(seed, stream):
    s = signs(seed, stream, 4096)
    assert np.array_equal(s, oracle.signs(seed, stream, 4096))
    assert np.array_equal(s[:100], signs(seed, stream, 100))  # D only cuts the sequence
    assert set(s) == {-1.0, 1.0}
    assert abs(s.mean()) < 5 / 64 and abs((s[1:] * s[:-1]).mean()) < 5 / 64


def test_seeds_and_streams_do_not_collide():
    """The streams start at 2 * seed + stream: those of one seed and of its neighbours differ."""
    seeds = [*range(64), *range(2**32 - 64, 2**32)]
    starts = list(itertools.product(seeds, (KEYS, VALUES)))
    assert len({signs(seed, stream, 64).tobytes() for seed, stream in starts}) == len(starts)


def test_keys_and_values_are_rotated_differently():
    for name in "srft", "srht":
        assert not np.array_equal(matrix(name, 5, KEYS, 64), matrix(name, 5, VALUES, 64))


@pytest.mark.parametrize("name, sizes", [("srft", EVEN), ("srht", POWERS)])
def test_orthonormal_and_equal_to_the_oracle(name, sizes):
    for D in sizes:
        R = np.array(matrix(name, D, KEYS, D)).astype(np.float64)
        assert R.shape == (D, D)
        assert np.abs(R @ R.T - np.eye(D)).max() < 1e-6, D
        # Columns of R are the rotated unit vectors; fp32 holds entries of at most 1 to 6e-8.
        assert np.abs(R.T - oracle.rotate(np.eye(D), name, D, KEYS)).max() < 6.1e-8, D


def test_matrices_are_fp32_and_shared():
    R = matrix("srft", 11, KEYS, 96)
    assert R is matrix("srft", 11, KEYS, 96)
    assert str(R.dtype) == "mlx.core.float32"


def test_real_fft_order():
    """A cosine of frequency 3 lands in y[6] alone, a sine in y[7], the mean in y[0]."""
    D, n = 16, np.arange(16)
    F = rotation.real_fft(D)
    for z, index, value in [
        (np.ones(D), 0, 4.0),
        ((-1.0) ** n, 1, 4.0),
        (np.cos(2 * np.pi * 3 * n / D), 6, np.sqrt(8)),
        (np.sin(2 * np.pi * 3 * n / D), 7, -np.sqrt(8)),
    ]:
        np.testing.assert_allclose(F @ z, value * np.eye(D)[index], atol=1e-12)


def test_no_rotation_has_no_matrix():
    assert matrix("none", 0, KEYS, 77) is None


@pytest.mark.parametrize(
    "name, D, reason",
    [
        ("srft", 7, "srft needs an even head size, not 7"),
        ("srft", 129, "srft needs an even head size, not 129"),
        ("srht", 12, "srht needs a head size that is a power of two, not 12"),
        ("srht", 80, "srht needs a head size that is a power of two, not 80"),
        ("srht", 192, "srht needs a head size that is a power of two, not 192"),
    ],
)
def test_sizes_without_a_rotation(name, D, reason):
    assert why_not(name, D) == reason
    with pytest.raises(ValueError, match=reason):
        matrix(name, 0, KEYS, D)


def test_sizes_with_a_rotation():
    assert not any(why_not("srft", D) for D in EVEN)
    assert not any(why_not("srht", D) for D in POWERS)
    assert not any(why_not("none", D) for D in (1, 7, 80))


@pytest.mark.parametrize("D", [0, -8, 10**12, 64.0, True, None])
@pytest.mark.parametrize("name", ["srft", "srht", "householder", "quaternion", "none"])
def test_a_head_size_is_a_whole_number(name, D):
    with pytest.raises(ValueError, match="^a head size is a whole number from 1 to 65536, not "):
        matrix(name, 0, KEYS, D)


def test_rotations_that_do_not_exist():
    assert why_not("dct", 64).startswith("a rotation is one of srft, srht, ")
    with pytest.raises(ValueError, match="^a rotation is one of srft, srht, .*, not 'dct'.$"):
        matrix("dct", 0, KEYS, 64)
    for call in (
        lambda: rotation.real_fft(7),
        lambda: rotation.hadamard(12),
        lambda: matrix("householder", 0, 0, 5),
        lambda: matrix("quaternion", 0, 0, 6),
    ):
        with pytest.raises(ValueError, match="needs a head size that|needs an even head size"):
            call()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((-1, KEYS, 8), "A seed is a whole number from 0 to "),
        ((0.5, KEYS, 8), "A seed is a whole number from 0 to .*, got 0.5.$"),
        ((0, 2, 8), "A stream is a whole number from 0 to 1, got 2."),
        ((0, KEYS, -8), "A head size is a whole number from 0 to 65536, got -8."),
        ((0, KEYS, 10**12), "A head size is a whole number from 0 to 65536, got 10"),
    ],
)
def test_signs_that_do_not_exist(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        signs(*arguments)
