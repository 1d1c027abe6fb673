"""Correct kernels give numpy's results, to the bit where Metal promises it."""

from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np
import pytest

from tests.emulator import KernelError, metal_kernel, run

I = "const uint i = thread_position_in_grid.x;\n"  # noqa: E741


def call(source, inputs, shape, dtype=mx.float32, grid=64, threadgroup=64, header="", **keywords):
    """One output of a kernel with inputs ``a``, ``b``, … and output ``o``."""
    options = {k: keywords.pop(k) for k in ("template", "init_value") if k in keywords}
    names = [chr(ord("a") + n) for n in range(len(inputs))]
    kernel = metal_kernel("test", names, ["o"], source, header, **keywords)
    grid, threadgroup = (
        (*x, 1, 1)[:3] if isinstance(x, tuple) else (x, 1, 1) for x in (grid, threadgroup)
    )
    return kernel(
        inputs=inputs,
        output_shapes=[shape],
        output_dtypes=[dtype],
        grid=grid,
        threadgroup=threadgroup,
        **options,
    )[0]


def lanes(op, x):
    """numpy's answer for one SIMD group's values, 32 of them."""
    shifted = np.arange(32)
    return {
        "simd_sum(x)": lambda: np.full(32, x.sum(dtype=x.dtype)),
        "simd_product(x)": lambda: np.full(32, x.prod(dtype=x.dtype)),
        "simd_max(x)": lambda: np.full(32, x.max()),
        "simd_min(x)": lambda: np.full(32, x.min()),
        "simd_prefix_inclusive_sum(x)": lambda: np.cumsum(x, dtype=x.dtype),
        "simd_prefix_exclusive_sum(x)": lambda: np.cumsum(x, dtype=x.dtype) - x,
        "simd_prefix_inclusive_product(x)": lambda: np.cumprod(x, dtype=x.dtype),
        "simd_shuffle(x, ushort(31 - i % 32))": lambda: x[::-1],
        "simd_shuffle_xor(x, 5)": lambda: x[shifted ^ 5],
        "simd_shuffle_up(x, 3)": lambda: np.concatenate([x[:3], x[:-3]]),
        "simd_shuffle_down(x, 3)": lambda: np.concatenate([x[3:], x[-3:]]),
        "simd_shuffle_and_fill_up(x, T(7), 2)": lambda: np.append([7, 7], x[:-2]),
    }[op]()


OPS = (
    "simd_sum(x)",
    "simd_product(x)",
    "simd_max(x)",
    "simd_min(x)",
    "simd_prefix_inclusive_sum(x)",
    "simd_prefix_exclusive_sum(x)",
    "simd_prefix_inclusive_product(x)",
    "simd_shuffle(x, ushort(31 - i % 32))",
    "simd_shuffle_xor(x, 5)",
    "simd_shuffle_up(x, 3)",
    "simd_shuffle_down(x, 3)",
    "simd_shuffle_and_fill_up(x, T(7), 2)",
)


@pytest.mark.parametrize("name", ["float32", "float16", "int32", "uint32", "int16", "uint16"])
def test_simd_functions(name):
    # Small integers, with few twos, so that sums and products are exact in every type.
    rng = np.random.default_rng(0)
    x = np.where(rng.random(64) < 0.15, 2, 1).astype(name)
    source = I + "T x = a[i];\n" + "".join(f"o[{k} * 64 + i] = {op};\n" for k, op in enumerate(OPS))
    dtype = getattr(mx, name)
    out = np.array(call(source, [mx.array(x)], (len(OPS), 64), dtype, template=[("T", dtype)]))
    for op, found in zip(OPS, out, strict=True):
        np.testing.assert_array_equal(found, np.append(lanes(op, x[:32]), lanes(op, x[32:])), op)


