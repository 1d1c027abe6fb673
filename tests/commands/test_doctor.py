"""mlx_kvq doctor: with kernels (in the emulator), without a GPU, with a kernel that is wrong."""

import argparse
from dataclasses import replace

import mlx.core as mx
import pytest

from mlx_kvq import ops
from mlx_kvq.cli import main
from mlx_kvq.commands import doctor
from mlx_kvq.format.format import make_format
from mlx_kvq.format.spec import Spec
from mlx_kvq.ops import gpu as fused
from mlx_kvq.ops.gpu import quantize, tuning
from tests.emulator import emulated
from tests.support import calls

ARGS = argparse.Namespace(seed=3)


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(doctor, "CASES", [("int4-srft", 64, 4, 2), ("int8-srft", 128, 2, 1)])
    monkeypatch.setattr(doctor, "LENGTHS", (1, 37))
    monkeypatch.setattr(doctor, "REPEATS", 1)


def test_all_kernels_pass(few, capsys):
    with emulated("checked"):
        assert doctor.run(ARGS) == 0
    out = capsys.readouterr().out
    assert "backend    metal" in out
    assert out.count("\nok ") == 20
    assert "20 of 20 passed" in out
    assert "FAIL" not in out


def test_a_wrong_kernel_fails_and_the_exit_status_says_it(few, capsys, monkeypatch):
    right = fused.attend
    monkeypatch.setattr(fused, "attend", lambda *a, **k: 1.05 * right(*a, **k))
    with emulated("checked"):
        assert doctor.run(ARGS) == 1
    out = capsys.readouterr().out
    assert "12 of 20 passed" in out
    failed = [line[5:19].strip() for line in out.splitlines() if line.startswith("FAIL")]
    assert failed == ["attend", "attend, masks"] * 4


def test_a_wrong_tail_fails(few, capsys, monkeypatch):
    right = fused.quantize_pack

    def wrong(*args):
        rows, tail = right(*args)
        return rows, None if tail is None else 1.01 * tail

    monkeypatch.setattr(fused, "quantize_pack", wrong)
    with emulated("checked"):
        assert doctor.run(ARGS) == 1
    assert capsys.readouterr().out.count("RuntimeError: the exact tail is off by 1.0e-02") >= 2


def test_a_kernel_that_raises_is_one_line(few, capsys, monkeypatch):
    def broken(*args):
        raise RuntimeError("no\nsuch function")

    monkeypatch.setattr(fused, "dequantize", broken)
    with emulated("checked"):
        assert doctor.run(ARGS) == 1
    assert capsys.readouterr().out.count("RuntimeError: no such function") == 4


def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["doctor"])
    assert exit_.value.code == 0
    assert "backend    reference" in capsys.readouterr().out


# ---- the choice of a backend --------------------------------------------------------------------
def arrays(fmt, dtype=mx.float16):
    D = fmt.layout.k_dim
    return tuple(mx.random.normal((1, 1, 3, D)).astype(dtype) for _ in "kv")


def test_reference_can_be_forced(monkeypatch):
    fmt = make_format(Spec.parse("int4-srft"), 64)
    with emulated("fast"):
        assert ops.backend(fmt) is fused
        monkeypatch.setenv("MLX_KVQ_BACKEND", "reference")
        assert ops.backend(fmt) is ops.plain
        monkeypatch.setenv("MLX_KVQ_BACKEND", "metal")
        with pytest.raises(ValueError, match="'reference' or unset, got 'metal'"):
            ops.backend(fmt)


def test_an_unsupported_head_size_falls_back_with_one_line(capsys):
    fmt = make_format(Spec.parse("int4-srft"), 88)
    with emulated("fast") as e:
        for _ in range(2):
            rows = calls.quantize_pack(ops, *arrays(fmt), fmt)
            mx.eval(rows)
        assert not e.counters
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("[mlx_kvq]")
    assert "88" in line


def test_a_kernel_that_does_not_compile_falls_back_with_one_warning(capsys, monkeypatch):
    fmt = make_format(Spec.parse("int4-srft"), 64)
    k, v = arrays(fmt)
    expected = calls.quantize_pack(ops, k, v, fmt)

    def broken(*args, **kwargs):
        raise RuntimeError("program_source:12: error: no matching function")

    with emulated("fast"):
        monkeypatch.setattr(fused, "quantize_pack", broken)
        for _ in range(2):
            assert mx.array_equal(calls.quantize_pack(ops, k, v, fmt), expected)
    (line,) = capsys.readouterr().err.splitlines()
    assert "warning: the quantize_pack kernel failed on this machine" in line
    assert "no matching function" in line
    assert "mlx_kvq doctor" in line


def test_what_compiles_for_a_token_is_tried_again_for_a_prompt(capsys, monkeypatch):
    """Many tokens, and batches, are other kernels: other compile-time constants."""
    fmt = make_format(Spec.parse("int4-srft"), 64)
    k, v = (mx.random.normal((2, 16, 80, 64)) for _ in "kv")
    q = mx.random.normal((2, 16, 1, 64))
    rows = calls.quantize_pack(ops, k, v, fmt)
    pack, attend = fused.quantize_pack, fused.attend

    def only_few(k, v, fmt, *more):
        if quantize.pairs(fmt.kind, k.shape[2], tail=False) > 1:
            raise RuntimeError("too many registers")
        return pack(k, v, fmt, *more)

    def only_one(q, *args):
        if q.shape[0] > 1:
            raise RuntimeError("too much threadgroup memory")
        return attend(q, *args)

    sizes = replace(tuning.TUNING["metal"], busy=32, busy_sizes=(32, 4, 0))
    monkeypatch.setitem(tuning.TUNING, "metal", sizes)
    with emulated("fast"):
        monkeypatch.setattr(fused, "quantize_pack", only_few)
        monkeypatch.setattr(fused, "attend", only_one)
        mx.eval(calls.quantize_pack(ops, k[:, :, :1], v[:, :, :1], fmt))
        mx.eval(calls.attend(ops, q[:1], rows[:1], 70, fmt, 0.1))
        assert not capsys.readouterr().err
        assert mx.array_equal(calls.quantize_pack(ops, k, v, fmt), rows)
        mx.eval(calls.attend(ops, q, rows, 70, fmt, 0.1))
    first, second = capsys.readouterr().err.splitlines()
    assert "quantize_pack kernel failed" in first and "registers" in first
    assert "attend kernel failed" in second and "threadgroup memory" in second
