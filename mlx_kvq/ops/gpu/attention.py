"""attend: queries over packed rows, one launch, or two where the context is split on Metal."""

import itertools
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import mlx.core as mx

from .. import memo
from ..packed import EVERY, Mask, Packed
from . import tables
from .arguments import integers, not_small
from .launch import Launch, like
from .machine import machine
from .machine import tuning as sizes
from .plan import plan
from .tuning import Tuning, attend_shape, splits, tile_bytes, vector_rows

NEVER = 1 << 30  # tokens of a context whose exact tail grows; the kernel doubles it
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
        rows (int): Query rows of ``kernels/attend_vector.metal``, 0 for matrix products.
        groups (int), keys (int), tiles (int): SIMD groups, keys of a tile and tiles of a SIMD
            group, compile-time constants.
        tuning (Tuning): Launch sizes for so many threadgroups.
    """

    blocks: int
    parallel: int
    rows: int
    groups: int
    keys: int
    tiles: int
    tuning: Tuning

    def parts(self, length: int, L: int, window: int | None, exact: bool) -> int:
        """Splits of a context of ``length`` tokens, some of them exact or none; 1 spares a launch,
        or the join."""
        span = length if window is None else min(length, window + L - 1)
        return splits(self.tuning, self.groups, self.keys, span, self.parallel, self.rows, exact)


def grid(q: mx.array, packed: Packed) -> Grid:
    (B, Hq, L, _), Hkv, lay = q.shape, packed.rows.shape[1], packed.format.layout
    blocks = -(-(Hq // Hkv) * L // 8)
    parallel = B * Hkv * blocks
    tuning = sizes().when(parallel, lay)
    rows = vector_rows(lay, tuning, Hq // Hkv, L)
    return Grid(blocks, parallel, rows, *attend_shape(lay, tuning, rows), tuning)


def _bits(x: float) -> int:
    return struct.unpack("<i", struct.pack("<f", x))[0]


class Attend:
    """The launches of :func:`attend` for one shape of its arguments but the length."""

    def __init__(self, q: mx.array, packed: Packed, scale: float, mask: Mask, sinks):
        self.machine, self.grid = machine(), grid(q, packed)
        self.kind, self.q_shape, self.dtype = packed.format.kind, q.shape, q.dtype
        self.Hkv, self.window, self.tail = (
            packed.rows.shape[1],
            mask.window,
            packed.tail is not None,
        )
        first = packed.first
        self.first, self.places = first is not None, first is not None and first.has_places
        self.starts, self.sinks = mask.starts is not None, sinks is not None
        heads, L = q.shape[1] // self.Hkv, q.shape[2]
        self.ends = {"heads": heads, "queries": L, "scale": _bits(scale)}
        self.given = {
            "scale": _bits(scale),
            "causal": mask.causal,
            "window": mask.window or 0,
        }
        tokens = () if first is None else (first.array, first.at if self.places else None)
        self.like = like(q, packed.rows, mask.starts, mask.array, packed.tail, sinks, *tokens)
        self.mask = 0 if mask.array is None else 1 if mask.array.dtype == mx.bool_ else 2
        # By number of splits: the launches, and whether they work on this machine.
        self.made: dict[int, tuple[Launch, ...]] = {}
        self.tried: dict[int, bool] = {}

    def parts(self, length: int) -> int:
        return self.grid.parts(length, self.q_shape[2], self.window, self.tail or self.first)

    def launches(self, parts: int) -> tuple[Launch, ...]:
        """One launch, or two where the context is split on Metal."""
        if (made := self.made.get(parts)) is None:
            made = self.made[parts] = self._launches(parts)
        return made

    def at(self, packed: Packed, parts: int) -> "Step":
        """The launch for this length, for the layers of a step."""
        launches = self.launches(parts)
        scores = (*self.q_shape[:3], packed.length) if self.mask else ()
        first = launches[0].prepared((*self.like, scores))
        # Partial sums have another shape for each number of splits.
        many = (*self.like[:1], parts)
        second = launches[1].prepared(many) if len(launches) > 1 else None
        info, arrivals = self._info(packed), self._arrivals(launches[0])
        ends = integers("combine", **self.ends)
        return Step(first, second, info, ends, scores, arrivals, self.machine == "metal")

    def _info(self, packed: Packed) -> mx.array:
        """The integers that ``kernels/attend_begin.metal`` takes."""
        length = packed.length
        given = {"length": length, **self.given}
        if self.tail or self.first:
            keep, idx = packed.ring or (0, length)
            recent, grows = self.kind.recent, packed.format.grows[0]
            if packed.recent is not None:
                recent, grows = packed.recent, NEVER
            if not self.tail:
                recent = 0
            given |= {"recent": recent, "grows": grows, "keep": keep, "next": idx}
        if packed.first is not None:
            given["firsts"], given["first_at"] = packed.first.numbers
        return integers("attend_store", **given)

    def _arrivals(self, launch: Launch) -> Iterator[mx.array] | None:
        return _arrivals() if launch.name == "attend_join" else None

    def _launches(self, parts: int) -> tuple[Launch, ...]:
        kind, work = self.kind, self.grid
        given = (
            ("MASK", self.mask), ("STARTS", self.starts), ("TAIL", self.tail),
            ("FIRST", self.first), ("PLACES", self.places),
        )  # fmt: skip
        shape = (
            ("ROWS", work.rows), ("NSG", work.groups), ("TK", work.keys), ("OWN_TILES", work.tiles),
        )  # fmt: skip
        constants = (*plan(kind).attend, *given, *shape)
        if self.machine == "cuda":
            tiled = work.groups, work.keys, work.tiles
            size = tile_bytes(kind.layout, work.tuning, tiled, work.rows)
            constants += (("TILE_BYTES", size),)
        with_sinks = ("SINKS", self.sinks)
        B, Hq, L, _ = self.q_shape
        out = (B, Hq, L, kind.layout.v_dim)
        partials = (B, Hq, L, parts * (out[3] + 2))
        sizes = (parts * work.groups * 32, self.Hkv * work.blocks, B), (work.groups * 32, 1, 1)

        def launch(kernel, constants, sizes, shapes, dtypes):
            grid, threadgroup = sizes
            return Launch(self.machine, kernel, constants, grid, threadgroup, shapes, dtypes)

        whole = (*constants, with_sinks)
        if parts == 1:
            return (launch("attend_finish", whole, sizes, (out,), (self.dtype,)),)
        if self.machine == "cuda" and work.parallel <= ARRIVALS:
            dtypes = (self.dtype, mx.float32)
            return (launch("attend_join", whole, sizes, (out, partials), dtypes),)
        merge = work.tuning.combine_groups
        ends = (*plan(kind).combine, with_sinks, ("NSG", merge))
        merging = (B * Hq * L * merge * 32, 1, 1), (merge * 32, 1, 1)
        return (
            launch("attend_store", constants, sizes, (partials,), (mx.float32,)),
            launch("combine", ends, merging, (out,), (self.dtype,)),
        )


@dataclass(eq=False)
class Step:
    """What runs one length; the arrays differ from layer to layer.

    Args:
        first, second: The launch, and that of combine.
        info, ends (mx.array): Run-time values, and those of combine.
        scores (tuple): Shape of an array mask.
        arrivals: Counters of attend_join.
        metal (bool): Whether the launch is one of Metal.
    """

    first: Callable
    second: Callable | None
    info: mx.array
    ends: mx.array
    scores: tuple[int, ...]
    arrivals: Iterator[mx.array] | None
    metal: bool

    def __call__(self, q, packed: Packed, mask: Mask, sinks: mx.array | None) -> mx.array:
        table = tables.of(packed.format).attends
        inputs = [q, packed.rows, self.info]
        if mask.starts is not None:
            inputs.append(not_small(mask.starts) if self.metal else mask.starts)
        if mask.array is not None:
            inputs.append(mx.broadcast_to(mask.array, self.scores))
        if packed.tail is not None:
            inputs.append(packed.tail)
        if (first := packed.first) is not None:
            inputs.append(first.array)
            if not isinstance(at := first.at, int):
                inputs.append(not_small(at) if self.metal else at)
        inputs.append(table)
        if self.second is not None:
            last = () if sinks is None else (sinks,)
            return self.second(q, self.ends, self.first(*inputs), table, *last)
        if sinks is not None:
            inputs.append(sinks)
        if self.arrivals is not None:
            inputs.append(next(self.arrivals))
        return self.first(*inputs)


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
    shape = Attend(q, packed, scale, mask, sinks)
    parts = shape.parts(packed.length) if parts is None else parts
    return shape.at(packed, parts)(q, packed, mask, sinks)
