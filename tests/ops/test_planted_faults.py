"""Faults planted in the kernels' sources, one at a time: the emulator or a comparison catches each.

A fault is a file, a text that occurs in it, and what stands there instead. Its check passes without
the fault, and fails, or the emulator raises, with it.
"""

import mmap

import mlx.core as mx
import numpy as np
import pytest

from mlx_kvq import ops
from mlx_kvq.format import levels
from mlx_kvq.ops import gpu as fused
from mlx_kvq.ops import plain
from mlx_kvq.ops.gpu import jit
from tests.emulator import KernelError, emulated, standin
from tests.ops.test_fused import (
    assert_attends,
    format_of,
    launches,
    normal,
    packed,
    transposed,
)
from tests.support import calls
from tests.support.feedback import assert_alike, assert_same_levels, weighted

__all__ = ["launches"]


# ---- checks -----------------------------------------------------------------------------------
def same(got, want, bound=2e-3):
    got, want = (np.array(x.astype(mx.float32)) for x in (got, want))
    assert np.isfinite(got).all()
    error = np.abs(got - want) / np.abs(want).max(axis=-1, keepdims=True)
    assert error.max() <= bound, f"off by {error.max():.2g}"


def edges(launches, tail=False):
    """Windows and causal limits that end one key beside, or at, the edge of a tile of 16."""
    launches(single=1023)
    fmt = format_of("int4-srft:recent=3", 64)
    rows = packed(fmt, 1, 1, 52)
    exact = {"tail": normal(1, 1, 8, 128, seed=30)} if tail else {}
    for L in (1, 2, 3):
        q = transposed(1, 2, L, 64, seed=L)
        for length in (31, 32, 33, 34, 35, 36, 37):
            for low in (15, 16, 17, None):
                window = None if low is None else length - low
                assert_attends(q, rows, length, fmt, mask="causal", window=window, **exact)


def edges_beside_a_tail(launches):
    edges(launches, tail=True)


def attention(launches):
    """Several splits, a tail, a mask, sinks, a centre, ragged lengths, a tail that wraps around."""
    fmt = format_of("int4-srft:recent=5", 64, what="mu")
    rows, tail = packed(fmt, 2, 2, 150), normal(2, 2, 9, 128, seed=30)
    sinks = normal(6, dtype=mx.float16)
    seen = np.random.default_rng(3).random((2, 6, 2, 147)) < 0.5
    for single, vector_rows in ((0, 0), (1023, 4)):
        launches(single=single, vector_rows=vector_rows)
        q = transposed(2, 6, 2, 64)
        assert_attends(q, rows, 147, fmt, mask="causal", tail=tail, sinks=sinks)
        assert_attends(q, rows, 147, fmt, mask=mx.array(seen))
        assert_attends(q, rows, 147, fmt, starts=mx.array([3, 100], mx.int32), tail=tail)
        one = q[:, :, :1]
        for ring in ((4, 60), (0, 3), (2, 146), (4, 7)):
            assert_attends(one, rows, 147, fmt, tail=tail, ring=ring)
        assert_attends(one, rows, 10, fmt, tail=tail, window=4)


def longer(launches):
    """Contexts of which a query reads more tokens from the tail, beside padding. Of the last ones,
    queries of a shorter context read rows of a tile of which those of the longer one read none."""
    cases = (1, 1, 129), (1, 1, 128), (1, 1, 258), (1, 4, 130), (1, 4, 258), (9, 4, 1153)
    for single in (0, 1023):
        launches(single=single)
        for recent, L, length in cases:
            fmt = format_of(f"int4-srft:recent={recent}", 64)
            starts = mx.array([0, 3], mx.int32)
            tail = normal(2, 2, 4 * recent + 3, 128, seed=30)
            q, rows = transposed(2, 4, L, 64), packed(fmt, 2, 2, length)
            assert_attends(q, rows, length, fmt, mask="causal", tail=tail, starts=starts)


def attention_of_odd_sizes(launches):
    """A last word that is not full; groups that are not whole slots; large and tiny scales."""
    launches(single=0, vector_rows=0)
    for spec, D in (("int4-srft:group_size=8", 72), ("int8-srft:group_size=40", 80)):
        fmt = format_of(f"{spec},recent=5", D)
        q, rows, tail = (
            transposed(1, 4, 1, D),
            packed(fmt, 1, 1, 90),
            normal(1, 1, 5, 2 * D, seed=3),
        )
        assert_attends(q, rows, 90, fmt)
        assert_attends(q, rows, 90, fmt, tail=tail)
    for size in (1e-5, 3e4):
        fmt = format_of("int4-srft", 64)
        k, v = normal(1, 1, 80, 64, seed=1), size * normal(1, 1, 80, 64, seed=2)
        rows = plain.quantize_pack(k, v, fmt)[0]
        assert_attends(normal(1, 2, 1, 64), rows, 80, fmt)
        fmt = format_of("int4-srft:group_size=8", 72)  # keys are dequantized before their product
        rows = plain.quantize_pack(size * normal(1, 1, 80, 72), normal(1, 1, 80, 72, seed=2), fmt)[
            0
        ]
        assert_attends(normal(1, 2, 1, 72) / size, rows, 80, fmt)


