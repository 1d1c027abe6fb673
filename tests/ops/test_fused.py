"""The fused kernels, run by the emulator, against the reference backend.

Every launch is checked: bounds, races, barriers, unwritten outputs, undefined arithmetic.
"""

import re
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_kvq import ops
from mlx_kvq.format import levels
from mlx_kvq.format.format import make_format
from mlx_kvq.format.rotation import real_fft
from mlx_kvq.format.spec import BITS, Spec
from mlx_kvq.format.transform import Calibration
from mlx_kvq.ops import gpu as fused
from mlx_kvq.ops import plain
from mlx_kvq.ops.gpu import arguments, attention, jit, machine, tables, tuning
from mlx_kvq.ops.gpu.sources import kernel_source, kernels_path
from tests.emulator import emulated
from tests.support import calls, op_matrix

# Of an output vector, relative to its largest channel: queries, probabilities and dequantized
# values are fp16 (2^-11) in the kernel; then the output is rounded (bf16: 2^-9).
TOLERANCE = {mx.float16: 2e-3, mx.bfloat16: 4e-3, mx.float32: 2e-3}

FORMATS = [
    # spec, Dk, Dv, what is calibrated
    ("int4-srft", 64, 64, ""),
    ("int4-srft", 80, 80, ""),
    ("int4-srft:group_size=24", 96, 96, ""),
    ("int4-srft", 112, 112, "mu lam"),
    ("int4-srft", 128, 128, ""),
    ("int4-srft:group_size=8", 72, 72, ""),
    ("int4-srft:group_size=64,scale=absmax", 192, 128, ""),
    ("int4-srft:scale=paper", 256, 256, ""),
    ("int8-srft", 128, 128, "mu sigma lam"),
    ("int8-srft:group_size=40,scale=paper", 80, 80, ""),
    ("k8v4-srft:group_size=16", 64, 128, "sigma"),
    ("int4-srht", 128, 128, "mu sigma"),
    ("int8-none:group_size=56", 112, 112, ""),
    ("int4-none:group_size=256", 256, 256, "lam"),
    ("int3-srft", 64, 64, "mu sigma lam"),
    ("int3-srft", 80, 80, ""),
    ("int3-srft:scale=paper", 96, 96, "mu"),
    ("int3-srft:group_size=16", 112, 112, ""),
    ("int3-srft", 128, 128, ""),
    ("int3-srft:group_size=64,scale=absmax", 256, 128, "lam"),
    ("int3-none:group_size=32", 192, 64, ""),
    ("k4v3-srft", 128, 128, ""),
    ("k4v3-srft", 80, 80, "mu sigma"),
    ("k4v3-srht:group_size=128,scale=paper", 128, 256, ""),
    ("k5v4-srft", 64, 64, ""),
    ("k5v4-srft", 80, 80, "mu sigma"),
    ("k5v4-srft:group_size=16", 112, 112, "lam"),
    ("k5v4-srft", 128, 128, "mu sigma lam"),
    ("k5v4-srft:group_size=32,scale=paper", 128, 256, ""),
    ("k5v4-none:scale=absmax", 256, 192, "mu"),
    ("int5-srft", 64, 64, ""),
    ("int5-srft", 80, 80, "mu"),
    ("int5-srft:scale=paper", 112, 112, ""),
    ("int5-srft:group_size=32", 128, 128, ""),
    ("int5-srht:scale=absmax", 256, 128, "sigma"),
    ("int5-none:group_size=48", 96, 96, ""),
]


@pytest.fixture
def emulator():
    with emulated("checked") as e:
        yield e


@pytest.fixture
def launches(monkeypatch):
    """Set launch sizes: ``launches(single=0)`` splits whatever can be split."""

    def change(**sizes):
        monkeypatch.setitem(tuning.TUNING, "metal", replace(tuning.TUNING["metal"], **sizes))
        ops.forget()

    yield change
    ops.forget()


def rng(*seed):
    return np.random.default_rng([7, *seed])


def normal(*shape, dtype=mx.float32, seed=0):
    return mx.array(rng(seed, *shape).standard_normal(shape).astype(np.float32)).astype(dtype)


def transposed(B, H, L, D, dtype=mx.float16, seed=0):
    """[B, H, L, D] with the strides that models hand over: [B, L, H, D] in memory."""
    return normal(B, L, H, D, dtype=dtype, seed=seed).swapaxes(1, 2)


def format_of(spec, Dk=128, Dv=None, what="", heads=2):
    Dv = Dk if Dv is None else Dv

    def calibration(D, seed):
        if not what:
            return None
        values = {
            "mu": 0.7 * normal(heads, D, seed=seed),
            "sigma": mx.exp(0.5 * normal(heads, D, seed=seed + 1)),
            "lam": mx.exp(0.3 * normal(heads, D, seed=seed + 2)),
        }
        return Calibration(*(values[n] if n in what.split() else None for n in values))

    return make_format(
        Spec.parse(spec), Dk, Dv, keys=calibration(Dk, 10), values=calibration(Dv, 20)
    )


