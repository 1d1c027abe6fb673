"""Launch sizes of the fused kernels: one table, and the functions that read it."""

import os
from dataclasses import dataclass, replace

from ...format.layout import RowLayout

VECTOR_KEYS = 32  # of a tile, a lane one


@dataclass(frozen=True)
class Tuning:
    """Launch sizes on one kind of GPU.

    Args:
        keys (int): Keys of a tile, a multiple of 16; a SIMD group works on one tile at a time.
        short_keys (int): The same where a key and its value have up to 128 channels together.
        simd_groups (int): SIMD groups of an attention threadgroup, fewer where rows are long.
        threadgroups (int): Attention threadgroups that fill the GPU.
        alone (int): Up to so many keys of a split one threadgroup to a processor, half of these, is
            faster than two, of which one works while the other waits. 0 for never.
        single (int): Up to this many keys one split does, and spares a launch on Metal.
        unsplit (int): The same where there is room for two splits at most.
        least (int): Tiles per SIMD group below which more splits do not pay.
        few (int): Up to so many splits, one tile a split is enough.
        most (int): Splits beyond which merging them costs more than they save.
        busy (int): From so many threadgroups of one split on (batch times KV heads, about) they
            have half the SIMD groups where values have more than 128 channels: by registers, a
            processor has no room for two with all of them.
        combine_groups (int): SIMD groups of a combine threadgroup, at most 16.
        combine_ahead (int): Splits that each of them loads at once.
        pack_pairs (int): Pairs of SIMD groups of a quantize threadgroup, fewer for few tokens.
        pack_threadgroups (int): Quantize threadgroups that fill the GPU; each then does several
            sets of tokens.
        restore_threadgroups (int): Likewise for restore.
        ahead (int): In a long chunk of a prompt, but for the first 2048 tokens (``caches``),
            evaluation begins after so many layers and goes on
            while the host builds the next ones; 0 leaves it to the caller. What MLX encodes far
            ahead of the GPU is in memory at once: the arrays of a chunk's attention, of every
            layer. Each time costs a CUDA host about 1 ms (H200, Qwen2.5-1.5B's shape, 512 tokens:
            every 3 layers 23.6 ms, every 9 18.6, never 14.7; fp16 10.1).
        replay (bool): Whether a decode step's launches are traced by ``mx.compile`` once and
            replayed; :func:`replays` asks the user first.
        hold_tables (bool): A SIMD group keeps twiddles and channel factors in registers while it
            packs or restores vectors; otherwise it reads them again for each set.
        packs_apart (bool): Tokens of a tail are packed by a kernel of its own, otherwise by that of
            a prompt, which is told at run time. That costs 40 registers on G13 and none on CUDA,
            where it takes a third of the time for a prompt; why is not known (H200, 512 tokens, 2
            heads of 128, nearest: 13.2 and 4.2 us; scripts/studies/speed.md).
        fed_at_once (int): Most keys that a SIMD group rounds with feedback side by side; 1, 2 or 4.
        hold_queries (bool): attend keeps the queries' operands and offsets in registers, otherwise
            in threadgroup memory.
        slice_values (bool): attend's SIMD groups share probabilities, and each adds up a slice of
            the values' channels of all their tiles; otherwise all channels of its own tiles.
        room_for_exact (bool): Where there are exact tokens, splits whose SIMD groups would all have
            as many tiles have one tile less, if the GPU has room for more splits, or, if these are
            two at most, half a tile more.
        vector_rows (int): Query heads of a KV head up to which one token is attended to without
            matrix products (``kernels/attend_vector.metal``); 0 for never.
        vector_few (int): Up to so many threadgroups of it, at most 16 splits, a split of two tiles
            pays.
        prefetch (bool): attend loads its next tile, and an exact token's value, into registers
            ahead of their use.
        own_tiles (int): Tiles of a SIMD group in threadgroup memory at once: the next ones are sent
            there ahead of their use, not into registers. One where codes have 3 or 5 bits.
        threadgroup_memory (int): Bytes that a threadgroup may have.
    """

    keys: int
    short_keys: int
    simd_groups: int
    threadgroups: int
    single: int
    least: int
    alone: int = 0
    unsplit: int = 0
    few: int = 1
    most: int = 256
    busy: int = 1 << 30
    combine_groups: int = 4
    combine_ahead: int = 1
    pack_pairs: int = 4
    pack_threadgroups: int = 256
    restore_threadgroups: int = 512
    ahead: int = 0
    replay: bool = False
    hold_tables: bool = False
    packs_apart: bool = False
    fed_at_once: int = 1
    hold_queries: bool = False
    slice_values: bool = False
    room_for_exact: bool = False
    vector_rows: int = 0
    vector_few: int = 0
    prefetch: bool = False
    own_tiles: int = 1
    threadgroup_memory: int = 32 * 1024

    def when(self, parallel: int, lay: RowLayout) -> "Tuning":
        """The launch sizes for so many threadgroups of one split, and for such rows."""
        if lay.v_dim <= 128:  # narrow rows are not sent ahead: another threadgroup fills the time
            return self if lay.wide == lay else replace(self, alone=0)
        if parallel < self.busy:
            return self
        return replace(self, simd_groups=self.simd_groups // 2, alone=self.alone // 4)


TUNING = {
    # Not measured: no Mac at hand; by tests/emulator/estimate_apple. One split of 512 keys would
    # leave all but one core per KV head idle and take twice the time of several and a second one.
    # replay: right by its trace (tests/ops/test_replay.py), but no Mac has confirmed it; with
    # MLX_KVQ_REPLAY=1 one can, and 'mlx_kvq doctor' compares both.
    "metal": Tuning(
        keys=16,
        short_keys=16,
        simd_groups=8,
        threadgroups=160,
        single=128,
        least=1,
        combine_groups=16,
        combine_ahead=4,
        slice_values=True,
        vector_rows=4,
        vector_few=32,
        packs_apart=True,
    ),
    # H200, mlx 0.32.4, the kernel alone (ncu): sweeps over keys, SIMD groups, tiles and splits at
    # D = 64, 128 and 256, 1 to 32 sequences of 512 to 128K tokens (scripts/studies/speed.md).
    "cuda": Tuning(
        keys=32,
        short_keys=64,
        simd_groups=8,
        threadgroups=264,
        alone=8192,
        single=128,
        unsplit=1024,
        least=4,
        few=16,
        most=96,
        busy=32,
        pack_threadgroups=528,
        ahead=9,
        replay=True,
        hold_tables=True,
        fed_at_once=4,
        hold_queries=True,
        room_for_exact=True,
        prefetch=True,
        own_tiles=2,
        threadgroup_memory=96 * 1024,
    ),
}


def replays(machine: str) -> bool:
    """Whether launches are replayed: ``Tuning.replay``, or what ``MLX_KVQ_REPLAY`` says.

    Raises:
        ValueError: If that is neither 0 nor 1.
    """
    asked = os.environ.get("MLX_KVQ_REPLAY", "")
    if asked not in ("", "0", "1"):
        raise ValueError(f"MLX_KVQ_REPLAY is 0, 1 or unset, got {asked!r}.")
    return asked == "1" if asked else TUNING[machine].replay


def _slices(lay: RowLayout, simd_groups: int) -> int:
    """``value_slices`` of ``kernels/tile.metal``."""
    units, slices = -(-lay.v_dim * lay.v_bits // 128), 1
    while (
        2 * slices <= simd_groups
        and lay.v_dim * lay.v_bits % 128 == 0
        and units % (4 * slices) == 0
        and units * (16 // lay.v_bits) >= 16 * slices
    ):
        slices *= 2
    return slices


def _tile_words(lay: RowLayout, tuning: Tuning, keys: int, simd_groups: int, tiles: int) -> int:
    """Words of ``memory`` in ``kernels/attend_begin.metal``, without ROWS."""
    lay = lay.wide  # rows as they are there
    units = -(-lay.v_dim * lay.v_bits // 128)  # 16-bit units of one lane
    slices = _slices(lay, simd_groups) if tuning.slice_values else 1
    sums = 64 * units * (16 // lay.v_bits) // slices
    all_tiles = simd_groups * tiles * keys * lay.words
    merged = simd_groups
    half = simd_groups // 2
    if half == slices or (half > slices and simd_groups * sums > max(all_tiles, 6144)):
        merged = half
    return max(all_tiles, merged * sums + 8 * lay.v_dim)


def tile_bytes(lay: RowLayout, tuning: Tuning, shape: tuple[int, int, int], rows: int = 0) -> int:
    """Bytes of it that a launch on CUDA gives the kernel; ``shape`` from :func:`attend_shape`. Of
    more than 48 KB in all MLX tells the driver only if these alone are more than 48,000."""
    groups, keys, tiles = shape
    words = _tile_words(lay, tuning, keys, groups, tiles)
    size = 16 * -(-(groups // 2 * rows * lay.v_dim if rows else words) // 4)
    beyond = not rows and _memory(lay, tuning, keys, groups, tiles) > 48 * 1024
    return max(size, 48016) if beyond else size


def _memory(lay: RowLayout, tuning: Tuning, keys: int, simd_groups: int, tiles: int) -> int:
    """Bytes of threadgroup memory that it declares."""
    lay, words = lay.wide, _tile_words(lay, tuning, keys, simd_groups, tiles)
    operands = -(-lay.k_words // 4) * (16 // lay.k_bits)
    size = 4 * (words + 3) + 16 * (8 * operands + 1) + 32 + 64 * simd_groups
    size += 32 * lay.k_dim // lay.k_group  # not there if a kernel keeps them in registers
    size += 256  # integers of the launch
    if tuning.slice_values:
        size += (16 * keys + 4) * simd_groups
    return size


def vector_rows(lay: RowLayout, tuning: Tuning, heads: int, L: int) -> int:
    """Query rows of a KV head that ``kernels/attend_vector.metal`` takes, 0 for none: then it is
    ``kernels/attend_matrix.metal``. A SIMD group's 32 lanes have to hold a token's codes.

    Raises:
        ValueError: If ``MLX_KVQ_VECTOR``, 0 for none, is not 0, 1 or unset.
    """
    asked = os.environ.get("MLX_KVQ_VECTOR", "")
    if asked not in ("", "0", "1"):
        raise ValueError(f"MLX_KVQ_VECTOR is 0, 1 or unset, got {asked!r}.")
    if asked == "0":
        return 0
    wide = lay.wide
    sides = ((lay.k_dim, wide.k_bits, lay.k_group), (lay.v_dim, wide.v_bits, lay.v_group))
    fits = all(D * bits <= 1024 or group % (64 // bits) == 0 for D, bits, group in sides)
    return heads if L == 1 and heads <= tuning.vector_rows and fits else 0


def attend_shape(lay: RowLayout, tuning: Tuning, rows: int = 0) -> tuple[int, int, int]:
    """SIMD groups of a threadgroup, keys of a tile and tiles of a SIMD group that fit threadgroup
    memory; ``rows`` from :func:`vector_rows`."""
    if rows:
        return tuning.simd_groups, VECTOR_KEYS, 1
    groups, tiles = tuning.simd_groups, tuning.own_tiles
    keys = tuning.short_keys if lay.k_dim + lay.v_dim <= 128 else tuning.keys
    if lay.wide != lay:  # narrow codes come through registers, not more than they have
        keys, tiles = 16, 1
    while _memory(lay, tuning, keys, groups, tiles) > tuning.threadgroup_memory:
        if tiles > 2:
            tiles -= 1
        elif keys > 16:
            keys //= 2
        else:
            groups //= 2
    return groups, keys, tiles


def splits(
    tuning: Tuning,
    groups: int,
    keys: int,
    span: int,
    parallel: int,
    rows: int = 0,
    exact: bool = False,
) -> int:
    """Shares of a context of ``span`` keys.

    Args:
        tuning (Tuning): Of the GPU.
        groups (int), keys (int): From :func:`attend_shape`.
        span (int): Keys that any query may attend to.
        parallel (int): Threadgroups of one split.
        rows (int): From :func:`vector_rows`.
        exact (bool): Whether there are exact tokens besides.
    """
    tiles = -(-span // keys)
    if span <= tuning.single:
        return 1
    wanted = tuning.threadgroups // parallel
    half = tuning.threadgroups // 2  # one threadgroup to a processor
    if parallel <= half and span <= half // parallel * tuning.alone:
        wanted = half // parallel
    wanted = min(tuning.most, wanted)
    if wanted <= 2 and span <= tuning.unsplit:
        return 1
    least = min(tuning.few, tiles)
    if rows:
        least = max(least, min(16, tuning.vector_few // parallel, -(-tiles // 2)))
    parts = max(1, min(wanted, max(least, -(-tiles // (tuning.least * groups)))))
    share = -(-tiles // parts)
    if exact and tuning.room_for_exact and parts > 1 < share and share % groups == 0:
        # The last SIMD group, which takes exact tokens first, has a tile less than others.
        more = -(-tiles // (share - 1))
        fits = half if parts * parallel <= half else tuning.threadgroups
        if more * parallel <= fits:
            parts = more
        elif share <= 2 * groups:  # or some have one more, and others none
            parts = -(-tiles // (share + groups // 2))
    return parts
