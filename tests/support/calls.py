"""Operations, given piece by piece what ``ops.Packed`` and ``ops.Mask`` hold."""

import mlx.core as mx

from mlx_kvq import ops


def attend(
    backend, q, rows, length, fmt, scale, mask=None, sinks=None, starts=None, window=None,
    tail=None, ring=None, first=None, **more,
):  # fmt: skip
    given = ops.Mask.of(mask)
    seen = ops.Mask(given.causal, window, starts, given.array)
    packed = ops.Packed(rows, length, fmt, tail, ring, first)
    return backend.attend(q, packed, scale, seen, sinks, **more)


def dequantize(backend, rows, length, fmt, dtype=mx.float32, tail=None, first=None):
    return backend.dequantize(ops.Packed(rows, length, fmt, tail, None, first), dtype)


def restore(backend, rows, length, fmt, dtype=mx.float32, tail=None, chunk=None, first=None):
    return backend.restore(ops.Packed(rows, length, fmt, tail, None, first), dtype, chunk)


def quantize_pack(backend, k, v, fmt):
    """The rows."""
    return backend.quantize_pack(k, v, fmt)[0]
