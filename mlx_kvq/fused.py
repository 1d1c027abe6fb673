"""The fused backend: the three operations as Metal kernels, or the same sources on CUDA.

Same contract as :mod:`mlx_kvq.reference`. Kernels compile once per format: lengths, numbers of
heads and of splits are run-time values.
"""

import hashlib
import itertools
import re
import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import mlx.core as mx

from . import tables
from .format import Format
from .layout import RowLayout
from .sources import kernel_source, kernels_path
from .tuning import TUNING, attend_shape, splits

_ROTATIONS = {"srft": 0, "srht": 1, "none": 2}
_RULES = {"search": 0, "absmax": 1, "paper": 2}
# Inputs that a launch may do without -> the constant that says whether it has them. Each input
# costs the host time at every launch.
_OPTIONAL = {"starts": "STARTS", "mask": "MASK", "sinks": "SINKS"}
# name -> files of the header, files of the body, inputs, outputs
_ATTEND = ("q", "rows", "info", "starts", "mask", "k_table")
_KERNELS: dict[str, tuple[tuple[str, ...], ...]] = {
    "quantize_pack": (
        ("rotate", "vectors", "quantize"),
        ("quantize_pack",),
        ("k", "v", "k_table", "v_table"),
        ("rows",),
    ),
    "attend_finish": (
        ("rotate", "vectors", "tile"),
        ("attend", "attend_finish"),
        (*_ATTEND, "v_table", "sinks"),
        ("out",),
    ),
    "attend_store": (
        ("rotate", "vectors", "tile"),
        ("attend", "attend_store"),
        _ATTEND,
        ("partial", "statistics"),
    ),
    # CUDA only
    "attend_join": (
        ("rotate", "vectors", "tile"),
        ("attend", "attend_store", "attend_join.cuh"),
        (*_ATTEND, "v_table", "sinks", "arrivals"),
        ("out", "partial", "statistics"),
    ),
    "combine": (
        ("rotate", "vectors"),
        ("combine",),
        ("q", "info", "partial", "statistics", "k_table", "v_table", "sinks"),
        ("out",),
    ),
    "dequantize": (("levels",), ("dequantize",), ("rows", "info"), ("keys", "values")),
    "rotate_queries": (
        ("rotate", "vectors", "levels"),
        ("rotate_queries",),
        ("x", "info", "table"),
        ("out",),
    ),
    "rotate_outputs": (
        ("rotate", "vectors"),
        ("rotate_outputs",),
        ("x", "info", "table"),
        ("out",),
    ),
}


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


_Constants = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class _Plan:
    """What the launches of a format need, made once."""

    layout: RowLayout
    k_pack: mx.array
    v_pack: mx.array
    k_query: mx.array  # of attend, wide
    v_output: mx.array
    k_queries: mx.array  # of prefill
    v_outputs: mx.array
    pack_set: int  # tokens that a pair of SIMD groups packs at once
    pack: _Constants  # compile-time constants
    attend: _Constants
    combine: _Constants
    dequantize: _Constants
    turn: _Constants


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
    centred = [("K_CENTRED", keys.calibration.mu is not None)]
    levels = [("HALF_STEP", fmt.scale != "paper")]
    return _Plan(
        layout=lay,
        k_pack=tables.channel_table(keys, "pack", wide=False),
        v_pack=tables.channel_table(values, "pack", wide=False),
        k_query=tables.channel_table(keys, "query", wide=True),
        v_output=tables.channel_table(values, "output", wide=True),
        k_queries=tables.channel_table(keys, "query", wide=False),
        v_outputs=tables.channel_table(values, "output", wide=False),
        pack_set=32 // max(tables.lanes(D, wide=False) for D in (lay.k_dim, lay.v_dim)),
        pack=(*dims, *codes, *rotation, ("RULE", _RULES[fmt.scale])),
        attend=(*dims, *codes, *rotation, *centred, *levels),
        combine=(*dims, *rotation, *centred),
        dequantize=(*dims, *codes, *levels),
        turn=(*dims, *rotation),
    )


@lru_cache(maxsize=64)
def _source(name: str) -> str:
    """A kernel source without comments and indentation: MLX copies and hashes the text of a
    kernel at every launch."""
    text = re.sub(r"//.*", "", kernel_source(name if "." in name else f"{name}.metal"))
    return "\n".join(line for raw in text.splitlines() if (line := raw.strip())) + "\n"