def vectors(launches):
    """One token of few heads: every number of them, more than one tile of exact tokens, rings,
    masks of heads, lanes without a part of a token, splits, a maximum that comes late."""
    # Several tiles of a SIMD group, the last one's keys the largest.
    fmt = format_of("int4-srft", 64)
    k, v = normal(1, 1, 300, 64, seed=1), normal(1, 1, 300, 64, seed=2)
    rows = plain.quantize_pack(k * mx.linspace(0.3, 3, 300)[:, None], v, fmt)[0]
    launches(single=1023)
    assert_attends(transposed(1, 2, 1, 64), rows, 300, fmt)
    for D, heads, bits, recent in (
        (64, 1, "int4", 40), (64, 3, "int8", 3), (80, 2, "int4", 3), (128, 4, "int4", 70),
        (256, 2, "int4", 3), (128, 2, "int3", 3),
    ):  # fmt: skip
        fmt = format_of(f"{bits}-srft:recent={recent}", D, what="mu")
        k, v = normal(2, 2, 140, D, seed=1), normal(2, 2, 140, D, seed=2)
        # The last keys are the largest.
        rows = plain.quantize_pack(k * mx.linspace(0.3, 3, 140)[:, None], v, fmt)[0]
        spare = mx.full((2, 2, 5, fmt.layout.words), 0xFFFFFFFF, mx.uint32)
        rows = mx.concatenate([rows, spare], axis=2)
        tail = normal(2, 2, recent + 4, 2 * D, seed=30)
        first = ops.First(normal(2, 2, 4, 2 * D, seed=31), 4)
        seen = mx.array(np.random.default_rng(3).random((2, 2 * heads, 1, 140)) < 0.7)
        q = transposed(2, 2 * heads, 1, D)
        for single in (0, 1023):
            launches(single=single)
            assert_attends(q, rows, 140, fmt, mask=seen)
            assert_attends(q, rows, 140, fmt, tail=tail, first=first, window=130)
            assert_attends(q, rows, 139, fmt, tail=tail, ring=(0, 60), mask=seen[..., :139])
            assert_attends(q, rows, 33, fmt, first=first)


