"""The first use of a kernel on this machine: random data, compared with plain operations. Kernels
are compiled when they are evaluated, which is too late to fall back. What passed is kept on disk,
what failed is tried again by the next process."""

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import mlx.core as mx

from ..format.format import Format
from . import gpu, memo, passed, plain
from .gpu import jit
from .gpu.attention import Attend
from .gpu.launch import Launch
from .packed import First, Mask, Packed

TOKENS = 64  # enough for every constant of a kernel
_TOLERANCE = 0.05  # of the largest number: rounding is far below, a wrong layout far above
_CODES = 0.1  # part of the rows' words that rounding may turn
_said: set[str] = set()


def say(line: str) -> None:
    if line not in _said:
        _said.add(line)
        print(f"[mlx_kvq] {line}", file=sys.stderr)


def works(op: str, launches: Sequence[Launch], dtypes: tuple, run: Callable) -> bool:
    """Whether these kernels do what plain operations do; ``run(backend)`` gives their outputs."""
    kernels = [(x.machine, x.name, x.constants) for x in launches]
    return memo.kernel((op, *dtypes, *kernels), lambda: _works(op, kernels, dtypes, run))


def _works(op: str, kernels: list[tuple], dtypes: tuple, run: Callable) -> bool:
    try:
        kept = passed.key(op, [jit.text(*kernel).digest for kernel in kernels], dtypes)
        if passed.has(kept):
            return True
        off = [_apart(got, want) for got, want in zip(run(gpu), run(plain), strict=True)]
        if max(off) <= 1:
            names = " and ".join(name for _, name, _ in kernels)
            passed.add(kept, " ".join([names, *(_name(x) for x in dtypes if x is not None)]))
            return True
        reason = "its results are wrong"
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    say(
        f"warning: the {op} kernel failed on this machine ({reason}). Using plain mx "
        "operations, which are slower. Please report the output of 'mlx_kvq doctor'."
    )
    return False


