"""Random rotations that are dense matrices: contenders of ``evaluate``, in no list of caches.

``scripts/studies`` compares them with the fast ones. Both take random words of 64 bits.
"""

from collections.abc import Iterator
from itertools import islice

import numpy as np


def householder(words: Iterator[int], D: int) -> np.ndarray:
    """The product of D/2 random reflections I − 2vvᵀ / vᵀv, float64 [D, D], for even D.

    It leaves half of all directions alone and a third of every channel in its place, so it
    spreads an outlier less than ``srft`` does.
    """
    R = np.eye(D)
    for v in _near_normal(words, (D // 2, D)):
        R -= np.outer(2 / (v @ v) * v, v @ R)
    return R


def quaternion(words: Iterator[int], D: int) -> np.ndarray:
    """Random rotations of every four channels, z -> a z b̄ with unit quaternions: float64 [D, D],
    in blocks of 4 x 4, for multiples of four.

    Every rotation of four dimensions is of this form (SO(4); IsoQuant).
    """
    R = np.zeros((D, D))
    for i, (a, b) in enumerate(_near_normal(words, (D // 4, 2, 4))):
        left, right = _left(a / np.sqrt(a @ a)), _left(b / np.sqrt(b @ b))
        # z b̄ as a matrix: conjugate, multiply by b from the left, conjugate.
        conjugate = np.array([1.0, -1.0, -1.0, -1.0])
        right = conjugate[:, None] * right * conjugate
        R[4 * i : 4 * i + 4, 4 * i : 4 * i + 4] = left @ right
    return R


def _left(a: np.ndarray) -> np.ndarray:
    """The 4 x 4 matrix of z -> a z for quaternions."""
    w, x, y, z = a
    return np.array([[w, -x, -y, -z], [x, w, -z, y], [y, z, w, -x], [z, -y, x, w]])


def _near_normal(words: Iterator[int], shape: tuple[int, ...]) -> np.ndarray:
    """Random numbers (float64) around zero, each the sum of a word's four 16-bit parts.

    Sums of integers instead of logarithms and cosines: those differ between platforms.
    """
    some = islice(words, int(np.prod(shape)))
    parts = [sum(word >> 16 * i & 0xFFFF for i in range(4)) for word in some]
    return np.array(parts, dtype=np.float64).reshape(shape) - 2 * 0xFFFF
