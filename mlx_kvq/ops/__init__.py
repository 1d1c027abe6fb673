"""The three operations on packed rows, and the one place that chooses their backend.

``rows`` is uint32 [B, Hkv, capacity, W] (``mlx_kvq.format.layout``); the whole buffer and a length
are passed, never a slice.

The fused kernels (``ops.gpu.fused``) run on Metal and CUDA, plain operations anywhere. A format
they do not cover, or a kernel that fails on this machine, falls back with one line on stderr.
"""

import os
import sys
from types import ModuleType
from weakref import WeakKeyDictionary

import mlx.core as mx

from ..format.format import Format
from ..format.layout import tail_dtype
from . import plain
from .check import (
    _FLOATS,
    _check_each,
    _check_held,
    _check_scale,
    _check_whole,
    check_mask,
    check_tail,
)
from .gpu import fused, steps
from .gpu.fused import ahead, language
from .gpu.sources import kernels_path
from .plain import in_token_order

__all__ = [
    "BACKENDS",
    "ahead",
    "attend",
    "backend",
    "dequantize",
    "in_token_order",
    "kernels_path",
    "language",
    "quantize_pack",
    "quantize_pack_tail",
    "restore",
    "rotate_outputs",
    "rotate_queries",
    "tail_dtype",
]

BACKENDS: dict[str, ModuleType] = {"gpu": fused, "plain": plain}  # to compare them
_said: set[str] = set()


class _Known:
    """What is known of a format, kept with it and gone with it."""

    def __init__(self, fmt: Format):
        self.heads = fmt.heads
        self.chosen: dict[tuple, ModuleType] = {}  # what `backend` said before
        self.tried: dict[tuple, bool] = {}  # kernel variant -> whether it ran on this machine
        # Arguments of a decode step, checked before, -> its launch: tens of layers ask for every
        # token.
        self.packs: dict[tuple, steps.PackStep] = {}
        self.steps: dict[tuple, steps.AttendStep] = {}


_known: "WeakKeyDictionary[Format, _Known]" = WeakKeyDictionary()


def _of(fmt: Format) -> _Known:
    try:
        known = _known.get(fmt)
    except TypeError:  # no weak reference can be made
        known = None
    if known is None:
        if not isinstance(fmt, Format):
            raise ValueError(
                f"A format is what mlx_kvq.format.format.make_format returns, got {fmt!r}."
            )
        known = _known[fmt] = _Known(fmt)
    return known


def backend(fmt: Format, dtype: mx.Dtype = mx.float16) -> ModuleType:
    """The module that runs the operations for ``fmt`` on the default device.

    Raises:
        ValueError: If ``MLX_KVQ_BACKEND`` names a backend that does not exist.
    """
    asked = os.environ.get("MLX_KVQ_BACKEND", "")
    if asked not in ("", "reference"):
        raise ValueError(f"MLX_KVQ_BACKEND is 'reference' or unset, got {asked!r}.")
    if asked == "reference" or fused.language() is None:
        return plain
    if reason := fused.why_not(fmt, dtype):
        _say(f"{reason}: using plain mx operations, which are slower.")
        return plain
    return fused


def _backend(fmt: Format, dtype: mx.Dtype) -> ModuleType:
    """``backend``, remembered: decoding asks three times a layer and token."""
    key, chosen = (dtype, fused.language()), _of(fmt).chosen
    if (module := chosen.get(key)) is None:
        module = chosen[key] = backend(fmt, dtype)
    return module


def is_reference(fmt: Format, dtype: mx.Dtype) -> bool:
    """Whether plain mx operations run the attention, not a kernel."""
    return _backend(fmt, dtype) is plain


def forget() -> None:
    """Choose and try again: for tests, which change the environment."""
    _known.clear()
    steps.token_of.cache_clear()


def _say(line: str) -> None:
    if line not in _said:
        _said.add(line)
        print(f"[mlx_kvq] {line}", file=sys.stderr)


def _works(op: str, variant: tuple, fmt: Format, dtype: mx.Dtype, trial) -> bool:
    """Whether a kernel runs on this machine: its first use is tried, and evaluated, on zeros.
    Kernels are compiled when they are evaluated, which is too late to fall back."""
    key, tried = (op, dtype, *variant), _of(fmt).tried
    works = tried.get(key)
    if works is None:
        try:
            mx.eval(getattr(fused, op)(*trial()))
            works = True
        except Exception as error:
            works = False
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            _say(
                f"warning: the {op} kernel failed on this machine ({reason}). Using plain mx "
                "operations, which are slower. Please report the output of 'mlx_kvq doctor'."
            )
        tried[key] = works
    return works


