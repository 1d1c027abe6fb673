"""Checks of the operations' arguments: one error that says what was given."""

import math
from numbers import Integral, Real

import mlx.core as mx

from ..format.format import Format

FLOATS = (mx.float16, mx.bfloat16, mx.float32)
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


def check_scale(scale: float) -> None:
    number = isinstance(scale, Real) and not isinstance(scale, bool)
    if not number or not math.isfinite(scale) or abs(scale) > 3e38:
        raise ValueError(f"A scale is a finite number, got {scale!r}.")


def _check_each(what: str, x: mx.array, count: int, of: str, kind: mx.DtypeCategory) -> None:
    if not isinstance(x, mx.array) or x.shape != (count,) or not mx.issubdtype(x.dtype, kind):
        name = "float" if kind is mx.floating else "integer"
        found = f"{x.dtype} {x.shape}" if isinstance(x, mx.array) else repr(x)
        raise ValueError(f"{what} are one {name} for each of {count} {of}, got {found}.")


def check_tail(tail: mx.array, heads: tuple[int, ...], least: int, fmt: Format) -> None:
    lay = fmt.layout
    wanted = (*heads, lay.k_dim + lay.v_dim)
    if (
        tail.ndim != 4
        or (*tail.shape[:2], tail.shape[3]) != wanted
        or tail.shape[2] < least
        or tail.dtype not in FLOATS
    ):
        raise ValueError(
            f"The tail is [{heads[0]}, {heads[1]}, at least {max(0, least)} tokens, {wanted[2]}] "
            f"in float16, bfloat16 or float32, got {tail.dtype} {tail.shape}."
        )


def check_first_parts(array, count, at) -> None:
    """What no row is needed for."""
    if not isinstance(array, mx.array) or array.ndim != 4 or array.dtype not in FLOATS:
        found = f"{array.dtype} {array.shape}" if isinstance(array, mx.array) else repr(array)
        raise ValueError(
            f"First tokens are [B, Hkv, F, Dk + Dv] in float16, bfloat16 or float32, got {found}."
        )
    _check_whole("A number of first tokens", count, 0, array.shape[2])
    if isinstance(at, mx.array):
        _check_each("Places of first tokens", at, array.shape[0], "sequences", mx.integer)
    else:
        _check_whole("A place of first tokens", at, -_MOST)


def _check_first(packed) -> None:
    first, lay = packed.first, packed.format.layout
    if first is None:
        return
    wanted = (*packed.rows.shape[:2], lay.k_dim + lay.v_dim)
    array = getattr(first, "array", None)
    if array is None or (*array.shape[:2], array.shape[3]) != wanted:
        found = repr(first) if array is None else f"{array.shape}"
        raise ValueError(
            f"The first tokens are [{wanted[0]}, {wanted[1]}, F, {wanted[2]}], got {found}."
        )
    if packed.tail is not None and packed.tail.dtype != array.dtype:
        raise ValueError(
            f"The first tokens are in the tail's dtype {packed.tail.dtype}, got {array.dtype}."
        )


def check_mask_parts(causal, window, starts, array) -> None:
    """What no query and no row is needed for."""
    if type(causal) is not bool:
        raise ValueError(f"A mask is causal or not, got {causal!r}.")
    if window is not None:
        _check_whole("A window", window, 1)
    if starts is not None:
        whole = isinstance(starts, mx.array) and mx.issubdtype(starts.dtype, mx.integer)
        if not whole or starts.ndim != 1:
            found = f"{starts.dtype} {starts.shape}" if isinstance(starts, mx.array) else starts
            raise ValueError(f"Starts are one integer for each sequence, got {found}.")
    if array is None:
        return
    if not isinstance(array, mx.array):
        raise ValueError(f"A mask is None, 'causal' or an array, got {array!r}.")
    if array.dtype != mx.bool_ and array.dtype not in FLOATS:
        raise ValueError(f"A mask is boolean (True attends) or a float to add, got {array.dtype}.")
    if causal:
        raise ValueError("A mask is causal or an array, got both.")


def _check_mask(mask: mx.array, q: mx.array, length: int) -> None:
    scores = (*q.shape[:3], length)
    # From the right, each axis is that of the scores or 1.
    pairs = zip(mask.shape[::-1], scores[::-1], strict=False)
    if mask.ndim > 4 or any(m not in (1, s) for m, s in pairs):
        raise ValueError(
            f"A mask {mask.shape} does not broadcast to the scores [B, Hq, L, length] = {scores}."
        )


def check_format(fmt: Format) -> None:
    if not isinstance(fmt, Format):
        raise ValueError(
            f"A format is what mlx_kvq.format.format.make_format returns, got {fmt!r}."
        )


def _check_kv_heads(H: int, fmt: Format) -> None:
    if (heads := fmt.heads) is not None and heads != H:
        raise ValueError(f"The format is calibrated for {heads} KV heads, got {H}.")


def check_vectors(k: mx.array, v: mx.array, fmt: Format) -> None:
    check_format(fmt)
    lay = fmt.layout
    if k.shape[:-1] != v.shape[:-1] or k.ndim != 4:
        raise ValueError(f"Keys {k.shape} and values {v.shape} are not [B, Hkv, L, D] of one size.")
    if k.shape[-1] != lay.k_dim or v.shape[-1] != lay.v_dim:
        raise ValueError(
            f"Keys {k.shape} and values {v.shape} do not fit the cache's head sizes "
            f"{lay.k_dim} and {lay.v_dim}."
        )
    if k.dtype not in FLOATS or v.dtype not in FLOATS:
        raise ValueError(
            f"Keys and values are float16, bfloat16 or float32, got {k.dtype} and {v.dtype}."
        )
    _check_kv_heads(k.shape[1], fmt)


