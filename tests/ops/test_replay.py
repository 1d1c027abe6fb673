"""What replayed launches are handed, on any machine: a kernel that mixes all it gets stands in.
CUDA replays, Metal where MLX_KVQ_REPLAY asks for it.

That replayed launches compute the same on a GPU is checked there, by tests/support/check_gpu.py.
"""

import gc
import weakref
from types import SimpleNamespace

import mlx.core as mx
import pytest

from mlx_kvq import ops
from mlx_kvq.format.format import make_format
from mlx_kvq.format.spec import Spec
from mlx_kvq.format.transform import Calibration
from mlx_kvq.ops import gpu as fused
from mlx_kvq.ops import memo, trial
from mlx_kvq.ops.gpu import jit, machine, tuning
from mlx_kvq.ops.gpu.launch import Launch
from tests.support import calls


@pytest.fixture(params=["cuda", "metal"])
def gpu(request, monkeypatch):
    """fused believes in this machine; the kernels it makes are lazy sums of their inputs and
    launch. What was called is in ``.calls``, what was made in ``.kernels``."""
    calls = []

    def kernel(machine, name, constants):
        salt = float(hash((name, constants)) % 1000)

        def launch(inputs, grid, threadgroup, output_shapes, output_dtypes):
            calls.append(name)
            # No two element-wise operations in a row: on a CPU mx.compile would call a compiler.
            small = [a if a.dtype == mx.float32 else a % 1009 for a in inputs]
            sums = mx.stack([a.sum().astype(mx.float32) for a in small])
            sizes = mx.array([salt, 0.1 * grid[0], 0.01 * grid[1], threadgroup[0]])
            outputs = []
            for i, (shape, dtype) in enumerate(zip(output_shapes, output_dtypes, strict=True)):
                parts = mx.concatenate([sums, sizes, mx.array([i])])
                weights = [(n + 1) / a.size for n, a in enumerate(inputs)] + [1] * 5
                outputs.append(mx.broadcast_to((parts @ mx.array(weights)).astype(dtype), shape))
            return outputs

        return launch

    kernels = {}  # one object for one kernel, as jit.kernel keeps them

    def same(*key):
        return kernels.setdefault(key, kernel(*key))

    monkeypatch.setattr(machine, "language", lambda: request.param)
    monkeypatch.setenv("MLX_KVQ_REPLAY", "1" if request.param == "metal" else "")
    monkeypatch.setattr(jit, "kernel", same)
    monkeypatch.setattr(trial, "works", lambda *_: True)
    ops.forget()
    yield SimpleNamespace(calls=calls, kernels=kernels, machine=request.param)
    ops.forget()


def formats():
    """Two layers that are alike but for their calibration, and the plain one."""
    spec = Spec.parse("int4-srft")
    mus = (mx.random.normal((2, 64)) for _ in range(4))
    calibrated = [
        make_format(spec, 64, keys=Calibration(k), values=Calibration(v))
        for k, v in zip(mus, mus, strict=True)
    ]
    return [*calibrated, make_format(spec, 64)]


def launches(kind):
    return [x for x in memo.launches.values() if isinstance(x, kind)]