def packed(fmt, B, H, T, spare=5):
    """Rows of random tokens, and behind them spare capacity full of NaN scales."""
    lay = fmt.layout
    k, v = normal(B, H, T, lay.k_dim, seed=1), normal(B, H, T, lay.v_dim, seed=2)
    rows = calls.quantize_pack(plain, k, v, fmt)
    full = mx.full((B, H, spare, lay.words), 0xFFFFFFFF, dtype=mx.uint32)
    return mx.concatenate([rows, full], axis=2)


def assert_attends(q, rows, length, fmt, **arguments):
    got = calls.attend(fused, q, rows, length, fmt, q.shape[-1] ** -0.5, **arguments)
    exact = q.astype(mx.float32)
    want = calls.attend(plain, exact, rows, length, fmt, q.shape[-1] ** -0.5, **arguments)
    assert (got.dtype, got.shape) == (q.dtype, want.shape)
    got, want = (np.array(x.astype(mx.float32)) for x in (got, want))
    error = np.abs(got - want) / np.abs(want).max(axis=-1, keepdims=True)
    assert error.max() <= TOLERANCE[q.dtype], f"off by {error.max():.2g}"
    return got


# ---- rotation ---------------------------------------------------------------------------------
@pytest.mark.parametrize("wide, hold", [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize("D", [32, 40, 64, 72, 80, 112, 128, 144, 192, 256])
def test_fft_in_a_simd_group(emulator, D, wide, hold):
    """One vector each way, against the matrix in float64."""
    body = """
      const uint lane = thread_index_in_simdgroup;
      float2 z[kvq::points_of(D)];
      const int before = kvq::first_channel<D, 0>(lane);
      const int after = 2 * kvq::points_of(D) * kvq::rotated_block<D, 0>(lane);
      for (int a = 0; a < kvq::points_of(D); a++) {
        const int c = BACK ? after + 2 * a : before + kvq::point_step(D, 0) * a;
        z[a] = float2(x[c], x[c + 1]);
      }
      kvq::lane_table<D> w;
      kvq::read_table<D, 0>(w, table, lane);
      if (BACK) kvq::rotate_back<D, 0>(z, w, table, lane);
      else kvq::rotate<D, 0>(z, w, table, lane);
      if (lane < uint(kvq::lanes_of(D))) {
        for (int a = 0; a < kvq::points_of(D); a++) {
          const int c = BACK ? before + kvq::point_step(D, 0) * a : after + 2 * a;
          y[c] = z[a].x;
          y[c + 1] = z[a].y;
        }
      }
    """
    header = f"enum : int {{ WIDE = {int(wide)}, HOLD_TABLES = {int(hold)} }};\n"
    header += "".join(kernel_source(f"{name}.metal") for name in ("machine", "rotate"))
    kernel = mx.fast.metal_kernel(
        name="fft", input_names=["x", "table"], output_names=["y"], source=body, header=header
    )
    x, table = normal(D, seed=D), mx.array(tables.rotation_table("srft", D, wide))
    F, exact = tables.stretch("srft", D) * real_fft(D), np.array(x).astype(np.float64)
    for back, want in ((False, F @ exact), (True, F.T @ exact)):
        (got,) = kernel(
            inputs=[x, table],
            template=[("D", D), ("BACK", back)],
            grid=(32, 1, 1),
            threadgroup=(32, 1, 1),
            output_shapes=[(D,)],
            output_dtypes=[mx.float32],
        )
        assert np.abs(np.array(got) - want).max() < 1e-6 * tables.stretch("srft", D)


@pytest.mark.parametrize("hold", [False, True])
def test_fft_by_swapping(emulator, hold):
    """Four vectors of a SIMD group, whose lanes are as many as a lane's points."""
    body = """
      const uint lane = thread_index_in_simdgroup;
      threadgroup float2 swap[4 * kvq::swap_points(128)];
      const int v = int(lane) / 8 * 128;
      float2 z[8];
      for (int a = 0; a < 8; a++) {
        const int c = v + kvq::first_channel<128, 0>(lane) + kvq::point_step(128, 0) * a;
        z[a] = float2(x[c], x[c + 1]);
      }
      kvq::lane_table<128> w;
      kvq::read_table<128, 0>(w, table, lane);
      kvq::rotate_swapping<128>(z, w, table, swap, lane);
      for (int a = 0; a < 8; a++) {
        const int c = v + 16 * kvq::rotated_block<128, 0>(lane) + 2 * a;
        y[c] = z[a].x;
        y[c + 1] = z[a].y;
      }
    """
    header = f"enum : int {{ WIDE = 0, HOLD_TABLES = {int(hold)} }};\n"
    header += "".join(kernel_source(f"{name}.metal") for name in ("machine", "rotate"))
    kernel = mx.fast.metal_kernel(
        name="swap", input_names=["x", "table"], output_names=["y"], source=body, header=header
    )
    x = normal(4, 128, seed=1)
    (got,) = kernel(
        inputs=[x, mx.array(tables.rotation_table("srft", 128, False))],
        grid=(32, 1, 1),
        threadgroup=(32, 1, 1),
        output_shapes=[x.shape],
        output_dtypes=[mx.float32],
    )
    want = np.array(x).astype(np.float64) @ real_fft(128).T * tables.stretch("srft", 128)
    assert np.abs(np.array(got) - want).max() < 1e-6 * tables.stretch("srft", 128)


# ---- quantize_pack and dequantize -------------------------------------------------------------
@pytest.mark.parametrize("spec, Dk, Dv, what", FORMATS)
def test_quantize_pack_and_dequantize(emulator, spec, Dk, Dv, what):
    fmt = format_of(spec, Dk, Dv, what)
    dtype = [mx.float16, mx.bfloat16, mx.float32][Dk % 3]
    k, v = transposed(2, 2, 5, Dk, dtype, seed=3), transposed(2, 2, 5, Dv, dtype, seed=4)
    got = np.array(calls.quantize_pack(fused, k, v, fmt))
    y, kept = (backend.quantize_pack(k, v, fmt, None, 5)[1] for backend in (plain, fused))
    in_bf16 = kept.dtype == mx.bfloat16
    step = 2**-7 if in_bf16 else 2e-6
    assert mx.abs((y - kept).astype(mx.float32)).max() <= step * mx.abs(y).max()
    want = plain.pack_rotated(kept, fmt)  # in bf16, y may have fallen to the other side of a tie
    words = np.array(want)
    # A code, or with its scale a group, may fall on the other side of a tie: more often in bf16.
    lay, off = fmt.layout, got != words
    differ = off.mean() * lay.words if in_bf16 else off.any(axis=(0, 1, 2)).sum()
    ties = in_bf16 and fmt.scale == "paper"  # where many numbers are on one exactly
    most = lay.words * (0.04 if ties else 0.02)
    assert differ <= most, f"{differ} of {lay.words} words of a row"
    length = 4
    for a, b in zip(
        calls.dequantize(fused, want, length, fmt, dtype),
        calls.dequantize(plain, want, length, fmt, dtype),
        strict=True,
    ):
        assert a.dtype == dtype
        assert mx.array_equal(a, b)


def strange(n) -> np.ndarray:
    """[1, 1, n, 64]: zeros, an outlier, below fp16's scales, beyond its largest, NaN, inf."""
    k = np.array(normal(1, 1, n, 64, seed=5))
    k[0, 0, 1] = 0
    k[0, 0, 2, 7] = 2e4
    k[0, 0, 3] *= 1e-7
    k[0, 0, 4] *= 1e-20
    k[0, 0, 5] *= 1e8
    k[0, 0, 6, 3] = np.nan
    k[0, 0, 7, 60] = -np.inf
    return k


@pytest.mark.parametrize(
    "spec",
    [
        "int4-srft", "int8-srft", "int4-none:scale=paper", "int8-none", "int4-none",
        "int3-srft", "int3-none", "int3-none:scale=paper", "k4v3-srft:group_size=64",
        "k5v4-srft", "int5-none", "int5-none:scale=paper",
    ],
)  # fmt: skip
def test_quantize_strange_vectors(emulator, spec):
    """Zeros, an outlier, values below fp16's scales, beyond its largest, NaN, inf."""
    fmt = format_of(spec, 64)
    k = strange(8)
    k, v = mx.array(k), mx.array(k[..., ::-1].copy())
    got, want = calls.quantize_pack(fused, k, v, fmt), calls.quantize_pack(plain, k, v, fmt)
    # Which NaN a damaged group's scale is depends on the platform.
    for a, b in zip(levels.split(got, fmt.layout), levels.split(want, fmt.layout), strict=True):
        assert mx.array_equal(a, b, equal_nan=a.dtype == mx.float16)


@pytest.mark.parametrize("sizes", [{}, {"pack_pairs": 2, "pack_threadgroups": 2}])
@pytest.mark.parametrize(
    "bits, D, group",
    [
        ("int4", 64, 32),
        ("int4", 96, 24),
        ("int3", 64, 32),
        ("k4v3", 96, 48),
        ("k5v4", 64, 32),
        ("int5", 96, 48),
    ],
)
def test_quantize_takes_any_strides_and_many_tokens(emulator, launches, sizes, bits, D, group):
    """Also where a SIMD group does several sets of tokens, and the last set is not whole."""
    launches(**sizes)
    fmt = format_of(f"{bits}-srft:group_size={group}", D)
    k = normal(1, 2, D, 77).swapaxes(2, 3)  # the last axis is not contiguous
    v = normal(2, 1, 77, 2 * D).swapaxes(0, 1)[..., D:]
    want = calls.quantize_pack(plain, k, v, fmt)
    assert mx.array_equal(calls.quantize_pack(fused, k, v, fmt), want)
    if sizes:
        assert emulator.counters[-1].threadgroups == 2  # one for each of the two heads


# ---- attend -----------------------------------------------------------------------------------
@pytest.mark.parametrize("spec, Dk, Dv, what", FORMATS)
def test_attend(emulator, launches, spec, Dk, Dv, what):
    fmt = format_of(spec, Dk, Dv, what)
    dtype = [mx.float16, mx.bfloat16, mx.float32][Dk % 3]
    rows = packed(fmt, 1, 2, 150)
    q = transposed(1, 6, 2, Dk, dtype, seed=6)
    whole = assert_attends(q, rows, 150, fmt, mask="causal")
    launches(single=0)
    parts = assert_attends(q, rows, 150, fmt, mask="causal")
    assert emulator.counters[-1].kernel.startswith("custom_kernel_kvq_combine")
    assert np.abs(whole - parts).max() <= TOLERANCE[dtype] * np.abs(whole).max()


@pytest.mark.parametrize("spec, Dk, Dv, what", FORMATS)
def test_what_cuda_holds_in_registers(emulator, launches, spec, Dk, Dv, what):
    """The same results as by the choices for Metal, on which all other tests run."""
    fmt = format_of(spec, Dk, Dv, what)
    lay = fmt.layout
    k, v = normal(1, 2, 60, Dk, seed=1), normal(1, 2, 60, Dv, seed=2)
    q, tail = transposed(1, 4, 2, Dk), normal(1, 2, fmt.recent + 1, Dk + Dv, seed=3)
    tables = "hold_tables", "hold_queries", "prefetch"

    def results(hold):
        launches(single=0, slice_values=not hold, vector_rows=4, **dict.fromkeys(tables, hold))
        rows, kept = fused.quantize_pack(k, v, fmt, None, 20)
        assert rows.shape == (1, 2, 60, lay.words)
        out = calls.attend(fused, q, rows, 60, fmt, Dk**-0.5, "causal")
        with_tail = calls.attend(fused, q, rows, 60, fmt, Dk**-0.5, "causal", tail=tail)
        one = calls.attend(fused, q[:, :, :1], rows, 60, fmt, Dk**-0.5, tail=tail)
        return [rows, kept, out, with_tail, one, *calls.restore(fused, rows, 60, fmt)]

    for i, (a, b) in enumerate(zip(results(True), results(False), strict=True)):
        # SIMD groups that share probabilities round them to fp16 beside another maximum.
        near = 0 if a.dtype == mx.uint32 else TOLERANCE[mx.float16] if i in (2, 3, 4) else 2e-6
        assert mx.allclose(a, b, rtol=0, atol=near * mx.abs(b).max().item()).item()


@pytest.mark.parametrize("gqa", [1, 2, 4, 6, 8, 16])
@pytest.mark.parametrize("L", [1, 2, 3, 4, 5, 6, 7, 8])
def test_attend_query_rows(emulator, gqa, L):
    fmt = format_of("int4-srft", 64)
    rows = packed(fmt, 2, 2, 40)
    q = transposed(2, 2 * gqa, L, 64, seed=gqa)
    mask = None if L % 2 else "causal"
    assert_attends(q, rows, 40, fmt, mask=mask)


@pytest.mark.parametrize("single", [0, 1023])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("mask", ["T", "LT", "B11T", "1H1T", "BHLT", "add LT", "add BHLT"])
def test_attend_masks_and_sinks(emulator, launches, mask, sinks, single):
    launches(single=single)
    fmt = format_of("int4-srft", 64, what="mu")
    B, H, L, T = 2, 4, 3, 150
    kind, axes = mask.split() if " " in mask else ("bool", mask)
    sizes = {"B": B, "H": H, "L": L, "T": T, "1": 1}
    shape = tuple(sizes[axis] for axis in axes)
    seen = rng(9).random(shape) < 0.6
    seen[..., 20:60] = False  # whole tiles
    added = np.where(seen, rng(8).standard_normal(shape), -np.inf).astype(np.float32)
    array = mx.array(seen) if kind == "bool" else mx.array(added).astype(mx.float16)
    logits = normal(H, dtype=mx.float16) if sinks else None
    q = transposed(B, H, L, 64)
    assert_attends(q, packed(fmt, B, 2, T), T, fmt, mask=array, sinks=logits)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 32, 33, 127, 128, 129, 300])
