"""quantize_pack: new keys and values to rows, and the exact tail moved on; one launch."""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from ...format.format import Format, Kind
from ...format.layout import tail_dtype
from . import tables
from .arguments import integers
from .launch import Launch, like
from .machine import machine
from .plan import plan
from .tuning import TUNING

COPYING = 32  # threadgroups that move tails on


def pairs(kind: Kind, L: int, tail: bool) -> int:
    """Pairs of SIMD groups in a threadgroup of quantize_pack, a compile-time constant; of few
    tokens one, unless there is a tail to move on, which the others do."""
    most = TUNING[machine()].pack_pairs
    return 1 if not tail and -(-L // plan(kind).pack_set) < most else most


def copying(tokens: int, channels: int, per_group: int, parallel: int) -> int:
    """Threadgroups of a head that move ``tokens`` of the tail on, two turns of eight channels for
    each thread; few where ``parallel`` heads fill the GPU anyway. One for all of 64 tokens took 9.4
    us on an H200 (2 heads of 128; one of 256: 15.0), this 6.2 (6.3), and 16 tokens take 5.6."""
    turns = tokens * channels // (8 * 64 * per_group)
    return max(1, min(-(-turns // 2), COPYING // parallel))


@dataclass(eq=False)
class Pack:
    """The launch for one shape of its arguments; ``sizes`` are those of the tail and the rows."""

    launch: Launch
    run: Callable
    sizes: mx.array | None

    def __call__(self, k, v, fmt: Format, tail=None, pending=None):
        packs = tables.of(fmt).packs
        if self.sizes is None:
            return self.run(k, v, *packs), None
        if tail is not None and pending is not None:  # a decode step
            return self.run(k, v, *packs, self.sizes, tail, pending)
        given = [a for a in (tail, pending) if a is not None]
        return self.run(k, v, *packs, self.sizes, *given)


def prepare(
    k: mx.array,
    v: mx.array,
    kind: Kind,
    tail: mx.array | None,
    size: int,
    pending: mx.array | None,
    capacity: int | None,
) -> Pack:
    """The launch of :func:`quantize_pack` for arguments like these."""
    name, lay = machine(), kind.layout
    B, H, L, _ = k.shape
    per_group = pairs(kind, L, size > 0)
    most = max(1, TUNING[name].pack_threadgroups // (B * H))
    count = capacity or (L if pending is None else pending.shape[2])
    groups = -(-L // (plan(kind).pack_set * per_group))
    if tail is not None:
        channels = lay.k_dim + lay.v_dim
        groups = max(groups, copying(size - L, channels, per_group, B * H))
    groups = min(groups, most)
    shapes, dtypes = [(B, H, count, lay.words)], [mx.uint32]
    if size:
        shapes.append((B, H, size, lay.k_dim + lay.v_dim))
        dtypes.append(tail_dtype(k.dtype))
    given = [("KEEPS", size > 0), ("TAIL", tail is not None), ("HOLDS", pending is not None)]
    launch = Launch(
        name,
        "quantize_pack",
        (*plan(kind).pack, ("PAIRS", per_group), *given),
        (groups * per_group * 64, B * H, 1),
        (per_group * 64, 1, 1),
        tuple(shapes),
        tuple(dtypes),
        len(shapes),
    )
    sizes = integers("quantize_pack", kept=size, rows=count) if size else None
    return Pack(launch, launch.prepared(like(k, v, tail, pending)), sizes)


def quantize_pack(
    k: mx.array,
    v: mx.array,
    fmt: Format,
    tail: mx.array | None = None,
    size: int = 0,
    pending: mx.array | None = None,
    capacity: int | None = None,
) -> tuple[mx.array, mx.array | None]:
    """k [B, H, L, Dk], v [B, H, L, Dv], any strides -> rows uint32 [B, H, L, W], and the new tail
    [B, H, size, Dk + Dv]; see :func:`mlx_kvq.ops.quantize_pack`."""
    return prepare(k, v, fmt.kind, tail, size, pending, capacity)(k, v, fmt, tail, pending)