def test_simd_functions_of_vectors_and_conditions():
    source = (
        I
        + """
      float4 x = ((const device float4*)a)[i];
      float4 y = simd_shuffle_xor(simd_sum(x), 1);
      o[i] = y.x + y.w + (simd_any(i == 3) ? 1000.0f : 0.0f) + (simd_all(i < 32) ? 0.5f : 0.0f);"""
    )
    x = np.arange(256, dtype=np.float32).reshape(2, 32, 4)
    total = x.sum(1)
    expected = np.repeat(total[:, 0] + total[:, 3] + [1000.5, 0], 32)
    np.testing.assert_array_equal(call(source, [mx.array(x)], (64,)), expected)


def test_reduction_over_a_threadgroup():
    source = (
        I
        + """
      threadgroup float part[8];
      float s = simd_sum(a[i]);
      if (thread_index_in_simdgroup == 0) part[simdgroup_index_in_threadgroup] = s;
      threadgroup_barrier(mem_flags::mem_threadgroup);
      if (simdgroup_index_in_threadgroup == 0) {
        s = simd_sum(thread_index_in_simdgroup < 8 ? part[thread_index_in_simdgroup] : 0.0f);
        if (thread_index_in_simdgroup == 0) o[threadgroup_position_in_grid.x] = s;
      }"""
    )
    x = mx.arange(1024, dtype=mx.float32)
    out = call(source, [x], (4,), grid=1024, threadgroup=256)
    assert mx.array_equal(out, x.reshape(4, 256).sum(1))


@pytest.mark.parametrize("seed", range(3))
def test_transpose_through_threadgroup_memory(seed):
    source = """
      threadgroup T tile[16][17];
      uint2 at = uint2(thread_position_in_threadgroup.x, thread_position_in_threadgroup.y);
      uint2 corner = uint2(threadgroup_position_in_grid.x, threadgroup_position_in_grid.y) * 16;
      tile[at.y][at.x] = a[(corner.y + at.y) * 48 + corner.x + at.x];
      threadgroup_barrier(mem_flags::mem_threadgroup);
      o[(corner.x + at.y) * 32 + corner.y + at.x] = tile[at.x][at.y];"""
    x = mx.arange(32 * 48).reshape(32, 48).astype(mx.bfloat16)
    out = call(
        source, [x], (48, 32), x.dtype, (48, 32), (16, 16), template=[("T", x.dtype)], seed=seed
    )
    assert mx.array_equal(out, x.T)


def test_matrix_product():
    source = """
      const uint lane = thread_index_in_simdgroup;
      const uint at = ((lane / 4 & 4) + (lane / 2 & 3)) * 8 + (lane / 4 & 2) * 2 + (lane & 1) * 2;
      simdgroup_matrix<half, 8, 8> A, B;
      simdgroup_matrix<float, 8, 8> C;
      A.thread_elements() = *(const device half2*)(a + at);
      B.thread_elements() = *(const device half2*)(b + at);
      C.thread_elements() = float2(1.0f, 1.0f);
      simdgroup_multiply_accumulate(C, A, B, C);
      *(device float2*)(o + at) = C.thread_elements();"""
    rng = np.random.default_rng(0)
    x, y = rng.integers(-8, 8, (2, 8, 8)).astype(np.float16)
    out = call(source, [mx.array(x), mx.array(y)], (8, 8), grid=32, threadgroup=32)
    np.testing.assert_array_equal(out, (x @ y + 1).astype(np.float32))


def test_half_arithmetic_rounds_every_operation():
    rng = np.random.default_rng(0)
    x, y, z = rng.normal(size=(3, 4096)).astype(np.float16)
    out = call(
        I + "o[i] = a[i] * b[i] + c[i];", [*map(mx.array, (x, y, z))], (4096,), mx.float16, 4096
    )
    np.testing.assert_array_equal(np.array(out), x * y + z)


