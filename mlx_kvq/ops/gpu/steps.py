"""Decode steps, prepared once: tens of layers ask for the same launch at every token.

Only where launches are replayed (``Tuning.replay``). What a step launches is what
:mod:`mlx_kvq.ops.gpu.fused` launches.
"""

from functools import lru_cache
from typing import Any

import mlx.core as mx

from ...format.format import Format
from ...format.layout import tail_dtype
from . import fused, jit


class PackStep:
    """:func:`quantize_pack` of a few tokens, or :func:`quantize_pack_tail`, prepared for one
    format, shape and dtype."""

    def __init__(
        self, k: mx.array, v: mx.array, fmt: Format, tail: mx.array | None = None, keep: int = 0,
        held: mx.array | None = None,
    ):  # fmt: skip
        self.machine, plan = fused._machine(), fused._plan(fmt)
        self.device = mx.default_device()
        B, H, L, _ = k.shape
        self.tables: tuple[mx.array, ...] = (plan.packs,)
        keeps = tail is not None
        constants, grid, threadgroup = fused._pack_launch(self.machine, fmt, B, H, L, keeps)
        lay = plan.layout
        given = ("KEEPS", keeps), ("TAIL", keeps), ("HOLDS", held is not None)
        constants = (*constants, *given)
        count = L if held is None else held.shape[2]
        shapes: tuple[tuple[int, ...], ...] = ((B, H, count, lay.words),)
        dtypes: tuple[mx.Dtype, ...] = (mx.uint32,)
        like: tuple = (k.shape, v.shape, k.dtype, v.dtype)
        if tail is not None:
            shapes += ((B, H, keep, lay.k_dim + lay.v_dim),)
            dtypes += (tail_dtype(k.dtype),)
            like += (tail.shape, tail.dtype, held is None)
            self.tables += (fused._integers(keep, count),)
        kernel = jit.kernel(self.machine, "quantize_pack", constants)
        self.run = jit.replayed(kernel, grid, threadgroup, shapes, dtypes, like, len(shapes))

    def __call__(self, k: mx.array, v: mx.array, *before: mx.array):
        return self.run(k, v, *self.tables, *before)


def check_ring(ring: tuple[int, int], length: int, L: int) -> None:
    """Raise ValueError unless L queries may read ``length`` rows in this order."""
    pair = isinstance(ring, tuple) and len(ring) == 2 and all(type(n) is int for n in ring)
    if not pair or not 0 <= ring[0] < ring[1] <= length or (L > 1 and ring[1] < length):
        raise ValueError(
            f"A ring of {length} rows for {L} queries is (keep, idx) with 0 <= keep < "
            f"idx <= {length}, of which idx is {length} for several queries, got {ring}."
        )


class AttendStep:
    """:func:`attend` without a mask or sinks, prepared for one format, shape and dtype: what is
    left to do for a token is to look up the number of splits and to launch."""

    def __init__(
        self, q: mx.array, rows: mx.array, fmt: Format, scale: float, window: int | None,
        starts: bool, single: bool, tail: mx.array | None,
    ):  # fmt: skip
        self.machine, plan = fused._machine(), fused._plan(fmt)
        self.device = mx.default_device()
        self.single = single  # the kernel for one split, or that for several
        self.rows_shape, self.q_shape, self.dtype = rows.shape, q.shape, q.dtype
        self.capacity, self.scale, self.window = rows.shape[2], scale, window
        self.layout = plan.layout
        B, Hq, L, _ = q.shape
        Hkv = rows.shape[1]
        heads = Hq // Hkv
        self.blocks = fused.query_blocks(heads, L)
        self.parallel = B * Hkv * self.blocks
        self.launch = fused._launch(
            self.machine, fmt, self.parallel, 0, starts, False, tail is not None
        )
        self.tail = None if tail is None else (tail.shape, tail.dtype)
        self.tables = plan.attends
        place = self.machine, self.layout, self.parallel
        recent = None if tail is None else fmt.recent
        self.token = token_of(*place, heads, L, scale, window, recent)

    def __call__(
        self, q: mx.array, rows: mx.array, length: int, starts: mx.array | None,
        tail: mx.array | None, ring: tuple[int, int] | None,
    ) -> mx.array | None:  # fmt: skip
        """``None`` where the length now asks for the other kernel."""
        token = self.token
        if token.length != length or token.ring != ring:
            token.move(length, ring)
        parts = token.parts
        if (parts == 1) is not self.single:
            return None
        key = self.launch, self.rows_shape, self.dtype, parts
        if (run := token.runs.get(key)) is None:
            run = token.runs[key] = self._prepare(parts)
        inputs: tuple[mx.array, ...] = (q, rows, token.info)
        if starts is not None:
            inputs += (starts,)
        if tail is not None:
            inputs += (tail,)
        if parts == 1:
            return run(*inputs, self.tables)
        return run(*inputs, self.tables, next(fused._arrivals()))

    def fits(self) -> bool:
        """Whether one launch does it all, however the context is split."""
        return self.parallel <= fused._ARRIVALS

    def _prepare(self, parts: int):
        B, Hq, L, _ = self.q_shape
        shape = (B, Hq, L, self.layout.v_dim)
        shapes: tuple[tuple[int, ...], ...] = (shape,)
        dtypes: tuple[mx.Dtype, ...] = (self.dtype,)
        if parts > 1:
            shapes += ((B, Hq, L, parts * (shape[3] + 2)),)
            dtypes += (mx.float32,)
        groups = self.launch.groups
        return jit.replayed(
            jit.kernel(
                self.machine, "attend_finish" if parts == 1 else "attend_join", self.launch.finish
            ),
            (parts * groups * 32, self.rows_shape[1] * self.blocks, B),
            (groups * 32, 1, 1),
            shapes,
            dtypes,
            (self.q_shape, self.rows_shape, self.tail),
        )


class _Token:
    """What the decode steps of all layers have in common while the length is the same."""

    def __init__(self, machine, layout, parallel, heads, L, scale, window, recent):
        self.place = machine, layout, parallel
        self.heads, self.L, self.scale, self.window = heads, L, scale, window
        self.recent = recent
        self.length, self.ring = 0, None
        self.runs: dict[tuple, Any] = {}  # launches, by what they depend on

    def move(self, length: int, ring: tuple[int, int] | None) -> None:
        if ring is not None:
            check_ring(ring, length, self.L)
        window = self.window
        span = length if window is None else min(length, window + self.L - 1)
        self.length, self.ring, self.parts = length, ring, fused._parts(*self.place, span)
        self.info = fused.attend_info(
            length, self.heads, self.L, self.scale, False, window, self.recent, ring
        )
        if len(self.runs) > 256:  # lengths far behind
            self.runs.clear()


@lru_cache(maxsize=64)
def token_of(machine, layout, parallel, heads, L, scale, window, recent) -> _Token:
    return _Token(machine, layout, parallel, heads, L, scale, window, recent)