def test_attend_ragged_lengths(emulator, launches, length):
    fmt = format_of("int4-srft", 128)
    rows = packed(fmt, 1, 1, length)
    q = transposed(1, 4, 1, 128, seed=length)
    assert_attends(q, rows, length, fmt)
    launches(single=0)
    assert_attends(q, rows, length, fmt)


@pytest.mark.parametrize("single", [0, 1023])
@pytest.mark.parametrize("L", [1, 4])
@pytest.mark.parametrize("window", [None, 1, 30, 64, 1000])
@pytest.mark.parametrize("starts", [None, [0, 150], [37, 196]])
def test_attend_starts_and_window(emulator, launches, starts, window, L, single):
    launches(single=single)
    fmt = format_of("int4-srft", 64)
    rows = packed(fmt, 2, 2, 200)
    q = transposed(2, 4, L, 64)
    first = None if starts is None else mx.array(starts, dtype=mx.int32)
    assert_attends(q, rows, 200, fmt, mask="causal", starts=first, window=window)
    if window is not None and window >= L:
        assert_attends(q, rows, 200, fmt, starts=first, window=window)


def test_attend_reads_only_the_window(emulator):
    fmt = format_of("int4-srft", 128)
    rows = packed(fmt, 1, 1, 400)
    assert_attends(transposed(1, 4, 1, 128), rows, 400, fmt, mask="causal", window=40)
    read = emulator.counters[-1].reads["rows"].reshape(-1, 4 * fmt.layout.words)
    assert not read[:352].any()
    assert read[360:400].all()
    assert not read[400:].any()