def _apart(got: mx.array, want: mx.array) -> float:
    """How far apart they are, in units of what is allowed."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return float("inf")
    if got.dtype == mx.uint32:
        return cast(float, (got != want).astype(mx.float32).mean().item()) / _CODES
    got, want = got.astype(mx.float32), want.astype(mx.float32)
    off = mx.abs(got - want).max() / mx.maximum(mx.abs(want).max(), 1e-6)
    value = cast(float, off.item())
    return value / _TOLERANCE if value == value else float("inf")


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).rpartition(".")[2]


def _normal(shape: Sequence[int], dtype: mx.Dtype, key: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(key)).astype(dtype)


def _rows(B: int, H: int, tokens: int, fmt: Format) -> mx.array:
    lay = fmt.layout
    k, v = (_normal((B, H, tokens, D), mx.float32, D) for D in (lay.k_dim, lay.v_dim))
    return mx.contiguous(plain.quantize_pack(k, v, fmt)[0])


def _first(packed: Packed, B: int, starts: mx.array | None = None) -> First | None:
    """Exact first tokens like those of ``packed``, from where sequences start."""
    if (given := packed.first) is None:
        return None
    _, H, F, D = given.array.shape
    at: int | mx.array = 0
    if not isinstance(given.at, int):
        at = (mx.zeros((B,)) if starts is None else starts).astype(given.at.dtype)
    return First(_normal((B, H, F, D), given.array.dtype, 6), min(given.count, 2), at)


def _pair(k, v) -> list[mx.array]:
    """Random keys and values like these, of one sequence."""
    H, tokens = k.shape[1], min(k.shape[2], TOKENS)
    return [_normal((1, H, tokens, x.shape[3]), x.dtype, i) for i, x in enumerate((k, v))]


def _exactly(backend, fmt: Format) -> AbstractContextManager:
    """With feedback a code that rounding turns turns later ones of its vector. Few vectors have
    one, unless products are TF32's, as those of plain operations are on CUDA. Wrong feedback turns
    a sixth of the codes, most words."""
    exactly = fmt.kind.feedback and backend is plain
    return mx.stream(mx.cpu) if exactly else nullcontext()


def pack(launch: Launch, k, v, fmt: Format, tail, size: int) -> bool:
    H = k.shape[1]

    def run(backend):
        end = None if tail is None else _normal((1, H, 2, tail.shape[3]), tail.dtype, 2)
        with _exactly(backend, fmt):
            rows, kept = backend.quantize_pack(*_pair(k, v), fmt, end, min(size, 2))
        return [rows] if kept is None else [rows, kept]

    dtypes = k.dtype, v.dtype, None if tail is None else tail.dtype
    return works("quantize_pack", [launch], dtypes, run)


def keep(launch: Launch, k, v, fmt: Format, tail) -> bool:
    H, tokens = k.shape[1], min(k.shape[2], TOKENS)

    def run(backend):
        end = _normal((1, H, 2, tail.shape[3]), tail.dtype, 2)
        return [backend.keep_exact(*_pair(k, v), fmt, end, tokens + 2)]

    return works("keep_exact", [launch], (k.dtype, v.dtype, tail.dtype), run)


def rotated(launch: Launch, y, fmt: Format) -> bool:
    H, tokens = y.shape[1], min(y.shape[2], TOKENS)

    def run(backend):
        with _exactly(backend, fmt):
            return [backend.pack_rotated(_normal((1, H, tokens, y.shape[3]), y.dtype, 0), fmt)]

    return works("pack_rotated", [launch], (y.dtype,), run)


def unpack(launch: Launch, packed: Packed, dtype: mx.Dtype, chunk) -> bool:
    fmt, H = packed.format, packed.rows.shape[1]

    def run(backend):
        tail = packed.tail
        end = None if tail is None else _normal((1, H, 2, tail.shape[3]), tail.dtype, 2)
        some = Packed(_rows(1, H, 5, fmt), 5, fmt, end, None, _first(packed, 1))
        if launch.name == "dequantize":
            return backend.dequantize(some, dtype)
        new = None if chunk is None else [_normal((1, *x.shape[1:]), x.dtype, 3) for x in chunk]
        return backend.restore(some, dtype, new)

    first = None if packed.first is None else packed.first.array
    arrays = (packed.tail, first, *(chunk or ()))
    dtypes = dtype, *(None if x is None else x.dtype for x in arrays)
    return works(launch.name, [launch], dtypes, run)


def attend(shape: Attend, parts: int, q, packed: Packed, scale: float, mask: Mask, sinks) -> bool:
    fmt, (B, Hkv), L = packed.format, packed.rows.shape[:2], q.shape[2]
    if parts in shape.tried:
        return shape.tried[parts]

    def run(backend):
        tail = packed.tail
        end = None if tail is None else _normal((B, Hkv, *tail.shape[2:]), tail.dtype, 2)
        starts = None if mask.starts is None else (mx.arange(B) % 3).astype(mask.starts.dtype)
        first = _first(packed, B, starts)
        some = Packed(_rows(B, Hkv, TOKENS, fmt), TOKENS, fmt, end, None, first)
        array = None
        if mask.array is not None:
            array = _normal((L, TOKENS), mx.float32, 4)
            array = (array > 0) if mask.array.dtype == mx.bool_ else array.astype(mask.array.dtype)
        seen = Mask(mask.causal, mask.window, starts, array)
        args = _normal(q.shape, q.dtype, 5), some, scale, seen, sinks
        return [backend.attend(*args, min(2, parts)) if backend is gpu else backend.attend(*args)]

    first = None if packed.first is None else packed.first.array
    arrays = (q, packed.tail, first, mask.array, mask.starts, sinks)
    dtypes = tuple(None if a is None else a.dtype for a in arrays)
    shape.tried[parts] = works("attend", shape.launches(parts), dtypes, run)
    return shape.tried[parts]
