"""Constants that the fused kernels read: twiddles of the real FFT and factors of each channel.

One flat fp32 array per side and purpose, laid out as ``kernels/rotate.metal`` reads it: the FFT's
tables (``srft`` only), then the channels' factors. Kernels that work on both sides get the keys'
and the values' in one array: each that a launch is given costs the host time.
"""

from dataclasses import dataclass
from functools import lru_cache
from weakref import WeakKeyDictionary

import mlx.core as mx
import numpy as np

from ...format.format import Format
from ...format.rotation import signs
from ...format.transform import Transform

MAX_POINTS = 9  # of the complex FFT held by one lane
MAX_DIM = 256  # threadgroup memory and registers of attend


def lanes(D: int, wide: bool) -> int:
    """SIMD lanes that share the FFT of D channels, a power of two.

    Args:
        D (int): Head size.
        wide (bool): As many as divide D / 2, up to 32, for one vector at a time; else the fewest
            that leave a lane eight points, or as near as D allows.
    """
    m, n = 1, D // 2
    while (wide or n // m > 8) and n // m % 2 == 0 and m < 32:
        m *= 2
    return m


def why_not(D: int) -> str | None:
    """Why the kernels do not rotate vectors of D channels, or ``None`` if they do."""
    if D % 8 or not 32 <= D <= MAX_DIM:
        return f"head size {D} is not a multiple of 8 from 32 to {MAX_DIM}"
    if (points := D // 2 // lanes(D, wide=False)) > MAX_POINTS:
        return f"head size {D} would leave {points} points of its FFT to a lane ({MAX_POINTS} fit)"
    return None


@lru_cache(maxsize=64)
def rotation_table(rotation: str, D: int, wide: bool) -> np.ndarray:
    """The part of a table that depends on the rotation, D and its lanes alone, float64 rounded to
    fp32: of a transform :func:`stretch` times as long as the orthonormal one."""
    if rotation != "srft":
        return np.zeros(0, np.float32)
    N, M = D // 2, lanes(D, wide)
    R, lane = N // M, np.arange(M)

    def turn(x):
        return np.exp(-2j * np.pi * np.asarray(x, np.float64))

    # Stage h joins lanes that differ in bit h; the upper one is turned after the butterfly. Quarter
    # turns, and none, need no table.
    stages = [
        np.where(lane & h, turn((lane % h) / (2 * h)), 1)
        for h in (M >> s for s in range(1, M.bit_length() - 2))
    ]
    turns = [turn(lane * k / N) for k in range(1, R)]
    width = M.bit_length() - 1
    reverse = np.array([int(f"{i:0{width}b}"[::-1], 2) if width else 0 for i in lane])
    split = [-1j * turn((k + R * reverse) / D) for k in range(R)]
    parts = [*stages, *turns, *split, turn(np.arange(R) / R)]
    flat = np.concatenate([np.asarray(p, np.complex128) for p in parts])
    pairs = np.stack([flat.real, flat.imag], axis=-1).reshape(-1)
    return pairs.astype(np.float32)


def stretch(rotation: str, D: int) -> float:
    """How many times as long as it should be a vector is that the kernels have rotated."""
    return {"srft": np.sqrt(2 * D), "srht": np.sqrt(D)}.get(rotation, 1.0)


def channel_table(side: Transform, purpose: str, wide: bool) -> mx.array:
    """A table for one side of the cache.

    Args:
        side (Transform): Keys or values.
        purpose (str): ``"pack"``: (x − μ) · s/σ, rotate, · λ. ``"query"``: q · sσ, rotate, / λ.
            ``"output"``: / λ, rotate back, · sσ, + μ.
        wide (bool): Of the kernel that reads it; see :func:`lanes`.
    """
    D = side.dim
    ones = np.ones(D) if side.rotation == "none" else signs(side.seed, side.stream, D)
    s = mx.array((ones / stretch(side.rotation, D)).astype(np.float32))
    table = mx.array(rotation_table(side.rotation, D, wide))
    c = side.calibration
    if c.mu is not None or c.sigma is not None or c.lam is not None:
        shape = next(a.shape for a in (c.mu, c.sigma, c.lam) if a is not None)
        one, zero = mx.ones(shape), mx.zeros(shape)
        mu, sigma, lam = (
            neutral if a is None else a.astype(mx.float32)
            for a, neutral in ((c.mu, zero), (c.sigma, one), (c.lam, one))
        )
        first, second = {
            "pack": (s / sigma, lam),
            "query": (s * sigma, 1 / lam),
            "output": (1 / lam, s * sigma),
        }[purpose]
        factors = mx.stack([first, second, mu], axis=1).reshape(-1)  # [Hkv, 3, D]
    else:
        factors = s
    table = mx.contiguous(mx.concatenate([table, factors]))
    mx.eval(table)  # made once, shared by threads and streams
    return table


@dataclass(frozen=True)
class Tables:
    """Of one format: the keys' table and, after it, the values'. Of ``packs`` then the format's
    ``feedback``, if there is one, transposed: lanes read what an error adds to neighbouring
    channels."""

    packs: tuple[mx.array, ...]
    attends: mx.array
    restores: mx.array


_tables: "WeakKeyDictionary[Format, Tables]" = WeakKeyDictionary()


def of(fmt: Format) -> Tables:
    """The tables of a format, made once and gone with it."""
    if (found := _tables.get(fmt)) is None:
        found = _tables[fmt] = Tables(
            packs=(_both(fmt, "pack", "pack", wide=False), *_transposed(fmt.feedback)),
            attends=_both(fmt, "query", "output", wide=True),
            restores=_both(fmt, "output", "output", wide=False),
        )
    return found


def _transposed(G: mx.array | None) -> tuple[mx.array, ...]:
    if G is None:
        return ()
    G = mx.contiguous(G.swapaxes(-1, -2))
    mx.eval(G)
    return (G,)


def _both(fmt: Format, of_keys: str, of_values: str, wide: bool) -> mx.array:
    keys, values = (fmt.keys, of_keys), (fmt.values, of_values)
    table = mx.concatenate([channel_table(*side, wide) for side in (keys, values)])
    mx.eval(table)
    return table
