"""The stand-in for mx.fast.metal_kernel, the cache of compiled kernels, other machines."""

import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

import tests.emulator
from mlx_kvq import ops
from mlx_kvq.ops import memo
from tests.emulator import KernelError, emulated, metal_kernel, toolchain

DOUBLE = "o[thread_position_in_grid.x] = 2 * a[thread_position_in_grid.x];"
LAUNCH = {
    "output_shapes": [(8,)],
    "output_dtypes": [mx.float32],
    "grid": (8, 1, 1),
    "threadgroup": (8, 1, 1),
}


def double(x):
    kernel = mx.fast.metal_kernel("double", ["a"], ["o"], source=DOUBLE)
    return kernel(inputs=[x], **LAUNCH)[0]


def test_emulated_replaces_and_restores():
    real = mx.fast.metal_kernel
    with emulated() as first:
        assert mx.array_equal(double(mx.arange(8.0)), 2 * mx.arange(8.0))
        with pytest.raises(ZeroDivisionError), emulated("checked") as second:
            double(mx.arange(8.0))
            raise ZeroDivisionError
        double(mx.arange(8.0))
    assert mx.fast.metal_kernel is real
    assert [len(x.counters) for x in (first, second)] == [2, 1]
    assert second.counters[0].reads and not first.counters[0].reads
    with pytest.raises(RuntimeError, match="Metal"):
        double(mx.arange(8.0))


def test_emulated_makes_the_package_believe_in_metal():
    def made():
        return memo.kernel("built", lambda: mx.fast.metal_kernel)

    outside = made()
    with emulated():
        assert ops.language() == "metal"
        assert made() is mx.fast.metal_kernel is not outside
    assert ops.language() is None
    assert made() is outside


def swallow(forget):
    with emulated() as e:
        bad = mx.fast.metal_kernel("bad", ["a"], ["o"], source=DOUBLE.replace("a[", "a[1 + "))
        with pytest.raises(KernelError):
            bad(inputs=[mx.zeros(8)], **LAUNCH)
        assert [error.kind for error in e.errors] == ["out of bounds"]
        if forget:
            e.errors.clear()


def test_a_swallowed_error_comes_out():
    with pytest.raises(KernelError, match="out of bounds"):
        swallow(forget=False)
    swallow(forget=True)


def test_lazy_inputs_and_use_in_a_graph():
    with emulated("checked"):
        x = mx.exp(mx.zeros((2, 8)))[1] + 1
        y = double(x).reshape(2, 4).sum(0)
    assert y.tolist() == [8] * 4


def test_source_is_what_mlx_prints(capfd, tmp_path):
    arguments = ("printed", ["a"], ["o"], DOUBLE, "inline int f() { return 1; }\n")
    options = {**LAUNCH, "template": [("N", 3), ("T", mx.float16)]}
    source = metal_kernel(*arguments).source([mx.zeros(8)], **options)
    real = mx.fast.metal_kernel(*arguments)
    path = str(tmp_path / "traced.mlxfn")
    mx.export_function(path, lambda x: real(inputs=[x], verbose=True, **options), mx.zeros(8))
    printed = capfd.readouterr().out.split("```")[1]
    assert source.strip() == printed.strip()
    assert "custom_kernel_printed" in source and "<3, float16_t>" in source


def test_verbose_prints_the_source(capfd):
    kernel = metal_kernel("printed", ["a"], ["o"], DOUBLE)
    kernel(inputs=[mx.zeros(8)], verbose=True, **LAUNCH)
    assert "[[kernel]] void custom_kernel_printed" in capfd.readouterr().out


def test_one_source_per_kind_of_input():
    kernel = metal_kernel("kinds", ["a"], ["o"], DOUBLE)
    for x in (mx.zeros(8), mx.zeros(9), mx.zeros((3, 4))):
        kernel(inputs=[x], **LAUNCH)
    assert len(kernel.sources) == 1
    with pytest.raises(KernelError, match="of a, which has 12 bytes"):
        kernel(inputs=[mx.zeros(3)], **LAUNCH)
    kernel(inputs=[mx.zeros(8, mx.int32)], **LAUNCH)
    assert len(kernel.sources) == 3


def test_compiled_kernels_are_kept(monkeypatch):
    source = "kernel source of this test only"
    folder = toolchain.cache_folder()
    made = []

    def make(where: Path, out: str):
        made.append(where)
        (where / out).write_bytes(b"object")

    path = toolchain._cached(source, make)
    try:
        assert path.parent == folder and path.read_bytes() == b"object"
        assert toolchain._cached(source, make) == path and len(made) == 1
        assert toolchain._cached(source + "!", make) != path and len(made) == 2
    finally:
        path.unlink()
        toolchain._cached(source + "!", make).unlink()
    assert not any(where.exists() for where in made)


def test_portable_build(tmp_path):
    """Without hand-written switching of lanes and without a CPU's half instructions."""
    here = Path(tests.emulator.__file__).parent
    chosen = "conversion or transpose or attributes or rounds or (planted and SIMD)"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen]
        + [str(here / f"test_emulator{part}.py") for part in ("", "_faults")],
        env={**os.environ, "MLX_KVQ_EMULATOR_PORTABLE": "1", "PYTHONPATH": str(here.parents[1])},
        cwd=here.parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "passed" in done.stdout
