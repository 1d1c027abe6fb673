"""MLX's own kernels, from the headers in its wheel, run in the emulator and agree with MLX.

Also: every builtin the emulator knows is one that those kernels call.
"""

import re
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import tests.emulator
from tests.emulator import run
from tests.emulator.arrays import to_mlx
from tests.emulator.mlx_kernels import KERNELS, mlx_source


def random(*shape, dtype=mx.float32):
    return mx.random.normal(shape, key=mx.random.key(7)).astype(dtype)


def close(found: np.ndarray, expected: mx.array, tolerance: float) -> bool:
    found = to_mlx(found, expected.dtype).astype(mx.float32)
    return bool(mx.allclose(found, expected.astype(mx.float32), rtol=tolerance, atol=tolerance))


TOLERANCE = {mx.float32: 1e-5, mx.float16: 2e-3, mx.bfloat16: 1e-2}
NAMES = {mx.float32: "float", mx.float16: "float16_t", mx.bfloat16: "bfloat16_t"}


@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.get)
@pytest.mark.parametrize("name, n", [("softmax_single_row", 509), ("softmax_looped", 1030)])
def test_softmax(name, n, dtype):
    x = random(3, n, dtype=dtype)
    source = mlx_source(
        "softmax.h", name, f"{NAMES[dtype]}, float, 4", "constant int SOFTMAX_N_READS = 4;\n"
    )
    # The looped one counts on all 32 SIMD groups: with fewer it reads what nobody wrote.
    threads = 160 if name == "softmax_single_row" else 1024
    grid = (3 * threads,)
    inputs = [x, np.int32(n)]
    out, counters = run(source, inputs, [x.shape], [dtype], grid, (threads,), max_threads=1024)
    assert close(out[0], mx.softmax(x, axis=-1, precise=True), TOLERANCE[dtype])
    assert counters.unwritten == {"out": 0}


def test_logsumexp():
    x = random(5, 200)
    source = mlx_source("logsumexp.h", "logsumexp", "float, float, 4")
    out, _ = run(source, [x, np.int32(200)], [(5,)], [mx.float32], (5 * 64,), (64,))
    assert close(out[0], mx.logsumexp(x, axis=-1), 1e-5)


@pytest.mark.parametrize("n", [64, 512])
def test_hadamard(n):
    x = random(4, n)
    source = mlx_source(
        "hadamard.h",
        "hadamard_n",
        f"float, {n}, 16, 4",
        '#define STEEL_PRAGMA_UNROLL _Pragma("clang loop unroll(full)")\n',
    )
    scale = np.float32(n**-0.5)
    out, _ = run(source, [x, scale], [x.shape], [mx.float32], (n // 16, 4), (n // 16,))
    assert close(out[0], mx.hadamard_transform(x), 1e-5)


@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.get)
def test_decode_attention(dtype):
    D, n, heads = 64, 77, 4
    q, k, v = random(1, heads, 1, D, dtype=dtype), random(1, 2, n, D), random(1, 2, n, D) * 2
    k, v = k.astype(dtype), v.astype(dtype)
    flags = ("has_mask", "query_transposed", "do_causal", "bool_mask", "float_mask", "has_sinks")
    source = mlx_source(
        "sdpa_vector.h",
        "sdpa_vector",
        f"{NAMES[dtype]}, {D}",
        "".join(f"constant bool {flag} = false;\n" for flag in flags),
    )
    none = np.int32(0)
    inputs = [q, k, v, np.int32(2), np.int32(n)]
    inputs += [np.uint64(s) for s in (n * D, D, n * D, D)]
    inputs += [np.float32(D**-0.5), mx.zeros(8, mx.bool_), mx.zeros(8, dtype)]
    inputs += [none, none, none, mx.zeros(8, dtype), none]
    grid, threads = (heads * 1024, 1, 1), (1024, 1, 1)
    out, counters = run(source, inputs, [q.shape], [dtype], grid, threads, max_threads=1024)
    expected = mx.fast.scaled_dot_product_attention(q, k, v, scale=D**-0.5)
    assert close(out[0], expected, TOLERANCE[dtype])
    # Both query heads of a KV head are threadgroups of their own, so keys are read twice.
    assert (counters.reads["keys"] == 2).all() and (counters.read_groups["keys"] == 2).all()


def test_every_builtin_is_used_by_mlx():
    folder = Path(tests.emulator.__file__).parent
    text = "".join((folder / f"metal{part}.h").read_text() for part in ("", "_math", "_simd"))
    known = set(re.findall(r"EMU_(?:UNARY|BINARY|SIMD|SHUFFLE)\((\w+), ", text))
    known |= set(re.findall(r"^EMU_INLINE [^;{(]*?\b(\w+)\(", text, re.M))
    known = {name for name in known if not name.startswith("emu_") and name != "name"}
    assert {"exp", "simd_sum", "threadgroup_barrier", "as_type", "fma"} <= known
    # bf16_math.h wraps the whole of Metal's library for bfloat: what is there exists, and need not
    # be used. `fast::divide` is a division, for which MLX writes an operator.
    wrapped = next(KERNELS.rglob("bf16_math.h")).read_text()
    assert "__metal_divide" in wrapped and "namespace fast" in wrapped
    used = "".join(p.read_text() for p in KERNELS.rglob("*.h") if p.name != "bf16_math.h")
    unused = [n for n in known if not re.search(rf"\b{n}\s*(?:<[^<>;]*>)?\(", used)]
    assert unused == ["divide"]
