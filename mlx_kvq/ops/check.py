"""Checks of the operations' arguments: one error that says what was given."""

import math
from numbers import Integral, Real

import mlx.core as mx

from ..format.format import Format

_FLOATS = (mx.float16, mx.bfloat16, mx.float32)
_MOST = 2**31 - 1  # kernels count in int32


def _check_whole(what: str, x: int, least: int, most: int = _MOST) -> None:
    if type(x) is int and least <= x <= most:
        return
    if isinstance(x, bool) or not isinstance(x, Integral):
        raise ValueError(f"{what} is a whole number, got {x!r}.")
    if x < least:
        raise ValueError(f"{what} is at least {least}, got {x}.")
    if x > most:
        raise ValueError(f"{what} is at most {most}, got {x}.")


def _check_scale(scale: float) -> None:
    number = isinstance(scale, Real) and not isinstance(scale, bool)
    if not number or not math.isfinite(scale) or abs(scale) > 3e38:
        raise ValueError(f"A scale is a finite number, got {scale!r}.")


def _check_each(what: str, x: mx.array, count: int, of: str, kind: mx.DtypeCategory) -> None:
    if not isinstance(x, mx.array) or x.shape != (count,) or not mx.issubdtype(x.dtype, kind):
        name = "float" if kind is mx.floating else "integer"
        found = f"{x.dtype} {x.shape}" if isinstance(x, mx.array) else repr(x)
        raise ValueError(f"{what} are one {name} for each of {count} {of}, got {found}.")


def _check_held(held: mx.array, shape: tuple[int, ...], fmt: Format) -> None:
    wanted = (*shape[:2], fmt.layout.words)
    if (
        held.ndim != 4
        or (*held.shape[:2], held.shape[3]) != wanted
        or held.shape[2] < shape[2]
        or held.dtype != mx.uint32
    ):
        raise ValueError(
            f"Held rows are uint32 [{wanted[0]}, {wanted[1]}, at least {shape[2]}, {wanted[2]}], "
            f"got {held.dtype} {held.shape}."
        )


def check_tail(tail: mx.array, heads: tuple[int, ...], least: int, fmt: Format) -> None:
    lay = fmt.layout
    wanted = (*heads, lay.k_dim + lay.v_dim)
    if (
        tail.ndim != 4
        or (*tail.shape[:2], tail.shape[3]) != wanted
        or tail.shape[2] < least
        or tail.dtype not in _FLOATS
    ):
        raise ValueError(
            f"The tail is [{heads[0]}, {heads[1]}, at least {max(0, least)} tokens, {wanted[2]}] "
            f"in float16, bfloat16 or float32, got {tail.dtype} {tail.shape}."
        )


def check_mask(mask: mx.array | str, q: mx.array, length: int) -> None:
    if not isinstance(mask, mx.array):
        if mask != "causal":
            raise ValueError(f"A mask is None, 'causal' or an array, got {mask!r}.")
        return
    if mask.dtype != mx.bool_ and mask.dtype not in _FLOATS:
        raise ValueError(f"A mask is boolean (True attends) or a float to add, got {mask.dtype}.")
    scores = (*q.shape[:3], length)
    # From the right, each axis is that of the scores or 1.
    pairs = zip(mask.shape[::-1], scores[::-1], strict=False)
    if mask.ndim > 4 or any(m not in (1, s) for m, s in pairs):
        raise ValueError(
            f"A mask {mask.shape} does not broadcast to the scores [B, Hq, L, length] = {scores}."
        )