def slices(launches):
    """SIMD groups that share probabilities, none, two and four of them: sets that are not full,
    values of other sizes in every other tile, more exact tokens than one turn takes."""
    launches(single=1023)
    for D, recent in ((64, 70), (128, 70), (256, 5)):
        fmt = format_of(f"int4-srft:recent={recent}", D)
        k, v = normal(1, 1, 170, D, seed=1), normal(1, 1, 170, D, seed=2)
        size = mx.where(mx.arange(170) // 16 % 2 == 0, 1.0, 2e3)[:, None]
        q, tail = transposed(1, 4, 2, D), 2e3 * normal(1, 1, recent + 1, 2 * D, seed=3)
        rows = plain.quantize_pack(k, v * size, fmt)[0]
        assert_attends(q, rows, 170, fmt, mask="causal")
        tail[..., :D] *= 1e-3
        assert_attends(q, rows, 170, fmt, mask="causal", tail=tail)


def sizes_of_values(launches):
    """Scales of values that grow, and far larger last ones; a maximum that comes late."""
    for spec in ("int4-srft", "int4-srft:group_size=16"):
        fmt = format_of(spec, 64)
        for late, growth in ((3e4, 0.1), (150.0, 3.0), (3.0, 0.1)):
            launches(single=1023, vector_rows=0, simd_groups=2)
            k, v = normal(1, 1, 300, 64, seed=1), normal(1, 1, 300, 64, seed=2)
            size = mx.where(mx.arange(300) < 260, mx.linspace(1e-3, 1, 300), late)[:, None]
            rows = plain.quantize_pack(k * mx.linspace(0.1, growth, 300)[:, None], v * size, fmt)[0]
            assert_attends(transposed(1, 8, 1, 64), rows, 300, fmt)


def sent(launches):
    """Tiles sent ahead of their use: a last one that is not full, heads that are not aligned, more
    tiles than a SIMD group has in memory, exact tokens before them."""
    for D, spare in ((128, 5), (128, 22), (64, 5)):
        launches(
            single=1023, keys=16, simd_groups=4, prefetch=True, own_tiles=2, hold_queries=True,
            slice_values=False, vector_rows=0,
        )  # fmt: skip
        fmt = format_of("int4-srft", D)
        rows = packed(fmt, 1, 2, 330, spare)
        for length in (325, 330):
            assert_attends(transposed(1, 12, 1, D), rows, length, fmt)
        # SIMD groups that begin with exact tokens, some of them only.
        tailed = format_of("int4-srft:recent=12", D)
        tail = normal(1, 2, 12, 2 * D, seed=30)
        assert_attends(transposed(1, 12, 1, D), rows, 325, tailed, tail=tail)


def packing(launches):
    """Any strides of both sides, several sets of a SIMD group, a tail, odd scales."""
    launches(pack_pairs=1, pack_threadgroups=1)
    for D, spec in ((128, "int4-srft:recent=5"), (64, "int4-srft:recent=5")):
        fmt = format_of(spec, D, what="mu sigma lam")
        k, v = (normal(D, 2, 1, 23, seed=s).transpose(2, 1, 3, 0) for s in (3, 4))
        want = plain.quantize_pack(k, v, fmt)[0]
        tail = normal(1, 2, 7, 2 * D, seed=5)
        got, kept = fused.quantize_pack(k, v, fmt, tail, 30)
        assert mx.array_equal(got, want)
        _, expected = plain.quantize_pack(k, v, fmt, tail, 30)
        same(kept, expected)
        same(fused.keep_exact(k, v, fmt, tail, 30), expected)
        assert mx.array_equal(fused.pack_rotated(kept[:, :, 7:], fmt), want)
        got, kept = fused.quantize_pack(k, v, fmt, None, 9)
        assert mx.array_equal(got, want)
        same(kept, plain.quantize_pack(k, v, fmt, None, 9)[1])
    odd = format_of("int4-srft:group_size=24", 96, 48)
    k, v = normal(1, 1, 5, 96), normal(1, 1, 5, 48)
    k[0, 0, 2, 7] = float("nan")
    got, want = (backend.quantize_pack(k, v, odd)[0] for backend in (fused, plain))
    for a, b in zip(levels.split(got, odd.layout), levels.split(want, odd.layout), strict=True):
        assert mx.array_equal(a, b, equal_nan=a.dtype == mx.float16)


def restoring(launches):
    launches(restore_threadgroups=1)
    fmt = format_of("int4-srft:recent=5", 64, what="mu sigma lam")
    rows, tail = packed(fmt, 1, 2, 40), normal(1, 2, 6, 128, seed=5)
    chunk = transposed(1, 2, 7, 64, mx.float32, 8), transposed(1, 2, 7, 64, mx.float32, 9)
    given = rows, 40, fmt, mx.float32, tail
    for a, b in zip(
        calls.restore(fused, *given, chunk), calls.restore(plain, *given, chunk), strict=True
    ):
        same(a, b, 1e-5)
    for a, b in zip(calls.dequantize(fused, *given), calls.dequantize(plain, *given), strict=True):
        same(a, b, 1e-6)
    for length in (37, 38, 39):
        got = calls.dequantize(fused, rows, length, fmt, mx.float16)
        for a, b in zip(got, calls.dequantize(plain, rows, length, fmt, mx.float16), strict=True):
            same(a, b)


def rows_beyond_8_gigabytes(launches, vector_rows=0):
    """The second sequence of a batch begins 2^31 words after the first: a sparse buffer."""
    launches(vector_rows=vector_rows)
    fmt = format_of("int4-srft", 64)
    rows, q = packed(fmt, 2, 1, 16, spare=0), transposed(2, 2, 1, 64)
    words = np.array(rows)
    far = 1 << 31
    space = mmap.mmap(-1, 4 * (far + words[1].size), flags=mmap.MAP_PRIVATE | 0x4000)  # no reserve
    flat = np.frombuffer(space, np.uint32)
    flat[: words[0].size] = words[0].reshape(-1)
    flat[far:] = words[1].reshape(-1)
    strides = (4 * far, *words.strides[1:])
    distant = np.lib.stride_tricks.as_strided(flat, words.shape, strides)
    want = calls.attend(plain, q.astype(mx.float32), rows, 16, fmt, 0.125)
    run = standin.run

    def with_distant(source, inputs, *rest, **given):
        inputs = [distant if a.dtype == mx.uint32 else a for a in inputs]
        return run(source, inputs, *rest, **{**given, "mode": "fast"})

    standin.run = with_distant
    try:
        same(calls.attend(fused, q, rows, 16, fmt, 0.125), want)
    finally:
        standin.run = run


def vectors_beyond_8_gigabytes(launches):
    rows_beyond_8_gigabytes(launches, vector_rows=4)


def first_tokens(launches):
    """At the beginning, after padding, gone in part, to come in part; in rings, around their end;
    beside a tail that has some of them."""
    fmt = format_of("int4-srft:recent=5", 64, what="mu")
    rows, tail = packed(fmt, 2, 2, 40), normal(2, 2, 7, 128, seed=30)
    array, q = normal(2, 2, 6, 128, seed=31), transposed(2, 4, 2, 64)
    for numbers, place, length in ((mx.arange(6) < 2, -2, 33), (mx.arange(6) >= 3, 0, 3)):
        unread = mx.where(numbers[:, None], mx.nan, array)  # gone, and to come
        first = ops.First(unread, 6, place)
        for vector_rows in (0, 4):
            launches(single=0, restore_threadgroups=1, vector_rows=vector_rows)
            assert_attends(q[:, :, :1], rows, length, fmt, tail=tail, first=first)
    launches(single=0, restore_threadgroups=1)
    at = mx.array([3, 30], mx.int32)
    for first, more in (
        (ops.First(array, 6), {}),
        (ops.First(array, 4, -2), {}),
        (ops.First(array, 6, at), {"starts": at}),
    ):
        for length in (33, 35, 37) if more else (3, 7, 33, 37):
            given = {"tail": tail, "first": first, "mask": "causal", **more}
            assert_attends(q, rows, length, fmt, **given)
        unpacked = rows, 37, fmt, mx.float32
        for a, b in zip(
            calls.restore(fused, *unpacked, first=first),
            calls.restore(plain, *unpacked, first=first),
            strict=True,
        ):
            same(a, b, 1e-5)
    seen = (mx.arange(33) >= at[:, None])[:, None, None]  # which is as long as the rows
    given = {"tail": tail, "first": ops.First(array, 6, at), "mask": seen}
    assert_attends(q[:, :, :1], rows, 33, fmt, **given)
    for keep, idx, first in (
        (4, 20, ops.First(array, 4)),
        (0, 20, ops.First(array, 6, -2)),
        (0, 35, ops.First(array, 6)),
        (0, 33, ops.First(array, 6, mx.array([0, 1], mx.int32))),
    ):
        seen = mx.broadcast_to(mx.arange(37) % 9 != 5, (2, 1, 1, 37))
        if not isinstance(first.at, int):  # padding, which is the oldest row
            seen = seen & mx.stack([mx.arange(37) != 99, mx.arange(37) != idx])[:, None, None]
        given = {"tail": tail, "first": first, "ring": (keep, idx), "mask": seen}
        for vector_rows in (0, 4):
            launches(single=0, vector_rows=vector_rows)
            assert_attends(q[:, :, :1], rows, 37, fmt, **given)


def three_bits(launches):
    """Loads of four, two and one unit, with and without registers for a tile; both ways to pack;
    an odd number of halves; groups of both tiers of scales that are tried."""
    for spec, D, prefetch in (
        ("int3-srft", 128, False),
        ("int3-srft:group_size=64", 64, True),
        ("k4v3-srft", 80, False),
    ):
        check_narrow(launches, spec, D, prefetch, differ=0)


def five_bits(launches):
    """Loads of two units and of one, with and without registers for a tile; both ways to pack; both
    ways to restore; an odd number of halves; keys alone, and both sides."""
    for spec, D, prefetch in (
        ("k5v4-srft", 128, False),
        ("int5-srft:group_size=32", 64, True),
        ("k5v4-srft", 80, False),
    ):
        # The two scales tried are near each other: by a rounding, one group in 500 or so takes the
        # other one.
        check_narrow(launches, spec, D, prefetch, differ=0.01)


def check_narrow(launches, spec: str, D: int, prefetch: bool, differ: float):
    """``differ``: part of the words of rows that need not be those of plain operations."""
    launches(single=0, prefetch=prefetch, vector_rows=0)
    fmt = format_of(spec, D)
    k, v = (transposed(1, 2, 45, D, mx.float32, seed) for seed in (3, 4))
    got, want = (backend.quantize_pack(k, v, fmt)[0] for backend in (fused, plain))
    assert (got != want).astype(mx.float32).mean().item() <= differ
    assert_attends(transposed(1, 4, 1, D), packed(fmt, 1, 2, 45), 45, fmt)
    given = want, 45, fmt, mx.float32
    for op in (calls.restore, calls.dequantize):
        for a, b in zip(op(fused, *given), op(plain, *given), strict=True):
            same(a, b, 1e-5)


def feedback(launches):
    """Groups that feed other ones; damage; levels that are more than a rounding off."""
    for spec, D, at_once in (
        ("int4-srft:group_size=64", 128, 4),
        ("int3-srft:group_size=32", 64, 1),
        ("k5v4-srft:group_size=32", 64, 1),
    ):
        launches(pack_pairs=1, pack_threadgroups=1, fed_at_once=at_once)
        fmt = weighted(spec, D)
        k, v = transposed(1, 2, 23, D, mx.float32, 3), transposed(1, 2, 23, D, mx.float32, 4)
        got, want = (backend.quantize_pack(k, v, fmt)[0] for backend in (fused, plain))
        assert_alike(got, want, k, fmt)
    fmt = weighted("int4-none:group_size=16", 64)  # no rotation takes NaN to other groups
    k = normal(1, 2, 5, 64)
    k[0, 0, 2, 37] = float("nan")
    got, want = (backend.quantize_pack(k, k, fmt)[0] for backend in (fused, plain))
    assert_same_levels(got, want, fmt)


CHECKS = (
    edges, edges_beside_a_tail, attention, longer, attention_of_odd_sizes, vectors, slices, packing,
    restoring, first_tokens, sizes_of_values, sent, rows_beyond_8_gigabytes,
    vectors_beyond_8_gigabytes, three_bits, five_bits, feedback,
)  # fmt: skip

# ---- faults: what, check, file, text, instead -------------------------------------------------
FAULTS = [
    ("high edge + 1", edges, "attend_begin.metal",
     "int high_edge = causal ? offset + 1 : length;",
     "int high_edge = causal ? offset + 2 : length;"),
    ("high edge + 1 beside a tail", edges_beside_a_tail, "attend_begin.metal",
     "is_ring ? end : offset + 1 - recent);", "is_ring ? end : offset + 2 - recent);"),
    ("low edge of the first query", edges, "attend_begin.metal",
     "window > 0 ? length - window : 0", "window > 0 ? offset - window + 1 : 0"),
    ("low edge - 1", edges, "attend_begin.metal",
     "window > 0 ? length - window : 0", "window > 0 ? length - window - 1 : 0"),
    ("v's last stride", packing, "quantize_pack.metal", "v_strides[2], v_strides[3]",
     "v_strides[2], 1"),
    ("last barrier of the swap", packing, "rotate.metal",
     "    if (k == 0 && l == 0) z[0] = joined_zero(v);\n  }\n"
     "  simdgroup_barrier(mem_flags::mem_threadgroup);",
     "    if (k == 0 && l == 0) z[0] = joined_zero(v);\n  }"),
    ("offsets of 32 bits", rows_beyond_8_gigabytes, "attend_matrix.metal",
     "numbers[kvq::AT_BATCH] * rows_strides[0]", "int(numbers[kvq::AT_BATCH] * rows_strides[0])"),
    ("words past the last row not zeroed", attention, "whole.metal",
     "UNROLL for (int j = 0; j < WIDTH; j++) s[j] = 0;",
     "UNROLL for (int j = 0; j < WIDTH; j++) s[j] = 0xffffffffu;"),
    # New ones.
    ("tiles lost between splits", attention, "attend_begin.metal",
     "(tiles + splits - 1) / splits", "max(1, tiles / splits)"),
    ("a split's end", attention, "attend_begin.metal", "(split + 1) * share)",
     "(split + 1) * share + 1)"),
    ("tail of the last query only", attention, "attend_begin.metal",
     "TAIL ? min(recent + L - 1, length - keep)", "TAIL ? min(recent, length - keep)"),
    ("a context's length with its padding", longer, "tokens.metal",
     "grows, position + 1 - start)", "grows, position + 1)"),
    ("rows before the tail of the last query", longer, "attend_begin.metal",
     "length - recent_before;", "length - recent;"),
    ("tail of the first query", longer, "attend_begin.metal",
     "recent_of(least, grows, length - start)", "recent_of(least, grows, offset + 1 - start)"),
    ("a longer tail one token late", longer, "tokens.metal", "tokens < grows ?",
     "tokens <= grows ?"),
    ("first tokens' rows counted, too", first_tokens, "attend_begin.metal",
     "FIRST ? max(start, place + firsts + (wraps ? idx - length : 0)) : start", "start"),
    ("first tokens of a ring counted, too", first_tokens, "attend_begin.metal",
     "wraps ? min(length, idx + max(0, place + firsts)) : idx", "idx"),
    ("first tokens of a ring that wraps", first_tokens, "attend_begin.metal",
     "place + firsts + (wraps ? idx - length : 0)", "place + firsts + (wraps ? -length : 0)"),
    ("a first token in the tail, too", first_tokens, "tokens.metal",
     "~order < range.oldest", "~order <= range.oldest"),
    ("mask of a ring's first tokens", first_tokens, "tokens.metal",
     "of_first - (of_first >= length ? length - keep : 0)", "of_first"),
    ("a first token that is still to come", first_tokens, "tokens.metal",
     "min(firsts, length - place)", "firsts"),
    ("a first token that has gone", first_tokens, "tokens.metal", "max(0, -place)", "0"),
    ("first tokens at other rows", first_tokens, "restore.metal",
     "row >= place && row < place + firsts", "row < firsts"),
    ("first tokens of another place", first_tokens, "restore_rows.metal",
     "PLACES ? int(first_at[b]) :", ""),
    ("tail into the kept rows", attention, "attend_begin.metal", "max(keep, idx - recent) : length",
     "idx - recent : length"),
    ("end of a ring", attention, "attend_begin.metal", "length - recent + idx - keep) :",
     "length - recent + idx) :"),
    ("exact values not enlarged", attention, "attend_matrix.metal",
     "float2(as_levels * p.x, as_levels * p.y)", "float2(p.x, p.y)"),
    ("mask of another query", attention, "attend_begin.metal", "at_token * mask_strides[2]",
     "head * mask_strides[2]"),
    ("starts of the first sequence", attention, "attend_begin.metal", "int(starts[b])",
     "int(starts[0])"),
    ("odd channels of exact keys", attention, "tile.metal", "WHOLE && BITS == 4 ? 16.0f :", ""),
    ("keys of an exact value", attention, "machine.metal", "2 * at.pair + uint(i)", "2 * at.pair"),
    ("exact tokens that are not there", slices, "tokens.metal",
     "tokens.is_there(age) ? age : other", "age"),
    ("exact tokens of one SIMD group", attention, "attend_matrix.metal",
     "(NSG - 1 - int(group)) * all_splits;", "0;"),
    ("exact tokens of one turn", slices, "attend_matrix.metal", "set += NSG * all_splits",
     "set += 9 * NSG * all_splits"),
    ("the next exact tokens' values", slices, "attend_matrix.metal",
     "(set + (NSG - 1 - int(other)) * all_splits)", "(set + (NSG - int(other)) * all_splits)"),
    ("exact channels past the end", attention_of_odd_sizes, "tokens.metal",
     "D % 64 == 0 || first + i < D", "true"),
    ("queries past the end", attention_of_odd_sizes, "machine.metal",
     "D % 32 == 0 ? c : min(c, D - 1)", "c"),
    ("barrier after the offsets", attention, "attend_matrix.metal",
     "    if (at.row == 0) pair_offsets[g] = x;\n  }\n"
     "  threadgroup_barrier(mem_flags::mem_threadgroup);",
     "    if (at.row == 0) pair_offsets[g] = x;\n  }"),
    ("rescaled sums", attention, "tile.metal",
     "  l = float2(l.x * f.x, l.y * f.y);\n", ""),
    ("values' scales of another level", sizes_of_values, "tile.metal",
     "simd_any(largest > 0x5800u) ? 2", "simd_any(largest > 0x7bffu) ? 2"),
    ("values' scales of the first level", sizes_of_values, "tile.metal",
     "simd_any(largest > 0x3c00u) ? 1 : 0", "simd_any(largest > 0x5c00u) ? 1 : 0"),
    ("sums left in the units of a lower level", sizes_of_values, "tile.metal",
     "levels_lift<SCALED>(to_level) / levels_lift<SCALED>(level);", "1.0f;"),
    ("a maximum that grows little by little", sizes_of_values, "tile.metal", "SLACK = 4",
     "SLACK = 40"),
    ("totals still enlarged", sizes_of_values, "attend_matrix.metal",
     "smaller * kvq::rows_sum(l.x)", "kvq::rows_sum(l.x)"),
    ("scale of a key's neighbour", attention, "machine.metal",
     "operand_row(tile_lane at, int) {\n  return at.row;",
     "operand_row(tile_lane at, int) {\n  return at.row ^ 1u;"),
    ("scale of the group before", sent, "tile.metal", "SCALE + group);\n        scaled[1]",
     "SCALE);\n        scaled[1]"),
    ("keys of another step", sent, "tile.metal", "counter(STEP) * row;", "row;"),
    ("a tile over the one in use", sent, "attend_matrix.metal",
     "turn == 0 ? OWN_TILES - 1 : turn - 1", "turn"),
    ("the tile before", sent, "attend_matrix.metal", "turn + 1 < OWN_TILES ? turn + 1 : 0", "0"),
    ("a last tile sent as a full one", sent, "whole.metal", "valid >= TK && ", ""),
    ("rows that are not aligned", sent, "whole.metal",
     "reinterpret_cast<uint64_t>(rows) % 16 == 0", "true"),
    ("sums of one SIMD group", sent, "attend_matrix.metal", "g < MERGED / SLICES", "g < 1"),
    ("sums that are not there yet", sent, "attend_matrix.metal",
     "    threadgroup_barrier(mem_flags::mem_threadgroup);\n    // A thread adds up", "    // A"),
    ("barrier before a set's maximum", slices, "tile.metal",
     "      maxima[8 * group + 2 * at.pair + 1] = top.y;\n    }\n"
     "    threadgroup_barrier(mem_flags::mem_threadgroup);",
     "      maxima[8 * group + 2 * at.pair + 1] = top.y;\n    }"),
    ("barrier after a set's probabilities", slices, "attend_matrix.metal",
     "shared_p[own_group * (4 * TK) + 32 * i] = p[i];\n    kvq::slices_barrier<SLICES>();",
     "shared_p[own_group * (4 * TK) + 32 * i] = p[i];"),
    ("barrier before a set's next tiles", slices, "attend_matrix.metal",
     "tile < end_of_tiles;\n  kvq::slices_barrier<SLICES>();", "tile < end_of_tiles;"),
    ("barrier after exact tokens' probabilities", slices, "attend_matrix.metal",
     "+ 32 * k] = s[k];\n      }\n      kvq::slices_barrier<SLICES>();",
     "+ 32 * k] = s[k];\n      }"),
    ("a set that is not full", slices, "attend_matrix.metal",
     "kvq::counter(end_of_tiles - (tile - own_group))", "kvq::counter(NSG)"),
    ("own level for all tiles of a set", slices, "attend_matrix.metal",
     "own_level = max(own_level, levels[own_group - own_slice + i]);", ""),
    ("vectors' offsets of 32 bits", vectors_beyond_8_gigabytes, "attend_vector.metal",
     "(own_b * rows_strides[0] +", "(int(own_b * rows_strides[0]) +"),
    ("a tile's last row", vectors, "attend_vector.metal",
     "(min(TK, own_length - first_key) - 1) * (W / UNIT)", "(TK - 1) * (W / UNIT)"),
    ("exact tiles counted as rows", vectors, "attend_vector.metal",
     "(int(tile) - numbers[kvq::AT_EXACT_TILES] +", "(int(tile) +"),
    ("tiles of exact tokens left out", vectors, "attend_begin.metal",
     "(exact.end + TK - 1) / TK", "exact.end / TK"),
    ("a lane's token of another set", vectors, "attend_vector.metal",
     "first_key + int(own.turn * K_AT_ONCE + own.set)", "first_key + int(lane)"),
    ("an exact token of another set", vectors, "attend_vector.metal",
     "vectors.tokens.at(first_age + int(own.turn * K_AT_ONCE + own.set))",
     "vectors.tokens.at(first_age + int(lane))"),
    ("mask of a KV head's first query head", vectors, "attend_vector.metal", "mask[mask_rows[r] +",
     "mask[mask_rows[0] +"),
    ("barrier before a tile's probabilities", vectors, "attend_vector.metal",
     "    simdgroup_barrier(mem_flags::mem_threadgroup);  // the last tile's have been read\n"
     "    kvq", "    kvq"),
    ("barrier after a tile's probabilities", vectors, "attend_vector.metal",
     "        shares, sums, own_lane);\n    simdgroup_barrier(mem_flags::mem_threadgroup);\n",
     "        shares, sums, own_lane);\n"),
    ("barrier after the magic offsets", vectors, "attend_vector.metal",
     "kvq::counter(lane));\n}\nthreadgroup_barrier(mem_flags::mem_threadgroup);",
     "kvq::counter(lane));\n}"),
    ("sums of the first lanes alone", vectors, "attend_vector.metal",
     "bit = V_LANES; bit < 32; bit *= 2", "bit = V_LANES; bit < 16; bit *= 2"),
    ("SIMD groups added up twice", vectors, "attend_vector.metal", "int g = 1; g < NSG / 2",
     "int g = 0; g < NSG / 2"),
    ("values' magic numbers left in", vectors, "attend_vector.metal", "fma(-excess, shares[r],",
     "fma(0.0f, shares[r],"),
    ("lanes past the last part", vectors, "dots.metal",
     "query[r * CHANNELS + i] = there ? x : half(0.0f);", "query[r * CHANNELS + i] = x;"),
    ("offsets of lanes past the last part", vectors, "dots.metal",
     "offset[r] = there ? -sum : 0.0f;", "offset[r] = -sum;"),
    ("the neighbour's token", vectors, "dots.metal", "(lane & 1u) != 0;", "(lane & 1u) == 0;"),
    ("magic numbers not rescaled", vectors, "dots.metal", "      shares[r] *= f;\n", ""),
    ("totals not rescaled", vectors, "dots.metal", "      l[r] *= f;\n", ""),
    ("barrier after a new maximum", vectors, "dots.metal",
     "    }\n  }\n  simdgroup_barrier(mem_flags::mem_threadgroup);\n  UNROLL",
     "    }\n  }\n  UNROLL"),
    ("barrier before a new maximum", vectors, "dots.metal",
     "      simdgroup_barrier(mem_flags::mem_threadgroup);\n      if (lane == 0) m[r] = top;",
     "      if (lane == 0) m[r] = top;"),
    ("upper codes at the lower one's place", vectors, "dots.metal",
     "BITS == 4 && (VALUES || i % 2 == 1) ? 64.0f : 1024.0f", "1024.0f"),
    ("scales of another group", vectors, "attend_vector.metal",
     "K_SCALES + own_value.part * V_CHANNELS / VG", "K_SCALES"),
    ("one slice of values for all", slices, "tile.metal",
     "slice * (UNITS / TOGETHER) + unit / TOGETHER", "unit / TOGETHER"),
    ("one slice of exact values for all", slices, "tile.metal",
     "int(slice) * RUNS + tile / RUN", "tile / RUN"),
    ("maximum of one SIMD group", attention, "vectors.metal",
     "top = max(top, maxima[8 * g + r]);", "top = maxima[8 * g + r];"),
    ("sink without the centre", attention, "vectors.metal", "    if (K_CENTRED) {\n",
     "    if (false && K_CENTRED) {\n"),
    ("queries past the last word", attention_of_odd_sizes, "attend_begin.metal",
     "for (int c = KD + 2 * int(lane);", "for (int c = KD + 64 + 2 * int(lane);"),
    ("large scales not taken back", attention_of_odd_sizes, "tile.metal",
     "out.back = 128.0f;", "out.back = 1.0f;"),
    ("small scales not lifted back", attention_of_odd_sizes, "tile.metal",
     "out.back = 0.0009765625f;", "out.back = 1.0f;"),
    ("a split twice", attention, "combine.metal", "s + j * NSG < splits ? f : 0.0f", "f"),
    ("sums of a SIMD group", attention, "combine.metal", "int g = 1; g < NSG",
     "int g = 2; g < NSG"),
    ("barrier before the end of combine", attention, "combine.metal",
     "  merged[c] = x;\n}\nthreadgroup_barrier(mem_flags::mem_threadgroup);",
     "  merged[c] = x;\n}"),
    ("the worse scale", packing, "quantize.metal",
     "dot * dot * best_length > best_dot * best_dot * length",
     "dot * dot * best_length < best_dot * best_dot * length"),
    ("NaN not marked", packing, "quantize.metal",
     "const bool finite = isfinite(top) && squares == squares;", "const bool finite = true;"),
    ("one kept token less", packing, "quantize.metal", "valid && token >= drop",
     "valid && token > drop"),
    ("tokens of a tail rotated again", packing, "quantize.metal", "if (rotated) {", "if (false) {"),
    ("a kept token's values beside its keys", packing, "keep_exact.metal", "new_kept + KD, v",
     "new_kept, v"),
    ("older kept tokens one too early", packing, "keep_exact.metal", "(tail_shape[2] - older)",
     "(tail_shape[2] - older - 1)"),
    ("older tokens one too early", packing, "quantize_pack.metal",
     "(tail_shape[2] - older)", "(tail_shape[2] - older - 1)"),
    ("first barrier of the swap", packing, "rotate.metal",
     "swap[k * (R + 1) + l] = z[k];\n  simdgroup_barrier(mem_flags::mem_threadgroup);\n"
     "  UNROLL for (int a",
     "swap[k * (R + 1) + l] = z[k];\n  UNROLL for (int a"),
    ("the real FFT's first point", packing, "rotate.metal",
     "    if (k == 0 && l == 0) z[0] = joined_zero(v);\n", ""),
    ("values' scales of the keys", packing, "quantize_pack.metal",
     "K_HALVES, CODES,\n      K_SCALES, W, KEEPS", "K_HALVES, CODES,\n      0, W, KEEPS"),
    ("exact rows one too late", restoring, "restore.metal", "(row - exact) * by_token",
     "max(row - exact - 1, 0) * by_token"),
    ("centre not restored", restoring, "restore.metal",
     "if (CALIBRATED) z[a] = float2(z[a].x + g.mu[a].x, z[a].y + g.mu[a].y);", ""),
    ("chunk over the rows", restoring, "restore_rows.metal",
     "values + (to + length) * VD", "values + to * VD"),
    ("a row too many", restoring, "dequantize.metal",
     "} else if (row + j < length) {\n      kvq::eight_levels<V_READ",
     "} else if (row + j <= length) {\n      kvq::eight_levels<V_READ"),
    ("levels half a step off", restoring, "levels.metal", "- (HALF_STEP ? 0.5f : 0.0f)", ""),
    ("high bits of the keys for the values", three_bits, "quantize_pack.metal",
     "2 * HIGHS + K_HALVES", "2 * HIGHS"),
    ("low bits of the second word", three_bits, "narrow.metal",
     "(second & 0x33333333u) << 2", "(second & 0x33333333u)"),
    ("the upper half of high bits", three_bits, "narrow.metal",
     "masked_or(word >> 1, 0x7fff8000u, word >> 16)", "masked_or(word >> 1, 0xffff8000u, word)"),
    ("units one row too far", three_bits, "narrow.metal",
     "from + HIGH + at * (N / 2)", "from + HIGH + at * (N / 2) + 1"),
    ("units past the tile", three_bits, "narrow.metal",
     "if (row < TK) write_words<2 * LOWS, WIDTH>", "if (row <= TK) write_words<2 * LOWS, WIDTH>"),
    ("scales past the last row read", three_bits, "narrow.metal",
     "if (row < valid) read_words<N>", "if (row <= valid) read_words<N>"),
    ("the padding of high bits", three_bits, "quantize_pack.metal",
     "if (HALVES % 2 == 1) kvq::halves_of", "if (HALVES % 2 == 2) kvq::halves_of"),
    ("a neighbour's codes", three_bits, "narrow.metal",
     "spread_high_bits<BITS>(other, words[0])", "spread_high_bits<BITS>(words[0], other)"),
    ("levels of 3-bit codes", three_bits, "quantize.metal",
     "if (BITS == 3 && (EXACT || !INSIDE)) codes[i] += 4.0f;", ""),
    ("another fraction of the largest channel", three_bits, "quantize.metal", "86 - 10 * i",
     "86 - 30 * i"),
    ("the high plane of another word", five_bits, "narrow.metal",
     "w < 2 ? high << uint(4 - 2 * w)", "w < 2 ? high << uint(2 + 2 * w)"),
    ("the high plane as it stands", five_bits, "narrow.metal", "h & 0x10101010u) + 0x70",
     "high & 0x10101010u) + 0x70"),
    ("no high plane", five_bits, "narrow.metal", "h & 0x10101010u) + 0x70", "0u) + 0x70"),
    ("a high plane that is not spread", five_bits, "narrow.metal",
     "masked_or(word, 0xffffu, word << 15)", "masked_or(word, 0xffffu, word << 16)"),
    ("levels from another middle", five_bits, "narrow.metal", "+ 0x70707070u", "+ 0x71717171u"),
    ("low bits of the other word", five_bits, "narrow.metal",
     "(second & 0x0f0f0f0fu) << 4", "(second & 0x0f0f0f0fu)"),
    ("the unit's second high plane first", five_bits, "narrow.metal",
     "spread = (spread >> 4) | spread_high_bits", "spread = spread | (spread_high_bits"
     "<BITS>(first, second) >> 4) | spread_high_bits"),
    ("a neighbour's high plane", five_bits, "narrow.metal", "eight % 2 == 0 ? own >> 4 : own",
     "eight % 2 != 0 ? own >> 4 : own"),
    ("copied values at their place in the row", five_bits, "narrow.metal",
     "COPY_TO = is_narrow(KB) ? 2 * LOWS : 0", "COPY_TO = is_narrow(KB) ? LOWS : 0"),
    ("levels of 5-bit codes", five_bits, "quantize.metal",
     "BITS == 5 ? level_of(codes[i]) - 8.0f : level_of(codes[i])", "level_of(codes[i])"),
    ("another fraction at 5 bits", five_bits, "quantize.metal", "100 - 4 * i : 98",
     "90 - 4 * i : 98"),
    ("5 bits restored as 4", five_bits, "restore.metal", "READ = wide_bits(BITS)",
     "READ = BITS == 5 ? 4 : wide_bits(BITS)"),
    ("values' codes after whole keys", five_bits, "row.metal", "KD * kvq::low_bits(KB) / 32",
     "KD * (KB == 5 ? 8 : KB) / 32"),
    ("the high plane of feedback's keys", feedback, "feedback.metal",
     "(unit * WORDS + w) * CODES_OF_WORD", "(unit * WORDS + w % 2) * CODES_OF_WORD"),
    ("errors of another block", feedback, "feedback.metal", "uint(8 * D * block)",
     "uint(8 * D * (block ^ 1))"),
    ("errors of the block before", feedback, "feedback.metal", "last - k, first, lane",
     "last, first, lane"),
    ("gains of the group's last slice", feedback, "feedback.metal",
     "if (block < last || slice < SLICES - 1)", "if (block < last)"),
    ("nothing for channels before a whole group", feedback, "feedback.metal",
     "first < low; first += 32", "first < low - 32; first += 32"),
    ("nothing for slices before in the group", feedback, "feedback.metal", "if (i < slice) {",
     "if (i > slice) {"),
    ("scales of another group", feedback, "feedback.metal", "SCALE + low / GROUP", "SCALE"),
    ("gains of the group for those before it", feedback, "feedback.metal",
     "low / 8 + block + i, first, lane", "low / 8 + block + i, low, lane"),
    ("errors of the step, not of the stored scale", feedback, "feedback.metal",
     "error_of(y[at], stored[v], t[at])", "error_of(y[at], step[v], t[at])"),
    ("errors from the target", feedback, "feedback.metal",
     "error_of(x, step[v], n)", "error_of(t[v * SLICES + slice], step[v], n)"),
    ("errors of the first vector", feedback, "feedback.metal",
     "errors[j] = e[v * D + 8", "errors[j] = e[8"),
    ("errors of the first vector in a block", feedback, "feedback.metal",
     "errors[8 * v + j] = simd_shuffle(e[v]", "errors[8 * v + j] = simd_shuffle(e[0]"),
    ("the other step's angle", feedback, "feedback.metal", "s[0] * s[0] * s[3]",
     "s[0] * s[0] * s[1]"),
    ("the group's scale of the levels, not of the targets", feedback, "feedback.metal",
     "fma(x, x, sums[2 * v])", "fma(n, x, sums[2 * v])"),
    ("damage passed on", feedback, "feedback.metal", "step[v] = damaged[v] ? 0.0f : step[v];", ""),
    ("errors that are not there yet", feedback, "feedback.metal",
     "  simdgroup_barrier(mem_flags::mem_threadgroup);  // all lanes", "  //"),
    ("targets that are not there yet", feedback, "feedback.metal",
     "  simdgroup_barrier(mem_flags::mem_threadgroup);  // and the targets", "  //"),
    ("vectors over the levels", feedback, "feedback.metal",
     "  simdgroup_barrier(mem_flags::mem_threadgroup);  // the next vectors", "  //"),
    ("targets over the vectors", feedback, "quantize.metal",
     "shared_points(D, GROUP, ROTATION, SET, true) - MOST * D / 2", "0"),
    ("G of the first head", feedback, "quantize_pack.metal", "feedback + h * KD * KD", "feedback"),
]  # fmt: skip


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_check_passes_without_a_fault(launches, check):
    with emulated("checked"):
        check(launches)


@pytest.mark.parametrize(
    "check, file, text, instead", [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS]
)
def test_fault_is_caught(launches, monkeypatch, check, file, text, instead):
    source = jit.kernel_source
    assert text in source(file)

    def planted(name):
        return source(name).replace(text, instead) if name == file else source(name)

    with emulated("checked") as e:
        monkeypatch.setattr(jit, "kernel_source", planted)
        monkeypatch.setattr(jit, "_source", jit._source.__wrapped__)  # what was read without it
        with pytest.raises((AssertionError, KernelError)):
            check(launches)
        e.errors.clear()