@pytest.mark.parametrize("single", [0, 1023])
def test_a_query_that_may_attend_to_nothing_gets_zeros(emulator, launches, single):
    launches(single=single)
    fmt = format_of("int4-srft", 64)
    rows = packed(fmt, 1, 1, 100)
    q = transposed(1, 2, 2, 64)
    mask = np.ones((2, 100), bool)
    mask[1] = False
    out = calls.attend(fused, q, rows, 100, fmt, 0.1, mx.array(mask))
    assert mx.all(mx.isfinite(out)).item()
    assert not mx.any(out[:, :, 1] != 0).item()  # -0 is true to mlx 0.32.0
    want = calls.attend(plain, q, rows, 100, fmt, 0.1, mx.array(mask))
    assert mx.allclose(out[:, :, 0], want[:, :, 0], atol=2e-3).item()


def test_damage_shows_where_it_is_attended_to(emulator):
    fmt = format_of("int4-srft", 64)
    k = np.array(normal(1, 2, 90, 64, seed=1))
    k[0, 1, 70, 3] = np.nan
    rows = calls.quantize_pack(plain, mx.array(k), normal(1, 2, 90, 64, seed=2), fmt)
    q = transposed(1, 4, 1, 64)
    out = np.array(calls.attend(fused, q, rows, 90, fmt, 0.1).astype(mx.float32))
    assert np.isnan(out[0, 2:]).all()
    assert np.isfinite(out[0, :2]).all()
    assert np.isfinite(
        np.array(calls.attend(fused, q, rows, 64, fmt, 0.1).astype(mx.float32))
    ).all()