def quantize_pack(k: mx.array, v: mx.array, fmt: Format) -> mx.array:
    """Rotate, quantize and pack new keys and values.

    Args:
        k (mx.array): Post-RoPE keys [B, Hkv, L, Dk], fp16, bf16 or fp32.
        v (mx.array): Values [B, Hkv, L, Dv], likewise.
        fmt (Format): The layer's format.

    Returns:
        mx.array: Rows, uint32 [B, Hkv, L, W]. B, Hkv and L may be 0.

    Raises:
        ValueError: If the shapes do not fit each other or ``fmt``, or a dtype is another.
    """
    key, packs = (k.shape, v.shape, k.dtype, v.dtype), _of(fmt).packs
    if (step := packs.get(key)) is not None and mx.default_device() == step.device:
        return step(k, v)
    check_vectors(k, v, fmt)
    if k.size and _packs_fused("quantize_pack", k, v, fmt):
        if fused.replays() and k.shape[2] == 1:
            packs[key] = steps.PackStep(k, v, fmt)
        return fused.quantize_pack(k, v, fmt)
    return plain.quantize_pack(k, v, fmt)


def quantize_pack_tail(
    k: mx.array,
    v: mx.array,
    fmt: Format,
    tail: mx.array | None,
    keep: int,
    held: mx.array | None = None,
    capacity: int | None = None,
) -> tuple[mx.array, mx.array]:
    """:func:`quantize_pack`, and the exact tail: rotated vectors of the newest tokens.

    Args:
        k (mx.array), v (mx.array), fmt (Format): As there.
        tail (mx.array, optional): The tail before these tokens, [B, Hkv, R, Dk + Dv] in any float
            dtype, the newest token last. ``None`` where there was no token.
        keep (int): Tokens of the new tail, 1 to R + L; up to L + 65536 where ``tail`` is ``None``:
            it then begins with zeros.
        held (mx.array, optional): Rows uint32 [B, Hkv, N, W], row contiguous, N >= L, that the
            new ones are to follow.
        capacity (int, optional): Rows to make, at least L, where nothing is held: zeros follow.

    Returns:
        Rows as :func:`quantize_pack`, or the last N of ``held`` and them; and the new tail
        [B, Hkv, keep, Dk + Dv] in :func:`tail_dtype` of the dtype of ``k``: what codes are made of,
        λ ⊙ R((x − μ) ⊘ σ), of keys and then of values.

    Raises:
        ValueError: As there, or if the tail or what is held is of another shape or dtype, or a
            number is out of its range.
    """
    key, packs = None, _of(fmt).packs
    if tail is not None and capacity is None:
        key = (
            k.shape, v.shape, k.dtype, v.dtype, keep, tail.shape, tail.dtype,
            None if held is None else held.shape,
        )  # fmt: skip
        if (step := packs.get(key)) is not None and mx.default_device() == step.device:
            return step(k, v, tail) if held is None else step(k, v, tail, held)
    check_vectors(k, v, fmt)
    L = k.shape[2]
    _check_whole("A tail's number of tokens to keep", keep, 1, L + _MOST_BEFORE)
    if tail is not None:
        check_tail(tail, k.shape[:2], keep - L, fmt)
    if held is not None:
        _check_held(held, k.shape, fmt)
    if capacity is not None:
        _check_whole("A capacity", capacity, L)
        if held is not None:
            raise ValueError(f"A capacity is for rows without held ones, got {capacity} and those.")
    given = None if tail is None else tail.dtype, held is not None
    if k.size and _packs_fused("quantize_pack_tail", k, v, fmt, given):
        if key is not None and fused.replays() and k.shape[2] == 1:
            packs[key] = steps.PackStep(k, v, fmt, tail, keep, held)
        return fused.quantize_pack_tail(k, v, fmt, tail, keep, held, capacity)
    return plain.quantize_pack_tail(k, v, fmt, tail, keep, held, capacity)


_MOST_BEFORE = 1 << 16  # zeros that a first tail may begin with