@pytest.mark.parametrize("starts, window", [(None, None), ([0, 3], None), (None, 300)])
def test_decode_steps_launch_what_plain_launches_do(gpu, starts, window):
    starts = None if starts is None else mx.array(starts, dtype=mx.int32)
    layers = formats()
    buffer = mx.random.randint(0, 1000, (2, 2, 2304, layers[0].layout.words)).astype(mx.uint32)
    seen = set()
    for length in (200, 500, 513, 514, 700, 1500, 513, 2300, 100):
        rows = buffer[:, :, : -(-length // 256) * 256]
        q = mx.random.normal((2, 6, 1, 64))
        for fmt in layers:
            options = {"starts": starts, "window": window}
            for _ in range(2):  # the first may prepare the step
                got = calls.attend(ops, q, rows, length, fmt, 0.1, **options)
            want = calls.attend(fused, q, rows, length, fmt, 0.1, **options)
            assert mx.array_equal(got, want), (length, options)
            seen.add(want[0, 0, 0, 0].item())
            one = mx.random.normal((2, 2, 1, 64))
            for _ in range(2):
                got = calls.quantize_pack(ops, one, 2 * one, fmt)
            assert mx.array_equal(got, calls.quantize_pack(fused, one, 2 * one, fmt))
    assert len(seen) > 20  # they do differ


@pytest.mark.parametrize("sinks", [False, True])
def test_replayed_and_called_launches_compute_the_same(gpu, sinks, monkeypatch):
    """At one split and at several, which are two launches on Metal. Sums of all that a launch is
    given differ if one array or size does."""
    fmt = formats()[0]
    rows = mx.random.randint(0, 1000, (1, 2, 4096, fmt.layout.words)).astype(mx.uint32)
    more = {"sinks": mx.random.normal((6,))} if sinks else {}
    steps = [(n, mx.random.normal((1, 6, 1, 64))) for n in (90, 90, 500, 800, 801, 3000, 801, 90)]
    found, launched = {}, {}
    for replay in "01":
        monkeypatch.setenv("MLX_KVQ_REPLAY", replay)
        ops.forget()
        gpu.calls.clear()
        found[replay] = [calls.attend(ops, q, rows, n, fmt, 0.1, **more) for n, q in steps]
        mx.eval(found[replay])
        launched[replay] = len(gpu.calls)
    assert all(mx.array_equal(a, b) for a, b in zip(found["0"], found["1"], strict=True))
    assert launched["1"] < launched["0"] == len(steps) + (5 if gpu.machine == "metal" else 0)
    assert ("combine" in gpu.calls) == (gpu.machine == "metal")


def test_the_switch_is_0_or_1(gpu, monkeypatch):
    monkeypatch.setenv("MLX_KVQ_REPLAY", "yes")
    ops.forget()
    fmt = formats()[0]
    with pytest.raises(ValueError, match="MLX_KVQ_REPLAY is 0, 1 or unset, got 'yes'"):
        calls.quantize_pack(ops, mx.zeros((1, 2, 1, 64)), mx.zeros((1, 2, 1, 64)), fmt)
    monkeypatch.setenv("MLX_KVQ_REPLAY", "")
    assert tuning.replays("cuda") and not tuning.replays("metal")


def test_layers_share_their_traces(gpu):
    layers = formats()[:2]
    rows = mx.zeros((1, 2, 1024, layers[0].layout.words), mx.uint32)
    q = mx.random.normal((1, 6, 1, 64))
    for fmt in layers:
        for length in (800, 801, 801):
            calls.attend(ops, q, rows, length, fmt, 0.1)
    assert len(launches(dict)) == 1  # not by layer
    traces = [key for key in memo.launches if isinstance(key[0], Launch)]
    # By splits, not by layer or length; on Metal store and combine.
    assert len(traces) == (1 if gpu.machine == "cuda" else 2)


def test_prefill_gets_every_output(gpu):
    fmt = formats()[0]
    rows = mx.random.randint(0, 1000, (1, 2, 300, fmt.layout.words)).astype(mx.uint32)
    for _ in range(2):
        k, v = calls.dequantize(ops, rows, 280, fmt, mx.float32)
        assert k.shape == v.shape == (1, 2, 280, 64)
        assert mx.array_equal(v, k + 1)  # the second output
        q = mx.random.normal((1, 4, 9, 64))
        assert calls.quantize_pack(ops, q[:, :2], q[:, :2], fmt).shape == (
            1,
            2,
            9,
            fmt.layout.words,
        )


@pytest.mark.parametrize("size", [3, 20])
def test_starts_launch_what_plain_launches_do(gpu, size):
    """With and without the first tokens in the tail."""
    k = mx.random.normal((2, 2, 9, 64))
    for fmt in formats():
        for _ in range(2):
            rows, tail, first = ops.pack_start(k, 2 * k, fmt, size, 16)
        want = fused.quantize_pack(k, 2 * k, fmt, None, size, 16)
        assert mx.array_equal(rows, want[0]) and mx.array_equal(tail, want[1])
        if size > 9:
            assert mx.array_equal(first, tail[:, :, 11 : 11 + fmt.first])
        else:
            begin = k[:, :, : fmt.first]
            assert mx.array_equal(first, fused.keep_exact(begin, 2 * begin, fmt, tail, fmt.first))


def test_a_launch_is_not_taken_on_another_device(gpu, monkeypatch):
    fmt = formats()[0]
    rows = mx.zeros((1, 2, 256, fmt.layout.words), mx.uint32)
    q = mx.random.normal((1, 4, 1, 64))
    for _ in range(2):
        calls.attend(ops, q, rows, 100, fmt, 0.1)
    assert len(launches(dict)) == 1
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu, 0))
    calls.attend(ops, q, rows, 100, fmt, 0.1)
    assert len(launches(dict)) == 2


def test_the_table_of_launches_has_an_end(gpu, monkeypatch):
    monkeypatch.setattr(memo, "MOST", 20)
    fmt = formats()[0]
    rows = mx.zeros((1, 2, 256, fmt.layout.words), mx.uint32)
    q = mx.random.normal((1, 4, 1, 64))
    for length in range(1, 100):
        got = calls.attend(ops, q, rows, length, fmt, 0.1)
        assert mx.array_equal(got, calls.attend(fused, q, rows, length, fmt, 0.1))
        assert len(memo.launches) <= 20


def test_what_is_known_of_a_format_goes_with_it(gpu):
    fmt = make_format(Spec.parse("int4-srft:recent=4"), 64, keys=Calibration(mx.zeros((2, 64))))
    k, q = mx.zeros((1, 2, 1, 64)), mx.zeros((1, 4, 1, 64))
    tail = mx.zeros((1, 2, 4, 128))
    for _ in range(2):
        rows, tail = ops.quantize_pack(k, k, fmt, tail, 4)
        calls.attend(ops, q, rows, 1, fmt, 0.1, tail=tail)
    assert len(launches(dict)) == 1
    gone = weakref.ref(fmt)
    del fmt
    gc.collect()
    assert gone() is None