@pytest.mark.parametrize("size", [1e-5, 1e-3, 3e4, 1e6])
@pytest.mark.parametrize(
    "spec",
    [
        "int4-srft",
        "int8-srft",
        "int4-srft:group_size=16",
        "int3-srft:group_size=16",
        "int5-srft:group_size=16",
    ],
)
def test_values_of_any_size_survive_fp16_operands(emulator, spec, size):
    """Scales beyond 2^8 and below 2^-10: fp16 would overflow, or keep few bits."""
    fmt = format_of(spec, 64)
    k, v = normal(1, 1, 80, 64, seed=1), size * normal(1, 1, 80, 64, seed=2)
    rows = calls.quantize_pack(plain, size * k, v, fmt)
    assert_attends(normal(1, 2, 1, 64) / size, rows, 80, fmt)


def test_more_splits_than_tiles(emulator, monkeypatch):
    """A threadgroup without a tile writes an empty partial sum."""
    monkeypatch.setattr(attention, "splits", lambda *_: 7)
    fmt = format_of("int4-srft", 64)
    assert_attends(transposed(1, 2, 1, 64), packed(fmt, 1, 1, 50), 50, fmt)
    assert emulator.counters[-2].threadgroups == 7


def test_the_buffer_may_be_a_view(emulator):
    fmt = format_of("int4-srft", 64)
    rows = packed(fmt, 3, 4, 40, spare=24)[1:, ::2]
    assert_attends(transposed(2, 4, 1, 64), rows, 40, fmt)
    k, v = calls.dequantize(fused, rows, 40, fmt, mx.float16)
    for a, b in zip((k, v), calls.dequantize(plain, rows, 40, fmt, mx.float16), strict=True):
        assert mx.array_equal(a, b)


# The first cases: test_ops.py has all of them on the reference, tests/support/check_gpu.py --matrix
# on a GPU.
@pytest.mark.parametrize(
    "case",
    [*op_matrix.CASES[:10], *[c for c in op_matrix.CASES[10:] if c.is_narrow][:8]],
    ids=str,
)
def test_op_matrix(emulator, case):
    op_matrix.check(fused, case, seed=1, fused=True)


