"""What the emulator counts, in kernels whose counts are known."""

import mlx.core as mx
import numpy as np
import pytest

from tests.emulator import Emulated, metal_kernel
from tests.emulator.arithmetic import classify


def count(source, mode="checked", threads=128, threadgroup=64, header=""):
    """Counters of a kernel on ``a``, 1024 uint32, that writes 1024 floats."""
    seen = Emulated()
    body = "const uint i = thread_position_in_grid.x, t = thread_position_in_threadgroup.x;\n"
    kernel = metal_kernel("count", ["a"], ["o"], body + source, header, mode=mode, seen=seen)
    kernel(
        inputs=[mx.arange(1024).astype(mx.uint32)],
        output_shapes=[(1024,)],
        output_dtypes=[mx.float32],
        grid=(threads, 1, 1),
        threadgroup=(threadgroup, 1, 1),
    )
    return seen.counters[0]


@pytest.mark.parametrize("mode", ["checked", "fast", "counted"])
def test_memory_and_synchronisation(mode):
    c = count(
        """
        threadgroup uint4 s[64];
        s[t] = ((const device uint4*)a)[i];
        threadgroup_barrier(mem_flags::mem_threadgroup);
        uint x = s[63 - t].x + simd_shuffle_xor(s[t].y, 1) + simd_sum(i);
        simdgroup_barrier(mem_flags::mem_none);
        o[i] = float(x);""",
        mode,
    )
    assert c.bytes_read == {"a": 128 * 16, "o": 0} and c.loads == {"a": 128, "o": 0}
    assert c.bytes_written == {"a": 0, "o": 128 * 4} and c.stores == {"a": 0, "o": 128}
    assert (c.threadgroup_bytes_written, c.threadgroup_bytes_read) == (128 * 16, 128 * 32)
    assert c.threadgroup_memory == 1024
    assert c.simd == {"simd_sum": 4, "simd_shuffle_xor": 4} and c.shuffles == 4
    assert (c.barriers, c.simdgroup_barriers, c.threads, c.threadgroups) == (2, 4, 128, 2)
    if mode == "fast":
        assert not c.reads and not c.unwritten
    else:
        assert c.unwritten == {"o": (1024 - 128) * 4}
        assert (c.reads["a"][: 128 * 16] == 1).all() and not c.reads["a"][128 * 16 :].any()


def test_how_often_a_byte_is_read():
    """Word 0 by every thread, word 1 + g by threadgroup g's first SIMD group, 9 + i by thread i."""
    c = count(
        """
        uint x = a[0] + a[9 + i];
        if (t < 32) x += a[1 + threadgroup_position_in_grid.x];
        o[i] = float(x);"""
    )
    words = slice(0, None, 4)
    reads, simd_groups, groups = (
        x["a"][words] for x in (c.reads, c.read_simdgroups, c.read_groups)
    )
    assert (reads[0], simd_groups[0], groups[0]) == (128, 4, 2)
    np.testing.assert_array_equal(reads[1:9], [32, 32] + [0] * 6)
    np.testing.assert_array_equal(simd_groups[1:9], [1, 1] + [0] * 6)
    np.testing.assert_array_equal(groups[1:9], [1, 1] + [0] * 6)
    assert (reads[9:137] == 1).all() and not reads[137:].any()
    assert (c.reads["a"].reshape(-1, 4) == reads[:, None]).all()


CASES = {
    "o[i] = metal::fma(x, x, 3.0f);": {"fma_f32": 1},
    "o[i] = x * x + 3.0f;": {"mul_f32": 1, "add_f32": 1},
    "o[i] = x / (x - 3.0f);": {"div_f32": 1, "add_f32": 1},
    "o[i] = metal::max(x, 3.0f);": {"compare_f32": 1},
    "o[i] = metal::fast::exp2(x) + metal::log(x);": {"exp": 1, "log": 1, "add_f32": 1},
    "o[i] = metal::rint(metal::floor(x) * 0.3f);": {"round": 2, "mul_f32": 1},
    "o[i] = metal::sqrt(metal::sin(-x));": {"sqrt": 1, "transcendental": 1, "sign": 1},
    "half h = half(x); o[i] = float(h * h);": {"convert": 2, "mul_f16": 1},
    "half2 h = half2(x, 2 * x); h = metal::fma(h, h, h); o[i] = float(h.x) + float(h.y);": {
        "mul_f32": 1,
        "convert": 4,
        "fma_f16": 2,
        "add_f32": 1,
    },
    "o[i] = as_type<float>((as_type<uint>(x) >> 3) & 0xf0f0u);": {"shift": 1, "bitwise": 1},
    "o[i] = as_type<float>(as_type<uint>(x) * 5 + 3);": {"mul_int": 1, "add_int": 1},
    "float4 y = float4(x, x, x, 1.0f) * x; o[i] = dot(y, y);": {"mul_f32": 8, "add_f32": 3},
    "o[i] = float(as_type<uint>(x) % 7);": {"div_int": 1, "convert": 1},
    # Eight nibbles of a word: the first needs no shift, the last no mask.
    """uint w = as_type<uint>(x);
    float s = 0.0f;
    for (int k = 0; k < 8; k++) s = metal::fma(x, float((w >> (4 * k)) & 15), s);
    o[i] = s;""": {"fma_f32": 8, "shift": 7, "bitwise": 7, "convert": 8},
}


@pytest.mark.parametrize("body", CASES)
def test_arithmetic(body):
    c = count("float x = as_type<float>(a[i]);\n" + body, "counted")
    # Conversions between widths are how i becomes an address.
    found = {name: n / 128 for name, n in c.arithmetic.items() if name != "extend"}
    assert found == CASES[body]


def test_arithmetic_counts_the_iterations():
    def at(n):
        loop = f"float x = 0; for (uint k = 0; k < a[{n}]; k++) x = metal::fma(x, x, 1.0f);"
        return count(loop + "o[i] = x;", "counted").arithmetic

    assert at(1)["fma_f32"] == 128 and at(100)["fma_f32"] == 12800
    # Not once, but in each of two launches alike.
    assert at(100) == at(100)


def test_arithmetic_only_in_counted_mode():
    source = "o[i] = float(a[i]) * 2.0f;"
    assert count(source, "counted").arithmetic["mul_f32"] == 128
    assert not count(source).arithmetic and not count(source, "fast").arithmetic


@pytest.mark.parametrize(
    "line, expected",
    [
        ("  %3 = fadd <4 x float> %1, %2, !dbg !3", ("add_f32", 4)),
        ("  %3 = fmul nnan half %1, %2", ("mul_f16", 1)),
        ("  %3 = add nuw nsw i64 %1, 4", ("int64", 1)),
        ("  %3 = or disjoint i32 %1, 4", ("bitwise", 1)),
        ("  %3 = icmp samesign ult i32 %1, 4", ("compare_int", 1)),
        ("  %3 = select i1 %0, <2 x half> %1, <2 x half> %2", ("select", 2)),
        ("  %3 = tail call noundef <2 x float> @llvm.fma.v2f32(<2 x float> %1)", ("fma_f32", 2)),
        ("  %3 = tail call i32 @llvm.umin.i32(i32 %1, i32 4)", ("compare_int", 1)),
        ("  tail call void @emu_access(i64 %1, i32 4, i32 5)", ("", 0)),
        ("  %3 = getelementptr inbounds float, ptr addrspace(1) %1, i64 %2", ("", 0)),
    ],
)
def test_classes_of_instructions(line, expected):
    assert classify(line) == expected