def _packs_fused(
    op: str,
    k: mx.array,
    v: mx.array,
    fmt: Format,
    given: tuple[mx.Dtype | None, bool] = (None, False),
) -> bool:
    # The kernel has no rounding with feedback.
    if fmt.feedback is not None or _backend(fmt, k.dtype) is not fused:
        return False
    lay, tokens = fmt.layout, min(k.shape[2], 64)  # enough for every constant of the kernel

    def trial():
        H = k.shape[1]
        zeros = mx.zeros((1, H, tokens, lay.k_dim), k.dtype)
        args = zeros, mx.zeros((1, H, tokens, lay.v_dim), v.dtype), fmt
        if op == "quantize_pack":
            return args
        tail = mx.zeros((1, H, 2, lay.k_dim + lay.v_dim), given[0]) if given[0] else None
        held = mx.zeros((1, H, tokens, lay.words), mx.uint32) if given[1] else None
        return *args, tail, 2, held

    pairs = fused.pack_pairs(fmt, k.shape[2], op != "quantize_pack")
    return _works(op, (pairs, *given), fmt, k.dtype, trial)


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
    tail: mx.array | None = None,
    ring: tuple[int, int] | None = None,
) -> mx.array:
    """Attention of a few queries straight over the packed rows.

    Args:
        q (mx.array): Queries [B, Hq, L, Dk]; Hq is a multiple of Hkv.
        rows (mx.array): uint32 [B, Hkv, capacity, W].
        length (int): Rows that hold tokens, 1 to capacity.
        fmt (Format): The layer's format.
        scale (float): Softmax scale, usually Dk ** -0.5; finite.
        mask: ``None``, ``"causal"`` (the queries are the last L tokens), or an array
            broadcastable to [B, Hq, L, length], boolean (True attends) or additive.
        sinks (mx.array, optional): [Hq] logits, in any float dtype, that take probability and add
            no value.
        starts (mx.array, optional): Integers [B], the first position each batch row may attend to.
        window (int, optional): The query at position p attends to positions above p - window.
        tail (mx.array, optional): From :func:`quantize_pack_tail`, or its numbers in another float
            dtype, at least ``fmt.recent + L - 1`` tokens: a query reads the ``fmt.recent`` tokens
            up to its own, and any after it, from there and not from their rows. Masks hold as
            without it.
        ring (tuple, optional): ``(keep, idx)`` where rows are not in the order of their tokens,
            which is [:keep], [idx:length], [keep:idx]; then L is 1, unless idx is ``length``. Only
            a tail needs it.

    Returns:
        mx.array: [B, Hq, L, Dv] in q's dtype. A query that may attend to nothing gets a
        finite, otherwise unspecified output. In fp16, outputs beyond it saturate. B, Hq and L may
        be 0.

    Raises:
        ValueError: If shapes or dtypes do not fit, the mask is another string, or a number is out
            of its range.
    """
    key: tuple | None = None
    prepared = _of(fmt).steps
    if mask is None and sinks is None:
        key = (q.shape, q.dtype, window, None if tail is None else tail.shape)
        if starts is not None:
            key += starts.size, starts.dtype
        step = prepared.get(key)
        if (
            step is not None
            and step.rows_shape == rows.shape
            and type(length) is int
            and 0 < length <= step.capacity
            and step.scale == scale
            and mx.default_device() == step.device
            and (out := step(q, rows, length, starts, tail, ring)) is not None
        ):
            return out
    check_rows(rows, length, fmt)
    if q.ndim != 4 or q.dtype not in _FLOATS:
        raise ValueError(
            f"Queries are float16, bfloat16 or float32 [B, Hq, L, {fmt.layout.k_dim}], "
            f"got {q.dtype} {q.shape}."
        )
    B, Hq, L, D = q.shape
    Hkv = rows.shape[1]
    if B != rows.shape[0] or (Hq % Hkv if Hkv else Hq) or fmt.layout.k_dim != D:
        raise ValueError(f"Queries {q.shape} do not fit rows {rows.shape} of {fmt.signature}.")
    _check_scale(scale)
    if mask is not None:
        check_mask(mask, q, length)
    if sinks is not None:
        _check_each("Sinks", sinks, Hq, "query heads", mx.floating)
    if starts is not None:
        _check_each("Starts", starts, B, "sequences", mx.integer)
    if window is not None:
        _check_whole("A window", window, 1)
    if tail is not None:
        check_tail(tail, rows.shape[:2], fmt.recent + L - 1, fmt)
        if ring is not None:
            steps.check_ring(ring, length, L)
    if not q.size:
        return mx.zeros((B, Hq, L, fmt.layout.v_dim), q.dtype)
    args = (q, rows, length, fmt, scale, mask, sinks, starts, window, tail, ring)
    if _backend(fmt, q.dtype) is fused:
        span = length if window is None else min(length, window + L - 1)
        parts = fused.attend_parts(fmt, B, Hq, Hkv, L, span)
        kind = mask.dtype if isinstance(mask, mx.array) else None

        def trial():
            return (
                mx.zeros((B, Hq, L, D), q.dtype),
                mx.zeros((B, Hkv, 64, rows.shape[3]), mx.uint32),
                64,
                fmt,
                scale,
                None if kind is None else mx.zeros((L, 64), kind),
                sinks,
                None if starts is None else mx.zeros((B,), mx.int32),
                window,
                None if tail is None else mx.zeros((B, Hkv, *tail.shape[2:]), tail.dtype),
                None,
                min(2, parts),
            )

        # What is a constant of the kernel: another is another compilation, which may fail.
        sizes = fused.attend_sizes(fmt, B, Hq, Hkv, L)
        exact = None if tail is None else tail.dtype
        variant = (kind, sinks is None, starts is None, exact, parts == 1, sizes)
        if _works("attend", variant, fmt, q.dtype, trial):
            if key is not None and fused.replays():
                step = steps.AttendStep(
                    q, rows, fmt, scale, window, starts is not None, parts == 1, tail
                )
                if step.fits():
                    prepared[key] = step
            return fused.attend(*args, parts)
    return plain.attend(*args)