@pytest.mark.parametrize("own_tiles", [2, 3])
@pytest.mark.parametrize(
    "spec, D, spare",
    [
        ("int4-srft", 64, 5), ("int4-srft", 128, 5), ("int4-srft", 128, 22), ("int4-srft", 80, 3),
        ("int4-srft", 256, 5), ("int8-srft", 128, 1), ("k8v4-srft:group_size=32", 64, 5),
        ("int4-srft:group_size=16", 96, 2), ("int3-srft", 128, 5),
    ],
)  # fmt: skip
def test_attend_as_on_cuda(emulator, launches, spec, D, spare, own_tiles):
    """Tiles are sent ahead, full ones and a last one, of heads that are aligned to 16 bytes and of
    others; fewer and more tiles than a SIMD group has in memory; queries are in registers."""
    launches(
        single=0, keys=32, short_keys=64, simd_groups=2, threadgroups=2, prefetch=True,
        own_tiles=own_tiles, hold_queries=True, hold_tables=True, slice_values=False, vector_rows=0,
    )  # fmt: skip
    fmt = format_of(f"{spec}{',' if ':' in spec else ':'}recent=3", D, what="mu")
    for length in (31, 130, 300):
        rows, q = packed(fmt, 1, 2, length, spare), transposed(1, 12, 1, D)
        tail, first = normal(1, 2, 12, 2 * D, seed=30), ops.First(normal(1, 2, 2, 2 * D), 2)
        assert_attends(q, rows, length, fmt)
        assert_attends(q, rows, length, fmt, tail=tail, first=first, window=length - 7)


@pytest.mark.parametrize("late, first", [(3.0, 260), (2e3, 260), (1.2e4, 260), (1.2e4, 288)])
@pytest.mark.parametrize("spec", ["int4-srft", "int8-srft", "int4-srft:group_size=16"])
def test_values_whose_size_changes_late(emulator, launches, spec, late, first):
    """Scales of values that are larger from tile to tile, and far larger from the ``first`` of the
    last ones on: sums are kept in other units then. A maximum that comes late, and one that grows
    little by little."""
    fmt, T = format_of(spec, 64), 320
    for growth in (0.1, 3.0):
        k, v = normal(1, 1, T, 64, seed=1), normal(1, 1, T, 64, seed=2)
        size = mx.where(mx.arange(T) < first, mx.linspace(1e-3, 1, T), late)[:, None]
        rows = plain.quantize_pack(k * mx.linspace(0.1, growth, T)[:, None], v * size, fmt)[0]
        for own_tiles in (1, 2):
            launches(
                vector_rows=0, prefetch=own_tiles > 1, own_tiles=own_tiles, simd_groups=2,
                short_keys=64 if own_tiles > 1 else 16,
            )  # fmt: skip
            q, tail = transposed(1, 8, 1, 64), late * normal(1, 1, 80, 128, seed=3)
            assert_attends(q, rows, T, fmt)
            assert_attends(
                q, rows, T, fmt, tail=mx.concatenate([tail[..., :64] / late, tail[..., 64:]], -1)
            )


@pytest.mark.parametrize("vector_rows", [0, 4])
def test_many_tokens_that_are_read_alike(emulator, launches, vector_rows):
    """The mean of values, of which little is left; all tokens of a head in one threadgroup."""
    launches(vector_rows=vector_rows)
    fmt = format_of("int4-srft", 128)
    rows, q = packed(fmt, 1, 1, 2048), 0.05 * normal(1, 4, 1, 128, seed=3)
    got = np.array(calls.attend(fused, q, rows, 2048, fmt, 0.1, parts=1))
    want = np.array(calls.attend(plain, q, rows, 2048, fmt, 0.1))
    error = np.linalg.norm(got - want, axis=-1) / np.linalg.norm(want, axis=-1)
    assert error.max() <= (2e-4 if vector_rows else 6e-4)


# ---- what a launch costs ----------------------------------------------------------------------
@pytest.mark.parametrize("prefetch, own_tiles", [(False, 1), (True, 1), (True, 2), (True, 3)])
@pytest.mark.parametrize(
    "spec, gqa", [*(("int4-srft", n) for n in (1, 4, 6, 8)), ("int3-srft", 6), ("k4v3-srft", 6)]
)
def test_attend_reads_each_row_once(emulator, launches, spec, gqa, prefetch, own_tiles):
    launches(single=0, prefetch=prefetch, own_tiles=own_tiles, vector_rows=0)
    fmt = format_of(spec, 128)
    rows = packed(fmt, 2, 2, 140)
    q = transposed(2, 2 * gqa, 1, 128)
    assert_attends(q, rows, 140, fmt)
    attend, _ = emulator.counters[-2:]
    reads = attend.reads["rows"].reshape(2, 2, -1, 4 * fmt.layout.words)
    assert (reads[:, :, :140] == 1).all()
    assert not reads[:, :, 140:].any()


@pytest.mark.parametrize("spec", ["int4-srft", "int8-srft", "int3-srft"])
@pytest.mark.parametrize("gqa", [1, 2, 3, 4])
def test_vectors_read_each_code_once(emulator, launches, spec, gqa):
    """Codes by one lane, narrow ones by two that are neighbours; scales, and the last row in place
    of rows that are not there, by the lanes that need them."""
    fmt = format_of(spec, 128)
    lay, length = fmt.layout, 300
    rows = packed(fmt, 2, 2, length)
    q = transposed(2, 2 * gqa, 1, 128)
    out = calls.attend(fused, q, rows, length, fmt, 0.1, parts=2)
    assert mx.allclose(out, calls.attend(plain, q, rows, length, fmt, 0.1), atol=2e-2).item()
    attend, _ = emulator.counters[-2:]
    assert "simdgroup_multiply_accumulate" not in attend.simd
    reads = attend.reads["rows"].reshape(2, 2, -1, 4 * lay.words)
    codes = 4 * (lay.k_words + lay.v_words)
    assert (reads[:, :, : length - 1, :codes] <= (2 if "3" in spec else 1)).all()
    assert (reads[:, :, :length] >= 1).all()
    assert not reads[:, :, length:].any()


