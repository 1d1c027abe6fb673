"""mlx_kvq doctor: with kernels (in the emulator), without a GPU, with a kernel that is wrong; and
its report."""

import argparse
import os
import platform
import re
import socket
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_kvq import ops
from mlx_kvq.cli import main
from mlx_kvq.commands import doctor, doctor_report
from mlx_kvq.commands import doctor_checks as checks
from mlx_kvq.commands import doctor_figures as figures
from mlx_kvq.format.format import make_format
from mlx_kvq.format.spec import Spec
from mlx_kvq.ops import compiling, cubins, memo, passed
from mlx_kvq.ops import gpu as fused
from mlx_kvq.ops.gpu import quantize, tuning
from tests.emulator import emulated
from tests.support import calls, compiled

ARGS = argparse.Namespace(seed=3, report=None, overwrite=False)
KERNELS = [compiling.Compiled("attend_store tail", 0.25), compiling.Compiled("combine", 0.5)]
ROWS = [
    {"op": "attend", "heads": "12 q", "tokens": 1024, "cache": "fp16", "us": 40.0, "x_fp16": [1]},
    {"op": "attend", "heads": "12 q", "tokens": 1024, "cache": "int4", "us": 20.0, "x_fp16": [2.0]},
]


@pytest.fixture
def few(monkeypatch):
    """Two cases and a format, short; what is timed is given."""
    both = [
        ("int4-srft", 64, 4, 2, mx.bfloat16, True),
        ("int8-srft", 32, 2, 1, mx.float16, False),
    ]
    monkeypatch.setattr(checks, "EVERY", both)
    monkeypatch.setattr(doctor, "CPU_CASES", both)
    monkeypatch.setattr(checks, "MORE", [("int4-srht", 64, 2, 1, mx.bfloat16, False)])
    monkeypatch.setattr(checks, "TOKENS", 64)
    monkeypatch.setattr(checks, "REPEATS", 1)
    monkeypatch.setattr(figures, "compiled", lambda: KERNELS)
    monkeypatch.setattr(figures, "replayed", lambda: (True, 0.2, 0.1))
    monkeypatch.setattr(figures, "beside_fp16", lambda contexts: iter([ROWS]))


TOTAL = 26 + 28 + 5  # variants of the two cases; calibrated values know no sinks; a format


def test_all_kernels_pass(few, capsys):
    with emulated("fast"):
        assert doctor.run(ARGS) == 0
    out = capsys.readouterr().out
    assert out.startswith("```\nmlx_kvq ") and out.endswith("\n```\n")  # one block
    assert "backend    metal" in out and "FAIL" not in out
    assert f"{TOTAL} of {TOTAL} passed" in out
    lines = {line[:30].strip(): line[30:].split() for line in out.splitlines()}
    assert {"attend, L=8, starts, window", "attend, ring", "keep, token"} <= lines.keys()
    assert all(0 < float(x) < 1e-2 for x in lines["attend, one split"][:2])
    assert lines["attend, sinks"][0] == "-"
    assert "     250.0  attend_store tail" in out and "     750.0  2 kernels" in out
    assert "the same bits; a layer's step 0.200 ms called, 0.100 replayed" in out
    assert "attend    12 q, 1024 tokens: fp16 40.0, int4 20.0, 2.00 x" in out
    assert "estimate_apple" in out and "not run: weights of a real model" in out


def test_every_kernel_of_metal_is_run(few):
    with emulated("fast") as e:
        doctor.run(ARGS)
    names = {c.kernel.removeprefix("custom_kernel_kvq_").rpartition("_")[0] for c in e.counters}
    names = {name.partition("_0")[0] for name in names}
    for kernel in ("quantize_pack", "attend_finish", "attend_store", "combine", "dequantize"):
        assert any(name.startswith(kernel) for name in names), kernel
    assert any(name.startswith("restore") for name in names)


def test_a_wrong_kernel_fails_and_the_exit_status_says_it(few, capsys, monkeypatch):
    right = fused.attend
    monkeypatch.setattr(fused, "attend", lambda *a, **k: 1.05 * right(*a, **k))
    with emulated("fast"):
        assert doctor.run(ARGS) == 1
    failed = [x for x in capsys.readouterr().out.splitlines() if x.startswith("FAIL")]
    assert len(failed) == 14 + 16 + 2
    assert all(line.startswith("FAIL attend, ") for line in failed)
    said = re.search(r"error (\S+), at most 1e-02", failed[0])
    assert said is not None and float(said[1]) == pytest.approx(0.05, rel=0.2)