_MOST_BEFORE = 1 << 16  # zeros that a first tail may begin with


def check_pack(k, v, fmt, tail, size, capacity) -> None:
    """Arguments of ``quantize_pack``."""
    check_vectors(k, v, fmt)
    if size == 0 and type(size) is int and tail is capacity is None:
        return
    L = k.shape[2]
    _check_whole("A tail's number of tokens to keep", size, 1, L + _MOST_BEFORE)
    if tail is not None:
        check_tail(tail, k.shape[:2], size - L, fmt)
    if capacity is not None:
        _check_whole("A capacity", capacity, L)


def check_start(k, v, fmt, size, capacity) -> None:
    """Arguments of ``pack_start``."""
    check_pack(k, v, fmt, None, size, capacity)
    _check_whole("A tail's number of tokens to keep", size, 1)
    _check_whole("A format's number of first tokens", fmt.first, 1, k.shape[2])


def check_keep(k, v, fmt, tail, size) -> None:
    """Arguments of ``keep_exact``."""
    check_vectors(k, v, fmt)
    L = k.shape[2]
    _check_whole("A tail's number of tokens to keep", size, max(1, L))
    check_tail(tail, k.shape[:2], size - L, fmt)


def check_rotated(y, fmt) -> None:
    """Arguments of ``pack_rotated``."""
    check_format(fmt)
    check_tail(y, y.shape[:2], 0, fmt)
    _check_kv_heads(y.shape[1], fmt)


def check_length(packed, L: int) -> None:
    """The length, and where a ring of ``packed`` begins for L queries."""
    _check_span(packed)
    if packed.ring is not None and (packed.tail is not None or packed.first is not None):
        _check_ring(packed.ring, packed.length, L)


def _check_span(packed) -> None:
    length = packed.length
    if type(length) is not int:
        _check_whole("A length", length, 1)
    if not 0 < length <= packed.rows.shape[2]:
        raise ValueError(f"Length {length} is not 1 to the capacity {packed.rows.shape[2]}.")


def check_rows(packed) -> None:
    """Rows, length and format of a ``Packed``."""
    rows, fmt = packed.rows, packed.format
    check_format(fmt)
    if rows.ndim != 4 or rows.shape[3] != fmt.layout.words or rows.dtype != mx.uint32:
        raise ValueError(
            f"Rows are uint32 [B, Hkv, capacity, {fmt.layout.words}] for {fmt.signature}, "
            f"got {rows.dtype} {rows.shape}."
        )
    _check_span(packed)
    _check_kv_heads(rows.shape[1], fmt)
    _check_first(packed)


def check_unpack(packed, dtype, chunk) -> None:
    """Arguments of ``dequantize`` and ``restore``."""
    check_rows(packed)
    rows, fmt = packed.rows, packed.format
    if not isinstance(dtype, mx.Dtype) or dtype not in FLOATS:
        raise ValueError(f"The dtype is float16, bfloat16 or float32, got {dtype}.")
    if packed.tail is not None:
        check_tail(packed.tail, rows.shape[:2], 0, fmt)
    if chunk is None:
        return
    if not isinstance(chunk, (tuple, list)) or len(chunk) != 2:
        raise ValueError(f"A chunk is a pair of keys and values, got {type(chunk).__name__}.")
    check_vectors(chunk[0], chunk[1], fmt)
    if chunk[0].shape[:2] != rows.shape[:2]:
        raise ValueError(f"A chunk {chunk[0].shape} does not follow rows {rows.shape}.")


def check_attend(q, packed, scale, mask, sinks) -> None:
    check_rows(packed)
    rows, fmt = packed.rows, packed.format
    if q.ndim != 4 or q.dtype not in FLOATS:
        raise ValueError(
            f"Queries are float16, bfloat16 or float32 [B, Hq, L, {fmt.layout.k_dim}], "
            f"got {q.dtype} {q.shape}."
        )
    (B, Hq, L, D), Hkv = q.shape, rows.shape[1]
    if B != rows.shape[0] or (Hq % Hkv if Hkv else Hq) or fmt.layout.k_dim != D:
        raise ValueError(f"Queries {q.shape} do not fit rows {rows.shape} of {fmt.signature}.")
    check_scale(scale)
    if mask.array is not None:
        _check_mask(mask.array, q, packed.length)
    if sinks is not None:
        _check_each("Sinks", sinks, Hq, "query heads", mx.floating)
    if mask.starts is not None:
        _check_each("Starts", mask.starts, B, "sequences", mx.integer)
    if packed.tail is not None:
        check_tail(packed.tail, rows.shape[:2], packed.most_recent + L - 1, fmt)
    check_length(packed, L)


def _check_ring(ring: tuple[int, int], length: int, L: int) -> None:
    pair = isinstance(ring, tuple) and len(ring) == 2 and all(type(n) is int for n in ring)
    if not pair or not 0 <= ring[0] < ring[1] <= length or (L > 1 and ring[1] < length):
        raise ValueError(
            f"A ring of {length} rows for {L} queries is (keep, idx) with 0 <= keep < "
            f"idx <= {length}, of which idx is {length} for several queries, got {ring}."
        )