@pytest.mark.parametrize(
    "spec, D", [("int4-srft", 128), ("int3-srft", 128), ("int3-srft", 112), ("k4v3-srft", 80)]
)
def test_quantize_pack_reads_and_writes_once(emulator, spec, D):
    """Also the zero halves behind odd numbers of high bits and of scales."""
    fmt = format_of(spec, D)
    k, v = transposed(1, 2, 5, D), transposed(1, 2, 5, D, seed=1)
    calls.quantize_pack(fused, k, v, fmt)
    (counters,) = emulator.counters
    assert (counters.reads["k"] == 1).all()
    assert (counters.reads["v"] == 1).all()
    assert counters.bytes_written["rows"] == 2 * 5 * 4 * fmt.layout.words
    assert counters.unwritten["rows"] == 0


def test_matrix_products_alone(emulator, monkeypatch):
    fmt = format_of("int4-srft", 128)
    rows, q = packed(fmt, 1, 2, 40), transposed(1, 8, 1, 128)
    products = []
    for asked in ("", "1", "0"):
        monkeypatch.setenv("MLX_KVQ_VECTOR", asked)
        assert_attends(q, rows, 40, fmt)
        products.append(any("multiply" in name for name in emulator.counters[-1].simd))
    assert products == [False, False, True]
    monkeypatch.setenv("MLX_KVQ_VECTOR", "no")
    with pytest.raises(ValueError, match="MLX_KVQ_VECTOR is 0, 1 or unset, got 'no'"):
        assert_attends(q, rows, 40, fmt)


def test_launches_and_threadgroups(emulator):
    """One launch for short contexts, two for long ones; at most 512 threads and 32 KB."""
    fmt = format_of("int4-srft", 128)
    rows = packed(fmt, 1, 2, 1100)
    for length, launched in ((10, 1), (128, 1), (300, 2), (1100, 2)):
        before = len(emulator.counters)
        mx.eval(calls.attend(fused, transposed(1, 4, 1, 128), rows, length, fmt, 0.1))
        assert len(emulator.counters) - before == launched
    for counters in emulator.counters:
        assert counters.threads <= 512 * counters.threadgroups
        assert counters.threadgroup_memory <= 32768


@pytest.mark.parametrize("spec", ["int4-srft", "int8-srft", "int3-srft"])
def test_vectors_fit_threadgroup_memory(emulator, spec):
    """At the largest heads, and the most of them."""
    fmt = format_of(spec, 256)
    mx.eval(calls.attend(fused, transposed(1, 8, 1, 256), packed(fmt, 1, 2, 40), 40, fmt, 0.1))
    counters = emulator.counters[-1]
    assert counters.threadgroup_memory <= 32768 and counters.threads == 256 * 2


def test_lengths_heads_and_splits_compile_nothing(emulator, launches):
    """But for the number of heads of a KV head, up to four, of which attend takes one token."""
    fmt = format_of("int4-srft", 64)
    rows = packed(fmt, 1, 2, 300)
    names = set()
    for length, gqa, L, window, mask in (
        (9, 5, 1, None, None),
        (300, 8, 1, 20, None),
        (170, 16, 3, None, "causal"),
        (200, 2, 3, None, "causal"),
    ):
        for single in (0, 1000):
            launches(single=single)
            calls.attend(
                fused, transposed(1, 2 * gqa, L, 64), rows, length, fmt, 0.1, mask, window=window
            )
    names = {counters.kernel for counters in emulator.counters}
    assert len(names) == 3  # attend with and without an end, combine
    q = transposed(1, 6, 1, 64)
    for length, window, parts in ((9, None, 1), (300, 20, 2), (170, None, 3)):
        calls.attend(fused, q, rows, length, fmt, 0.1, window=window, parts=parts)
    assert len({counters.kernel for counters in emulator.counters} - names) == 2


@pytest.mark.parametrize("machine", ["metal", "cuda"])
def test_threadgroup_memory_fits_for_every_format(machine):
    sizes, limit = tuning.TUNING[machine], {"metal": 32768, "cuda": 98304}[machine]
    for D in range(32, 257, 8):
        for bits in BITS:
            narrow = "3" in bits or "5" in bits
            if narrow and D % 16:
                continue
            for group in (16 if narrow else 8, D):
                lay = make_format(Spec(bits, "none", group_size=group), D).layout
                groups, keys, tiles = tuning.attend_shape(lay, sizes)
                assert groups >= 1
                assert keys in (16, 32, 64)
                assert 32 * groups <= 512
                all_of_it = tuning._memory(lay, sizes, keys, groups, tiles)
                assert all_of_it <= limit
                # Or MLX would not tell the driver, which allows 48 KB unasked.
                given = tuning.tile_bytes(lay, sizes, (groups, keys, tiles))
                others = all_of_it - 4 * tuning._tile_words(lay, sizes, keys, groups, tiles)
                assert given > 48000 or given + others <= 48 * 1024