def test_half_fma_rounds_once():
    rng = np.random.default_rng(0)
    x, y, z = (rng.normal(size=(3, 8192)) * [[1], [1], [1e-3]]).astype(np.float16)
    # A sum just above or below a tie between two halves, by a term far smaller than either.
    x[:4096], y[:4096] = 1 + 2**-5, rng.integers(1, 64, 4096) * 2.0**-6
    z[:4096] = rng.choice([-1, 1], 4096) * 2.0**-24
    inputs = [*map(mx.array, (x, y, z))]
    out = call(I + "o[i] = fma(a[i], b[i], c[i]);", inputs, (8192,), mx.float16, 8192)
    exact = x.astype(np.float64) * y + z
    np.testing.assert_array_equal(np.array(out), exact.astype(np.float16))
    assert (exact.astype(np.float32).astype(np.float16) != exact.astype(np.float16)).any()
    pair = "((device half2*)o)[i] = fma(half2(a[i]), half2(b[i]), half2(c[i]));"
    out = call(I + pair, inputs, (8192, 2), mx.float16, 8192)
    np.testing.assert_array_equal(np.array(out)[:, 1], exact.astype(np.float16))


def awkward_floats():
    """Every sign and exponent, mantissas around the ties of half and bfloat, infinities, NaN."""
    high = np.arange(0, 1 << 16, 8, dtype=np.uint32) << 16
    low = np.array([0, 1, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    bits = (high[:, None] | low).reshape(-1)
    return np.append(bits, np.uint32([0x477FEFFF, 0x477FF000, 0x33000000, 0x33000001, 0xFFC00000]))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_conversion_from_float(dtype):
    x = awkward_floats().view(np.float32)
    n = len(x)
    given = mx.array(x)
    found = call(I + "o[i] = T(a[i]);", [given], (n,), dtype, n, template=[("T", dtype)])
    expected = given.astype(dtype)
    same = (found.view(mx.uint16) == expected.view(mx.uint16)) | (
        mx.isnan(found) & mx.isnan(expected)
    )
    assert same.all()


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_conversion_to_float(dtype):
    x = mx.arange(1 << 16).astype(mx.uint16).view(dtype)
    found = call(I + "o[i] = float(a[i]);", [x], x.shape, grid=1 << 16, threadgroup=512)
    assert mx.array_equal(found, x.astype(mx.float32), equal_nan=True)


def test_mathematics():
    functions = {
        "exp(x)": np.exp,
        "fast::exp2(x)": np.exp2,
        "precise::log(x)": np.log,
        "metal::sqrt(x)": np.sqrt,
        "rsqrt(x)": lambda x: 1 / np.sqrt(x),
        "floor(-x)": lambda x: np.floor(-x),
        "ceil(x)": np.ceil,
        "rint(x)": np.rint,
        "clamp(x, 1.0f, 2.0f)": lambda x: np.clip(x, 1, 2),
        "fma(x, x, 1.0f)": lambda x: x * x + 1,
        "min(x, 1.5f)": lambda x: np.minimum(x, 1.5),
        "fmax(x, NAN)": lambda x: x,
        "abs(-x)": np.abs,
        "select(x, -x, x > 1.0f)": lambda x: np.where(x > 1, -x, x),
        "(isnan(x) || isinf(x) || !isfinite(x)) ? 1.0f : 0.0f": np.zeros_like,
        "dot(float4(x), float4(1, 2, 3, 4))": lambda x: 10 * x,
        "as_type<float>(as_type<uint>(x) ^ 0x80000000u)": np.negative,
        "Limits<float>::finite_max * 0.0f + M_PI_F": lambda x: np.full_like(x, np.pi),
    }
    x = np.linspace(0.01, 3.3, 64, dtype=np.float32)
    body = "".join(f"o[{k} * 64 + i] = {name};\n" for k, name in enumerate(functions))
    out = call(I + "float x = a[i];\n" + body, [mx.array(x)], (len(functions), 64))
    for (name, function), found in zip(functions.items(), np.array(out), strict=True):
        np.testing.assert_allclose(found, function(x), rtol=3e-6, atol=1e-7, err_msg=name)


def test_vectors():
    source = (
        I
        + """
      uint4 w = ((const device uint4*)a)[i];
      float4 x = float4(w.x, float2(w.y, w.z), w.w) * 0.5f;
      half4 h = half4(x);
      int2 k = int2(float2(x.w, x.z));
      uchar4 bytes = as_type<uchar4>(w.x);
      ((device float4*)o)[i] = float4(h.wzyx) + float4(k.x, k.y, bytes.x, float(w.yx.y));"""
    )
    w = np.arange(32, dtype=np.uint32).reshape(8, 4)
    x = w * np.float32(0.5)
    extra = np.stack([x[:, 3] // 1, x[:, 2] // 1, w[:, 0] % 256, w[:, 0]], 1)
    out = call(source, [mx.array(w)], (8, 4), grid=8, threadgroup=8)
    np.testing.assert_array_equal(out, x[:, ::-1] + extra)


def test_thread_attributes():
    """In a grid that is no multiple of the threadgroup, in three dimensions."""
    grid, group = np.array([7, 5, 3]), np.array([4, 2, 2])
    names = ("thread_position_in_grid", "threadgroup_position_in_grid",
             "thread_position_in_threadgroup", "threads_per_threadgroup",
             "dispatch_threads_per_threadgroup", "threadgroups_per_grid", "threads_per_grid",
             "grid_size")  # fmt: skip
    scalars = ("thread_index_in_threadgroup", "thread_index_in_simdgroup",
               "simdgroup_index_in_threadgroup", "simdgroups_per_threadgroup",
               "threads_per_simdgroup", "thread_execution_width")  # fmt: skip
    stores = [f"p[{3 * k + d}] = {n}.{'xyz'[d]};" for k, n in enumerate(names) for d in range(3)]
    stores += [f"p[{24 + k}] = {n};" for k, n in enumerate(scalars)]
    source = """
      uint3 at = thread_position_in_grid;
      device uint* p = o + ((at.z * 5 + at.y) * 7 + at.x) * 30;
      """ + "\n".join(stores)
    out = np.array(call(source, [], (3, 5, 7, 30), mx.uint32, tuple(map(int, grid)), (4, 2, 2)))
    z, y, x = np.meshgrid(*(np.arange(n) for n in grid[::-1]), indexing="ij")
    at = np.stack([x, y, z], -1)
    inside, size = at % group, np.minimum(group, grid - at // group * group)
    vectors = [at, at // group, inside, size, *(np.broadcast_to(v, at.shape) for v in
               (group, -(-grid // group), grid, grid))]  # fmt: skip
    np.testing.assert_array_equal(out[..., :24], np.concatenate(vectors, -1))
    index = (inside[..., 2] * size[..., 1] + inside[..., 1]) * size[..., 0] + inside[..., 0]
    np.testing.assert_array_equal(out[..., 24], index)
    assert (out[..., 25] == index).all() and not out[..., 26].any()
    assert (out[..., 27:] == [1, 32, 32]).all()


VIEWS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(2, 0, 1),
    "sliced": lambda x: x[1:, ::2, 1:3],
    "reversed": lambda x: x[:, ::-1],
    "broadcast": lambda x: mx.broadcast_to(x[:, :1], x.shape),
}


@pytest.mark.parametrize("keep", [True, False], ids=["strides", "contiguous"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("view", VIEWS)
def test_strided_input(view, dtype, keep):
    x = VIEWS[view](mx.arange(2 * 6 * 4).reshape(2, 6, 4).astype(dtype))
    source = (
        I
        + """
      uint3 at = uint3(i / (a_shape[1] * a_shape[2]), i / a_shape[2] % a_shape[1], i % a_shape[2]);
      o[i] = a_ndim == 3 ? a[at.x * a_strides[0] + at.y * a_strides[1] + at.z * a_strides[2]]
                         : T(0.0f);"""
    )
    out = call(
        source,
        [x],
        x.shape,
        dtype,
        grid=x.size,
        template=[("T", dtype)],
        ensure_row_contiguous=not keep,
    )
    assert mx.array_equal(out, x)


@pytest.mark.parametrize("keep", [True, False])
def test_copy_is_made_unless_refused(keep):
    x = mx.arange(64).reshape(8, 8).T
    out = call(I + "o[i] = a[i];", [x], x.shape, mx.int32, ensure_row_contiguous=not keep)
    assert mx.array_equal(out, x.T if keep else x)


def test_small_inputs_templates_and_init_value():
    source = (
        I
        + """
      if (FLAG && i < 4) o[i] = T(a[i % 3]) + T(b) * N + T(c);"""
    )
    template = [("T", mx.float16), ("N", 3), ("FLAG", True)]
    inputs = [mx.array([1, 2, 3]), mx.array(0.5, mx.float16), 2]
    out = call(source, inputs, (6,), mx.float16, 6, template=template, init_value=-1)
    np.testing.assert_array_equal(out, [4.5, 5.5, 6.5, 4.5, -1, -1])
    off = call(source, inputs, (6,), mx.float16, 6, template=[*template[:2], ("FLAG", False)])
    assert mx.isnan(off).all()


def test_variables_that_nobody_set_are_nan():
    source = (
        I
        + """
      float x[4];
      for (uint k = 0; k < a[0]; k++) x[k] = 1.0f;
      o[i] = x[i % 4];"""
    )
    out = np.array(call(source, [mx.array([3] * 8)], (64,))).reshape(16, 4)
    assert (out[:, :3] == 1).all() and np.isnan(out[:, 3]).all()


def test_launches_from_several_threads():
    source = I + "float x = simd_sum(a[i]); o[i] = x + simd_sum(float(i));"
    x = [mx.full((64,), n) for n in range(8)]
    mx.eval(x)
    launch = {"output_shapes": [(64,)], "output_dtypes": [mx.float32]}
    launch |= {"grid": (64, 1, 1), "threadgroup": (32, 1, 1)}
    kernel = metal_kernel("threads", ["a"], ["o"], source)
    kernel.source([x[0]], **launch)
    sums = np.repeat([31 * 16, 31 * 16 + 1024], 32)

    def right(n):
        return all(
            (np.array(kernel(inputs=[x[n]], **launch)[0]) == 32 * n + sums).all() for _ in range(20)
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(right, range(8)))


def test_lanes_run_in_an_order_that_the_seed_chooses():
    source = I + "threadgroup uint s[1]; s[0] = i; o[i] = s[0];"
    ids = set()
    for seed in range(8):
        kernel = metal_kernel("order", ["a"], ["o"], source, mode="fast", seed=seed)
        out = kernel(
            inputs=[mx.zeros(8)],
            output_shapes=[(64,)],
            output_dtypes=[mx.uint32],
            grid=(64, 1, 1),
            threadgroup=(64, 1, 1),
        )[0]
        assert mx.array_equal(out, mx.arange(64))
    source = (
        I
        + """
      threadgroup uint s[1]; s[0] = i;
      threadgroup_barrier(mem_flags::mem_threadgroup);
      o[i] = s[0];"""
    )
    for seed in range(8):
        out = call(source, [mx.zeros(8)], (64,), mx.uint32, mode="fast", seed=seed)
        again = call(source, [mx.zeros(8)], (64,), mx.uint32, mode="fast", seed=seed)
        assert mx.array_equal(out, again)
        ids.add(out[0].item())
    assert len(ids) > 3


@pytest.mark.parametrize(
    "change, detail",
    [
        ({"inputs": []}, "no array for the input a"),
        ({"inputs": [np.zeros(8, np.float32)] * 2}, "more arrays"),
        ({"inputs": [np.zeros(8, np.int32)]}, "a is float, got int"),
        ({"output_shapes": [], "output_dtypes": []}, "1 outputs"),
        ({"grid": (0, 1, 1)}, "empty"),
    ],
)
def test_arrays_that_do_not_fit_the_source(change, detail):
    source = """[[kernel]] void test(
  const device float* a [[buffer(0)]],
  device float* o [[buffer(1)]],
  uint3 thread_position_in_grid [[thread_position_in_grid]]) {
  o[thread_position_in_grid.x] = a[thread_position_in_grid.x];
}"""
    good = {
        "inputs": [np.zeros(8, np.float32)],
        "output_shapes": [(8,)],
        "output_dtypes": [np.float32],
        "grid": (8,),
        "threadgroup": (8,),
    }
    assert run(source, **good)[0][0].tolist() == [0] * 8
    with pytest.raises(KernelError, match=detail):
        run(source, **{**good, **change})
    with pytest.raises(ValueError, match="mode is one of"):
        run(source, **good, mode="quick")
