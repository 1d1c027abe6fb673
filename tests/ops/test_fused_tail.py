"""The exact tail in the fused kernels, run by the emulator, against the reference backend."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_kvq import ops
from mlx_kvq.ops import gpu as fused
from mlx_kvq.ops import plain as reference
from mlx_kvq.ops.gpu import attention
from tests.ops.test_fused import (  # the fixtures are used by name
    assert_attends,
    emulator,
    format_of,
    launches,
    normal,
    packed,
    transposed,
)
from tests.support import calls

__all__ = ["emulator", "launches"]

# Spec, Dk, Dv, calibrated: each way through each kernel, like FORMATS of tests/ops/test_fused.py.
FORMATS = [
    ("int4-srft:recent=5", 64, 64, ""),
    ("k8v4-srht:recent=16", 64, 128, "mu sigma lam"),
    ("int8-none:scale=paper,recent=3", 80, 48, "mu"),
    ("int4-srft:group_size=24,recent=40", 96, 96, "mu sigma"),
    ("int3-srft:recent=5", 64, 128, "mu"),
    ("k5v4-srft:recent=5", 128, 64, "mu"),
]


def tail_of(fmt, B, H, R, dtype=mx.float32):
    """[B, H, R, Dk + Dv], unlike what is in rows."""
    return normal(B, H, R, fmt.layout.k_dim + fmt.layout.v_dim, dtype=dtype, seed=30)


@pytest.mark.parametrize("single", [0, 1023])
@pytest.mark.parametrize("L", [1, 3, 8])
@pytest.mark.parametrize("spec, Dk, Dv, what", FORMATS)
def test_attend(emulator, launches, spec, Dk, Dv, what, L, single):
    launches(single=single)
    fmt = format_of(spec, Dk, Dv, what)
    dtype = [mx.float16, mx.bfloat16, mx.float32][Dk % 3]
    rows = packed(fmt, 2, 2, 70)
    q = transposed(2, 6, L, Dk, dtype, seed=6)
    tail = tail_of(fmt, 2, 2, fmt.recent + L + 1, dtype)
    for length in (70, L):
        got = assert_attends(q, rows, length, fmt, mask="causal", tail=tail)
    plain = np.array(calls.attend(fused, q, rows, L, fmt, Dk**-0.5, "causal").astype(mx.float32))
    assert np.abs(got - plain).max() > 0.1  # the tail shows


@pytest.mark.parametrize("single", [0, 1023])
@pytest.mark.parametrize(
    "keep, idx", [(0, 20), (4, 20), (4, 7), (4, 69), (0, 1), (3, 70), (69, 70)]
)
@pytest.mark.parametrize("recent", [3, 30, 200])
def test_attend_in_a_ring(emulator, launches, keep, idx, recent, single):
    """The newest tokens are before row idx, and before them those at the end of the rows."""
    launches(single=single)
    fmt = format_of(f"int4-srft:recent={recent}", 64)
    rows = packed(fmt, 1, 2, 70)
    mask = mx.array(np.random.default_rng(3).random((1, 70)) < 0.7)
    tail = tail_of(fmt, 1, 2, recent)
    for seen in (None, mask):
        assert_attends(
            transposed(1, 4, 1, 64), rows, 70, fmt, mask=seen, tail=tail, ring=(keep, idx)
        )


@pytest.mark.parametrize("recent", [3, 200])
@pytest.mark.parametrize("keep", [1, 30])
def test_several_queries_after_kept_tokens(emulator, launches, recent, keep):
    """Those are read from rows by every query, however many tokens are to be exact."""
    launches(single=0)
    fmt = format_of(f"int4-srft:recent={recent}", 64)
    q, tail = transposed(1, 4, 5, 64), tail_of(fmt, 1, 2, recent + 4)
    for length in (40, 33):
        rows = packed(fmt, 1, 2, length)
        assert_attends(q, rows, length, fmt, mask="causal", tail=tail, ring=(keep, length))


@pytest.mark.parametrize("L", [1, 6])
@pytest.mark.parametrize("starts", [None, [0, 3, 131, 200]])
@pytest.mark.parametrize("length", [126, 127, 129, 133, 254, 256, 258, 261, 300])
def test_longer_contexts_have_a_longer_tail(emulator, launches, length, starts, L):
    """From 128 and 256 tokens of its own sequence on, a query reads 2 and 4 in place of 1."""
    launches(single=0)
    fmt = format_of("int4-srft:recent=1", 64)
    assert [fmt.recent_at(n) for n in (1, 127, 128, 255, 256, 9999)] == [1, 1, 2, 2, 4, 4]
    B = 1 if starts is None else len(starts)
    first = None if starts is None else mx.array([min(n, length - L) for n in starts])
    rows, tail = packed(fmt, B, 2, length), tail_of(fmt, B, 2, 4 + L - 1)
    q = transposed(B, 4, L, 64)
    got = assert_attends(q, rows, length, fmt, mask="causal", tail=tail, starts=first)
    for b in range(B):  # as alone, without the padding
        begin = 0 if first is None else first[b].item()
        own = rows[b : b + 1, :, begin:], length - begin
        alone = calls.attend(
            fused, q[b : b + 1], *own, fmt, 64**-0.5, "causal", tail=tail[b : b + 1]
        )
        np.testing.assert_allclose(got[b], np.array(alone.astype(mx.float32))[0], atol=2e-3)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("axes", ["LT", "BHLT"])
@pytest.mark.parametrize("added", [False, True])
def test_attend_masks_and_sinks(emulator, launches, sinks, axes, added):
    launches(single=0)
    fmt = format_of("int4-srft:recent=9", 64, what="mu")
    B, H, L, T = 2, 4, 3, 70
    shape = (L, T) if axes == "LT" else (B, H, L, T)
    rng = np.random.default_rng(5)
    seen = rng.random(shape) < 0.6
    seen[..., 20:50] = False
    mask = mx.array(seen)
    if added:
        mask = mx.array(np.where(seen, rng.standard_normal(shape), -np.inf)).astype(mx.float16)
    logits = normal(H, dtype=mx.float16) if sinks else None
    q, tail = transposed(B, H, L, 64), tail_of(fmt, B, 2, 12)
    assert_attends(q, packed(fmt, B, 2, T), T, fmt, mask=mask, sinks=logits, tail=tail)


@pytest.mark.parametrize("L", [1, 4])
@pytest.mark.parametrize("window", [None, 1, 5, 64])
@pytest.mark.parametrize("starts", [None, [0, 50], [37, 66]])
def test_attend_starts_and_window(emulator, launches, starts, window, L):
    launches(single=0)
    fmt = format_of("int4-srft:recent=9", 64)
    rows, tail = packed(fmt, 2, 2, 70), tail_of(fmt, 2, 2, 12)
    first = None if starts is None else mx.array(starts, dtype=mx.int32)
    q = transposed(2, 4, L, 64)
    assert_attends(q, rows, 70, fmt, mask="causal", starts=first, window=window, tail=tail)


def test_the_tail_may_be_a_view(emulator):
    """Of tokens that were taken back, and of some sequences of a batch."""
    fmt = format_of("int4-srft:recent=9", 64)
    tail = tail_of(fmt, 4, 2, 14)[1:3, :, :12]
    rows, q = packed(fmt, 2, 2, 40), transposed(2, 4, 2, 64)
    assert_attends(q, rows, 40, fmt, mask="causal", tail=tail)
    for a, b in zip(
        calls.dequantize(fused, rows, 40, fmt, mx.float16, tail),
        calls.dequantize(reference, rows, 40, fmt, mx.float16, tail),
        strict=True,
    ):
        assert mx.array_equal(a, b)


def test_more_splits_than_tiles(emulator, monkeypatch):
    monkeypatch.setattr(attention, "splits", lambda *_: 7)
    fmt = format_of("int4-srft:recent=30", 64)
    rows, tail = packed(fmt, 1, 1, 50), tail_of(fmt, 1, 1, 30)
    assert_attends(transposed(1, 2, 1, 64), rows, 50, fmt, tail=tail, ring=(0, 7))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
@pytest.mark.parametrize("length", [3, 12, 40])
def test_dequantize(emulator, dtype, length):
    fmt = format_of("k8v4-srft:recent=9", 64, 128)
    rows, tail = packed(fmt, 2, 2, 40), tail_of(fmt, 2, 2, 12, mx.bfloat16)
    for op in ("dequantize", "restore"):
        got = getattr(calls, op)(fused, rows, length, fmt, dtype, tail)
        want = getattr(calls, op)(reference, rows, length, fmt, dtype, tail)
        for a, b in zip(got, want, strict=True):
            assert (a.dtype, a.shape) == (dtype, b.shape)
            if op == "dequantize":
                assert mx.array_equal(a, b)
            else:
                a, b = a.astype(mx.float32), b.astype(mx.float32)
                step = {mx.float16: 2**-10, mx.bfloat16: 2**-7, mx.float32: 2e-6}[dtype]
                assert mx.abs(a - b).max() <= step * mx.abs(b).max()


@pytest.mark.parametrize("spec, Dk, Dv, what", FORMATS)
@pytest.mark.parametrize("L, keep", [(1, 5), (1, 6), (1, 1), (3, 8), (5, 2), (40, 5), (40, 45)])
def test_quantize_pack_tail(emulator, spec, Dk, Dv, what, L, keep):
    """First chunks and later ones, which move a tail on that is a view; rows are those without."""
    fmt = format_of(spec, Dk, Dv, what)
    dtype = [mx.float16, mx.bfloat16, mx.float32][Dk % 3]
    k, v = transposed(2, 2, L, Dk, dtype, seed=3), transposed(2, 2, L, Dv, dtype, seed=4)
    want = calls.quantize_pack(fused, k, v, fmt)
    kept = ops.tail_dtype(dtype)
    step = 2**-7 if kept == mx.bfloat16 else 1e-6
    # The last one is as in files of version 0.1.0.
    views = (tail_of(fmt, 3, 2, 7, t)[1:, :, 1:6] for t in (kept, mx.float16))
    for tail in (None, *views):
        rows, moved = fused.quantize_pack(k, v, fmt, tail, keep)
        assert mx.array_equal(rows, want)
        _, expected = reference.quantize_pack(k, v, fmt, tail, keep)
        assert (moved.dtype, moved.shape) == (kept, expected.shape)
        old = max(0, keep - L)
        assert mx.array_equal(moved[:, :, :old], expected[:, :, :old])  # as they were
        a, b = (x[:, :, old:].astype(mx.float32) for x in (moved, expected))
        assert mx.abs(a - b).max() <= step * mx.abs(b).max()


@pytest.mark.parametrize("spec, Dk, Dv, what", FORMATS)
@pytest.mark.parametrize("L, keep", [(1, 5), (1, 6), (1, 1), (3, 8), (5, 5), (16, 20)])
def test_keep_exact_and_pack_rotated(emulator, launches, spec, Dk, Dv, what, L, keep):
    """The tail is that of quantize_pack, and rows of it are its rows, to the bit; by a kernel of
    its own or that of a prompt."""
    launches(packs_apart=L != 5)
    fmt = format_of(spec, Dk, Dv, what)
    dtype = [mx.float16, mx.bfloat16, mx.float32][Dk % 3]
    k, v = transposed(2, 2, L, Dk, dtype, seed=3), transposed(2, 2, L, Dv, dtype, seed=4)
    for t in (ops.tail_dtype(dtype), mx.float16):  # the last one as in files of version 0.1.0
        tail = tail_of(fmt, 3, 2, 7, t)[1:, :, 1:6]
        rows, expected = fused.quantize_pack(k, v, fmt, tail, keep)
        moved = fused.keep_exact(k, v, fmt, tail, keep)
        assert moved.dtype == expected.dtype and mx.array_equal(moved, expected)
        assert mx.array_equal(fused.pack_rotated(moved[:, :, -L:], fmt), rows)


def test_a_tail_is_in_the_dtype_of_keys(emulator):
    """Values in another one as well."""
    fmt = format_of("int8-srft", 64, 64, "mu")
    k, v = transposed(1, 2, 20, 64, mx.bfloat16, seed=3), transposed(1, 2, 20, 64, seed=4)
    for backend in (fused, reference):
        rows, tail = backend.quantize_pack(k, v, fmt, None, 20)
        assert tail.dtype == mx.bfloat16
        assert mx.array_equal(backend.pack_rotated(tail, fmt), rows)


def reads_once(emulator):
    """The counters of the only launch, which has read keys and values once."""
    (counters,) = emulator.counters
    assert (counters.reads["k"] == 1).all()
    assert (counters.reads["v"] == 1).all()
    return counters


def test_keep_exact_reads_and_writes_once(emulator):
    fmt = format_of("int4-srft:recent=16", 128)
    k, v = transposed(1, 2, 1, 128), transposed(1, 2, 1, 128, seed=1)
    fused.keep_exact(k, v, fmt, tail_of(fmt, 1, 2, 16), 16)
    counters = reads_once(emulator)
    assert sum(counters.bytes_written.values()) == 2 * 16 * 2 * 256
    assert not any(counters.unwritten.values())


def test_attend_reads_each_row_and_token_once(emulator, launches):
    launches(single=0, vector_rows=0)
    fmt = format_of("int4-srft:recent=16", 128)
    rows, tail = packed(fmt, 2, 2, 140), tail_of(fmt, 2, 2, 16)
    assert_attends(transposed(2, 8, 1, 128), rows, 140, fmt, tail=tail)
    attend, _ = emulator.counters[-2:]
    reads = attend.reads["rows"].reshape(2, 2, -1, 4 * fmt.layout.words)
    assert (reads[:, :, :124] == 1).all()
    assert (reads[:, :, 124:140] <= 1).all()
    assert not reads[:, :, 140:].any()
    assert (attend.reads["tail"] == 1).all()


def test_quantize_pack_tail_reads_and_writes_once(emulator):
    fmt = format_of("int4-srft:recent=16", 128)
    k, v = transposed(1, 2, 1, 128), transposed(1, 2, 1, 128, seed=1)
    fused.quantize_pack(k, v, fmt, tail_of(fmt, 1, 2, 16), 16)
    counters = reads_once(emulator)
    assert counters.bytes_written["rows"] == 2 * 4 * fmt.layout.words
    assert counters.unwritten["rows"] == 0
    (name,) = (n for n in counters.unwritten if n != "rows")
    assert counters.unwritten[name] == 0
    assert counters.bytes_written[name] == 2 * 16 * 2 * 256