@lru_cache(maxsize=256)
def _kernel(machine: str, name: str, constants: tuple[tuple[str, Any], ...]):
    """A kernel with its compile-time constants. They stand in its source and not in ``template``,
    which MLX would convert and format again at every call, a few microseconds of decoding."""
    headers, bodies, inputs, outputs = _KERNELS[name]
    chosen = dict(constants)
    absent = [n for n in inputs if n in _OPTIONAL and not chosen[_OPTIONAL[n]]]
    keywords: dict[str, Any] = {
        "input_names": [n for n in inputs if n not in absent],
        "output_names": list(outputs),
    }
    body = "".join(
        f"constexpr {'bool' if isinstance(value, bool) else 'int'} {key} = {str(value).lower()};\n"
        for key, value in constants
    )
    for n in absent:  # named in branches that are never taken
        body += f"const device int* {n} = nullptr;\n"
        body += "const int64_t mask_strides[4] = {0, 0, 0, 0};\n" if n == "mask" else ""
    # How many lanes of a SIMD group share a vector (kernels/rotate.metal).
    lanes = f"enum : int {{ WIDE = {int(name.startswith(('attend', 'combine')))} }};\n"
    if machine == "metal":
        header = lanes + "".join(_source(h) for h in ("machine", *headers))
        body += "".join(_source(b) for b in bodies)
        digest = hashlib.sha256((header + body).encode()).hexdigest()[:12]
        return mx.fast.metal_kernel(
            name=f"kvq_{name}_{digest}",
            header=header,
            source=body,
            ensure_row_contiguous=False,
            **keywords,
        )
    # Bodies declare threadgroup memory, the header's functions only point to it.
    header = (
        lanes
        + _include("machine.cuh", *headers)
        + "#undef threadgroup\n#define threadgroup __shared__\n"
    )
    text = "".join(_source(b) for b in bodies)
    # MLX looks for these words to pass shapes and strides.
    words = sorted(set(re.findall(r"\b\w+_(?:shape|strides|ndim)\b", text)))
    body += f"// {' '.join(words)}\n" + _include(*bodies)
    digest = hashlib.sha256((header + body).encode()).hexdigest()[:12]
    return mx.fast.cuda_kernel(
        name=f"kvq_{name}_{digest}",
        header=header,
        source=body,
        ensure_row_contiguous=False,
        **keywords,
    )


def _include(*names: str) -> str:
    """CUDA reads the files itself: MLX copies and hashes the text it is given at every launch.
    The hash of what they say makes a changed file a new kernel."""
    lines = []
    for name in names:
        path = kernels_path() / (name if "." in name else f"{name}.metal")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        lines.append(f'#include "{path.as_posix()}"  // {digest}\n')
    return "".join(lines)


def _machine() -> str:
    machine = language()
    if machine is None:
        raise RuntimeError("The fused kernels need a Metal or CUDA GPU as the default device.")
    return machine


@lru_cache(maxsize=64)
def _bits(x: float) -> int:
    return struct.unpack("<i", struct.pack("<f", x))[0]


@lru_cache(maxsize=512)
def _replayed(kernel, grid, threadgroup, shapes, dtypes, inputs: tuple, results: int = 1):
    """A launch that MLX traced once and replays for the same shapes of ``inputs``; gives the first
    of the kernel's outputs, or the first ``results`` of them.

    Calling a kernel builds its source text, 1 to 2 KB, and hashes it; replaying a trace does not
    (H100: 12 to 20 us of the host's time a launch before, see docs/performance.md). One function
    for each set of shapes, since MLX looks through a function's traces one by one.
    """

    def launch(*arrays):
        made = kernel(
            inputs=list(arrays),
            grid=grid,
            threadgroup=threadgroup,
            output_shapes=list(shapes),
            output_dtypes=list(dtypes),
        )
        return made[0] if results == 1 else tuple(made[:results])

    return mx.compile(launch)


