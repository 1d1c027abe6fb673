"""The fused backend: the three operations as Metal kernels, or the same sources on CUDA.

Same contract as :mod:`mlx_kvq.reference`. Kernels compile once per format: lengths, numbers of
heads and of splits are run-time values.
"""

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
from .sources import kernel_source
from .tuning import TUNING, attend_shape, splits

_ROTATIONS = {"srft": 0, "srht": 1, "none": 2}
_RULES = {"search": 0, "absmax": 1, "paper": 2}
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
    "combine": (
        ("rotate", "vectors"),
        ("combine",),
        ("q", "info", "partial", "statistics", "k_table", "v_table", "sinks"),
        ("out",),
    ),
    "dequantize": (("levels",), ("dequantize",), ("rows", "info"), ("keys", "values")),
}


def language() -> str | None:
    """``"metal"`` or ``"cuda"`` if the default device is such a GPU, else ``None``."""
    if mx.default_device().type != mx.DeviceType.gpu:
        return None
    if mx.metal.is_available():
        return "metal"
    return "cuda" if mx.cuda.is_available() else None


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
    k_pack: mx.array
    v_pack: mx.array
    k_query: mx.array
    v_output: mx.array
    pack: list[tuple[str, Any]]  # template values
    attend: list[tuple[str, Any]]
    combine: list[tuple[str, Any]]
    dequantize: list[tuple[str, Any]]


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
        k_pack=tables.channel_table(keys, "pack"),
        v_pack=tables.channel_table(values, "pack"),
        k_query=tables.channel_table(keys, "query"),
        v_output=tables.channel_table(values, "output"),
        pack=[*dims, *codes, *rotation, ("RULE", _RULES[fmt.scale])],
        attend=[*dims, *codes, *rotation, *centred, *levels],
        combine=[*dims, *rotation, *centred],
        dequantize=[*dims, *codes, *levels],
    )


@lru_cache(maxsize=64)
def _source(name: str) -> str:
    """A kernel source without comments and indentation: MLX copies and hashes the text of a
    kernel at every call."""
    text = re.sub(r"//.*", "", kernel_source(name))
    return "\n".join(line for raw in text.splitlines() if (line := raw.strip())) + "\n"


@lru_cache(maxsize=64)
def _kernel(machine: str, name: str):
    headers, bodies, inputs, outputs = _KERNELS[name]
    header = "".join(_source(f"{h}.metal") for h in headers)
    keywords: dict[str, Any] = {
        "name": f"kvq_{name}",
        "input_names": list(inputs),
        "output_names": list(outputs),
        "source": "".join(_source(f"{b}.metal") for b in bodies),
        "ensure_row_contiguous": False,
    }
    if machine == "metal":
        return mx.fast.metal_kernel(header=_source("machine.metal") + header, **keywords)
    # Bodies declare threadgroup memory, the header's functions only point to it.
    body_words = "#undef threadgroup\n#define threadgroup __shared__\n"
    return mx.fast.cuda_kernel(header=_source("machine.cuh") + header + body_words, **keywords)


def _machine() -> str:
    machine = language()
    if machine is None:
        raise RuntimeError("The fused kernels need a Metal or CUDA GPU as the default device.")
    return machine


@lru_cache(maxsize=64)
def _bits(x: float) -> int:
    return struct.unpack("<i", struct.pack("<f", x))[0]


def quantize_pack(k: mx.array, v: mx.array, fmt: Format) -> mx.array:
    """k [B, H, L, Dk], v [B, H, L, Dv], any strides -> rows uint32 [B, H, L, W]; one launch."""
    machine, plan = _machine(), _plan(fmt)
    tuning = TUNING[machine]
    B, H, L, _ = k.shape
    count = B * H * L
    rows = tuning.pack_rows if count >= tuning.pack_many else 1
    return _kernel(machine, "quantize_pack")(
        inputs=[k, v, plan.k_pack, plan.v_pack],
        template=[*plan.pack, ("ROWS", rows)],
        grid=(-(-count // rows) * rows * 64, 1, 1),
        threadgroup=(rows * 64, 1, 1),
        output_shapes=[(B, H, L, plan.layout.words)],
        output_dtypes=[mx.uint32],
    )[0]


@lru_cache(maxsize=1024)
def _integers(*values: int) -> mx.array:
    """Run-time values of a launch. Every layer of a decode step asks for the same ones, and a
    small array from the host costs more than the launch itself on CUDA."""
    return mx.array(values, dtype=mx.int32)


def attend_parts(
    q_shape: tuple[int, ...],
    rows_shape: tuple[int, ...],
    length: int,
    fmt: Format,
    window: int | None = None,
) -> int:
    """Shares of the context that :func:`attend` works on in parallel; 1 spares a launch."""
    tuning = TUNING[_machine()]
    B, Hq, L, _ = q_shape
    Hkv = rows_shape[1]
    groups, keys = attend_shape(fmt.layout, tuning)
    blocks = -(-(Hq // Hkv * L) // 8)
    span = length if window is None else min(length, window + L - 1)
    return splits(tuning, groups, keys, span, B * Hkv * blocks)


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
    lay, tuning = plan.layout, TUNING[machine]
    B, Hq, L, _ = q.shape
    Hkv = rows.shape[1]
    causal = isinstance(mask, str)
    info = _integers(length, Hq // Hkv, L, _bits(scale), causal, window or 0, starts is not None)
    kind = 0
    dense = info  # stands in for what is not given
    if isinstance(mask, mx.array):
        kind = 1 if mask.dtype == mx.bool_ else 2
        dense = mx.broadcast_to(mask, (B, Hq, L, length))
    groups, keys = attend_shape(lay, tuning)
    blocks = -(-(Hq // Hkv * L) // 8)
    if parts is None:
        parts = attend_parts(q.shape, rows.shape, length, fmt, window)
    inputs = [q, rows, info, info if starts is None else starts, dense, plan.k_query]
    template = [*plan.attend, ("MASK", kind), ("NSG", groups), ("TK", keys)]
    with_sinks = [("SINKS", sinks is not None)]
    last = [plan.v_output, info if sinks is None else sinks]
    grid, threadgroup = (parts * groups * 32, Hkv * blocks, B), (groups * 32, 1, 1)
    shape = (B, Hq, L, lay.v_dim)
    if parts == 1:
        return _kernel(machine, "attend_finish")(
            inputs=inputs + last,
            template=template + with_sinks,
            grid=grid,
            threadgroup=threadgroup,
            output_shapes=[shape],
            output_dtypes=[q.dtype],
        )[0]
    partial, statistics = _kernel(machine, "attend_store")(
        inputs=inputs,
        template=template,
        grid=grid,
        threadgroup=threadgroup,
        output_shapes=[(B, Hq, L, parts, lay.v_dim), (B, Hq, L, parts, 2)],
        output_dtypes=[mx.float32, mx.float32],
    )
    merge = tuning.combine_groups
    return _kernel(machine, "combine")(
        inputs=[q, info, partial, statistics, plan.k_query, *last],
        template=[*plan.combine, *with_sinks, ("NSG", merge)],
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
    threads = length * ((lay.k_dim + lay.v_dim) // 8)
    k, v = _kernel(machine, "dequantize")(
        inputs=[rows, _integers(length)],
        template=plan.dequantize,
        grid=(-(-threads // 256) * 256, H, B),
        threadgroup=(256, 1, 1),
        output_shapes=[(B, H, length, lay.k_dim), (B, H, length, lay.v_dim)],
        output_dtypes=[dtype, dtype],
    )
    return k, v