def dequantize(
    rows: mx.array,
    length: int,
    fmt: Format,
    dtype: mx.Dtype = mx.float32,
    tail: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Rows to keys and values in the rotated domain, for prefill.

    With a tail [B, Hkv, R, Dk + Dv], in any float dtype, the last R of them, or as many as there
    are, come from it.

    Returns:
        K [B, Hkv, length, Dk] and V [B, Hkv, length, Dv] in ``dtype``: fp16, bf16 or fp32. In fp16,
        numbers beyond it saturate.

    Raises:
        ValueError: If shapes or dtypes do not fit.
    """
    return _unpacked("dequantize", rows, length, fmt, dtype, tail)


def restore(
    rows: mx.array,
    length: int,
    fmt: Format,
    dtype: mx.Dtype = mx.float32,
    tail: mx.array | None = None,
    chunk: tuple[mx.array, mx.array] | None = None,
) -> tuple[mx.array, mx.array]:
    """Rows to keys and values as the model made them; as :func:`dequantize`.

    A chunk, keys [B, Hkv, L, Dk] and values [B, Hkv, L, Dv] of newer tokens, follows as it is:
    the outputs then have length + L tokens.
    """
    if chunk is not None:
        if not isinstance(chunk, (tuple, list)) or len(chunk) != 2:
            raise ValueError(f"A chunk is a pair of keys and values, got {type(chunk).__name__}.")
        check_vectors(*chunk, fmt)
        if chunk[0].shape[:2] != rows.shape[:2]:
            raise ValueError(f"A chunk {chunk[0].shape} does not follow rows {rows.shape}.")
        if not chunk[0].shape[2]:
            chunk = None
    return _unpacked("restore", rows, length, fmt, dtype, tail, chunk)


def _unpacked(op: str, rows, length, fmt, dtype, tail, chunk=None) -> tuple[mx.array, mx.array]:
    check_rows(rows, length, fmt)
    if not isinstance(dtype, mx.Dtype) or dtype not in _FLOATS:
        raise ValueError(f"The dtype is float16, bfloat16 or float32, got {dtype}.")
    more = () if chunk is None else (chunk,)
    if tail is not None:
        check_tail(tail, rows.shape[:2], 0, fmt)
    if not rows.size:  # no sequence or no head
        shape = *rows.shape[:2], length + (0 if chunk is None else chunk[0].shape[2])
        lay = fmt.layout
        return mx.zeros((*shape, lay.k_dim), dtype), mx.zeros((*shape, lay.v_dim), dtype)
    if _backend(fmt, dtype) is fused:

        def trial():
            zeros = mx.zeros((1, rows.shape[1], 1, rows.shape[3]), mx.uint32)
            end = None if tail is None else mx.zeros((1, *tail.shape[1:]), tail.dtype)
            new = [tuple(mx.zeros((1, *x.shape[1:]), x.dtype) for x in pair) for pair in more]
            return zeros, 1, fmt, dtype, end, *new

        variant = None if tail is None else tail.dtype, *(x.dtype for pair in more for x in pair)
        if _works(op, variant, fmt, dtype, trial):
            return getattr(fused, op)(rows, length, fmt, dtype, tail, *more)
    return getattr(plain, op)(rows, length, fmt, dtype, tail, *more)


def rotate_queries(q: mx.array, fmt: Format, Hkv: int) -> mx.array:
    """Queries [B, Hq, L, Dk] into the rotated domain of the keys, R(q ⊙ σ) ⊘ λ, in their dtype.

    Raises:
        ValueError: If the queries do not fit ``fmt`` or ``Hkv``, the number of KV heads.
    """
    _check_heads("Queries", q, fmt.layout.k_dim, fmt, Hkv)
    if not q.size:
        return q
    if _fused_rotation("rotate_queries", q, fmt, Hkv):
        return fused.rotate_queries(q, fmt, Hkv)
    return plain.saturated(fmt.keys.query(q), q.dtype)


def rotate_outputs(o: mx.array, fmt: Format, Hkv: int) -> mx.array:
    """Outputs [B, Hq, L, Dv] out of the rotated domain of the values, Rᵀ(o ⊘ λ) ⊙ σ + μ.

    Raises:
        ValueError: If the outputs do not fit ``fmt`` or ``Hkv``, the number of KV heads.
    """
    _check_heads("Outputs", o, fmt.layout.v_dim, fmt, Hkv)
    if not o.size:
        return o
    if _fused_rotation("rotate_outputs", o, fmt, Hkv):
        return fused.rotate_outputs(o, fmt, Hkv)
    return plain.saturated(fmt.values.output(o), o.dtype)


def _fused_rotation(name: str, x: mx.array, fmt: Format, Hkv: int) -> bool:
    def trial():
        return mx.zeros((1, Hkv, 1, x.shape[3]), x.dtype), fmt, Hkv

    return _backend(fmt, x.dtype) is fused and _works(name, (), fmt, x.dtype, trial)


def _check_kv_heads(H: int, fmt: Format) -> None:
    if (heads := _of(fmt).heads) is not None and heads != H:
        raise ValueError(f"The format is calibrated for {heads} KV heads, got {H}.")


def _check_heads(what: str, x: mx.array, D: int, fmt: Format, Hkv: int) -> None:
    """Queries or outputs, whose heads share KV heads."""
    _check_whole("Hkv, the number of KV heads,", Hkv, 0)
    if x.ndim != 4 or x.shape[3] != D or x.dtype not in _FLOATS:
        raise ValueError(
            f"{what} are float16, bfloat16 or float32 [B, Hq, L, {D}], got {x.dtype} {x.shape}."
        )
    if x.shape[1] % Hkv if Hkv else x.shape[1]:
        raise ValueError(f"{what} {x.shape} do not share {Hkv} KV heads.")
    _check_kv_heads(Hkv, fmt)


def check_vectors(k: mx.array, v: mx.array, fmt: Format) -> None:
    lay = fmt.layout
    if k.shape[:-1] != v.shape[:-1] or k.ndim != 4:
        raise ValueError(f"Keys {k.shape} and values {v.shape} are not [B, Hkv, L, D] of one size.")
    if k.shape[-1] != lay.k_dim or v.shape[-1] != lay.v_dim:
        raise ValueError(
            f"Keys {k.shape} and values {v.shape} do not fit the cache's head sizes "
            f"{lay.k_dim} and {lay.v_dim}."
        )
    if k.dtype not in _FLOATS or v.dtype not in _FLOATS:
        raise ValueError(
            f"Keys and values are float16, bfloat16 or float32, got {k.dtype} and {v.dtype}."
        )
    _check_kv_heads(k.shape[1], fmt)


def check_rows(rows: mx.array, length: int, fmt: Format) -> None:
    if rows.ndim != 4 or rows.shape[3] != fmt.layout.words or rows.dtype != mx.uint32:
        raise ValueError(
            f"Rows are uint32 [B, Hkv, capacity, {fmt.layout.words}] for {fmt.signature}, "
            f"got {rows.dtype} {rows.shape}."
        )
    if type(length) is not int:
        _check_whole("A length", length, 1)
    if not 0 < length <= rows.shape[2]:
        raise ValueError(f"Length {length} is not 1 to the capacity {rows.shape[2]}.")
    _check_kv_heads(rows.shape[1], fmt)