def _run(machine, name, constants, inputs, grid, threadgroup, shapes, dtypes):
    """Launch a kernel, or replay it where that pays; all outputs."""
    kernel = _kernel(machine, name, constants)
    if TUNING[machine].replay:
        like = tuple((a.shape, a.dtype) for a in inputs)
        made = _replayed(kernel, grid, threadgroup, shapes, dtypes, like, len(shapes))(*inputs)
        return (made,) if len(shapes) == 1 else made
    return kernel(
        inputs=inputs,
        grid=grid,
        threadgroup=threadgroup,
        output_shapes=list(shapes),
        output_dtypes=list(dtypes),
    )


def _pack_launch(machine: str, fmt: Format, B: int, H: int, L: int):
    """Constants, grid and threadgroup of quantize_pack."""
    plan, tuning = _plan(fmt), TUNING[machine]
    sets = -(-L // plan.pack_set)
    pairs = 1 if sets < tuning.pack_pairs else tuning.pack_pairs
    groups = min(-(-sets // pairs), max(1, tuning.pack_threadgroups // (B * H)))
    return (*plan.pack, ("PAIRS", pairs)), (groups * pairs * 64, B * H, 1), (pairs * 64, 1, 1)


class PackStep:
    """:func:`quantize_pack` of a few tokens, prepared for one format, shape and dtype."""

    def __init__(self, k: mx.array, v: mx.array, fmt: Format):
        self.machine, plan = _machine(), _plan(fmt)
        self.device = mx.default_device()
        B, H, L, _ = k.shape
        self.tables = plan.k_pack, plan.v_pack
        constants, grid, threadgroup = _pack_launch(self.machine, fmt, B, H, L)
        self.run = _replayed(
            _kernel(self.machine, "quantize_pack", constants),
            grid,
            threadgroup,
            ((B, H, L, plan.layout.words),),
            (mx.uint32,),
            (k.shape, v.shape, k.dtype, v.dtype),
        )

    def __call__(self, k: mx.array, v: mx.array) -> mx.array:
        return self.run(k, v, *self.tables)


def quantize_pack(k: mx.array, v: mx.array, fmt: Format) -> mx.array:
    """k [B, H, L, Dk], v [B, H, L, Dv], any strides -> rows uint32 [B, H, L, W]; one launch."""
    machine, plan = _machine(), _plan(fmt)
    B, H, L, _ = k.shape
    constants, grid, threadgroup = _pack_launch(machine, fmt, B, H, L)
    inputs = [k, v, plan.k_pack, plan.v_pack]
    shapes = ((B, H, L, plan.layout.words),)
    return _run(
        machine, "quantize_pack", constants, inputs, grid, threadgroup, shapes, (mx.uint32,)
    )[0]


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
    tuning = TUNING[machine].when(parallel)
    groups, keys = attend_shape(lay, tuning)
    return splits(tuning, groups, keys, span, parallel)


def attend_parts(fmt: Format, B: int, Hq: int, Hkv: int, L: int, span: int) -> int:
    """Shares of a context of ``span`` keys that :func:`attend` works on in parallel; 1 spares
    a launch."""
    return _parts(_machine(), fmt.layout, B * Hkv * -(-(Hq // Hkv * L) // 8), span)


def forget() -> None:
    """Look the launch sizes up again: for tests and for tuning, which change the table."""
    for cached in (_parts, _launch, _token):
        cached.cache_clear()


@dataclass(frozen=True, eq=False)
class _Launch:
    """What does not change from one decode step to the next; one object for all layers that are
    alike but for their calibration."""

    groups: int
    merge: int
    attend: _Constants  # compile-time constants
    finish: _Constants
    combine: _Constants


@lru_cache(maxsize=4096)
def _launch(
    machine: str, fmt: Format, parallel: int, kind: int, starts: bool, sinks: bool
) -> _Launch:
    plan, tuning = _plan(fmt), TUNING[machine].when(parallel)
    groups, keys = attend_shape(plan.layout, tuning)
    sizes = (("NSG", groups), ("TK", keys))
    attend = (*plan.attend, ("MASK", kind), ("STARTS", starts), *sizes)
    with_sinks = ("SINKS", sinks)
    return _same_launch(
        groups,
        tuning.combine_groups,
        attend,
        (*attend, with_sinks),
        (*plan.combine, with_sinks, ("NSG", tuning.combine_groups)),
    )


_same_launch = lru_cache(maxsize=1024)(_Launch)


class AttendStep:
    """:func:`attend` without a mask or sinks, prepared for one format, shape and dtype: what is
    left to do for a token is to look up the number of splits and to launch."""

    def __init__(
        self, q: mx.array, rows: mx.array, fmt: Format, scale: float, window: int | None,
        starts: bool, single: bool,
    ):  # fmt: skip
        self.machine, plan = _machine(), _plan(fmt)
        self.device = mx.default_device()
        self.single = single  # the kernel for one split, or that for several
        self.rows_shape, self.q_shape, self.dtype = rows.shape, q.shape, q.dtype
        self.capacity, self.scale, self.window = rows.shape[2], scale, window
        self.layout = plan.layout
        B, Hq, L, _ = q.shape
        Hkv = rows.shape[1]
        heads = Hq // Hkv
        self.blocks = -(-(heads * L) // 8)
        self.parallel = B * Hkv * self.blocks
        self.launch = _launch(self.machine, fmt, self.parallel, 0, starts, False)
        self.tables = plan.k_query, plan.v_output
        self.token = _token(self.machine, self.layout, self.parallel, heads, L, scale, window)

    def __call__(
        self, q: mx.array, rows: mx.array, length: int, starts: mx.array | None
    ) -> mx.array | None:
        """``None`` where the length now asks for the other kernel."""
        token = self.token
        if token.length != length:
            token.move(length)
        parts = token.parts
        if (parts == 1) is not self.single:
            return None
        key = self.launch, self.rows_shape, self.dtype, parts
        if (run := token.runs.get(key)) is None:
            run = token.runs[key] = self._prepare(parts)
        inputs = (q, rows, token.info) if starts is None else (q, rows, token.info, starts)
        if parts == 1:
            return run(*inputs, *self.tables)
        return run(*inputs, *self.tables, next(_arrivals()))

    def fits(self) -> bool:
        """Whether one launch does it all, however the context is split."""
        return self.parallel <= _ARRIVALS

    def _prepare(self, parts: int):
        B, Hq, L, _ = self.q_shape
        shape = (B, Hq, L, self.layout.v_dim)
        shapes: tuple[tuple[int, ...], ...] = (shape,)
        dtypes: tuple[mx.Dtype, ...] = (self.dtype,)
        if parts > 1:
            shapes += ((B, Hq, L, parts, shape[3]), (B, Hq, L, parts, 2))
            dtypes += (mx.float32, mx.float32)
        groups = self.launch.groups
        return _replayed(
            _kernel(
                self.machine, "attend_finish" if parts == 1 else "attend_join", self.launch.finish
            ),
            (parts * groups * 32, self.rows_shape[1] * self.blocks, B),
            (groups * 32, 1, 1),
            shapes,
            dtypes,
            (self.q_shape, self.rows_shape),
        )


class _Token:
    """What the decode steps of all layers have in common while the length is the same."""

    def __init__(self, machine, layout, parallel, heads, L, scale, window):
        self.place = machine, layout, parallel
        self.heads, self.L, self.scale, self.window = heads, L, scale, window
        self.length = 0
        self.runs: dict[tuple, Any] = {}  # launches, by what they depend on

    def move(self, length: int) -> None:
        window = self.window
        span = length if window is None else min(length, window + self.L - 1)
        self.length, self.parts = length, _parts(*self.place, span)
        self.info = _integers(length, self.heads, self.L, _bits(self.scale), False, window or 0)
        if len(self.runs) > 256:  # lengths far behind
            self.runs.clear()


@lru_cache(maxsize=64)
def _token(machine, layout, parallel, heads, L, scale, window) -> _Token:
    return _Token(machine, layout, parallel, heads, L, scale, window)


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
    info = _integers(length, heads, L, _bits(scale), isinstance(mask, str), window or 0)
    kind = 0
    inputs = [q, rows, info]
    if starts is not None:
        inputs.append(starts)
    if isinstance(mask, mx.array):
        kind = 1 if mask.dtype == mx.bool_ else 2
        inputs.append(mx.broadcast_to(mask, (B, Hq, L, length)))
    if parts is None:
        span = length if window is None else min(length, window + L - 1)
        parts = attend_parts(fmt, B, Hq, Hkv, L, span)
    blocks = -(-(heads * L) // 8)
    launch = _launch(machine, fmt, B * Hkv * blocks, kind, starts is not None, sinks is not None)
    inputs.append(plan.k_query)
    last = [plan.v_output] if sinks is None else [plan.v_output, sinks]
    grid = (parts * launch.groups * 32, Hkv * blocks, B)
    threadgroup = (launch.groups * 32, 1, 1)
    shape = (B, Hq, L, plan.layout.v_dim)
    if parts == 1:
        return _kernel(machine, "attend_finish", launch.finish)(
            inputs=inputs + last,
            grid=grid,
            threadgroup=threadgroup,
            output_shapes=[shape],
            output_dtypes=[q.dtype],
        )[0]
    partials = [(B, Hq, L, parts, shape[3]), (B, Hq, L, parts, 2)]
    if machine == "cuda" and B * Hkv * blocks <= _ARRIVALS:
        return _kernel(machine, "attend_join", launch.finish)(
            inputs=[*inputs, *last, next(_arrivals())],
            grid=grid,
            threadgroup=threadgroup,
            output_shapes=[shape, *partials],
            output_dtypes=[q.dtype, mx.float32, mx.float32],
        )[0]
    partial, statistics = _kernel(machine, "attend_store", launch.attend)(
        inputs=inputs,
        grid=grid,
        threadgroup=threadgroup,
        output_shapes=partials,
        output_dtypes=[mx.float32, mx.float32],
    )
    merge = launch.merge
    return _kernel(machine, "combine", launch.combine)(
        inputs=[q, info, partial, statistics, plan.k_query, *last],
        grid=(B * Hq * L * merge * 32, 1, 1),
        threadgroup=(merge * 32, 1, 1),
        output_shapes=[shape],
        output_dtypes=[q.dtype],
    )[0]


def dequantize(
    rows: mx.array, length: int, fmt: Format, dtype: mx.Dtype = mx.float32
) -> tuple[mx.array, mx.array]:
    """rows [B, H, capacity, W] -> rotated K [B, H, length, Dk] and V [B, H, length, Dv]."""
    machine, plan = _machine(), _plan(fmt)
    lay = plan.layout
    B, H = rows.shape[:2]
    threads = -(-length // _DEQUANTIZE_STEPS) * ((lay.k_dim + lay.v_dim) // 8)
    grid = (-(-threads // 256) * 256, H, B)
    shapes = ((B, H, length, lay.k_dim), (B, H, length, lay.v_dim))
    inputs = [rows, _integers(length)]
    k, v = _run(
        machine, "dequantize", plan.dequantize, inputs, grid, (256, 1, 1), shapes, (dtype, dtype)
    )
    return k, v


def _rotate(name: str, x: mx.array, fmt: Format, table: mx.array, Hkv: int, shape) -> mx.array:
    machine, plan = _machine(), _plan(fmt)
    B, Hq, L, D = x.shape
    groups = -(-B * Hq * L // (4 * (32 // tables.lanes(D, wide=False))))
    inputs = [x, _integers(Hq // Hkv), table]
    return _run(
        machine, name, plan.turn, inputs, (groups * 128, 1, 1), (128, 1, 1), (shape,), (x.dtype,)
    )[0]


def rotate_queries(q: mx.array, fmt: Format, Hkv: int) -> mx.array:
    """q [B, Hq, L, Dk] -> R(q ⊙ σ) ⊘ λ of the keys, in q's dtype; one launch."""
    return _rotate("rotate_queries", q, fmt, _plan(fmt).k_queries, Hkv, q.shape)


def rotate_outputs(o: mx.array, fmt: Format, Hkv: int) -> mx.array:
    """o [B, Hq, L, Dv] in the rotated domain -> Rᵀ(o ⊘ λ) ⊙ σ + μ of the values; one launch.

    In memory the result is [B, L, Hq, Dv], so that a model's next reshape copies nothing.
    """
    B, Hq, L, D = o.shape
    out = _rotate("rotate_outputs", o, fmt, _plan(fmt).v_outputs, Hkv, (B, L, Hq, D))
    return out.swapaxes(1, 2)