@pytest.mark.parametrize(
    "capability, kilobytes", [((7, 5), 48), ((8, 0), 96), ((8, 9), 48), ((9, 0), 96), ((12, 0), 48)]
)
def test_gpus_with_less_threadgroup_memory(monkeypatch, capability, kilobytes):
    major, minor = capability
    info = {"compute_capability_major": major, "compute_capability_minor": minor}
    monkeypatch.setattr(machine, "language", lambda: "cuda")
    monkeypatch.setattr(mx, "device_info", lambda: info)
    sizes = machine.tuning()
    assert sizes.threadgroup_memory == kilobytes * 1024
    lay = make_format(Spec("int4", "srft"), 128).layout
    keys = 32 if kilobytes == 96 else 16
    assert tuning.attend_shape(lay, sizes) == (8, keys, 2)


# ---- refusals and sources ---------------------------------------------------------------------
def test_why_not():
    assert fused.why_not(format_of("int4-srft", 128), mx.float16) is None
    assert "512" in fused.why_not(format_of("int4-srft", 512))
    assert "88" in fused.why_not(format_of("int4-srft", 88))
    assert "float64" in fused.why_not(format_of("int4-srft", 128), mx.float64)
    assert ops.language() is None  # the tests run on the CPU
    with pytest.raises(RuntimeError, match="GPU"):
        calls.quantize_pack(
            fused, normal(1, 1, 1, 64), normal(1, 1, 1, 64), format_of("int4-srft", 64)
        )


# SIMD-group, threadgroup and type vocabulary that the kernels may use: machine.cuh has all of it.
VOCABULARY = {
    "simd_shuffle", "simd_shuffle_xor", "simd_sum", "simd_max", "simd_any",
    "simdgroup_barrier", "threadgroup_barrier", "thread_index_in_simdgroup",
    "simdgroup_index_in_threadgroup", "threadgroup_position_in_grid", "threadgroups_per_grid",
    "thread_position_in_threadgroup",
}  # fmt: skip


def test_the_cuda_prelude_has_the_kernels_vocabulary():
    used = set()
    for path in kernels_path().glob("*.metal"):
        if path.stem != "machine":
            text = re.sub(r"//.*", "", path.read_text())
            used |= set(re.findall(r"\b(?:simd|simdgroup|thread|threads|threadgroups?)_\w+", text))
    assert used == VOCABULARY
    prelude = kernel_source("machine.cuh")
    assert [word for word in VOCABULARY if word not in prelude] == []


@pytest.mark.parametrize("name", jit.KERNELS)
def test_kernels_read_their_integers_by_name(name):
    """Each name of the host's list is read, and nothing else, least of all by number."""
    _, bodies, inputs, _ = jit.KERNELS[name]
    files = [b if "." in b else f"{b}.metal" for b in bodies]
    text = re.sub(r"//.*", "", "".join(map(kernel_source, files)))
    array = "keep" if "keep" in inputs else "info"
    read = set(re.findall(rf"\b{array}\[(.*?)\]", text))
    given = {f"kvq::{n}" for n in arguments.ARGUMENTS[name]}
    assert read == given


def test_integers_by_name():
    given = arguments.integers("quantize_pack", rows=7, kept=3)
    assert given.tolist() == [3, 7] and given.dtype == mx.int32
    names = arguments.enumeration("quantize_pack")
    assert names == "namespace kvq { enum : int { KEPT, ROWS, IS_ROTATED }; }\n"
    assert arguments.integers("quantize_pack", kept=3).tolist() == [3]
    for wrong in ({"kept": 3, "rows": 7, "length": 1}, {"rows": 7}, {"kept": 3, "length": 7}):
        with pytest.raises(ValueError, match="quantize_pack takes kept, rows, is_rotated, not .*$"):
            arguments.integers("quantize_pack", **wrong)


def test_bodies_use_threadgroup_only_to_declare():
    """In a body it is CUDA's __shared__, which no pointer or cast may carry."""
    for _, bodies, _, _ in jit.KERNELS.values():
        for name in bodies:
            text = kernel_source(name if "." in name else f"{name}.metal")
            for line in re.findall(r".*\bthreadgroup\b.*", re.sub(r"//.*", "", text)):
                assert re.fullmatch(r"threadgroup \w+ \w+(\[.*\])?;\s*", line), line


def test_headers_have_no_variables():
    """Metal wants them to be `constant`, which the emulator's compiler does not."""
    names = {
        "machine",
        "narrow",
        "feedback",
        *(name for headers, _, _, _ in jit.KERNELS.values() for name in headers),
    }
    for name in names:
        text = re.sub(r"//.*", "", kernel_source(f"{name}.metal"))
        found = re.findall(r"^\w[\w ]* \w+(?:\[.*\])? = .*", text, re.MULTILINE)
        assert not found, f"{name}.metal: {found}"
