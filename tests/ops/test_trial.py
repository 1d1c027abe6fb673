"""A kernel's first use on a machine, in the emulator: compared with plain operations, once for each
set of compile-time constants."""

import mlx.core as mx
import pytest

from mlx_kvq import ops
from mlx_kvq.format.format import make_format
from mlx_kvq.format.spec import Spec
from mlx_kvq.format.transform import Calibration
from mlx_kvq.ops import gpu, plain
from tests.emulator import emulated
from tests.support import calls

SPEC = Spec.parse("int4-srft")


def layers(n):
    """Formats of layers that differ in the numbers of their calibration alone."""
    mus = [mx.random.normal((2, 64)) for _ in range(2 * n)]
    return [
        make_format(SPEC, 64, keys=Calibration(mu=a), values=Calibration(mu=b))
        for a, b in zip(mus[::2], mus[1::2], strict=True)
    ]


def step(fmt):
    """What a layer asks of the operations for a prompt and a token."""
    k, q = mx.random.normal((1, 2, 20, 64)), mx.random.normal((1, 4, 1, 64))
    rows, tail = ops.quantize_pack(k, k, fmt, None, 16)
    out = calls.attend(ops, q, rows, 20, fmt, 0.125, tail=tail)
    restored = calls.restore(ops, rows, 20, fmt, mx.float32, tail)
    mx.eval(out, restored)
    return q, rows, tail, out, restored


WRONG = {
    "attend": lambda right: lambda *a: right(*a)[..., ::-1],
    "quantize_pack": lambda right: lambda *a: (right(*a)[0][..., ::-1], right(*a)[1]),
    "restore": lambda right: lambda *a: right(*a)[::-1],
}


@pytest.mark.parametrize("op", WRONG)
def test_a_kernel_with_a_wrong_layout_is_not_used(op, monkeypatch, capsys):
    """On zeros these would pass."""
    (fmt,) = layers(1)
    with emulated("fast"):
        monkeypatch.setattr(gpu, op, WRONG[op](getattr(gpu, op)))
        q, rows, tail, out, restored = step(fmt)
        want = calls.attend(plain, q, rows, 20, fmt, 0.125, tail=tail)
        assert mx.allclose(out, want, atol=1e-3)
        wanted = calls.restore(plain, rows, 20, fmt, mx.float32, tail)
        assert all(mx.allclose(a, b, atol=1e-3) for a, b in zip(restored, wanted, strict=True))
    (line,) = capsys.readouterr().err.splitlines()
    assert f"the {op} kernel failed on this machine (its results are wrong)" in line


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_large_centres_fail_no_kernel(dtype, capsys):
    """Of keys as in Qwen2.5: the trial's data lie around them, as the model's do."""
    mu = 300 * mx.random.normal((2, 64))
    given = Calibration(mu=mu, sigma=mx.exp(mx.random.normal((2, 64))))
    fmt = make_format(SPEC, 64, keys=given, values=given)
    k = (mu[None, :, None] + mx.random.normal((1, 2, 20, 64))).astype(dtype)
    q = mx.random.normal((1, 4, 1, 64)).astype(dtype)
    with emulated("fast") as e:
        rows, tail = ops.quantize_pack(k, k, fmt, None, 16)
        mx.eval(calls.attend(ops, q, rows, 20, fmt, 0.125, tail=tail))
        mx.eval(calls.restore(ops, rows, 20, fmt, dtype, tail))
        assert len(e.counters) >= 3
    assert not capsys.readouterr().err


def test_layers_of_one_kind_are_tried_once(monkeypatch):
    tried = []
    for op in WRONG:
        right = getattr(gpu, op)
        monkeypatch.setattr(gpu, op, lambda *a, op=op, right=right: tried.append(op) or right(*a))
    with emulated("fast"):
        for fmt in layers(3):
            step(fmt)
    assert sorted(tried) == sorted(WRONG)


def test_a_trial_leaves_the_users_random_numbers_alone():
    (fmt,) = layers(1)
    found = []
    for _ in range(2):
        mx.random.seed(3)
        with emulated("fast"):
            step(fmt)
        found.append(mx.random.normal((4,)))
    mx.random.seed(3)
    step(fmt)  # on the CPU nothing is tried
    assert all(mx.array_equal(x, mx.random.normal((4,))) for x in found[:1])
    assert mx.array_equal(*found)
