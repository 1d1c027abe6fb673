"""The fused backend: the three operations as Metal kernels, or the same sources on CUDA.

Same contract as :mod:`mlx_kvq.ops.plain`. Kernels compile once per format: lengths, numbers of
heads and of splits are run-time values.
"""

import itertools
import struct
from dataclasses import dataclass, field
from functools import lru_cache
from weakref import WeakKeyDictionary

import mlx.core as mx

from ...format.format import Format
from ...format.layout import RowLayout, tail_dtype
from . import jit, tables
from .tuning import TUNING, attend_shape, splits

_ROTATIONS = {"srft": 0, "srht": 1, "none": 2}
_RULES = {"search": 0, "absmax": 1, "paper": 2}


def language() -> str | None:
    """``"metal"`` or ``"cuda"`` if the default device is such a GPU, else ``None``."""
    if mx.default_device().type != mx.DeviceType.gpu:
        return None
    if mx.metal.is_available():
        return "metal"
    return "cuda" if mx.cuda.is_available() else None


def replays() -> bool:
    """Whether the launches of decode steps are traced once and replayed on this machine."""
    return TUNING[_machine()].replay


def ahead() -> int:
    """Layers of a prompt after which evaluation begins (``Tuning.ahead``), 0 without a GPU."""
    machine = language()
    return 0 if machine is None else TUNING[machine].ahead


def why_not(fmt: Format, dtype: mx.Dtype | None = None) -> str | None:
    """Why the fused kernels do not do this format, in one line, or ``None`` if they do."""
    if fmt.spec.rotation not in _ROTATIONS:
        return f"rotation '{fmt.spec.rotation}' has no fused kernel"
    for D in (fmt.layout.k_dim, fmt.layout.v_dim):
        if reason := tables.why_not(D):
            return reason
    if dtype is not None and dtype not in (mx.float16, mx.bfloat16, mx.float32):
        return f"dtype {dtype} is none of float16, bfloat16 and float32"
    return None


@dataclass(frozen=True)
class _Plan:
    """What the launches of a format need, made once."""

    layout: RowLayout
    packs: mx.array  # tables of keys and then of values
    attends: mx.array
    restores: mx.array
    queries: mx.array  # of keys
    outputs: mx.array  # of values
    pack_set: int  # tokens that a pair of SIMD groups packs at once
    pack: jit.Constants  # compile-time constants
    attend: jit.Constants
    combine: jit.Constants
    dequantize: jit.Constants
    restore: jit.Constants
    turn: jit.Constants
    launches: dict[tuple, "_Launch"] = field(default_factory=dict)  # of attend


_plans: "WeakKeyDictionary[Format, _Plan]" = WeakKeyDictionary()


def _plan(fmt: Format) -> _Plan:
    plan = _plans.get(fmt)
    if plan is None:
        plan = _plans[fmt] = _make_plan(fmt)
    return plan


def _make_plan(fmt: Format) -> _Plan:
    if reason := why_not(fmt):
        raise ValueError(f"{reason}.")
    lay, keys, values = fmt.layout, fmt.keys, fmt.values
    dims = [("KD", lay.k_dim), ("VD", lay.v_dim)]
    codes = [("KB", lay.k_bits), ("VB", lay.v_bits), ("KG", lay.k_group), ("VG", lay.v_group)]
    rotation = [
        ("ROTATION", _ROTATIONS[fmt.spec.rotation]),
        ("K_CALIBRATED", tables.calibrated(keys)),
        ("V_CALIBRATED", tables.calibrated(values)),
    ]
    scaled = [
        ("K_SCALED", keys.calibration.lam is not None),
        ("V_SCALED", values.calibration.lam is not None),
    ]
    centred = [("K_CENTRED", keys.calibration.mu is not None)]
    levels = [("HALF_STEP", fmt.scale != "paper")]
    return _Plan(
        layout=lay,
        packs=tables.both_tables(keys, "pack", values, "pack", wide=False),
        attends=tables.both_tables(keys, "query", values, "output", wide=True),
        restores=tables.both_tables(keys, "output", values, "output", wide=False),
        queries=tables.channel_table(keys, "query", wide=False),
        outputs=tables.channel_table(values, "output", wide=False),
        pack_set=32 // max(tables.lanes(D, wide=False) for D in (lay.k_dim, lay.v_dim)),
        pack=(*dims, *codes, *rotation, *scaled, ("RULE", _RULES[fmt.scale])),
        attend=(*dims, *codes, *rotation, *centred, *levels),
        combine=(*dims, *rotation, *centred),
        dequantize=(*dims, *codes, *levels),
        restore=(*dims, *codes, *rotation, *levels),
        turn=(*dims, *rotation),
    )


