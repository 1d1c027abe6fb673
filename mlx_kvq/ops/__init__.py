"""The operations on packed rows, and the one place that chooses their backend.

The fused kernels (``ops.gpu``) run on Metal and CUDA, plain operations anywhere. A format that
they do not cover, or a kernel that fails on this machine, falls back with one line on stderr.

A call's shapes and dtypes are checked once: what runs it is then in ``memo.launches``.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

import mlx.core as mx

from ..format.format import Format
from ..format.layout import tail_dtype
from . import check, gpu, memo, plain, trial
from .gpu import attention, keep, machine, quantize, unpack
from .gpu.machine import ahead
from .gpu.sources import kernels_path
from .memo import forget
from .packed import CAUSAL, EVERY, First, Mask, Packed
from .plain import in_token_order

__all__ = [
    "BACKENDS",
    "CAUSAL",
    "EVERY",
    "First",
    "Mask",
    "Packed",
    "ahead",
    "attend",
    "backend",
    "dequantize",
    "feeds_back",
    "forget",
    "in_token_order",
    "is_reference",
    "keep_exact",
    "kernels_path",
    "language",
    "pack_rotated",
    "pack_start",
    "quantize_pack",
    "reference",
    "restore",
    "tail_dtype",
]

_CPU = mx.Device(mx.cpu, 0)
BACKENDS: dict[str, ModuleType] = {"gpu": gpu, "plain": plain}  # to compare them


def language() -> str | None:
    """``"metal"`` or ``"cuda"`` if the default device is such a GPU, else ``None``."""
    return machine.language()


def feeds_back(fmt: Format) -> bool:
    """Whether rounding keys with feedback costs little: the default device is a GPU whose kernels
    cover the format, whatever ``MLX_KVQ_BACKEND`` says."""
    return language() is not None and gpu.why_not(fmt) is None


def backend(fmt: Format, dtype: mx.Dtype = mx.float16) -> ModuleType:
    """The module that runs the operations for ``fmt`` on the default device.

    Raises:
        ValueError: If ``MLX_KVQ_BACKEND`` names a backend that does not exist.
    """
    asked = os.environ.get("MLX_KVQ_BACKEND", "")
    if asked not in ("", "reference"):
        raise ValueError(f"MLX_KVQ_BACKEND is 'reference' or unset, got {asked!r}.")
    if asked == "reference" or language() is None or _plain_only:
        return plain
    if reason := gpu.why_not(fmt, dtype):
        trial.say(f"{reason}: using plain mx operations, which are slower.")
        return plain
    return gpu


_plain_only = False


@contextmanager
def reference() -> Iterator[None]:
    """Inside, plain operations: for a run that is to show errors of Python, and is hardly computed.
    Kernels would be compiled for it, and tried, that nothing else needs. Other threads compute with
    plain operations meanwhile, too: not for while one decodes."""
    global _plain_only
    outer, _plain_only = _plain_only, True
    try:
        with memo.apart():
            yield
    finally:
        _plain_only = outer


def is_reference(fmt: Format, dtype: mx.Dtype) -> bool:
    """Whether plain mx operations run the attention, not a kernel."""
    key = ("backend", fmt.kind, mx.default_device() == _CPU, dtype)
    return memo.kernel(key, lambda: backend(fmt, dtype)) is plain


def quantize_pack(
    k: mx.array,
    v: mx.array,
    fmt: Format,
    tail: mx.array | None = None,
    size: int = 0,
    capacity: int | None = None,
) -> tuple[mx.array, mx.array | None]:
    """Rotate, quantize and pack new keys and values; with ``size`` also the exact tail, rotated
    vectors of the newest tokens.

    Args:
        k (mx.array): Post-RoPE keys [B, Hkv, L, Dk], fp16, bf16 or fp32.
        v (mx.array): Values [B, Hkv, L, Dv], likewise.
        fmt (Format): The layer's format.
        tail (mx.array, optional): The tail before these tokens, [B, Hkv, R, Dk + Dv] in any float
            dtype, the newest token last. ``None`` where there was no token.
        size (int): Tokens of the new tail, 1 to R + L; up to L + 65536 where ``tail`` is ``None``:
            it then begins with zeros. 0 for none, with nothing of what is next either.
        capacity (int, optional): Rows to make, at least L: zeros follow.

    Returns:
        Rows, uint32 [B, Hkv, L or capacity, W]; and the new tail [B, Hkv, size, Dk + Dv] in
        :func:`tail_dtype` of the dtype of ``k``: what codes are made of, λ ⊙ R((x − μ) ⊘ σ), of
        keys and then of values; or ``None``. B, Hkv and L may be 0.

    Raises:
        ValueError: If the shapes do not fit each other or ``fmt``, a dtype is another, or a number
            is out of its range.
    """
    kind = fmt.kind if isinstance(fmt, Format) else None
    key = (
        "pack", kind, mx.default_device() == _CPU, k.shape, v.shape, k.dtype, v.dtype,
        size, capacity, None if tail is None else (tail.shape, tail.dtype),
    )  # fmt: skip
    whole = type(size) is int and (capacity is None or type(capacity) is int)
    run = memo.launches.get(key) if whole else None
    if run is None:
        check.check_pack(k, v, fmt, tail, size, capacity)
        run = memo.remember(key, _pack(k, v, fmt, tail, size, capacity))
    return run(k, v, fmt, tail)


def pack_start(
    k: mx.array, v: mx.array, fmt: Format, size: int, capacity: int | None = None
) -> tuple[mx.array, mx.array, mx.array]:
    """:func:`quantize_pack` where sequences begin, and their first tokens exactly.

    Args:
        k, v, fmt, size, capacity: As for :func:`quantize_pack`, ``size`` at least 1; L is at least
            ``fmt.first``, and that 1.

    Returns:
        Rows and the tail of :func:`quantize_pack`; and the first tokens [B, Hkv, fmt.first, Dk +
        Dv], as :func:`keep_exact` makes them.

    Raises:
        ValueError: As :func:`quantize_pack`.
    """
    kind, first = (fmt.kind, fmt.first) if isinstance(fmt, Format) else (None, 0)
    key = (
        "start", kind, first, mx.default_device() == _CPU, k.shape, v.shape, k.dtype, v.dtype,
        size, capacity,
    )  # fmt: skip
    whole = type(size) is int and (capacity is None or type(capacity) is int)
    run = memo.launches.get(key) if whole else None
    if run is None:
        check.check_start(k, v, fmt, size, capacity)
        run = memo.remember(key, _pack_start(k, v, fmt, size, capacity))
    return run(k, v, fmt)


def keep_exact(k: mx.array, v: mx.array, fmt: Format, tail: mx.array, size: int) -> mx.array:
    """Move the exact tail on by new keys and values: what a decode step does instead of
    :func:`quantize_pack`. :func:`pack_rotated` later makes the same rows of the tail.

    Args:
        k (mx.array): Post-RoPE keys [B, Hkv, L, Dk], fp16, bf16 or fp32.
        v (mx.array): Values [B, Hkv, L, Dv], likewise.
        fmt (Format): The layer's format.
        tail (mx.array): The tail before these tokens, [B, Hkv, R, Dk + Dv] in any float dtype, the
            newest token last.
        size (int): Tokens of the new tail, at least 1, L to R + L.

    Returns:
        mx.array: The new tail [B, Hkv, size, Dk + Dv], as that of :func:`quantize_pack`. B, Hkv and
        L may be 0.

    Raises:
        ValueError: If the shapes do not fit each other or ``fmt``, a dtype is another, or a number
            is out of its range.
    """
    kind = fmt.kind if isinstance(fmt, Format) else None
    key = (
        "keep", kind, mx.default_device() == _CPU, k.shape, v.shape, k.dtype, v.dtype, size,
        tail.shape, tail.dtype,
    )  # fmt: skip
    run = memo.launches.get(key) if type(size) is int else None
    if run is None:
        check.check_keep(k, v, fmt, tail, size)
        run = memo.remember(key, _keep(k, v, fmt, tail, size))
    return run(k, v, fmt, tail)


def pack_rotated(y: mx.array, fmt: Format) -> mx.array:
    """Rows of tokens of a tail: the bits that :func:`quantize_pack` makes of their keys and values.

    Args:
        y (mx.array): [B, Hkv, L, Dk + Dv] in a tail's dtype, as :func:`keep_exact` returns it.
        fmt (Format): The layer's format.

    Returns:
        mx.array: Rows, uint32 [B, Hkv, L, W]. B, Hkv and L may be 0.

    Raises:
        ValueError: If the shape does not fit ``fmt``, or the dtype is another.
    """
    kind = fmt.kind if isinstance(fmt, Format) else None
    key = "rotated", kind, mx.default_device() == _CPU, y.shape, y.dtype
    run = memo.launches.get(key)
    if run is None:
        check.check_rotated(y, fmt)
        run = memo.remember(key, _pack_rotated(y, fmt))
    return run(y, fmt)


def attend(
    q: mx.array,
    packed: Packed,
    scale: float,
    mask: Mask = EVERY,
    sinks: mx.array | None = None,
) -> mx.array:
    """Attention of a few queries straight over the packed rows.

    Args:
        q (mx.array): Queries [B, Hq, L, Dk]; Hq is a multiple of Hkv.
        packed (Packed): The layer's keys and values. With a tail of at least
            ``format.recent_at(length) + L - 1`` tokens, a query that is the last of n tokens of
            its sequence reads the ``format.recent_at(n)`` tokens up to its own (or
            ``packed.recent``), and any after it, from there and not from their rows; likewise the
            first tokens that are kept exactly. Where rows are a ring and there is either, L is 1,
            unless its ``idx`` is ``length``.
        scale (float): Softmax scale, usually Dk ** -0.5; finite.
        mask (Mask): What a query may see.
        sinks (mx.array, optional): [Hq] logits, in any float dtype, that take probability and add
            no value: parameters of a layer, so they are no part of the step's mask.

    Returns:
        mx.array: [B, Hq, L, Dv] in q's dtype. A query that may attend to nothing gets a
        finite, otherwise unspecified output. In fp16, outputs beyond it saturate. B, Hq and L may
        be 0.

    Raises:
        ValueError: If shapes or dtypes do not fit, or a number is out of its range.
    """
    if type(scale) is not float:
        check.check_scale(scale)
        scale = float(scale)
    fmt, tail, length, ring, first = (
        packed.format, packed.tail, packed.length, packed.ring, packed.first
    )  # fmt: skip
    kind = fmt.kind if isinstance(fmt, Format) else None
    key = (
        "attend", kind, mx.default_device() == _CPU, q.shape, q.dtype, packed.rows.shape, scale,
        mask.key, None if tail is None else (tail.shape, tail.dtype),
        None if first is None else first.key,
        None if sinks is None else (sinks.shape, sinks.dtype),
    )  # fmt: skip
    found = memo.launches.get(key)
    run = None
    if found is not None and type(length) is int:
        run = found.get((length, ring, None if first is None else first.numbers, packed.recent))
    if run is None:
        run = _attend(key, q, packed, scale, mask, sinks)
    return run(q, packed, mask, sinks)


def dequantize(packed: Packed, dtype: mx.Dtype = mx.float32) -> tuple[mx.array, mx.array]:
    """Rows to keys and values in the rotated domain; the newest ones from the tail and the first
    ones exactly, if there are such.

    Returns:
        K [B, Hkv, length, Dk] and V [B, Hkv, length, Dv] in ``dtype``: fp16, bf16 or fp32. In fp16,
        numbers beyond it saturate.

    Raises:
        ValueError: If shapes or dtypes do not fit.
    """
    return _unpacked("dequantize", packed, dtype, None)


def restore(
    packed: Packed,
    dtype: mx.Dtype = mx.float32,
    chunk: tuple[mx.array, mx.array] | None = None,
) -> tuple[mx.array, mx.array]:
    """Rows to keys and values as the model made them; as :func:`dequantize`.

    A chunk, keys [B, Hkv, L, Dk] and values [B, Hkv, L, Dv] of newer tokens, follows as it is:
    the outputs then have length + L tokens.
    """
    return _unpacked("restore", packed, dtype, chunk)


def _pack(k, v, fmt, tail, size, capacity) -> Callable:
    if k.size and backend(fmt, k.dtype) is gpu:
        run = quantize.prepare(k, v, fmt.kind, tail, size, capacity)
        if trial.pack(run.launch, k, v, fmt, tail, size):
            return run
    return lambda k, v, fmt, tail: plain.quantize_pack(k, v, fmt, tail, size, capacity)


def _pack_start(k, v, fmt, size, capacity) -> Callable:
    pack, F, older = _pack(k, v, fmt, None, size, capacity), fmt.first, size - k.shape[2]
    keeps: Callable | None = None
    if older < 0:  # the tail lacks some of them
        tail = mx.zeros((*k.shape[:2], size, k.shape[3] + v.shape[3]), tail_dtype(k.dtype))
        keeps = _keep(k[:, :, :F], v[:, :, :F], fmt, tail, F)

    def first(k, v, given, tail):
        if keeps is None:  # not a view, which would keep all of the tail in memory
            return mx.contiguous(tail[:, :, older : older + F])
        return keeps(k[:, :, :F], v[:, :, :F], given, tail)

    if isinstance(pack, quantize.Pack) and isinstance(keeps, keep.Keep | None):
        keeps = None if keeps is None else keeps.with_table
        return pack.then(first)

    def apart(k, v, fmt):
        rows, tail = pack(k, v, fmt, None)
        return rows, tail, first(k, v, fmt, tail)

    return apart


def _keep(k, v, fmt, tail, size) -> Callable:
    if k.size and backend(fmt, k.dtype) is gpu:
        run = keep.prepare(k, v, fmt.kind, tail, size)
        if trial.keep(run.launch, k, v, fmt, tail):
            _pack_rotated(tail, fmt)  # tried now, not in the middle of a text
            return run
    return lambda k, v, fmt, tail: plain.keep_exact(k, v, fmt, tail, size)


def _pack_rotated(y, fmt) -> Callable:
    if not y.size:
        return lambda y, fmt: mx.zeros((*y.shape[:3], fmt.layout.words), mx.uint32)
    if backend(fmt, y.dtype) is gpu:
        run = quantize.prepare_rotated(y, fmt.kind)
        if trial.rotated(run.launch, y, fmt):
            return lambda y, fmt: run(*quantize.sides(y, fmt.kind), fmt)[0]
    return plain.pack_rotated


def _attend(key: tuple, q, packed: Packed, scale: float, mask: Mask, sinks) -> Callable:
    """What runs this length: shapes are checked once, then the length of each step."""
    if (lengths := memo.launches.get(key)) is None:
        check.check_attend(q, packed, scale, mask, sinks)
        lengths = memo.remember(key, _Lengths(q, packed, scale, mask, sinks))
    else:
        check.check_length(packed, q.shape[2])
    return lengths.at(q, packed, scale, mask, sinks)


class _Lengths(dict):
    """(length, ring, numbers of first tokens, fixed tail) -> what runs attention, for one shape of
    the other arguments."""

    def __init__(self, q, packed: Packed, scale: float, mask: Mask, sinks):
        self.shape = None
        if q.size and backend(packed.format, q.dtype) is gpu:
            self.shape = attention.Attend(q, packed, scale, mask, sinks)

    def at(self, q, packed: Packed, scale: float, mask: Mask, sinks) -> Callable:
        def run(q, packed, mask, sinks):
            return plain.attend(q, packed, scale, mask, sinks)

        if not q.size:
            out = (*q.shape[:3], packed.format.layout.v_dim)
            return lambda q, *_: mx.zeros(out, q.dtype)
        if self.shape is not None:
            parts = self.shape.parts(packed.length)
            if trial.attend(self.shape, parts, q, packed, scale, mask, sinks):
                run = self.shape.at(packed, parts)
        if len(self) >= 256:  # lengths far behind
            self.clear()
        first = None if packed.first is None else packed.first.numbers
        self[packed.length, packed.ring, first, packed.recent] = run
        return run


def _unpacked(op: str, packed: Packed, dtype: mx.Dtype, chunk) -> tuple[mx.array, mx.array]:
    fmt, tail, first = packed.format, packed.tail, packed.first
    try:
        key = (
            op, fmt.kind, mx.default_device() == _CPU, packed.rows.shape, packed.length,
            type(packed.length), dtype, None if tail is None else (tail.shape, tail.dtype),
            None if first is None else (first.key, first.numbers),
            tuple((x.shape, x.dtype) for x in chunk or ()),
        )  # fmt: skip
        run = memo.launches.get(key)
    except (AttributeError, TypeError):  # no pair of arrays: the checks say what
        run = None
    if run is None:
        check.check_unpack(packed, dtype, chunk)
        run = memo.remember(key, _unpack(op, packed, dtype, chunk))
    return run(packed, chunk)


def _unpack(op: str, packed: Packed, dtype: mx.Dtype, chunk) -> Callable:
    rows, lay = packed.rows, packed.format.layout
    if not rows.size:  # no sequence or no head
        shape = *rows.shape[:2], packed.length + (0 if chunk is None else chunk[0].shape[2])
        return lambda *_: tuple(mx.zeros((*shape, D), dtype) for D in (lay.k_dim, lay.v_dim))
    if chunk is not None and not chunk[0].shape[2]:
        return lambda packed, _: _unpacked(op, packed, dtype, None)
    if backend(packed.format, dtype) is gpu:
        run = unpack.prepare(op, packed, dtype, chunk)
        if trial.unpack(run.launch, packed, dtype, chunk):
            return run
    if op == "dequantize":
        return lambda packed, _: plain.dequantize(packed, dtype)
    return lambda packed, chunk: plain.restore(packed, dtype, chunk)
