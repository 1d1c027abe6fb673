"""attend: queries over packed rows, one launch, or two where the context is split on Metal."""

import itertools
import struct
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from ...format.format import Kind
from .. import memo
from ..packed import EVERY, Mask, Packed
from . import tables
from .jit import Constants
from .launch import Launch, integers, like
from .machine import machine
from .plan import plan
from .tuning import TUNING, attend_shape, splits

ARRIVALS = 8192  # query blocks of one launch that attend_join can count


def _arrivals() -> "itertools.cycle[mx.array]":
    """Counters of attend_join, all zero between launches. Launches take turns, so that those
    that MLX runs at the same time (of two models, say) have counters of their own."""

    def make():
        counters = [mx.zeros((ARRIVALS,), mx.uint32) for _ in range(32)]
        mx.eval(counters)
        return itertools.cycle(counters)

    return memo.kernel("arrivals", make)


@dataclass(frozen=True)
class Grid:
    """How the work of a call is shared out.

    Args:
        blocks (int): Threadgroups of 8 query rows of a KV head.
        parallel (int): Threadgroups of one split.
        parts (int): Splits of the context; 1 spares a launch, or the join.
        groups (int), keys (int): SIMD groups and keys of a tile, compile-time constants.
    """

    blocks: int
    parallel: int
    parts: int
    groups: int
    keys: int


def grid(q: mx.array, packed: Packed, window: int | None, parts: int | None = None) -> Grid:
    """How :func:`attend` shares out the work; ``parts`` overrides the number of splits."""
    (B, Hq, L, _), Hkv, lay = q.shape, packed.rows.shape[1], packed.format.layout
    blocks = -(-(Hq // Hkv) * L // 8)
    parallel = B * Hkv * blocks
    tuning = TUNING[machine()].when(parallel, lay)
    groups, keys = attend_shape(lay, tuning)
    if parts is None:
        span = packed.length if window is None else min(packed.length, window + L - 1)
        parts = splits(tuning, groups, keys, span, parallel)
    return Grid(blocks, parallel, parts, groups, keys)


def _bits(x: float) -> int:
    return struct.unpack("<i", struct.pack("<f", x))[0]


def _info(q: mx.array, packed: Packed, scale: float, mask: Mask) -> mx.array:
    """The integers that ``kernels/attend.metal`` takes."""
    _, Hq, L, _ = q.shape
    length, heads = packed.length, Hq // packed.rows.shape[1]
    given = (length, heads, L, _bits(scale), mask.causal, mask.window or 0)
    if packed.tail is None:
        return integers(*given)
    keep, idx = packed.ring or (0, length)
    return integers(*given, min(packed.format.recent, length - keep), keep, idx)


@dataclass(frozen=True, eq=False)
class Attend:
    """The launch for one length and one shape of the arguments, for the layers of a step."""

    launches: tuple[Launch, ...]
    parts: int
    first: Callable
    second: Callable | None  # combine
    info: mx.array
    scores: tuple[int, ...]  # shape of an array mask

    def __call__(self, q, packed: Packed, mask: Mask, sinks: mx.array | None) -> mx.array:
        table = tables.of(packed.format).attends
        inputs = [q, packed.rows, self.info]
        if mask.starts is not None:
            inputs.append(mask.starts)
        if mask.array is not None:
            inputs.append(mx.broadcast_to(mask.array, self.scores))
        if packed.tail is not None:
            inputs.append(packed.tail)
        inputs.append(table)
        last = [] if sinks is None else [sinks]
        if self.second is not None:
            return self.second(q, self.info, self.first(*inputs), table, *last)
        if self.launches[0].name == "attend_join":
            last.append(next(_arrivals()))
        return self.first(*inputs, *last)


def prepare(
    q: mx.array,
    packed: Packed,
    scale: float,
    mask: Mask,
    sinks: mx.array | None,
    parts: int | None = None,
) -> Attend:
    """The launch of :func:`attend` for arguments like these and this length."""
    info, work = _info(q, packed, scale, mask), grid(q, packed, mask.window, parts)
    arrays = (q, packed.rows, mask.starts, packed.tail, sinks)
    scores = (*q.shape[:3], packed.length) if mask.array is not None else ()
    kind = 0 if mask.array is None else 1 if mask.array.dtype == mx.bool_ else 2
    launches = _launches(machine(), q, packed, work, kind, mask.starts is not None, sinks)
    first = launches[0].prepared((*like(*arrays), kind, scores))
    second = launches[1].prepared(like(q, sinks)) if len(launches) > 1 else None
    return Attend(launches, work.parts, first, second, info, scores)


def _constants(kind: Kind, work: Grid, mask: int, starts: bool, tail: bool) -> Constants:
    given = (("MASK", mask), ("STARTS", starts), ("TAIL", tail))
    return (*plan(kind).attend, *given, ("NSG", work.groups), ("TK", work.keys))


def _launches(
    name: str, q: mx.array, packed: Packed, work: Grid, mask: int, starts: bool, sinks
) -> tuple[Launch, ...]:
    kind = packed.format.kind
    constants = _constants(kind, work, mask, starts, packed.tail is not None)
    with_sinks = ("SINKS", sinks is not None)
    B, Hq, L, _ = q.shape
    out = (B, Hq, L, kind.layout.v_dim)
    partials = (B, Hq, L, work.parts * (out[3] + 2))
    threads = (work.parts * work.groups * 32, packed.rows.shape[1] * work.blocks, B)
    group = (work.groups * 32, 1, 1)

    def launch(kernel, constants, shapes, dtypes, threads=threads, group=group):
        return Launch(name, kernel, constants, threads, group, shapes, dtypes)

    if work.parts == 1:
        return (launch("attend_finish", (*constants, with_sinks), (out,), (q.dtype,)),)
    if name == "cuda" and work.parallel <= ARRIVALS:
        dtypes = (q.dtype, mx.float32)
        return (launch("attend_join", (*constants, with_sinks), (out, partials), dtypes),)
    merge = TUNING[name].when(work.parallel, kind.layout).combine_groups
    ends = (*plan(kind).combine, with_sinks, ("NSG", merge))
    sizes = (B * Hq * L * merge * 32, 1, 1), (merge * 32, 1, 1)
    return (
        launch("attend_store", constants, (partials,), (mx.float32,)),
        launch("combine", ends, (out,), (q.dtype,), *sizes),
    )


def attend(
    q: mx.array,
    packed: Packed,
    scale: float,
    mask: Mask = EVERY,
    sinks: mx.array | None = None,
    parts: int | None = None,
) -> mx.array:
    """Shapes as in :func:`mlx_kvq.ops.attend`; ``parts`` overrides the number of splits. A query
    that may attend to nothing gets zeros."""
    return prepare(q, packed, scale, mask, sinks, parts)(q, packed, mask, sinks)