def _machine() -> str:
    machine = language()
    if machine is None:
        raise RuntimeError("The fused kernels need a Metal or CUDA GPU as the default device.")
    return machine


@lru_cache(maxsize=64)
def _bits(x: float) -> int:
    return struct.unpack("<i", struct.pack("<f", x))[0]


def pack_pairs(fmt: Format, L: int, keeps: bool = False) -> int:
    """Pairs of SIMD groups in a threadgroup of quantize_pack, a compile-time constant; of few
    tokens one, unless there is a tail to move on, which the others do."""
    pairs = TUNING[_machine()].pack_pairs
    return 1 if not keeps and -(-L // _plan(fmt).pack_set) < pairs else pairs


def _pack_launch(machine: str, fmt: Format, B: int, H: int, L: int, keeps: bool = False):
    """Constants, grid and threadgroup of quantize_pack, but for KEEPS, TAIL and HOLDS."""
    plan, tuning = _plan(fmt), TUNING[machine]
    sets = -(-L // plan.pack_set)
    pairs = pack_pairs(fmt, L, keeps)
    groups = min(-(-sets // pairs), max(1, tuning.pack_threadgroups // (B * H)))
    return (*plan.pack, ("PAIRS", pairs)), (groups * pairs * 64, B * H, 1), (pairs * 64, 1, 1)


def quantize_pack(k: mx.array, v: mx.array, fmt: Format) -> mx.array:
    """k [B, H, L, Dk], v [B, H, L, Dv], any strides -> rows uint32 [B, H, L, W]; one launch."""
    machine, plan = _machine(), _plan(fmt)
    B, H, L, _ = k.shape
    constants, grid, threadgroup = _pack_launch(machine, fmt, B, H, L)
    constants = (*constants, ("KEEPS", False), ("TAIL", False), ("HOLDS", False))
    inputs = [k, v, plan.packs]
    shapes = ((B, H, L, plan.layout.words),)
    return jit.run(
        machine, "quantize_pack", constants, inputs, grid, threadgroup, shapes, (mx.uint32,)
    )[0]


def quantize_pack_tail(
    k: mx.array,
    v: mx.array,
    fmt: Format,
    tail: mx.array | None,
    keep: int,
    held: mx.array | None = None,
    capacity: int | None = None,
) -> tuple[mx.array, mx.array]:
    """Rows, and the new tail [B, H, keep, Dk + Dv]; see :func:`mlx_kvq.ops.quantize_pack_tail`; one
    launch."""
    machine, plan = _machine(), _plan(fmt)
    B, H, L, _ = k.shape
    lay = plan.layout
    constants, grid, threadgroup = _pack_launch(machine, fmt, B, H, L, True)
    count = capacity or (L if held is None else held.shape[2])
    inputs = [k, v, plan.packs, _integers(keep, count)]
    inputs += [a for a in (tail, held) if a is not None]
    shapes = ((B, H, count, lay.words), (B, H, keep, lay.k_dim + lay.v_dim))
    given = ("TAIL", tail is not None), ("HOLDS", held is not None)
    constants = (*constants, ("KEEPS", True), *given)
    dtypes = (mx.uint32, tail_dtype(k.dtype))
    rows, kept = jit.run(
        machine, "quantize_pack", constants, inputs, grid, threadgroup, shapes, dtypes
    )
    return rows, kept


_DEQUANTIZE_STEPS = 4  # rows of a thread
_ARRIVALS = 8192  # query blocks of one launch that attend_join can count


@lru_cache(maxsize=1)
def _arrivals() -> "itertools.cycle[mx.array]":
    """Counters of attend_join, all zero between launches. Launches take turns, so that those
    that MLX runs at the same time (of two models, say) have counters of their own."""
    counters = [mx.zeros((_ARRIVALS,), mx.uint32) for _ in range(32)]
    mx.eval(counters)
    return itertools.cycle(counters)


@lru_cache(maxsize=1024)
def _integers(*values: int) -> mx.array:
    """Run-time values of a launch. Every layer of a decode step asks for the same ones, and a
    small array from the host costs more than the launch itself on CUDA."""
    return mx.array(values, dtype=mx.int32)


@lru_cache(maxsize=4096)
def _parts(machine: str, lay: RowLayout, parallel: int, span: int) -> int:
    tuning = TUNING[machine].when(parallel, lay)
    groups, keys = attend_shape(lay, tuning)
    return splits(tuning, groups, keys, span, parallel)


def query_blocks(heads: int, L: int) -> int:
    """Threadgroups of 8 query rows that the ``heads`` of a KV head at L positions take."""
    return -(-heads * L // 8)


def attend_info(
    length: int,
    heads: int,
    L: int,
    scale: float,
    causal: bool,
    window: int | None,
    recent: int | None,
    ring: tuple[int, int] | None,
) -> mx.array:
    """The integers that ``kernels/attend.metal`` takes; ``recent`` is ``None`` without a tail."""
    given = (length, heads, L, _bits(scale), causal, window or 0)
    if recent is None:
        return _integers(*given)
    keep, idx = ring or (0, length)
    return _integers(*given, min(recent, length - keep), keep, idx)


def attend_parts(fmt: Format, B: int, Hq: int, Hkv: int, L: int, span: int) -> int:
    """Shares of a context of ``span`` keys that :func:`attend` works on in parallel; 1 spares
    a launch."""
    return _parts(_machine(), fmt.layout, B * Hkv * query_blocks(Hq // Hkv, L), span)


def attend_sizes(fmt: Format, B: int, Hq: int, Hkv: int, L: int) -> tuple[int, int]:
    """SIMD groups and keys of a tile of :func:`attend`, compile-time constants."""
    parallel = B * Hkv * query_blocks(Hq // Hkv, L)
    return attend_shape(fmt.layout, TUNING[_machine()].when(parallel, fmt.layout))


def forget() -> None:
    """Look the launch sizes up again: for tests and for tuning, which change the table."""
    _parts.cache_clear()
    _plans.clear()


@dataclass(frozen=True, eq=False)
class _Launch:
    """What does not change from one decode step to the next; one object for all layers that are
    alike but for their calibration."""

    groups: int
    merge: int
    attend: jit.Constants  # compile-time constants
    finish: jit.Constants
    combine: jit.Constants


def _launch(
    machine: str, fmt: Format, parallel: int, kind: int, starts: bool, sinks: bool, tail: bool
) -> _Launch:
    plan, key = _plan(fmt), (machine, parallel, kind, starts, sinks, tail)
    if (found := plan.launches.get(key)) is not None:
        return found
    tuning = TUNING[machine].when(parallel, plan.layout)
    groups, keys = attend_shape(plan.layout, tuning)
    sizes = (("NSG", groups), ("TK", keys))
    attend = (*plan.attend, ("MASK", kind), ("STARTS", starts), ("TAIL", tail), *sizes)
    with_sinks = ("SINKS", sinks)
    launch = plan.launches[key] = _same_launch(
        groups,
        tuning.combine_groups,
        attend,
        (*attend, with_sinks),
        (*plan.combine, with_sinks, ("NSG", tuning.combine_groups)),
    )
    return launch


_same_launch = lru_cache(maxsize=1024)(_Launch)


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
    parts: int | None = None,
) -> mx.array:
    """Attention over the first ``length`` rows, one launch, or two where the context is split.

    Shapes as in :func:`mlx_kvq.ops.attend`; ``parts`` overrides the number of splits. A query
    that may attend to nothing gets zeros.
    """
    machine, plan = _machine(), _plan(fmt)
    B, Hq, L, _ = q.shape
    Hkv = rows.shape[1]
    heads = Hq // Hkv
    recent = None if tail is None else fmt.recent
    info = attend_info(length, heads, L, scale, isinstance(mask, str), window, recent, ring)
    kind = 0
    inputs = [q, rows, info]
    if starts is not None:
        inputs.append(starts)
    if isinstance(mask, mx.array):
        kind = 1 if mask.dtype == mx.bool_ else 2
        inputs.append(mx.broadcast_to(mask, (B, Hq, L, length)))
    if tail is not None:
        inputs.append(tail)
    if parts is None:
        span = length if window is None else min(length, window + L - 1)
        parts = attend_parts(fmt, B, Hq, Hkv, L, span)
    blocks = query_blocks(heads, L)
    given = [a is not None for a in (starts, sinks, tail)]
    launch = _launch(machine, fmt, B * Hkv * blocks, kind, *given)
    inputs.append(plan.attends)
    last = [] if sinks is None else [sinks]
    grid = (parts * launch.groups * 32, Hkv * blocks, B)
    threadgroup = (launch.groups * 32, 1, 1)
    shape = (B, Hq, L, plan.layout.v_dim)
    if parts == 1:
        return jit.kernel(machine, "attend_finish", launch.finish)(
            inputs=inputs + last,
            grid=grid,
            threadgroup=threadgroup,
            output_shapes=[shape],
            output_dtypes=[q.dtype],
        )[0]
    partials = (B, Hq, L, parts * (shape[3] + 2))
    if machine == "cuda" and B * Hkv * blocks <= _ARRIVALS:
        return jit.kernel(machine, "attend_join", launch.finish)(
            inputs=[*inputs, *last, next(_arrivals())],
            grid=grid,
            threadgroup=threadgroup,
            output_shapes=[shape, partials],
            output_dtypes=[q.dtype, mx.float32],
        )[0]
    (partial,) = jit.kernel(machine, "attend_store", launch.attend)(
        inputs=inputs,
        grid=grid,
        threadgroup=threadgroup,
        output_shapes=[partials],
        output_dtypes=[mx.float32],
    )
    merge = launch.merge
    return jit.kernel(machine, "combine", launch.combine)(
        inputs=[q, info, partial, plan.attends, *last],
        grid=(B * Hq * L * merge * 32, 1, 1),
        threadgroup=(merge * 32, 1, 1),
        output_shapes=[shape],
        output_dtypes=[q.dtype],
    )[0]


def dequantize(
    rows: mx.array,
    length: int,
    fmt: Format,
    dtype: mx.Dtype = mx.float32,
    tail: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """rows [B, H, capacity, W] -> rotated K [B, H, length, Dk] and V [B, H, length, Dv], the last
    ones from the tail [B, H, R, Dk + Dv] if there is one."""
    machine, plan = _machine(), _plan(fmt)
    lay = plan.layout
    B, H = rows.shape[:2]
    threads = -(-length // _DEQUANTIZE_STEPS) * ((lay.k_dim + lay.v_dim) // 8)
    grid = (-(-threads // 256) * 256, H, B)
    shapes = ((B, H, length, lay.k_dim), (B, H, length, lay.v_dim))
    constants = (*plan.dequantize, ("TAIL", tail is not None))
    inputs = [rows, _integers(length)] + ([] if tail is None else [tail])
    k, v = jit.run(
        machine, "dequantize", constants, inputs, grid, (256, 1, 1), shapes, (dtype, dtype)
    )
    return k, v


_RESTORE_PAIRS = 2  # of SIMD groups of a threadgroup


def restore(
    rows: mx.array,
    length: int,
    fmt: Format,
    dtype: mx.Dtype,
    tail: mx.array | None = None,
    chunk: tuple[mx.array, mx.array] | None = None,
) -> tuple[mx.array, mx.array]:
    """As :func:`dequantize`, but out of the rotation: keys and values as the model made them,
    followed by those of the chunk [B, H, L, D]."""
    machine, plan = _machine(), _plan(fmt)
    lay = plan.layout
    B, H = rows.shape[:2]
    sets = -(-length // plan.pack_set)
    most = max(1, TUNING[machine].restore_threadgroups // (B * H))
    groups = min(-(-sets // _RESTORE_PAIRS), most)
    grid, threadgroup = (groups * _RESTORE_PAIRS * 64, B * H, 1), (_RESTORE_PAIRS * 64, 1, 1)
    total = length if chunk is None else length + chunk[0].shape[2]
    shapes = ((B, H, total, lay.k_dim), (B, H, total, lay.v_dim))
    constants = (*plan.restore, ("TAIL", tail is not None), ("CHUNK", chunk is not None))
    inputs = [rows, _integers(length)] + ([] if tail is None else [tail])
    inputs += [*(chunk or ()), plan.restores]
    k, v = jit.run(machine, "restore", constants, inputs, grid, threadgroup, shapes, (dtype, dtype))
    return k, v


def _rotate(name: str, x: mx.array, fmt: Format, table: mx.array, Hkv: int, shape) -> mx.array:
    machine, plan = _machine(), _plan(fmt)
    B, Hq, L, D = x.shape
    groups = -(-B * Hq * L // (4 * (32 // tables.lanes(D, wide=False))))
    inputs = [x, _integers(Hq // Hkv), table]
    return jit.run(
        machine, name, plan.turn, inputs, (groups * 128, 1, 1), (128, 1, 1), (shape,), (x.dtype,)
    )[0]


def rotate_queries(q: mx.array, fmt: Format, Hkv: int) -> mx.array:
    """q [B, Hq, L, Dk] -> R(q ⊙ σ) ⊘ λ of the keys, in q's dtype; one launch."""
    return _rotate("rotate_queries", q, fmt, _plan(fmt).queries, Hkv, q.shape)


def rotate_outputs(o: mx.array, fmt: Format, Hkv: int) -> mx.array:
    """o [B, Hq, L, Dv] in the rotated domain -> Rᵀ(o ⊘ λ) ⊙ σ + μ of the values; one launch.

    In memory the result is [B, L, Hq, Dv], so that a model's next reshape copies nothing.
    """
    B, Hq, L, D = o.shape
    out = _rotate("rotate_outputs", o, fmt, _plan(fmt).outputs, Hkv, (B, L, Hq, D))
    return out.swapaxes(1, 2)
