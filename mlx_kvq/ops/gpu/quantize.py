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
from .tuning import TUNING, replays

COPYING = 32  # threadgroups that move tails on


def pairs(kind: Kind, L: int, tail: bool) -> int:
    """Pairs of SIMD groups in a threadgroup of quantize_pack, a compile-time constant; of few
    tokens one, unless there is a tail, which the others move on."""
    most = TUNING[machine()].pack_pairs
    return 1 if not tail and -(-L // plan(kind).pack_set) < most else most


def copying(tokens: int, channels: int, per_group: int, parallel: int) -> int:
    """Threadgroups of a head that move ``tokens`` of the tail on, two turns of eight channels for
    each thread; few where ``parallel`` heads fill the GPU anyway. One for all of 64 tokens took 9.4
    us on an H200 (2 heads of 128; one of 256: 15.0), this 6.2 (6.3), and 16 tokens take 5.6."""
    turns = tokens * channels // (8 * 64 * per_group)
    return max(1, min(-(-turns // 2), COPYING // parallel))


def grid(
    kind: Kind, shape: tuple[int, ...], per_group: int, size: int, tail: bool
) -> tuple[int, int, int]:
    """Threads for keys of this shape, of which each threadgroup takes sets by ``per_group`` pairs
    of SIMD groups, and a tail of ``size`` tokens, moved on if there was a ``tail``."""
    B, H, L, _ = shape
    groups = -(-L // (plan(kind).pack_set * per_group))
    if tail:
        channels = kind.layout.k_dim + kind.layout.v_dim
        groups = max(groups, copying(size - L, channels, per_group, B * H))
    most = max(1, TUNING[machine()].pack_threadgroups // (B * H))
    return min(groups, most) * per_group * 64, B * H, 1


@dataclass(eq=False)
class Pack:
    """The launch for one shape of its arguments; ``sizes`` are those of the tail and the rows."""

    launch: Launch
    run: Callable
    sizes: mx.array | None

    def __call__(self, k, v, fmt: Format, tail=None):
        packs = tables.of(fmt).packs
        if self.sizes is None:
            return self.run(k, v, *packs), None
        return self.run(k, v, *packs, self.sizes, *([] if tail is None else [tail]))

    def then(self, more: Callable) -> Callable:
        """This launch, without a tail before, and ``more(k, v, table, tail)``, given the new tail:
        both in one replay, which costs the host little more than the launch alone."""

        def launch(k, v, table, *feedback):
            rows, tail = self.run(k, v, table, *feedback, self.sizes)
            return rows, tail, more(k, v, table, tail)

        run = mx.compile(launch) if replays(self.launch.machine) else launch
        return lambda k, v, fmt: run(k, v, *tables.of(fmt).packs)


def prepare(
    k: mx.array,
    v: mx.array,
    kind: Kind,
    tail: mx.array | None,
    size: int = 0,
    capacity: int | None = None,
    rotated: bool = False,
) -> Pack:
    """The launch of :func:`quantize_pack` for arguments like these, or if ``rotated`` of
    :func:`pack_rotated` for those sides of a tail."""
    name, lay, (B, H, L, _) = machine(), kind.layout, k.shape
    apart = TUNING[name].packs_apart
    if rotated and not apart:
        size = 1  # by the kernel of a prompt, which keeps a tail
    per_group = pairs(kind, L, size > 0 or rotated)
    count = capacity or L
    shapes, dtypes = [(B, H, count, lay.words)], [mx.uint32]
    if size:
        shapes.append((B, H, size, lay.k_dim + lay.v_dim))
        dtypes.append(tail_dtype(k.dtype))
    launch = Launch(
        name,
        "quantize_pack",
        (
            *plan(kind).pack,
            ("PAIRS", per_group),
            ("KEEPS", size > 0),
            ("TAIL", tail is not None),
            ("ROTATED", int(rotated) if apart or not size else 2),
        ),  # fmt: skip
        grid(kind, k.shape, per_group, size, tail is not None),
        (per_group * 64, 1, 1),
        tuple(shapes),
        tuple(dtypes),
        len(shapes),
    )
    sizes = None
    if size:
        sizes = integers("quantize_pack", kept=size, rows=count, is_rotated=int(rotated))
    return Pack(launch, launch.prepared(like(k, v, tail)), sizes)


def quantize_pack(
    k: mx.array,
    v: mx.array,
    fmt: Format,
    tail: mx.array | None = None,
    size: int = 0,
    capacity: int | None = None,
) -> tuple[mx.array, mx.array | None]:
    """k [B, H, L, Dk], v [B, H, L, Dv], any strides -> rows uint32 [B, H, L, W], and the new tail
    [B, H, size, Dk + Dv]; see :func:`mlx_kvq.ops.quantize_pack`."""
    return prepare(k, v, fmt.kind, tail, size, capacity)(k, v, fmt, tail)


def pack_rotated(y: mx.array, fmt: Format) -> mx.array:
    """y [B, H, L, Dk + Dv], tokens of a tail -> rows uint32 [B, H, L, W]; see
    :func:`mlx_kvq.ops.pack_rotated`."""
    return prepare_rotated(y, fmt.kind)(*sides(y, fmt.kind), fmt)[0]


def prepare_rotated(y: mx.array, kind: Kind) -> Pack:
    """The launch of :func:`pack_rotated` for a tail like this."""
    return prepare(*sides(y, kind), kind, None, rotated=True)


def sides(y: mx.array, kind: Kind) -> tuple[mx.array, mx.array]:
    """Keys and values of a tail."""
    return y[..., : kind.layout.k_dim], y[..., kind.layout.k_dim :]
