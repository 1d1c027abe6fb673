"""The rotations, orthonormal and the same from one seed on every platform.

``srft`` and ``srht`` are R = F · diag(s) with random signs s and a fast F: the real FFT
(Bergach, arXiv 2605.05699, §3) or the Hadamard matrix. ``scripts/studies`` compares them
with others.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import islice
from numbers import Integral

import mlx.core as mx
import numpy as np

from . import dense

KEYS, VALUES = 0, 1  # streams of random signs
_MOST = 1 << 16  # channels
_MASK = (1 << 64) - 1


def splitmix64(seed: int, stream: int) -> Iterator[int]:
    """Random words of 64 bits, started at ``2 * seed + stream``."""
    state = 2 * seed + stream
    while True:
        state = (state + 0x9E3779B97F4A7C15) & _MASK
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        yield z ^ (z >> 31)


def signs(seed: int, stream: int, D: int) -> np.ndarray:
    """D random signs (float64, ±1). Raises ValueError if the seed, the stream or D is no number of
    its range."""
    _check_number("A seed", seed, 0, _MASK)
    _check_number("A stream", stream, 0, 1)
    _check_number("A head size", D, 0, _MOST)
    words = islice(splitmix64(seed, stream), D)
    return np.array([-1.0 if word >> 63 else 1.0 for word in words])


def real_fft(D: int) -> np.ndarray:
    """The orthonormal real FFT as a matrix F [D, D], for every even D.

    With X = DFT(z) / √D: F z = [Re X[0], Re X[D/2], √2 Re X[1], √2 Im X[1], √2 Re X[2], ...].
    """
    _check("srft", D)
    X = np.fft.rfft(np.eye(D), axis=0) / np.sqrt(D)  # [D/2 + 1, D]
    F = np.empty((D, D))
    F[0], F[1] = X[0].real, X[D // 2].real
    F[2::2] = np.sqrt(2) * X[1 : D // 2].real
    F[3::2] = np.sqrt(2) * X[1 : D // 2].imag
    return F


def hadamard(D: int) -> np.ndarray:
    """The orthonormal Sylvester-Hadamard matrix [D, D], for powers of two."""
    _check("srht", D)
    H = np.ones((1, 1))
    while H.shape[0] < D:
        H = np.block([[H, H], [H, -H]])
    return H / np.sqrt(D)


def why_not(rotation: str, D: int) -> str | None:
    """Why ``rotation`` does not exist for head size D, or ``None`` if it does."""
    if rotation != "none" and rotation not in _MATRICES:
        return f"a rotation is one of {', '.join(NAMES)}, not {rotation!r}"
    if type(D) is not int or not 1 <= D <= _MOST:
        return f"a head size is a whole number from 1 to {_MOST}, not {D!r}"
    if rotation in ("srft", "householder") and D % 2:
        return f"{rotation} needs an even head size, not {D}"
    if rotation == "srht" and D & (D - 1):
        return f"srht needs a head size that is a power of two, not {D}"
    if rotation == "quaternion" and D % 4:
        return f"quaternion needs a head size that is a multiple of 4, not {D}"
    return None


def _check(rotation: str, D: int) -> None:
    if reason := why_not(rotation, D):
        raise ValueError(f"{reason}.")


def _check_number(what: str, x: int, least: int, most: int) -> None:
    if isinstance(x, bool) or not isinstance(x, Integral) or not least <= x <= most:
        raise ValueError(f"{what} is a whole number from {least} to {most}, got {x!r}.")


_MATRICES: dict[str, Callable[[int, int, int], np.ndarray]] = {
    "srft": lambda seed, stream, D: real_fft(D) * signs(seed, stream, D),
    "srht": lambda seed, stream, D: hadamard(D) * signs(seed, stream, D),
    "householder": lambda seed, stream, D: dense.householder(splitmix64(seed, stream), D),
    "quaternion": lambda seed, stream, D: dense.quaternion(splitmix64(seed, stream), D),
}
NAMES = ("srft", "srht", "none")  # in errors; dense ones are for evaluation


@lru_cache(maxsize=64)
def matrix(rotation: str, seed: int, stream: int, D: int) -> mx.array | None:
    """R as an fp32 array [D, D] with ``y = x @ R.T``; ``None`` for the identity. Raises ValueError
    if there is no such rotation of head size D."""
    _check(rotation, D)
    if rotation == "none":
        return None
    R = mx.array(_MATRICES[rotation](seed, stream, D).astype(np.float32))
    mx.eval(R)  # made once, shared by threads and streams
    return R


@lru_cache(maxsize=64)
def _weights(seed: int, stream: int, D: int) -> tuple[mx.array, mx.array, mx.array]:
    """Signs, and the factors that make MLX's transform and its inverse orthonormal; fp32 [D]."""
    _check("srft", D)
    scale = np.full(D, np.sqrt(2 / D))
    scale[:2] = np.sqrt(1 / D)
    arrays = [mx.array(a.astype(np.float32)) for a in (signs(seed, stream, D), scale, 1 / scale)]
    mx.eval(arrays)  # made once, shared by threads and streams
    return tuple(arrays)  # type: ignore[return-value]


def srft(x: mx.array, seed: int, stream: int) -> mx.array:
    """``x @ matrix("srft", …).T`` for x fp32 [..., D] in D log D steps.

    On a CPU with MLX's own BLAS the matrix takes 10.5 µs for a vector of 128 and this 0.4 µs, or
    0.14 ms and 0.04 ms for the 12 queries of a token. On GPUs one product is the faster way.
    """
    D = x.shape[-1]
    s, scale, _ = _weights(seed, stream, D)
    X = mx.fft.rfft(x * s).view(mx.float32)  # Re X[0], Im X[0], Re X[1], ..., Re X[D/2], Im X[D/2]
    return mx.concatenate([X[..., :1], X[..., D : D + 1], X[..., 2:D]], axis=-1) * scale


def srft_inverse(y: mx.array, seed: int, stream: int) -> mx.array:
    """``y @ matrix("srft", …)``, the inverse of :func:`srft`."""
    s, _, scale = _weights(seed, stream, y.shape[-1])
    y = y * scale
    zero = mx.zeros((*y.shape[:-1], 1))
    X = mx.concatenate([y[..., :1], zero, y[..., 2:], y[..., 1:2], zero], axis=-1)
    return mx.fft.irfft(X.view(mx.complex64)) * s
