"""The three operations on packed rows, and the one place that chooses their backend.

``rows`` is uint32 [B, Hkv, capacity, W] (``mlx_kvq.layout``); the whole buffer and a length
are passed, never a slice.

The fused kernels (``mlx_kvq.fused``) run on Metal and CUDA, the reference anywhere. A format
they do not cover, or a kernel that fails on this machine, falls back with one line on stderr.
"""

import os
import sys
from types import ModuleType

import mlx.core as mx

from . import fused, reference
from .format import Format

_tried: dict[tuple, bool] = {}  # kernel variant -> whether it ran on this machine
_said: set[str] = set()


def backend(fmt: Format, dtype: mx.Dtype = mx.float16) -> ModuleType:
    """The module that runs the operations for ``fmt`` on the default device.

    Raises:
        ValueError: If ``MLX_KVQ_BACKEND`` names a backend that does not exist.
    """
    asked = os.environ.get("MLX_KVQ_BACKEND", "")
    if asked not in ("", "reference"):
        raise ValueError(f"MLX_KVQ_BACKEND is 'reference' or unset, got {asked!r}.")
    if asked == "reference" or fused.language() is None:
        return reference
    if reason := fused.why_not(fmt, dtype):
        _say(f"{reason}: using plain mx operations, which are slower.")
        return reference
    return fused


def _say(line: str) -> None:
    if line not in _said:
        _said.add(line)
        print(f"[mlx_kvq] {line}", file=sys.stderr)


def _run(op: str, variant: tuple, fmt: Format, dtype: mx.Dtype, trial, *args):
    """Run ``op`` on its backend. A kernel's first use is tried and evaluated on small zeros:
    kernels are compiled when they are evaluated, too late to fall back by then.
    """
    module = backend(fmt, dtype)
    if module is fused:
        key = (op, fused.language(), fmt.signature, dtype, *variant)
        if key not in _tried:
            try:
                mx.eval(getattr(fused, op)(*trial()))
                _tried[key] = True
            except Exception as error:
                _tried[key] = False
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                _say(
                    f"warning: the {op} kernel failed on this machine ({reason}). Using plain mx "
                    "operations, which are slower. Please report the output of 'mlx_kvq doctor'."
                )
        if not _tried[key]:
            module = reference
    return getattr(module, op)(*args)


def quantize_pack(k: mx.array, v: mx.array, fmt: Format) -> mx.array:
    """Rotate, quantize and pack new keys and values.

    Args:
        k (mx.array): Post-RoPE keys [B, Hkv, L, Dk], fp16, bf16 or fp32.
        v (mx.array): Values [B, Hkv, L, Dv], same dtype.
        fmt (Format): The layer's format.

    Returns:
        mx.array: Rows, uint32 [B, Hkv, L, W].

    Raises:
        ValueError: If the shapes do not fit each other or ``fmt``.
    """
    lay = fmt.layout
    if k.shape[:-1] != v.shape[:-1] or k.ndim != 4:
        raise ValueError(f"Keys {k.shape} and values {v.shape} are not [B, Hkv, L, D] of one size.")
    if k.shape[-1] != lay.k_dim or v.shape[-1] != lay.v_dim:
        raise ValueError(
            f"Keys {k.shape} and values {v.shape} do not fit the cache's head sizes "
            f"{lay.k_dim} and {lay.v_dim}."
        )
    Hkv = k.shape[1]

    def trial():
        return (
            mx.zeros((1, Hkv, 1, lay.k_dim), k.dtype),
            mx.zeros((1, Hkv, 1, lay.v_dim), v.dtype),
            fmt,
        )

    return _run("quantize_pack", (), fmt, k.dtype, trial, k, v, fmt)


def attend(
    q: mx.array,
    rows: mx.array,
    length: int,
    fmt: Format,
    scale: float,
    mask: mx.array | str | None = None,
    sinks: mx.array | None = None,
    starts: mx.array | None = None,
    window: int | None = None,
) -> mx.array:
    """Attention of a few queries straight over the packed rows.

    Args:
        q (mx.array): Queries [B, Hq, L, Dk]; Hq is a multiple of Hkv.
        rows (mx.array): uint32 [B, Hkv, capacity, W].
        length (int): Rows that hold tokens, 1 to capacity.
        fmt (Format): The layer's format.
        scale (float): Softmax scale, usually Dk ** -0.5.
        mask: ``None``, ``"causal"`` (the queries are the last L tokens), or an array
            broadcastable to [B, Hq, L, length], boolean (True attends) or additive.
        sinks (mx.array, optional): [Hq] logits that take probability and add no value.
        starts (mx.array, optional): int32 [B], the first position each batch row may attend to.
        window (int, optional): The query at position p attends to positions above p - window.

    Returns:
        mx.array: [B, Hq, L, Dv] in q's dtype. A query that may attend to nothing gets a
        finite, otherwise unspecified output.

    Raises:
        ValueError: If shapes do not fit.
    """
    _check_rows(rows, length, fmt)
    B, Hq, _, D = q.shape
    if B != rows.shape[0] or Hq % rows.shape[1] or fmt.layout.k_dim != D:
        raise ValueError(f"Queries {q.shape} do not fit rows {rows.shape} of {fmt.signature}.")
    Hkv, L = rows.shape[1], q.shape[2]
    parts = 1
    if backend(fmt, q.dtype) is fused:
        parts = min(2, fused.attend_parts(q.shape, rows.shape, length, fmt, window))
    kind = mask.dtype if isinstance(mask, mx.array) else None
    variant = (kind, sinks is None, starts is None, parts)

    def trial():
        n = 64
        return (
            mx.zeros((1, Hq, L, D), q.dtype),
            mx.zeros((1, Hkv, n, rows.shape[3]), mx.uint32),
            n,
            fmt,
            scale,
            None if kind is None else mx.zeros((L, n), kind),
            sinks,
            None if starts is None else mx.zeros((1,), mx.int32),
            window,
            parts,
        )

    args = (q, rows, length, fmt, scale, mask, sinks, starts, window)
    return _run("attend", variant, fmt, q.dtype, trial, *args)


def dequantize(
    rows: mx.array, length: int, fmt: Format, dtype: mx.Dtype = mx.float32
) -> tuple[mx.array, mx.array]:
    """Rows to keys and values in the rotated domain, for prefill.

    Returns:
        K [B, Hkv, length, Dk] and V [B, Hkv, length, Dv] in ``dtype``.
    """
    _check_rows(rows, length, fmt)

    def trial():
        return mx.zeros((1, rows.shape[1], 1, rows.shape[3]), mx.uint32), 1, fmt, dtype

    return _run("dequantize", (), fmt, dtype, trial, rows, length, fmt, dtype)


def _check_rows(rows: mx.array, length: int, fmt: Format) -> None:
    if rows.ndim != 4 or rows.shape[3] != fmt.layout.words or rows.dtype != mx.uint32:
        raise ValueError(
            f"Rows are uint32 [B, Hkv, capacity, {fmt.layout.words}] for {fmt.signature}, "
            f"got {rows.dtype} {rows.shape}."
        )
    if not 0 < length <= rows.shape[2]:
        raise ValueError(f"Length {length} is not 1 to the capacity {rows.shape[2]}.")
