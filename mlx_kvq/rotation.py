"""The rotations: R = F · diag(s), orthonormal, the same bytes on every platform.

Source: Bergach, arXiv 2605.05699, §3 (sign-randomized real FFT); ``srht`` replaces the FFT by
the Hadamard matrix.
"""

from functools import lru_cache

import mlx.core as mx
import numpy as np

KEYS, VALUES = 0, 1  # streams of random signs
_MASK = (1 << 64) - 1


def signs(seed: int, stream: int, D: int) -> np.ndarray:
    """D random signs (float64, ±1) from splitmix64 started at ``2 * seed + stream``."""
    state = 2 * seed + stream
    out = np.empty(D)
    for i in range(D):
        state = (state + 0x9E3779B97F4A7C15) & _MASK
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        out[i] = -1.0 if (z ^ (z >> 31)) >> 63 else 1.0
    return out


def real_fft(D: int) -> np.ndarray:
    """The orthonormal real FFT as a matrix F [D, D], for every even D.

    With X = DFT(z) / √D: F z = [Re X[0], Re X[D/2], √2 Re X[1], √2 Im X[1], √2 Re X[2], ...].
    """
    X = np.fft.rfft(np.eye(D), axis=0) / np.sqrt(D)  # [D/2 + 1, D]
    F = np.empty((D, D))
    F[0], F[1] = X[0].real, X[D // 2].real
    F[2::2] = np.sqrt(2) * X[1 : D // 2].real
    F[3::2] = np.sqrt(2) * X[1 : D // 2].imag
    return F


def hadamard(D: int) -> np.ndarray:
    """The orthonormal Sylvester-Hadamard matrix [D, D], for powers of two."""
    H = np.ones((1, 1))
    while H.shape[0] < D:
        H = np.block([[H, H], [H, -H]])
    return H / np.sqrt(D)


def why_not(rotation: str, D: int) -> str | None:
    """Why ``rotation`` does not exist for head size D, or ``None`` if it does."""
    if rotation == "srft" and D % 2:
        return f"srft needs an even head size, not {D}"
    if rotation == "srht" and D & (D - 1):
        return f"srht needs a head size that is a power of two, not {D}"
    return None


@lru_cache(maxsize=64)
def matrix(rotation: str, seed: int, stream: int, D: int) -> mx.array | None:
    """R as an fp32 array [D, D] with ``y = x @ R.T``; ``None`` for the identity."""
    if reason := why_not(rotation, D):
        raise ValueError(f"{reason}.")
    if rotation == "none":
        return None
    F = real_fft(D) if rotation == "srft" else hadamard(D)
    R = mx.array((F * signs(seed, stream, D)).astype(np.float32))
    mx.eval(R)  # made once, shared by threads and streams
    return R