def test_a_wrong_tail_fails(few, capsys, monkeypatch):
    right = fused.quantize_pack

    def wrong(*args):
        rows, tail = right(*args)
        return rows, None if tail is None else 1.03 * tail

    monkeypatch.setattr(fused, "quantize_pack", wrong)
    with emulated("fast"):
        assert doctor.run(ARGS) == 1
    assert capsys.readouterr().out.count("RuntimeError: the exact tail is off by 3.") == 2 + 2 + 1


def test_a_kernel_that_raises_is_one_line(few, capsys, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no\nsuch function")

    monkeypatch.setattr(fused, "dequantize", broken)
    with emulated("fast"):
        assert doctor.run(ARGS) == 1
    assert capsys.readouterr().out.count("RuntimeError: no such function") == 2 + 2 + 1


def test_replayed_launches_that_differ_are_said(few, capsys, monkeypatch):
    monkeypatch.setattr(figures, "replayed", lambda: (False, 0.2, 0.1))
    with emulated("fast"):
        doctor.run(ARGS)
    assert "OTHER BITS: leave MLX_KVQ_REPLAY unset" in capsys.readouterr().out


def test_what_was_compiled_and_what_was_read_is_said_on_cuda(few, monkeypatch):
    monkeypatch.setattr(cubins, "record", cubins.Record(5, 2, 1.25))
    assert not any("of this process" in line for line in doctor.compile_lines())
    monkeypatch.setattr(doctor.ops, "language", lambda: "cuda")
    *_, line = doctor.compile_lines()
    assert line == "kernels of this process: 5 read from disk, 2 compiled in 1.2 s"


def test_a_part_that_fails_loses_nothing(few, capsys, monkeypatch):
    def broken():
        raise MemoryError("no room")

    monkeypatch.setattr(figures, "compiled", broken)
    with emulated("fast"):
        assert doctor.run(ARGS) == 1
    out = capsys.readouterr().out
    assert "FAIL compiled: MemoryError: no room" in out and f"{TOTAL} of {TOTAL} passed" in out
    assert "replayed launches: the same bits" in out


def test_without_a_gpu_only_the_reference_is_checked(few, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["doctor", "--seed", "3"])
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    assert "backend    reference" in out and "54 of 54 passed" in out
    assert "No kernel ran" in out and "Only the reference was checked" in out
    assert "not run: every kernel" in out and "replayed" not in out


def test_doctor_tries_kernels_anew(few, monkeypatch, tmp_path):
    monkeypatch.setenv("MLX_KVQ_CACHE", str(tmp_path))
    passed.add("a", "attend float16")
    doctor.run(ARGS)
    assert list(tmp_path.iterdir()) == []


def test_float64_is_nearer_to_the_reference_than_any_limit(monkeypatch):
    """In fp32 the reference agrees with it to 1e-5: each option of attention, a ring, a tail."""
    monkeypatch.setattr(checks, "RELATIVE", {mx.float32: 3e-5})
    monkeypatch.setattr(checks, "TOKENS", 100)
    monkeypatch.setattr(checks, "REPEATS", 1)
    cases = [("int4-srft", 64, 4, 2, mx.float32, c) for c in (True, False)]
    found = list(checks.check(1, cases))
    assert len(found) == 54 and [r for r in found if not r.passed] == []


def test_what_is_compiled_from_loading_to_the_twentieth_token():
    with compiled.compiling() as sources:
        found = figures.compiled()
    assert sorted(k.kernel for k in found) == [
        "attend_store starts tail first places", "attend_store tail first", "combine",
        "keep_exact", "quantize_pack feedback keeps", "quantize_pack feedback rotated",
        "restore chunk first",
    ]  # fmt: skip
    assert len(found) == sum(map(len, sources.values()))
    assert all(k.seconds >= 0 for k in found)


def test_what_is_noted_ends_with_the_block():
    fmt, k = make_format(Spec.parse("int4-srft"), 64), mx.zeros((1, 1, 3, 64))
    with emulated("fast"):
        mx.eval(fused.quantize_pack(k, k, fmt))
        before = dict(memo.launches)
        with compiling.noted() as found:
            for dtype in (mx.float32, mx.float16, mx.float32):
                mx.eval(fused.quantize_pack(k.astype(dtype), k, fmt))
        assert [x.kernel for x in found] == ["quantize_pack"] * 2  # one for each dtype
        assert memo.launches == before
        mx.eval(fused.quantize_pack(k.astype(mx.bfloat16), k, fmt))
        assert len(found) == 2


def test_replay_is_compared_and_the_environment_is_as_before(monkeypatch):
    monkeypatch.setenv("MLX_KVQ_REPLAY", "0")
    same, called, again = figures.replayed(2)
    assert same and called > 0 and again > 0
    assert os.environ["MLX_KVQ_REPLAY"] == "0"
    monkeypatch.delenv("MLX_KVQ_REPLAY")
    with figures.replay("1"):
        assert tuning.replays("metal")
    assert "MLX_KVQ_REPLAY" not in os.environ


def test_timings_beside_fp16():
    rows = next(figures.beside_fp16([32], rounds=1))
    assert [r["cache"] for r in rows] == ["fp16", "int4-srft"]
    line = doctor.timing(rows)
    assert line.startswith("attend    12 q / 2 kv, D = 128, 32 tokens: fp16 ") and line.endswith(
        " x"
    )


# ---- the report ---------------------------------------------------------------------------------
@pytest.fixture
def private(monkeypatch, tmp_path):
    """A home, a user and a machine with names that must not be in a report."""
    home = tmp_path / "Users" / "geheim"
    home.mkdir(parents=True)
    for name, value in {
        "HOME": home, "USER": "geheim", "LOGNAME": "geheim", "HOSTNAME": "tresor.local",
        "MLX_KVQ_CACHE": home / "kept", "SECRET_TOKEN": "hf_abc",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(socket, "gethostname", lambda: "tresor.local")
    monkeypatch.setattr(platform, "node", lambda: "Tresor")
    monkeypatch.chdir(home)
    return home


@pytest.fixture
def short(few, monkeypatch):
    monkeypatch.setattr(doctor_report, "CPU_CONTEXTS", [8, 16, 24])


def report(path, *more):
    with pytest.raises(SystemExit) as exit_:
        main(["doctor", "--seed", "3", "--report", str(path), *more])
    return exit_.value.code


def test_a_report_of_a_cpu_says_that_it_is_one(short, private, capsys):
    assert report("report.md") == 0
    assert "written to report.md" in capsys.readouterr().out
    text = Path("report.md").read_text()
    assert text.startswith("# mlx_kvq doctor: REDUCED report of a CPU")
    assert "54 of 54 passed" in text and text.endswith("Complete. Every check passed.\n")
    rows = [line for line in text.splitlines() if line.startswith(("| fp16", "| int4-srft"))]
    assert [row.split("|")[2].strip() for row in rows] == ["8", "8", "16", "16", "24", "24"]
    assert "peak MB of prefill" in text and "nan" not in text


def test_nothing_private_is_in_a_report(short, private, monkeypatch):
    def broken(*args, **kwargs):
        files = f"{private}/kernels/row.metal", os.__file__, ops.__file__
        raise RuntimeError(f"geheim@Tresor: tresor.local: cannot read {', '.join(files)}")

    monkeypatch.setattr(ops.plain, "dequantize", broken)
    monkeypatch.setattr(doctor_report, "_entries", broken)
    assert report("report.md") == 1
    text = Path("report.md").read_text()
    assert "(name)@(name): (name)" in text and "cannot read ~/kernels/row.metal" in text
    assert "failed: RuntimeError" in text and "Every check" not in text
    for word in ("geheim", "tresor", "hf_abc", str(private.parents[1]), str(Path.cwd())):
        assert word not in text.lower(), word
    assert str(Path(ops.__file__).parents[2]) not in text


def test_short_and_common_names_are_left(monkeypatch):
    for name in ("USER", "LOGNAME", "USERNAME", "HOSTNAME"):
        monkeypatch.setenv(name, {"USER": "root", "LOGNAME": "ab"}.get(name, "localhost"))
    monkeypatch.setattr(socket, "gethostname", lambda: "x")
    monkeypatch.setattr(platform, "node", lambda: "")
    monkeypatch.setattr(doctor_report.getpass, "getuser", lambda: "ab")
    said = "root, ab and x on localhost"
    assert doctor_report.public(said) == said


def test_a_report_replaces_no_file_unasked(short, private, capsys):
    Path("mine.md").write_text("mine")
    assert "mine.md exists: give another name, or --overwrite" in str(report("mine.md"))
    assert Path("mine.md").read_text() == "mine"
    assert "is a folder" in str(report("."))
    assert "The folder of none/report.md does not exist" in str(report("none/report.md"))
    assert report("mine.md", "--overwrite") == 0
    assert Path("mine.md").read_text().startswith("# mlx_kvq doctor")


def test_what_is_done_is_in_the_file_when_a_run_is_cut_off(short, private, monkeypatch):
    def stopped(bar):
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor_report, "_benchmark", stopped)
    assert report("report.md") == 130
    text = Path("report.md").read_text()
    assert "54 of 54 passed" in text and "Complete" not in text


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
    """Many tokens, and batches at D = 256, are other kernels: other compile-time constants."""
    fmt = make_format(Spec.parse("int4-srft"), 256)
    k, v = (mx.random.normal((2, 16, 80, 256)) for _ in "kv")
    q = mx.random.normal((2, 16, 1, 256))
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

    sizes = replace(tuning.TUNING["metal"], busy=32)
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
