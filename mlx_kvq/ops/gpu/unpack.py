"""dequantize and restore: rows to keys and values, inside and out of the rotation; one launch."""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from ..packed import First, Packed
from . import tables
from .arguments import integers, not_small
from .jit import Constants
from .launch import Launch, like
from .machine import machine
from .plan import plan
from .tuning import TUNING

_STEPS = 4  # rows of a thread of dequantize
_PAIRS = 2  # of SIMD groups of a threadgroup of restore
Chunk = tuple[mx.array, mx.array] | None


@dataclass(eq=False)
class Restore:
    """The launch for one shape of its arguments."""

    launch: Launch
    run: Callable
    info: mx.array

    def __call__(self, packed: Packed, chunk: Chunk = None) -> tuple[mx.array, mx.array]:
        inputs = [packed.rows, self.info, *([] if packed.tail is None else [packed.tail])]
        if (first := packed.first) is not None:
            inputs.append(first.array)
            if not isinstance(at := first.at, int):
                inputs.append(not_small(at) if self.launch.machine == "metal" else at)
        if self.launch.name == "restore":
            inputs += [*(chunk or ()), tables.of(packed.format).restores]
        return self.run(*inputs)


def prepare(op: str, packed: Packed, dtype: mx.Dtype, chunk: Chunk = None) -> Restore:
    """The launch of ``"dequantize"`` or ``"restore"`` for arguments like these."""
    name, kind, length = machine(), packed.format.kind, packed.length
    lay, B, H, first = kind.layout, *packed.rows.shape[:2], packed.first
    constants, total = plan(kind).dequantize, length
    if op == "restore":
        constants = (*plan(kind).restore, ("CHUNK", chunk is not None))
        total += 0 if chunk is None else chunk[0].shape[2]
        most = max(1, TUNING[name].restore_threadgroups // (B * H))
        groups = min(-(-length // (plan(kind).pack_set * _PAIRS)), most)
        grid, threadgroup = (groups * _PAIRS * 64, B * H, 1), (_PAIRS * 64, 1, 1)
    else:
        threads = -(-length // _STEPS) * ((lay.k_dim + lay.v_dim) // 8)
        grid, threadgroup = (-(-threads // 256) * 256, H, B), (256, 1, 1)
    launch = Launch(
        name,
        op,
        (*constants, ("TAIL", packed.tail is not None), *_firsts(first)),
        grid,
        threadgroup,
        ((B, H, total, lay.k_dim), (B, H, total, lay.v_dim)),
        (dtype, dtype),
        2,
    )
    given, arrays = {"length": length}, [packed.rows, packed.tail, *(chunk or ())]
    if first is not None:
        given["firsts"], given["first_at"] = first.numbers
        arrays += [first.array, None if isinstance(first.at, int) else first.at]
    return Restore(launch, launch.prepared(like(*arrays)), integers(op, **given))


def _firsts(first: First | None) -> Constants:
    return ("FIRST", first is not None), ("PLACES", first is not None and first.has_places)


def dequantize(packed: Packed, dtype: mx.Dtype = mx.float32) -> tuple[mx.array, mx.array]:
    """Rotated K [B, H, length, Dk] and V [B, H, length, Dv], the last ones from the tail."""
    return prepare("dequantize", packed, dtype)(packed)


def restore(packed: Packed, dtype: mx.Dtype, chunk: Chunk = None) -> tuple[mx.array, mx.array]:
    """As :func:`dequantize`, but out of the rotation: keys and values as the model made them,
    followed by those of the chunk [B, H, L, D]."""
    return prepare("restore", packed, dtype, chunk)(packed, chunk)
