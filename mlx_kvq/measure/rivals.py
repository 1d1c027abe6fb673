"""Caches that round as published schemes do, fake-quantized: plain arrays in which a block of
tokens is overwritten by what its scheme would keep of it. They show what a scheme's rounding costs
in quality and count the bytes that it would need; their speed and memory say nothing.

Both schemes round a block of tokens together once it is full, so the newest tokens, up to a block,
are read exactly. A chunk of a prompt reads itself exactly and what came before it from its blocks.

- ``kivi``, after KIVI (arXiv 2402.02750): keys per channel over a block of 64 tokens, values per
  token in groups of 64 channels; minimum and step of each in 16 bits.
- ``kvarn``, after KVarN: a Hadamard transform, then the standard deviations of the tokens and of
  the channels of a tile of 128 tokens are made even in turns; keys are rounded per channel, values
  per token. Minimum and step in 16 bits, and one factor for each line across them.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models import cache as stock
from mlx_lm.models.base import create_causal_mask

from ..format.rotation import hadamard, why_not

FAKE = "fake-quantized"
BLOCKS = {"kivi": 64, "kvarn": 128}  # tokens that are rounded together
GROUP = 64  # channels of a value that share a scale in KIVI, or all if 64 does not divide them
HALF = 16  # bits of a scale, and of a value that is kept exactly
ROUNDS = 16  # of making a tile even
EVEN = (1e-3, 1e3)  # a round divides by standard deviations within these
LOG_FACTORS = (-0.3, 10.0)  # all rounds together divide by exp of these


@dataclass(frozen=True)
class Rival:
    """A parsed name: ``kivi`` or ``kvarn``, with options as a spec has them (``kivi:first=4``).

    Args:
        scheme (str): ``"kivi"`` or ``"kvarn"``.
        bits (int): Bits of a code, 2 to 8.
        block (int): Tokens that are rounded together; 0 takes the scheme's own.
        residual (int): Newest tokens that are exact besides those of the unfilled block.
        first (int): First tokens that are exact; blocks begin after them.

    Raises:
        ValueError: If the scheme is unknown or a number out of range.
    """

    scheme: str
    bits: int = 4
    block: int = 0
    residual: int = 0
    first: int = 0

    def __post_init__(self):
        if self.scheme not in BLOCKS:
            raise ValueError(f"A rival is one of {', '.join(BLOCKS)}, got {self.scheme!r}.")
        object.__setattr__(self, "block", self.block or BLOCKS[self.scheme])
        if not 2 <= self.bits <= 8:
            raise ValueError(f"{self.scheme}: bits is 2 to 8, got {self.bits}.")
        if not 2 <= self.block <= 1024:
            raise ValueError(f"{self.scheme}: block is 2 to 1024 tokens, got {self.block}.")

    def __str__(self) -> str:
        default = type(self)(self.scheme)
        given = [
            f"{option}={getattr(self, option)}"
            for option in OPTIONS
            if getattr(self, option) != getattr(default, option)
        ]
        return f"{self.scheme}:{','.join(given)}" if given else self.scheme

    @classmethod
    def parse(cls, text: object) -> "Rival | None":
        """The rival of this name; None if it is the name of something else. Raises ValueError if
        an option is unknown or out of range."""
        scheme, colon, tail = str(text).strip().lower().partition(":")
        if scheme not in BLOCKS:
            return None
        options: dict[str, int] = {}
        for item in tail.split(",") if colon else ():
            found = re.fullmatch(r"\s*(\w+)\s*=\s*(\d+)\s*", item)
            if not found or found[1] not in OPTIONS or found[1] in options:
                raise ValueError(
                    f"{text}: options of {scheme} are {', '.join(f'{o}=N' for o in OPTIONS)}, "
                    f"once each; got {item!r}."
                )
            options[found[1]] = int(found[2])
        return cls(scheme, **options)

    @property
    def note(self) -> str:
        """To be printed beside its figures."""
        exact = f"the unfilled block of {self.block} tokens"
        exact += f", {self.residual} more" if self.residual else ""
        exact += f" and the first {self.first}" if self.first else ""
        return f"{FAKE}: rounded as the scheme does, stored as plain arrays; exact: {exact}"

    def why_not(self, Dk: int, Dv: int) -> str | None:
        """Why heads of these sizes cannot be rounded so, or None if they can."""
        if self.scheme == "kivi":
            return None
        return why_not("srht", Dk) or why_not("srht", Dv)

    def bits_per_token(self, Dk: int, Dv: int) -> float:
        """Bits of a rounded token in one head, scales included."""
        if self.scheme == "kivi":
            keys, values = 2 * HALF * Dk / self.block, 2 * HALF * Dv / _group(Dv)
        else:
            keys = 2 * HALF * Dk / self.block + HALF
            values = 2 * HALF + HALF * Dv / self.block
        return self.bits * (Dk + Dv) + keys + values

    def round(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """What is kept of whole blocks, [B, H, n * block, D] each."""
        round_keys, round_values = _ROUND[self.scheme]
        return _blocks(round_keys, keys, self), _blocks(round_values, values, self)


OPTIONS = tuple(f.name for f in fields(Rival) if f.name != "scheme")


def label(name: str) -> str:
    """The name of a cache for a table: of a rival it says that it is fake-quantized."""
    return f"{name} ({FAKE})" if name.partition(":")[0] in BLOCKS else name


def _blocks(function: Callable, x: mx.array, rival: Rival) -> mx.array:
    B, H, L, D = x.shape
    tiles = x.reshape(B, H, L // rival.block, rival.block, D).astype(mx.float32)
    return function(tiles, rival.bits).reshape(x.shape).astype(x.dtype)


def _group(D: int) -> int:
    return GROUP if D % GROUP == 0 else D


def affine(x: mx.array, bits: int, axis: int) -> mx.array:
    """x fp32 as codes between its minimum and maximum along an axis, both given by a minimum and a
    step in 16 bits."""
    low, high = x.min(axis=axis, keepdims=True), x.max(axis=axis, keepdims=True)
    most = 2**bits - 1
    step = _half(mx.maximum((high - low) / most, 1e-7))
    low = _half(low)
    return mx.clip(mx.round((x - low) / step), 0, most) * step + low


def _half(x: mx.array) -> mx.array:
    return x.astype(mx.float16).astype(mx.float32)


def _kivi_keys(x: mx.array, bits: int) -> mx.array:
    return affine(x, bits, -2)


def _kivi_values(x: mx.array, bits: int) -> mx.array:
    groups = x.reshape(*x.shape[:-1], -1, _group(x.shape[-1]))
    return affine(groups, bits, -1).reshape(x.shape)


def even(x: mx.array) -> tuple[mx.array, mx.array]:
    """Factors of tokens [..., T, 1] and of channels [..., 1, D] of tiles x fp32 [..., T, D], whose
    quotient has standard deviations as even as any round of taking turns had them."""
    tokens = mx.zeros((*x.shape[:-1], 1))  # logarithms
    channels = mx.zeros((*x.shape[:-2], 1, x.shape[-1]))
    best, now = (mx.exp(tokens), mx.exp(channels)), x
    least = _imbalance(now)
    for _ in range(ROUNDS):
        tokens = mx.clip(tokens + mx.log(mx.clip(_deviation(now, -1), *EVEN)), *LOG_FACTORS)
        now = x / mx.exp(tokens + channels)
        channels = mx.clip(channels + mx.log(mx.clip(_deviation(now, -2), *EVEN)), *LOG_FACTORS)
        now = x / mx.exp(tokens + channels)
        found = _imbalance(now)
        better = found <= least
        best = (
            mx.where(better, mx.exp(tokens), best[0]),
            mx.where(better, mx.exp(channels), best[1]),
        )
        least = mx.where(better, found, least)
    return best


def _deviation(x: mx.array, axis: int) -> mx.array:
    return mx.sqrt(mx.var(x, axis=axis, keepdims=True, ddof=1))


def _imbalance(x: mx.array) -> mx.array:
    """Largest over smallest standard deviation, of tokens and of channels, [..., 1, 1]."""
    parts = [_deviation(x, axis) for axis in (-1, -2)]
    both = (-2, -1)
    high = [p.max(axis=both, keepdims=True) for p in parts]
    low = [mx.maximum(p.min(axis=both, keepdims=True), 1e-8) for p in parts]
    return high[0] / low[0] + high[1] / low[1]


def _kvarn(x: mx.array, bits: int, axis: int) -> mx.array:
    """Tiles fp32 [..., T, D], rounded along tokens (-2) or along channels (-1). What a step and a
    minimum vary with is multiplied into them; the other factor is kept beside them."""
    H = _hadamard(x.shape[-1])
    x = x @ H
    tokens, channels = even(x)
    inside, beside = (channels, tokens) if axis == -2 else (tokens, channels)
    y = x / tokens / channels
    low, high = y.min(axis=axis, keepdims=True), y.max(axis=axis, keepdims=True)
    most = 2**bits - 1
    step = mx.maximum((high - low) / most, 1e-10)
    codes = mx.clip(mx.round((y - low) / step), 0, most)
    return ((codes * _half(step * inside) + _half(low * inside)) * _half(beside)) @ H


def _kvarn_keys(x: mx.array, bits: int) -> mx.array:
    return _kvarn(x, bits, -2)


def _kvarn_values(x: mx.array, bits: int) -> mx.array:
    return _kvarn(x, bits, -1)


_ROUND = {"kivi": (_kivi_keys, _kivi_values), "kvarn": (_kvarn_keys, _kvarn_values)}


@lru_cache
def _hadamard(D: int) -> mx.array:
    return mx.array(hadamard(D).astype(np.float32))  # symmetric, its own inverse


class FakeCache(stock.KVCache):
    """A growing cache, or with ``window`` that of a layer that reads so many newest tokens, which
    reads its blocks rounded. Its sequences are all of one length, without padding."""

    def __init__(self, rival: Rival, window: int | None = None):
        super().__init__()
        self.keys: Any
        self.values: Any
        self.rival, self.window = rival, window
        self.rounded = rival.first  # tokens before this are as they stay

    def update_and_fetch(self, keys, values):
        self._round_full_blocks()
        k, v = super().update_and_fetch(keys, values)
        if self.window is None:
            return k, v
        begin = max(0, self.offset - (self.window - 1 + keys.shape[2]))
        return k[:, :, begin:], v[:, :, begin:]

    def _round_full_blocks(self) -> None:
        r, begin = self.rival, self.rounded
        end = begin + max(0, self.offset - r.residual - begin) // r.block * r.block
        if end > begin:
            some = [x[:, :, begin:end] for x in (self.keys, self.values)]
            self.keys[:, :, begin:end], self.values[:, :, begin:end] = r.round(*some)
            self.rounded = end

    def make_mask(self, N, return_array=False, window_size=None):
        if self.window is None:
            return super().make_mask(N, return_array=return_array, window_size=window_size)
        if N == 1:
            return None  # what the token may not see is not returned
        return create_causal_mask(N, min(self.offset, self.window - 1), window_size=self.window)

    def size(self) -> int:
        """Tokens that are read."""
        return self.offset if self.window is None else min(self.offset, self.window)

    def bytes_per_token(self) -> float:
        """Bytes that the scheme would need, shared out over the tokens that are read: rounded ones,
        and room for all that it may have to keep exactly, in 16 bits."""
        H, Dk, Dv = self.keys.shape[1], self.keys.shape[3], self.values.shape[3]
        r, tokens = self.rival, self.size()
        room = min(tokens, r.first + r.residual + r.block)
        rounded = max(0, tokens - (self.offset - self.rounded) - r.first)
        bits = rounded * r.bits_per_token(Dk, Dv) + room * HALF * (Dk + Dv)
        return H * bits / 8 / tokens

    def is_trimmable(self) -> bool:
        return False

    def trim(self, n):
        raise NotImplementedError(f"{self.rival}: a {FAKE} cache cannot be cut.")

    @classmethod
    def merge(cls, caches):
        raise NotImplementedError(f"A {FAKE} cache is of sequences of one length.")
