"""From keys and queries of short windows to their moments at all positions of a long context.

RoPE turns pairs of channels by an angle proportional to the position, so a key at one position is a
key at any other, turned. The pass over text turns every key and query back to position 0; what
they are at the positions that are read later is then a closed form (``docs/mathematics.md``).
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

LEAST = 512  # positions of the shortest context in the mix (docs/calibration.md)


@dataclass(frozen=True, eq=False)
class Rope:
    """One call of ``mx.fast.rope``: what it did to its input, and what undoes it."""

    options: dict[str, Any]
    start: int = 0  # channels of the keys that it was given
    stop: int | None = None

    def undo(self, x: mx.array) -> mx.array:
        """x [B, H, L, D] as it was before this call, fp32. A factor of the length (YaRN's mscale)
        is applied before ``mx.fast.rope`` and stays."""
        x = x.astype(mx.float32)
        stop = self.stop or x.shape[-1]
        back = {**self.options, "scale": -self.options["scale"]}
        turned = mx.fast.rope(x[..., self.start : stop], **back)
        return mx.concatenate([x[..., : self.start], turned, x[..., stop:]], axis=-1)

    def turns(self, D: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each pair of D channels the first one, the second one, and by how many radians a
        position turns them (float64): by none beyond ``dims``."""
        dims, freqs = self.options["dims"], self.options.get("freqs")
        if freqs is None:
            freqs = self.options["base"] ** (np.arange(0, dims, 2) / dims)
        one = np.arange(0, dims, 2) if self.options["traditional"] else np.arange(dims // 2)
        one = one + self.start
        two = one + (1 if self.options["traditional"] else dims // 2)
        rest = np.setdiff1d(np.arange(D), np.concatenate([one, two]))
        angle = np.zeros(D // 2)
        angle[: dims // 2] = self.options["scale"] / np.array(freqs, dtype=np.float64)
        return np.concatenate([one, rest[::2]]), np.concatenate([two, rest[1::2]]), angle


class RopeWatch:
    """The last calls of ``mx.fast.rope``, through which all RoPE modules of mlx-lm go."""

    def __init__(self) -> None:
        # A layer turns queries and keys, some layers a second pair of each.
        self._calls: deque[tuple[mx.array, Rope]] = deque(maxlen=4)

    def call_that_made(self, keys: mx.array) -> Rope | None:
        """None if ``keys`` [B, H, L, D] did not come out of ``mx.fast.rope``, or changed since.

        Channels may have been joined to what came out, before or behind, and one head of it may
        have become a part of all.
        """
        for out, rope in self._calls:
            if out is keys:
                return rope
        for out, rope in self._calls:
            for start in _places(out, keys):
                stop = start + out.shape[-1]
                part = keys[..., start:stop]
                if mx.array_equal(mx.broadcast_to(out, part.shape), part):
                    return replace(rope, start=start, stop=stop)
        return None

    @contextmanager
    def watching(self) -> Iterator[None]:
        original = mx.fast.rope

        def rope(a: mx.array, dims: int, **options: Any) -> mx.array:
            out = original(a, dims, **options)
            kept = {k: v for k, v in options.items() if k != "stream"}
            self._calls.append((out, Rope({"dims": dims, **kept})))
            return out

        setattr(mx.fast, "rope", rope)  # noqa: B010 (for mypy)
        try:
            yield
        finally:
            setattr(mx.fast, "rope", original)  # noqa: B010
            self._calls.clear()


def _places(part: mx.array, whole: mx.array) -> tuple[int, ...]:
    """Channels of ``whole`` [B, H, L, D] where ``part``, no more of them, may begin."""
    if part.ndim != 4 or part.shape[-1] > whole.shape[-1] or part.shape[2] != whole.shape[2]:
        return ()
    if part.shape[1] not in (1, whole.shape[1]):
        return ()
    return 0, whole.shape[-1] - part.shape[-1]


def contexts(positions: int) -> list[int]:
    """Lengths of the contexts that ``positions`` stands for: it, its half, and so on, down to
    ``LEAST``. All count alike, so the mix is as good for short contexts as for long ones."""
    lengths = [positions]
    while lengths[-1] // 2 >= LEAST:
        lengths.append(lengths[-1] // 2)
    return lengths


def mean_turn(angles: np.ndarray, lengths: list[int]) -> np.ndarray:
    """E[e^{i angle p}] over the positions p of contexts of these lengths, complex128.

    Over one context of n tokens, with x half the angle: e^{i(n-1)x} sin(n x) / (n sin x).
    """
    x = angles / 2
    whole = np.isclose(np.sin(x), 0.0, atol=1e-12)  # turns by nothing
    sine = np.where(whole, 1.0, np.sin(x))
    turns = [
        np.where(whole, 1.0, np.exp(1j * (n - 1) * x) * np.sin(n * x) / (n * sine)) for n in lengths
    ]
    return np.asarray(np.mean(turns, axis=0))


def spread(
    mean: np.ndarray, square: np.ndarray, rope: Rope, lengths: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """E[x] [H, D] and E[x xᵀ] [H, D, D] at all positions of contexts of these lengths, from those
    at position 0.

    With z = a + ib for a pair (a, b), a turn by θ is z e^{iθ}. E[z z̄ᵀ] then turns by differences of
    angles and E[z zᵀ] by sums, and these two hold all of E[x xᵀ].
    """
    D = mean.shape[-1]
    a, b, angle = rope.turns(D)
    z = (mean[:, a] + 1j * mean[:, b]) * mean_turn(angle, lengths)
    aa, bb, ab, ba = (square[:, i[:, None], j] for i, j in ((a, a), (b, b), (a, b), (b, a)))
    one = (aa + bb + 1j * (ba - ab)) * mean_turn(angle[:, None] - angle, lengths)
    two = (aa - bb + 1j * (ba + ab)) * mean_turn(angle[:, None] + angle, lengths)
    new_mean, new_square = np.empty_like(mean), np.empty_like(square)
    new_mean[:, a], new_mean[:, b] = z.real, z.imag
    new_square[:, a[:, None], a] = (one + two).real / 2
    new_square[:, b[:, None], b] = (one - two).real / 2
    new_square[:, a[:, None], b] = (two - one).imag / 2
    new_square[:, b[:, None], a] = (one + two).imag / 2
    return new_mean, new_square
