"""keep_exact: the exact tail moved on by new keys and values; one launch."""

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
from .quantize import grid
from .tuning import TUNING


@dataclass(eq=False)
class Keep:
    """The launch for one shape of its arguments; ``sizes`` is that of the tail."""

    launch: Launch
    run: Callable
    sizes: mx.array

    def __call__(self, k, v, fmt: Format, tail):
        return self.with_table(k, v, tables.of(fmt).packs[0], tail)

    def with_table(self, k, v, table: mx.array, tail):
        return self.run(k, v, table, self.sizes, tail)


def prepare(k: mx.array, v: mx.array, kind: Kind, tail: mx.array, size: int) -> Keep:
    """The launch of :func:`keep_exact` for arguments like these."""
    name, (B, H, _, channels) = machine(), tail.shape
    per_group = TUNING[name].pack_pairs
    launch = Launch(
        name,
        "keep_exact",
        (*plan(kind).keep, ("PAIRS", per_group)),
        grid(kind, k.shape, per_group, size, True),
        (per_group * 64, 1, 1),
        ((B, H, size, channels),),
        (tail_dtype(k.dtype),),
    )
    return Keep(launch, launch.prepared(like(k, v, tail)), integers("keep_exact", kept=size))


def keep_exact(k: mx.array, v: mx.array, fmt: Format, tail: mx.array, size: int) -> mx.array:
    """k [B, H, L, Dk], v [B, H, L, Dv], any strides -> the new tail [B, H, size, Dk + Dv]; see
    :func:`mlx_kvq.ops.keep_exact`."""
    return prepare(k, v, fmt.kind, tail, size)(k, v, fmt, tail)
